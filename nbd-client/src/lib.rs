//! The volume client of a node: opens volumes, replicates their writes, serves them over NBD.
//!
//! - [`engine`]: the volume session, rules R0-R9, sans-IO.
//! - [`nbd`]: the NBD protocol's server side, sans-IO.
//! - [`client`]: reactor threads, connections and metadata access around the two.
//! - [`extents`]: which bytes of a snapshot have data, or differ from another.
//! - [`metrics`]: the names of all metrics.
//! - [`node`]: volumes as devices of this machine's kernel.
//! - [`revert`]: a volume becomes what a snapshot of it shows.
//!
//! Architecture invariant: `engine` and `nbd` do no I/O and know neither tokio nor sockets.

pub mod client;
pub mod engine;
pub mod extents;
pub mod metrics;
pub mod nbd;
pub mod node;
pub mod revert;
