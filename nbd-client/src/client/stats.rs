//! Statistics: JSON lines on a unix socket. Each line received is a command, `stats` or `reset` (stats,
//! and then the longest times start anew); each is answered by one line.

use std::path::Path;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::ReplicaState;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

use super::export::Export;
use super::links::Links;
use super::messages::ToWorker;
use super::worker_handle::WorkerSender;

/// Longest command line.
const COMMAND_MAX: u64 = 256;
/// Time for a worker to tell its statistics.
const STATS_TIMEOUT: Duration = Duration::from_secs(1);

/// One line of answer.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct Statistics {
    /// The process.
    pub pid: u32,
    /// Its volumes, in the order of the command line.
    pub volumes: Vec<VolumeStats>,
}

/// Figures of one volume since it was opened. Times are microseconds, sizes bytes.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct VolumeStats {
    /// Position on the command line.
    pub index: usize,
    /// Name.
    pub name: String,
    /// Identity.
    pub volume_id: String,
    /// Size.
    pub size_bytes: u64,
    /// Open and served.
    pub serving: bool,
    /// Epoch of the newest known configuration.
    pub epoch: u64,
    /// NBD connections.
    pub connections: usize,
    /// NBD requests under way.
    pub requests_in_flight: usize,
    /// Client reads answered.
    pub reads: u64,
    /// Client writes, trims and zeroes acknowledged.
    pub writes: u64,
    /// Client flushes answered.
    pub flushes: u64,
    /// Client trims and zeroes acknowledged (counted among the writes too).
    #[serde(default)]
    pub discards: u64,
    /// Client requests answered with an error.
    #[serde(default)]
    pub errors: u64,
    /// Bytes read by clients.
    pub read_bytes: u64,
    /// Bytes written by clients.
    pub written_bytes: u64,
    /// Longest time in which requests were under way and none was answered.
    pub longest_stall_us: u64,
    /// Time since anything was answered, while requests are under way.
    #[serde(default)]
    pub current_stall_us: u64,
    /// Longest time that an answered request took.
    pub longest_request_us: u64,
    /// Flushes started to bound retained writes.
    pub background_flushes: u64,
    /// Flushes for which no replica had to be asked.
    pub flushes_spared: u64,
    /// Replicas excluded.
    pub exclusions: u64,
    /// Rebuild targets promoted.
    pub promotions: u64,
    /// Blocks that did not match their checksum.
    pub bad_blocks_found: u64,
    /// Bad blocks rewritten from another replica.
    pub bad_blocks_repaired: u64,
    /// Blocks written by reconcile at open.
    pub blocks_reconciled: u64,
    /// Acknowledged writes replayed after power losses.
    pub writes_replayed: u64,
    /// Reads that waited for a lease or a write in flight.
    pub reads_delayed: u64,
    /// Blocks moved to rebuild targets, as far as reported.
    pub rebuild_blocks_moved: u64,
    /// Bytes of requests in flight.
    pub in_flight_bytes: u64,
    /// Bytes acknowledged and not yet flushed.
    pub retained_bytes: u64,
    /// How long requests took.
    #[serde(default)]
    pub latencies: Latencies,
    /// The replicas as last known.
    pub replicas: Vec<ReplicaStats>,
}

/// Upper bounds of the buckets of [`Histogram`], in microseconds; one more is above them.
pub const BUCKET_BOUNDS_US: [u64; 19] = [
    50, 100, 200, 350, 500, 750, 1_000, 2_000, 3_500, 5_000, 10_000, 20_000, 50_000, 100_000,
    250_000, 500_000, 1_000_000, 3_000_000, 10_000_000,
];

/// How long requests took.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct Histogram {
    /// Requests per bucket, not cumulative.
    pub buckets: [u64; BUCKET_BOUNDS_US.len() + 1],
    /// Sum of all times in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    /// Counts a request.
    pub fn record(&mut self, took: Duration) {
        let us = microseconds(took);
        let bucket = BUCKET_BOUNDS_US.partition_point(|bound| *bound < us);
        self.buckets[bucket] += 1;
        self.sum_us = self.sum_us.saturating_add(us);
    }
}

/// How long requests took, by what was asked.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct Latencies {
    /// Reads.
    pub read: Histogram,
    /// Writes.
    pub write: Histogram,
    /// Flushes.
    pub flush: Histogram,
    /// Trims and zeroes.
    pub discard: Histogram,
    /// Block status.
    pub status: Histogram,
}

