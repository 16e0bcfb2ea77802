//! Whole clusters in one process, over real TCP on loopback and real directories.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

use super::{Options, Running};
use crate::raft::config::Tuning;
use crate::raft::network::channel;

mod clones;
mod observed;
mod publications;
mod snapshots;

const PATIENCE: Duration = Duration::from_secs(30);

struct Cluster {
    directory: TempDir,
    addresses: BTreeMap<u64, SocketAddr>,
    members: BTreeMap<u64, Running>,
    initial: u64,
    replace_after: Duration,
    tuning: Tuning,
}

/// An address that stays free: below the kernel's range for outgoing connections, and given out once.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * 64;
    loop {
        let port = 10_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port as u16));
        if std::net::TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

fn id(n: u8) -> Vec<u8> {
    vec![n; 16]
}

fn request() -> Vec<u8> {
    crate::model::RequestKey::generate().0.to_vec()
}

async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut f: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = f().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Cluster {
    async fn start(initial: u64) -> Self {
        Self::tuned(initial, Tuning::default()).await
    }

    async fn tuned(initial: u64, tuning: Tuning) -> Self {
        let mut cluster = Self {
            directory: tempfile::tempdir().unwrap(),
            addresses: (1..=initial).map(|i| (i, free_address())).collect(),
            members: BTreeMap::new(),
            initial,
            replace_after: Duration::from_secs(600),
            tuning,
        };
        for i in 1..=initial {
            cluster.start_member(i).await;
        }
        cluster.leader().await;
        cluster
    }

    async fn start_member(&mut self, i: u64) {
        let listen = *self.addresses.entry(i).or_insert_with(free_address);
        let first = self.addresses.iter().filter(|(j, _)| **j <= self.initial);
        let first: BTreeMap<_, _> = first.map(|(j, a)| (*j, a.to_string())).collect();
        let joins = i > self.initial;
        let options = Options {
            id: i,
            listen,
            advertise: None,
            data: self.directory.path().join(i.to_string()),
            join: if joins {
                first.values().cloned().collect()
            } else {
                Vec::new()
            },
            bootstrap: if joins { BTreeMap::new() } else { first },
            replace_after: self.replace_after,
            tuning: self.tuning,
        };
        // The database of a member that was just killed may still be locked for a moment.
        let running = eventually("start", || async {
            Running::start(options.clone()).await.ok()
        })
        .await;
        self.members.insert(i, running);
    }

    async fn kill(&mut self, i: u64) {
        self.members.remove(&i).unwrap().kill().await;
    }

    /// A leader that a majority confirms.
    async fn leader(&self) -> u64 {
        eventually("leader", || async {
            for (i, running) in &self.members {
                if running.member.role.borrow().leading_term.is_some()
                    && running.member.linearize().await.is_ok()
                {
                    return Some(*i);
                }
            }
            None
        })
        .await
    }

    async fn follower(&self) -> u64 {
        let leader = self.leader().await;
        *self.members.keys().find(|i| **i != leader).unwrap()
    }

    fn client(&self, i: u64) -> MetadataClient<Channel> {
        MetadataClient::new(channel(&self.addresses[&i].to_string()).unwrap())
    }

    /// Three nodes with a disk each, and a pool.
    async fn populate(&self) {
        let mut client = self.client(self.leader().await);
        for n in 1..=3 {
            register(&mut client, n).await;
        }
        let pool = pb::CreatePoolRequest {
            request_id: request(),
            name: "p".into(),
            spec: None,
        };
        client.create_pool(pool).await.unwrap();
    }

    async fn voters(&self) -> usize {
        let members = self.members[&self.leader().await].member.cluster().members;
        members.iter().filter(|m| m.voter).count()
    }
}

async fn register(client: &mut MetadataClient<Channel>, n: u8) {
    let node = pb::RegisterNodeRequest {
        request_id: request(),
        node_id: id(n),
        name: format!("node-{n}"),
        admin_address: "127.0.0.1:1".into(),
        ..Default::default()
    };
    client.register_node(node).await.unwrap();
    let disk = pb::RegisterDiskRequest {
        request_id: request(),
        disk_id: id(100 + n),
        node_id: id(n),
        data_address: format!("127.0.0.{n}:2"),
        capacity_bytes: 1 << 30,
        incarnation: 1,
        ..Default::default()
    };
    client.register_disk(disk).await.unwrap();
}

fn heartbeat(n: u8, volumes: Vec<Vec<u8>>) -> pb::HeartbeatRequest {
    let disk = pb::DiskStatus {
        disk_id: id(100 + n),
        used_bytes: 4096,
        capacity_bytes: 1 << 30,
        incarnation: 1,
        volumes,
        ..Default::default()
    };
    pb::HeartbeatRequest {
        node_id: id(n),
        disks: vec![disk],
    }
}

async fn create(
    client: &mut MetadataClient<Channel>,
    name: &str,
) -> Result<pb::Volume, tonic::Status> {
    let create = pb::CreateVolumeRequest {
        request_id: request(),
        name: name.into(),
        size_bytes: 1 << 20,
        pool: "p".into(),
        ..Default::default()
    };
    client
        .create_volume(create)
        .await
        .map(tonic::Response::into_inner)
}

