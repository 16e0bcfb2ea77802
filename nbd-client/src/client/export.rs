//! One volume on a worker: its engine, its listener and the NBD clients that are connected to it.
//!
//! Invariants:
//! - Requests are taken off a connection only while the engine is accepting, the connection has fewer
//!   than [`REQUESTS_MAX`] of them under way and its client takes its replies; else receiving is paused.
//!   So memory per volume is bounded by the engine's budget and the receive buffers.
//! - After the engine has stopped, nothing is sent to any client.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::{ConnId, ListenerId, Reactor};
use ashlar_proto::ids::VolumeId;
use ashlar_proto::volume::VolumeView;
use ashlar_proto::wire::Payload;

use super::engine_trait::VolumeEngine;
use super::export_end::Release;
use super::messages::{AskReply, Endpoint, VolumeSetup};
use super::peer::{Peer, Splitting};
use super::requests::{Kind, Requests};
use crate::engine::{
    ClientError, ClientOp, ClientReply, ClientRequest, SessionCommand, SessionEvent,
};
use crate::nbd::{self, Command, Incoming, MAX_PART_LENGTH};

/// Requests under way on one connection.
const REQUESTS_MAX: u32 = 1024;
/// Connections to one volume.
const PEERS_MAX: usize = 64;
/// Bytes that a client has not taken, above which its requests wait.
const SEND_QUEUE_MAX: usize = 4 * 1024 * 1024;
/// Payloads above this are announced to the reactor, to be received in one piece.
const RESERVE_ABOVE: usize = 4096;
/// Time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Marks the tags of requests of this process: slots' tags have a part number there, which stays small.
const ASKED: u64 = 1 << 63;

/// A volume and its clients.
pub(super) struct Export {
    pub index: usize,
    pub volume: VolumeId,
    pub info: nbd::Export,
    pub endpoint: Endpoint,
    pub listener: Option<ListenerId>,
    pub serving: bool,
    pub commands: Vec<SessionCommand>,
    pub view: Option<VolumeView>,
    pub requests: Requests,
    /// On the worker's list of volumes to look at.
    pub touched: bool,
    /// In the worker's timers.
    pub deadline: Option<Time>,
    engine: Box<dyn VolumeEngine + Send>,
    /// Clients that connected before the volume was open.
    pub(super) waiting: VecDeque<ConnId>,
    pub(super) peers: BTreeMap<ConnId, Peer>,
    stalled: VecDeque<ConnId>,
    pub(super) dirty: Vec<ConnId>,
    handshakes: VecDeque<(Time, ConnId)>,
    /// Shutting down: no request is taken any more, connections end when theirs are done.
    pub(super) draining: Option<Time>,
    pub(super) close_asked: bool,
    pub(super) release: Option<Release>,
    /// Requests of this process, by tag.
    asked: BTreeMap<u64, AskReply>,
    asked_count: u64,
    /// As last told to the control side.
    pub told_connections: usize,
    /// Connections that ended here, for the worker to forget.
    pub gone: Vec<ConnId>,
}

impl Export {
    pub fn new(setup: VolumeSetup) -> Self {
        let requests = Requests::of(&setup.name);
        Self {
            index: setup.index,
            volume: setup.volume,
            info: nbd::Export {
                description: format!("Ashlar volume {}", setup.name),
                name: setup.name,
                size_bytes: 0,
                read_only: setup.read_only,
            },
            endpoint: setup.endpoint,
            listener: None,
            serving: false,
            commands: Vec::new(),
            view: None,
            requests,
            touched: false,
            deadline: None,
            engine: setup.engine,
            waiting: VecDeque::new(),
            peers: BTreeMap::new(),
            stalled: VecDeque::new(),
            dirty: Vec::new(),
            handshakes: VecDeque::new(),
            draining: None,
            close_asked: false,
            release: None,
            asked: BTreeMap::new(),
            asked_count: 0,
            told_connections: 0,
            gone: Vec::new(),
        }
    }

