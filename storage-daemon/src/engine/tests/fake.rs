//! A store in memory that answers when it is told to, with pages of few entries, so that the engine's
//! waiting and paging are exercised.

use std::collections::{BTreeMap, VecDeque};

use ashlar_platform::clock::Time;
use ashlar_proto::ids::*;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::*;
use bytes::Bytes;

use crate::engine::ChunkStore;
use crate::store::*;

const PAGE: usize = 3;

#[derive(Clone, PartialEq, Debug)]
pub struct Stored {
    pub state: BlockState,
    pub version: Version,
    pub data: Bytes,
}

pub struct FakeStore {
    pub identity: StoreIdentity,
    pub replicas: BTreeMap<VolumeId, ReplicaInfo>,
    pub blocks: BTreeMap<(VolumeId, Cursor), Stored>,
    /// Keep everything that changes data until `release`.
    pub hold: bool,
    pub held: VecDeque<(u64, StoreRequest)>,
    released: VecDeque<(u64, StoreRequest)>,
    /// Versions of writes in the order in which they were applied.
    pub applied: Vec<Version>,
    /// Requests by kind, in order.
    pub seen: Vec<&'static str>,
    pub poison: bool,
    /// Answer `Busy` to so many merges.
    pub busy_applies: u32,
    opened: bool,
    closed: bool,
}

pub fn info(volume: VolumeId) -> ReplicaInfo {
    ReplicaInfo {
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
        layers: LayerList::default(),
        garbage_left: 0,
        layer_bytes: Vec::new(),
    }
}

impl FakeStore {
    pub fn new(disk: u8) -> Self {
        Self {
            identity: StoreIdentity {
                cluster: ClusterId([9; 16]),
                disk: DiskId([disk; 16]),
                incarnation: Incarnation(u64::from(disk) * 100),
                incarnation_changed: false,
                damaged: false,
                bad_blocks: 0,
            },
            replicas: BTreeMap::new(),
            blocks: BTreeMap::new(),
            hold: false,
            held: VecDeque::new(),
            released: VecDeque::new(),
            applied: Vec::new(),
            seen: Vec::new(),
            poison: false,
            busy_applies: 0,
            opened: false,
            closed: false,
        }
    }

    pub fn put(&mut self, volume: VolumeId, at: Cursor, version: Version, byte: u8) {
        let data = Bytes::from(vec![byte; BLOCK_SIZE]);
        self.blocks.insert(
            (volume, at),
            Stored {
                state: BlockState::Data,
                version,
                data,
            },
        );
    }

    pub fn put_tombstone(&mut self, volume: VolumeId, at: Cursor, version: Version) {
        let stored = Stored {
            state: BlockState::Tombstone,
            version,
            data: Bytes::new(),
        };
        self.blocks.insert((volume, at), stored);
    }

    /// Lets so many held requests be carried out at the next tick.
    pub fn release(&mut self, count: usize) {
        for _ in 0..count {
            self.released.extend(self.held.pop_front());
        }
    }

    /// Lets one held request be carried out at the next tick, out of order.
    pub fn release_one(&mut self, index: usize) {
        self.released.extend(self.held.remove(index));
    }

    fn entry(at: Cursor, stored: &Stored) -> Entry {
        let checksum = if stored.state == BlockState::Data {
            crc32c::crc32c(&stored.data)
        } else {
            0
        };
        Entry {
            at,
            state: stored.state,
            version: stored.version,
            checksum,
        }
    }

    fn entries(&self, volume: VolumeId, chunk: ChunkIndex, from: Cursor) -> Entries {
        let all = self.blocks.range((volume, from)..);
        let mut entries: Vec<Entry> = all
            .take_while(|((v, at), _)| *v == volume && at.chunk == chunk)
            .take(PAGE + 1)
            .map(|((_, at), stored)| Self::entry(*at, stored))
            .collect();
        let next = (entries.len() > PAGE).then(|| entries[PAGE].at);
        entries.truncate(PAGE);
        Entries { entries, next }
    }

