//! An operator's work on a living cluster: disks added and removed, replicas moved and rebuilt, by the `ashlar` command
//! alone, while a client writes.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use ashlar_platform::sim::Rng;
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, binary, wait_until};
use serde_json::Value;

const BLOCKS: u64 = 2048;
const VOLUME: &str = "data";
/// Exit codes of docs/operations.md.
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const CONFLICT: i32 = 4;
const UNAVAILABLE: i32 = 5;

fn up(members: u32) -> Cluster {
    Cluster::up(ClusterSpec {
        members,
        disk_size: "512MiB",
        ..ClusterSpec::default()
    })
}

fn connect(export: &Export) -> NbdClient {
    NbdClient::connect_unix(export.socket(), VOLUME).unwrap()
}

/// Blocks and the stamps that they must have.
type Stamps = BTreeMap<u64, u64>;

/// Writes every block, and makes that durable.
fn fill(client: &mut NbdClient) -> Stamps {
    let stamps: Stamps = (0..BLOCKS).map(|block| (block, block + 1)).collect();
    for (&block, &stamp) in &stamps {
        client.write_stamp(block, stamp).unwrap();
    }
    client.flush().unwrap();
    stamps
}

fn check(client: &mut NbdClient, stamps: &Stamps) {
    for (&block, &stamp) in stamps {
        assert_eq!(client.read_stamp(block).unwrap(), stamp, "block {block}");
    }
}

/// A client that writes random blocks, and now and then reads one, until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Stamps>,
}

