//! Random operations against a model in memory, under random I/O order, restarts and a full disk.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use std::collections::BTreeMap;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::*;
use ashlar_proto::wire::{self, BlockState, WriteOutcome};
use storage_daemon::store::*;
use store_support::*;

const CHUNKS: u32 = 3;
const BLOCKS: u32 = 128;

type Model = BTreeMap<(u32, u32), (Version, bool)>;

fn apply(m: &mut Model, op: (u32, u32, u32, Version, bool)) {
    for b in op.1..op.1 + op.2 {
        let e = m.entry((op.0, b)).or_default();
        if op.3 > e.0 {
            *e = (op.3, op.4);
        }
    }
}

fn compare(m: &Model, h: &mut Harness, forgotten: Version, context: &str) {
    for chunk in 0..CHUNKS {
        for (b, (state, version)) in h.read_checked(chunk, 0, BLOCKS).into_iter().enumerate() {
            let want = m.get(&(chunk, b as u32)).copied().unwrap_or_default();
            let ok = match state {
                BlockState::Data => want == (version, true),
                BlockState::Tombstone => want == (version, false),
                BlockState::Absent => want.0.is_zero() || (!want.1 && want.0 <= forgotten),
                BlockState::Bad => false,
            };
            assert!(
                ok,
                "{context}: {chunk}/{b} is {state:?} {version:?}, want {want:?}"
            );
        }
    }
}

fn run(seed: u64) -> u64 {
    let mut write_backs = 0;
    let mut h = Harness::open(TestDisk::formatted(&options(24 << 20, 1 << 20)), 1, seed);
    h.create(VOLUME, 1);
    let mut m = Model::new();
    let mut sequence = 0;
    let mut forgotten = Version::ZERO;
    for step in 0..600 {
        let context = format!("seed {seed} step {step}");
        sequence += 1;
        // Versions arrive out of order, and some twice.
        let version = Version::new(1, (sequence - h.rng.below(6).min(sequence - 1)).max(1));
        let version = version.max(Version::new(1, forgotten.sequence.0 / 2 + 1));
        sequence = sequence.max(version.sequence.0);
        let chunk = h.rng.below(u64::from(CHUNKS)) as u32;
        let first = h.rng.below(u64::from(BLOCKS)) as u32;
        let most = if h.rng.below(6) == 0 { 60 } else { 6 };
        let count = (1 + h.rng.below(most) as u32).min(BLOCKS - first);
        match h.rng.below(12) {
            0..=7 => {
                // One version names one content: repeats must not differ in kind.
                let version = Version::new(1, version.sequence.0 * 2);
                let tag = h.request(write(chunk, first, count, version));
                apply(&mut m, (chunk, first, count, version, true));
                h.replies.remove(&tag);
            }
            8 => {
                let version = Version::new(1, version.sequence.0 * 2 + 1);
                h.request(trim(chunk, first, count, version));
                apply(&mut m, (chunk, first, count, version, false));
            }
            9 => {
                h.settle();
                let below = Version::new(1, sequence.saturating_sub(8) * 2);
                forgotten = forgotten.max(below);
                h.flush(below, below);
            }
            10 => {
                // What is not answered yet may be seen or not.
                h.settle();
                compare(&m, &mut h, forgotten, &context);
            }
            _ => {
                h.now = Time(h.now.0 + 2_500_000_000);
                h.tick();
            }
        }
        h.tick();
        for _ in 0..h.rng.below(5) {
            h.one_io();
        }
        if h.rng.below(90) == 0 {
            h.settle();
            write_backs += h.store.stats().write_backs;
            let rng = h.rng.clone();
            h = if step % 2 == 0 {
                Harness::open(h.shutdown(), 1, 1)
            } else {
                Harness::open(h.disk.after_kill(Cut::LoseAll), 1, 1)
            };
            h.rng = rng;
            compare(&m, &mut h, forgotten, &context);
        }
        sequence = sequence.max(forgotten.sequence.0 / 2 + 1);
    }
    h.settle();
    assert!(h.replies.values().all(Result::is_ok));
    compare(&m, &mut h, forgotten, &format!("seed {seed} end"));
    h.idle();
    h.check_disk(&format!("seed {seed}"));
    write_backs + h.store.stats().write_backs
}

#[test]
fn the_store_behaves_like_a_map_of_versions() {
    let write_backs: u64 = (1..=60).map(run).sum();
    assert!(write_backs > 200, "only {write_backs}");
}

