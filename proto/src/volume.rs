//! A volume as its client sees it: the plain value behind `rpc::metadata::Volume`, for the engines,
//! which know no generated code.

use std::collections::BTreeMap;

use crate::descriptor::{Parent, ReplicaDescriptor, VolumeDescriptor};
use crate::ids::{
    ChunkIndex, ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, ReplicaState,
    SnapshotNumber, VolumeId,
};
use crate::layers::LayerList;
use crate::rpc::metadata as pb;

/// A replica as Raft knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaView {
    /// The disk that holds it.
    pub disk: DiskId,
    /// Its state.
    pub state: ReplicaState,
    /// The store's incarnation when the replica was last known good; 0 for a new replica.
    pub incarnation: Incarnation,
    /// Epoch e of R7 while rebuilding, else 0.
    pub rebuild_epoch: Epoch,
    /// It may be linked to the parent's replica on its disk (docs/snapshots.md, C3).
    pub inherits: bool,
}

/// Where a disk is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskEndpoint {
    /// The disk.
    pub disk: DiskId,
    /// Its node.
    pub node: NodeId,
    /// `host:port` of the data protocol.
    pub address: String,
    /// Whether metadata believes it alive.
    pub alive: bool,
}

/// A volume, its configuration and where its disks are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeView {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// Replica groups; chunk `c` belongs to group `c mod groups.len()`. Never empty.
    pub groups: Vec<Vec<ReplicaView>>,
    /// Epoch of this configuration.
    pub epoch: Epoch,
    /// The client that holds the volume.
    pub holder: Option<ClientId>,
    /// Clients that only read it (R10); none while there is a holder.
    pub readers: Vec<ClientId>,
    /// A holder made the replicas and recorded their incarnations: data may exist.
    pub opened_once: bool,
    /// Number that new writes carry, once what came before it is drained (docs/snapshots.md, S2).
    pub snapshot: SnapshotNumber,
    /// That number is reserved and not yet settled: a holder reports that it holds.
    pub snapshot_pending: bool,
    /// Which snapshots are live.
    pub layers: LayerList,
    /// Where blocks come from that the volume never wrote (C1).
    pub parent: Option<Parent>,
    /// Grows with every change.
    pub revision: u64,
    /// Where the disks of the volume are reached.
    pub disks: BTreeMap<DiskId, DiskEndpoint>,
}

/// A message lacks a field or has one out of range.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed volume from metadata: {0}")]
pub struct MalformedVolume(pub &'static str);

impl VolumeView {
    /// The group of a chunk.
    pub fn group_of(&self, chunk: ChunkIndex) -> GroupIndex {
        GroupIndex(chunk.0 % self.groups.len() as u32)
    }

    /// What the replicas are to remember of this configuration.
    pub fn descriptor(&self) -> VolumeDescriptor {
        VolumeDescriptor {
            volume: self.volume,
            epoch: self.epoch,
            size_bytes: self.size_bytes,
            min_replicas: self.min_replicas,
            snapshot: self.snapshot,
            layers: self.layers.clone(),
            parent: self.parent,
            groups: self
                .groups
                .iter()
                .map(|g| {
                    g.iter()
                        .map(|r| ReplicaDescriptor {
                            disk: r.disk,
                            state: r.state,
                            inherits: r.inherits,
                        })
                        .collect()
                })
                .collect(),
            name: self.name.clone(),
        }
    }

    /// Builds the view from messages.
    pub fn from_messages(
        volume: &pb::Volume,
        disks: &[pb::DiskEndpoint],
    ) -> Result<Self, MalformedVolume> {
        let bad = MalformedVolume;
        let mut groups = Vec::with_capacity(volume.groups.len());
        for group in &volume.groups {
            let mut replicas = Vec::with_capacity(group.replicas.len());
            for r in &group.replicas {
                replicas.push(ReplicaView {
                    disk: DiskId::from_slice(&r.disk_id).ok_or(bad("replica.disk_id"))?,
                    state: u8::try_from(r.state)
                        .ok()
                        .and_then(ReplicaState::from_u8)
                        .ok_or(bad("replica.state"))?,
                    incarnation: Incarnation(r.incarnation),
                    rebuild_epoch: Epoch(r.rebuild_epoch),
                    inherits: r.inherits,
                });
            }
            groups.push(replicas);
        }
        if groups.is_empty() {
            return Err(bad("groups"));
        }
        if !volume
            .size_bytes
            .is_multiple_of(crate::ids::BLOCK_SIZE as u64)
        {
            return Err(bad("size_bytes"));
        }
        let mut endpoints = BTreeMap::new();
        for d in disks {
            let disk = DiskId::from_slice(&d.disk_id).ok_or(bad("disk.disk_id"))?;
            let node = NodeId::from_slice(&d.node_id).unwrap_or_default();
            endpoints.insert(
                disk,
                DiskEndpoint {
                    disk,
                    node,
                    address: d.data_address.clone(),
                    alive: d.alive,
                },
            );
        }
        let layers = volume.layers.as_ref().map(LayerList::from);
        let layers = layers.unwrap_or_default();
        layers.check().map_err(|e| bad(e.0))?;
        let parent = volume.parent.as_ref().map(|p| {
            let id = VolumeId::from_slice(&p.volume_id).unwrap_or(VolumeId::NIL);
            Parent::of(id, SnapshotNumber(p.snapshot_number)).ok_or(bad("parent"))
        });
        let parent = parent.transpose()?;
        Ok(Self {
            volume: VolumeId::from_slice(&volume.volume_id).ok_or(bad("volume_id"))?,
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            min_replicas: u8::try_from(volume.min_replicas)
                .map_err(|_| bad("min_replicas"))?
                .max(1),
            groups,
            epoch: Epoch(volume.epoch),
            holder: volume
                .holder
                .as_ref()
                .and_then(|h| ClientId::from_slice(&h.client_id)),
            readers: volume
                .readers
                .iter()
                .filter_map(|r| ClientId::from_slice(&r.client_id))
                .collect(),
            opened_once: volume.opened_once,
            snapshot: SnapshotNumber(volume.snapshot_number),
            snapshot_pending: volume.snapshot_pending,
            layers,
            parent: parent.flatten(),
            revision: volume.revision,
            disks: endpoints,
        })
    }
}

impl From<&pb::LayerList> for LayerList {
    fn from(message: &pb::LayerList) -> Self {
        Self {
            revision: message.revision,
            settled: SnapshotNumber(message.settled),
            live: message.live.iter().copied().map(SnapshotNumber).collect(),
        }
    }
}

impl From<&LayerList> for pb::LayerList {
    fn from(list: &LayerList) -> Self {
        Self {
            revision: list.revision,
            settled: list.settled.0,
            live: list.live.iter().map(|n| n.0).collect(),
        }
    }
}
