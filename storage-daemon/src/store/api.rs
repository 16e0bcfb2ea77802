//! What the store of one disk is asked, answers and commands: the interface to the engine above it.
//!
//! ```text
//! Store::format_plan(&FormatOptions) -> Result<Vec<(u64, Bytes)>, StoreError>   // write all of it, then sync
//! Store::open(config, disk_bytes, boot_id, now) -> Store                        // state Recovering
//! store.step(now, StoreEvent, &mut Vec<StoreCommand>)
//! store.flush_batch(now, &mut Vec<StoreCommand>)     // = step(Tick): once per reactor iteration
//! store.next_deadline() -> Option<Time>              // when a Tick is needed at the latest
//! store.is_ready(), store.identity(), store.replica(volume), store.stats()
//! ```
//!
//! Invariants:
//! - Every request is answered exactly once, with its tag, unless the process dies. Before `Ready` and
//!   after `Closed` the answer is `NotReady`; after a failed write or sync it is `DiskFailed`.
//! - Requests only take effect on the disk after `flush_batch` (or a Tick) closed the batch.
//! - The store checks neither fences nor incarnations of requests: the engine does, before it asks.

use std::io;
use std::time::Duration;

use ashlar_platform::disk::{DiskCommand, DiskCompletion};
use ashlar_proto::descriptor::VolumeDescriptor;
use ashlar_proto::ids::{
    BlockRange, ChunkIndex, ClusterId, DiskId, Epoch, GroupIndex, Incarnation, SnapshotNumber,
    Version, VolumeId,
};
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire;
use bytes::Bytes;

/// How a disk is laid out when it is formatted.
#[derive(Clone, Debug)]
pub struct FormatOptions {
    /// The cluster that the disk will belong to.
    pub cluster: ClusterId,
    /// The disk's new identity.
    pub disk: DiskId,
    /// Bytes of the file or device.
    pub size_bytes: u64,
    /// First incarnation: random, not 0.
    pub incarnation: Incarnation,
    /// Bytes of the log; `None` chooses by size.
    pub log_bytes: Option<u64>,
    /// Replicas that the disk can hold; `None` chooses by size.
    pub replica_slots: Option<u32>,
}

/// Bounds and delays of a store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Bytes of cached page metadata.
    pub cache_bytes: usize,
    /// Requests that may wait for room in the log or for metadata before new ones answer `Busy`.
    pub queue_requests_max: usize,
    /// Bytes of data that may wait likewise.
    pub queue_bytes_max: usize,
    /// Log batches in flight at once.
    pub batches_in_flight_max: usize,
    /// Bytes of data in one log batch.
    pub batch_bytes_max: usize,
    /// Log bytes that one write-back burst frees at most.
    pub write_back_burst_bytes: u64,
    /// Write back when the log is used beyond this percentage.
    pub write_back_percent: u8,
    /// Write back what the log holds after this long without writes.
    pub idle_write_back: Duration,
    /// Make the marker of the last flush durable after this long without another batch.
    pub marker_delay: Duration,
    /// Discard pages that stay free for this long (at most twice as long); `None`: never.
    pub discard_after: Option<Duration>,
    /// Between two steps of merging layers, while there are requests.
    pub merge_pause: Duration,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            cache_bytes: 128 << 20,
            queue_requests_max: 4096,
            queue_bytes_max: 64 << 20,
            batches_in_flight_max: 8,
            batch_bytes_max: 1 << 20,
            write_back_burst_bytes: 32 << 20,
            write_back_percent: 50,
            idle_write_back: Duration::from_millis(2000),
            marker_delay: Duration::from_millis(20),
            discard_after: Some(Duration::from_secs(5)),
            merge_pause: Duration::from_millis(5),
        }
    }
}

/// What happens to a store.
#[derive(Debug)]
pub enum StoreEvent {
    /// Somebody asks something.
    Request {
        /// Chosen by the asker; comes back with the reply.
        tag: u64,
        /// What is asked.
        request: StoreRequest,
    },
    /// A disk command is done.
    Disk(DiskCompletion),
    /// Time has passed, or an iteration of the reactor ends: close the batch, look at the timers.
    Tick,
}

