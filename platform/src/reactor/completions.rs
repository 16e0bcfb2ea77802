//! What completions of operations lead to.
//!
//! Invariant: each completion ends the use of its operation's memory by the kernel before anything else is
//! done with it.
#![expect(
    unsafe_code,
    reason = "received bytes, and descriptors that accepts return"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::connection::State;
use super::disks::Next;
use super::ring::Completion;
use super::{ACCEPT_PAUSE, ConnId, DiskIndex, Event, Kind, ListenerId, Reactor};
use crate::clock;

impl Reactor {
    pub(super) fn complete(&mut self, completion: Completion, events: &mut Vec<Event>) {
        let (kind, slot) = Kind::of(completion.user_data);
        match kind {
            Kind::Receive => self.received(slot, completion, events),
            Kind::Send => self.sent(slot, completion.outcome(), events),
            Kind::Connect => {
                let conn = ConnId {
                    slot,
                    generation: self.connections.generation(slot),
                };
                if let Some(connection) = self.connections.at(slot) {
                    connection.connect_in_flight = false;
                }
                if self.connected(conn) {
                    events.push(Event::Connected { conn });
                }
            }
            Kind::Accept => self.accepted(slot, completion.outcome(), events),
            Kind::Wake => {
                self.wake_in_flight = false;
                self.waker.heard();
                events.push(Event::Woken);
            }
            Kind::Disk => {
                let Some(operation) = self.operations.at(slot) else {
                    return;
                };
                let disk = operation.disk;
                match operation.complete(completion.outcome(), &mut self.disks[disk]) {
                    Next::Continue => self.submit_disk(slot),
                    Next::Finished(completion) => {
                        self.operations.remove(slot);
                        events.push(Event::Disk {
                            disk: DiskIndex(disk),
                            completion,
                        });
                    }
                }
            }
            Kind::Cancel => {}
        }
    }

    fn received(&mut self, slot: u32, completion: Completion, events: &mut Vec<Event>) {
        let conn = ConnId {
            slot,
            generation: self.connections.generation(slot),
        };
        let Some(connection) = self.connections.at(slot) else {
            return;
        };
        let outcome = completion.outcome();
        let count = *outcome.as_ref().unwrap_or(&0);
        // SAFETY: this is the completion of the receive that `prepare` was called for.
        unsafe { connection.input.complete(count) };
        match (connection.state, outcome) {
            (State::Dead { .. }, _) => self.dead.push(slot),
            (State::Open | State::Lingering, Err(error)) if is_transient(&error) => {
                self.mark(slot);
            }
            (State::Lingering, Ok(1..)) => {
                connection.input.received.clear();
                self.mark(slot);
            }
            (State::Lingering, _) => self.close(conn),
            (State::Releasing, Ok(1..)) => events.extend(self.released(slot)),
            (State::Releasing, Err(error)) if is_cancelled(&error) => {
                events.extend(self.released(slot));
            }
            (_, Ok(0)) if connection.paused => connection.ended = true,
            (_, Ok(0)) => self.fail(slot, None),
            (_, Err(error)) => self.fail(slot, Some(error)),
            (_, Ok(_)) => {
                if !connection.paused {
                    events.push(Event::Received { conn });
                }
                self.mark(slot);
            }
        }
    }

    fn sent(&mut self, slot: u32, outcome: io::Result<usize>, events: &mut Vec<Event>) {
        let conn = ConnId {
            slot,
            generation: self.connections.generation(slot),
        };
        let Some(connection) = self.connections.at(slot) else {
            return;
        };
        connection.output.complete(*outcome.as_ref().unwrap_or(&0));
        match (connection.state, outcome) {
            (State::Dead { .. }, _) => {
                connection.output.discard();
                self.dead.push(slot);
            }
            (_, Err(error)) if is_transient(&error) => self.mark(slot),
            (State::Lingering, Err(_)) => self.close(conn),
            (_, Err(error)) => self.fail(slot, Some(error)),
            (state, Ok(_)) => {
                if connection.output.queued() > 0 {
                    self.mark(slot);
                } else if state == State::Lingering {
                    self.finish_lingering(conn);
                } else if state == State::Releasing {
                    events.extend(self.released(slot));
                } else {
                    events.push(Event::Sent { conn });
                }
            }
        }
    }

    /// A connection attempt ended; true if it is open now (else a `Closed` is made ready).
    pub(super) fn connected(&mut self, conn: ConnId) -> bool {
        let timeout = self.config.tcp_user_timeout;
        let Some(connection) = self.connections.at(conn.slot) else {
            return false;
        };
        if !connection.is_alive() {
            self.dead.push(conn.slot);
            return false;
        }
        match connection.connect_outcome(timeout) {
            Ok(()) => {
                connection.state = State::Open;
                self.mark(conn.slot);
                true
            }
            Err(error) => {
                self.fail(conn.slot, Some(error));
                false
            }
        }
    }

    fn accepted(&mut self, slot: u32, outcome: io::Result<usize>, events: &mut Vec<Event>) {
        self.listeners_dirty = true;
        let id = ListenerId {
            slot,
            generation: self.listeners.generation(slot),
        };
        // SAFETY: a successful accept returns a new descriptor, owned by nobody else.
        let outcome = outcome.map(|descriptor| unsafe { OwnedFd::from_raw_fd(descriptor as i32) });
        let Some(listener) = self.listeners.at(slot) else {
            return;
        };
        listener.accept_in_flight = false;
        if listener.closed {
            self.listeners.remove(slot);
            return;
        }
        match outcome {
            Ok(socket) => match self.adopt(socket) {
                Ok(conn) => events.push(Event::Accepted { listener: id, conn }),
                Err(error) => {
                    tracing::debug!(%error, "a connection was gone before it was accepted")
                }
            },
            Err(error)
                if is_transient(&error) || error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection, trying again");
                listener.paused_until = Some(clock::now().after(ACCEPT_PAUSE));
                self.listeners_paused = true;
            }
        }
    }
}

fn is_cancelled(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ECANCELED) || is_transient(error)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}
