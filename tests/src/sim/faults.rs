//! What each fault of the schedule does to the cluster, and how everything is healed.

use ashlar_platform::clock::Time;
use ashlar_platform::sim::{DiskFaults, HostId};
use ashlar_proto::ids::ReplicaState;
use nbd_client::engine::SessionEvent;

use super::client::{ClientState, Inbound};
use super::cluster::{Cluster, Timer};
use super::metadata;
use super::node::NodeState;
use super::schedule::{CLIENT, Fault, MS, Schedule};

impl Cluster {
    /// Arms the faults of a schedule.
    pub(super) fn arm(&mut self, schedule: &Schedule) {
        self.errors_allowed = schedule.damages;
        for (at, fault) in &schedule.faults {
            self.timer(*at, Timer::Fault(fault.clone()));
        }
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.note(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::BreakConnections => {
                let all: Vec<_> = self.net.connections().map(|(id, _)| id).collect();
                for id in all {
                    if self.rng.coin() {
                        self.net.break_connection(self.now, id);
                    }
                }
            }
            Fault::Cut {
                from,
                to,
                both,
                duration,
            } => {
                let name = |host| if host == CLIENT { self.newest } else { host };
                let (from, to) = (name(from), name(to));
                let mut routes = vec![(from, to)];
                if both {
                    routes.push((to, from));
                }
                self.cut(routes, duration);
            }
            Fault::Isolate { node, duration } => {
                let routes = self.routes_of(node);
                self.cut(routes, duration);
            }
            Fault::Crash { node, down } => self.crash_node(node, down),
            Fault::PowerLoss {
                nodes,
                down,
                with_client,
            } => {
                for node in nodes {
                    self.power_loss(node, down);
                }
                if with_client {
                    self.crash_client(true, down / 2 + MS);
                }
            }
            Fault::Freeze { node, duration } => self.freeze_node(node, duration),
            Fault::SlowDisk {
                node,
                factor,
                duration,
            } => {
                self.disk_faults(
                    node,
                    DiskFaults {
                        slowdown: factor,
                        ..DiskFaults::NONE
                    },
                    duration,
                );
            }
            Fault::StuckDisk { node, duration } => {
                self.disk_faults(
                    node,
                    DiskFaults {
                        stuck: true,
                        ..DiskFaults::NONE
                    },
                    duration,
                );
            }
            Fault::DiskErrors { node, duration } => {
                let mut faults = DiskFaults::NONE;
                match self.rng.below(3) {
                    0 => faults.write_errors = DiskFaults::ALWAYS / 4,
                    1 => faults.sync_errors = DiskFaults::ALWAYS / 2,
                    _ => faults.read_errors = DiskFaults::ALWAYS / 4,
                }
                self.disk_faults(node, faults, duration);
            }
            Fault::BitFlips { node, count } => self.flip_bits(node, count),
            Fault::MetadataDown { duration } => {
                self.metadata_down += 1;
                self.timer(duration, Timer::MetadataUp);
            }
            Fault::MetadataLossy { one_in, duration } => {
                self.metadata_lossy = Some(one_in);
                self.timer(duration, Timer::MetadataReliable);
            }
            Fault::CrashClient {
                reopen_after,
                power,
            } => self.crash_client(power, reopen_after),
            Fault::Zombie {
                takeover_after,
                wakes_after,
            } => {
                let client = self.newest;
                if let Some(old) = self.clients.get_mut(&client)
                    && old.runs()
                {
                    old.state = ClientState::Frozen;
                    self.timer(takeover_after, Timer::NewClient { force: true });
                    self.timer(wakes_after, Timer::ThawClient { client });
                }
            }
            Fault::Takeover => self.new_client(true),
            Fault::Split {
                node,
                takeover_after,
                duration,
            } => {
                let client = self.newest;
                let mut routes = self.routes_of(client);
                routes.extend(self.routes_of(node));
                // Also the client that is to come.
                let next = self
                    .clients
                    .keys()
                    .next_back()
                    .map_or(client, |last| last + 1);
                routes.extend([(node, next), (next, node)]);
                let together = [(client, node), (node, client)];
                routes.retain(|route| !together.contains(route));
                self.cut(routes, duration);
                self.timer(takeover_after, Timer::NewClient { force: true });
            }
            Fault::Handover => self.close_newest(false),
            Fault::Readers {
                count,
                writer_after,
                frozen_for,
            } => {
                self.close_newest(true);
                for _ in 0..count {
                    let after = self.rng.between(0, 50) * MS;
                    self.timer(after, Timer::NewReader);
                }
                if frozen_for > 0 {
                    let before = self.rng.between(0, 20) * MS;
                    let after = writer_after.saturating_sub(before);
                    self.timer(
                        after,
                        Timer::FreezeReaders {
                            duration: frozen_for,
                        },
                    );
                }
                self.timer(writer_after, Timer::NewClient { force: true });
            }
        }
    }

