//! What goes into and comes out of a [`Session`](super::Session): plain values, no I/O.
//!
//! Invariants:
//! - Every accepted [`ClientRequest`] gets exactly one [`SessionCommand::Reply`], unless the session
//!   stops for good ([`SessionCommand::Stopped`]): then there are no further replies at all.
//! - Being fenced is never an error reply: the session stops and its owner drops the NBD connections.
//! - After `Stopped` the session emits nothing more, whatever it is fed.

use std::time::Duration;

use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, ReplicaState, SnapshotNumber,
    VolumeId,
};
use ashlar_proto::volume::VolumeView;
use ashlar_proto::wire::{Payload, Reply, Request};
use bytes::Bytes;
use smallvec::SmallVec;

/// Lease time of R6. An opener waits this long after an unclean close.
pub const LEASE: Duration = Duration::from_secs(2);
/// Part of the lease that a holder does not use, for clocks that run at different speeds.
pub const LEASE_DRIFT_MARGIN: Duration = Duration::from_millis(200);
/// A replica that answers nothing for this long while a request is outstanding has failed.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(1200);
/// Largest client request, in bytes.
pub const REQUEST_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// How a session behaves; the defaults are the design's.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// The volume.
    pub volume: VolumeId,
    /// This client process: what the volume's holder must equal.
    pub client: ClientId,
    /// The node that the client runs on (NIL: none): a replica there is preferred for reads.
    pub node: NodeId,
    /// Distinguishes the request ids of sessions that share a connection (upper 16 bits of the id).
    pub session_number: u16,
    /// Lease time of R6.
    pub lease: Duration,
    /// See [`LEASE_DRIFT_MARGIN`].
    pub lease_drift_margin: Duration,
    /// See [`ANSWER_TIMEOUT`].
    pub answer_timeout: Duration,
    /// Client requests are refused admission ([`Session::accepting`](super::Session::accepting))
    /// while their bytes in flight are at or above this.
    pub in_flight_bytes_max: u64,
    /// Acknowledged but unflushed writes that are kept for R5: a background flush starts above half of
    /// it, admission stops at it.
    pub retained_bytes_max: u64,
    /// R10: joins the volume's readers instead of holding it. Writes are refused.
    pub read_only: bool,
    /// Reads this snapshot instead of the head (docs/snapshots.md, S9); with `read_only`.
    pub snapshot: Option<SnapshotSource>,
    /// Limit of a rebuild's pull in bytes per second; 0 for none.
    pub rebuild_bytes_per_second: u64,
    /// A mistake to make on purpose, for the simulator to catch.
    #[cfg(feature = "planted-bugs")]
    pub planted_bug: Option<PlantedBug>,
}

impl SessionConfig {
    /// The defaults for a volume and a client.
    pub fn new(volume: VolumeId, client: ClientId) -> Self {
        Self {
            volume,
            client,
            node: NodeId::NIL,
            session_number: 0,
            lease: LEASE,
            lease_drift_margin: LEASE_DRIFT_MARGIN,
            answer_timeout: ANSWER_TIMEOUT,
            in_flight_bytes_max: 16 * 1024 * 1024,
            retained_bytes_max: 16 * 1024 * 1024,
            read_only: false,
            snapshot: None,
            rebuild_bytes_per_second: 0,
            #[cfg(feature = "planted-bugs")]
            planted_bug: None,
        }
    }
}

/// The snapshot that a session reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotSource {
    /// Its number.
    pub number: SnapshotNumber,
    /// Size of the volume when it was taken.
    pub size_bytes: u64,
}

