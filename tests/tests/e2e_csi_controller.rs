//! The Controller service against a real metadata cluster, as the sidecars use it.
#![expect(clippy::unwrap_used, reason = "tests")]

use ashlar_tests::e2e::csi::{Driver, block, create, mount};
use ashlar_tests::e2e::{Cluster, ClusterSpec, go_tool, have, run};
use csi_driver::rpc::volume_capability::access_mode::Mode;
use csi_driver::rpc::{self, CapacityRange};
use tonic::Code;

const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;

struct World {
    driver: Driver,
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
}

fn world() -> World {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    World {
        driver: Driver::start(&cluster, "csi", "node-1", &[]),
        cluster,
        runtime: tokio::runtime::Runtime::new().unwrap(),
    }
}

fn id(response: rpc::CreateVolumeResponse) -> String {
    response.volume.unwrap().volume_id
}

fn publish(volume: &str, node: &str, readonly: bool) -> rpc::ControllerPublishVolumeRequest {
    rpc::ControllerPublishVolumeRequest {
        volume_id: volume.to_owned(),
        node_id: node.to_owned(),
        volume_capability: Some(mount(Mode::SingleNodeWriter)),
        readonly,
        ..Default::default()
    }
}

fn unpublish(volume: &str, node: &str) -> rpc::ControllerUnpublishVolumeRequest {
    rpc::ControllerUnpublishVolumeRequest {
        volume_id: volume.to_owned(),
        node_id: node.to_owned(),
        ..Default::default()
    }
}

fn delete(volume: &str) -> rpc::DeleteVolumeRequest {
    rpc::DeleteVolumeRequest {
        volume_id: volume.to_owned(),
        ..Default::default()
    }
}

#[test]
fn volumes_are_made_once_by_whichever_controller_and_deleted_once() {
    let world = world();
    // Two controllers overlap while leadership changes.
    let other = Driver::start(&world.cluster, "csi2", "node-2", &[]);
    world.runtime.block_on(async {
        let (mut a, mut b) = (world.driver.controller(), other.controller());
        let request = create(
            "Odd Name/1",
            GIB,
            &[("replicas", "2"), ("mkfsOptions", "-m 1")],
        );
        let first = a.create_volume(request.clone()).await.unwrap().into_inner();
        let second = b.create_volume(request.clone()).await.unwrap().into_inner();
        assert_eq!(first, second);
        let volume = first.volume.clone().unwrap();
        assert_eq!(volume.capacity_bytes, GIB);
        assert_eq!(volume.volume_context["mkfsOptions"], "-m 1");
        // Both at the same moment: one volume, or ABORTED for a caller that then asks again.
        let twice = create("race", GIB, &[]);
        let (x, y) = tokio::join!(
            a.create_volume(twice.clone()),
            b.create_volume(twice.clone())
        );
        assert_eq!(id(x.unwrap().into_inner()), id(y.unwrap().into_inner()));

        for (other, part) in [
            (
                create(
                    "Odd Name/1",
                    2 * GIB,
                    &[("replicas", "2"), ("mkfsOptions", "-m 1")],
                ),
                "size",
            ),
            (
                create(
                    "Odd Name/1",
                    GIB,
                    &[("replicas", "3"), ("mkfsOptions", "-m 1")],
                ),
                "replicas",
            ),
            (
                create("Odd Name/1", GIB, &[("replicas", "2")]),
                "mkfsOptions",
            ),
        ] {
            let status = b.create_volume(other).await.unwrap_err();
            assert_eq!(status.code(), Code::AlreadyExists);
            assert!(status.message().contains(part), "{status}");
        }
        let list = a
            .list_volumes(rpc::ListVolumesRequest::default())
            .await
            .unwrap()
            .into_inner();
        assert_eq!(list.entries.len(), 2);
        for entry in list.entries {
            let volume = entry.volume.unwrap().volume_id;
            b.delete_volume(delete(&volume)).await.unwrap();
            a.delete_volume(delete(&volume)).await.unwrap();
        }
        let list = b
            .list_volumes(rpc::ListVolumesRequest::default())
            .await
            .unwrap()
            .into_inner();
        assert!(list.entries.is_empty());
    });
}