    /// Feeds the engine.
    pub fn step(&mut self, now: Time, event: SessionEvent) {
        match &event {
            SessionEvent::Granted { view, .. }
            | SessionEvent::Confirmed(view)
            | SessionEvent::ConfigChanged(view)
            | SessionEvent::ChangeAnswer { view, .. }
                if self
                    .view
                    .as_ref()
                    .is_none_or(|known| known.revision <= view.revision) =>
            {
                self.view = Some(view.as_ref().clone());
            }
            _ => {}
        }
        self.engine.step(now, event, &mut self.commands);
    }

    pub fn engine(&self) -> &dyn VolumeEngine {
        self.engine.as_ref()
    }

    pub fn peer_count(&self) -> usize {
        self.peers.len() + self.waiting.len()
    }

    /// When this volume needs to be looked at without an event.
    pub fn next_deadline(&self) -> Option<Time> {
        let handshake = self.handshakes.front().map(|(at, _)| *at);
        [self.engine.next_deadline(), handshake, self.draining]
            .into_iter()
            .flatten()
            .min()
    }

    /// Time limits that have passed.
    pub fn tick(&mut self, now: Time, reactor: &mut Reactor) {
        if self.engine.next_deadline().is_some_and(|at| at <= now) {
            self.engine
                .step(now, SessionEvent::Tick, &mut self.commands);
        }
        while let Some((at, conn)) = self.handshakes.front().copied()
            && at <= now
        {
            self.handshakes.pop_front();
            if self
                .peers
                .get(&conn)
                .is_some_and(|p| p.protocol.in_handshake())
            {
                tracing::info!(
                    volume = self.info.name,
                    "a client did not finish its handshake"
                );
                self.drop_peer(conn, reactor);
            }
        }
        if self.draining.is_some_and(|until| until <= now) {
            self.draining = Some(Time(u64::MAX));
            self.drop_all(reactor);
        }
    }

    /// A client has connected; false if there are too many.
    pub fn accept(&mut self, now: Time, conn: ConnId, reactor: &mut Reactor) -> bool {
        if self.peer_count() >= PEERS_MAX || self.draining.is_some() {
            reactor.close(conn);
            return false;
        }
        if self.serving {
            self.greet(now, conn);
        } else {
            reactor.pause_receive(conn);
            self.waiting.push_back(conn);
        }
        true
    }

    fn greet(&mut self, now: Time, conn: ConnId) {
        self.peers.insert(conn, Peer::new());
        self.dirty.push(conn);
        self.handshakes
            .push_back((now.after(HANDSHAKE_TIMEOUT), conn));
    }

    /// Takes over a client past the handshake.
    pub fn adopt(&mut self, conn: ConnId, negotiated: nbd::Negotiated) {
        // As every new peer it is marked for flushing, which clears the mark.
        self.peers.insert(conn, Peer::in_transmission(negotiated));
        self.dirty.push(conn);
    }

    /// Whether [`Self::adopt`] may be called.
    pub fn may_adopt(&self) -> bool {
        self.serving
            && self.draining.is_none()
            && self.release.is_none()
            && self.peer_count() < PEERS_MAX
    }

    /// A request of this process itself.
    pub fn ask(&mut self, now: Time, op: ClientOp, reply: AskReply) {
        self.asked_count += 1;
        let tag = ASKED | self.asked_count;
        self.asked.insert(tag, reply);
        let event = SessionEvent::Client(ClientRequest { tag, op });
        self.engine.step(now, event, &mut self.commands);
    }

    /// The volume is open: clients that wait are greeted.
    pub fn start_serving(&mut self, now: Time, size_bytes: u64, reactor: &mut Reactor) {
        self.info.size_bytes = size_bytes;
        self.serving = true;
        while let Some(conn) = self.waiting.pop_front() {
            self.greet(now, conn);
            reactor.resume_receive(conn);
        }
    }

