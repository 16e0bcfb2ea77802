//! Replicas on disks that do not come back get others by themselves.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, wait_until};

const MIB: u64 = 1 << 20;

/// The bytes of MiB `part` in round `round`.
fn content(part: u64, round: u64) -> Vec<u8> {
    let seed = (part << 8 | round).to_le_bytes();
    seed.iter().copied().cycle().take(1 << 20).collect()
}

/// Nodes that the volume has replicas on, and whether all are in sync.
fn replicas(cluster: &Cluster, volume: &str) -> (Vec<String>, bool) {
    let shown = cluster.json(&["volume", "show", volume]);
    let mut nodes = Vec::new();
    let mut in_sync = true;
    for replica in shown["replica_list"].as_array().unwrap() {
        nodes.push(replica["node"].as_str().unwrap().to_owned());
        in_sync &= replica["state"] == "in-sync";
    }
    nodes.sort();
    nodes.dedup();
    (nodes, in_sync)
}

#[test]
fn a_node_that_stays_away_is_replaced_under_load_and_cleaned_up_when_it_returns() {
    let cluster = Cluster::up(ClusterSpec {
        daemons: 4,
        replace_after: Some(4),
        ..ClusterSpec::default()
    });
    cluster.volume("v", "256MiB", 3);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    for part in 0..128 {
        client.write(part * MIB, &content(part, 0)).unwrap();
    }
    client.flush().unwrap();
    let (before, _) = replicas(&cluster, "v");
    assert_eq!(before.len(), 3);
    let victim = before.first().unwrap().clone();
    let daemon = victim.replace("node-", "daemon-");
    cluster.ok(&["dev", "kill", &daemon]);

    // Writes go on all the time, and soon there are three good copies again.
    let began = Instant::now();
    let mut round = 1;
    let after = loop {
        for part in (0..64).step_by(8) {
            client.write(part * MIB, &content(part, round)).unwrap();
        }
        client.flush().unwrap();
        let (nodes, in_sync) = replicas(&cluster, "v");
        if in_sync && !nodes.contains(&victim) {
            break nodes;
        }
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "not replaced: {nodes:?} {in_sync}"
        );
        round += 1;
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(after.len(), 3, "{after:?}");

    // What the new set holds is everything: another of the first three may die now, with nothing to take its place.
    let second = before.iter().find(|n| after.contains(n)).unwrap();
    cluster.ok(&["dev", "kill", &second.replace("node-", "daemon-")]);
    for part in 0..128 {
        let round = if part < 64 && part % 8 == 0 { round } else { 0 };
        let read = client.read(part * MIB, 1 << 20).unwrap();
        assert!(read == content(part, round), "MiB {part}");
    }
    cluster.ok(&["dev", "start", &second.replace("node-", "daemon-")]);

    // The first one comes back: what it had is not needed any more, and it may be used again.
    cluster.ok(&["dev", "start", &daemon]);
    wait_until(
        "the returning disk to be emptied, or used",
        Duration::from_secs(60),
        || {
            let (nodes, in_sync) = replicas(&cluster, "v");
            let disks = cluster.json(&["disk", "list"]);
            let disk = disks.as_array().unwrap().iter();
            let used = disk.filter(|d| d["node"] == victim.as_str());
            let used: u64 = used.map(|d| d["used_bytes"].as_u64().unwrap()).sum();
            let fits = nodes.contains(&victim) || used == 0;
            (in_sync && nodes.len() == 3 && fits).then_some(())
        },
    );
    assert!(export.stop().success());
}

#[test]
fn without_a_place_to_go_to_a_replica_waits_for_its_disk() {
    let cluster = Cluster::up(ClusterSpec {
        replace_after: Some(2),
        ..ClusterSpec::default()
    });
    cluster.volume("v", "64MiB", 3);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    client.write(0, &content(0, 0)).unwrap();
    client.flush().unwrap();
    cluster.ok(&["dev", "kill", "daemon-2"]);
    client.write(MIB, &content(1, 0)).unwrap();
    client.flush().unwrap();
    std::thread::sleep(Duration::from_secs(6));
    let logs = cluster.logs();
    assert!(
        logs.contains("there is no disk for another"),
        "nobody says so: {logs}"
    );
    cluster.ok(&["dev", "start", "daemon-2"]);
    wait_until("full redundancy", Duration::from_secs(60), || {
        let (nodes, in_sync) = replicas(&cluster, "v");
        (in_sync && nodes.len() == 3).then_some(())
    });
    assert!(client.read(0, 1 << 20).unwrap() == content(0, 0));
    assert!(client.read(MIB, 1 << 20).unwrap() == content(1, 0));
    assert!(export.stop().success());
}

fn health(cluster: &Cluster, volume: &str) -> (u64, u64, String) {
    let shown = cluster.json(&["volume", "show", volume]);
    let number = |key: &str| shown[key].as_u64().unwrap();
    let mode = shown["holder"]["mode"].as_str().unwrap_or("-").to_owned();
    (number("replicas_in_sync"), number("replicas_total"), mode)
}

#[test]
fn a_volume_that_nobody_uses_is_rebuilt_and_still_opens_at_once() {
    let cluster = Cluster::up(ClusterSpec {
        daemons: 4,
        replace_after: Some(3),
        ..ClusterSpec::default()
    });
    cluster.volume("v", "128MiB", 3);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    for part in 0..96 {
        client.write(part * MIB, &content(part, 0)).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    assert!(export.stop().success());
    let (before, in_sync) = replicas(&cluster, "v");
    assert!(in_sync && before.len() == 3);
    let victim = before.first().unwrap().clone();
    cluster.ok(&["dev", "kill", &victim.replace("node-", "daemon-")]);
    let mut cared = false;
    wait_until(
        "three good copies, and nobody",
        Duration::from_secs(60),
        || {
            let (good, total, mode) = health(&cluster, "v");
            cared |= mode == "care";
            let (nodes, _) = replicas(&cluster, "v");
            let done = good == 3 && total == 3 && mode == "-" && !nodes.contains(&victim);
            done.then_some(())
        },
    );
    assert!(cared, "somebody held it");
    let shown = cluster.json(&["volume", "show", "v"]);
    assert_eq!(shown["clean"], true, "{shown}");

    // Whoever wants a volume that is being cared for gets it at once.
    let (nodes, _) = replicas(&cluster, "v");
    let second = nodes.first().unwrap().replace("node-", "daemon-");
    cluster.ok(&["dev", "kill", &second]);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    for part in 0..96 {
        client.write(part * MIB, &content(part, 1)).unwrap();
    }
    client.flush().unwrap();
    drop(client);
    assert!(export.stop().success());
    cluster.ok(&["dev", "start", &second]);
    wait_until("a daemon to hold it", Duration::from_secs(30), || {
        let (good, total, mode) = health(&cluster, "v");
        (mode == "care" || good == total).then_some(())
    });
    let began = Instant::now();
    let export = Export::start(&cluster, "v");
    println!("open beside a daemon that cares: {:?}", began.elapsed());
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    for part in 0..96 {
        let read = client.read(part * MIB, 1 << 20).unwrap();
        assert!(read == content(part, 1), "MiB {part}");
    }
    drop(client);
    assert!(export.stop().success());
    wait_until("three good copies again", Duration::from_secs(60), || {
        let (good, total, mode) = health(&cluster, "v");
        (good == 3 && total == 3 && mode == "-").then_some(())
    });

    // The same for one that deletes it.
    cluster.ok(&["dev", "kill", &second]);
    cluster.ok(&["volume", "delete", "v", "--yes"]);
    cluster.ok(&["dev", "start", &second]);
}
