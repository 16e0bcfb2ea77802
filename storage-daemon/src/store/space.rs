//! Where things are on the disk, formatting, the high-water mark, and pages given back later.
//!
//! Invariants:
//! - The high-water mark rises only after the sectors below it are durable as free ones.
//! - Pages of a dropped replica are given back when no write to them can be in flight any more.

use ashlar_platform::buffer::AlignedBuffer;
use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{BLOCK_SIZE, PAGE_SIZE};
use bytes::Bytes;
use smallvec::smallvec;

use super::api::{FormatOptions, StoreCommand, StoreError};
use super::cache::SECTORS_PER_BLOCK;
use super::sync::{SuperblockAction, SyncAction};
use super::{Store, Target};
use crate::format::{
    Geometry, IO_BLOCK, PAGE_SECTOR_BYTES, PageSector, ReplicaHeader, SECTOR, SLOT_BYTES,
    SUPERBLOCK_OFFSETS, Superblock, salt_of,
};

/// Pages by which the high-water mark rises.
const HIGH_WATER_STEP: u32 = 8192;
/// Pages whose sectors are written in one command.
const SECTORS_PER_WRITE: u32 = 2048;

struct Deferred {
    after_batch: u64,
    after_burst: u64,
    pages: Vec<u32>,
}

/// State of this file's matters.
#[derive(Default)]
pub(super) struct SpaceState {
    raising_to: Option<u32>,
    outstanding: u32,
    deferred: Vec<Deferred>,
    pub(super) shutdown_started: bool,
}

impl SpaceState {
    pub(super) fn is_busy(&self) -> bool {
        self.raising_to.is_some()
    }
}

fn free_sectors(from: u32, to: u32, generation: u64, salt: u32) -> Bytes {
    let mut buffer = AlignedBuffer::zeroed((to - from) as usize * PAGE_SECTOR_BYTES);
    for page in from..to {
        let at = (page - from) as usize * PAGE_SECTOR_BYTES;
        PageSector::free(page, generation).encode_into(&mut buffer[at..], salt);
    }
    buffer.freeze()
}

/// A 4 KiB block that begins with these bytes.
pub(super) fn block_of(bytes: &[u8]) -> Bytes {
    let mut block = AlignedBuffer::zeroed(IO_BLOCK);
    block[..bytes.len()].copy_from_slice(bytes);
    block.freeze()
}

impl Store {
    /// What to write to an empty disk: (offset, bytes) in this order, then sync. Destroys what is there.
    pub fn format_plan(options: &FormatOptions) -> Result<Vec<(u64, Bytes)>, StoreError> {
        let geometry = Geometry::plan(options.size_bytes, options.log_bytes, options.replica_slots)
            .map_err(StoreError::TooSmall)?;
        if options.incarnation.0 == 0 {
            return Err(StoreError::Invalid("incarnation 0"));
        }
        let salt = salt_of(options.disk);
        let mut plan = Vec::new();
        let free = block_of(
            &ReplicaHeader {
                salt,
                ..ReplicaHeader::default()
            }
            .encode(),
        );
        for slot in 0..geometry.slot_count {
            for copy in ReplicaHeader::COPIES {
                let at = geometry.slots_offset + u64::from(slot) * SLOT_BYTES as u64 + copy;
                plan.push((at, free.clone()));
            }
        }
        let high_water = geometry.page_count.min(HIGH_WATER_STEP);
        for from in (0..high_water).step_by(SECTORS_PER_WRITE as usize) {
            let to = (from + SECTORS_PER_WRITE).min(high_water);
            let at = geometry.sectors_offset + u64::from(from) * PAGE_SECTOR_BYTES as u64;
            plan.push((at, free_sectors(from, to, 1, salt)));
        }
        let superblock = Superblock {
            cluster: options.cluster,
            disk: options.disk,
            boot_id: [0; 16],
            generation: 1,
            incarnation: options.incarnation,
            damage_incarnation: ashlar_proto::ids::Incarnation(0),
            tail_offset: 0,
            tail_sequence: 0,
            tail_chain: 0,
            clean: true,
            durable_sequence: 0,
            page_high_water: high_water,
            next_replica: 1,
            geometry,
        };
        let block = block_of(&superblock.encode());
        plan.extend(SUPERBLOCK_OFFSETS.map(|at| (at, block.clone())));
        Ok(plan)
    }