/// What a store wants done.
#[derive(Debug)]
pub enum StoreCommand {
    /// I/O on the store's disk.
    Disk(DiskCommand),
    /// The answer to a request.
    Reply {
        /// The request's tag.
        tag: u64,
        /// The answer.
        result: Result<StoreReply, StoreError>,
    },
    /// Recovery is done; requests are served from now on.
    Ready(StoreIdentity),
    /// The disk cannot be opened; nothing will ever be served.
    OpenFailed(StoreError),
    /// A write or sync failed: fail-stop. Emitted once; everything answers `DiskFailed` from now on.
    Poisoned {
        /// What failed.
        kind: io::ErrorKind,
        /// In words.
        message: String,
    },
    /// A block was found bad (also counted); its reader got `BlockState::Bad`.
    BadBlock {
        /// The volume.
        volume: VolumeId,
        /// Where.
        at: wire::Cursor,
    },
    /// After `Shutdown` is answered: the disk may be closed.
    Closed,
}

/// Who a disk is, once it is open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The disk.
    pub disk: DiskId,
    /// The life of the store; changes only at open.
    pub incarnation: Incarnation,
    /// Whether this open drew a new incarnation.
    pub incarnation_changed: bool,
    /// Whether this open found damage that no single block accounts for (every replica is `damaged`).
    pub damaged: bool,
    /// Blocks found bad by recovery.
    pub bad_blocks: u64,
}

/// What [`StoreRequest::ListBlocks`] lists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockListOrder {
    /// Only chunks of this group...
    pub group: GroupIndex,
    /// ...of so many.
    pub group_count: u32,
    /// The snapshot; [`SnapshotNumber::HEAD`]: what the volume shows now.
    pub snapshot: SnapshotNumber,
    /// An older snapshot to compare with; `None`: every block with data is listed.
    pub base: Option<SnapshotNumber>,
    /// First chunk.
    pub from: ChunkIndex,
}

/// Neighbouring blocks of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRun {
    /// Where.
    pub range: BlockRange,
    /// They have data; false: they read as zeroes and did not in the base.
    pub data: bool,
}

/// A part of a list.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct BlockRuns {
    /// Ascending.
    pub runs: Vec<BlockRun>,
    /// Where the next part begins; `None`: this was the last.
    pub next: Option<ChunkIndex>,
}

/// A request to a store.
#[derive(Clone, Debug)]
pub enum StoreRequest {
    /// R3. `client`: a client's write (at or below the watermark it is a no-op); false for
    /// reconciliation (R2), which must not be dropped.
    Write {
        /// The volume.
        volume: VolumeId,
        /// What to write.
        write: wire::Write,
        /// See above.
        client: bool,
    },
    /// R9.
    Trim {
        /// The volume.
        volume: VolumeId,
        /// What to trim.
        trim: wire::Trim,
        /// As for `Write`.
        client: bool,
    },
    /// Blocks with versions and data.
    Read {
        /// The volume.
        volume: VolumeId,
        /// What to read.
        read: wire::Read,
    },
    /// R5: everything answered before is durable when this is answered.
    Flush {
        /// The volume.
        volume: VolumeId,
        /// See [`wire::Flush::watermark`].
        watermark: Version,
        /// See [`wire::Flush::forget_below`].
        forget_below: Version,
    },
    /// R2.
    Collect {
        /// The volume.
        volume: VolumeId,
        /// What to list.
        collect: wire::Collect,
    },
    /// R7: entries of one chunk.
    Digest {
        /// The volume.
        volume: VolumeId,
        /// What to list.
        digest: wire::Digest,
    },
    /// R7: digests of chunks.
    ChunkDigests {
        /// The volume.
        volume: VolumeId,
        /// What to list.
        digests: wire::ChunkDigests,
    },
    /// S10: blocks that a snapshot shows data in, or that differ from an older one's.
    ListBlocks {
        /// The volume.
        volume: VolumeId,
        /// What to list.
        order: BlockListOrder,
    },
    /// R8: as Write, but also applied at equal version, and over bad blocks of unknown version.
    Repair {
        /// The volume.
        volume: VolumeId,
        /// The good data.
        write: wire::Write,
    },
    /// R7: the merge at a rebuild target, decided per block when it is applied.
    PullApply {
        /// The volume.
        volume: VolumeId,
        /// Epoch e: local versions with an epoch >= e win by version, others yield to the source.
        rebuild_epoch: Epoch,
        /// The chunk.
        chunk: ChunkIndex,
        /// What the source has (or has not) for some of its blocks; at most [`wire::MAX_ENTRIES`].
        blocks: Vec<PullBlock>,
    },
    /// R1: raise the fence, durably. Creates the replica if asked; a new rebuild epoch also clears
    /// `damaged` (the contents are no longer claimed to be right).
    PutFence {
        /// The volume.
        volume: VolumeId,
        /// New fence; lower than the current one is refused.
        epoch: Epoch,
        /// Create an empty replica if there is none.
        create: bool,
        /// Not 0: rebuild target of this epoch. 0 leaves it as it is.
        rebuild_epoch: Epoch,
        /// C3: what a replica that is created is linked to.
        link: Option<wire::FenceLink>,
    },
    /// R0: store the configuration durably, and fence at its epoch. A descriptor of a lower epoch than
    /// the stored one is refused. Of its layer list and the replica's the one of the higher revision stays.
    PutDescriptor {
        /// The configuration.
        descriptor: VolumeDescriptor,
    },
    /// S6: the layer list, durable before the answer. One that is not newer than the replica's is done without effect.
    PutLayers {
        /// The volume.
        volume: VolumeId,
        /// The list.
        layers: LayerList,
    },
    /// What is known of a replica (also without a request: `Store::replica`).
    GetReplica {
        /// The volume.
        volume: VolumeId,
    },
    /// A holder's flush or a promotion confirmed the replica in this incarnation; durable.
    ClearSuspect {
        /// The volume.
        volume: VolumeId,
    },
    /// Forget the replica and free its space; durable.
    DropReplica {
        /// The volume.
        volume: VolumeId,
    },
    /// C7: copy what a clone's replica inherits, in the background, and cut its link. Not remembered by the disk.
    Flatten {
        /// The volume.
        volume: VolumeId,
    },
    /// All replicas.
    ListReplicas,
    /// The layer lists of all replicas that ever got one, and what is left to be merged under them (S8).
    LayerProgress,
    /// Counters.
    Stats,
    /// Finish what was admitted, make it durable, write the clean mark.
    Shutdown,
}

