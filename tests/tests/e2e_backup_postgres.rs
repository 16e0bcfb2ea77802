//! A database that works while it is backed up: PostgreSQL on ext4 on kernel NBD in user-mode Linux, backed up fully and then
//! incrementally to an S3 server; its node loses power, and a second node finds every commit that was reported before the backup.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node, PROGRAMS};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, S3Server, binary, have, wait_until};

const PG: &str = "/usr/lib/postgresql/15/bin";
const MINUTE: Duration = Duration::from_secs(60);

const AS: &str = "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n";
const START: &str = "as PG/pg_ctl -D /pg/data -w -t 60 -l /pg/log -o '-c unix_socket_directories=/run/postgresql \
    -c listen_addresses= -c shared_buffers=64MB' start\n";

/// Attaches the export as /dev/nbd0 with the stock tool.
fn attach(port: u16) -> String {
    format!(
        "set -e\n\
         insmod $(find /lib/modules/$(uname -r)/ -name nbd.ko) max_part=0 2>/dev/null || modprobe nbd max_part=0\n\
         /usr/sbin/nbd-client -N {} {HOST_ADDRESS} {port} /dev/nbd0 -b 4096 -connections 2 -persist -timeout 30\n\
         mkdir -p /pg /run/postgresql\nchown postgres /run/postgresql\n",
        if port == 10809 { "pg" } else { "restored" }
    )
}

fn script(parts: &[&str]) -> String {
    parts.concat().replace("PG/", &format!("{PG}/"))
}

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

fn committed(file: &Path) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[test]
fn a_database_is_restored_from_an_incremental_backup_that_was_made_while_it_worked() {
    let mut programs = PROGRAMS.to_vec();
    let (initdb, pgbench) = (format!("{PG}/initdb"), format!("{PG}/pgbench"));
    programs.extend(["/usr/sbin/nbd-client", "mkfs.ext4", &initdb, &pgbench]);
    if !have(&programs) {
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
            &attach(10809),
            "mkfs.ext4 -q -E nodiscard /dev/nbd0\nmount /dev/nbd0 /pg\nchown postgres /pg\n",
            AS,
            "as PG/initdb -D /pg/data -A trust >/dev/null\n",
            START,
            "as PG/createdb -h /run/postgresql bench\n",
            "as PG/pgbench -h /run/postgresql -i -s 2 -q bench\n",
            "as PG/psql -h /run/postgresql -q bench -c 'create table ledger (n bigint primary key)'\n",
        ]),
        MINUTE * 4,
    );
    // It goes on to the end; what is reported as committed is written outside of the volume.
    node.start(&script(&[
        AS,
        "as PG/pgbench -h /run/postgresql -c 2 -j 1 -T 600 bench >/dev/null 2>&1 &\n",
        "n=0; while true; do n=$((n+1)); as PG/psql -h /run/postgresql -qc \"insert into ledger values ($n)\" bench && echo $n > /share/committed.tmp && mv /share/committed.tmp /share/committed; done\n",
    ]));
    let file = cluster.scratch("node1").join("committed");
    let reach = |n: u64| wait_until("commits", MINUTE, || (committed(&file) >= n).then_some(()));
    reach(10);
    let full = backup(&cluster, &server, &["create", "--volume", "pg"]);
    assert_eq!(full["kind"], "full");
    reach(committed(&file) + 10);
    let before = committed(&file);
    let second = backup(&cluster, &server, &["create", "--volume", "pg"]);
    assert_eq!(second["kind"], "incremental");
    assert!(
        second["read_bytes"].as_u64() < full["read_bytes"].as_u64(),
        "{second}"
    );
    reach(committed(&file) + 5);
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
            &attach(10810),
            "mount /dev/nbd0 /pg\nrm -f /pg/data/postmaster.pid\n",
            AS,
            START,
            "echo highest $(as PG/psql -h /run/postgresql -Atc 'select count(*), max(n) from ledger' bench)\n",
            "echo balance $(as PG/psql -h /run/postgresql -Atc 'select sum(abalance) = (select coalesce(sum(delta), 0) from pgbench_history) from pgbench_accounts' bench)\n",
            "as PG/pg_amcheck -h /run/postgresql --install-missing --heapallindexed bench || echo AMCHECK_FAILED\n",
        ]),
        MINUTE * 3,
    );
    let line = |name: &str| output.lines().find_map(|l| l.trim().strip_prefix(name));
    let (count, max) = line("highest ").and_then(|l| l.split_once('|')).unwrap();
    assert_eq!(count, max, "no hole in the ledger: {output}");
    let max: u64 = max.trim().parse().unwrap();
    assert!(
        max >= before,
        "{before} commits were reported before the backup, {max} are there"
    );
    assert_eq!(line("balance "), Some("t"), "{output}");
    assert!(!output.contains("AMCHECK_FAILED"), "{output}");
    drop(node);
    drop(export);
}