    pub(super) fn sector_block_offset(&self, block: u32) -> u64 {
        self.geometry.sectors_offset + u64::from(block) * BLOCK_SIZE as u64
    }

    pub(super) fn page_offset(&self, physical: u32) -> u64 {
        self.geometry.pages_offset + u64::from(physical) * PAGE_SIZE as u64
    }

    pub(super) fn slot_offset(&self, slot: u32) -> u64 {
        self.geometry.slots_offset + u64::from(slot) * SLOT_BYTES as u64
    }

    pub(super) fn write_block(
        &mut self,
        target: Target,
        offset: u64,
        data: Bytes,
        out: &mut Vec<StoreCommand>,
    ) {
        debug_assert!(data.len().is_multiple_of(SECTOR));
        let token = self.token(target);
        out.push(StoreCommand::Disk(DiskCommand::Write {
            durable: false,
            token,
            offset,
            data: smallvec![data],
        }));
    }

    /// Initialises more sectors when few pages are left below the mark.
    pub(super) fn raise_high_water(&mut self, out: &mut Vec<StoreCommand>) {
        let from = self.allocator.high_water();
        if self.space.raising_to.is_some()
            || self.allocator.ready() >= HIGH_WATER_STEP / 2
            || from >= self.geometry.page_count
        {
            return;
        }
        let to = from
            .saturating_add(HIGH_WATER_STEP)
            .min(self.geometry.page_count);
        self.space.raising_to = Some(to);
        self.generation += 1;
        for start in (from..to).step_by(SECTORS_PER_WRITE as usize) {
            let end = (start + SECTORS_PER_WRITE).min(to);
            let data = free_sectors(start, end, self.generation, self.salt);
            let offset = self.sector_block_offset(start / SECTORS_PER_BLOCK);
            self.space.outstanding += 1;
            self.write_block(Target::HighWater, offset, data, out);
        }
    }

    pub(super) fn on_high_water_written(&mut self, out: &mut Vec<StoreCommand>) {
        self.space.outstanding -= 1;
        if self.space.outstanding == 0 {
            self.want_sync(SyncAction::HighWater, out);
        }
    }

    pub(super) fn high_water_sectors_durable(&mut self) {
        if let Some(to) = self.space.raising_to {
            self.superblock.page_high_water = to;
            self.want_superblock(SuperblockAction::HighWater(to));
        }
    }

    pub(super) fn high_water_raised(&mut self, to: u32) {
        self.allocator.raise_high_water(to);
        self.space.raising_to = None;
    }

    /// Gives pages back once every write that is in flight now is done.
    pub(super) fn release_later(&mut self, pages: Vec<u32>) {
        let after_batch = if self.log.open.is_empty() && self.log.open.redirects == 0 {
            self.log.last_sequence
        } else {
            self.log.open.forced = true;
            self.log.next_sequence
        };
        let after_burst = self.burst.started();
        self.space.deferred.push(Deferred {
            after_batch,
            after_burst,
            pages,
        });
    }

    pub(super) fn release_deferred(&mut self) {
        if self.space.deferred.is_empty() {
            return;
        }
        let (completed, bursts, idle) = (
            self.log.completed,
            self.burst.started(),
            self.burst.is_idle(),
        );
        let due = |d: &Deferred| d.after_batch <= completed && (idle || d.after_burst < bursts);
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.space.deferred)
            .into_iter()
            .partition(due);
        self.space.deferred = later;
        if !self.space.deferred.is_empty() {
            self.close_wanted = true;
        }
        for page in now.into_iter().flat_map(|d| d.pages) {
            self.allocator.release(page);
        }
    }
}
