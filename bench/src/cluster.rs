//! A development cluster and its clients, driven by the programs of this build.

use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// First bytes of every NBD server.
const NBD_MAGIC: &[u8; 8] = b"NBDMAGIC";
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(20);

/// The path of a program of this build, which lies beside this one.
pub fn program(name: &str) -> Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    if !path.is_file() {
        bail!(
            "{} is missing: build the whole workspace (`make build`)",
            path.display()
        );
    }
    Ok(path)
}

/// A cluster in a directory; stopped when dropped. Its data and logs stay then (to look at after an error)
/// until the next one is started there, unless [`Cluster::discard_data`] was called.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    ashlar: PathBuf,
    /// Addresses of the metadata members, with commas.
    pub metadata: String,
    keep: bool,
}

impl Cluster {
    /// Removes what an earlier run left in the directory, and starts a new cluster there.
    pub fn up(directory: &Path, options: &[&str]) -> Result<Self> {
        let mut cluster = Self {
            directory: directory.to_owned(),
            ashlar: program("ashlar")?,
            metadata: String::new(),
            keep: true,
        };
        cluster.ashlar(&["dev", "down", "--purge"])?;
        let mut arguments = vec!["dev", "up"];
        arguments.extend_from_slice(options);
        let view = cluster.ashlar(&arguments)?;
        let members = view["metadata"]
            .as_array()
            .context("dev up names no metadata")?;
        let members: Vec<&str> = members.iter().filter_map(Value::as_str).collect();
        cluster.metadata = members.join(",");
        Ok(cluster)
    }

    /// Runs the `ashlar` command and reads its JSON.
    pub fn ashlar(&self, arguments: &[&str]) -> Result<Value> {
        let output = Command::new(&self.ashlar)
            .env_remove("ASHLAR_METADATA")
            .args(["-o", "json", "--dir"])
            .arg(&self.directory)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {}", self.ashlar.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("ashlar {}: {}", arguments.join(" "), said.trim());
        }
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("the answer of ashlar {}", arguments.join(" ")))
    }

    /// Lets the data go when dropped: all is well, nobody needs to look at them.
    pub fn discard_data(&mut self) {
        self.keep = false;
    }

    /// The pids of the processes whose names start so.
    pub fn pids(&self, prefix: &str) -> Result<Vec<u32>> {
        let status = self.ashlar(&["dev", "status"])?;
        let processes = status["processes"].as_array().context("dev status")?;
        Ok(processes
            .iter()
            .filter(|p| p["name"].as_str().is_some_and(|n| n.starts_with(prefix)))
            .filter_map(|p| p["pid"].as_u64())
            .filter_map(|pid| u32::try_from(pid).ok())
            .collect())
    }

    /// The name of the process that leads the metadata, as in `metadata-2`.
    pub fn leader(&self) -> Result<String> {
        let status = self.ashlar(&["dev", "status"])?;
        match status["leader_id"].as_u64() {
            Some(id) if id > 0 => Ok(format!("metadata-{id}")),
            _ => bail!("the metadata has no leader"),
        }
    }

    /// Replicas of a volume that are in sync, and all.
    pub fn redundancy(&self, volume: &str) -> Result<(u64, u64)> {
        let shown = self.ashlar(&["volume", "show", volume])?;
        let number = |field: &str| shown[field].as_u64().context("volume show");
        Ok((number("replicas_in_sync")?, number("replicas_total")?))
    }

    /// Waits until all replicas of a volume are in sync; how long it took.
    pub fn wait_redundant(&self, volume: &str, limit: Duration) -> Result<Duration> {
        let start = Instant::now();
        loop {
            // The command may find no leader for a moment.
            if self
                .redundancy(volume)
                .is_ok_and(|(in_sync, total)| in_sync == total)
            {
                return Ok(start.elapsed());
            }
            if start.elapsed() > limit {
                bail!("{volume} is not fully redundant after {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Blocks that the last rebuild of a volume's replica on a node moved.
    pub fn blocks_moved(&self, volume: &str, node: &str) -> Result<u64> {
        let replicas = self.ashlar(&["replica", "list", volume])?;
        let replicas = replicas.as_array().context("replica list")?;
        let mut moved = 0;
        for replica in replicas.iter().filter(|r| r["node"].as_str() == Some(node)) {
            moved += replica["rebuild_blocks_moved"]
                .as_u64()
                .with_context(|| format!("{node} does not say how many blocks it moved"))?;
        }
        Ok(moved)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let arguments: &[&str] = if self.keep {
            &["dev", "down"]
        } else {
            &["dev", "down", "--purge"]
        };
        if let Err(e) = self.ashlar(arguments) {
            eprintln!("warning: {e:#}");
        }
    }
}

/// A process that is stopped when dropped: asked with SIGTERM, then killed.
#[derive(Debug)]
pub struct Server {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Server {
    /// Starts a program; what it says goes to `log`.
    pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Self> {
        let file = std::fs::File::create(log)?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            child,
            name,
            log: log.to_owned(),
        })
    }

    /// `nbd-client serve` for some (volume, socket), as on the machine of the first daemon: that one is
    /// reached over its unix socket, the others over TCP.
    pub fn nbd_client(
        cluster: &Cluster,
        exports: &[(String, PathBuf)],
        log: &Path,
    ) -> Result<Self> {
        let sockets = cluster.directory.join("run/node-1");
        let mut arguments = vec![
            "serve".to_owned(),
            "--metadata".into(),
            cluster.metadata.clone(),
            "--node".into(),
            "node-1".into(),
            "--local-sockets".into(),
            sockets.display().to_string(),
        ];
        for (volume, socket) in exports {
            let _ = std::fs::remove_file(socket);
            arguments.extend(["--volume".to_owned(), volume.clone()]);
            arguments.extend(["--socket".to_owned(), socket.display().to_string()]);
        }
        let mut server = Self::start(&program("nbd-client")?, &arguments, log)?;
        for (_, socket) in exports {
            server.wait_nbd(socket, Duration::from_secs(20))?;
        }
        Ok(server)
    }

    /// `csi-driver --mode controller` on a socket.
    pub fn csi_controller(cluster: &Cluster, socket: &Path, log: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let arguments = [
            "--mode".to_owned(),
            "controller".into(),
            "--metadata".into(),
            cluster.metadata.clone(),
            "--endpoint".into(),
            format!("unix://{}", socket.display()),
        ];
        let mut server = Self::start(&program("csi-driver")?, &arguments, log)?;
        server.wait_for(socket, Duration::from_secs(20), |s| {
            UnixStream::connect(s).is_ok()
        })?;
        Ok(server)
    }

    /// Waits until the socket greets as an NBD server does.
    pub fn wait_nbd(&mut self, socket: &Path, limit: Duration) -> Result<()> {
        self.wait_for(socket, limit, greets)
    }

    fn wait_for(
        &mut self,
        socket: &Path,
        limit: Duration,
        serves: fn(&Path) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}: {}", self.name, self.log_tail());
            }
            if serves(socket) {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
        bail!(
            "{} does not serve {} after {limit:?}: {}",
            self.name,
            socket.display(),
            self.log_tail()
        )
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(6)..].join("\n")
    }
}

fn greets(socket: &Path) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return false;
    };
    let mut magic = [0u8; 8];
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .is_ok()
        && stream.read_exact(&mut magic).is_ok()
        && &magic == NBD_MAGIC
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            // The child is not reaped yet, so the pid is still its own.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(POLL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