    fn digests(&self, volume: VolumeId, ask: &ChunkDigests) -> ChunkDigestList {
        let mut chunks = BTreeMap::<ChunkIndex, u64>::new();
        for ((v, at), stored) in &self.blocks {
            if *v == volume && at.chunk >= ask.from && at.chunk.0 % ask.group_count == ask.group.0 {
                let text = format!("{:?}", Self::entry(*at, stored));
                let digest = chunks.entry(at.chunk).or_default();
                *digest = digest.rotate_left(7) ^ u64::from(crc32c::crc32c(text.as_bytes()));
            }
        }
        let next = chunks.keys().nth(PAGE).copied();
        let chunks = chunks.into_iter().take(PAGE);
        ChunkDigestList {
            chunks: chunks
                .map(|(chunk, digest)| ChunkDigest { chunk, digest })
                .collect(),
            next,
        }
    }

    fn read(&self, volume: VolumeId, read: &Read) -> ReadReply {
        let mut reply = ReadReply {
            range: read.range,
            blocks: Default::default(),
            data: Default::default(),
        };
        for block in read.range.blocks() {
            let at = Cursor {
                chunk: read.range.chunk,
                snapshot: self.name(volume, read.snapshot),
                block,
            };
            let stored = self.blocks.get(&(volume, at));
            let absent = BlockInfo {
                state: BlockState::Absent,
                version: Version::ZERO,
                checksum: 0,
            };
            reply.blocks.push(stored.map_or(absent, |s| {
                let entry = Self::entry(at, s);
                BlockInfo {
                    state: s.state,
                    version: s.version,
                    checksum: entry.checksum,
                }
            }));
            if let Some(s) = stored.filter(|s| s.state == BlockState::Data) {
                reply.data.push(s.data.clone());
            }
        }
        reply
    }

    fn write(
        &mut self,
        volume: VolumeId,
        range: BlockRange,
        snapshot: SnapshotNumber,
        new: &Stored,
    ) -> WriteOutcome {
        let snapshot = self.name(volume, snapshot);
        self.applied.push(new.version);
        let mut outcome = WriteOutcome::Applied;
        for (index, block) in range.blocks().enumerate() {
            let key = (
                volume,
                Cursor {
                    chunk: range.chunk,
                    snapshot,
                    block,
                },
            );
            if self
                .blocks
                .get(&key)
                .is_some_and(|old| old.version >= new.version)
            {
                outcome = WriteOutcome::Superseded;
                continue;
            }
            let mut stored = new.clone();
            if stored.state == BlockState::Data {
                stored.data = new.data.slice(index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE);
            }
            self.blocks.insert(key, stored);
        }
        outcome
    }

    fn pull(
        &mut self,
        volume: VolumeId,
        e: Epoch,
        chunk: ChunkIndex,
        blocks: Vec<PullBlock>,
    ) -> StoreReply {
        let mut applied = 0;
        for block in blocks {
            let key = (
                volume,
                Cursor {
                    chunk,
                    snapshot: self.name(volume, block.snapshot),
                    block: block.block,
                },
            );
            let old = self.blocks.get(&key);
            if old.is_some_and(|old| old.version.epoch >= e && old.version >= block.version) {
                continue;
            }
            applied += 1;
            if block.state == BlockState::Absent {
                self.blocks.remove(&key);
            } else {
                let stored = Stored {
                    state: block.state,
                    version: block.version,
                    data: block.data,
                };
                self.blocks.insert(key, stored);
            }
        }
        StoreReply::Pulled { applied }
    }

