//! Reads (R6, R8): one in-sync replica, lease and writes in flight checked when the answer is used,
//! checksums verified, bad blocks read elsewhere and repaired.
//!
//! Invariants:
//! - An answer is returned only while the lease of its group holds: every in-sync member and counted
//!   target answered a request of this session sent within the lease time.
//! - No block is returned to a client whose version belongs to a write that is still in flight.
//! - No byte is returned that does not match its checksum. A block that is bad on every in-sync replica
//!   is an I/O error.

use ashlar_proto::ids::{BLOCK_SIZE, BlockRange};
use ashlar_proto::wire::{
    BlockInfo, BlockState, Checksums, MAX_PAYLOAD, Payload, Read, ReadReply, RequestBody, Write,
};
use bytes::Bytes;

use super::api::{ClientError, PlantedBug, ReadSegment, ReadSegments};
use super::reader::Role;
use super::replica::Purpose;
use super::session::Session;
use super::slots::{Key, PeerSet};
use super::write::{checksums, payload_len, piece, range_at, slice_payload};

/// For whom blocks are read.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReadOwner {
    /// A part of a client's request.
    Op { op: Key, part: u32 },
    /// The base of a read-modify-write.
    Rmw(Key),
}

/// One read on its way, or waiting.
#[derive(Debug)]
pub(super) struct ReadSlot {
    owner: ReadOwner,
    range: BlockRange,
    /// Bytes of the first block that were not asked for.
    head: u32,
    length: u32,
    group: u32,
    /// Whom it was sent to.
    peer: Option<u8>,
    /// Who has answered with bad blocks.
    tried: PeerSet,
    /// Verified, not returned yet.
    answer: Option<ReadReply>,
    merge: Option<Box<Merge>>,
    delayed: bool,
}

/// A read that met bad blocks: good ones are gathered from several replicas.
#[derive(Debug)]
struct Merge {
    blocks: Vec<Option<(BlockInfo, Bytes)>>,
    bad: Vec<(u8, u16)>,
}

impl Session {
    /// A client's read of any byte range.
    pub(super) fn begin_read(&mut self, op: Key, offset: u64, length: u64) {
        let end = offset + length;
        let block = BLOCK_SIZE as u64;
        let mut position = offset;
        while position < end {
            let first = position / block * block;
            let last = end.div_ceil(block) * block;
            let (covered, _) = piece(first, last, MAX_PAYLOAD as u64);
            let stop = (first + covered).min(end);
            let part = self.op_add_read_part(op);
            let head = (position - first) as u32;
            let owner = ReadOwner::Op { op, part };
            self.submit_read(
                owner,
                range_at(first, covered),
                head,
                (stop - position) as u32,
            );
            position = stop;
        }
    }

    pub(super) fn submit_read(
        &mut self,
        owner: ReadOwner,
        range: BlockRange,
        head: u32,
        length: u32,
    ) {
        let group = self.view.group_of(range.chunk).0;
        let key = self.reads.insert(ReadSlot {
            owner,
            range,
            head,
            length,
            group,
            peer: None,
            tried: PeerSet::EMPTY,
            answer: None,
            merge: None,
            delayed: false,
        });
        if !self.send_read(key) {
            self.parked.push(key);
        }
    }

    /// The replica to read from: the local one, else one that depends on the chunk.
    pub(super) fn choose_source(&self, g: usize, chunk: u32, tried: PeerSet) -> Option<u8> {
        let group = &self.groups[g];
        if group.recovering || group.reconcile.is_some() {
            return None;
        }
        let mut candidates = PeerSet::EMPTY;
        for peer in group.in_sync.without(tried).iter() {
            if self.usable(peer) && !self.peers[peer as usize].failed {
                if self.peers[peer as usize].local {
                    return Some(peer);
                }
                candidates.insert(peer);
            }
        }
        if candidates.is_empty() {
            return None;
        }
        let spread = chunk as usize / self.groups.len();
        candidates.nth(spread % candidates.len())
    }

    /// False: no replica can be asked now.
    fn send_read(&mut self, key: Key) -> bool {
        let Some(slot) = self.reads.get(key) else {
            return true;
        };
        let (range, g, tried) = (slot.range, slot.group as usize, slot.tried);
        let Some(peer) = self.choose_source(g, range.chunk.0, tried) else {
            return false;
        };
        if let Some(slot) = self.reads.get_mut(key) {
            slot.peer = Some(peer);
        }
        let read = Read {
            range,
            snapshot: self.read_number(),
            exact_layer: false,
        };
        self.send(peer, Purpose::Read { slot: key }, RequestBody::Read(read));
        true
    }

