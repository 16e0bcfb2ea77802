//! Many volumes at a time through a real `csi-driver --mode controller`: every answer is right, and nothing is left
//! of them, neither in metadata nor on a disk nor in a process. (How fast it is: `ashlar-bench csi`.)
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use ashlar_bench::csi_inventory::{Inventory, register_nodes};
use ashlar_bench::csi_load::{Load, Plan};
use ashlar_bench::machine;
use ashlar_tests::e2e::csi::Driver;
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, exposition};

const VOLUMES: usize = 1000;
const MIB: u64 = 1 << 20;
const VOLUME_BYTES: i64 = 16 << 20;
/// Volumes that are opened and written before they go.
const WRITTEN: [usize; 3] = [0, 499, 999];
const WRITTEN_BYTES: u64 = 8 * MIB;
/// Time for the daemons to free what was deleted; their heartbeats tell of it.
const RESTORED: Duration = Duration::from_secs(30);
/// A process that does not leak may still grow a little between the second load and the fourth: answers that
/// metadata remembers, allocator, threads that had not been needed before. One that keeps 2 KiB per request grows
/// by 30 MiB.
const GROWTH_BYTES_MAX: u64 = 24 * MIB;
const DESCRIPTORS_MAX: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Cost {
    rss_bytes: u64,
    descriptors: usize,
}

/// What every process of the cluster, and the driver, costs now.
fn costs(cluster: &Cluster, driver: &Driver) -> BTreeMap<String, Cost> {
    let status = cluster.json(&["dev", "status"]);
    let mut pids = BTreeMap::from([("csi-driver".to_owned(), driver.pid())]);
    for process in status["processes"].as_array().unwrap() {
        let pid = process["pid"].as_u64().unwrap().try_into().unwrap();
        pids.insert(process["name"].as_str().unwrap().to_owned(), pid);
    }
    pids.into_iter()
        .map(|(name, pid)| {
            let cost = Cost {
                rss_bytes: machine::process_rss_bytes(pid).unwrap(),
                descriptors: machine::process_descriptors(pid).unwrap(),
            };
            (name, cost)
        })
        .collect()
}

/// Volumes come, are published to several nodes, and go.
async fn come_and_go(load: &mut Load) {
    load.create().await.unwrap();
    load.list(false).await.unwrap();
    load.publish().await.unwrap();
    load.list(true).await.unwrap();
    load.unpublish().await.unwrap();
    load.list(false).await.unwrap();
    load.delete().await.unwrap();
}

#[test]
fn a_thousand_volumes_come_and_go_and_leave_nothing_behind() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let driver = Driver::controller_only(&cluster, "csi");
    let metadata = cluster.metadata();
    let workers: Vec<String> = (1..=5).map(|n| format!("worker-{n}")).collect();
    let plan = Plan {
        volumes: VOLUMES,
        in_flight: 32,
        size_bytes: VOLUME_BYTES,
        nodes: ["node-1", "node-2", "node-3"]
            .map(str::to_owned)
            .into_iter()
            .chain(workers.clone())
            .collect(),
        page_size: 64,
        prefix: "load".into(),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let connect = Load::connect(driver.socket(), plan);
    let mut load = runtime.block_on(connect).unwrap();
    let (before, full) = runtime.block_on(async {
        register_nodes(&metadata, &workers).await.unwrap();
        let before = Inventory::take(&metadata).await.unwrap();
        load.create().await.unwrap();
        (before, Inventory::take(&metadata).await.unwrap())
    });
    assert_eq!((before.volumes, full.volumes), (0, VOLUMES as u64));
    assert_eq!(full.disks.len(), 3);
    for disk in full.disks.values() {
        assert_eq!(disk.replicas_placed, VOLUMES as u64);
        assert_eq!(
            disk.provisioned_bytes,
            VOLUMES as u64 * VOLUME_BYTES.unsigned_abs()
        );
    }

    // Some have data, so that their disks have something to free.
    for number in WRITTEN {
        let name = load.name(number);
        let export = Export::start(&cluster, &name);
        let mut client = NbdClient::connect_unix(export.socket(), &name).unwrap();
        let block = vec![0xa5; usize::try_from(MIB).unwrap()];
        for at in 0..WRITTEN_BYTES / MIB {
            client.write(at * MIB, &block).unwrap();
        }
        client.flush().unwrap();
        drop(client);
        assert!(export.stop().success());
    }
    runtime.block_on(async {
        let written = Inventory::take(&metadata).await.unwrap();
        for (name, disk) in &written.disks {
            let least = before.disks[name].used_bytes + WRITTEN.len() as u64 * WRITTEN_BYTES;
            assert!(disk.used_bytes >= least, "{name}: {written:?}");
            assert_eq!(disk.replicas_kept, WRITTEN.len() as u64, "{written:?}");
        }
        load.publish().await.unwrap();
        load.list(true).await.unwrap();
        let published = Inventory::take(&metadata).await.unwrap();
        // A quarter to all of eight nodes, the rest to one.
        assert_eq!(published.publications, 250 * 8 + 750);
        load.unpublish().await.unwrap();
        load.delete().await.unwrap();
        before.wait_restored(&metadata, RESTORED).await.unwrap();
    });
    exposition::wait_metric(
        &cluster,
        &format!("metadata-{}", cluster.leader()),
        "ashlar_metadata_replicas_to_drop",
        RESTORED,
        |value| value == 0.0,
    );

    // What is kept for a while (remembered answers, the log) is there after the second load; then nothing grows.
    runtime.block_on(come_and_go(&mut load));
    let then = costs(&cluster, &driver);
    runtime.block_on(async {
        come_and_go(&mut load).await;
        come_and_go(&mut load).await;
        before.wait_restored(&metadata, RESTORED).await.unwrap();
    });
    let now = costs(&cluster, &driver);
    println!("then {then:?}\nnow {now:?}");
    for (name, then) in &then {
        let now = now[name];
        assert!(
            now.rss_bytes <= then.rss_bytes + GROWTH_BYTES_MAX,
            "{name} grew from {then:?} to {now:?}"
        );
        assert!(
            now.descriptors <= then.descriptors + DESCRIPTORS_MAX,
            "{name} kept descriptors: {then:?} {now:?}"
        );
    }
}
