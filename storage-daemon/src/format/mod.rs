//! Bytes on a disk (layout and reasons: docs/formats.md, "Disk format").
//!
//! Invariants:
//! - Everything is little-endian at explicit offsets and independent of struct layout; every structure
//!   has magic, version and crc32c (computed with the checksum field as zero).
//! - Whatever must change atomically fits one 512-byte sector: superblock, replica header, page sector.
//! - Structures carry the disk's salt (from its id), so that remains of an earlier format are not taken
//!   for this disk's.
//! - Decoding never panics and never trusts a length.

mod body;
mod log;
mod page;
mod slot;
mod superblock;
mod upgrade;

pub use body::{
    BODY_BYTES_MAX, Body, decode_body, decode_descriptor, encode_body, encode_descriptor,
};
pub(crate) use log::header_blocks_for;
pub use log::{
    BatchHeader, ENTRY_BYTES, LOG_HEADER_BYTES, Record, RecordKind, decode_batch, encode_batch,
    peek_header_blocks,
};
pub use page::{PAGE_SECTOR_BYTES, PageBlock, PageSector, PageState, StoredState};
pub use slot::{Link, ReplicaHeader, SLOT_BYTES};
pub use superblock::{Geometry, SUPERBLOCK_OFFSETS, Superblock};
pub use upgrade::{FORMAT_VERSION, check_version};

use ashlar_proto::ids::DiskId;

/// The unit of all our I/O to metadata.
pub const IO_BLOCK: usize = 4096;
/// The unit that a disk writes atomically.
pub const SECTOR: usize = 512;

/// Why bytes are not the structure that is expected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// Another magic.
    #[error("wrong magic")]
    Magic,
    /// A newer release wrote it.
    #[error("format version {0} is not supported")]
    Version(u16),
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
    /// A field is out of its bounds.
    #[error("field out of bounds: {0}")]
    Bounds(&'static str),
    /// Written for another disk or another place.
    #[error("belongs elsewhere")]
    Foreign,
}

/// What structures of a disk carry besides their own magic.
pub fn salt_of(disk: DiskId) -> u32 {
    crc32c::crc32c(&disk.0)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// crc32c of `bytes` with the four bytes at `hole` taken as zero.
pub(crate) fn checksum_with_hole(bytes: &[u8], hole: usize) -> u32 {
    let head = crc32c::crc32c(&bytes[..hole]);
    let gap = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(gap, &bytes[hole + 4..])
}
