//! A whole cluster in one process and one thread: carries messages, I/O and time between the engines.
//!
//! Invariants:
//! - Everything that happens has a time and an order drawn from the seed; maps are ordered; the same
//!   seed and options give the same history.
//! - True time only moves forward. Engines see only their own process's clock.
//! - A frozen process executes nothing; what arrives for it waits, as in its kernel's buffers.

mod control;
mod nodes;
mod requests;
mod sessions;

use std::collections::{BTreeMap, BTreeSet};

use ashlar_platform::clock::Time;
use ashlar_platform::sim::{
    ConnectionId as NetId, End, NetworkConfig, NetworkEvent, Rng, SimNetwork,
};
use ashlar_proto::ids::{ClientId, Epoch, Incarnation, RequestId, VolumeId};
use ashlar_proto::wire::{
    Hello, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Reply, Request, RequestBody,
};
use bytes::Bytes;
use nbd_client::engine::SessionEvent;

use super::client::{Client, ClientState, Inbound};
use super::clones::{Image, ORIGIN};
use super::frame::Frame;
use super::history::History;
use super::metadata::{CLUSTER, Metadata, Shape, VOLUME, disk_id};
use super::node::{Backend, Node, NodeState};
use super::schedule::{Fault, MS};
use super::workload::Workload;

/// Host number of the first client; nodes have theirs from 1, metadata is 0.
pub const FIRST_CLIENT: u32 = 100;
/// A process looks at what happened up to this long ago at once, as a busy reactor does.
const ROUND_NS: u64 = 20_000;
/// Time for an answer of metadata before the client's process asks again.
const ASK_RETRY_NS: u64 = 700 * MS;
/// Time for a connection to be made.
const CONNECT_TIMEOUT_NS: u64 = 1_000 * MS;
/// Between two heartbeats of a node, and two looks of the repair loop.
const HEARTBEAT_NS: u64 = 250 * MS;
/// Events of a run beyond which an engine must be spinning.
const ROUNDS_MAX: u64 = 400_000;
/// Connections by which audits ask engines directly are numbered from here.
pub(super) const AUDIT: u64 = 1 << 62;

/// What happens at a time of its own.
#[derive(Debug)]
pub(super) enum Timer {
    Fault(Fault),
    Uncut(Vec<(u32, u32)>),
    StartNode {
        node: u32,
        generation: u64,
    },
    ThawNode {
        node: u32,
        generation: u64,
    },
    HealDisk {
        node: u32,
    },
    MetadataUp,
    MetadataReliable,
    NewClient {
        force: bool,
    },
    NewReader,
    FreezeReaders {
        duration: u64,
    },
    ThawClient {
        client: u32,
    },
    AskArrives {
        client: u32,
        number: u64,
    },
    Answered {
        client: u32,
        number: u64,
        event: Box<SessionEvent>,
    },
    OpenedOnce {
        client: u32,
        number: u64,
        opened_once: bool,
    },
    AskAgain {
        client: u32,
        number: u64,
    },
    ConnectTimeout {
        client: u32,
        net: NetId,
    },
    Watch {
        client: u32,
    },
    Heartbeat,
    Snapshot,
    SnapshotOver,
    Grow,
    Submit {
        client: u32,
    },
}

/// How a cluster is built.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Shape of cluster and volume.
    pub shape: Shape,
    /// The nodes' chunk store.
    pub backend: Backend,
    /// Messages pass through their bytes.
    pub use_codec: bool,
    /// Delays of the network.
    pub network: NetworkConfig,
    /// The volume is a clone (`clones`).
    pub clones: bool,
    /// Sizes that the volume grows to (`growth`), ascending.
    pub grows: Vec<u64>,
    /// A mistake for sessions to make.
    #[cfg(feature = "planted-bugs")]
    pub planted_bug: Option<nbd_client::engine::PlantedBug>,
    /// Keep a trace of everything.
    pub verbose: bool,
}

