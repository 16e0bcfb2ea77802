//! What the tokio side and the workers tell each other.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use ashlar_proto::ids::{ClusterId, DiskId, VolumeId};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::engine_trait::VolumeEngine;
use super::stats::VolumeStats;
use crate::engine::{
    ClientError, ClientOp, ClientReply, MetadataRequest, SessionEvent, StopReason,
};
use crate::nbd::Negotiated;

/// Where a volume is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(SocketAddr),
    /// Nowhere: connections are handed in ([`ToWorker::Adopt`]).
    Given,
}

/// A connection in the transmission phase, on its way to or from a worker.
#[derive(Debug)]
pub struct PassedSocket {
    /// Its socket.
    pub socket: OwnedFd,
    /// Bytes that came in and belong to requests not begun.
    pub received: Bytes,
    /// How its replies are to be.
    pub negotiated: Negotiated,
}

/// Where the answer to a request of this process goes.
pub type AskReply = oneshot::Sender<Result<ClientReply, ClientError>>;

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
    /// Serve these connections to a volume, without a handshake. The volume must be open.
    Adopt {
        /// The volume.
        index: usize,
        /// The connections.
        sockets: Vec<PassedSocket>,
    },
    /// A request of this process itself to a volume.
    Ask {
        /// The volume.
        index: usize,
        /// What is asked.
        op: ClientOp,
        /// Where the answer goes; dropped if the volume stops.
        reply: AskReply,
    },
    /// Begin no more requests, answer those under way, and give the volume's connections back. It
    /// stays open.
    Release {
        /// The volume.
        index: usize,
        /// Where the connections go.
        reply: oneshot::Sender<Vec<PassedSocket>>,
    },
    /// Drain a volume's requests, drop its connections, close it.
    Close {
        /// The volume.
        index: usize,
    },
    /// Forget a volume: its connections are dropped, and it is not closed.
    Abandon {
        /// The volume.
        index: usize,
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
    /// A volume is open and served, or its size has changed since.
    Serving {
        /// The volume.
        index: usize,
        /// Its size.
        size_bytes: u64,
    },
    /// Connections of a volume came or went.
    Connections {
        /// The volume.
        index: usize,
        /// How many there are now.
        count: usize,
    },
    /// A volume was forgotten, as [`ToWorker::Abandon`] asked.
    Abandoned {
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
