//! Merging layers that are one (docs/snapshots.md, S7) in the background: what is to be done next; `merge_steps` does it.
//!
//! ```text
//! chunk with garbage -> plan -> Sectors -> plan again
//!                            -> Relabel: sectors written, synced      (pages that the canonical layer lacks)
//!                            -> Read: data read, verified, logged     (what else is still visible)
//! ```
//! What is to be done follows from the list and the index, so that a crash loses at most one step.
//!
//! Invariants:
//! - Within a chunk the highest layer goes first, page by page: what is merged into the canonical layer is always the
//!   next lower one, and a page that has to wait holds back the same page of lower layers.
//! - A page is relabelled only if neither layer has entries of it in the overlay, and no burst runs: so no record in
//!   the log counts on it. The index changes when the sector is durable.
//! - Everything else goes through the log, in one batch: the blocks under their new name, with version, checksum
//!   and state as they were, and their erasure under the old one. Write-back then frees the page.
//! - A step needs no free page: what would need one waits until write-back has made a relabelling of it.
//! - One step is under way at a time, and while there are requests a pause lies between steps. One that is not overdue
//!   begins only while the log is at most half full, or write-back has no reason to make it emptier, and nobody
//!   waits for it. One that is overdue goes before the next burst: load without an end does not keep what was
//!   deleted for ever.

use std::collections::BTreeSet;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{BLOCKS_PER_PAGE, PAGE_SIZE};
use ashlar_proto::wire::BlockState;
use smallvec::SmallVec;

use super::api::StoreCommand;
use super::cache::SECTORS_PER_BLOCK;
use super::index::{BlockKey, PageKey};
use super::pieces::Pieces;
use super::resolve::Resolved;
use super::{Phase, Store};

/// Most pages whose data one step moves.
const MOVED_PAGES_MAX: u64 = 8;
/// Chunks that one event looks at.
pub(super) const CHUNKS_PER_EVENT: usize = 16;
/// A step is overdue after so many pauses.
const OVERDUE_PAUSES: u32 = 4;
/// Most pages with entries in the overlay: erasures take few bytes of the log, and memory until they are home.
const OVERLAY_PAGES_MAX: usize = 16 * 1024;
/// Blocks of sectors that a plan asks for at once.
pub(super) const SECTORS_MAX: usize = 64;

/// What happens to one page of a layer.
pub(super) struct MergePage {
    pub(super) page: u8,
    /// Blocks that move to the canonical layer.
    pub(super) moved: SmallVec<[(u16, Resolved); 16]>,
}

/// What can be done next in a chunk.
enum Plan {
    /// Nothing is left to be merged.
    Done,
    /// What is left waits for write-back.
    Wait,
    Sectors(BTreeSet<u32>),
    Relabel {
        from: u32,
        pages: Vec<(u8, u32)>,
    },
    Move {
        from: u32,
        pages: Vec<MergePage>,
    },
}

/// What is under way.
pub(super) enum Step {
    Sectors(BTreeSet<u32>),
    Relabel {
        from: u32,
        to: u32,
        pages: Vec<(u8, u32)>,
        pinned: BTreeSet<u32>,
        outstanding: usize,
    },
    Read {
        from: u32,
        pages: u64,
        pieces: Pieces,
    },
}

/// Where the plan of a chunk goes on after a step: what lies above was planned and has to wait.
struct Resume {
    replica: u64,
    chunk: u32,
    layer: u32,
    /// Pages that are held back from this layer on.
    held: u64,
}

/// State of merging.
#[derive(Default)]
pub(super) struct MergeState {
    /// (slot, chunk, what)
    pub(super) step: Option<(u32, u32, Step)>,
    /// Where the next chunk is looked for.
    pub(super) at: (u32, u32),
    /// Something was done since the search began at the first replica.
    progress: bool,
    /// There may be something to do.
    any: bool,
    /// Everything left waits for write-back.
    stalled: bool,
    resume: Option<Resume>,
    /// When a step was begun, or looked for in vain.
    tried: Option<Time>,
    rest_until: Option<Time>,
}

