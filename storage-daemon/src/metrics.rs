//! Every counter of this daemon, and every metric made of them, in one place. Meanings and units are in
//! `docs/metrics.md`, too, which a test compares with this.
//!
//! Invariant: counters only grow while the process runs; they are kept by the disk's thread and copied
//! out on request (a heartbeat, GetStatus, a scrape), never shared.

use ashlar_platform::observe::{Metric, Unit};
use ashlar_proto::wire::{RequestBody, Status};

/// Counters of one disk's engine since the process started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EngineCounters {
    /// Read requests.
    pub reads: u64,
    /// Bytes asked for by them.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes of them.
    pub write_bytes: u64,
    /// Trims.
    pub trims: u64,
    /// Flushes.
    pub flushes: u64,
    /// Repairs.
    pub repairs: u64,
    /// Fences and configurations.
    pub fences: u64,
    /// Pings.
    pub pings: u64,
    /// Listings for reconciliation and rebuild.
    pub listings: u64,
    /// Requests refused because of their epoch.
    pub refused_fenced: u64,
    /// Requests refused because of their incarnation.
    pub refused_incarnation: u64,
    /// Requests refused because too much was under way.
    pub refused_busy: u64,
    /// Requests refused for other reasons.
    pub refused_other: u64,
    /// Connections that were closed because they broke the protocol.
    pub connections_refused: u64,
    /// Fences that had to wait for requests of a lower epoch.
    pub fences_waited: u64,
    /// Bad blocks that the store reported.
    pub bad_blocks: u64,
    /// Pulls started.
    pub pulls: u64,
    /// Pulls that failed.
    pub pulls_failed: u64,
    /// Blocks that pulls copied or removed.
    pub pull_blocks: u64,
}

impl EngineCounters {
    /// Counts an admitted request.
    pub fn count_request(&mut self, body: &RequestBody) {
        match body {
            RequestBody::Read(read) => {
                self.reads += 1;
                self.read_bytes += read.range.byte_len() as u64;
            }
            RequestBody::Write(write) => {
                self.writes += 1;
                self.write_bytes += write.range.byte_len() as u64;
            }
            RequestBody::Trim(_) => self.trims += 1,
            RequestBody::Flush(_) => self.flushes += 1,
            RequestBody::Repair(_) => self.repairs += 1,
            RequestBody::Fence(_) | RequestBody::Configure(_) => self.fences += 1,
            RequestBody::Ping => self.pings += 1,
            RequestBody::Collect(_) | RequestBody::Digest(_) | RequestBody::ChunkDigests(_) => {
                self.listings += 1;
            }
            RequestBody::Hello(_)
            | RequestBody::PullStart(_)
            | RequestBody::PullStatus { .. }
            | RequestBody::Layers(_) => {}
        }
    }

    /// Counts a refusal.
    pub fn count_refusal(&mut self, status: Status) {
        match status {
            Status::Fenced => self.refused_fenced += 1,
            Status::IncarnationMismatch => self.refused_incarnation += 1,
            Status::Busy => self.refused_busy += 1,
            _ => self.refused_other += 1,
        }
    }
}

/// Labels of everything about a disk: its id (all zeros where the superblock could not be read) and its path.
const DISK: &[&str] = &["disk", "path"];

