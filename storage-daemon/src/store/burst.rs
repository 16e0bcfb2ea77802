//! Write-back, second half: reading the log, writing pages and sectors, advancing the tail.
//!
//! ```text
//! Marker -> MarkerSync -> Load -> Write -> Settle -> Sync -> Tail -> (done)
//! ```
//! Marker and MarkerSync are skipped when a durable marker covers the run already.
//!
//! Invariants:
//! - Sectors, data and everything up to `wait` are durable before the superblock names the new tail; the
//!   freed part of the log and freed pages are reused only after that superblock is durable.
//! - A page is changed in place only block by block, and only blocks that the log still holds.
//! - The overlay hides a page until the burst is finished.

use std::collections::BTreeSet;

use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{BLOCK_SIZE, BLOCKS_PER_PAGE, ChunkIndex, SnapshotNumber, Version};
use bytes::Bytes;
use smallvec::SmallVec;

use super::api::StoreCommand;
use super::cache::{Lookup, SECTORS_PER_BLOCK};
use super::index::{NO_PAGE, PageKey};
use super::sync::{SuperblockAction, SyncAction};
use super::writeback::{BlockPlan, Burst, LogRead, Outcome, PagePlan, Stage};
use super::{Store, Target};
use crate::format::{PageBlock, PageSector, PageState, StoredState};

/// Writes of a burst in flight at once: foreground requests share the device.
const WRITES_IN_FLIGHT_MAX: u32 = 32;
/// Reads of sectors of a burst in flight at once.
const READS_IN_FLIGHT_MAX: usize = 32;
/// Bytes of one read of the log.
const READ_BYTES_MAX: u64 = 1 << 20;
/// Dead bytes of the log that are read along to save a command.
const READ_GAP_MAX: u64 = 64 * 1024;

impl Store {
    pub(super) fn pump_burst(&mut self, out: &mut Vec<StoreCommand>) {
        if self.burst.is_idle() {
            self.start_burst(out);
        }
        let Some(mut burst) = self.burst.active.take() else {
            return;
        };
        match burst.stage {
            Stage::Marker if self.log.completed >= burst.wait => {
                burst.stage = Stage::MarkerSync;
                self.burst.active = Some(burst);
                return self.want_sync(SyncAction::WriteBack, out);
            }
            Stage::Load => self.load_burst(&mut burst, out),
            Stage::Settle if self.log.completed >= burst.wait => {
                burst.stage = Stage::Sync;
                self.burst.active = Some(burst);
                return self.want_sync(SyncAction::WriteBack, out);
            }
            _ => {}
        }
        if burst.stage == Stage::Write {
            self.issue_writes(&mut burst, out);
            if burst.outstanding == 0 {
                burst.stage = Stage::Settle;
            }
        }
        let again = burst.stage == Stage::Settle && self.log.completed >= burst.wait;
        self.burst.active = Some(burst);
        if again {
            self.pump_burst(out);
        }
    }

    pub(super) fn burst_synced(&mut self, out: &mut Vec<StoreCommand>) {
        let Some(burst) = self.burst.active.as_mut() else {
            return;
        };
        match burst.stage {
            Stage::MarkerSync => {
                burst.stage = Stage::Load;
                self.pump_burst(out);
            }
            Stage::Sync => {
                burst.stage = Stage::Tail;
                let end = burst.end;
                if let Some(b) = self.log.batch(end) {
                    self.superblock.tail_offset = b.end();
                    self.superblock.tail_sequence = b.sequence;
                    self.superblock.tail_chain = b.chain;
                }
                self.want_superblock(SuperblockAction::TailFree);
            }
            _ => {}
        }
    }

    fn load_burst(&mut self, burst: &mut Burst, out: &mut Vec<StoreCommand>) {
        if !burst.loading {
            // Once: this runs at every event while sectors are loaded.
            if !self.allocate_pages(burst) {
                return;
            }
            burst.loading = true;
            self.start_loading(burst, out);
        }
        while burst.missing.len() < READS_IN_FLIGHT_MAX
            && let Some(block) = burst.unasked.pop()
        {
            if self.cache.contains(block) {
                self.cache.pin(block);
                burst.pinned.push(block);
            } else {
                self.load_sectors(block, out);
                burst.missing.insert(block);
            }
        }
        let loaded = burst.missing.is_empty() && burst.unasked.is_empty();
        if loaded && burst.outstanding == 0 {
            burst.reads.sort_by_key(|r| (r.offset, r.length));
            burst.unbuilt = burst.pages.keys().copied().collect();
            burst.stage = Stage::Write;
        }
    }

