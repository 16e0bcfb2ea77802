//! What every daemon tells of its process, read from /proc at a scrape.

use super::Scrape;
use super::metric::{Metric, Unit};

/// Which program this is.
const BUILD_INFO: Metric = Metric::gauge(
    "ashlar_build_info",
    Unit::Count,
    &["component", "version"],
    "Always 1; the labels say what runs",
);
/// Memory.
const RESIDENT_BYTES: Metric = Metric::gauge(
    "ashlar_process_resident_memory_bytes",
    Unit::Bytes,
    &[],
    "Resident memory of the process",
);
/// Threads.
const THREADS: Metric = Metric::gauge(
    "ashlar_process_threads",
    Unit::Count,
    &[],
    "Threads of the process",
);

/// What every daemon tells.
pub const PROCESS: &[Metric] = &[BUILD_INFO, RESIDENT_BYTES, THREADS];

pub(super) fn collect(scrape: &Scrape, component: &str, version: &str) {
    scrape.set(&BUILD_INFO, &[component, version], 1_u64);
    if let Some(bytes) = resident_bytes() {
        scrape.set(&RESIDENT_BYTES, &[], bytes);
    }
    if let Some(threads) = status("Threads:") {
        scrape.set(&THREADS, &[], threads);
    }
}

/// Resident memory of this process; `None` if /proc does not tell.
pub fn resident_bytes() -> Option<u64> {
    Some(status("VmRSS:")? * 1024)
}

fn status(name: &str) -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The number after a name in `/proc/self/status` (proc_pid_status(5)).
fn field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let status = "VmRSS:\t  1234 kB\nThreads:\t7\nx_ctxt:\tmany\n";
        assert_eq!(field(status, "VmRSS:"), Some(1234));
        assert_eq!(field(status, "Threads:"), Some(7));
        assert_eq!(field(status, "x_ctxt:"), None);
        assert_eq!(field(status, "VmSwap:"), None);
    }
}
