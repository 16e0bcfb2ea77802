//! A volume that is a clone (docs/snapshots.md, C1 to C7): before a simulation begins, a volume is written, snapshotted and
//! cloned, and from then on the clone is the volume that everything happens to.
//!
//! - What was written before is part of the history: completed and flushed before the first client comes. So the oracle judges
//!   what is inherited like anything else.
//! - The origin goes on after its snapshot: what it writes then must not be seen.
//! - A replica of the origin may be stale when it is cloned, with blocks missing and with blocks that were never
//!   acknowledged.
//! - Nodes are told to flatten now and then.

use std::collections::BTreeMap;

use ashlar_platform::sim::Rng;
use ashlar_proto::ids::{
    BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockRange, ChunkIndex, ClientId, DiskId, Epoch, GroupIndex,
    Incarnation, NodeId, ReplicaState, SnapshotId, SnapshotNumber, Version, VolumeId,
};
use ashlar_proto::wire::{BlockState, Fence, Flush, Read, ReplyBody, RequestBody, Trim, Write};
use bytes::Bytes;
use metadata_raft::model::{
    ChangeReplicas, CloneVolume, CommitSnapshot, NewSnapshot, OpenVolume, Operation, ReplicaChange,
    ReserveSnapshots, Source,
};
use storage_daemon::engine::{AdminRequest, EngineEvent};

use super::cluster::Cluster;
use super::history::{Kind, OperationId, Outcome, SECTORS_PER_BLOCK, Value, decode, stamped};
use super::metadata::{Metadata, VOLUME, node_of};
use super::run::{ask, ask_of};

/// The volume that was cloned.
pub(super) const ORIGIN: VolumeId = VolumeId([0x71; 16]);
const SNAPSHOT: SnapshotId = SnapshotId([0x72; 16]);
const WRITER: ClientId = ClientId([0x73; 16]);
/// Operations that no history knows.
const NOBODY: OperationId = OperationId(u32::MAX - 7);

/// What the snapshot shows, by (chunk, block): whose data, or none.
pub(super) type Image = BTreeMap<(u32, u32), OperationId>;

impl Metadata {
    fn open_origin(&mut self, incarnations: &[(DiskId, Incarnation)], stale: Option<DiskId>) {
        self.must(Operation::OpenVolume(OpenVolume {
            volume: ORIGIN,
            client: WRITER,
            node: NodeId::NIL,
            client_name: "writer".to_owned(),
            force: false,
        }));
        let volume = self.volume();
        let (epoch, groups) = (volume.epoch, volume.groups.clone());
        let mut changes = Vec::new();
        for (group, replicas) in groups.iter().enumerate() {
            for replica in replicas {
                let known = incarnations.iter().find(|(d, _)| *d == replica.disk);
                changes.push(ReplicaChange {
                    group: GroupIndex(group as u32),
                    disk: replica.disk,
                    state: if Some(replica.disk) == stale {
                        ReplicaState::Stale
                    } else {
                        ReplicaState::InSync
                    },
                    incarnation: known.map_or(Incarnation(0), |(_, i)| *i),
                });
            }
        }
        self.must(Operation::ChangeReplicas(ChangeReplicas {
            volume: ORIGIN,
            client: WRITER,
            epoch,
            changes,
        }));
    }

    fn snapshot_origin(&mut self) {
        self.must(Operation::CloseVolume {
            volume: ORIGIN,
            client: WRITER,
            epoch: self.volume().epoch,
            clean: true,
        });
        self.must(Operation::ReserveSnapshots(ReserveSnapshots {
            snapshots: vec![NewSnapshot {
                id: SNAPSHOT,
                name: "origin".to_owned(),
                volume: ORIGIN,
                labels: Default::default(),
            }],
            group: None,
            created_unix_ms: 1,
        }));
        self.must(Operation::CommitSnapshots(vec![CommitSnapshot {
            snapshot: SNAPSHOT,
            holder: None,
        }]));
    }

    /// The clone becomes the volume.
    fn clone_origin(&mut self) {
        let (size_bytes, min_replicas) = (self.volume().size_bytes, self.volume().min_replicas);
        self.must(Operation::CloneVolume(CloneVolume {
            volume: VOLUME,
            name: "clone".to_owned(),
            size_bytes,
            min_replicas,
            snapshot: SNAPSHOT,
            source: Source::Snapshot(SNAPSHOT),
            labels: Default::default(),
            created_unix_ms: 1,
        }));
        self.is_cloned();
    }
}

