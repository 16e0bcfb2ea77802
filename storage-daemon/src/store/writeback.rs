//! Write-back, first half: which part of the log goes home, and what that means for each page.
//!
//! Invariants:
//! - Only durable batches go home, and only when a durable marker says that they are: else recovery
//!   could discard a record whose page was already changed in place.
//! - A record that is already superseded is not written home; the tail passes it only after the batch
//!   that superseded it (at or below `wait`) is durable.
//! - Tombstones of freed records are re-logged, or forgotten when R9 allows it: at or below
//!   `forget_below`, in the oldest layer of the chunk, with the homes beneath them emptied first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_proto::ids::{
    BLOCK_SIZE, BLOCKS_PER_PAGE, BlockRange, ChunkIndex, Epoch, SnapshotNumber, Version,
};
use bytes::Bytes;
use smallvec::SmallVec;

use super::Store;
use super::api::StoreCommand;
use super::index::{BlockKey, NO_PAGE, PageKey, Place};
use super::sync::SyncAction;
use super::tombstones::Extent;
use crate::format::{Record, RecordKind};

/// Pages that one burst may touch: a run of redirects takes few bytes of the log and many pages, and the
/// disk's thread answers nobody while it plans and builds them.
const BURST_PAGES_MAX: usize = 1024;

/// Pages that a range lies in.
fn pages_touched(range: BlockRange) -> usize {
    let per_page = BLOCKS_PER_PAGE as u16;
    usize::from((range.end() - 1) / per_page - range.first / per_page) + 1
}

/// What a block of a page becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum BlockPlan {
    /// Data at this offset of the log.
    Data {
        log_offset: u64,
        version: Version,
        checksum: u32,
    },
    /// It is in the adopted page already.
    Adopted,
    /// Nothing.
    Erased,
    /// Known bad.
    Bad { version: Version, checksum: u32 },
    /// Known bad, of at most this version.
    BadUnversioned { version: Version },
}

/// A fresh page that becomes home.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Adoption {
    pub(super) physical: u32,
    pub(super) version: Version,
    pub(super) checksums: [u32; BLOCKS_PER_PAGE as usize],
}

/// What happens to one page.
#[derive(Clone, Debug, Default)]
pub(super) struct PagePlan {
    pub(super) adopt: Option<Adoption>,
    /// (block within the page, its batch, what it becomes)
    pub(super) blocks: SmallVec<[(u8, u64, BlockPlan); 4]>,
    /// Tombstones that cover parts of it, from records that are durable.
    pub(super) tombstones: SmallVec<[Extent; 1]>,
    /// The page that it will be in, if it needs a new one.
    pub(super) allocated: Option<u32>,
}

/// Where a burst is; see `burst`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Marker,
    MarkerSync,
    Load,
    Write,
    Settle,
    Sync,
    Tail,
}

/// A part of the log that is read back.
pub(super) struct LogRead {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) data: Option<Bytes>,
}

/// How a page ends up.
pub(super) struct Outcome {
    pub(super) key: PageKey,
    /// Where it is now.
    pub(super) home: Option<u32>,
    /// Pages that it leaves.
    pub(super) left: SmallVec<[u32; 2]>,
}

/// One burst.
pub(super) struct Burst {
    /// Last batch that it frees.
    pub(super) end: u64,
    /// Last batch that may have superseded something in the run.
    pub(super) wait: u64,
    pub(super) stage: Stage,
    pub(super) pages: BTreeMap<PageKey, PagePlan>,
    pub(super) touched: Vec<(u32, u32, u32)>,
    /// Fresh pages that a later redirect replaced.
    pub(super) dead: Vec<u32>,
    /// Fresh pages of replicas that were dropped.
    pub(super) orphans: Vec<u32>,
    pub(super) loading: bool,
    pub(super) reads: Vec<LogRead>,
    pub(super) outstanding: u32,
    /// Blocks of sectors that are still to be asked for, and those on their way.
    pub(super) unasked: Vec<u32>,
    pub(super) missing: BTreeSet<u32>,
    /// Pages that are still to be built, and the blocks of sectors that the built ones changed.
    pub(super) unbuilt: VecDeque<PageKey>,
    pub(super) dirty: BTreeSet<u32>,
    pub(super) pinned: Vec<u32>,
    pub(super) writes: VecDeque<(u64, SmallVec<[Bytes; 4]>)>,
    pub(super) outcomes: Vec<Outcome>,
}

