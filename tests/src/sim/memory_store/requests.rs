//! What each request does to the contents.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::descriptor::VolumeDescriptor;
use ashlar_proto::ids::{
    BLOCKS_PER_CHUNK, ChunkIndex, DiskId, Epoch, ReplicaState, SnapshotNumber, Version, VolumeId,
};
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{
    BlockInfo, BlockState, ChunkDigest, ChunkDigestList, Cursor, Entries, Entry, Payload,
    ReadReply, WriteOutcome,
};
use bytes::Bytes;
use smallvec::smallvec;
use storage_daemon::store::{
    LayerProgress, PullBlock, ReplicaInfo, StoreError, StoreReply, StoreRequest, StoreStats,
};

use super::{BLOCK, Block, Media, PAGE_ENTRIES, Replica, at, chunk_range};

impl Media {
    /// The layer of a request under the replica's list (docs/snapshots.md, S7).
    fn name_layers(&self, request: &mut StoreRequest) {
        let name = |volume: &VolumeId, layer: &mut SnapshotNumber| {
            if let Some(replica) = self.current.get(volume) {
                *layer = replica.info.layers.canonical(*layer);
            }
        };
        match request {
            StoreRequest::Write { volume, write, .. } => name(volume, &mut write.snapshot),
            StoreRequest::Trim { volume, trim, .. } => name(volume, &mut trim.snapshot),
            StoreRequest::Read { volume, read } if read.exact_layer => {
                name(volume, &mut read.snapshot);
            }
            StoreRequest::PullApply { volume, blocks, .. } => {
                for block in blocks {
                    name(volume, &mut block.snapshot);
                }
            }
            _ => {}
        }
    }

    pub(super) fn execute(&mut self, mut request: StoreRequest) -> Result<StoreReply, StoreError> {
        self.name_layers(&mut request);
        let disk = self.identity.disk;
        match request {
            StoreRequest::PutFence {
                volume,
                epoch,
                create,
                rebuild_epoch,
                ..
            } => self.put_fence(volume, epoch, create, rebuild_epoch),
            StoreRequest::ListReplicas => {
                let infos = self.current.values().map(|r| r.info.clone()).collect();
                Ok(StoreReply::Replicas(infos))
            }
            StoreRequest::LayerProgress => {
                let progress = self.current.values().map(|r| LayerProgress {
                    volume: r.info.volume,
                    revision: r.info.layers.revision,
                    chunks_left: 0,
                    inherits: false,
                    inherited_left: 0,
                    pages: r.info.pages,
                });
                Ok(StoreReply::LayerProgress(progress.collect()))
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
                replica.put_layers(&descriptor.layers);
                let layers = replica.info.layers.clone();
                replica.info.descriptor = Some(VolumeDescriptor {
                    layers,
                    ..descriptor
                });
                Ok(StoreReply::Done)
            }
            StoreRequest::PutLayers { volume, layers } => {
                layers.check().map_err(|e| StoreError::Invalid(e.0))?;
                self.replica(volume)?.put_layers(&layers);
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
                    // The block that a read at this number sees.
                    let Some(cursor) = replica.newest(at(write.range.chunk, write.snapshot, block))
                    else {
                        continue;
                    };
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
                replica.forget(forget_below);
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
                if !read.exact_layer
                    && replica.info.layers.canonical(read.snapshot) != read.snapshot
                {
                    return Err(StoreError::SnapshotGone);
                }
                let mut blocks = smallvec![];
                let mut data = Payload::new();
                for block in read.range.blocks() {
                    let high = at(read.range.chunk, read.snapshot, block);
                    let found = if read.exact_layer {
                        Some(high)
                    } else {
                        replica.newest(high)
                    };
                    let Some(block) = found.and_then(|at| replica.blocks.get(&at)) else {
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
                layers: LayerList::default(),
                garbage_left: 0,
                layer_bytes: Vec::new(),
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
    /// Where the block is that a read at a number sees.
    fn newest(&self, high: Cursor) -> Option<Cursor> {
        let chunk = at(high.chunk, SnapshotNumber(0), 0)..=at(high.chunk, high.snapshot, u16::MAX);
        let (top, _) = self.blocks.range(chunk).next_back()?;
        let layers = (0..=top.snapshot.0).map(SnapshotNumber);
        let cursors = layers.map(|snapshot| Cursor { snapshot, ..high });
        let found = cursors.filter_map(|at| self.blocks.get(&at).map(|b| (b.version, at)));
        found.max().map(|(_, at)| at)
    }

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

    /// Tombstones at or below go, unless an older layer has something beneath (R9).
    fn forget(&mut self, below: Version) {
        // What a tombstone hides may lie in any other layer.
        let data = self.blocks.iter();
        let data = data.filter(|(_, b)| b.state != BlockState::Tombstone);
        let places: BTreeSet<_> = data.map(|(at, _)| (at.chunk, at.block)).collect();
        self.blocks.retain(|at, block| {
            block.state != BlockState::Tombstone
                || block.version > below
                || places.contains(&(at.chunk, at.block))
        });
    }

    /// Like a store that has merged everything the moment it gets a list.
    fn put_layers(&mut self, layers: &LayerList) {
        if layers.revision <= self.info.layers.revision {
            return;
        }
        self.info.layers = layers.clone();
        if let Some(descriptor) = &mut self.info.descriptor {
            descriptor.layers = layers.clone();
        }
        for (at, block) in std::mem::take(&mut self.blocks) {
            let snapshot = layers.canonical(at.snapshot);
            let at = Cursor { snapshot, ..at };
            let old = self.blocks.get(&at);
            if old.is_none_or(|old| old.version < block.version) {
                self.blocks.insert(at, block);
            }
        }
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
