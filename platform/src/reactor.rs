//! One thread's I/O: sockets, disks, deadlines and wake-ups on one io_uring.
//!
//! A consumer loops: `wait` for events, handle all of them (which queues sends, disk commands, closes),
//! `wait` again. One system call per turn submits everything queued and waits. Nothing is polled.
//!
//! Invariants:
//! - A reactor stays on the thread that made it (it is not `Send`).
//! - At most one receive and one send are in flight per connection; a receive goes into a large buffer
//!   (many frames per receive), a send carries all that is queued (many replies per send).
//! - Memory and descriptors that the kernel uses are kept until the operation's completion, also when a
//!   connection is closed or the reactor dropped: `Connection`, `Listener` and `Operation` leave their
//!   tables only without operations in flight, and `Drop` cancels and waits.
//! - Every connection that was not closed by the consumer reports exactly one `Closed`, as its last event.
#![expect(
    unsafe_code,
    reason = "io_uring operations and the descriptors that they return"
)]

mod arming;
mod completions;
mod connection;
mod disks;
mod input;
mod output;
mod release;
mod ring;
mod slab;
mod socket;
mod teardown;
mod types;
mod waker;

use std::io;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use io_uring::{opcode, types as uring};

use crate::buffer::BufferPool;
use crate::clock::{self, Time};
use crate::disk::{DiskCommand, DiskFile};

pub use input::RESERVE_MAX;
pub use types::{ConnId, DiskIndex, Event, ListenerId, ReactorConfig};
pub use waker::Waker;

use connection::{Connection, State};
use disks::{Disk, Operation};
use input::Retired;
use ring::Ring;
use slab::Slab;

/// Disks of one reactor whose descriptors are registered with the ring; more work too, a little slower.
const REGISTERED_DISKS: u32 = 64;
/// How long a connection may linger after `close_after_send`.
const LINGER: Duration = Duration::from_secs(5);
/// Pause of a listener after an error such as "too many open files".
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a completion belongs to: the upper byte of the user data; the lower half is a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Kind {
    Receive = 1,
    Send,
    Connect,
    Accept,
    Wake,
    Disk,
    Cancel,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Receive,
        Self::Send,
        Self::Connect,
        Self::Accept,
        Self::Wake,
        Self::Disk,
        Self::Cancel,
    ];

    fn user_data(self, slot: u32) -> u64 {
        u64::from(self as u8) << 56 | u64::from(slot)
    }

    fn of(user_data: u64) -> (Self, u32) {
        let kind = Self::ALL[(user_data >> 56) as usize - 1];
        (kind, user_data as u32)
    }
}

struct Listener {
    socket: OwnedFd,
    accept_in_flight: bool,
    /// No accept before this time.
    paused_until: Option<Time>,
    closed: bool,
}

/// See the module.
pub struct Reactor {
    ring: Ring,
    config: ReactorConfig,
    connections: Slab<Connection>,
    listeners: Slab<Listener>,
    disks: Vec<Disk>,
    operations: Slab<Operation>,
    /// Connections to look at before the next wait.
    dirty: Vec<u32>,
    /// Dead connections to remove before the next wait, if nothing is in flight for them.
    dead: Vec<u32>,
    /// Listeners may have accepts to start.
    listeners_dirty: bool,
    /// Some listener pauses after an error.
    listeners_paused: bool,
    /// Connections that linger, with their deadlines.
    lingering: Vec<(Time, ConnId)>,
    /// Events found outside completions.
    ready: Vec<Event>,
    retired: Retired,
    pool: BufferPool,
    waker: Waker,
    /// Where the eventfd's counter goes.
    wake_count: Box<u64>,
    wake_in_flight: bool,
    /// What `input` shows of connections that are gone.
    no_input: BytesMut,
    files_registered: bool,
    not_send: PhantomData<Rc<()>>,
}