impl Load {
    fn start(mut client: NbdClient, mut stamps: Stamps) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut rng = Rng::new(7);
            let mut stamp = BLOCKS * 2;
            while !stopped.load(Ordering::Relaxed) {
                stamp += 1;
                let block = rng.below(BLOCKS);
                client.write_stamp(block, stamp).unwrap();
                stamps.insert(block, stamp);
                let block = rng.below(BLOCKS);
                assert_eq!(client.read_stamp(block).unwrap(), stamps[&block]);
            }
            client.flush().unwrap();
            stamps
        });
        Self { stop, thread }
    }

    /// Ends it; what every block must say now.
    fn stop(self) -> Stamps {
        assert!(!self.thread.is_finished(), "a request failed");
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// A command that must fail with this code, and say this, on standard error.
fn refused(cluster: &Cluster, args: &[&str], code: i32, says: &[&str]) {
    let output = cluster.ashlar(args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?} said: {said}");
    assert!(said.starts_with("error: "), "{args:?} said: {said}");
    for part in says {
        assert!(said.contains(part), "{args:?} said: {said}");
    }
}

/// `disk list`'s row of a disk, if there is one.
fn disk(cluster: &Cluster, id: &str) -> Option<Value> {
    let disks = cluster.json(&["disk", "list"]);
    let found = disks.as_array().unwrap().iter().find(|d| d["id"] == id);
    found.cloned()
}

fn used(cluster: &Cluster, id: &str) -> u64 {
    disk(cluster, id).unwrap()["used_bytes"].as_u64().unwrap()
}

/// The id of the only disk of a node that has but one.
fn only_disk_of(cluster: &Cluster, node: &str) -> String {
    let disks = cluster.json(&["disk", "list", "--node", node]);
    assert_eq!(disks.as_array().unwrap().len(), 1, "{disks}");
    disks[0]["id"].as_str().unwrap().to_owned()
}

fn wait_alive(cluster: &Cluster, id: &str) {
    wait_until("the disk is alive", Duration::from_secs(20), || {
        disk(cluster, id).filter(|d| d["alive"] == true).map(drop)
    });
}

/// Formats a new file as `storage-daemon format` does it for people.
fn formatted(cluster: &Cluster, path: &Path) {
    let output = cluster
        .command(&binary("storage-daemon"))
        .args(["format", path.to_str().unwrap(), "--size", "512MiB"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// (disk, state) of each replica of the volume.
fn replicas(cluster: &Cluster) -> Vec<(String, String)> {
    let list = cluster.json(&["replica", "list", VOLUME]);
    let text = |row: &Value, name: &str| row[name].as_str().unwrap().to_owned();
    let rows = list.as_array().unwrap().iter();
    rows.map(|r| (text(r, "disk_id"), text(r, "state")))
        .collect()
}

#[test]
fn a_replica_is_moved_to_a_new_disk_under_load_and_the_old_disk_is_removed() {
    let cluster = up(3);
    let old = only_disk_of(&cluster, "node-1");
    let unused = used(&cluster, &old);
    cluster.volume(VOLUME, "64MiB", 3);
    let export = Export::start(&cluster, VOLUME);
    let stamps = fill(&mut connect(&export));

    let path = cluster.scratch("new-disk.img");
    formatted(&cluster, &path);
    let added = cluster.json(&["disk", "add", "--node", "node-1", path.to_str().unwrap()]);
    let new = added["id"].as_str().unwrap();
    wait_alive(&cluster, new);
    wait_until("the space is reported", Duration::from_secs(10), || {
        (used(&cluster, &old) > unused).then_some(())
    });
    let says = ["holds 1 replica", "ashlar disk evacuate", &old];
    refused(&cluster, &["disk", "remove", &old], CONFLICT, &says);

    let load = Load::start(connect(&export), stamps);
    cluster.ok(&[
        "replica",
        "move",
        VOLUME,
        &old,
        "--to",
        new,
        "--wait",
        "--wait-timeout",
        "60",
    ]);
    // At once: what `--wait` promises is that the move is over.
    let now = replicas(&cluster);
    assert_eq!(now.len(), 3, "{now:?}");
    assert!(now.iter().all(|(_, state)| state == "in-sync"), "{now:?}");
    assert!(now.iter().any(|(disk, _)| disk == new), "{now:?}");
    assert!(!now.iter().any(|(disk, _)| *disk == old), "{now:?}");
    let stamps = load.stop();
    check(&mut connect(&export), &stamps);

    wait_until(
        "the old disk's space is back",
        Duration::from_secs(20),
        || {
            let row = disk(&cluster, &old).unwrap();
            (row["replicas"] == 0 && row["used_bytes"].as_u64().unwrap() <= unused).then_some(())
        },
    );
    cluster.ok(&["disk", "remove", &old]);
    assert_eq!(disk(&cluster, &old), None);
    refused(
        &cluster,
        &["disk", "remove", &old],
        NOT_FOUND,
        &["disk list"],
    );

    // The new disk alone has everything, and comes back with its daemon.
    cluster.ok(&["dev", "kill", "daemon-1"]);
    cluster.ok(&["dev", "start", "daemon-1"]);
    wait_alive(&cluster, new);
    cluster.wait_redundant(VOLUME, Duration::from_secs(30));
    cluster.ok(&["dev", "kill", "daemon-2"]);
    cluster.ok(&["dev", "kill", "daemon-3"]);
    check(&mut connect(&export), &stamps);
}

/// How often the repair loops of all members began a rebuild of their own accord.
fn begun_by_loop(cluster: &Cluster) -> usize {
    let count = |member: u32| {
        let log = cluster.dir().join(format!("logs/metadata-{member}.log"));
        let text = std::fs::read_to_string(log).unwrap();
        text.matches("beginning a rebuild").count()
    };
    (1..=3).map(count).sum()
}

#[test]
fn a_rebuild_can_be_forced_before_the_repair_loop_comes_to_it() {
    // Each failure doubles the loop's back-off (half a second at first), so that some round sees a replica
    // which is stale on a living disk.
    const ROUNDS_MAX: u32 = 8;
    let cluster = up(3);
    let held = only_disk_of(&cluster, "node-2");
    cluster.volume(VOLUME, "64MiB", 3);
    let export = Export::start(&cluster, VOLUME);
    let mut client = connect(&export);
    let mut stamps = fill(&mut client);
    let args = [
        "replica",
        "rebuild",
        VOLUME,
        &held,
        "--wait",
        "--wait-timeout",
        "60",
    ];
    refused(&cluster, &args, CONFLICT, &["nothing to rebuild"]);
    for round in 0..ROUNDS_MAX {
        cluster.ok(&["dev", "kill", "daemon-2"]);
        for block in 0..200 {
            let stamp = BLOCKS * u64::from(round + 2);
            client.write_stamp(block, stamp).unwrap();
            stamps.insert(block, stamp);
        }
        client.flush().unwrap();
        wait_until("the disk is away", Duration::from_secs(20), || {
            disk(&cluster, &held).filter(|d| d["alive"] == false)
        });
        // Else the loop began in vain before it knew that; it goes on when the disk is back.
        let stale = replicas(&cluster).contains(&(held.clone(), "stale".to_owned()));
        let before = begun_by_loop(&cluster);
        cluster.ok(&["dev", "start", "daemon-2"]);
        wait_alive(&cluster, &held);
        let output = cluster.ashlar(&args);
        if stale && output.status.success() && begun_by_loop(&cluster) == before {
            let now = replicas(&cluster);
            assert!(now.iter().all(|(_, state)| state == "in-sync"), "{now:?}");
            // The rebuilt replica alone has everything.
            cluster.ok(&["dev", "kill", "daemon-1"]);
            cluster.ok(&["dev", "kill", "daemon-3"]);
            check(&mut client, &stamps);
            return;
        }
        // The loop was first. That is no error, or one that says so.
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(CONFLICT), "{said}");
        }
        cluster.wait_redundant(VOLUME, Duration::from_secs(60));
    }
    panic!("the repair loop was first, {ROUNDS_MAX} times");
}

#[test]
fn a_removed_disk_stays_removed_and_can_be_added_again() {
    let cluster = up(1);
    let path = cluster.scratch("second.img");
    let add = ["disk", "add", "--node", "node-3", path.to_str().unwrap()];
    let format = [&add[..], &["--format", "--size", "256MiB"]].concat();
    let added = cluster.json(&format);
    let id = added["id"].as_str().unwrap();
    wait_alive(&cluster, id);
    refused(&cluster, &add, CONFLICT, &["served", "ashlar disk list"]);
    cluster.ok(&["disk", "remove", path.to_str().unwrap()]);
    assert_eq!(disk(&cluster, id), None);
    cluster.ok(&["dev", "kill", "daemon-3"]);
    cluster.ok(&["dev", "start", "daemon-3"]);
    wait_alive(&cluster, &only_disk_of(&cluster, "node-3"));
    assert_eq!(disk(&cluster, id), None, "it came back by itself");
    // Its contents stay, so it is the same disk.
    let add = [&["-o", "json"], &add[..]].concat();
    let again = wait_until("the daemon to answer", Duration::from_secs(10), || {
        let output = cluster.ashlar(&add);
        output.status.success().then_some(output.stdout)
    });
    let again: serde_json::Value = serde_json::from_slice(&again).unwrap();
    assert_eq!(again["id"], id);
    wait_alive(&cluster, id);
}

#[test]
fn wrong_names_and_states_are_refused_with_the_reason() {
    let cluster = up(1);
    let disks = ["node-1", "node-2", "node-3"].map(|node| only_disk_of(&cluster, node));
    let [first, second, _] = &disks;
    cluster.volume(VOLUME, "64MiB", 2);
    cluster.volume("three", "64MiB", 3);
    let held: Vec<String> = replicas(&cluster).into_iter().map(|(d, _)| d).collect();
    let free = disks.iter().find(|d| !held.contains(*d)).unwrap();
    let blank = cluster.scratch("blank.img");
    std::fs::File::create(&blank)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    let blank = blank.to_str().unwrap();
    let foreign = cluster.scratch("foreign.img");
    std::fs::write(&foreign, vec![b'x'; 32 << 20]).unwrap();
    let foreign = foreign.to_str().unwrap();
    let nowhere = cluster.scratch("nowhere.img");
    let nowhere = nowhere.to_str().unwrap();

    let cases: &[(&[&str], i32, &[&str])] = &[
        // disk add
        (
            &["disk", "add", "--node", "nobody", blank],
            NOT_FOUND,
            &["nobody", "ashlar node list"],
        ),
        (
            &["disk", "add", "--node", "node-1", "blank.img"],
            USAGE,
            &["absolute"],
        ),
        (
            &["disk", "add", "--node", "node-1", nowhere],
            USAGE,
            &[nowhere],
        ),
        (
            &["disk", "add", "--node", "node-1", blank],
            CONFLICT,
            &["is not an Ashlar disk", "--format"],
        ),
        (
            &["disk", "add", "--node", "node-1", "--format", foreign],
            CONFLICT,
            &["something else"],
        ),
        // disk remove
        (
            &["disk", "remove", "deadbeef"],
            NOT_FOUND,
            &["deadbeef", "ashlar disk list"],
        ),
        (
            &["disk", "remove", first],
            CONFLICT,
            &["replica", "ashlar disk evacuate"],
        ),
        // replica rebuild
        (
            &["replica", "rebuild", "nothing", first],
            NOT_FOUND,
            &["nothing", "ashlar volume list"],
        ),
        (
            &["replica", "rebuild", VOLUME, "deadbeef"],
            NOT_FOUND,
            &["deadbeef"],
        ),
        (
            &["replica", "rebuild", VOLUME, free],
            NOT_FOUND,
            &["has no replica on disk", "ashlar replica list"],
        ),
        (
            &["replica", "rebuild", VOLUME, &held[0]],
            CONFLICT,
            &["nothing to rebuild"],
        ),
        // replica move
        (
            &["replica", "move", "nothing", first],
            NOT_FOUND,
            &["nothing"],
        ),
        (
            &["replica", "move", VOLUME, free],
            NOT_FOUND,
            &["has no replica on disk"],
        ),
        (
            &["replica", "move", VOLUME, &held[0], "--to", "deadbeef"],
            NOT_FOUND,
            &["deadbeef"],
        ),
        (
            &["replica", "move", VOLUME, &held[0], "--to", &held[0]],
            USAGE,
            &["already there"],
        ),
        (
            &["replica", "move", VOLUME, &held[0], "--to", &held[1]],
            CONFLICT,
            &["shares a failure domain", "another disk"],
        ),
        (
            &["replica", "move", "three", first],
            CONFLICT,
            &["disk add"],
        ),
        (
            &["replica", "move", "three", first, "--to", second],
            CONFLICT,
            &["shares a failure domain"],
        ),
    ];
    for (args, code, says) in cases {
        refused(&cluster, args, *code, says);
    }
    // Nothing of that changed anything.
    assert_eq!(cluster.json(&["disk", "list"]).as_array().unwrap().len(), 3);
    assert_eq!(cluster.replica_states(VOLUME), ["in-sync", "in-sync"]);

    // Nobody holds the volume: it moves all the same.
    let moving = ["replica", "move", VOLUME, &held[0], "--to", free, "--wait"];
    cluster.ok(&moving);
    wait_until("the move is over", Duration::from_secs(30), || {
        let disks: Vec<String> = replicas(&cluster).into_iter().map(|(d, _)| d).collect();
        (disks.len() == 2 && disks.contains(free) && !disks.contains(&held[0])).then_some(())
    });

    // A node that is away.
    cluster.ok(&["dev", "kill", "daemon-1"]);
    let away = ["disk", "add", "--node", "node-1", blank, "--format"];
    refused(
        &cluster,
        &away,
        UNAVAILABLE,
        &["does not answer", "ashlar node list"],
    );
}
