//! Bits flipped in the disk file of one replica: every read stays right and the blocks are repaired.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use ashlar_platform::sim::Rng;
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient};

const BLOCKS: u64 = 4096;

/// The disk file of a daemon.
fn disk_of(cluster: &Cluster, daemon: u32) -> PathBuf {
    let disks = cluster.json(&["disk", "list"]);
    let node = format!("node-{daemon}");
    let disk = disks
        .as_array()
        .unwrap()
        .iter()
        .find(|d| d["node"].as_str() == Some(&node));
    let disk = disk.unwrap_or_else(|| panic!("no disk of {node} in {disks}"));
    disk["path"].as_str().unwrap().into()
}

/// Flips one bit in each of `count` random places that hold something.
fn flip(path: &PathBuf, rng: &mut Rng, count: u32) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let length = file.metadata().unwrap().len();
    let mut flipped = 0;
    while flipped < count {
        let at = rng.below(length);
        let mut byte = [0u8];
        file.read_exact_at(&mut byte, at).unwrap();
        if byte[0] == 0 {
            continue; // mostly unused space
        }
        byte[0] ^= 1 << rng.below(8);
        file.write_all_at(&byte, at).unwrap();
        flipped += 1;
    }
    file.sync_all().unwrap();
}

#[test]
fn flipped_bits_of_one_replica_are_never_returned_and_are_repaired() {
    let cluster = Cluster::up(ClusterSpec {
        disk_size: "256MiB",
        ..ClusterSpec::default()
    });
    cluster.volume("rot", "64MiB", 3);
    let export = Export::start(&cluster, "rot");
    let mut client = NbdClient::connect_unix(export.socket(), "rot").unwrap();
    for block in 0..BLOCKS {
        client.write_stamp(block, block + 1).unwrap();
    }
    client.flush().unwrap();
    let mut rng = Rng::new(3);
    for daemon in 1..=3 {
        // While it runs: data pages and log are read back as they are now on the disk.
        flip(&disk_of(&cluster, daemon), &mut rng, 60);
        for block in 0..BLOCKS {
            assert_eq!(
                client.read_stamp(block).unwrap(),
                block + 1,
                "block {block}"
            );
        }
        // While it is down: superblock, descriptors and page metadata are read when it starts.
        cluster.ok(&["dev", "kill", &format!("daemon-{daemon}")]);
        flip(&disk_of(&cluster, daemon), &mut rng, 20);
        client.write_stamp(0, 1).unwrap();
        cluster.ashlar(&["dev", "start", &format!("daemon-{daemon}")]);
        cluster.wait_redundant("rot", Duration::from_secs(40));
        for block in 0..BLOCKS {
            assert_eq!(
                client.read_stamp(block).unwrap(),
                block + 1,
                "block {block}"
            );
        }
    }
    assert!(export.stop().success());
}
