//! Page sectors: one 512-byte sector per physical page, the inverse table "what is in this page".
//!
//! Invariants:
//! - A sector is self-describing (salt, own page number, owner, generation, 16 blocks) and atomic.
//! - Every sector below the superblock's high-water mark is initialised; one that does not verify is rot
//!   and never taken as free.
//! - Of two sectors that claim the same (replica, chunk, layer, page) the higher generation owns it.

use ashlar_proto::ids::{BLOCKS_PER_PAGE, ChunkIndex, SnapshotNumber, Version, VolumeId};

use super::upgrade::{FORMAT_VERSION, check_version};
use super::{FormatError, array_at, checksum_with_hole, put, u16_at, u32_at, u64_at};

/// Bytes of a page sector.
pub const PAGE_SECTOR_BYTES: usize = 512;
const MAGIC: u32 = u32::from_le_bytes(*b"APGM");
const CHECKSUM_AT: usize = 8;
const BLOCKS_AT: usize = 64;
const BLOCK_BYTES: usize = 24;

/// Whether a page is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageState {
    /// Nobody's.
    Free,
    /// Holds blocks of its owner.
    Owned,
}

/// State of a block in its home page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum StoredState {
    /// Not in this page; an older layer may have it.
    #[default]
    Absent = 0,
    /// Data with version and checksum.
    Data = 1,
    /// Known bad; the version is right.
    Bad = 2,
    /// Known bad; the version is an upper bound.
    BadUnversioned = 3,
}

/// One block of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageBlock {
    /// Its version.
    pub version: Version,
    /// crc32c of its data.
    pub checksum: u32,
    /// Its state.
    pub state: StoredState,
}

/// A decoded page sector.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageSector {
    /// Free or owned.
    pub state: PageState,
    /// The physical page it describes.
    pub physical: u32,
    /// Owner's replica number (unique on this disk).
    pub replica: u64,
    /// Owner's volume.
    pub volume: VolumeId,
    /// Owner's chunk.
    pub chunk: ChunkIndex,
    /// Owner's layer.
    pub layer: SnapshotNumber,
    /// Page within the chunk, 0..64.
    pub page: u8,
    /// Grows with every write of any sector.
    pub generation: u64,
    /// Its blocks.
    pub blocks: [PageBlock; BLOCKS_PER_PAGE as usize],
}

impl PageSector {
    /// A free page.
    pub fn free(physical: u32, generation: u64) -> Self {
        Self {
            state: PageState::Free,
            physical,
            replica: 0,
            volume: VolumeId::NIL,
            chunk: ChunkIndex(0),
            layer: SnapshotNumber(0),
            page: 0,
            generation,
            blocks: [PageBlock::default(); BLOCKS_PER_PAGE as usize],
        }
    }