impl Reactor {
    /// A reactor for this thread.
    ///
    /// # Errors
    /// If the kernel has no io_uring, forbids it, or is older than 5.11.
    pub fn new(config: ReactorConfig) -> io::Result<Self> {
        let mut ring = Ring::new(config.entries)?;
        let files_registered = ring.register_files(REGISTERED_DISKS);
        let config = ReactorConfig {
            receive_buffer: config.receive_buffer.max(64 * 1024),
            ..config
        };
        Ok(Self {
            ring,
            config,
            connections: Slab::default(),
            listeners: Slab::default(),
            disks: Vec::new(),
            operations: Slab::default(),
            dirty: Vec::new(),
            dead: Vec::new(),
            listeners_dirty: false,
            listeners_paused: false,
            lingering: Vec::new(),
            ready: Vec::new(),
            retired: Retired::new(config.receive_buffer),
            pool: BufferPool::new(config.buffer_pool_bytes),
            waker: Waker::new()?,
            wake_count: Box::new(0),
            wake_in_flight: false,
            no_input: BytesMut::new(),
            files_registered,
            not_send: PhantomData,
        })
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Time {
        clock::now()
    }

    /// A handle that wakes this reactor from any thread.
    #[must_use]
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// The pool that disk reads come from; take buffers for writes from it as well.
    #[must_use]
    pub fn buffers(&self) -> &BufferPool {
        &self.pool
    }

    /// Listens on an address (port 0: any), and tells the actual one.
    ///
    /// # Errors
    /// Those of socket, bind and listen.
    pub fn listen_tcp(&mut self, address: SocketAddr) -> io::Result<(ListenerId, SocketAddr)> {
        let (socket, actual) = socket::listen_tcp(address)?;
        Ok((self.add_listener(socket), actual))
    }

    /// Listens on a unix socket; replaces a socket file on which nobody listens any more.
    ///
    /// # Errors
    /// Those of socket, bind and listen.
    pub fn listen_unix(&mut self, path: &Path) -> io::Result<ListenerId> {
        let socket = socket::listen_unix(path)?;
        Ok(self.add_listener(socket))
    }

    fn add_listener(&mut self, socket: OwnedFd) -> ListenerId {
        self.listeners_dirty = true;
        let listener = Listener {
            socket,
            accept_in_flight: false,
            paused_until: None,
            closed: false,
        };
        let (slot, generation) = self.listeners.insert(listener);
        ListenerId { slot, generation }
    }

    /// Stops listening. Connections that were accepted stay.
    pub fn close_listener(&mut self, listener: ListenerId) {
        let Some(entry) = self.listeners.get_mut(listener.slot, listener.generation) else {
            return;
        };
        entry.closed = true;
        if entry.accept_in_flight {
            self.cancel(Kind::Accept.user_data(listener.slot));
        } else {
            self.listeners.remove(listener.slot);
        }
    }

    /// Starts to connect: `Connected` or `Closed` follows. There is no time limit but TCP's own (about
    /// two minutes): `close` the connection when it takes too long.
    pub fn connect_tcp(&mut self, address: SocketAddr) -> ConnId {
        self.add_attempt(socket::connect_tcp(address))
    }

    /// Connects to a unix socket: `Connected` or `Closed` follows.
    pub fn connect_unix(&mut self, path: &Path) -> ConnId {
        self.add_attempt(socket::connect_unix(path))
    }

    fn add_attempt(&mut self, attempt: io::Result<socket::Attempt>) -> ConnId {
        let full = self.connections.len() >= self.config.connections_max;
        let attempt = match attempt {
            Ok(_) if full => Err(io::Error::other("too many connections")),
            other => other,
        };
        let attempt = match attempt {
            Ok(attempt) => attempt,
            Err(error) => return self.refused(error),
        };
        let descriptor = attempt.socket.as_raw_fd();
        let conn = self.add_connection(attempt.socket, State::Connecting);
        if attempt.connected {
            if self.connected(conn) {
                self.ready.push(Event::Connected { conn });
            }
        } else {
            let entry = opcode::PollAdd::new(uring::Fd(descriptor), libc::POLLOUT as u32)
                .build()
                .user_data(Kind::Connect.user_data(conn.slot));
            // SAFETY: the descriptor lives in the connection, which stays until `connect_in_flight` ends.
            unsafe { self.ring.push(entry) };
            if let Some(connection) = self.connections.at(conn.slot) {
                connection.connect_in_flight = true;
            }
        }
        conn
    }

    /// A connection that could not even be attempted: `Closed` follows.
    fn refused(&mut self, error: io::Error) -> ConnId {
        let state = State::Dead { silent: false };
        let connection = Connection::new(None, state, self.config.receive_buffer);
        let (slot, generation) = self.connections.insert(connection);
        let conn = ConnId { slot, generation };
        self.ready.push(Event::Closed {
            conn,
            error: Some(error),
        });
        conn
    }

    /// Takes over a connected stream socket.
    ///
    /// # Errors
    /// If it is none, or there are too many connections.
    pub fn adopt(&mut self, socket: OwnedFd) -> io::Result<ConnId> {
        if self.connections.len() >= self.config.connections_max {
            return Err(io::Error::other("too many connections"));
        }
        socket::prepare(&socket, self.config.tcp_user_timeout)?;
        Ok(self.add_connection(socket, State::Open))
    }

    /// As `adopt`, of a socket on which `received` has come in already. If that is not empty, a
    /// `Received` follows.
    ///
    /// # Errors
    /// As `adopt`.
    pub fn adopt_with(&mut self, socket: OwnedFd, received: &[u8]) -> io::Result<ConnId> {
        let conn = self.adopt(socket)?;
        if let Some(connection) = self.connections.at(conn.slot)
            && !received.is_empty()
        {
            connection.input.received = BytesMut::from(received);
            self.ready.push(Event::Received { conn });
        }
        Ok(conn)
    }

    fn add_connection(&mut self, socket: OwnedFd, state: State) -> ConnId {
        let connection = Connection::new(Some(socket), state, self.config.receive_buffer);
        let (slot, generation) = self.connections.insert(connection);
        self.mark(slot);
        ConnId { slot, generation }
    }

    /// What was received and not consumed yet. Consumers split off what they use; what they leave is
    /// there again, with more behind it, at the next `Received`. Empty for connections that are gone.
    ///
    /// A consumer that waits for the rest of a large frame should call [`Reactor::reserve`]
    /// (`BytesMut::reserve` works but copies).
    pub fn input(&mut self, conn: ConnId) -> &mut BytesMut {
        match self.connections.get_mut(conn.slot, conn.generation) {
            Some(connection) if connection.state != (State::Dead { silent: true }) => {
                &mut connection.input.received
            }
            _ => {
                self.no_input.clear();
                &mut self.no_input
            }
        }
    }

    /// Tells that the frame at the start of `input` has `total` bytes (at most [`RESERVE_MAX`]), so that it
    /// is received in one piece with at most one copy of what is there.
    pub fn reserve(&mut self, conn: ConnId, total: usize) {
        if let Some(connection) = self.connections.get_mut(conn.slot, conn.generation) {
            connection.input.reserve(total, None);
        }
    }

    /// As [`Reactor::reserve`], with the byte at `aligned_at` of the frame aligned to 4 KiB in memory where
    /// that can be had without another copy: for data that go to a disk from where they are.
    pub fn reserve_aligned(&mut self, conn: ConnId, total: usize, aligned_at: usize) {
        if let Some(connection) = self.connections.get_mut(conn.slot, conn.generation) {
            connection.input.reserve(total, Some(aligned_at));
        }
    }

    /// Queues bytes for sending; they leave at the next `wait`. Dropped if the connection is gone. A
    /// connection whose queue exceeds `send_queue_max` is ended with an error.
    pub fn send(&mut self, conn: ConnId, bytes: Bytes) {
        if let Some(connection) = self.open(conn) {
            connection.output.push(bytes);
            self.queued(conn);
        }
    }

    /// As `send`, copying the bytes into the connection's own buffer: better than `send` for small
    /// messages that the caller has in a buffer of its own.
    pub fn send_copy(&mut self, conn: ConnId, bytes: &[u8]) {
        if let Some(connection) = self.open(conn) {
            connection.output.push_copy(bytes);
            self.queued(conn);
        }
    }

    fn open(&mut self, conn: ConnId) -> Option<&mut Connection> {
        self.connections
            .get_mut(conn.slot, conn.generation)
            .filter(|connection| matches!(connection.state, State::Open | State::Connecting))
    }

    fn queued(&mut self, conn: ConnId) {
        if self.send_queued_bytes(conn) > self.config.send_queue_max {
            let error = io::Error::new(
                io::ErrorKind::StorageFull,
                "the peer does not read its data",
            );
            self.fail(conn.slot, Some(error));
        } else {
            self.mark(conn.slot);
        }
    }

    /// Bytes queued and not yet taken by the kernel.
    #[must_use]
    pub fn send_queued_bytes(&self, conn: ConnId) -> usize {
        self.connections
            .get(conn.slot, conn.generation)
            .map_or(0, |c| c.output.queued())
    }

    /// Receives nothing more until `resume_receive`; a receive in flight may still add to `input`, without
    /// an event.
    pub fn pause_receive(&mut self, conn: ConnId) {
        if let Some(connection) = self.open(conn) {
            connection.paused = true;
        }
    }

    /// Receives again. If `input` is not empty, a `Received` follows.
    pub fn resume_receive(&mut self, conn: ConnId) {
        let Some(connection) = self.open(conn) else {
            return;
        };
        if !connection.paused {
            return;
        }
        connection.paused = false;
        let ended = connection.ended;
        if !connection.input.received.is_empty() {
            self.ready.push(Event::Received { conn });
        }
        if ended {
            self.fail(conn.slot, None);
        } else {
            self.mark(conn.slot);
        }
    }

    /// Ends a connection at once, with what is queued. No event follows for it.
    pub fn close(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(conn.slot, conn.generation) {
            let was_alive = connection.is_alive();
            connection.state = State::Dead { silent: true };
            if was_alive {
                self.tear_down(conn.slot);
            }
        }
    }

    /// Ends a connection after its queue is sent (and for at most 5 s). What it still receives is dropped,
    /// and no event follows for it.
    pub fn close_after_send(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn.slot, conn.generation) else {
            return;
        };
        match connection.state {
            State::Open if !connection.ended => {
                connection.state = State::Lingering;
                connection.input.received.clear();
                self.lingering.push((clock::now().after(LINGER), conn));
                self.mark(conn.slot);
            }
            State::Lingering => {}
            State::Open | State::Connecting | State::Releasing | State::Dead { .. } => {
                self.close(conn);
            }
        }
    }

