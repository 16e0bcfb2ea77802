//! A volume exported over NBD by a real nbd-client process.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::cluster::Cluster;
use super::tools::{binary, wait_until};

/// A running `nbd-client serve`; killed when dropped.
pub struct Export {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    volume: String,
}

impl Export {
    /// Serves a volume on a unix socket and waits until it answers.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn start(cluster: &Cluster, volume: &str) -> Self {
        Self::start_with(cluster, volume, volume, &[])
    }

    /// Like [`Export::start`] with a name of its own for socket and log, and further arguments.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn start_with(cluster: &Cluster, volume: &str, name: &str, args: &[&str]) -> Self {
        let socket = cluster.scratch(&format!("{name}.sock"));
        let export = Self::spawn(cluster, volume, name, &socket, args);
        let path = export.socket.clone();
        export.wait_ready(|| {
            super::NbdClient::connect_unix(&path, volume)
                .is_ok()
                .then_some(())
        })
    }

    /// Serves a snapshot on a unix socket, with a name of its own for socket and log.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn start_snapshot(cluster: &Cluster, snapshot: &str, name: &str) -> Self {
        let socket = cluster.scratch(&format!("{name}.sock"));
        let path = socket.to_str().expect("UTF-8 path").to_owned();
        let args = ["--snapshot", snapshot, "--socket", &path];
        let export = Self::spawn_raw(cluster, snapshot, name, &socket, &args);
        let connects = || super::NbdClient::connect_unix(&socket, snapshot).is_ok();
        export.wait_ready(|| connects().then_some(()))
    }

    /// Serves snapshots of different volumes, each on a unix socket `SNAPSHOT.sock` among the cluster's scratch files.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn start_snapshots(cluster: &Cluster, snapshots: &[String], name: &str) -> Self {
        let sockets: Vec<PathBuf> = snapshots
            .iter()
            .map(|s| cluster.scratch(&format!("{s}.sock")))
            .collect();
        let mut args = Vec::new();
        for (snapshot, socket) in snapshots.iter().zip(&sockets) {
            let socket = socket.to_str().expect("UTF-8 path");
            args.extend(["--snapshot", snapshot, "--socket", socket]);
        }
        let first = sockets.first().expect("a snapshot");
        let export = Self::spawn_raw(cluster, &snapshots[0], name, first, &args);
        let connects =
            |(s, path): (&String, &PathBuf)| super::NbdClient::connect_unix(path, s).is_ok();
        export.wait_ready(|| {
            let mut all = snapshots.iter().zip(&sockets);
            all.all(connects).then_some(())
        })
    }

    /// Serves a volume on a TCP address inside the cluster's network namespace.
    ///
    /// # Panics
    /// If the process says nothing of readiness within 20 s.
    pub fn start_tcp(
        cluster: &Cluster,
        volume: &str,
        name: &str,
        address: &str,
        args: &[&str],
    ) -> Self {
        let socket = cluster.scratch(&format!("{name}.sock"));
        let mut all = vec!["--volume", volume, "--listen", address];
        all.extend_from_slice(args);
        let export = Self::spawn_raw(cluster, volume, name, &socket, &all);
        let uri = format!("nbd://{address}/{volume}");
        let ready = || {
            let status = cluster
                .command(Path::new("nbdinfo"))
                .args(["--size", &uri])
                .stderr(Stdio::null())
                .stdout(Stdio::null())
                .status();
            status.is_ok_and(|s| s.success()).then_some(())
        };
        export.wait_ready(ready)
    }

    fn spawn(cluster: &Cluster, volume: &str, name: &str, socket: &Path, args: &[&str]) -> Self {
        let path = socket.to_str().expect("UTF-8 path").to_owned();
        let mut all = vec!["--volume", volume, "--socket", &path];
        all.extend_from_slice(args);
        Self::spawn_raw(cluster, volume, name, socket, &all)
    }

    fn spawn_raw(
        cluster: &Cluster,
        volume: &str,
        name: &str,
        socket: &Path,
        args: &[&str],
    ) -> Self {
        let log = cluster.scratch(&format!("{name}.log"));
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(&log)
            .expect("log");
        let child = cluster
            .command(&binary("nbd-client"))
            .args(["serve", "--metadata", &cluster.metadata()])
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("log"))
            .stderr(file)
            .spawn()
            .expect("nbd-client starts");
        Self {
            child,
            socket: socket.to_owned(),
            log,
            volume: volume.to_owned(),
        }
    }

    fn wait_ready(mut self, mut ready: impl FnMut() -> Option<()>) -> Self {
        let log = self.log.clone();
        wait_until("the export", Duration::from_secs(20), || {
            if let Ok(Some(status)) = self.child.try_wait() {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                panic!("nbd-client ended ({status}):\n{text}");
            }
            ready()
        });
        self
    }

    /// Path of the unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// NBD URI of the export.
    pub fn uri(&self) -> String {
        format!(
            "nbd+unix:///{}?socket={}",
            self.volume,
            self.socket.display()
        )
    }

    /// The process's log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends the process a signal.
    ///
    /// # Panics
    /// If it is gone; or, with SIGSTOP, if it has not stopped after 10 s.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("nbd-client is there");
        if signal == Signal::STOP {
            // Its threads stop one by one, and until then they answer.
            wait_until("nbd-client stops", Duration::from_secs(10), || {
                self.is_stopped().then_some(())
            });
        }
    }

    fn is_stopped(&self) -> bool {
        let tasks = format!("/proc/{}/task", self.child.id());
        std::fs::read_dir(tasks)
            .expect("nbd-client is there")
            .flatten()
            .all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ")
                    .is_some_and(|(_, rest)| rest.starts_with('T'))
            })
    }

    /// Ends the process with SIGKILL, as a crash would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends the process with SIGTERM (drain, flush, clean close).
    ///
    /// # Panics
    /// If it has not ended after 20 s.
    pub fn stop(mut self) -> std::process::ExitStatus {
        self.signal(Signal::TERM);
        wait_until("nbd-client ends", Duration::from_secs(20), || {
            self.child.try_wait().expect("its status")
        })
    }

    /// Waits until the process ends by itself.
    ///
    /// # Panics
    /// After `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> std::process::ExitStatus {
        wait_until("nbd-client ends by itself", limit, || {
            self.child.try_wait().expect("its status")
        })
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- nbd-client of {}:\n{}", self.volume, self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
