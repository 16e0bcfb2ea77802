//! Every metric of this crate.
//!
//! Invariant: what happens per request is counted by the worker that serves it; everything else is
//! collected when somebody asks.

use std::sync::Arc;

use ashlar_platform::observe::{Metric, Observer, Scrape, Unit};

use crate::client::Host;
use crate::client::stats::VolumeStats;

/// Requests answered, by volume and operation.
pub const REQUESTS: Metric = Metric::counter(
    "ashlar_volume_requests_total",
    Unit::Count,
    &["volume", "operation"],
    "Requests of a volume's users that were answered",
);
/// Bytes moved for users.
pub const BYTES: Metric = Metric::counter(
    "ashlar_volume_bytes_total",
    Unit::Bytes,
    &["volume", "operation"],
    "Bytes that a volume's users have read and written",
);
/// Requests answered with an error.
pub const ERRORS: Metric = Metric::counter(
    "ashlar_volume_errors_total",
    Unit::Count,
    &["volume"],
    "Requests of a volume's users that were answered with an error",
);
/// Time to answer a request.
pub const REQUEST_SECONDS: Metric = Metric::seconds(
    "ashlar_volume_request_duration_seconds",
    &["volume", "operation"],
    "Time to answer a request of a volume's user",
);
/// Requests under way.
pub const IN_FLIGHT: Metric = Metric::gauge(
    "ashlar_volume_requests_in_flight",
    Unit::Count,
    &["volume"],
    "Requests of a volume's users that are under way",
);
/// The present stall.
pub const STALL: Metric = Metric::gauge(
    "ashlar_volume_stall_seconds",
    Unit::Seconds,
    &["volume"],
    "Time since anything was answered while requests are under way; 0 while none are",
);
/// Whether a volume is open.
pub const SERVING: Metric = Metric::gauge(
    "ashlar_volume_serving",
    Unit::Count,
    &["volume"],
    "1 while the volume is open and served by this process, 0 while it is being opened",
);
/// Connections of users.
pub const CONNECTIONS: Metric = Metric::gauge(
    "ashlar_volume_connections",
    Unit::Count,
    &["volume"],
    "NBD connections of a volume",
);
/// States of replicas.
pub const REPLICAS: Metric = Metric::gauge(
    "ashlar_volume_replicas",
    Unit::Count,
    &["volume", "state"],
    "Replicas of a volume in this state, as its holder knows them",
);
/// Replicas that were excluded.
pub const EXCLUSIONS: Metric = Metric::counter(
    "ashlar_volume_exclusions_total",
    Unit::Count,
    &["volume"],
    "Replicas that the holder excluded because they failed",
);
/// Replicas that have caught up.
pub const PROMOTIONS: Metric = Metric::counter(
    "ashlar_volume_promotions_total",
    Unit::Count,
    &["volume"],
    "Replicas that have caught up and count again",
);
/// Blocks that did not match their checksum.
pub const BAD_BLOCKS: Metric = Metric::counter(
    "ashlar_volume_bad_blocks_total",
    Unit::Count,
    &["volume", "outcome"],
    "Blocks that did not match their checksum, found and repaired",
);
/// Bytes acknowledged and not yet flushed.
pub const UNFLUSHED: Metric = Metric::gauge(
    "ashlar_volume_unflushed_bytes",
    Unit::Bytes,
    &["volume"],
    "Bytes that are acknowledged and not yet flushed to all replicas' devices",
);
/// Attachments of this node.
pub const ATTACHMENTS: Metric = Metric::gauge(
    "ashlar_node_attachments",
    Unit::Count,
    &["state"],
    "Volumes that are devices of this node, by state",
);
/// Time of attach and detach.
pub const OPERATION_SECONDS: Metric = Metric::seconds(
    "ashlar_node_operation_duration_seconds",
    &["operation", "outcome"],
    "Time of an attach, a detach, or of taking a device back",
);
/// Connections that the kernel gave up.
pub const DEAD_CONNECTIONS: Metric = Metric::counter(
    "ashlar_node_dead_connections_total",
    Unit::Count,
    &[],
    "Connections of devices that the kernel gave up, because requests on them were not answered in time or this process ended",
);