impl MergeState {
    pub(super) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// There may be something to do that was not there, or had to wait, when it was looked for last.
    pub(super) fn wake(&mut self) {
        self.any = true;
        self.stalled = false;
        // Layers may have other names now, and what had to wait may not have to.
        self.resume = None;
        // The search goes once around, wherever it is.
        self.progress = true;
    }

    /// Home pages are being relabelled: no burst may begin.
    pub(super) fn moves_pages(&self) -> bool {
        matches!(self.step, Some((_, _, Step::Relabel { .. })))
    }

    /// When to go on after a pause.
    pub(super) fn deadline(&self, now: Time) -> Option<Time> {
        let waits = self.any && !self.stalled && self.step.is_none();
        self.rest_until.filter(|at| waits && *at > now)
    }
}

impl Store {
    /// Begins the next step, if there is one and it is the time for it.
    pub(super) fn pump_merge(&mut self, out: &mut Vec<StoreCommand>) {
        for _ in 0..CHUNKS_PER_EVENT {
            if !self.may_merge() {
                return;
            }
            let Some((slot, chunk)) = self.next_garbage() else {
                return;
            };
            self.begin_step(slot, chunk, out);
            if self.merge.step.is_some() {
                self.merge.tried = Some(self.now);
            }
        }
        // More chunks are to be looked at: at the next event, which is asked for.
        if self.may_merge() {
            self.merge.tried = Some(self.now);
            self.merge.rest_until = Some(self.now.after(self.pause()));
        }
    }

    fn may_merge(&self) -> bool {
        self.merge.any
            && !self.merge.stalled
            && self.merge.step.is_none()
            && self.merge.rest_until.is_none_or(|at| at <= self.now)
            && self.may_move(self.merge.tried)
    }

    /// Whether blocks may be moved in the background: nobody waits, and the log and the overlay have room; or it was
    /// tried last so long ago that the others have to wait.
    pub(super) fn may_move(&self, tried: Option<Time>) -> bool {
        let quiet = self.queue.is_empty()
            && (self.log.used <= self.log.bytes / 2 || !self.idle_work())
            && self.index.pages.len() <= OVERLAY_PAGES_MAX;
        matches!(self.phase, Phase::Ready)
            && self.burst.is_idle()
            && !self.admin.is_dropping()
            && (quiet || self.is_overdue(tried))
    }

    fn is_overdue(&self, tried: Option<Time>) -> bool {
        let after = self.pause().saturating_mul(OVERDUE_PAUSES);
        tried.is_none_or(|at| at.after(after) <= self.now)
    }

    /// Write-back of a busy store waits until a step has begun that is overdue.
    pub(super) fn moves_go_first(&self) -> bool {
        (self.may_merge() && self.is_overdue(self.merge.tried))
            || (self.may_flatten() && self.is_overdue(self.flattening.tried))
    }

    /// Blocks are being moved, or will be at this event: write-back of an idle store waits until that has come to
    /// an end, or to where it needs write-back. Else every step would pay for a burst.
    pub(super) fn moves_go_on(&self) -> bool {
        !self.merge.is_idle()
            || !self.flattening.is_idle()
            || self.may_merge()
            || self.may_flatten()
    }

    /// The next chunk with something to merge, in turn.
    fn next_garbage(&mut self) -> Option<(u32, u32)> {
        for _ in 0..2 {
            let (slot, chunk) = self.merge.at;
            let replicas = self.index.replicas.iter().skip(slot as usize).flatten();
            let found = replicas.into_iter().find_map(|r| {
                let from = if r.slot == slot { chunk } else { 0 };
                Some((r.slot, *r.garbage.range(from..).next()?))
            });
            if let Some((slot, chunk)) = found {
                self.merge.at = match chunk.checked_add(1) {
                    Some(next) => (slot, next),
                    None => (slot + 1, 0),
                };
                return Some((slot, chunk));
            }
            if (slot, chunk) == (0, 0) {
                self.merge.any = false;
                return None;
            }
            self.merge.at = (0, 0);
            if !std::mem::take(&mut self.merge.progress) {
                self.merge.stalled = true;
                return None;
            }
        }
        None
    }

