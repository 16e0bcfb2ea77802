//! The engine of one disk: decides what may be done to its replicas, and when it may be answered (rules
//! R0, R1, R7 at the replica). Sans-IO: `step(now, event, commands)`, the same code in production and in
//! the simulator.
//!
//! Invariants (checked by `invariants.rs`):
//! - Nothing is done for a connection before its Hello named this cluster and this disk, for a request
//!   that names another incarnation than the store's, or for one whose epoch is below the fence.
//! - A fence or configuration is answered only when it is durable and every request of a lower epoch
//!   that was admitted on any connection, pulls included, was applied or dropped.
//! - Every request is answered once, or its connection is gone. What is under way is bounded, per
//!   connection (it is paused) and in all (`Busy`).

mod admin;
mod api;
mod fencing;
pub mod invariants;
mod pull;
mod rebuild;
mod requests;
mod results;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, GroupIndex, Incarnation, RequestId, VolumeId};
use ashlar_proto::wire::{Fence, Reply, ReplyBody, Status};
use rustc_hash::FxHashMap;

pub use self::api::{
    AdminReply, AdminRequest, BlockList, ConnectionId, EngineCommand, EngineEvent, EngineStatus,
    PeerId, PullPace, ReplicaStatus,
};
use self::fencing::Fencing;
pub use self::pull::PullFailure;
use self::rebuild::PullSlot;
use self::table::Table;
use crate::metrics::EngineCounters;
use crate::store::{
    LayerProgress, StoreCommand, StoreEvent, StoreIdentity, StoreReply, StoreRequest, StoreStats,
};

/// Requests under way on one disk; more are answered `Busy`.
pub const REQUESTS_MAX: usize = 16 * 1024;
/// Bytes of the requests under way on one disk; more are answered `Busy`.
pub const REQUEST_BYTES_MAX: usize = 64 << 20;
/// Requests under way on one connection before it is paused.
pub const CONNECTION_REQUESTS_MAX: u32 = 2048;
/// Bytes of the requests under way on one connection before it is paused.
pub const CONNECTION_BYTES_MAX: usize = 16 << 20;

/// A store as the engine needs it.
pub trait ChunkStore {
    /// See `Store::step`.
    fn step(&mut self, now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>);
    /// See `Store::next_deadline`.
    fn next_deadline(&self) -> Option<Time>;
}

/// Where an engine is in its life. Opening -> Serving -> Stopping -> Stopped; any -> Failed.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Life {
    Opening,
    Serving,
    /// `true` once the store was asked to shut down.
    Stopping(bool),
    Stopped,
    Failed(String),
}

#[derive(Default)]
struct Connection {
    greeted: bool,
    /// Told to be closed: what still arrives is ignored.
    closing: bool,
    paused: bool,
    requests: u32,
    bytes: usize,
}

/// What the engine remembers of a replica, so that it need not ask the store for each request.
#[derive(Clone, Copy, Debug)]
struct Replica {
    /// The durable fence.
    fence: Epoch,
    rebuild_epoch: Epoch,
    suspect: bool,
    /// Being dropped: answers like an unknown volume.
    dropping: bool,
}

/// Somebody's request that is under way.
struct ClientRequest {
    conn: ConnectionId,
    id: RequestId,
    volume: VolumeId,
    /// Counted against it in `Fencing` while `admitted`.
    epoch: Epoch,
    admitted: bool,
    bytes: usize,
    stage: Stage,
}

/// What the next answer for a client's request means.
enum Stage {
    /// A fence or configuration that waits for lower epochs.
    WaitingFence(FenceKind),
    /// With the store: its answer is the reply.
    Plain,
    /// A durable flush; the replica was `suspect` when it arrived.
    Flush,
    /// The flush is done, the suspicion is being cleared.
    ClearSuspect,
    /// PutFence is with the store.
    Fence,
    /// PutDescriptor is with the store.
    Descriptor,
    /// The descriptor is durable, the replica is being read again.
    Refresh,
    /// PutLayers is with the store.
    Layers,
    /// The newer list is durable, the replica is being asked for it.
    LayersHeld,
}

enum FenceKind {
    Fence(Fence),
    Configure(Box<ashlar_proto::descriptor::VolumeDescriptor>),
}

