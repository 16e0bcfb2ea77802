//! Writes and trims (R3, R9): split, versioned, sent in parallel, acknowledged.
//!
//! Invariants:
//! - A version is drawn when the request arrives and is the write's for ever: retries, fresh answers
//!   after a configuration change and replays carry it.
//! - A write is acknowledged when every in-sync member and every counted target of the *current*
//!   configuration has answered, each for the membership and attempt in which the request was sent, and
//!   the group may acknowledge (no hold, configuration durable, `min_replicas`).
//! - When a group loses an in-sync member, its writes in flight forget all answers and are sent again
//!   as durable ones (R4).
//! - An acknowledged write that a rebuild target has not answered stays until it has: the target is
//!   not promoted before (R7).

use ashlar_proto::ids::{
    BLOCK_SIZE, BlockRange, CHUNK_SIZE, ChunkIndex, Epoch, SnapshotNumber, Version,
};
use ashlar_proto::wire::{Checksums, MAX_PAYLOAD, Payload, RequestBody, Trim, Write};

use super::api::{ClientError, PlantedBug};
use super::replica::{Group, Purpose};
use super::session::{Phase, Session};
use super::slots::{Key, PeerSet};

/// What a retained write costs besides its data.
const RETAINED_OVERHEAD: u64 = 256;

/// For whom a write is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum WriteOwner {
    /// Part of a client's request.
    Op(Key),
    /// The second half of a read-modify-write.
    Rmw(Key),
    /// R5: an acknowledged write, again.
    Replay,
}

/// What is written.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Data { data: Payload, checksums: Checksums },
    Trim,
}

/// One write on its way, or acknowledged and waited for by a rebuild target.
#[derive(Debug)]
pub(super) struct WriteSlot {
    pub(super) owner: WriteOwner,
    pub(super) group: u32,
    pub(super) range: BlockRange,
    pub(super) version: Version,
    pub(super) snapshot: SnapshotNumber,
    pub(super) body: Body,
    pub(super) durable: bool,
    /// Asked, with the request outstanding or answered.
    pub(super) sent: PeerSet,
    pub(super) answered: PeerSet,
    pub(super) no_space: PeerSet,
    pub(super) attempt: u16,
    /// Acknowledged; only rebuild targets are still to answer.
    pub(super) done: bool,
}

/// An acknowledged write that no flush has covered yet (R5).
#[derive(Debug)]
pub(super) struct Retained {
    pub(super) group: u32,
    pub(super) range: BlockRange,
    pub(super) version: Version,
    pub(super) snapshot: SnapshotNumber,
    pub(super) body: Body,
}

impl Retained {
    pub(super) fn bytes(&self) -> u64 {
        RETAINED_OVERHEAD
            + match &self.body {
                Body::Data { .. } => self.range.byte_len() as u64,
                Body::Trim => 0,
            }
    }
}

impl WriteSlot {
    /// Who is to have the write: the in-sync members, and targets whose rebuild began before it.
    fn wanted(&self, group: &Group) -> PeerSet {
        let mut set = group.in_sync;
        for peer in group.targets.iter() {
            if group
                .member(peer)
                .is_some_and(|m| m.rebuild_epoch <= self.version.epoch)
            {
                set.insert(peer);
            }
        }
        set
    }
}

impl Session {
    /// A client's write of any byte range.
    pub(super) fn begin_write(&mut self, op: Key, offset: u64, data: &Payload, fua: bool) {
        let expects_flush = self.rhythm.write() && self.writes.is_empty();
        let durable = fua || expects_flush;
        let end = offset + payload_len(data) as u64;
        let mut position = offset;
        while position < end {
            let (take, whole) = piece(position, end, MAX_PAYLOAD as u64);
            let part = slice_payload(data, (position - offset) as usize, take as usize);
            self.op_add_part(op);
            if whole {
                let version = self.window.draw(self.epoch);
                let checksums = checksums(&part);
                let body = Body::Data {
                    data: part,
                    checksums,
                };
                self.submit_write(
                    WriteOwner::Op(op),
                    range_at(position, take),
                    version,
                    body,
                    durable,
                );
            } else {
                self.begin_rmw(op, position, part, durable);
            }
            position += take;
        }
    }