#[test]
fn a_full_disk_refuses_cleanly_and_recovers_when_space_returns() {
    let mut h = Harness::open(TestDisk::formatted(&options(6 << 20, 512 << 10)), 1, 3);
    h.create(VOLUME, 1);
    let mut stored: Vec<(u32, u32)> = Vec::new();
    let mut refused = 0;
    let mut sequence = 0;
    // One block per page: each costs a page, through the log and later at home.
    for chunk in 0..4 {
        for page in 0..64 {
            sequence += 1;
            match h.call(write(chunk, page * 16, 1, Version::new(1, sequence))) {
                Ok(_) => stored.push((chunk, page * 16)),
                Err(StoreError::NoSpace) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(
        refused > 50 && stored.len() > 30,
        "{refused} {}",
        stored.len()
    );
    let stats = h.store.stats();
    assert!(stats.used_bytes <= stats.capacity_bytes);
    // What was admitted can be overwritten in place, and everything reaches its home.
    for (chunk, block) in &stored {
        sequence += 1;
        let r = h.call(write(*chunk, *block, 1, Version::new(1, sequence)));
        assert_eq!(r, Ok(StoreReply::Written(WriteOutcome::Applied)));
    }
    h.flush(Version::new(1, sequence), Version::new(1, sequence));
    h.idle();
    assert_eq!(
        h.call(write(3, 1000, 1, Version::new(1, 9999))),
        Err(StoreError::NoSpace)
    );
    let mut h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 2, 1);
    for (chunk, block) in &stored {
        assert_eq!(h.read_checked(*chunk, *block, 1)[0].0, BlockState::Data);
    }
    h.call(trim(stored[0].0, 0, 1024, Version::new(1, 10_000)))
        .unwrap();
    h.flush(Version::new(1, 10_000), Version::new(1, 10_000));
    h.idle();
    let r = h.call(write(3, 1000, 1, Version::new(1, 10_001)));
    assert_eq!(r, Ok(StoreReply::Written(WriteOutcome::Applied)));
}

#[test]
fn a_full_log_holds_requests_back_and_never_stops() {
    let mut h = Harness::open(TestDisk::formatted(&options(24 << 20, 512 << 10)), 1, 3);
    h.create(VOLUME, 1);
    let mut tags = Vec::new();
    for i in 0..800u32 {
        tags.push(h.request(write(
            i % 3,
            (i * 7) % 1000,
            2,
            Version::new(1, u64::from(i) + 1),
        )));
    }
    h.tick();
    h.settle();
    let busy = tags
        .iter()
        .filter(|t| h.replies[t] == Err(StoreError::Busy))
        .count();
    assert!(tags.iter().all(|t| h.replies.contains_key(t)));
    assert_eq!(busy, 0, "4096 requests may wait");
    assert!(h.store.stats().write_backs > 1);
    assert_eq!(h.store.stats().queued_requests, 0);
}

#[test]
fn too_many_requests_are_refused_as_busy() {
    let config = StoreConfig {
        queue_requests_max: 10,
        ..config()
    };
    let disk = TestDisk::formatted(&options(24 << 20, 512 << 10));
    let mut h = Harness::start_with(config, disk, 1, 3);
    h.settle();
    h.create(VOLUME, 1);
    let tags: Vec<u64> = (0..300)
        .map(|i| h.request(write(0, i * 3, 2, Version::new(1, u64::from(i) + 1))))
        .collect();
    h.tick();
    h.settle();
    let busy = tags
        .iter()
        .filter(|t| h.replies[t] == Err(StoreError::Busy))
        .count();
    assert!(busy > 0 && busy < 300);
    assert!(
        tags.iter()
            .all(|t| matches!(h.replies[t], Ok(_) | Err(StoreError::Busy)))
    );
}

#[test]
fn reads_among_writes_in_flight_are_never_bad_and_never_go_back() {
    for seed in 1..=20 {
        let config = StoreConfig {
            write_back_percent: 0,
            ..config()
        };
        let disk = TestDisk::formatted(&options(24 << 20, 512 << 10));
        let mut h = Harness::start_with(config, disk, 1, seed);
        h.settle();
        h.create(VOLUME, 1);
        let mut reads: BTreeMap<u64, Vec<Version>> = BTreeMap::new();
        let mut answered = vec![Version::ZERO; 64];
        let mut writes = BTreeMap::new();
        for i in 1..=400u64 {
            let block = h.rng.below(60) as u32;
            let version = Version::new(1, i);
            let count = if i % 9 == 0 { 32 } else { 2 };
            let first = block.min(64 - count);
            let tag = h.request(write(0, first, count, version));
            writes.insert(tag, (first, count, version));
            let read = wire::Read {
                range: BlockRange::new(ChunkIndex(0), 0, 64).unwrap(),
                snapshot: SnapshotNumber(0),
                exact_layer: false,
            };
            let tag = h.request(StoreRequest::Read {
                volume: VOLUME,
                read,
            });
            reads.insert(tag, answered.clone());
            if i % 20 == 0 {
                let zero = Version::ZERO;
                h.request(StoreRequest::Flush {
                    volume: VOLUME,
                    watermark: zero,
                    forget_below: zero,
                });
            }
            h.tick();
            for _ in 0..h.rng.below(6) {
                h.one_io();
                for (tag, result) in std::mem::take(&mut h.replies) {
                    if let Some((first, count, version)) = writes.remove(&tag) {
                        result.unwrap();
                        for b in first..first + count {
                            answered[b as usize] = answered[b as usize].max(version);
                        }
                    } else if let Some(floor) = reads.remove(&tag) {
                        let Ok(StoreReply::Read(r)) = result else {
                            panic!("{result:?}")
                        };
                        for (b, info) in r.blocks.iter().enumerate() {
                            assert_ne!(info.state, BlockState::Bad, "seed {seed} write {i}");
                            assert!(
                                info.version >= floor[b],
                                "seed {seed}: an answered write is missing"
                            );
                        }
                    }
                }
            }
        }
        h.settle();
        assert_eq!(h.bad_reports, 0);
    }
}
