//! Every daemon of a development cluster, the driver and a client, as Prometheus and the kubelet see them.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use ashlar_tests::e2e::csi::{Driver, create};
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, exposition, wait_until};

const LIMIT: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;

/// An address of loopback that is free now.
fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

#[test]
fn every_daemon_of_a_development_cluster_is_scraped_and_shows_what_is_documented() {
    let cluster = Cluster::up(ClusterSpec::default());
    let status = cluster.json(&["dev", "status"]);
    let processes = status["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 6);
    let table = cluster.ok(&["dev", "status"]);
    for process in processes {
        let name = process["name"].as_str().unwrap();
        let address = process["metrics_address"].as_str().unwrap();
        assert!(address.starts_with("127.0.0.1:"), "{status}");
        assert!(table.contains(address), "{table}");
        let program = match name.starts_with("metadata-") {
            true => "metadata-raft",
            false => "storage-daemon",
        };
        assert_eq!(exposition::get(address, "/healthz").unwrap().0, 200);
        wait_until(&format!("{name} is ready"), LIMIT, || {
            let (status, _) = exposition::get(address, "/readyz").unwrap();
            (status == 200).then_some(())
        });
        let shown = exposition::scrape_at(address);
        shown.check_documented(program).unwrap();
        let labels = [("component", program)];
        assert_eq!(shown.value("ashlar_build_info", &labels), Some(1.0));
    }
    let leaders: f64 = (1..=3)
        .filter_map(|n| {
            exposition::scrape(&cluster, &format!("metadata-{n}"))
                .value("ashlar_metadata_is_leader", &[])
        })
        .sum();
    assert_eq!(leaders, 1.0);
    // Where it was is where it is again.
    cluster.ok(&["dev", "kill", "daemon-1"]);
    let address = exposition::address(&cluster, "daemon-1");
    exposition::get(&address, "/healthz").unwrap_err();
    cluster.ok(&["dev", "start", "daemon-1"]);
    wait_until("daemon-1 is ready again", LIMIT, || {
        let answer = exposition::get(&address, "/readyz");
        answer.is_ok_and(|(status, _)| status == 200).then_some(())
    });
}

#[test]
fn input_and_output_move_the_metrics_of_the_volume_and_of_the_disks() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("data", "64MiB", 3);
    let address = free_address();
    let export = Export::start_with(&cluster, "data", "data", &["--metrics", &address]);
    let mut client = NbdClient::connect_unix(export.socket(), "data").unwrap();
    let disks = |name: &str| -> f64 {
        (1..=3)
            .filter_map(|n| exposition::scrape(&cluster, &format!("daemon-{n}")).value(name, &[]))
            .sum()
    };
    let before = exposition::scrape_at(&address);
    before.check_documented("nbd-client").unwrap();
    let written_before = disks("ashlar_disk_written_bytes_total");
    let block = vec![7; usize::try_from(MIB).unwrap()];
    for at in 0..4 {
        client.write(at * MIB, &block).unwrap();
    }
    client.flush().unwrap();
    for at in 0..3 {
        assert_eq!(client.read(at * MIB, block.len()).unwrap(), block);
    }
    let after = exposition::scrape_at(&address);
    after.check_documented("nbd-client").unwrap();
    for (name, operation, grows_by) in [
        ("ashlar_volume_requests_total", "write", 4.0),
        ("ashlar_volume_requests_total", "flush", 1.0),
        ("ashlar_volume_requests_total", "read", 3.0),
        ("ashlar_volume_bytes_total", "write", 4.0 * MIB as f64),
        ("ashlar_volume_bytes_total", "read", 3.0 * MIB as f64),
        ("ashlar_volume_request_duration_seconds_count", "write", 4.0),
        ("ashlar_volume_request_duration_seconds_count", "read", 3.0),
    ] {
        let labels = [("volume", "data"), ("operation", operation)];
        let value = |shown: &exposition::Exposition| shown.value(name, &labels).unwrap_or(0.0);
        let grown = value(&after) - value(&before);
        assert_eq!(grown, grows_by, "{name} {operation}\n{after:?}");
    }
    let volume = [("volume", "data")];
    assert_eq!(after.value("ashlar_volume_serving", &volume), Some(1.0));
    let in_sync = [("volume", "data"), ("state", "in-sync")];
    assert_eq!(after.value("ashlar_volume_replicas", &in_sync), Some(3.0));
    let written = disks("ashlar_disk_written_bytes_total") - written_before;
    assert!(written >= 12.0 * MIB as f64, "three replicas: {written}");
}

#[test]
fn the_driver_shows_what_is_documented() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let address = free_address();
    let driver = Driver::start(&cluster, "csi", "node-1", &["--metrics", &address]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let request = create("a", 64 << 20, &[]);
        driver.controller().create_volume(request).await.unwrap();
    });
    let shown = exposition::scrape_at(&address);
    shown.check_documented("csi-driver").unwrap();
    let labels = [("method", "CreateVolume"), ("code", "Ok")];
    let count = shown.value("ashlar_csi_rpc_seconds_count", &labels);
    assert_eq!(count, Some(1.0));
}
