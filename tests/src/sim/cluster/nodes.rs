//! Storage nodes: their turns, what their engines command, their heartbeats.

use ashlar_platform::disk::DiskCompletion;
use ashlar_platform::sim::{ConnectionId as NetId, End, HostId, NetworkEvent, NetworkEventKind};
use storage_daemon::engine::{AdminReply, AdminRequest, ConnectionId, EngineCommand, EngineEvent};

use super::super::clones;
use super::super::frame::Frame;
use super::super::metadata;
use super::super::node::NodeState;
use super::super::schedule::MS;
use super::{AUDIT, Cluster, HEARTBEAT_NS, Timer};

impl Cluster {
    pub(in crate::sim) fn node_network(&mut self, number: u32, event: NetworkEvent<Frame>) {
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

    pub(super) fn node_round(&mut self, number: u32) {
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

    pub(in crate::sim) fn engine(&mut self, number: u32, event: EngineEvent) {
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
            EngineCommand::Admin {
                tag,
                reply: AdminReply::LayersKept,
            } => node.layers = node.layers.max(tag),
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

    pub(in crate::sim) fn start_node(&mut self, number: u32) {
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

    /// What metadata answers to a heartbeat: a newer layer list (S6).
    fn send_layers(&mut self, number: u32) {
        let volume = self.metadata.volume();
        let (tag, layers) = (volume.layers.revision, volume.layers.clone());
        let request = AdminRequest::PutLayers {
            volume: volume.id,
            layers,
        };
        self.engine(number, EngineEvent::Admin { tag, request });
    }

    /// Whether every replica keeps the newest layer list.
    pub(in crate::sim) fn layers_are_known(&self) -> bool {
        let newest = self.metadata.volume().layers.revision;
        let disks = self.metadata.volume().disks();
        let mut nodes = disks.iter().map(|d| self.nodes.get(&metadata::node_of(*d)));
        nodes.all(|n| n.is_some_and(|n| n.layers >= newest))
    }

    pub(super) fn heartbeats(&mut self) {
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
                let behind = node.layers < self.metadata.volume().layers.revision;
                self.metadata.heartbeat(self.now, number, incarnation);
                // Answers are late, or lost.
                if behind && self.rng.chance(2, 3) {
                    self.send_layers(number);
                }
                clones::order_flatten(self, number);
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
}
