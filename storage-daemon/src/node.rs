//! The thread of one disk: select (reactor) -> step (engine) -> execute (commands). `disk_handle` is what the
//! rest of the daemon holds of it.
//!
//! Invariants:
//! - Everything of a disk happens on its thread: its file, its connections, its engine. The daemon only
//!   sends administrative requests over a bounded channel and reads what the thread publishes.
//! - All events of one wait are handled, then the store's batch is closed once, then everything queued
//!   leaves with the next wait: batching at every hop, no polling.
//! - A connection that sends anything but frames is closed; nothing else notices.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::{ConnId, DiskIndex, Event, ListenerId, Reactor, ReactorConfig};
use ashlar_proto::ids::DiskId;
use ashlar_proto::wire::{Decoded, Direction, decode, encode_reply, encode_request, frame_length};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::{oneshot, watch};

use crate::config::DiscardPolicy;
use crate::disk_handle::{Control, DiskState, DiskThreadConfig};
use crate::engine::{
    AdminReply, AdminRequest, ChunkStore, ConnectionId, DiskEngine, EngineCommand, EngineEvent,
    PeerId,
};
use crate::error::DiskError;
use crate::store::{Store, StoreCommand, StoreEvent, StoreIdentity};

/// How long a stopping thread still sends what it has answered.
const FAREWELL: Duration = Duration::from_millis(50);

impl ChunkStore for Store {
    fn step(&mut self, now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>) {
        Self::step(self, now, event, out);
    }

    fn next_deadline(&self) -> Option<Time> {
        Self::next_deadline(self)
    }
}

struct Client {
    conn: ConnId,
    paused: bool,
}

/// What the thread owns.
pub(crate) struct DiskThread {
    path: PathBuf,
    listen: SocketAddr,
    local_sockets: Option<PathBuf>,
    pub(crate) reactor: Reactor,
    disk: DiskIndex,
    engine: DiskEngine<Store>,
    publish: watch::Sender<DiskState>,
    listeners: Vec<ListenerId>,
    clients: FxHashMap<ConnectionId, Client>,
    peers: FxHashMap<PeerId, ConnId>,
    peer_of: FxHashMap<ConnId, PeerId>,
    waiting: FxHashMap<u64, oneshot::Sender<AdminReply>>,
    admin_next: u64,
    /// What executing commands made happen; handled before the batch is closed.
    follow_ups: VecDeque<EngineEvent>,
    commands: Vec<EngineCommand>,
    buffers: Vec<Bytes>,
    stopped: bool,
}

impl DiskThread {
    /// Opens the file and the reactor; the store's recovery begins with [`Self::run`].
    pub(crate) fn prepare(
        config: DiskThreadConfig,
        publish: watch::Sender<DiskState>,
    ) -> Result<Self, DiskError> {
        let path = config.path;
        let io = |action| {
            let path = path.clone();
            move |source| DiskError::Io {
                path,
                action,
                source,
            }
        };
        let file = crate::offline::open_for_service(&path)?;
        let mut reactor =
            Reactor::new(ReactorConfig::default()).map_err(io("make an io_uring for"))?;
        let boot_id = ashlar_platform::boot_id().map_err(io("read the boot id for"))?;
        let size = file.size();
        let discards = match config.discard {
            DiscardPolicy::On => true,
            DiscardPolicy::Off => false,
            DiscardPolicy::Auto => {
                file.is_block_device() || file.is_sparse().map_err(io("look at"))?
            }
        };
        let disk = reactor.add_disk(file);
        let mut bounds = config.store;
        bounds.discard_after = bounds.discard_after.filter(|_| discards);
        let store = Store::open(bounds, size, boot_id, reactor.now());
        Ok(Self {
            path,
            listen: config.listen,
            local_sockets: config.local_sockets,
            reactor,
            disk,
            engine: DiskEngine::new(store),
            publish,
            listeners: Vec::new(),
            clients: FxHashMap::default(),
            peers: FxHashMap::default(),
            peer_of: FxHashMap::default(),
            waiting: FxHashMap::default(),
            admin_next: 0,
            follow_ups: VecDeque::new(),
            commands: Vec::new(),
            buffers: Vec::new(),
            stopped: false,
        })
    }

    /// Serves the disk until it is stopped.
    pub(crate) fn run(&mut self, control: &Receiver<Control>) {
        let mut events = Vec::new();
        self.end_round();
        loop {
            let deadline = self.engine.next_deadline();
            if let Err(error) = self.reactor.wait(deadline, &mut events) {
                return self.fail(format!("its reactor failed: {error}"));
            }
            for event in events.drain(..) {
                if matches!(event, Event::Woken) {
                    self.take_control(control);
                } else {
                    self.on_event(event);
                }
                self.follow_up();
            }
            self.end_round();
            if self.stopped {
                return self.farewell();
            }
        }
    }

