//! Lists of blocks (docs/snapshots.md, S10) against reads at the two numbers, over random histories.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_proto::ids::*;
use ashlar_proto::wire::BlockState;
use storage_daemon::store::*;
use store_support::layers::*;
use store_support::*;

/// A list with all of its parts, for group 0 of one, or of a group of two.
fn listed(
    h: &mut Harness,
    snapshot: SnapshotNumber,
    base: Option<SnapshotNumber>,
    (group, group_count): (u32, u32),
) -> Result<Vec<BlockRun>, StoreError> {
    let mut runs = Vec::new();
    let mut from = ChunkIndex(0);
    loop {
        let order = BlockListOrder {
            group: GroupIndex(group),
            group_count,
            snapshot,
            base,
            from,
        };
        let request = StoreRequest::ListBlocks {
            volume: VOLUME,
            order,
        };
        match h.call(request)? {
            StoreReply::Blocks(part) => {
                runs.extend(part.runs);
                match part.next {
                    Some(next) => from = next,
                    None => return Ok(runs),
                }
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Per block: in the list or not, and whether it has data.
fn map(runs: &[BlockRun]) -> Vec<Option<bool>> {
    let mut map = vec![None; (CHUNKS * BLOCKS) as usize];
    let mut last = None;
    for run in runs {
        let begin = (run.range.chunk, run.range.first);
        assert!(last.is_none_or(|l| l <= begin), "ascending: {runs:?}");
        last = Some((run.range.chunk, run.range.end()));
        for block in run.range.blocks() {
            let at = run.range.chunk.0 * BLOCKS + u32::from(block);
            assert_eq!(map[at as usize].replace(run.data), None, "told twice");
        }
    }
    map
}

/// What a number shows: the version of each block with data.
fn shown(h: &mut Harness, number: u32) -> Vec<Option<Version>> {
    let chunks = 0..CHUNKS;
    let states = chunks.flat_map(|chunk| h.states(chunk, BLOCKS, number));
    states
        .map(|(state, version)| (state == BlockState::Data).then_some(version))
        .collect()
}

fn read_number(snapshot: SnapshotNumber) -> u32 {
    match snapshot {
        SnapshotNumber::HEAD => u32::MAX,
        SnapshotNumber(n) => n - 1,
    }
}

/// Every pair of live snapshots and the head.
fn check(h: &mut Harness, live: &[SnapshotNumber], context: &str) {
    let all: Vec<_> = live.iter().copied().chain([SnapshotNumber::HEAD]).collect();
    for (i, newer) in all.iter().enumerate() {
        let new = shown(h, read_number(*newer));
        let expected: Vec<_> = new.iter().map(|v| v.map(|_| true)).collect();
        let found = listed(h, *newer, None, (0, 1)).unwrap();
        assert_eq!(map(&found), expected, "{context}: allocated in {newer:?}");
        let halves: Vec<_> = (0..2)
            .flat_map(|g| listed(h, *newer, None, (g, 2)).unwrap())
            .collect();
        assert_eq!(map(&halves), expected, "{context}: by groups");
        for older in &all[..i] {
            let old = shown(h, read_number(*older));
            let pairs = old.iter().zip(&new);
            let expected: Vec<_> = pairs
                .map(|(o, n)| (o != n).then_some(n.is_some()))
                .collect();
            let found = listed(h, *newer, Some(*older), (0, 1)).unwrap();
            assert_eq!(map(&found), expected, "{context}: {older:?} to {newer:?}");
        }
    }
}

#[test]
fn what_is_listed_is_what_reads_see() {
    for seed in 0..12 {
        let mut h = Harness::open(TestDisk::formatted(&options(24 << 20, 1 << 20)), 1, seed);
        h.create(VOLUME, 1);
        let mut rng = Rng::new(seed);
        let mut volume = Volume::default();
        for round in 0..6 {
            for _ in 0..12 {
                let op = volume.random_op(&mut rng);
                h.call(op.request()).unwrap();
            }
            volume.change_list(&mut rng, 4);
            let list = volume.list.clone();
            h.put_layers(&list);
            if rng.below(3) == 0 {
                // Merged, and at home.
                h.idle();
            }
            check(&mut h, &list.live, &format!("seed {seed}, round {round}"));
        }
    }
}

#[test]
fn lists_of_what_cannot_be_read_are_refused() {
    let mut h = Harness::open(TestDisk::formatted(&options(24 << 20, 1 << 20)), 1, 1);
    h.create(VOLUME, 1);
    let n = SnapshotNumber;
    h.call(write_layer(0, 0, 4, Version::new(1, 1), 0)).unwrap();
    let list = ashlar_proto::layers::LayerList {
        revision: 1,
        settled: n(4),
        live: vec![n(2), n(4)],
    };
    h.put_layers(&list);
    let whole = (0, 1);
    for (snapshot, base, error) in [
        (n(3), None, StoreError::SnapshotGone),
        (n(4), Some(n(1)), StoreError::SnapshotGone),
        (n(0), None, StoreError::Invalid("snapshot numbers")),
        (n(2), Some(n(4)), StoreError::Invalid("snapshot numbers")),
        (n(2), Some(n(2)), StoreError::Invalid("snapshot numbers")),
    ] {
        assert_eq!(listed(&mut h, snapshot, base, whole), Err(error));
    }
    assert!(matches!(
        listed(&mut h, n(2), None, (1, 1)),
        Err(StoreError::Invalid(_))
    ));
    let runs = listed(&mut h, n(4), None, whole).unwrap();
    assert_eq!(
        (runs.len(), runs[0].range.count, runs[0].data),
        (1, 4, true)
    );
    assert_eq!(listed(&mut h, n(4), Some(n(2)), whole), Ok(vec![]));
}
