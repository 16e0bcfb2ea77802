//! Bounded memory: admission stops, and goes on.

use super::world::World;
use crate::engine::*;

const DONE: Result<ClientReply, ClientError> = Ok(ClientReply::Done);

#[test]
fn retained_writes_are_bounded_by_background_flushes() {
    let mut w = World::new(18, 3, 1, 2);
    let c = w.open(|config| config.retained_bytes_max = 256 * 1024);
    for i in 0..100 {
        w.run_until("accepting", |w| w.clients[c].session.accepting());
        let tag = w.write(c, i * 8, 64, false);
        assert_eq!(w.answer(c, tag), DONE);
        assert!(w.clients[c].session.stats().retained_bytes <= (256 + 32 + 1) * 1024);
    }
    assert!(w.clients[c].session.stats().background_flushes > 5);
}

/// More may be acknowledged while a flush is under way than it covers: what is left must be flushed, too, though
/// nobody is admitted who could ask for it.
#[test]
fn admission_goes_on_after_a_flush_that_was_overtaken() {
    let mut w = World::new(19, 3, 1, 2);
    let budget = 256 * 1024;
    let c = w.open(|config| {
        config.retained_bytes_max = budget;
        config.in_flight_bytes_max = budget;
    });
    w.slow_flushes = true;
    let mut tags = Vec::new();
    for i in 0..200 {
        w.run_until("accepting", |w| w.clients[c].session.accepting());
        tags.push(w.write(c, i * 8, 64, false));
        let stats = w.clients[c].session.stats();
        assert!(stats.retained_bytes + stats.in_flight_bytes < 3 * budget);
    }
    for tag in tags {
        assert_eq!(w.answer(c, tag), DONE);
    }
}
