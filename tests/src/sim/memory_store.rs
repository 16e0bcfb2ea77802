//! A reference chunk store in memory: the store's interface with the simplest semantics that satisfy it.
//!
//! It lets the session and the disk engine be simulated against something obviously right, so that a
//! failing seed tells whether the chunk store is to blame. It does a dummy I/O on its [`SimDisk`] for
//! every request, so answers are delayed, reordered, and fail when the disk fails.
//!
//! Persistence: a request takes effect when its I/O completes; a sync makes durable what had taken
//! effect when it was submitted. The contents live in [`Media`], which outlives the process.
//!
//! [`SimDisk`]: ashlar_platform::sim::SimDisk

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use ashlar_platform::clock::Time;
use ashlar_platform::disk::{DiskCommand, IoToken};
use ashlar_platform::sim::Rng;
use ashlar_proto::ids::{
    BLOCKS_PER_CHUNK, ChunkIndex, DiskId, Epoch, Incarnation, ReplicaState, SnapshotNumber,
    Version, VolumeId,
};
use ashlar_proto::wire::{
    BlockInfo, BlockState, ChunkDigest, ChunkDigestList, Cursor, Entries, Entry, Payload,
    ReadReply, WriteOutcome,
};
use bytes::Bytes;
use smallvec::smallvec;
use storage_daemon::engine::ChunkStore;
use storage_daemon::store::{
    PullBlock, ReplicaInfo, StoreCommand, StoreError, StoreEvent, StoreIdentity, StoreReply,
    StoreRequest, StoreStats,
};

/// Entries per answer: small, so that paging is exercised.
const PAGE_ENTRIES: usize = 7;
const BLOCK: usize = 4096;

#[derive(Clone, Debug)]
struct Block {
    state: BlockState,
    version: Version,
    checksum: u32,
    data: Bytes,
}

#[derive(Clone, Debug)]
struct Replica {
    info: ReplicaInfo,
    blocks: BTreeMap<Cursor, Block>,
}

/// What is on the medium of one disk.
#[derive(Clone, Debug)]
pub struct Media {
    /// Who the disk is.
    pub identity: StoreIdentity,
    current: BTreeMap<VolumeId, Replica>,
    durable: BTreeMap<VolumeId, Replica>,
    /// Number of the sync that made `durable`: an older one that ends later changes nothing.
    durable_as_of: u64,
}

impl Media {
    /// An empty disk.
    pub fn new(identity: StoreIdentity) -> Self {
        Self {
            identity,
            current: BTreeMap::new(),
            durable: BTreeMap::new(),
            durable_as_of: 0,
        }
    }

    /// The machine lost power: blocks that are not durable are kept or lost one by one; the store begins
    /// another life.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        let lose_all = rng.chance(1, 4);
        let mut after = self.durable.clone();
        for (volume, replica) in &mut after {
            let Some(newer) = self.current.get(volume) else {
                continue;
            };
            for (at, block) in &newer.blocks {
                let known = replica
                    .blocks
                    .get(at)
                    .is_some_and(|b| b.version >= block.version);
                if !known && !lose_all && rng.coin() {
                    replica.info.highest = replica.info.highest.max(block.version);
                    replica.blocks.insert(*at, block.clone());
                }
            }
            replica.info.written |= !replica.blocks.is_empty();
        }
        for replica in after.values_mut() {
            replica.info.suspect = true;
        }
        self.identity.incarnation = Incarnation(rng.next_u64() | 1);
        self.identity.incarnation_changed = true;
        self.current = after.clone();
        self.durable = after;
        self.durable_as_of = 0;
    }
}

enum Work {
    Ready,
    Request {
        tag: u64,
        request: StoreRequest,
    },
    /// A write that must be durable, or a flush: the second I/O is a sync of what was current then.
    Synced {
        tag: u64,
        reply: StoreReply,
        as_of: u64,
        snapshot: BTreeMap<VolumeId, Replica>,
    },
}

/// The store of one process.
pub struct MemoryStore {
    media: Rc<RefCell<Media>>,
    work: BTreeMap<u64, Work>,
    next_token: u64,
    poisoned: bool,
    started: bool,
}