    /// A client's trim (whole blocks only) or write of zeroes (edges by read-modify-write).
    pub(super) fn begin_trim(&mut self, op: Key, offset: u64, length: u64, fua: bool, edges: bool) {
        let end = offset + length;
        let mut position = offset;
        while position < end {
            let (take, whole) = piece(position, end, CHUNK_SIZE);
            if whole {
                self.op_add_part(op);
                let version = self.window.draw(self.epoch);
                let range = range_at(position, take);
                self.submit_write(WriteOwner::Op(op), range, version, Body::Trim, fua);
            } else if edges {
                self.op_add_part(op);
                let zeroes = Payload::from_iter([self.zeroes.slice(..take as usize)]);
                self.begin_rmw(op, position, zeroes, fua);
            }
            position += take;
        }
    }

    /// Sends a write to everyone who is to have it.
    pub(super) fn submit_write(
        &mut self,
        owner: WriteOwner,
        range: BlockRange,
        version: Version,
        body: Body,
        durable: bool,
    ) {
        self.submit_write_as(owner, range, version, self.layer, body, durable);
    }

    /// The same, in a layer of the caller's choice (replays keep theirs).
    pub(super) fn submit_write_as(
        &mut self,
        owner: WriteOwner,
        range: BlockRange,
        version: Version,
        snapshot: SnapshotNumber,
        body: Body,
        durable: bool,
    ) {
        let group = self.view.group_of(range.chunk).0;
        let slot = WriteSlot {
            owner,
            group,
            range,
            version,
            snapshot,
            body,
            durable,
            sent: PeerSet::EMPTY,
            answered: PeerSet::EMPTY,
            no_space: PeerSet::EMPTY,
            attempt: 0,
            done: false,
        };
        let key = self.writes.insert(slot);
        self.send_write(key);
    }

    /// Sends a write to the usable peers that are to have it and were not asked yet.
    pub(super) fn send_write(&mut self, key: Key) {
        let Some(slot) = self.writes.get(key) else {
            return;
        };
        let group = &self.groups[slot.group as usize];
        if group.reconcile.is_some() {
            return;
        }
        let missing = slot.wanted(group).without(slot.sent);
        for peer in missing.iter() {
            if self.usable(peer) {
                self.send_write_to(key, peer);
            }
        }
    }

    fn send_write_to(&mut self, key: Key, peer: u8) {
        let Some(slot) = self.writes.get_mut(key) else {
            return;
        };
        let Some(member) = self.groups[slot.group as usize].member(peer) else {
            return;
        };
        slot.sent.insert(peer);
        let purpose = Purpose::Write {
            slot: key,
            attempt: slot.attempt,
            membership: member.membership,
        };
        let (range, snapshot, version, durable) =
            (slot.range, slot.snapshot, slot.version, slot.durable);
        let body = match &slot.body {
            Body::Data { data, checksums } => RequestBody::Write(Write {
                range,
                snapshot,
                version,
                durable,
                checksums: checksums.clone(),
                data: data.clone(),
            }),
            Body::Trim => RequestBody::Trim(Trim {
                range,
                snapshot,
                version,
                durable,
            }),
        };
        self.send(peer, purpose, body);
    }

    /// The slot an answer is for, if the answer counts (R3).
    fn counted_answer(&mut self, peer: u8, slot: Key, attempt: u16, membership: u32) -> bool {
        let Some(write) = self.writes.get(slot) else {
            return false;
        };
        write.attempt == attempt
            && self.groups[write.group as usize]
                .member(peer)
                .is_some_and(|m| m.membership == membership)
    }

    /// A replica has the write in its log.
    pub(super) fn on_written(&mut self, peer: u8, slot: Key, attempt: u16, membership: u32) {
        if self.counted_answer(peer, slot, attempt, membership)
            && let Some(write) = self.writes.get_mut(slot)
        {
            write.answered.insert(peer);
            self.settle_write(slot);
            // A rebuild may wait for this answer although nobody is acknowledged.
            self.pump |= self
                .groups
                .iter()
                .any(|g| !g.acknowledging && !g.targets.is_empty());
        }
    }

    /// A replica has no room for the write.
    pub(super) fn on_write_no_space(&mut self, peer: u8, slot: Key, attempt: u16, membership: u32) {
        if !self.counted_answer(peer, slot, attempt, membership) {
            return;
        }
        let Some(write) = self.writes.get_mut(slot) else {
            return;
        };
        if write.owner == WriteOwner::Replay {
            // Acknowledged once: it must fit again, as write-back makes room.
            write.sent.remove(peer);
            self.busy(peer);
            return;
        }
        write.no_space.insert(peer);
        if !self.groups[write.group as usize].in_sync.contains(peer) {
            self.fail_peer(peer);
        } else {
            self.settle_write(slot);
        }
    }

