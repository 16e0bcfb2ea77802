//! Snapshots over a real cluster: the leader's clock and memory, followers, and heartbeats.

use super::*;

type Client = MetadataClient<Channel>;

pub(super) fn item(volume: &pb::Volume, name: &str) -> pb::CreateSnapshotItem {
    pb::CreateSnapshotItem {
        name: name.into(),
        volume_id: volume.volume_id.clone(),
        labels: [("team".to_owned(), "blue".to_owned())].into(),
    }
}

pub(super) fn take(items: Vec<pb::CreateSnapshotItem>, group: &str) -> pb::CreateSnapshotsRequest {
    pb::CreateSnapshotsRequest {
        request_id: request(),
        items,
        group_name: group.into(),
    }
}

pub(super) async fn create_snapshots(
    client: &mut Client,
    request: pb::CreateSnapshotsRequest,
) -> Result<Vec<pb::Snapshot>, tonic::Status> {
    let answer = client.create_snapshots(request).await?;
    Ok(answer.into_inner().snapshots)
}

pub(super) async fn snapshots(client: &mut Client) -> Vec<pb::Snapshot> {
    let all = client.list_snapshots(pb::ListSnapshotsRequest::default());
    all.await.unwrap().into_inner().snapshots
}

async fn delete(client: &mut Client, snapshots: &[&pb::Snapshot]) {
    let request = pb::DeleteSnapshotsRequest {
        request_id: request(),
        snapshot_ids: snapshots.iter().map(|s| s.snapshot_id.clone()).collect(),
    };
    client.delete_snapshots(request).await.unwrap();
}

/// A client that holds a volume and reports as soon as it sees a pending number, after a pause.
pub(super) fn hold(
    mut client: Client,
    volume: &pb::Volume,
    holder: u8,
    epoch: u64,
    pause: Duration,
) {
    let volume_id = volume.volume_id.clone();
    tokio::spawn(async move {
        let watch = pb::WatchVolumesRequest {
            volume_ids: vec![volume_id.clone()],
        };
        let mut events = client.watch_volumes(watch).await.unwrap().into_inner();
        while let Ok(Some(event)) = events.message().await {
            let volume = event.volume.unwrap_or_default();
            if volume.snapshot_pending {
                tokio::time::sleep(pause).await;
                let report = pb::ReportHeldRequest {
                    volume_id: volume_id.clone(),
                    client_id: id(holder),
                    epoch,
                    number: volume.snapshot_number,
                };
                // One that comes too late is refused.
                drop(client.report_held(report).await);
            }
        }
    });
}

