//! Disk I/O as commands and completions: the same for real disks (reactor) and simulated ones.
//!
//! Invariants:
//! - Offsets and lengths are multiples of the disk's logical sector (512 or 4096); buffers should be
//!   aligned to 4096 (others are copied first).
//! - A completed Write is on the device, perhaps in its volatile cache; only a completed Sync that was
//!   *submitted* after that completion makes it durable.
//! - A write of one logical sector is atomic at power loss and leaves its neighbours unharmed.

mod file;

use std::io;

use bytes::Bytes;
use smallvec::SmallVec;

pub(crate) use file::discard_is_unsupported;
pub use file::{DiskFile, DiskOpenError, OpenOptions};

/// Pairs a completion with its command; chosen by the store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct IoToken(pub u64);

/// What a store asks of its disk.
#[derive(Clone, Debug)]
pub enum DiskCommand {
    /// Read `length` bytes at `offset`.
    Read {
        /// Pairs the completion.
        token: IoToken,
        /// Bytes from the start.
        offset: u64,
        /// Bytes to read.
        length: usize,
    },
    /// Write the buffers one after the other at `offset`.
    Write {
        /// Pairs the completion.
        token: IoToken,
        /// Bytes from the start.
        offset: u64,
        /// What to write.
        data: SmallVec<[Bytes; 4]>,
        /// Complete only when these bytes are on stable storage (RWF_DSYNC); says nothing of other writes.
        durable: bool,
    },
    /// fdatasync.
    Sync {
        /// Pairs the completion.
        token: IoToken,
    },
    /// Tell the device that a range's contents are no longer needed (BLKDISCARD or punch hole); advisory.
    Discard {
        /// Pairs the completion.
        token: IoToken,
        /// Bytes from the start.
        offset: u64,
        /// Bytes to discard.
        length: u64,
    },
}

/// What became of a command.
#[derive(Debug)]
pub struct DiskCompletion {
    /// The command's token.
    pub token: IoToken,
    /// The bytes of a Read (exactly as many as asked for; fewer is an error), empty otherwise.
    pub result: io::Result<Bytes>,
}