/// The cluster.
pub struct Cluster {
    pub(super) setup: Setup,
    pub(super) now: Time,
    pub(super) rng: Rng,
    pub(super) net: SimNetwork<Frame>,
    pub(super) nodes: BTreeMap<u32, Node>,
    pub(super) clients: BTreeMap<u32, Client>,
    pub(super) newest: u32,
    pub(super) metadata: Metadata,
    pub(super) metadata_down: u32,
    pub(super) metadata_lossy: Option<u64>,
    timers: BTreeMap<(Time, u64), Timer>,
    next_timer: u64,
    pub(super) cuts: BTreeMap<(u32, u32), u32>,
    pub(super) workload: Workload,
    pub(super) requests_left: u64,
    pub(super) loading: bool,
    /// Damage to data may make reads fail.
    pub(super) errors_allowed: bool,
    /// In-sync replicas that lost power since, by (group, node), and when.
    pub(super) lossy: BTreeMap<(usize, u32), Time>,
    /// Nodes of the in-sync replicas of each group, as of the last change.
    pub(super) in_sync: Vec<BTreeSet<u32>>,
    /// Every in-sync replica of some group lost power at about this time, and nobody repaired it yet.
    pub(super) total_loss: Option<Time>,
    /// Everything was flushed and nothing written since: losses take nothing.
    pub(super) everything_durable: bool,
    pub(super) audit_replies: Vec<Reply>,
    /// Blocks (chunk, layer, block) that an audit found damaged somewhere.
    pub(super) bad_blocks: BTreeSet<(u32, u32, u16)>,
    /// What the snapshot of a clone's origin shows.
    pub(super) origin: Image,
    /// Audits so far.
    pub(super) audits: u64,
    /// Times that the volume grew.
    pub(super) resizes: u64,
    rounds: u64,
    /// What the clients did.
    pub history: History,
    /// Broken rules other than those of the history.
    pub problems: Vec<String>,
    /// Lines for people.
    pub trace: Vec<String>,
}

impl Cluster {
    /// A cluster whose nodes start now; no client yet.
    pub fn new(setup: Setup, workload: Workload, requests: u64, mut rng: Rng) -> Self {
        let net = SimNetwork::new(setup.network, rng.fork(2));
        let first = if setup.clones { ORIGIN } else { VOLUME };
        let metadata = Metadata::new(setup.shape, first);
        let nodes = (1..=setup.shape.nodes)
            .map(|n| (n, Node::new(n, setup.backend, rng.fork(u64::from(n) + 10))))
            .collect();
        let mut this = Self {
            now: Time(1),
            rng,
            net,
            nodes,
            clients: BTreeMap::new(),
            newest: FIRST_CLIENT - 1,
            metadata,
            metadata_down: 0,
            metadata_lossy: None,
            timers: BTreeMap::new(),
            next_timer: 0,
            cuts: BTreeMap::new(),
            workload,
            requests_left: requests,
            loading: true,
            errors_allowed: false,
            lossy: BTreeMap::new(),
            in_sync: Vec::new(),
            total_loss: None,
            everything_durable: false,
            audit_replies: Vec::new(),
            bad_blocks: BTreeSet::new(),
            origin: Image::new(),
            audits: 0,
            resizes: 0,
            rounds: 0,
            history: History::default(),
            problems: Vec::new(),
            trace: Vec::new(),
            setup,
        };
        for number in 1..=this.setup.shape.nodes {
            this.start_node(number);
        }
        this.timer(HEARTBEAT_NS, Timer::Heartbeat);
        this
    }

    /// The time of the simulation.
    pub fn now(&self) -> Time {
        self.now
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if self.setup.verbose {
            let line = format!("[{:12.6} ms] {}", self.now.0 as f64 / 1e6, line());
            self.trace.push(line);
        }
    }

    pub(super) fn problem(&mut self, text: String) {
        self.note(|| format!("PROBLEM {text}"));
        self.problems.push(text);
    }

    pub(super) fn timer(&mut self, delay: u64, timer: Timer) {
        let key = (Time(self.now.0 + delay), self.next_timer);
        self.next_timer += 1;
        self.timers.insert(key, timer);
    }

    /// Takes faults and their ends out of the timers.
    pub(super) fn drop_fault_timers(&mut self) {
        self.timers.retain(|_, timer| {
            !matches!(
                timer,
                Timer::Fault(_)
                    | Timer::Uncut(_)
                    | Timer::StartNode { .. }
                    | Timer::ThawNode { .. }
                    | Timer::HealDisk { .. }
                    | Timer::MetadataUp
                    | Timer::MetadataReliable
                    | Timer::NewClient { .. }
                    | Timer::NewReader
                    | Timer::FreezeReaders { .. }
                    | Timer::ThawClient { .. }
            )
        });
    }

    /// Runs until a time, or until a rule is broken.
    pub fn run_until(&mut self, end: Time) {
        while self.problems.is_empty() {
            let Some(next) = self.next_time().filter(|t| *t <= end) else {
                break;
            };
            let lag = self.rng.below(ROUND_NS);
            self.now = Time(next.0.max(self.now.0) + lag);
            self.round();
            self.rounds += 1;
            if self.rounds > ROUNDS_MAX {
                self.problem(format!("more than {ROUNDS_MAX} rounds: something spins"));
            }
        }
        self.now = self.now.max(end);
    }

