//! An in-memory replica with the semantics of R1, R3, R5, R7: version compare, fence, incarnation,
//! volatile until flushed.

use std::collections::{BTreeMap, VecDeque};

use ashlar_proto::ids::{BlockRange, DiskId, Epoch, Incarnation, SnapshotNumber, Version};
use ashlar_proto::wire::*;
use bytes::Bytes;

use super::Random;

pub(super) type Place = (u32, u16);

#[derive(Clone, PartialEq, Debug)]
pub(super) struct Cell {
    pub(super) version: Version,
    /// `None`: tombstone.
    pub(super) data: Option<Bytes>,
    pub(super) checksum: u32,
}

pub(super) struct Pull {
    pub(super) groups: u32,
    pub(super) epoch: Epoch,
    pub(super) source: DiskId,
    pub(super) source_incarnation: Incarnation,
    pub(super) todo: VecDeque<Place>,
    pub(super) applying: usize,
    pub(super) state: PullState,
    pub(super) moved: u64,
    pub(super) number: u64,
}

pub(super) struct FakeDisk {
    pub(super) id: DiskId,
    pub(super) alive: bool,
    /// Requests wait until then (SIGSTOP, lost packets).
    pub(super) paused_until: u64,
    /// Changes with every start of the process.
    pub(super) process: u64,
    pub(super) incarnation: Incarnation,
    pub(super) fence: Epoch,
    pub(super) exists: bool,
    pub(super) suspect: bool,
    pub(super) watermark: Version,
    pub(super) rebuild_epoch: Epoch,
    pub(super) live: BTreeMap<Place, Cell>,
    /// States since the last flush, the durable one first.
    unflushed: BTreeMap<Place, Vec<Option<Cell>>>,
    /// By group.
    pub(super) pull: BTreeMap<u32, Pull>,
    pub(super) last_pull: u32,
    pub(super) pulls: u64,
    pub(super) full: bool,
    /// Fails every checksum of reads of this block once.
    pub(super) corrupt: Option<Place>,
    pub(super) requests: u64,
    pub(super) flushes: u64,
    pub(super) descriptor_epoch: Epoch,
    pub(super) writes: u64,
    /// Which number each version that arrived carried.
    pub(super) layers: BTreeMap<Version, SnapshotNumber>,
}

impl FakeDisk {
    pub(super) fn new(number: u8) -> Self {
        Self {
            id: DiskId([number + 1; 16]),
            alive: true,
            paused_until: 0,
            process: 1,
            incarnation: Incarnation(u64::from(number) * 1000 + 1),
            fence: Epoch(0),
            exists: false,
            suspect: false,
            watermark: Version::ZERO,
            rebuild_epoch: Epoch(0),
            live: BTreeMap::new(),
            unflushed: BTreeMap::new(),
            pull: BTreeMap::new(),
            last_pull: 0,
            pulls: 0,
            full: false,
            corrupt: None,
            requests: 0,
            flushes: 0,
            descriptor_epoch: Epoch(0),
            writes: 0,
            layers: BTreeMap::new(),
        }
    }

    fn set(&mut self, place: Place, cell: Option<Cell>) {
        let old = self.live.get(&place).cloned();
        self.unflushed
            .entry(place)
            .or_insert_with(|| vec![old])
            .push(cell.clone());
        match cell {
            Some(cell) => self.live.insert(place, cell),
            None => self.live.remove(&place),
        };
    }

    fn flush(&mut self) {
        self.unflushed.clear();
        self.flushes += 1;
    }

    /// Blocks that a power cut may change.
    pub(super) fn unflushed(&self) -> usize {
        self.unflushed.len()
    }

    /// The process dies and its memory with it; what was written stays.
    pub(super) fn crash(&mut self) {
        self.alive = false;
        self.process += 1;
        self.pull.clear();
    }

    /// The machine loses power: every unflushed block falls back to some state since the last flush.
    pub(super) fn power_loss(&mut self, random: &mut Random) {
        self.crash();
        for (place, states) in std::mem::take(&mut self.unflushed) {
            match states[random.below(states.len() as u64) as usize].clone() {
                Some(cell) => self.live.insert(place, cell),
                None => self.live.remove(&place),
            };
        }
        self.incarnation.0 += 1;
        self.suspect = true;
    }