    /// Acknowledges a write if it may be.
    pub(super) fn settle_write(&mut self, key: Key) {
        let Some(slot) = self.writes.get(key) else {
            return;
        };
        let group = &self.groups[slot.group as usize];
        if slot.done {
            if slot
                .answered
                .covers(slot.wanted(group).without(group.in_sync))
            {
                self.writes.remove(key);
                self.lingering -= 1;
                self.pump = true;
            }
            return;
        }
        let replay = slot.owner == WriteOwner::Replay;
        if !group.acknowledging && !replay {
            return;
        }
        let mut needed = group.needed();
        if self.planted(PlantedBug::AckBeforeExclusion) {
            for peer in needed.iter() {
                if self.peers[peer as usize].failed {
                    needed.remove(peer);
                }
            }
        }
        if slot.answered.covers(needed) {
            self.acknowledge(key);
        } else if !slot.no_space.is_empty()
            && slot.answered.union(slot.no_space).covers(group.in_sync)
        {
            self.settle_no_space(key);
        }
    }

    fn acknowledge(&mut self, key: Key) {
        let Some(slot) = self.writes.get_mut(key) else {
            return;
        };
        slot.done = true;
        let (owner, version, durable) = (slot.owner, slot.version, slot.durable);
        let group = &self.groups[slot.group as usize];
        let waits = !slot
            .answered
            .covers(slot.wanted(group).without(group.in_sync));
        if owner != WriteOwner::Replay {
            self.window.settle(version);
            self.dirty |= !durable;
            if !durable {
                let retained = Retained {
                    group: slot.group,
                    range: slot.range,
                    version,
                    snapshot: slot.snapshot,
                    body: slot.body.clone(),
                };
                self.retain(retained);
            }
        }
        if waits {
            self.lingering += 1;
        } else {
            self.writes.remove(key);
        }
        self.settled = true;
        match owner {
            WriteOwner::Op(op) => self.op_part_done(op, None),
            WriteOwner::Rmw(rmw) => self.rmw_written(rmw, None),
            WriteOwner::Replay => {
                self.replays -= 1;
                self.stats.writes_replayed += 1;
                self.pump = true;
            }
        }
    }

    /// Every in-sync replica answered, some of them that they are full.
    fn settle_no_space(&mut self, key: Key) {
        let Some(slot) = self.writes.get(key) else {
            return;
        };
        let group = &self.groups[slot.group as usize];
        let full = slot.no_space.common(group.in_sync);
        if !full.covers(group.in_sync) {
            // Some applied it: the full ones missed it.
            for peer in full.iter() {
                self.fail_peer(peer);
            }
            return;
        }
        // None applied it: it never happened, except perhaps on a rebuild target.
        let targets = group.targets;
        let Some(slot) = self.writes.remove(key) else {
            return;
        };
        self.window.settle(slot.version);
        self.settled = true;
        match slot.owner {
            WriteOwner::Op(op) => self.op_part_done(op, Some(ClientError::NoSpace)),
            WriteOwner::Rmw(rmw) => self.rmw_written(rmw, Some(ClientError::NoSpace)),
            WriteOwner::Replay => {}
        }
        for peer in targets.common(slot.sent).iter() {
            self.fail_peer(peer);
        }
    }

    /// Tries every write of a group.
    pub(super) fn settle_group(&mut self, g: usize) {
        for key in self.writes.keys_where(|w| w.group as usize == g) {
            self.settle_write(key);
        }
    }

    /// A write's request got no answer.
    pub(super) fn write_void(&mut self, peer: u8, slot: Key, attempt: u16) {
        if let Some(write) = self.writes.get_mut(slot)
            && write.attempt == attempt
            && !write.answered.contains(peer)
        {
            write.sent.remove(peer);
            write.no_space.remove(peer);
        }
    }

    /// Sends a peer all writes that it is to have and was not asked for.
    pub(super) fn resend_writes(&mut self, peer: u8) {
        let groups = &self.groups;
        let keys = self.writes.keys_where(|w| {
            !w.sent.contains(peer) && groups[w.group as usize].member(peer).is_some()
        });
        for key in keys {
            self.send_write(key);
        }
    }

