//! A client process of the simulation: the real session engine, its connections, its questions to
//! metadata, and the requests of the user in front of it.

use std::collections::{BTreeMap, VecDeque};

use ashlar_platform::clock::Time;
use ashlar_platform::sim::{ConnectionId as NetId, NetworkEvent, SimClock};
use ashlar_proto::ids::{ClientId, DiskId};
use nbd_client::engine::{Session, SessionConfig, SessionEvent, StopReason};

use super::frame::Frame;
use super::history::OperationId;
use super::metadata::{Ask, VOLUME};

/// What a client process does at the moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClientState {
    /// Runs.
    Running,
    /// Stopped by a signal.
    Frozen,
    /// Killed.
    Dead,
    /// The session ended by itself.
    Stopped(StopReason),
}

/// A connection to a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// SYN sent.
    Connecting,
    /// Hello sent.
    Greeting,
    /// Usable.
    Up,
}

/// See [`LinkState`].
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The network's connection.
    pub net: NetId,
    /// How far it is.
    pub state: LinkState,
}

/// A question on its way.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The question.
    pub ask: Ask,
    /// Of an open: whether the volume had been opened before, once that was asked.
    pub opened_once: Option<bool>,
}

/// What waits for a frozen process.
#[derive(Debug)]
pub enum Inbound {
    /// From the network.
    Network(Box<NetworkEvent<Frame>>),
    /// From metadata.
    Session(Box<SessionEvent>),
    /// The user's next request is due.
    Submit,
}

/// A client process.
pub struct Client {
    /// Host number in the network; also names the client in the history.
    pub host: u32,
    /// Its identity.
    pub id: ClientId,
    /// What it does.
    pub state: ClientState,
    /// Its clock.
    pub clock: SimClock,
    /// The engine.
    pub session: Session,
    /// Connections by disk.
    pub links: BTreeMap<DiskId, Link>,
    /// Disk of each connection.
    pub disks: BTreeMap<NetId, DiskId>,
    /// Questions to metadata.
    pub pending: BTreeMap<u64, Pending>,
    /// Number of the next question.
    pub next_ask: u64,
    /// Takes the volume from another holder.
    pub force: bool,
    /// Only reads.
    pub reads: bool,
    /// The session serves.
    pub serving: bool,
    /// Bytes of the volume as the session told; 0 until it serves.
    pub size_bytes: u64,
    /// It was asked to close.
    pub closing: bool,
    /// Readers come after it, not a client that writes.
    pub readers_follow: bool,
    /// Granted: the watch runs.
    pub granted: bool,
    /// Newest revision that the watch delivered.
    pub revision: u64,
    /// Requests of the user without an answer.
    pub in_flight: BTreeMap<u64, OperationId>,
    /// What arrived while frozen.
    pub inbox: VecDeque<Inbound>,
}

/// Identity of a client by its host number.
pub fn client_id(host: u32) -> ClientId {
    let mut id = [0xc0; 16];
    id[12..].copy_from_slice(&host.to_be_bytes());
    ClientId(id)
}

impl Client {
    /// A process that has not started its session.
    pub fn new(host: u32, force: bool, config: SessionConfig, clock: SimClock, now: Time) -> Self {
        Self {
            host,
            id: config.client,
            reads: config.read_only,
            state: ClientState::Running,
            clock,
            session: Session::new(config, clock.local(now)),
            links: BTreeMap::new(),
            disks: BTreeMap::new(),
            pending: BTreeMap::new(),
            next_ask: 1,
            force,
            serving: false,
            size_bytes: 0,
            closing: false,
            readers_follow: false,
            granted: false,
            revision: 0,
            in_flight: BTreeMap::new(),
            inbox: VecDeque::new(),
        }
    }

    /// The defaults of a client of the simulated volume.
    pub fn config(host: u32) -> SessionConfig {
        SessionConfig::new(VOLUME, client_id(host))
    }

    /// Whether the process executes.
    pub fn runs(&self) -> bool {
        self.state == ClientState::Running
    }

    /// Whether there may be something to come from it.
    pub fn lives(&self) -> bool {
        matches!(self.state, ClientState::Running | ClientState::Frozen)
    }

    /// When the session wants to be woken, in true time.
    pub fn next_time(&self) -> Option<Time> {
        if !self.runs() {
            return None;
        }
        self.session
            .next_deadline()
            .map(|t| self.clock.true_time(t))
    }
}
