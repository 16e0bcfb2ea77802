//! Power cuts and kills at every single I/O: what was flushed is intact, nothing is torn, nothing bad.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use std::collections::{BTreeMap, BTreeSet};

use ashlar_platform::clock::Time;
use ashlar_proto::ids::*;
use ashlar_proto::wire::BlockState;
use storage_daemon::store::*;
use store_support::*;

const CHUNKS: u32 = 2;
const BLOCKS: u32 = 80;

/// What may be in a block.
#[derive(Clone, Default)]
struct Expect {
    /// Newest state that was flushed: (version, is data).
    flushed: (Version, bool),
    /// Everything sent since.
    later: Vec<(Version, bool)>,
}

/// (chunk, first block, count, version, is data)
type Op = (u32, u32, u32, Version, bool);

#[derive(Clone, Default)]
struct Model {
    blocks: BTreeMap<(u32, u32), Expect>,
    /// Updates under way or answered but not flushed: tag -> what.
    answered: Vec<Op>,
    pending: BTreeMap<u64, Op>,
    /// Of these, the writes that count as flushed when they are answered.
    durable: BTreeSet<u64>,
    /// Flush tags with what had been answered when they were sent.
    flushes: BTreeMap<u64, Vec<Op>>,
    sequence: u64,
}

impl Model {
    fn sent(&mut self, tag: u64, op: Op) {
        self.pending.insert(tag, op);
        for b in op.1..op.1 + op.2 {
            self.blocks
                .entry((op.0, b))
                .or_default()
                .later
                .push((op.3, op.4));
        }
    }

    /// Takes what the store answered.
    fn collect(&mut self, h: &mut Harness) {
        for (tag, result) in std::mem::take(&mut h.replies) {
            result.unwrap();
            if let Some(op) = self.pending.remove(&tag) {
                self.answered.push(op);
                if self.durable.remove(&tag) {
                    self.flushed(op);
                }
            } else if let Some(ops) = self.flushes.remove(&tag) {
                for op in ops {
                    self.flushed(op);
                }
            }
        }
    }

    fn flushed(&mut self, (chunk, first, count, version, data): Op) {
        for b in first..first + count {
            let e = self.blocks.get_mut(&(chunk, b)).unwrap();
            if version > e.flushed.0 {
                e.flushed = (version, data);
            }
        }
    }

    fn check(&self, h: &mut Harness, context: &str) {
        for chunk in 0..CHUNKS {
            let states = h.read_checked(chunk, 0, BLOCKS);
            for (b, (state, version)) in states.into_iter().enumerate() {
                let e = self
                    .blocks
                    .get(&(chunk, b as u32))
                    .cloned()
                    .unwrap_or_default();
                let candidates = || {
                    e.later
                        .iter()
                        .chain([&e.flushed])
                        .filter(|c| c.0 >= e.flushed.0)
                };
                let ok = match state {
                    BlockState::Data => candidates().any(|c| *c == (version, true)),
                    BlockState::Tombstone => candidates().any(|c| *c == (version, false)),
                    // Never written, or a forgotten tombstone.
                    BlockState::Absent => candidates().any(|c| !c.1),
                    BlockState::Bad => false,
                };
                assert!(
                    ok,
                    "{context}: block {chunk}/{b} is {state:?} {version:?}, flushed {:?} later {:?}",
                    e.flushed, e.later
                );
            }
        }
    }

    /// After a crash what is there is the new truth.
    fn rebase(&mut self, h: &mut Harness) {
        self.pending.clear();
        self.durable.clear();
        self.flushes.clear();
        self.answered.clear();
        for chunk in 0..CHUNKS {
            let states = h.read_checked(chunk, 0, BLOCKS);
            for (b, (state, version)) in states.into_iter().enumerate() {
                let e = self.blocks.entry((chunk, b as u32)).or_default();
                // It is on the device, but only a flush makes it last: all of it stays possible.
                e.later.retain(|c| c.0 > e.flushed.0);
                let _ = (state, version);
            }
        }
    }
}

fn random_op(m: &mut Model, h: &mut Harness) {
    m.sequence += 1;
    let version = Version::new(1, m.sequence);
    let chunk = h.rng.below(u64::from(CHUNKS)) as u32;
    match h.rng.below(20) {
        0..=11 => {
            let first = h.rng.below(u64::from(BLOCKS) - 4) as u32;
            let count = 1 + h.rng.below(4) as u32;
            let mut request = write(chunk, first, count, version);
            let durable = h.rng.below(3) == 0;
            if let StoreRequest::Write { write, .. } = &mut request {
                write.durable = durable;
            }
            let tag = h.request(request);
            m.durable.extend(durable.then_some(tag));
            m.sent(tag, (chunk, first, count, version, true));
        }
        12..=13 => {
            // Whole pages, sometimes with a ragged start.
            let first = 16 + 16 * h.rng.below(2) as u32 - u32::from(h.rng.below(2) == 0) * 2;
            let count = 34;
            let tag = h.request(write(chunk, first, count, version));
            m.sent(tag, (chunk, first, count, version, true));
        }
        14 => {
            let first = h.rng.below(60) as u32;
            let count = 1 + h.rng.below(20) as u32;
            let tag = h.request(trim(chunk, first, count, version));
            m.sent(tag, (chunk, first, count, version, false));
        }
        _ => {
            // The watermark: everything below the oldest update that is not flushed.
            let oldest = m
                .pending
                .values()
                .chain(&m.answered)
                .map(|o| o.3.sequence.0)
                .min();
            let below = m
                .blocks
                .values()
                .flat_map(|e| e.later.iter().filter(|c| c.0 > e.flushed.0))
                .map(|c| c.0.sequence.0)
                .chain(oldest)
                .min()
                .unwrap_or(m.sequence);
            let mark = Version::new(1, below.saturating_sub(1));
            let tag = h.request(StoreRequest::Flush {
                volume: VOLUME,
                watermark: mark,
                forget_below: mark,
            });
            m.flushes.insert(tag, m.answered.clone());
        }
    }
    m.collect(h);
}

