//! A real database on a real kernel: PostgreSQL on ext4 on kernel NBD in user-mode Linux nodes, with a
//! storage daemon killed in mid-run, then the node itself, then a second node that takes over.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node, PROGRAMS};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, have, wait_until};
use rustix::process::Signal;

const PG: &str = "/usr/lib/postgresql/15/bin";
const MINUTE: Duration = Duration::from_secs(60);

/// Attaches the export as /dev/nbd0 with the stock tool and makes helpers for the database.
fn prologue(port: u16) -> String {
    format!(
        r#"set -e
insmod $(find /lib/modules/$(uname -r)/ -name nbd.ko) max_part=0 2>/dev/null || modprobe nbd max_part=0
/usr/sbin/nbd-client -N pg {HOST_ADDRESS} {port} /dev/nbd0 -b 4096 -connections 2 -persist -timeout 30
mkdir -p /pg /run/postgresql
chown postgres /run/postgresql
"#
    )
}

const START: &str = r#"
as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH "$@"; }
as PG/pg_ctl -D /pg/data -w -t 60 -l /pg/log -o '-c unix_socket_directories=/run/postgresql -c listen_addresses= -c shared_buffers=64MB' start
"#;

fn script(parts: &[&str]) -> String {
    parts.concat().replace("PG/", &format!("{PG}/"))
}

#[test]
fn pgbench_survives_a_daemon_and_the_database_survives_its_node() {
    let mut programs = PROGRAMS.to_vec();
    let initdb = format!("{PG}/initdb");
    let pgbench = format!("{PG}/pgbench");
    programs.extend([
        "/usr/sbin/nbd-client",
        "mkfs.ext4",
        "nbdinfo",
        &initdb,
        &pgbench,
    ]);
    if !have(&programs) {
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
            &prologue(10809),
            "mkfs.ext4 -q -E nodiscard /dev/nbd0\nmount /dev/nbd0 /pg\nchown postgres /pg\n",
            "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n",
            "as PG/initdb -D /pg/data -A trust >/dev/null\n",
            START,
            "as PG/createdb -h /run/postgresql bench\n",
            "as PG/pgbench -h /run/postgresql -i -s 10 -q bench\n",
            "as PG/psql -h /run/postgresql -q bench -c 'create table ledger (n bigint primary key)'\n",
        ]),
        MINUTE * 4,
    );

    // 30 s of pgbench while one daemon dies and comes back.
    let run = node.start(&script(&[
        "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n",
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
    node.start(&script(&[
        "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n",
        "n=0; while true; do n=$((n+1)); as PG/psql -h /run/postgresql -qc \"insert into ledger values ($n)\" bench && echo $n > /share/committed.tmp && mv /share/committed.tmp /share/committed; done\n",
    ]));
    let committed = cluster.scratch("node1").join("committed");
    let read = |path: &Path| {
        std::fs::read_to_string(path)
            .ok()
            .and_then(|t| t.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    wait_until("some commits", MINUTE, || {
        (read(&committed) >= 30).then_some(())
    });
    // Power cut of the node; its nbd-client freezes and becomes a zombie.
    node.power_off();
    old.signal(Signal::STOP);
    let reported = read(&committed);

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
            &prologue(10810),
            "mount /dev/nbd0 /pg\n",
            "rm -f /pg/data/postmaster.pid\n",
            START,
            "echo highest $(as PG/psql -h /run/postgresql -Atc 'select count(*), max(n) from ledger' bench)\n",
            "as PG/psql -h /run/postgresql -Atc 'select sum(abalance) = (select sum(delta) from pgbench_history) from pgbench_accounts' bench\n",
            "as PG/pg_amcheck -h /run/postgresql --install-missing --heapallindexed bench || echo AMCHECK_FAILED\n",
        ]),
        MINUTE * 3,
    );
    let highest = output
        .lines()
        .find_map(|l| l.strip_prefix("highest "))
        .unwrap_or_default();
    let (count, max) = highest
        .split_once('|')
        .unwrap_or_else(|| panic!("{output}"));
    assert_eq!(count, max, "no hole in the ledger: {output}");
    let max: u64 = max.trim().parse().unwrap();
    assert!(
        max >= reported,
        "{reported} commits were reported, {max} are there"
    );
    assert!(
        output.lines().any(|l| l.trim() == "t"),
        "pgbench's balance is wrong: {output}"
    );
    assert!(!output.contains("AMCHECK_FAILED"), "{output}");
    println!("{reported} commits reported, {max} there");

    // The zombie wakes up and is refused.
    old.signal(Signal::CONT);
    let status = old.wait_end(Duration::from_secs(30));
    assert!(!status.success(), "{status}");
    drop(second);
    drop(new);
}
