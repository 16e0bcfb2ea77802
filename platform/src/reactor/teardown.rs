//! The ends of things: failing and closing connections, lingering, deadlines of the reactor itself, and
//! the reactor's own end.
//!
//! Invariant: memory and descriptors are freed only after the completions of all operations on them.
#![expect(
    unsafe_code,
    reason = "cancel operations, and descriptors accepted while stopping"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use io_uring::opcode;
use rustix::net::Shutdown;

use super::connection::State;
use super::{ConnId, Event, Kind, Reactor};
use crate::clock::{self, Time};

/// How long a dropped reactor waits for its operations before it leaks their memory instead.
const DRAIN: Duration = Duration::from_secs(30);
/// How often it repeats itself meanwhile.
const DRAIN_STEP: Duration = Duration::from_millis(500);

impl Reactor {
    /// The connection ended by itself: makes the event ready that tells so, if nobody was told yet.
    pub(super) fn fail(&mut self, slot: u32, error: Option<io::Error>) {
        let generation = self.connections.generation(slot);
        let Some(connection) = self.connections.at(slot).filter(|c| c.is_alive()) else {
            return;
        };
        connection.state = State::Dead { silent: false };
        self.tear_down(slot);
        self.ready.push(Event::Closed {
            conn: ConnId { slot, generation },
            error,
        });
    }

    /// Ends the operations of a connection that just died.
    pub(super) fn tear_down(&mut self, slot: u32) {
        let Some(connection) = self.connections.at(slot) else {
            return;
        };
        connection.output.discard();
        // Fails on sockets that are not connected, which is as good.
        let _ = connection.shutdown(Shutdown::Both);
        let in_flight = [
            (Kind::Connect, connection.connect_in_flight),
            (Kind::Receive, connection.input.in_flight()),
            (Kind::Send, connection.output.in_flight()),
        ];
        for (kind, in_flight) in in_flight {
            if in_flight {
                self.cancel(kind.user_data(slot));
            }
        }
        self.dead.push(slot);
    }

    pub(super) fn cancel(&mut self, user_data: u64) {
        let entry = opcode::AsyncCancel::new(user_data)
            .build()
            .user_data(Kind::Cancel.user_data(0));
        // SAFETY: the entry names no memory and no descriptor.
        unsafe { self.ring.push(entry) };
    }

    /// Removes dead connections that nothing is in flight for; the others come back with their last
    /// completion.
    pub(super) fn reap(&mut self) {
        while let Some(slot) = self.dead.pop() {
            let Some(connection) = self.connections.at(slot) else {
                continue;
            };
            if connection.is_over() {
                self.connections.remove(slot);
                self.listeners_dirty = true;
            }
        }
    }

    /// Everything is sent: tells the peer, and waits for its end of stream (a close now could make the
    /// kernel drop what the peer has not read yet).
    pub(super) fn finish_lingering(&mut self, conn: ConnId) {
        if let Some(connection) = self.connections.get_mut(conn.slot, conn.generation)
            && !connection.finished
        {
            connection.finished = true;
            if !connection.shutdown(Shutdown::Write) {
                self.close(conn);
            }
        }
    }

    pub(super) fn has_timers(&self) -> bool {
        !self.lingering.is_empty() || self.listeners_paused
    }

    /// Time to wait at most.
    pub(super) fn timeout(&mut self, deadline: Option<Time>, now: Time) -> Option<Duration> {
        let mut first = deadline;
        let mut consider = |time: Time| first = Some(first.map_or(time, |first| first.min(time)));
        self.lingering.iter().for_each(|&(time, _)| consider(time));
        if self.listeners_paused {
            self.listeners
                .iter_mut()
                .filter_map(|(_, l)| l.paused_until)
                .for_each(&mut consider);
        }
        first.map(|time| time.since(now))
    }

    /// Handles the deadlines of the reactor itself.
    pub(super) fn expire(&mut self) {
        if !self.has_timers() {
            return;
        }
        let now = clock::now();
        let mut index = 0;
        while index < self.lingering.len() {
            let (deadline, conn) = self.lingering[index];
            let alive = self
                .connections
                .get(conn.slot, conn.generation)
                .is_some_and(super::connection::Connection::is_alive);
            if alive && deadline > now {
                index += 1;
                continue;
            }
            self.lingering.swap_remove(index);
            self.close(conn);
        }
        if self.listeners_paused {
            self.listeners_paused = false;
            for (_, listener) in self.listeners.iter_mut() {
                if listener.paused_until.is_some_and(|time| time <= now) {
                    listener.paused_until = None;
                    self.listeners_dirty = true;
                }
                self.listeners_paused |= listener.paused_until.is_some();
            }
        }
    }

    /// Cancels whatever is in flight and waits for its completions; false if they do not come.
    fn drain(&mut self) -> bool {
        let deadline = clock::now().after(DRAIN);
        while self.ring.in_flight() > 0 {
            if self.ring.enter(true, Some(DRAIN_STEP)).is_err() || clock::now() >= deadline {
                return false;
            }
            while let Some(completion) = self.ring.next() {
                let (kind, _) = Kind::of(completion.user_data);
                if kind == Kind::Accept && completion.result >= 0 {
                    // SAFETY: a successful accept returns a new descriptor, owned by nobody else.
                    drop(unsafe { OwnedFd::from_raw_fd(completion.result) });
                }
            }
        }
        true
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        let connections: Vec<u32> = self.connections.iter_mut().map(|(slot, _)| slot).collect();
        connections
            .into_iter()
            .for_each(|slot| self.tear_down(slot));
        let listeners: Vec<u32> = self
            .listeners
            .iter_mut()
            .filter(|(_, listener)| listener.accept_in_flight)
            .map(|(slot, _)| slot)
            .collect();
        listeners
            .into_iter()
            .for_each(|slot| self.cancel(Kind::Accept.user_data(slot)));
        if self.wake_in_flight {
            self.cancel(Kind::Wake.user_data(0));
        }
        if !self.drain() {
            tracing::error!("operations did not end when a reactor stopped: leaking their memory");
            Box::leak(Box::new((
                std::mem::take(&mut self.connections),
                std::mem::take(&mut self.operations),
                std::mem::take(&mut self.wake_count),
            )));
        }
    }
}