/// Mistakes that a session makes on request (feature `planted-bugs` only); each breaks one rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlantedBug {
    /// R4: acknowledges writes without a failed replica before its exclusion is committed.
    AckBeforeExclusion,
    /// R7: promotes a rebuild target although it has not answered every write sent to it.
    PromoteWithoutTargetAcks,
    /// R6: answers reads without checking the lease.
    ReadWithoutLease,
    /// R2: serves after an unclean close without reconciling the replicas.
    SkipReconcile,
    /// R6: returns the data of writes that are not acknowledged yet.
    ReadInFlight,
    /// R4: excludes a replica without flushing a remaining one first, nor the writes in flight.
    SkipExclusionFlush,
    /// R10: a reader answers although metadata did not confirm its place in time.
    ReadWithoutConfirmation,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum SessionEvent {
    /// The first event: the session asks to open its volume.
    Start,
    /// A client's request. Requests that arrive before [`SessionCommand::Serving`] wait.
    Client(ClientRequest),
    /// The connection asked for by [`SessionCommand::Connect`] is up (Hello answered).
    ReplicaUp {
        /// The disk.
        disk: DiskId,
    },
    /// The connection failed, or could not be made. Requests outstanding on it get no answer.
    ReplicaDown {
        /// The disk.
        disk: DiskId,
    },
    /// A replica answered.
    Reply {
        /// The disk that the connection leads to.
        disk: DiskId,
        /// The answer.
        reply: Reply,
    },
    /// Answer to [`MetadataRequest::Open`] and [`MetadataRequest::Join`].
    Granted {
        /// The volume with the new epoch and this client as holder; or with this client among the readers.
        view: Box<VolumeView>,
        /// The last close was clean: neither reconcile nor lease wait.
        previous_clean: bool,
        /// No holder has made the replicas yet (`opened_once` was false before this client's first
        /// attempt to open): those that do not exist are created.
        first_open: bool,
    },
    /// Answer to [`MetadataRequest::Join`]: nobody holds the volume, but it is to be reconciled, or its replicas
    /// are to be made, before it may be read (R10).
    NotReadable,
    /// Answer to [`MetadataRequest::Confirm`].
    Confirmed(Box<VolumeView>),
    /// Answer to [`MetadataRequest::Open`] and [`MetadataRequest::Join`]: not granted, for good (no such volume, held
    /// by another client and not forced).
    OpenRefused {
        /// Text for people.
        reason: String,
    },
    /// The volume as metadata has it now: from the watch, or the answer to [`MetadataRequest::Refresh`].
    ConfigChanged(Box<VolumeView>),
    /// Answer to [`MetadataRequest::ChangeReplicas`].
    ChangeAnswer {
        /// Whether the change was made.
        applied: bool,
        /// The volume afterwards.
        view: Box<VolumeView>,
    },
    /// Answer to [`MetadataRequest::Close`].
    CloseAnswer,
    /// The volume is gone from metadata.
    Deleted,
    /// Finish what was accepted, flush, close cleanly; then [`SessionCommand::Stopped`].
    Close,
    /// [`Session::next_deadline`](super::Session::next_deadline) has passed.
    Tick,
}

/// A request of the volume's user.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    /// Comes back with the reply; chosen by the caller, need not be unique.
    pub tag: u64,
    /// What is asked.
    pub op: ClientOp,
}

/// What a [`ClientRequest`] asks. Offsets and lengths are bytes; any alignment is accepted (below
/// 4 KiB by read-modify-write). Longer than [`REQUEST_BYTES_MAX`] (except trims, zeroes and block
/// status) or beyond the volume's end is [`ClientError::Invalid`].
#[derive(Clone, Debug)]
pub enum ClientOp {
    /// Read bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u32,
    },
    /// Write bytes.
    Write {
        /// First byte.
        offset: u64,
        /// The bytes, in order; shared, never copied unless unaligned.
        data: Payload,
        /// Durable on every in-sync replica before the reply.
        fua: bool,
    },
    /// Everything acknowledged before becomes durable.
    Flush,
    /// Discards whole blocks; partial blocks at the edges keep their data.
    Trim {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// As for writes.
        fua: bool,
    },
    /// Like a write of zeroes, without space for whole blocks.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// As for writes.
        fua: bool,
    },
    /// Which bytes are allocated. The answer may cover less than asked, but at least one block.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// A successful answer.
#[derive(Clone, PartialEq, Debug)]
pub enum ClientReply {
    /// To Write, Flush, Trim, WriteZeroes.
    Done,
    /// To Read: exactly the bytes asked for, in order.
    Data(ReadSegments),
    /// To BlockStatus, ascending, adjacent, from the offset asked for.
    Extents(Vec<Extent>),
}

/// The pieces of a read's answer.
pub type ReadSegments = SmallVec<[ReadSegment; 2]>;

/// A piece of a read's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ReadSegment {
    /// Bytes as written.
    Data(Bytes),
    /// That many zero bytes: never written, or trimmed.
    Zeroes(u32),
}

impl ReadSegment {
    /// Bytes that the segment stands for.
    pub fn len(&self) -> usize {
        match self {
            Self::Data(bytes) => bytes.len(),
            Self::Zeroes(length) => *length as usize,
        }
    }

    /// Whether it stands for no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Number of bytes.
    pub length: u64,
    /// False: a hole that reads as zeroes.
    pub allocated: bool,
}

/// Why a request failed. Being fenced is not among them: see [`StopReason`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClientError {
    /// No replica has intact data (EIO).
    #[error("no replica holds intact data")]
    Io,
    /// No replica has room (ENOSPC).
    #[error("no space left on the replicas' disks")]
    NoSpace,
    /// Beyond the end, or too long (EINVAL).
    #[error("request out of range")]
    Invalid,
}