    /// A pulled block arrives.
    pub(super) fn apply_pulled(
        &mut self,
        group: u32,
        place: Place,
        cell: Option<Cell>,
        epoch: Epoch,
    ) {
        let mine = self.live.get(&place).cloned();
        if mine == cell {
            return;
        }
        let newer = mine.as_ref().is_some_and(|m| m.version.epoch >= epoch);
        if newer
            && cell
                .as_ref()
                .is_none_or(|c| c.version <= mine.as_ref().unwrap().version)
        {
            return;
        }
        self.set(place, cell);
        if let Some(pull) = self.pull.get_mut(&group) {
            pull.moved += 1;
        }
    }

    pub(super) fn apply(&mut self, request: &Request) -> Result<ReplyBody, Status> {
        self.requests += 1;
        let fencing = matches!(
            request.body,
            RequestBody::Fence(_) | RequestBody::Configure(_)
        );
        if request.epoch < self.fence {
            return Err(Status::Fenced);
        }
        if !matches!(request.body, RequestBody::Fence(_)) {
            if request.incarnation != self.incarnation {
                return Err(Status::IncarnationMismatch);
            }
            if !self.exists {
                return Err(Status::UnknownVolume);
            }
        }
        if fencing {
            self.fence = self.fence.max(request.epoch);
        }
        match &request.body {
            RequestBody::Fence(fence) => self.on_fence(*fence),
            RequestBody::Configure(descriptor) => {
                self.descriptor_epoch = self.descriptor_epoch.max(descriptor.epoch);
                Ok(ReplyBody::Configure)
            }
            RequestBody::Write(write) => {
                self.layers.insert(write.version, write.snapshot);
                let cells = write.range.blocks().enumerate().map(|(i, block)| {
                    let data = whole(&write.data).slice(i * 4096..(i + 1) * 4096);
                    assert_eq!(crc32c::crc32c(&data), write.checksums[i]);
                    let checksum = write.checksums[i];
                    (
                        block,
                        Cell {
                            version: write.version,
                            data: Some(data),
                            checksum,
                        },
                    )
                });
                let cells = cells.collect();
                self.write(write.range, write.version, write.durable, cells)
            }
            RequestBody::Trim(trim) => {
                self.layers.insert(trim.version, trim.snapshot);
                let cell = Cell {
                    version: trim.version,
                    data: None,
                    checksum: 0,
                };
                let cells = trim.range.blocks().map(|b| (b, cell.clone())).collect();
                self.write(trim.range, trim.version, trim.durable, cells)
            }
            RequestBody::Repair(write) => {
                let place = (write.range.chunk.0, write.range.first);
                if self
                    .live
                    .get(&place)
                    .is_some_and(|c| c.version == write.version)
                {
                    self.corrupt = None;
                }
                Ok(ReplyBody::Written(WriteOutcome::Applied))
            }
            RequestBody::Read(read) => Ok(ReplyBody::Read(self.read(read))),
            RequestBody::Flush(flush) => {
                self.flush();
                self.suspect = false;
                self.watermark = self.watermark.max(flush.watermark);
                let below = flush.forget_below;
                self.live
                    .retain(|_, c| c.data.is_some() || c.version > below);
                Ok(ReplyBody::Flush)
            }
            RequestBody::Collect(collect) => {
                let entries = self.entries(|place, c| {
                    place.0 % collect.group_count == collect.group.0
                        && c.version > collect.watermark
                });
                Ok(ReplyBody::Entries(page(entries, collect.from, 3)))
            }
            RequestBody::Digest(digest) => {
                let entries = self.entries(|place, _| place.0 == digest.chunk.0);
                Ok(ReplyBody::Entries(page(entries, digest.from, 100)))
            }
            RequestBody::PullStart(start) => self.pull_start(start),
            RequestBody::PullStatus { group } => {
                Ok(ReplyBody::PullStatus(self.pull_status(group.0)))
            }
            RequestBody::Ping => Ok(ReplyBody::Ping),
            RequestBody::Hello(_) | RequestBody::ChunkDigests(_) | RequestBody::Layers(_) => {
                Err(Status::Invalid)
            }
        }
    }

    fn on_fence(&mut self, fence: Fence) -> Result<ReplyBody, Status> {
        let existed = self.exists;
        if !existed && !fence.create {
            return Err(Status::UnknownVolume);
        }
        self.exists = true;
        if fence.rebuild_epoch > Epoch(0) {
            if fence.rebuild_epoch != self.rebuild_epoch {
                self.pull.clear();
            }
            self.rebuild_epoch = fence.rebuild_epoch;
        }
        Ok(ReplyBody::Fence(FenceReply {
            existed,
            suspect: self.suspect,
            damaged: false,
            watermark: self.watermark,
            highest: self
                .live
                .values()
                .map(|c| c.version)
                .max()
                .unwrap_or_default(),
            written: !self.live.is_empty(),
        }))
    }

