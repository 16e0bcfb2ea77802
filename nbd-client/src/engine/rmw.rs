//! Writes of less than a block: read, modify, write (R3: block lock from read to acknowledgement).
//!
//! Invariants:
//! - Of the partial writes of one block, at most one is beyond waiting; they go in order of arrival.
//! - It draws its version when its read starts, and that is when no write in flight overlaps the block:
//!   what it reads contains every write below its own version, so nothing acknowledged is overwritten
//!   with old bytes. A whole-block write that arrives later has a higher version and supersedes it.
//! - Its read therefore waits for nothing: neither for acknowledgements (what is in flight now is
//!   newer) nor for a lease (its write is fenced like any).

use ashlar_proto::ids::{BLOCK_SIZE, BlockRange, Epoch, Version};
use ashlar_proto::wire::Payload;
use bytes::{Bytes, BytesMut};

use super::api::{ClientError, ReadSegment, ReadSegments};
use super::read::ReadOwner;
use super::session::Session;
use super::slots::Key;
use super::write::{Body, WriteOwner, checksums, range_at};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Waiting,
    Reading,
    Writing,
}

/// A partial write of one block.
#[derive(Debug)]
pub(super) struct Rmw {
    op: Key,
    range: BlockRange,
    /// First byte within the block.
    from: usize,
    patch: Payload,
    /// ZERO while waiting.
    version: Version,
    durable: bool,
    /// Of arrival.
    order: u64,
    state: State,
}

impl Rmw {
    /// Whether it has a version below an epoch and is not a write yet.
    pub(super) fn reads_below(&self, epoch: Epoch) -> bool {
        self.state == State::Reading && self.version.epoch < epoch
    }
}

impl Session {
    /// Queues a partial write; it starts when it may.
    pub(super) fn begin_rmw(&mut self, op: Key, offset: u64, patch: Payload, durable: bool) {
        let block = BLOCK_SIZE as u64;
        self.rmw_arrivals += 1;
        self.rmws.insert(Rmw {
            op,
            range: range_at(offset / block * block, block),
            from: (offset % block) as usize,
            patch,
            version: Version::ZERO,
            durable,
            order: self.rmw_arrivals,
            state: State::Waiting,
        });
        self.rmw_waiting += 1;
        self.rmw_pump();
    }

    /// Starts the partial writes whose turn it is.
    pub(super) fn rmw_pump(&mut self) {
        if self.rmw_waiting == 0 {
            return;
        }
        for key in self.rmws.keys_where(|r| r.state == State::Waiting) {
            let Some(rmw) = self.rmws.get(key) else {
                continue;
            };
            let (range, order) = (rmw.range, rmw.order);
            let locked = self
                .rmws
                .iter()
                .any(|(_, other)| other.range == range && other.order < order);
            let overlapped = self
                .writes
                .iter()
                .any(|(_, w)| !w.done && w.range.overlaps(range));
            if locked || overlapped {
                continue;
            }
            let version = self.window.draw(self.epoch);
            if let Some(rmw) = self.rmws.get_mut(key) {
                rmw.state = State::Reading;
                rmw.version = version;
            }
            self.rmw_waiting -= 1;
            self.submit_read(ReadOwner::Rmw(key), range, 0, BLOCK_SIZE as u32);
        }
    }

    /// The block as it was; now it is written as it is to be.
    pub(super) fn rmw_base(&mut self, key: Key, base: Result<ReadSegments, ClientError>) {
        let segments = match base {
            Ok(segments) => segments,
            Err(error) => {
                if let Some(rmw) = self.rmws.get(key) {
                    let version = rmw.version;
                    self.window.settle(version);
                }
                self.settled = true;
                return self.rmw_written(key, Some(error));
            }
        };
        let Some(rmw) = self.rmws.get_mut(key) else {
            return;
        };
        rmw.state = State::Writing;
        let block = merge(&segments, rmw.from, &rmw.patch);
        let data = Payload::from_iter([block]);
        let (range, version, durable) = (rmw.range, rmw.version, rmw.durable);
        let body = Body::Data {
            checksums: checksums(&data),
            data,
        };
        self.submit_write(WriteOwner::Rmw(key), range, version, body, durable);
    }

    /// The partial write is over: its lock is free.
    pub(super) fn rmw_written(&mut self, key: Key, error: Option<ClientError>) {
        if let Some(rmw) = self.rmws.remove(key) {
            self.op_part_done(rmw.op, error);
        }
    }
}

fn merge(base: &ReadSegments, from: usize, patch: &Payload) -> Bytes {
    let mut block = BytesMut::with_capacity(BLOCK_SIZE);
    for segment in base {
        match segment {
            ReadSegment::Data(bytes) => block.extend_from_slice(bytes),
            ReadSegment::Zeroes(length) => block.resize(block.len() + *length as usize, 0),
        }
    }
    block.resize(BLOCK_SIZE, 0);
    let mut at = from;
    for bytes in patch {
        block[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    }
    block.freeze()
}
