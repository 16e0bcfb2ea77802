//! Snapshots over CSI against a real metadata cluster, as external-snapshotter asks for them, of volumes that nobody has
//! attached.
#![expect(clippy::unwrap_used, reason = "tests")]

use ashlar_tests::e2e::csi::{Driver, create};
use ashlar_tests::e2e::{Cluster, ClusterSpec};
use csi_driver::rpc::controller_client::ControllerClient;
use csi_driver::rpc::{self, volume_content_source};
use tonic::Code;
use tonic::transport::Channel;

const GIB: i64 = 1 << 30;

type Controller = ControllerClient<Channel>;

fn take(name: &str, volume: &str) -> rpc::CreateSnapshotRequest {
    rpc::CreateSnapshotRequest {
        name: name.to_owned(),
        source_volume_id: volume.to_owned(),
        ..Default::default()
    }
}

fn drop_one(snapshot: &str) -> rpc::DeleteSnapshotRequest {
    rpc::DeleteSnapshotRequest {
        snapshot_id: snapshot.to_owned(),
        ..Default::default()
    }
}

async fn volume(controller: &mut Controller, name: &str) -> String {
    let made = controller.create_volume(create(name, GIB, &[])).await;
    made.unwrap().into_inner().volume.unwrap().volume_id
}

async fn taken(controller: &mut Controller, name: &str, volume: &str) -> rpc::Snapshot {
    let taken = controller.create_snapshot(take(name, volume)).await;
    taken.unwrap().into_inner().snapshot.unwrap()
}

async fn listed(controller: &mut Controller, ask: rpc::ListSnapshotsRequest) -> Vec<rpc::Snapshot> {
    let (mut found, mut ask) = (Vec::new(), ask);
    loop {
        let page = controller.list_snapshots(ask.clone()).await;
        let page = page.unwrap().into_inner();
        found.extend(page.entries.into_iter().filter_map(|e| e.snapshot));
        ask.starting_token = page.next_token;
        if ask.starting_token.is_empty() {
            return found;
        }
    }
}

#[test]
fn snapshots_are_taken_once_listed_and_deleted_and_outlive_their_volume() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let driver = Driver::controller_only(&cluster, "csi");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut c = driver.controller();
        let (a, b) = (volume(&mut c, "a").await, volume(&mut c, "b").await);
        let first = taken(&mut c, "Odd Name/1", &a).await;
        assert!(first.ready_to_use && first.size_bytes == GIB);
        assert_eq!(first.source_volume_id, a);
        assert!(first.creation_time.unwrap().seconds > 1_700_000_000);
        assert_eq!(taken(&mut c, "Odd Name/1", &a).await, first, "once");
        let second = taken(&mut c, "snapshot-2", &a).await;
        let other = taken(&mut c, "snapshot-3", &b).await;

        for (request, code) in [
            (take("snapshot-2", &b), Code::AlreadyExists),
            (take("", &a), Code::InvalidArgument),
            (take("x", ""), Code::InvalidArgument),
            (take("x", "none"), Code::NotFound),
            (take("x", &first.snapshot_id), Code::NotFound),
        ] {
            let refused = c.create_snapshot(request).await.unwrap_err();
            assert_eq!(refused.code(), code, "{refused}");
        }
        let mut colored = take("x", &a);
        colored.parameters.insert("color".into(), "red".into());
        let refused = c.create_snapshot(colored).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("parameters[color]"), "{refused}");

        let all = rpc::ListSnapshotsRequest {
            max_entries: 1,
            ..Default::default()
        };
        let found = listed(&mut c, all.clone()).await;
        assert_eq!(found, [first.clone(), second.clone(), other.clone()]);
        for (snapshot, source, expected) in [
            ("", a.as_str(), vec![first.clone(), second.clone()]),
            (other.snapshot_id.as_str(), "", vec![other.clone()]),
            (other.snapshot_id.as_str(), a.as_str(), vec![]),
            ("none", "", vec![]),
            ("", "none", vec![]),
        ] {
            let ask = rpc::ListSnapshotsRequest {
                snapshot_id: snapshot.to_owned(),
                source_volume_id: source.to_owned(),
                ..all.clone()
            };
            assert_eq!(listed(&mut c, ask).await, expected);
        }
        let foreign = rpc::ListSnapshotsRequest {
            starting_token: "no-token".into(),
            ..Default::default()
        };
        let refused = c.list_snapshots(foreign).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        let get = |id: &str| rpc::GetSnapshotRequest {
            snapshot_id: id.to_owned(),
            ..Default::default()
        };
        let got = c.get_snapshot(get(&first.snapshot_id)).await.unwrap();
        assert_eq!(got.into_inner().snapshot.unwrap(), first);
        let refused = c.get_snapshot(get("none")).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);

        // The volume goes; its snapshots stay, and a retry still finds them.
        let gone = rpc::DeleteVolumeRequest {
            volume_id: a.clone(),
            ..Default::default()
        };
        c.delete_volume(gone).await.unwrap();
        assert_eq!(taken(&mut c, "snapshot-2", &a).await, second);
        let refused = c.create_snapshot(take("late", &a)).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound);
        for snapshot in [&first, &second, &other] {
            c.delete_snapshot(drop_one(&snapshot.snapshot_id))
                .await
                .unwrap();
            c.delete_snapshot(drop_one(&snapshot.snapshot_id))
                .await
                .unwrap();
        }
        c.delete_snapshot(drop_one("none")).await.unwrap();
        assert!(listed(&mut c, all).await.is_empty());
    });
    assert_eq!(cluster.json(&["volume", "list"])[0]["name"], "b");
}

