//! CPU time of the machine and of processes, and their memory, from /proc.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Clock ticks per second of /proc (USER_HZ, which is 100 on every Linux port that runs this).
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time that the whole machine has spent working, since boot.
///
/// # Errors
/// /proc cannot be read, or is not understood.
pub fn busy_seconds() -> Result<f64> {
    parse_busy(&std::fs::read_to_string("/proc/stat")?).context("/proc/stat")
}

/// user + nice + system + irq + softirq; not idle, iowait, steal, nor guest (which user contains).
fn parse_busy(text: &str) -> Option<f64> {
    let line = text.lines().find(|l| l.starts_with("cpu "))?;
    let fields: Vec<f64> = line
        .split_ascii_whitespace()
        .skip(1)
        .filter_map(|f| f.parse().ok())
        .collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields.as_slice() else {
        return None;
    };
    Some((user + nice + system + irq + softirq) / TICKS_PER_SECOND)
}

/// CPU time of one process with all its threads.
///
/// # Errors
/// It is gone.
pub fn process_seconds(pid: u32) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = &text[text.rfind(')').context("/proc/PID/stat")? + 1..];
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok());
    // Fields 14 and 15 of the file; the first here is field 3.
    let (user, system) = (ticks(11).context("utime")?, ticks(12).context("stime")?);
    Ok((user + system) / TICKS_PER_SECOND)
}

/// Resident memory of a process now.
///
/// # Errors
/// It is gone.
pub fn process_rss_bytes(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Open file descriptors of a process.
///
/// # Errors
/// It is gone, or belongs to another user.
pub fn process_descriptors(pid: u32) -> Result<usize> {
    let path = format!("/proc/{pid}/fd");
    Ok(std::fs::read_dir(&path).context(path)?.count())
}

/// CPU of the processes together over a time, as a share of one core.
///
/// # Errors
/// One of them is gone.
pub fn share_of_core(pids: &[u32], over: Duration) -> Result<f64> {
    let sum = || -> Result<f64> { pids.iter().map(|p| process_seconds(*p)).sum() };
    let (before, start) = (sum()?, Instant::now());
    std::thread::sleep(over);
    Ok((sum()? - before) / start.elapsed().as_secs_f64())
}

/// The load average of the last minute; what others do on the machine spoils the numbers.
pub fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_ascii_whitespace()
        .next()
        .and_then(|f| f.parse().ok())
        .unwrap_or(0.0)
}

/// What the machine is, for the report.
pub fn description() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .map_or("unknown CPU", |l| l.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cores} cores, Linux {}", kernel.trim())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn idle_and_waiting_are_not_work() {
        let text = "cpu  100 10 200 5000 700 5 15 9 3 0\ncpu0 1 1 1 1\n";
        assert_eq!(parse_busy(text), Some(3.3));
        assert_eq!(parse_busy("nothing"), None);
    }

    #[test]
    fn this_process_has_used_some_memory() {
        let pid = std::process::id();
        assert!(process_rss_bytes(pid).unwrap() > 100_000);
        assert!(process_seconds(pid).unwrap() >= 0.0);
        assert!(process_descriptors(pid).unwrap() >= 3);
    }
}
