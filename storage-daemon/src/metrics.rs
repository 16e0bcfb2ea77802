//! Every counter of this daemon, in one place.
//!
//! Invariant: counters only grow while the process runs; they are kept by the disk's thread and copied
//! out on request, never shared.

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
            RequestBody::Hello(_) | RequestBody::PullStart(_) | RequestBody::PullStatus { .. } => {}
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
