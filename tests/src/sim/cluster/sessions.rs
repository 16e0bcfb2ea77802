//! Client processes: their sessions, what these command, their connections to the nodes.
//!
//! Invariant: a session that said Stopped is never stepped again; that it commands something after it is a problem.

use ashlar_platform::sim::{
    ConnectionId as NetId, End, HostId, NetworkEvent, NetworkEventKind, SimClock,
};
use ashlar_proto::wire::ReplyBody;
use nbd_client::engine::{SessionCommand, SessionEvent, StopReason};

use super::super::client::{Client, ClientState, Link, LinkState};
use super::super::frame::Frame;
use super::super::metadata;
use super::super::schedule::MS;
use super::{CONNECT_TIMEOUT_NS, Cluster, FIRST_CLIENT, Timer, hello};

impl Cluster {
    /// Starts a client process that opens the volume.
    pub(in crate::sim) fn new_client(&mut self, force: bool) {
        self.newest = self.start_client(force, false);
    }

    /// Starts a client process; its host number.
    pub(super) fn start_client(&mut self, force: bool, reads: bool) -> u32 {
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

    pub(in crate::sim) fn session(&mut self, host: u32, event: SessionEvent) {
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
                self.size_told(host, size_bytes);
                self.note(|| format!("k{host} SERVES"));
                self.history.serving.push((host, self.now));
                self.settle_total_loss();
                for _ in 0..self.workload.depth {
                    self.arm_submit(host);
                }
            }
            SessionCommand::Resized { size_bytes } => self.size_told(host, size_bytes),
            SessionCommand::Stopped { reason } => {
                self.note(|| format!("k{host} STOPS {reason:?}"));
                self.stop_client(host, ClientState::Stopped(reason));
            }
        }
    }

    pub(in crate::sim) fn stop_client(&mut self, host: u32, state: ClientState) {
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

    pub(super) fn connect_timeout(&mut self, host: u32, net: NetId) {
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

    pub(in crate::sim) fn client_network(&mut self, host: u32, event: NetworkEvent<Frame>) {
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
}
