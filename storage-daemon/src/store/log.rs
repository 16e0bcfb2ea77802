//! The circular log in memory: which batches are in it, which are in flight, which are durable.
//!
//! Invariants:
//! - `tail batch .. head` is one contiguous circular run of `used` bytes; a batch never wraps.
//! - Batches complete in order: `completed` is the highest such that it and all before it are on the
//!   device, redirected data included. Acknowledgements follow `completed`.
//! - A batch is written durably only when all before it are durable and it names no fresh pages; then it is
//!   durable once it completes.
//! - `durable <= completed`; `marker <= durable` is the highest claim that a durable batch carries.
//! - What clients ask leaves `reserve` bytes free: write-back's own records always fit.

use std::collections::VecDeque;

use ashlar_platform::buffer::{AlignedBuffer, BufferPool};
use ashlar_proto::ids::BLOCK_SIZE;
use ashlar_proto::wire::WriteOutcome;
use bytes::Bytes;
use smallvec::SmallVec;

use super::api::StoreReply;
use crate::format::{BatchHeader, Record, RecordKind, encode_batch};

/// Most bytes of records in one batch's header (far below what the format allows).
pub(super) const RECORD_BYTES_MAX: usize = 128 * 1024;
/// Bytes of one data buffer of an open batch.
const DATA_BUFFER_BYTES: usize = 128 * 1024;

/// What is answered when a batch or a sync is done; small, since many wait at once.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Written(WriteOutcome),
    Other(Box<StoreReply>),
}

impl Answer {
    pub(super) fn into_reply(self) -> StoreReply {
        match self {
            Self::Done => StoreReply::Done,
            Self::Written(outcome) => StoreReply::Written(outcome),
            Self::Other(reply) => *reply,
        }
    }
}

/// An answer that waits for a batch.
#[derive(Debug)]
pub(super) struct Ack {
    pub(super) tag: u64,
    pub(super) answer: Answer,
    /// Wait for a sync as well.
    pub(super) durable: bool,
}

/// A batch in the log.
#[derive(Debug)]
pub(super) struct BatchInfo {
    pub(super) sequence: u64,
    /// Where it begins, relative to the log.
    pub(super) offset: u64,
    /// What it occupies, with what was skipped before it.
    pub(super) used: u64,
    pub(super) header_blocks: u32,
    pub(super) data_blocks: u32,
    pub(super) chain: u32,
    pub(super) records: Vec<Record>,
}

impl BatchInfo {
    pub(super) fn end(&self) -> u64 {
        self.offset + u64::from(self.header_blocks + self.data_blocks) * BLOCK_SIZE as u64
    }

    /// Where a data block is, relative to the log.
    pub(super) fn data_offset(&self, index: u32) -> u64 {
        self.offset + u64::from(self.header_blocks + index) * BLOCK_SIZE as u64
    }
}

/// The batch that collects records.
#[derive(Default)]
pub(super) struct OpenBatch {
    pub(super) records: Vec<Record>,
    pub(super) record_bytes: usize,
    pub(super) data: SmallVec<[AlignedBuffer; 4]>,
    pub(super) data_blocks: u32,
    /// Writes of redirected pages that are not done.
    pub(super) redirects: u32,
    pub(super) acks: Vec<Ack>,
    /// Holds something that a client asked for.
    pub(super) fresh: bool,
    /// Must be written even without records.
    pub(super) forced: bool,
}

impl OpenBatch {
    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty() && !self.forced
    }

    fn total_with(&self, record_bytes: usize, data_blocks: u32) -> u64 {
        let header = crate::format::header_blocks_for(self.record_bytes + record_bytes);
        (header as u64 + u64::from(self.data_blocks + data_blocks)) * BLOCK_SIZE as u64
    }
}

struct Flight {
    sequence: u64,
    pending: u32,
    /// Its write is on stable storage when it is done.
    durable: bool,
    acks: Vec<Ack>,
}

/// A batch to be written.
pub(super) struct Submission {
    pub(super) sequence: u64,
    /// Relative to the log.
    pub(super) offset: u64,
    pub(super) data: SmallVec<[Bytes; 4]>,
    /// To be written to stable storage.
    pub(super) durable: bool,
}