impl Burst {
    pub(super) fn new(end: u64) -> Self {
        Self {
            end,
            wait: end,
            stage: Stage::Marker,
            pages: BTreeMap::new(),
            touched: Vec::new(),
            dead: Vec::new(),
            orphans: Vec::new(),
            loading: false,
            reads: Vec::new(),
            outstanding: 0,
            unasked: Vec::new(),
            missing: BTreeSet::new(),
            unbuilt: VecDeque::new(),
            dirty: BTreeSet::new(),
            pinned: Vec::new(),
            writes: VecDeque::new(),
            outcomes: Vec::new(),
        }
    }

    pub(super) fn data_at(&self, offset: u64) -> Option<Bytes> {
        let at = self.reads.partition_point(|r| r.offset <= offset);
        // Failed reads were split: several entries may begin at or before the offset.
        self.reads[..at].iter().rev().take(2).find_map(|r| {
            let start = offset - r.offset;
            let data = r.data.as_ref()?;
            (start + BLOCK_SIZE as u64 <= r.length)
                .then(|| data.slice(start as usize..start as usize + BLOCK_SIZE))
        })
    }
}

/// Whether a burst is under way.
#[derive(Default)]
pub(super) struct BurstState {
    pub(super) active: Option<Box<Burst>>,
    pub(super) count: u64,
}

impl BurstState {
    pub(super) fn is_idle(&self) -> bool {
        self.active.is_none()
    }

    /// Number of the burst that is or was the last under way.
    pub(super) fn started(&self) -> u64 {
        self.count
    }
}

impl Store {
    /// The log holds something that a client wrote and that is not home.
    pub(super) fn idle_work(&self) -> bool {
        self.burst.is_idle()
            && self
                .log
                .batches
                .front()
                .is_some_and(|b| b.sequence <= self.log.last_fresh)
    }

    /// Begins a burst when one is due.
    pub(super) fn start_burst(&mut self, out: &mut Vec<StoreCommand>) {
        let Some(front) = self.log.batches.front().map(|b| b.sequence) else {
            return;
        };
        let percent = u64::from(self.config.write_back_percent);
        let stuck = !self.queue.is_empty()
            && (self.log.used > self.log.bytes / 4
                || (self.log.flights() == 0 && self.log.open.is_empty()));
        // What write-back itself logged again is no reason to go on.
        let full = self.log.used * 100 > self.log.bytes * percent && self.idle_work();
        let pressure = full || stuck;
        let idle = self.idle_work()
            && self.now >= self.last_write.after(self.config.idle_write_back)
            && !self.moves_go_on();
        if !(pressure || idle) || self.admin.is_dropping() || self.merge.moves_pages() {
            return;
        }
        if self.moves_go_first() {
            return;
        }
        if front > self.log.durable {
            if front <= self.log.completed && self.sync.idle() {
                self.want_sync(SyncAction::Marker, out);
            }
            return;
        }
        self.plan_burst();
    }

    fn plan_burst(&mut self) {
        let limit = self.config.write_back_burst_bytes.min(self.log.bytes / 4);
        let mut bytes = 0;
        let mut pages = 0;
        let mut end = 0;
        for b in &self.log.batches {
            bytes += b.used;
            pages += b
                .records
                .iter()
                .map(|r| pages_touched(r.range))
                .sum::<usize>();
            let full = bytes > limit || pages > BURST_PAGES_MAX;
            if b.sequence > self.log.durable || (end > 0 && full) {
                break;
            }
            end = b.sequence;
        }
        self.burst.count += 1;
        let mut burst = Box::new(Burst::new(end));
        let touched = self.plan_pages(&mut burst);
        self.plan_tombstones(&mut burst, &touched);
        burst.touched = touched.into_iter().collect();
        // Records of our own go into the open batch; everything superseded so far lies at or below it.
        let before = self.log.open.records.len();
        self.relog_tombstones(&burst);
        self.append_watermarks(end);
        let own = self.log.open.records.len() > before;
        let marked = self.log.marker >= end;
        if own || !marked {
            self.log.open.forced = true;
        }
        let open = !self.log.open.is_empty() || self.log.open.redirects > 0;
        self.close_wanted |= open;
        burst.wait = if open {
            self.log.next_sequence
        } else {
            self.log.last_sequence
        };
        burst.stage = if marked { Stage::Load } else { Stage::Marker };
        self.burst.active = Some(burst);
    }

