//! Flattening (docs/snapshots.md, C7): a clone's replica copies what it inherits, and then cuts its link.
//!
//! ```text
//! Chunk(c) -> plan -> Sectors -> plan again
//!                  -> Read: data read, verified, logged under the clone's lowest canonical layer -> plan again
//!                  -> nothing left: Chunk(c + 1)
//! no chunk left -> Copied -> all of it durable -> Durable -> the header without the link is written (`descriptors`)
//! ```
//!
//! Invariants:
//! - A chunk is passed only when nothing is inherited in it any more; that cannot change back (C5).
//! - Between the look at a block and its record nothing comes: what changed while data was read is not copied.
//! - Data is verified when it is copied: what does not match, or cannot be read, is bad under its version from then on.
//! - One step is under way at a time, when the store is quiet enough for merging, and as slowly.
//! - After a crash it begins again where it is asked for; what was copied is the clone's own and is not copied twice.

use std::collections::BTreeSet;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{BLOCKS_PER_PAGE, VolumeId};
use ashlar_proto::wire::BlockState;
use bytes::Bytes;
use smallvec::SmallVec;

use super::api::{StoreCommand, StoreError};
use super::index::{BlockKey, PageKey};
use super::merge::{CHUNKS_PER_EVENT, SECTORS_MAX};
use super::pieces::Pieces;
use super::replica::Replica;
use super::resolve::Resolved;
use super::sync::SyncAction;
use super::{Store, Target};
use crate::format::ENTRY_BYTES;

/// Most pages that one step copies.
const PAGES_MAX: usize = 8;
/// How long a step waits for room on the disk or in the log.
const ROOM_PAUSE: Duration = Duration::from_millis(100);

/// How far the flattening of a replica has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flatten {
    /// Lower chunks are done.
    Chunk(u32),
    /// Everything is copied, the last of it in this batch.
    Copied(u64),
    /// Its sync is asked for.
    Syncing,
    /// And is durable: the link may be cut.
    Durable,
}

/// Blocks of a page, as they were inherited.
type Blocks = SmallVec<[(u16, Resolved); 16]>;

enum Plan {
    Done,
    /// Something is in flight.
    Wait,
    Sectors(BTreeSet<u32>),
    Copy(Vec<(u8, Blocks)>),
}

enum Step {
    Sectors(BTreeSet<u32>),
    Read {
        pages: Vec<(u8, Blocks)>,
        pieces: Pieces,
    },
}

/// State of flattening.
#[derive(Default)]
pub(super) struct FlattenState {
    /// Replica number, slot, chunk, what.
    step: Option<(u64, u32, u32, Step)>,
    /// When a step was begun.
    pub(super) tried: Option<Time>,
    rest_until: Option<Time>,
    /// Some replica is being flattened, or waits for its link to be cut.
    any: bool,
    /// Some replica may have something left to be copied.
    copies: bool,
}

impl FlattenState {
    pub(super) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// When to go on after a pause.
    pub(super) fn deadline(&self, now: Time) -> Option<Time> {
        let waits = self.copies && self.step.is_none();
        self.rest_until.filter(|at| waits && *at > now)
    }
}

impl Store {
    /// A replica is to be flattened; done at once where nothing is inherited.
    pub(super) fn flatten(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        let replica = self.index.replica_mut(volume);
        let replica = replica.ok_or(StoreError::UnknownVolume)?;
        if replica.base.is_some() && replica.flatten.is_none() {
            replica.flatten = Some(Flatten::Chunk(0));
            self.flattening.any = true;
            self.flattening.copies = true;
        }
        Ok(())
    }

    /// The slots of replicas whose links may be cut.
    pub(super) fn flattening_done(&self) -> SmallVec<[u32; 4]> {
        if !self.flattening.any {
            return SmallVec::new();
        }
        let replicas = self.index.replicas.iter().flatten();
        let done = replicas.filter(|r| r.flatten == Some(Flatten::Durable));
        done.map(|r| r.slot).collect()
    }

    /// Chunks that are not done; of the parent that has most, since several may have the same.
    pub(super) fn inherited_left(&self, replica: &Replica) -> u64 {
        let Some(Flatten::Chunk(from)) = replica.flatten else {
            return 0;
        };
        let bases = self.index.bases(replica.slot);
        let counts = bases.iter().filter_map(|base| {
            let parent = self.index.by_slot(base.slot)?;
            let theirs = parent.chunks.range(from..);
            Some(theirs.filter(|(_, c)| c.has_below(base.number)).count() as u64)
        });
        counts.max().unwrap_or(0)
    }

