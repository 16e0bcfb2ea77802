//! A volume or a snapshot as this command's own NBD export: an `nbd-client` process on a private socket.
//!
//! Invariant: the process ends with this one, however this one ends.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use ashlar_cli::backup::nbd::NbdClient;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::dev::process::{log_tail, sibling};
use crate::error::{CliError, Context as _, Result};

/// Time for the export to come up: an open after a crash waits for leases and reconciles.
const START_MAX: Duration = Duration::from_secs(60);
/// Time for an orderly end: it drains, flushes and tells metadata.
const STOP_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);

/// What is exported.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// A snapshot, to be read.
    Snapshot {
        /// Its id.
        id: &'a str,
        /// Its name, which is the export's.
        name: &'a str,
    },
    /// A volume, by its name, to be written.
    Volume(&'a str),
}

/// A running export and a connection to it.
pub struct Export {
    child: Child,
    log: PathBuf,
    /// The connection.
    pub client: NbdClient,
    _directory: TempDir,
}

impl Export {
    /// Starts it.
    pub async fn start(metadata: &[String], what: What<'_>) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("ashlar-backup-")
            .tempdir()
            .context(|| "make a temporary directory".to_owned())?;
        let (socket, log) = (directory.path().join("nbd"), directory.path().join("log"));
        let file = std::fs::File::create(&log).context(|| "make a log file".to_owned())?;
        let (option, wanted, name) = match what {
            What::Snapshot { id, name } => ("--snapshot", id, name),
            What::Volume(name) => ("--volume", name, name),
        };
        let doing = || "start nbd-client".to_owned();
        let own = std::env::current_exe().context(doing)?;
        let mut child = Command::new(own)
            .arg("exec-bound")
            .arg("--")
            .arg(sibling("nbd-client")?)
            .args(["serve", "--metadata", &metadata.join(","), option, wanted])
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .context(doing)?;
        let deadline = Instant::now() + START_MAX;
        let client = loop {
            let refused = match NbdClient::connect(&socket, name).await {
                Ok(client) => break client,
                Err(e) => e,
            };
            let ended = child.try_wait().context(doing)?.is_some();
            if ended || Instant::now() >= deadline {
                return Err(CliError::error(format!(
                    "nbd-client does not serve {name}: {refused}; it says:\n{}",
                    log_tail(&log, 5)
                )));
            }
            tokio::time::sleep(POLL).await;
        };
        Ok(Self {
            child,
            log,
            client,
            _directory: directory,
        })
    }

    /// Ends it in order: a volume is closed cleanly then.
    pub async fn stop(self) -> Result<()> {
        let Self {
            mut child,
            log,
            client,
            _directory,
        } = self;
        client.disconnect().await;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // It may have ended by itself; the wait says how.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let ended = tokio::time::timeout(STOP_MAX, child.wait()).await;
        match ended {
            Ok(Ok(status)) if status.success() => Ok(()),
            _ => Err(CliError::error(format!(
                "nbd-client did not end in order; it says:\n{}",
                log_tail(&log, 5)
            ))),
        }
    }
}
