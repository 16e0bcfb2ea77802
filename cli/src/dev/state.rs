//! The state file of a development cluster. It is replaced as a whole (written beside, renamed).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dev::process::ProcessRecord;
use crate::error::{CliError, Context as _, Result};

/// Version of the file's form.
const FORMAT: u32 = 1;
/// Most members: Raft groups have 1, 3 or 5.
pub const MEMBERS_MAX: u32 = 5;
/// Most storage daemons of a development cluster.
pub const DAEMONS_MAX: u32 = 64;
/// Most disks per daemon.
pub const DISKS_MAX: u32 = 16;
/// Ports kept free beside each daemon's, for disks that are added later.
const SPARE_PORTS: u32 = 4;

/// What the cluster is made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Metadata members.
    pub members: u32,
    /// Storage daemons.
    pub daemons: u32,
    /// Disks of each.
    pub disks_per_daemon: u32,
    /// Size of each disk.
    pub disk_size_bytes: u64,
    /// First port; the others follow.
    pub base_port: u16,
    /// Address that all listen on; loopback, unless the cluster has a network namespace to itself.
    #[serde(default = "loopback")]
    pub address: IpAddr,
    /// Whether the processes serve metrics; clusters made before they did have no ports for it.
    #[serde(default)]
    pub metrics: bool,
    /// Seconds without a daemon after which its replicas get others; `None`: as metadata members do by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_after_seconds: Option<u64>,
}

fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

impl Spec {
    /// Ports that one daemon may use: administration, then one per disk.
    fn ports_per_daemon(&self) -> u32 {
        1 + self.disks_per_daemon + SPARE_PORTS
    }

    /// Ports of the services, from the base on.
    fn service_ports(&self) -> u32 {
        self.members + self.daemons * self.ports_per_daemon()
    }

    /// Ports from the base on.
    pub fn port_count(&self) -> u32 {
        let observed = match self.metrics {
            true => self.members + self.daemons,
            false => 0,
        };
        self.service_ports() + observed
    }

    fn at(&self, offset: u32) -> String {
        let port = u32::from(self.base_port) + offset;
        match self.address {
            IpAddr::V4(address) => format!("{address}:{port}"),
            IpAddr::V6(address) => format!("[{address}]:{port}"),
        }
    }

    /// Address of a member, from 1.
    pub fn member_address(&self, member: u32) -> String {
        self.at(member - 1)
    }

    /// Addresses of all members.
    pub fn member_addresses(&self) -> Vec<String> {
        (1..=self.members).map(|m| self.member_address(m)).collect()
    }

    /// Administration address of a daemon, from 1.
    pub fn admin_address(&self, daemon: u32) -> String {
        let offset = self.members + (daemon - 1) * self.ports_per_daemon();
        self.at(offset)
    }

    /// First data address of a daemon; its further disks follow.
    pub fn data_address(&self, daemon: u32) -> String {
        let offset = self.members + (daemon - 1) * self.ports_per_daemon() + 1;
        self.at(offset)
    }

    /// Address of a process' metrics, which lie above all services.
    pub fn metrics_address(&self, name: Name) -> Option<String> {
        let place = match name {
            Name::Metadata(member) => member - 1,
            Name::Daemon(daemon) => self.members + daemon - 1,
        };
        self.metrics.then(|| self.at(self.service_ports() + place))
    }

    /// Names of all processes, in the order in which they start.
    pub fn names(&self) -> Vec<Name> {
        let members = (1..=self.members).map(Name::Metadata);
        members
            .chain((1..=self.daemons).map(Name::Daemon))
            .collect()
    }
}

/// A process of the cluster: `metadata-1`, `daemon-2`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Name {
    /// A metadata member.
    Metadata(u32),
    /// A storage daemon.
    Daemon(u32),
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Metadata(n) => write!(f, "metadata-{n}"),
            Self::Daemon(n) => write!(f, "daemon-{n}"),
        }
    }
}

impl std::str::FromStr for Name {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |t: &str| t.parse::<u32>().ok().filter(|n| *n >= 1);
        if let Some(n) = text.strip_prefix("metadata-").and_then(number) {
            return Ok(Self::Metadata(n));
        }
        if let Some(n) = text.strip_prefix("daemon-").and_then(number) {
            return Ok(Self::Daemon(n));
        }
        Err(format!(
            "{text:?} is not a process; write for instance metadata-1 or daemon-2"
        ))
    }
}

/// The state file's contents.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// What the cluster is made of.
    pub spec: Spec,
    /// The processes as they were started last, by name.
    pub processes: BTreeMap<String, ProcessRecord>,
}