    fn close_newest(&mut self, readers_follow: bool) {
        let host = self.newest;
        if let Some(client) = self.clients.get_mut(&host)
            && client.runs()
            && !client.closing
            && client.serving
        {
            client.closing = true;
            client.readers_follow = readers_follow;
            self.session(host, SessionEvent::Close);
        }
    }

    pub(super) fn freeze_readers(&mut self, duration: u64) {
        let readers = self.clients.values_mut().filter(|c| c.reads && c.runs());
        let hosts: Vec<u32> = readers
            .map(|client| {
                client.state = ClientState::Frozen;
                client.host
            })
            .collect();
        for client in hosts {
            self.timer(duration, Timer::ThawClient { client });
        }
    }

    fn routes_of(&self, host: u32) -> Vec<(u32, u32)> {
        let others = std::iter::once(&0)
            .chain(self.nodes.keys())
            .chain(self.clients.keys());
        let others = others.filter(|other| **other != host);
        others
            .flat_map(|&other| [(host, other), (other, host)])
            .collect()
    }

    fn cut(&mut self, routes: Vec<(u32, u32)>, duration: u64) {
        for &(from, to) in &routes {
            let count = self.cuts.entry((from, to)).or_default();
            *count += 1;
            self.net.cut(HostId(from), HostId(to));
        }
        self.timer(duration, Timer::Uncut(routes));
    }

    pub(super) fn uncut(&mut self, routes: &[(u32, u32)]) {
        for &(from, to) in routes {
            let Some(count) = self.cuts.get_mut(&(from, to)) else {
                continue;
            };
            *count -= 1;
            if *count == 0 {
                self.cuts.remove(&(from, to));
                self.net.heal(self.now, HostId(from), HostId(to));
            }
        }
        self.note(|| format!("healed {routes:?}"));
    }

