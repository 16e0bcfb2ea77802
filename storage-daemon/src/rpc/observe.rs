//! What the daemon tells of its disks, collected at a scrape.
//!
//! Invariant: a scrape asks each disk's thread once, as a heartbeat does; nothing is counted for it on the
//! path of data.

use std::sync::Arc;

use ashlar_platform::observe::{Metric, Observer, Scrape, Value};

use crate::daemon::{Daemon, DiskReport};
use crate::metrics;

/// Lets an observer tell of this daemon.
pub fn observe(daemon: &Arc<Daemon>, observer: &Observer) {
    let asked = Arc::clone(daemon);
    observer.ready_when(move || asked.standing());
    let asked = Arc::clone(daemon);
    observer.on_scrape(move |scrape| {
        let daemon = Arc::clone(&asked);
        async move { collect(&daemon, &scrape).await }
    });
}

async fn collect(daemon: &Daemon, scrape: &Scrape) {
    let known = daemon.disk_count().await;
    let reports = daemon.reports().await;
    let failed = reports.iter().filter(|r| r.failure.is_some()).count();
    scrape.set(&metrics::REGISTERED, &[], daemon.standing().is_ok());
    scrape.set(&metrics::DISKS, &["served"], reports.len() - failed);
    scrape.set(&metrics::DISKS, &["failed"], failed);
    // One may have been added or removed meanwhile.
    scrape.set(
        &metrics::DISKS,
        &["silent"],
        known.saturating_sub(reports.len()),
    );
    for report in &reports {
        collect_disk(report, scrape);
    }
}

