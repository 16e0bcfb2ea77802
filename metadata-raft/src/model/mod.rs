//! The replicated state machine: `apply(state, command) -> response`, pure and deterministic.
//!
//! Architecture invariants:
//! - No clock, no randomness, no I/O: everything comes in the command. The simulator runs this very code.
//! - Every change of a volume goes through [`State::install`], which keeps the derived indexes and checks
//!   the transition against `invariants` *before* it takes effect: a bug here refuses a command, it does
//!   not break a volume.
//! - Apply costs O(size of the volume or thing that changes), never O(number of volumes).
//! - Derived indexes are not part of a snapshot; they are rebuilt from it.

mod answers;
mod apply;
mod apply_clones;
mod apply_publications;
mod apply_readers;
mod apply_replicas;
mod apply_reverts;
mod apply_snapshots;
mod apply_volume;
mod cluster;
mod command;
mod image;
mod image_v1;
mod image_v2;
mod invariants;
mod schedule;
mod service;
mod snapshot;
pub mod validate;
pub mod view;
mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ashlar_proto::ids::{ClusterId, DiskId, Epoch, NodeId, PoolId, ReplicaState, VolumeId};

pub use answers::{RecentAnswers, Remembered};
pub use apply::apply;
pub(crate) use apply::no_such_pool;
pub use apply_publications::attacher_id;
pub use cluster::{
    Disk, Domain, FailureDomain, FlattenPolicy, Labels, Node, Pool, PoolSpec, ZONE_LABEL,
};
pub use command::{
    Answer, Attacher, ChangeReplicas, CloneVolume, Command, CommitSnapshot, CreateVolume,
    NewSnapshot, OpenVolume, Operation, Refusal, RefusalCode, ReplicaChange, RequestKey,
    ReserveSnapshots, Response,
};
pub use image::{IMAGE_VERSION, ImageError};
pub use invariants::{check_state, check_transition};
pub(crate) use schedule::no_such_schedule;
pub use schedule::{BackupTarget, KEEP_MAX, Outcome, Run, Schedule, ScheduleId, Schedules, Target};
pub use service::{Part, Service};
pub use snapshot::{Snapshot, SnapshotGroup, SnapshotState, Snapshots};
pub use volume::{
    AttachMode, Attachment, Format, FormatState, Group, Parent, Replica, Source, Volume,
    share_bytes,
};

/// What is derived about a disk from the volumes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DiskUse {
    /// Replicas on the disk.
    pub replicas: u32,
    /// Sum of the sizes placed on it.
    pub provisioned_bytes: u64,
    /// Replicas of attached volumes that are being rebuilt on it.
    pub rebuilding: u32,
}

/// What is derived about a pool from the volumes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct PoolUse {
    /// Volumes in the pool.
    pub volumes: u32,
    /// Sum of the volumes' sizes times their replicas.
    pub provisioned_bytes: u64,
}

/// What a command changed, for watchers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A volume was created, changed or deleted.
    Volume(VolumeId),
    /// A disk's endpoint changed.
    Disk(DiskId),
}

/// Most changes kept for collection between two calls of [`State::take_changes`]; beyond it only the
/// fact that there were more is kept.
const CHANGES_MAX: usize = 4096;

/// The whole replicated state.
#[derive(Clone, Default, Debug)]
pub struct State {
    cluster: ClusterId,
    nodes: BTreeMap<NodeId, Node>,
    disks: BTreeMap<DiskId, Disk>,
    pools: BTreeMap<PoolId, Pool>,
    volumes: BTreeMap<VolumeId, Arc<Volume>>,
    snapshots: Snapshots,
    /// Former replicas whose data a disk is still to drop, with the volume's epoch at that time.
    garbage: BTreeMap<(DiskId, VolumeId), Epoch>,
    answers: RecentAnswers,
    /// Labels that attaching nodes told, by node name: a storage daemon's own win over them.
    attacher_labels: BTreeMap<String, Labels>,
    /// Of pools that said one.
    flatten_policies: BTreeMap<PoolId, FlattenPolicy>,
    schedules: Schedules,
    /// Of nodes and disks that are not simply in use.
    services: BTreeMap<Part, Service>,

    // Derived.
    node_by_name: BTreeMap<String, NodeId>,
    pool_by_name: BTreeMap<String, PoolId>,
    volume_by_name: BTreeMap<String, VolumeId>,
    disk_volumes: BTreeSet<(DiskId, VolumeId)>,
    node_disks: BTreeSet<(NodeId, DiskId)>,
    /// Stale replicas of attached volumes: what the repair loop looks at.
    repairable: BTreeSet<(DiskId, VolumeId)>,
    /// Volumes that somebody has to hold so that they can be rebuilt.
    neglected: BTreeSet<VolumeId>,
    /// Replicas of volumes that have (or had) snapshots: what layer lists are sent to.
    layered: BTreeSet<(DiskId, VolumeId)>,
    /// Clones by what they inherit from.
    children: BTreeSet<(Parent, VolumeId)>,
    /// Grows with every change of `layered`, of a layer list, or of what is to be flattened.
    layers_generation: u64,
    disk_use: BTreeMap<DiskId, DiskUse>,
    pool_use: BTreeMap<PoolId, PoolUse>,
    rebuilding: u32,
    changes: Vec<Change>,
    changes_lost: bool,
}