/// Whatever waits for the store.
enum Work {
    Client(ClientRequest),
    Pull {
        volume: VolumeId,
        group: GroupIndex,
        number: u64,
        token: u32,
        /// Set if it counts as admitted in this epoch.
        admitted: Option<Epoch>,
    },
    /// The listing of replicas when the disk is open.
    Load,
    Status {
        tag: u64,
    },
    /// The second part of a status.
    Progress {
        tag: u64,
    },
    Layers {
        tag: u64,
    },
    Flatten {
        tag: u64,
    },
    List {
        tag: u64,
    },
    Blocks {
        tag: u64,
        volume: VolumeId,
        epoch: Epoch,
    },
    Drop {
        tag: u64,
        volume: VolumeId,
    },
    Shutdown,
}

/// See the module.
pub struct DiskEngine<S> {
    store: S,
    life: Life,
    identity: Option<StoreIdentity>,
    // Hash maps here are only looked up; what is iterated is ordered.
    connections: FxHashMap<ConnectionId, Connection>,
    replicas: BTreeMap<VolumeId, Replica>,
    fencing: Fencing,
    table: Table<Work>,
    request_bytes: usize,
    pulls: BTreeMap<(VolumeId, GroupIndex), PullSlot>,
    peers: BTreeMap<PeerId, (VolumeId, GroupIndex)>,
    peer_next: u64,
    pull_next: u64,
    counters: EngineCounters,
    last_stats: StoreStats,
    last_layers: Vec<LayerProgress>,
    store_commands: Vec<StoreCommand>,
}

impl<S: ChunkStore> DiskEngine<S> {
    /// An engine over a store that is being opened.
    pub fn new(store: S) -> Self {
        Self {
            store,
            life: Life::Opening,
            identity: None,
            connections: FxHashMap::default(),
            replicas: BTreeMap::new(),
            fencing: Fencing::default(),
            table: Table::default(),
            request_bytes: 0,
            pulls: BTreeMap::new(),
            peers: BTreeMap::new(),
            peer_next: 0,
            pull_next: 0,
            counters: EngineCounters::default(),
            last_stats: StoreStats::default(),
            last_layers: Vec::new(),
            store_commands: Vec::new(),
        }
    }

    /// Who the disk is, once it is open.
    pub fn identity(&self) -> Option<StoreIdentity> {
        self.identity
    }

    /// Counters since the process started.
    pub fn counters(&self) -> EngineCounters {
        self.counters
    }

    /// The store, for tests and the simulator's oracle.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// When a `Tick` is needed at the latest.
    pub fn next_deadline(&self) -> Option<Time> {
        let pulls = self
            .pulls
            .values()
            .filter_map(PullSlot::next_deadline)
            .min();
        [self.store.next_deadline(), pulls]
            .into_iter()
            .flatten()
            .min()
    }

    /// Handles one event. Commands are appended.
    pub fn step(&mut self, now: Time, event: EngineEvent, out: &mut Vec<EngineCommand>) {
        match event {
            EngineEvent::Request { conn, request } => self.on_request(now, conn, request, out),
            EngineEvent::ConnClosed { conn } => {
                self.connections.remove(&conn);
            }
            EngineEvent::PeerUp { peer } => self.on_peer(now, peer, rebuild::PeerEvent::Up, out),
            EngineEvent::PeerReply { peer, reply } => {
                self.on_peer(now, peer, rebuild::PeerEvent::Reply(Box::new(reply)), out);
            }
            EngineEvent::PeerDown { peer } => {
                self.on_peer(now, peer, rebuild::PeerEvent::Down, out);
            }
            EngineEvent::Disk(completion) => self.drive(now, StoreEvent::Disk(completion), out),
            EngineEvent::Admin { tag, request } => self.on_admin(now, tag, request, out),
            EngineEvent::Tick => {
                self.tick_pulls(now, out);
                self.drive(now, StoreEvent::Tick, out);
            }
        }
        self.shut_down_if_drained(now, out);
        // Costs a look at every request under way: in debug builds, and while those are few.
        #[cfg(debug_assertions)]
        if self.table.len() <= invariants::CHECKED_REQUESTS_MAX {
            invariants::assert_all(self);
        }
    }

    /// Asks the store something; the answer comes as `Work`.
    fn ask(&mut self, now: Time, work: Work, request: StoreRequest, out: &mut Vec<EngineCommand>) {
        let tag = self.table.insert(work);
        self.drive(now, StoreEvent::Request { tag, request }, out);
    }