    /// Like a store that has merged everything the moment it gets a list.
    pub fn put_layers(&mut self, volume: VolumeId, layers: LayerList) -> Result<(), StoreError> {
        let replica = self.replicas.get_mut(&volume);
        let replica = replica.ok_or(StoreError::UnknownVolume)?;
        layers.check().map_err(|e| StoreError::Invalid(e.0))?;
        if layers.revision <= replica.layers.revision {
            return Ok(());
        }
        replica.layers = layers.clone();
        let (mine, others) = std::mem::take(&mut self.blocks)
            .into_iter()
            .partition(|((v, _), _)| *v == volume);
        self.blocks = others;
        let mine: BTreeMap<(VolumeId, Cursor), Stored> = mine;
        for ((_, at), stored) in mine {
            let snapshot = layers.canonical(at.snapshot);
            let key = (volume, Cursor { snapshot, ..at });
            if self
                .blocks
                .get(&key)
                .is_none_or(|old| old.version < stored.version)
            {
                self.blocks.insert(key, stored);
            }
        }
        Ok(())
    }

    fn name(&self, volume: VolumeId, layer: SnapshotNumber) -> SnapshotNumber {
        let replica = self.replicas.get(&volume);
        replica.map_or(layer, |r| r.layers.canonical(layer))
    }

    fn carry_out(&mut self, request: StoreRequest) -> Result<StoreReply, StoreError> {
        if self.poison {
            return Err(StoreError::DiskFailed);
        }
        match request {
            StoreRequest::PutLayers { volume, layers } => {
                self.put_layers(volume, layers).map(|()| StoreReply::Done)
            }
            StoreRequest::Write { volume, write, .. } | StoreRequest::Repair { volume, write } => {
                let data = write.data.concat().into();
                let new = Stored {
                    state: BlockState::Data,
                    version: write.version,
                    data,
                };
                Ok(StoreReply::Written(self.write(
                    volume,
                    write.range,
                    write.snapshot,
                    &new,
                )))
            }
            StoreRequest::Trim { volume, trim, .. } => {
                let new = Stored {
                    state: BlockState::Tombstone,
                    version: trim.version,
                    data: Bytes::new(),
                };
                Ok(StoreReply::Written(self.write(
                    volume,
                    trim.range,
                    trim.snapshot,
                    &new,
                )))
            }
            StoreRequest::Read { volume, read } => Ok(StoreReply::Read(self.read(volume, &read))),
            StoreRequest::Flush { .. } | StoreRequest::Shutdown => Ok(StoreReply::Done),
            StoreRequest::Collect { .. } => Ok(StoreReply::Entries(Entries {
                entries: vec![],
                next: None,
            })),
            StoreRequest::Digest { volume, digest } => Ok(StoreReply::Entries(self.entries(
                volume,
                digest.chunk,
                digest.from,
            ))),
            StoreRequest::ChunkDigests { volume, digests } => {
                Ok(StoreReply::ChunkDigests(self.digests(volume, &digests)))
            }
            StoreRequest::ListBlocks { .. } => Ok(StoreReply::Blocks(Default::default())),
            StoreRequest::PullApply {
                volume,
                rebuild_epoch,
                chunk,
                blocks,
            } => {
                if self.busy_applies > 0 {
                    self.busy_applies -= 1;
                    return Err(StoreError::Busy);
                }
                Ok(self.pull(volume, rebuild_epoch, chunk, blocks))
            }
            StoreRequest::PutFence {
                volume,
                epoch,
                create,
                rebuild_epoch,
                ..
            } => {
                let existed = self.replicas.contains_key(&volume);
                if !existed && !create {
                    return Err(StoreError::UnknownVolume);
                }
                let replica = self.replicas.entry(volume).or_insert_with(|| info(volume));
                if epoch < replica.fence {
                    return Err(StoreError::Fenced(replica.fence));
                }
                replica.fence = epoch;
                if rebuild_epoch.0 != 0 {
                    replica.rebuild_epoch = rebuild_epoch;
                }
                Ok(StoreReply::Fenced {
                    existed,
                    replica: replica.clone(),
                })
            }
            StoreRequest::PutDescriptor { descriptor } => {
                let replica = self
                    .replicas
                    .get_mut(&descriptor.volume)
                    .ok_or(StoreError::UnknownVolume)?;
                if descriptor.epoch < replica.fence {
                    return Err(StoreError::Fenced(replica.fence));
                }
                replica.fence = descriptor.epoch;
                replica.descriptor = Some(descriptor);
                Ok(StoreReply::Done)
            }
            StoreRequest::GetReplica { volume } => {
                let replica = self
                    .replicas
                    .get(&volume)
                    .ok_or(StoreError::UnknownVolume)?;
                Ok(StoreReply::Replica(Box::new(replica.clone())))
            }
            StoreRequest::ClearSuspect { volume } => {
                self.replicas
                    .get_mut(&volume)
                    .ok_or(StoreError::UnknownVolume)?
                    .suspect = false;
                Ok(StoreReply::Done)
            }
            StoreRequest::DropReplica { volume } => {
                self.replicas.remove(&volume);
                self.blocks.retain(|(v, _), _| *v != volume);
                Ok(StoreReply::Done)
            }
            StoreRequest::ListReplicas => Ok(StoreReply::Replicas(
                self.replicas.values().cloned().collect(),
            )),
            StoreRequest::Flatten { .. } => Ok(StoreReply::Done),
            StoreRequest::LayerProgress => Ok(StoreReply::LayerProgress(
                self.replicas
                    .values()
                    .map(|r| LayerProgress {
                        volume: r.volume,
                        revision: r.layers.revision,
                        chunks_left: r.garbage_left,
                        inherits: false,
                        inherited_left: 0,
                        pages: r.pages,
                    })
                    .collect(),
            )),
            StoreRequest::Stats => Ok(StoreReply::Stats(StoreStats::default())),
        }
    }
}

