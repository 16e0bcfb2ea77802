//! A simulated disk with a volatile write cache, for stores that speak `platform::disk` commands.
//!
//! What each fault does, and so what a store may rely on:
//! - A Write takes effect when it completes. Until a Sync that was submitted after its completion
//!   succeeds, a power cut may lose it or keep any subset of its 512-byte sectors; writes that were
//!   still under way at the cut likewise. Sectors are never mixed within themselves.
//! - A durable Write is on the medium when it completes; nothing else is because of it.
//! - When only the process dies, completed writes stay (the machine still runs); those under way have
//!   happened wholly, in part (any subset of 4096-byte blocks) or not at all.
//! - A failed Write has happened in any subset of its sectors. After a failed Sync everything that was
//!   not durable before is lost at the next power cut, except a random subset, and no later Sync brings
//!   it back, although reads show it until then.
//! - Bit flips and unreadable sectors are put in by the test; a write to an unreadable sector heals it.
//!
//! Invariants: the same commands at the same times with the same seed give the same completions; the
//! disk neither reads a clock nor draws randomness of its own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::io;

use bytes::{Bytes, BytesMut};

use super::rng::Rng;
use crate::clock::Time;
use crate::disk::{DiskCommand, DiskCompletion, IoToken};

/// Granularity at which power cuts tear writes, and smallest unit of I/O.
const SECTOR: u64 = 512;
/// Granularity of the stored image.
const BLOCK: u64 = 4096;
/// errno values as Linux gives them.
const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EINVAL: i32 = 22;

/// Size and speed of a simulated disk.
#[derive(Clone, Copy, Debug)]
pub struct SimDiskConfig {
    /// Capacity in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Shortest time of a read or write.
    pub latency_ns: u64,
    /// Up to this much is added at random to each operation, so completions are reordered.
    pub jitter_ns: u64,
    /// Time per 4096 bytes moved.
    pub block_ns: u64,
    /// Time of a sync, before jitter.
    pub sync_ns: u64,
}

impl SimDiskConfig {
    /// A disk of this size with the speed of a common NVMe device.
    pub fn with_size(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            latency_ns: 20_000,
            jitter_ns: 60_000,
            block_ns: 1_000,
            sync_ns: 200_000,
        }
    }
}

/// Faults that last until they are changed. Rates are in parts of 65536 operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskFaults {
    /// Reads that fail with EIO.
    pub read_errors: u32,
    /// Writes that fail with EIO.
    pub write_errors: u32,
    /// Syncs that fail with EIO.
    pub sync_errors: u32,
    /// Operations take this many times longer; 1 is the normal speed.
    pub slowdown: u32,
    /// Writes to blocks that were never written (or were discarded) fail with ENOSPC, as on a file in a
    /// full file system.
    pub full: bool,
    /// No operation completes until this is cleared.
    pub stuck: bool,
}

impl DiskFaults {
    /// A healthy disk.
    pub const NONE: Self = Self {
        read_errors: 0,
        write_errors: 0,
        sync_errors: 0,
        slowdown: 1,
        full: false,
        stuck: false,
    };
    /// Rate that means "every operation".
    pub const ALWAYS: u32 = 65536;
}

/// What a power cut does to writes that are not durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PowerCut {
    /// Each sector of each write survives or not, at random; also all or none of the cache at times.
    Random,
    /// Everything not durable is lost.
    LoseAll,
    /// Everything completed survives; writes under way are lost.
    KeepCompleted,
}

/// What a disk has done so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DiskStats {
    /// Reads, writes, syncs and discards submitted.
    pub submitted: u64,
    /// Writes completed without error.
    pub writes: u64,
    /// Syncs completed without error.
    pub syncs: u64,
    /// Discards completed.
    pub discards: u64,
    /// Operations completed with an error.
    pub errors: u64,
}

#[derive(Clone, Debug, Default)]
struct Image {
    blocks: BTreeMap<u64, Bytes>,
}

impl Image {
    fn block(&self, index: u64) -> Option<&Bytes> {
        self.blocks.get(&index)
    }

