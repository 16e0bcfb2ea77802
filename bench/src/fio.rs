//! Running fio and reading what it measured.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// What fio does its I/O on.
#[derive(Clone, Debug)]
pub enum Target {
    /// A file, O_DIRECT, by io_uring.
    File(PathBuf),
    /// An export on a unix socket, by fio's nbd engine.
    Nbd {
        /// The socket.
        socket: PathBuf,
        /// The export's name.
        export: String,
    },
}

impl Target {
    /// The options that name it.
    pub fn options(&self) -> Vec<String> {
        match self {
            Self::File(path) => vec![
                "--ioengine=io_uring".into(),
                "--direct=1".into(),
                format!("--filename={}", path.display()),
            ],
            Self::Nbd { .. } => vec!["--ioengine=nbd".into(), format!("--uri={}", self.uri())],
        }
    }

    /// The NBD URI; empty for a file.
    pub fn uri(&self) -> String {
        match self {
            Self::File(_) => String::new(),
            Self::Nbd { socket, export } => {
                format!("nbd+unix:///{export}?socket={}", socket.display())
            }
        }
    }
}

/// One direction of fio's result.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Direction {
    /// Operations.
    pub total_ios: u64,
    /// Operations per second.
    pub iops: f64,
    /// Bytes per second.
    pub bw_bytes: f64,
    /// Submission to completion.
    #[serde(default)]
    pub lat_ns: Latency,
    /// With percentiles.
    #[serde(default)]
    pub clat_ns: Latency,
}

/// A latency distribution, in nanoseconds.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Latency {
    /// Mean.
    pub mean: f64,
    /// By percentile, as in "99.000000".
    #[serde(default)]
    pub percentile: std::collections::BTreeMap<String, f64>,
}

/// One job's result.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Job {
    /// The first error number, 0 for none.
    pub error: i64,
    /// Errors that were counted and passed over.
    #[serde(default)]
    pub total_err: u64,
    /// Reads.
    pub read: Direction,
    /// Writes.
    pub write: Direction,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

/// Reads fio's JSON; lines before it are messages.
pub fn parse(text: &str) -> Result<Vec<Job>> {
    let start = text.find('{').context("fio wrote no JSON")?;
    let output: Output = serde_json::from_str(&text[start..]).context("fio's JSON")?;
    Ok(output.jobs)
}

/// A fio that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: PathBuf,
    messages: PathBuf,
}

/// What a finished fio left.
#[derive(Debug)]
pub struct Finished {
    /// Its jobs; empty if it wrote no result.
    pub jobs: Vec<Job>,
    /// Whether it exited with 0.
    pub success: bool,
    /// What it said on standard error.
    pub messages: String,
}

impl Running {
    /// Starts fio; its files are `directory/name.*`.
    pub fn start(directory: &Path, name: &str, options: &[String]) -> Result<Self> {
        let output = directory.join(format!("{name}.json"));
        let messages = directory.join(format!("{name}.messages"));
        // The JSON of an earlier run must not be taken for this one's.
        let _ = std::fs::remove_file(&output);
        let log = File::create(&messages)?;
        // Threads: a job that is a process of its own would outlive the one that is killed.
        let child = Command::new("fio")
            .arg("--thread")
            .arg("--output-format=json")
            .arg(format!("--output={}", output.display()))
            .args(options)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start fio (Debian: apt-get install fio)")?;
        Ok(Self {
            child,
            output,
            messages,
        })
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Result<Finished> {
        let status = self.child.wait()?;
        let messages = std::fs::read_to_string(&self.messages).unwrap_or_default();
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        let jobs = parse(&text).unwrap_or_default();
        Ok(Finished {
            jobs,
            success: status.success(),
            messages,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs fio to its end; an error if it fails.
pub fn run(directory: &Path, name: &str, options: &[String]) -> Result<Vec<Job>> {
    let finished = Running::start(directory, name, options)?.finish()?;
    let error = finished
        .jobs
        .iter()
        .any(|j| j.error != 0 || j.total_err != 0);
    if !finished.success || error || finished.jobs.is_empty() {
        let tail: Vec<&str> = finished.messages.lines().rev().take(10).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("fio {name} failed: {}", tail.join("\n"));
    }
    Ok(finished.jobs)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn messages_before_the_json_are_passed_over() {
        let text = r#"fio: a note
{"jobs":[{"jobname":"a","error":5,"read":{"total_ios":1,"iops":2.5,"bw_bytes":3,
"lat_ns":{"mean":4.0,"max":6}},"write":{"total_ios":0,"iops":0,"bw_bytes":0}}]}"#;
        let jobs = parse(text).unwrap();
        assert_eq!((jobs[0].error, jobs[0].read.total_ios), (5, 1));
        assert_eq!(jobs[0].read.lat_ns.mean, 4.0);
        assert!(parse("nothing").is_err());
    }

    #[test]
    fn an_export_is_named_by_its_uri() {
        let target = Target::Nbd {
            socket: "/run/a.sock".into(),
            export: "v".into(),
        };
        assert_eq!(target.uri(), "nbd+unix:///v?socket=/run/a.sock");
    }
}
