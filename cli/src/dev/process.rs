//! Starting processes that outlive the command, and signalling exactly those again.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::{CliError, Context as _, Result};

/// Pause between two looks at a process that is to end.
const POLL: Duration = Duration::from_millis(20);
/// Largest log file; a bigger one is set aside when its process starts.
const LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Identifies one run of one process, also when its pid is used again.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Its pid.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat.
    pub start_ticks: u64,
    /// Of the kernel under which it was started.
    pub boot_id: String,
    /// When, for people.
    pub started_unix_ms: u64,
}

/// What a process does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// It runs (or sleeps).
    Running,
    /// It is stopped by a signal.
    Paused,
    /// It is gone.
    Stopped,
}

struct ProcStat {
    state: char,
    start_ticks: u64,
}

/// Reads /proc/PID/stat. The name in parentheses may contain anything, so fields count from the last
/// parenthesis.
fn read_stat(pid: i32) -> Option<ProcStat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<ProcStat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3; the start time is field 22.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(ProcStat { state, start_ticks })
}

/// Whether threads besides the first one are there.
fn has_other_threads(pid: i32) -> bool {
    std::fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1)
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

impl ProcessRecord {
    fn of(pid: i32) -> Option<Self> {
        let stat = read_stat(pid)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Some(Self {
            pid,
            start_ticks: stat.start_ticks,
            boot_id: boot_id(),
            started_unix_ms: now.as_millis() as u64,
        })
    }

    /// What it does now.
    pub fn condition(&self) -> Condition {
        match read_stat(self.pid) {
            Some(stat) if stat.start_ticks == self.start_ticks && self.boot_id == boot_id() => {
                match stat.state {
                    // The first thread of a process that was killed may be a zombie while others still end
                    // and hold its sockets and files.
                    'Z' | 'X' if has_other_threads(self.pid) => Condition::Running,
                    'Z' | 'X' => Condition::Stopped,
                    'T' | 't' => Condition::Paused,
                    _ => Condition::Running,
                }
            }
            _ => Condition::Stopped,
        }
    }

    /// Whether it is there at all.
    pub fn is_alive(&self) -> bool {
        self.condition() != Condition::Stopped
    }

    /// Sends a signal; `Ok(false)` if the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<bool> {
        let Some(pid) = Pid::from_raw(self.pid).filter(|_| self.pid > 1) else {
            return Ok(false);
        };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(false);
        };
        // The descriptor now names one process for good: only then is its identity looked at.
        if !self.is_alive() {
            return Ok(false);
        }
        match pidfd_send_signal(&pidfd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(e) => Err(CliError::error(format!(
                "cannot signal process {}: {e}",
                self.pid
            ))),
        }
    }

    /// Waits until it is gone; false if it is still there at the deadline.
    pub fn wait_gone(&self, deadline: Instant) -> bool {
        while self.is_alive() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> Option<u64> {
        if !self.is_alive() {
            return None;
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
        line.trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<u64>()
            .ok()
            .map(|kib| kib * 1024)
    }
}

/// Finds a program of this build: beside the running executable.
pub fn sibling(program: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context(|| "find the running executable".to_owned())?;
    let path = own.with_file_name(program);
    if path.is_file() {
        return Ok(path);
    }
    Err(CliError::not_found(format!("{} is missing", path.display())).hint(
        "build all programs of the workspace: `cargo build --release --workspace` (or `make build`)",
    ))
}

/// Starts a program in a session of its own; its output goes to the end of `log`.
pub fn spawn_detached(program: &Path, arguments: &[String], log: &Path) -> Result<ProcessRecord> {
    let doing = || format!("start {}", program.display());
    if std::fs::metadata(log).is_ok_and(|m| m.len() > LOG_BYTES_MAX) {
        std::fs::rename(log, log.with_extension("log.old")).context(doing)?;
    }
    let output = File::options()
        .create(true)
        .append(true)
        .open(log)
        .context(doing)?;
    let own = std::env::current_exe().context(doing)?;
    // This program starts itself, which makes the session and then becomes the other program: the pid
    // stays the same, and no code runs between fork and exec.
    let mut child = Command::new(own)
        .arg("exec-detached")
        .arg("--")
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone().context(doing)?)
        .stderr(output)
        .spawn()
        .context(doing)?;
    let pid = i32::try_from(child.id()).context(doing)?;
    let record = ProcessRecord::of(pid)
        .ok_or_else(|| CliError::error(format!("cannot {}: it ended at once", doing())))?;
    // Reaps the child if it ends while this command still runs; afterwards init does.
    std::thread::spawn(move || child.wait());
    Ok(record)
}

