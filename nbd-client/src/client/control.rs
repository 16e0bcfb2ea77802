//! The tokio side: starts the workers, gives them their volumes, answers what they ask of the metadata
//! cluster, watches the volumes, and ends everything in order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ashlar_platform::clock;
use ashlar_proto::ids::{ClientId, NodeId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;

use super::attachment::Volume;
use super::messages::{Endpoint, FromWorker, ToWorker, VolumeSetup};
use super::metadata::{BadAddress, Members};
use super::stats::{self, Statistics};
use super::worker::{WorkerConfig, WorkerHandle, WorkerSender, spawn_worker};
use crate::engine::{MetadataRequest, Session, SessionConfig, StopReason};

/// Messages from workers that may wait here.
const CONTROL_MAX: usize = 4096;
/// Time for a worker to tell its statistics.
const STATS_TIMEOUT: Duration = Duration::from_secs(1);
/// At shutdown, the part of the time limit in which requests under way may be answered.
const DRAIN_PARTS: u32 = 2;

/// A volume to serve.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// Its name.
    pub name: String,
    /// Where.
    pub endpoint: Endpoint,
}

/// What to serve, and how.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// `host:port` of metadata members, at least one.
    pub metadata: Vec<String>,
    /// The volumes.
    pub volumes: Vec<VolumeSpec>,
    /// Refuse writes.
    pub read_only: bool,
    /// Take volumes over from their present holders.
    pub force: bool,
    /// Reactor threads.
    pub threads: usize,
    /// Name of the storage daemon's node that this process runs on, for local reads.
    pub node: Option<String>,
    /// Where to serve statistics.
    pub stats_socket: Option<PathBuf>,
    /// Where storage daemons on this machine have a unix socket per disk.
    pub local_sockets: Option<PathBuf>,
    /// Time for an orderly end.
    pub close_timeout: Duration,
}

