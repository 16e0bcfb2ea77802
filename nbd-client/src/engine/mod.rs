//! The volume session engine: rules R0-R10 of the replication protocol, sans-IO and synchronous.
//!
//! One [`Session`] is the holder (PacificA's primary) of one volume. It takes events with the time and
//! appends commands; it knows no socket, no thread, no clock. Production and simulation run this code.
//!
//! | file | rule |
//! |---|---|
//! | `open`, `reconcile` | R1 open and fence, R2 reconcile, R5 replay |
//! | `configure`, `exclude` | R0 configuration, R4 exclude before ack |
//! | `write`, `rmw` | R3 write, R9 trim, blocks smaller than 4 KiB |
//! | `flush` | R5 flush, watermark, retained writes |
//! | `read`, `lease` | R6 reads and leases, R8 integrity |
//! | `rebuild` | R7 rebuild, the holder's part |
//! | `reader` | R10 readers: a session that only reads |
//! | `replica` | links, timeouts, members of groups |

mod api;
mod configure;
mod exclude;
mod flush;
#[cfg(debug_assertions)]
mod invariants;
mod lease;
mod op;
mod open;
mod read;
mod reader;
mod rebuild;
mod reconcile;
mod replica;
mod rmw;
mod session;
mod slots;
mod status;
mod switch;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
mod write;

pub use api::*;
pub use session::Session;
