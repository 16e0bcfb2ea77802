//! Puts the services together on the socket.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ashlar_platform::observe::{ObserveError, Observer};
use tonic::transport::Server;

use crate::attach::Attacher;
use crate::controller::ControllerService;
use crate::identity::IdentityService;
use crate::listener::{ListenError, connections, listen};
use crate::metadata::{BadAddress, Metadata};
use crate::metrics::{self, CountLayer};
use crate::node::{NodeOptions, NodeService};
use crate::rpc::controller_server::ControllerServer;
use crate::rpc::identity_server::IdentityServer;
use crate::rpc::node_server::NodeServer;

/// Largest request that is read: capabilities and maps are bounded, so this is plenty.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Requests at a time on one connection.
const CONCURRENT_MAX: u32 = 256;
/// HTTP/2 pings, so that a client that is gone is noticed.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Pause before the node's registration is tried again.
const REGISTER_PAUSE: Duration = Duration::from_secs(5);

/// How long requests that are under way at the end may take: less than the time that Kubernetes gives a pod.
/// Every request can be repeated, and metadata or nbd-client may be gone for good.
const DRAIN_MAX: Duration = Duration::from_secs(5);
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
    /// Whether the Controller service is served.
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

/// Serves until `shutdown`; then requests that are under way have [`DRAIN_MAX`] to finish, and their connections end.
pub async fn serve(
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    serve_and_drain(options, shutdown, DRAIN_MAX).await
}

async fn serve_and_drain(
    options: Options,
    shutdown: impl Future<Output = ()> + Send,
    drain_max: Duration,
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
    let router =
        Server::builder()
            .layer(CountLayer)
            .max_concurrent_streams(Some(CONCURRENT_MAX))
            .http2_keepalive_interval(Some(KEEPALIVE))
            .add_service(health_service)
            .add_service(IdentityServer::new(identity))
            .add_optional_service(controller.map(|service| {
                ControllerServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }))
            .add_optional_service(node.map(|service| {
                NodeServer::new(service).max_decoding_message_size(MESSAGE_BYTES_MAX)
            }));
    tracing::info!(
        driver = options.driver_name,
        controller = options.controller,
        socket = %options.socket.display(),
        "serving CSI"
    );
    let (stopping, stop) = tokio::sync::oneshot::channel();
    let serving = router.serve_with_incoming_shutdown(connections(listener), async {
        shutdown.await;
        // The drain below may be over already.
        let _ = stopping.send(());
    });
    let drained = async {
        if stop.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(drain_max).await;
    };
    tokio::select! {
        served = serving => served?,
        () = drained => tracing::warn!("requests under way are cut off; their callers will repeat them"),
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::rpc::DeleteVolumeRequest;
    use crate::rpc::controller_client::ControllerClient;

    /// Long enough for a request to be begun, far less than its own time limit.
    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_request_that_waits_for_metadata_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("csi.sock");
        // Connects, and never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let options = Options {
            socket: socket.clone(),
            metadata: vec![silent.local_addr().unwrap().to_string()],
            driver_name: "csi.ashlar.io".to_owned(),
            controller: true,
            node: None,
            metrics: None,
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopped.await;
        };
        let server = tokio::spawn(serve_and_drain(
            options,
            shutdown,
            Duration::from_millis(100),
        ));
        while !socket.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut client = ControllerClient::connect(format!("unix://{}", socket.display()))
            .await
            .unwrap();
        let call = tokio::spawn(async move {
            let request = DeleteVolumeRequest {
                volume_id: "01890a5d-ac96-774b-bcce-b302099a8057".to_owned(),
                ..DeleteVolumeRequest::default()
            };
            client.delete_volume(request).await
        });
        // The driver asks metadata: the request is under way.
        let (_asked, _) = tokio::task::spawn_blocking(move || silent.accept())
            .await
            .unwrap()
            .unwrap();
        stop.send(()).unwrap();
        tokio::time::timeout(LIMIT, server)
            .await
            .expect("the server ends")
            .unwrap()
            .unwrap();
        // The connection ends with the process.
        assert!(!call.is_finished());
        assert!(!socket.exists());
    }
}