    /// Takes requests off a connection's input, as many as back-pressure allows.
    pub fn pump(&mut self, now: Time, conn: ConnId, reactor: &mut Reactor) {
        loop {
            let Some(peer) = self.peers.get_mut(&conn) else {
                return;
            };
            if peer.leaving {
                reactor.input(conn).clear();
                break;
            }
            if self.release.is_some() && !peer.is_amid_request() {
                reactor.pause_receive(conn);
                if !peer.dirty {
                    peer.dirty = true;
                    self.dirty.push(conn);
                }
                return;
            }
            if !self.engine.accepting()
                || peer.in_flight >= REQUESTS_MAX
                || self.draining.is_some()
                || reactor.send_queued_bytes(conn) > SEND_QUEUE_MAX
            {
                if !peer.stalled {
                    peer.stalled = true;
                    reactor.pause_receive(conn);
                    self.stalled.push_back(conn);
                }
                break;
            }
            if peer.splitting.is_some() {
                self.next_part(now, conn);
                continue;
            }
            match peer.protocol.receive(reactor.input(conn), &self.info) {
                Ok(Some(Incoming::Request(request))) => self.begin(now, conn, request),
                Ok(Some(Incoming::Disconnect)) => peer.leaving = true,
                Ok(None) => {
                    let wanted = peer.protocol.wanted();
                    if wanted > RESERVE_ABOVE {
                        reactor.reserve(conn, wanted);
                    }
                    break;
                }
                Err(error) => {
                    tracing::warn!(volume = self.info.name, %error, "closing an NBD connection");
                    self.drop_peer(conn, reactor);
                    return;
                }
            }
        }
        self.mark_dirty(conn);
    }

    fn mark_dirty(&mut self, conn: ConnId) {
        if let Some(peer) = self.peers.get_mut(&conn)
            && !peer.dirty
            && (peer.leaving || !peer.protocol.output().is_empty())
        {
            peer.dirty = true;
            self.dirty.push(conn);
        }
    }

    /// Lets stalled connections go on, in turn. True if any request was taken.
    pub fn pump_stalled(&mut self, now: Time, reactor: &mut Reactor) -> bool {
        let before = self.commands.len();
        let mut progress = false;
        for _ in 0..self.stalled.len() {
            if !self.engine.accepting() || self.draining.is_some() {
                break;
            }
            let Some(conn) = self.stalled.pop_front() else {
                break;
            };
            let Some(peer) = self.peers.get_mut(&conn) else {
                continue;
            };
            peer.stalled = false;
            let in_flight = self.requests.len();
            self.pump(now, conn, reactor);
            if self.peers.get(&conn).is_some_and(|p| !p.stalled) {
                reactor.resume_receive(conn);
            }
            progress |= self.requests.len() != in_flight;
        }
        progress || self.commands.len() != before
    }

