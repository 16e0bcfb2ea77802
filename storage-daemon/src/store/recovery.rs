//! Opening a disk: what to read in which order, and what an unreadable part means.
//!
//! ```text
//! Superblocks -> Slots -> Bodies -> Sectors -> Log -> Scan -> Pages -> (replay) -> Superblock -> Fix -> Seal
//! ```
//!
//! Invariants:
//! - The log is walked batch by batch from the superblock's tail by the chain of headers. Markers (of
//!   headers that verify, and of the superblock) divide it: at or below the marker, data that does not
//!   verify makes its blocks bad; above it the log ends at the first batch that does not verify.
//! - A missing batch at or below a marker, a rotten page sector, slot or descriptor is damage: a new
//!   incarnation, and every replica counts as damaged until it is rebuilt. Nothing is rolled back
//!   silently, and nothing rotten is taken as free before the damage is durable.
//! - Before the store is ready a new batch (the seal) follows the last accepted one, durably: what was
//!   discarded can never be accepted later.
//!
//! Time to open: all page sectors below the high-water mark (8 GiB per TiB of pages ever used) and the
//! log twice, read sequentially.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{BLOCK_SIZE, ClusterId, DiskId, Incarnation, Version};
use bytes::Bytes;

use super::allocator::Allocator;
use super::api::{StoreCommand, StoreError, StoreIdentity};
use super::cache::SECTORS_PER_BLOCK;
use super::index::PageKey;
use super::log::Log;
use super::replica::Replica;
use super::sync::{SuperblockAction, SyncAction};
use super::{Phase, Store, Target};
use crate::format::{
    BatchHeader, FormatError, Geometry, IO_BLOCK, PAGE_SECTOR_BYTES, PageSector, PageState, Record,
    ReplicaHeader, SUPERBLOCK_OFFSETS, StoredState, Superblock, decode_body, salt_of,
};

/// Reads in flight.
const READS_IN_FLIGHT: u32 = 16;
/// Bytes of a sequential read.
pub(super) const WINDOW: u64 = 1 << 20;
/// Bytes by which windows of the scan overlap, so that headers are seen whole.
const OVERLAP: u64 = 160 * 1024;
/// Marks the read of a single block of sectors.
const SINGLE: u64 = 1 << 63;

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Step {
    #[default]
    Start,
    Superblocks,
    Slots,
    Bodies,
    Sectors,
    Log,
    Scan,
    Pages,
    Superblock,
    FixRead,
    FixWrite,
    FixSync,
    Seal,
    SealSync,
}

/// A batch found in the log.
pub(super) struct Found {
    pub(super) header: BatchHeader,
    pub(super) records: Vec<Record>,
    pub(super) offset: u64,
    /// Data blocks that do not match.
    pub(super) bad: BTreeSet<u32>,
}

/// State of an opening.
#[derive(Default)]
pub(super) struct Recovery {
    step: Step,
    outstanding: u32,
    /// (what it is, offset, length)
    pub(super) reads: VecDeque<(u64, u64, u64)>,
    superblocks: Vec<Superblock>,
    format_error: Option<FormatError>,
    rotten_slots: Vec<u32>,
    bodies: BTreeMap<u32, ReplicaHeader>,
    /// Generation of the sector of each page that is somebody's home, else 0.
    pub(super) owned: Vec<u64>,
    rotten_pages: Vec<u32>,
    losers: Vec<u32>,
    /// Where the walk is, relative to the log; and whether its start was tried instead.
    pub(super) at: u64,
    pub(super) wrapped: bool,
    pub(super) window_at: u64,
    pub(super) window: Bytes,
    pub(super) short_window: bool,
    pub(super) found: Vec<Found>,
    pub(super) highest_sequence: u64,
    pub(super) evidence: bool,
    pub(super) bad_pages: BTreeSet<usize>,
    pub(super) damage: bool,
    pub(super) bad_blocks: u64,
    changed: bool,
    seal: u64,
    kept: BTreeSet<u32>,
}

