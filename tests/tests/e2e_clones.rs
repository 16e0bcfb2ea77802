//! Clones with real processes (docs/snapshots.md, C1 to C7): what they show, what they outlive, what is left of them.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, have, run_ok, wait_until};

const SIZE: u64 = 96 << 20;

/// A file of random bytes with a hole of zeroes in the middle.
fn random_file(cluster: &Cluster, name: &str, bytes: u64) -> PathBuf {
    let path = cluster.scratch(name);
    let script = format!(
        "head -c {bytes} /dev/urandom > {path} && dd if=/dev/zero of={path} bs=1M seek=20 count=9 conv=notrunc status=none",
        path = path.display()
    );
    run_ok("sh", &["-c", &script]);
    path
}

fn write(export: &Export, file: &Path) {
    run_ok(
        "nbdcopy",
        &["--flush", file.to_str().unwrap(), &export.uri()],
    );
}

fn assert_shows(export: &Export, file: &Path, what: &str) {
    let uri = export.uri();
    let back = format!("{}.back", file.display());
    run_ok("nbdcopy", &[&uri, &back]);
    run_ok("truncate", &["-s", &SIZE.to_string(), &back]);
    let out = ashlar_tests::e2e::run("cmp", &[file.to_str().unwrap(), &back]);
    assert!(out.status.success(), "{what}: {out:?}");
    std::fs::remove_file(&back).unwrap();
}

fn used_bytes(cluster: &Cluster) -> u64 {
    cluster.used_by_disk().iter().sum()
}

#[test]
fn clones_show_their_snapshot_and_outlive_what_they_were_made_of() {
    if !have(&["nbdcopy", "cmp"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("db", "96MiB", 3);
    let first = random_file(&cluster, "first.raw", SIZE);
    let second = random_file(&cluster, "second.raw", SIZE);
    let db = Export::start(&cluster, "db");
    write(&db, &first);
    cluster.ok(&["snapshot", "create", "db", "--name", "s1"]);
    write(&db, &second);

    let began = Instant::now();
    cluster.ok(&["volume", "create", "c1", "--from-snapshot", "s1"]);
    println!("a clone took {:?}", began.elapsed());
    let c1 = Export::start(&cluster, "c1");
    assert_shows(&c1, &first, "the clone shows the snapshot");
    assert_shows(&db, &second, "the parent shows its head");
    // Three replicas of two images: nothing was copied for the clone.
    assert!(used_bytes(&cluster) < 3 * (2 * SIZE + (8 << 20)));

    // The clone is a volume like any other: written, trimmed, snapshotted, cloned while it is attached.
    let mut client = NbdClient::connect_unix(c1.socket(), "c1").unwrap();
    client.write(3 << 20, &[0x5a; 65536]).unwrap();
    client.trim(40 << 20, 1 << 20).unwrap();
    client.write(70 << 20, &[0xa5; 4096]).unwrap();
    client.flush().unwrap();
    drop(client);
    let script = format!(
        "dd if=/dev/zero bs=64k count=1 status=none | tr '\\000' '\\132' | dd of={f} bs=64k seek=48 conv=notrunc status=none; \
         dd if=/dev/zero of={f} bs=1M seek=40 count=1 conv=notrunc status=none; \
         dd if=/dev/zero bs=4k count=1 status=none | tr '\\000' '\\245' | dd of={f} bs=4k seek=17920 conv=notrunc status=none",
        f = first.display()
    );
    run_ok("sh", &["-c", &script]);
    assert_shows(&c1, &first, "the clone shows its own");
    assert_shows(&db, &second, "and the parent nothing of it");
    cluster.ok(&[
        "volume",
        "create",
        "c2",
        "--from-volume",
        "c1",
        "--size",
        "128MiB",
    ]);
    let c2 = Export::start(&cluster, "c2");
    assert_shows(&c2, &first, "a clone of the clone");

    // Everything it was made of is deleted; a daemon dies and comes back.
    assert!(db.stop().success());
    assert!(c1.stop().success());
    cluster.ok(&["snapshot", "delete", "s1", "--yes"]);
    cluster.ok(&["volume", "delete", "db", "--yes"]);
    cluster.ok(&["volume", "delete", "c1", "--yes"]);
    assert_shows(&c2, &first, "what was deleted is kept for it");
    cluster.ok(&["dev", "kill", "daemon-2"]);
    let mut client = NbdClient::connect_unix(c2.socket(), "c2").unwrap();
    client.write(5 << 20, &[0x11; 8192]).unwrap();
    client.flush().unwrap();
    drop(client);
    let script = format!(
        "dd if=/dev/zero bs=8k count=1 status=none | tr '\\000' '\\021' | dd of={} bs=8k seek=640 conv=notrunc status=none",
        first.display()
    );
    run_ok("sh", &["-c", &script]);
    cluster.ok(&["dev", "start", "daemon-2"]);
    cluster.wait_redundant("c2", Duration::from_secs(60));

    cluster.ok(&["volume", "flatten", "c2", "--wait"]);
    assert_shows(&c2, &first, "the clone on its own");
    let shown = cluster.json(&["volume", "show", "c2"]);
    assert!(shown["parent"].is_null(), "{shown}");
    // What was kept for it goes: three replicas of what it holds are left, and a page or two.
    wait_until("space to come back", Duration::from_secs(60), || {
        (used_bytes(&cluster) < 3 * (SIZE + (4 << 20))).then_some(())
    });
    assert!(c2.stop().success());
    cluster.ok(&["volume", "delete", "c2", "--yes"]);
    wait_until("all space to come back", Duration::from_secs(60), || {
        (used_bytes(&cluster) == 0).then_some(())
    });
}

#[test]
fn trimmed_space_comes_back_on_every_disk_unless_a_snapshot_holds_it() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("v", "64MiB", 3);
    let export = Export::start(&cluster, "v");
    let mut client = NbdClient::connect_unix(export.socket(), "v").unwrap();
    let mib = vec![0x77; 1 << 20];
    for part in 0..32u64 {
        client.write(part << 20, &mib).unwrap();
    }
    client.flush().unwrap();
    let within = |low, high| cluster.wait_used_mib(low, high);
    within(32, 34);
    // What was trimmed is free as soon as it is written back.
    client.trim(0, 16 << 20).unwrap();
    client.flush().unwrap();
    within(16, 18);
    // What a snapshot shows is kept, and free when the snapshot is deleted.
    cluster.ok(&["snapshot", "create", "v", "--name", "s"]);
    client.trim(16 << 20, 16 << 20).unwrap();
    client.flush().unwrap();
    std::thread::sleep(Duration::from_secs(5));
    within(16, 18);
    cluster.ok(&["snapshot", "delete", "s", "--yes"]);
    within(0, 2);
    drop(client);
    assert!(export.stop().success());
}
