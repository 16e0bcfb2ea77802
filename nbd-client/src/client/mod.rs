//! Threads, connections and metadata access around the session engine and the NBD codec.
//!
//! - `worker`: one reactor thread; owns its volumes, their NBD connections and its replica connections.
//! - `export`: one volume on a worker: engine, listener, NBD peers, back-pressure. `export_end`: how its
//!   connections end. `peer`: one client.
//!   `requests`: the NBD requests under way.
//! - `links`: the worker's connections to disks, shared by its volumes.
//! - `host`: the volumes of a process, opened and closed at any time. `control`: the task behind it, which
//!   answers the workers' questions. `serve`: a fixed list of volumes. `attachment`: one volume's dealings with metadata; `snapshot_reader`: a snapshot's. `metadata`: gRPC with failover. `stats`: the statistics socket.
//!
//! Invariants:
//! - A volume, its NBD connections and its engine live on one worker for good; nothing of them is shared
//!   between threads. Threads talk by bounded channels and wakers only.
//! - Payloads are never copied: what an NBD client sent is a slice of the receive buffer until it has
//!   left for the replicas, and the other way round for reads.
//! - A fenced or stopped volume gives no error replies: its connections are dropped.

mod attachment;
mod control;
mod engine_trait;
mod export;
mod export_end;
mod host;
mod links;
mod messages;
pub(crate) mod metadata;
mod peer;
mod requests;
mod serve;
mod snapshot_reader;
pub mod stats;
mod worker;
mod worker_handle;

pub use engine_trait::VolumeEngine;
pub use host::{
    Ended, Host, HostConfig, HostError, HostThreads, HostedVolume, OpenSpec, Phase, SnapshotSpec,
    VolumeStatus, is_clone, is_first_open,
};
pub use messages::{AskReply, Endpoint, FromWorker, PassedSocket, ToWorker, VolumeSetup};
pub use metadata::BadAddress;
pub use serve::{Outcome, ServeConfig, ServeError, VolumeSpec, serve};
pub use snapshot_reader::Unreadable;
pub(crate) use snapshot_reader::view_snapshot;
pub use worker_handle::{WorkerConfig, WorkerHandle, WorkerSender, spawn_worker};