/// How the store under test is set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    log_bytes: u64,
    write_back_percent: u8,
}

const CALM: Setup = Setup {
    log_bytes: 512 << 10,
    write_back_percent: 30,
};
/// Write-back follows every flush at once.
const EAGER: Setup = Setup {
    log_bytes: 512 << 10,
    write_back_percent: 0,
};
/// The log is full most of the time: freed parts are used again at once.
const TIGHT: Setup = Setup {
    log_bytes: 256 << 10,
    write_back_percent: 60,
};

fn fresh(seed: u64, setup: Setup) -> Harness {
    let disk = TestDisk::formatted(&options(10 << 20, setup.log_bytes));
    let config = StoreConfig {
        write_back_percent: setup.write_back_percent,
        ..config()
    };
    let mut h = Harness::start_with(config, disk, 1, seed);
    h.settle();
    h.create(VOLUME, 1);
    h
}

fn recover(disk: TestDisk, boot: u8, context: &str) -> Harness {
    let h = Harness::open(disk, boot, 99);
    let identity = h.ready.unwrap();
    assert!(!identity.damaged, "{context}: false damage");
    assert_eq!(identity.bad_blocks, 0, "{context}");
    h
}

fn cut_everywhere(seed: u64, operations: u32, setup: Setup) {
    let mut h = fresh(seed, setup);
    let mut m = Model::default();
    let mut bursts = 0;
    for op in 0..operations {
        random_op(&mut m, &mut h);
        if h.rng.below(3) == 0 {
            h.tick();
        }
        if op % 50 == 49 {
            h.now = Time(h.now.0 + 3_000_000_000);
        }
        for _ in 0..h.rng.below(7) {
            let io = h.disk.ios;
            if !h.one_io() {
                break;
            }
            m.collect(&mut h);
            let cut = match io % 4 {
                0 => Cut::LoseAll,
                1 => Cut::Writes(io),
                2 => Cut::KeepAll,
                _ => Cut::Sectors(io),
            };
            let context = format!("{setup:?} seed {seed} io {io} {cut:?}");
            let mut after = recover(h.disk.after_power_cut(cut), 2, &context);
            assert!(after.ready.unwrap().incarnation_changed);
            m.check(&mut after, &context);
            if io.is_multiple_of(8) {
                let context = format!("{context}, killed");
                let mut after = recover(h.disk.after_kill(cut), 1, &context);
                assert!(!after.ready.unwrap().incarnation_changed, "{context}");
                // Nothing that was answered is lost when only the process dies.
                let mut strict = m.clone();
                for op in m.answered.clone() {
                    strict.flushed(op);
                }
                strict.check(&mut after, &context);
            }
        }
        bursts = h.store.stats().write_backs;
    }
    let stats = h.store.stats();
    assert!(
        stats.durable_batches > 0 && stats.syncs > stats.durable_batches,
        "both ways to make a write durable: {stats:?}"
    );
    assert!(h.disk.discards > 0, "free pages must be discarded");
    assert!(
        bursts >= 2,
        "the workload must reach write-back, had {bursts}"
    );
}

/// Seed 1 found a batch that was written durably, and so told to be durable, while the fresh page that it named
/// was in the device's cache only.
#[test]
fn power_cut_at_every_io_of_a_workload() {
    for seed in 1..=3 {
        cut_everywhere(seed, 160, CALM);
    }
}

#[test]
fn power_cut_at_every_io_of_eager_write_back() {
    for seed in 1..=3 {
        cut_everywhere(seed, 120, EAGER);
    }
}

#[test]
fn power_cut_at_every_io_with_a_tight_log() {
    for seed in 1..=2 {
        cut_everywhere(seed, 300, TIGHT);
    }
}

#[test]
fn lives_after_lives() {
    for seed in 1..=24 {
        let setup = [CALM, EAGER, TIGHT][seed as usize % 3];
        let mut h = fresh(seed, setup);
        let mut m = Model::default();
        for life in 2..8u8 {
            for _ in 0..h.rng.below(90) {
                random_op(&mut m, &mut h);
                h.tick();
                for _ in 0..h.rng.below(6) {
                    h.one_io();
                    m.collect(&mut h);
                }
            }
            let cut = match h.rng.below(3) {
                0 => Cut::LoseAll,
                1 => Cut::Writes(seed),
                _ => Cut::Sectors(seed),
            };
            let context = format!("seed {seed} life {life} {cut:?}");
            h = recover(h.disk.after_power_cut(cut), life, &context);
            h.rng = Rng::new(seed * 100 + u64::from(life));
            m.check(&mut h, &context);
            m.rebase(&mut h);
        }
    }
}

#[test]
fn a_power_cut_during_recovery_is_harmless() {
    let mut h = fresh(5, CALM);
    let mut m = Model::default();
    for _ in 0..120 {
        random_op(&mut m, &mut h);
        h.tick();
        h.one_io();
        m.collect(&mut h);
    }
    let base = h.disk.after_power_cut(Cut::Sectors(3));
    for n in 0.. {
        let mut h = Harness::start(base.clone(), 2, n);
        for _ in 0..n {
            h.one_io();
        }
        let done = h.ready.is_some();
        let context = format!("after {n} of recovery");
        let mut after = recover(h.disk.after_power_cut(Cut::Sectors(n)), 3, &context);
        m.check(&mut after, &context);
        if done {
            break;
        }
    }
}