impl MemoryStore {
    /// A store on a medium; becomes ready after its first I/O.
    pub fn open(media: Rc<RefCell<Media>>) -> Self {
        media.borrow_mut().durable_as_of = 0;
        Self {
            media,
            work: BTreeMap::new(),
            next_token: 1,
            poisoned: false,
            started: false,
        }
    }

    fn submit(&mut self, work: Work, sync: bool, out: &mut Vec<StoreCommand>) {
        let token = IoToken(self.next_token);
        self.next_token += 1;
        self.work.insert(token.0, work);
        out.push(StoreCommand::Disk(if sync {
            DiskCommand::Sync { token }
        } else {
            let data = smallvec![Bytes::from_static(&[0; 512])];
            DiskCommand::Write {
                durable: false,
                token,
                offset: 0,
                data,
            }
        }));
    }

    fn on_done(&mut self, work: Work, out: &mut Vec<StoreCommand>) {
        match work {
            Work::Ready => out.push(StoreCommand::Ready(self.media.borrow().identity)),
            Work::Synced {
                tag,
                reply,
                as_of,
                snapshot,
            } => {
                let mut media = self.media.borrow_mut();
                if as_of > media.durable_as_of {
                    media.durable = snapshot;
                    media.durable_as_of = as_of;
                }
                out.push(StoreCommand::Reply {
                    tag,
                    result: Ok(reply),
                });
            }
            Work::Request { tag, request } => {
                let durable = is_durable(&request);
                let result = self.media.borrow_mut().execute(request);
                match result {
                    Ok(reply) if durable => {
                        let snapshot = self.media.borrow().current.clone();
                        let as_of = self.next_token;
                        self.submit(
                            Work::Synced {
                                tag,
                                reply,
                                as_of,
                                snapshot,
                            },
                            true,
                            out,
                        );
                    }
                    result => out.push(StoreCommand::Reply { tag, result }),
                }
            }
        }
    }

    fn poison(&mut self, message: String, out: &mut Vec<StoreCommand>) {
        for work in std::mem::take(&mut self.work).into_values() {
            if let Work::Request { tag, .. } | Work::Synced { tag, .. } = work {
                out.push(StoreCommand::Reply {
                    tag,
                    result: Err(StoreError::DiskFailed),
                });
            }
        }
        if !std::mem::replace(&mut self.poisoned, true) {
            out.push(StoreCommand::Poisoned {
                kind: std::io::ErrorKind::Other,
                message,
            });
        }
    }
}

fn is_durable(request: &StoreRequest) -> bool {
    match request {
        StoreRequest::Write { write, .. } => write.durable,
        StoreRequest::Trim { trim, .. } => trim.durable,
        StoreRequest::Flush { .. }
        | StoreRequest::PutFence { .. }
        | StoreRequest::PutDescriptor { .. }
        | StoreRequest::ClearSuspect { .. }
        | StoreRequest::DropReplica { .. }
        | StoreRequest::Shutdown => true,
        _ => false,
    }
}

