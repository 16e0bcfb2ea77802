//! Names, events and settings of the reactor.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;

use crate::disk::DiskCompletion;

/// A connection. Names are never used again, so an old one finds nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConnId {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

impl ConnId {
    /// The name as a number, for maps and logs.
    #[must_use]
    pub fn as_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }
}

/// A listening socket.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ListenerId {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

/// A disk, by the order of `add_disk`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DiskIndex(pub usize);

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A listener has a new connection.
    Accepted {
        /// Which listener.
        listener: ListenerId,
        /// The new connection.
        conn: ConnId,
    },
    /// `connect_*` succeeded.
    Connected {
        /// The connection.
        conn: ConnId,
    },
    /// `input` has grown (or receiving was resumed and `input` is not empty).
    Received {
        /// The connection.
        conn: ConnId,
    },
    /// Everything that was queued is handed to the kernel.
    Sent {
        /// The connection.
        conn: ConnId,
    },
    /// The connection is gone: by the peer's end of stream (no error) or by an error. The last event of
    /// a connection, and the only one of its kind; its `input` can be read until the next `wait`. A
    /// connection that the consumer closed has no such event.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why; `None` is the peer's orderly end.
        error: Option<io::Error>,
    },
    /// What `release` asked for; the last event of a connection.
    Released {
        /// The connection.
        conn: ConnId,
        /// Its socket, blocking, with nothing in flight.
        socket: OwnedFd,
        /// What was received and not consumed.
        received: Bytes,
    },
    /// A disk command is done.
    Disk {
        /// The disk.
        disk: DiskIndex,
        /// Its outcome.
        completion: DiskCompletion,
    },
    /// A `Waker` was used, once or several times.
    Woken,
}

/// Settings of a reactor.
#[derive(Clone, Copy, Debug)]
pub struct ReactorConfig {
    /// Operations submitted in one system call (more are submitted in several).
    pub entries: u32,
    /// Size of the allocations that connections receive into, in bytes; at least 64 KiB.
    pub receive_buffer: usize,
    /// Unacknowledged data for so long ends a TCP connection.
    pub tcp_user_timeout: Duration,
    /// Connections at once; further ones wait to be accepted, further `connect`s fail.
    pub connections_max: usize,
    /// Bytes queued for sending at which a connection is given up: its peer does not read.
    pub send_queue_max: usize,
    /// Idle bytes of aligned buffers that the reactor keeps.
    pub buffer_pool_bytes: usize,
}

impl Default for ReactorConfig {
    fn default() -> Self {
        Self {
            entries: 512,
            receive_buffer: 256 * 1024,
            tcp_user_timeout: Duration::from_secs(5),
            connections_max: 4096,
            send_queue_max: 512 * 1024 * 1024,
            buffer_pool_bytes: crate::buffer::POOL_IDLE_MAX,
        }
    }
}
