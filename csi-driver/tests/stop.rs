//! The real process ends soon after SIGTERM, whatever its requests wait for.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use csi_driver::drain::{ANSWER_LIMIT, FINISH_LIMIT};
use csi_driver::rpc;
use csi_driver::rpc::controller_client::ControllerClient;
use csi_driver::rpc::identity_client::IdentityClient;
use csi_driver::rpc::node_client::NodeClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// Beyond the limits: for a machine that is busy.
const SLACK: Duration = Duration::from_secs(2);

struct Driver {
    child: Child,
    socket: PathBuf,
    // Both take connections and answer nothing.
    _metadata: TcpListener,
    _nbd_client: std::os::unix::net::UnixListener,
}

impl Driver {
    fn start(dir: &Path) -> Self {
        let metadata = TcpListener::bind("127.0.0.1:0").unwrap();
        let nbd_socket = dir.join("nbd.sock");
        let socket = dir.join("csi.sock");
        let nbd_client = std::os::unix::net::UnixListener::bind(&nbd_socket).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_csi-driver"))
            .args(["--mode", "all", "--node", "node-1"])
            .args(["--metadata", &metadata.local_addr().unwrap().to_string()])
            .args(["--endpoint", &format!("unix://{}", socket.display())])
            .arg("--nbd-socket")
            .arg(&nbd_socket)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            child,
            socket,
            _metadata: metadata,
            _nbd_client: nbd_client,
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display())).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match endpoint.connect().await {
                Ok(channel) => return channel,
                Err(error) if Instant::now() > until => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Asks it to end; how long it took.
    async fn stop(&mut self) -> Duration {
        let started = Instant::now();
        let process = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "{status}");
                return started.elapsed();
            }
            assert!(started.elapsed() < Duration::from_secs(60), "it never ends");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn requests_that_wait_for_others_are_answered_unavailable_and_the_process_ends() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver::start(dir.path());
    let channel = driver.channel().await;
    // A stream that never ends by itself, as gRPC health clients hold one.
    let mut health = HealthClient::new(driver.channel().await);
    let watched = health.watch(HealthCheckRequest::default()).await;
    let mut stream = watched.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    // A connection that says nothing at all.
    let _silent = std::os::unix::net::UnixStream::connect(&driver.socket).unwrap();
    // Requests that wait for the metadata cluster, and for nbd-client after it.
    let mut controller = ControllerClient::new(channel.clone());
    let mut node = NodeClient::new(channel.clone());
    let capacity = tokio::spawn(async move {
        let request = rpc::GetCapacityRequest::default();
        controller.get_capacity(request).await.map(drop)
    });
    let info = tokio::spawn(async move {
        let request = rpc::NodeGetInfoRequest::default();
        node.node_get_info(request).await.map(drop)
    });
    // One connection carries requests in their order: when this is answered the others are under way.
    let mut identity = IdentityClient::new(channel);
    let request = rpc::GetPluginInfoRequest::default();
    identity.get_plugin_info(request).await.unwrap();
    assert!(!capacity.is_finished());

    let took = driver.stop().await;
    assert!(took < FINISH_LIMIT + ANSWER_LIMIT + SLACK, "{took:?}");
    let status = capacity.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("stopped"), "{status}");
    match info.await.unwrap() {
        Ok(()) => {}
        Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
    }
    assert!(!driver.socket.exists(), "the socket is removed");
}

#[tokio::test]
async fn without_requests_the_process_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut driver = Driver::start(dir.path());
    let mut identity = IdentityClient::new(driver.channel().await);
    let request = rpc::GetPluginInfoRequest::default();
    identity.get_plugin_info(request).await.unwrap();
    let took = driver.stop().await;
    assert!(took < FINISH_LIMIT, "{took:?}");
}
