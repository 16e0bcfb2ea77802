//! Ashlar's CSI driver: a translation between Kubernetes and Ashlar.
//!
//! Invariants: the driver holds no state. Volumes, publications and formats are in the metadata cluster,
//! attachments in nbd-client, mounts in the kernel; so a restart at any moment is harmless, and two controllers may
//! overlap.

pub mod attach;
pub mod authority;
pub mod controller;
pub mod drain;
pub mod errors;
pub mod group_controller;
pub mod identity;
pub mod listener;
pub mod locks;
pub mod metadata;
pub mod metrics;
pub mod mounter;
pub mod node;
pub mod parameters;
pub mod redact;
pub mod rpc;
pub mod server;
pub mod snapshot_metadata;
pub mod snapshots;
pub mod topology;
pub mod validate;
pub mod volume_id;