    /// Writes data that starts at a sector and covers whole sectors.
    fn write(&mut self, offset: u64, data: &Bytes) {
        let mut done = 0u64;
        let len = data.len() as u64;
        while done < len {
            let at = offset + done;
            let within = at % BLOCK;
            let part = (BLOCK - within).min(len - done);
            let piece = data.slice(done as usize..(done + part) as usize);
            if part == BLOCK {
                self.blocks.insert(at / BLOCK, piece);
            } else {
                let old = self.blocks.get(&(at / BLOCK));
                let mut block = old.map_or_else(|| vec![0; BLOCK as usize], |b| b.to_vec());
                block[within as usize..(within + part) as usize].copy_from_slice(&piece);
                self.blocks.insert(at / BLOCK, block.into());
            }
            done += part;
        }
    }

    fn read(&self, offset: u64, length: usize) -> Bytes {
        let mut out = BytesMut::zeroed(length);
        let mut done = 0usize;
        while done < length {
            let at = offset + done as u64;
            let within = (at % BLOCK) as usize;
            let part = (BLOCK as usize - within).min(length - done);
            if let Some(block) = self.block(at / BLOCK) {
                out[done..done + part].copy_from_slice(&block[within..within + part]);
            }
            done += part;
        }
        out.freeze()
    }

    fn forget(&mut self, block: u64) {
        self.blocks.remove(&block);
    }

    fn flip(&mut self, offset: u64, bit: u8) {
        let Some(block) = self.blocks.get(&(offset / BLOCK)) else {
            return;
        };
        let mut block = block.to_vec();
        block[(offset % BLOCK) as usize] ^= 1 << (bit & 7);
        self.blocks.insert(offset / BLOCK, block.into());
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Read {
        offset: u64,
        length: usize,
    },
    Write {
        offset: u64,
        data: Bytes,
        durable: bool,
    },
    Sync {
        covers: u64,
    },
    Discard {
        offset: u64,
        length: u64,
    },
}

#[derive(Clone, Debug)]
struct InFlight {
    token: IoToken,
    operation: Operation,
}

/// A write that is on the device but not durable.
#[derive(Clone, Debug)]
struct Cached {
    serial: u64,
    offset: u64,
    data: Bytes,
}

/// The disk. Cloning it gives an independent disk with the same contents and the same future.
#[derive(Clone, Debug)]
pub struct SimDisk {
    config: SimDiskConfig,
    rng: Rng,
    faults: DiskFaults,
    stats: DiskStats,
    visible: Image,
    durable: Image,
    cache: Vec<Cached>,
    unreadable: BTreeSet<u64>,
    in_flight: BTreeMap<u64, InFlight>,
    due: BinaryHeap<Reverse<(Time, u64)>>,
    next_serial: u64,
}

impl SimDisk {
    /// An empty (all zero) disk.
    pub fn new(config: SimDiskConfig, rng: Rng) -> Self {
        assert!(
            config.size_bytes.is_multiple_of(BLOCK),
            "a disk has whole blocks"
        );
        Self {
            config,
            rng,
            faults: DiskFaults::NONE,
            stats: DiskStats::default(),
            visible: Image::default(),
            durable: Image::default(),
            cache: Vec::new(),
            unreadable: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            due: BinaryHeap::new(),
            next_serial: 1,
        }
    }

    /// Capacity in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.config.size_bytes
    }

    /// What was done so far.
    pub fn stats(&self) -> DiskStats {
        self.stats
    }

    /// Operations that were submitted and have not completed.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sets the lasting faults.
    pub fn set_faults(&mut self, faults: DiskFaults) {
        self.faults = faults;
    }

    /// The lasting faults.
    pub fn faults(&self) -> DiskFaults {
        self.faults
    }

