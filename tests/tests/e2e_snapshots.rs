//! Snapshots of volumes that are written meanwhile, with real processes: taken, alone and in groups, and deleted.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, have};

/// fio that writes at random until it is told to stop, and ends at the first error.
fn fio(export: &Export) -> std::process::Child {
    std::process::Command::new("fio")
        .args(["--name=w", "--ioengine=nbd", "--rw=randwrite", "--bs=4k"])
        .args(["--iodepth=16", "--size=64m", "--time_based", "--runtime=60"])
        .arg(format!("--uri={}", export.uri()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn volumes_are_snapshotted_while_they_are_written_and_what_is_deleted_goes() {
    if !have(&["fio"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("one", "128MiB", 3);
    cluster.volume("two", "128MiB", 3);
    let exports = ["one", "two"].map(|name| Export::start(&cluster, name));
    let mut writers = exports.each_ref().map(fio);
    std::thread::sleep(Duration::from_secs(1));

    let mut took = Vec::new();
    for i in 0..8 {
        let began = Instant::now();
        cluster.ok(&["snapshot", "create", "one", "--name", &format!("s{i}")]);
        took.push(began.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("a command each: {took:?}");
    cluster.ok(&["snapshot", "create", "one", "two", "--name", "both"]);
    let all = cluster.json(&["snapshot", "list"]);
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 10, "{all:?}");
    assert!(all.iter().all(|s| s["state"] == "ready"), "{all:?}");
    for writer in &mut writers {
        assert!(writer.try_wait().unwrap().is_none(), "fio met an error");
    }

    // Deleted while it goes on; the disks merge what is left, and say so.
    let mut names: Vec<String> = (0..8).map(|i| format!("s{i}")).collect();
    names.extend(["both-one".to_owned(), "both-two".to_owned()]);
    for name in &names {
        cluster.ok(&["snapshot", "delete", name, "--yes"]);
    }
    let began = Instant::now();
    loop {
        let left = cluster.json(&["snapshot", "list"]);
        if left == serde_json::json!([]) {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(40), "{left:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    for writer in &mut writers {
        assert!(writer.try_wait().unwrap().is_none(), "fio met an error");
        writer.kill().unwrap();
        writer.wait().unwrap();
    }
    for export in exports {
        assert!(export.stop().success());
    }
    for volume in ["one", "two"] {
        let shown = cluster.json(&["volume", "show", volume]);
        assert_eq!(shown["clean"], true, "{shown}");
    }
}