/// A question to the metadata cluster. The owner repeats it (same request id) until it is answered;
/// there is at most one of each kind outstanding.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MetadataRequest {
    /// OpenVolume: answered by `Granted` or `OpenRefused`.
    Open,
    /// ChangeReplicas as the holder: answered by `ChangeAnswer`.
    ChangeReplicas {
        /// Must be the volume's current epoch.
        epoch: Epoch,
        /// The changes.
        changes: Vec<ReplicaChange>,
    },
    /// CloseVolume: answered by `CloseAnswer`; by `ConfigChanged` if the epoch is no longer current (then
    /// the session asks again).
    Close {
        /// Must be the volume's current epoch.
        epoch: Epoch,
        /// Drained and flushed everywhere.
        clean: bool,
    },
    /// GetVolume (linearizable): answered by `ConfigChanged` or `Deleted`.
    Refresh,
    /// OpenVolume for reading only (R10): answered by `Granted`, `NotReadable` or `OpenRefused`.
    Join,
    /// ReportHeld (docs/snapshots.md, S2): everything below the number is acknowledged and flushed, and new writes wait.
    /// There is no answer: what becomes of it is in the view. Worth sending for half the hold time.
    ReportHeld {
        /// Must be the volume's current epoch.
        epoch: Epoch,
        /// Must be the volume's pending number.
        number: SnapshotNumber,
    },
    /// GetVolume (linearizable, carried out after it was asked for): answered by `Confirmed` or `Deleted`.
    Confirm,
}

/// One change of [`MetadataRequest::ChangeReplicas`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaChange {
    /// The group.
    pub group: GroupIndex,
    /// The disk of the replica.
    pub disk: DiskId,
    /// The new state.
    pub state: ReplicaState,
    /// To record, with `InSync`.
    pub incarnation: Incarnation,
}

/// What the owner of the session is to do, in order.
#[derive(Clone, Debug)]
pub enum SessionCommand {
    /// Make (or share) a connection; answered by `ReplicaUp` or `ReplicaDown`.
    Connect {
        /// The disk.
        disk: DiskId,
        /// `host:port`.
        address: String,
    },
    /// This session needs the connection no longer, or distrusts it. No `ReplicaDown` follows.
    Disconnect {
        /// The disk.
        disk: DiskId,
    },
    /// Send a request on the disk's connection.
    Send {
        /// The disk.
        disk: DiskId,
        /// The request.
        request: Request,
    },
    /// Ask the metadata cluster.
    Metadata(MetadataRequest),
    /// Answer a client's request.
    Reply {
        /// The request's tag.
        tag: u64,
        /// The answer.
        result: Result<ClientReply, ClientError>,
    },
    /// The volume is open: requests are served from now on.
    Serving {
        /// The volume's size.
        size_bytes: u64,
    },
    /// The volume grew.
    Resized {
        /// The new size.
        size_bytes: u64,
    },
    /// The end: nothing follows.
    Stopped {
        /// Why.
        reason: StopReason,
    },
}

/// Why a session ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StopReason {
    /// Asked for, and closed.
    Closed,
    /// Another client holds the volume now, or an operator ended the attachment.
    Superseded,
    /// The open was refused.
    OpenRefused(String),
    /// The volume, or the snapshot that is read, was deleted.
    Deleted,
}

/// Counters and gauges of a session.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SessionStats {
    /// Client reads answered.
    pub reads: u64,
    /// Client writes, trims and zeroes acknowledged.
    pub writes: u64,
    /// Client flushes answered.
    pub flushes: u64,
    /// Bytes read by clients.
    pub read_bytes: u64,
    /// Bytes written by clients.
    pub written_bytes: u64,
    /// Flushes started to bound retained writes.
    pub background_flushes: u64,
    /// Flushes for which nobody had to be asked.
    pub flushes_spared: u64,
    /// Replicas excluded (R4).
    pub exclusions: u64,
    /// Rebuild targets promoted (R7).
    pub promotions: u64,
    /// Blocks whose data did not match their checksum (R8).
    pub bad_blocks_found: u64,
    /// Bad blocks rewritten from another replica (R8).
    pub bad_blocks_repaired: u64,
    /// Blocks written by reconcile (R2).
    pub blocks_reconciled: u64,
    /// Acknowledged writes replayed after every in-sync replica lost power (R5).
    pub writes_replayed: u64,
    /// Reads that waited for a lease or a write in flight (R6).
    pub reads_delayed: u64,
    /// Blocks moved by the pulls of rebuild targets, as far as reported.
    pub rebuild_blocks_moved: u64,
    /// Switches to a new snapshot number.
    pub switches: u64,
    /// Bytes of client requests in flight.
    pub in_flight_bytes: u64,
    /// Bytes acknowledged and not yet flushed.
    pub retained_bytes: u64,
}