#[test]
fn wishes_are_checked_before_anything_is_made() {
    let world = world();
    world.runtime.block_on(async {
        let mut controller = world.driver.controller();
        let mut refused = vec![
            (
                create("a", GIB, &[("replica", "3")]),
                Code::InvalidArgument,
                "replicas (1 to 5)",
            ),
            (
                create("a", GIB, &[("pool", "fast")]),
                Code::InvalidArgument,
                "accepted: default",
            ),
            (
                create("a", GIB, &[("placement", "local")]),
                Code::InvalidArgument,
                "WaitForFirstConsumer",
            ),
            (
                create(&"x".repeat(129), GIB, &[]),
                Code::InvalidArgument,
                "128 bytes",
            ),
            (
                create("a", 2 << 50, &[]),
                Code::OutOfRange,
                "largest volume",
            ),
        ];
        let mut limit = create("a", GIB + 1, &[]);
        limit.capacity_range = Some(CapacityRange {
            required_bytes: GIB + 1,
            limit_bytes: GIB + 2,
        });
        refused.push((limit, Code::OutOfRange, "limit_bytes"));
        let mut second = create("a", GIB, &[]);
        second
            .volume_capabilities
            .push(block(Mode::MultiNodeMultiWriter));
        refused.push((second, Code::InvalidArgument, "ReadWriteMany raw block"));
        let mut mutable = create("a", GIB, &[]);
        mutable
            .mutable_parameters
            .insert("iops".into(), "100".into());
        refused.push((mutable, Code::InvalidArgument, "iops"));
        let mut secret = create("a", GIB, &[("replica", "3")]);
        secret.secrets.insert("key".into(), "hunter2".into());
        refused.push((secret, Code::InvalidArgument, "replica"));
        for (request, code, part) in refused {
            let status = controller.create_volume(request).await.unwrap_err();
            assert_eq!(status.code(), code, "{status}");
            assert!(status.message().contains(part), "{status}");
            assert!(status.details().is_empty());
        }
        let list = controller
            .list_volumes(rpc::ListVolumesRequest::default())
            .await
            .unwrap();
        assert!(list.into_inner().entries.is_empty());
    });
    assert!(!world.driver.log().contains("hunter2"));
}

#[test]
fn a_local_volume_has_a_replica_on_its_node_or_is_not_made() {
    let world = world();
    world.runtime.block_on(async {
        let mut controller = world.driver.controller();
        let local = |name: &str, node: &str| {
            let mut request = create(name, GIB, &[("placement", "local"), ("replicas", "1")]);
            request.accessibility_requirements = Some(rpc::TopologyRequirement {
                requisite: Vec::new(),
                preferred: vec![rpc::Topology {
                    segments: csi_driver::topology::segments(node, None),
                }],
            });
            request
        };
        for node in ["node-1", "node-2", "node-3"] {
            controller.create_volume(local(node, node)).await.unwrap();
            let replicas = world.cluster.json(&["replica", "list", node]);
            assert_eq!(replicas[0]["node"], node, "{replicas}");
        }
        let status = controller
            .create_volume(local("nowhere", "node-9"))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    });
}

#[test]
fn a_volume_is_published_to_one_node_at_a_time() {
    let world = world();
    world.runtime.block_on(async {
        let mut controller = world.driver.controller();
        let volume = id(controller
            .create_volume(create("a", GIB, &[]))
            .await
            .unwrap()
            .into_inner());
        let published = controller
            .controller_publish_volume(publish(&volume, "node-1", false))
            .await;
        let context = published.unwrap().into_inner().publish_context;
        assert_eq!(context["readOnly"], "false");
        controller
            .controller_publish_volume(publish(&volume, "node-1", false))
            .await
            .unwrap();
        for (request, code) in [
            (publish(&volume, "node-1", true), Code::AlreadyExists),
            (publish(&volume, "node-2", false), Code::FailedPrecondition),
            (publish(&volume, "node-9", false), Code::NotFound),
            (
                publish("01890000-0000-7000-8000-000000000000", "node-1", false),
                Code::NotFound,
            ),
        ] {
            let status = controller
                .controller_publish_volume(request.clone())
                .await
                .unwrap_err();
            assert_eq!(status.code(), code, "{request:?}: {status}");
        }
        let get = rpc::ControllerGetVolumeRequest {
            volume_id: volume.clone(),
        };
        let found = controller
            .controller_get_volume(get.clone())
            .await
            .unwrap()
            .into_inner();
        assert_eq!(found.status.unwrap().published_node_ids, ["node-1"]);
        let status = controller.delete_volume(delete(&volume)).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        for _ in 0..2 {
            controller
                .controller_unpublish_volume(unpublish(&volume, "node-1"))
                .await
                .unwrap();
        }
        // Readers may be many; an empty node means all.
        for node in ["node-1", "node-2"] {
            controller
                .controller_publish_volume(publish(&volume, node, true))
                .await
                .unwrap();
        }
        let list = controller
            .list_volumes(rpc::ListVolumesRequest::default())
            .await
            .unwrap()
            .into_inner();
        let mut nodes = list.entries[0].status.clone().unwrap().published_node_ids;
        nodes.sort();
        assert_eq!(nodes, ["node-1", "node-2"]);
        controller
            .controller_unpublish_volume(unpublish(&volume, ""))
            .await
            .unwrap();
        let found = controller
            .controller_get_volume(get)
            .await
            .unwrap()
            .into_inner();
        assert!(found.status.unwrap().published_node_ids.is_empty());
        controller.delete_volume(delete(&volume)).await.unwrap();
        controller
            .controller_unpublish_volume(unpublish(&volume, "node-1"))
            .await
            .unwrap();
    });
}

