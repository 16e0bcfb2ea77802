//! The volumes of this process, opened and closed at any time, and what their owner may do with them.
//!
//! Invariant: an open volume stays open until its owner closes it or it ends by itself; dropping a
//! [`HostedVolume`] changes nothing.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ashlar_proto::ids::{ClientId, Epoch, NodeId, SnapshotId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::control::{Control, Open};
use super::messages::{Endpoint, PassedSocket, ToWorker};
use super::metadata::{BadAddress, Members};
use super::stats::{Statistics, collect_stats};
use super::worker_handle::{WorkerConfig, WorkerHandle, WorkerSender, spawn_worker};
use crate::engine::{ClientError, ClientOp, ClientReply, SnapshotSource};

/// Messages from workers that may wait for the control task.
const CONTROL_MAX: usize = 4096;
/// Opens that may wait for it.
const OPENS_MAX: usize = 64;
/// At a close, the part of the time limit in which requests under way may be answered.
const DRAIN_PARTS: u32 = 2;

/// What all volumes of a process share.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// `host:port` of metadata members, at least one.
    pub metadata: Vec<String>,
    /// Identity of this process towards metadata and daemons.
    pub client: ClientId,
    /// Reactor threads.
    pub threads: usize,
    /// Where storage daemons on this machine have a unix socket per disk.
    pub local_sockets: Option<PathBuf>,
    /// Time for an orderly end of a volume.
    pub close_timeout: Duration,
}

/// Why there is no host.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A metadata address is malformed.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// No thread or no io_uring.
    #[error("cannot start a reactor thread")]
    Reactor(#[source] std::io::Error),
}

/// A volume to open.
#[derive(Clone, Debug)]
pub struct OpenSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Where to serve it.
    pub endpoint: Endpoint,
    /// Join the readers (R10) instead of holding the volume.
    pub read_only: bool,
    /// Take it over from its present holder.
    pub force: bool,
    /// The node that this process runs on; NIL: none.
    pub node: NodeId,
    /// No holder has made its replicas yet, as metadata said before.
    pub first_open: bool,
    /// Read this snapshot of the volume instead of the volume itself; with `read_only`.
    pub snapshot: Option<SnapshotSpec>,
    /// To revert it: nobody else may open it meanwhile.
    pub revert: bool,
    /// Only so that it is rebuilt: whoever wants it gets it.
    pub care: bool,
}

impl OpenSpec {
    /// To hold a volume whose replicas are made, for nobody in particular.
    pub fn new(volume: VolumeId, name: String, endpoint: Endpoint) -> Self {
        Self {
            volume,
            name,
            endpoint,
            read_only: false,
            force: false,
            node: NodeId::NIL,
            first_open: false,
            snapshot: None,
            revert: false,
            care: false,
        }
    }
}

/// Whether a volume began as a copy of another.
pub fn is_clone(volume: &pb::Volume) -> bool {
    !volume.source_snapshot_id.is_empty() || !volume.source_volume_id.is_empty()
}

/// Whether replicas that are missing are to be made by who opens it now ([`OpenSpec::first_open`]): no holder has made them yet.
/// Those of a clone that was cut off its parent exist, with what the disks copied: a missing one is lost, not new.
pub fn is_first_open(volume: &pb::Volume) -> bool {
    !volume.opened_once && (!is_clone(volume) || volume.parent.is_some())
}

/// A snapshot to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SnapshotSpec {
    /// Which.
    pub id: SnapshotId,
    /// What its reader reads.
    pub source: SnapshotSource,
}

/// Where a volume is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Not served yet.
    Opening,
    /// Served.
    Serving,
    /// Gone from this process.
    Ended(Ended),
}

/// What became of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// Asked for, and closed cleanly.
    Closed {
        /// The volume's epoch since.
        epoch: u64,
    },
    /// Another client holds it.
    Superseded,
    /// Metadata refused to open it.
    Refused(String),
    /// It was deleted.
    Deleted,
    /// This process cannot serve it.
    Failed(String),
    /// Asked for: left without closing it.
    Abandoned,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { .. } => f.write_str("it was closed"),
            Self::Superseded => {
                f.write_str("another client holds it now (or its attachment was ended)")
            }
            Self::Refused(why) => write!(f, "it could not be opened: {why}"),
            Self::Deleted => f.write_str("it was deleted"),
            Self::Failed(why) => write!(f, "it cannot be served: {why}"),
            Self::Abandoned => f.write_str("it was left without closing it"),
        }
    }
}

/// A volume as its owner sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeStatus {
    /// Where it is.
    pub phase: Phase,
    /// Its size; 0 before it is served.
    pub size_bytes: u64,
    /// The epoch in which it was opened.
    pub epoch: Epoch,
    /// NBD connections.
    pub connections: usize,
}

/// The process's volumes.
#[derive(Clone)]
pub struct Host {
    members: Members,
    senders: Vec<WorkerSender>,
    opens: mpsc::Sender<Box<Open>>,
    next_index: Arc<AtomicUsize>,
}

/// What ends when the host is shut down.
pub struct HostThreads {
    workers: Vec<WorkerHandle>,
    control: JoinHandle<()>,
}