    /// Closes the store's batch.
    fn end_round(&mut self) {
        self.step(EngineEvent::Tick);
        while !self.follow_ups.is_empty() {
            self.follow_up();
            self.step(EngineEvent::Tick);
        }
    }

    fn follow_up(&mut self) {
        while let Some(event) = self.follow_ups.pop_front() {
            self.step(event);
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Accepted { conn, .. } => {
                let id = ConnectionId(conn.as_u64());
                self.clients.insert(
                    id,
                    Client {
                        conn,
                        paused: false,
                    },
                );
            }
            Event::Connected { conn } => {
                if let Some(&peer) = self.peer_of.get(&conn) {
                    self.step(EngineEvent::PeerUp { peer });
                }
            }
            Event::Received { conn } => self.on_received(conn),
            Event::Closed { conn, error } => {
                if let Some(peer) = self.peer_of.remove(&conn) {
                    self.peers.remove(&peer);
                    self.step(EngineEvent::PeerDown { peer });
                } else {
                    tracing::debug!(?error, conn = conn.as_u64(), "a connection ended");
                    self.forget_client(ConnectionId(conn.as_u64()));
                }
            }
            Event::Disk { completion, .. } => self.step(EngineEvent::Disk(completion)),
            Event::Sent { .. } | Event::Released { .. } | Event::Woken => {}
        }
    }

    fn forget_client(&mut self, conn: ConnectionId) {
        if self.clients.remove(&conn).is_some() {
            self.step(EngineEvent::ConnClosed { conn });
        }
    }

    fn on_received(&mut self, conn: ConnId) {
        if let Some(&peer) = self.peer_of.get(&conn) {
            return self.on_peer_received(conn, peer);
        }
        let id = ConnectionId(conn.as_u64());
        while self.clients.get(&id).is_some_and(|client| !client.paused) {
            if self.awaits_frame(conn) {
                return;
            }
            match decode(self.reactor.input(conn), Direction::Requests) {
                Ok(Some(Decoded::Request(request))) => {
                    self.step(EngineEvent::Request { conn: id, request });
                }
                Ok(None) => return,
                Ok(Some(Decoded::Reply(_))) => return self.refuse(conn, "a reply"),
                Err(error) => return self.refuse(conn, &error.to_string()),
            }
        }
    }

    /// Whether a frame is there in part; then the rest will arrive in one piece with it, uncopied.
    fn awaits_frame(&mut self, conn: ConnId) -> bool {
        let input = self.reactor.input(conn);
        match frame_length(input) {
            Some(length) if input.len() < length.total => {
                let (total, payload_at) = (length.total, length.payload_at);
                self.reactor.reserve_aligned(conn, total, payload_at);
                true
            }
            _ => false,
        }
    }

    fn refuse(&mut self, conn: ConnId, reason: &str) {
        tracing::warn!(
            reason,
            conn = conn.as_u64(),
            "closing a connection that breaks the data protocol"
        );
        self.reactor.close(conn);
        self.forget_client(ConnectionId(conn.as_u64()));
    }

    fn on_peer_received(&mut self, conn: ConnId, peer: PeerId) {
        while self.peers.get(&peer) == Some(&conn) {
            if self.awaits_frame(conn) {
                return;
            }
            match decode(self.reactor.input(conn), Direction::Replies) {
                Ok(Some(Decoded::Reply(reply))) => {
                    self.step(EngineEvent::PeerReply { peer, reply })
                }
                Ok(None) => return,
                other => {
                    tracing::warn!(?other, "the source of a pull breaks the data protocol");
                    self.reactor.close(conn);
                    self.peers.remove(&peer);
                    self.peer_of.remove(&conn);
                    return self.step(EngineEvent::PeerDown { peer });
                }
            }
        }
    }

    fn take_control(&mut self, control: &Receiver<Control>) {
        loop {
            match control.try_recv() {
                Ok(Control { request, answer }) => {
                    if request == AdminRequest::Stop {
                        for listener in self.listeners.drain(..) {
                            self.reactor.close_listener(listener);
                        }
                    }
                    self.admin_next += 1;
                    let tag = self.admin_next;
                    self.waiting.insert(tag, answer);
                    self.step(EngineEvent::Admin { tag, request });
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    // The daemon dropped its handle: the process is ending.
                    self.stopped = true;
                    return;
                }
            }
        }
    }

    fn step(&mut self, event: EngineEvent) {
        let now = self.reactor.now();
        let mut commands = std::mem::take(&mut self.commands);
        self.engine.step(now, event, &mut commands);
        for command in commands.drain(..) {
            self.execute(command);
        }
        self.commands = commands;
    }