/// All of them.
pub const ALL: &[Metric] = &[
    REQUESTS,
    BYTES,
    ERRORS,
    REQUEST_SECONDS,
    IN_FLIGHT,
    STALL,
    SERVING,
    CONNECTIONS,
    REPLICAS,
    EXCLUSIONS,
    PROMOTIONS,
    BAD_BLOCKS,
    UNFLUSHED,
    ATTACHMENTS,
    OPERATION_SECONDS,
    DEAD_CONNECTIONS,
];

/// Collects the volumes' figures at each scrape.
pub fn observe(observer: &Arc<Observer>, host: &Host) {
    let host = host.clone();
    observer.on_scrape(move |scrape| {
        let host = host.clone();
        async move {
            for volume in host.stats(false).await.volumes {
                collect(&scrape, &volume);
            }
        }
    });
}

fn collect(scrape: &Scrape, v: &VolumeStats) {
    let name = v.name.as_str();
    for (operation, count) in [
        ("read", v.reads),
        ("write", v.writes.saturating_sub(v.discards)),
        ("flush", v.flushes),
        ("discard", v.discards),
    ] {
        scrape.set(&REQUESTS, &[name, operation], count);
    }
    scrape.set(&BYTES, &[name, "read"], v.read_bytes);
    scrape.set(&BYTES, &[name, "write"], v.written_bytes);
    scrape.set(&ERRORS, &[name], v.errors);
    scrape.set(&IN_FLIGHT, &[name], v.requests_in_flight as u64);
    scrape.set(&STALL, &[name], v.current_stall_us as f64 / 1e6);
    scrape.set(&SERVING, &[name], u64::from(v.serving));
    scrape.set(&CONNECTIONS, &[name], v.connections as u64);
    for state in ["in-sync", "rebuilding", "stale"] {
        let count = v.replicas.iter().filter(|r| r.state == state).count();
        scrape.set(&REPLICAS, &[name, state], count as u64);
    }
    scrape.set(&EXCLUSIONS, &[name], v.exclusions);
    scrape.set(&PROMOTIONS, &[name], v.promotions);
    scrape.set(&BAD_BLOCKS, &[name, "found"], v.bad_blocks_found);
    scrape.set(&BAD_BLOCKS, &[name, "repaired"], v.bad_blocks_repaired);
    scrape.set(&UNFLUSHED, &[name], v.retained_bytes);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::client::stats::ReplicaStats;

    #[test]
    fn the_reference_is_complete() {
        let reference = include_str!("../../docs/metrics.md");
        ashlar_platform::observe::check_reference(reference, "nbd-client", ALL)
            .unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    #[tokio::test]
    async fn a_volumes_figures_are_shown_under_its_name() {
        let observer = Observer::apart("nbd-client", "0", ALL).unwrap();
        let volume = VolumeStats {
            name: "data".into(),
            writes: 7,
            discards: 2,
            current_stall_us: 1_500_000,
            replicas: ["in-sync", "stale", "in-sync"]
                .map(|state| ReplicaStats {
                    state: state.into(),
                    ..ReplicaStats::default()
                })
                .to_vec(),
            ..VolumeStats::default()
        };
        observer.on_scrape(move |scrape| {
            collect(&scrape, &volume);
            std::future::ready(())
        });
        let text = observer.render().await.unwrap();
        for line in [
            r#"ashlar_volume_requests_total{volume="data",operation="write"} 5"#,
            r#"ashlar_volume_requests_total{volume="data",operation="discard"} 2"#,
            r#"ashlar_volume_stall_seconds{volume="data"} 1.5"#,
            r#"ashlar_volume_replicas{volume="data",state="in-sync"} 2"#,
            r#"ashlar_volume_replicas{volume="data",state="stale"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