impl Recovery {
    /// Pages whose sectors must become free ones.
    pub(super) fn to_fix(&self) -> impl Iterator<Item = u32> + '_ {
        self.rotten_pages.iter().chain(&self.losers).copied()
    }

    /// Of those, pages that log records name are not given back now.
    pub(super) fn keep_named(&mut self, named: &BTreeSet<u32>) {
        self.kept = self.to_fix().filter(|p| named.contains(p)).collect();
    }
}

/// Stands in until the disk's own is read.
pub(super) fn blank_superblock() -> Superblock {
    Superblock {
        cluster: ClusterId::NIL,
        disk: DiskId::NIL,
        boot_id: [0; 16],
        generation: 0,
        incarnation: Incarnation(0),
        damage_incarnation: Incarnation(0),
        tail_offset: 0,
        tail_sequence: 0,
        tail_chain: 0,
        clean: false,
        durable_sequence: 0,
        page_high_water: 0,
        next_replica: 1,
        geometry: Geometry {
            size_bytes: 0,
            slot_count: 0,
            slots_offset: 0,
            sectors_offset: 0,
            log_offset: 0,
            log_bytes: 0,
            pages_offset: 0,
            page_count: 0,
        },
    }
}

impl Store {
    fn recovery(&mut self) -> Option<&mut Recovery> {
        if let Phase::Recovering(r) = &mut self.phase {
            Some(r)
        } else {
            None
        }
    }