    /// Plans what the live records of the run mean; returns the layers with tombstones to look after.
    fn plan_pages(&mut self, burst: &mut Burst) -> BTreeSet<(u32, u32, u32)> {
        let mut touched = BTreeSet::new();
        let mut pages: BTreeMap<PageKey, PagePlan> = BTreeMap::new();
        for batch in self
            .log
            .batches
            .iter()
            .take_while(|b| b.sequence <= burst.end)
        {
            for record in &batch.records {
                let Some(&slot) = self.index.by_number.get(&record.replica) else {
                    if let RecordKind::Redirect { physical, .. } = record.kind {
                        burst.orphans.push(physical);
                    }
                    continue;
                };
                let (chunk, layer) = (record.range.chunk.0, record.layer.0);
                let key = |block| BlockKey {
                    slot,
                    chunk,
                    layer,
                    block,
                };
                match &record.kind {
                    RecordKind::Watermark { .. } => continue,
                    RecordKind::Trim => {
                        touched.insert((slot, chunk, layer));
                    }
                    RecordKind::Redirect {
                        physical,
                        checksums,
                    } => {
                        let page = key(record.range.first).page();
                        let current = self.index.pages.get(&page).map_or(NO_PAGE, |r| r.redirect);
                        if current == *physical {
                            let adopt = Adoption {
                                physical: *physical,
                                version: record.version,
                                checksums: *checksums,
                            };
                            pages.entry(page).or_default().adopt = Some(adopt);
                        } else if self.index.by_slot(slot).and_then(|r| r.home(page))
                            != Some(*physical)
                        {
                            // As a home (an interrupted burst adopted it) it is left like any home.
                            burst.dead.push(*physical);
                        }
                    }
                    RecordKind::Data(_)
                    | RecordKind::Erase
                    | RecordKind::Bad
                    | RecordKind::BadUnversioned => {}
                }
                let mut block = record.range.first;
                while block < record.range.end() {
                    if !self.index.pages.contains_key(&key(block).page()) {
                        block = (block / 16 + 1) * 16;
                        continue;
                    }
                    self.plan_block(key(block), batch.sequence, &mut pages);
                    block += 1;
                }
            }
        }
        burst.pages = pages;
        touched
    }

    /// Plans a block if its newest state is in this batch.
    fn plan_block(&self, key: BlockKey, batch: u64, pages: &mut BTreeMap<PageKey, PagePlan>) {
        let Some(o) = self.index.overlay(key).filter(|o| o.batch == batch) else {
            return;
        };
        let (version, checksum) = (o.version, o.checksum);
        let plan = match o.place {
            Place::Log(index) => {
                let offset = self.log.batch(batch).map_or(0, |b| b.data_offset(index));
                BlockPlan::Data {
                    log_offset: offset,
                    version,
                    checksum,
                }
            }
            Place::Page(_) => BlockPlan::Adopted,
            Place::Erased => BlockPlan::Erased,
            Place::Bad => BlockPlan::Bad { version, checksum },
            Place::BadUnversioned => BlockPlan::BadUnversioned { version },
        };
        let block = (key.block % BLOCKS_PER_PAGE as u16) as u8;
        let blocks = &mut pages.entry(key.page()).or_default().blocks;
        // Two records of one batch can cover the same block (an erasure and its tombstone).
        if blocks.iter().all(|(b, _, _)| *b != block) {
            blocks.push((block, batch, plan));
        }
    }

