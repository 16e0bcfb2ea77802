//! `serve` with the real session engine against a metadata member and three disks that are minimal
//! stand-ins: the wiring of open, replication, exclusion, fencing, failover of metadata, statistics and
//! the orderly end.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "common/fake_disk.rs"]
mod fake_disk;
#[path = "common/fake_metadata.rs"]
mod fake_metadata;

use std::path::Path;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{ClientId, ClusterId};
use fake_disk::FakeDisk;
use fake_metadata::FakeMetadata;
use nbd_client::client::{Endpoint, Outcome, ServeConfig, ServeError, VolumeSpec, serve, stats};
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const SIZE: u64 = 32 << 20;

struct Cluster {
    directory: tempfile::TempDir,
    disks: Vec<FakeDisk>,
    metadata: FakeMetadata,
}

impl Cluster {
    async fn start() -> Self {
        let cluster = ClusterId::generate();
        let disks: Vec<FakeDisk> = (0..3).map(|_| FakeDisk::start(cluster)).collect();
        let reached: Vec<_> = disks
            .iter()
            .map(|d| (d.id, d.address.to_string()))
            .collect();
        let metadata = FakeMetadata::start(cluster, "vol", SIZE, &reached).await;
        Self {
            directory: tempfile::tempdir().unwrap(),
            disks,
            metadata,
        }
    }

    fn config(&self) -> ServeConfig {
        ServeConfig {
            // The first member does not exist: the second is asked.
            metadata: vec!["127.0.0.1:9".into(), self.metadata.address.to_string()],
            volumes: vec![VolumeSpec {
                name: "vol".into(),
                snapshot: false,
                endpoint: Endpoint::Unix(self.directory.path().join("nbd.sock")),
            }],
            read_only: false,
            force: false,
            threads: 1,
            node: None,
            local_sockets: None,
            stats_socket: Some(self.directory.path().join("stats.sock")),
            observer: None,
            close_timeout: Duration::from_secs(10),
        }
    }

    fn socket(&self) -> String {
        self.directory.path().join("nbd.sock").display().to_string()
    }

    fn stats_socket(&self) -> std::path::PathBuf {
        self.directory.path().join("stats.sock")
    }
}

struct Running {
    shutdown: oneshot::Sender<()>,
    task: JoinHandle<Result<Outcome, ServeError>>,
}

impl Running {
    fn start(config: ServeConfig) -> Self {
        let (shutdown, asked) = oneshot::channel();
        let task = tokio::spawn(serve(config, async move {
            // A dropped sender ends it as well.
            let _ = asked.await;
        }));
        Self { shutdown, task }
    }

    async fn stop(self) -> Outcome {
        let _ = self.shutdown.send(());
        self.task.await.unwrap().unwrap()
    }
}

async fn serving(socket: &Path) -> stats::VolumeStats {
    let start = Instant::now();
    loop {
        if let Ok(found) = stats::ask(socket, false).await
            && let Some(volume) = found.volumes.into_iter().next()
            && volume.serving
        {
            return volume;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "never served");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Runs a Python script with `h` connected to the volume.
async fn nbdsh(socket: &str, script: &str) -> bool {
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let uri = format!("nbd+unix:///vol?socket={socket}");
    let mut command = Command::new("timeout");
    command
        .args(["60", "nbdsh", "-u", &uri, "-c", script])
        .env("PATH", path);
    command.status().await.unwrap().success()
}

fn have_nbdsh() -> bool {
    let found = Path::new("/usr/bin/nbdsh").is_file();
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "nbdsh is not installed"
        );
        eprintln!("SKIPPED: nbdsh is not installed");
    }
    found
}

#[tokio::test]
async fn a_volume_is_opened_written_read_and_closed_cleanly() {
    if !have_nbdsh() {
        return;
    }
    let cluster = Cluster::start().await;
    let running = Running::start(cluster.config());
    serving(&cluster.stats_socket()).await;
    let script = r#"
data = bytes(range(256)) * 8192
h.pwrite(data, 4096)
h.pwrite(b"odd" * 333, 777)
h.flush()
assert h.pread(len(data), 4096) == data
assert h.pread(1003, 775) == b"\0\0" + b"odd" * 333 + b"\0\0"
h.trim(1 << 20, 1 << 20)
assert h.pread(4096, 1 << 20) == bytes(4096)
h.zero(1 << 20, 0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
big = b"0123456789abcdef" * (1 << 20)
h.pwrite(big, 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(len(big), 1 << 20) == big
h.shutdown()
"#;
    assert!(nbdsh(&cluster.socket(), script).await);
    let volume = serving(&cluster.stats_socket()).await;
    assert!(volume.writes >= 5 && volume.reads >= 5, "{volume:?}");
    assert_eq!(volume.replicas.len(), 3);
    assert!(
        volume
            .replicas
            .iter()
            .all(|r| r.connected && r.state == "in-sync"),
        "{volume:?}"
    );
    assert_eq!(running.stop().await, Outcome::Closed);
    assert!(cluster.metadata.closed_cleanly());
    assert!(!Path::new(&cluster.socket()).exists());
    // Every disk has every byte.
    for disk in &cluster.disks {
        assert_eq!(disk.byte(1 << 20), b'0');
    }
}

/// Many more than are taken off a connection at a time; what stalls it is over when its replies are made.
#[tokio::test]
async fn thousands_of_requests_on_one_connection_are_all_answered() {
    if !have_nbdsh() {
        return;
    }
    let cluster = Cluster::start().await;
    let running = Running::start(cluster.config());
    serving(&cluster.stats_socket()).await;
    let script = r#"
h.pwrite(b"x" * 4096 * 64, 0)
for op in range(2):
    for i in range(6000):
        at = 4096 * (i % 64)
        h.aio_pread(nbd.Buffer(512), at) if op == 0 else h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), at)
    while h.aio_in_flight() > 0:
        assert h.poll(10000) == 1, "no reply for 10 s"
h.shutdown()
"#;
    assert!(nbdsh(&cluster.socket(), script).await);
    assert_eq!(running.stop().await, Outcome::Closed);
}

