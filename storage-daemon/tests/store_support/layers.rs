//! A model of a volume with snapshots: what every reader sees, whatever a store has merged.
//!
//! Invariants:
//! - As a holder does (docs/snapshots.md, S2), versions grow with the snapshot numbers that they carry.
//! - What was sent may be seen, what was flushed must be, unless something newer hides it.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::*;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{self, BlockState};
use storage_daemon::store::*;

use super::*;

pub const CHUNKS: u32 = 2;
pub const BLOCKS: u32 = 80;

/// An update of a range.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    pub chunk: u32,
    pub first: u32,
    pub count: u32,
    pub version: Version,
    pub layer: u32,
    pub data: bool,
}

impl Op {
    pub fn request(&self) -> StoreRequest {
        let Self {
            chunk,
            first,
            count,
            version,
            layer,
            data,
        } = *self;
        if data {
            write_layer(chunk, first, count, version, layer)
        } else {
            trim_layer(chunk, first, count, version, layer)
        }
    }
}

/// Of one block: layer -> (newest flushed, everything sent after it).
#[derive(Clone, Default)]
struct Block {
    layers: BTreeMap<u32, Vec<(Version, bool, bool)>>,
}

/// See the module.
#[derive(Clone, Default)]
pub struct Volume {
    blocks: BTreeMap<(u32, u32), Block>,
    pub sequence: u64,
    /// The number that new writes carry.
    pub number: u32,
    /// The list as the metadata have it.
    pub list: LayerList,
    /// Tombstones at or below may be gone.
    pub forgotten: Version,
    answered: Vec<Op>,
    pub pending: BTreeMap<u64, Op>,
    flushes: BTreeMap<u64, Vec<Op>>,
    lists: BTreeMap<u64, u64>,
    /// Revisions of the newest list that a store was sent, and that it answered.
    pub revision_sent: u64,
    pub revision_answered: u64,
    pub done: Vec<Op>,
}

impl Volume {
    pub fn random_op(&mut self, rng: &mut Rng) -> Op {
        self.sequence += 1;
        let chunk = rng.below(u64::from(CHUNKS)) as u32;
        let (first, count, data) = match rng.below(16) {
            0..=9 => (
                rng.below(u64::from(BLOCKS) - 4) as u32,
                1 + rng.below(4) as u32,
                true,
            ),
            10..=12 => {
                // Whole pages, sometimes with a ragged start.
                let first = 16 + 16 * rng.below(2) as u32 - u32::from(rng.below(2) == 0) * 2;
                (first, 34, true)
            }
            13 => (16 * rng.below(4) as u32, 16, false),
            _ => (rng.below(40) as u32, 1 + rng.below(40) as u32, false),
        };
        Op {
            chunk,
            first,
            count,
            version: Version::new(1, self.sequence),
            layer: self.number,
            data,
        }
    }

    pub fn sent(&mut self, tag: u64, op: Op) {
        for b in op.first..op.first + op.count {
            let block = self.blocks.entry((op.chunk, b)).or_default();
            let states = block.layers.entry(op.layer).or_default();
            states.push((op.version, op.data, false));
        }
        self.pending.insert(tag, op);
    }

    pub fn flush_sent(&mut self, tag: u64) {
        self.flushes.insert(tag, self.answered.clone());
    }

    pub fn list_sent(&mut self, tag: u64, revision: u64) {
        self.revision_sent = self.revision_sent.max(revision);
        self.lists.insert(tag, revision);
    }

    /// Takes what the store answered.
    pub fn collect(&mut self, h: &mut Harness) {
        for (tag, result) in std::mem::take(&mut h.replies) {
            result.unwrap();
            if let Some(op) = self.pending.remove(&tag) {
                self.answered.push(op);
            } else if let Some(ops) = self.flushes.remove(&tag) {
                ops.into_iter().for_each(|op| self.flushed(op));
            } else if let Some(revision) = self.lists.remove(&tag) {
                self.revision_answered = self.revision_answered.max(revision);
            }
        }
    }

    /// Everything that was answered counts as flushed: only a process died, or the store was closed.
    pub fn all_flushed(&mut self) {
        for op in self.answered.clone() {
            self.flushed(op);
        }
    }

    fn flushed(&mut self, op: Op) {
        for b in op.first..op.first + op.count {
            let block = self.blocks.get_mut(&(op.chunk, b)).unwrap();
            let states = block.layers.get_mut(&op.layer).unwrap();
            for s in states.iter_mut().filter(|s| s.0 == op.version) {
                s.2 = true;
            }
        }
    }

    /// The process is gone and with it whatever it was asked.
    pub fn crashed(&mut self) {
        self.pending.clear();
        self.flushes.clear();
        self.lists.clear();
        self.answered.clear();
    }

    /// Updates below this one are flushed.
    pub fn watermark(&self) -> Version {
        let open = self.pending.values().chain(&self.answered);
        let states = self
            .blocks
            .values()
            .flat_map(|b| b.layers.values().flatten());
        let unflushed = states.filter(|s| !s.2).map(|s| s.0);
        let lowest = open.map(|o| o.version).chain(unflushed).min();
        let below = lowest.map_or(self.sequence, |v| v.sequence.0 - 1);
        Version::new(1, below)
    }

