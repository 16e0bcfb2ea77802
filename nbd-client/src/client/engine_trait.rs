//! What a worker needs of a volume's engine: the session, or a stand-in for tests.

use ashlar_platform::clock::Time;

use crate::engine::{Session, SessionCommand, SessionEvent, SessionStats};

/// The engine of one volume. See [`Session`] for the meaning of the calls.
pub trait VolumeEngine {
    /// Takes one event and appends what is to be done about it.
    fn step(&mut self, now: Time, event: SessionEvent, out: &mut Vec<SessionCommand>);
    /// When a tick is due.
    fn next_deadline(&self) -> Option<Time>;
    /// Whether more client requests may be given to it.
    fn accepting(&self) -> bool;
    /// Counters and gauges.
    fn stats(&self) -> SessionStats;
}

impl VolumeEngine for Session {
    fn step(&mut self, now: Time, event: SessionEvent, out: &mut Vec<SessionCommand>) {
        Self::step(self, now, event, out);
    }

    fn next_deadline(&self) -> Option<Time> {
        Self::next_deadline(self)
    }

    fn accepting(&self) -> bool {
        Self::accepting(self)
    }

    fn stats(&self) -> SessionStats {
        Self::stats(self)
    }
}