#[tokio::test]
async fn a_dead_disk_is_excluded_and_io_goes_on() {
    if !have_nbdsh() {
        return;
    }
    let cluster = Cluster::start().await;
    let running = Running::start(cluster.config());
    serving(&cluster.stats_socket()).await;
    assert!(nbdsh(&cluster.socket(), "h.pwrite(b'a' * 65536, 0); h.flush()").await);
    cluster.disks[0].kill();
    let script = "h.pwrite(b'b' * 65536, 0)\nassert h.pread(65536, 0) == b'b' * 65536\nh.flush()";
    assert!(nbdsh(&cluster.socket(), script).await);
    let volume = serving(&cluster.stats_socket()).await;
    assert_eq!(volume.exclusions, 1, "{volume:?}");
    assert!(volume.longest_stall_us < 500_000, "{volume:?}");
    assert_eq!(
        volume
            .replicas
            .iter()
            .filter(|r| r.state == "stale")
            .count(),
        1
    );
    assert_eq!(running.stop().await, Outcome::Closed);
}

#[tokio::test]
async fn a_superseded_client_drops_its_connections_and_says_why() {
    if !have_nbdsh() {
        return;
    }
    let cluster = Cluster::start().await;
    let running = Running::start(cluster.config());
    serving(&cluster.stats_socket()).await;
    let socket = cluster.socket();
    let client = tokio::spawn(async move {
        // Never an error reply: the connection ends (nbd reports that without an error number of the
        // server's).
        let script = r#"
import time
try:
    for i in range(3000):
        h.pwrite(b"c" * 4096, 0)
        time.sleep(0.01)
    raise SystemExit("nothing happened")
except nbd.Error as e:
    assert e.errno in (None, "ENOTCONN", "EPIPE", "ECONNRESET", "EINVAL"), (e.errno, e.string)
"#;
        nbdsh(&socket, script).await
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.metadata.take_over(ClientId::generate());
    let outcome = running.task.await.unwrap().unwrap();
    assert!(
        matches!(&outcome, Outcome::NothingLeft(why) if why.contains("vol")),
        "{outcome:?}"
    );
    assert!(client.await.unwrap());
    assert!(!Path::new(&cluster.socket()).exists());
}

#[tokio::test]
async fn a_volume_held_by_another_client_needs_force() {
    let cluster = Cluster::start().await;
    let running = Running::start(cluster.config());
    serving(&cluster.stats_socket()).await;
    assert_eq!(running.stop().await, Outcome::Closed);
    cluster.metadata.take_over(ClientId::generate());
    let running = Running::start(cluster.config());
    let outcome = running.task.await.unwrap().unwrap();
    assert!(
        matches!(&outcome, Outcome::NothingLeft(why) if why.contains("held")),
        "{outcome:?}"
    );
    let running = Running::start(ServeConfig {
        force: true,
        ..cluster.config()
    });
    // The other client did not close: a lease time passes first.
    serving(&cluster.stats_socket()).await;
    assert_eq!(running.stop().await, Outcome::Closed);
}

#[tokio::test]
async fn an_unknown_volume_is_an_error_at_once() {
    let cluster = Cluster::start().await;
    let mut config = cluster.config();
    config.volumes[0].name = "other".into();
    let error = Running::start(config).task.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("\"other\""), "{error}");
}

#[tokio::test]
async fn a_socket_that_cannot_be_listened_on_is_reported() {
    let cluster = Cluster::start().await;
    let mut config = cluster.config();
    config.volumes[0].endpoint = Endpoint::Unix("/nonexistent/nbd.sock".into());
    let outcome = Running::start(config).task.await.unwrap().unwrap();
    assert!(
        matches!(&outcome, Outcome::NothingLeft(why) if why.contains("vol")),
        "{outcome:?}"
    );
}
