//! Whole clusters in one deterministic process: the real engines on simulated disks, network and clocks.
//!
//! `cluster` runs the processes ([`node`], [`client`], [`metadata`]) and carries messages between them;
//! `faults` hurts them as `schedule` says; `workload` makes the requests, `history` records them, and
//! `oracle` judges. [`run`] does all of it for one seed.

pub mod client;
mod clones;
pub mod cluster;
mod faults;
pub mod frame;
pub mod growth;
pub mod history;
pub mod memory_store;
pub mod metadata;
pub mod node;
pub mod oracle;
pub mod run;
pub mod schedule;
mod snapshots;
pub mod workload;