/// One update of the origin.
struct Update {
    range: BlockRange,
    /// `None`: a trim.
    by: Option<OperationId>,
    version: Version,
    snapshot: SnapshotNumber,
}

impl Update {
    fn body(&self) -> RequestBody {
        let range = self.range;
        let Some(by) = self.by else {
            return RequestBody::Trim(Trim {
                range,
                snapshot: self.snapshot,
                version: self.version,
                durable: false,
            });
        };
        let first = first_sector(range);
        let data = stamped(by, first, u64::from(range.count) * SECTORS_PER_BLOCK);
        RequestBody::Write(Write {
            range,
            snapshot: self.snapshot,
            version: self.version,
            durable: false,
            checksums: data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect(),
            data: [Bytes::from(data)].into_iter().collect(),
        })
    }
}

fn first_sector(range: BlockRange) -> u64 {
    let block = u64::from(range.chunk.0) * u64::from(BLOCKS_PER_CHUNK) + u64::from(range.first);
    block * SECTORS_PER_BLOCK
}

/// Writes the origin, takes its snapshot, and clones it.
pub(super) fn prepare(cluster: &mut Cluster, rng: &mut Rng) -> Result<(), String> {
    cluster.run_until(cluster.in_ms(50));
    let volume = cluster.metadata.volume().clone();
    let disks = volume.disks();
    let may_be_stale = volume.replicas > 2 && rng.chance(1, 3);
    let stale = rng.pick(&disks).copied().filter(|_| may_be_stale);
    let incarnations: Vec<_> = disks
        .iter()
        .filter_map(|d| Some((*d, cluster.nodes.get(&node_of(*d))?.incarnation()?)))
        .collect();
    cluster.metadata.open_origin(&incarnations, stale);
    let epoch = cluster.metadata.volume().epoch;
    let updates = updates(cluster, rng, epoch);
    cluster.audits += 1;
    for disk in &disks {
        ask(cluster, node_of(*disk), None)?;
    }
    for disk in &disks {
        let node = node_of(*disk);
        let fence = Fence {
            create: true,
            rebuild_epoch: Epoch(0),
            link: None,
        };
        ask_of(cluster, node, (ORIGIN, epoch), RequestBody::Fence(fence))?;
        for update in &updates {
            let group = &volume.groups[update.range.chunk.0 as usize % volume.groups.len()];
            let here = group.iter().any(|r| r.disk == *disk);
            let missed = Some(*disk) == stale && rng.chance(1, 3);
            if here && !missed {
                ask_of(cluster, node, (ORIGIN, epoch), update.body())?;
            }
            if here && Some(*disk) == stale && rng.chance(1, 6) {
                // Sent by somebody who never got it acknowledged.
                let stray = Update {
                    by: Some(NOBODY),
                    version: Version::new(epoch.0, 1_000_000 + update.version.sequence.0),
                    ..*update
                };
                ask_of(cluster, node, (ORIGIN, epoch), stray.body())?;
            }
        }
        let flush = Flush {
            watermark: Version::new(epoch.0, updates.len() as u64),
            forget_below: Version::ZERO,
        };
        ask_of(cluster, node, (ORIGIN, epoch), RequestBody::Flush(flush))?;
    }
    cluster.metadata.snapshot_origin();
    let layers = cluster.metadata.volume().layers.clone();
    for disk in &disks {
        let node = node_of(*disk);
        if Some(*disk) != stale {
            let layers = RequestBody::Layers(layers.clone());
            ask_of(cluster, node, (ORIGIN, epoch), layers)?;
        }
        for update in updates.iter().filter(|_| rng.chance(1, 2)) {
            let group = &volume.groups[update.range.chunk.0 as usize % volume.groups.len()];
            if group.iter().any(|r| r.disk == *disk) {
                let later = Update {
                    by: Some(NOBODY),
                    version: Version::new(epoch.0, 2_000_000 + update.version.sequence.0),
                    snapshot: SnapshotNumber(1),
                    ..*update
                };
                ask_of(cluster, node, (ORIGIN, epoch), later.body())?;
            }
        }
    }
    cluster.origin = image(&updates);
    cluster.metadata.clone_origin();
    cluster.metadata_changed();
    Ok(())
}