/// One block of a [`StoreRequest::PullApply`].
#[derive(Clone, PartialEq, Debug)]
pub struct PullBlock {
    /// Its layer.
    pub snapshot: SnapshotNumber,
    /// Its index within the chunk.
    pub block: u16,
    /// `Absent`: the source has nothing. `Bad` is refused (`Invalid`).
    pub state: wire::BlockState,
    /// The source's version.
    pub version: Version,
    /// crc32c of the data if `Data`.
    pub checksum: u32,
    /// 4096 bytes if `Data`, else empty.
    pub data: Bytes,
}

/// An answer of a store.
#[derive(Clone, PartialEq, Debug)]
pub enum StoreReply {
    /// To Write, Trim and Repair.
    Written(wire::WriteOutcome),
    /// To Read.
    Read(wire::ReadReply),
    /// To Flush and Shutdown, ClearSuspect, DropReplica, PutDescriptor and PutLayers.
    Done,
    /// To Collect and Digest.
    Entries(wire::Entries),
    /// To ChunkDigests.
    ChunkDigests(wire::ChunkDigestList),
    /// To ListBlocks.
    Blocks(BlockRuns),
    /// To PullApply: how many blocks changed.
    Pulled {
        /// Blocks written or removed.
        applied: u32,
    },
    /// To PutFence: the replica after it, and whether it existed before.
    Fenced {
        /// It existed before this request.
        existed: bool,
        /// The replica now.
        replica: ReplicaInfo,
    },
    /// To GetReplica.
    Replica(Box<ReplicaInfo>),
    /// To ListReplicas, ordered by volume.
    Replicas(Vec<ReplicaInfo>),
    /// To LayerProgress, ordered by volume.
    LayerProgress(Vec<LayerProgress>),
    /// To Stats.
    Stats(StoreStats),
}

/// How far a replica is with its layer list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerProgress {
    /// The volume.
    pub volume: VolumeId,
    /// The list's revision.
    pub revision: u64,
    /// Chunks that are still to be merged.
    pub chunks_left: u64,
    /// It is linked to the replica of its parent (C3).
    pub inherits: bool,
    /// While it is being flattened: chunks that are not done.
    pub inherited_left: u64,
    /// Pages in use.
    pub pages: u64,
}

impl LayerProgress {
    /// Whether metadata has to hear of it: it has a list, or something left to be merged.
    pub fn is_layered(&self) -> bool {
        self.revision > 0 || self.chunks_left > 0 || self.inherits
    }
}