impl State {
    /// An empty state without cluster identity.
    pub fn new() -> Self {
        Self::default()
    }

    /// The cluster's identity; NIL before the first leader gave one.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// A node by its name.
    pub fn node_by_name(&self, name: &str) -> Option<&Node> {
        self.nodes.get(self.node_by_name.get(name)?)
    }

    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// A disk.
    pub fn disk(&self, id: DiskId) -> Option<&Disk> {
        self.disks.get(&id)
    }

    /// All disks, by id.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.disks.values()
    }

    /// A pool.
    pub fn pool(&self, id: PoolId) -> Option<&Pool> {
        self.pools.get(&id)
    }

    /// A pool by its name.
    pub fn pool_by_name(&self, name: &str) -> Option<&Pool> {
        self.pools.get(self.pool_by_name.get(name)?)
    }

    /// All pools, by id.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    /// A volume; also one that is hidden.
    pub fn volume(&self, id: VolumeId) -> Option<&Arc<Volume>> {
        self.volumes.get(&id)
    }

    /// The snapshots.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// The schedules.
    pub fn schedules(&self) -> &Schedules {
        &self.schedules
    }

    /// A volume by its name.
    pub fn volume_by_name(&self, name: &str) -> Option<&Arc<Volume>> {
        self.volumes.get(self.volume_by_name.get(name)?)
    }

    /// All volumes, by id, hidden ones included.
    pub fn volumes(&self) -> impl Iterator<Item = &Arc<Volume>> {
        self.volumes.values()
    }

    /// Number of volumes, hidden ones included.
    pub fn volume_count(&self) -> usize {
        self.volumes.len()
    }

    /// Volumes in order of name, those after `after`.
    pub fn volumes_by_name_after(&self, after: &str) -> impl Iterator<Item = &Arc<Volume>> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.volume_by_name
            .range::<str, _>((Excluded(after), Unbounded))
            .filter_map(|(_, id)| self.volumes.get(id))
    }

    /// Volumes with a replica on a disk.
    pub fn volumes_on(&self, disk: DiskId) -> impl Iterator<Item = VolumeId> {
        range_of(&self.disk_volumes, disk)
    }

    /// Attached volumes with a stale replica on a disk.
    pub fn repairable_on(&self, disk: DiskId) -> impl Iterator<Item = VolumeId> {
        range_of(&self.repairable, disk)
    }

    /// Volumes that somebody has to hold so that they can be rebuilt, in the order of identities.
    pub fn neglected(&self) -> impl Iterator<Item = VolumeId> {
        self.neglected.iter().copied()
    }

    /// Whether any attached volume has a stale replica.
    pub fn has_repairable(&self) -> bool {
        !self.repairable.is_empty()
    }

    /// Volumes with a replica on a disk that have (or had) snapshots.
    pub fn layered_on(&self, disk: DiskId) -> impl Iterator<Item = VolumeId> {
        range_of(&self.layered, disk)
    }

    /// Differs from an earlier answer if [`Self::layered_on`], any layer list or [`Self::is_to_flatten`] changed since. Not
    /// replicated.
    pub fn layers_generation(&self) -> u64 {
        self.layers_generation
    }

    /// Replicas that a disk no longer holds but may still have data of.
    pub fn garbage_on(&self, disk: DiskId) -> impl Iterator<Item = (VolumeId, Epoch)> {
        let (low, high) = ((disk, VolumeId([0; 16])), (disk, VolumeId([0xff; 16])));
        self.garbage.range(low..=high).map(|((_, v), e)| (*v, *e))
    }

    /// Number of such replicas on all disks.
    pub fn garbage_count(&self) -> usize {
        self.garbage.len()
    }

    /// What is placed on a disk.
    pub fn disk_use(&self, disk: DiskId) -> DiskUse {
        self.disk_use.get(&disk).copied().unwrap_or_default()
    }

    /// What is placed in a pool.
    pub fn pool_use(&self, pool: PoolId) -> PoolUse {
        self.pool_use.get(&pool).copied().unwrap_or_default()
    }

    /// Replicas of attached volumes being rebuilt in the whole cluster.
    pub fn rebuilding(&self) -> u32 {
        self.rebuilding
    }

    /// The answer that a request was given, if it is remembered.
    pub fn remembered(&self, request: &RequestKey) -> Option<&Remembered> {
        self.answers.get(request)
    }

    /// What changed since the last call; `None`: too much to list.
    pub fn take_changes(&mut self) -> Option<Vec<Change>> {
        let changes = std::mem::take(&mut self.changes);
        if std::mem::take(&mut self.changes_lost) {
            None
        } else {
            Some(changes)
        }
    }

    /// The failure domain of a registered disk.
    pub fn domain_of(&self, level: FailureDomain, disk: DiskId) -> Option<Domain> {
        let disk = self.disks.get(&disk)?;
        Some(Domain::of(level, disk, self.nodes.get(&disk.node)?))
    }

    fn note(&mut self, change: Change) {
        if self.changes.len() < CHANGES_MAX {
            self.changes.push(change);
        } else {
            self.changes_lost = true;
        }
    }

    /// Replaces (or adds) a volume after checking the transition; counts its revision.
    fn install(&mut self, mut next: Volume) -> Result<Arc<Volume>, Refusal> {
        self.check_next(&mut next)?;
        Ok(self.put(next))
    }

    /// [`Self::install`] for several different volumes: all of them or none.
    fn install_all(&mut self, mut nexts: Vec<Volume>) -> Result<Vec<Arc<Volume>>, Refusal> {
        nexts.iter_mut().try_for_each(|n| self.check_next(n))?;
        Ok(nexts.into_iter().map(|n| self.put(n)).collect())
    }

    fn check_next(&self, next: &mut Volume) -> Result<(), Refusal> {
        next.revision += 1;
        let before = self.volumes.get(&next.id);
        check_transition(before.map(|v| &**v), next).map_err(|broken| {
            Refusal::internal(format!(
                "refused, because it would break an invariant of volume {}: {broken}; please report this as a bug",
                next.name
            ))
        })
    }

    fn put(&mut self, next: Volume) -> Arc<Volume> {
        let before = self.volumes.get(&next.id).cloned();
        let same_layers = before.as_ref().is_some_and(|b| {
            b.layers == next.layers
                && b.disks() == next.disks()
                && (b.parent, b.flatten) == (next.parent, next.flatten)
        });
        if next.layers.revision > 0 && !same_layers {
            self.layers_generation += 1;
        }
        if let Some(before) = before {
            self.index(&before, false);
        }
        let next = Arc::new(next);
        self.index(&next, true);
        self.volumes.insert(next.id, next.clone());
        self.note(Change::Volume(next.id));
        next
    }

    /// Removes a volume with its snapshots, and remembers what its disks are to drop; what was kept for it alone goes, too.
    fn uninstall(&mut self, volume: &Arc<Volume>) {
        self.index(volume, false);
        self.volumes.remove(&volume.id);
        self.snapshots.remove_volume(volume.id);
        self.layers_generation += u64::from(volume.layers.revision > 0);
        for disk in volume.disks() {
            self.garbage.insert((disk, volume.id), volume.epoch);
        }
        self.note(Change::Volume(volume.id));
        if let Some(parent) = volume.parent {
            self.release(parent);
        }
    }

    /// Adds or takes away what the derived indexes say of a volume.
    fn index(&mut self, volume: &Volume, add: bool) {
        let apply = |count: &mut u32| *count = if add { *count + 1 } else { *count - 1 };
        let share = volume.share_bytes();
        let mut replica_bytes = 0_u64;
        for (_, replica) in volume.all_replicas() {
            let disk_use = self.disk_use.entry(replica.disk).or_default();
            apply(&mut disk_use.replicas);
            let bytes = disk_use.provisioned_bytes;
            disk_use.provisioned_bytes = if add { bytes + share } else { bytes - share };
            replica_bytes += share;
            if volume.holder.is_some() && replica.state == ReplicaState::Rebuilding {
                apply(&mut disk_use.rebuilding);
                apply(&mut self.rebuilding);
            }
            if disk_use.replicas == 0 {
                self.disk_use.remove(&replica.disk);
            }
            let key = (replica.disk, volume.id);
            set(&mut self.disk_volumes, key, add);
            if volume.holder.is_some() && replica.state == ReplicaState::Stale {
                set(&mut self.repairable, key, add);
            }
            if volume.layers.revision > 0 {
                set(&mut self.layered, key, add);
            }
        }
        let pool_use = self.pool_use.entry(volume.pool).or_default();
        apply(&mut pool_use.volumes);
        let bytes = pool_use.provisioned_bytes;
        pool_use.provisioned_bytes = if add {
            bytes + replica_bytes
        } else {
            bytes - replica_bytes
        };
        if pool_use.volumes == 0 {
            self.pool_use.remove(&volume.pool);
        }
        if let Some(parent) = volume.parent {
            set(&mut self.children, (parent, volume.id), add);
        }
        if volume.needs_care() {
            set(&mut self.neglected, volume.id, add);
        }
        if volume.hidden {
            return;
        }
        if add {
            self.volume_by_name.insert(volume.name.clone(), volume.id);
        } else {
            self.volume_by_name.remove(&volume.name);
        }
    }
}

fn set<T: Ord>(set: &mut BTreeSet<T>, key: T, add: bool) {
    if add {
        set.insert(key);
    } else {
        set.remove(&key);
    }
}

fn range_of(set: &BTreeSet<(DiskId, VolumeId)>, disk: DiskId) -> impl Iterator<Item = VolumeId> {
    let (low, high) = ((disk, VolumeId([0; 16])), (disk, VolumeId([0xff; 16])));
    set.range(low..=high).map(|(_, v)| *v)
}

#[cfg(test)]
mod tests;
