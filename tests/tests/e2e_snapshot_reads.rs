//! Snapshots read over NBD, and lists of what they have and of what changed, against what the volume was then.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::e2e::csi::Driver;
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, have, run_ok};
use csi_driver::rpc;
use tonic::Code;

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

/// A volume with snapshots `one` and `two`, detached; their images.
fn two_snapshots(cluster: &Cluster, size: u64) -> (PathBuf, PathBuf) {
    cluster.ok(&["pool", "create", "default"]);
    let bytes = size.to_string();
    cluster.ok(&[
        "volume",
        "create",
        "v",
        "--size",
        &bytes,
        "--replicas",
        "2",
        "--groups",
        "2",
    ]);
    let writer = Export::start(cluster, "v");
    let mut client = connect(&writer, "v");
    write_pattern(&mut client, size, 1);
    let one = snapshot(cluster, &writer, "v", "one");
    write_pattern(&mut client, size, 2);
    client.trim(8 * MIB, 9 * MIB as u32).unwrap();
    client.write(40 * MIB, &vec![9; 2 * MIB as usize]).unwrap();
    let two = snapshot(cluster, &writer, "v", "two");
    drop(client);
    assert!(writer.stop().success());
    (one, two)
}

fn image(cluster: &Cluster, name: &str) -> PathBuf {
    let export = Export::start(cluster, "v");
    let copy = nbdcopy(cluster, &export.uri(), name);
    assert!(export.stop().success());
    copy
}

#[test]
fn a_detached_volume_is_reverted_also_after_an_interruption() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    let size = 64 * MIB;
    let (one, two) = two_snapshots(&cluster, size);
    let revert = ["snapshot", "revert", "v", "one", "--yes"];

    let export = Export::start(&cluster, "v");
    let refused = cluster.ashlar(&revert);
    assert!(!refused.status.success(), "it is attached");
    assert!(export.stop().success());

    cluster.ok(&revert);
    assert_same(&image(&cluster, "back.raw"), &one);
    // What was there is still in the other snapshot, and the revert is a change like any other.
    let reader = Export::start_snapshot(&cluster, "two", "reader");
    assert_same(&nbdcopy(&cluster, &reader.uri(), "copy.raw"), &two);
    assert!(reader.stop().success());
    cluster.ok(&["snapshot", "create", "v", "--name", "three"]);
    let found = blocks(&cluster.json(&["snapshot", "diff", "two", "three"]), size);
    let changed = truth(&two, &one);
    for (block, change) in changed.iter().enumerate().filter(|(_, c)| c.is_some()) {
        assert_eq!(found[block], *change, "block {block}");
    }

    // Killed wherever it is: the same command once more completes it, nobody has to be detached by hand.
    let mut interrupted = 0;
    for (round, after_ms) in [2, 10, 20, 40, 60, 80, 100, 120, 150, 200, 300]
        .into_iter()
        .enumerate()
    {
        let (name, image_of) = [("two", &two), ("one", &one)][round % 2];
        let revert = ["snapshot", "revert", "v", name, "--yes"];
        let mut half = cluster
            .command(&ashlar_tests::e2e::binary("ashlar"))
            .arg("--dir")
            .arg(cluster.dir())
            .args(revert)
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(after_ms));
        half.kill().unwrap();
        half.wait().unwrap();
        let shown = cluster.json(&["volume", "show", "v"]);
        let (reverting, holder) = (&shown["reverting"], &shown["holder"]);
        println!("killed after {after_ms} ms: reverting {reverting}, held by {holder}");
        assert!(
            holder.is_null() || !reverting.is_null(),
            "held, and nothing to finish"
        );
        interrupted += u32::from(!reverting.is_null());
        cluster.ok(&revert);
        if round % 4 == 0 {
            assert_same(&image(&cluster, "back.raw"), image_of);
        }
    }
    assert!(interrupted > 0, "none was killed on the way");
}