impl State {
    /// A cluster without processes yet.
    pub fn new(spec: Spec) -> Self {
        Self {
            format: FORMAT,
            spec,
            processes: BTreeMap::new(),
        }
    }

    fn path(directory: &Path) -> PathBuf {
        directory.join("cluster.json")
    }

    /// Reads the state in a directory; `None` if there is no cluster.
    pub fn load(directory: &Path) -> Result<Option<Self>> {
        let path = Self::path(directory);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => {
                return Err(CliError::error(format!(
                    "cannot read {}: {e}",
                    path.display()
                )));
            }
        };
        let state: Self = serde_json::from_str(&text)
            .context(|| format!("understand {}", path.display()))
            .map_err(|e| e.hint("it was made by another version, or is damaged: stop the processes by hand and delete the directory"))?;
        if state.format != FORMAT {
            return Err(CliError::error(format!(
                "{} has format {}, this ashlar reads {FORMAT}",
                path.display(),
                state.format
            ))
            .hint("use the ashlar that made it, or `ashlar dev down --purge` with that one"));
        }
        Ok(Some(state))
    }

    /// Reads the state of a cluster that must exist.
    pub fn load_existing(directory: &Path) -> Result<Self> {
        Self::load(directory)?.ok_or_else(|| {
            CliError::not_found(format!(
                "there is no development cluster in {}",
                directory.display()
            ))
            .hint("start one with `ashlar dev up`, or say where it is with --dir")
        })
    }

    /// Replaces the state in a directory.
    pub fn save(&self, directory: &Path) -> Result<()> {
        let path = Self::path(directory);
        let doing = || format!("write {}", path.display());
        let text = serde_json::to_string_pretty(self).context(doing)?;
        let mut file = tempfile::NamedTempFile::new_in(directory).context(doing)?;
        file.write_all(text.as_bytes()).context(doing)?;
        file.persist(&path).context(doing)?;
        Ok(())
    }
}

/// Makes the directory and holds its lock until dropped.
pub fn lock(directory: &Path) -> Result<File> {
    let doing = || format!("use the directory {}", directory.display());
    std::fs::create_dir_all(directory).context(doing)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(directory.join("lock"))
        .context(doing)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).context(doing)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn spec() -> Spec {
        Spec {
            members: 3,
            daemons: 2,
            disks_per_daemon: 2,
            disk_size_bytes: 1 << 30,
            base_port: 21000,
            address: loopback(),
            metrics: true,
            replace_after_seconds: None,
        }
    }

    #[test]
    fn no_two_addresses_are_the_same() {
        let spec = spec();
        let mut all = spec.member_addresses();
        for daemon in 1..=spec.daemons {
            all.push(spec.admin_address(daemon));
            all.push(spec.data_address(daemon));
        }
        all.extend(
            spec.names()
                .into_iter()
                .filter_map(|n| spec.metrics_address(n)),
        );
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(spec.data_address(2), "127.0.0.1:21011");
        let first = spec.metrics_address(Name::Metadata(1));
        assert_eq!(first.as_deref(), Some("127.0.0.1:21017"));
        assert_eq!(21011 + spec.disks_per_daemon + SPARE_PORTS, 21017);
        let last = spec.metrics_address(Name::Daemon(2));
        assert_eq!(last.as_deref(), Some("127.0.0.1:21021"));
        assert_eq!(spec.port_count(), 22);
    }

    #[test]
    fn a_cluster_that_was_made_without_metrics_goes_on_without() {
        let mut old = serde_json::to_value(spec()).unwrap();
        old.as_object_mut().unwrap().remove("metrics");
        let spec: Spec = serde_json::from_value(old).unwrap();
        assert_eq!(spec.metrics_address(Name::Daemon(1)), None);
        assert_eq!(spec.port_count(), 17);
    }

    #[test]
    fn the_state_comes_back_as_it_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(State::load(directory.path()).unwrap(), None);
        let mut state = State::new(spec());
        state.processes.insert(
            "daemon-1".into(),
            ProcessRecord {
                pid: 7,
                start_ticks: 8,
                boot_id: "b".into(),
                started_unix_ms: 9,
            },
        );
        state.save(directory.path()).unwrap();
        assert_eq!(State::load(directory.path()).unwrap(), Some(state));
        std::fs::write(directory.path().join("cluster.json"), "{}").unwrap();
        assert!(State::load(directory.path()).is_err());
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in spec().names() {
            assert_eq!(name.to_string().parse::<Name>().unwrap(), name);
        }
        assert!("daemon-0".parse::<Name>().is_err());
        assert!("disk-1".parse::<Name>().is_err());
    }
}
