//! The life of a development cluster: made, started, watched until it is ready, stopped, deleted.

use std::io::Write as _;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ashlar_proto::rpc::metadata as pb;
use rustix::process::Signal;

use crate::client::Metadata;
use crate::dev::process::{self, Condition, ProcessRecord};
use crate::dev::state::{Name, Spec, State};
use crate::error::{CliError, Context as _, Result};

/// Ports are looked for from here; below the kernel's range for outgoing connections (32768), so that a
/// port stays free while its process is down.
const PORT_FIRST: u16 = 20_000;
/// Ports are looked for up to here.
const PORT_LAST: u16 = 32_000;
/// How long a process may take to end by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the kernel may take to end a killed process.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two looks whether the cluster is ready.
const READY_POLL: Duration = Duration::from_millis(50);
/// Lines of a log that an error shows.
const LOG_LINES: usize = 8;

/// A development cluster and where it lives. Whoever has one holds the directory's lock.
#[derive(Debug)]
pub struct DevCluster {
    directory: PathBuf,
    /// What the state file says.
    pub state: State,
    /// Write all of each new disk file before it is formatted.
    pub preallocate: bool,
    _lock: std::fs::File,
}

impl DevCluster {
    /// The cluster in a directory, which must exist.
    pub fn open(directory: &Path) -> Result<Self> {
        State::load_existing(directory)?;
        let lock = crate::dev::state::lock(directory)?;
        let directory = directory
            .canonicalize()
            .context(|| format!("find {}", directory.display()))?;
        Ok(Self {
            state: State::load_existing(&directory)?,
            preallocate: false,
            directory,
            _lock: lock,
        })
    }

    /// The cluster in a directory; made by `spec` if there is none. `spec` gets the existing one.
    pub fn open_or_create(
        directory: &Path,
        spec: impl FnOnce(Option<&Spec>) -> Result<Spec>,
    ) -> Result<Self> {
        let lock = crate::dev::state::lock(directory)?;
        let directory = directory
            .canonicalize()
            .context(|| format!("find {}", directory.display()))?;
        let state = match State::load(&directory)? {
            Some(state) => {
                spec(Some(&state.spec))?;
                state
            }
            None => State::new(spec(None)?),
        };
        for part in ["logs", "disks"] {
            std::fs::create_dir_all(directory.join(part))
                .context(|| format!("make {}", directory.join(part).display()))?;
        }
        state.save(&directory)?;
        Ok(Self {
            directory,
            state,
            preallocate: false,
            _lock: lock,
        })
    }

    /// Where the cluster lives.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The log of a process.
    pub fn log(&self, name: Name) -> PathBuf {
        self.directory.join("logs").join(format!("{name}.log"))
    }

    /// The record of a process, whether it lives or not.
    pub fn record(&self, name: Name) -> Option<&ProcessRecord> {
        self.state.processes.get(&name.to_string())
    }

    /// What a process does.
    pub fn condition(&self, name: Name) -> Condition {
        self.record(name)
            .map_or(Condition::Stopped, ProcessRecord::condition)
    }

    /// Checks that a name belongs to the cluster.
    pub fn check_name(&self, name: Name) -> Result<()> {
        if self.state.spec.names().contains(&name) {
            return Ok(());
        }
        Err(CliError::not_found(format!("this cluster has no {name}"))
            .hint("`ashlar dev status` shows its processes"))
    }

    /// Starts a process if it is not alive; true if it was started.
    pub fn start(&mut self, name: Name) -> Result<bool> {
        self.check_name(name)?;
        if self.condition(name) != Condition::Stopped {
            return Ok(false);
        }
        let (program, mut arguments) = match name {
            Name::Metadata(n) => (process::sibling("metadata-raft")?, self.member_arguments(n)),
            Name::Daemon(n) => (
                process::sibling("storage-daemon")?,
                self.daemon_arguments(n)?,
            ),
        };
        if let Some(address) = self.state.spec.metrics_address(name) {
            arguments.extend(["--metrics".to_owned(), address]);
        }
        let record = process::spawn_detached(&program, &arguments, &self.log(name))?;
        self.state.processes.insert(name.to_string(), record);
        self.state.save(&self.directory)?;
        Ok(true)
    }

    fn member_arguments(&self, member: u32) -> Vec<String> {
        let spec = &self.state.spec;
        let bootstrap: Vec<String> = spec
            .member_addresses()
            .into_iter()
            .enumerate()
            .map(|(i, address)| format!("{}={address}", i + 1))
            .collect();
        let mut arguments = vec![
            "--id".into(),
            member.to_string(),
            "--listen".into(),
            spec.member_address(member),
            "--data".into(),
            self.directory
                .join(format!("metadata-{member}"))
                .display()
                .to_string(),
            "--bootstrap".into(),
            bootstrap.join(","),
        ];
        if let Some(seconds) = spec.replace_after_seconds {
            arguments.extend(["--replace-after".to_owned(), seconds.to_string()]);
        }
        arguments
    }