    fn next_chunk(&self, slot: u32, from: u32) -> Option<u32> {
        let bases = self.index.bases(slot);
        let firsts = bases.iter().filter_map(|base| {
            let parent = self.index.by_slot(base.slot)?;
            let mut theirs = parent.chunks.range(from..);
            theirs
                .find(|(_, c)| c.has_below(base.number))
                .map(|(i, _)| *i)
        });
        firsts.min()
    }

    /// Begins the next step, if there is one and it is the time for it.
    pub(super) fn pump_flatten(&mut self, out: &mut Vec<StoreCommand>) {
        for _ in 0..CHUNKS_PER_EVENT {
            if !self.may_flatten() {
                return;
            }
            let mut replicas = self.index.replicas.iter().flatten();
            let next = replicas.find_map(|r| match r.flatten? {
                Flatten::Chunk(from) => Some((r.slot, r.header.replica, Ok(from))),
                Flatten::Copied(batch) => Some((r.slot, r.header.replica, Err(batch))),
                Flatten::Syncing | Flatten::Durable => None,
            });
            match next {
                None => {
                    self.flattening.copies = false;
                    let mut replicas = self.index.replicas.iter().flatten();
                    self.flattening.any = replicas.any(|r| r.flatten.is_some());
                    return;
                }
                Some((slot, number, Ok(from))) => match self.next_chunk(slot, from) {
                    Some(chunk) => {
                        self.begin_flatten((number, slot, chunk), out);
                        if self.flattening.step.is_some() {
                            self.flattening.tried = Some(self.now);
                        }
                    }
                    None => {
                        let log = &self.log;
                        let newest = if log.open.is_empty() {
                            log.last_sequence
                        } else {
                            log.next_sequence
                        };
                        self.set_flatten(slot, Flatten::Copied(newest));
                    }
                },
                Some((_, _, Err(batch))) if batch > self.log.completed => {
                    self.close_wanted |= batch == self.log.next_sequence;
                    self.flattening.tried = Some(self.now);
                    return;
                }
                Some((slot, number, Err(_))) => {
                    self.set_flatten(slot, Flatten::Syncing);
                    self.want_sync(SyncAction::Flatten(slot, number), out);
                }
            }
        }
        self.flattening.tried = Some(self.now);
        self.flattening.rest_until = Some(self.now.after(self.pause()));
    }

    fn set_flatten(&mut self, slot: u32, state: Flatten) {
        if let Some(replica) = self.index.by_slot_mut(slot) {
            replica.flatten = Some(state);
        }
    }

    /// What was copied is durable.
    pub(super) fn flatten_synced(&mut self, slot: u32, number: u64) {
        let replica = self.index.by_slot_mut(slot);
        if let Some(r) = replica.filter(|r| r.header.replica == number) {
            r.flatten = Some(Flatten::Durable);
        }
    }

    pub(super) fn may_flatten(&self) -> bool {
        self.flattening.copies
            && self.flattening.step.is_none()
            && self.flattening.rest_until.is_none_or(|at| at <= self.now)
            && self.may_move(self.flattening.tried)
    }

    fn rest(&mut self, pause: Duration) {
        self.flattening.rest_until = Some(self.now.after(pause));
    }

    fn begin_flatten(&mut self, at: (u64, u32, u32), out: &mut Vec<StoreCommand>) {
        let (number, slot, chunk) = at;
        match self.plan_flatten(slot, chunk) {
            Plan::Done => {
                let next = chunk.saturating_add(1);
                self.set_flatten(slot, Flatten::Chunk(next));
            }
            Plan::Wait => self.rest(ROOM_PAUSE),
            Plan::Sectors(blocks) => {
                for block in &blocks {
                    self.load_sectors(*block, out);
                }
                self.flattening.step = Some((number, slot, chunk, Step::Sectors(blocks)));
            }
            Plan::Copy(pages) => {
                let blocks = pages.iter().flat_map(|(_, blocks)| blocks);
                let data = blocks.filter(|(_, r)| r.state == BlockState::Data);
                let offsets = data.map(|(_, r)| r.offset).collect();
                let pieces = self.read_pieces(offsets, Target::FlattenRead, out);
                let complete = pieces.is_complete();
                self.flattening.step = Some((number, slot, chunk, Step::Read { pages, pieces }));
                if complete {
                    self.finish_copy();
                }
            }
        }
    }