    /// The chunk is looked at again before others.
    fn stay(&mut self, slot: u32, chunk: u32) {
        self.merge.at = (slot, chunk);
    }

    fn begin_step(&mut self, slot: u32, chunk: u32, out: &mut Vec<StoreCommand>) {
        match self.plan_merge(slot, chunk) {
            Plan::Done => self.merge.progress = true,
            Plan::Wait => {}
            Plan::Sectors(blocks) => {
                for block in &blocks {
                    self.load_sectors(*block, out);
                }
                self.merge.step = Some((slot, chunk, Step::Sectors(blocks)));
            }
            Plan::Relabel { from, pages } => self.begin_relabel(slot, chunk, from, pages, out),
            Plan::Move { from, pages } => self.begin_move(slot, chunk, from, &pages, out),
        }
    }

    fn plan_merge(&mut self, slot: u32, chunk: u32) -> Plan {
        let resume = self.merge.resume.take();
        let Some(replica) = self.index.by_slot_mut(slot) else {
            return Plan::Done;
        };
        if !replica.prune(chunk) {
            return Plan::Done;
        }
        let Some(c) = replica.chunks.get(&chunk) else {
            return Plan::Done;
        };
        let numbers = c.layers.iter().rev().map(|l| l.number);
        let layers: SmallVec<[(u32, u32); 8]> = numbers
            .map(|n| (n, replica.canonical(n)))
            .filter(|(n, canonical)| n != canonical)
            .collect();
        let number = replica.header.replica;
        let resume = resume.filter(|r| (r.replica, r.chunk) == (number, chunk));
        let (mut class, mut held) = (None, 0u64);
        for (from, to) in layers {
            if resume.as_ref().is_some_and(|r| from > r.layer) {
                continue;
            }
            if class != Some(to) {
                let above = resume.as_ref().filter(|r| r.layer == from);
                (class, held) = (Some(to), above.map_or(0, |r| r.held));
            }
            let before = held;
            let plan = self.plan_layer((slot, chunk), from, to, &mut held);
            if !matches!(plan, Plan::Wait) {
                self.merge.resume = Some(Resume {
                    replica: number,
                    chunk,
                    layer: from,
                    held: before,
                });
                return plan;
            }
        }
        Plan::Wait
    }

    /// Plans one layer; pages that have to wait are added to those that are held.
    fn plan_layer(
        &mut self,
        (slot, chunk): (u32, u32),
        from: u32,
        to: u32,
        held: &mut u64,
    ) -> Plan {
        let blocks_max =
            (self.log.bytes / (16 * PAGE_SIZE as u64)).clamp(1, MOVED_PAGES_MAX) as usize * 16;
        let mut need = BTreeSet::new();
        let mut relabel = Vec::new();
        let mut pages = Vec::new();
        let mut data = 0;
        for page in 0..64u8 {
            let key = |layer| PageKey {
                slot,
                chunk,
                layer,
                page,
            };
            let layer = self.index.by_slot(slot).and_then(|r| r.layer(chunk, from));
            let vacant = layer.is_none_or(|l| l.is_vacant(page));
            if vacant || *held & (1 << page) != 0 || need.len() >= SECTORS_MAX {
                continue;
            }
            let states = match self.page_states(key(from), to) {
                Ok(states) => states,
                Err(sectors) => {
                    need.extend(sectors);
                    continue;
                }
            };
            if states.is_empty() {
                // At most erasures that are not home yet.
                continue;
            }
            let moved: SmallVec<[(u16, Resolved); 16]> = states
                .iter()
                .filter(|(_, here, there)| here.beats(there))
                .map(|(block, here, _)| (*block, *here))
                .collect();
            let in_flight = states
                .iter()
                .any(|(_, here, there)| here.batch.max(there.batch) > self.log.completed);
            let stays = |(_, r): &&(u16, Resolved)| r.state != BlockState::Tombstone;
            let homeless = moved.iter().any(|m| stays(&m))
                && self
                    .index
                    .by_slot(slot)
                    .is_some_and(|r| r.home(key(to)).is_none());
            let logged = |layer| self.index.pages.contains_key(&key(layer));
            let home = layer_home(self, key(from));
            if in_flight {
                *held |= 1 << page;
            } else if homeless && !logged(from) && !logged(to) {
                match home {
                    Some(physical) => relabel.push((page, physical)),
                    None => *held |= 1 << page,
                }
            } else if homeless && self.index.needs_reservation(key(to)) {
                *held |= 1 << page;
            } else {
                let more = moved
                    .iter()
                    .filter(|(_, r)| r.state == BlockState::Data)
                    .count();
                if data > 0 && data + more > blocks_max {
                    break;
                }
                data += more;
                pages.push(MergePage { page, moved });
            }
        }
        if !need.is_empty() {
            Plan::Sectors(need)
        } else if !relabel.is_empty() {
            Plan::Relabel {
                from,
                pages: relabel,
            }
        } else if pages.is_empty() {
            Plan::Wait
        } else {
            Plan::Move { from, pages }
        }
    }

