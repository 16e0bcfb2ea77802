//! Snapshots read over NBD, and lists of what they have and of what changed, against what the volume was then.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, have, run_ok};

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;

fn connect(export: &Export, name: &str) -> NbdClient {
    NbdClient::connect_unix(export.socket(), name).unwrap()
}

/// Blocks that a step of the test writes: spread over all groups, with gaps, differently for each stamp.
fn pattern(size: u64, stamp: u64) -> impl Iterator<Item = u64> {
    (0..size / BLOCK).filter(move |b| {
        let mixed =
            b.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stamp.wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed >> 40) % 61 < 2
    })
}

fn write_pattern(client: &mut NbdClient, size: u64, stamp: u64) {
    for block in pattern(size, stamp) {
        client.write_stamp(block, stamp).unwrap();
    }
}

fn nbdcopy(cluster: &Cluster, uri: &str, name: &str) -> PathBuf {
    let file = cluster.scratch(name);
    run_ok("nbdcopy", &[uri, file.to_str().unwrap()]);
    file
}

/// Takes a snapshot, and an image of the volume as it is at that moment (nobody writes meanwhile).
fn snapshot(cluster: &Cluster, export: &Export, volume: &str, name: &str) -> PathBuf {
    cluster.ok(&["snapshot", "create", volume, "--name", name]);
    nbdcopy(cluster, &export.uri(), &format!("{name}.raw"))
}

fn assert_same(one: &Path, other: &Path) {
    let [a, b] = [one, other].map(|f| std::fs::read(f).unwrap());
    assert_eq!(a.len(), b.len());
    let differs = (0..a.len()).step_by(BLOCK as usize).find(|at| {
        let end = at + BLOCK as usize;
        a[*at..end] != b[*at..end]
    });
    assert_eq!(differs, None, "{} and {}", one.display(), other.display());
}

/// A map of an extent list: for each block `None` (not in it) or whether it has data.
fn blocks(list: &serde_json::Value, size: u64) -> Vec<Option<bool>> {
    let mut map = vec![None; (size / BLOCK) as usize];
    let mut last = 0;
    for e in list.as_array().unwrap() {
        let (offset, length) = (e["offset"].as_u64().unwrap(), e["length"].as_u64().unwrap());
        assert!(
            length > 0 && offset >= last && offset + length <= size,
            "{e}"
        );
        last = offset + length;
        for block in offset / BLOCK..last / BLOCK {
            map[block as usize] = Some(e["kind"] == "data");
        }
    }
    map
}

/// What a diff must say: blocks that differ between two images, and whether they have data.
fn truth(base: &Path, newer: &Path) -> Vec<Option<bool>> {
    let [base, newer] = [base, newer].map(|f| std::fs::read(f).unwrap());
    let chunks = |image: &[u8]| -> Vec<Vec<u8>> {
        image.chunks(BLOCK as usize).map(<[u8]>::to_vec).collect()
    };
    let (base, newer) = (chunks(&base), chunks(&newer));
    let blocks = base.iter().zip(&newer);
    blocks
        .map(|(b, n)| (b != n).then(|| n.iter().any(|byte| *byte != 0)))
        .collect()
}

fn assert_blocks(found: &[Option<bool>], expected: &[Option<bool>]) {
    let differs = (0..found.len()).find(|b| found[*b] != expected[*b]);
    let show = differs.map(|b| (b, found[b], expected[b]));
    assert_eq!(show, None, "block, found, expected");
}