impl ChunkStore for MemoryStore {
    fn step(&mut self, _now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>) {
        match event {
            StoreEvent::Request { tag, request } => {
                if self.poisoned {
                    out.push(StoreCommand::Reply {
                        tag,
                        result: Err(StoreError::DiskFailed),
                    });
                } else {
                    self.submit(Work::Request { tag, request }, false, out);
                }
            }
            StoreEvent::Disk(completion) => {
                let Some(work) = self.work.remove(&completion.token.0) else {
                    return;
                };
                match completion.result {
                    Ok(_) => self.on_done(work, out),
                    Err(error) => {
                        self.work.insert(completion.token.0, work);
                        self.poison(error.to_string(), out);
                    }
                }
            }
            StoreEvent::Tick => {
                if !std::mem::replace(&mut self.started, true) {
                    self.submit(Work::Ready, false, out);
                }
            }
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        (!self.started).then_some(Time(0))
    }
}

fn at(chunk: ChunkIndex, snapshot: SnapshotNumber, block: u16) -> Cursor {
    Cursor {
        chunk,
        snapshot,
        block,
    }
}

fn chunk_range(chunk: ChunkIndex) -> Range<Cursor> {
    let next = ChunkIndex(chunk.0 + 1);
    at(chunk, SnapshotNumber(0), 0)..at(next, SnapshotNumber(0), 0)
}

impl Media {
    fn execute(&mut self, request: StoreRequest) -> Result<StoreReply, StoreError> {
        let disk = self.identity.disk;
        match request {
            StoreRequest::PutFence {
                volume,
                epoch,
                create,
                rebuild_epoch,
            } => self.put_fence(volume, epoch, create, rebuild_epoch),
            StoreRequest::ListReplicas => {
                let infos = self.current.values().map(|r| r.info.clone()).collect();
                Ok(StoreReply::Replicas(infos))
            }
            StoreRequest::Stats => Ok(StoreReply::Stats(StoreStats::default())),
            StoreRequest::Shutdown => Ok(StoreReply::Done),
            StoreRequest::DropReplica { volume } => {
                self.current.remove(&volume);
                Ok(StoreReply::Done)
            }
            StoreRequest::PutDescriptor { descriptor } => {
                let replica = self.replica(descriptor.volume)?;
                if descriptor.epoch < replica.info.fence {
                    return Err(StoreError::Fenced(replica.info.fence));
                }
                replica.info.fence = descriptor.epoch;
                let mine = descriptor
                    .groups
                    .iter()
                    .flatten()
                    .filter(|r| r.disk == disk);
                if mine.clone().count() > 0 && mine.clone().all(|r| r.state == ReplicaState::InSync)
                {
                    replica.info.rebuild_epoch = Epoch(0);
                }
                replica.info.descriptor = Some(descriptor);
                Ok(StoreReply::Done)
            }
            StoreRequest::Write {
                volume,
                write,
                client,
            } => {
                let data = whole(&write.data);
                let replica = self.replica(volume)?;
                let blocks = write.range.blocks().zip(&write.checksums).enumerate();
                let blocks = blocks.map(|(i, (block, &checksum))| {
                    let data = data.slice(i * BLOCK..(i + 1) * BLOCK);
                    let cursor = at(write.range.chunk, write.snapshot, block);
                    (
                        cursor,
                        Block {
                            state: BlockState::Data,
                            version: write.version,
                            checksum,
                            data,
                        },
                    )
                });
                Ok(StoreReply::Written(replica.write(
                    blocks,
                    write.version,
                    client,
                )))
            }
            StoreRequest::Trim {
                volume,
                trim,
                client,
            } => {
                let replica = self.replica(volume)?;
                let (state, version) = (BlockState::Tombstone, trim.version);
                let blocks = trim.range.blocks().map(|block| {
                    let block_at = at(trim.range.chunk, trim.snapshot, block);
                    (
                        block_at,
                        Block {
                            state,
                            version,
                            checksum: 0,
                            data: Bytes::new(),
                        },
                    )
                });
                Ok(StoreReply::Written(replica.write(blocks, version, client)))
            }
            StoreRequest::Repair { volume, write } => {
                let data = whole(&write.data);
                let replica = self.replica(volume)?;
                for (i, block) in write.range.blocks().enumerate() {
                    let cursor = at(write.range.chunk, write.snapshot, block);
                    let old = replica
                        .blocks
                        .get(&cursor)
                        .map_or(Version::ZERO, |b| b.version);
                    if old <= write.version {
                        let data = data.slice(i * BLOCK..(i + 1) * BLOCK);
                        let checksum = write.checksums[i];
                        let block = Block {
                            state: BlockState::Data,
                            version: write.version,
                            checksum,
                            data,
                        };
                        replica.blocks.insert(cursor, block);
                    }
                }
                Ok(StoreReply::Written(WriteOutcome::Applied))
            }
            StoreRequest::Flush {
                volume,
                watermark,
                forget_below,
            } => {
                let replica = self.replica(volume)?;
                replica.info.watermark = replica.info.watermark.max(watermark);
                replica.blocks.retain(|_, block| {
                    block.state != BlockState::Tombstone || block.version > forget_below
                });
                Ok(StoreReply::Done)
            }
            StoreRequest::PullApply {
                volume,
                rebuild_epoch,
                chunk,
                blocks,
            } => self.pull_apply(volume, rebuild_epoch, chunk, blocks),
            StoreRequest::ClearSuspect { volume } => {
                self.replica(volume)?.info.suspect = false;
                Ok(StoreReply::Done)
            }
            request => self.query(request),
        }
    }

