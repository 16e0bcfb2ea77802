//! A cluster of real processes, made and driven by the `ashlar` binary as a user would.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;

use super::tools::{binary, wait_until};

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// Metadata members.
    pub members: u32,
    /// Storage daemons, one disk each.
    pub daemons: u32,
    /// Size of each disk, as in `2GiB`.
    pub disk_size: &'static str,
    /// Seconds without a daemon after which its replicas get others.
    pub replace_after: Option<u64>,
    /// Network namespace to run in.
    pub namespace: Option<String>,
    /// Address to listen on, in a namespace of the test's own.
    pub address: &'static str,
}

impl Default for ClusterSpec {
    fn default() -> Self {
        Self {
            members: 3,
            daemons: 3,
            disk_size: "2GiB",
            replace_after: None,
            namespace: None,
            address: "127.0.0.1",
        }
    }
}

/// A running cluster; its processes and files go when it is dropped.
pub struct Cluster {
    dir: TempDir,
    spec: ClusterSpec,
}

impl Cluster {
    /// Starts a cluster and waits until it is ready.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn up(spec: ClusterSpec) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("ashlar-e2e-")
            .tempdir()
            .expect("temp dir");
        let cluster = Self { dir, spec };
        let replace_after = cluster.spec.replace_after.map(|s| s.to_string());
        let members = cluster.spec.members.to_string();
        let daemons = cluster.spec.daemons.to_string();
        let mut arguments = vec![
            "dev",
            "up",
            "--members",
            &members,
            "--daemons",
            &daemons,
            "--disk-size",
            cluster.spec.disk_size,
            "--address",
            cluster.spec.address,
        ];
        if let Some(seconds) = &replace_after {
            arguments.extend(["--replace-after", seconds]);
        }
        cluster.ok(&arguments);
        cluster
    }

    /// The directory of the cluster's state, disks and logs.
    pub fn dir(&self) -> PathBuf {
        self.dir.path().join("dev")
    }

    /// A path for a test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command that runs in the cluster's network namespace.
    pub fn command(&self, program: &Path) -> Command {
        match &self.spec.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command
                    .arg(format!("--net=/run/netns/{namespace}"))
                    .arg("--")
                    .arg(program);
                command
            }
        }
    }

    /// Runs `ashlar ARGS`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn ashlar(&self, args: &[&str]) -> Output {
        self.command(&binary("ashlar"))
            .arg("--dir")
            .arg(self.dir())
            .args(args)
            .output()
            .expect("ashlar starts")
    }

    /// Runs `ashlar ARGS`, which must succeed; its standard output.
    ///
    /// # Panics
    /// If it fails.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.ashlar(args);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "ashlar {args:?} failed ({}):\n{stdout}\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
        stdout
    }

    /// Runs `ashlar -o json ARGS`, which must succeed.
    ///
    /// # Panics
    /// If it fails or prints no JSON.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut all = vec!["-o", "json"];
        all.extend_from_slice(args);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
    }

    /// Bytes that each disk has in use.
    pub fn used_by_disk(&self) -> Vec<u64> {
        let disks = self.json(&["disk", "list"]);
        let disks = disks.as_array().into_iter().flatten();
        disks.filter_map(|d| d["used_bytes"].as_u64()).collect()
    }

    /// Waits until each of three disks has between so many and so many MiB in use.
    pub fn wait_used_mib(&self, low: u64, high: u64) {
        wait_until(
            &format!("each disk to have {low} to {high} MiB in use"),
            Duration::from_secs(60),
            || {
                let used = self.used_by_disk();
                let fits = used.iter().all(|u| (low << 20..=high << 20).contains(u));
                (used.len() == 3 && fits).then_some(())
            },
        );
    }

    /// Makes the pool `default` (once) and a volume in it.
    pub fn volume(&self, name: &str, size: &str, replicas: u32) {
        let pools = self.json(&["pool", "list"]);
        if pools.as_array().is_none_or(Vec::is_empty) {
            self.ok(&["pool", "create", "default"]);
        }
        let replicas = replicas.to_string();
        self.ok(&[
            "volume",
            "create",
            name,
            "--size",
            size,
            "--replicas",
            &replicas,
        ]);
    }

    /// Addresses of the metadata members, separated by commas.
    ///
    /// # Panics
    /// If the cluster does not say them.
    pub fn metadata(&self) -> String {
        let env = self.ok(&["dev", "env"]);
        let value = env
            .lines()
            .find_map(|l| l.trim().split_once("ASHLAR_METADATA="));
        let (_, addresses) = value.unwrap_or_else(|| panic!("no ASHLAR_METADATA in {env}"));
        addresses.trim_matches(['"', '\'']).to_owned()
    }

    /// States of a volume's replicas, in order.
    pub fn replica_states(&self, volume: &str) -> Vec<String> {
        let list = self.json(&["replica", "list", volume]);
        let rows = list.as_array().cloned().unwrap_or_default();
        rows.iter()
            .map(|r| r["state"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    /// Waits until every replica of a volume is in sync.
    ///
    /// # Panics
    /// If that takes longer than `limit`.
    pub fn wait_redundant(&self, volume: &str, limit: Duration) {
        wait_until("full redundancy", limit, || {
            let states = self.replica_states(volume);
            (!states.is_empty() && states.iter().all(|s| s.replace('_', "-") == "in-sync"))
                .then_some(())
        });
    }

    /// Number (from 1) of the metadata member that leads.
    ///
    /// # Panics
    /// If there is none within ten seconds.
    pub fn leader(&self) -> u64 {
        wait_until("a metadata leader", Duration::from_secs(10), || {
            let output = self.ashlar(&["-o", "json", "cluster", "status"]);
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
            status["leader_id"].as_u64().filter(|id| *id != 0)
        })
    }

    /// The end of every process's log.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let Ok(entries) = std::fs::read_dir(self.dir().join("logs")) else {
            return text;
        };
        for entry in entries.flatten() {
            let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(15).collect();
            text.push_str(&format!("--- {}\n", entry.path().display()));
            for line in tail.iter().rev() {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = self.ashlar(&["dev", "down", "--purge"]);
    }
}
