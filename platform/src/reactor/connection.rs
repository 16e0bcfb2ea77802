//! A connection: its socket, its state, the operations in flight for it.
//!
//! State transitions:
//!
//! | from | event | to |
//! |---|---|---|
//! | Connecting | connected | Open |
//! | Connecting, Open | failure, end of stream | Dead (Closed is reported) |
//! | Connecting, Open | `close` | Dead (nothing is reported) |
//! | Open | `close_after_send` | Lingering |
//! | Lingering | end of stream, failure, deadline, `close` | Dead (nothing is reported) |
//! | Open | `release` | Releasing |
//! | Releasing | everything sent, no operation in flight | Dead (Released is reported) |
//! | Releasing | failure, end of stream | Dead (Closed is reported) |
//!
//! Invariant: a connection leaves the reactor's table only when Dead, its Closed delivered or not wanted,
//! and no operation in flight, so the buffers and the socket outlive every operation on them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::Shutdown;

use super::input::Input;
use super::output::Output;
use super::socket;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    Connecting,
    Open,
    /// Sends what is queued, then waits for the peer's end of stream.
    Lingering,
    /// Sends what is queued, then gives its socket back.
    Releasing,
    /// Waits for its operations to end.
    Dead {
        /// Closed by the consumer: nothing is reported any more.
        silent: bool,
    },
}

pub(super) struct Connection {
    /// None if there was not even one to connect with; the connection is Dead then.
    pub socket: Option<OwnedFd>,
    pub state: State,
    pub input: Input,
    pub output: Output,
    pub connect_in_flight: bool,
    /// The consumer wants nothing more for now.
    pub paused: bool,
    /// The peer's end of stream came while paused.
    pub ended: bool,
    /// On the list of connections to look at before the next wait.
    pub dirty: bool,
    /// Lingering: everything is sent and the peer has been told.
    pub finished: bool,
    /// `Closed` was delivered.
    pub reported: bool,
}

impl Connection {
    pub fn new(socket: Option<OwnedFd>, state: State, receive_buffer: usize) -> Self {
        Self {
            socket,
            state,
            input: Input::new(receive_buffer),
            output: Output::new(),
            connect_in_flight: false,
            paused: false,
            ended: false,
            dirty: false,
            finished: false,
            reported: false,
        }
    }

    /// The descriptor for an operation.
    pub fn descriptor(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// The outcome of the connection attempt; the socket is ready for use if it is a success.
    pub fn connect_outcome(&self, user_timeout: Duration) -> io::Result<()> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        socket::connect_outcome(socket)?;
        socket::prepare(socket, user_timeout)
    }

    /// Shuts the socket down; false if it was not connected.
    pub fn shutdown(&self, how: Shutdown) -> bool {
        self.socket
            .as_ref()
            .is_some_and(|socket| rustix::net::shutdown(socket, how).is_ok())
    }

    /// Whether the kernel may still use this connection's memory or socket.
    pub fn in_flight(&self) -> bool {
        self.connect_in_flight || self.input.in_flight() || self.output.in_flight()
    }

    /// Whether the table may forget this connection.
    pub fn is_over(&self) -> bool {
        match self.state {
            State::Dead { silent } => (silent || self.reported) && !self.in_flight(),
            State::Connecting | State::Open | State::Lingering | State::Releasing => false,
        }
    }

    pub fn is_alive(&self) -> bool {
        !matches!(self.state, State::Dead { .. })
    }

    /// Whether a receive should be started.
    pub fn wants_input(&self) -> bool {
        match self.state {
            State::Open => {
                !self.paused
                    && !self.ended
                    && !self.input.in_flight()
                    && self.input.received.len() < super::input::INPUT_MAX
            }
            State::Lingering => !self.input.in_flight(),
            State::Connecting | State::Releasing | State::Dead { .. } => false,
        }
    }

    /// Whether a send should be started.
    pub fn wants_output(&self) -> bool {
        matches!(
            self.state,
            State::Open | State::Lingering | State::Releasing
        ) && self.output.is_ready()
    }
}
