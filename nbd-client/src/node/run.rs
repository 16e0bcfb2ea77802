//! The daemon: one process at a time per state directory.
//!
//! Invariants:
//! - The lock on the state directory is held from before the first record is read until the process ends.
//! - The service socket is replaced by renaming, never removed, so that a successor's is not lost.
//! - On SIGTERM requests under way are answered, then connections are dropped: devices wait for the next
//!   process, and the volumes stay held, so that nobody else opens them meanwhile.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_platform::observe::Observer;
use ashlar_proto::ids::ClientId;
use ashlar_proto::rpc::node::node_attach_server::NodeAttachServer;
use rustix::fs::FlockOperation;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;

use super::attachments::{Attachments, State};
use super::device;
use super::error::NodeError;
use super::handover;
use super::netlink::Nbd;
use super::record::{self, Kind, Records};
use super::service::Service;
use crate::client::{Host, HostConfig, HostError};
use crate::metrics::{ATTACHMENTS, DEAD_CONNECTIONS};

/// Time for requests under way when this process is asked to end.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the predecessor to end, once it has handed over (or does not listen).
const LOCK_TIMEOUT: Duration = Duration::from_secs(15);
const LOCK_POLL: Duration = Duration::from_millis(10);
/// Most connections to the service.
const REQUESTS_MAX: usize = 256;

