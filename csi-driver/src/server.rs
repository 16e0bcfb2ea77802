//! Puts the services together on the socket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_platform::observe::{ObserveError, Observer};
use nbd_client::extents::BlockLists;
use tonic::transport::Server;

use crate::attach::Attacher;
use crate::controller::ControllerService;
use crate::drain::Cut;
use crate::group_controller::GroupControllerService;
use crate::identity::IdentityService;
use crate::listener::{ListenError, connections, listen};
use crate::metadata::{BadAddress, Metadata};
use crate::metrics::{self, CountLayer};
use crate::node::{NodeOptions, NodeService};
use crate::rpc::controller_server::ControllerServer;
use crate::rpc::group_controller_server::GroupControllerServer;
use crate::rpc::identity_server::IdentityServer;
use crate::rpc::node_server::NodeServer;
use crate::rpc::snapshot_metadata_server::SnapshotMetadataServer;
use crate::snapshot_metadata::SnapshotMetadataService;

/// Largest request that is read: capabilities and maps are bounded, so this is plenty.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Requests at a time on one connection.
const CONCURRENT_MAX: u32 = 256;
/// HTTP/2 pings, so that a client that is gone is noticed.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause before the node's registration is tried again.
const REGISTER_PAUSE: Duration = Duration::from_secs(5);

/// Pause between two looks at what the driver needs.
const WATCH_PAUSE: Duration = Duration::from_secs(5);

/// What is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket.
    pub socket: PathBuf,
    /// Metadata members, `host:port`.
    pub metadata: Vec<String>,
    /// As in `csi.ashlar.io`.
    pub driver_name: String,
    /// Whether the Controller, GroupController and SnapshotMetadata services are served.
    pub controller: bool,
    /// The Node service, if it is served.
    pub node: Option<NodeConfig>,
    /// Where to serve metrics and health over HTTP.
    pub metrics: Option<SocketAddr>,
}

/// Of the Node service.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// The node.
    pub options: NodeOptions,
    /// Socket of nbd-client.
    pub nbd_socket: PathBuf,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address is none.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// Likewise.
    #[error(transparent)]
    Lists(nbd_client::client::BadAddress),
    /// No socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The path of nbd-client's socket is none.
    #[error("--nbd-socket {0}: {1}")]
    NbdSocket(PathBuf, #[source] tonic::transport::Error),
    /// No metrics.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// The server failed.
    #[error("serve: {0}")]
    Server(#[from] tonic::transport::Error),
}

/// Serves until `shutdown`; requests that are under way have the time for it that [`crate::drain`] says.
pub async fn serve(
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let metadata = Metadata::new(&options.metadata)?;
    let observer = match options.metrics {
        None => None,
        Some(address) => {
            let version = env!("CARGO_PKG_VERSION");
            let observer = Observer::install("csi-driver", version, metrics::ALL)?;
            Some((observer.serve(address).await?, observer))
        }
    };
    let identity = IdentityService::new(options.driver_name.clone(), options.controller);
    let controller = options
        .controller
        .then(|| ControllerService::new(metadata.clone()));
    let group_controller = options
        .controller
        .then(|| GroupControllerService::new(metadata.clone()));
    let snapshot_metadata = match options.controller {
        false => None,
        true => {
            let lists = BlockLists::new(&options.metadata).map_err(ServeError::Lists)?;
            Some(SnapshotMetadataService::new(lists))
        }
    };
    let node = match options.node {
        None => None,
        Some(config) => Some(node(config, metadata.clone())?),
    };
    let listener = listen(&options.socket).await?;
    if let Some(node) = node.clone() {
        tokio::spawn(register(node));
    }
    if let Some((_, observer)) = &observer {
        tokio::spawn(watch(observer.clone(), metadata, node.clone()));
    }
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<IdentityServer<IdentityService>>()
        .await;
    let (cut, cut_layer) = Cut::new();
    let router =
        Server::builder()
            .layer(CountLayer)
            .layer(cut_layer)
            .max_concurrent_streams(Some(CONCURRENT_MAX))
            .http2_keepalive_interval(Some(KEEPALIVE))
            .add_service(health_service)
            .add_service(IdentityServer::new(identity))
            .add_optional_service(controller.map(|service| {
                ControllerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }))
            .add_optional_service(group_controller.map(|service| {
                GroupControllerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }))
            .add_optional_service(snapshot_metadata.map(SnapshotMetadataServer::new))
            .add_optional_service(node.map(|service| {
                NodeServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }));
    tracing::info!(
        driver = options.driver_name,
        controller = options.controller,
        socket = %options.socket.display(),
        "serving CSI"
    );
    let (began, begun) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Nobody waits for it only if serving has ended.
        let _ = began.send(());
    };
    let limited = async {
        match begun.await {
            Ok(()) => cut.after_limits().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        served = router.serve_with_incoming_shutdown(connections(listener), shutdown) => served?,
        () = limited => {}
    }
    remove(&options.socket);
    Ok(())
}

fn node(config: NodeConfig, metadata: Metadata) -> Result<NodeService, ServeError> {
    let attacher = Attacher::new(&config.nbd_socket)
        .map_err(|e| ServeError::NbdSocket(config.nbd_socket.clone(), e))?;
    Ok(NodeService::new(config.options, metadata, attacher))
}

/// Makes the node known, so that volumes can be published to it before anybody asks for its topology.
async fn register(node: NodeService) {
    while let Err(error) = node.register().await {
        tracing::warn!(%error, "this node is not registered yet; trying again");
        tokio::time::sleep(REGISTER_PAUSE).await;
    }
}

/// Says whether what the driver needs answers.
async fn watch(observer: Arc<Observer>, metadata: Metadata, node: Option<NodeService>) {
    loop {
        let nbd = match &node {
            Some(node) => node.nbd_client_answers().await,
            None => true,
        };
        match (metadata.answers().await, nbd) {
            (true, true) => observer.set_ready(),
            (false, _) => observer.set_not_ready("no metadata member answers"),
            (_, false) => observer.set_not_ready("nbd-client of this node does not answer"),
        }
        tokio::time::sleep(WATCH_PAUSE).await;
    }
}

fn remove(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, socket = %socket.display(), "the socket is left behind");
    }
}
