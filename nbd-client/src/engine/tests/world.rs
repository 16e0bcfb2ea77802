//! A small deterministic world around sessions: fake replicas, fake metadata, a network that delays and
//! reorders, faults, and an oracle of what clients saw.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, Incarnation, NodeId, ReplicaState, SnapshotNumber, VolumeId,
};
use ashlar_proto::volume::{DiskEndpoint, ReplicaView, VolumeView};
use ashlar_proto::wire::{Reply, Request, RequestBody};

use super::Random;
use super::fake_disk::{Cell, FakeDisk, Place};
use super::oracle::Oracle;
use crate::engine::*;

pub(super) const VOLUME: VolumeId = VolumeId([7; 16]);
pub(super) const MS: u64 = 1_000_000;

/// Tells what happens if the environment asks for it.
macro_rules! trace {
    ($world:expr, $($text:tt)*) => {
        if $world.trace {
            eprintln!("{:>14} {}", $world.now, format!($($text)*));
        }
    };
}
pub(super) use trace;

#[derive(Debug)]
pub(super) enum Event {
    ToDisk {
        disk: usize,
        client: usize,
        connection: u64,
        process: u64,
        request: Box<Request>,
    },
    Answer {
        client: usize,
        disk: usize,
        connection: u64,
        reply: Box<Reply>,
    },
    Connected {
        client: usize,
        disk: usize,
        connection: u64,
    },
    Broken {
        client: usize,
        disk: usize,
        connection: u64,
    },
    ToSession {
        client: usize,
        event: Box<SessionEvent>,
    },
    Metadata {
        client: usize,
        request: MetadataRequest,
    },
    Tick {
        client: usize,
    },
    PullStep {
        disk: usize,
        process: u64,
        group: u32,
        number: u64,
    },
    PullApply {
        disk: usize,
        process: u64,
        group: u32,
        number: u64,
        place: Place,
        cell: Option<Cell>,
    },
    Plan,
    Restart {
        disk: usize,
    },
}

struct Scheduled(u64, u64, Event);
impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

pub(super) struct Client {
    pub(super) session: Session,
    pub(super) id: ClientId,
    /// A crashed client takes no events.
    pub(super) alive: bool,
    /// Cut off from metadata: its questions and the watch are lost until it is reconnected.
    pub(super) cut: bool,
    pub(super) serving: bool,
    pub(super) stopped: Option<StopReason>,
    pub(super) sent: u64,
    pub(super) connections: Vec<u64>,
    tick_at: u64,
    pub(super) pending: BTreeMap<u64, ClientOp>,
    pub(super) answers: BTreeMap<u64, Result<ClientReply, ClientError>>,
}

pub(super) struct World {
    pub(super) now: u64,
    pub(super) random: Random,
    queue: BinaryHeap<Reverse<Scheduled>>,
    sequence: u64,
    pub(super) disks: Vec<FakeDisk>,
    pub(super) view: VolumeView,
    pub(super) clean: bool,
    /// A reader lost the volume without leaving it.
    pub(super) reader_revoked: bool,
    pub(super) clients: Vec<Client>,
    pub(super) metadata_up: bool,
    pub(super) rebuilds: bool,
    pub(super) oracle: Oracle,
    pub(super) connection: u64,
    /// Connections below it are broken, per disk.
    pub(super) broken_below: Vec<u64>,
    /// Clients that get no connection to a disk.
    pub(super) unreachable: BTreeSet<(usize, usize)>,
    pub(super) tag: u64,
    /// Longest delay of a message, in microseconds.
    pub(super) delay_us_max: u64,
    pub(super) changes: u64,
    pub(super) waiting_metadata: Vec<(usize, MetadataRequest)>,
    /// The node of clients: 0 none, else that of disk n - 1.
    pub(super) local: u8,
    /// Flushes are late.
    pub(super) slow_flushes: bool,
    /// Writes to this disk are late.
    pub(super) slow_writes_to: Option<usize>,
    /// Reports of clients that hold their writes: when, by whom, under which epoch, for which number.
    pub(super) held: Vec<(u64, usize, Epoch, SnapshotNumber)>,
    pub(super) trace: bool,
}

