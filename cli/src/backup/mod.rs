//! Backups of snapshots in object storage (`docs/backup.md` has the layout and why it is so).
//!
//! Invariants:
//! - A backup exists if and only if its manifest does. The manifest is put last, in one piece, after everything that it
//!   names is stored; so a backup that was killed is never listed.
//! - An object is never changed: data are named by a hash of their content, manifests by an id that is used once.
//! - Whatever a repository says is checked before it is believed: each object has a checksum over its header, its name
//!   and its payload; lengths are bounded before memory is taken; content is hashed again after it was unpacked.
//! - Memory is bounded: at most [`IN_FLIGHT_BYTES_MAX`] of segments at a time, twice (plain and packed), beside one page of
//!   references and, per TiB of volume, 128 KiB for the map of segments to read.

pub mod codec;
pub mod error;
pub mod gc;
pub mod id;
pub mod key;
pub mod lock;
pub mod manifest;
pub mod nbd;
pub mod reader;
pub mod repository;
pub mod segments;
pub mod storage;
pub mod verify;
pub mod writer;

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;

pub use codec::Compression;
pub use error::{BackupError, Result};
pub use manifest::Manifest;
pub use repository::Repository;

/// Most bytes of segments that are worked on at the same time.
pub const IN_FLIGHT_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Most segments that are worked on at the same time.
pub const IN_FLIGHT_MAX: usize = 32;

/// How many segments of a size are worked on at the same time.
fn in_flight(segment_bytes: u32) -> usize {
    (IN_FLIGHT_BYTES_MAX / segment_bytes.max(1) as usize).clamp(2, IN_FLIGHT_MAX)
}

/// Told how far a long operation is; the bytes are those of the volume.
pub trait Progress: Send + Sync {
    /// So many bytes will be looked at.
    fn begin(&self, total: u64);
    /// So many more are done; `moved` went over the network to or from the repository for them.
    fn step(&self, bytes: u64, moved: u64);
}

/// Nobody looks.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _total: u64) {}
    fn step(&self, _bytes: u64, _moved: u64) {}
}