#[test]
fn snapshots_are_read_and_compared_while_the_volume_goes_on_and_after_its_deletion() {
    if !have(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    let size = 96 * MIB;
    cluster.ok(&["pool", "create", "default"]);
    cluster.ok(&[
        "volume",
        "create",
        "v",
        "--size",
        "96MiB",
        "--replicas",
        "3",
        "--groups",
        "3",
    ]);
    let empty = cluster.scratch("empty.raw");
    std::fs::write(&empty, vec![0; size as usize]).unwrap();

    let writer = Export::start(&cluster, "v");
    let mut client = connect(&writer, "v");
    write_pattern(&mut client, size, 1);
    let one = snapshot(&cluster, &writer, "v", "one");
    write_pattern(&mut client, size, 2);
    // Of the first and of the second pattern, of nothing, and a whole chunk.
    client.trim(20 * MIB, 8 * MIB as u32).unwrap();
    for block in pattern(size, 1).take(5) {
        client.trim(block * BLOCK, BLOCK as u32).unwrap();
    }
    let two = snapshot(&cluster, &writer, "v", "two");
    write_pattern(&mut client, size, 3);
    client.write(21 * MIB, &vec![7; MIB as usize]).unwrap();
    let three = snapshot(&cluster, &writer, "v", "three");
    write_pattern(&mut client, size, 4);

    // While it is attached and written.
    let reader = Export::start_snapshot(&cluster, "one", "reader");
    let info = run_ok("nbdinfo", &[reader.uri()]);
    for expected in [
        format!("export-size: {size}"),
        "is_read_only: true".into(),
        "can_multi_conn: true".into(),
    ] {
        assert!(info.contains(&expected), "{expected} not in:\n{info}");
    }
    assert_same(&nbdcopy(&cluster, &reader.uri(), "copy.raw"), &one);
    let mut other = connect(&reader, "one");
    assert!(
        other.write_stamp(0, 9).is_err(),
        "a snapshot is not written"
    );

    // A daemon dies while it is read; the others go on, also for lists.
    let mut early = connect(&reader, "one");
    cluster.ok(&["dev", "kill", "daemon-2"]);
    for block in pattern(size, 1) {
        assert_eq!(early.read_stamp(block).unwrap(), 1);
    }
    let both =
        |base: &str, newer: &str| blocks(&cluster.json(&["snapshot", "diff", base, newer]), size);
    assert_blocks(&both("one", "two"), &truth(&one, &two));
    assert_blocks(&both("two", "three"), &truth(&two, &three));
    cluster.ok(&["dev", "start", "daemon-2"]);
    write_pattern(&mut client, size, 5);
    cluster.wait_redundant("v", Duration::from_secs(60));

    // Every replica shows the same, also the one that was rebuilt.
    assert_blocks(&both("one", "three"), &truth(&one, &three));
    assert_blocks(
        &both("three", "three"),
        &vec![None; (size / BLOCK) as usize],
    );
    let allocated = |name: &str| blocks(&cluster.json(&["snapshot", "extents", name]), size);
    assert_blocks(&allocated("one"), &truth(&empty, &one));
    assert_blocks(&allocated("three"), &truth(&empty, &three));
    let map = run_ok(
        "nbdinfo",
        &["--map=base:allocation", "--totals", reader.uri().as_str()],
    );
    let data = allocated("one").iter().flatten().count() as u64 * BLOCK;
    assert!(map.contains(&data.to_string()), "{data} not in {map}");

    // Names in the wrong order, and of things that are not there.
    let refused = cluster.ashlar(&["snapshot", "diff", "two", "one"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && why.contains("newer"), "{why}");

    // Detached, then deleted: it is kept for its snapshots.
    drop(client);
    assert!(writer.stop().success());
    assert_eq!(
        other.read_stamp(pattern(size, 1).next().unwrap()).unwrap(),
        1
    );
    cluster.ok(&["volume", "delete", "v", "--yes"]);
    assert_same(&nbdcopy(&cluster, &reader.uri(), "copy.raw"), &one);
    let late = Export::start_snapshot(&cluster, "three", "late");
    assert_same(&nbdcopy(&cluster, &late.uri(), "copy.raw"), &three);
    assert_blocks(&both("one", "two"), &truth(&one, &two));

    // A deleted snapshot ends its reader, and no other.
    let mut reader = reader;
    cluster.ok(&["snapshot", "delete", "one", "--yes"]);
    assert!(!reader.wait_end(Duration::from_secs(10)).success());
    assert!(
        reader.log().contains("the snapshot was deleted"),
        "{}",
        reader.log()
    );
    assert_same(&nbdcopy(&cluster, &late.uri(), "copy.raw"), &three);
    assert!(late.stop().success());
}
