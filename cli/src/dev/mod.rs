//! A development cluster: real processes of the real binaries on one machine, on loopback, in one
//! directory.
//!
//! ```text
//! DIR/cluster.json        what the cluster is, and the processes (pid, start time, boot id)
//! DIR/lock                held while one `ashlar dev` command changes something
//! DIR/metadata-1/ ...     data of the metadata members
//! DIR/daemon-1/ ...       data of the storage daemons
//! DIR/disks/*.img         their disks
//! DIR/logs/*.log          what the processes say
//! ```
//!
//! Invariants:
//! - No process is signalled unless its pid, its start time and the kernel's boot id are those that were
//!   recorded; the signal goes through a pidfd, so a pid that is used again is never hit.
//! - Every command may be repeated: what is there already is left as it is.
//! - `--purge` deletes only what this module made.

pub mod cluster;
pub mod process;
pub mod state;