    /// Keeps reads in flight; moves on when a step has nothing left to do.
    pub(super) fn recovery_pump(&mut self, out: &mut Vec<StoreCommand>) {
        let Phase::Recovering(mut r) = std::mem::replace(&mut self.phase, Phase::Closed) else {
            return;
        };
        loop {
            while r.outstanding < READS_IN_FLIGHT {
                let Some((id, offset, length)) = r.reads.pop_front() else {
                    break;
                };
                r.outstanding += 1;
                let token = self.token(Target::Recovery(id));
                let length = length as usize;
                out.push(StoreCommand::Disk(DiskCommand::Read {
                    token,
                    offset,
                    length,
                }));
            }
            if r.outstanding > 0 || !r.reads.is_empty() {
                break;
            }
            match self.next_step(&mut r, out) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    out.push(StoreCommand::OpenFailed(error.clone()));
                    self.phase = Phase::Failed(error);
                    return;
                }
            }
        }
        if matches!(self.phase, Phase::Closed) {
            self.phase = Phase::Recovering(r);
        }
    }

    /// The current step is done: what comes next. False: wait for an event.
    fn next_step(
        &mut self,
        r: &mut Recovery,
        out: &mut Vec<StoreCommand>,
    ) -> Result<bool, StoreError> {
        r.step = match r.step {
            Step::Start => {
                for (id, offset) in SUPERBLOCK_OFFSETS.into_iter().enumerate() {
                    r.reads.push_back((id as u64, offset, IO_BLOCK as u64));
                }
                Step::Superblocks
            }
            Step::Superblocks => {
                self.adopt_superblock(r)?;
                for slot in 0..self.geometry.slot_count {
                    let at = self.slot_offset(slot);
                    r.reads.push_back((slot.into(), at, 2 * IO_BLOCK as u64));
                }
                Step::Slots
            }
            Step::Slots => {
                for (slot, header) in &r.bodies {
                    let at = self.slot_offset(*slot) + ReplicaHeader::body_offset(header.body_area);
                    let length = u64::from(header.body_bytes).next_multiple_of(IO_BLOCK as u64);
                    r.reads.push_back(((*slot).into(), at, length));
                }
                Step::Bodies
            }
            Step::Bodies => {
                r.owned = vec![0; self.superblock.page_high_water as usize];
                let bytes = u64::from(self.superblock.page_high_water) * PAGE_SECTOR_BYTES as u64;
                for at in (0..bytes).step_by(WINDOW as usize) {
                    let length = WINDOW.min(bytes - at);
                    r.reads
                        .push_back((at, self.geometry.sectors_offset + at, length));
                }
                Step::Sectors
            }
            Step::Sectors => {
                r.at = self.superblock.tail_offset;
                r.window_at = u64::MAX;
                r.highest_sequence = self.superblock.tail_sequence;
                Step::Log
            }
            Step::Log => {
                if self.walk_log(r) {
                    return Ok(true);
                }
                let bytes = self.geometry.log_bytes;
                for at in (0..bytes).step_by(WINDOW as usize) {
                    let length = (WINDOW + OVERLAP).min(bytes - at);
                    r.reads
                        .push_back((at, self.geometry.log_offset + at, length));
                }
                Step::Scan
            }
            Step::Scan => {
                self.cut_log(r);
                self.read_fresh_pages(r);
                Step::Pages
            }
            Step::Pages => {
                self.replay(r);
                self.renew_superblock(r);
                self.want_superblock(SuperblockAction::Recovery);
                self.sync.dirty = true;
                r.step = Step::Superblock;
                return Ok(false);
            }
            Step::FixRead => {
                self.write_fixes(r, out);
                r.step = Step::FixWrite;
                // Something waits for a sync in any case: it may have to cover nothing.
                if r.outstanding > 0 {
                    return Ok(false);
                }
                Step::FixWrite
            }
            Step::FixWrite => {
                r.step = Step::FixSync;
                self.sync.dirty = true;
                self.want_sync(SyncAction::Recovery, out);
                return Ok(false);
            }
            Step::Seal => {
                if self.log.completed < r.seal {
                    self.close_wanted = true;
                    self.submit_batch(out);
                    return Ok(false);
                }
                r.step = Step::SealSync;
                self.sync.dirty = true;
                self.want_sync(SyncAction::Recovery, out);
                return Ok(false);
            }
            Step::Superblock | Step::FixSync | Step::SealSync => return Ok(false),
        };
        Ok(true)
    }

    /// A sync or superblock that the opening waited for is durable.
    pub(super) fn recovery_advance(&mut self, out: &mut Vec<StoreCommand>) {
        let Phase::Recovering(r) = &mut self.phase else {
            return;
        };
        match r.step {
            Step::Superblock => {
                let pages = r.rotten_pages.iter().chain(&r.losers);
                let blocks: BTreeSet<u32> = pages.map(|p| p / SECTORS_PER_BLOCK).collect();
                r.step = Step::FixRead;
                let sectors = self.geometry.sectors_offset;
                for block in blocks {
                    let at = sectors + u64::from(block) * BLOCK_SIZE as u64;
                    r.reads.push_back((block.into(), at, IO_BLOCK as u64));
                }
            }
            Step::FixSync => {
                let pages: Vec<u32> = r.rotten_pages.drain(..).chain(r.losers.drain(..)).collect();
                r.step = Step::Seal;
                r.seal = self.log.next_sequence;
                self.log.open.forced = true;
                let kept = std::mem::take(&mut r.kept);
                for page in pages.into_iter().filter(|p| !kept.contains(p)) {
                    self.allocator.release(page);
                }
            }
            Step::SealSync => self.become_ready(out),
            _ => {}
        }
    }

    pub(super) fn on_recovery(
        &mut self,
        id: u64,
        bytes: Option<Bytes>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Phase::Recovering(mut r) = std::mem::replace(&mut self.phase, Phase::Closed) else {
            return;
        };
        r.outstanding -= 1;
        match r.step {
            Step::Superblocks => match bytes.as_deref().map(Superblock::decode) {
                Some(Ok(s)) => r.superblocks.push(s),
                Some(Err(error)) => r.format_error = Some(error),
                None => {}
            },
            Step::Slots => self.on_slot(&mut r, id as u32, bytes.as_deref()),
            Step::Bodies => self.on_body(&mut r, id as u32, bytes.as_deref()),
            Step::Sectors => self.on_sectors(&mut r, id, bytes.as_deref()),
            Step::Log => {
                r.window = bytes.unwrap_or_default();
            }
            Step::Scan => self.on_scan(&mut r, bytes.as_deref()),
            Step::Pages => self.on_fresh_page(&mut r, id, bytes.as_deref()),
            Step::FixRead => self.cache.insert(id as u32, bytes.as_deref(), self.salt),
            _ => {}
        }
        self.phase = Phase::Recovering(r);
        let _ = out;
    }

    fn adopt_superblock(&mut self, r: &mut Recovery) -> Result<(), StoreError> {
        let newest = r.superblocks.drain(..).max_by_key(|s| s.generation);
        let Some(superblock) = newest else {
            return Err(match r.format_error {
                Some(FormatError::Version(v)) => StoreError::FormatVersion(v),
                Some(FormatError::Magic) => StoreError::NotFormatted("no superblock"),
                _ => StoreError::NotFormatted("both superblocks are unreadable"),
            });
        };
        if superblock.geometry.size_bytes > self.disk_bytes {
            return Err(StoreError::NotFormatted(
                "the disk is smaller than when it was formatted",
            ));
        }
        self.geometry = superblock.geometry;
        self.salt = salt_of(superblock.disk);
        self.log = Log::new(self.geometry.log_bytes, self.salt);
        self.allocator = Allocator::new(self.geometry.page_count, superblock.page_high_water);
        self.index
            .replicas
            .resize_with(self.geometry.slot_count as usize, || None);
        self.superblock = superblock;
        Ok(())
    }

    fn on_slot(&mut self, r: &mut Recovery, slot: u32, bytes: Option<&[u8]>) {
        let copies = ReplicaHeader::COPIES.map(|at| {
            let copy = bytes.and_then(|b| b.get(at as usize..))?;
            ReplicaHeader::decode(copy, self.salt).ok()
        });
        match copies.into_iter().flatten().max_by_key(|h| h.generation) {
            None => {
                r.rotten_slots.push(slot);
                r.damage = true;
            }
            Some(h) if h.replica == 0 => {}
            Some(h) => {
                if h.body_bytes > 0 {
                    r.bodies.insert(slot, h.clone());
                }
                self.index.add(Replica::new(slot, h));
            }
        }
    }

    fn on_body(&mut self, r: &mut Recovery, slot: u32, bytes: Option<&[u8]>) {
        let Some(h) = r.bodies.get(&slot) else { return };
        let body = bytes
            .and_then(|b| b.get(..h.body_bytes as usize))
            .filter(|b| crc32c::crc32c(b) == h.body_checksum);
        match body.map(decode_body) {
            Some(Ok(body)) => {
                if let Some(replica) = self.index.by_slot_mut(slot) {
                    replica.descriptor = body.descriptor;
                    replica.layers = body.layers;
                }
            }
            _ => r.damage = true,
        }
    }

    fn on_sectors(&mut self, r: &mut Recovery, at: u64, bytes: Option<&[u8]>) {
        let (at, single) = (at & !SINGLE, at & SINGLE != 0);
        let first = (at / PAGE_SECTOR_BYTES as u64) as u32;
        let left = self.superblock.page_high_water - first;
        let Some(bytes) = bytes else {
            if single {
                r.rotten_pages
                    .extend(first..first + left.min(SECTORS_PER_BLOCK));
                r.damage = true;
                return;
            }
            // Unreadable as a whole: block by block, so that one bad sector costs only its own.
            let window = (WINDOW / PAGE_SECTOR_BYTES as u64) as u32;
            for block in (0..left.min(window)).step_by(SECTORS_PER_BLOCK as usize) {
                let at = at + u64::from(block) * PAGE_SECTOR_BYTES as u64;
                let offset = self.geometry.sectors_offset + at;
                r.reads.push_back((at | SINGLE, offset, BLOCK_SIZE as u64));
            }
            return;
        };
        for (i, sector) in bytes.chunks_exact(PAGE_SECTOR_BYTES).enumerate() {
            let page = first + i as u32;
            if page >= self.superblock.page_high_water {
                break;
            }
            match PageSector::decode(sector, page, self.salt) {
                Ok(s) => {
                    self.generation = self.generation.max(s.generation);
                    if s.state == PageState::Owned {
                        self.on_owned(r, &s);
                    }
                }
                Err(_) => {
                    r.rotten_pages.push(page);
                    r.damage = true;
                }
            }
        }
    }

    fn on_owned(&mut self, r: &mut Recovery, s: &PageSector) {
        let Some(&slot) = self.index.by_number.get(&s.replica) else {
            return;
        };
        let Some(replica) = self.index.by_slot_mut(slot) else {
            return;
        };
        let present = s.blocks.iter().filter(|b| b.state != StoredState::Absent);
        let highest = present.map(|b| b.version).max().unwrap_or(Version::ZERO);
        let key = PageKey {
            slot,
            chunk: s.chunk.0,
            layer: s.layer.0,
            page: s.page,
        };
        if let Some(other) = replica.home(key) {
            if r.owned[other as usize] > s.generation {
                r.losers.push(s.physical);
                return;
            }
            r.owned[other as usize] = 0;
            r.losers.push(other);
        }
        r.owned[s.physical as usize] = s.generation;
        replica.home_highest = replica.home_highest.max(highest);
        replica.note(s.chunk.0, s.layer.0, highest);
        replica.set_home(key, s.physical);
    }

    /// Brings memory to what the log says.
    fn replay(&mut self, r: &mut Recovery) {
        let marker = self.marker_of(r);
        if let Some(cut) = r.bad_pages.first() {
            r.found.truncate(*cut);
        }
        let last = r
            .found
            .last()
            .map_or(self.superblock.tail_sequence, |f| f.header.sequence);
        let floor = r
            .highest_sequence
            .max(self.superblock.durable_sequence)
            .max(marker);
        self.replay_log(r);
        self.log.last_sequence = last;
        self.log.completed = last;
        self.log.durable = marker.min(last);
        self.log.marker = self.superblock.durable_sequence.min(last);
        self.log.next_sequence = floor + 1;
        self.log.last_fresh = last;
    }

    fn renew_superblock(&mut self, r: &mut Recovery) {
        r.damage |= self.tie_links();
        let rebooted = self.superblock.boot_id != self.boot_id && !self.superblock.clean;
        if rebooted || r.damage {
            self.superblock.incarnation.0 += 1;
            r.changed = true;
        }
        if r.damage {
            self.superblock.damage_incarnation = self.superblock.incarnation;
            tracing::error!(
                disk = %self.superblock.disk,
                rotten_pages = r.rotten_pages.len(),
                rotten_slots = r.rotten_slots.len(),
                "the disk lost something durable: its replicas must be rebuilt from others"
            );
        }
        self.superblock.boot_id = self.boot_id;
        self.superblock.clean = false;
    }

    /// Sectors that lost their page to a newer owner, and rotten ones, become free ones; rotten slots too.
    fn write_fixes(&mut self, r: &mut Recovery, out: &mut Vec<StoreCommand>) {
        self.generation += 1;
        let mut blocks: BTreeSet<u32> = BTreeSet::new();
        for page in r.rotten_pages.iter().chain(&r.losers) {
            self.cache
                .update(&PageSector::free(*page, self.generation), self.salt);
            blocks.insert(page / SECTORS_PER_BLOCK);
        }
        for block in blocks {
            if let Some(bytes) = self.cache.bytes(block).map(super::space::block_of) {
                let offset = self.sector_block_offset(block);
                r.outstanding += 1;
                self.write_block(Target::Fix, offset, bytes, out);
            }
        }
        let header = ReplicaHeader {
            generation: 1,
            salt: self.salt,
            ..ReplicaHeader::default()
        };
        for slot in std::mem::take(&mut r.rotten_slots) {
            for copy in ReplicaHeader::COPIES {
                let offset = self.slot_offset(slot) + copy;
                r.outstanding += 1;
                self.write_block(
                    Target::Fix,
                    offset,
                    super::space::block_of(&header.encode()),
                    out,
                );
            }
        }
    }

    pub(super) fn on_fix_written(&mut self) {
        if let Some(r) = self.recovery() {
            r.outstanding -= 1;
        }
    }

    fn become_ready(&mut self, out: &mut Vec<StoreCommand>) {
        let Phase::Recovering(r) = std::mem::replace(&mut self.phase, Phase::Ready) else {
            return;
        };
        let identity = StoreIdentity {
            cluster: self.superblock.cluster,
            disk: self.superblock.disk,
            incarnation: self.superblock.incarnation,
            incarnation_changed: r.changed,
            damaged: r.damage,
            bad_blocks: r.bad_blocks,
        };
        self.last_write = self.now;
        self.identity = Some(identity);
        out.push(StoreCommand::Ready(identity));
    }
}