    /// The request got no answer: another replica is asked.
    pub(super) fn read_void(&mut self, peer: u8, key: Key) {
        if let Some(slot) = self.reads.get_mut(key)
            && slot.peer == Some(peer)
            && slot.answer.is_none()
        {
            slot.peer = None;
            self.parked.push(key);
            self.pump = true;
        }
    }

    /// Reads answered by a replica that is no longer in sync are read again elsewhere.
    pub(super) fn reread_group(&mut self, g: usize) {
        let in_sync = self.groups[g].in_sync;
        let mut again = Vec::new();
        for (key, slot) in self.reads.iter_mut() {
            if slot.group as usize == g && slot.peer.is_some_and(|p| !in_sync.contains(p)) {
                slot.peer = None;
                slot.answer = None;
                slot.merge = None;
                slot.tried = PeerSet::EMPTY;
                again.push(key);
            }
        }
        for key in again {
            if !self.parked.contains(&key) {
                self.parked.push(key);
            }
        }
    }

    /// An answer from a replica.
    pub(super) fn on_read(&mut self, peer: u8, key: Key, reply: ReadReply) {
        let Some(slot) = self.reads.get(key) else {
            return;
        };
        if slot.peer != Some(peer) || slot.answer.is_some() {
            return;
        }
        if !well_formed(slot.range, &reply) {
            self.fail_peer(peer);
            return self.read_void(peer, key);
        }
        if slot.merge.is_none() && !any_bad(&reply) {
            return self.read_answered(key, reply);
        }
        self.merge_answer(peer, key, &reply);
    }

    fn read_answered(&mut self, key: Key, reply: ReadReply) {
        if let Some(slot) = self.reads.get_mut(key) {
            slot.answer = Some(reply);
        }
        if !self.try_return(key) {
            self.parked.push(key);
        }
    }

    /// Gathers good blocks; asks the next replica for what is missing (R8).
    fn merge_answer(&mut self, peer: u8, key: Key, reply: &ReadReply) {
        let Some(slot) = self.reads.get_mut(key) else {
            return;
        };
        let count = slot.range.count as usize;
        let merge = slot.merge.get_or_insert_with(|| {
            Box::new(Merge {
                blocks: vec![None; count],
                bad: Vec::new(),
            })
        });
        let mut found = 0;
        for (index, (info, data)) in blocks_of(reply).enumerate() {
            if info.state == BlockState::Bad || !verified(&info, &data) {
                merge.bad.push((peer, index as u16));
                found += 1;
            } else if merge.blocks[index].is_none() {
                merge.blocks[index] = Some((info, data));
            }
        }
        slot.tried.insert(peer);
        slot.peer = None;
        self.stats.bad_blocks_found += found;
        if found > 0 {
            tracing::warn!(volume = %self.config.volume, disk = %self.peers[peer as usize].disk, blocks = found, "bad blocks read");
        }
        self.merge_go_on(key);
    }

    fn merge_go_on(&mut self, key: Key) {
        let Some(slot) = self.reads.get(key) else {
            return;
        };
        let Some(merge) = &slot.merge else { return };
        let group = &self.groups[slot.group as usize];
        if merge.blocks.iter().all(Option::is_some) {
            self.merge_complete(key);
        } else if slot.tried.covers(group.in_sync) {
            self.finish_read(key, Err(ClientError::Io));
        } else if !self.send_read(key) {
            self.parked.push(key);
        }
    }

    fn merge_complete(&mut self, key: Key) {
        let Some(slot) = self.reads.get_mut(key) else {
            return;
        };
        let Some(merge) = slot.merge.take() else {
            return;
        };
        let range = slot.range;
        let mut reply = ReadReply {
            range,
            blocks: Default::default(),
            data: Payload::new(),
        };
        let mut repairs = Vec::new();
        for (info, data) in merge.blocks.into_iter().flatten() {
            reply.blocks.push(info);
            repairs.push((info, data.clone()));
            if info.state == BlockState::Data {
                reply.data.push(data);
            }
        }
        for (peer, index) in merge.bad {
            let (info, data) = repairs[index as usize].clone();
            self.repair(peer, range, index, info, data);
        }
        self.read_answered(key, reply);
    }

    /// Rewrites a bad block with intact data of equal version.
    fn repair(&mut self, peer: u8, range: BlockRange, index: u16, info: BlockInfo, data: Bytes) {
        if info.state != BlockState::Data
            || self.role == Role::Reader
            || !self.usable(peer)
            || self.window.in_flight(info.version)
        {
            return;
        }
        let write = Write {
            range: BlockRange {
                chunk: range.chunk,
                first: range.first + index,
                count: 1,
            },
            snapshot: self.read_number(),
            version: info.version,
            durable: false,
            checksums: Checksums::from_iter([info.checksum]),
            data: Payload::from_iter([data]),
        };
        self.send(peer, Purpose::Repair, RequestBody::Repair(write));
    }