    /// The blocks of a page that are inherited; or sectors to read first.
    fn inherited_blocks(&mut self, page: PageKey) -> Result<Blocks, SmallVec<[u32; 4]>> {
        let mut blocks = Blocks::new();
        let mut need: SmallVec<[u32; 4]> = SmallVec::new();
        for index in 0..BLOCKS_PER_PAGE as u8 {
            let key = page.block(index);
            match self.inherited_block(key) {
                Ok(Some(found)) => blocks.push((key.block, found)),
                Ok(None) => {}
                Err(sectors) => need.push(sectors),
            }
        }
        if need.is_empty() {
            Ok(blocks)
        } else {
            Err(need)
        }
    }

    fn inherited_block(&mut self, key: BlockKey) -> Result<Option<Resolved>, u32> {
        let own = self.resolve_own_class(key)?;
        if own.state != BlockState::Absent {
            return Ok(None);
        }
        let inherited = self.inherited(key)?;
        let batch = own.batch.max(inherited.batch);
        let found = inherited.state != BlockState::Absent;
        Ok(found.then_some(Resolved { batch, ..inherited }))
    }

    fn plan_flatten(&mut self, slot: u32, chunk: u32) -> Plan {
        let Some(layer) = self.index.by_slot(slot).map(|r| r.canonical(0)) else {
            return Plan::Done;
        };
        let mut need = BTreeSet::new();
        let mut pages = Vec::new();
        let mut waits = false;
        let inherited = self.index.inherited_pages(slot, chunk);
        for page in (0..64u8).filter(|page| inherited & (1 << page) != 0) {
            if pages.len() == PAGES_MAX || need.len() >= SECTORS_MAX {
                break;
            }
            let key = PageKey {
                slot,
                chunk,
                layer,
                page,
            };
            match self.inherited_blocks(key) {
                Err(sectors) => need.extend(sectors),
                Ok(blocks) if blocks.is_empty() => {}
                Ok(blocks) if blocks.iter().any(|(_, r)| r.batch > self.log.completed) => {
                    waits = true;
                }
                Ok(blocks) => pages.push((page, blocks)),
            }
        }
        if !need.is_empty() {
            Plan::Sectors(need)
        } else if !pages.is_empty() {
            Plan::Copy(pages)
        } else if waits {
            Plan::Wait
        } else {
            Plan::Done
        }
    }

    /// A block of sectors came.
    pub(super) fn flatten_sector(&mut self, block: u32) {
        if let Some((_, _, _, Step::Sectors(missing))) = &mut self.flattening.step {
            missing.remove(&block);
            if missing.is_empty() {
                self.flattening.step = None;
            }
        }
    }

    pub(super) fn on_flatten_read(
        &mut self,
        index: u32,
        bytes: Option<Bytes>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some((_, _, _, Step::Read { pieces, .. })) = &mut self.flattening.step else {
            return;
        };
        let singles = pieces.arrived(index, bytes);
        if pieces.is_complete() {
            return self.finish_copy();
        }
        self.read_parts(singles, Target::FlattenRead, out);
    }

    /// The data is there: what is still as it was when it was read enters the log.
    fn finish_copy(&mut self) {
        let Some((number, slot, chunk, Step::Read { pages, pieces })) = self.flattening.step.take()
        else {
            return;
        };
        let replica = self.index.by_slot(slot);
        let Some(replica) = replica.filter(|r| r.header.replica == number) else {
            return;
        };
        let layer = replica.canonical(0);
        for (page, planned) in pages {
            let key = PageKey {
                slot,
                chunk,
                layer,
                page,
            };
            let Ok(blocks) = self.inherited_blocks(key) else {
                continue;
            };
            let same: Blocks = blocks.into_iter().filter(|b| planned.contains(b)).collect();
            if same.is_empty() {
                continue;
            }
            let data = same.iter().filter(|(_, r)| r.state == BlockState::Data);
            let data = data.count() as u32;
            let homed = !self.index.needs_reservation(key) || self.allocator.can_reserve(1);
            let room = self.admit_log(same.len() * (ENTRY_BYTES + 4), data).is_ok();
            if !(homed && room) {
                self.close_wanted |= !self.log.open.is_empty();
                return self.rest(ROOM_PAUSE);
            }
            self.log.open.fresh = true;
            self.close_wanted = true;
            for (block, r) in same {
                let bytes = match r.state {
                    BlockState::Data => pieces.block(r.offset),
                    _ => None,
                };
                let index = (block % BLOCKS_PER_PAGE as u16) as u8;
                self.append_moved(key.block(index), number, &r, bytes);
            }
            self.stats.flattened_pages += 1;
        }
        self.flattening.rest_until = self.pause_between_steps();
    }
}