/// The hidden command `exec-detached`: a new session, then the program. Returns only on failure.
pub fn exec_detached(command: &[String]) -> CliError {
    let Some((program, arguments)) = command.split_first() else {
        return CliError::usage("no program is given");
    };
    // Fails only if this process leads a group already; then it has what it needs.
    let _ = rustix::process::setsid();
    let error = Command::new(program).args(arguments).exec();
    CliError::error(format!("cannot start {program}: {error}"))
}

/// The hidden command `exec-bound`: the program gets SIGTERM when the process that started this one ends.
/// Returns only on failure.
pub fn exec_bound(command: &[String]) -> CliError {
    let Some((program, arguments)) = command.split_first() else {
        return CliError::usage("no program is given");
    };
    let parent = rustix::process::getppid();
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::TERM)) {
        return CliError::error(format!("cannot bind {program} to its starter: {error}"));
    }
    // It may have ended just before.
    if rustix::process::getppid() != parent {
        return CliError::error(format!("who wanted {program} is gone"));
    }
    let error = Command::new(program).args(arguments).exec();
    CliError::error(format!("cannot start {program}: {error}"))
}

/// The last lines of a log, for an error message.
pub fn log_tail(log: &Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_confuse_the_fields() {
        let text = "12 (a) b (c)) S 1 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.state, stat.start_ticks), ('S', 98765));
        assert!(parse_stat("").is_none());
        assert!(parse_stat("1 (x) S 2").is_none());
    }

    #[test]
    fn a_process_with_another_start_time_is_not_signalled() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let record = ProcessRecord::of(child.id() as i32).unwrap();
        let foreign = ProcessRecord {
            start_ticks: record.start_ticks + 1,
            ..record.clone()
        };
        assert!(!foreign.signal(Signal::KILL).unwrap());
        let other_boot = ProcessRecord {
            boot_id: "other".into(),
            ..record.clone()
        };
        assert!(!other_boot.signal(Signal::KILL).unwrap());
        assert!(record.is_alive());
        assert!(record.signal(Signal::STOP).unwrap());
        let deadline = Instant::now() + Duration::from_secs(5);
        while record.condition() != Condition::Paused && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        assert_eq!(record.condition(), Condition::Paused);
        assert!(record.signal(Signal::KILL).unwrap());
        child.wait().unwrap();
        assert!(!record.signal(Signal::KILL).unwrap());
        assert_eq!(record.condition(), Condition::Stopped);
    }

    #[test]
    fn a_process_is_there_until_its_last_thread_is_gone() {
        // The first thread ends by the system call `exit`, the other one stays.
        let script = "import ctypes, platform, threading, time\n\
            threading.Thread(target=time.sleep, args=(60,)).start()\n\
            ctypes.CDLL(None).syscall(60 if platform.machine() == 'x86_64' else 93, 0)";
        let mut child = Command::new("python3")
            .args(["-c", script])
            .spawn()
            .expect("python3 is installed (.ci/install-tools.sh)");
        let record = ProcessRecord::of(child.id() as i32).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while read_stat(record.pid).unwrap().state != 'Z' && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
        assert_eq!(read_stat(record.pid).unwrap().state, 'Z');
        assert_eq!(record.condition(), Condition::Running);
        assert!(record.signal(Signal::KILL).unwrap());
        assert!(record.wait_gone(Instant::now() + Duration::from_secs(10)));
        child.wait().unwrap();
    }

    #[test]
    fn nobody_signals_init() {
        let record = ProcessRecord::of(1).unwrap();
        assert!(!record.signal(Signal::CONT).unwrap());
    }
}
