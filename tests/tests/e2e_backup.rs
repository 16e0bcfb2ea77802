//! Backups with real processes: full and incremental, while the volume is written; to a directory and to an S3 server;
//! killed, damaged, healed, and restored in another cluster.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, S3Server, binary, wait_until};
use serde_json::Value;

const MIB: usize = 1024 * 1024;
const SIZE: &str = "48MiB";

/// A cluster and a repository.
struct World<'a> {
    cluster: &'a Cluster,
    url: String,
    key: PathBuf,
    environment: Vec<(String, String)>,
}

impl World<'_> {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.cluster.command(&binary("ashlar"));
        command
            .args(["-o", "json", "--dir"])
            .arg(self.cluster.dir())
            .arg("backup")
            .args(args)
            .env("ASHLAR_BACKUP_REPOSITORY", &self.url)
            .env("ASHLAR_BACKUP_KEY_FILE", &self.key)
            .envs(self.environment.iter().cloned());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "backup {args:?}: {}\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.cluster.logs()
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn code(&self, args: &[&str]) -> i32 {
        self.run(args).status.code().unwrap()
    }

    fn listed(&self) -> usize {
        self.ok(&["list"]).as_array().unwrap().len()
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field]
        .as_str()
        .unwrap_or_else(|| panic!("{field}: {value}"))
}

/// Bytes that do not shrink.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(|| next().to_le_bytes())
        .flatten()
        .take(length)
        .collect()
}

fn connect(export: &Export, volume: &str) -> NbdClient {
    NbdClient::connect_unix(export.socket(), volume).unwrap()
}

/// The content of a volume.
fn image(cluster: &Cluster, volume: &str) -> Vec<u8> {
    let export = Export::start(cluster, volume);
    let mut client = connect(&export, volume);
    let size = client.size as usize;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        let length = (size - bytes.len()).min(4 * MIB);
        bytes.extend(client.read(bytes.len() as u64, length).unwrap());
    }
    drop(client);
    assert!(export.stop().success());
    bytes
}