    fn query(&mut self, request: StoreRequest) -> Result<StoreReply, StoreError> {
        match request {
            StoreRequest::Read { volume, read } => {
                let replica = self.replica(volume)?;
                let mut blocks = smallvec![];
                let mut data = Payload::new();
                for block in read.range.blocks() {
                    let high = at(read.range.chunk, read.snapshot, block);
                    let layers = (0..=read.snapshot.0).rev().map(SnapshotNumber);
                    let mut found = layers
                        .take(if read.exact_layer { 1 } else { usize::MAX })
                        .filter_map(|s| {
                            replica.blocks.get(&Cursor {
                                snapshot: s,
                                ..high
                            })
                        });
                    let Some(block) = found.next() else {
                        blocks.push(BlockInfo {
                            state: BlockState::Absent,
                            version: Version::ZERO,
                            checksum: 0,
                        });
                        continue;
                    };
                    let (state, version, checksum) = (block.state, block.version, block.checksum);
                    blocks.push(BlockInfo {
                        state,
                        version,
                        checksum,
                    });
                    if block.state == BlockState::Data {
                        data.push(block.data.clone());
                    }
                }
                Ok(StoreReply::Read(ReadReply {
                    range: read.range,
                    blocks,
                    data,
                }))
            }
            StoreRequest::Collect { volume, collect } => {
                let replica = self.replica(volume)?;
                let wanted = |c: &Cursor, b: &Block| {
                    c.chunk.0 % collect.group_count.max(1) == collect.group.0
                        && b.version > collect.watermark
                };
                Ok(StoreReply::Entries(replica.list(
                    collect.from,
                    None,
                    wanted,
                )))
            }
            StoreRequest::Digest { volume, digest } => {
                let replica = self.replica(volume)?;
                let range = chunk_range(digest.chunk);
                let from = digest.from.max(range.start);
                Ok(StoreReply::Entries(replica.list(
                    from,
                    Some(range.end),
                    |_, _| true,
                )))
            }
            StoreRequest::ChunkDigests { volume, digests } => {
                let replica = self.replica(volume)?;
                let mut chunks: BTreeMap<ChunkIndex, u64> = BTreeMap::new();
                for (cursor, block) in replica
                    .blocks
                    .range(at(digests.from, SnapshotNumber(0), 0)..)
                {
                    if cursor.chunk.0 % digests.group_count.max(1) == digests.group.0 {
                        let hash = chunks.entry(cursor.chunk).or_insert(1);
                        for x in [
                            u64::from(cursor.snapshot.0),
                            u64::from(cursor.block),
                            block.version.epoch.0,
                            block.version.sequence.0,
                            block.state as u64,
                        ] {
                            *hash = (*hash ^ x)
                                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                                .rotate_left(29);
                        }
                    }
                }
                let all = chunks
                    .into_iter()
                    .map(|(chunk, digest)| ChunkDigest { chunk, digest });
                let mut chunks: Vec<_> = all.take(PAGE_ENTRIES + 1).collect();
                let next = if chunks.len() > PAGE_ENTRIES {
                    chunks.pop().map(|c| c.chunk)
                } else {
                    None
                };
                Ok(StoreReply::ChunkDigests(ChunkDigestList { chunks, next }))
            }
            StoreRequest::GetReplica { volume } => Ok(StoreReply::Replica(Box::new(
                self.replica(volume)?.info.clone(),
            ))),
            _ => Err(StoreError::Invalid("not a query")),
        }
    }

    fn replica(&mut self, volume: VolumeId) -> Result<&mut Replica, StoreError> {
        self.current
            .get_mut(&volume)
            .ok_or(StoreError::UnknownVolume)
    }

