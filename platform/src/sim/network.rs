//! A simulated network of stream connections between processes, carrying messages as values.
//!
//! Like TCP: messages of one direction of a connection arrive in order and each once, or the connection
//! breaks and both ends learn it (unless they cannot hear of it). There is no loss, duplication or
//! reordering within a connection; between connections everything may be reordered by delays.
//!
//! - A cut direction (one-way or both) holds messages back; after it heals they arrive late, in order,
//!   unless the connection broke meanwhile.
//! - A killed process's connections are reset: the peers learn it after a delay, if they can be reached.
//! - A silently lost process (power loss) tells nobody and answers nothing; once it is up again, peers
//!   that still send, or had sent meanwhile, get a reset.
//! - A frozen process (SIGSTOP) is the caller's business: it simply does not take its events.
//!
//! Invariant: one seed and one sequence of calls give one sequence of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};

use super::rng::Rng;
use crate::clock::Time;

/// A process of the simulation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct HostId(pub u32);

/// A connection; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct ConnectionId(pub u64);

/// An end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum End {
    /// The one that connected.
    Connector,
    /// The one that accepted.
    Acceptor,
}

impl End {
    /// The opposite end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Connector => Self::Acceptor,
            Self::Acceptor => Self::Connector,
        }
    }
}

/// Delays.
#[derive(Clone, Copy, Debug)]
pub struct NetworkConfig {
    /// Shortest one-way delay.
    pub latency_ns: u64,
    /// Up to this much more, at random.
    pub jitter_ns: u64,
    /// One message of so many is delayed by up to `spike_ns`; 0 for none.
    pub spike_one_in: u64,
    /// Longest spike.
    pub spike_ns: u64,
}

/// What happens at an end of a connection.
#[derive(Debug)]
pub enum NetworkEventKind<M> {
    /// The connect succeeded (at the connector).
    Connected,
    /// Somebody connected (at the acceptor).
    Accepted {
        /// Who.
        from: HostId,
    },
    /// A message arrived.
    Message(M),
    /// The connection is gone, or could not be made.
    Closed,
}

/// An event for one process.
#[derive(Debug)]
pub struct NetworkEvent<M> {
    /// Whose event.
    pub host: HostId,
    /// Which connection.
    pub connection: ConnectionId,
    /// Which end of it this is.
    pub end: End,
    /// What happened.
    pub kind: NetworkEventKind<M>,
}

#[derive(Debug)]
enum InTransit<M> {
    Syn,
    SynAck,
    Message(M),
    Close,
}

#[derive(Debug)]
struct Direction<M> {
    queue: VecDeque<(Time, InTransit<M>)>,
    last: Time,
}

#[derive(Debug)]
struct Connection<M> {
    hosts: [HostId; 2],
    /// Messages towards the connector and towards the acceptor.
    towards: [Direction<M>; 2],
    /// Whether each end still has the connection open.
    open: [bool; 2],
    /// Something was sent to a host without power: its sender repeats it until the host is back.
    unheard: bool,
}

fn slot(end: End) -> usize {
    match end {
        End::Connector => 0,
        End::Acceptor => 1,
    }
}

/// The network. `M` is a message as a value.
#[derive(Debug)]
pub struct SimNetwork<M> {
    config: NetworkConfig,
    rng: Rng,
    connections: BTreeMap<ConnectionId, Connection<M>>,
    next_connection: u64,
    /// One entry per message in transit; stale ones (the connection is gone) are skipped.
    due: BinaryHeap<Reverse<(Time, u64, ConnectionId, End)>>,
    next_serial: u64,
    cut: BTreeSet<(HostId, HostId)>,
    down: BTreeSet<HostId>,
    silent: BTreeSet<HostId>,
}

impl<M> SimNetwork<M> {
    /// A network without connections, where every host is up.
    pub fn new(config: NetworkConfig, rng: Rng) -> Self {
        Self {
            config,
            rng,
            connections: BTreeMap::new(),
            next_connection: 1,
            due: BinaryHeap::new(),
            next_serial: 0,
            cut: BTreeSet::new(),
            down: BTreeSet::new(),
            silent: BTreeSet::new(),
        }
    }

    /// Starts to connect; `Connected` or `Closed` follows, at the target `Accepted` first.
    pub fn connect(&mut self, now: Time, from: HostId, to: HostId) -> ConnectionId {
        let id = ConnectionId(self.next_connection);
        self.next_connection += 1;
        let direction = || Direction {
            queue: VecDeque::new(),
            last: now,
        };
        let connection = Connection {
            hosts: [from, to],
            towards: [direction(), direction()],
            open: [true, false],
            unheard: false,
        };
        self.connections.insert(id, connection);
        self.transmit(now, id, End::Acceptor, InTransit::Syn);
        id
    }

