//! The `ashlar` program against a metadata server in memory: output, JSON, exit codes, failover.
//! Longer than 600 lines: a case per command, and all share one fake server.
#![expect(clippy::unwrap_used, reason = "tests")]

mod support;

use std::process::{Command, Output};

use ashlar_proto::rpc::metadata as pb;
use serde_json::Value;
use support::{FakeMetadata, Model};

fn ashlar(metadata: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ashlar"))
        .env_remove("ASHLAR_METADATA")
        .env_remove("ASHLAR_LOG")
        .args(["--metadata", metadata, "--timeout", "2"])
        .args(arguments)
        .output()
        .unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Value {
    assert_eq!(code(output), 0, "{}", stderr(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Three nodes that are not reachable, with a disk each.
fn three_nodes() -> Model {
    let mut model = Model::default();
    for n in 1..=3u8 {
        model.nodes.push(pb::Node {
            node_id: vec![n; 16],
            name: format!("node-{n}"),
            admin_address: "127.0.0.1:1".into(),
            alive: n != 3,
            last_heartbeat_age_ms: 100,
            ..Default::default()
        });
        model.disks.push(pb::Disk {
            disk_id: vec![0x10 + n; 16],
            node_id: vec![n; 16],
            node_name: format!("node-{n}"),
            path: format!("/disk-{n}"),
            capacity_bytes: 10 << 30,
            used_bytes: 1 << 30,
            alive: n != 3,
            ..Default::default()
        });
    }
    model
}

#[test]
fn a_pool_and_a_volume_are_made_shown_resized_and_deleted() {
    let server = FakeMetadata::start(three_nodes());
    let at = server.address.to_string();
    let volume_before_pool = ashlar(&at, &["volume", "create", "v", "--size", "1GiB"]);
    assert_eq!(code(&volume_before_pool), 4);
    assert!(stderr(&volume_before_pool).contains("ashlar pool create"));

    let pool = json(&ashlar(
        &at,
        &["-o", "json", "pool", "create", "main", "--replicas", "2"],
    ));
    assert_eq!(
        (
            pool["replicas"].as_u64(),
            pool["overprovision_percent"].as_u64()
        ),
        (Some(2), Some(1000))
    );
    let again = ashlar(&at, &["pool", "create", "main"]);
    assert_eq!(code(&again), 4);
    let updated = json(&ashlar(
        &at,
        &[
            "-o",
            "json",
            "pool",
            "update",
            "main",
            "--failure-domain",
            "zone",
            "--selector",
            "media=ssd",
        ],
    ));
    assert_eq!(updated["failure_domain"], "zone");
    assert_eq!(updated["selector"]["media"], "ssd");
    assert_eq!(updated["replicas"], 2, "what is not given stays");
    assert_eq!(code(&ashlar(&at, &["pool", "update", "main"])), 2);

    let created = ashlar(&at, &["volume", "create", "v", "--size", "10GiB", "--wait"]);
    assert_eq!(code(&created), 0, "{}", stderr(&created));
    assert!(stdout(&created).contains("10 GiB"));
    let shown = json(&ashlar(&at, &["-o", "json", "volume", "show", "v"]));
    assert_eq!(shown["size_bytes"], 10u64 << 30);
    assert_eq!(shown["health"], "ok");
    assert_eq!(shown["replica_list"].as_array().unwrap().len(), 3);
    assert_eq!(shown["replica_list"][2]["disk_alive"], false);
    let by_id = json(&ashlar(
        &at,
        &[
            "-o",
            "json",
            "volume",
            "show",
            shown["id"].as_str().unwrap(),
        ],
    ));
    assert_eq!(by_id["name"], "v");

    let smaller = ashlar(&at, &["volume", "resize", "v", "1GiB"]);
    assert_eq!(code(&smaller), 4);
    assert!(stderr(&smaller).contains("only grows"));
    assert_eq!(
        json(&ashlar(
            &at,
            &["-o", "json", "volume", "resize", "v", "20GiB"]
        ))["size_bytes"],
        20u64 << 30
    );
    assert_eq!(code(&ashlar(&at, &["pool", "delete", "main"])), 4);
    assert_eq!(
        code(&ashlar(&at, &["volume", "delete", "v"])),
        2,
        "without a terminal --yes is needed"
    );
    assert_eq!(code(&ashlar(&at, &["volume", "delete", "v", "--yes"])), 0);
    assert_eq!(code(&ashlar(&at, &["volume", "delete", "v", "--yes"])), 3);
    assert_eq!(code(&ashlar(&at, &["pool", "delete", "main"])), 0);
}

#[test]
fn tables_have_a_row_per_thing_over_all_pages() {
    let mut model = three_nodes();
    for n in 1..=3u8 {
        model.volumes.push(pb::Volume {
            volume_id: vec![n; 16],
            name: format!("volume-{n}"),
            size_bytes: 1 << 30,
            min_replicas: 1,
            ..Default::default()
        });
    }
    let server = FakeMetadata::start(model);
    let at = server.address.to_string();
    let volumes = stdout(&ashlar(&at, &["volume", "list"]));
    assert_eq!(volumes.lines().count(), 4, "{volumes}");
    assert!(volumes.lines().next().unwrap().contains("HEALTH"));
    let nodes = stdout(&ashlar(&at, &["node", "list"]));
    assert!(
        nodes.contains("node-3") && nodes.contains("silent"),
        "{nodes}"
    );
    assert!(stdout(&ashlar(&at, &["node", "show", "node-1"])).contains("/disk-1"));
    let disks = json(&ashlar(
        &at,
        &["-o", "json", "disk", "list", "--node", "node-2"],
    ));
    assert_eq!(disks.as_array().unwrap().len(), 1);
    assert_eq!(disks[0]["path"], "/disk-2");
    let status = json(&ashlar(&at, &["-o", "json", "cluster", "status"]));
    assert_eq!(status["nodes_alive"], 2);
    assert_eq!(status["volumes"], 3);
    assert_eq!(status["members"][0]["leader"], true);
    assert!(stdout(&ashlar(&at, &["cluster", "status"])).contains("2 of 3 alive"));
}

#[test]
fn what_does_not_exist_ends_with_3_and_says_how_to_look() {
    let server = FakeMetadata::start(three_nodes());
    let at = server.address.to_string();
    for arguments in [
        ["volume", "show", "nothing"],
        ["node", "show", "nothing"],
        ["pool", "show", "nothing"],
        ["disk", "remove", "nothing"],
    ] {
        let output = ashlar(&at, &arguments);
        assert_eq!(code(&output), 3, "{arguments:?}: {}", stderr(&output));
        assert!(stderr(&output).contains("list"), "{}", stderr(&output));
        assert!(stdout(&output).is_empty());
    }
}

#[test]
fn a_dead_endpoint_is_passed_over_and_the_request_is_not_carried_out_twice() {
    let mut model = three_nodes();
    model.lose_answers = 2;
    let server = FakeMetadata::start(model);
    let at = format!("127.0.0.1:1,{}", server.address);
    let output = ashlar(&at, &["pool", "create", "main"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let model = server.model.lock().unwrap();
    assert_eq!(model.request_ids.len(), 3);
    assert!(
        model
            .request_ids
            .iter()
            .all(|id| *id == model.request_ids[0]),
        "one id for all tries"
    );
}

#[test]
fn without_an_answer_the_exit_code_is_5() {
    let output = ashlar("127.0.0.1:1", &["node", "list"]);
    assert_eq!(code(&output), 5, "{}", stderr(&output));
    assert!(stderr(&output).contains("hint:"));
    let mut model = three_nodes();
    model.unavailable = true;
    let server = FakeMetadata::start(model);
    assert_eq!(
        code(&ashlar(&server.address.to_string(), &["volume", "list"])),
        5
    );
}

#[test]
fn replicas_are_listed_rebuilt_and_not_moved_without_room() {
    let mut model = three_nodes();
    let replica = |n: u8, state: pb::ReplicaState| pb::Replica {
        disk_id: vec![0x10 + n; 16],
        state: state as i32,
        ..Default::default()
    };
    model.volumes.push(pb::Volume {
        volume_id: vec![9; 16],
        name: "v".into(),
        min_replicas: 2,
        replicas: 3,
        groups: vec![pb::Group {
            replicas: vec![
                replica(1, pb::ReplicaState::InSync),
                replica(2, pb::ReplicaState::InSync),
                replica(3, pb::ReplicaState::Stale),
            ],
        }],
        ..Default::default()
    });
    let server = FakeMetadata::start(model);
    let at = server.address.to_string();
    let list = json(&ashlar(&at, &["-o", "json", "replica", "list", "v"]));
    let states: Vec<&str> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["in-sync", "in-sync", "stale"]);
    assert!(
        list[0]["used_bytes"].is_null(),
        "the daemons are not reachable"
    );
    assert_eq!(
        json(&ashlar(&at, &["-o", "json", "volume", "show", "v"]))["health"],
        "degraded"
    );
    assert_eq!(
        code(&ashlar(&at, &["replica", "rebuild", "v", "/disk-1"])),
        4
    );
    let rebuilt = ashlar(
        &at,
        &[
            "replica",
            "rebuild",
            "v",
            "/disk-3",
            "--wait",
            "--wait-timeout",
            "5",
        ],
    );
    assert_eq!(code(&rebuilt), 0, "{}", stderr(&rebuilt));
    let moved = ashlar(&at, &["replica", "move", "v", "/disk-1"]);
    assert_eq!(code(&moved), 4);
    assert!(stderr(&moved).contains("disk add"));
}

#[test]
fn publications_are_shown_and_taken_back() {
    let mut model = three_nodes();
    let publication = |node: &str| pb::Publication {
        node_name: node.into(),
        mode: pb::AttachMode::ReadOnly.into(),
    };
    model.volumes.push(pb::Volume {
        volume_id: vec![9; 16],
        name: "v".into(),
        publications: vec![publication("a"), publication("b")],
        holder: Some(pb::Attachment {
            client_id: vec![4; 16],
            client_name: "client-on-a".into(),
            ..Default::default()
        }),
        format: Some(pb::VolumeFormat {
            state: pb::FormatState::Formatting.into(),
            fs_type: "ext4".into(),
        }),
        ..Default::default()
    });
    let server = FakeMetadata::start(model);
    let at = server.address.to_string();
    let shown = ashlar(&at, &["volume", "show", "v"]);
    assert!(stdout(&shown).contains("a (read-only), b (read-only)"));
    assert!(stdout(&shown).contains("ext4, not finished"));
    let shown = json(&ashlar(&at, &["-o", "json", "volume", "show", "v"]));
    assert_eq!(shown["publications"][1]["node"], "b");
    assert_eq!(shown["publications"][1]["mode"], "read-only");
    assert_eq!(shown["format"]["state"], "formatting");

    let unasked = ashlar(&at, &["volume", "unpublish", "v"]);
    assert_eq!(code(&unasked), 2);
    assert!(stderr(&unasked).contains("client-on-a"));
    let elsewhere = ashlar(&at, &["volume", "unpublish", "v", "--node", "c"]);
    assert_eq!(code(&elsewhere), 0, "{}", stderr(&elsewhere));
    assert!(stdout(&elsewhere).contains("not published to c"));
    assert!(server.model.lock().unwrap().request_ids.is_empty());

    let one = ["volume", "unpublish", "v", "--node", "b", "--yes"];
    assert_eq!(code(&ashlar(&at, &one)), 0);
    let left = server.model.lock().unwrap().volumes[0].clone();
    assert_eq!(left.publications, [publication("a")]);
    let all = ashlar(&at, &["volume", "unpublish", "v", "--yes"]);
    assert_eq!(code(&all), 0, "{}", stderr(&all));
    assert!(stdout(&all).contains("client-on-a lost it"));
    let deleted = ashlar(&at, &["volume", "delete", "v", "--yes"]);
    assert_eq!(code(&deleted), 0, "{}", stderr(&deleted));
}

#[test]
fn a_published_volume_is_not_deleted() {
    let mut model = three_nodes();
    model.volumes.push(pb::Volume {
        volume_id: vec![9; 16],
        name: "v".into(),
        publications: vec![pb::Publication {
            node_name: "worker".into(),
            mode: pb::AttachMode::Exclusive.into(),
        }],
        ..Default::default()
    });
    let server = FakeMetadata::start(model);
    let at = server.address.to_string();
    let deleted = ashlar(&at, &["volume", "delete", "v", "--yes"]);
    assert_eq!(code(&deleted), 4);
    assert!(stderr(&deleted).contains("worker"));
}

#[test]
fn usage_errors_end_with_2_and_completions_are_printed() {
    let server = FakeMetadata::start(Model::default());
    let at = server.address.to_string();
    assert_eq!(
        code(&ashlar(
            &at,
            &["volume", "create", "v", "--size", "10 apples"]
        )),
        2
    );
    assert_eq!(code(&ashlar(&at, &["nonsense"])), 2);
    let nowhere = tempfile::tempdir().unwrap();
    let no_cluster = Command::new(env!("CARGO_BIN_EXE_ashlar"))
        .env_remove("ASHLAR_METADATA")
        .arg("--dir")
        .arg(nowhere.path())
        .args(["node", "list"])
        .output()
        .unwrap();
    assert_eq!(code(&no_cluster), 2);
    assert!(stderr(&no_cluster).contains("ashlar dev up"));
    for shell in ["bash", "zsh", "fish"] {
        let output = ashlar(&at, &["completions", shell]);
        assert_eq!(code(&output), 0);
        assert!(stdout(&output).contains("ashlar"));
    }
}

#[test]
fn a_development_cluster_that_is_not_there_is_down_already() {
    let directory = tempfile::tempdir().unwrap();
    let dev = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_ashlar"))
            .arg("--dir")
            .arg(directory.path().join("none"))
            .arg("dev")
            .args(arguments)
            .output()
            .unwrap()
    };
    assert_eq!(code(&dev(&["down"])), 0);
    assert_eq!(code(&dev(&["status"])), 3);
    assert_eq!(code(&dev(&["kill", "daemon-1"])), 3);
    assert_eq!(code(&dev(&["kill", "bogus"])), 2);
    assert_eq!(code(&dev(&["up", "--members", "2"])), 2);
}

/// A server with a pool and the volumes `a` and `b`.
fn two_volumes() -> (FakeMetadata, String) {
    let server = FakeMetadata::start(three_nodes());
    let at = server.address.to_string();
    json(&ashlar(&at, &["-o", "json", "pool", "create", "main"]));
    for name in ["a", "b"] {
        let create = ["-o", "json", "volume", "create", name, "--size", "1GiB"];
        json(&ashlar(&at, &create));
    }
    (server, at)
}

#[test]
fn snapshots_are_taken_listed_shown_and_deleted() {
    let (server, at) = two_volumes();
    let run = |arguments: &[&str]| ashlar(&at, arguments);
    let taken = run(&["snapshot", "create", "a", "--name", "s", "--label", "k=v"]);
    assert_eq!(code(&taken), 0, "{}", stderr(&taken));
    assert_eq!(stdout(&taken), "snapshot s of volume a is taken\n");
    let both = run(&["-o", "json", "snapshot", "create", "a", "b", "--name", "n"]);
    let both = json(&both);
    assert_eq!(
        (&both[0]["name"], &both[1]["name"]),
        (&"n-a".into(), &"n-b".into())
    );
    assert_eq!(both[0]["group"], "n", "several are a group");
    assert_eq!(server.model.lock().unwrap().snapshots.len(), 3);

    let names = |arguments: &[&str]| -> Vec<String> {
        let all = json(&ashlar(&at, arguments));
        let all = all.as_array().unwrap().iter();
        all.map(|s| s["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let list = ["-o", "json", "snapshot", "list"];
    assert_eq!(names(&list), ["s", "n-a", "n-b"]);
    assert_eq!(names(&[&list[..], &["a"]].concat()), ["s", "n-a"]);
    assert_eq!(
        names(&[&list[..], &["--group", "n"]].concat()),
        ["n-a", "n-b"]
    );
    assert_eq!(code(&run(&["snapshot", "list", "none"])), 3);
    let table = stdout(&run(&["snapshot", "list"]));
    assert!(
        table.contains("NAME") && table.contains("2023-11-14 22:13:20"),
        "{table}"
    );

    let shown = json(&run(&["-o", "json", "snapshot", "show", "s"]));
    assert_eq!(shown["state"], "ready");
    assert_eq!(shown["labels"]["k"], "v");
    assert_eq!(shown["size_bytes"], 1u64 << 30);
    let by_id = run(&["snapshot", "show", shown["id"].as_str().unwrap()]);
    assert!(stdout(&by_id).contains("s\n"), "{}", stdout(&by_id));
    let absent = run(&["snapshot", "show", "none"]);
    assert_eq!(code(&absent), 3);
    assert!(stderr(&absent).contains("ashlar snapshot list"));
    let volume = json(&run(&["-o", "json", "volume", "show", "a"]));
    assert_eq!(volume["snapshots"].as_array().unwrap().len(), 2);
    assert!(stdout(&run(&["volume", "show", "a"])).contains("n-a"));

    assert_eq!(code(&run(&["snapshot", "delete", "s"])), 2, "needs --yes");
    assert_eq!(code(&run(&["snapshot", "delete", "--yes"])), 2, "of what?");
    let deleted = run(&["snapshot", "delete", "s", "--yes"]);
    assert_eq!(code(&deleted), 0, "{}", stderr(&deleted));
    assert!(stdout(&deleted).starts_with("snapshot s is deleted"));
    let group = json(&run(&[
        "-o", "json", "snapshot", "delete", "--group", "n", "-y",
    ]));
    assert_eq!(group.as_array().unwrap().len(), 2);
    assert!(names(&list).is_empty());
    assert_eq!(code(&run(&["snapshot", "delete", "--group", "n", "-y"])), 3);
}

#[test]
fn a_snapshot_that_cannot_be_taken_says_why() {
    let (server, at) = two_volumes();
    for (status, expected) in [
        (tonic::Status::aborted("not held in time: try again"), 4),
        (
            tonic::Status::resource_exhausted("1000 snapshots; delete some"),
            4,
        ),
        (tonic::Status::failed_precondition("attach it once"), 4),
        (tonic::Status::invalid_argument("name: not a valid name"), 2),
    ] {
        let message = status.message().to_owned();
        server.model.lock().unwrap().no_snapshots = Some(status);
        let refused = ashlar(&at, &["snapshot", "create", "a", "--name", "s"]);
        assert_eq!(code(&refused), expected);
        assert!(stderr(&refused).contains(&message), "{}", stderr(&refused));
        assert!(
            !stderr(&refused).contains("disk add"),
            "{}",
            stderr(&refused)
        );
    }
    assert_eq!(code(&ashlar(&at, &["snapshot", "create", "a"])), 2);
    assert_eq!(
        code(&ashlar(&at, &["snapshot", "create", "--name", "s"])),
        2
    );
}

#[test]
fn a_snapshot_on_its_way_out_shows_its_progress() {
    let (server, at) = two_volumes();
    server.model.lock().unwrap().snapshots.push(pb::Snapshot {
        snapshot_id: vec![9; 16],
        name: "old".into(),
        volume_id: vec![1; 16],
        volume_name: "a".into(),
        state: pb::SnapshotState::Deleting.into(),
        replicas_left: 2,
        chunks_left: 17,
        volume_deleted: true,
        ..Default::default()
    });
    let table = stdout(&ashlar(&at, &["snapshot", "list"]));
    assert!(
        table.contains("deleting, 17 chunks to look at on 2 replicas"),
        "{table}"
    );
    assert!(table.contains("a (deleted)"), "{table}");
}

#[test]
fn nodes_and_disks_go_out_of_service_and_back() {
    let mut model = three_nodes();
    model.disks[0].replica_count = 2;
    model.disks[1].used_bytes = 9 << 30;
    model.repairs = pb::Repairs {
        waiting: 1,
        unplaced_total: 3,
        unplaced: vec![pb::Unplaced {
            volume_name: "v".into(),
            reason: "no living disk has room".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let server = FakeMetadata::start(model);
    let at = server.address.to_string();
    let state = |what: &str, n: usize| {
        let shown = json(&ashlar(&at, &["-o", "json", what, "list"]));
        shown[n]["service"].as_str().unwrap().to_owned()
    };
    assert_eq!(state("node", 0), "in-use");
    let cordoned = ashlar(&at, &["node", "cordon", "node-1"]);
    assert!(stdout(&cordoned).contains("the 2 that are there stay"));
    assert_eq!(state("node", 0), "cordoned");
    let shown = ashlar(&at, &["node", "show", "node-1"]);
    assert!(stdout(&shown).contains("alive, cordoned"));

    // Nothing can leave: that is said, and the wait ends.
    let begun = ashlar(&at, &["node", "drain", "node-1"]);
    assert!(stdout(&begun).contains("2 replicas (1 GiB) leave node node-1"));
    let wait = ["node", "drain", "node-1", "--wait", "--wait-timeout", "1"];
    let stuck = ashlar(&at, &wait);
    assert_eq!(code(&stuck), 5, "{}", stderr(&stuck));
    let text = stderr(&stuck);
    assert!(text.contains("2 replicas are still there"), "{text}");
    assert!(
        text.contains("no living disk has room (and 2 more"),
        "{text}"
    );
    let repairs = json(&ashlar(&at, &["-o", "json", "cluster", "repairs"]));
    assert_eq!(
        (repairs["waiting"].as_u64(), repairs["unplaced"].as_u64()),
        (Some(1), Some(3))
    );
    server.model.lock().unwrap().disks[0].replica_count = 0;
    let drained = ashlar(&at, &wait);
    assert!(stdout(&drained).contains("node node-1 holds no replica"));
    assert_eq!(code(&ashlar(&at, &["node", "uncordon", "node-1"])), 0);
    assert_eq!(state("node", 0), "in-use");

    assert_eq!(
        code(&ashlar(&at, &["disk", "evacuate", "/disk-2", "--wait"])),
        0
    );
    assert_eq!(state("disk", 1), "draining");
    let disks = ashlar(&at, &["disk", "list"]);
    assert!(
        stdout(&disks).contains("alive, draining, nearly full"),
        "{}",
        stdout(&disks)
    );
    let status = json(&ashlar(&at, &["-o", "json", "cluster", "status"]));
    assert_eq!(status["disks_nearly_full"], 1);
    assert_eq!(code(&ashlar(&at, &["disk", "uncordon", "/disk-2"])), 0);
    assert_eq!(state("disk", 1), "in-use");
    let itself = ashlar(&at, &["disk", "replace", "/disk-2", "/disk-2"]);
    assert_eq!(code(&itself), 2);
    assert_eq!(code(&ashlar(&at, &["disk", "cordon", "nothing"])), 3);
}