/// Updates of what the workload may touch, done and flushed as far as the history knows.
fn updates(cluster: &mut Cluster, rng: &mut Rng, epoch: Epoch) -> Vec<Update> {
    let mut updates: Vec<Update> = Vec::new();
    let per_chunk = u64::from(BLOCKS_PER_CHUNK);
    // The origin does not grow.
    let blocks = cluster.setup.shape.size_bytes / BLOCK_SIZE as u64;
    for (first, count) in cluster.workload.everything() {
        let (mut block, end) = (first.div_ceil(8), ((first + count) / 8).min(blocks));
        while block < end {
            let left = (end - block).min(per_chunk - block % per_chunk);
            let count = rng.between(1, 20).min(left);
            let range = BlockRange {
                chunk: ChunkIndex((block / per_chunk) as u32),
                first: (block % per_chunk) as u16,
                count: count as u16,
            };
            block += count;
            if rng.chance(1, 4) {
                continue;
            }
            let kinds: &[Kind] = if rng.chance(1, 5) {
                &[Kind::Write, Kind::Zero]
            } else {
                &[Kind::Write]
            };
            for kind in kinds {
                let (start, sectors) = (first_sector(range), count * SECTORS_PER_BLOCK);
                let id = done(cluster, *kind, start, sectors);
                updates.push(Update {
                    range,
                    by: (*kind == Kind::Write).then_some(id),
                    version: Version::new(epoch.0, updates.len() as u64 + 1),
                    snapshot: SnapshotNumber(0),
                });
            }
        }
    }
    done(cluster, Kind::Flush, 0, 0);
    updates
}

fn done(cluster: &mut Cluster, kind: Kind, first: u64, count: u64) -> OperationId {
    cluster.run_until(ashlar_platform::clock::Time(cluster.now().0 + 1));
    let at = cluster.now();
    let id = cluster.history.begin(1, kind, first, count, false, at);
    if let Some(operation) = cluster.history.operations.get_mut(id.0 as usize) {
        operation.outcome = Outcome::Done(at);
    }
    id
}

fn image(updates: &[Update]) -> Image {
    let mut image = Image::new();
    for update in updates {
        for block in update.range.blocks() {
            let at = (update.range.chunk.0, u32::from(block));
            match update.by {
                Some(by) => drop(image.insert(at, by)),
                None => drop(image.remove(&at)),
            }
        }
    }
    image
}

/// Now and then a node is told to flatten (C7).
pub(super) fn order_flatten(cluster: &mut Cluster, node: u32) {
    if cluster.setup.clones && cluster.rng.chance(1, 16) {
        cluster.note(|| format!("n{node} is told to flatten"));
        let request = AdminRequest::Flatten { volume: VOLUME };
        cluster.engine(node, EngineEvent::Admin { tag: 0, request });
    }
}

/// The origin's snapshot, on the nodes that had it whole, shows what it showed.
pub(super) fn read_back(cluster: &mut Cluster) -> Result<(), String> {
    let Some(origin) = cluster.metadata.origin().cloned() else {
        return Ok(());
    };
    for ((chunk, block), by) in cluster.origin.clone() {
        let group = &origin.groups[chunk as usize % origin.groups.len()];
        let whole = group.iter().filter(|r| r.state == ReplicaState::InSync);
        for node in whole.map(|r| node_of(r.disk)) {
            let range = BlockRange {
                chunk: ChunkIndex(chunk),
                first: block as u16,
                count: 1,
            };
            let read = Read {
                range,
                snapshot: SnapshotNumber(0),
                exact_layer: false,
            };
            let body = RequestBody::Read(read);
            let reply = match ask_of(cluster, node, (ORIGIN, origin.epoch), body)? {
                ReplyBody::Read(reply) => reply,
                other => return Err(format!("node {node} answers Read with {other:?}")),
            };
            let state = reply.blocks.first().map(|b| b.state);
            if state == Some(BlockState::Bad) && cluster.errors_allowed {
                continue;
            }
            let data: Vec<u8> = reply.data.concat();
            let values: Vec<Value> = data
                .chunks(512)
                .zip(first_sector(range)..)
                .map(|(bytes, at)| decode(at, bytes))
                .collect();
            if values != vec![Value::Written(by); SECTORS_PER_BLOCK as usize] {
                return Err(format!(
                    "the origin's snapshot shows {state:?} {values:?} on node {node} at chunk {chunk} block {block}, written by {by:?}"
                ));
            }
        }
    }
    Ok(())
}
