//! The part of `ashlar` that others may link: backups of snapshots to object storage.
//!
//! Invariant: nothing here prints, reads the command line or knows a cluster; see [`backup`].

pub mod backup;
