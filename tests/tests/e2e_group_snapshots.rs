//! Group snapshots are of one instant (docs/snapshots.md, S3): with a program that writes volumes in lock-step, and with a
//! database whose data and log are on two volumes.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ashlar_tests::e2e::uml::{HOST_ADDRESS, Network, Node, PROGRAMS};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, have, wait_until};

const ROUNDS: u32 = 200;
const PG: &str = "/usr/lib/postgresql/15/bin";
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

/// Attaches two exports as /dev/nbd0 and /dev/nbd1 with the stock tool.
fn attach(names: [&str; 2], ports: [u16; 2]) -> String {
    let [data, log] = names;
    let [data_port, log_port] = ports;
    format!(
        "set -e\n\
         insmod $(find /lib/modules/$(uname -r)/ -name nbd.ko) max_part=0 2>/dev/null || modprobe nbd max_part=0\n\
         /usr/sbin/nbd-client -N {data} {HOST_ADDRESS} {data_port} /dev/nbd0 -b 4096 -connections 2 -persist -timeout 30\n\
         /usr/sbin/nbd-client -N {log} {HOST_ADDRESS} {log_port} /dev/nbd1 -b 4096 -connections 2 -persist -timeout 30\n\
         mkdir -p /pg /wal /run/postgresql\nchown postgres /run/postgresql\n"
    )
}

const AS: &str = "as() { setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp PATH=$PATH \"$@\"; }\n";
const START: &str = "as PG/pg_ctl -D /pg/data -w -t 60 -l /pg/log -o '-c unix_socket_directories=/run/postgresql \
    -c listen_addresses= -c shared_buffers=64MB' start\n";

fn script(parts: &[&str]) -> String {
    parts.concat().replace("PG/", &format!("{PG}/"))
}

#[test]
fn a_database_on_two_volumes_recovers_from_clones_of_a_group_snapshot() {
    let mut programs = PROGRAMS.to_vec();
    let initdb = format!("{PG}/initdb");
    let pgbench = format!("{PG}/pgbench");
    programs.extend(["/usr/sbin/nbd-client", "mkfs.ext4", &initdb, &pgbench]);
    if !have(&programs) {
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
            &attach(["data", "log"], [10809, 10810]),
            "for i in 0 1; do mkfs.ext4 -q -E nodiscard /dev/nbd$i; done\n\
             mount /dev/nbd0 /pg\nmount /dev/nbd1 /wal\nchown postgres /pg /wal\n",
            AS,
            "as PG/initdb -D /pg/data -X /wal/log -A trust >/dev/null\n",
            START,
            "as PG/createdb -h /run/postgresql bench\n\
             as PG/pgbench -h /run/postgresql -i -s 5 -q bench\n\
             as PG/psql -h /run/postgresql -q bench -c 'create table ledger (n bigint primary key)'\n",
        ]),
        MINUTE * 4,
    );
    node.start(&script(&[
        AS,
        "as PG/pgbench -h /run/postgresql -c 4 -j 1 -T 600 --max-tries=1 bench >/dev/null 2>&1 &\n\
         n=0; while true; do n=$((n+1)); as PG/psql -h /run/postgresql -qc \"insert into ledger values ($n)\" bench && echo $n > /share/committed.tmp && mv /share/committed.tmp /share/committed; done\n",
    ]));
    let file = cluster.scratch("node1").join("committed");
    let committed = || {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
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
            &attach(["data2", "log2"], [10811, 10812]),
            "mount /dev/nbd0 /pg\nmount /dev/nbd1 /wal\nrm -f /pg/data/postmaster.pid\n",
            AS,
            START,
            "echo highest $(as PG/psql -h /run/postgresql -Atc 'select count(*), max(n) from ledger' bench)\n\
             as PG/psql -h /run/postgresql -Atc 'select sum(abalance) = (select sum(delta) from pgbench_history) from pgbench_accounts' bench\n\
             as PG/pg_amcheck -h /run/postgresql --install-missing --heapallindexed bench || echo AMCHECK_FAILED\n",
        ]),
        MINUTE * 3,
    );
    let highest = output.lines().find_map(|l| l.strip_prefix("highest "));
    let (count, max) = highest
        .and_then(|h| h.split_once('|'))
        .unwrap_or_else(|| panic!("{output}"));
    assert_eq!(count, max, "no hole in the ledger: {output}");
    let max: u64 = max.trim().parse().unwrap();
    assert!(
        (reported..committed()).contains(&max),
        "{reported} commits were reported before the snapshot, {max} are there"
    );
    assert!(
        output.lines().any(|l| l.trim() == "t"),
        "pgbench's balance is wrong: {output}"
    );
    assert!(!output.contains("AMCHECK_FAILED"), "{output}");
    println!("{reported} commits reported, {max} there");
}
