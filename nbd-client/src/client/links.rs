//! A worker's connections to disks: one per disk, shared by the worker's volumes.
//!
//! | state | next |
//! |---|---|
//! | Idle | a volume connects: Waiting until the back-off has passed, then Resolving or Connecting |
//! | Resolving | address: Connecting; failure: Idle |
//! | Connecting | connected: Greeting; failure, time-out: Idle |
//! | Greeting | Hello answered: Up; failure, time-out: Idle |
//! | Up | failure: Idle |
//!
//! A disk whose daemon runs on this machine is reached over its unix socket, if there is one: that costs a
//! fraction of the loopback's TCP. Hello proves that it is the right disk, as always.
//!
//! Invariants:
//! - Each `connect` is answered by one `ReplicaUp` or `ReplicaDown`; a volume that got `ReplicaDown` is
//!   no user any more and connects again when it wants to.
//! - Only volumes that use a link get its replies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::{ConnId, Reactor};
use ashlar_proto::ids::{ClientId, ClusterId, DiskId, Epoch, Incarnation, RequestId, VolumeId};
use ashlar_proto::wire::{
    self, Decoded, Direction, Hello, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, Reply, ReplyBody,
    Request, RequestBody,
};
use bytes::Bytes;

/// Time for connecting and for Hello, each.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1200);
/// First pause after a failure.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
/// Longest pause after failures in a row.
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// A link that owes answers and is silent for so long is closed for all when one volume distrusts it.
const SILENCE: Duration = Duration::from_secs(1);
/// Request id of Hello: sessions' ids have their session number above bit 48, which is never this.
const HELLO_ID: RequestId = RequestId(u64::MAX);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Idle,
    Waiting,
    Resolving,
    Connecting(ConnId),
    Greeting(ConnId),
    Up(ConnId),
}

struct Link {
    address: String,
    state: State,
    /// This attempt, or connection, is over the disk's socket on this machine.
    local: bool,
    /// The last attempt over the local socket failed.
    shun_local: bool,
    /// Volumes that connected and have not been told of a failure.
    users: BTreeSet<usize>,
    backoff: Duration,
    not_before: Time,
    /// Requests without an answer.
    outstanding: u64,
    last_heard: Time,
    frames: Vec<Bytes>,
    dirty: bool,
}

/// What follows from a change of a link.
pub(super) enum LinkOutput {
    /// Tell a volume's engine that the disk is reached.
    Up(usize, DiskId),
    /// Tell a volume's engine that the disk is not reached.
    Down(usize, DiskId),
    /// Look up a host name; answer with [`Links::resolved`].
    Resolve(DiskId, String),
}

/// The worker's links.
pub(super) struct Links {
    client: ClientId,
    cluster: ClusterId,
    /// Where daemons on this machine have a socket per disk, `DISK-ID.sock`.
    local_sockets: Option<PathBuf>,
    links: BTreeMap<DiskId, Link>,
    by_conn: BTreeMap<ConnId, DiskId>,
    /// Time limits of links that are neither idle nor up.
    timers: BTreeMap<DiskId, Time>,
    dirty: Vec<DiskId>,
    pub output: Vec<LinkOutput>,
}

impl Links {
    pub fn new(client: ClientId, local_sockets: Option<PathBuf>) -> Self {
        Self {
            client,
            local_sockets,
            cluster: ClusterId::NIL,
            links: BTreeMap::new(),
            by_conn: BTreeMap::new(),
            timers: BTreeMap::new(),
            dirty: Vec::new(),
            output: Vec::new(),
        }
    }

    pub fn set_cluster(&mut self, cluster: ClusterId) {
        self.cluster = cluster;
    }

    /// The disk that a connection leads to.
    pub fn disk_of(&self, conn: ConnId) -> Option<DiskId> {
        self.by_conn.get(&conn).copied()
    }

    /// Earliest time limit.
    pub fn next_deadline(&self) -> Option<Time> {
        self.timers.values().min().copied()
    }

    /// Whether a disk's link is up.
    pub fn is_up(&self, disk: DiskId) -> bool {
        self.links
            .get(&disk)
            .is_some_and(|l| matches!(l.state, State::Up(_)))
    }