/// How serving ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Asked for; every volume was closed.
    Closed,
    /// Asked for, but these volumes were not closed in time: the next open has to reconcile them.
    TimedOut(Vec<String>),
    /// No volume is left: what became of the last one.
    NothingLeft(String),
}

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A metadata address is malformed.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// Metadata refused a question.
    #[error("{what}: {}", status.message())]
    Metadata {
        /// What was asked.
        what: String,
        /// The refusal; its message is part of this error's text, so it is no source.
        status: Box<Status>,
    },
    /// Metadata's answer makes no sense.
    #[error("{0}")]
    Malformed(String),
    /// No thread or no io_uring.
    #[error("cannot start a reactor thread")]
    Reactor(#[source] std::io::Error),
    /// The statistics socket cannot be listened on.
    #[error("cannot listen on the statistics socket {path}")]
    StatsSocket {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A volume that is being served.
struct Served {
    volume: Arc<Volume>,
    tasks: JoinSet<()>,
    watching: bool,
}

/// Serves until `shutdown` ends or no volume is left.
///
/// # Errors
/// If it cannot begin.
pub async fn serve(
    config: ServeConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<Outcome, ServeError> {
    let members = Members::new(&config.metadata)?;
    let client = ClientId::generate();
    tokio::pin!(shutdown);
    let (control, inbox) = mpsc::channel(CONTROL_MAX);
    let mut workers = Vec::new();
    for number in 0..config.threads.clamp(1, config.volumes.len().max(1)) {
        let settings = WorkerConfig {
            number,
            client,
            drain_timeout: config.close_timeout / DRAIN_PARTS,
            local_sockets: config.local_sockets.clone(),
        };
        workers.push(spawn_worker(settings, control.clone()).map_err(ServeError::Reactor)?);
    }
    drop(control);
    let senders: Vec<WorkerSender> = workers.iter().map(WorkerHandle::sender).collect();
    let _stats = match &config.stats_socket {
        Some(path) => Some(StatsSocket::open(path, senders.clone()).map_err(|source| {
            ServeError::StatsSocket {
                path: path.clone(),
                source,
            }
        })?),
        None => None,
    };
    let volumes = tokio::select! {
        volumes = find_volumes(&config, &members, client, &senders) => volumes?,
        () = &mut shutdown => return Ok(Outcome::Closed),
    };
    let mut control = Control {
        senders,
        inbox,
        served: BTreeMap::new(),
        last: String::new(),
    };
    for (volume, spec) in volumes.into_iter().zip(&config.volumes) {
        control.add(volume, spec, config.read_only).await;
    }
    let outcome = control.run(&mut shutdown, config.close_timeout).await;
    for worker in workers {
        if worker.thread.is_finished() {
            match worker.thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "a reactor thread failed; restart me"),
                Err(_) => tracing::error!("a reactor thread panicked; report this bug"),
            }
        }
    }
    Ok(outcome)
}

/// Looks the volumes up by name.
async fn find_volumes(
    config: &ServeConfig,
    members: &Members,
    client: ClientId,
    senders: &[WorkerSender],
) -> Result<Vec<Volume>, ServeError> {
    let node = find_node(config.node.as_deref(), members).await?;
    let mut volumes = Vec::with_capacity(config.volumes.len());
    for (index, spec) in config.volumes.iter().enumerate() {
        let question = pb::GetVolumeRequest {
            name: spec.name.clone(),
            volume_id: Vec::new(),
        };
        let ask = |mut c: pb::metadata_client::MetadataClient<_>| {
            let question = question.clone();
            async move { c.get_volume(question).await }
        };
        let found = members
            .ask("GetVolume", ask)
            .await
            .map_err(|status| ServeError::Metadata {
                what: format!("volume {:?}", spec.name),
                status: Box::new(status),
            })?;
        let id = VolumeId::from_slice(&found.volume_id)
            .ok_or_else(|| ServeError::Malformed(format!("volume {:?} has no id", spec.name)))?;
        volumes.push(Volume {
            index,
            name: spec.name.clone(),
            id,
            client,
            node,
            force: config.force,
            first_open: !found.opened_once,
            members: members.clone(),
            worker: senders[index % senders.len()].clone(),
            disks: Mutex::default(),
        });
    }
    Ok(volumes)
}

/// The id of the node that this process runs on; NIL if it is not told or not known.
async fn find_node(name: Option<&str>, members: &Members) -> Result<NodeId, ServeError> {
    let Some(name) = name else {
        return Ok(NodeId::NIL);
    };
    let nodes = members
        .ask("ListNodes", |mut c| async move {
            c.list_nodes(pb::ListNodesRequest {}).await
        })
        .await
        .map_err(|status| ServeError::Metadata {
            what: "list of nodes".into(),
            status: Box::new(status),
        })?;
    let found = nodes.nodes.iter().find(|n| n.name == name);
    if found.is_none() {
        tracing::warn!(
            node = name,
            "no such node is registered: no replica counts as local"
        );
    }
    Ok(found
        .and_then(|n| NodeId::from_slice(&n.node_id))
        .unwrap_or(NodeId::NIL))
}

struct Control {
    senders: Vec<WorkerSender>,
    inbox: mpsc::Receiver<FromWorker>,
    served: BTreeMap<usize, Served>,
    /// What became of the volume that stopped last.
    last: String,
}

impl Control {
    async fn add(&mut self, volume: Volume, spec: &VolumeSpec, read_only: bool) {
        let mut config = SessionConfig::new(volume.id, volume.client);
        config.node = volume.node;
        config.session_number = volume.index as u16;
        let setup = VolumeSetup {
            index: volume.index,
            volume: volume.id,
            name: volume.name.clone(),
            endpoint: spec.endpoint.clone(),
            read_only,
            engine: Box::new(Session::new(config, clock::now())),
        };
        volume.worker.send(ToWorker::Add(Box::new(setup))).await;
        let served = Served {
            volume: Arc::new(volume),
            tasks: JoinSet::new(),
            watching: false,
        };
        self.served.insert(served.volume.index, served);
    }

    async fn run(
        &mut self,
        shutdown: &mut (impl Future<Output = ()> + Unpin),
        close_timeout: Duration,
    ) -> Outcome {
        while !self.served.is_empty() {
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.message(message).await,
                    None => return Outcome::NothingLeft("the reactor threads ended".into()),
                },
                () = &mut *shutdown => return self.shut_down(close_timeout).await,
            }
        }
        // The workers have nothing left to do and end.
        for sender in &self.senders {
            sender.send(ToWorker::Shutdown).await;
        }
        Outcome::NothingLeft(std::mem::take(&mut self.last))
    }

    async fn shut_down(&mut self, close_timeout: Duration) -> Outcome {
        tracing::info!(volumes = self.served.len(), "shutting down");
        for sender in &self.senders {
            sender.send(ToWorker::Shutdown).await;
        }
        let end = tokio::time::Instant::now() + close_timeout;
        while !self.served.is_empty() {
            match tokio::time::timeout_at(end, self.inbox.recv()).await {
                Ok(Some(message)) => self.message(message).await,
                Ok(None) => break,
                Err(_) => {
                    let names = self
                        .served
                        .values()
                        .map(|s| s.volume.name.clone())
                        .collect();
                    return Outcome::TimedOut(names);
                }
            }
        }
        Outcome::Closed
    }

    async fn message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Metadata { index, request } => {
                let Some(served) = self.served.get_mut(&index) else {
                    return;
                };
                // Finished tasks are cleared away, so that the set stays small.
                while served.tasks.try_join_next().is_some() {}
                let volume = served.volume.clone();
                if request == MetadataRequest::Open && !served.watching {
                    served.watching = true;
                    let volume = volume.clone();
                    served
                        .tasks
                        .spawn(async move { volume.open_and_watch().await });
                } else {
                    served
                        .tasks
                        .spawn(async move { volume.answer(request).await });
                }
            }
            FromWorker::Resolve {
                worker,
                disk,
                address,
            } => {
                let Some(sender) = self.senders.get(worker).cloned() else {
                    return;
                };
                tokio::spawn(async move {
                    let address = match tokio::net::lookup_host(&address).await {
                        Ok(mut found) => found.next().ok_or_else(|| "no address".to_owned()),
                        Err(error) => Err(error.to_string()),
                    };
                    sender.send(ToWorker::Resolved { disk, address }).await;
                });
            }
            FromWorker::Listening { index, address } => {
                let Some(served) = self.served.get(&index) else {
                    return;
                };
                let name = &served.volume.name;
                match address {
                    Some(address) => tracing::info!(volume = name, %address, "listening"),
                    None => tracing::info!(volume = name, "listening"),
                }
            }
            FromWorker::Serving { index } => {
                if let Some(served) = self.served.get(&index) {
                    tracing::info!(volume = served.volume.name, "open and served");
                }
            }
            FromWorker::Stopped { index, reason } => {
                let Some(served) = self.served.remove(&index) else {
                    return;
                };
                self.stopped(&served.volume.name, reason);
            }
            FromWorker::Failed { index, error } => {
                let Some(served) = self.served.remove(&index) else {
                    return;
                };
                let name = &served.volume.name;
                tracing::error!(
                    volume = name,
                    error,
                    "cannot serve the volume: check its socket"
                );
                self.last = format!("volume {name:?} cannot be served: {error}");
            }
        }
    }

    fn stopped(&mut self, name: &str, reason: StopReason) {
        let why = match reason {
            StopReason::Closed => {
                tracing::info!(volume = name, "closed");
                self.last = format!("volume {name:?} was closed");
                return;
            }
            StopReason::Superseded => {
                "another client holds it now (or its attachment was ended)".to_owned()
            }
            StopReason::OpenRefused(reason) => {
                format!("it could not be opened: {reason}")
            }
            StopReason::Deleted => "it was deleted".to_owned(),
        };
        tracing::error!(
            volume = name,
            why,
            "stopped serving a volume; its connections are dropped"
        );
        self.last = format!("volume {name:?}: {why}");
    }
}

/// Serves statistics until it is dropped.
struct StatsSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl StatsSocket {
    fn open(path: &Path, senders: Vec<WorkerSender>) -> std::io::Result<Self> {
        // A socket file that a killed process left behind is replaced.
        if std::os::unix::net::UnixStream::connect(path).is_err() {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let listener = UnixListener::bind(path)?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let senders = senders.clone();
                tokio::spawn(stats::serve_connection(stream, move |reset| {
                    collect_stats(senders.clone(), reset)
                }));
            }
        });
        Ok(Self {
            path: path.to_owned(),
            task,
        })
    }
}

impl Drop for StatsSocket {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a socket file");
        }
    }
}

async fn collect_stats(senders: Vec<WorkerSender>, reset: bool) -> Statistics {
    let mut statistics = Statistics {
        pid: std::process::id(),
        volumes: Vec::new(),
    };
    for sender in senders {
        let (reply, answer) = oneshot::channel();
        if sender.send(ToWorker::Stats { reset, reply }).await
            && let Ok(Ok(volumes)) = tokio::time::timeout(STATS_TIMEOUT, answer).await
        {
            statistics.volumes.extend(volumes);
        }
    }
    statistics.volumes.sort_by_key(|v| v.index);
    statistics
}
