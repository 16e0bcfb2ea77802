//! Updates: writes, trims, repairs and the merge of a rebuild, from the request to the open batch.
//!
//! Invariants:
//! - A block is applied iff its version is higher than what the block has (Repair: or equal), decided at
//!   the moment it enters the batch; nothing comes between the decision and the index.
//! - "Superseded" is answered after the batch of the superseding record.
//! - Every block that enters the log has a home page, a fresh page or a reservation.
//! - A request enters one batch whole, or waits in the queue in order of arrival.

use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{
    BLOCK_SIZE, BLOCKS_PER_PAGE, BlockRange, SnapshotNumber, Version, VolumeId,
};
use ashlar_proto::wire::{self, BlockState, Checksums, Payload, WriteOutcome};
use bytes::Bytes;
use smallvec::SmallVec;

use super::api::{StoreCommand, StoreError, StoreReply, StoreRequest};
use super::index::{BlockKey, Overlay, PageKey, Place};
use super::log::{Ack, Answer};
use super::{Parked, Store, Target};
use crate::format::{ENTRY_BYTES, Record, RecordKind};

/// What kind of update decides whether equal versions apply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Write,
    Repair,
}

/// Which blocks of a range are accepted, and the newest batch that supersedes others.
type Judged = (SmallVec<[bool; 32]>, u64);

enum Judgement {
    Accept,
    /// By this batch, 0: by something that is home.
    Superseded(u64),
    /// These sectors must be read first.
    Need(u32),
}

/// Why an update did not enter the batch.
pub(super) enum Stop {
    Refuse(StoreError),
    /// Sectors to read first.
    Sectors(SmallVec<[u32; 8]>),
    /// No room in the log now.
    LogFull,
    /// Answered.
    Done,
}

/// The pieces of one block of a payload.
pub(super) fn block_pieces(data: &[Bytes], block: usize) -> SmallVec<[&[u8]; 2]> {
    let (mut skip, mut want) = (block * BLOCK_SIZE, BLOCK_SIZE);
    let mut pieces = SmallVec::new();
    for piece in data {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let n = want.min(piece.len() - skip);
        pieces.push(&piece[skip..skip + n]);
        skip = 0;
        want -= n;
        if want == 0 {
            break;
        }
    }
    pieces
}

/// Buffers of `length` bytes of a payload from `start`, without copying.
fn slice_payload(data: &Payload, start: usize, length: usize, to: &mut SmallVec<[Bytes; 4]>) {
    let (mut skip, mut want) = (start, length);
    for piece in data {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let n = want.min(piece.len() - skip);
        to.push(piece.slice(skip..skip + n));
        skip = 0;
        want -= n;
        if want == 0 {
            return;
        }
    }
}

fn verify_data(count: u16, checksums: &Checksums, data: &Payload) -> Result<(), StoreError> {
    let bytes: usize = data.iter().map(Bytes::len).sum();
    if checksums.len() != usize::from(count) || bytes != usize::from(count) * BLOCK_SIZE {
        return Err(StoreError::Invalid(
            "data or checksums do not fit the range",
        ));
    }
    for (i, expected) in checksums.iter().enumerate() {
        let sum = block_pieces(data, i)
            .iter()
            .fold(0, |c, p| crc32c::crc32c_append(c, p));
        if sum != *expected {
            return Err(StoreError::Checksum);
        }
    }
    Ok(())
}

pub(super) fn range_is_valid(range: BlockRange) -> bool {
    BlockRange::new(range.chunk, range.first.into(), range.count.into()).is_some()
}

impl Store {
    pub(super) fn execute_update(&mut self, p: Parked, out: &mut Vec<StoreCommand>) {
        if self.queue.is_empty() {
            if let Some(p) = self.update(p, out) {
                self.enqueue(p, out);
            }
        } else {
            self.enqueue(p, out);
        }
    }

    fn enqueue(&mut self, p: Parked, out: &mut Vec<StoreCommand>) {
        let bytes = payload_bytes(&p.request);
        if self.queue.len() >= self.config.queue_requests_max
            || self.queue_bytes + bytes > self.config.queue_bytes_max
        {
            return Self::reply(out, p.tag, Err(StoreError::Busy));
        }
        self.queue_bytes += bytes;
        self.queue.push_back(p);
    }

    pub(super) fn drain_queue(&mut self, out: &mut Vec<StoreCommand>) {
        while let Some(p) = self.queue.pop_front() {
            let bytes = payload_bytes(&p.request);
            if let Some(p) = self.update(p, out) {
                self.queue.push_front(p);
                return;
            }
            self.queue_bytes -= bytes;
        }
    }

