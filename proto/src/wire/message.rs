//! The messages of the data protocol, as values. Their bytes are in `codec.rs`; docs/protocol.md has
//! the layout.
//!
//! Invariants:
//! - Every request but Hello names volume, epoch and incarnation; every reply names the replica's fence
//!   epoch and its actual incarnation.
//! - A message's data is at most [`MAX_PAYLOAD`] bytes and its fields at most [`MAX_META`] bytes.
//! - One checksum (crc32c) per block of data travels with the data and is never recomputed in between.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::descriptor::{Parent, VolumeDescriptor};
use crate::ids::{
    BlockRange, ChunkIndex, ClientId, ClusterId, DiskId, Epoch, GroupIndex, Incarnation, RequestId,
    SnapshotNumber, Version, VolumeId,
};
use crate::layers::LayerList;

/// Oldest version of the data protocol that this build speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;
/// Newest version of the data protocol that this build speaks.
pub const PROTOCOL_VERSION_MAX: u16 = 1;
/// Largest data part of a frame, in bytes (256 blocks).
pub const MAX_PAYLOAD: usize = 1024 * 1024;
/// Largest number of blocks in one read, write or trim with data. Trims may cover a whole chunk.
pub const MAX_DATA_BLOCKS: u32 = (MAX_PAYLOAD / crate::ids::BLOCK_SIZE) as u32;
/// Largest field part of a frame, in bytes.
pub const MAX_META: usize = 64 * 1024;
/// Most entries of one Collect or Digest reply.
pub const MAX_ENTRIES: usize = 1024;
/// Longest ticket, in bytes.
pub const MAX_TICKET: usize = 4096;

/// Data of a message: buffers in order, shared by reference, never copied to be joined.
pub type Payload = SmallVec<[Bytes; 2]>;
/// crc32c of each block, in order.
pub type Checksums = SmallVec<[u32; 8]>;

/// A request with its addressing.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// Pairs the reply.
    pub id: RequestId,
    /// The volume; NIL for Hello.
    pub volume: VolumeId,
    /// The request epoch: may this client do this now?
    pub epoch: Epoch,
    /// Life of the store that the requester believes in; 0 skips the check (Hello, Fence only).
    pub incarnation: Incarnation,
    /// What is asked.
    pub body: RequestBody,
}

/// What a request asks.
#[derive(Clone, PartialEq, Debug)]
pub enum RequestBody {
    /// First message of a connection.
    Hello(Hello),
    /// R1: record the epoch durably, refuse lower ones from now on, answer after every admitted
    /// lower-epoch request is applied or dropped. Creates an empty replica if there is none and
    /// `create` is set.
    Fence(Fence),
    /// R0: make a configuration durable (and fence at its epoch).
    Configure(VolumeDescriptor),
    /// R3: write blocks.
    Write(Write),
    /// R9: versioned blocks without data, for trim and write zeroes.
    Trim(Trim),
    /// Read blocks.
    Read(Read),
    /// R5: make everything answered before this request durable.
    Flush(Flush),
    /// R2: blocks above a watermark.
    Collect(Collect),
    /// R7: every (layer, block) of a range of chunks with its version.
    Digest(Digest),
    /// R7: digests of whole chunks, to skip equal ones.
    ChunkDigests(ChunkDigests),
    /// R7: the target starts pulling a group from a source.
    PullStart(PullStart),
    /// R7: how far the pull is.
    PullStatus {
        /// The pull of this group.
        group: GroupIndex,
    },
    /// R8: rewrite a bad block with data of equal version.
    Repair(Write),
    /// R6: renews the lease; answered if the epoch is not fenced.
    Ping,
    /// S6: a layer list, which the replica keeps if it is newer than its own; answered with the one it has then.
    Layers(LayerList),
}

/// First message of a connection: who speaks, to whom, in which versions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Lowest version that the client speaks.
    pub version_min: u16,
    /// Highest version that the client speaks.
    pub version_max: u16,
    /// The cluster that the client belongs to.
    pub cluster: ClusterId,
    /// The disk that the client means to reach.
    pub disk: DiskId,
    /// The client process.
    pub client: ClientId,
    /// Signed ticket; empty in clusters without authentication.
    pub ticket: Bytes,
}

/// See [`RequestBody::Fence`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fence {
    /// Create an empty replica if the store has none of this volume.
    pub create: bool,
    /// Not 0: the replica becomes a rebuild target of this rebuild epoch (R7); equals the request's epoch
    /// or is lower.
    pub rebuild_epoch: Epoch,
    /// With `create`: a new replica is linked to its parent's on the same disk (docs/snapshots.md, C3).
    pub link: Option<FenceLink>,
}

/// See [`Fence::link`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FenceLink {
    /// What the volume is a clone of.
    pub parent: Parent,
    /// Somewhere the replica is in sync: without the parent's on the disk it is not created. Else it is
    /// created alone then.
    pub required: bool,
    /// The replica is in sync wherever it belongs, and so was the parent's.
    pub whole: bool,
}

