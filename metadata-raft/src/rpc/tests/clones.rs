//! Clones over a real cluster: snapshots that are taken for them, heartbeats that cut them off, and reverts.

use pb::create_volume_request::Source;

use super::snapshots::{
    beat, create_snapshots, hold, item, make_replicas, opened, snapshots, take, used,
};
use super::*;

type Client = MetadataClient<Channel>;

fn clone(name: &str, source: Source) -> pb::CreateVolumeRequest {
    pb::CreateVolumeRequest {
        request_id: request(),
        name: name.into(),
        source: Some(source),
        ..Default::default()
    }
}

async fn made(client: &mut Client, ask: pb::CreateVolumeRequest) -> pb::Volume {
    client.create_volume(ask).await.unwrap().into_inner()
}

fn of_volume(volume: &pb::Volume) -> Source {
    Source::VolumeId(volume.volume_id.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_in_use_is_cloned_by_a_snapshot_that_nobody_sees() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    used(&mut client, "v").await;
    let volume = get(&mut client, "v").await.unwrap();
    let granted = client.open_volume(open(&volume, 1)).await.unwrap();
    let volume = granted.into_inner().volume.unwrap();
    hold(client.clone(), &volume, 1, volume.epoch, Duration::ZERO);
    let ask = clone("c", of_volume(&volume));
    let first = made(&mut client, ask.clone()).await;
    let parent = first.parent.clone().unwrap();
    assert_eq!(parent.volume_id, volume.volume_id);
    assert_eq!((parent.snapshot_number, first.snapshot_number), (1, 1));
    assert!(parent.snapshot_deleted && !parent.volume_deleted);
    assert_eq!(first.epoch, volume.epoch);
    assert_eq!(first.size_bytes, volume.size_bytes);
    assert_eq!(first.source_volume_id, volume.volume_id);
    assert!(first.groups[0].replicas.iter().all(|r| r.inherits));
    assert!(!first.flatten.unwrap().wanted, "its source is there");
    assert!(snapshots(&mut client).await.is_empty());
    let origin = get(&mut client, "v").await.unwrap();
    assert_eq!(origin.layers.unwrap().live, [1]);
    // The same request, and the same name and source under another one.
    assert_eq!(made(&mut client, ask).await, first);
    let again = clone("c", of_volume(&volume));
    assert_eq!(made(&mut client, again).await, first);
    let origin = get(&mut client, "v").await.unwrap();
    assert_eq!(origin.snapshot_number, 1, "no other snapshot was taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_clone_cannot_be_is_refused_before_anything_is_taken() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let volume = used(&mut client, "v").await;
    let elsewhere = |change: fn(&mut pb::CreateVolumeRequest)| {
        let mut ask = clone("c", of_volume(&volume));
        change(&mut ask);
        ask
    };
    for (ask, says) in [
        (elsewhere(|a| a.pool = "other".into()), "in pool p"),
        (elsewhere(|a| a.replicas = 1), "3 replicas"),
        (elsewhere(|a| a.size_bytes = 4096), "as large or larger"),
        (elsewhere(|a| a.name = "A".into()), "not a valid name"),
    ] {
        let refused = client.create_volume(ask).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(says), "{refused}");
    }
    let unknown = clone("c", Source::SnapshotId(id(77)));
    let refused = client.create_volume(unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let volume = get(&mut client, "v").await.unwrap();
    assert_eq!(volume.snapshot_number, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_is_cut_off_when_every_disk_says_that_it_inherits_nothing() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.leader().await);
    let volume = used(&mut client, "v").await;
    let ask = take(vec![item(&volume, "s")], "");
    let taken = create_snapshots(&mut client, ask).await.unwrap();
    let source = Source::SnapshotId(taken[0].snapshot_id.clone());
    let made = made(&mut client, clone("c", source)).await;
    let found = snapshots(&mut client).await;
    assert_eq!(found[0].clones, 1);
    used_again(&mut client, &made).await;
    let say = |n: u8, inherits: Option<bool>, inherited_left: u64| {
        let mut beat = beat(n, &made, 1, 0);
        beat.disks[0].layers[0].inherits = inherits;
        beat.disks[0].layers[0].inherited_left = inherited_left;
        beat
    };
    async fn told(client: &mut Client, beat: pb::HeartbeatRequest) -> usize {
        let answer = client.heartbeat(beat).await.unwrap().into_inner();
        answer.flatten.len()
    }
    assert_eq!(told(&mut client, say(1, Some(true), 0)).await, 0);
    let flatten = pb::FlattenVolumeRequest {
        request_id: request(),
        volume_id: made.volume_id.clone(),
    };
    client.flatten_volume(flatten).await.unwrap();
    // Said until it is done.
    for _ in 0..2 {
        assert_eq!(told(&mut client, say(1, Some(true), 7)).await, 1);
    }
    let progress = get(&mut client, "c").await.unwrap().flatten.unwrap();
    assert_eq!((progress.wanted, progress.chunks_left), (true, 7));
    assert_eq!(progress.replicas_left, 3);
    assert_eq!(told(&mut client, say(1, Some(false), 0)).await, 0);
    assert_eq!(told(&mut client, say(2, Some(false), 0)).await, 0);
    // What is not said, and a replica that is not there, do not count.
    assert_eq!(told(&mut client, say(3, None, 0)).await, 0);
    assert_eq!(told(&mut client, heartbeat(3, Vec::new())).await, 0);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(get(&mut client, "c").await.unwrap().parent.is_some());
    assert_eq!(told(&mut client, say(3, Some(false), 0)).await, 0);
    eventually("cut", || async {
        let volume = get(&mut cluster.client(1), "c").await.unwrap();
        volume.parent.is_none().then_some(())
    })
    .await;
    assert_eq!(snapshots(&mut client).await[0].clones, 0);
}

/// Opens and closes a volume, with its replicas made.
async fn used_again(client: &mut Client, volume: &pb::Volume) {
    let granted = client.open_volume(open(volume, 1)).await.unwrap();
    let volume = granted.into_inner().volume.unwrap();
    assert!(make_replicas(client, &volume).await.opened_once);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_clone_was_not_made_is_removed() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let volume = opened(&mut client, "v", 1).await;
    // It holds late, so that the caller can go away in between.
    let pause = Duration::from_millis(300);
    hold(client.clone(), &volume, 1, volume.epoch, pause);
    let mut caller = cluster.client(1);
    let ask = clone("c", of_volume(&volume));
    let call = tokio::spawn(async move { caller.create_volume(ask).await });
    eventually("pending", || async {
        let volume = get(&mut cluster.client(1), "v").await.unwrap();
        volume.snapshot_pending.then_some(())
    })
    .await;
    call.abort();
    eventually("settled, and nothing is live", || async {
        let volume = get(&mut cluster.client(1), "v").await.unwrap();
        let live = volume.layers.unwrap_or_default().live;
        (!volume.snapshot_pending && live.is_empty()).then_some(())
    })
    .await;
    // The next attempt succeeds.
    hold(client.clone(), &volume, 1, volume.epoch, Duration::ZERO);
    made(&mut client, clone("c", of_volume(&volume))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_reverted_is_opened_for_that_only() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    let volume = used(&mut client, "v").await;
    let ask = take(vec![item(&volume, "s")], "");
    let taken = create_snapshots(&mut client, ask).await.unwrap();
    let begin = pb::BeginRevertRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        snapshot_id: taken[0].snapshot_id.clone(),
    };
    let begun = client.begin_revert(begin).await.unwrap().into_inner();
    assert_eq!(begun.reverting.unwrap().snapshot_name, "s");
    let refused = client.open_volume(open(&volume, 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("snapshot revert v s"));
    let to_revert = pb::OpenVolumeRequest {
        revert: true,
        ..open(&volume, 1)
    };
    let granted = client.open_volume(to_revert).await.unwrap().into_inner();
    let end = pb::EndRevertRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        snapshot_id: taken[0].snapshot_id.clone(),
        client_id: id(1),
        epoch: granted.volume.unwrap().epoch,
    };
    let ended = client.end_revert(end).await.unwrap().into_inner();
    assert!(ended.reverting.is_none() && ended.holder.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_keeps_what_it_says_about_flattening() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let spec = |flatten: pb::FlattenPolicy| {
        Some(pb::PoolSpec {
            flatten: flatten.into(),
            ..Default::default()
        })
    };
    let ask = pb::CreatePoolRequest {
        request_id: request(),
        name: "q".into(),
        spec: spec(pb::FlattenPolicy::Always),
    };
    let made = client.create_pool(ask).await.unwrap().into_inner();
    assert_eq!(made.spec.unwrap().flatten(), pb::FlattenPolicy::Always);
    for (says, expected) in [
        (pb::FlattenPolicy::Unspecified, pb::FlattenPolicy::Always),
        (pb::FlattenPolicy::Never, pb::FlattenPolicy::Never),
    ] {
        let ask = pb::UpdatePoolRequest {
            request_id: request(),
            name: "q".into(),
            spec: spec(says),
        };
        let updated = client.update_pool(ask).await.unwrap().into_inner();
        assert_eq!(updated.spec.unwrap().flatten(), expected);
    }
}