    /// Finds a page for every plan that needs one; false while the high-water mark has to rise first.
    fn allocate_pages(&mut self, burst: &mut Burst) -> bool {
        for (key, plan) in &mut burst.pages {
            let holds = plan
                .blocks
                .iter()
                .any(|(_, _, b)| !matches!(b, BlockPlan::Erased));
            let has = plan.adopt.is_some() || plan.allocated.is_some();
            if has
                || !holds
                || self
                    .index
                    .by_slot(key.slot)
                    .is_none_or(|r| r.home(*key).is_some())
            {
                continue;
            }
            let reserved = self.index.pages.get(key).is_some_and(|r| r.reserved);
            let page = if reserved {
                self.allocator.allocate_reserved()
            } else {
                self.allocator.allocate_unreserved()
            };
            let Some(page) = page else { return false };
            if let Some(r) = self.index.pages.get_mut(key) {
                r.reserved = false;
            }
            plan.allocated = Some(page);
        }
        true
    }

    fn start_loading(&mut self, burst: &mut Burst, out: &mut Vec<StoreCommand>) {
        let mut offsets: Vec<u64> = Vec::new();
        let mut sectors: BTreeSet<u32> = BTreeSet::new();
        for (key, plan) in &burst.pages {
            let home = self.index.by_slot(key.slot).and_then(|r| r.home(*key));
            let adopt = plan.adopt.map(|a| a.physical);
            for page in [home, adopt, plan.allocated].into_iter().flatten() {
                sectors.insert(page / SECTORS_PER_BLOCK);
            }
            offsets.extend(plan.blocks.iter().filter_map(|(_, _, b)| match b {
                BlockPlan::Data { log_offset, .. } => Some(*log_offset),
                _ => None,
            }));
        }
        burst.unasked = sectors.into_iter().rev().collect();
        offsets.sort_unstable();
        for offset in offsets {
            let block = BLOCK_SIZE as u64;
            if let Some(last) = burst.reads.last_mut()
                && offset <= last.offset + last.length + READ_GAP_MAX
                && offset + block <= last.offset + READ_BYTES_MAX
            {
                last.length = last.length.max(offset + block - last.offset);
                continue;
            }
            burst.reads.push(LogRead {
                offset,
                length: block,
                data: None,
            });
        }
        burst.outstanding = burst.reads.len() as u32;
        for (i, r) in burst.reads.iter().enumerate() {
            let token = self.token(Target::BurstRead(i as u32));
            let offset = self.geometry.log_offset + r.offset;
            let length = r.length as usize;
            out.push(StoreCommand::Disk(DiskCommand::Read {
                token,
                offset,
                length,
            }));
        }
    }

    pub(super) fn on_burst_read(
        &mut self,
        index: u32,
        bytes: Option<Bytes>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some(mut burst) = self.burst.active.take() else {
            return;
        };
        burst.outstanding -= 1;
        let base = burst.reads.len() as u32;
        if let Some(r) = burst.reads.get_mut(index as usize) {
            let (offset, length) = (r.offset, r.length);
            r.data = bytes.filter(|b| b.len() as u64 == length);
            if r.data.is_none() && length > BLOCK_SIZE as u64 {
                // One unreadable sector must not cost its neighbours.
                r.length = 0;
                let blocks = (length / BLOCK_SIZE as u64) as u32;
                burst.outstanding += blocks;
                for i in 0..blocks {
                    let offset = offset + u64::from(i) * BLOCK_SIZE as u64;
                    burst.reads.push(LogRead {
                        offset,
                        length: BLOCK_SIZE as u64,
                        data: None,
                    });
                    let token = self.token(Target::BurstRead(base + i));
                    let offset = self.geometry.log_offset + offset;
                    let length = BLOCK_SIZE;
                    out.push(StoreCommand::Disk(DiskCommand::Read {
                        token,
                        offset,
                        length,
                    }));
                }
            }
        }
        self.burst.active = Some(burst);
    }

    /// A block of sectors came: it stays until the burst is done.
    pub(super) fn burst_sector(&mut self, block: u32) {
        if let Some(burst) = self.burst.active.as_mut()
            && burst.missing.remove(&block)
        {
            self.cache.pin(block);
            burst.pinned.push(block);
        }
    }