/// A write of whole blocks.
#[derive(Clone, PartialEq, Debug)]
pub struct Write {
    /// Where.
    pub range: BlockRange,
    /// Layer that the write belongs to.
    pub snapshot: SnapshotNumber,
    /// One version for all its blocks.
    pub version: Version,
    /// Durable before it is answered (FUA).
    pub durable: bool,
    /// `range.count` checksums.
    pub checksums: Checksums,
    /// `range.byte_len()` bytes.
    pub data: Payload,
}

/// Versioned blocks without data; may cover up to a whole chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trim {
    /// Where.
    pub range: BlockRange,
    /// Layer that the trim belongs to.
    pub snapshot: SnapshotNumber,
    /// One version for all its blocks.
    pub version: Version,
    /// Durable before it is answered (FUA).
    pub durable: bool,
}

/// A read of blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Read {
    /// Where; at most [`MAX_DATA_BLOCKS`].
    pub range: BlockRange,
    /// Newest layer at or below this number.
    pub snapshot: SnapshotNumber,
    /// Only blocks of exactly this layer (rebuild); else the newest at or below.
    pub exact_layer: bool,
}

/// See [`RequestBody::Flush`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flush {
    /// Everything at or below it is durable on all in-sync replicas (R2, R3).
    pub watermark: Version,
    /// Tombstones at or below it may be forgotten (R9); ZERO while a replica is not in sync.
    pub forget_below: Version,
}

/// Position in a listing of (chunk, layer, block), ascending.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Cursor {
    /// Next chunk.
    pub chunk: ChunkIndex,
    /// Next layer within the chunk.
    pub snapshot: SnapshotNumber,
    /// Next block within the layer.
    pub block: u16,
}

/// See [`RequestBody::Collect`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Collect {
    /// Only this group's chunks.
    pub group: GroupIndex,
    /// Groups of the volume.
    pub group_count: u32,
    /// Only blocks above it.
    pub watermark: Version,
    /// Where to go on.
    pub from: Cursor,
}

/// See [`RequestBody::Digest`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Digest {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Where to go on within the chunk.
    pub from: Cursor,
}

/// See [`RequestBody::ChunkDigests`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkDigests {
    /// Only this group's chunks.
    pub group: GroupIndex,
    /// Groups of the volume.
    pub group_count: u32,
    /// First chunk to list.
    pub from: ChunkIndex,
}

/// See [`RequestBody::PullStart`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PullStart {
    /// The group to pull.
    pub group: GroupIndex,
    /// Groups of the volume.
    pub group_count: u32,
    /// Epoch e of the rebuild: versions with an epoch >= e win by version, for older ones the source is
    /// the truth.
    pub rebuild_epoch: Epoch,
    /// Disk to pull from.
    pub source: DiskId,
    /// Life of the source that the holder trusts; another one ends the pull with an error.
    pub source_incarnation: Incarnation,
    /// Data address of the source, `host:port`.
    pub source_address: String,
    /// Bytes per second; 0 for no limit.
    pub bytes_per_second: u64,
}

/// A reply with its addressing.
#[derive(Clone, PartialEq, Debug)]
pub struct Reply {
    /// The request's id.
    pub id: RequestId,
    /// The request's volume.
    pub volume: VolumeId,
    /// The replica's fence: requests with a lower epoch are refused.
    pub fence: Epoch,
    /// The store's actual incarnation.
    pub incarnation: Incarnation,
    /// The answer, or why there is none.
    pub result: Result<ReplyBody, Status>,
}

/// What a successful request answers.
#[derive(Clone, PartialEq, Debug)]
pub enum ReplyBody {
    /// To Hello.
    Hello(HelloReply),
    /// To Fence.
    Fence(FenceReply),
    /// To Configure.
    Configure,
    /// To Write, Trim and Repair.
    Written(WriteOutcome),
    /// To Read.
    Read(ReadReply),
    /// To Flush.
    Flush,
    /// To Collect and Digest.
    Entries(Entries),
    /// To ChunkDigests.
    ChunkDigests(ChunkDigestList),
    /// To PullStart.
    PullStart,
    /// To PullStatus.
    PullStatus(PullProgress),
    /// To Ping.
    Ping,
    /// To Layers: the replica's list, durable.
    Layers(LayerList),
}

/// What became of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteOutcome {
    /// All its blocks are in the log.
    Applied,
    /// Some blocks hold a higher version (which is in the log), or the version is at or below the
    /// watermark. Counts as an acknowledgement.
    Superseded,
}

/// See [`Hello`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HelloReply {
    /// The version chosen for the connection.
    pub version: u16,
    /// The disk that answers.
    pub disk: DiskId,
}

/// See [`Fence`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FenceReply {
    /// The replica existed before this request.
    pub existed: bool,
    /// The store's incarnation changed since the last flush of a holder or promotion (R1).
    pub suspect: bool,
    /// The store lost or may have lost something at or below a watermark that it confirmed: the replica
    /// must become Stale.
    pub damaged: bool,
    /// The watermark that the replica remembers.
    pub watermark: Version,
    /// Highest version of any block.
    pub highest: Version,
    /// Whether any block was ever written.
    pub written: bool,
}