    /// A volume wants the disk.
    pub fn connect(
        &mut self,
        now: Time,
        reactor: &mut Reactor,
        user: usize,
        disk: DiskId,
        address: String,
    ) {
        let link = self.links.entry(disk).or_insert_with(|| Link {
            address: String::new(),
            state: State::Idle,
            local: false,
            shun_local: false,
            users: BTreeSet::new(),
            backoff: BACKOFF_MIN,
            not_before: Time::default(),
            outstanding: 0,
            last_heard: now,
            frames: Vec::new(),
            dirty: false,
        });
        link.users.insert(user);
        match link.state {
            State::Up(_) => {
                self.output.push(LinkOutput::Up(user, disk));
            }
            State::Idle => {
                link.address = address;
                if now < link.not_before {
                    link.state = State::Waiting;
                    self.timers.insert(disk, link.not_before);
                } else {
                    self.start(now, reactor, disk);
                }
            }
            State::Waiting | State::Resolving | State::Connecting(_) | State::Greeting(_) => {
                link.address = address;
            }
        }
    }

    fn start(&mut self, now: Time, reactor: &mut Reactor, disk: DiskId) {
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        self.timers.insert(disk, now.after(CONNECT_TIMEOUT));
        let socket = self.local_sockets.as_ref().filter(|_| !link.shun_local);
        let socket = socket.map(|dir| dir.join(format!("{disk}.sock")));
        link.local = false;
        if let Some(socket) = socket.filter(|socket| socket.exists()) {
            let conn = reactor.connect_unix(&socket);
            link.local = true;
            link.state = State::Connecting(conn);
            self.by_conn.insert(conn, disk);
        } else if let Ok(address) = link.address.parse::<SocketAddr>() {
            let conn = reactor.connect_tcp(address);
            link.state = State::Connecting(conn);
            self.by_conn.insert(conn, disk);
        } else {
            link.state = State::Resolving;
            self.output
                .push(LinkOutput::Resolve(disk, link.address.clone()));
        }
    }

    /// A host name was looked up.
    pub fn resolved(
        &mut self,
        now: Time,
        reactor: &mut Reactor,
        disk: DiskId,
        address: Result<SocketAddr, String>,
    ) {
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        if link.state != State::Resolving {
            return;
        }
        match address {
            Ok(address) => {
                let conn = reactor.connect_tcp(address);
                link.state = State::Connecting(conn);
                self.by_conn.insert(conn, disk);
            }
            Err(error) => self.fail(now, reactor, disk, &error),
        }
    }

    /// A volume needs the disk no longer, or distrusts the connection.
    pub fn disconnect(&mut self, now: Time, reactor: &mut Reactor, user: usize, disk: DiskId) {
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        if !link.users.remove(&user) {
            return;
        }
        let silent = link.outstanding > 0 && now.since(link.last_heard) >= SILENCE;
        if link.users.is_empty() || silent {
            self.fail(now, reactor, disk, "a volume gave it up");
        }
    }

    /// A volume is gone.
    pub fn forget(&mut self, now: Time, reactor: &mut Reactor, user: usize) {
        let used: Vec<DiskId> = self
            .links
            .iter()
            .filter(|(_, l)| l.users.contains(&user))
            .map(|(d, _)| *d)
            .collect();
        for disk in used {
            self.disconnect(now, reactor, user, disk);
        }
    }

    /// The link has failed: its users are told, and the next attempt waits.
    pub fn fail(&mut self, now: Time, reactor: &mut Reactor, disk: DiskId, why: &str) {
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        match link.state {
            State::Connecting(conn) | State::Greeting(conn) | State::Up(conn) => {
                reactor.close(conn);
                self.by_conn.remove(&conn);
            }
            State::Idle | State::Waiting | State::Resolving => {}
        }
        let was_up = matches!(link.state, State::Up(_));
        // A socket file may be all that is left of a daemon: then the network decides.
        link.shun_local = link.local && !was_up;
        if was_up && !link.users.is_empty() {
            tracing::warn!(%disk, address = link.address, why, "lost the connection to a disk");
        } else {
            tracing::debug!(%disk, address = link.address, why, "no connection to a disk");
        }
        link.state = State::Idle;
        link.not_before = now.after(link.backoff);
        link.backoff = (link.backoff * 2).min(BACKOFF_MAX);
        link.outstanding = 0;
        link.frames.clear();
        self.timers.remove(&disk);
        for user in std::mem::take(&mut link.users) {
            self.output.push(LinkOutput::Down(user, disk));
        }
    }