#[test]
fn volumes_are_listed_by_pages_and_grow_and_count_against_the_capacity() {
    let world = world();
    world.runtime.block_on(async {
        let mut controller = world.driver.controller();
        let capacity = async || {
            let mut controller = world.driver.controller();
            let answer = controller
                .get_capacity(rpc::GetCapacityRequest::default())
                .await;
            answer.unwrap().into_inner().available_capacity
        };
        let before = capacity().await;
        let mut volumes = Vec::new();
        for n in 0..5 {
            let made = controller
                .create_volume(create(&format!("v{n}"), 64 * MIB, &[]))
                .await;
            volumes.push(id(made.unwrap().into_inner()));
        }
        assert_eq!(before - capacity().await, 5 * 64 * MIB);
        let mut seen = Vec::new();
        let mut token = String::new();
        loop {
            let request = rpc::ListVolumesRequest {
                max_entries: 2,
                starting_token: token,
            };
            let page = controller.list_volumes(request).await.unwrap().into_inner();
            assert!(page.entries.len() <= 2);
            seen.extend(
                page.entries
                    .into_iter()
                    .map(|e| e.volume.unwrap().volume_id),
            );
            token = page.next_token;
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(seen, volumes);
        let bad = rpc::ListVolumesRequest {
            max_entries: -1,
            ..Default::default()
        };
        assert_eq!(
            controller.list_volumes(bad).await.unwrap_err().code(),
            Code::InvalidArgument
        );

        let grow = |bytes: i64, limit: i64| rpc::ControllerExpandVolumeRequest {
            volume_id: volumes[0].clone(),
            capacity_range: Some(CapacityRange {
                required_bytes: bytes,
                limit_bytes: limit,
            }),
            ..Default::default()
        };
        for _ in 0..2 {
            let grown = controller
                .controller_expand_volume(grow(128 * MIB, 0))
                .await
                .unwrap()
                .into_inner();
            assert_eq!(
                (grown.capacity_bytes, grown.node_expansion_required),
                (128 * MIB, true)
            );
        }
        let status = controller
            .controller_expand_volume(grow(MIB, 64 * MIB))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::OutOfRange);
        let mut modify = rpc::ControllerModifyVolumeRequest {
            volume_id: volumes[0].clone(),
            ..Default::default()
        };
        controller
            .controller_modify_volume(modify.clone())
            .await
            .unwrap();
        modify.mutable_parameters.insert("iops".into(), "1".into());
        let status = controller
            .controller_modify_volume(modify)
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("iops"), "{status}");
    });
}

#[test]
fn the_controller_goes_on_when_the_metadata_leader_dies() {
    let world = world();
    let leader = world.cluster.leader();
    world
        .cluster
        .ok(&["dev", "kill", &format!("metadata-{leader}")]);
    world.runtime.block_on(async {
        let mut controller = world.driver.controller();
        let made = controller
            .create_volume(create("after", GIB, &[]))
            .await
            .unwrap();
        controller
            .delete_volume(delete(&id(made.into_inner())))
            .await
            .unwrap();
    });
}

#[test]
fn go_clients_are_let_in_whatever_they_send_as_authority() {
    let client = go_tool("csi-client");
    if !have(&[&client]) {
        return;
    }
    let world = world();
    let socket = world.driver.socket().to_string_lossy().into_owned();
    let output = run(&client, &[socket.as_str(), "csi.ashlar.io"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    assert_eq!(
        text.lines().filter(|l| l.ends_with(": ok")).count(),
        6,
        "{text}"
    );
}

#[test]
fn metrics_count_requests_by_method_and_code() {
    if !have(&["curl"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let driver = Driver::start(&cluster, "csi", "node-1", &["--metrics", &port.to_string()]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut controller = driver.controller();
        controller
            .create_volume(create("a", GIB, &[]))
            .await
            .unwrap();
        controller
            .create_volume(create("a", 2 * GIB, &[]))
            .await
            .unwrap_err();
    });
    let output = run("curl", &["-sS", &format!("http://{port}/metrics")]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for code in ["Ok", "AlreadyExists"] {
        let series =
            format!("ashlar_csi_rpc_seconds_count{{method=\"CreateVolume\",code=\"{code}\"}} 1");
        assert!(text.contains(&series), "{text}");
    }
}