/// Disks by state.
pub const DISKS: Metric = Metric::gauge(
    "ashlar_storage_disks",
    Unit::Count,
    &["state"],
    "Disks of this node by state: served, failed, or silent (being opened, or not answering now)",
);
/// Registration.
pub const REGISTERED: Metric = Metric::gauge(
    "ashlar_storage_registered",
    Unit::Count,
    &[],
    "1 where the last report to the metadata cluster was accepted and no disk is being opened, else 0",
);
/// Refusals.
pub const REFUSED: Metric = Metric::counter(
    "ashlar_disk_refused_requests_total",
    Unit::Count,
    &["disk", "path", "reason"],
    "Requests refused, by reason: fenced, incarnation, busy or other",
);
/// Read requests admitted.
pub const READS: Metric = Metric::counter(
    "ashlar_disk_reads_total",
    Unit::Count,
    DISK,
    "Read requests admitted",
);
/// Bytes that read requests asked for.
pub const READ_BYTES: Metric = Metric::counter(
    "ashlar_disk_read_bytes_total",
    Unit::Bytes,
    DISK,
    "Bytes that read requests asked for",
);
/// Write requests admitted.
pub const WRITES: Metric = Metric::counter(
    "ashlar_disk_writes_total",
    Unit::Count,
    DISK,
    "Write requests admitted",
);
/// Bytes of write requests.
pub const WRITTEN_BYTES: Metric = Metric::counter(
    "ashlar_disk_written_bytes_total",
    Unit::Bytes,
    DISK,
    "Bytes of write requests",
);
/// Trim requests admitted.
pub const TRIMS: Metric = Metric::counter(
    "ashlar_disk_trims_total",
    Unit::Count,
    DISK,
    "Trim requests admitted",
);
/// Flush requests admitted.
pub const FLUSHES: Metric = Metric::counter(
    "ashlar_disk_flushes_total",
    Unit::Count,
    DISK,
    "Flush requests admitted",
);
/// Repair requests admitted.
pub const REPAIRS: Metric = Metric::counter(
    "ashlar_disk_repairs_total",
    Unit::Count,
    DISK,
    "Repair requests admitted: bad blocks rewritten from another replica",
);
/// Blocks found unreadable or not matching their checksum.
pub const BAD_BLOCKS: Metric = Metric::counter(
    "ashlar_disk_bad_blocks_found_total",
    Unit::Count,
    DISK,
    "Blocks found unreadable or not matching their checksum",
);
/// Bad blocks repaired.
pub const REPAIRED_BLOCKS: Metric = Metric::counter(
    "ashlar_disk_bad_blocks_repaired_total",
    Unit::Count,
    DISK,
    "Bad blocks repaired",
);
/// Syncs (fdatasync) of the disk.
pub const SYNCS: Metric = Metric::counter(
    "ashlar_disk_syncs_total",
    Unit::Count,
    DISK,
    "Syncs (fdatasync) of the disk",
);
/// Bytes of free space given back to the device.
pub const DISCARDED_BYTES: Metric = Metric::counter(
    "ashlar_disk_discarded_bytes_total",
    Unit::Bytes,
    DISK,
    "Bytes of free space given back to the device by discards",
);
/// Batches written to the log.
pub const LOG_BATCHES: Metric = Metric::counter(
    "ashlar_disk_log_batches_total",
    Unit::Count,
    DISK,
    "Batches written to the log",
);
/// Bursts that moved blocks from the log to their pages.
pub const WRITE_BACKS: Metric = Metric::counter(
    "ashlar_disk_write_backs_total",
    Unit::Count,
    DISK,
    "Bursts that moved blocks from the log to their pages",
);
/// Page metadata found in the cache.
pub const CACHE_HITS: Metric = Metric::counter(
    "ashlar_disk_cache_hits_total",
    Unit::Count,
    DISK,
    "Page metadata found in the cache",
);
/// Page metadata read from the disk.
pub const CACHE_MISSES: Metric = Metric::counter(
    "ashlar_disk_cache_misses_total",
    Unit::Count,
    DISK,
    "Page metadata read from the disk",
);
/// Blocks that rebuilds copied to or removed from this disk.
pub const PULLED_BLOCKS: Metric = Metric::counter(
    "ashlar_disk_pulled_blocks_total",
    Unit::Count,
    DISK,
    "Blocks that rebuilds copied to or removed from this disk",
);
/// Bytes for data.
pub const CAPACITY: Metric = Metric::gauge(
    "ashlar_disk_capacity_bytes",
    Unit::Bytes,
    DISK,
    "Bytes for data",
);
/// Bytes in use or reserved.
pub const USED: Metric = Metric::gauge(
    "ashlar_disk_used_bytes",
    Unit::Bytes,
    DISK,
    "Bytes in use or reserved",
);
/// Bytes promised to blocks that are only in the log so far.
pub const RESERVED: Metric = Metric::gauge(
    "ashlar_disk_reserved_bytes",
    Unit::Bytes,
    DISK,
    "Bytes promised to blocks that are only in the log so far; part of the used bytes",
);
/// Size of the log.
pub const LOG_SIZE: Metric = Metric::gauge(
    "ashlar_disk_log_bytes",
    Unit::Bytes,
    DISK,
    "Size of the log",
);
/// Bytes of the log in use.
pub const LOG_USED: Metric = Metric::gauge(
    "ashlar_disk_log_used_bytes",
    Unit::Bytes,
    DISK,
    "Bytes of the log in use",
);
/// Replicas on the disk.
pub const REPLICAS: Metric = Metric::gauge(
    "ashlar_disk_replicas",
    Unit::Count,
    DISK,
    "Replicas on the disk",
);
/// Requests that wait for room in the log or for page metadata.
pub const QUEUED: Metric = Metric::gauge(
    "ashlar_disk_queued_requests",
    Unit::Count,
    DISK,
    "Requests that wait for room in the log or for page metadata",
);
/// Connections of clients and of other daemons.
pub const CONNECTIONS: Metric = Metric::gauge(
    "ashlar_disk_connections",
    Unit::Count,
    DISK,
    "Connections of clients and of other daemons",
);
/// Incarnation of the store.
pub const INCARNATION: Metric = Metric::gauge(
    "ashlar_disk_incarnation",
    Unit::Count,
    DISK,
    "Incarnation of the store; it grows when something durable may have been lost",
);
/// 1 where the disk is not served because it failed or cannot be opened.
pub const FAILED: Metric = Metric::gauge(
    "ashlar_disk_failed",
    Unit::Count,
    DISK,
    "1 where the disk is not served because it failed or cannot be opened, else 0",
);

/// All of them.
pub const ALL: &[Metric] = &[
    DISKS,
    REGISTERED,
    REFUSED,
    READS,
    READ_BYTES,
    WRITES,
    WRITTEN_BYTES,
    TRIMS,
    FLUSHES,
    REPAIRS,
    BAD_BLOCKS,
    REPAIRED_BLOCKS,
    SYNCS,
    DISCARDED_BYTES,
    LOG_BATCHES,
    WRITE_BACKS,
    CACHE_HITS,
    CACHE_MISSES,
    PULLED_BLOCKS,
    CAPACITY,
    USED,
    RESERVED,
    LOG_SIZE,
    LOG_USED,
    REPLICAS,
    QUEUED,
    CONNECTIONS,
    INCARNATION,
    FAILED,
];

#[cfg(test)]
mod tests {
    #[test]
    fn the_reference_is_complete() {
        let reference = include_str!("../../docs/metrics.md");
        ashlar_platform::observe::check_reference(reference, "storage-daemon", super::ALL)
            .unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}
