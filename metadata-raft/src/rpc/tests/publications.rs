//! Publications and formats over gRPC: through a follower, watched, and after a restart from snapshots.

use super::*;

fn publish(volume: &pb::Volume, node: &str, mode: pb::AttachMode) -> pb::PublishVolumeRequest {
    pb::PublishVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        node_name: node.into(),
        mode: mode.into(),
    }
}

fn unpublish(volume: &pb::Volume, node: &str) -> pb::UnpublishVolumeRequest {
    pb::UnpublishVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        node_name: node.into(),
    }
}

fn attacher(name: &str) -> pb::RegisterNodeRequest {
    pb::RegisterNodeRequest {
        request_id: request(),
        name: name.into(),
        labels: [("rack".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_moves_between_nodes_that_only_attach() {
    let cluster = Cluster::start(3).await;
    cluster.populate().await;
    let mut client = cluster.client(cluster.follower().await);
    let volume = create(&mut client, "v").await.unwrap();
    let mut nodes = Vec::new();
    for name in ["worker-a", "worker-b"] {
        let node = client.register_node(attacher(name)).await.unwrap();
        nodes.push(node.into_inner());
    }
    assert!(nodes[0].alive && nodes[0].node_id.len() == 16);
    let again = client.register_node(attacher("worker-a")).await.unwrap();
    assert_eq!(again.into_inner().node_id, nodes[0].node_id);
    let open_at = |by, node: &pb::Node| pb::OpenVolumeRequest {
        node_id: node.node_id.clone(),
        ..open(&volume, by)
    };

    let exclusive = pb::AttachMode::Exclusive;
    let asked = publish(&volume, "worker-a", exclusive);
    let published = client.publish_volume(asked.clone()).await.unwrap();
    let retried = client.publish_volume(asked).await.unwrap();
    assert_eq!(published.get_ref(), retried.get_ref());
    let publication = published.into_inner().publications.remove(0);
    assert_eq!(publication.node_name, "worker-a");
    assert_eq!(publication.mode(), exclusive);
    client.open_volume(open_at(1, &nodes[0])).await.unwrap();
    let refused = client.open_volume(open_at(2, &nodes[1])).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let taken = publish(&volume, "worker-b", exclusive);
    let refused = client.publish_volume(taken.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("worker-a"), "{refused}");
    for (node, mode, code) in [
        ("nobody", exclusive, Code::NotFound),
        ("worker-a", pb::AttachMode::ReadOnly, Code::AlreadyExists),
        ("worker-a", pb::AttachMode::Shared, Code::InvalidArgument),
    ] {
        let asked = publish(&volume, node, mode);
        assert_eq!(client.publish_volume(asked).await.unwrap_err().code(), code);
    }

    // The node is gone: its right is taken back, and the holder learns it from the watch.
    let volume_ids = vec![volume.volume_id.clone()];
    let watch = pb::WatchVolumesRequest { volume_ids };
    let mut events = client.watch_volumes(watch).await.unwrap().into_inner();
    let held = events.message().await.unwrap().unwrap().volume.unwrap();
    assert_eq!((held.epoch, held.holder.unwrap().client_id), (1, id(1)));
    let asked = unpublish(&volume, "worker-a");
    client.unpublish_volume(asked).await.unwrap();
    let revoked = events.message().await.unwrap().unwrap().volume.unwrap();
    assert!(revoked.holder.is_none() && !revoked.clean && revoked.publications.is_empty());
    assert_eq!(revoked.epoch, 2);
    let close = pb::CloseVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        client_id: id(1),
        epoch: 1,
        clean: true,
    };
    let refused = client.close_volume(close).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    client.publish_volume(taken).await.unwrap();
    let granted = client.open_volume(open_at(2, &nodes[1])).await.unwrap();
    let granted = granted.into_inner();
    assert!(!granted.previous_clean && granted.volume.unwrap().epoch == 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publications_and_formats_survive_restarts_and_snapshots() {
    let tuning = Tuning {
        snapshot_entries: 10,
        kept_entries: 1,
    };
    let mut cluster = Cluster::tuned(1, tuning).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    let volume = create(&mut client, "v").await.unwrap();
    let asked = publish(&volume, "node-2", pb::AttachMode::ReadOnly);
    client.publish_volume(asked).await.unwrap();
    let set = |state: pb::FormatState, fs_type: &str| pb::SetVolumeFormatRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
        format: Some(pb::VolumeFormat {
            state: state.into(),
            fs_type: fs_type.into(),
        }),
    };
    for state in [pb::FormatState::Formatting, pb::FormatState::Formatted] {
        client.set_volume_format(set(state, "ext4")).await.unwrap();
    }
    let other = set(pb::FormatState::Formatted, "xfs");
    let refused = client.set_volume_format(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let unspecified = set(pb::FormatState::Unspecified, "xfs");
    let refused = client.set_volume_format(unspecified).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    for n in 0..20 {
        create(&mut client, &format!("other-{n}")).await.unwrap();
    }
    eventually("log purged", || async {
        use openraft::async_runtime::WatchReceiver;
        let raft = &cluster.members[&1].member.raft;
        let purged = raft.metrics().borrow_watched().purged;
        purged.filter(|id| id.index > 15)
    })
    .await;
    let before = get(&mut client, "v").await.unwrap();
    cluster.kill(1).await;
    cluster.start_member(1).await;
    cluster.leader().await;
    let mut client = cluster.client(1);
    let after = get(&mut client, "v").await.unwrap();
    assert_eq!(after, before);
    assert_eq!(after.publications[0].mode(), pb::AttachMode::ReadOnly);
    assert_eq!(after.format.unwrap().fs_type, "ext4");
    let delete = pb::DeleteVolumeRequest {
        request_id: request(),
        volume_id: volume.volume_id.clone(),
    };
    let refused = client.delete_volume(delete.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    client
        .unpublish_volume(unpublish(&volume, ""))
        .await
        .unwrap();
    client.delete_volume(delete).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_required_node_must_exist_and_have_room() {
    let cluster = Cluster::start(1).await;
    cluster.populate().await;
    let mut client = cluster.client(1);
    client.register_node(attacher("diskless")).await.unwrap();
    for (node, code) in [
        ("nobody", Some(Code::NotFound)),
        ("diskless", Some(Code::ResourceExhausted)),
        ("node-3", None),
    ] {
        let create = pb::CreateVolumeRequest {
            request_id: request(),
            name: format!("on-{node}"),
            size_bytes: 1 << 20,
            pool: "p".into(),
            replicas: 1,
            preferred_node: node.into(),
            require_preferred_node: true,
            ..Default::default()
        };
        let answer = client.create_volume(create).await;
        match code {
            Some(code) => assert_eq!(answer.unwrap_err().code(), code, "{node}"),
            None => {
                let volume = answer.unwrap().into_inner();
                assert_eq!(volume.groups[0].replicas[0].disk_id, id(103));
            }
        }
    }
}