impl World {
    pub(super) fn new(seed: u64, replicas: u8, groups: usize, min_replicas: u8) -> Self {
        let disks: Vec<FakeDisk> = (0..replicas).map(FakeDisk::new).collect();
        let group: Vec<ReplicaView> = disks
            .iter()
            .map(|d| ReplicaView {
                disk: d.id,
                state: ReplicaState::InSync,
                incarnation: Incarnation(0),
                rebuild_epoch: Epoch(0),
                inherits: false,
            })
            .collect();
        let endpoints = disks.iter().enumerate().map(|(i, d)| {
            let endpoint = DiskEndpoint {
                disk: d.id,
                node: NodeId([i as u8 + 1; 16]),
                address: format!("disk{i}"),
                alive: true,
            };
            (d.id, endpoint)
        });
        let view = VolumeView {
            volume: VOLUME,
            name: "v".into(),
            size_bytes: 16 << 20,
            min_replicas,
            groups: vec![group; groups],
            epoch: Epoch(0),
            holder: None,
            readers: Vec::new(),
            opened_once: false,
            snapshot: Default::default(),
            snapshot_pending: false,
            layers: Default::default(),
            parent: None,
            revision: 1,
            disks: endpoints.collect(),
        };
        let mut world = Self {
            now: 1000 * MS,
            random: Random(seed),
            queue: BinaryHeap::new(),
            sequence: 0,
            disks,
            view,
            clean: true,
            reader_revoked: false,
            clients: Vec::new(),
            metadata_up: true,
            rebuilds: true,
            oracle: Oracle::default(),
            connection: 0,
            broken_below: vec![0; replicas as usize],
            unreachable: BTreeSet::new(),
            tag: 0,
            delay_us_max: 300,
            changes: 0,
            waiting_metadata: Vec::new(),
            local: 0,
            slow_flushes: false,
            slow_writes_to: None,
            held: Vec::new(),
            trace: std::env::var_os("SESSION_TRACE").is_some(),
        };
        world.schedule(50 * MS, Event::Plan);
        world
    }

    pub(super) fn start(&mut self, change: impl FnOnce(&mut SessionConfig)) -> usize {
        let index = self.clients.len();
        let id = ClientId([index as u8 + 100; 16]);
        let mut config = SessionConfig::new(VOLUME, id);
        config.session_number = index as u16;
        config.node = NodeId([self.local; 16]);
        change(&mut config);
        self.clients.push(Client {
            session: Session::new(config, Time(self.now)),
            id,
            alive: true,
            cut: false,
            serving: false,
            stopped: None,
            sent: 0,
            connections: vec![0; self.disks.len()],
            tick_at: u64::MAX,
            pending: BTreeMap::new(),
            answers: BTreeMap::new(),
        });
        self.feed(index, SessionEvent::Start);
        index
    }

    pub(super) fn schedule(&mut self, after: u64, event: Event) {
        self.sequence += 1;
        self.queue
            .push(Reverse(Scheduled(self.now + after, self.sequence, event)));
    }

    /// Of one message; now and then one is far behind those sent after it.
    pub(super) fn delay(&mut self) -> u64 {
        let late = if self.random.chance(2) { 10 } else { 1 };
        20_000 + self.random.below(self.delay_us_max.max(1)) * 1000 * late
    }

    pub(super) fn disk_index(&self, disk: DiskId) -> usize {
        self.disks.iter().position(|d| d.id == disk).unwrap()
    }