pub(super) async fn opened(client: &mut Client, name: &str, holder: u8) -> pb::Volume {
    let volume = create(client, name).await.unwrap();
    let granted = client.open_volume(open(&volume, holder)).await.unwrap();
    granted.into_inner().volume.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_taken_while_its_holder_holds() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    let held = opened(&mut client, "held", 1).await;
    let idle = create(&mut client, "idle").await.unwrap();
    hold(client.clone(), &held, 1, held.epoch, Duration::ZERO);
    let ask = take(vec![item(&held, "g-held"), item(&idle, "g-idle")], "g");
    let taken = create_snapshots(&mut client, ask.clone()).await.unwrap();
    assert_eq!(taken.len(), 2);
    for snapshot in &taken {
        assert_eq!(snapshot.state(), pb::SnapshotState::Ready);
        assert_eq!((snapshot.number, snapshot.size_bytes), (1, 1 << 20));
        assert_eq!(snapshot.group_name, "g");
        assert_eq!(snapshot.labels["team"], "blue");
        assert!(snapshot.created_unix_ms > 0 && !snapshot.volume_deleted);
    }
    assert_eq!(taken[0].volume_name, "held");
    assert_eq!(taken[0].group_id, taken[1].group_id);
    let volume = get(&mut client, "held").await.unwrap();
    let layers = volume.layers.unwrap();
    assert_eq!(
        (layers.revision, layers.settled, layers.live),
        (1, 1, vec![1])
    );
    assert_eq!(
        (volume.snapshot_number, volume.snapshot_pending),
        (1, false)
    );
    assert_eq!(volume.epoch, held.epoch);
    // The same request, and the same names under another one, get the same.
    assert_eq!(create_snapshots(&mut client, ask).await.unwrap(), taken);
    let again = take(vec![item(&held, "g-held"), item(&idle, "g-idle")], "g");
    assert_eq!(create_snapshots(&mut client, again).await.unwrap(), taken);
    let other = take(vec![item(&idle, "g-held")], "");
    let refused = create_snapshots(&mut client, other).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);

    // Found by name, id, volume and group; in pages.
    let named = pb::GetSnapshotRequest {
        name: "g-idle".into(),
        ..Default::default()
    };
    let found = client.get_snapshot(named).await.unwrap().into_inner();
    assert_eq!(found, taken[1]);
    let by_id = pb::GetSnapshotRequest {
        snapshot_id: taken[0].snapshot_id.clone(),
        ..Default::default()
    };
    let found = client.get_snapshot(by_id).await.unwrap().into_inner();
    assert_eq!(found, taken[0]);
    let absent = pb::GetSnapshotRequest {
        name: "none".into(),
        ..Default::default()
    };
    let refused = client.get_snapshot(absent).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let ask = |volume: Option<&pb::Volume>, group: &str, token: &str| pb::ListSnapshotsRequest {
        volume_id: volume.map(|v| v.volume_id.clone()).unwrap_or_default(),
        group_name: group.into(),
        page_token: token.into(),
        page_size: 1,
        ..Default::default()
    };
    for (volume, group, expected) in [
        (None, "", &taken[..]),
        (None, "g", &taken[..]),
        (Some(&idle), "", &taken[1..]),
        (Some(&idle), "g", &taken[1..]),
        (None, "h", &[]),
    ] {
        let (mut found, mut token) = (Vec::new(), String::new());
        loop {
            let page = client.list_snapshots(ask(volume, group, &token)).await;
            let page = page.unwrap().into_inner();
            found.extend(page.snapshots);
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(found, expected);
    }
    let wrong = client.list_snapshots(ask(None, "", "wrong")).await;
    assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_held_too_late_take_no_snapshot() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.leader().await);
    let late = opened(&mut client, "late", 1).await;
    let idle = create(&mut client, "idle").await.unwrap();
    hold(
        client.clone(),
        &late,
        1,
        late.epoch,
        Duration::from_millis(1300),
    );
    let ask = take(vec![item(&late, "a"), item(&idle, "b")], "g");
    let refused = create_snapshots(&mut client, ask.clone())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("late (test)"), "{refused}");
    assert!(snapshots(&mut client).await.is_empty());
    for name in ["late", "idle"] {
        let volume = get(&mut client, name).await.unwrap();
        assert!(!volume.snapshot_pending);
        let layers = volume.layers.unwrap();
        assert_eq!((layers.settled, layers.live), (1, vec![]), "{name}");
    }
    // A report of a number that is settled, of another epoch, of another client.
    for (holder, epoch, number) in [(1, 1, 1), (1, 7, 2), (2, 1, 2)] {
        let report = pb::ReportHeldRequest {
            volume_id: late.volume_id.clone(),
            client_id: id(holder),
            epoch,
            number,
        };
        let refused = client.report_held(report).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
    }
    // An open meanwhile cancels at once.
    let began = Instant::now();
    let mut second = client.clone();
    let (refused, _) = tokio::join!(create_snapshots(&mut second, ask), async {
        eventually("pending", || async {
            let volume = get(&mut cluster.client(1), "late").await.unwrap();
            volume.snapshot_pending.then_some(())
        })
        .await;
        client.open_volume(open(&idle, 3)).await.unwrap();
    });
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("opened"), "{refused}");
    assert!(began.elapsed() < Duration::from_secs(5));
    // Unclean and not attached: it says what to do.
    let close = pb::CloseVolumeRequest {
        request_id: request(),
        volume_id: late.volume_id.clone(),
        client_id: id(1),
        epoch: late.epoch,
        clean: false,
    };
    client.close_volume(close).await.unwrap();
    let ask = take(vec![item(&late, "a")], "");
    let refused = create_snapshots(&mut client, ask).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("attach it once"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_cancels_what_is_pending() {
    let mut cluster = Cluster::start(3).await;
    cluster.populate().await;
    let leader = cluster.leader().await;
    let follower = cluster.follower().await;
    let mut client = cluster.client(follower);
    let volume = opened(&mut client, "v", 1).await;
    // Nobody reports. The call goes to the leader itself, and dies with it.
    let mut doomed = cluster.client(leader);
    let ask = take(vec![item(&volume, "s")], "");
    let call = tokio::spawn(async move { doomed.create_snapshots(ask).await });
    eventually("pending", || async {
        let state = cluster.members[&follower].member.shared.state();
        let found = state.volume_by_name("v").map(|v| v.is_snapshot_pending());
        found.filter(|pending| *pending)
    })
    .await;
    cluster.kill(leader).await;
    assert!(call.await.unwrap().is_err());
    eventually("cancelled", || async {
        let volume = get(&mut cluster.client(follower), "v").await.ok()?;
        (!volume.snapshot_pending).then_some(())
    })
    .await;
    assert!(snapshots(&mut client).await.is_empty());
    // And the next one succeeds.
    hold(client.clone(), &volume, 1, volume.epoch, Duration::ZERO);
    let ask = take(vec![item(&volume, "s")], "");
    let taken = create_snapshots(&mut client, ask).await.unwrap();
    assert_eq!(taken[0].number, 2);
}

pub(super) fn beat(
    n: u8,
    volume: &pb::Volume,
    revision: u64,
    chunks_left: u64,
) -> pb::HeartbeatRequest {
    let mut beat = heartbeat(n, vec![volume.volume_id.clone()]);
    if revision > 0 {
        beat.disks[0].layers = vec![pb::ReplicaLayers {
            volume_id: volume.volume_id.clone(),
            revision,
            chunks_left,
            ..Default::default()
        }];
    }
    beat
}

async fn set_layers(client: &mut Client, beat: pb::HeartbeatRequest) -> Vec<pb::SetLayers> {
    let answer = client.heartbeat(beat).await.unwrap();
    answer.into_inner().set_layers
}

/// The holder says that it has made the replicas.
pub(super) async fn make_replicas(client: &mut Client, volume: &pb::Volume) -> pb::Volume {
    let made = volume.groups[0].replicas.iter().map(|r| pb::ReplicaChange {
        group: 0,
        disk_id: r.disk_id.clone(),
        state: pb::ReplicaState::InSync.into(),
        incarnation: 1,
    });
    let change = pb::ChangeReplicasRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(1),
        epoch: volume.epoch,
        changes: made.collect(),
    };
    let changed = client.change_replicas(change).await.unwrap().into_inner();
    assert!(changed.applied, "{}", changed.reason);
    changed.volume.unwrap()
}