    /// Puts an update into the open batch, or parks or refuses it; gives it back if the log is full.
    fn update(&mut self, mut p: Parked, out: &mut Vec<StoreCommand>) -> Option<Parked> {
        let first_time = !std::mem::replace(&mut p.verified, true);
        let tag = p.tag;
        self.name_layers(&mut p.request);
        let stop = match &p.request {
            StoreRequest::Write {
                volume,
                write,
                client,
            } => self.write(tag, *volume, write, Mode::Write, *client, first_time, out),
            StoreRequest::Repair { volume, write } => {
                self.write(tag, *volume, write, Mode::Repair, false, first_time, out)
            }
            StoreRequest::Trim {
                volume,
                trim,
                client,
            } => self.trim(tag, *volume, trim, *client, out),
            StoreRequest::PullApply { .. } => self.pull(tag, &p.request, first_time, out),
            _ => Stop::Refuse(StoreError::Invalid("not an update")),
        };
        match stop {
            Stop::Done => {}
            Stop::Refuse(error) => Self::reply(out, tag, Err(error)),
            Stop::Sectors(blocks) => self.park(p, blocks, out),
            Stop::LogFull => {
                // Whatever is open must go, so that room can appear.
                self.close_wanted |= !self.log.open.is_empty();
                return Some(p);
            }
        }
        None
    }

    fn judge(&mut self, key: BlockKey, version: Version, mode: Mode) -> Judgement {
        let Some(replica) = self.index.by_slot(key.slot) else {
            return Judgement::Accept;
        };
        if version > replica.highest && mode == Mode::Write {
            return Judgement::Accept;
        }
        if self.index.overlay(key).is_none()
            && self.index.others_of_class(key).is_empty()
            && replica.base.is_none()
        {
            let layer = replica.layer(key.chunk, key.layer);
            let covered = layer.and_then(|l| l.tombstones.covering(key.block));
            if covered.is_none() && version > replica.home_highest {
                return Judgement::Accept;
            }
        }
        match self.resolve_in_class(key) {
            Err(block) => Judgement::Need(block),
            Ok(r) => {
                let equal_repair = mode == Mode::Repair
                    && (r.unversioned
                        || (version == r.version
                            && matches!(r.state, BlockState::Data | BlockState::Bad)));
                if equal_repair || (version > r.version && !r.unversioned) {
                    Judgement::Accept
                } else {
                    Judgement::Superseded(r.batch)
                }
            }
        }
    }