#[test]
fn a_group_is_taken_and_deleted_as_a_whole() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let driver = Driver::controller_only(&cluster, "csi");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let (mut c, mut groups) = (driver.controller(), driver.group_controller());
        let (a, b) = (volume(&mut c, "a").await, volume(&mut c, "b").await);
        let take_group = |sources: &[&str]| rpc::CreateVolumeGroupSnapshotRequest {
            name: "groupsnapshot-1".into(),
            source_volume_ids: sources.iter().map(|s| (*s).to_owned()).collect(),
            ..Default::default()
        };
        let group = groups
            .create_volume_group_snapshot(take_group(&[&a, &b]))
            .await;
        let group = group.unwrap().into_inner().group_snapshot.unwrap();
        assert!(group.ready_to_use && group.creation_time.is_some());
        assert_eq!(group.snapshots.len(), 2);
        let id = group.group_snapshot_id.clone();
        assert!(group.snapshots.iter().all(|s| s.group_snapshot_id == id));
        let again = groups
            .create_volume_group_snapshot(take_group(&[&b, &a]))
            .await;
        assert_eq!(again.unwrap().into_inner().group_snapshot.unwrap(), group);
        let fewer = groups.create_volume_group_snapshot(take_group(&[&a])).await;
        assert_eq!(fewer.unwrap_err().code(), Code::AlreadyExists);

        let members: Vec<_> = group
            .snapshots
            .iter()
            .map(|s| s.snapshot_id.clone())
            .collect();
        let get = |id: &str, members: &[String]| rpc::GetVolumeGroupSnapshotRequest {
            group_snapshot_id: id.to_owned(),
            snapshot_ids: members.to_vec(),
            ..Default::default()
        };
        let got = groups.get_volume_group_snapshot(get(&id, &members)).await;
        assert_eq!(got.unwrap().into_inner().group_snapshot.unwrap(), group);
        let fewer = groups
            .get_volume_group_snapshot(get(&id, &members[..1]))
            .await;
        assert_eq!(fewer.unwrap_err().code(), Code::InvalidArgument);
        let none = groups
            .get_volume_group_snapshot(get("none", &members))
            .await;
        assert_eq!(none.unwrap_err().code(), Code::NotFound);
        let alone = c.delete_snapshot(drop_one(&members[0])).await;
        assert_eq!(alone.unwrap_err().code(), Code::InvalidArgument);

        let delete = |members: &[String]| rpc::DeleteVolumeGroupSnapshotRequest {
            group_snapshot_id: id.clone(),
            snapshot_ids: members.to_vec(),
            ..Default::default()
        };
        let fewer = groups
            .delete_volume_group_snapshot(delete(&members[1..]))
            .await;
        assert_eq!(fewer.unwrap_err().code(), Code::InvalidArgument);
        for _ in 0..2 {
            let deleted = groups.delete_volume_group_snapshot(delete(&members)).await;
            deleted.unwrap();
        }
        let all = rpc::ListSnapshotsRequest::default();
        assert!(listed(&mut c, all).await.is_empty());
    });
}