fn kind(request: &StoreRequest) -> &'static str {
    match request {
        StoreRequest::Write { .. } => "write",
        StoreRequest::Trim { .. } => "trim",
        StoreRequest::Read { .. } => "read",
        StoreRequest::Flush { .. } => "flush",
        StoreRequest::Collect { .. } => "collect",
        StoreRequest::Digest { .. } => "digest",
        StoreRequest::ChunkDigests { .. } => "chunk digests",
        StoreRequest::ListBlocks { .. } => "list blocks",
        StoreRequest::Repair { .. } => "repair",
        StoreRequest::PullApply { .. } => "pull apply",
        StoreRequest::PutFence { .. } => "fence",
        StoreRequest::PutDescriptor { .. } => "descriptor",
        StoreRequest::PutLayers { .. } => "layers",
        StoreRequest::GetReplica { .. } => "get replica",
        StoreRequest::ClearSuspect { .. } => "clear suspect",
        StoreRequest::DropReplica { .. } => "drop",
        StoreRequest::ListReplicas => "list",
        StoreRequest::Flatten { .. } => "flatten",
        StoreRequest::LayerProgress => "layer progress",
        StoreRequest::Stats => "stats",
        StoreRequest::Shutdown => "shutdown",
    }
}

impl ChunkStore for FakeStore {
    fn step(&mut self, _now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>) {
        match event {
            StoreEvent::Tick if !self.opened => {
                self.opened = true;
                out.push(StoreCommand::Ready(self.identity));
            }
            StoreEvent::Tick => {
                while let Some((tag, request)) = self.released.pop_front() {
                    let result = self.carry_out(request);
                    out.push(StoreCommand::Reply { tag, result });
                }
            }
            StoreEvent::Request { tag, request } => {
                self.seen.push(kind(&request));
                let changes = matches!(
                    request,
                    StoreRequest::Write { .. }
                        | StoreRequest::Trim { .. }
                        | StoreRequest::PullApply { .. }
                        | StoreRequest::PutFence { .. }
                        | StoreRequest::PutDescriptor { .. }
                        | StoreRequest::PutLayers { .. }
                        | StoreRequest::Flush { .. }
                        | StoreRequest::DropReplica { .. }
                );
                if self.hold && changes {
                    return self.held.push_back((tag, request));
                }
                let shutdown = matches!(request, StoreRequest::Shutdown);
                let result = self.carry_out(request);
                out.push(StoreCommand::Reply { tag, result });
                if shutdown && !self.closed {
                    self.closed = true;
                    out.push(StoreCommand::Closed);
                }
            }
            StoreEvent::Disk(_) => {}
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        None
    }
}