    fn execute(&mut self, command: EngineCommand) {
        match command {
            EngineCommand::Reply { conn, reply } => {
                if let Some(client) = self.clients.get(&conn) {
                    let conn = client.conn;
                    encode_reply(&reply, &mut self.buffers);
                    for buffer in self.buffers.drain(..) {
                        self.reactor.send(conn, buffer);
                    }
                }
            }
            EngineCommand::Close { conn } => {
                if let Some(client) = self.clients.remove(&conn) {
                    self.reactor.close_after_send(client.conn);
                    self.follow_ups.push_back(EngineEvent::ConnClosed { conn });
                }
            }
            EngineCommand::Pause { conn } => {
                if let Some(client) = self.clients.get_mut(&conn) {
                    client.paused = true;
                    self.reactor.pause_receive(client.conn);
                }
            }
            EngineCommand::Resume { conn } => {
                if let Some(client) = self.clients.get_mut(&conn) {
                    client.paused = false;
                    self.reactor.resume_receive(client.conn);
                }
            }
            EngineCommand::PeerConnect { peer, address } => self.connect(peer, &address),
            EngineCommand::PeerSend { peer, request } => {
                if let Some(&conn) = self.peers.get(&peer) {
                    encode_request(&request, &mut self.buffers);
                    for buffer in self.buffers.drain(..) {
                        self.reactor.send(conn, buffer);
                    }
                }
            }
            EngineCommand::PeerClose { peer } => {
                if let Some(conn) = self.peers.remove(&peer) {
                    self.peer_of.remove(&conn);
                    self.reactor.close(conn);
                }
            }
            EngineCommand::Disk(command) => self.reactor.disk(self.disk, command),
            EngineCommand::Admin { tag, reply } => {
                if let Some(answer) = self.waiting.remove(&tag) {
                    // Whoever asked may have given up.
                    let _ = answer.send(reply);
                }
            }
            EngineCommand::Ready(identity) => self.serve(identity),
            EngineCommand::Failed { message } => self.fail(message),
            EngineCommand::Stopped => {
                self.publish.send_if_modified(|state| {
                    let clean = !matches!(state, DiskState::Failed { .. });
                    if clean {
                        *state = DiskState::Stopped;
                    }
                    clean
                });
                self.stopped = true;
            }
        }
    }

    fn connect(&mut self, peer: PeerId, address: &str) {
        match address.parse::<SocketAddr>() {
            Ok(address) => {
                let conn = self.reactor.connect_tcp(address);
                self.peers.insert(peer, conn);
                self.peer_of.insert(conn, peer);
            }
            Err(_) => {
                tracing::warn!(
                    address,
                    "the source of a pull has no address of the form ip:port"
                );
                self.follow_ups.push_back(EngineEvent::PeerDown { peer });
            }
        }
    }

    fn serve(&mut self, identity: StoreIdentity) {
        let any = SocketAddr::new(self.listen.ip(), 0);
        let listening = self.reactor.listen_tcp(self.listen).or_else(|error| {
            if self.listen.port() == 0 {
                return Err(error);
            }
            tracing::warn!(address = %self.listen, %error, "cannot listen there, taking another port");
            self.reactor.listen_tcp(any)
        });
        match listening {
            Ok((listener, address)) => {
                self.listeners.push(listener);
                self.serve_locally(identity.disk);
                tracing::info!(disk = %identity.disk, path = %self.path.display(), %address,
                    incarnation = identity.incarnation.0, new_incarnation = identity.incarnation_changed,
                    bad_blocks = identity.bad_blocks, "serving a disk");
                self.publish
                    .send_replace(DiskState::Serving { identity, address });
            }
            Err(error) => self.fail(format!("cannot listen on {}: {error}", self.listen)),
        }
    }

    /// Clients on this machine get a unix socket; they can do without.
    fn serve_locally(&mut self, disk: DiskId) {
        let Some(directory) = &self.local_sockets else {
            return;
        };
        let socket = directory.join(format!("{disk}.sock"));
        let listening = std::fs::create_dir_all(directory)
            .and_then(|()| self.reactor.listen_unix(&socket))
            .and_then(|listener| {
                self.listeners.push(listener);
                // Whoever may open it may do what a client may do.
                std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            });
        if let Err(error) = listening {
            tracing::warn!(path = %socket.display(), %error,
                "cannot serve a disk on a unix socket; clients use TCP");
        }
    }

    fn fail(&mut self, message: String) {
        tracing::error!(path = %self.path.display(), message,
            "a disk is not served; replace it, or restart the daemon if its cause is gone");
        self.publish.send_modify(|state| {
            let served = match state {
                DiskState::Serving { identity, address } => Some((*identity, *address)),
                _ => None,
            };
            *state = DiskState::Failed { message, served };
        });
    }

    /// Lets the last replies leave.
    fn farewell(&mut self) {
        let end = self.reactor.now().after(FAREWELL);
        let mut events = Vec::new();
        while self
            .clients
            .values()
            .any(|c| self.reactor.send_queued_bytes(c.conn) > 0)
            && self.reactor.now() < end
        {
            if self.reactor.wait(Some(end), &mut events).is_err() {
                return;
            }
            events.clear();
        }
    }
}
