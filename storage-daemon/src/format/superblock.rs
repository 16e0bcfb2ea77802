//! The superblock: identity, geometry, the life of the store and where its log begins. Two copies.
//!
//! Invariants:
//! - 512 bytes, so a copy is old or new, never torn; both copies are written at every change and the
//!   change counts when both are durable. At open the valid copy of the higher generation wins.
//! - The log's tail here never lies behind a region that may have been overwritten.

use ashlar_proto::ids::{BLOCK_SIZE, ClusterId, DiskId, Incarnation, PAGE_SIZE};

use super::page::PAGE_SECTOR_BYTES;
use super::slot::SLOT_BYTES;
use super::upgrade::{FORMAT_VERSION, check_version};
use super::{FormatError, SECTOR, array_at, checksum_with_hole, put, u16_at, u32_at, u64_at};

const MAGIC: &[u8; 8] = b"ASHLARSB";
const CHECKSUM_AT: usize = 12;
const FLAG_CLEAN: u32 = 1;

/// Where the two copies are.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 * 1024];
/// First byte after the superblocks.
const SLOTS_OFFSET: u64 = 128 * 1024;
/// Smallest log.
pub const LOG_BYTES_MIN: u64 = 256 * 1024;
/// Largest log that is chosen by default.
const LOG_BYTES_DEFAULT_MAX: u64 = 512 << 20;

/// Where things are on a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of the file or device when it was formatted.
    pub size_bytes: u64,
    /// Number of replica slots.
    pub slot_count: u32,
    /// First byte of the slots.
    pub slots_offset: u64,
    /// First byte of the page sectors.
    pub sectors_offset: u64,
    /// First byte of the log.
    pub log_offset: u64,
    /// Bytes of the log, a multiple of 4096.
    pub log_bytes: u64,
    /// First byte of the pages.
    pub pages_offset: u64,
    /// Number of pages.
    pub page_count: u32,
}

fn round_up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

impl Geometry {
    /// Lays out a disk; the error is the number of bytes that would be needed.
    pub fn plan(size_bytes: u64, log_bytes: Option<u64>, slots: Option<u32>) -> Result<Self, u64> {
        let slot_count = slots
            .unwrap_or_else(|| (size_bytes / (64 << 20)).clamp(16, 4096) as u32)
            .max(1);
        let log_bytes = log_bytes
            .unwrap_or_else(|| (size_bytes / 16).clamp(8 << 20, LOG_BYTES_DEFAULT_MAX))
            .max(LOG_BYTES_MIN);
        let log_bytes = round_up(log_bytes, BLOCK_SIZE as u64);
        let sectors_offset = SLOTS_OFFSET + u64::from(slot_count) * SLOT_BYTES as u64;
        let fixed = sectors_offset + log_bytes + 2 * PAGE_SIZE as u64;
        let per_page = (PAGE_SIZE + PAGE_SECTOR_BYTES) as u64;
        let needed = fixed + 8 * per_page;
        if size_bytes < needed {
            return Err(needed);
        }
        // Whole 4 KiB blocks of sectors, so that no block is shared with what lies behind them.
        let page_count = ((size_bytes - fixed) / per_page).min(u64::from(u32::MAX) - 8) as u32 & !7;
        let sectors_bytes = round_up(
            u64::from(page_count) * PAGE_SECTOR_BYTES as u64,
            BLOCK_SIZE as u64,
        );
        let log_offset = sectors_offset + sectors_bytes;
        let pages_offset = round_up(log_offset + log_bytes, PAGE_SIZE as u64);
        Ok(Self {
            size_bytes,
            slot_count,
            slots_offset: SLOTS_OFFSET,
            sectors_offset,
            log_offset,
            log_bytes,
            pages_offset,
            page_count,
        })
    }

    fn check(&self) -> Result<(), FormatError> {
        let fits = |offset: u64, bytes: u64, end: u64| {
            offset.is_multiple_of(BLOCK_SIZE as u64)
                && offset.checked_add(bytes).is_some_and(|e| e <= end)
        };
        let slots = u64::from(self.slot_count) * SLOT_BYTES as u64;
        let sectors = round_up(
            u64::from(self.page_count) * PAGE_SECTOR_BYTES as u64,
            BLOCK_SIZE as u64,
        );
        let pages = u64::from(self.page_count) * PAGE_SIZE as u64;
        let good = self.slots_offset >= SLOTS_OFFSET
            && self.page_count < u32::MAX
            && self.log_bytes >= LOG_BYTES_MIN
            && self.log_bytes.is_multiple_of(BLOCK_SIZE as u64)
            && fits(self.slots_offset, slots, self.sectors_offset)
            && fits(self.sectors_offset, sectors, self.log_offset)
            && fits(self.log_offset, self.log_bytes, self.pages_offset)
            && fits(self.pages_offset, pages, self.size_bytes);
        if good {
            Ok(())
        } else {
            Err(FormatError::Bounds("geometry"))
        }
    }
}

/// The superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The cluster that the disk belongs to.
    pub cluster: ClusterId,
    /// The disk.
    pub disk: DiskId,
    /// Kernel boot under which the store was last opened.
    pub boot_id: [u8; 16],
    /// Grows with every write of the superblock.
    pub generation: u64,
    /// The store's life.
    pub incarnation: Incarnation,
    /// Replicas that were not sound since this incarnation are damaged; 0: none.
    pub damage_incarnation: Incarnation,
    /// Where the log begins, relative to the log's first byte.
    pub tail_offset: u64,
    /// Sequence of the last batch that was freed (the one before the tail).
    pub tail_sequence: u64,
    /// Its header's checksum.
    pub tail_chain: u32,
    /// Closed by Shutdown.
    pub clean: bool,
    /// Batches up to this one are known durable.
    pub durable_sequence: u64,
    /// Page sectors below this number are initialised; pages at or above were never used.
    pub page_high_water: u32,
    /// Next replica number to give out.
    pub next_replica: u64,
    /// Where things are.
    pub geometry: Geometry,
}