    /// Snapshot numbers that can be read, with the number under which they are: live ones, and the head's.
    pub fn readers(&self) -> BTreeSet<u32> {
        let snapshots = self.list.live.iter().map(|n| n.0 - 1);
        snapshots.chain([self.number]).collect()
    }

    /// Takes a snapshot, cancels one, or deletes one: a new list.
    pub fn change_list(&mut self, rng: &mut Rng, live_max: usize) {
        self.list.revision += 1;
        let live = self.list.live.len();
        if rng.below(3) > 0 && live < live_max {
            self.number += 1;
            self.list.settled = SnapshotNumber(self.number);
            if rng.below(5) > 0 {
                self.list.live.push(SnapshotNumber(self.number));
            }
        } else if live > 0 {
            self.list.live.remove(rng.below(live as u64) as usize);
        }
    }

    pub fn delete_all(&mut self) {
        self.list.revision += 1;
        self.list.live.clear();
    }

    /// Every live snapshot and the head read back.
    pub fn check(&self, h: &mut Harness, context: &str) {
        let revision = h.store.replica(VOLUME).unwrap().layers.revision;
        assert!(
            (self.revision_answered..=self.revision_sent).contains(&revision),
            "{context}: list {revision}, answered {}, sent {}",
            self.revision_answered,
            self.revision_sent
        );
        for number in self.readers() {
            for chunk in 0..CHUNKS {
                let states = h.read_layer_checked(chunk, 0, BLOCKS, number);
                for (b, (state, version)) in states.into_iter().enumerate() {
                    self.check_block(number, (chunk, b as u32), (state, version), context);
                }
            }
        }
    }

    fn check_block(
        &self,
        number: u32,
        at: (u32, u32),
        (state, version): (BlockState, Version),
        context: &str,
    ) {
        let none = Block::default();
        let block = self.blocks.get(&at).unwrap_or(&none);
        let visible = block.layers.range(..=number).flat_map(|(_, s)| s);
        let flushed = visible.clone().filter(|s| s.2).max_by_key(|s| s.0);
        let floor = flushed.map_or(Version::ZERO, |s| s.0);
        let mut candidates = visible.filter(|s| s.0 >= floor);
        let mut candidates_again = candidates.clone();
        let mut forgotten = || candidates_again.any(|s| !s.1 && s.0 <= self.forgotten);
        let ok = match state {
            BlockState::Data => candidates.any(|s| (s.0, s.1) == (version, true)),
            // Or an older one, that of a lower layer, is not forgotten yet.
            BlockState::Tombstone => {
                candidates.any(|s| (s.0, s.1) == (version, false)) || forgotten()
            }
            // Never written, or a forgotten tombstone.
            BlockState::Absent => flushed.is_none() || forgotten(),
            BlockState::Bad => false,
        };
        assert!(
            ok,
            "{context}: block {at:?} of number {number} is {state:?} {version:?}, list {:?}, sent {:?}",
            self.list, block.layers
        );
    }
}

impl Harness {
    /// States and versions at a snapshot number, without a look at the contents.
    pub fn states(&mut self, chunk: u32, count: u32, snapshot: u32) -> Vec<(BlockState, Version)> {
        let r = self.read(chunk, 0, count, snapshot);
        r.blocks.iter().map(|b| (b.state, b.version)).collect()
    }

    /// What `storage-daemon check` says of the disk at rest, which it must say.
    pub fn check_disk(&self, context: &str) {
        let report = storage_daemon::check::check_image(&self.disk.current[..], true);
        assert!(report.sound(), "{context}: {:#?}", report.problems);
        let stats = self.store.stats();
        let pages = report.owned_pages + report.logged_pages;
        assert_eq!(
            pages * PAGE_SIZE as u64,
            stats.used_bytes - stats.reserved_bytes,
            "{context}: pages that leaked, or are free and owned: {report:?}"
        );
    }

    pub fn put_layers(&mut self, layers: &LayerList) {
        let layers = layers.clone();
        let volume = VOLUME;
        let r = self.call(StoreRequest::PutLayers { volume, layers });
        assert_eq!(r, Ok(StoreReply::Done));
    }

    /// Every entry of a chunk, in order.
    pub fn entries(&mut self, chunk: u32) -> Vec<wire::Entry> {
        let chunk = ChunkIndex(chunk);
        let mut from = wire::Cursor {
            chunk,
            ..wire::Cursor::default()
        };
        let mut all = Vec::new();
        loop {
            let digest = wire::Digest { chunk, from };
            let volume = VOLUME;
            match self.call(StoreRequest::Digest { volume, digest }) {
                Ok(StoreReply::Entries(part)) => {
                    all.extend(part.entries);
                    match part.next {
                        Some(next) => from = next,
                        None => return all,
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