/// What a store knows of a replica.
#[derive(Clone, PartialEq, Debug)]
pub struct ReplicaInfo {
    /// The volume.
    pub volume: VolumeId,
    /// Requests of lower epochs are refused.
    pub fence: Epoch,
    /// R7's e while it is a rebuild target, else 0. Reset to 0 by a descriptor that says InSync.
    pub rebuild_epoch: Epoch,
    /// The incarnation changed since the last ClearSuspect.
    pub suspect: bool,
    /// Something durable may have been lost.
    pub damaged: bool,
    /// As of the last flush.
    pub watermark: Version,
    /// Highest version ever applied.
    pub highest: Version,
    /// Anything was ever written or trimmed.
    pub written: bool,
    /// Pages (64 KiB) that its blocks occupy, without what is only in the log.
    pub pages: u64,
    /// Chunks with anything written or trimmed.
    pub chunks: u64,
    /// The last configuration.
    pub descriptor: Option<VolumeDescriptor>,
    /// The newest layer list that the replica ever got.
    pub layers: LayerList,
    /// Chunks that are still to be merged under it (S8).
    pub garbage_left: u64,
    /// Bytes of the pages of each canonical layer, ascending: a snapshot's own, and above the last live one the head's.
    pub layer_bytes: Vec<(u32, u64)>,
}

/// Counters and gauges of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreStats {
    /// Bytes of all pages.
    pub capacity_bytes: u64,
    /// Bytes of pages that hold something or are promised to what the log holds.
    pub used_bytes: u64,
    /// Of these, bytes promised to blocks that are only in the log.
    pub reserved_bytes: u64,
    /// Bytes of the log.
    pub log_bytes: u64,
    /// Bytes of the log in use.
    pub log_used_bytes: u64,
    /// Replicas.
    pub replicas: u32,
    /// Log batches written.
    pub batches: u64,
    /// Of these, written durably instead of being followed by a sync.
    pub durable_batches: u64,
    /// Blocks written through the log.
    pub log_blocks: u64,
    /// Pages written directly.
    pub redirected_pages: u64,
    /// Blocks read.
    pub read_blocks: u64,
    /// Bytes of free pages given back to the device.
    pub discarded_bytes: u64,
    /// fdatasyncs.
    pub syncs: u64,
    /// Write-back bursts.
    pub write_backs: u64,
    /// Blocks whose data did not match (arrival excluded).
    pub checksum_errors: u64,
    /// Reads that the device refused.
    pub read_errors: u64,
    /// Bad blocks repaired by Repair.
    pub repaired_blocks: u64,
    /// Pages whose layer was merged into another.
    pub merged_pages: u64,
    /// Pages that clones copied from what they inherit (C7).
    pub flattened_pages: u64,
    /// Tombstone ranges kept.
    pub tombstones: u64,
    /// Requests waiting for the log or for metadata.
    pub queued_requests: u64,
    /// Hits of the page metadata cache.
    pub cache_hits: u64,
    /// Misses of the page metadata cache.
    pub cache_misses: u64,
}

/// Why a store refuses.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// Still recovering, or closed.
    #[error("the store is not open")]
    NotReady,
    /// Too much is queued.
    #[error("the store is busy")]
    Busy,
    /// No room beyond the reserve.
    #[error("no space left on the disk")]
    NoSpace,
    /// A write or sync failed; poisoned until opened again.
    #[error("the disk failed")]
    DiskFailed,
    /// The request breaks the rules (ranges, counts, too large a descriptor).
    #[error("invalid request: {0}")]
    Invalid(&'static str),
    /// Data does not match its checksum on arrival.
    #[error("data does not match its checksum")]
    Checksum,
    /// No replica of this volume.
    #[error("no replica of this volume")]
    UnknownVolume,
    /// A replica of a clone without its parent's on this disk (docs/snapshots.md, C3).
    #[error("the parent volume has no replica on this disk")]
    NoParent,
    /// DropReplica of what clones on this disk inherit from (C6).
    #[error("clones on this disk need the replica; flatten them, or delete them")]
    HasClones,
    /// A read of a snapshot that is deleted (docs/snapshots.md, S9).
    #[error("the snapshot is deleted")]
    SnapshotGone,
    /// PutFence or PutDescriptor with a lower epoch than the fence.
    #[error("fenced by epoch {}", .0.0)]
    Fenced(Epoch),
    /// Not an Ashlar disk, or both superblocks are unreadable.
    #[error("not an Ashlar disk: {0}")]
    NotFormatted(&'static str),
    /// Formatted by a newer release.
    #[error("disk format version {0} is not supported")]
    FormatVersion(u16),
    /// The disk is too small.
    #[error("the disk is too small: {0} bytes are needed")]
    TooSmall(u64),
}