/// A volume that was opened, with its replicas made, and closed.
pub(super) async fn used(client: &mut Client, name: &str) -> pb::Volume {
    let volume = opened(client, name, 1).await;
    let made = make_replicas(client, &volume).await;
    let close = pb::CloseVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(1),
        epoch: made.epoch,
        clean: true,
    };
    client.close_volume(close).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_go_out_with_heartbeats_and_deleted_ones_are_forgotten() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.leader().await);
    let volume = used(&mut client, "v").await;
    assert!(volume.opened_once);
    assert!(
        set_layers(&mut client, beat(1, &volume, 0, 0))
            .await
            .is_empty()
    );
    let ask = take(vec![item(&volume, "s")], "");
    let taken = create_snapshots(&mut client, ask).await.unwrap();
    // Sent until it is reported.
    for _ in 0..2 {
        let lists = set_layers(&mut client, beat(1, &volume, 0, 0)).await;
        assert_eq!(lists.len(), 1);
        assert_eq!(lists[0].disk_id, id(101));
        assert_eq!(lists[0].volume_id, volume.volume_id);
        let layers = lists[0].layers.as_ref().unwrap();
        assert_eq!((layers.revision, layers.settled), (1, 1));
        assert_eq!(layers.live, [1]);
    }
    for _ in 0..2 {
        assert!(
            set_layers(&mut client, beat(1, &volume, 1, 0))
                .await
                .is_empty()
        );
    }
    // A disk without a replica of it gets nothing.
    assert!(
        set_layers(&mut client, heartbeat(2, Vec::new()))
            .await
            .is_empty()
    );
    delete(&mut client, &[&taken[0]]).await;
    let lists = set_layers(&mut client, beat(1, &volume, 1, 0)).await;
    assert_eq!(lists[0].layers.as_ref().unwrap().revision, 2);
    set_layers(&mut client, beat(1, &volume, 2, 5)).await;
    set_layers(&mut client, beat(2, &volume, 2, 0)).await;
    let deleting = &snapshots(&mut client).await[0];
    assert_eq!(deleting.state(), pb::SnapshotState::Deleting);
    assert_eq!((deleting.replicas_left, deleting.chunks_left), (2, 5));
    set_layers(&mut client, beat(1, &volume, 2, 0)).await;
    assert_eq!(snapshots(&mut client).await[0].replicas_left, 1);
    set_layers(&mut client, beat(3, &volume, 2, 0)).await;
    eventually("forgotten", || async {
        let mut client = cluster.client(1);
        snapshots(&mut client).await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_volume_lasts_as_long_as_its_snapshots() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    let volume = used(&mut client, "v").await;
    let ask = take(vec![item(&volume, "s")], "");
    let taken = create_snapshots(&mut client, ask).await.unwrap();
    let watch = pb::WatchVolumesRequest {
        volume_ids: vec![volume.volume_id.clone()],
    };
    let mut events = client.watch_volumes(watch).await.unwrap().into_inner();
    assert!(!events.message().await.unwrap().unwrap().deleted);
    let gone = pb::DeleteVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
    };
    client.delete_volume(gone).await.unwrap();
    assert!(events.message().await.unwrap().unwrap().deleted);
    let refused = get(&mut client, "v").await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let by_id = pb::GetVolumeRequest {
        volume_id: volume.volume_id.clone(),
        ..Default::default()
    };
    let refused = client.get_volume(by_id).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let refused = client.open_volume(open(&volume, 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let listed = client.list_volumes(pb::ListVolumesRequest::default()).await;
    assert!(listed.unwrap().into_inner().volumes.is_empty());
    assert!(snapshots(&mut client).await[0].volume_deleted);
    // Its disks keep it, and learn its list.
    let held = beat(1, &volume, 0, 0);
    let answer = client.heartbeat(held.clone()).await.unwrap().into_inner();
    assert!(answer.drop.is_empty() && answer.set_layers.len() == 1);
    create(&mut client, "v").await.unwrap();
    delete(&mut client, &[&taken[0]]).await;
    assert!(snapshots(&mut client).await.is_empty());
    let answer = client.heartbeat(held).await.unwrap().into_inner();
    assert_eq!(answer.drop.len(), 1);
    assert!(answer.set_layers.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_goes_away_leaves_nothing_pending() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let volume = opened(&mut client, "v", 1).await;
    let mut caller = cluster.client(1);
    let ask = take(vec![item(&volume, "s")], "");
    let call = tokio::spawn(async move { caller.create_snapshots(ask).await });
    eventually("pending", || async {
        let volume = get(&mut cluster.client(1), "v").await.unwrap();
        volume.snapshot_pending.then_some(())
    })
    .await;
    // A second one at the same time is told so.
    let same = take(vec![item(&volume, "s")], "");
    let refused = create_snapshots(&mut client, same).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("being taken"), "{refused}");
    call.abort();
    eventually("cancelled", || async {
        let volume = get(&mut cluster.client(1), "v").await.unwrap();
        (!volume.snapshot_pending).then_some(())
    })
    .await;
    assert!(snapshots(&mut client).await.is_empty());
}