async fn get(
    client: &mut MetadataClient<Channel>,
    name: &str,
) -> Result<pb::Volume, tonic::Status> {
    let get = pb::GetVolumeRequest {
        name: name.into(),
        ..Default::default()
    };
    client
        .get_volume(get)
        .await
        .map(tonic::Response::into_inner)
}

fn open(volume: &pb::Volume, client: u8) -> pb::OpenVolumeRequest {
    pb::OpenVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(client),
        client_name: "test".into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_forwards_mutations_reads_and_heartbeats() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut follower = cluster.client(cluster.follower().await);
    let volume = create(&mut follower, "v").await.unwrap();
    assert_eq!(volume.groups[0].replicas.len(), 3);
    assert_eq!(get(&mut follower, "v").await.unwrap(), volume);
    assert_eq!(
        get(&mut follower, "w").await.unwrap_err().code(),
        Code::NotFound
    );
    let beat = follower
        .heartbeat(heartbeat(1, Vec::new()))
        .await
        .unwrap()
        .into_inner();
    assert!(beat.known && beat.drop.is_empty());
    let unknown = follower
        .heartbeat(heartbeat(77, Vec::new()))
        .await
        .unwrap()
        .into_inner();
    assert!(!unknown.known);
    let disks = follower
        .list_disks(pb::ListDisksRequest::default())
        .await
        .unwrap()
        .into_inner()
        .disks;
    assert_eq!(disks.len(), 3);
    assert!(disks.iter().any(|d| d.alive && d.used_bytes == 4096));
    // An exclusive hold, a retry with the same request, a takeover refused.
    let first = open(&volume, 1);
    let granted = follower
        .open_volume(first.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(granted.volume.as_ref().unwrap().epoch, 1);
    assert!(
        granted.previous_clean && granted.disks.len() == 3 && granted.cluster_id != vec![0; 16]
    );
    assert_eq!(
        follower
            .open_volume(first)
            .await
            .unwrap()
            .into_inner()
            .volume,
        granted.volume
    );
    let refused = follower.open_volume(open(&volume, 2)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_survives_its_leader_and_takes_it_back() {
    let mut cluster = Cluster::start(3).await;
    cluster.populate().await;
    let leader = cluster.leader().await;
    let follower = cluster.follower().await;
    create(&mut cluster.client(follower), "before")
        .await
        .unwrap();
    cluster.kill(leader).await;
    let killed = Instant::now();
    // Routed until a new leader is there: the client sees no error.
    create(&mut cluster.client(follower), "during")
        .await
        .unwrap();
    println!("served again after {:?}", killed.elapsed());
    cluster.start_member(leader).await;
    eventually("the old leader serves", || async {
        get(&mut cluster.client(leader), "during").await.ok()
    })
    .await;
    eventually("the old leader catches up", || async {
        cluster.members[&leader]
            .member
            .shared
            .state()
            .volume_by_name("during")
            .map(|_| ())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_answered() {
    let mut cluster = Cluster::start(3).await;
    cluster.populate().await;
    create(&mut cluster.client(1), "v").await.unwrap();
    cluster.kill(2).await;
    cluster.kill(3).await;
    let mut client = cluster.client(1);
    assert_eq!(
        get(&mut client, "v").await.unwrap_err().code(),
        Code::Unavailable
    );
    assert_eq!(
        create(&mut client, "w").await.unwrap_err().code(),
        Code::Unavailable
    );
    cluster.start_member(2).await;
    eventually("majority is back", || async {
        get(&mut cluster.client(1), "v").await.ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_survives_a_restart_of_all() {
    let mut cluster = Cluster::start(3).await;
    cluster.populate().await;
    let volume = create(&mut cluster.client(1), "v").await.unwrap();
    cluster
        .client(2)
        .open_volume(open(&volume, 1))
        .await
        .unwrap();
    for i in 1..=3 {
        cluster.kill(i).await;
    }
    for i in 1..=3 {
        cluster.start_member(i).await;
    }
    cluster.leader().await;
    let found = get(&mut cluster.client(3), "v").await.unwrap();
    assert_eq!((found.epoch, found.holder.unwrap().client_id), (1, id(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lagging_member_gets_a_snapshot() {
    let tuning = Tuning {
        snapshot_entries: 50,
        kept_entries: 5,
    };
    let mut cluster = Cluster::tuned(3, tuning).await;
    cluster.populate().await;
    let lagging = cluster.follower().await;
    cluster.kill(lagging).await;
    let mut client = cluster.client(cluster.leader().await);
    for i in 0..200 {
        create(&mut client, &format!("v{i}")).await.unwrap();
    }
    let leader = cluster.leader().await;
    eventually("log purged", || async {
        use openraft::async_runtime::WatchReceiver;
        let purged = cluster.members[&leader]
            .member
            .raft
            .metrics()
            .borrow_watched()
            .purged;
        purged.filter(|id| id.index > 100)
    })
    .await;
    cluster.start_member(lagging).await;
    eventually("caught up", || async {
        (cluster.members[&lagging]
            .member
            .shared
            .state()
            .volume_count()
            == 200)
            .then_some(())
    })
    .await;
    // And it starts from that snapshot.
    cluster.kill(lagging).await;
    cluster.start_member(lagging).await;
    assert!(
        cluster.members[&lagging]
            .member
            .shared
            .state()
            .volume_count()
            > 100
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_join_and_leave() {
    let mut cluster = Cluster::start(3).await;
    cluster.populate().await;
    for i in 4..=5 {
        cluster.start_member(i).await;
        let expected = i as usize;
        eventually("joined", || async {
            (cluster.voters().await == expected).then_some(())
        })
        .await;
    }
    create(&mut cluster.client(5), "v").await.unwrap();
    // The leader itself leaves: it hands over first.
    let leader = cluster.leader().await;
    let mut client = cluster.client(cluster.follower().await);
    let remove = pb::RemoveMemberRequest {
        request_id: request(),
        id: leader,
    };
    let left = client.remove_member(remove).await.unwrap().into_inner();
    assert!(left.members.iter().all(|m| m.id != leader));
    cluster.kill(leader).await;
    assert_eq!(cluster.voters().await, 4);
    get(&mut cluster.client(cluster.follower().await), "v")
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_tells_every_change() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    let volume = create(&mut client, "v").await.unwrap();
    let watch = pb::WatchVolumesRequest {
        volume_ids: vec![volume.volume_id.clone()],
    };
    let mut events = client.watch_volumes(watch).await.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    assert_eq!(first.volume.unwrap().epoch, 0);
    assert_eq!(first.disks.len(), 3);
    create(&mut client, "other").await.unwrap();
    client.open_volume(open(&volume, 1)).await.unwrap();
    let opened = events.message().await.unwrap().unwrap().volume.unwrap();
    assert_eq!((opened.epoch, opened.holder.unwrap().client_id), (1, id(1)));
    let close = pb::CloseVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(1),
        epoch: 1,
        clean: true,
    };
    client.close_volume(close).await.unwrap();
    assert!(
        events
            .message()
            .await
            .unwrap()
            .unwrap()
            .volume
            .unwrap()
            .clean
    );
    let delete = pb::DeleteVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
    };
    client.delete_volume(delete).await.unwrap();
    assert!(events.message().await.unwrap().unwrap().deleted);
    // The disk is told to drop its replica until it has done so.
    let held = heartbeat(1, vec![volume.volume_id.clone()]);
    let drop = client.heartbeat(held).await.unwrap().into_inner().drop;
    assert_eq!((drop.len(), drop[0].epoch), (1, 1));
    client.heartbeat(heartbeat(1, Vec::new())).await.unwrap();
    let again = client
        .heartbeat(heartbeat(1, vec![volume.volume_id]))
        .await
        .unwrap()
        .into_inner();
    assert!(again.drop.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_at_a_follower_never_calls_a_new_volume_deleted() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut leader = cluster.client(cluster.leader().await);
    let mut follower = cluster.client(cluster.follower().await);
    for i in 0..30 {
        let volume_ids = vec![
            create(&mut leader, &format!("v{i}"))
                .await
                .unwrap()
                .volume_id,
        ];
        let watch = pb::WatchVolumesRequest { volume_ids };
        let mut events = follower.watch_volumes(watch).await.unwrap().into_inner();
        let first = events.message().await.unwrap().unwrap();
        assert!(!first.deleted && first.disks.len() == 3, "volume {i}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_replica_is_rebuilt_when_its_disk_is_heard_of() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let volume = create(&mut client, "v").await.unwrap();
    // Nobody sends heartbeats: all die.
    eventually("node 1 is dead", || async {
        let nodes = cluster
            .client(1)
            .list_nodes(pb::ListNodesRequest {})
            .await
            .unwrap()
            .into_inner()
            .nodes;
        nodes.iter().all(|n| !n.alive).then_some(())
    })
    .await;
    let epoch = client
        .open_volume(open(&volume, 1))
        .await
        .unwrap()
        .into_inner()
        .volume
        .unwrap()
        .epoch;
    let change = pb::ChangeReplicasRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(1),
        epoch,
        changes: vec![pb::ReplicaChange {
            group: 0,
            disk_id: id(101),
            state: pb::ReplicaState::Stale.into(),
            incarnation: 0,
        }],
    };
    assert!(
        client
            .change_replicas(change)
            .await
            .unwrap()
            .into_inner()
            .applied
    );
    client.heartbeat(heartbeat(1, Vec::new())).await.unwrap();
    let rebuilding = eventually("rebuild begins", || async {
        let volume = get(&mut cluster.client(1), "v").await.unwrap();
        volume.groups[0]
            .replicas
            .iter()
            .find(|r| r.state() == pb::ReplicaState::Rebuilding)
            .copied_epoch()
    })
    .await;
    assert_eq!(rebuilding, epoch + 2);
}

trait RebuildEpoch {
    fn copied_epoch(self) -> Option<u64>;
}

impl RebuildEpoch for Option<&pb::Replica> {
    fn copied_epoch(self) -> Option<u64> {
        self.map(|r| r.rebuild_epoch)
    }
}
