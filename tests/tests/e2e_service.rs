//! Nodes are drained, disks emptied and replaced, and new disks get their part, with the volumes in use.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, wait_until};

const MIB: u64 = 1 << 20;

/// The bytes of MiB `part` in round `round`.
fn content(part: u64, round: u64) -> Vec<u8> {
    let seed = (part << 8 | round).to_le_bytes();
    seed.iter().copied().cycle().take(1 << 20).collect()
}

fn write(client: &mut NbdClient, parts: u64, round: u64) {
    for part in 0..parts {
        client.write(part * MIB, &content(part, round)).unwrap();
    }
    client.flush().unwrap();
}

fn check(client: &mut NbdClient, parts: u64, round: u64) {
    for part in 0..parts {
        let read = client.read(part * MIB, 1 << 20).unwrap();
        assert!(read == content(part, round), "MiB {part} of round {round}");
    }
}

/// Writes a volume that is not open, and closes it.
fn fill(cluster: &Cluster, volume: &str, parts: u64, round: u64) {
    let export = Export::start(cluster, volume);
    let mut client = NbdClient::connect_unix(export.socket(), volume).unwrap();
    write(&mut client, parts, round);
    drop(client);
    assert!(export.stop().success());
}

fn check_closed(cluster: &Cluster, volume: &str, parts: u64, round: u64) {
    let export = Export::start(cluster, volume);
    let mut client = NbdClient::connect_unix(export.socket(), volume).unwrap();
    check(&mut client, parts, round);
    drop(client);
    assert!(export.stop().success());
}

fn disk_of(cluster: &Cluster, node: &str) -> serde_json::Value {
    let disks = cluster.json(&["disk", "list", "--node", node]);
    disks[0].clone()
}

fn replicas_on(cluster: &Cluster, node: &str) -> u64 {
    let disks = cluster.json(&["disk", "list", "--node", node]);
    let disks = disks.as_array().unwrap().iter();
    disks.map(|d| d["replicas"].as_u64().unwrap()).sum()
}