    /// Hands a request to the engine, or its first part.
    fn begin(&mut self, now: Time, conn: ConnId, request: nbd::Request) {
        let nbd::Request {
            cookie,
            style,
            command,
        } = request;
        let Some(peer) = self.peers.get_mut(&conn) else {
            return;
        };
        let kind = match &command {
            Command::Read { offset, length } => Kind::Read {
                offset: *offset,
                length: *length,
            },
            Command::BlockStatus { length, one, .. } => Kind::Status {
                length: *length,
                one: *one,
            },
            Command::Flush => Kind::Flush,
            Command::Trim { .. } | Command::WriteZeroes { .. } => Kind::Discard,
            Command::Write { .. } => Kind::Write,
        };
        let slot = match peer.writing {
            Some(slot) if matches!(command, Command::Write { first: false, .. }) => slot,
            _ => {
                peer.in_flight += 1;
                self.requests.begin(now, conn, cookie, style, kind)
            }
        };
        let mut last = true;
        let op = match command {
            Command::Read { offset, length } if length <= MAX_PART_LENGTH => {
                ClientOp::Read { offset, length }
            }
            Command::Read { offset, length } => {
                let end = offset + u64::from(length);
                peer.splitting = Some(Splitting::Read {
                    slot,
                    next: offset,
                    end,
                });
                return;
            }
            Command::WriteZeroes {
                offset,
                length,
                fua,
                no_hole: true,
            } => {
                let end = offset + u64::from(length);
                peer.splitting = Some(Splitting::Zeroes {
                    slot,
                    next: offset,
                    end,
                    fua,
                });
                return;
            }
            Command::Write {
                offset,
                data,
                fua,
                last: is_last,
                ..
            } => {
                last = is_last;
                peer.writing = (!last).then_some(slot);
                ClientOp::Write {
                    offset,
                    data: Payload::from_iter([data]),
                    fua,
                }
            }
            Command::Flush => ClientOp::Flush,
            Command::Trim {
                offset,
                length,
                fua,
            } => ClientOp::Trim {
                offset,
                length: u64::from(length),
                fua,
            },
            Command::WriteZeroes {
                offset,
                length,
                fua,
                no_hole: false,
            } => ClientOp::WriteZeroes {
                offset,
                length: u64::from(length),
                fua,
            },
            Command::BlockStatus { offset, length, .. } => ClientOp::BlockStatus {
                offset,
                length: u64::from(length),
            },
        };
        self.submit(now, slot, last, op);
    }

    fn submit(&mut self, now: Time, slot: u32, last: bool, op: ClientOp) {
        let tag = self.requests.part(slot, last);
        let event = SessionEvent::Client(ClientRequest { tag, op });
        self.engine.step(now, event, &mut self.commands);
    }

    fn next_part(&mut self, now: Time, conn: ConnId) {
        let Some(peer) = self.peers.get_mut(&conn) else {
            return;
        };
        let Some((slot, op, last)) = peer.next_part() else {
            return;
        };
        self.submit(now, slot, last, op);
    }

    /// The engine has answered.
    pub fn reply(&mut self, now: Time, tag: u64, result: Result<ClientReply, ClientError>) {
        if let Some(asker) = self.asked.remove(&tag) {
            // The asker may have given up.
            let _ = asker.send(result);
            return;
        }
        let conn = self.requests.connection_of(tag);
        let mut peer = conn.and_then(|conn| self.peers.get_mut(&conn));
        let protocol = peer.as_mut().map(|p| &mut p.protocol);
        let done = self.requests.finish_part(now, tag, result, protocol);
        if let (Some(peer), Some(conn)) = (peer, conn) {
            peer.in_flight -= u32::from(done);
            if !peer.dirty {
                peer.dirty = true;
                self.dirty.push(conn);
            }
        }
    }

    /// Hands replies to the reactor, and ends connections that have nothing left to do.
    pub fn flush(&mut self, reactor: &mut Reactor) {
        for conn in std::mem::take(&mut self.dirty) {
            let Some(peer) = self.peers.get_mut(&conn) else {
                continue;
            };
            peer.dirty = false;
            for bytes in peer.protocol.output().drain() {
                reactor.send(conn, bytes);
            }
            // At shutdown the thread may end right after: then the kernel must have all replies.
            if self.release.is_some() {
                if peer.at_rest() && !peer.released {
                    peer.released = true;
                    reactor.release(conn);
                }
                continue;
            }
            let ends = match self.draining {
                Some(_) => reactor.send_queued_bytes(conn) == 0,
                None => peer.leaving,
            };
            if ends && peer.in_flight == 0 {
                // Spec, NBD_CMD_DISC: outstanding requests are handled first; there is no reply.
                self.peers.remove(&conn);
                self.gone.push(conn);
                reactor.close_after_send(conn);
            }
        }
    }

    /// All that was queued for a client is sent.
    pub fn sent(&mut self, conn: ConnId) {
        if self.draining.is_some()
            && let Some(peer) = self.peers.get_mut(&conn)
            && !peer.dirty
        {
            peer.dirty = true;
            self.dirty.push(conn);
        }
    }
}
