//! fio's logs: what happened when.

use std::path::Path;

use anyhow::{Context as _, Result};

/// One line of a log. Times are milliseconds of the Unix epoch (`log_unix_epoch=1`).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sample {
    /// When the operation (or the window of operations) ended.
    pub time_ms: u64,
    /// Nanoseconds in a latency log, operations per second in an IOPS log.
    pub value: f64,
    /// 0 for a read, 1 for a write.
    pub direction: u8,
}

/// A named part of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Phase {
    /// From, in milliseconds of the Unix epoch.
    pub start_ms: u64,
    /// To.
    pub end_ms: u64,
}

impl Phase {
    /// Its length in seconds.
    pub fn seconds(self) -> f64 {
        self.end_ms.saturating_sub(self.start_ms) as f64 / 1000.0
    }
}

/// Reads a log.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    Ok(parse(&text))
}

/// Lines are `time, value, direction, block size, ...`; others are passed over.
fn parse(text: &str) -> Vec<Sample> {
    let line = |line: &str| {
        let mut fields = line.split(',').map(str::trim);
        Some(Sample {
            time_ms: fields.next()?.parse().ok()?,
            value: fields.next()?.parse().ok()?,
            direction: fields.next()?.parse().ok()?,
        })
    };
    text.lines().filter_map(line).collect()
}

/// The longest latency, in seconds, of operations that were under way during the phase.
pub fn longest(samples: &[Sample], phase: Phase) -> f64 {
    let under_way = |s: &&Sample| {
        let begun_ms = s.time_ms.saturating_sub((s.value / 1e6) as u64);
        s.time_ms >= phase.start_ms && begun_ms <= phase.end_ms
    };
    samples
        .iter()
        .filter(under_way)
        .map(|s| s.value / 1e9)
        .fold(0.0, f64::max)
}

/// The mean rate over the phase, from an IOPS log with windows: each value holds from the sample before
/// it (of the same direction) to its own time, so a stall counts as what it was.
pub fn mean_rate(samples: &[Sample], direction: u8, phase: Phase) -> f64 {
    let mut operations = 0.0;
    let mut previous: Option<u64> = None;
    for sample in samples.iter().filter(|s| s.direction == direction) {
        if let Some(from) = previous {
            let start = from.max(phase.start_ms);
            let end = sample.time_ms.min(phase.end_ms);
            if end > start {
                operations += sample.value * (end - start) as f64 / 1000.0;
            }
        }
        previous = Some(sample.time_ms);
    }
    let seconds = phase.seconds();
    if seconds > 0.0 {
        operations / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_operation_counts_in_every_phase_that_it_touches() {
        let samples = parse("1000, 1000000, 1, 4096\n3000, 1500000000, 1, 4096\nbroken\n");
        assert_eq!(samples.len(), 2);
        let at = |start_ms, end_ms| longest(&samples, Phase { start_ms, end_ms });
        assert_eq!(at(1400, 1600), 1.5);
        assert_eq!(at(2500, 4000), 1.5);
        assert_eq!(at(900, 1100), 0.001);
        assert_eq!(at(3100, 4000), 0.0);
    }

    #[test]
    fn a_stall_lowers_the_mean_rate() {
        let samples =
            parse("1000, 100, 1, 4096\n1100, 100, 1, 4096\n1100, 7, 0, 4096\n2100, 0, 1, 4096\n");
        let rate = mean_rate(
            &samples,
            1,
            Phase {
                start_ms: 1000,
                end_ms: 2000,
            },
        );
        assert!((rate - 10.0).abs() < 1e-9, "{rate}");
        assert_eq!(
            mean_rate(
                &samples,
                1,
                Phase {
                    start_ms: 5000,
                    end_ms: 5000
                }
            ),
            0.0
        );
    }
}
