//! What the tokio side and the workers tell each other.

use std::net::SocketAddr;
use std::path::PathBuf;

use ashlar_proto::ids::{ClusterId, DiskId, VolumeId};
use tokio::sync::oneshot;

use super::engine_trait::VolumeEngine;
use super::stats::VolumeStats;
use crate::engine::{MetadataRequest, SessionEvent, StopReason};

/// Where a volume is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
}

/// A volume to be served by a worker.
pub struct VolumeSetup {
    /// Names the volume in messages; unique in the process.
    pub index: usize,
    /// The volume.
    pub volume: VolumeId,
    /// Its name, which is the export's name.
    pub name: String,
    /// Where to serve it.
    pub endpoint: Endpoint,
    /// Refuse writes.
    pub read_only: bool,
    /// Its engine, not started.
    pub engine: Box<dyn VolumeEngine + Send>,
}

/// To a worker.
pub enum ToWorker {
    /// Serve a volume.
    Add(Box<VolumeSetup>),
    /// The cluster, known from the first grant; connections to disks name it.
    Cluster(ClusterId),
    /// An event for a volume's engine (metadata's answers and changes).
    Session {
        /// The volume.
        index: usize,
        /// The event.
        event: Box<SessionEvent>,
    },
    /// Answer to [`FromWorker::Resolve`].
    Resolved {
        /// The disk.
        disk: DiskId,
        /// Its address, or why there is none.
        address: Result<SocketAddr, String>,
    },
    /// Asks for statistics.
    Stats {
        /// Start the longest times anew afterwards.
        reset: bool,
        /// Where to send them.
        reply: oneshot::Sender<Vec<VolumeStats>>,
    },
    /// Drain requests, drop NBD connections, close the volumes; the worker ends when all have stopped.
    Shutdown,
}

/// From a worker.
#[derive(Debug)]
pub enum FromWorker {
    /// A volume's engine asks the metadata cluster.
    Metadata {
        /// The volume.
        index: usize,
        /// The question.
        request: MetadataRequest,
    },
    /// A disk's address is a host name.
    Resolve {
        /// The asking worker.
        worker: usize,
        /// The disk.
        disk: DiskId,
        /// `host:port`.
        address: String,
    },
    /// A volume listens.
    Listening {
        /// The volume.
        index: usize,
        /// The actual TCP address, if it is one.
        address: Option<SocketAddr>,
    },
    /// A volume is open and served.
    Serving {
        /// The volume.
        index: usize,
    },
    /// A volume has stopped; nothing of it is left.
    Stopped {
        /// The volume.
        index: usize,
        /// Why.
        reason: StopReason,
    },
    /// A volume cannot be served here (its socket cannot be listened on).
    Failed {
        /// The volume.
        index: usize,
        /// Why.
        error: String,
    },
}