impl Host {
    /// Starts the threads. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// If an address is malformed, or there is no thread or io_uring to be had.
    pub fn start(config: HostConfig) -> Result<(Self, HostThreads), HostError> {
        let members = Members::new(&config.metadata)?;
        let (control, inbox) = mpsc::channel(CONTROL_MAX);
        let mut workers = Vec::new();
        for number in 0..config.threads.max(1) {
            let settings = WorkerConfig {
                number,
                client: config.client,
                drain_timeout: config.close_timeout / DRAIN_PARTS,
                local_sockets: config.local_sockets.clone(),
            };
            workers.push(spawn_worker(settings, control.clone()).map_err(HostError::Reactor)?);
        }
        let senders: Vec<WorkerSender> = workers.iter().map(WorkerHandle::sender).collect();
        let (opens, opens_inbox) = mpsc::channel(OPENS_MAX);
        let control = Control::new(
            config.client,
            members.clone(),
            senders.clone(),
            inbox,
            opens_inbox,
        );
        let host = Self {
            members,
            senders,
            opens,
            next_index: Arc::default(),
        };
        let control = tokio::spawn(control.run());
        Ok((host, HostThreads { workers, control }))
    }

    /// The metadata cluster.
    pub(crate) fn members(&self) -> &Members {
        &self.members
    }

    /// Begins to open a volume; its status tells the rest.
    pub async fn open(&self, spec: OpenSpec) -> HostedVolume {
        let index = self.next_index.fetch_add(1, Ordering::Relaxed);
        let (status, watcher) = watch::channel(VolumeStatus {
            phase: Phase::Opening,
            size_bytes: 0,
            epoch: Epoch(0),
            connections: 0,
        });
        let open = Open {
            index,
            spec,
            status,
        };
        // If the control task is gone the status ends with it, and says so.
        let _ = self.opens.send(Box::new(open)).await;
        HostedVolume {
            index,
            worker: self.senders[index % self.senders.len()].clone(),
            status: watcher,
        }
    }

    /// Statistics of all volumes; `reset` starts longest times anew afterwards.
    pub async fn stats(&self, reset: bool) -> Statistics {
        collect_stats(self.senders.clone(), reset).await
    }

    /// Ends the workers as soon as all volumes are closed: requests are drained first.
    pub async fn shut_down(&self) {
        for sender in &self.senders {
            sender.send(ToWorker::Shutdown).await;
        }
    }
}

impl HostThreads {
    /// Waits for the end of the threads that have something to tell, and tells it.
    pub fn join(self) {
        self.control.abort();
        for worker in self.workers {
            if worker.thread.is_finished() {
                match worker.thread.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::error!(%error, "a reactor thread failed; restart me")
                    }
                    Err(_) => tracing::error!("a reactor thread panicked; report this bug"),
                }
            }
        }
    }
}

/// A volume of a [`Host`].
#[derive(Clone)]
pub struct HostedVolume {
    index: usize,
    worker: WorkerSender,
    status: watch::Receiver<VolumeStatus>,
}

impl HostedVolume {
    /// Names the volume in [`Host::stats`].
    pub fn index(&self) -> usize {
        self.index
    }

    /// How it is now.
    pub fn status(&self) -> VolumeStatus {
        let status = self.status.borrow().clone();
        // Without a sender nobody serves it, whatever was said last.
        if self.status.has_changed().is_err() && !matches!(status.phase, Phase::Ended(_)) {
            let phase = Phase::Ended(Ended::Failed("the reactor threads ended".into()));
            return VolumeStatus { phase, ..status };
        }
        status
    }

    /// Waits until `condition` holds of the status, or the volume has ended; the status then.
    pub async fn wait(&self, mut condition: impl FnMut(&VolumeStatus) -> bool) -> VolumeStatus {
        let mut status = self.status.clone();
        let ends = |s: &VolumeStatus| matches!(s.phase, Phase::Ended(_));
        // An error means that there is no sender, which `status` tells.
        let _ = status.wait_for(|s| condition(s) || ends(s)).await;
        self.status()
    }

    /// Waits for the end.
    pub async fn ended(&self) -> Ended {
        match self.wait(|_| false).await.phase {
            Phase::Ended(ended) => ended,
            // `wait` returns only then.
            phase => Ended::Failed(format!("the volume is in phase {phase:?}: report this bug")),
        }
    }

    /// Serves connections past their handshake.
    pub async fn adopt(&self, sockets: Vec<PassedSocket>) {
        let index = self.index;
        self.worker.send(ToWorker::Adopt { index, sockets }).await;
    }

    /// A request of this process to the volume; `None` if the volume ended before it was answered.
    pub async fn ask(&self, op: ClientOp) -> Option<Result<ClientReply, ClientError>> {
        let (reply, answer) = oneshot::channel();
        let index = self.index;
        self.worker.send(ToWorker::Ask { index, op, reply }).await;
        answer.await.ok()
    }

    /// Begins no more requests, answers those under way, gives the connections back. The volume
    /// stays open.
    pub async fn release(&self) -> Vec<PassedSocket> {
        let (reply, answer) = oneshot::channel();
        let index = self.index;
        self.worker.send(ToWorker::Release { index, reply }).await;
        answer.await.unwrap_or_default()
    }

    /// Begins to close the volume: requests are drained, connections dropped.
    pub async fn close(&self) {
        let index = self.index;
        self.worker.send(ToWorker::Close { index }).await;
    }

    /// Leaves the volume without closing it: the next open reconciles. Connections are dropped.
    pub async fn abandon(&self) {
        let index = self.index;
        self.worker.send(ToWorker::Abandon { index }).await;
    }
}
