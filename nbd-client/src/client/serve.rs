//! `nbd-client serve`: a fixed list of volumes, each on a socket, until asked to end or none is left.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_platform::observe::Observer;
use ashlar_proto::ids::{ClientId, NodeId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tokio::net::UnixListener;
use tokio::task::{JoinHandle, JoinSet};
use tonic::Status;

use super::host::{Host, HostConfig, HostError, HostedVolume, OpenSpec, Phase, is_first_open};
use super::messages::Endpoint;
use super::metadata::Members;
use super::snapshot_reader::find_snapshot;
use super::stats;

/// A volume to serve.
#[derive(Clone, Debug)]
pub struct VolumeSpec {
    /// Its name; with `snapshot` that of the snapshot.
    pub name: String,
    /// It is a snapshot, which is only read.
    pub snapshot: bool,
    /// Where.
    pub endpoint: Endpoint,
}

/// What to serve, and how.
#[derive(Clone)]
pub struct ServeConfig {
    /// `host:port` of metadata members, at least one.
    pub metadata: Vec<String>,
    /// The volumes.
    pub volumes: Vec<VolumeSpec>,
    /// Join the readers (R10) instead of holding the volume.
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
    /// Where figures are shown, if anywhere.
    pub observer: Option<Arc<Observer>>,
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
    /// There is no host for the volumes.
    #[error(transparent)]
    Host(#[from] HostError),
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

/// Serves until `shutdown` ends or no volume is left.
///
/// # Errors
/// If it cannot begin.
pub async fn serve(
    config: ServeConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<Outcome, ServeError> {
    tokio::pin!(shutdown);
    let (host, threads) = Host::start(HostConfig {
        metadata: config.metadata.clone(),
        client: ClientId::generate(),
        threads: config.threads.clamp(1, config.volumes.len().max(1)),
        local_sockets: config.local_sockets.clone(),
        close_timeout: config.close_timeout,
    })?;
    if let Some(observer) = &config.observer {
        crate::metrics::observe(observer, &host);
    }
    let _stats = match &config.stats_socket {
        Some(path) => Some(StatsSocket::open(path, host.clone()).map_err(|source| {
            ServeError::StatsSocket {
                path: path.clone(),
                source,
            }
        })?),
        None => None,
    };
    let specs = tokio::select! {
        specs = find_volumes(&config, host.members()) => specs?,
        () = &mut shutdown => return Ok(Outcome::Closed),
    };
    let mut volumes = Vec::with_capacity(specs.len());
    for spec in specs {
        volumes.push((spec.name.clone(), host.open(spec).await));
    }
    if let Some(observer) = &config.observer {
        let all: Vec<HostedVolume> = volumes.iter().map(|(_, v)| v.clone()).collect();
        observer.ready_when(move || {
            let open = |v: &HostedVolume| v.status().phase == Phase::Serving;
            match all.iter().all(open) {
                true => Ok(()),
                false => Err("not every volume is served".to_owned()),
            }
        });
    }
    let outcome = run(&host, &volumes, &mut shutdown, config.close_timeout).await;
    threads.join();
    Ok(outcome)
}

/// Waits for the end of all volumes, and brings it about when `shutdown` ends.
async fn run(
    host: &Host,
    volumes: &[(String, HostedVolume)],
    shutdown: &mut (impl Future<Output = ()> + Unpin),
    close_timeout: Duration,
) -> Outcome {
    let mut ends = JoinSet::new();
    for (name, volume) in volumes.iter().cloned() {
        ends.spawn(async move { (name, volume.ended().await) });
    }
    let mut last = String::new();
    loop {
        tokio::select! {
            end = ends.join_next() => match end {
                Some(Ok((name, ended))) => last = format!("volume {name:?}: {ended}"),
                Some(Err(_)) => {}
                None => {
                    // The workers have nothing left to do and end.
                    host.shut_down().await;
                    return Outcome::NothingLeft(last);
                }
            },
            () = &mut *shutdown => break,
        }
    }
    tracing::info!(volumes = ends.len(), "shutting down");
    host.shut_down().await;
    let all = async { while ends.join_next().await.is_some() {} };
    if tokio::time::timeout(close_timeout, all).await.is_ok() {
        return Outcome::Closed;
    }
    let open = volumes
        .iter()
        .filter(|(_, v)| !matches!(v.status().phase, Phase::Ended(_)));
    Outcome::TimedOut(open.map(|(name, _)| name.clone()).collect())
}

/// Looks the volumes up by name.
async fn find_volumes(
    config: &ServeConfig,
    members: &Members,
) -> Result<Vec<OpenSpec>, ServeError> {
    let node = find_node(config.node.as_deref(), members).await?;
    let mut specs = Vec::with_capacity(config.volumes.len());
    for spec in &config.volumes {
        if spec.snapshot {
            specs.push(OpenSpec {
                node,
                ..snapshot_spec(spec, members).await?
            });
            continue;
        }
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
        let volume = VolumeId::from_slice(&found.volume_id)
            .ok_or_else(|| ServeError::Malformed(format!("volume {:?} has no id", spec.name)))?;
        specs.push(OpenSpec {
            read_only: config.read_only,
            force: config.force,
            node,
            first_open: is_first_open(&found),
            ..OpenSpec::new(volume, spec.name.clone(), spec.endpoint.clone())
        });
    }
    Ok(specs)
}

/// Looks a snapshot up by name or id.
async fn snapshot_spec(spec: &VolumeSpec, members: &Members) -> Result<OpenSpec, ServeError> {
    let what = || format!("snapshot {:?}", spec.name);
    let view = find_snapshot(members, &spec.name)
        .await
        .map_err(|status| ServeError::Metadata {
            what: what(),
            status: Box::new(status),
        })?;
    OpenSpec::of_snapshot(&view, spec.endpoint.clone())
        .map_err(|why| ServeError::Malformed(format!("{}: {why}", what())))
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

/// Serves statistics until it is dropped.
struct StatsSocket {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl StatsSocket {
    fn open(path: &Path, host: Host) -> std::io::Result<Self> {
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
                let host = host.clone();
                tokio::spawn(stats::serve_connection(stream, move |reset| {
                    let host = host.clone();
                    async move { host.stats(reset).await }
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
