//! Reads: the I/O and its verification; `resolve` says where the newest state of a block is.
//!
//! Invariants:
//! - Data is answered only if it matches the checksum that belongs to the answered version.
//! - A block whose newest record is in flight is not read before its batch is complete.
//! - What does not match is looked up again while its place has changed meanwhile (write-back moves
//!   blocks under readers); if it has not, the block is bad.

use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{BLOCK_SIZE, Version};
use ashlar_proto::wire::{self, BlockInfo, BlockState, Cursor, ReadReply};
use bytes::Bytes;
use smallvec::SmallVec;

use super::api::{StoreCommand, StoreError, StoreReply, StoreRequest};
use super::resolve::Resolved;
use super::{Parked, READS_MAX, Store, Target};

/// Times that a read is repeated because what it found had moved.
const ATTEMPTS_MAX: u8 = 8;

struct Segment {
    /// Index of the first block within the range.
    first: u16,
    count: u16,
    offset: u64,
    data: Option<Bytes>,
}

/// A read whose I/O is under way.
pub(super) struct ReadJob {
    parked: Parked,
    blocks: SmallVec<[Resolved; 4]>,
    segments: SmallVec<[Segment; 2]>,
    outstanding: u32,
}

impl ReadJob {
    pub(super) fn tag(&self) -> u64 {
        self.parked.tag
    }
}

impl Store {
    pub(super) fn execute_read(&mut self, p: Parked, out: &mut Vec<StoreCommand>) {
        let StoreRequest::Read { volume, read } = &p.request else {
            return;
        };
        let (volume, mut read) = (*volume, *read);
        let range = read.range;
        let valid = u32::from(range.count) <= wire::MAX_DATA_BLOCKS
            && ashlar_proto::ids::BlockRange::new(
                range.chunk,
                range.first.into(),
                range.count.into(),
            )
            .is_some();
        if !valid {
            return Self::reply(out, p.tag, Err(StoreError::Invalid("range")));
        }
        let Some(replica) = self.index.replica(volume) else {
            return Self::reply(out, p.tag, Err(StoreError::UnknownVolume));
        };
        let slot = replica.slot;
        let canonical = replica.layers.canonical(read.snapshot);
        if canonical != read.snapshot && !read.exact_layer {
            // Of a snapshot that is deleted: what it showed may be merged with what came later (S9).
            return Self::reply(out, p.tag, Err(StoreError::SnapshotGone));
        }
        if replica.base.is_some() && !self.inherits_intact(replica) {
            return Self::reply(out, p.tag, Err(StoreError::SnapshotGone));
        }
        read.snapshot = canonical;
        if self.reads.len() >= READS_MAX {
            return Self::reply(out, p.tag, Err(StoreError::Busy));
        }
        let mut blocks: SmallVec<[Resolved; 4]> = SmallVec::with_capacity(range.count.into());
        let mut need: SmallVec<[u32; 8]> = SmallVec::new();
        for block in range.blocks() {
            match self.resolve(slot, &read, block) {
                Ok(found) => blocks.push(found),
                Err(sectors) => need.push(sectors),
            }
        }
        if !need.is_empty() {
            return self.park(p, need, out);
        }
        let batch = blocks.iter().map(|b| b.batch).max().unwrap_or(0);
        if batch > self.log.completed {
            self.close_wanted |= batch == self.log.next_sequence;
            self.batch_waiters.entry(batch).or_default().push(p);
            return;
        }
        self.stats.read_blocks += u64::from(range.count);
        self.start_read(p, blocks, out);
    }

    fn start_read(
        &mut self,
        parked: Parked,
        blocks: SmallVec<[Resolved; 4]>,
        out: &mut Vec<StoreCommand>,
    ) {
        let mut segments: SmallVec<[Segment; 2]> = SmallVec::new();
        for (i, b) in blocks
            .iter()
            .enumerate()
            .filter(|(_, b)| b.state == BlockState::Data)
        {
            if let Some(last) = segments.last_mut()
                && usize::from(last.first + last.count) == i
                && last.offset + u64::from(last.count) * BLOCK_SIZE as u64 == b.offset
            {
                last.count += 1;
                continue;
            }
            segments.push(Segment {
                first: i as u16,
                count: 1,
                offset: b.offset,
                data: None,
            });
        }
        let id = self.next_read;
        self.next_read += 1;
        let outstanding = segments.len() as u32;
        for (i, s) in segments.iter().enumerate() {
            let token = self.token(Target::Read {
                job: id,
                segment: i as u32,
            });
            let length = usize::from(s.count) * BLOCK_SIZE;
            out.push(StoreCommand::Disk(DiskCommand::Read {
                token,
                offset: s.offset,
                length,
            }));
        }
        let job = ReadJob {
            parked,
            blocks,
            segments,
            outstanding,
        };
        if outstanding == 0 {
            return self.finish_read(job, out);
        }
        self.reads.insert(id, job);
    }

