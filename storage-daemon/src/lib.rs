//! The storage daemon: owns a node's disks, each a crash-safe chunk store served by one thread.
//!
//! Layers, each knowing only those before it: `format` (bytes), `store` (one disk), `engine`
//! (replicas: fencing, admission, rebuild), then the threads and services around them.

pub mod check;
pub mod config;
pub mod daemon;
pub mod disk_handle;
pub mod engine;
pub mod error;
pub mod format;
pub mod inspect;
pub mod metrics;
mod node;
pub mod offline;
pub mod rpc;
pub mod store;