    /// Feeds a session one event and carries out its commands.
    pub(super) fn feed(&mut self, client: usize, event: SessionEvent) {
        if !self.clients[client].alive || self.clients[client].stopped.is_some() {
            return;
        }
        let mut out = Vec::new();
        self.clients[client]
            .session
            .step(Time(self.now), event, &mut out);
        for command in out {
            self.carry_out(client, command);
        }
        if let Some(Time(at)) = self.clients[client].session.next_deadline() {
            let at = at.max(self.now + 1);
            if at < self.clients[client].tick_at || self.clients[client].tick_at <= self.now {
                self.clients[client].tick_at = at;
                self.schedule(at - self.now, Event::Tick { client });
            }
        }
    }

    fn carry_out(&mut self, client: usize, command: SessionCommand) {
        trace!(self, "client {client} -> {command:?}");
        match command {
            SessionCommand::Connect { disk, .. } => {
                let disk = self.disk_index(disk);
                self.connection += 1;
                let connection = self.connection;
                self.clients[client].connections[disk] = connection;
                let after = self.delay();
                self.schedule(
                    after,
                    Event::Connected {
                        client,
                        disk,
                        connection,
                    },
                );
            }
            SessionCommand::Disconnect { disk } => {
                let disk = self.disk_index(disk);
                self.clients[client].connections[disk] = 0;
            }
            SessionCommand::Send { disk, request } => {
                let disk = self.disk_index(disk);
                self.clients[client].sent += 1;
                let connection = self.clients[client].connections[disk];
                assert_ne!(connection, 0, "sent without a connection");
                if connection < self.broken_below[disk] {
                    return;
                }
                let process = self.disks[disk].process;
                let mut after = self.delay();
                if self.slow_writes_to == Some(disk)
                    && matches!(request.body, RequestBody::Write(_))
                {
                    after += 500 * MS;
                }
                if self.slow_flushes && matches!(request.body, RequestBody::Flush(_)) {
                    after += 200 * MS;
                }
                let request = Box::new(request);
                self.schedule(
                    after,
                    Event::ToDisk {
                        disk,
                        client,
                        connection,
                        process,
                        request,
                    },
                );
            }
            SessionCommand::Metadata(request) => {
                if let MetadataRequest::ReportHeld { epoch, number } = request {
                    self.check_held(client);
                    self.held.push((self.now, client, epoch, number));
                    return;
                }
                let after = self.delay() * 3;
                self.schedule(after, Event::Metadata { client, request });
            }
            SessionCommand::Reply { tag, result } => {
                let Some(op) = self.clients[client].pending.remove(&tag) else {
                    panic!("a second answer to {tag}");
                };
                self.oracle.answered(tag, self.now, &op, &result);
                self.clients[client].answers.insert(tag, result);
            }
            SessionCommand::Serving { .. } => self.clients[client].serving = true,
            SessionCommand::Resized { .. } => {}
            SessionCommand::Stopped { reason } => self.clients[client].stopped = Some(reason),
        }
    }

    /// The next event; false: none before `until`.
    pub(super) fn advance(&mut self, until: u64) -> bool {
        match self.queue.peek() {
            Some(Reverse(next)) if next.0 <= until => {}
            _ => {
                self.now = self.now.max(until);
                return false;
            }
        }
        let Some(Reverse(Scheduled(at, _, event))) = self.queue.pop() else {
            return false;
        };
        self.now = self.now.max(at);
        self.happen(event);
        true
    }

    pub(super) fn run_for(&mut self, duration: Duration) {
        let until = self.now + duration.as_nanos() as u64;
        let mut events = 0u64;
        while self.advance(until) {
            events += 1;
            assert!(events < 20_000_000, "the world does not come to rest");
        }
    }

    /// Runs until a condition holds; panics after a minute.
    pub(super) fn run_until(&mut self, what: &str, mut test: impl FnMut(&World) -> bool) {
        let limit = self.now + 60_000 * MS;
        while !test(self) {
            assert!(self.advance(limit), "never: {what}");
        }
    }

    /// Runs until a request is answered.
    pub(super) fn answer(&mut self, client: usize, tag: u64) -> Result<ClientReply, ClientError> {
        self.run_until("an answer", |w| {
            w.clients[client].answers.contains_key(&tag)
        });
        self.clients[client].answers[&tag].clone()
    }