impl Superblock {
    /// Its 512 bytes.
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut b = [0; SECTOR];
        put(&mut b, 0, MAGIC);
        put(&mut b, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut b, 16, &self.cluster.0);
        put(&mut b, 32, &self.disk.0);
        put(&mut b, 48, &self.boot_id);
        put(&mut b, 64, &self.generation.to_le_bytes());
        put(&mut b, 72, &self.geometry.size_bytes.to_le_bytes());
        put(&mut b, 80, &self.incarnation.0.to_le_bytes());
        put(&mut b, 88, &self.damage_incarnation.0.to_le_bytes());
        put(&mut b, 96, &self.tail_offset.to_le_bytes());
        put(&mut b, 104, &self.tail_sequence.to_le_bytes());
        put(&mut b, 112, &self.tail_chain.to_le_bytes());
        put(
            &mut b,
            116,
            &(if self.clean { FLAG_CLEAN } else { 0 }).to_le_bytes(),
        );
        put(&mut b, 120, &self.durable_sequence.to_le_bytes());
        put(&mut b, 128, &self.page_high_water.to_le_bytes());
        put(&mut b, 132, &self.geometry.slot_count.to_le_bytes());
        put(&mut b, 136, &self.next_replica.to_le_bytes());
        put(&mut b, 144, &self.geometry.slots_offset.to_le_bytes());
        put(&mut b, 152, &self.geometry.sectors_offset.to_le_bytes());
        put(&mut b, 160, &self.geometry.log_offset.to_le_bytes());
        put(&mut b, 168, &self.geometry.log_bytes.to_le_bytes());
        put(&mut b, 176, &self.geometry.pages_offset.to_le_bytes());
        put(&mut b, 184, &self.geometry.page_count.to_le_bytes());
        let checksum = checksum_with_hole(&b, CHECKSUM_AT);
        put(&mut b, CHECKSUM_AT, &checksum.to_le_bytes());
        b
    }

    /// From at least 512 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let b = bytes.get(..SECTOR).ok_or(FormatError::Bounds("length"))?;
        if &b[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        if checksum_with_hole(b, CHECKSUM_AT) != u32_at(b, CHECKSUM_AT) {
            return Err(FormatError::Checksum);
        }
        check_version(u16_at(b, 8))?;
        let geometry = Geometry {
            size_bytes: u64_at(b, 72),
            slot_count: u32_at(b, 132),
            slots_offset: u64_at(b, 144),
            sectors_offset: u64_at(b, 152),
            log_offset: u64_at(b, 160),
            log_bytes: u64_at(b, 168),
            pages_offset: u64_at(b, 176),
            page_count: u32_at(b, 184),
        };
        geometry.check()?;
        let superblock = Self {
            cluster: ClusterId(array_at(b, 16)),
            disk: DiskId(array_at(b, 32)),
            boot_id: array_at(b, 48),
            generation: u64_at(b, 64),
            incarnation: Incarnation(u64_at(b, 80)),
            damage_incarnation: Incarnation(u64_at(b, 88)),
            tail_offset: u64_at(b, 96),
            tail_sequence: u64_at(b, 104),
            tail_chain: u32_at(b, 112),
            clean: u32_at(b, 116) & FLAG_CLEAN != 0,
            durable_sequence: u64_at(b, 120),
            page_high_water: u32_at(b, 128),
            next_replica: u64_at(b, 136),
            geometry,
        };
        let tail_fits = superblock.tail_offset.is_multiple_of(BLOCK_SIZE as u64)
            && superblock.tail_offset <= geometry.log_bytes
            && superblock.page_high_water <= geometry.page_count;
        if tail_fits {
            Ok(superblock)
        } else {
            Err(FormatError::Bounds("tail"))
        }
    }
}

#[cfg(test)]
pub(crate) fn example() -> Superblock {
    Superblock {
        cluster: ClusterId([1; 16]),
        disk: DiskId([2; 16]),
        boot_id: [3; 16],
        generation: 4,
        incarnation: Incarnation(5),
        damage_incarnation: Incarnation(0),
        tail_offset: 8192,
        tail_sequence: 6,
        tail_chain: 7,
        clean: true,
        durable_sequence: 8,
        page_high_water: 9,
        next_replica: 10,
        geometry: Geometry::plan(64 << 20, Some(1 << 20), Some(4)).expect("large enough"),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_survives_its_bytes() {
        let s = example();
        assert_eq!(Superblock::decode(&s.encode()).unwrap(), s);
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let good = example().encode();
        for bit in 0..SECTOR * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn golden_bytes() {
        let b = example().encode();
        assert_eq!(&b[..12], b"ASHLARSB\x01\x00\x00\x00");
        assert_eq!(&b[64..72], &[4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&b[96..104], &[0, 0x20, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&b[116..120], &[1, 0, 0, 0]);
        assert_eq!(&b[128..132], &[9, 0, 0, 0]);
        assert_eq!(&b[136..144], &[10, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn too_small_a_disk_says_what_it_needs() {
        let needed = Geometry::plan(1 << 20, None, None).unwrap_err();
        assert!(Geometry::plan(needed, None, None).is_ok());
    }
}