    /// Steps the store and carries out what it says. Answers may make the engine ask again: `ask` is
    /// re-entered, each time with the commands of its own step.
    fn drive(&mut self, now: Time, event: StoreEvent, out: &mut Vec<EngineCommand>) {
        let mut commands = std::mem::take(&mut self.store_commands);
        debug_assert!(commands.is_empty());
        self.store.step(now, event, &mut commands);
        for command in commands.drain(..) {
            self.on_store(now, command, out);
        }
        // Keep the larger buffer for the next step.
        if commands.capacity() > self.store_commands.capacity() {
            self.store_commands = commands;
        }
    }

    fn on_store(&mut self, now: Time, command: StoreCommand, out: &mut Vec<EngineCommand>) {
        match command {
            StoreCommand::Disk(command) => out.push(EngineCommand::Disk(command)),
            StoreCommand::Reply { tag, result } => self.on_result(now, tag, result, out),
            StoreCommand::Ready(identity) => {
                self.identity = Some(identity);
                self.ask(now, Work::Load, StoreRequest::ListReplicas, out);
            }
            StoreCommand::OpenFailed(error) => {
                self.failed(now, format!("the disk cannot be opened: {error}"), out);
            }
            StoreCommand::Poisoned { kind, message } => {
                self.failed(now, format!("the disk failed ({kind}): {message}"), out);
            }
            StoreCommand::BadBlock { volume, at } => {
                self.counters.bad_blocks += 1;
                tracing::warn!(%volume, chunk = at.chunk.0, layer = at.snapshot.0, block = at.block,
                    "a block on this disk is bad; it is served from another replica and repaired");
            }
            StoreCommand::Closed => {
                if !matches!(self.life, Life::Failed(_)) {
                    self.life = Life::Stopped;
                }
                out.push(EngineCommand::Stopped);
            }
        }
    }

    fn failed(&mut self, now: Time, message: String, out: &mut Vec<EngineCommand>) {
        if matches!(self.life, Life::Failed(_)) {
            return;
        }
        self.life = Life::Failed(message.clone());
        self.cancel_pulls(now, |_, _| true, out);
        out.push(EngineCommand::Failed { message });
    }

    /// The fence of a volume as requests see it.
    fn fence_of(&self, volume: VolumeId) -> Epoch {
        let durable = self.replicas.get(&volume).map_or(Epoch(0), |r| r.fence);
        self.fencing.fence(volume, durable)
    }

    fn incarnation(&self) -> Incarnation {
        self.identity.map(|i| i.incarnation).unwrap_or_default()
    }

    /// Why nothing is served now, if so.
    fn refusal(&self) -> Option<Status> {
        match self.life {
            Life::Serving => None,
            Life::Opening | Life::Stopping(_) | Life::Stopped => Some(Status::Busy),
            Life::Failed(_) => Some(Status::DiskFailed),
        }
    }

    /// Queues a reply.
    fn reply(
        &mut self,
        conn: ConnectionId,
        id: RequestId,
        volume: VolumeId,
        result: Result<ReplyBody, Status>,
        out: &mut Vec<EngineCommand>,
    ) {
        if let Err(status) = result {
            self.counters.count_refusal(status);
        }
        if !self.connections.contains_key(&conn) {
            return;
        }
        let reply = Reply {
            id,
            volume,
            fence: self.fence_of(volume),
            incarnation: self.incarnation(),
            result,
        };
        out.push(EngineCommand::Reply { conn, reply });
    }
}

/// What a store's answer means for a client; see [`results`].
fn body_of(reply: StoreReply) -> Option<ReplyBody> {
    Some(match reply {
        StoreReply::Written(outcome) => ReplyBody::Written(outcome),
        StoreReply::Read(read) => ReplyBody::Read(read),
        StoreReply::Entries(entries) => ReplyBody::Entries(entries),
        StoreReply::ChunkDigests(list) => ReplyBody::ChunkDigests(list),
        StoreReply::Done => ReplyBody::Flush,
        StoreReply::Pulled { .. }
        | StoreReply::Fenced { .. }
        | StoreReply::Blocks(_)
        | StoreReply::Replica(_)
        | StoreReply::Replicas(_)
        | StoreReply::LayerProgress(_)
        | StoreReply::Stats(_) => return None,
    })
}