    pub(super) fn on_read(
        &mut self,
        id: u64,
        segment: u32,
        bytes: Option<Bytes>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some(job) = self.reads.get_mut(&id) else {
            return;
        };
        job.outstanding -= 1;
        let Some(s) = job.segments.get_mut(segment as usize) else {
            return;
        };
        let whole = bytes.filter(|b| b.len() == usize::from(s.count) * BLOCK_SIZE);
        if whole.is_none() && s.count > 1 {
            // One bad sector must not cost its neighbours: read block by block.
            let (first, count, offset) = (s.first, s.count, s.offset);
            s.count = 0;
            let base = job.segments.len() as u32;
            for i in 0..count {
                let offset = offset + u64::from(i) * BLOCK_SIZE as u64;
                job.segments.push(Segment {
                    first: first + i,
                    count: 1,
                    offset,
                    data: None,
                });
            }
            job.outstanding += u32::from(count);
            for i in 0..u32::from(count) {
                let token = self.token(Target::Read {
                    job: id,
                    segment: base + i,
                });
                let offset = offset + u64::from(i) * BLOCK_SIZE as u64;
                let length = BLOCK_SIZE;
                out.push(StoreCommand::Disk(DiskCommand::Read {
                    token,
                    offset,
                    length,
                }));
            }
            return;
        }
        s.data = whole;
        if job.outstanding == 0
            && let Some(job) = self.reads.remove(&id)
        {
            self.finish_read(job, out);
        }
    }

    fn finish_read(&mut self, mut job: ReadJob, out: &mut Vec<StoreCommand>) {
        let StoreRequest::Read { volume, read } = &job.parked.request else {
            return;
        };
        let (volume, read) = (*volume, *read);
        job.segments.sort_by_key(|s| (s.first, s.count));
        let mut bad: SmallVec<[u16; 4]> = SmallVec::new();
        for s in &job.segments {
            for i in 0..s.count {
                let expected = job.blocks[usize::from(s.first + i)].checksum;
                let at = usize::from(i) * BLOCK_SIZE;
                let good = s
                    .data
                    .as_ref()
                    .is_some_and(|d| crc32c::crc32c(&d[at..at + BLOCK_SIZE]) == expected);
                if !good {
                    bad.push(s.first + i);
                }
            }
        }
        if !bad.is_empty() && job.parked.attempts < ATTEMPTS_MAX {
            let Some(replica) = self.index.replica(volume) else {
                return Self::reply(out, job.parked.tag, Err(StoreError::UnknownVolume));
            };
            let slot = replica.slot;
            let mut current = read;
            current.snapshot = replica.layers.canonical(read.snapshot);
            let moved = bad.iter().any(|i| {
                let old = job.blocks[usize::from(*i)];
                self.resolve(slot, &current, read.range.first + i) != Ok(old)
            });
            if moved {
                job.parked.attempts += 1;
                return self.execute_read(job.parked, out);
            }
        }
        for i in bad {
            self.stats.checksum_errors += 1;
            job.blocks[usize::from(i)].state = BlockState::Bad;
            let block = read.range.first + i;
            let at = Cursor {
                chunk: read.range.chunk,
                snapshot: read.snapshot,
                block,
            };
            out.push(StoreCommand::BadBlock { volume, at });
        }
        let reply = Self::compose_reply(&read, &job);
        Self::reply(out, job.parked.tag, Ok(StoreReply::Read(reply)));
    }

    fn compose_reply(read: &wire::Read, job: &ReadJob) -> ReadReply {
        let mut data = wire::Payload::new();
        for s in &job.segments {
            let Some(bytes) = &s.data else { continue };
            let is_data = |i: u16| job.blocks[usize::from(s.first + i)].state == BlockState::Data;
            let mut i = 0;
            while i < s.count {
                let mut end = i;
                while end < s.count && is_data(end) {
                    end += 1;
                }
                if end > i {
                    data.push(
                        bytes.slice(usize::from(i) * BLOCK_SIZE..usize::from(end) * BLOCK_SIZE),
                    );
                }
                i = end + 1;
            }
        }
        let blocks = job.blocks.iter().map(|b| BlockInfo {
            state: b.state,
            version: if b.unversioned {
                Version::ZERO
            } else {
                b.version
            },
            checksum: if b.state == BlockState::Data {
                b.checksum
            } else {
                0
            },
        });
        ReadReply {
            range: read.range,
            blocks: blocks.collect(),
            data,
        }
    }
}