/// See the module.
pub(super) struct Log {
    pub(super) bytes: u64,
    pub(super) reserve: u64,
    pub(super) batches: VecDeque<BatchInfo>,
    pub(super) head: u64,
    pub(super) used: u64,
    pub(super) open: OpenBatch,
    /// Sequence that the open batch will have.
    pub(super) next_sequence: u64,
    pub(super) last_sequence: u64,
    pub(super) last_chain: u32,
    flights: VecDeque<Flight>,
    pub(super) completed: u64,
    pub(super) durable: u64,
    pub(super) marker: u64,
    claims: VecDeque<(u64, u64)>,
    /// Last batch with something that a client asked for.
    pub(super) last_fresh: u64,
    salt: u32,
    pool: BufferPool,
}

impl Log {
    pub(super) fn new(bytes: u64, salt: u32) -> Self {
        Self {
            bytes,
            reserve: bytes / 4,
            batches: VecDeque::new(),
            head: 0,
            used: 0,
            open: OpenBatch::default(),
            next_sequence: 1,
            last_sequence: 0,
            last_chain: 0,
            flights: VecDeque::new(),
            completed: 0,
            durable: 0,
            marker: 0,
            claims: VecDeque::new(),
            last_fresh: 0,
            salt,
            pool: BufferPool::new(8 << 20),
        }
    }

    fn placement(&self, total: u64) -> (u64, u64) {
        if self.head + total <= self.bytes {
            (self.head, 0)
        } else {
            (0, self.bytes - self.head)
        }
    }

    fn fits(&self, record_bytes: usize, data_blocks: u32, reserve: u64) -> bool {
        let total = self.open.total_with(record_bytes, data_blocks);
        let (_, waste) = self.placement(total);
        self.used + waste + total + reserve <= self.bytes
    }

    /// Whether the open batch can take this for a client.
    pub(super) fn admits(&self, record_bytes: usize, data_blocks: u32, batch_max: usize) -> bool {
        let large = self.open.total_with(record_bytes, data_blocks) > batch_max as u64;
        let full = self.open.record_bytes + record_bytes > RECORD_BYTES_MAX;
        if (large && self.open.data_blocks > 0) || (full && !self.open.records.is_empty()) {
            return false;
        }
        self.fits(record_bytes, data_blocks, self.reserve)
    }

    /// Whether a marker fits without what a write-back burst may need.
    pub(super) fn admits_marker(&self) -> bool {
        self.fits(0, 0, self.reserve / 2)
    }

    pub(super) fn flights(&self) -> usize {
        self.flights.len()
    }

    /// Adds a record without data; it is in the open batch, whose sequence is `next_sequence`.
    pub(super) fn push(&mut self, record: Record) {
        self.open.record_bytes += record.encoded_bytes();
        self.open.records.push(record);
    }

    /// Room for one block of data of the open batch.
    pub(super) fn push_block(&mut self, pieces: &[&[u8]]) {
        let spare = self.open.data.last().map_or(0, AlignedBuffer::spare);
        if spare < BLOCK_SIZE {
            self.open
                .data
                .push(self.pool.with_capacity(DATA_BUFFER_BYTES));
        }
        if let Some(buffer) = self.open.data.last_mut() {
            for piece in pieces {
                buffer.extend_from_slice(piece);
            }
        }
        self.open.data_blocks += 1;
    }

    /// Closes the open batch.
    pub(super) fn close(&mut self) -> Submission {
        let open = std::mem::take(&mut self.open);
        let header_blocks = crate::format::header_blocks_for(open.record_bytes) as u32;
        let total = u64::from(header_blocks + open.data_blocks) * BLOCK_SIZE as u64;
        let (offset, waste) = self.placement(total);
        assert!(
            self.used + waste + total <= self.bytes,
            "the log's reserve covers write-back"
        );
        let sequence = self.next_sequence;
        // Somebody waits for a sync, and everything that recovery needs before this batch is durable: one
        // durable write does what a write and a sync would. A fresh page is on the device before the batch closes
        // as often as not, but only a sync makes it last.
        let has_pages = |r: &Record| matches!(r.kind, RecordKind::Redirect { .. });
        let durable = self.durable == self.last_sequence
            && open.acks.iter().any(|a| a.durable)
            && !open.records.iter().any(has_pages);
        let header = BatchHeader {
            sequence,
            previous_sequence: self.last_sequence,
            previous_chain: self.last_chain,
            durable_sequence: self.durable,
            header_blocks,
            data_blocks: open.data_blocks,
            chain: 0,
        };
        let mut buffer = self.pool.with_capacity(header_blocks as usize * BLOCK_SIZE);
        buffer.resize(header_blocks as usize * BLOCK_SIZE);
        let chain = encode_batch(&mut buffer, &header, &open.records, self.salt);
        let mut data: SmallVec<[Bytes; 4]> = SmallVec::new();
        data.push(buffer.freeze());
        data.extend(open.data.into_iter().map(AlignedBuffer::freeze));
        self.batches.push_back(BatchInfo {
            sequence,
            offset,
            used: waste + total,
            header_blocks,
            data_blocks: open.data_blocks,
            chain,
            records: open.records,
        });
        if open.fresh {
            self.last_fresh = sequence;
        }
        self.claims.push_back((sequence, self.durable));
        self.flights.push_back(Flight {
            sequence,
            pending: 1 + open.redirects,
            durable,
            acks: open.acks,
        });
        self.used += waste + total;
        self.head = offset + total;
        self.last_sequence = sequence;
        self.last_chain = chain;
        self.next_sequence = sequence + 1;
        Submission {
            sequence,
            offset,
            data,
            durable,
        }
    }

