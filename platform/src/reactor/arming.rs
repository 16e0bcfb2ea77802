//! Starting what is due before a wait: receives, sends, accepts, the wake-up read.
//!
//! Invariant: an operation is started only when the previous one of its kind on the same object is done.
#![expect(unsafe_code, reason = "io_uring operations")]

use std::os::fd::AsRawFd;

use io_uring::{opcode, types as uring};

use super::output::Send;
use super::{Kind, Reactor};

impl Reactor {
    /// Starts the receives, sends and accepts that are due.
    pub(super) fn arm(&mut self) {
        if !self.wake_in_flight {
            self.wake_in_flight = true;
            let start = (&raw mut *self.wake_count).cast();
            let entry = opcode::Read::new(uring::Fd(self.waker.descriptor()), start, 8)
                .build()
                .user_data(Kind::Wake.user_data(0));
            // SAFETY: counter and descriptor live in the reactor, which waits for this in its Drop.
            unsafe { self.ring.push(entry) };
        }
        if self.listeners_dirty {
            self.arm_listeners();
        }
        while let Some(slot) = self.dirty.pop() {
            let Some(connection) = self.connections.at(slot) else {
                continue;
            };
            connection.dirty = false;
            if connection.wants_output() {
                let fd = uring::Fd(connection.descriptor());
                let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
                let entry = match connection.output.prepare() {
                    Send::Plain(start, length) => {
                        opcode::Send::new(fd, start, length).flags(flags).build()
                    }
                    Send::Vectored(header) => {
                        opcode::SendMsg::new(fd, header).flags(flags as u32).build()
                    }
                };
                // SAFETY: the connection keeps the queue, the vectors and the socket until completion.
                unsafe { self.ring.push(entry.user_data(Kind::Send.user_data(slot))) };
            }
            if connection.wants_input() {
                let fd = uring::Fd(connection.descriptor());
                let (start, length) = connection.input.prepare(&mut self.retired);
                let entry = opcode::Recv::new(fd, start, length).build();
                // SAFETY: the connection keeps the landing part, untouched, and the socket until
                // completion.
                unsafe {
                    self.ring
                        .push(entry.user_data(Kind::Receive.user_data(slot)))
                };
            }
        }
    }

    fn arm_listeners(&mut self) {
        self.listeners_dirty = false;
        if self.connections.len() >= self.config.connections_max {
            return;
        }
        for (slot, listener) in self.listeners.iter_mut() {
            if listener.accept_in_flight || listener.closed || listener.paused_until.is_some() {
                continue;
            }
            listener.accept_in_flight = true;
            let fd = uring::Fd(listener.socket.as_raw_fd());
            let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build()
                .user_data(Kind::Accept.user_data(slot));
            // SAFETY: no memory; the listener stays in its table while `accept_in_flight`.
            unsafe { self.ring.push(entry) };
        }
    }
}