    /// Builds a page's writes; after the last page, those of the sectors. False: there is nothing left.
    fn build_more(&mut self, burst: &mut Burst) -> bool {
        if let Some(key) = burst.unbuilt.pop_front() {
            if let Some(plan) = burst.pages.remove(&key) {
                self.build_page(burst, key, &plan);
                burst.pages.insert(key, plan);
            }
            return true;
        }
        for block in std::mem::take(&mut burst.dirty) {
            let offset = self.sector_block_offset(block);
            if let Some(bytes) = self.cache.bytes(block) {
                let mut data = SmallVec::new();
                data.push(super::space::block_of(bytes));
                burst.writes.push_back((offset, data));
            }
        }
        !burst.writes.is_empty()
    }

    /// The sector of a home page as blocks.
    pub(super) fn home_blocks(&mut self, physical: u32, bound: Version) -> [PageBlock; 16] {
        let mut blocks = [PageBlock::default(); BLOCKS_PER_PAGE as usize];
        match self.cache.sector(physical) {
            Lookup::Sector(bytes) => {
                for (i, b) in blocks.iter_mut().enumerate() {
                    *b = PageSector::block_of(bytes, i);
                }
            }
            Lookup::Rotten | Lookup::Missing => {
                let state = StoredState::BadUnversioned;
                blocks.fill(PageBlock {
                    version: bound,
                    checksum: 0,
                    state,
                });
            }
        }
        blocks
    }

    fn build_page(&mut self, burst: &mut Burst, key: PageKey, plan: &PagePlan) {
        let Some(replica) = self.index.by_slot(key.slot) else {
            return;
        };
        let (number, volume) = (replica.header.replica, replica.header.volume);
        let (bound, home) = (replica.home_highest, replica.home(key));
        let (physical, mut blocks) = match (plan.adopt, home, plan.allocated) {
            (Some(a), _, _) => {
                let blocks = a.checksums.map(|checksum| PageBlock {
                    version: a.version,
                    checksum,
                    state: StoredState::Data,
                });
                (a.physical, blocks)
            }
            (None, Some(home), _) => (home, self.home_blocks(home, bound)),
            (None, None, Some(page)) => (page, [PageBlock::default(); 16]),
            (None, None, None) => return,
        };
        for e in &plan.tombstones {
            for (i, b) in blocks.iter_mut().enumerate() {
                let at = key.block(i as u8).block;
                if e.first <= at && at < e.end && b.version < e.version {
                    *b = PageBlock::default();
                }
            }
        }
        let mut runs: SmallVec<[(u8, SmallVec<[Bytes; 4]>); 4]> = SmallVec::new();
        let mut planned = plan.blocks.clone();
        planned.sort_by_key(|(i, _, _)| *i);
        for (i, _, what) in planned {
            let b = &mut blocks[usize::from(i)];
            match what {
                BlockPlan::Adopted => {}
                BlockPlan::Erased => *b = PageBlock::default(),
                BlockPlan::Bad { version, checksum } => {
                    *b = PageBlock {
                        version,
                        checksum,
                        state: StoredState::Bad,
                    };
                }
                BlockPlan::BadUnversioned { version } => {
                    *b = PageBlock {
                        version,
                        checksum: 0,
                        state: StoredState::BadUnversioned,
                    };
                }
                BlockPlan::Data {
                    log_offset,
                    version,
                    checksum,
                } => {
                    let data = burst.data_at(log_offset);
                    let data = data.filter(|d| crc32c::crc32c(d) == checksum);
                    let Some(data) = data else {
                        self.stats.checksum_errors += 1;
                        *b = PageBlock {
                            version,
                            checksum,
                            state: StoredState::Bad,
                        };
                        continue;
                    };
                    *b = PageBlock {
                        version,
                        checksum,
                        state: StoredState::Data,
                    };
                    match runs
                        .last_mut()
                        .filter(|(at, d)| usize::from(*at) + d.len() == usize::from(i))
                    {
                        Some((_, run)) => run.push(data),
                        None => runs.push((i, smallvec::smallvec![data])),
                    }
                }
            }
        }
        for (i, data) in runs {
            let offset = self.page_offset(physical) + u64::from(i) * BLOCK_SIZE as u64;
            burst.writes.push_back((offset, data));
        }
        self.generation += 1;
        let mut sector = PageSector::free(physical, self.generation);
        sector.blocks = blocks;
        let empty = sector.is_empty();
        if !empty {
            sector.state = PageState::Owned;
            sector.replica = number;
            sector.volume = volume;
            sector.chunk = ChunkIndex(key.chunk);
            sector.layer = SnapshotNumber(key.layer);
            sector.page = key.page;
        }
        let highest = blocks
            .iter()
            .map(|b| b.version)
            .max()
            .unwrap_or(Version::ZERO);
        if let Some(r) = self.index.by_slot_mut(key.slot) {
            r.home_highest = r.home_highest.max(highest);
        }
        self.cache.update(&sector, self.salt);
        burst.dirty.insert(physical / SECTORS_PER_BLOCK);
        let mut left: SmallVec<[u32; 2]> = SmallVec::new();
        if let Some(old) = home.filter(|h| *h != physical) {
            self.cache
                .update(&PageSector::free(old, self.generation), self.salt);
            burst.dirty.insert(old / SECTORS_PER_BLOCK);
            left.push(old);
        }
        if empty {
            left.push(physical);
        }
        burst.outcomes.push(Outcome {
            key,
            home: (!empty).then_some(physical),
            left,
        });
    }