fn from_snapshot(id: &str) -> rpc::VolumeContentSource {
    rpc::VolumeContentSource {
        r#type: Some(volume_content_source::Type::Snapshot(
            volume_content_source::SnapshotSource {
                snapshot_id: id.to_owned(),
            },
        )),
    }
}

fn from_volume(id: &str) -> rpc::VolumeContentSource {
    rpc::VolumeContentSource {
        r#type: Some(volume_content_source::Type::Volume(
            volume_content_source::VolumeSource {
                volume_id: id.to_owned(),
            },
        )),
    }
}

fn made_from(name: &str, bytes: i64, source: rpc::VolumeContentSource) -> rpc::CreateVolumeRequest {
    rpc::CreateVolumeRequest {
        volume_content_source: Some(source),
        ..create(name, bytes, &[])
    }
}

#[test]
fn volumes_are_made_from_snapshots_and_volumes_and_unwind() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let driver = Driver::controller_only(&cluster, "csi");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut c = driver.controller();
        let origin = volume(&mut c, "origin").await;
        let snapshot = taken(&mut c, "snapshot-1", &origin).await.snapshot_id;
        let make = |request| {
            let mut c = c.clone();
            async move {
                let made = c.create_volume(request).await?;
                Ok::<_, tonic::Status>(made.into_inner().volume.unwrap())
            }
        };

        // As large as the source if nothing is said, or larger; once.
        let restored = made_from("restored", 0, from_snapshot(&snapshot));
        let first = make(restored.clone()).await.unwrap();
        assert_eq!(first.capacity_bytes, GIB);
        assert_eq!(first.content_source, Some(from_snapshot(&snapshot)));
        assert_eq!(make(restored).await.unwrap(), first);
        let cloned = made_from("cloned", 2 * GIB, from_volume(&origin));
        let second = make(cloned.clone()).await.unwrap();
        assert_eq!(second.capacity_bytes, 2 * GIB);
        assert_eq!(second.content_source, Some(from_volume(&origin)));
        assert_eq!(make(cloned).await.unwrap(), second);
        let shown = cluster.json(&["snapshot", "list"]);
        assert_eq!(shown.as_array().unwrap().len(), 1, "{shown}");

        for (request, code) in [
            (
                made_from("small", GIB / 2, from_snapshot(&snapshot)),
                Code::OutOfRange,
            ),
            (
                made_from("small", GIB / 2, from_volume(&origin)),
                Code::OutOfRange,
            ),
            (made_from("x", GIB, from_snapshot("none")), Code::NotFound),
            (made_from("x", GIB, from_volume(&snapshot)), Code::NotFound),
            (
                made_from("restored", GIB, from_volume(&origin)),
                Code::AlreadyExists,
            ),
            (create("restored", GIB, &[]), Code::AlreadyExists),
            (
                made_from("origin", GIB, from_snapshot(&snapshot)),
                Code::AlreadyExists,
            ),
        ] {
            let refused = make(request).await.unwrap_err();
            assert_eq!(refused.code(), code, "{refused}");
        }

        // Sources go first.
        c.delete_snapshot(drop_one(&snapshot)).await.unwrap();
        for volume in [&origin, &first.volume_id, &second.volume_id] {
            let gone = rpc::DeleteVolumeRequest {
                volume_id: volume.clone(),
                ..Default::default()
            };
            c.delete_volume(gone).await.unwrap();
        }
        assert_eq!(cluster.json(&["volume", "list"]), serde_json::json!([]));
        cluster.ok(&["pool", "delete", "default"]);
    });
}
