//! The node's attach service: volumes become block devices of this machine's kernel, and stay so across
//! the ends of this process.
//!
//! - `netlink`, `device`: kernel NBD. `loopdev`: the alternative for kernels without it.
//!   `stale`: those of its devices that cannot be taken back.
//! - `record`: what the next process must know. `recovery`: taking devices back, and watching over their
//!   connections. `handover`: passing them to the next process without a dead socket.
//! - `attachments`: the attachments and the claims on them. `attach`, `detach`: the operations.
//! - `service`: gRPC on a unix socket. `command`: its command line.
//!
//! Architecture invariants:
//! - The kernel never gets an error from here because this process ends: connections are dropped, and the
//!   device waits.
//! - A device whose volume somebody else may have written since is never given data again: it is taken
//!   down, and its users get I/O errors.
//! - Only this folder and `client/` know tokio; the data path is the workers'.

mod attach;
mod attachments;
pub mod command;
mod detach;
pub mod device;
mod error;
mod handover;
mod loopdev;
pub mod netlink;
pub mod record;
mod recovery;
mod run;
mod service;
mod stale;

pub use attachments::Attachments;
pub use error::NodeError;
pub use run::{NodeConfig, RunError, run};
