//! The session of one volume: state and dispatch. (The rules are in the sibling files.)

use ashlar_platform::clock::Time;

use super::api::{SessionCommand, SessionConfig, SessionEvent, SessionStats};

/// The holder of one volume: see the module's documentation.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    stats: SessionStats,
}

impl Session {
    /// A session that has not started; feed it [`SessionEvent::Start`].
    pub fn new(config: SessionConfig, _now: Time) -> Self {
        Self { config, stats: SessionStats::default() }
    }

    /// Takes one event and appends what is to be done about it.
    pub fn step(&mut self, _now: Time, _event: SessionEvent, _out: &mut Vec<SessionCommand>) {}

    /// When [`SessionEvent::Tick`] is due; `None`: an idle session needs no timer.
    pub fn next_deadline(&self) -> Option<Time> {
        None
    }

    /// Whether the session takes more client requests now (back-pressure). A request given
    /// nevertheless is served; memory is bounded only if the owner obeys.
    pub fn accepting(&self) -> bool {
        self.stats.in_flight_bytes < self.config.in_flight_bytes_max
            && self.stats.retained_bytes < self.config.retained_bytes_max
    }

    /// Counters and gauges.
    pub fn stats(&self) -> SessionStats {
        self.stats
    }
}