    fn put_fence(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        create: bool,
        rebuild_epoch: Epoch,
    ) -> Result<StoreReply, StoreError> {
        let existed = self.current.contains_key(&volume);
        if !existed && !create {
            return Err(StoreError::UnknownVolume);
        }
        let replica = self.current.entry(volume).or_insert_with(|| Replica {
            info: ReplicaInfo {
                volume,
                fence: Epoch(0),
                rebuild_epoch: Epoch(0),
                suspect: false,
                damaged: false,
                watermark: Version::ZERO,
                highest: Version::ZERO,
                written: false,
                pages: 0,
                chunks: 0,
                descriptor: None,
            },
            blocks: BTreeMap::new(),
        });
        if epoch < replica.info.fence {
            return Err(StoreError::Fenced(replica.info.fence));
        }
        replica.info.fence = epoch;
        if rebuild_epoch != Epoch(0) {
            replica.info.rebuild_epoch = rebuild_epoch;
            replica.info.damaged = false;
        }
        Ok(StoreReply::Fenced {
            existed,
            replica: replica.info.clone(),
        })
    }

    fn pull_apply(
        &mut self,
        volume: VolumeId,
        rebuild_epoch: Epoch,
        chunk: ChunkIndex,
        blocks: Vec<PullBlock>,
    ) -> Result<StoreReply, StoreError> {
        let replica = self.replica(volume)?;
        let mut applied = 0;
        for source in blocks {
            if source.state == BlockState::Bad || u32::from(source.block) >= BLOCKS_PER_CHUNK {
                return Err(StoreError::Invalid("pulled block"));
            }
            let cursor = at(chunk, source.snapshot, source.block);
            let local = replica.blocks.get(&cursor);
            let version = local.map_or(Version::ZERO, |b| b.version);
            let same = local.map_or(BlockState::Absent, |b| b.state) == source.state
                && version == source.version;
            // R7: what is new wins by version, for what is older the source is the truth.
            let keep = version.epoch >= rebuild_epoch && version >= source.version;
            if same || keep {
                continue;
            }
            applied += 1;
            if source.state == BlockState::Absent {
                replica.blocks.remove(&cursor);
                continue;
            }
            replica.info.highest = replica.info.highest.max(source.version);
            replica.info.written = true;
            let PullBlock {
                state,
                version,
                checksum,
                data,
                ..
            } = source;
            replica.blocks.insert(
                cursor,
                Block {
                    state,
                    version,
                    checksum,
                    data,
                },
            );
        }
        Ok(StoreReply::Pulled { applied })
    }

    /// The identity of the disk.
    pub fn disk(&self) -> DiskId {
        self.identity.disk
    }
}

impl Replica {
    fn write(
        &mut self,
        blocks: impl Iterator<Item = (Cursor, Block)>,
        version: Version,
        client: bool,
    ) -> WriteOutcome {
        if client && version <= self.info.watermark {
            return WriteOutcome::Superseded;
        }
        let mut outcome = WriteOutcome::Applied;
        for (cursor, block) in blocks {
            match self.blocks.get(&cursor) {
                Some(old) if old.version >= version => outcome = WriteOutcome::Superseded,
                _ => {
                    self.blocks.insert(cursor, block);
                }
            }
        }
        self.info.highest = self.info.highest.max(version);
        self.info.written = true;
        outcome
    }

    fn list(
        &self,
        from: Cursor,
        end: Option<Cursor>,
        wanted: impl Fn(&Cursor, &Block) -> bool,
    ) -> Entries {
        let range = self
            .blocks
            .range(from..)
            .take_while(|(c, _)| end.is_none_or(|end| **c < end));
        let mut entries: Vec<Entry> = range
            .filter(|(c, b)| wanted(c, b))
            .take(PAGE_ENTRIES + 1)
            .map(|(c, b)| Entry {
                at: *c,
                state: b.state,
                version: b.version,
                checksum: b.checksum,
            })
            .collect();
        let next = if entries.len() > PAGE_ENTRIES {
            entries.pop().map(|e| e.at)
        } else {
            None
        };
        Entries { entries, next }
    }
}

fn whole(data: &Payload) -> Bytes {
    match &data[..] {
        [one] => one.clone(),
        parts => parts.concat().into(),
    }
}