    /// Attaches an answer to a batch; gives it back if the batch is complete.
    pub(super) fn ack_after(&mut self, batch: u64, ack: Ack) -> Option<Ack> {
        if batch == self.next_sequence {
            self.open.acks.push(ack);
            return None;
        }
        match self.flights.iter_mut().find(|f| f.sequence == batch) {
            Some(flight) => {
                flight.acks.push(ack);
                None
            }
            None => Some(ack),
        }
    }

    /// One write of a batch is done; returns the answers that are due, in order.
    pub(super) fn complete(&mut self, sequence: u64) -> Vec<Ack> {
        if sequence == self.next_sequence {
            self.open.redirects = self.open.redirects.saturating_sub(1);
            return Vec::new();
        }
        if let Some(flight) = self.flights.iter_mut().find(|f| f.sequence == sequence) {
            flight.pending = flight.pending.saturating_sub(1);
        }
        let mut due = Vec::new();
        while self.flights.front().is_some_and(|f| f.pending == 0) {
            if let Some(mut flight) = self.flights.pop_front() {
                self.completed = flight.sequence;
                if flight.durable {
                    self.synced(flight.sequence);
                }
                if due.is_empty() {
                    due = flight.acks;
                } else {
                    due.append(&mut flight.acks);
                }
            }
        }
        due
    }

    /// A sync that was submitted when `completed` was `covers` is done.
    pub(super) fn synced(&mut self, covers: u64) {
        self.durable = self.durable.max(covers);
        while let Some(&(sequence, claim)) = self.claims.front() {
            if sequence > self.durable {
                break;
            }
            self.marker = self.marker.max(claim);
            self.claims.pop_front();
        }
    }

    /// The highest claim of any batch, durable or not.
    pub(super) fn claimed(&self) -> u64 {
        self.claims.back().map_or(self.marker, |&(_, claim)| claim)
    }

    /// A batch that is in the log.
    pub(super) fn batch(&self, sequence: u64) -> Option<&BatchInfo> {
        let at = self.batches.partition_point(|b| b.sequence < sequence);
        self.batches.get(at).filter(|b| b.sequence == sequence)
    }

    /// Fresh pages that records of a replica name.
    pub(super) fn redirected_pages(&self, replica: u64) -> std::collections::BTreeSet<u32> {
        let records = self
            .batches
            .iter()
            .flat_map(|b| &b.records)
            .chain(&self.open.records);
        let pages = records
            .filter(|r| r.replica == replica)
            .filter_map(|r| match r.kind {
                RecordKind::Redirect { physical, .. } => Some(physical),
                _ => None,
            });
        pages.collect()
    }

    /// Frees batches up to and including `sequence`.
    pub(super) fn free_to(&mut self, sequence: u64) {
        while self.batches.front().is_some_and(|b| b.sequence <= sequence) {
            if let Some(b) = self.batches.pop_front() {
                self.used -= b.used;
            }
        }
    }

    /// Every answer that still waits.
    pub(super) fn drain_acks(&mut self) -> Vec<Ack> {
        let mut acks: Vec<Ack> = self.flights.drain(..).flat_map(|f| f.acks).collect();
        acks.append(&mut self.open.acks);
        acks
    }
}