    /// Sends a message from an end; without effect if that end is closed.
    pub fn send(&mut self, now: Time, id: ConnectionId, from: End, message: M) {
        if self
            .connections
            .get(&id)
            .is_some_and(|c| c.open[slot(from)])
        {
            self.transmit(now, id, from.other(), InTransit::Message(message));
        }
    }

    /// Closes a connection from an end, which hears no more of it; the other end gets what was sent
    /// before, then `Closed`.
    pub fn close(&mut self, now: Time, id: ConnectionId, from: End) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if !std::mem::replace(&mut connection.open[slot(from)], false) {
            return;
        }
        connection.towards[slot(from)].queue.clear();
        self.transmit(now, id, from.other(), InTransit::Close);
    }

    /// Breaks a connection: messages in transit are lost, both ends learn it after a delay.
    pub fn break_connection(&mut self, now: Time, id: ConnectionId) {
        for end in [End::Connector, End::Acceptor] {
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let direction = &mut connection.towards[slot(end)];
            direction.queue.clear();
            direction.last = now;
            if connection.open[slot(end)] {
                self.transmit(now, id, end, InTransit::Close);
            } else {
                // A connect that had not arrived yet.
                self.forget_if_done(id);
            }
        }
    }

    /// Connections that exist, ascending, with their two hosts (connector first).
    pub fn connections(&self) -> impl Iterator<Item = (ConnectionId, [HostId; 2])> + '_ {
        self.connections.iter().map(|(id, c)| (*id, c.hosts))
    }

    /// Cuts one direction.
    pub fn cut(&mut self, from: HostId, to: HostId) {
        self.cut.insert((from, to));
    }

    /// Whether a direction is cut.
    pub fn is_cut(&self, from: HostId, to: HostId) -> bool {
        self.cut.contains(&(from, to))
    }

    /// Heals one direction: what was held back is delivered from `now` on.
    pub fn heal(&mut self, now: Time, from: HostId, to: HostId) {
        if self.cut.remove(&(from, to)) {
            self.reschedule(now);
        }
    }

    /// Heals everything.
    pub fn heal_all(&mut self, now: Time) {
        self.cut.clear();
        self.reschedule(now);
    }

    /// A process died and its kernel resets its connections.
    pub fn kill(&mut self, now: Time, host: HostId) {
        self.down.insert(host);
        for id in self.ids_of(host) {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            let end = if connection.hosts[0] == host {
                End::Connector
            } else {
                End::Acceptor
            };
            connection.towards[slot(end)].queue.clear();
            connection.open[slot(end)] = false;
            // The reset may overtake data.
            if self.rng.coin() {
                connection.towards[slot(end.other())].queue.clear();
            }
            self.transmit(now, id, end.other(), InTransit::Close);
        }
    }

    /// A machine vanished: nobody is told. What it had sent may still arrive.
    pub fn lose_silently(&mut self, host: HostId) {
        self.down.insert(host);
        self.silent.insert(host);
        for id in self.ids_of(host) {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            let end = if connection.hosts[0] == host { 0 } else { 1 };
            connection.open[end] = false;
            connection.unheard |= !connection.towards[end].queue.is_empty();
            connection.towards[end].queue.clear();
        }
    }

    /// A process listens (again). Who sent to it while it was without power gets a reset now.
    pub fn bring_up(&mut self, now: Time, host: HostId) {
        self.down.remove(&host);
        if !self.silent.remove(&host) {
            return;
        }
        for id in self.ids_of(host) {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            let (end, mine) = match connection.hosts[0] == host {
                true => (End::Connector, 0),
                false => (End::Acceptor, 1),
            };
            if std::mem::take(&mut connection.unheard) && !connection.open[mine] {
                self.transmit(now, id, end.other(), InTransit::Close);
            }
        }
    }

    /// When the next event happens.
    pub fn next_event(&mut self) -> Option<Time> {
        loop {
            let Reverse((time, _, id, end)) = *self.due.peek()?;
            if self.is_current(time, id, end) {
                return Some(time);
            }
            self.due.pop();
        }
    }

    /// The next event that is due at `now`.
    pub fn poll(&mut self, now: Time) -> Option<NetworkEvent<M>> {
        while self.next_event()? <= now {
            let Reverse((_, _, id, end)) = self.due.pop()?;
            let connection = self.connections.get_mut(&id)?;
            let (host, peer) = (
                connection.hosts[slot(end)],
                connection.hosts[slot(end.other())],
            );
            let Some((_, item)) = connection.towards[slot(end)].queue.pop_front() else {
                continue;
            };
            self.schedule_front(now, id, end);
            if let Some(kind) = self.arrive(now, id, end, host, peer, item) {
                return Some(NetworkEvent {
                    host,
                    connection: id,
                    end,
                    kind,
                });
            }
        }
        None
    }

    fn arrive(
        &mut self,
        now: Time,
        id: ConnectionId,
        end: End,
        host: HostId,
        peer: HostId,
        item: InTransit<M>,
    ) -> Option<NetworkEventKind<M>> {
        let is_down = self.down.contains(&host);
        let connection = self.connections.get_mut(&id)?;
        if self.silent.contains(&host) && !matches!(item, InTransit::Close) {
            connection.unheard = true;
            return None;
        }
        let open = &mut connection.open;
        match item {
            InTransit::Syn if is_down => {
                self.transmit(now, id, end.other(), InTransit::Close);
                None
            }
            InTransit::Syn => {
                open[slot(end)] = true;
                self.transmit(now, id, end.other(), InTransit::SynAck);
                Some(NetworkEventKind::Accepted { from: peer })
            }
            InTransit::Close => {
                let was_open = std::mem::replace(&mut open[slot(end)], false);
                self.forget_if_done(id);
                was_open.then_some(NetworkEventKind::Closed)
            }
            InTransit::SynAck | InTransit::Message(_) if !open[slot(end)] => {
                // A reset, if there is somebody to send it.
                if !is_down && open[slot(end.other())] {
                    self.transmit(now, id, end.other(), InTransit::Close);
                }
                self.forget_if_done(id);
                None
            }
            InTransit::SynAck => Some(NetworkEventKind::Connected),
            InTransit::Message(message) => Some(NetworkEventKind::Message(message)),
        }
    }

    fn forget_if_done(&mut self, id: ConnectionId) {
        if self.connections.get(&id).is_some_and(|c| {
            c.open == [false, false] && c.towards.iter().all(|d| d.queue.is_empty())
        }) {
            self.connections.remove(&id);
        }
    }

    fn ids_of(&self, host: HostId) -> Vec<ConnectionId> {
        let ids = self
            .connections
            .iter()
            .filter(|(_, c)| c.hosts.contains(&host));
        ids.map(|(id, _)| *id).collect()
    }

    fn transmit(&mut self, now: Time, id: ConnectionId, to: End, item: InTransit<M>) {
        let mut delay = self.config.latency_ns + self.rng.between(0, self.config.jitter_ns);
        let spike = self.config.spike_one_in;
        if spike > 0 && self.rng.chance(1, spike) {
            delay += self.rng.between(0, self.config.spike_ns);
        }
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let direction = &mut connection.towards[slot(to)];
        let time = Time((now.0 + delay.max(1)).max(direction.last.0));
        direction.last = time;
        direction.queue.push_back((time, item));
        if direction.queue.len() == 1 {
            self.schedule_front(now, id, to);
        }
    }

    /// Puts the first message of a direction onto the heap, unless the direction is cut.
    fn schedule_front(&mut self, now: Time, id: ConnectionId, to: End) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let route = (
            connection.hosts[slot(to.other())],
            connection.hosts[slot(to)],
        );
        if self.cut.contains(&route) {
            return;
        }
        let Some((time, _)) = connection.towards[slot(to)].queue.front_mut() else {
            return;
        };
        *time = (*time).max(now);
        self.due.push(Reverse((*time, self.next_serial, id, to)));
        self.next_serial += 1;
    }

    fn is_current(&self, time: Time, id: ConnectionId, end: End) -> bool {
        self.connections.get(&id).is_some_and(|c| {
            let route = (c.hosts[slot(end.other())], c.hosts[slot(end)]);
            let front = c.towards[slot(end)].queue.front();
            front.is_some_and(|(due, _)| *due == time) && !self.cut.contains(&route)
        })
    }

    fn reschedule(&mut self, now: Time) {
        let all: Vec<_> = self.connections.keys().copied().collect();
        self.due.clear();
        for id in all {
            self.schedule_front(now, id, End::Connector);
            self.schedule_front(now, id, End::Acceptor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId(1);
    const B: HostId = HostId(2);

    fn network(seed: u64) -> SimNetwork<u32> {
        let config = NetworkConfig {
            latency_ns: 1000,
            jitter_ns: 50_000,
            spike_one_in: 10,
            spike_ns: 1_000_000,
        };
        SimNetwork::new(config, Rng::new(seed))
    }

    /// Everything that happens up to a time, as text.
    fn drain(network: &mut SimNetwork<u32>, until: u64) -> Vec<String> {
        let mut seen = Vec::new();
        while let Some(time) = network.next_event().filter(|t| t.0 <= until) {
            let Some(event) = network.poll(time) else {
                continue;
            };
            let what = match event.kind {
                NetworkEventKind::Connected => "connected".to_owned(),
                NetworkEventKind::Accepted { from } => format!("accepted {}", from.0),
                NetworkEventKind::Message(m) => format!("{m}"),
                NetworkEventKind::Closed => "closed".to_owned(),
            };
            seen.push(format!("{}:{what}", event.host.0));
        }
        seen
    }

    #[test]
    fn messages_of_a_direction_arrive_in_order_and_then_the_close() {
        for seed in 0..50 {
            let mut net = network(seed);
            let id = net.connect(Time(0), A, B);
            assert_eq!(drain(&mut net, 10_000_000), ["2:accepted 1", "1:connected"]);
            for message in 0..20 {
                net.send(Time(10_000_000), id, End::Connector, message);
            }
            net.close(Time(10_000_000), id, End::Connector);
            let expected: Vec<_> = (0..20)
                .map(|m| format!("2:{m}"))
                .chain(["2:closed".to_owned()])
                .collect();
            assert_eq!(drain(&mut net, u64::MAX), expected);
            assert_eq!(net.connections().count(), 0);
        }
    }

    #[test]
    fn a_one_way_cut_holds_messages_back_until_it_heals() {
        let mut net = network(3);
        let id = net.connect(Time(0), A, B);
        drain(&mut net, 10_000_000);
        net.cut(A, B);
        net.send(Time(10_000_000), id, End::Connector, 1);
        net.send(Time(10_000_000), id, End::Acceptor, 2);
        assert_eq!(drain(&mut net, 1_000_000_000), ["1:2"]);
        net.heal(Time(1_000_000_000), A, B);
        assert_eq!(drain(&mut net, 2_000_000_000), ["2:1"]);
    }

    #[test]
    fn a_killed_process_resets_and_a_lost_one_is_silent_until_it_is_back() {
        let mut net = network(4);
        net.connect(Time(0), A, B);
        drain(&mut net, 10_000_000);
        net.kill(Time(10_000_000), B);
        assert_eq!(drain(&mut net, 20_000_000), ["1:closed"]);
        net.connect(Time(20_000_000), A, B);
        assert_eq!(
            drain(&mut net, 30_000_000),
            ["1:closed"],
            "connection refused"
        );
        net.bring_up(Time(30_000_000), B);
        let id = net.connect(Time(30_000_000), A, B);
        drain(&mut net, 40_000_000);
        net.lose_silently(B);
        net.send(Time(40_000_000), id, End::Connector, 9);
        assert!(drain(&mut net, 50_000_000).is_empty());
        net.bring_up(Time(50_000_000), B);
        assert_eq!(drain(&mut net, 60_000_000), ["1:closed"]);
    }

    #[test]
    fn a_broken_connection_loses_what_was_in_transit_and_tells_both() {
        let mut net = network(5);
        let id = net.connect(Time(0), A, B);
        drain(&mut net, 10_000_000);
        net.send(Time(10_000_000), id, End::Connector, 1);
        net.break_connection(Time(10_000_000), id);
        let mut seen = drain(&mut net, 60_000_000);
        seen.sort();
        assert_eq!(seen, ["1:closed", "2:closed"]);
        assert_eq!(net.connections().next(), None);
        assert!(net.next_event().is_none());
        net.send(Time(70_000_000), id, End::Connector, 1);
        assert!(drain(&mut net, u64::MAX).is_empty());
    }

    #[test]
    fn a_connect_to_a_silently_lost_host_is_refused_after_it_is_back_only() {
        let mut net = network(6);
        net.lose_silently(B);
        net.connect(Time(0), A, B);
        assert!(drain(&mut net, 1_000_000_000).is_empty());
        net.bring_up(Time(1_000_000_000), B);
        assert_eq!(drain(&mut net, u64::MAX / 2), ["1:closed"]);
    }
}
