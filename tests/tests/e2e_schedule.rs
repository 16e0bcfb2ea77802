//! Schedules with real processes: snapshots of a group each minute with retention, backups by the leader, a leader that dies.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use ashlar_tests::e2e::{Cluster, ClusterSpec, wait_until};
use serde_json::Value;

/// Two times of a schedule that is due each minute, and some.
const SOON: Duration = Duration::from_secs(150);

fn shown(cluster: &Cluster, name: &str) -> Value {
    cluster.json(&["schedule", "show", name])
}

fn ready(cluster: &Cluster, volume: &str) -> usize {
    let all = cluster.json(&["snapshot", "list", volume]);
    let all = all.as_array().unwrap();
    all.iter().filter(|s| s["state"] == "ready").count()
}

#[test]
fn schedules_run_each_minute_keep_the_newest_and_outlive_their_leader() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.ok(&["pool", "create", "default"]);
    for name in ["a", "b", "other"] {
        let label = if name == "other" { "app=x" } else { "app=db" };
        cluster.ok(&[
            "volume", "create", name, "--size", "16MiB", "--label", label,
        ]);
    }
    let every = "* * * * *";
    cluster.ok(&[
        "schedule", "create", "group", "--cron", every, "--labels", "app=db", "--keep", "1",
    ]);
    let directory = cluster.scratch("repository");
    let url = format!("file://{}", directory.display());
    cluster.ok(&[
        "schedule",
        "create",
        "away",
        "--cron",
        every,
        "--volume",
        "other",
        "--keep",
        "1",
        "--backup-to",
        &url,
    ]);
    cluster.ok(&[
        "schedule",
        "create",
        "idle",
        "--cron",
        "0 0 1 1 *",
        "--volume",
        "a",
        "--keep",
        "1",
    ]);
    cluster.ok(&[
        "schedule", "create", "paused", "--cron", every, "--volume", "a", "--keep", "1",
    ]);
    cluster.ok(&["schedule", "pause", "paused"]);
    let refused = cluster.ashlar(&[
        "schedule",
        "create",
        "bad",
        "--cron",
        "every day",
        "--volume",
        "a",
        "--keep",
        "1",
    ]);
    assert_eq!(refused.status.code(), Some(2));

    let succeeded = |name: &str| shown(&cluster, name)["succeeded_unix_ms"].as_u64().unwrap();
    wait_until("the first runs", SOON, || {
        (succeeded("group") > 0 && succeeded("away") > 0).then_some(())
    });
    assert_eq!((ready(&cluster, "a"), ready(&cluster, "b")), (1, 1));
    let first = (succeeded("group"), succeeded("away"));

    // The next leader goes on, and deletes what is too old.
    let leader = cluster.leader();
    cluster.ok(&["dev", "kill", &format!("metadata-{leader}")]);
    wait_until("the next runs", SOON, || {
        (succeeded("group") > first.0 && succeeded("away") > first.1).then_some(())
    });
    for volume in ["a", "b", "other"] {
        assert_eq!(ready(&cluster, volume), 1, "snapshots of {volume}");
    }
    let backups = cluster.json(&["backup", "list", "--from", &url]);
    assert_eq!(backups.as_array().unwrap().len(), 1, "{backups}");
    assert_eq!(backups[0]["schedule"], "away");
    let group = shown(&cluster, "group");
    assert_eq!(group["failures"], 0, "{group}");
    assert_eq!(shown(&cluster, "idle")["runs"], 0);
    assert_eq!(shown(&cluster, "paused")["runs"], 0);
    cluster.ok(&["schedule", "delete", "group", "--yes"]);
    let left = cluster.json(&["schedule", "list"]);
    assert_eq!(left.as_array().unwrap().len(), 3, "{left}");
    assert_eq!(ready(&cluster, "a"), 1, "what it made stays");
}
