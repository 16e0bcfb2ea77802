//! What members tell of themselves and of the cluster.

use ashlar_platform::observe::Observer;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::metrics;
use crate::rpc::observe::SERVICE;

/// Whether a series has this value.
fn shows(text: &str, series: &str, value: &str) -> bool {
    text.lines().any(|l| l == format!("{series} {value}"))
}

/// The value of a counter; 0 if it is not shown.
fn counted(text: &str, series: &str) -> u64 {
    let value = text.lines().find_map(|l| l.strip_prefix(series));
    value.map_or(0, |v| v.trim().parse().unwrap())
}

async fn serving(cluster: &Cluster, i: u64, service: &str) -> Option<ServingStatus> {
    let channel = channel(&cluster.addresses[&i].to_string()).unwrap();
    let request = HealthCheckRequest {
        service: service.into(),
    };
    let answer = HealthClient::new(channel).check(request).await.ok()?;
    Some(answer.into_inner().status())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_tells_of_the_cluster_and_every_member_of_itself() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let leader = cluster.leader().await;
    // The process's metrics, of all three members; collected from the leader.
    let observer = Observer::install("metadata-raft", "0", metrics::ALL).unwrap();
    cluster.members[&leader].member.observe(&observer);
    let other = Observer::apart("metadata-raft", "0", metrics::ALL).unwrap();
    let follower = cluster.follower().await;
    cluster.members[&follower].member.observe(&other);

    let mut client = cluster.client(leader);
    let attacher = pb::RegisterNodeRequest {
        request_id: request(),
        name: "worker".into(),
        ..Default::default()
    };
    let worker = client.register_node(attacher).await.unwrap().into_inner();
    for n in 1..=3 {
        client.heartbeat(heartbeat(n, Vec::new())).await.unwrap();
    }
    let volume = create(&mut client, "v").await.unwrap();
    create(&mut client, "detached").await.unwrap();
    let gone = create(&mut client, "gone").await.unwrap();
    let delete = pb::DeleteVolumeRequest {
        request_id: request(),
        volume_id: gone.volume_id,
    };
    client.delete_volume(delete).await.unwrap();
    let elsewhere = create(&mut client, "elsewhere").await.unwrap();
    let attach = pb::OpenVolumeRequest {
        node_id: worker.node_id,
        ..open(&elsewhere, 3)
    };
    client.open_volume(attach).await.unwrap();
    let attach = pb::OpenVolumeRequest {
        node_id: id(1),
        ..open(&volume, 1)
    };
    client.open_volume(attach).await.unwrap();
    let taken = client.open_volume(open(&volume, 2)).await.unwrap_err();
    assert_eq!(taken.code(), Code::FailedPrecondition);

    // Without further heartbeats the nodes fall silent, and the holder's with them.
    let text = eventually("silence is told", || async {
        let text = observer.render().await.unwrap();
        shows(&text, "ashlar_metadata_nodes{state=\"silent\"}", "3").then_some(text)
    })
    .await;
    for (series, value) in [
        ("ashlar_metadata_is_leader", "1"),
        ("ashlar_metadata_members{kind=\"voter\"}", "3"),
        ("ashlar_metadata_nodes{state=\"alive\"}", "0"),
        ("ashlar_metadata_disks{state=\"silent\"}", "3"),
        ("ashlar_metadata_disks{state=\"failed\"}", "0"),
        ("ashlar_metadata_nodes{state=\"attach_only\"}", "1"),
        ("ashlar_metadata_volumes{health=\"ok\"}", "3"),
        ("ashlar_metadata_volumes{health=\"waiting\"}", "0"),
        ("ashlar_metadata_volumes_attached", "2"),
        ("ashlar_metadata_attachments_silent", "1"),
        ("ashlar_metadata_replicas{state=\"in_sync\"}", "9"),
        ("ashlar_metadata_replicas_to_drop", "3"),
        (
            "ashlar_metadata_pool_capacity_bytes{pool=\"p\"}",
            "3221225472",
        ),
        ("ashlar_metadata_pool_used_bytes{pool=\"p\"}", "12288"),
        (
            "ashlar_metadata_pool_provisioned_bytes{pool=\"p\"}",
            "9437184",
        ),
    ] {
        assert!(shows(&text, series, value), "{series} {value}\n{text}");
    }
    // One registration, three volumes and two opens, and one open that was refused; other tests of this process
    // count there, too.
    for (series, least) in [
        (
            "ashlar_metadata_rpcs_total{method=\"open_volume\",code=\"FAILED_PRECONDITION\"}",
            1,
        ),
        (
            "ashlar_metadata_rpc_seconds_count{method=\"open_volume\"}",
            3,
        ),
        ("ashlar_metadata_proposals_total{outcome=\"refused\"}", 1),
        ("ashlar_metadata_proposals_total{outcome=\"committed\"}", 6),
        ("ashlar_metadata_proposal_seconds_count", 7),
    ] {
        let count = counted(&text, series);
        assert!(count >= least, "{series} {count}\n{text}");
    }
    let text = other.render().await.unwrap();
    assert!(shows(&text, "ashlar_metadata_is_leader", "0"));
    assert!(!text.contains("ashlar_metadata_volumes{"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_a_leader_is_alive_but_not_ready() {
    let mut cluster = Cluster::start(2).await;
    let observer = Observer::apart("metadata-raft", "0", metrics::ALL).unwrap();
    let (leader, follower) = (cluster.leader().await, cluster.follower().await);
    cluster.members[&follower].member.observe(&observer);
    eventually("ready", || async { observer.readiness().ok() }).await;
    eventually("serving", || async {
        (serving(&cluster, follower, SERVICE).await? == ServingStatus::Serving).then_some(())
    })
    .await;
    cluster.kill(leader).await;
    let reason = eventually("not ready", || async { observer.readiness().err() }).await;
    assert!(reason.contains("leader"), "{reason}");
    eventually("not serving", || async {
        (serving(&cluster, follower, SERVICE).await? == ServingStatus::NotServing).then_some(())
    })
    .await;
    assert_eq!(
        serving(&cluster, follower, "").await,
        Some(ServingStatus::Serving)
    );
}
