//! What happens to the engine of one disk, and what it wants done: the interface to the thread (or the
//! simulator) around it.

use std::time::Duration;

use ashlar_platform::disk::{DiskCommand, DiskCompletion};
use ashlar_proto::ids::{Epoch, VolumeId};
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{PullProgress, Reply, Request, Status};

use crate::metrics::EngineCounters;
use crate::store::{
    BlockListOrder, BlockRuns, LayerProgress, ReplicaInfo, StoreIdentity, StoreStats,
};

/// A connection that a client (or a pulling daemon) opened. Never used again after `ConnClosed`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnectionId(pub u64);

/// A connection to another daemon, which the engine asked for. Never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PeerId(pub u64);

/// What happens to an engine.
#[derive(Debug)]
pub enum EngineEvent {
    /// A request arrived on a connection (the first one must be Hello).
    Request {
        /// Where.
        conn: ConnectionId,
        /// What.
        request: Request,
    },
    /// A connection is gone. Its requests are carried out, their replies dropped.
    ConnClosed {
        /// Which.
        conn: ConnectionId,
    },
    /// A connection that was asked for stands.
    PeerUp {
        /// Which.
        peer: PeerId,
    },
    /// The peer answered.
    PeerReply {
        /// Which.
        peer: PeerId,
        /// What.
        reply: Reply,
    },
    /// The connection could not be made, or broke (not sent after `PeerClose`).
    PeerDown {
        /// Which.
        peer: PeerId,
    },
    /// A disk command is done.
    Disk(DiskCompletion),
    /// The daemon's own administration asks.
    Admin {
        /// Pairs the answer.
        tag: u64,
        /// What.
        request: AdminRequest,
    },
    /// The end of one round of events: closes the store's batch, looks at the timers. Commands of a round
    /// take effect on the disk only after it.
    Tick,
}

/// What an engine wants done.
#[derive(Debug)]
pub enum EngineCommand {
    /// Answer on a connection.
    Reply {
        /// Where.
        conn: ConnectionId,
        /// What.
        reply: Reply,
    },
    /// Close a connection after the replies queued so far. `ConnClosed` must follow.
    Close {
        /// Which.
        conn: ConnectionId,
    },
    /// Deliver no more requests of this connection (back-pressure).
    Pause {
        /// Which.
        conn: ConnectionId,
    },
    /// Deliver again.
    Resume {
        /// Which.
        conn: ConnectionId,
    },
    /// Connect to another daemon; answered by `PeerUp` or `PeerDown`.
    PeerConnect {
        /// Chosen by the engine.
        peer: PeerId,
        /// `ip:port`.
        address: String,
    },
    /// A request to a peer.
    PeerSend {
        /// Which.
        peer: PeerId,
        /// What.
        request: Request,
    },
    /// Close the connection to a peer.
    PeerClose {
        /// Which.
        peer: PeerId,
    },
    /// I/O on the disk.
    Disk(DiskCommand),
    /// The answer to an administrative request.
    Admin {
        /// The request's tag.
        tag: u64,
        /// The answer.
        reply: AdminReply,
    },
    /// The disk is open; requests are served from now on.
    Ready(StoreIdentity),
    /// The disk cannot be opened, or failed while it was served (fail-stop): every request is refused.
    Failed {
        /// In words.
        message: String,
    },
    /// After [`AdminRequest::Stop`]: everything is durable and the clean mark written.
    Stopped,
}

/// What [`AdminRequest::ListBlocks`] asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockList {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of a view in which the replica is in sync; refused if the fence is above it.
    pub epoch: Epoch,
    /// What to list.
    pub order: BlockListOrder,
}

/// What the daemon itself asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AdminRequest {
    /// Counters and replicas, for heartbeats and `GetStatus`.
    Status,
    /// All replicas with the last configuration.
    ListReplicas,
    /// Remove a replica, unless its fence is above `epoch`.
    DropReplica {
        /// The volume.
        volume: VolumeId,
        /// Highest fence that the asker knew of.
        epoch: Epoch,
    },
    /// Keep a layer list (docs/snapshots.md, S6), unless the replica's is as new.
    PutLayers {
        /// The volume.
        volume: VolumeId,
        /// The list.
        layers: LayerList,
    },
    /// Copy what a clone's replica inherits, and cut its link (docs/snapshots.md, C7).
    Flatten {
        /// The volume.
        volume: VolumeId,
    },
    /// A part of a list of blocks (docs/snapshots.md, S10).
    ListBlocks(BlockList),
    /// Refuse new requests, finish the others, make everything durable.
    Stop,
}

/// Answers to [`AdminRequest`].
#[derive(Clone, PartialEq, Debug)]
pub enum AdminReply {
    /// To Status.
    Status(Box<EngineStatus>),
    /// To ListReplicas.
    Replicas(Vec<ReplicaStatus>),
    /// To DropReplica; also where there was none.
    Dropped,
    /// To PutLayers: it is durable, or was not newer.
    LayersKept,
    /// To Flatten: it is under way, or there is nothing to copy.
    Flattening,
    /// To ListBlocks.
    Blocks(BlockRuns),
    /// To Stop, at once; `Stopped` follows.
    Stopping,
    /// Refused.
    Refused(Status),
}

/// How an engine fares.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EngineStatus {
    /// Who the disk is; `None` before it is open.
    pub identity: Option<StoreIdentity>,
    /// Of the store.
    pub store: StoreStats,
    /// Of the engine.
    pub counters: EngineCounters,
    /// Connections that others have opened.
    pub connections: u32,
    /// Why the disk is not served, if so.
    pub failure: Option<String>,
    /// Volumes with a replica here, and their fences, ascending.
    pub volumes: Vec<(VolumeId, Epoch)>,
    /// Layer lists, and what is left to be merged under them.
    pub layers: Vec<LayerProgress>,
}

/// A replica and its last pull.
#[derive(Clone, PartialEq, Debug)]
pub struct ReplicaStatus {
    /// What the store knows.
    pub info: ReplicaInfo,
    /// The last pulls since the process started, summed over the volume's groups.
    pub pull: Option<PullProgress>,
    /// Of those that run.
    pub pace: Option<PullPace>,
}

/// How far running pulls are, for an estimate of when they end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PullPace {
    /// Since the longest began.
    pub running: Duration,
    /// Chunks of the groups' shares that are below what was compared, summed.
    pub position: u64,
    /// Groups that are pulled.
    pub groups: u32,
}