    fn daemon_arguments(&self, daemon: u32) -> Result<Vec<String>> {
        let spec = &self.state.spec;
        let mut arguments = vec![
            "serve".to_owned(),
            "--metadata".into(),
            spec.member_addresses().join(","),
            "--node-name".into(),
            format!("node-{daemon}"),
            "--data-dir".into(),
            self.directory
                .join(format!("daemon-{daemon}"))
                .display()
                .to_string(),
            "--admin-listen".into(),
            spec.admin_address(daemon),
            "--data-listen".into(),
            spec.data_address(daemon),
            // Each daemon stands for a machine of its own.
            "--local-sockets".into(),
            self.directory
                .join(format!("run/node-{daemon}"))
                .display()
                .to_string(),
        ];
        for disk in 1..=spec.disks_per_daemon {
            arguments.push("--disk".into());
            arguments.push(self.formatted_disk(daemon, disk)?.display().to_string());
        }
        Ok(arguments)
    }

    /// The path of a disk file, which is made and formatted if it is not there. It is formatted under
    /// another name first, so that a half-formatted file is never taken for a disk.
    fn formatted_disk(&self, daemon: u32, disk: u32) -> Result<PathBuf> {
        let path = self
            .directory
            .join("disks")
            .join(format!("daemon-{daemon}-disk-{disk}.img"));
        if path.exists() {
            return Ok(path);
        }
        let fresh = path.with_extension("new");
        let doing = || format!("format {}", path.display());
        if fresh.exists() {
            std::fs::remove_file(&fresh).context(doing)?;
        }
        if self.preallocate {
            write_zeros(&fresh, self.state.spec.disk_size_bytes).context(doing)?;
        }
        let output = Command::new(process::sibling("storage-daemon")?)
            .arg("format")
            .arg(&fresh)
            .arg("--size")
            .arg(self.state.spec.disk_size_bytes.to_string())
            .stdin(Stdio::null())
            .output()
            .context(doing)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(CliError::error(format!("cannot {}: {said}", doing())));
        }
        std::fs::rename(&fresh, &path).context(doing)?;
        Ok(path)
    }

    /// Signals one process, which must be alive.
    pub fn signal(&self, name: Name, signal: Signal) -> Result<()> {
        self.check_name(name)?;
        let record = self.record(name).filter(|r| r.is_alive());
        match record.map(|r| r.signal(signal)).transpose()? {
            Some(true) => Ok(()),
            _ => Err(CliError::conflict(format!("{name} does not run"))
                .hint(format!("start it with `ashlar dev start {name}`"))),
        }
    }

    /// Kills one process with SIGKILL and waits until it is gone.
    pub fn kill(&self, name: Name) -> Result<()> {
        self.signal(name, Signal::KILL)?;
        self.wait_gone(name, KILL_TIMEOUT)
    }

    fn wait_gone(&self, name: Name, timeout: Duration) -> Result<()> {
        let gone = self
            .record(name)
            .is_none_or(|r| r.wait_gone(Instant::now() + timeout));
        if gone {
            return Ok(());
        }
        Err(CliError::unavailable(format!(
            "{name} is still there after {timeout:?}"
        )))
    }

    /// Stops everything, the daemons before the metadata: first asked, then killed. Returns the names of
    /// those that had to be killed.
    pub fn stop_all(&self) -> Result<Vec<Name>> {
        let mut killed = Vec::new();
        let (members, daemons): (Vec<Name>, Vec<Name>) = self
            .state
            .spec
            .names()
            .into_iter()
            .partition(|n| matches!(n, Name::Metadata(_)));
        for group in [daemons, members] {
            let records: Vec<(Name, &ProcessRecord)> = group
                .into_iter()
                .filter_map(|n| self.record(n).map(|r| (n, r)))
                .collect();
            for (_, record) in &records {
                record.signal(Signal::TERM)?;
                // One that is paused would never see it.
                record.signal(Signal::CONT)?;
            }
            let deadline = Instant::now() + STOP_TIMEOUT;
            for (name, record) in records {
                if !record.wait_gone(deadline) {
                    record.signal(Signal::KILL)?;
                    self.wait_gone(name, KILL_TIMEOUT)?;
                    killed.push(name);
                }
            }
        }
        Ok(killed)
    }

    /// Deletes the cluster's files; its processes must be stopped. Other files stay, and the directory
    /// then, too.
    pub fn purge(self) -> Result<()> {
        let spec = &self.state.spec;
        if let Some(name) = spec
            .names()
            .into_iter()
            .find(|n| self.condition(*n) != Condition::Stopped)
        {
            return Err(CliError::conflict(format!(
                "{name} still runs; nothing is deleted"
            )));
        }
        let own = ["logs", "disks"].map(str::to_owned);
        for part in spec.names().iter().map(ToString::to_string).chain(own) {
            let path = self.directory.join(part);
            match std::fs::remove_dir_all(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(CliError::error(format!(
                        "cannot delete {}: {e}",
                        path.display()
                    )));
                }
                _ => {}
            }
        }
        for file in ["cluster.json", "lock"] {
            // The directory is kept if something is left in it, which the next line finds out.
            let _ = std::fs::remove_file(self.directory.join(file));
        }
        let _ = std::fs::remove_dir(&self.directory);
        Ok(())
    }

    /// A client of this cluster's metadata.
    pub fn metadata(&self, timeout: Duration) -> Result<Metadata> {
        Metadata::new(self.state.spec.member_addresses(), timeout)
    }

    /// Waits until a leader is known, and every daemon that runs is alive in the metadata with its disks.
    pub async fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut missing = "the metadata".to_owned();
        while Instant::now() < deadline {
            for name in self.state.spec.names() {
                if self.condition(name) == Condition::Stopped {
                    return Err(self.ended_early(name));
                }
            }
            match self.what_is_missing().await {
                Ok(None) => return Ok(()),
                Ok(Some(what)) => missing = what,
                Err(e) => missing = e.message,
            }
            tokio::time::sleep(READY_POLL).await;
        }
        Err(CliError::unavailable(format!(
            "after {timeout:?} the cluster is not ready: {missing}"
        ))
        .hint(format!(
            "the logs are in {}",
            self.directory.join("logs").display()
        )))
    }

    fn ended_early(&self, name: Name) -> CliError {
        let log = self.log(name);
        CliError::error(format!(
            "{name} ended; its last words:\n{}",
            process::log_tail(&log, LOG_LINES)
        ))
        .hint(format!("the whole log: {}", log.display()))
    }

    async fn what_is_missing(&self) -> Result<Option<String>> {
        let mut metadata = self.metadata(Duration::from_secs(2))?;
        let cluster = metadata.cluster().await?;
        if cluster.leader_id == 0 {
            return Ok(Some("no metadata leader yet".to_owned()));
        }
        let nodes = metadata.nodes().await?;
        let disks = metadata.disks().await?;
        for daemon in 1..=self.state.spec.daemons {
            let name = format!("node-{daemon}");
            let Some(node) = nodes.iter().find(|n| n.name == name && n.alive) else {
                return Ok(Some(format!("{name} is not alive yet")));
            };
            let alive = disks
                .iter()
                .filter(|d| d.node_id == node.node_id && d.alive)
                .count();
            if alive < self.state.spec.disks_per_daemon as usize {
                return Ok(Some(format!("{name} has {alive} disks so far")));
            }
        }
        Ok(None)
    }

    /// Which member leads, if one answers.
    pub async fn leader(&self) -> Option<pb::Cluster> {
        self.metadata(Duration::from_secs(2))
            .ok()?
            .cluster()
            .await
            .ok()
    }
}

