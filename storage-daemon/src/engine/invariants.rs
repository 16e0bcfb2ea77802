//! What is always true of an engine between two steps. Checked after every step in debug builds and in
//! the simulator.

use std::collections::BTreeMap;

use ashlar_proto::ids::Epoch;

use super::{ChunkStore, ConnectionId, DiskEngine, Stage, Work};

/// Debug builds check by themselves while no more requests than these are under way.
pub const CHECKED_REQUESTS_MAX: usize = 64;

/// A broken invariant.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    /// Requests counted as admitted are not those under way.
    #[error("{counted} requests are counted as admitted, {under_way} are under way")]
    Admitted {
        /// By the fences.
        counted: u64,
        /// In the table.
        under_way: u64,
    },
    /// A connection's count is not its requests.
    #[error("connection {0} counts other requests than it has")]
    Connection(u64),
    /// The bytes under way are miscounted.
    #[error("the bytes under way are miscounted")]
    Bytes,
    /// A request of a fenced epoch is under way although the fence is durable.
    #[error("a request of epoch {epoch} is under way below the durable fence {fence}")]
    BelowFence {
        /// Of the request.
        epoch: u64,
        /// Durable.
        fence: u64,
    },
    /// A pull runs although its replica is fenced beyond it.
    #[error("a pull of epoch {epoch} runs below the fence {fence}")]
    PullBelowFence {
        /// Of the pull.
        epoch: u64,
        /// Raised.
        fence: u64,
    },
}

/// Checks everything.
pub fn check<S: ChunkStore>(engine: &DiskEngine<S>) -> Result<(), Violation> {
    let mut under_way = 0;
    let mut bytes = 0;
    let mut connections = BTreeMap::<ConnectionId, (u32, usize)>::new();
    for work in engine.table.values() {
        let (volume, epoch) = match work {
            Work::Client(client) => {
                bytes += client.bytes;
                let counts = connections.entry(client.conn).or_default();
                counts.0 += 1;
                counts.1 += client.bytes;
                if !client.admitted {
                    continue;
                }
                (client.volume, client.epoch)
            }
            Work::Pull {
                volume,
                admitted: Some(epoch),
                ..
            } => (*volume, *epoch),
            _ => continue,
        };
        under_way += 1;
        let fence = engine.replicas.get(&volume).map_or(Epoch(0), |r| r.fence);
        // A configuration that is durable but not read back yet is its own fence: never below.
        if epoch < fence {
            return Err(Violation::BelowFence {
                epoch: epoch.0,
                fence: fence.0,
            });
        }
    }
    let counted = engine.fencing.in_flight_total();
    if counted != under_way {
        return Err(Violation::Admitted { counted, under_way });
    }
    if bytes != engine.request_bytes {
        return Err(Violation::Bytes);
    }
    for (id, connection) in &engine.connections {
        let expected = connections.get(id).copied().unwrap_or_default();
        if (connection.requests, connection.bytes) != expected {
            return Err(Violation::Connection(id.0));
        }
    }
    for ((volume, _), slot) in &engine.pulls {
        let (epoch, fence) = (
            slot.pull().order().start.rebuild_epoch,
            engine.fence_of(*volume),
        );
        if slot.pull().running() && epoch < fence {
            return Err(Violation::PullBelowFence {
                epoch: epoch.0,
                fence: fence.0,
            });
        }
    }
    Ok(())
}

/// Requests that wait as fences, for tests.
pub fn waiting_fences<S: ChunkStore>(engine: &DiskEngine<S>) -> usize {
    engine
        .table
        .values()
        .filter(|w| matches!(w, Work::Client(c) if matches!(c.stage, Stage::WaitingFence(_))))
        .count()
}

#[cfg(debug_assertions)]
pub(super) fn assert_all<S: ChunkStore>(engine: &DiskEngine<S>) {
    if let Err(violation) = check(engine) {
        panic!("engine invariant: {violation}");
    }
}
