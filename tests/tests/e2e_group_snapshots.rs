//! Group snapshots are of one instant (docs/snapshots.md, S3): with a program that writes volumes in lock-step, and with a
//! database whose data and log are on two volumes.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ashlar_tests::e2e::postgres::{
    self, CHECK, COMMITS, START, attach, check, committed, fill, script,
};
use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, wait_until};

const ROUNDS: u32 = 200;
const MINUTE: Duration = Duration::from_secs(60);

/// Takes a group snapshot; on a busy machine not all writers hold in time, and nothing is taken then.
fn take(cluster: &Cluster, volumes: &[&str], name: &str) {
    let mut args = vec!["snapshot", "create"];
    args.extend_from_slice(volumes);
    args.extend_from_slice(&["--name", name]);
    let mut said = String::new();
    for _ in 0..10 {
        let output = cluster.ashlar(&args);
        if output.status.success() {
            return;
        }
        said = String::from_utf8_lossy(&output.stderr).into_owned();
    }
    panic!("{name}: {said}");
}

#[test]
fn no_later_write_without_an_earlier_one_in_two_hundred_rounds() {
    let cluster = Cluster::up(ClusterSpec::default());
    let volumes = ["first", "second", "third"];
    for volume in volumes {
        cluster.volume(volume, "64MiB", 3);
    }
    // Each has a client process of its own, as on nodes of their own.
    let exports = volumes.map(|v| Export::start(&cluster, v));
    let clients: Vec<NbdClient> = exports
        .iter()
        .zip(volumes)
        .map(|(e, v)| NbdClient::connect_unix(e.socket(), v).unwrap())
        .collect();
    let stop = AtomicBool::new(false);
    let mut shown = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut clients = clients;
            let mut round = 0u64;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                for client in &mut clients {
                    client.write_stamp(round % 97, round).unwrap();
                }
            }
            round
        });
        for round in 0..ROUNDS {
            let name = format!("g{round}");
            take(&cluster, &volumes, &name);
            let snapshots = volumes.map(|v| format!("{name}-{v}"));
            let reader = Export::start_snapshots(&cluster, &snapshots, "reader");
            let newest = snapshots.each_ref().map(|snapshot| {
                let socket = cluster.scratch(&format!("{snapshot}.sock"));
                let mut client = NbdClient::connect_unix(&socket, snapshot).unwrap();
                let stamps = (0..97).map(|block| client.read_stamp(block).unwrap());
                stamps.max().unwrap()
            });
            reader.kill();
            let [first, second, third] = newest;
            assert!(
                first >= second && second >= third && first <= third + 1,
                "round {round}: {newest:?}"
            );
            shown = third;
            for snapshot in &snapshots {
                std::fs::remove_file(cluster.scratch(&format!("{snapshot}.sock"))).unwrap();
                cluster.ok(&["snapshot", "delete", snapshot, "--yes"]);
            }
        }
        stop.store(true, Ordering::Relaxed);
        let written = writer.join().unwrap();
        println!("{written} rounds of writes, {shown} of them in the last snapshot");
        assert!(shown > u64::from(ROUNDS), "writes went on meanwhile");
    });
}

#[test]
fn a_database_on_two_volumes_recovers_from_clones_of_a_group_snapshot() {
    if !postgres::is_there() {
        return;
    }
    let network = Network::new(2);
    let cluster = Cluster::up(ClusterSpec {
        namespace: Some(network.name().to_owned()),
        disk_size: "4GiB",
        ..ClusterSpec::default()
    });
    let serve = |volume: &str, port: u16| {
        let address = format!("{HOST_ADDRESS}:{port}");
        Export::start_tcp(&cluster, volume, &format!("holder-{volume}"), &address, &[])
    };
    cluster.volume("data", "1GiB", 3);
    cluster.volume("log", "1GiB", 3);
    let _origin = [serve("data", 10809), serve("log", 10810)];
    let mut node = Node::boot(&network, 1, &cluster.scratch("node1"));
    node.ok(
        &script(&[
            &attach(&[("data", 10809), ("log", 10810)]),
            "mkdir -p /wal\nfor i in 0 1; do mkfs.ext4 -q -E nodiscard /dev/nbd$i; done\n\
             mount /dev/nbd0 /pg\nmount /dev/nbd1 /wal\nchown postgres /pg /wal\n",
            "as PG/initdb -D /pg/data -X /wal/log -A trust >/dev/null\n",
            START,
            &fill(5),
        ]),
        MINUTE * 4,
    );
    node.start(&script(&[
        "as PG/pgbench -h /run/postgresql -c 4 -j 1 -T 600 --max-tries=1 bench >/dev/null 2>&1 &\n",
        COMMITS,
    ]));
    let share = cluster.scratch("node1");
    let committed = || committed(&share);
    wait_until("some commits", MINUTE, || (committed() >= 20).then_some(()));
    let reported = committed();
    take(&cluster, &["data", "log"], "set");
    wait_until("more commits", MINUTE, || {
        (committed() >= reported + 10).then_some(())
    });
    for volume in ["data", "log"] {
        let (copy, snapshot) = (format!("{volume}2"), format!("set-{volume}"));
        cluster.ok(&["volume", "create", &copy, "--from-snapshot", &snapshot]);
    }
    let _copies = [serve("data2", 10811), serve("log2", 10812)];
    let mut second = Node::boot(&network, 2, &cluster.scratch("node2"));
    let output = second.ok(
        &script(&[
            &attach(&[("data2", 10811), ("log2", 10812)]),
            "mkdir -p /wal\nmount /dev/nbd0 /pg\nmount /dev/nbd1 /wal\nrm -f /pg/data/postmaster.pid\n",
            START,
            CHECK,
        ]),
        MINUTE * 3,
    );
    let max = check(&output);
    assert!(
        (reported..committed()).contains(&max),
        "{reported} commits were reported before the snapshot, {max} are there"
    );
    println!("{reported} commits reported, {max} there");
}
