//! Giving a connection's socket back: what is queued is sent first, and what was received stays with it.
//!
//! Invariants:
//! - The socket leaves with no operation in flight on it, so nobody but its new owner reads or writes it.
//! - No byte is lost: what the kernel handed over before the receive was cancelled is in `received`.

use super::connection::State;
use super::{ConnId, Event, Kind, Reactor};

impl Reactor {
    /// Ends the use of an open connection without closing it: receives nothing more, sends what is queued,
    /// then [`Event::Released`] hands the socket back with what was received and not consumed. If the
    /// peer's end or an error comes first, `Closed` follows instead. Connections that are not open
    /// are left alone.
    pub fn release(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(conn.slot, conn.generation) else {
            return;
        };
        if connection.state != State::Open {
            return;
        }
        if connection.ended {
            self.fail(conn.slot, None);
            return;
        }
        connection.state = State::Releasing;
        if connection.input.in_flight() {
            self.cancel(Kind::Receive.user_data(conn.slot));
        }
        self.mark(conn.slot);
        if let Some(event) = self.released(conn.slot) {
            self.ready.push(event);
        }
    }

    /// The event that hands a releasing connection over, once nothing is in flight or queued.
    pub(super) fn released(&mut self, slot: u32) -> Option<Event> {
        let generation = self.connections.generation(slot);
        let connection = self.connections.at(slot)?;
        if connection.state != State::Releasing
            || connection.in_flight()
            || connection.output.queued() > 0
        {
            return None;
        }
        let socket = connection.socket.take()?;
        let received = std::mem::take(&mut connection.input.received);
        connection.state = State::Dead { silent: true };
        self.dead.push(slot);
        Some(Event::Released {
            conn: ConnId { slot, generation },
            socket,
            received: received.freeze(),
        })
    }
}