/// Settings of the daemon.
#[derive(Clone)]
pub struct NodeConfig {
    /// `host:port` of metadata members, at least one.
    pub metadata: Vec<String>,
    /// Name of this node in the cluster.
    pub node: String,
    /// Where attachments are remembered.
    pub state_dir: PathBuf,
    /// Where the service listens.
    pub socket: PathBuf,
    /// Reactor threads.
    pub threads: usize,
    /// Where storage daemons on this machine have a unix socket per disk.
    pub local_sockets: Option<PathBuf>,
    /// Time for an orderly end of a volume.
    pub close_timeout: Duration,
    /// Where figures are shown, if anywhere.
    pub observer: Option<Arc<Observer>>,
}

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The state directory.
    #[error("state directory {}: {what}", path.display())]
    State {
        /// Its path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another process has the state directory.
    #[error("another nbd-client has the state directory {} and does not hand over", .0.display())]
    Locked(PathBuf),
    /// The service socket.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no host for volumes.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The records.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The service ended.
    #[error("the service ended")]
    Service(#[source] tonic::transport::Error),
    /// A reactor thread ended.
    #[error("a reactor thread ended: start me again, devices wait")]
    Broken,
}

/// Serves until `shutdown` ends.
///
/// # Errors
/// If it cannot begin, or cannot go on.
pub async fn run(config: NodeConfig, shutdown: impl Future<Output = ()>) -> Result<(), RunError> {
    let state = |what| {
        let path = config.state_dir.clone();
        move |source| RunError::State { path, what, source }
    };
    fs::create_dir_all(&config.state_dir).map_err(state("cannot make it"))?;
    let file = lock_file(&config.state_dir).map_err(state("cannot make a file in it"))?;
    let locked = try_lock(&file).map_err(state("cannot lock it"))?;
    let client =
        record::client_id(&config.state_dir).map_err(state("cannot keep the client id"))?;
    let records =
        Records::open(&config.state_dir).map_err(state("cannot make a directory in it"))?;
    let boot_id = ashlar_platform::boot_id().map_err(state("cannot read the boot id"))?;
    let (host, threads) = Host::start(HostConfig {
        metadata: config.metadata.clone(),
        client,
        threads: config.threads,
        local_sockets: config.local_sockets.clone(),
        close_timeout: config.close_timeout,
    })?;
    let attachments = Attachments::new(
        host,
        client,
        records,
        uuid::Uuid::from_bytes(boot_id).to_string(),
        config.state_dir.clone(),
        config.node.clone(),
    );
    let starting = async {
        if !locked {
            // What can be learned before is learned before: the devices' users wait meanwhile.
            if let Err(error) = attachments.node().await {
                tracing::warn!(%error, "metadata does not say this node's id yet");
            }
            succeed(&attachments, client, &config.state_dir).await;
            wait_lock(&file, &config.state_dir).await?;
        }
        Ok::<_, RunError>(attachments.recover(client).await?)
    };
    tokio::pin!(shutdown);
    tokio::select! {
        started = starting => started?,
        () = &mut shutdown => {
            attachments.leave(LEAVE_TIMEOUT).await;
            threads.join();
            return Ok(());
        }
    }
    watch_links(&attachments);
    let successors = listen(&handover::path(&config.state_dir))
        .map_err(state("cannot listen for a successor in it"))?;
    let listener = listen(&config.socket).map_err(|source| RunError::Socket {
        path: config.socket.clone(),
        source,
    })?;
    let service = NodeAttachServer::new(Service {
        attachments: attachments.clone(),
    });
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<NodeAttachServer<Service>>().await;
    let server = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(REQUESTS_MAX)
        .add_service(service)
        .add_service(health_service)
        .serve_with_incoming(UnixListenerStream::new(listener));
    if let Some(observer) = &config.observer {
        observe(observer, &attachments);
    }
    tracing::info!(socket = %config.socket.display(), node = config.node, %client, "ready");
    let outcome = tokio::select! {
        outcome = server => outcome.map_err(RunError::Service),
        () = attachments.shared.broken.notified() => Err(RunError::Broken),
        () = handed_over(&attachments, successors) => {
            threads.join();
            return Ok(());
        }
        () = &mut shutdown => Ok(()),
    };
    attachments.leave(LEAVE_TIMEOUT).await;
    threads.join();
    outcome
}

/// The file whose lock is the right to a state directory.
fn lock_file(state_dir: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(state_dir.join("lock"))
}

/// Whether the lock is this process's now.
fn try_lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits for the end of the process that has the lock.
async fn wait_lock(file: &File, state_dir: &Path) -> Result<(), RunError> {
    let until = tokio::time::Instant::now() + LOCK_TIMEOUT;
    loop {
        match try_lock(file) {
            Ok(true) => return Ok(()),
            Ok(false) if tokio::time::Instant::now() > until => {
                return Err(RunError::Locked(state_dir.to_owned()));
            }
            Ok(false) => tokio::time::sleep(LOCK_POLL).await,
            Err(source) => {
                return Err(RunError::State {
                    path: state_dir.to_owned(),
                    what: "cannot lock it",
                    source,
                });
            }
        }
    }
}

/// Takes over from the process that has the state directory.
async fn succeed(attachments: &Attachments, client: ClientId, state_dir: &Path) {
    let dir = state_dir.to_owned();
    let asked = tokio::task::spawn_blocking(move || handover::ask(&dir)).await;
    let mut volumes = match asked {
        Ok(Ok(volumes)) => volumes,
        Ok(Err(error)) => {
            tracing::warn!(%error, "the process that has the state directory does not listen: waiting for its end");
            return;
        }
        Err(_) => return,
    };
    while let Some(passed) = volumes.recv().await {
        let volume = passed.record.volume.clone();
        let index = passed.record.index;
        let there = index.is_some_and(|i| match passed.record.kind {
            Kind::Nbd => device::is_ours(i, &passed.record.backend()),
            Kind::Loop => attachments.place(passed.record.volume_id).has(i),
        });
        if !there {
            tracing::warn!(volume, "was handed a device that is gone");
            continue;
        }
        if let Err(error) = attachments.take_back(passed.record, client, passed.sockets) {
            tracing::error!(volume, %error, "cannot take over");
        }
    }
}

/// Ends when everything was handed over to another process.
async fn handed_over(attachments: &Attachments, successors: UnixListener) {
    loop {
        let stream = match successors.accept().await {
            Ok((stream, _)) => stream.into_std(),
            Err(error) => Err(error),
        };
        match stream {
            Ok(stream) => {
                if attachments.hand_over(stream).await {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot listen for a successor");
                tokio::time::sleep(LOCK_POLL).await;
            }
        }
    }
}

/// Listens on a unix socket that only root may use, in place of a former one.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Shows the figures of volumes and attachments; ready as long as the service runs.
fn observe(observer: &Arc<Observer>, attachments: &Attachments) {
    crate::metrics::observe(observer, &attachments.shared.host);
    let attachments = attachments.clone();
    observer.on_scrape(move |scrape| {
        let all = attachments.list(None);
        for state in State::ALL {
            let count = all.iter().filter(|a| a.state == state).count();
            scrape.set(&ATTACHMENTS, &[state.name()], count as u64);
        }
        std::future::ready(())
    });
    observer.set_ready();
}

/// Tells, for people, when the kernel gives up a connection. The workers notice by themselves.
fn watch_links(attachments: &Attachments) {
    let attachments = attachments.clone();
    let watch = move || {
        let listener = match Nbd::open().and_then(|nbd| nbd.listen().map(|()| nbd)) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::info!(%error, "not listening for dead connections");
                return;
            }
        };
        loop {
            match listener.next_dead() {
                Ok(index) => {
                    DEAD_CONNECTIONS.counter_of(&[]).increment(1);
                    let all = attachments.list(None);
                    let volume = all.iter().find(|a| a.record.index == Some(index));
                    if let Some(volume) = volume.map(|a| &a.record.volume) {
                        let device = device::path(index);
                        tracing::warn!(volume, device = %device.display(), "a connection is dead");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "lost news of dead connections");
                    return;
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("link-dead".into());
    if let Err(error) = thread.spawn(watch) {
        tracing::warn!(%error, "not listening for dead connections");
    }
}

impl Attachments {
    /// Answers what is under way and drops the connections; records and held volumes stay.
    async fn leave(&self, limit: Duration) {
        let all = self.list(None);
        tracing::info!(
            attachments = all.len(),
            "leaving; devices wait for the next process"
        );
        let mut leaving = tokio::task::JoinSet::new();
        for hosted in all.into_iter().filter_map(|a| {
            if let Some(supervisor) = &a.supervisor {
                supervisor.abort();
            }
            a.hosted
        }) {
            leaving.spawn(async move {
                let sockets = hosted.release().await;
                // What was acknowledged is durable before the volume is left: then the next open has little to compare.
                let _ = hosted.ask(crate::engine::ClientOp::Flush).await;
                drop(sockets);
            });
        }
        let all_left = async { while leaving.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, all_left).await.is_err() {
            tracing::warn!("some requests are not answered: the kernel will send them again");
        }
    }
}