    /// Adds the durable tombstones of the touched layers to every page beneath them.
    fn plan_tombstones(&self, burst: &mut Burst, touched: &BTreeSet<(u32, u32, u32)>) {
        for &(slot, chunk, layer) in touched {
            let Some(l) = self.layer(slot, chunk, layer) else {
                continue;
            };
            for e in l.tombstones.iter().filter(|e| e.batch <= burst.end) {
                let first = (e.first / BLOCKS_PER_PAGE as u16) as u8;
                let last = ((e.end - 1) / BLOCKS_PER_PAGE as u16) as u8;
                for page in first..=last {
                    let key = PageKey {
                        slot,
                        chunk,
                        layer,
                        page,
                    };
                    if l.pages.get(page).is_some() || burst.pages.contains_key(&key) {
                        burst.pages.entry(key).or_default().tombstones.push(*e);
                    }
                }
            }
        }
    }

    fn layer(&self, slot: u32, chunk: u32, layer: u32) -> Option<&super::replica::Layer> {
        self.index.by_slot(slot)?.layer(chunk, layer)
    }

    /// Writes those tombstones again that may not be forgotten yet.
    fn relog_tombstones(&mut self, burst: &Burst) {
        let batch = self.log.next_sequence;
        for &(slot, chunk, layer) in &burst.touched {
            let Some(replica) = self.index.by_slot(slot) else {
                continue;
            };
            let (number, rebuilding) = (replica.header.replica, replica.header.rebuild_epoch);
            let unsettled = self
                .index
                .inherits_unsettled(slot, self.superblock.damage_incarnation);
            let inherited = self.index.inherited_pages(slot, chunk);
            let Some(replica) = self.index.by_slot_mut(slot) else {
                continue;
            };
            // A rebuild target may still be given what lies beneath, and so may those that it inherits from.
            let below = match rebuilding {
                Epoch(0) if !unsettled => replica.forget_below,
                _ => Version::ZERO,
            };
            // Layers above count as well: until all replicas have one list, an older block may bear a higher number.
            let layers = replica.chunks.get(&chunk).map(|c| &c.layers);
            let others = layers.into_iter().flatten().filter(|l| l.number != layer);
            let occupied = others.fold(inherited, |mask, l| mask | l.occupied());
            let keep = |e: &Extent| {
                let pages = e.first / BLOCKS_PER_PAGE as u16..=(e.end - 1) / BLOCKS_PER_PAGE as u16;
                let alone = pages.into_iter().all(|page| occupied & (1 << page) == 0);
                !(alone && e.version <= below)
            };
            let Some(l) = replica.layer_mut(chunk, layer) else {
                continue;
            };
            let tombstones = &mut l.tombstones;
            for e in tombstones
                .iter()
                .filter(|e| e.batch <= burst.end && keep(e))
            {
                self.log.push(Record {
                    replica: number,
                    range: BlockRange {
                        chunk: ChunkIndex(chunk),
                        first: e.first,
                        count: e.end - e.first,
                    },
                    layer: SnapshotNumber(layer),
                    version: e.version,
                    kind: RecordKind::Trim,
                });
            }
            tombstones.rebase(burst.end, batch, keep);
        }
    }

    /// Logs watermarks that changed, or whose record is at or below `freed`.
    pub(super) fn append_watermarks(&mut self, freed: u64) {
        let batch = self.log.next_sequence;
        let Self { index, log, .. } = self;
        for r in index.replicas.iter_mut().flatten() {
            let lost = r.watermark_batch != 0 && r.watermark_batch <= freed;
            // The highest version must survive when its blocks are trimmed and forgotten.
            let first = r.watermark_batch == 0 && freed != 0 && !r.highest.is_zero();
            if !(r.watermark_dirty || lost || first) {
                continue;
            }
            r.watermark_dirty = false;
            r.watermark_batch = batch;
            log.push(Record {
                replica: r.header.replica,
                range: BlockRange {
                    chunk: ChunkIndex(0),
                    first: 0,
                    count: 1,
                },
                layer: SnapshotNumber(0),
                version: r.watermark,
                kind: RecordKind::Watermark {
                    forget_below: r.forget_below,
                    highest: r.highest,
                },
            });
        }
    }
}
