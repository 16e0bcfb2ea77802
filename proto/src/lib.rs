//! Protocols of Ashlar: identities, the data protocol's frames, the volume descriptor, gRPC services.
//!
//! Architecture invariant: this crate does no I/O and knows no runtime; it depends on no other crate of
//! the workspace.

pub mod descriptor;
pub mod ids;
pub mod layers;
pub mod volume;
pub mod wire;

/// Control-plane services generated from `proto/*.proto`.
pub mod rpc;