    /// Whether no block is in the page.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(|b| b.state == StoredState::Absent)
    }

    /// Writes its 512 bytes.
    pub fn encode_into(&self, b: &mut [u8], salt: u32) {
        let b = &mut b[..PAGE_SECTOR_BYTES];
        b.fill(0);
        put(b, 0, &MAGIC.to_le_bytes());
        put(b, 4, &FORMAT_VERSION.to_le_bytes());
        b[6] = u8::from(self.state == PageState::Owned);
        b[7] = self.page;
        put(b, 12, &self.chunk.0.to_le_bytes());
        put(b, 16, &self.layer.0.to_le_bytes());
        put(b, 20, &self.physical.to_le_bytes());
        put(b, 24, &self.generation.to_le_bytes());
        put(b, 32, &self.replica.to_le_bytes());
        put(b, 40, &self.volume.0);
        put(b, 56, &salt.to_le_bytes());
        for (i, block) in self.blocks.iter().enumerate() {
            let at = BLOCKS_AT + i * BLOCK_BYTES;
            put(b, at, &block.version.epoch.0.to_le_bytes());
            put(b, at + 8, &block.version.sequence.0.to_le_bytes());
            put(b, at + 16, &block.checksum.to_le_bytes());
            b[at + 20] = block.state as u8;
        }
        let checksum = checksum_with_hole(b, CHECKSUM_AT);
        put(b, CHECKSUM_AT, &checksum.to_le_bytes());
    }

    /// Whether 512 bytes are the valid sector of `physical`.
    pub fn verify(b: &[u8], physical: u32, salt: u32) -> Result<(), FormatError> {
        let b = b
            .get(..PAGE_SECTOR_BYTES)
            .ok_or(FormatError::Bounds("length"))?;
        if u32_at(b, 0) != MAGIC {
            return Err(FormatError::Magic);
        }
        if checksum_with_hole(b, CHECKSUM_AT) != u32_at(b, CHECKSUM_AT) {
            return Err(FormatError::Checksum);
        }
        check_version(u16_at(b, 4))?;
        if u32_at(b, 56) != salt || u32_at(b, 20) != physical {
            return Err(FormatError::Foreign);
        }
        let states =
            (0..BLOCKS_PER_PAGE as usize).all(|i| b[BLOCKS_AT + i * BLOCK_BYTES + 20] <= 3);
        if b[6] > 1 || b[7] >= 64 || !states {
            return Err(FormatError::Bounds("page"));
        }
        Ok(())
    }

    /// One block of a verified sector.
    pub fn block_of(b: &[u8], index: usize) -> PageBlock {
        let at = BLOCKS_AT + index * BLOCK_BYTES;
        PageBlock {
            version: Version::new(u64_at(b, at), u64_at(b, at + 8)),
            checksum: u32_at(b, at + 16),
            state: match b[at + 20] {
                1 => StoredState::Data,
                2 => StoredState::Bad,
                3 => StoredState::BadUnversioned,
                _ => StoredState::Absent,
            },
        }
    }

    /// From 512 bytes.
    pub fn decode(b: &[u8], physical: u32, salt: u32) -> Result<Self, FormatError> {
        Self::verify(b, physical, salt)?;
        let mut blocks = [PageBlock::default(); BLOCKS_PER_PAGE as usize];
        for (i, block) in blocks.iter_mut().enumerate() {
            *block = Self::block_of(b, i);
        }
        Ok(Self {
            state: if b[6] == 1 {
                PageState::Owned
            } else {
                PageState::Free
            },
            page: b[7],
            chunk: ChunkIndex(u32_at(b, 12)),
            layer: SnapshotNumber(u32_at(b, 16)),
            physical,
            generation: u64_at(b, 24),
            replica: u64_at(b, 32),
            volume: VolumeId(array_at(b, 40)),
            blocks,
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn example() -> PageSector {
        let mut s = PageSector::free(7, 8);
        s.state = PageState::Owned;
        s.replica = 9;
        s.volume = VolumeId([1; 16]);
        s.chunk = ChunkIndex(2);
        s.layer = SnapshotNumber(3);
        s.page = 4;
        s.blocks[15] = PageBlock {
            version: Version::new(5, 6),
            checksum: 0xdead_beef,
            state: StoredState::Data,
        };
        s
    }

    #[test]
    fn golden_bytes_and_round_trip() {
        let mut b = [0xff; 512];
        example().encode_into(&mut b, 10);
        assert_eq!(&b[..8], b"APGM\x01\x00\x01\x04");
        assert_eq!(&b[12..24], &[2, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(
            &b[424..446],
            b"\x05\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\xef\xbe\xad\xde\x01\0"
        );
        assert_eq!(PageSector::decode(&b, 7, 10).unwrap(), example());
        assert_eq!(PageSector::decode(&b, 8, 10), Err(FormatError::Foreign));
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let mut good = [0; 512];
        example().encode_into(&mut good, 10);
        for bit in 0..512 * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(PageSector::decode(&bad, 7, 10).is_err(), "bit {bit}");
        }
    }
}