    fn write(
        &mut self,
        range: BlockRange,
        version: Version,
        durable: bool,
        cells: Vec<(u16, Cell)>,
    ) -> Result<ReplyBody, Status> {
        let newer = |live: &BTreeMap<Place, Cell>, block| {
            live.get(&(range.chunk.0, block))
                .is_none_or(|c| c.version < version)
        };
        let ignored = version <= self.watermark;
        if self.full && !ignored && cells.iter().any(|(b, _)| newer(&self.live, *b)) {
            return Err(Status::NoSpace);
        }
        self.writes += 1;
        for (block, cell) in cells {
            if !ignored && newer(&self.live, block) {
                self.set((range.chunk.0, block), Some(cell));
            }
        }
        if durable {
            self.flush();
        }
        Ok(ReplyBody::Written(WriteOutcome::Applied))
    }

    fn read(&mut self, read: &Read) -> ReadReply {
        let mut reply = ReadReply {
            range: read.range,
            blocks: Default::default(),
            data: Payload::new(),
        };
        for block in read.range.blocks() {
            let place = (read.range.chunk.0, block);
            let info = |state, version, checksum| BlockInfo {
                state,
                version,
                checksum,
            };
            match self.live.get(&place) {
                None => reply
                    .blocks
                    .push(info(BlockState::Absent, Version::ZERO, 0)),
                Some(cell) => match &cell.data {
                    None => reply
                        .blocks
                        .push(info(BlockState::Tombstone, cell.version, 0)),
                    Some(_) if self.corrupt == Some(place) => {
                        // Corrupted on the way: the bytes do not match.
                        reply
                            .blocks
                            .push(info(BlockState::Data, cell.version, cell.checksum));
                        reply.data.push(Bytes::from_static(&[0xee; 4096]));
                    }
                    Some(data) => {
                        reply
                            .blocks
                            .push(info(BlockState::Data, cell.version, cell.checksum));
                        reply.data.push(data.clone());
                    }
                },
            }
        }
        reply
    }

    fn entries(&self, test: impl Fn(&Place, &Cell) -> bool) -> Vec<Entry> {
        let all = self.live.iter().filter(|(p, c)| test(p, c));
        all.map(|(place, cell)| Entry {
            at: Cursor {
                chunk: ashlar_proto::ids::ChunkIndex(place.0),
                snapshot: SnapshotNumber(0),
                block: place.1,
            },
            state: if cell.data.is_some() {
                BlockState::Data
            } else {
                BlockState::Tombstone
            },
            version: cell.version,
            checksum: cell.checksum,
        })
        .collect()
    }

    fn pull_start(&mut self, start: &PullStart) -> Result<ReplyBody, Status> {
        if start.rebuild_epoch != self.rebuild_epoch {
            return Err(Status::WrongState);
        }
        self.pulls += 1;
        self.last_pull = start.group.0;
        let pull = Pull {
            groups: start.group_count,
            epoch: start.rebuild_epoch,
            source: start.source,
            source_incarnation: start.source_incarnation,
            todo: VecDeque::new(),
            applying: 0,
            state: PullState::Running,
            moved: 0,
            number: self.pulls,
        };
        self.pull.insert(start.group.0, pull);
        Ok(ReplyBody::PullStart)
    }

    fn pull_status(&self, group: u32) -> PullProgress {
        let none = PullProgress {
            rebuild_epoch: self.rebuild_epoch,
            state: PullState::None,
            chunks_done: 0,
            chunks_total: 0,
            blocks_moved: 0,
        };
        self.pull.get(&group).map_or(none, |p| PullProgress {
            rebuild_epoch: p.epoch,
            state: p.state,
            blocks_moved: p.moved,
            ..none
        })
    }
}

pub(super) fn whole(payload: &Payload) -> Bytes {
    match payload.as_slice() {
        [one] => one.clone(),
        many => Bytes::from(many.concat()),
    }
}

fn page(entries: Vec<Entry>, from: Cursor, most: usize) -> Entries {
    let mut entries: Vec<Entry> = entries.into_iter().filter(|e| e.at >= from).collect();
    let next = entries.get(most).map(|e| e.at);
    entries.truncate(most);
    Entries { entries, next }
}