    /// The blocks that a page of a layer has: what it has, and what the canonical layer has. Or sectors to read first.
    #[expect(clippy::type_complexity, reason = "used here only")]
    pub(super) fn page_states(
        &mut self,
        from: PageKey,
        to: u32,
    ) -> Result<SmallVec<[(u16, Resolved, Resolved); 16]>, SmallVec<[u32; 2]>> {
        let mut need: SmallVec<[u32; 2]> = SmallVec::new();
        let mut states = SmallVec::new();
        for index in 0..BLOCKS_PER_PAGE as u8 {
            let key = from.block(index);
            let here = self.resolve_in_layer(key);
            let there = self.resolve_in_layer(BlockKey { layer: to, ..key });
            match (here, there) {
                (Ok(here), Ok(there)) if here.state != BlockState::Absent => {
                    states.push((key.block, here, there));
                }
                (Ok(_), Ok(_)) => {}
                (here, there) => need.extend([here.err(), there.err()].into_iter().flatten()),
            }
        }
        // A page may be relabelled although a tombstone spared the look at its sector.
        if let Some(physical) = layer_home(self, from) {
            let block = physical / SECTORS_PER_BLOCK;
            if !self.cache.contains(block) {
                need.push(block);
            }
        }
        need.sort_unstable();
        need.dedup();
        if need.is_empty() {
            Ok(states)
        } else {
            Err(need)
        }
    }

    /// A block of sectors came.
    pub(super) fn merge_sector(&mut self, block: u32) {
        if let Some((slot, chunk, Step::Sectors(missing))) = &mut self.merge.step {
            missing.remove(&block);
            if missing.is_empty() {
                let (slot, chunk) = (*slot, *chunk);
                self.merge.step = None;
                self.stay(slot, chunk);
            }
        }
    }

    pub(super) fn pause(&self) -> Duration {
        // Not 0: the deadline has to lie ahead.
        self.config.merge_pause.max(Duration::from_micros(1))
    }

    /// A step is done: there may be more to do in its chunk.
    pub(super) fn end_step(&mut self, slot: u32, chunk: u32, progress: bool) {
        self.merge.progress |= progress;
        self.stay(slot, chunk);
        self.merge.rest_until = self.pause_between_steps();
    }

    /// When the next step may begin: while there are requests, after a pause.
    pub(super) fn pause_between_steps(&self) -> Option<Time> {
        let busy = !self.reads.is_empty()
            || self.now < self.last_write.after(self.pause().saturating_mul(4));
        busy.then(|| self.now.after(self.pause()))
    }
}

fn layer_home(store: &Store, key: PageKey) -> Option<u32> {
    store.index.by_slot(key.slot)?.home(key)
}
