//! What a daemon with real disks tells over HTTP, while no metadata member can be reached.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ashlar_platform::observe::Observer;
use ashlar_proto::ids::ClusterId;
use storage_daemon::config::{NodeFile, ServeConfig};
use storage_daemon::daemon::Daemon;
use storage_daemon::metrics;
use storage_daemon::offline::{self, FormatRequest};
use storage_daemon::rpc::{MetadataAccess, observe};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disks_are_told_of_and_a_removed_one_no_more() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("disk");
    let format = FormatRequest {
        size_bytes: Some(128 << 20),
        ..Default::default()
    };
    offline::format(&path, &format).unwrap();
    offline::join_cluster(&path, ClusterId([8; 16])).unwrap();
    let anywhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    // Nobody listens on port 1.
    let members = vec!["127.0.0.1:1".to_owned()];
    let config = ServeConfig {
        metadata: members.clone(),
        node_name: "n".into(),
        labels: BTreeMap::new(),
        data_dir: dir.path().join("node"),
        admin_listen: anywhere,
        data_listen: "127.0.0.1".parse().unwrap(),
        advertise: None,
        local_sockets: None,
        disks: Vec::new(),
        cache_bytes: 1 << 20,
        discard: storage_daemon::config::DiscardPolicy::Off,
    };
    let file = NodeFile::open(&config.data_dir).unwrap();
    let access = MetadataAccess::new(&members).unwrap();
    let daemon = Arc::new(Daemon::new(config, file, access, anywhere));
    let observer = Observer::install("storage-daemon", "0", metrics::ALL).unwrap();
    observe(&daemon, &observer);
    let served = observer.serve(anywhere).await.unwrap();
    let disk = daemon.serve_disk(&path).await.unwrap();
    daemon
        .serve_disk(&dir.path().join("none"))
        .await
        .unwrap_err();

    let ready = get(served.address(), "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503 ") && ready.ends_with("not registered yet\n"));
    assert!(
        get(served.address(), "/healthz")
            .await
            .starts_with("HTTP/1.1 200 ")
    );
    let text = get(served.address(), "/metrics").await;
    let capacity = daemon.reports().await[0].status.store.capacity_bytes;
    assert!(capacity > 64 << 20);
    let labels = format!("disk=\"{disk}\",path=\"{}\"", path.display());
    for line in [
        format!("ashlar_disk_failed{{{labels}}} 0"),
        format!("ashlar_disk_capacity_bytes{{{labels}}} {capacity}"),
        format!("ashlar_disk_writes_total{{{labels}}} 0"),
        "ashlar_storage_disks{state=\"served\"} 1".into(),
        "ashlar_storage_disks{state=\"failed\"} 1".into(),
        "ashlar_storage_disks{state=\"silent\"} 0".into(),
        "ashlar_storage_registered 0".into(),
    ] {
        assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
    }
    assert!(daemon.remove_disk(disk).await.unwrap());
    let text = get(served.address(), "/metrics").await;
    assert!(!text.contains(&disk.to_string()), "{text}");
    assert!(
        text.lines()
            .any(|l| l == "ashlar_storage_disks{state=\"served\"} 0")
    );
}
