//! The thread of one disk: select (reactor) -> step (engine) -> execute (commands), and the handle that
//! the rest of the daemon holds of it.
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
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::{
    ConnId, DiskIndex, Event, ListenerId, Reactor, ReactorConfig, Waker,
};
use ashlar_proto::ids::DiskId;
use ashlar_proto::wire::{Decoded, Direction, decode, encode_reply, encode_request, frame_length};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use tokio::sync::{oneshot, watch};

use crate::engine::{
    AdminReply, AdminRequest, ChunkStore, ConnectionId, DiskEngine, EngineCommand, EngineEvent,
    PeerId,
};
use crate::error::DiskError;
use crate::store::{Store, StoreCommand, StoreConfig, StoreEvent, StoreIdentity};

/// Administrative requests that may wait for a disk's thread.
const CONTROL_QUEUE: usize = 64;
/// How long the daemon waits for an administrative answer.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
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

/// What a disk's thread is told when it starts.
#[derive(Clone, Debug)]
pub struct DiskThreadConfig {
    /// The file or device.
    pub path: PathBuf,
    /// Where to listen; port 0 for any.
    pub listen: SocketAddr,
    /// Where to listen on a unix socket as well, `DISK-ID.sock` in this directory.
    pub local_sockets: Option<PathBuf>,
    /// The store's bounds.
    pub store: StoreConfig,
}

/// Where a disk's thread is.
#[derive(Clone, PartialEq, Debug)]
pub enum DiskState {
    /// Recovering.
    Opening,
    /// Serving at this address.
    Serving {
        /// Who the disk is.
        identity: StoreIdentity,
        /// Where it listens.
        address: SocketAddr,
    },
    /// Not served; the disk, if it could be opened, refuses every request.
    Failed {
        /// Why.
        message: String,
        /// Who the disk is and where it listens, if it was served.
        served: Option<(StoreIdentity, SocketAddr)>,
    },
    /// Closed cleanly.
    Stopped,
}

struct Control {
    request: AdminRequest,
    answer: oneshot::Sender<AdminReply>,
}

/// The thread did not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskGone {
    /// It ended.
    #[error("the disk's thread has ended")]
    Ended,
    /// It has too much to do.
    #[error("the disk's thread does not answer")]
    Silent,
}

/// A disk's thread, as the daemon sees it.
pub struct DiskHandle {
    /// `None` only while it is dropped.
    control: Option<SyncSender<Control>>,
    waker: Waker,
    state: watch::Receiver<DiskState>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DiskHandle {
    /// Opens the disk's file and starts its thread; `Serving` or `Failed` follows in `state`.
    ///
    /// # Errors
    /// If the file cannot be opened, or there is no io_uring.
    pub fn start(config: DiskThreadConfig) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let failed = |message: String| DiskError::Thread {
            path: path.clone(),
            message,
        };
        let (control, receiver) = sync_channel(CONTROL_QUEUE);
        let (publish, state) = watch::channel(DiskState::Opening);
        // The reactor is made on the thread that uses it; its waker comes back once.
        let (ready, made) = sync_channel::<Result<Waker, DiskError>>(1);
        let name = path
            .file_name()
            .map_or("disk".into(), |n| n.to_string_lossy().into_owned());
        let thread = std::thread::Builder::new()
            .name(format!("disk {name}"))
            .spawn(move || {
                let guard = Obituary(publish.clone());
                let prepared = DiskThread::prepare(config, publish);
                match prepared {
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                    Ok(mut thread) => {
                        let _ = ready.send(Ok(thread.reactor.waker()));
                        thread.run(&receiver);
                    }
                }
                drop(guard);
            })
            .map_err(|error| failed(format!("cannot start its thread: {error}")))?;
        let waker = made
            .recv()
            .map_err(|_| failed("its thread ended at once".to_owned()))??;
        Ok(Self {
            control: Some(control),
            waker,
            state,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// What the thread publishes.
    pub fn state(&self) -> watch::Receiver<DiskState> {
        self.state.clone()
    }

    /// Asks the thread.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminReply, DiskGone> {
        let answer = self.post(request)?;
        match tokio::time::timeout(ADMIN_TIMEOUT, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(DiskGone::Ended),
            Err(_) => Err(DiskGone::Silent),
        }
    }

    /// Asks the thread, from code without a runtime.
    pub fn admin_blocking(&self, request: AdminRequest) -> Result<AdminReply, DiskGone> {
        self.post(request)?
            .blocking_recv()
            .map_err(|_| DiskGone::Ended)
    }

    fn post(&self, request: AdminRequest) -> Result<oneshot::Receiver<AdminReply>, DiskGone> {
        let (answer, receiver) = oneshot::channel();
        let control = self.control.as_ref().ok_or(DiskGone::Ended)?;
        match control.try_send(Control { request, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(DiskGone::Silent),
            Err(TrySendError::Disconnected(_)) => return Err(DiskGone::Ended),
        }
        self.waker.wake();
        Ok(receiver)
    }

    /// Waits for the thread's end, after [`AdminRequest::Stop`].
    pub fn join(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a disk's thread panicked");
        }
    }
}

impl DiskHandle {
    /// Ends the thread as the death of the process would: nothing is finished, flushed or marked.
    pub fn abandon(self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(self);
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a disk's thread panicked");
        }
    }
}

/// A thread without a handle ends.
impl Drop for DiskHandle {
    fn drop(&mut self) {
        self.control = None;
        self.waker.wake();
    }
}

/// Publishes the end of a thread that ended without saying so.
struct Obituary(watch::Sender<DiskState>);

impl Drop for Obituary {
    fn drop(&mut self) {
        self.0.send_if_modified(|state| {
            let served = match state {
                DiskState::Stopped | DiskState::Failed { .. } => return false,
                DiskState::Serving { identity, address } => Some((*identity, *address)),
                DiskState::Opening => None,
            };
            *state = DiskState::Failed {
                message: "the disk's thread ended".to_owned(),
                served,
            };
            true
        });
    }
}

struct Client {
    conn: ConnId,
    paused: bool,
}

struct DiskThread {
    path: PathBuf,
    listen: SocketAddr,
    local_sockets: Option<PathBuf>,
    reactor: Reactor,
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
    fn prepare(
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
        let disk = reactor.add_disk(file);
        let store = Store::open(config.store, size, boot_id, reactor.now());
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

    fn run(&mut self, control: &Receiver<Control>) {
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