/// A stream's ranges, and the size that it tells; no message has more ranges than asked for.
async fn ranges(
    driver: &Driver,
    base: Option<&str>,
    target: &str,
    starting_offset: i64,
    max_results: i32,
) -> Result<(i64, Vec<(i64, i64)>), tonic::Status> {
    let mut client = driver.snapshot_metadata();
    let (mut size, mut all) = (0, Vec::new());
    let mut take = |capacity: i64, kind: i32, part: Vec<rpc::BlockMetadata>| {
        assert!(max_results == 0 || part.len() <= max_results as usize);
        assert_eq!(kind, i32::from(rpc::BlockMetadataType::VariableLength));
        size = capacity;
        all.extend(part.iter().map(|b| (b.byte_offset, b.size_bytes)));
    };
    match base {
        None => {
            let ask = rpc::GetMetadataAllocatedRequest {
                snapshot_id: target.to_owned(),
                starting_offset,
                max_results,
                ..Default::default()
            };
            let mut stream = client.get_metadata_allocated(ask).await?.into_inner();
            while let Some(m) = stream.message().await? {
                take(
                    m.volume_capacity_bytes,
                    m.block_metadata_type,
                    m.block_metadata,
                );
            }
        }
        Some(base) => {
            let ask = rpc::GetMetadataDeltaRequest {
                base_snapshot_id: base.to_owned(),
                target_snapshot_id: target.to_owned(),
                starting_offset,
                max_results,
                ..Default::default()
            };
            let mut stream = client.get_metadata_delta(ask).await?.into_inner();
            while let Some(m) = stream.message().await? {
                take(
                    m.volume_capacity_bytes,
                    m.block_metadata_type,
                    m.block_metadata,
                );
            }
        }
    }
    Ok((size, all))
}

/// The blocks that ranges name.
fn named(ranges: &[(i64, i64)], size: u64) -> Vec<bool> {
    let mut map = vec![false; (size / BLOCK) as usize];
    for (offset, length) in ranges {
        let first = *offset as u64 / BLOCK;
        map[first as usize..(first + *length as u64 / BLOCK) as usize].fill(true);
    }
    map
}

#[test]
fn csi_tells_allocated_and_changed_blocks() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    let size = 64 * MIB;
    let (one, two) = two_snapshots(&cluster, size);
    let empty = cluster.scratch("empty.raw");
    std::fs::write(&empty, vec![0; size as usize]).unwrap();
    cluster.volume("other", "64MiB", 1);
    cluster.ok(&["snapshot", "create", "other", "--name", "foreign"]);
    let id = |name: &str| {
        let shown = cluster.json(&["snapshot", "show", name]);
        shown["id"].as_str().unwrap().to_owned()
    };
    let [a, b, foreign] = ["one", "two", "foreign"].map(id);
    let some = |map: Vec<Option<bool>>| map.iter().map(Option::is_some).collect::<Vec<_>>();
    let driver = Driver::controller_only(&cluster, "csi");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (bytes, found) = ranges(&driver, None, &a, 0, 0).await.unwrap();
        assert_eq!(bytes, size as i64);
        assert_eq!(named(&found, size), some(truth(&empty, &one)));
        let (_, delta) = ranges(&driver, Some(&a), &b, 0, 7).await.unwrap();
        assert_eq!(named(&delta, size), some(truth(&one, &two)));
        // From the middle of a range, and of a block, on: the block is told whole.
        let (offset, length) = *delta.iter().find(|(_, l)| *l > 2 * BLOCK as i64).unwrap();
        let middle = offset + BLOCK as i64;
        let (_, rest) = ranges(&driver, Some(&a), &b, middle + 100, 0)
            .await
            .unwrap();
        assert_eq!(rest[0], (middle, length - BLOCK as i64));
        let (bytes, none) = ranges(&driver, None, &a, size as i64, 0).await.unwrap();
        assert_eq!((bytes, none.len()), (size as i64, 0));
        let (_, nothing) = ranges(&driver, None, &foreign, 0, 0).await.unwrap();
        assert!(nothing.is_empty(), "never opened");

        let beyond = size as i64 + 1;
        for (base, target, offset, results, code) in [
            (None, "none", 0, 0, Code::NotFound),
            (None, "", 0, 0, Code::InvalidArgument),
            (None, a.as_str(), beyond, 0, Code::OutOfRange),
            (None, a.as_str(), -1, 0, Code::InvalidArgument),
            (None, a.as_str(), 0, -1, Code::InvalidArgument),
            (Some("none"), a.as_str(), 0, 0, Code::NotFound),
            (
                Some(foreign.as_str()),
                a.as_str(),
                0,
                0,
                Code::FailedPrecondition,
            ),
            (Some(b.as_str()), a.as_str(), 0, 0, Code::FailedPrecondition),
            (Some(a.as_str()), b.as_str(), beyond, 0, Code::OutOfRange),
        ] {
            let refused = ranges(&driver, base, target, offset, results)
                .await
                .unwrap_err();
            assert_eq!(
                refused.code(),
                code,
                "{base:?} {target:?} {offset}: {refused}"
            );
        }
    });
}