/// Writes a file of zeros, so that its blocks are allocated and written. (Only allocating them would
/// leave unwritten extents, whose first write is slower than any later one.)
fn write_zeros(path: &Path, bytes: u64) -> std::io::Result<()> {
    const PIECE: usize = 1 << 20;
    let mut file = std::fs::File::create(path)?;
    let zeros = vec![0u8; PIECE];
    let mut left = bytes;
    while left > 0 {
        let length = left.min(PIECE as u64) as usize;
        file.write_all(&zeros[..length])?;
        left -= length as u64;
    }
    file.sync_all()
}

/// Finds a run of free ports.
pub fn free_ports(address: IpAddr, count: u32) -> Result<u16> {
    if let Err(error) = TcpListener::bind((address, 0)) {
        return Err(CliError::usage(format!(
            "cannot listen on {address}: {error}"
        )));
    }
    // Different users and runs start at different places, so that they rarely meet.
    let span = u32::from(PORT_LAST - PORT_FIRST);
    let start = std::process::id().wrapping_mul(97) % span;
    let count = u16::try_from(count).map_err(|_| CliError::usage("that needs too many ports"))?;
    let mut base = PORT_FIRST + start as u16;
    // Each round either finds a run or moves past a port that is taken, so two turns see everything.
    for _ in 0..2 * span {
        if u32::from(base) + u32::from(count) > u32::from(PORT_LAST) {
            base = PORT_FIRST;
        }
        match first_taken(address, base, count) {
            None => return Ok(base),
            Some(port) => base = port + 1,
        }
    }
    Err(
        CliError::unavailable(format!("no {count} free ports in a row"))
            .hint("choose them with --base-port"),
    )
}

/// The first port of a run that cannot be listened on.
pub fn first_taken(address: IpAddr, base: u16, count: u16) -> Option<u16> {
    (base..base.saturating_add(count)).find(|port| TcpListener::bind((address, *port)).is_err())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_taken_port_is_not_chosen() {
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let base = free_ports(loopback, 8).unwrap();
        assert!(first_taken(loopback, base, 8).is_none());
        let held = TcpListener::bind((loopback, base + 3)).unwrap();
        assert_eq!(first_taken(loopback, base, 8), Some(base + 3));
        drop(held);
        assert!(free_ports(IpAddr::from([192, 0, 2, 1]), 8).is_err());
    }
}
