//! The jobs that every target runs, and what is read off them.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::fio::{self, Target};
use ashlar_bench::machine;

/// One job.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Its name in files and JSON.
    pub id: &'static str,
    rw: &'static str,
    block_size: &'static str,
    depth: u32,
    /// A flush (raw: fdatasync) after each write.
    flush: bool,
}

/// All jobs, in the order in which they run.
pub const JOBS: [Job; 7] = [
    Job::new("write-4k-1", "randwrite", "4k", 1),
    Job::new("write-4k-32", "randwrite", "4k", 32),
    Job::new("read-4k-1", "randread", "4k", 1),
    Job::new("read-4k-32", "randread", "4k", 32),
    Job::new("write-1m-8", "write", "1M", 8),
    Job::new("read-1m-8", "read", "1M", 8),
    Job {
        flush: true,
        ..Job::new("write-flush-4k-1", "randwrite", "4k", 1)
    },
];

impl Job {
    const fn new(id: &'static str, rw: &'static str, block_size: &'static str, depth: u32) -> Self {
        Self {
            id,
            rw,
            block_size,
            depth,
            flush: false,
        }
    }

    fn options(&self, target: &Target, bytes: u64, seconds: u64) -> Vec<String> {
        let mut options = target.options();
        options.extend([
            format!("--name={}", self.id),
            format!("--rw={}", self.rw),
            format!("--bs={}", self.block_size),
            format!("--iodepth={}", self.depth),
            format!("--size={bytes}"),
            format!("--runtime={seconds}"),
            "--time_based".into(),
            "--norandommap".into(),
        ]);
        if self.flush {
            // fio's nbd engine sends a flush for fsync and knows no fdatasync.
            let option = if matches!(target, Target::File(_)) {
                "--fdatasync=1"
            } else {
                "--fsync=1"
            };
            options.push(option.into());
        }
        options
    }

    /// Runs the job once.
    pub fn measure(
        &self,
        target: &Target,
        bytes: u64,
        seconds: u64,
        directory: &Path,
    ) -> Result<Measurement> {
        let busy = machine::busy_seconds()?;
        let jobs = fio::run(directory, self.id, &self.options(target, bytes, seconds))?;
        let busy = machine::busy_seconds()? - busy;
        let job = jobs.first().context("fio reported no job")?;
        let direction = if self.rw.ends_with("read") {
            &job.read
        } else {
            &job.write
        };
        anyhow::ensure!(
            direction.total_ios > 0,
            "{}: no operation was completed",
            self.id
        );
        Ok(Measurement {
            iops: direction.iops,
            mib_per_second: direction.bw_bytes / f64::from(1 << 20),
            latency_us: if self.flush {
                1e6 / direction.iops
            } else {
                direction.lat_ns.mean / 1e3
            },
            p99_us: direction
                .clat_ns
                .percentile
                .get("99.000000")
                .copied()
                .unwrap_or(0.0)
                / 1e3,
            cpu_us_per_op: busy * 1e6 / direction.total_ios as f64,
        })
    }
}

/// What one run of one job gave.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    /// Operations per second.
    pub iops: f64,
    /// MiB per second.
    pub mib_per_second: f64,
    /// Mean; of a write with its flush where there is one.
    pub latency_us: f64,
    /// 99th percentile, without the flush.
    pub p99_us: f64,
    /// CPU time of the whole machine per operation, fio's own included.
    pub cpu_us_per_op: f64,
}

/// The median of each number over the rounds.
pub fn median(rounds: &[Measurement]) -> Option<Measurement> {
    let of = |f: fn(&Measurement) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        if values.len() % 2 == 1 {
            values.get(middle).copied()
        } else {
            Some((values.get(middle.checked_sub(1)?)? + values.get(middle)?) / 2.0)
        }
    };
    Some(Measurement {
        iops: of(|m| m.iops)?,
        mib_per_second: of(|m| m.mib_per_second)?,
        latency_us: of(|m| m.latency_us)?,
        p99_us: of(|m| m.p99_us)?,
        cpu_us_per_op: of(|m| m.cpu_us_per_op)?,
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn at(value: f64) -> Measurement {
        Measurement {
            iops: value,
            mib_per_second: value,
            latency_us: value,
            p99_us: value,
            cpu_us_per_op: value,
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert!(median(&[]).is_none());
        assert_eq!(median(&[at(3.0), at(1.0), at(9.0)]).unwrap().iops, 3.0);
        assert_eq!(median(&[at(3.0), at(1.0)]).unwrap().latency_us, 2.0);
    }

    #[test]
    fn only_nbd_flushes_by_fsync() {
        let job = JOBS[6];
        let file = job.options(&Target::File("/x".into()), 1, 1);
        assert!(file.contains(&"--fdatasync=1".to_owned()));
        let nbd = job.options(
            &Target::Nbd {
                socket: "/x".into(),
                export: "v".into(),
            },
            1,
            1,
        );
        assert!(nbd.contains(&"--fsync=1".to_owned()));
    }
}
