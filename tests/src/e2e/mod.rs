//! End-to-end tests: real processes, real sockets, real disks (files), real clients.
//!
//! Invariants: everything a test starts lives in its own temporary directory and dies with the test;
//! nothing listens beyond loopback or the test's own network namespace; a tool that is missing skips
//! its test with a loud line, and fails it under CI=true.

mod attach;
mod cluster;
pub mod csi;
mod export;
pub mod exposition;
mod nbd;
pub mod postgres;
mod s3;
mod tools;
pub mod uml;

pub use attach::AttachNode;
pub use cluster::{Cluster, ClusterSpec};
pub use export::Export;
pub use nbd::{BlockNumber, NbdClient};
pub use s3::S3Server;
pub use tools::{binary, go_tool, have, run, run_ok, wait_until};
