//! A database that works while it is backed up: PostgreSQL on ext4 on kernel NBD in user-mode Linux, backed up fully and then
//! incrementally to an S3 server; its node loses power, and a second node finds every commit that was reported before the backup.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::process::Output;
use std::time::Duration;

use ashlar_tests::e2e::postgres::{
    self, CHECK, COMMITS, START, attach, check, committed, fill, script,
};
use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, S3Server, binary, wait_until};

const MINUTE: Duration = Duration::from_secs(60);

fn backup(cluster: &Cluster, server: &S3Server, args: &[&str]) -> serde_json::Value {
    let output: Output = cluster
        .command(&binary("ashlar"))
        .args(["-o", "json", "--dir"])
        .arg(cluster.dir())
        .arg("backup")
        .args(args)
        .args(["--repository", "s3://backups/database"])
        .envs(server.environment())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "backup {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_database_is_restored_from_an_incremental_backup_that_was_made_while_it_worked() {
    if !postgres::is_there() {
        return;
    }
    let network = Network::new(2);
    let cluster = Cluster::up(ClusterSpec {
        namespace: Some(network.name().to_owned()),
        ..ClusterSpec::default()
    });
    let Some(server) = S3Server::start(&cluster, "backups") else {
        return;
    };
    cluster.volume("pg", "1GiB", 3);
    let address = format!("{HOST_ADDRESS}:10809");
    let export = Export::start_tcp(&cluster, "pg", "first", &address, &[]);
    let mut node = Node::boot(&network, 1, &cluster.scratch("node1"));
    node.ok(
        &script(&[
            &attach(&[("pg", 10809)]),
            "mkfs.ext4 -q -E nodiscard /dev/nbd0\nmount /dev/nbd0 /pg\nchown postgres /pg\n",
            "as PG/initdb -D /pg/data -A trust >/dev/null\n",
            START,
            &fill(2),
        ]),
        MINUTE * 4,
    );
    // It goes on to the end; what is reported as committed is written outside of the volume.
    node.start(&script(&[
        "as PG/pgbench -h /run/postgresql -c 2 -j 1 -T 600 bench >/dev/null 2>&1 &\n",
        COMMITS,
    ]));
    let share = cluster.scratch("node1");
    let reach = |n: u64| wait_until("commits", MINUTE, || (committed(&share) >= n).then_some(()));
    reach(10);
    let full = backup(&cluster, &server, &["create", "--volume", "pg"]);
    assert_eq!(full["kind"], "full");
    reach(committed(&share) + 10);
    let before = committed(&share);
    let second = backup(&cluster, &server, &["create", "--volume", "pg"]);
    assert_eq!(second["kind"], "incremental");
    assert!(
        second["read_bytes"].as_u64() < full["read_bytes"].as_u64(),
        "{second}"
    );
    reach(committed(&share) + 5);
    node.power_off();
    drop(export);

    let id = second["id"].as_str().unwrap();
    backup(&cluster, &server, &["verify", "--deep"]);
    backup(&cluster, &server, &["restore", id, "--volume", "restored"]);
    let address = format!("{HOST_ADDRESS}:10810");
    let export = Export::start_tcp(&cluster, "restored", "second", &address, &[]);
    let mut node = Node::boot(&network, 2, &cluster.scratch("node2"));
    let output = node.ok(
        &script(&[
            &attach(&[("restored", 10810)]),
            "mount /dev/nbd0 /pg\nrm -f /pg/data/postmaster.pid\n",
            START,
            CHECK,
        ]),
        MINUTE * 3,
    );
    let max = check(&output);
    assert!(
        max >= before,
        "{before} commits were reported before the backup, {max} are there"
    );
    drop(node);
    drop(export);
}