    /// Tries every waiting read again.
    pub(super) fn reads_pump(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut self.parked);
        for key in parked {
            let Some(slot) = self.reads.get(key) else {
                continue;
            };
            if slot.answer.is_some() {
                if !self.try_return(key) {
                    self.parked.push(key);
                }
            } else if slot.peer.is_none() {
                if slot.merge.is_some() {
                    self.merge_go_on(key);
                } else if !self.send_read(key) {
                    self.parked.push(key);
                }
            }
        }
    }

    /// Returns a verified answer if R6 allows it now.
    fn try_return(&mut self, key: Key) -> bool {
        let Some(slot) = self.reads.get(key) else {
            return true;
        };
        let Some(answer) = &slot.answer else {
            return false;
        };
        let early = self.planted(PlantedBug::ReadInFlight);
        let base = matches!(slot.owner, ReadOwner::Rmw(_));
        let waits = !early
            && !base
            && answer
                .blocks
                .iter()
                .any(|b| self.window.in_flight(b.version));
        let g = slot.group as usize;
        if waits || (!base && !self.lease_holds(g)) {
            if let Some(slot) = self.reads.get_mut(key)
                && !slot.delayed
            {
                slot.delayed = true;
                self.stats.reads_delayed += 1;
            }
            return false;
        }
        let Some(slot) = self.reads.get(key) else {
            return true;
        };
        let Some(answer) = &slot.answer else {
            return false;
        };
        let segments = segments_of(answer, slot.head as usize, slot.length as usize);
        self.finish_read(key, Ok(segments));
        true
    }

    fn finish_read(&mut self, key: Key, result: Result<ReadSegments, ClientError>) {
        let Some(slot) = self.reads.remove(key) else {
            return;
        };
        match slot.owner {
            ReadOwner::Op { op, part } => self.op_read_done(op, part, result),
            ReadOwner::Rmw(rmw) => self.rmw_base(rmw, result),
        }
    }
}

/// Whether an answer has the shape that the request asks for.
pub(super) fn well_formed(range: BlockRange, reply: &ReadReply) -> bool {
    let data = reply
        .blocks
        .iter()
        .filter(|b| b.state == BlockState::Data)
        .count();
    reply.range == range
        && reply.blocks.len() == range.count as usize
        && payload_len(&reply.data) == data * BLOCK_SIZE
}

fn any_bad(reply: &ReadReply) -> bool {
    let sums = checksums(&reply.data);
    let mut next = sums.iter();
    reply.blocks.iter().any(|b| match b.state {
        BlockState::Bad => true,
        BlockState::Data => next.next() != Some(&b.checksum),
        BlockState::Absent | BlockState::Tombstone => false,
    })
}

/// Whether a block's bytes match its checksum.
pub(super) fn verified(info: &BlockInfo, data: &Bytes) -> bool {
    info.state != BlockState::Data || crc32c::crc32c(data) == info.checksum
}

/// The blocks of an answer, each with its bytes (empty unless `Data`).
pub(super) fn blocks_of(reply: &ReadReply) -> impl Iterator<Item = (BlockInfo, Bytes)> {
    let mut at = 0;
    reply.blocks.iter().map(move |info| {
        if info.state != BlockState::Data {
            return (*info, Bytes::new());
        }
        let part = slice_payload(&reply.data, at, BLOCK_SIZE);
        at += BLOCK_SIZE;
        let bytes = match part.as_slice() {
            [one] => one.clone(),
            many => Bytes::from(many.concat()),
        };
        (*info, bytes)
    })
}

/// The bytes asked for, zeroes by number.
fn segments_of(reply: &ReadReply, head: usize, length: usize) -> ReadSegments {
    let mut segments = ReadSegments::new();
    let (mut skip, mut rest, mut at) = (head, length, 0);
    let blocks = &reply.blocks;
    let mut index = 0;
    while index < blocks.len() && rest > 0 {
        let data = blocks[index].state == BlockState::Data;
        let run = blocks[index..]
            .iter()
            .take_while(|b| (b.state == BlockState::Data) == data)
            .count();
        let bytes = run * BLOCK_SIZE;
        let take = (bytes - skip).min(rest);
        if data {
            for part in slice_payload(&reply.data, at + skip, take) {
                segments.push(ReadSegment::Data(part));
            }
            at += bytes;
        } else {
            segments.push(ReadSegment::Zeroes(take as u32));
        }
        skip = 0;
        rest -= take;
        index += run;
    }
    segments
}
