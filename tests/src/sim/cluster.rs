//! A whole cluster in one process and one thread: carries messages, I/O and time between the engines.
//!
//! Invariants:
//! - Everything that happens has a time and an order drawn from the seed; maps are ordered; the same
//!   seed and options give the same history.
//! - True time only moves forward. Engines see only their own process's clock.
//! - A frozen process executes nothing; what arrives for it waits, as in its kernel's buffers.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_platform::clock::Time;
use ashlar_platform::disk::DiskCompletion;
use ashlar_platform::sim::{
    ConnectionId as NetId, End, HostId, NetworkConfig, NetworkEvent, NetworkEventKind, Rng,
    SimClock, SimNetwork,
};
use ashlar_proto::ids::{ClientId, Epoch, Incarnation, ReplicaState, RequestId, VolumeId};
use ashlar_proto::wire::{
    Hello, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Reply, ReplyBody, Request, RequestBody,
};
use bytes::Bytes;
use nbd_client::engine::{
    ClientError, ClientOp, ClientReply, ClientRequest, MetadataRequest, ReadSegment,
    SessionCommand, SessionEvent, StopReason,
};
use smallvec::smallvec;
use storage_daemon::engine::{ConnectionId, EngineCommand, EngineEvent};

use super::client::{Client, ClientState, Inbound, Link, LinkState, Pending};
use super::frame::Frame;
use super::history::{
    History, Kind, OperationId, Outcome, Rollback, SECTOR, Value, decode, stamped,
};
use super::metadata::{self, Ask, CLUSTER, Metadata, Shape, disk_id};
use super::node::{Backend, Node, NodeState};
use super::schedule::{Fault, MS};
use super::workload::{self, Workload};

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
    /// Audits so far.
    pub(super) audits: u64,
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
        let metadata = Metadata::new(setup.shape);
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
            audits: 0,
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

    pub(super) fn node_network(&mut self, number: u32, event: NetworkEvent<Frame>) {
        let net = event.connection;
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        let conn = ConnectionId(net.0);
        match (event.end, event.kind) {
            (End::Acceptor, NetworkEventKind::Accepted { .. }) => {
                node.accepted.insert(net);
            }
            (End::Acceptor, NetworkEventKind::Message(Frame::Request(request))) => {
                if let Some(waiting) = node.paused.get_mut(&conn) {
                    waiting.push_back(request);
                } else {
                    self.engine(number, EngineEvent::Request { conn, request });
                }
            }
            (End::Acceptor, NetworkEventKind::Closed) => {
                node.accepted.remove(&net);
                node.paused.remove(&conn);
                self.engine(number, EngineEvent::ConnClosed { conn });
            }
            (End::Connector, kind) => {
                let Some(&peer) = node.peers.get(&net) else {
                    return;
                };
                match kind {
                    NetworkEventKind::Connected => {
                        self.engine(number, EngineEvent::PeerUp { peer })
                    }
                    NetworkEventKind::Message(Frame::Reply(reply)) => {
                        self.engine(number, EngineEvent::PeerReply { peer, reply });
                    }
                    NetworkEventKind::Closed => {
                        node.peers.remove(&net);
                        self.engine(number, EngineEvent::PeerDown { peer });
                    }
                    _ => {}
                }
            }
            _ => {}
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

    // Nodes.

    fn node_round(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        if node.state != NodeState::Up {
            return;
        }
        let mut done: Vec<DiskCompletion> = Vec::new();
        node.disk.poll(self.now, &mut done);
        let due = node.next_time().is_some_and(|t| t <= self.now);
        let busy = !done.is_empty() || due;
        for completion in done {
            self.engine(number, EngineEvent::Disk(completion));
        }
        if busy || self.nodes.get(&number).is_some_and(|n| n.touched) {
            self.engine(number, EngineEvent::Tick);
            if let Some(node) = self.nodes.get_mut(&number) {
                node.touched = false;
            }
        }
    }

    pub(super) fn engine(&mut self, number: u32, event: EngineEvent) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        let Some(engine) = node.engine.as_mut() else {
            return;
        };
        let mut commands = Vec::new();
        node.touched = true;
        engine.step(node.clock.local(self.now), event, &mut commands);
        for command in commands {
            self.engine_command(number, command);
        }
    }

    fn engine_command(&mut self, number: u32, command: EngineCommand) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        match command {
            EngineCommand::Disk(command) => node.disk.submit(self.now, command),
            EngineCommand::Reply { conn, reply } if conn.0 >= AUDIT => {
                self.audit_replies.push(reply)
            }
            EngineCommand::Reply { conn, reply } => {
                let net = NetId(conn.0);
                if node.accepted.contains(&net) {
                    let frame = Frame::Reply(reply);
                    self.note(|| format!("n{number} -> c{} {}", net.0, frame.brief()));
                    self.send(net, End::Acceptor, frame);
                }
            }
            EngineCommand::Close { conn } => {
                let net = NetId(conn.0);
                node.paused.remove(&conn);
                if node.accepted.remove(&net) {
                    self.net.close(self.now, net, End::Acceptor);
                }
                self.engine(number, EngineEvent::ConnClosed { conn });
            }
            EngineCommand::Pause { conn } => {
                node.paused.entry(conn).or_default();
            }
            EngineCommand::Resume { conn } => {
                let waiting = node.paused.remove(&conn).unwrap_or_default();
                for request in waiting {
                    match self
                        .nodes
                        .get_mut(&number)
                        .and_then(|n| n.paused.get_mut(&conn))
                    {
                        Some(again) => again.push_back(request),
                        None => self.engine(number, EngineEvent::Request { conn, request }),
                    }
                }
            }
            EngineCommand::PeerConnect { peer, address } => {
                let Some(target) = metadata::node_at(&address) else {
                    return;
                };
                let net = self.net.connect(self.now, HostId(number), HostId(target));
                node.peers.insert(net, peer);
                self.note(|| format!("n{number} connects to n{target} (c{})", net.0));
            }
            EngineCommand::PeerSend { peer, request } => {
                let net = node
                    .peers
                    .iter()
                    .find(|(_, p)| **p == peer)
                    .map(|(net, _)| *net);
                if let Some(net) = net {
                    let frame = Frame::Request(request);
                    self.note(|| format!("n{number} -> c{} {}", net.0, frame.brief()));
                    self.send(net, End::Connector, frame);
                }
            }
            EngineCommand::PeerClose { peer } => {
                let net = node
                    .peers
                    .iter()
                    .find(|(_, p)| **p == peer)
                    .map(|(net, _)| *net);
                if let Some(net) = net {
                    node.peers.remove(&net);
                    self.net.close(self.now, net, End::Connector);
                }
            }
            EngineCommand::Admin { .. } | EngineCommand::Stopped => {}
            EngineCommand::Ready(identity) => {
                self.note(|| format!("n{number} ready {identity:?}"));
            }
            EngineCommand::Failed { message } => {
                node.failed = true;
                self.note(|| format!("n{number} FAILED {message}"));
                if !self.errors_allowed {
                    self.problem(format!("node {number} failed on a healthy disk: {message}"));
                }
            }
        }
    }

    pub(super) fn start_node(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        if node.state != NodeState::Down {
            return;
        }
        node.start(self.now);
        self.net.bring_up(self.now, HostId(number));
        self.note(|| format!("n{number} starts"));
        self.engine(number, EngineEvent::Tick);
    }

    fn heartbeats(&mut self) {
        self.timer(HEARTBEAT_NS, Timer::Heartbeat);
        if self.metadata_down > 0 {
            return;
        }
        for number in 1..=self.setup.shape.nodes {
            let Some(node) = self.nodes.get(&number) else {
                continue;
            };
            let cut = self.cuts.contains_key(&(number, 0));
            if node.state == NodeState::Up
                && !node.failed
                && !cut
                && let Some(incarnation) = node.incarnation()
            {
                self.metadata.heartbeat(self.now, number, incarnation);
            }
        }
        if self.metadata.repair(self.now) {
            self.metadata_changed();
        }
        let clients: Vec<u32> = self
            .clients
            .values()
            .filter(|c| c.lives())
            .map(|c| c.host)
            .collect();
        for client in clients {
            self.timer(1 + self.now.0 % MS, Timer::Watch { client });
        }
    }

    // Metadata.

    /// The volume changed: watchers hear of it, and lossy replicas that are not in sync any more do not
    /// count.
    fn metadata_changed(&mut self) {
        let volume = self.metadata.volume();
        let summary: Vec<Vec<(u8, ReplicaState)>> = volume
            .groups
            .iter()
            .map(|g| g.iter().map(|r| (r.disk.0[15], r.state)).collect())
            .collect();
        let (epoch, holder) = (volume.epoch, volume.holder.as_ref().map(|h| h.client));
        self.note(|| format!("metadata: epoch {} holder {holder:?} {summary:?}", epoch.0));
        self.forget_excluded(&summary);
        self.look_for_total_loss();
        let clients: Vec<u32> = self
            .clients
            .values()
            .filter(|c| c.lives())
            .map(|c| c.host)
            .collect();
        for client in clients {
            let delay = self.rng.between(MS / 10, 5 * MS);
            self.timer(delay, Timer::Watch { client });
        }
    }

    /// Lossy replicas that are not in sync any more do not count. An exclusion alone never makes a loss
    /// total: R4 flushes a replica that remains first.
    fn forget_excluded(&mut self, summary: &[Vec<(u8, ReplicaState)>]) {
        let lossy_before: Vec<bool> = self
            .in_sync
            .iter()
            .enumerate()
            .map(|(g, nodes)| nodes.iter().all(|n| self.lossy.contains_key(&(g, *n))))
            .collect();
        self.in_sync = summary
            .iter()
            .map(|group| {
                let in_sync = group.iter().filter(|(_, s)| *s == ReplicaState::InSync);
                in_sync.map(|(n, _)| u32::from(*n)).collect()
            })
            .collect();
        for (g, nodes) in self.in_sync.iter().enumerate() {
            let all = nodes.iter().all(|n| self.lossy.contains_key(&(g, *n)));
            let excluded_only = all && lossy_before.get(g) == Some(&false);
            self.lossy
                .retain(|(group, node), _| *group != g || (nodes.contains(node) && !excluded_only));
        }
    }

    /// Whether every in-sync replica of some group has lost power since it was known good.
    pub(super) fn look_for_total_loss(&mut self) {
        let volume = self.metadata.volume();
        for (index, group) in volume.groups.iter().enumerate() {
            let in_sync = group.iter().filter(|r| r.state == ReplicaState::InSync);
            let times: Option<Vec<Time>> = in_sync
                .map(|r| self.lossy.get(&(index, metadata::node_of(r.disk))).copied())
                .collect();
            if let Some(first) = times.and_then(|t| t.into_iter().min()) {
                let known = self.total_loss.unwrap_or(first);
                self.total_loss = Some(known.min(first));
            }
        }
    }

    /// A client serves, or a flush failed: what a total loss took is gone from now on.
    fn settle_total_loss(&mut self) {
        if let Some(from) = self.total_loss.take() {
            self.lossy.clear();
            if !self.everything_durable {
                self.note(|| "unflushed writes may be gone".to_owned());
                self.history.rollbacks.push(Rollback {
                    from,
                    until: self.now,
                });
            }
        }
    }

    fn ask(&mut self, host: u32, request: MetadataRequest) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let number = client.next_ask;
        client.next_ask += 1;
        let ask = Ask {
            client: client.id,
            number,
            request,
            force: client.force,
        };
        self.note(|| format!("k{host} asks metadata {:?}", ask.request));
        if let Some(client) = self.clients.get_mut(&host) {
            client.pending.insert(
                number,
                Pending {
                    ask,
                    opened_once: None,
                },
            );
        }
        self.send_ask(host, number);
        self.timer(
            ASK_RETRY_NS,
            Timer::AskAgain {
                client: host,
                number,
            },
        );
    }

    fn send_ask(&mut self, client: u32, number: u64) {
        let frozen = !self.clients.get(&client).is_some_and(Client::runs);
        if frozen || self.metadata_drops(client, 0) {
            return;
        }
        let delay = self.rng.between(MS / 5, 8 * MS);
        self.timer(delay, Timer::AskArrives { client, number });
    }

    fn metadata_drops(&mut self, from: u32, to: u32) -> bool {
        let lossy = self
            .metadata_lossy
            .is_some_and(|one_in| self.rng.chance(1, one_in));
        lossy || self.cuts.contains_key(&(from, to))
    }

    fn ask_arrives(&mut self, client: u32, number: u64) {
        if self.metadata_down > 0 {
            return;
        }
        let Some(pending) = self
            .clients
            .get(&client)
            .and_then(|c| c.pending.get(&number))
        else {
            return;
        };
        let pending = pending.clone();
        let opening = pending.ask.request == MetadataRequest::Open;
        let delay = self.rng.between(MS / 5, 8 * MS);
        if let (true, None) = (opening, pending.opened_once) {
            let opened_once = self.metadata.volume().opened_once;
            if !self.metadata_drops(0, client) {
                self.timer(
                    delay,
                    Timer::OpenedOnce {
                        client,
                        number,
                        opened_once,
                    },
                );
            }
            return;
        }
        if pending.ask.request == MetadataRequest::Join && self.metadata.volume().holder.is_some() {
            // As the real process does: it asks again until nobody holds the volume.
            return;
        }
        let before = self.metadata.volume().revision;
        let opened_once = pending.opened_once.unwrap_or(true);
        let event = self.metadata.answer(self.now, &pending.ask, opened_once);
        if self.metadata.volume().revision != before {
            self.metadata_changed();
        }
        if !self.metadata_drops(0, client) {
            self.timer(
                delay,
                Timer::Answered {
                    client,
                    number,
                    event: Box::new(event),
                },
            );
        }
    }

    fn answered(&mut self, host: u32, number: u64, event: Box<SessionEvent>) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !client.lives() || client.pending.remove(&number).is_none() {
            return;
        }
        if let SessionEvent::Granted { .. } = *event {
            client.granted = true;
        }
        match client.state {
            ClientState::Frozen => client.inbox.push_back(Inbound::Session(event)),
            _ => self.session(host, *event),
        }
    }

    fn watch(&mut self, host: u32) {
        let revision = self.metadata.volume().revision;
        let reachable = self.metadata_down == 0 && !self.cuts.contains_key(&(0, host));
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !reachable || !client.granted || !client.lives() || client.revision >= revision {
            return;
        }
        client.revision = revision;
        let event = Box::new(SessionEvent::ConfigChanged(Box::new(
            self.metadata.view(self.now),
        )));
        match client.state {
            ClientState::Frozen => client.inbox.push_back(Inbound::Session(event)),
            _ => self.session(host, *event),
        }
    }

    // Clients.

    /// Starts a client process that opens the volume.
    pub(super) fn new_client(&mut self, force: bool) {
        self.newest = self.start_client(force, false);
    }

    /// Starts a client process; its host number.
    fn start_client(&mut self, force: bool, reads: bool) -> u32 {
        let last = self.clients.keys().next_back();
        let host = last.map_or(FIRST_CLIENT, |last| last + 1);
        let mut config = Client::config(host);
        config.read_only = reads;
        #[cfg(feature = "planted-bugs")]
        {
            config.planted_bug = self.setup.planted_bug;
        }
        let drift = self.rng.between(0, 400) as i32 - 200;
        let clock = SimClock::new(self.rng.below(1 << 40), drift);
        self.clients
            .insert(host, Client::new(host, force, config, clock, self.now));
        self.note(|| format!("k{host} starts, force {force}, reads {reads}"));
        self.session(host, SessionEvent::Start);
        host
    }

    pub(super) fn session(&mut self, host: u32, event: SessionEvent) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !client.runs() {
            return;
        }
        let mut commands = Vec::new();
        client
            .session
            .step(client.clock.local(self.now), event, &mut commands);
        for command in commands {
            self.session_command(host, command);
        }
    }

    fn session_command(&mut self, host: u32, command: SessionCommand) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if let ClientState::Stopped(_) = client.state {
            return self.problem(format!("client {host} goes on after Stopped: {command:?}"));
        }
        match command {
            SessionCommand::Connect { disk, address } => {
                self.unlink(host, disk);
                let Some(target) = metadata::node_at(&address) else {
                    return;
                };
                let net = self.net.connect(self.now, HostId(host), HostId(target));
                self.note(|| format!("k{host} connects to n{target} (c{})", net.0));
                if let Some(client) = self.clients.get_mut(&host) {
                    client.links.insert(
                        disk,
                        Link {
                            net,
                            state: LinkState::Connecting,
                        },
                    );
                    client.disks.insert(net, disk);
                }
                self.timer(
                    CONNECT_TIMEOUT_NS,
                    Timer::ConnectTimeout { client: host, net },
                );
            }
            SessionCommand::Disconnect { disk } => self.unlink(host, disk),
            SessionCommand::Send { disk, request } => {
                let link = client.links.get(&disk).copied();
                if let Some(link) = link.filter(|l| l.state == LinkState::Up) {
                    let frame = Frame::Request(request);
                    self.note(|| {
                        format!(
                            "k{host} -> n{} c{} {}",
                            metadata::node_of(disk),
                            link.net.0,
                            frame.brief()
                        )
                    });
                    self.send(link.net, End::Connector, frame);
                }
            }
            SessionCommand::Metadata(request) => self.ask(host, request),
            SessionCommand::Reply { tag, result } => self.reply(host, tag, result),
            SessionCommand::Serving { size_bytes } => {
                client.serving = true;
                let expected = self.setup.shape.size_bytes;
                if size_bytes != expected {
                    self.problem(format!(
                        "client {host} serves {size_bytes} bytes instead of {expected}"
                    ));
                }
                self.note(|| format!("k{host} SERVES"));
                self.history.serving.push((host, self.now));
                self.settle_total_loss();
                for _ in 0..self.workload.depth {
                    self.arm_submit(host);
                }
            }
            SessionCommand::Resized { .. } => {}
            SessionCommand::Stopped { reason } => {
                self.note(|| format!("k{host} STOPS {reason:?}"));
                self.stop_client(host, ClientState::Stopped(reason));
            }
        }
    }

    pub(super) fn stop_client(&mut self, host: u32, state: ClientState) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let closed = client.closing && state == ClientState::Stopped(StopReason::Closed);
        if closed && !client.readers_follow && self.loading {
            self.timer(MS, Timer::NewClient { force: false });
        }
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        client.state = state;
        client.serving = false;
        client.pending.clear();
        for disk in client.links.keys().copied().collect::<Vec<_>>() {
            self.unlink(host, disk);
        }
    }

    fn unlink(&mut self, host: u32, disk: ashlar_proto::ids::DiskId) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if let Some(link) = client.links.remove(&disk) {
            client.disks.remove(&link.net);
            self.net.close(self.now, link.net, End::Connector);
        }
    }

    fn connect_timeout(&mut self, host: u32, net: NetId) {
        let Some(client) = self.clients.get(&host) else {
            return;
        };
        let Some(&disk) = client.disks.get(&net) else {
            return;
        };
        if client.runs()
            && client
                .links
                .get(&disk)
                .is_some_and(|l| l.state != LinkState::Up)
        {
            self.unlink(host, disk);
            self.session(host, SessionEvent::ReplicaDown { disk });
        }
    }

    pub(super) fn client_network(&mut self, host: u32, event: NetworkEvent<Frame>) {
        let net = event.connection;
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let Some(&disk) = client.disks.get(&net) else {
            return;
        };
        let Some(link) = client.links.get_mut(&disk) else {
            return;
        };
        match event.kind {
            NetworkEventKind::Connected => {
                link.state = LinkState::Greeting;
                let hello = hello(client.id, disk);
                self.send(net, End::Connector, Frame::Request(hello));
            }
            NetworkEventKind::Message(Frame::Reply(reply)) if link.state == LinkState::Greeting => {
                if matches!(reply.result, Ok(ReplyBody::Hello(_))) {
                    link.state = LinkState::Up;
                    self.session(host, SessionEvent::ReplicaUp { disk });
                } else {
                    self.unlink(host, disk);
                    self.session(host, SessionEvent::ReplicaDown { disk });
                }
            }
            NetworkEventKind::Message(Frame::Reply(reply)) => {
                self.session(host, SessionEvent::Reply { disk, reply });
            }
            NetworkEventKind::Closed => {
                client.links.remove(&disk);
                client.disks.remove(&net);
                self.note(|| format!("k{host} lost n{} (c{})", metadata::node_of(disk), net.0));
                self.session(host, SessionEvent::ReplicaDown { disk });
            }
            NetworkEventKind::Accepted { .. } | NetworkEventKind::Message(Frame::Request(_)) => {}
        }
    }

    // The user's requests.

    fn arm_submit(&mut self, client: u32) {
        let delay = self.rng.between(1, self.workload.think_ns.max(1));
        // Many requests at once matter more than even spacing.
        let delay = if self.rng.chance(2, 5) {
            1 + delay / 1000
        } else {
            delay
        };
        self.timer(delay, Timer::Submit { client });
    }

    fn submit_due(&mut self, host: u32) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if client.state == ClientState::Frozen {
            client.inbox.push_back(Inbound::Submit);
        } else if client.runs() {
            self.submit_next(host);
        }
    }

    pub(super) fn submit_next(&mut self, host: u32) {
        let Some(client) = self.clients.get(&host) else {
            return;
        };
        if !self.loading || self.requests_left == 0 || client.closing {
            return;
        }
        if !client.session.accepting() {
            return self.timer(5 * MS, Timer::Submit { client: host });
        }
        self.requests_left -= 1;
        let reads = client.reads;
        let mut request = self.workload.next(&mut self.rng);
        if reads {
            request.kind = Kind::Read;
            request.fua = false;
            if request.count == 0 {
                (request.first, request.count) = (0, 8);
            }
        }
        self.submit(host, request);
    }

    /// Gives a request to a client's session.
    pub(super) fn submit(&mut self, host: u32, request: workload::Request) -> OperationId {
        let workload::Request {
            kind,
            trim,
            first,
            count,
            fua,
        } = request;
        let covered = match (kind, trim) {
            (Kind::Zero, true) => workload::whole_blocks(first, count),
            _ => (first, count),
        };
        let id = self
            .history
            .begin(host, kind, covered.0, covered.1, fua, self.now);
        let (offset, length) = (first * SECTOR as u64, count * SECTOR as u64);
        let op = match kind {
            Kind::Read => ClientOp::Read {
                offset,
                length: length as u32,
            },
            Kind::Flush => ClientOp::Flush,
            Kind::Zero if trim => ClientOp::Trim {
                offset,
                length,
                fua,
            },
            Kind::Zero => ClientOp::WriteZeroes {
                offset,
                length,
                fua,
            },
            Kind::Write => {
                let bytes = Bytes::from(stamped(id, first, count));
                // Sometimes in two pieces, as it arrives from a socket.
                let cut = if self.rng.chance(1, 4) {
                    self.rng.index(bytes.len())
                } else {
                    0
                };
                let data = match cut {
                    0 => smallvec![bytes],
                    cut => smallvec![bytes.slice(..cut), bytes.slice(cut..)],
                };
                ClientOp::Write { offset, data, fua }
            }
        };
        self.note(|| {
            format!(
                "k{host} #{} {kind:?} {first}+{count} fua {fua} trim {trim}",
                id.0
            )
        });
        let tag = u64::from(id.0);
        if let Some(client) = self.clients.get_mut(&host) {
            client.in_flight.insert(tag, id);
        }
        self.session(host, SessionEvent::Client(ClientRequest { tag, op }));
        id
    }

    fn reply(&mut self, host: u32, tag: u64, result: Result<ClientReply, ClientError>) {
        let now = self.now;
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let Some(id) = client.in_flight.remove(&tag) else {
            return self.problem(format!(
                "client {host} answered #{tag}, which is not in flight"
            ));
        };
        self.note(|| match &result {
            Ok(_) => format!("k{host} #{tag} done"),
            Err(error) => format!("k{host} #{tag} FAILED {error:?}"),
        });
        let Some(operation) = self.history.operations.get_mut(id.0 as usize) else {
            return;
        };
        let kind = operation.kind;
        match result {
            Ok(ClientReply::Data(segments)) => {
                operation.outcome = Outcome::Done(now);
                let bytes = joined(&segments);
                if bytes.len() != operation.count as usize * SECTOR {
                    return self.problem(format!("#{tag} returned {} bytes", bytes.len()));
                }
                let sectors = (operation.first..).zip(bytes.chunks(SECTOR));
                operation.values = sectors
                    .map(|(sector, b)| decode(sector, b))
                    .collect::<Vec<Value>>();
            }
            Ok(_) => {
                operation.outcome = Outcome::Done(now);
                let start = operation.start;
                let holder = self.metadata.volume().holder.as_ref().map(|h| h.client);
                let holds = self.clients.get(&host).map(|c| c.id) == holder;
                if kind == Kind::Flush && holds && self.total_loss.is_some_and(|loss| loss < start)
                {
                    // The living holder replayed what was lost: nothing is gone.
                    self.total_loss = None;
                    self.lossy.clear();
                }
            }
            Err(error) => {
                operation.outcome = Outcome::Failed(now);
                let excused = match (error, kind) {
                    (ClientError::Io, Kind::Flush) => self.total_loss.is_some(),
                    (ClientError::Io, _) => self.errors_allowed,
                    _ => false,
                };
                if kind == Kind::Flush && excused {
                    self.settle_total_loss();
                } else if !excused {
                    return self.problem(format!("#{tag} {kind:?} failed: {error}"));
                }
            }
        }
        self.arm_submit(host);
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

fn joined(segments: &[ReadSegment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            ReadSegment::Data(data) => bytes.extend_from_slice(data),
            ReadSegment::Zeroes(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    bytes
}