    /// Judges every block of a range; on success, which are accepted and the newest superseding batch.
    fn judge_range(
        &mut self,
        slot: u32,
        range: BlockRange,
        layer: SnapshotNumber,
        version: Version,
        mode: Mode,
    ) -> Result<Judged, SmallVec<[u32; 8]>> {
        let mut accepted = SmallVec::with_capacity(range.count.into());
        let mut behind = 0;
        let mut need: SmallVec<[u32; 8]> = SmallVec::new();
        for block in range.blocks() {
            let key = BlockKey {
                slot,
                chunk: range.chunk.0,
                layer: layer.0,
                block,
            };
            match self.judge(key, version, mode) {
                Judgement::Accept => accepted.push(true),
                Judgement::Superseded(batch) => {
                    accepted.push(false);
                    behind = behind.max(batch);
                }
                Judgement::Need(sectors) => need.push(sectors),
            }
        }
        if need.is_empty() {
            Ok((accepted, behind))
        } else {
            Err(need)
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one caller per kind of update")]
    fn write(
        &mut self,
        tag: u64,
        volume: VolumeId,
        write: &wire::Write,
        mode: Mode,
        client: bool,
        first_time: bool,
        out: &mut Vec<StoreCommand>,
    ) -> Stop {
        if first_time {
            if !range_is_valid(write.range)
                || u32::from(write.range.count) > wire::MAX_DATA_BLOCKS
                || write.version.is_zero()
            {
                return Stop::Refuse(StoreError::Invalid("range or version"));
            }
            if let Err(error) = verify_data(write.range.count, &write.checksums, &write.data) {
                return Stop::Refuse(error);
            }
        }
        let Some(replica) = self.index.replica(volume) else {
            return Stop::Refuse(StoreError::UnknownVolume);
        };
        let (slot, number) = (replica.slot, replica.header.replica);
        let watermark = replica.watermark;
        let named;
        let write = if mode == Mode::Repair {
            if write.range.count != 1 {
                return Stop::Refuse(StoreError::Invalid("a repair is of one block"));
            }
            match self.repaired_layer(slot, write) {
                Ok(None) => {
                    let reply = StoreReply::Written(WriteOutcome::Superseded);
                    Self::reply(out, tag, Ok(reply));
                    return Stop::Done;
                }
                Ok(Some(snapshot)) => {
                    named = wire::Write {
                        snapshot,
                        ..write.clone()
                    };
                    &named
                }
                Err(sectors) => return Stop::Sectors(SmallVec::from_iter([sectors])),
            }
        } else {
            write
        };
        if client && write.version <= watermark {
            Self::reply(out, tag, Ok(StoreReply::Written(WriteOutcome::Superseded)));
            return Stop::Done;
        }
        let (accepted, behind) =
            match self.judge_range(slot, write.range, write.snapshot, write.version, mode) {
                Ok(judged) => judged,
                Err(need) => return Stop::Sectors(need),
            };
        let blocks = accepted.iter().filter(|a| **a).count() as u32;
        if blocks == 0 {
            let answer = Answer::Written(WriteOutcome::Superseded);
            self.ack_after(
                behind,
                Ack {
                    tag,
                    answer,
                    durable: write.durable,
                },
                out,
            );
            return Stop::Done;
        }
        // What equals in version may lie in a lower layer that is one with this: there it must go.
        let stale = match mode {
            Mode::Repair => self.stale_layers(slot, write.range, write.snapshot),
            Mode::Write => SmallVec::new(),
        };
        let redirect = match self.admit_write(slot, write, &accepted, stale.len()) {
            Ok(redirect) => redirect,
            Err(stop) => return stop,
        };
        if mode == Mode::Repair {
            self.stats.repaired_blocks += u64::from(blocks);
        }
        for layer in stale {
            self.append_erase(slot, number, write.range, layer, |i| {
                accepted[usize::from(i)]
            });
        }
        self.append_write(slot, number, write, &accepted, redirect, out);
        let all = blocks == u32::from(write.range.count);
        let outcome = if all {
            WriteOutcome::Applied
        } else {
            WriteOutcome::Superseded
        };
        let ack = Ack {
            tag,
            answer: Answer::Written(outcome),
            durable: write.durable,
        };
        self.log.open.acks.push(ack);
        Stop::Done
    }

    /// Checks room in the log and on the disk; says whether whole pages go to fresh pages.
    fn admit_write(
        &self,
        slot: u32,
        write: &wire::Write,
        accepted: &[bool],
        stale: usize,
    ) -> Result<bool, Stop> {
        let (mut whole, mut need_with, mut need_without) = (0u32, 0u32, 0u32);
        let mut log_blocks = 0u32;
        let page_of = |block: u16| block / BLOCKS_PER_PAGE as u16;
        for page in page_of(write.range.first)..=page_of(write.range.end() - 1) {
            let first = (page * BLOCKS_PER_PAGE as u16).max(write.range.first);
            let end = ((page + 1) * BLOCKS_PER_PAGE as u16).min(write.range.end());
            let at = |b: u16| usize::from(b - write.range.first);
            let taken = accepted[at(first)..at(end - 1) + 1]
                .iter()
                .filter(|a| **a)
                .count() as u32;
            let key = PageKey {
                slot,
                chunk: write.range.chunk.0,
                layer: write.snapshot.0,
                page: page as u8,
            };
            let need = u32::from(taken > 0 && self.index.needs_reservation(key));
            need_without += need;
            if taken == BLOCKS_PER_PAGE {
                whole += 1;
            } else {
                need_with += need;
                log_blocks += taken;
            }
        }
        let redirect = whole > 0
            && self.allocator.ready() >= whole
            && self.allocator.can_reserve(whole + need_with);
        let data_blocks = if redirect {
            log_blocks
        } else {
            log_blocks + whole * BLOCKS_PER_PAGE
        };
        if !redirect && !self.allocator.can_reserve(need_without) {
            return Err(Stop::Refuse(StoreError::NoSpace));
        }
        let edges = accepted.windows(2).filter(|w| w[0] != w[1]).count();
        let records = whole as usize * 2 + 2 + edges + stale * (edges + 1);
        let record_bytes = records * ENTRY_BYTES + accepted.len() * 4 + whole as usize * 4;
        self.admit_log(record_bytes, data_blocks)?;
        Ok(redirect)
    }

    pub(super) fn admit_log(&self, record_bytes: usize, data_blocks: u32) -> Result<(), Stop> {
        let bytes = record_bytes as u64 + u64::from(data_blocks + 2) * BLOCK_SIZE as u64;
        if bytes > self.log.bytes / 3 {
            return Err(Stop::Refuse(StoreError::Invalid(
                "larger than this disk's log allows",
            )));
        }
        let fits = self
            .log
            .admits(record_bytes, data_blocks, self.config.batch_bytes_max);
        if fits { Ok(()) } else { Err(Stop::LogFull) }
    }

    fn append_write(
        &mut self,
        slot: u32,
        number: u64,
        write: &wire::Write,
        accepted: &[bool],
        redirect: bool,
        out: &mut Vec<StoreCommand>,
    ) {
        self.log.open.fresh = true;
        self.last_write = self.now;
        let mut at = 0u16;
        let count = write.range.count;
        let mut pages: SmallVec<[(u16, u32); 16]> = SmallVec::new();
        while at < count {
            if !accepted[usize::from(at)] {
                at += 1;
                continue;
            }
            let page = BLOCKS_PER_PAGE as u16;
            let whole = |at: u16| {
                redirect
                    && (write.range.first + at).is_multiple_of(page)
                    && at + page <= count
                    && accepted[usize::from(at)..usize::from(at + page)]
                        .iter()
                        .all(|a| *a)
            };
            if whole(at)
                && let Some(physical) = self.allocator.allocate_unreserved()
            {
                self.append_redirect(slot, number, write, at, physical);
                pages.push((at, physical));
                at += page;
                continue;
            }
            let mut end = at + 1;
            while end < count && accepted[usize::from(end)] && !whole(end) {
                end += 1;
            }
            self.append_run(slot, number, write, at, end);
            at = end;
        }
        self.write_redirected(write, &pages, out);
    }

    /// Blocks `at..end` of a write go through the log.
    fn append_run(&mut self, slot: u32, number: u64, write: &wire::Write, at: u16, end: u16) {
        let batch = self.log.next_sequence;
        for i in at..end {
            let key = BlockKey {
                slot,
                chunk: write.range.chunk.0,
                layer: write.snapshot.0,
                block: write.range.first + i,
            };
            let entry = Overlay {
                batch,
                version: write.version,
                checksum: write.checksums[usize::from(i)],
                place: Place::Log(self.log.open.data_blocks),
            };
            self.index.apply_data(key, entry, &mut self.allocator);
            self.log
                .push_block(&block_pieces(&write.data, usize::from(i)));
        }
        self.stats.log_blocks += u64::from(end - at);
        let range = BlockRange {
            chunk: write.range.chunk,
            first: write.range.first + at,
            count: end - at,
        };
        self.log.push(Record {
            replica: number,
            range,
            layer: write.snapshot,
            version: write.version,
            kind: RecordKind::Data(write.checksums[usize::from(at)..usize::from(end)].into()),
        });
    }

    fn append_redirect(&mut self, slot: u32, number: u64, w: &wire::Write, at: u16, physical: u32) {
        let first = w.range.first + at;
        let page = (first / BLOCKS_PER_PAGE as u16) as u8;
        let key = PageKey {
            slot,
            chunk: w.range.chunk.0,
            layer: w.snapshot.0,
            page,
        };
        let mut checksums = [0; BLOCKS_PER_PAGE as usize];
        checksums.copy_from_slice(&w.checksums[usize::from(at)..][..BLOCKS_PER_PAGE as usize]);
        let origin = (self.log.next_sequence, w.version);
        self.index
            .apply_redirect(key, origin, physical, &checksums, &mut self.allocator);
        self.log.push(Record {
            replica: number,
            range: BlockRange {
                chunk: w.range.chunk,
                first,
                count: BLOCKS_PER_PAGE as u16,
            },
            layer: w.snapshot,
            version: w.version,
            kind: RecordKind::Redirect {
                physical,
                checksums,
            },
        });
        self.stats.redirected_pages += 1;
    }

    /// Writes the data of redirected pages, neighbours in one command.
    fn write_redirected(
        &mut self,
        write: &wire::Write,
        pages: &[(u16, u32)],
        out: &mut Vec<StoreCommand>,
    ) {
        let page = BLOCKS_PER_PAGE as u16;
        let mut i = 0;
        while i < pages.len() {
            let mut n = 1;
            while i + n < pages.len()
                && pages[i + n].1 == pages[i].1 + n as u32
                && pages[i + n].0 == pages[i].0 + n as u16 * page
            {
                n += 1;
            }
            let mut data = SmallVec::new();
            let start = usize::from(pages[i].0) * BLOCK_SIZE;
            slice_payload(
                &write.data,
                start,
                n * usize::from(page) * BLOCK_SIZE,
                &mut data,
            );
            let offset = self.page_offset(pages[i].1);
            let token = self.token(Target::Redirect(self.log.next_sequence));
            self.log.open.redirects += 1;
            out.push(StoreCommand::Disk(DiskCommand::Write {
                durable: false,
                token,
                offset,
                data,
            }));
            i += n;
        }
    }

    /// Answers when a batch is complete (0: now).
    pub(super) fn ack_after(&mut self, batch: u64, ack: Ack, out: &mut Vec<StoreCommand>) {
        if let Some(ack) = self.log.ack_after(batch, ack) {
            self.settle(vec![ack], out);
        }
    }
}

fn payload_bytes(request: &StoreRequest) -> usize {
    match request {
        StoreRequest::Write { write, .. } | StoreRequest::Repair { write, .. } => {
            write.range.byte_len()
        }
        StoreRequest::PullApply { blocks, .. } => blocks.iter().map(|b| 128 + b.data.len()).sum(),
        _ => 0,
    }
}