    /// Starts an operation; it completes at a later time, perhaps before earlier ones.
    pub fn submit(&mut self, now: Time, command: DiskCommand) {
        self.stats.submitted += 1;
        let serial = self.next_serial;
        self.next_serial += 1;
        let (token, operation, blocks) = match command {
            DiskCommand::Read {
                token,
                offset,
                length,
            } => (
                token,
                Operation::Read { offset, length },
                length as u64 / BLOCK + 1,
            ),
            DiskCommand::Write {
                token,
                offset,
                data,
                durable,
            } => {
                let mut joined = BytesMut::with_capacity(data.iter().map(Bytes::len).sum());
                data.iter().for_each(|part| joined.extend_from_slice(part));
                let blocks = joined.len() as u64 / BLOCK + 1;
                (
                    token,
                    Operation::Write {
                        offset,
                        data: joined.freeze(),
                        durable,
                    },
                    blocks,
                )
            }
            DiskCommand::Sync { token } => (
                token,
                Operation::Sync {
                    covers: self.last_cached(),
                },
                0,
            ),
            DiskCommand::Discard {
                token,
                offset,
                length,
            } => (token, Operation::Discard { offset, length }, 0),
        };
        let base = match operation {
            Operation::Sync { .. } => self.config.sync_ns,
            Operation::Write { durable: true, .. } => {
                self.config.latency_ns + blocks * self.config.block_ns + self.config.sync_ns
            }
            _ => self.config.latency_ns + blocks * self.config.block_ns,
        };
        let jitter = self.rng.between(0, self.config.jitter_ns);
        let duration = (base + jitter).saturating_mul(u64::from(self.faults.slowdown.max(1)));
        self.due
            .push(Reverse((Time(now.0 + duration.max(1)), serial)));
        self.in_flight.insert(serial, InFlight { token, operation });
    }

    /// When the next operation completes; `None` if none will.
    pub fn next_completion(&self) -> Option<Time> {
        if self.faults.stuck {
            None
        } else {
            self.due.peek().map(|Reverse((time, _))| *time)
        }
    }

    /// Completes what is due at `now`, in order of time.
    pub fn poll(&mut self, now: Time, out: &mut Vec<DiskCompletion>) {
        while self.next_completion().is_some_and(|time| time <= now) {
            let Some(Reverse((_, serial))) = self.due.pop() else {
                return;
            };
            if let Some(operation) = self.in_flight.remove(&serial) {
                let result = self.execute(operation.operation);
                if result.is_err() {
                    self.stats.errors += 1;
                }
                out.push(DiskCompletion {
                    token: operation.token,
                    result,
                });
            }
        }
    }

    /// The process that used the disk died; the machine lives.
    pub fn crash_process(&mut self) {
        for operation in std::mem::take(&mut self.in_flight).into_values() {
            match operation.operation {
                Operation::Write { offset, data, .. } => self.apply_in_part(offset, &data, BLOCK),
                Operation::Discard { offset, length } => self.discard(offset, length),
                Operation::Read { .. } | Operation::Sync { .. } => {}
            }
        }
        self.due.clear();
    }

    /// The machine lost power: what is not durable may be lost or torn.
    pub fn power_cut(&mut self, how: PowerCut) {
        self.due.clear();
        let under_way = std::mem::take(&mut self.in_flight);
        for operation in under_way.values() {
            if let Operation::Discard { offset, length } = operation.operation {
                self.discard(offset, length);
            }
        }
        let cache = std::mem::take(&mut self.cache);
        let style = match how {
            PowerCut::Random => self.rng.below(8),
            PowerCut::LoseAll => 0,
            PowerCut::KeepCompleted => 1,
        };
        let mut durable = std::mem::take(&mut self.durable);
        for write in cache {
            match style {
                0 => {}
                1 => durable.write(write.offset, &write.data),
                _ => self.tear(&mut durable, write.offset, &write.data, SECTOR),
            }
        }
        for operation in under_way.into_values() {
            if let (Operation::Write { offset, data, .. }, 2..) = (operation.operation, style) {
                self.tear(&mut durable, offset, &data, SECTOR);
            }
        }
        self.visible = durable.clone();
        self.durable = durable;
        self.faults.stuck = false;
    }