    /// The reactor has connected.
    pub fn connected(&mut self, now: Time, reactor: &mut Reactor, conn: ConnId) {
        let Some(disk) = self.disk_of(conn) else {
            return;
        };
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        link.state = State::Greeting(conn);
        self.timers.insert(disk, now.after(CONNECT_TIMEOUT));
        let hello = Request {
            id: HELLO_ID,
            volume: VolumeId::NIL,
            epoch: Epoch(0),
            incarnation: Incarnation(0),
            body: RequestBody::Hello(Hello {
                version_min: PROTOCOL_VERSION_MIN,
                version_max: PROTOCOL_VERSION_MAX,
                cluster: self.cluster,
                disk,
                client: self.client,
                ticket: Bytes::new(),
            }),
        };
        let mut frames = Vec::new();
        wire::encode_request(&hello, &mut frames);
        for frame in frames {
            reactor.send(conn, frame);
        }
    }

    /// Time limits.
    pub fn tick(&mut self, now: Time, reactor: &mut Reactor) {
        while let Some((&disk, _)) = self.timers.iter().find(|(_, at)| **at <= now) {
            self.timers.remove(&disk);
            match self.links.get(&disk).map(|l| l.state) {
                Some(State::Waiting) => self.start(now, reactor, disk),
                Some(State::Resolving | State::Connecting(_) | State::Greeting(_)) => {
                    self.fail(now, reactor, disk, "timed out");
                }
                Some(State::Idle | State::Up(_)) | None => {}
            }
        }
    }

    /// Queues a request; dropped if the link is not up (its users have been told, or are about to be).
    pub fn send(&mut self, disk: DiskId, request: &Request) {
        let Some(link) = self.links.get_mut(&disk) else {
            return;
        };
        if !matches!(link.state, State::Up(_)) {
            return;
        }
        link.outstanding += 1;
        wire::encode_request(request, &mut link.frames);
        if !link.dirty {
            link.dirty = true;
            self.dirty.push(disk);
        }
    }

    /// Hands what is queued to the reactor: one batch per link.
    pub fn flush(&mut self, reactor: &mut Reactor) {
        for disk in self.dirty.drain(..) {
            let Some(link) = self.links.get_mut(&disk) else {
                continue;
            };
            link.dirty = false;
            if let State::Up(conn) = link.state {
                for frame in link.frames.drain(..) {
                    reactor.send(conn, frame);
                }
            }
        }
    }

    /// Takes the next reply off a connection's input. Hello's answer is handled here.
    pub fn next_reply(
        &mut self,
        now: Time,
        reactor: &mut Reactor,
        conn: ConnId,
    ) -> Option<(DiskId, Reply)> {
        let disk = self.disk_of(conn)?;
        loop {
            let input = reactor.input(conn);
            if let Some(length) = wire::frame_length(input)
                && input.len() < length.total
            {
                reactor.reserve(conn, length.total);
                return None;
            }
            let reply = match wire::decode(input, Direction::Replies) {
                Ok(Some(Decoded::Reply(reply))) => reply,
                Ok(Some(Decoded::Request(_)) | None) => return None,
                Err(error) => {
                    self.fail(now, reactor, disk, &error.to_string());
                    return None;
                }
            };
            let link = self.links.get_mut(&disk)?;
            link.last_heard = now;
            if let State::Greeting(_) = link.state {
                self.greeted(now, reactor, conn, disk, &reply);
                continue;
            }
            link.outstanding = link.outstanding.saturating_sub(1);
            return Some((disk, reply));
        }
    }

    fn greeted(
        &mut self,
        now: Time,
        reactor: &mut Reactor,
        conn: ConnId,
        disk: DiskId,
        reply: &Reply,
    ) {
        let problem = match &reply.result {
            Ok(ReplyBody::Hello(hello)) if hello.disk != disk => "another disk answers".to_owned(),
            Ok(ReplyBody::Hello(hello))
                if !(PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION_MAX).contains(&hello.version) =>
            {
                format!("it chose protocol version {}", hello.version)
            }
            Ok(ReplyBody::Hello(_)) => {
                let Some(link) = self.links.get_mut(&disk) else {
                    return;
                };
                link.state = State::Up(conn);
                link.backoff = BACKOFF_MIN;
                self.timers.remove(&disk);
                tracing::debug!(%disk, address = link.address, "connected to a disk");
                for user in &link.users {
                    self.output.push(LinkOutput::Up(*user, disk));
                }
                return;
            }
            Ok(_) => "not an answer to Hello".to_owned(),
            Err(status) => {
                tracing::warn!(%disk, %status, "a disk refuses the connection");
                status.to_string()
            }
        };
        self.fail(now, reactor, disk, &problem);
    }

    /// Whether a volume uses the link.
    pub fn is_user(&self, disk: DiskId, user: usize) -> bool {
        self.links
            .get(&disk)
            .is_some_and(|l| l.users.contains(&user))
    }
}