    fn crash_node(&mut self, number: u32, down: u64) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        if node.state == NodeState::Down {
            return;
        }
        node.kill();
        let generation = node.generation;
        self.net.kill(self.now, HostId(number));
        self.timer(
            down,
            Timer::StartNode {
                node: number,
                generation,
            },
        );
    }

    fn power_loss(&mut self, number: u32, down: u64) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        node.lose_power();
        let generation = node.generation;
        self.net.lose_silently(HostId(number));
        self.timer(
            down,
            Timer::StartNode {
                node: number,
                generation,
            },
        );
        let volume = self.metadata.volume();
        let in_sync = volume.all_replicas().filter(|(_, r)| {
            metadata::node_of(r.disk) == number && r.state == ReplicaState::InSync
        });
        let groups: Vec<usize> = in_sync.map(|(group, _)| group).collect();
        for group in groups {
            self.lossy.entry((group, number)).or_insert(self.now);
        }
        self.look_for_total_loss();
    }

    fn freeze_node(&mut self, number: u32, duration: u64) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        if node.state == NodeState::Up {
            node.state = NodeState::Frozen;
            node.generation += 1;
            let generation = node.generation;
            self.timer(
                duration,
                Timer::ThawNode {
                    node: number,
                    generation,
                },
            );
        }
    }

    pub(super) fn thaw_node(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        if node.state != NodeState::Frozen {
            return;
        }
        node.state = NodeState::Up;
        node.generation += 1;
        let inbox = std::mem::take(&mut node.inbox);
        self.note(|| format!("n{number} goes on"));
        for event in inbox {
            self.node_network(number, event);
        }
    }

    fn disk_faults(&mut self, number: u32, faults: DiskFaults, duration: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.disk.set_faults(faults);
            self.timer(duration, Timer::HealDisk { node: number });
        }
    }

    /// The disk is well again; a daemon that gave up on it is restarted, perhaps with the machine.
    pub(super) fn heal_disk(&mut self, number: u32) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        node.disk.set_faults(DiskFaults::NONE);
        if node.failed && node.state != NodeState::Down {
            if self.rng.coin() {
                self.crash_node(number, 10 * MS);
            } else {
                self.power_loss(number, 10 * MS);
            }
        }
    }

    fn flip_bits(&mut self, number: u32, count: u32) {
        let Some(node) = self.nodes.get_mut(&number) else {
            return;
        };
        let blocks: Vec<u64> = node.disk.written_blocks().collect();
        for _ in 0..count {
            let Some(&block) = self.rng.pick(&blocks) else {
                return;
            };
            node.disk
                .flip_bit(block + self.rng.below(4096), self.rng.below(8) as u8);
        }
    }

    fn crash_client(&mut self, power: bool, reopen_after: u64) {
        let host = self.newest;
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !client.lives() {
            return;
        }
        client.state = ClientState::Dead;
        client.serving = false;
        client.pending.clear();
        client.inbox.clear();
        if power {
            self.net.lose_silently(HostId(host));
        } else {
            self.net.kill(self.now, HostId(host));
        }
        self.timer(reopen_after, Timer::NewClient { force: true });
    }

    pub(super) fn thaw_client(&mut self, host: u32) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if client.state != ClientState::Frozen {
            return;
        }
        client.state = ClientState::Running;
        let inbox = std::mem::take(&mut client.inbox);
        self.note(|| format!("k{host} goes on"));
        for inbound in inbox {
            match inbound {
                Inbound::Network(event) => self.client_network(host, *event),
                Inbound::Session(event) => self.session(host, *event),
                Inbound::Submit => self.submit_next(host),
            }
        }
    }

    /// Ends every fault and sees to it that a client is there.
    pub(super) fn heal(&mut self) {
        self.note(|| "HEAL".to_owned());
        self.drop_fault_timers();
        self.loading = false;
        self.metadata_down = 0;
        self.metadata_lossy = None;
        self.grow_up();
        self.cuts.clear();
        self.net.heal_all(self.now);
        for number in 1..=self.setup.shape.nodes {
            self.thaw_node(number);
            self.heal_disk(number);
        }
        self.drop_fault_timers();
        for number in 1..=self.setup.shape.nodes {
            self.cuts.clear();
            self.net.heal_all(self.now);
            self.start_node(number);
        }
        let clients: Vec<u32> = self.clients.keys().copied().collect();
        for host in clients {
            self.thaw_client(host);
            if self
                .clients
                .get(&host)
                .is_some_and(|c| c.reads && c.lives())
            {
                self.stop_client(host, ClientState::Dead);
            }
        }
        if !self
            .clients
            .get(&self.newest)
            .is_some_and(|c| c.runs() && !c.closing)
        {
            self.new_client(true);
        }
    }

    /// Openers race and answers get lost: whoever was granted the volume last is the client to look at.
    /// If nobody is left, one more opens it.
    pub(super) fn follow_holder(&mut self) {
        let holder = self.metadata.volume().holder.as_ref().map(|h| h.client);
        let granted = self
            .clients
            .values()
            .find(|c| Some(c.id) == holder && c.runs());
        if let Some(client) = granted {
            self.newest = client.host;
        } else if !self.clients.values().any(|c| c.runs()) {
            self.new_client(true);
        }
    }

    /// The whole cluster loses power and starts again, and a new client takes over.
    pub(super) fn power_cycle(&mut self) {
        self.note(|| "POWER CYCLE".to_owned());
        self.crash_client(true, 0);
        for number in 1..=self.setup.shape.nodes {
            self.power_loss(number, 0);
        }
        self.drop_fault_timers();
        self.cuts.clear();
        self.net.heal_all(self.now);
        for number in 1..=self.setup.shape.nodes {
            self.start_node(number);
        }
        self.new_client(true);
    }

    /// The time so many milliseconds from now.
    pub(super) fn in_ms(&self, ms: u64) -> Time {
        Time(self.now.0 + ms * MS)
    }
}