/// Full and incremental, deleted, collected, restored; returns the ids of what is left and what it shows.
fn round(world: &World<'_>, volume: &str) -> Vec<(String, Vec<u8>)> {
    let cluster = world.cluster;
    let export = Export::start(cluster, volume);
    let mut client = connect(&export, volume);
    let mut expected = vec![0; client.size as usize];
    let write = |client: &mut NbdClient, expected: &mut Vec<u8>, at: usize, data: &[u8]| {
        client.write(at as u64, data).unwrap();
        expected[at..at + data.len()].copy_from_slice(data);
    };
    write(&mut client, &mut expected, 0, &noise(1, 6 * MIB));
    write(&mut client, &mut expected, 20 * MIB + 4096, &[b'x'; 70_000]);
    client.flush().unwrap();

    // The volume stays attached all the time.
    let full = world.ok(&["create", "--volume", volume]);
    assert_eq!(text(&full, "kind"), "full");
    assert!(
        full["read_bytes"].as_u64().unwrap() <= 10 * MIB as u64,
        "only what is allocated: {full}"
    );
    let first = expected.clone();

    write(&mut client, &mut expected, 2 * MIB, &noise(2, 8192));
    write(&mut client, &mut expected, 40 * MIB, &noise(3, 4096));
    client.trim(4 * MIB as u64, MIB as u32).unwrap();
    expected[4 * MIB..5 * MIB].fill(0);
    client.flush().unwrap();
    let increment = world.ok(&["create", "--volume", volume, "--compression", "lz4"]);
    assert_eq!(text(&increment, "kind"), "incremental");
    assert_eq!(increment["base"], full["id"]);
    assert!(
        increment["read_bytes"].as_u64().unwrap() <= 4 * MIB as u64,
        "{increment}"
    );
    assert!(
        increment["sent_bytes"].as_u64().unwrap() < 3 * MIB as u64,
        "{increment}"
    );
    // Only the newest snapshot is kept as a base.
    let snapshots = cluster.json(&["snapshot", "list", volume]);
    let ready = snapshots
        .as_array()
        .unwrap()
        .iter()
        .filter(|s| s["state"] == "ready");
    assert_eq!(ready.count(), 1, "{snapshots}");
    // The same snapshot again is nothing new.
    let again = world.ok(&["create", "--snapshot", text(&increment, "snapshot")]);
    assert_eq!(
        (&again["existed"], &again["id"]),
        (&Value::Bool(true), &increment["id"])
    );
    drop(client);
    assert!(export.stop().success());
    assert!(
        world.ok(&["verify", "--deep"])["problems"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    vec![
        (text(&full, "id").to_owned(), first),
        (text(&increment, "id").to_owned(), expected),
    ]
}

fn restore_and_compare(world: &World<'_>, backups: &[(String, Vec<u8>)], prefix: &str) {
    for (number, (id, expected)) in backups.iter().enumerate() {
        let name = format!("{prefix}-{number}");
        world.ok(&["restore", id, "--volume", &name]);
        let found = image(world.cluster, &name);
        assert!(found == *expected, "volume {name} differs");
    }
}

#[test]
fn backups_in_a_directory_survive_everything_that_they_should() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("one", SIZE, 3);
    let directory = cluster.scratch("repository");
    let key = cluster.scratch("key");
    std::fs::write(&key, b"a passphrase of some length\n").unwrap();
    let world = World {
        cluster: &cluster,
        url: format!("file://{}", directory.display()),
        key,
        environment: Vec::new(),
    };
    assert_eq!(world.code(&["list"]), 3, "no repository");
    let backups = round(&world, "one");
    restore_and_compare(&world, &backups, "copy");

    let wrong = World {
        key: cluster.scratch("other-key"),
        url: world.url.clone(),
        environment: Vec::new(),
        cluster: &cluster,
    };
    std::fs::write(&wrong.key, [9; 32]).unwrap();
    assert_eq!(wrong.code(&["list"]), 2, "the wrong key");
    for at in 0..8 {
        assert_no_plaintext(&directory, &backups[0].1[at * 512 * 1024..][..64]);
    }

    killed_backups_are_not_listed(&world);
    a_damaged_object_is_found_and_healed(&world, &directory, &backups);

    // Another cluster, with one of everything.
    let other = Cluster::up(ClusterSpec {
        members: 1,
        daemons: 1,
        ..ClusterSpec::default()
    });
    other.ok(&["pool", "create", "small", "--replicas", "1"]);
    let there = World {
        cluster: &other,
        url: world.url.clone(),
        key: world.key.clone(),
        environment: Vec::new(),
    };
    restore_and_compare(&there, &backups, "moved");

    // The newer one does not need the older one; when all are gone nothing is left.
    world.ok(&["delete", &backups[0].0, "--yes"]);
    world.ok(&["gc", "--grace-hours", "0"]);
    restore_and_compare(&world, &backups[1..], "alone");
    let left = world.ok(&["list"]);
    for backup in left.as_array().unwrap() {
        world.ok(&["delete", text(backup, "id"), "--yes"]);
    }
    let collected = world.ok(&["gc", "--grace-hours", "0"]);
    assert!(
        collected["deleted_objects"].as_u64().unwrap() > 0,
        "{collected}"
    );
    assert_eq!(collected["kept_bytes"], 0, "{collected}");
}

fn assert_no_plaintext(directory: &Path, plain: &[u8]) {
    for file in files(directory) {
        let bytes = std::fs::read(&file).unwrap();
        let found = bytes.windows(plain.len()).any(|w| w == plain);
        assert!(!found, "{} shows content", file.display());
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn killed_backups_are_not_listed(world: &World<'_>) {
    let cluster = world.cluster;
    cluster.volume("big", "128MiB", 3);
    let export = Export::start(cluster, "big");
    let mut client = connect(&export, "big");
    let mut expected = Vec::new();
    for part in 0..32u64 {
        let data = noise(100 + part, 2 * MIB);
        client.write(part * 2 * MIB as u64, &data).unwrap();
        expected.extend(data);
    }
    expected.resize(client.size as usize, 0);
    client.flush().unwrap();
    cluster.ok(&["snapshot", "create", "big", "--name", "big-1"]);
    let before = world.listed();
    let objects = |world: &World<'_>| files(Path::new(&world.url["file://".len()..])).len();
    let were = objects(world);
    for after in [1, 8, 24] {
        let mut child = world
            .command(&["create", "--snapshot", "big-1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let many = |at_least: usize| objects(world) >= were + at_least;
        wait_until("some objects", Duration::from_secs(60), || {
            (many(after) || child.try_wait().unwrap().is_some()).then_some(())
        });
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(world.listed(), before, "a backup that was killed is listed");
    assert_eq!(
        world.code(&["gc", "--grace-hours", "0"]),
        4,
        "the locks of the dead are young"
    );
    let done = world.ok(&["create", "--snapshot", "big-1"]);
    assert!(
        done["sent_objects"].as_u64().unwrap() < 60,
        "what was sent is not sent again: {done}"
    );
    assert_eq!(world.listed(), before + 1);
    world.ok(&["gc", "--grace-hours", "0", "--break-locks"]);
    restore_and_compare(
        world,
        &[(text(&done, "id").to_owned(), expected)],
        "big-copy",
    );
    drop(client);
    assert!(export.stop().success());
}

fn a_damaged_object_is_found_and_healed(
    world: &World<'_>,
    directory: &Path,
    backups: &[(String, Vec<u8>)],
) {
    let victim = files(&directory.join("data")).into_iter().next().unwrap();
    let good = std::fs::read(&victim).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x10;
    std::fs::File::create(&victim)
        .unwrap()
        .write_all(&bad)
        .unwrap();
    let output = world.run(&["verify", "--deep"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bad_backups: Vec<_> = report["bad_backups"].as_array().unwrap().iter().collect();
    assert!(!bad_backups.is_empty(), "{report}");
    let id = bad_backups[0].as_str().unwrap();
    assert_eq!(world.code(&["restore", id, "--volume", "never"]), 1);
    let shown = world.cluster.ashlar(&["volume", "show", "never"]);
    assert_eq!(
        shown.status.code(),
        Some(3),
        "what was half restored is gone"
    );
    // The object is one of what is still in a volume: a full backup stores it again.
    assert_eq!(world.code(&["verify", "--deep", "--delete-damaged"]), 1);
    for volume in ["one", "big", "copy-0"] {
        world.ok(&["create", "--volume", volume, "--base", "none"]);
    }
    let report = world.ok(&["verify", "--deep"]);
    assert!(
        report["problems"].as_array().unwrap().is_empty(),
        "{report}"
    );
    assert!(std::fs::read(&victim).unwrap().len() > 72);
    assert!(!backups.is_empty());
}

#[test]
fn backups_in_an_s3_server_restore_exactly() {
    let cluster = Cluster::up(ClusterSpec::default());
    let Some(server) = S3Server::start(&cluster, "bucket") else {
        return;
    };
    cluster.volume("one", SIZE, 3);
    let key = cluster.scratch("key");
    std::fs::write(&key, [5; 32]).unwrap();
    let world = World {
        cluster: &cluster,
        url: "s3://bucket/some/prefix".to_owned(),
        key,
        environment: server.environment(),
    };
    let backups = round(&world, "one");
    restore_and_compare(&world, &backups, "copy");
    world.ok(&["delete", &backups[0].0, "--yes"]);
    world.ok(&["gc", "--grace-hours", "0"]);
    restore_and_compare(&world, &backups[1..], "alone");
    // With a wrong secret it says so.
    let mut environment = server.environment();
    environment.push(("AWS_SECRET_ACCESS_KEY".into(), "else".into()));
    let nobody = World {
        environment,
        url: world.url.clone(),
        key: world.key.clone(),
        cluster: &cluster,
    };
    assert_eq!(nobody.code(&["list"]), 5);
}