    pub(super) fn open(&mut self, change: impl FnOnce(&mut SessionConfig)) -> usize {
        let client = self.start(change);
        self.run_until("serving", |w| w.clients[client].serving);
        client
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick { client } => {
                if self.clients[client].tick_at <= self.now {
                    self.clients[client].tick_at = u64::MAX;
                    self.feed(client, SessionEvent::Tick);
                }
            }
            Event::ToSession { client, event } => self.feed(client, *event),
            Event::Connected {
                client,
                disk,
                connection,
            } => {
                if self.clients[client].connections[disk] != connection {
                    return;
                }
                let (id, up) = (self.disks[disk].id, self.disks[disk].alive);
                let whole = connection >= self.broken_below[disk]
                    && !self.unreachable.contains(&(client, disk));
                if up && whole && self.disks[disk].paused_until <= self.now {
                    self.feed(client, SessionEvent::ReplicaUp { disk: id });
                } else {
                    self.clients[client].connections[disk] = 0;
                    self.feed(client, SessionEvent::ReplicaDown { disk: id });
                }
            }
            Event::Broken {
                client,
                disk,
                connection,
            } => {
                if self.clients[client].connections[disk] == connection {
                    self.clients[client].connections[disk] = 0;
                    let disk = self.disks[disk].id;
                    self.feed(client, SessionEvent::ReplicaDown { disk });
                }
            }
            Event::ToDisk {
                disk,
                client,
                connection,
                process,
                request,
            } => {
                self.arrive(disk, client, connection, process, request);
            }
            Event::Answer {
                client,
                disk,
                connection,
                reply,
            } => {
                if self.clients[client].connections[disk] == connection
                    && connection >= self.broken_below[disk]
                {
                    let disk = self.disks[disk].id;
                    self.feed(
                        client,
                        SessionEvent::Reply {
                            disk,
                            reply: *reply,
                        },
                    );
                }
            }
            Event::Metadata { client, request } => self.metadata(client, request),
            Event::PullStep {
                disk,
                process,
                group,
                number,
            } => {
                self.pull_step(disk, process, group, number);
            }
            Event::PullApply {
                disk,
                process,
                group,
                number,
                place,
                cell,
            } => {
                let target = &mut self.disks[disk];
                if target.process != process {
                    return;
                }
                let Some(pull) = target.pull.get_mut(&group).filter(|p| p.number == number) else {
                    return;
                };
                pull.applying -= 1;
                let epoch = pull.epoch;
                target.apply_pulled(group, place, cell, epoch);
            }
            Event::Plan => {
                self.plan();
                self.schedule(200 * MS, Event::Plan);
            }
            Event::Restart { disk } => self.disks[disk].alive = true,
        }
    }

    fn arrive(
        &mut self,
        disk: usize,
        client: usize,
        connection: u64,
        process: u64,
        request: Box<Request>,
    ) {
        let target = &mut self.disks[disk];
        if target.process != process || !target.alive {
            return;
        }
        if target.paused_until > self.now {
            let wait = target.paused_until - self.now;
            self.schedule(
                wait,
                Event::ToDisk {
                    disk,
                    client,
                    connection,
                    process,
                    request,
                },
            );
            return;
        }
        let pulls = target.pulls;
        let result = target.apply(&request);
        let reply = Reply {
            id: request.id,
            volume: VOLUME,
            fence: target.fence,
            incarnation: target.incarnation,
            result,
        };
        if target.pulls > pulls {
            let (number, group) = (target.pulls, target.last_pull);
            self.pull_begin(disk, group);
            self.schedule(
                MS,
                Event::PullStep {
                    disk,
                    process,
                    group,
                    number,
                },
            );
        }
        let after = self.delay();
        self.schedule(
            after,
            Event::Answer {
                client,
                disk,
                connection,
                reply: Box::new(reply),
            },
        );
    }
}