/// A replica of a volume.
#[derive(Clone, Serialize, Deserialize, Debug, Default)]
pub struct ReplicaStats {
    /// Group.
    pub group: usize,
    /// Disk.
    pub disk_id: String,
    /// `in-sync`, `rebuilding` or `stale`.
    pub state: String,
    /// Whether this process has a connection to the disk.
    pub connected: bool,
}

/// Asks a running client for its statistics.
///
/// # Errors
/// If nobody answers on the socket.
pub async fn ask(socket: &Path, reset: bool) -> std::io::Result<Statistics> {
    let mut stream = UnixStream::connect(socket).await?;
    stream
        .write_all(if reset { b"reset\n" } else { b"stats\n" })
        .await?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).await?;
    Ok(serde_json::from_str(&line)?)
}

/// Serves one connection: `fetch` gets the statistics.
pub(super) async fn serve_connection<F>(stream: UnixStream, mut fetch: impl FnMut(bool) -> F)
where
    F: Future<Output = Statistics>,
{
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = String::new();
        match (&mut read).take(COMMAND_MAX).read_line(&mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let statistics = match line.trim() {
            "stats" => fetch(false).await,
            "reset" => fetch(true).await,
            _ => return,
        };
        let Ok(mut answer) = serde_json::to_vec(&statistics) else {
            return;
        };
        answer.push(b'\n');
        if write.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// Asks all workers.
pub(super) async fn collect_stats(senders: Vec<WorkerSender>, reset: bool) -> Statistics {
    let mut statistics = Statistics {
        pid: std::process::id(),
        volumes: Vec::new(),
    };
    for sender in senders {
        let (reply, answer) = oneshot::channel();
        if sender.send(ToWorker::Stats { reset, reply }).await
            && let Ok(Ok(volumes)) = tokio::time::timeout(STATS_TIMEOUT, answer).await
        {
            statistics.volumes.extend(volumes);
        }
    }
    statistics.volumes.sort_by_key(|v| v.index);
    statistics
}

/// The figures of a volume; `reset` starts its longest times anew.
pub(super) fn volume_stats(
    export: &mut Export,
    links: &Links,
    now: Time,
    reset: bool,
) -> VolumeStats {
    let s = export.engine().stats();
    let stall = export
        .requests
        .longest_stall
        .max(export.requests.current_stall(now));
    let request = export.requests.longest_request;
    if reset {
        export.requests.longest_stall = Duration::ZERO;
        export.requests.longest_request = Duration::ZERO;
    }
    let groups = export.view.iter().flat_map(|v| v.groups.iter().enumerate());
    let replicas = groups.flat_map(|(group, replicas)| {
        replicas.iter().map(move |r| ReplicaStats {
            group,
            disk_id: r.disk.to_string(),
            state: match r.state {
                ReplicaState::Stale => "stale",
                ReplicaState::Rebuilding => "rebuilding",
                ReplicaState::InSync => "in-sync",
            }
            .to_owned(),
            connected: links.is_up(r.disk),
        })
    });
    VolumeStats {
        index: export.index,
        name: export.info.name.clone(),
        volume_id: export.volume.to_string(),
        size_bytes: export.info.size_bytes,
        serving: export.serving,
        epoch: export.view.as_ref().map_or(0, |v| v.epoch.0),
        connections: export.peer_count(),
        requests_in_flight: export.requests.len(),
        reads: s.reads,
        writes: s.writes,
        flushes: s.flushes,
        discards: export.requests.discards,
        errors: export.requests.errors,
        read_bytes: s.read_bytes,
        written_bytes: s.written_bytes,
        longest_stall_us: microseconds(stall),
        current_stall_us: microseconds(export.requests.current_stall(now)),
        longest_request_us: microseconds(request),
        background_flushes: s.background_flushes,
        flushes_spared: s.flushes_spared,
        exclusions: s.exclusions,
        promotions: s.promotions,
        bad_blocks_found: s.bad_blocks_found,
        bad_blocks_repaired: s.bad_blocks_repaired,
        blocks_reconciled: s.blocks_reconciled,
        writes_replayed: s.writes_replayed,
        reads_delayed: s.reads_delayed,
        rebuild_blocks_moved: s.rebuild_blocks_moved,
        in_flight_bytes: s.in_flight_bytes,
        retained_bytes: s.retained_bytes,
        latencies: export.requests.latencies.clone(),
        replicas: replicas.collect(),
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
