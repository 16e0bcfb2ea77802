//! Identities, epochs, versions and the constants of the model.
//!
//! Invariants:
//! - A [`Version`] orders data (which block is newer?); an [`Epoch`] alone fences requests (may this
//!   client do this now?). The two are never compared with each other.
//! - `Version::ZERO` means "never written" and is lower than every version a writer draws.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of one block, the unit of versions and checksums.
pub const BLOCK_SIZE: usize = 4096;
/// Bytes of one page, the unit of allocation on a disk.
pub const PAGE_SIZE: usize = 64 * 1024;
/// Bytes of one chunk, the unit of placement within a replica group.
pub const CHUNK_SIZE: u64 = 4 * 1024 * 1024;
/// Blocks in a chunk (1024).
pub const BLOCKS_PER_CHUNK: u32 = (CHUNK_SIZE / BLOCK_SIZE as u64) as u32;
/// Blocks in a page (16).
pub const BLOCKS_PER_PAGE: u32 = (PAGE_SIZE / BLOCK_SIZE) as u32;
/// Pages in a chunk (64).
pub const PAGES_PER_CHUNK: u32 = (CHUNK_SIZE / PAGE_SIZE as u64) as u32;

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// A new random identity (UUID version 7: ordered by creation time).
            pub fn generate() -> Self {
                Self(uuid::Uuid::now_v7().into_bytes())
            }

            /// The 16 bytes of a field of a message; `None` if the length differs.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The identity as a byte vector, for messages.
            pub fn to_vec(self) -> Vec<u8> {
                self.0.to_vec()
            }

            /// All zero: no identity.
            pub const NIL: Self = Self([0; 16]);

            /// Whether this is [`Self::NIL`].
            pub fn is_nil(self) -> bool {
                self == Self::NIL
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                uuid::Uuid::parse_str(text).map(|u| Self(u.into_bytes()))
            }
        }
    };
}

uuid_newtype!(/// A cluster; every disk and every connection names it.
    ClusterId);
uuid_newtype!(/// A machine that runs a storage daemon or an nbd-client.
    NodeId);
uuid_newtype!(/// A disk, from its superblock.
    DiskId);
uuid_newtype!(/// A pool of disks.
    PoolId);
uuid_newtype!(/// A volume.
    VolumeId);
uuid_newtype!(/// A snapshot of a volume.
    SnapshotId);
uuid_newtype!(/// Snapshots of several volumes of one point in time.
    SnapshotGroupId);
uuid_newtype!(/// A client (nbd-client). `serve` draws a new one at every start; the node service keeps its own, so that it may
    /// open again what it holds.
    ClientId);

/// Granted by Raft; strictly increasing per volume. A request with a lower epoch than the replica's
/// fence is refused.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

/// Drawn by the holder from one counter per volume when a request arrives. Sequences start at 1 in
/// every epoch; only the pair with the epoch is unique.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct Sequence(pub u64);

/// Which data is newer: ordered by epoch, then sequence.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Version {
    /// Epoch in which the writer drew the version.
    pub epoch: Epoch,
    /// The writer's counter.
    pub sequence: Sequence,
}

impl Version {
    /// Never written.
    pub const ZERO: Self = Self::new(0, 0);
    /// Higher than every version that a writer can draw.
    pub const MAX: Self = Self::new(u64::MAX, u64::MAX);

    /// A version from its two raw numbers.
    pub const fn new(epoch: u64, sequence: u64) -> Self {
        Self {
            epoch: Epoch(epoch),
            sequence: Sequence(sequence),
        }
    }

    /// Whether this is [`Version::ZERO`].
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}.{}", self.epoch.0, self.sequence.0)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch.0, self.sequence.0)
    }
}

/// A life of a store: changes when acknowledged data may have been lost (the machine rebooted, the
/// store was recreated or found damaged), not when only the process restarted. 0 means "unknown".
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct Incarnation(pub u64);

/// The number of a snapshot layer: writes carry the volume's current number, a read asks for the
/// newest layer at or below a number. The head of a volume without snapshots is layer 0.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct SnapshotNumber(pub u32);

impl SnapshotNumber {
    /// Above every number that is given out: a read of it sees the newest layer of each block.
    pub const HEAD: Self = Self(u32::MAX);
}

/// Index of a chunk within its volume (byte offset / 4 MiB).
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct ChunkIndex(pub u32);

/// Index of a replica group within its volume: chunk `c` belongs to group `c mod S`.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug, Serialize, Deserialize,
)]
pub struct GroupIndex(pub u32);

/// Pairs a reply with its request on one connection. Unique per connection, chosen by the requester.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Debug)]
pub struct RequestId(pub u64);

/// A run of blocks within one chunk. `first + count <= 1024`, `count >= 1`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BlockRange {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First block within the chunk, 0..1024.
    pub first: u16,
    /// Number of blocks, 1..=1024.
    pub count: u16,
}

impl BlockRange {
    /// A range, if it lies within one chunk and is not empty.
    pub fn new(chunk: ChunkIndex, first: u32, count: u32) -> Option<Self> {
        let end = first.checked_add(count)?;
        (count >= 1 && end <= BLOCKS_PER_CHUNK).then_some(Self {
            chunk,
            first: first as u16,
            count: count as u16,
        })
    }

    /// One past the last block within the chunk.
    pub fn end(self) -> u16 {
        self.first + self.count
    }

    /// The block indexes of the range within the chunk.
    pub fn blocks(self) -> std::ops::Range<u16> {
        self.first..self.end()
    }

    /// Bytes of data that the range covers.
    pub fn byte_len(self) -> usize {
        self.count as usize * BLOCK_SIZE
    }

    /// Whether two ranges share a block.
    pub fn overlaps(self, other: Self) -> bool {
        self.chunk == other.chunk && self.first < other.end() && other.first < self.end()
    }
}

/// What Raft says of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[repr(u8)]
pub enum ReplicaState {
    /// Missed writes; holds nothing that may be read until rebuilt.
    Stale = 0,
    /// Receives new writes and pulls the older ones from a source.
    Rebuilding = 1,
    /// Holds every acknowledged write.
    InSync = 2,
}

impl ReplicaState {
    /// From its number on the wire or on disk.
    pub fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Stale),
            1 => Some(Self::Rebuilding),
            2 => Some(Self::InSync),
            _ => None,
        }
    }
}