    /// Adds a disk.
    pub fn add_disk(&mut self, file: DiskFile) -> DiskIndex {
        let index = self.disks.len();
        let descriptor = std::os::fd::AsFd::as_fd(&file).as_raw_fd();
        let registered = u32::try_from(index)
            .ok()
            .filter(|&slot| self.files_registered && slot < REGISTERED_DISKS)
            .filter(|&slot| self.ring.register_file(slot, descriptor));
        self.disks.push(Disk {
            file,
            registered,
            discard_by_fallocate: false,
        });
        DiskIndex(index)
    }

    /// The file of a disk, for its size and sector.
    ///
    /// # Panics
    /// If there is no such disk.
    #[must_use]
    pub fn disk_file(&self, disk: DiskIndex) -> &DiskFile {
        &self.disks[disk.0].file
    }

    /// Starts a disk command at the next `wait`; an `Event::Disk` with its token follows.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn disk(&mut self, disk: DiskIndex, command: DiskCommand) {
        let operation = Operation::new(disk.0, &self.disks[disk.0].file, command, &self.pool);
        match operation {
            Ok(operation) => {
                let (slot, _) = self.operations.insert(operation);
                self.submit_disk(slot);
            }
            Err(completion) => self.ready.push(Event::Disk { disk, completion }),
        }
    }

    fn submit_disk(&mut self, slot: u32) {
        let Some(operation) = self.operations.at(slot) else {
            return;
        };
        let entry = operation
            .entry(&self.disks[operation.disk])
            .user_data(Kind::Disk.user_data(slot));
        // SAFETY: the operation owns the buffers and vectors that the entry names and stays in the table
        // until its completion; the disk's descriptor stays as long as the reactor.
        unsafe { self.ring.push(entry) };
    }

    /// Submits everything queued, waits until something happens or `deadline` passes, and appends all
    /// that happened to `events`.
    ///
    /// # Errors
    /// If the ring is unusable: a bug, or a kernel without memory.
    pub fn wait(&mut self, deadline: Option<Time>, events: &mut Vec<Event>) -> io::Result<()> {
        let before = events.len();
        loop {
            self.reap();
            self.arm();
            self.take_ready(events);
            let now = if deadline.is_some() || self.has_timers() {
                clock::now()
            } else {
                Time(0)
            };
            let timeout = self.timeout(deadline, now);
            let idle = events.len() == before && timeout != Some(Duration::ZERO);
            self.ring.enter(idle, timeout)?;
            while let Some(completion) = self.ring.next() {
                self.complete(completion, events);
            }
            self.take_ready(events);
            self.expire();
            if events.len() > before || deadline.is_some_and(|deadline| clock::now() >= deadline) {
                return Ok(());
            }
        }
    }

    /// Moves events found outside completions, without those of connections closed since.
    fn take_ready(&mut self, events: &mut Vec<Event>) {
        if self.ready.is_empty() {
            return;
        }
        let mut ready = std::mem::take(&mut self.ready);
        for event in ready.drain(..) {
            let (Event::Connected { conn } | Event::Received { conn } | Event::Closed { conn, .. }) =
                &event
            else {
                events.push(event);
                continue;
            };
            let ConnId { slot, generation } = *conn;
            let Some(connection) = self.connections.get_mut(slot, generation) else {
                continue;
            };
            if connection.state == (State::Dead { silent: true }) {
                continue;
            }
            if matches!(event, Event::Closed { .. }) {
                connection.reported = true;
                self.dead.push(slot);
            }
            events.push(event);
        }
        self.ready = ready;
    }

    fn mark(&mut self, slot: u32) {
        if let Some(connection) = self.connections.at(slot)
            && !connection.dirty
        {
            connection.dirty = true;
            self.dirty.push(slot);
        }
    }
}
