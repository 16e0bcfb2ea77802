//! The volume session engine: rules R0-R9 of the replication protocol, sans-IO and synchronous.
//!
//! One [`Session`] is the holder (PacificA's primary) of one volume. It takes events with the time and
//! appends commands; it knows no socket, no thread, no clock. Production and simulation run this code.

mod api;
mod session;

pub use api::*;
pub use session::Session;
