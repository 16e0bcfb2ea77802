//! Whole clusters in one deterministic process: the real engines on simulated disks, network and clocks.

pub mod history;
pub mod oracle;