fn collect_disk(report: &DiskReport, scrape: &Scrape) {
    let (disk, path) = (report.disk.to_string(), report.path.display().to_string());
    let labels = [disk.as_str(), path.as_str()];
    let set = |metric: &Metric, value: Value| scrape.set(metric, &labels, value);
    set(&metrics::FAILED, report.failure.is_some().into());
    if report.status.identity.is_none() {
        // It was never open: there is nothing to say of what is on it.
        return;
    }
    let (store, counters) = (&report.status.store, &report.status.counters);
    set(&metrics::READS, counters.reads.into());
    set(&metrics::READ_BYTES, counters.read_bytes.into());
    set(&metrics::WRITES, counters.writes.into());
    set(&metrics::WRITTEN_BYTES, counters.write_bytes.into());
    set(&metrics::TRIMS, counters.trims.into());
    set(&metrics::FLUSHES, counters.flushes.into());
    set(&metrics::REPAIRS, counters.repairs.into());
    set(&metrics::BAD_BLOCKS, counters.bad_blocks.into());
    set(&metrics::PULLED_BLOCKS, counters.pull_blocks.into());
    set(&metrics::REPAIRED_BLOCKS, store.repaired_blocks.into());
    set(&metrics::SYNCS, store.syncs.into());
    set(&metrics::DISCARDED_BYTES, store.discarded_bytes.into());
    set(&metrics::LOG_BATCHES, store.batches.into());
    set(&metrics::WRITE_BACKS, store.write_backs.into());
    set(&metrics::CACHE_HITS, store.cache_hits.into());
    set(&metrics::CACHE_MISSES, store.cache_misses.into());
    set(&metrics::CAPACITY, store.capacity_bytes.into());
    set(&metrics::USED, store.used_bytes.into());
    set(&metrics::RESERVED, store.reserved_bytes.into());
    set(&metrics::LOG_SIZE, store.log_bytes.into());
    set(&metrics::LOG_USED, store.log_used_bytes.into());
    set(&metrics::REPLICAS, store.replicas.into());
    set(&metrics::QUEUED, store.queued_requests.into());
    set(&metrics::CONNECTIONS, report.status.connections.into());
    set(&metrics::INCARNATION, report.incarnation.into());
    for (reason, count) in [
        ("fenced", counters.refused_fenced),
        ("incarnation", counters.refused_incarnation),
        ("busy", counters.refused_busy),
        ("other", counters.refused_other),
    ] {
        scrape.set(&metrics::REFUSED, &[&disk, &path, reason], count);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::BTreeMap;

    use ashlar_proto::ids::{ClusterId, DiskId, Incarnation};

    use super::*;
    use crate::engine::EngineStatus;
    use crate::metrics::EngineCounters;
    use crate::store::{StoreIdentity, StoreStats};

    fn report() -> DiskReport {
        let disk = DiskId([7; 16]);
        DiskReport {
            disk,
            path: "/dev/a".into(),
            address: "127.0.0.1:1".into(),
            incarnation: 101,
            labels: BTreeMap::new(),
            failure: None,
            status: EngineStatus {
                layers: Vec::new(),
                identity: Some(StoreIdentity {
                    cluster: ClusterId([1; 16]),
                    disk,
                    incarnation: Incarnation(101),
                    incarnation_changed: false,
                    damaged: false,
                    bad_blocks: 0,
                }),
                store: StoreStats {
                    capacity_bytes: 201,
                    used_bytes: 202,
                    reserved_bytes: 203,
                    log_bytes: 204,
                    log_used_bytes: 205,
                    replicas: 206,
                    batches: 207,
                    syncs: 208,
                    discarded_bytes: 214,
                    write_backs: 209,
                    repaired_blocks: 210,
                    queued_requests: 211,
                    cache_hits: 212,
                    cache_misses: 213,
                    ..StoreStats::default()
                },
                counters: EngineCounters {
                    reads: 301,
                    read_bytes: 302,
                    writes: 303,
                    write_bytes: 304,
                    trims: 305,
                    flushes: 306,
                    repairs: 307,
                    refused_fenced: 308,
                    refused_incarnation: 309,
                    refused_busy: 310,
                    refused_other: 311,
                    bad_blocks: 312,
                    pull_blocks: 313,
                    ..EngineCounters::default()
                },
                connections: 401,
                failure: None,
                volumes: Vec::new(),
            },
        }
    }

    async fn shown(report: DiskReport) -> String {
        let observer = Observer::apart("storage-daemon", "0", metrics::ALL).unwrap();
        observer.on_scrape(move |scrape| {
            collect_disk(&report, &scrape);
            async {}
        });
        observer.render().await.unwrap()
    }

    #[tokio::test]
    async fn every_value_of_a_disk_has_its_series() {
        let report = report();
        let labels = format!("disk=\"{}\",path=\"/dev/a\"", report.disk);
        let text = shown(report).await;
        for (name, value) in [
            ("incarnation", 101),
            ("capacity_bytes", 201),
            ("used_bytes", 202),
            ("reserved_bytes", 203),
            ("log_bytes", 204),
            ("log_used_bytes", 205),
            ("replicas", 206),
            ("log_batches_total", 207),
            ("syncs_total", 208),
            ("discarded_bytes_total", 214),
            ("write_backs_total", 209),
            ("bad_blocks_repaired_total", 210),
            ("queued_requests", 211),
            ("cache_hits_total", 212),
            ("cache_misses_total", 213),
            ("reads_total", 301),
            ("read_bytes_total", 302),
            ("writes_total", 303),
            ("written_bytes_total", 304),
            ("trims_total", 305),
            ("flushes_total", 306),
            ("repairs_total", 307),
            ("bad_blocks_found_total", 312),
            ("pulled_blocks_total", 313),
            ("connections", 401),
            ("failed", 0),
        ] {
            let line = format!("ashlar_disk_{name}{{{labels}}} {value}");
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
        for (reason, value) in [
            ("fenced", 308),
            ("incarnation", 309),
            ("busy", 310),
            ("other", 311),
        ] {
            let line = format!(
                "ashlar_disk_refused_requests_total{{{labels},reason=\"{reason}\"}} {value}"
            );
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
    }

    #[tokio::test]
    async fn of_a_disk_that_was_never_open_only_its_failure_is_told() {
        let never = DiskReport {
            failure: Some("gone".into()),
            status: EngineStatus::default(),
            ..report()
        };
        let text = shown(never).await;
        assert!(text.contains("ashlar_disk_failed{") && text.contains("} 1\n"));
        assert!(!text.contains("ashlar_disk_capacity_bytes{"), "{text}");
    }
}
