//! A real database on a real kernel: PostgreSQL on ext4 on kernel NBD in user-mode Linux nodes, with a
//! storage daemon killed in mid-run, then the node itself, then a second node that takes over.

use std::time::Duration;

use ashlar_tests::e2e::postgres::{
    self, CHECK, COMMITS, START, attach, check, committed, fill, script,
};
use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, have, wait_until};
use rustix::process::Signal;

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn pgbench_survives_a_daemon_and_the_database_survives_its_node() {
    if !(postgres::is_there() && have(&["nbdinfo"])) {
        return;
    }
    let network = Network::new(2);
    let cluster = Cluster::up(ClusterSpec {
        namespace: Some(network.name().to_owned()),
        disk_size: "4GiB",
        ..ClusterSpec::default()
    });
    cluster.volume("pg", "2GiB", 3);
    let mut old = Export::start_tcp(
        &cluster,
        "pg",
        "holder-1",
        &format!("{HOST_ADDRESS}:10809"),
        &[],
    );
    let mut node = Node::boot(&network, 1, &cluster.scratch("node1"));
    node.ok(
        &script(&[
            &attach(&[("pg", 10809)]),
            "mkfs.ext4 -q -E nodiscard /dev/nbd0\nmount /dev/nbd0 /pg\nchown postgres /pg\n",
            "as PG/initdb -D /pg/data -A trust >/dev/null\n",
            START,
            &fill(10),
        ]),
        MINUTE * 4,
    );

    // 30 s of pgbench while one daemon dies and comes back.
    let run = node.start(&script(&[
        "as PG/pgbench -h /run/postgresql -c 4 -j 1 -T 30 --max-tries=1 bench\n",
    ]));
    std::thread::sleep(Duration::from_secs(8));
    cluster.ok(&["dev", "kill", "daemon-2"]);
    std::thread::sleep(Duration::from_secs(8));
    cluster.ok(&["dev", "start", "daemon-2"]);
    let output = node.finish(run, MINUTE * 2);
    assert!(
        output.contains("number of failed transactions: 0"),
        "{output}"
    );
    println!(
        "{}",
        output
            .lines()
            .filter(|l| l.contains("tps"))
            .collect::<Vec<_>>()
            .join(" ")
    );
    cluster.wait_redundant("pg", MINUTE);

    // Commits whose success was reported are written to the host's share, outside of the volume.
    node.start(&script(&[COMMITS]));
    let share = cluster.scratch("node1");
    wait_until("some commits", MINUTE, || {
        (committed(&share) >= 30).then_some(())
    });
    // Power cut of the node; its nbd-client freezes and becomes a zombie.
    node.power_off();
    old.signal(Signal::STOP);
    let reported = committed(&share);

    let new = Export::start_tcp(
        &cluster,
        "pg",
        "holder-2",
        &format!("{HOST_ADDRESS}:10810"),
        &["--force"],
    );
    let mut second = Node::boot(&network, 2, &cluster.scratch("node2"));
    let output = second.ok(
        &script(&[
            &attach(&[("pg", 10810)]),
            "mount /dev/nbd0 /pg\n",
            "rm -f /pg/data/postmaster.pid\n",
            START,
            CHECK,
        ]),
        MINUTE * 3,
    );
    let max = check(&output);
    assert!(
        max >= reported,
        "{reported} commits were reported, {max} are there"
    );
    println!("{reported} commits reported, {max} there");

    // The zombie wakes up and is refused.
    old.signal(Signal::CONT);
    let status = old.wait_end(Duration::from_secs(30));
    assert!(!status.success(), "{status}");
    drop(second);
    drop(new);
}