    fn issue_writes(&mut self, burst: &mut Burst, out: &mut Vec<StoreCommand>) {
        while burst.outstanding < WRITES_IN_FLIGHT_MAX {
            let Some((offset, data)) = burst.writes.pop_front() else {
                // Page by page, as the device takes them: the thread has others to serve.
                if self.build_more(burst) {
                    continue;
                }
                return;
            };
            burst.outstanding += 1;
            let token = self.token(Target::BurstWrite);
            out.push(StoreCommand::Disk(DiskCommand::Write {
                durable: false,
                token,
                offset,
                data,
            }));
        }
    }

    pub(super) fn on_burst_write(&mut self) {
        if let Some(burst) = self.burst.active.as_mut() {
            burst.outstanding -= 1;
        }
    }

    /// The new tail is durable: what was freed may be used again.
    pub(super) fn finish_burst(&mut self, out: &mut Vec<StoreCommand>) {
        let Some(burst) = self.burst.active.take() else {
            return;
        };
        for outcome in &burst.outcomes {
            self.settle_page(outcome);
        }
        for (key, plan) in &burst.pages {
            if let Some(r) = self.index.pages.get_mut(key)
                && plan.adopt.is_some_and(|a| a.physical == r.redirect)
            {
                r.redirect = NO_PAGE;
            }
            let entries = plan.blocks.iter().map(|(i, batch, _)| (*i, *batch));
            self.index.retire(*key, entries, &mut self.allocator);
        }
        for outcome in &burst.outcomes {
            self.release_left(outcome);
        }
        for &(slot, chunk, layer) in &burst.touched {
            let replica = self.index.by_slot_mut(slot);
            let Some(l) = replica.and_then(|r| r.layer_mut(chunk, layer)) else {
                continue;
            };
            let tombstones = &mut l.tombstones;
            let before = tombstones.len();
            tombstones.forget(burst.end);
            let forgotten = before - tombstones.len();
            self.index.tombstones -= forgotten as u64;
        }
        for page in burst.dead.iter().chain(&burst.orphans) {
            self.allocator.release(*page);
        }
        for block in burst.pinned {
            self.cache.unpin(block);
        }
        self.log.free_to(burst.end);
        self.stats.write_backs += 1;
        self.merge.wake();
        self.drain_queue(out);
    }

    /// Enters the page's new home.
    fn settle_page(&mut self, outcome: &Outcome) {
        let key = outcome.key;
        let Some(home) = outcome.home else { return };
        let Some(replica) = self.index.by_slot_mut(key.slot) else {
            return;
        };
        replica.set_home(key, home);
        if let Some(r) = self.index.pages.get_mut(&key)
            && std::mem::take(&mut r.reserved)
        {
            self.allocator.unreserve();
        }
    }

    /// Gives back pages that were left. A page that is empty on disk, but that newer records in the log
    /// count on, stays home.
    fn release_left(&mut self, outcome: &Outcome) {
        let key = outcome.key;
        for page in &outcome.left {
            let Some(replica) = self.index.by_slot_mut(key.slot) else {
                continue;
            };
            if replica.home(key) == Some(*page) {
                let counted_on = self
                    .index
                    .pages
                    .get(&key)
                    .is_some_and(|r| r.redirect == NO_PAGE);
                if counted_on {
                    continue;
                }
                let Some(replica) = self.index.by_slot_mut(key.slot) else {
                    continue;
                };
                replica.clear_home(key);
            }
            self.allocator.release(*page);
        }
    }
}