    /// Flips one bit where something was written; elsewhere nothing happens.
    pub fn flip_bit(&mut self, offset: u64, bit: u8) {
        self.visible.flip(offset, bit);
        self.durable.flip(offset, bit);
    }

    /// Makes one sector unreadable (EIO) until it is written.
    pub fn make_unreadable(&mut self, offset: u64) {
        self.unreadable.insert(offset / SECTOR);
    }

    /// Offsets of all 4096-byte blocks that were ever written and not discarded, ascending.
    pub fn written_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.visible.blocks.keys().map(|index| index * BLOCK)
    }

    /// The bytes that a read would return now; for checks and for opening a store offline.
    pub fn peek(&self, offset: u64, length: usize) -> Bytes {
        self.visible.read(offset, length)
    }

    /// Puts bytes onto the disk at once and durably, as a tool would offline.
    pub fn poke(&mut self, offset: u64, data: &Bytes) {
        assert!(
            offset.is_multiple_of(SECTOR) && (data.len() as u64).is_multiple_of(SECTOR),
            "whole sectors only"
        );
        self.visible.write(offset, data);
        self.durable.write(offset, data);
    }

    fn last_cached(&self) -> u64 {
        self.cache.last().map_or(0, |write| write.serial)
    }

    fn fails(&mut self, rate: u32) -> bool {
        rate > 0 && self.rng.below(u64::from(DiskFaults::ALWAYS)) < u64::from(rate)
    }

    fn execute(&mut self, operation: Operation) -> io::Result<Bytes> {
        match operation {
            Operation::Read { offset, length } => self.read(offset, length),
            Operation::Write {
                offset,
                data,
                durable,
            } => {
                let result = self.write(offset, &data)?;
                if durable {
                    self.harden(offset, data.len() as u64);
                }
                Ok(result)
            }
            Operation::Sync { covers } => self.sync(covers),
            Operation::Discard { offset, length } => {
                self.check(offset, length)?;
                self.discard(offset, length);
                self.stats.discards += 1;
                Ok(Bytes::new())
            }
        }
    }

    /// Durable at once: a discarded range may hold anything afterwards, and a store must not discard what it may
    /// need after a power cut. Block by block it is zeros, what it was, or something else; a block in part
    /// stays what it was, as a device may do.
    fn discard(&mut self, offset: u64, length: u64) {
        self.cache
            .retain(|w| w.offset < offset || w.offset + w.data.len() as u64 > offset + length);
        for block in offset.div_ceil(BLOCK)..(offset + length) / BLOCK {
            match self.rng.below(3) {
                0 => {}
                1 => {
                    self.visible.forget(block);
                    self.durable.forget(block);
                }
                _ => {
                    let garbage = Bytes::from(vec![self.rng.below(256) as u8; BLOCK as usize]);
                    self.visible.write(block * BLOCK, &garbage);
                    self.durable.write(block * BLOCK, &garbage);
                }
            }
        }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let inside = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.config.size_bytes);
        if inside && offset.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(EINVAL))
        }
    }

    fn read(&mut self, offset: u64, length: usize) -> io::Result<Bytes> {
        self.check(offset, length as u64)?;
        let sectors = offset / SECTOR..(offset + length as u64) / SECTOR;
        if self.fails(self.faults.read_errors) || self.unreadable.range(sectors).next().is_some() {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        Ok(self.visible.read(offset, length))
    }

    fn write(&mut self, offset: u64, data: &Bytes) -> io::Result<Bytes> {
        let length = data.len() as u64;
        self.check(offset, length)?;
        if self.faults.full {
            let mut blocks = offset / BLOCK..(offset + length).div_ceil(BLOCK);
            if blocks.any(|index| self.visible.block(index).is_none()) {
                return Err(io::Error::from_raw_os_error(ENOSPC));
            }
        }
        if self.fails(self.faults.write_errors) {
            self.apply_in_part(offset, data, SECTOR);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.apply(offset, data.clone());
        self.stats.writes += 1;
        Ok(Bytes::new())
    }

    /// What the cache holds of a range becomes durable, in order.
    fn harden(&mut self, offset: u64, length: u64) {
        let durable = &mut self.durable;
        self.cache.retain(|w| {
            let overlaps = w.offset < offset + length && offset < w.offset + w.data.len() as u64;
            if overlaps {
                durable.write(w.offset, &w.data);
            }
            !overlaps
        });
    }

    fn apply(&mut self, offset: u64, data: Bytes) {
        for sector in offset / SECTOR..(offset + data.len() as u64) / SECTOR {
            self.unreadable.remove(&sector);
        }
        self.visible.write(offset, &data);
        let serial = self.next_serial;
        self.next_serial += 1;
        self.cache.push(Cached {
            serial,
            offset,
            data,
        });
    }

    /// All, nothing, or a random subset of the units of a write takes effect.
    fn apply_in_part(&mut self, offset: u64, data: &Bytes, unit: u64) {
        match self.rng.below(4) {
            0 => {}
            1 => self.apply(offset, data.clone()),
            _ => {
                for at in (0..data.len()).step_by(unit as usize) {
                    if self.rng.coin() {
                        let end = (at + unit as usize).min(data.len());
                        self.apply(offset + at as u64, data.slice(at..end));
                    }
                }
            }
        }
    }

    fn tear(&mut self, image: &mut Image, offset: u64, data: &Bytes, unit: u64) {
        match self.rng.below(4) {
            0 => {}
            1 => image.write(offset, data),
            _ => {
                for at in (0..data.len()).step_by(unit as usize) {
                    if self.rng.coin() {
                        let end = (at + unit as usize).min(data.len());
                        image.write(offset + at as u64, &data.slice(at..end));
                    }
                }
            }
        }
    }

    fn sync(&mut self, covers: u64) -> io::Result<Bytes> {
        let split = self.cache.partition_point(|write| write.serial <= covers);
        if self.fails(self.faults.sync_errors) {
            // The kernel or the device dropped an unknown part of what it had, also of what was written
            // after this sync was submitted.
            let mut durable = std::mem::take(&mut self.durable);
            for write in std::mem::take(&mut self.cache) {
                self.tear(&mut durable, write.offset, &write.data, SECTOR);
            }
            self.durable = durable;
            return Err(io::Error::from_raw_os_error(EIO));
        }
        for write in self.cache.drain(..split) {
            self.durable.write(write.offset, &write.data);
        }
        self.stats.syncs += 1;
        Ok(Bytes::new())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use smallvec::smallvec;

    use super::*;

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(SimDiskConfig::with_size(1 << 20), Rng::new(seed))
    }

    fn write(disk: &mut SimDisk, token: u64, offset: u64, byte: u8, length: usize) {
        let data = smallvec![Bytes::from(vec![byte; length])];
        disk.submit(
            Time(0),
            DiskCommand::Write {
                durable: false,
                token: IoToken(token),
                offset,
                data,
            },
        );
    }

    fn finish(disk: &mut SimDisk) -> Vec<DiskCompletion> {
        let mut out = Vec::new();
        disk.poll(Time(u64::MAX), &mut out);
        out
    }

    fn sync(disk: &mut SimDisk) -> io::Result<Bytes> {
        disk.submit(Time(0), DiskCommand::Sync { token: IoToken(99) });
        finish(disk).pop().unwrap().result
    }

    #[test]
    fn synced_data_survives_a_power_cut_and_later_data_is_torn_at_sectors_at_most() {
        let mut seen = BTreeSet::new();
        for seed in 0..64 {
            let mut disk = disk(seed);
            write(&mut disk, 1, 0, 1, 4096);
            finish(&mut disk);
            sync(&mut disk).unwrap();
            write(&mut disk, 2, 0, 2, 4096);
            finish(&mut disk);
            assert_eq!(disk.peek(0, 4096)[..], [2; 4096], "reads see the cache");
            disk.power_cut(PowerCut::Random);
            let after = disk.peek(0, 4096);
            let sectors: Vec<u8> = after.chunks(512).map(|s| s[0]).collect();
            assert!(
                after
                    .chunks(512)
                    .all(|s| s.iter().all(|&b| b == s[0] && (b == 1 || b == 2)))
            );
            seen.insert(sectors);
        }
        assert!(seen.len() > 20, "only {} outcomes", seen.len());
    }

    #[test]
    fn a_sync_does_not_cover_writes_that_were_under_way_when_it_was_submitted() {
        let mut disk = disk(1);
        write(&mut disk, 1, 0, 1, 4096);
        disk.submit(Time(0), DiskCommand::Sync { token: IoToken(2) });
        assert_eq!(finish(&mut disk).len(), 2);
        disk.power_cut(PowerCut::LoseAll);
        assert_eq!(disk.peek(0, 4096)[..], [0; 4096]);
    }

    #[test]
    fn a_process_crash_keeps_completed_writes() {
        let mut disk = disk(5);
        write(&mut disk, 1, 4096, 7, 4096);
        finish(&mut disk);
        write(&mut disk, 2, 8192, 8, 4096);
        disk.crash_process();
        assert_eq!(disk.peek(4096, 4096)[..], [7; 4096]);
        assert_eq!(disk.next_completion(), None);
    }

    #[test]
    fn after_a_failed_sync_a_later_good_one_saves_nothing_old() {
        let mut lost = 0;
        for seed in 0..32 {
            let mut disk = disk(seed);
            write(&mut disk, 1, 0, 3, 512);
            finish(&mut disk);
            disk.set_faults(DiskFaults {
                sync_errors: DiskFaults::ALWAYS,
                ..DiskFaults::NONE
            });
            assert!(sync(&mut disk).is_err());
            disk.set_faults(DiskFaults::NONE);
            sync(&mut disk).unwrap();
            disk.power_cut(PowerCut::KeepCompleted);
            lost += u32::from(disk.peek(0, 1)[0] == 0);
        }
        assert!(lost > 5);
    }

    #[test]
    fn faults_fail_operations_with_the_errno_of_the_real_ones() {
        let mut disk = disk(2);
        write(&mut disk, 1, 0, 1, 4096);
        finish(&mut disk);
        disk.set_faults(DiskFaults {
            full: true,
            ..DiskFaults::NONE
        });
        write(&mut disk, 2, 0, 2, 4096);
        assert!(
            finish(&mut disk)[0].result.is_ok(),
            "overwriting needs no room"
        );
        write(&mut disk, 3, 4096, 2, 4096);
        assert_eq!(
            finish(&mut disk)[0]
                .result
                .as_ref()
                .unwrap_err()
                .raw_os_error(),
            Some(ENOSPC)
        );
        disk.set_faults(DiskFaults::NONE);
        disk.make_unreadable(512);
        disk.submit(
            Time(0),
            DiskCommand::Read {
                token: IoToken(4),
                offset: 0,
                length: 4096,
            },
        );
        assert_eq!(
            finish(&mut disk)[0]
                .result
                .as_ref()
                .unwrap_err()
                .raw_os_error(),
            Some(EIO)
        );
        write(&mut disk, 5, 0, 9, 4096);
        finish(&mut disk);
        disk.submit(
            Time(0),
            DiskCommand::Read {
                token: IoToken(6),
                offset: 0,
                length: 4096,
            },
        );
        assert_eq!(finish(&mut disk)[0].result.as_ref().unwrap()[..], [9; 4096]);
        disk.submit(
            Time(0),
            DiskCommand::Read {
                token: IoToken(7),
                offset: 1 << 20,
                length: 512,
            },
        );
        assert!(finish(&mut disk)[0].result.is_err(), "beyond the end");
    }

    #[test]
    fn the_same_seed_gives_the_same_completions() {
        let run = |seed| {
            let mut disk = disk(seed);
            for token in 0..20 {
                write(&mut disk, token, token * 4096, token as u8, 4096);
            }
            disk.power_cut(PowerCut::Random);
            disk.peek(0, 20 * 4096)
        };
        assert_eq!(run(11), run(11));
        assert_ne!(run(11), run(12));
    }
}