    /// The membership of peers in a group changed: nothing they answered counts any longer.
    pub(super) fn forget_answers(&mut self, g: usize, peers: PeerSet) {
        let mut settled = Vec::new();
        for (key, write) in self.writes.iter_mut() {
            if write.group as usize == g {
                write.sent = write.sent.without(peers);
                write.answered = write.answered.without(peers);
                write.no_space = write.no_space.without(peers);
                settled.push(key);
            }
        }
        for key in settled {
            self.settle_write(key);
        }
    }

    /// R4: the group lost an in-sync member: the writes in flight collect fresh, durable answers.
    pub(super) fn renew_writes(&mut self, g: usize) {
        for (_, write) in self.writes.iter_mut() {
            if write.group as usize == g && !write.done {
                write.sent = PeerSet::EMPTY;
                write.answered = PeerSet::EMPTY;
                write.no_space = PeerSet::EMPTY;
                write.attempt = write.attempt.wrapping_add(1);
                write.durable = true;
            }
        }
    }

    /// Whether every write of a group with a version below an epoch is applied on all in-sync members
    /// (acknowledged or not), and none is still to come.
    pub(super) fn drained_below(&self, g: usize, epoch: Epoch) -> bool {
        if !self.window.in_flight_below(epoch) {
            return true;
        }
        let in_sync = self.groups[g].in_sync;
        !self.rmws.iter().any(|(_, r)| r.reads_below(epoch))
            && !self.writes.iter().any(|(_, w)| {
                let older = w.group as usize == g && !w.done && w.version.epoch < epoch;
                older && !w.answered.covers(in_sync)
            })
    }

    /// Sends a group's writes to whoever lacks them.
    pub(super) fn send_group(&mut self, g: usize) {
        for key in self.writes.keys_where(|w| w.group as usize == g) {
            self.send_write(key);
        }
    }

    fn retain(&mut self, retained: Retained) {
        self.stats.retained_bytes += retained.bytes();
        self.retained.push_back(retained);
        self.bound_retained();
    }

    /// Starts a flush if too much is retained. To be asked whenever the amount grew or a flush ended: above the limit
    /// no request is admitted, so nobody else would ask for one.
    pub(super) fn bound_retained(&mut self) {
        if self.stats.retained_bytes > self.config.retained_bytes_max / 2
            && self.flush.is_none()
            && self.phase == Phase::Serving
        {
            self.stats.background_flushes += 1;
            self.start_flush();
        }
    }
}

/// Bytes from `position` that one request takes, and whether they are whole blocks.
pub(super) fn piece(position: u64, end: u64, most: u64) -> (u64, bool) {
    let block = BLOCK_SIZE as u64;
    let within = position % block;
    if within != 0 || end - position < block {
        return ((block - within).min(end - position), false);
    }
    let chunk_rest = CHUNK_SIZE - position % CHUNK_SIZE;
    let whole = (end - position) / block * block;
    (whole.min(most).min(chunk_rest), true)
}

/// The blocks of a block-aligned byte range within one chunk.
pub(super) fn range_at(offset: u64, length: u64) -> BlockRange {
    BlockRange {
        chunk: ChunkIndex((offset / CHUNK_SIZE) as u32),
        first: (offset % CHUNK_SIZE / BLOCK_SIZE as u64) as u16,
        count: (length / BLOCK_SIZE as u64) as u16,
    }
}

/// Bytes of a payload.
pub(super) fn payload_len(payload: &Payload) -> usize {
    payload.iter().map(bytes::Bytes::len).sum()
}

/// A part of a payload, by reference.
pub(super) fn slice_payload(payload: &Payload, from: usize, length: usize) -> Payload {
    let mut part = Payload::new();
    let (mut skip, mut rest) = (from, length);
    for bytes in payload {
        if rest == 0 {
            break;
        }
        if skip >= bytes.len() {
            skip -= bytes.len();
            continue;
        }
        let take = rest.min(bytes.len() - skip);
        part.push(bytes.slice(skip..skip + take));
        rest -= take;
        skip = 0;
    }
    part
}

/// crc32c of each 4 KiB of a payload whose length is a multiple of that.
pub(super) fn checksums(payload: &Payload) -> Checksums {
    let mut sums = Checksums::new();
    let (mut sum, mut have) = (0u32, 0usize);
    for bytes in payload {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(BLOCK_SIZE - have));
            sum = crc32c::crc32c_append(sum, now);
            have += now.len();
            rest = later;
            if have == BLOCK_SIZE {
                sums.push(sum);
                (sum, have) = (0, 0);
            }
        }
    }
    sums
}