#[test]
fn a_node_is_drained_whatever_its_volumes_are_there_for() {
    let cluster = Cluster::up(ClusterSpec {
        daemons: 4,
        ..ClusterSpec::default()
    });
    // In use, closed, never opened, deleted but for its snapshot, and a clone of a snapshot of what is in use.
    for volume in ["used", "closed", "new", "gone", "other"] {
        cluster.volume(volume, "128MiB", 3);
    }
    fill(&cluster, "closed", 32, 1);
    fill(&cluster, "gone", 32, 2);
    cluster.ok(&["snapshot", "create", "gone", "--name", "last"]);
    cluster.ok(&["volume", "delete", "gone", "--yes"]);
    fill(&cluster, "other", 16, 3);
    let export = Export::start(&cluster, "used");
    let mut client = NbdClient::connect_unix(export.socket(), "used").unwrap();
    write(&mut client, 64, 4);
    cluster.ok(&["snapshot", "create", "used", "--name", "s"]);
    cluster.ok(&["volume", "create", "clone", "--from-snapshot", "s"]);
    // One that was opened, and one that never was.
    cluster.ok(&["volume", "create", "unopened", "--from-snapshot", "s"]);
    check_closed(&cluster, "clone", 64, 4);
    write(&mut client, 32, 5);

    let volumes = cluster.json(&["volume", "show", "used"]);
    let node = volumes["replica_list"][0]["node"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(replicas_on(&cluster, &node) > 0);
    let began = Instant::now();
    let drained = cluster.ok(&["node", "drain", &node, "--wait", "--wait-timeout", "120"]);
    println!("drained in {:?}: {drained}", began.elapsed());
    assert!(drained.contains("holds no replica"), "{drained}");
    assert_eq!(replicas_on(&cluster, &node), 0);
    let status = cluster.json(&["cluster", "status"]);
    assert_eq!(status["volumes_degraded"], 0, "{status}");

    // Nothing comes back, and everything is there without the node.
    cluster.volume("later", "64MiB", 3);
    assert_eq!(replicas_on(&cluster, &node), 0);
    cluster.ok(&["dev", "kill", &node.replace("node-", "daemon-")]);
    check(&mut client, 32, 5);
    for part in 32..64 {
        assert!(client.read(part * MIB, 1 << 20).unwrap() == content(part, 4));
    }
    write(&mut client, 8, 6);
    check(&mut client, 8, 6);
    drop(client);
    assert!(export.stop().success());
    check_closed(&cluster, "closed", 32, 1);
    check_closed(&cluster, "clone", 64, 4);
    check_closed(&cluster, "unopened", 64, 4);
    check_closed(&cluster, "other", 16, 3);
    let last = Export::start_snapshot(&cluster, "last", "last");
    let mut client = NbdClient::connect_unix(last.socket(), "last").unwrap();
    check(&mut client, 32, 2);
    drop(client);
    assert!(last.stop().success());
    fill(&cluster, "new", 8, 7);
    check_closed(&cluster, "new", 8, 7);

    cluster.ok(&["dev", "start", &node.replace("node-", "daemon-")]);
    cluster.ok(&["node", "uncordon", &node]);
    let disk = disk_of(&cluster, &node);
    assert_eq!(disk["service"], "in-use");
}

#[test]
fn a_disk_is_replaced_in_place_and_taken_out() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("v", "256MiB", 3);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    write(&mut client, 128, 1);
    let old = disk_of(&cluster, "node-2");
    let id = old["id"].as_str().unwrap();
    let refused = cluster.ashlar(&["disk", "remove", id]);
    assert_eq!(refused.status.code(), Some(4));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("ashlar disk evacuate"), "{text}");

    // There is no other node: only a disk of the same one will do.
    let stuck = cluster.ashlar(&["disk", "evacuate", id, "--wait", "--wait-timeout", "3"]);
    assert_eq!(stuck.status.code(), Some(5));
    let text = String::from_utf8_lossy(&stuck.stderr).into_owned();
    assert!(text.contains("no living disk of pool default"), "{text}");
    let path = cluster.scratch("new-disk");
    let path = path.to_str().unwrap();
    let replace = ["disk", "replace", id, path, "--format", "--size", "2GiB"];
    let mut replace = replace.to_vec();
    replace.extend(["--wait", "--wait-timeout", "120"]);
    let replaced = cluster.ok(&replace);
    assert!(replaced.contains("holds no replica"), "{replaced}");
    cluster.ok(&["disk", "remove", id]);
    let disks = cluster.json(&["disk", "list", "--node", "node-2"]);
    assert_eq!(disks.as_array().unwrap().len(), 1);
    assert_eq!(disks[0]["path"], path);
    assert_eq!(disks[0]["replicas"], 1);
    cluster.wait_redundant("v", Duration::from_secs(10));
    for other in ["daemon-1", "daemon-3"] {
        cluster.ok(&["dev", "kill", other]);
        check(&mut client, 128, 1);
        cluster.ok(&["dev", "start", other]);
        cluster.wait_redundant("v", Duration::from_secs(30));
    }
    drop(client);
    assert!(export.stop().success());
}

#[test]
fn an_empty_disk_gets_its_part_while_volumes_are_written() {
    let cluster = Cluster::up(ClusterSpec {
        daemons: 4,
        ..ClusterSpec::default()
    });
    let pool = ["pool", "create", "default", "--overprovision", "200"];
    cluster.ok(&pool);
    cluster.ok(&["node", "cordon", "node-4"]);
    for n in 1..=8 {
        cluster.volume(&format!("v{n}"), "256MiB", 3);
    }
    assert_eq!(replicas_on(&cluster, "node-4"), 0);
    fill(&cluster, "v2", 16, 2);
    let export = Export::start(&cluster, "v1");
    let mut client = NbdClient::connect_unix(export.socket(), "v1").unwrap();
    write(&mut client, 64, 1);
    cluster.ok(&["node", "uncordon", "node-4"]);
    // All the while what is there is written again, which takes room in the disks' logs and none of their pages.
    let mut round = 1;
    let mut counts = Vec::new();
    let mut since = Instant::now();
    wait_until(
        "the replicas to be spread",
        Duration::from_secs(120),
        || {
            round += 1;
            write(&mut client, 16, round);
            let now: Vec<_> = (1..=4)
                .map(|n| replicas_on(&cluster, &format!("node-{n}")))
                .collect();
            if now != counts {
                println!("{now:?}");
                counts = now;
                since = Instant::now();
            }
            let spread = counts.iter().sum::<u64>() == 24 && (4..=8).contains(&counts[3]);
            // And it stays so.
            (spread && since.elapsed() > Duration::from_secs(12)).then_some(())
        },
    );
    check(&mut client, 16, round);
    for part in 16..64 {
        assert!(client.read(part * MIB, 1 << 20).unwrap() == content(part, 1));
    }
    drop(client);
    assert!(export.stop().success());
    check_closed(&cluster, "v2", 16, 2);
}