    fn next_time(&mut self) -> Option<Time> {
        let timer = self.timers.keys().next().map(|(time, _)| *time);
        let nodes = self.nodes.values().filter_map(Node::next_time).min();
        let clients = self.clients.values().filter_map(Client::next_time).min();
        [timer, nodes, clients, self.net.next_event()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Everything that is due now.
    fn round(&mut self) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let timer = entry.remove();
            self.on_timer(timer);
        }
        while let Some(event) = self.net.poll(self.now) {
            self.on_network(event);
        }
        for number in 1..=self.setup.shape.nodes {
            self.node_round(number);
        }
        let due: Vec<u32> = self
            .clients
            .values()
            .filter(|c| c.next_time().is_some_and(|t| t <= self.now))
            .map(|c| c.host)
            .collect();
        for host in due {
            self.session(host, SessionEvent::Tick);
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Fault(fault) => self.fault(fault),
            Timer::Uncut(routes) => self.uncut(&routes),
            Timer::StartNode { node, generation } => {
                if self
                    .nodes
                    .get(&node)
                    .is_some_and(|n| n.generation == generation)
                {
                    self.start_node(node);
                }
            }
            Timer::ThawNode { node, generation } => {
                if self
                    .nodes
                    .get(&node)
                    .is_some_and(|n| n.generation == generation)
                {
                    self.thaw_node(node);
                }
            }
            Timer::HealDisk { node } => self.heal_disk(node),
            Timer::MetadataUp => self.metadata_down = self.metadata_down.saturating_sub(1),
            Timer::MetadataReliable => self.metadata_lossy = None,
            Timer::NewClient { force } => self.new_client(force),
            Timer::NewReader => {
                self.start_client(false, true);
            }
            Timer::FreezeReaders { duration } => self.freeze_readers(duration),
            Timer::ThawClient { client } => self.thaw_client(client),
            Timer::AskArrives { client, number } => self.ask_arrives(client, number),
            Timer::OpenedOnce {
                client,
                number,
                opened_once,
            } => {
                if let Some(pending) = self
                    .clients
                    .get_mut(&client)
                    .and_then(|c| c.pending.get_mut(&number))
                {
                    pending.opened_once.get_or_insert(opened_once);
                    self.send_ask(client, number);
                }
            }
            Timer::Answered {
                client,
                number,
                event,
            } => self.answered(client, number, event),
            Timer::AskAgain { client, number } => {
                if self
                    .clients
                    .get(&client)
                    .is_some_and(|c| c.pending.contains_key(&number))
                {
                    self.send_ask(client, number);
                    self.timer(ASK_RETRY_NS, Timer::AskAgain { client, number });
                }
            }
            Timer::ConnectTimeout { client, net } => self.connect_timeout(client, net),
            Timer::Watch { client } => self.watch(client),
            Timer::Heartbeat => self.heartbeats(),
            Timer::Snapshot => self.snapshot_due(),
            Timer::SnapshotOver => self.snapshot_over(),
            Timer::Grow => self.growth_due(),
            Timer::Submit { client } => self.submit_due(client),
        }
    }

    // Network.

    fn on_network(&mut self, event: NetworkEvent<Frame>) {
        let host = event.host.0;
        if let Some(node) = self.nodes.get_mut(&host) {
            match node.state {
                NodeState::Up => self.node_network(host, event),
                NodeState::Frozen => node.inbox.push_back(event),
                NodeState::Down => {}
            }
        } else if let Some(client) = self.clients.get_mut(&host) {
            match client.state {
                ClientState::Running => self.client_network(host, event),
                ClientState::Frozen => client.inbox.push_back(Inbound::Network(Box::new(event))),
                ClientState::Dead | ClientState::Stopped(_) => {}
            }
        }
    }

    fn send(&mut self, net: NetId, end: End, frame: Frame) {
        let frame = if self.setup.use_codec {
            frame.through_codec()
        } else {
            frame
        };
        self.net.send(self.now, net, end, frame);
    }
}

/// The first message of a connection.
pub(super) fn hello(client: ClientId, disk: ashlar_proto::ids::DiskId) -> Request {
    Request {
        id: RequestId(0),
        volume: VolumeId::NIL,
        epoch: Epoch(0),
        incarnation: Incarnation(0),
        body: RequestBody::Hello(Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            cluster: CLUSTER,
            disk,
            client,
            ticket: Bytes::new(),
        }),
    }
}

/// The disk of a node by its number.
pub(super) fn disk_of(node: u32) -> ashlar_proto::ids::DiskId {
    disk_id(node)
}