/// State of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlockState {
    /// Never written, or forgotten: reads as zeroes.
    Absent = 0,
    /// Data follows.
    Data = 1,
    /// Trimmed: reads as zeroes.
    Tombstone = 2,
    /// The data on disk does not match its checksum, or cannot be read; nothing follows.
    Bad = 3,
}

impl BlockState {
    /// From its number on the wire or on disk.
    pub fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Absent),
            1 => Some(Self::Data),
            2 => Some(Self::Tombstone),
            3 => Some(Self::Bad),
            _ => None,
        }
    }
}

/// One block of a [`ReadReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockInfo {
    /// State; only `Data` blocks have bytes in the payload.
    pub state: BlockState,
    /// Version; ZERO if absent, or unknown if bad.
    pub version: Version,
    /// crc32c if `Data`, else 0.
    pub checksum: u32,
}

/// Answer to a read: one entry per block, and the bytes of the `Data` blocks in order.
#[derive(Clone, PartialEq, Debug)]
pub struct ReadReply {
    /// Where.
    pub range: BlockRange,
    /// `range.count` entries.
    pub blocks: SmallVec<[BlockInfo; 4]>,
    /// 4096 bytes for each entry whose state is `Data`.
    pub data: Payload,
}

/// One (chunk, layer, block) with its version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Where.
    pub at: Cursor,
    /// State (never `Absent`).
    pub state: BlockState,
    /// Version.
    pub version: Version,
    /// crc32c if `Data`, else 0.
    pub checksum: u32,
}

/// A part of a listing, ascending.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entries {
    /// At most [`MAX_ENTRIES`].
    pub entries: Vec<Entry>,
    /// Where to go on; `None` at the end.
    pub next: Option<Cursor>,
}

/// Digest of one chunk: equal digests mean equal (layer, block, version, state) everywhere in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChunkDigest {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// 64 bits over its entries; absent chunks are not listed.
    pub digest: u64,
}

/// A part of the list of chunks, ascending.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkDigestList {
    /// At most [`MAX_ENTRIES`].
    pub chunks: Vec<ChunkDigest>,
    /// Where to go on; `None` at the end.
    pub next: Option<ChunkIndex>,
}

/// How far a pull is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PullState {
    /// No such pull (never started, or the process restarted).
    None = 0,
    /// Under way.
    Running = 1,
    /// Every chunk was compared and what differed has been applied.
    Complete = 2,
    /// Ended by an error (source gone, fenced, disk full); may be started again.
    Failed = 3,
}

/// See [`RequestBody::PullStatus`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PullProgress {
    /// Rebuild epoch of the pull.
    pub rebuild_epoch: Epoch,
    /// State.
    pub state: PullState,
    /// Chunks compared so far.
    pub chunks_done: u32,
    /// Chunks to compare, as far as known.
    pub chunks_total: u32,
    /// Blocks copied or removed.
    pub blocks_moved: u64,
}

/// Why a request was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u16)]
pub enum Status {
    /// A newer holder exists (the reply's fence says its epoch): stop for good.
    #[error("fenced by a newer epoch")]
    Fenced = 2,
    /// The store has another incarnation than the request names.
    #[error("the store's incarnation changed")]
    IncarnationMismatch = 3,
    /// The disk has no room (beyond its reserve).
    #[error("no space left on the disk")]
    NoSpace = 4,
    /// A device error; the store is poisoned and serves nothing until it is opened again.
    #[error("the disk failed")]
    DiskFailed = 5,
    /// The request breaks the protocol's rules (ranges, counts).
    #[error("invalid request")]
    Invalid = 6,
    /// The store holds no replica of the volume.
    #[error("no replica of this volume here")]
    UnknownVolume = 7,
    /// No common protocol version.
    #[error("no common protocol version")]
    Version = 8,
    /// The connection was meant for another disk or cluster.
    #[error("another disk or cluster than expected")]
    WrongTarget = 9,
    /// The ticket is missing, expired or not for this volume.
    #[error("not authorised")]
    Unauthorized = 10,
    /// Too many requests at once, or the store is closing; try again later.
    #[error("busy, try again")]
    Busy = 11,
    /// Data does not match its checksum on arrival.
    #[error("data does not match its checksum")]
    Checksum = 12,
    /// The pull or repair does not fit the replica's state (another rebuild epoch, not a target).
    #[error("not in the required state")]
    WrongState = 13,
}

impl Status {
    /// From its number on the wire.
    pub fn from_u16(value: u16) -> Option<Self> {
        Some(match value {
            2 => Self::Fenced,
            3 => Self::IncarnationMismatch,
            4 => Self::NoSpace,
            5 => Self::DiskFailed,
            6 => Self::Invalid,
            7 => Self::UnknownVolume,
            8 => Self::Version,
            9 => Self::WrongTarget,
            10 => Self::Unauthorized,
            11 => Self::Busy,
            12 => Self::Checksum,
            13 => Self::WrongState,
            _ => return None,
        })
    }
}
