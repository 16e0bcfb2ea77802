//! Commands about clones: make one, make it independent of its parent, forget the parent (docs/snapshots.md, C1, C2, C6, C7).
//!
//! Invariants:
//! - A clone is made in one command, with its parent's groups: the same disks, and nothing is copied.
//! - A number that a clone inherits from stays live, and so stays its volume: they are hidden when they are deleted, and
//!   go with the last clone, up the chain ([`State::release`]).
//! - While a clone may inherit on a disk, its parent's replica does not leave that disk.
//! - Cutting the parent off changes no configuration: the epoch stays.

use std::collections::BTreeMap;

use ashlar_proto::ids::{
    DiskId, Epoch, Incarnation, PoolId, ReplicaState, SnapshotId, SnapshotNumber, VolumeId,
};
use ashlar_proto::layers::LayerList;

use super::apply::no_such_pool;
use super::apply_snapshots::busy;
use super::cluster::FlattenPolicy;
use super::command::{Answer, CloneVolume, Refusal, Response};
use super::snapshot::{Snapshot, SnapshotState};
use super::volume::{Group, Parent, Replica, Volume, share_bytes};
use super::{State, validate};

/// Clones named in a message.
const NAMED_MAX: usize = 5;

impl State {
    /// Whether a volume inherits from a snapshot of another.
    pub fn has_clones(&self, volume: VolumeId, number: SnapshotNumber) -> bool {
        self.clones_of(volume, Some(number)).next().is_some()
    }

    /// The volumes that inherit from a snapshot of a volume, or from any of its; hidden ones included.
    pub fn clones_of(
        &self,
        volume: VolumeId,
        number: Option<SnapshotNumber>,
    ) -> impl Iterator<Item = VolumeId> {
        let (low, high) = number.map_or((0, u32::MAX), |n| (n.0, n.0));
        let at = |number| Parent {
            volume,
            number: SnapshotNumber(number),
        };
        let (low, high) = (
            (at(low), VolumeId([0; 16])),
            (at(high), VolumeId([0xff; 16])),
        );
        self.children.range(low..=high).map(|(_, child)| *child)
    }

    /// All volumes that inherit from another.
    pub fn clones(&self) -> impl Iterator<Item = VolumeId> {
        self.children.iter().map(|(_, child)| *child)
    }

    /// What a pool says about flattening.
    pub fn flatten_policy(&self, pool: PoolId) -> FlattenPolicy {
        self.flatten_policies
            .get(&pool)
            .copied()
            .unwrap_or_default()
    }

    /// Whether the disks are to make a clone independent of its parent (C7).
    pub fn is_to_flatten(&self, volume: &Volume) -> bool {
        let Some(parent) = volume.parent else {
            return false;
        };
        volume.flatten
            || match self.flatten_policy(volume.pool) {
                FlattenPolicy::Never => false,
                FlattenPolicy::Always => true,
                FlattenPolicy::Orphaned => self.is_orphaned(parent),
            }
    }

    /// Whether a user deleted what clones inherit from.
    fn is_orphaned(&self, parent: Parent) -> bool {
        self.volume(parent.volume).is_none_or(|v| v.hidden)
            || self.snapshots.is_hidden(parent.volume, parent.number)
                && self
                    .snapshots
                    .numbered(parent.volume, parent.number)
                    .is_some_and(|s| !s.for_clone)
    }

    /// The volume that a retried creation of a clone would get, or the refusal because the name is taken.
    pub fn existing_clone(&self, clone: &CloneVolume) -> Option<Response> {
        let existing = self.volume_by_name(&clone.name)?;
        let same = existing.size_bytes == clone.size_bytes
            && existing.min_replicas == clone.min_replicas
            && existing.labels == clone.labels
            && existing.source == Some(clone.source);
        Some(if same {
            Ok(Answer::Volume(existing.clone()))
        } else {
            Err(Refusal::exists(format!(
                "volume {} exists with another size, source, min_replicas or labels; choose another name",
                clone.name
            )))
        })
    }

    /// What a clone would be made of, or why none can be made; for the leader, before it takes a snapshot for it.
    ///
    /// # Errors
    /// The refusal.
    pub fn check_may_clone(&self, volume: &Volume) -> Result<Option<Parent>, Refusal> {
        if volume.is_moving() && !volume.hidden {
            return Err(Refusal::precondition(format!(
                "a replica of volume {} is being moved to another disk; make the clone when that is done (`ashlar volume \
                 show {}`)",
                volume.name, volume.name
            )));
        }
        // Nothing was written on what was never opened.
        let inherited = volume.parent.filter(|_| !volume.opened_once);
        let mut depth = usize::from(volume.opened_once);
        let mut above = volume.parent;
        while let Some(parent) = above {
            depth += 1;
            above = self.volume(parent.volume).and_then(|v| v.parent);
        }
        if depth > validate::CLONE_DEPTH_MAX {
            return Err(Refusal::precondition(format!(
                "volume {} is a clone of a clone, {depth} deep: clones of it would be deeper than {}; make it independent first \
                 with `ashlar volume flatten {}`",
                volume.name,
                validate::CLONE_DEPTH_MAX,
                volume.name
            )));
        }
        Ok(inherited)
    }

    pub(super) fn clone_volume(&mut self, clone: &CloneVolume) -> Response {
        validate::name("name", &clone.name)?;
        validate::size("size_bytes", clone.size_bytes)?;
        validate::labels("labels", &clone.labels)?;
        if let Some(response) = self.existing_clone(clone) {
            return response;
        }
        let snapshot = self.source_of(clone)?.clone();
        let origin = self.volumes.get(&snapshot.volume).cloned();
        let origin = origin.ok_or_else(|| Refusal::internal("a snapshot without volume"))?;
        validate::replica_counts(origin.replicas, clone.min_replicas)?;
        let inherited = self.check_may_clone(&origin)?;
        let own = Parent {
            volume: origin.id,
            number: snapshot.number,
        };
        let parent = if origin.opened_once {
            Some(own)
        } else {
            inherited
        };
        let groups: Vec<_> = origin
            .groups
            .iter()
            .map(|g| clone_group(g, origin.opened_once))
            .collect();
        let remains = |r: &Replica| self.garbage.contains_key(&(r.disk, clone.volume));
        if clone.volume.is_nil()
            || self.volumes.contains_key(&clone.volume)
            || groups.iter().flatten().any(remains)
        {
            return Err(Refusal::internal("volume_id: not fresh"));
        }
        if let Some(pool) = self.pool(origin.pool) {
            let share = share_bytes(clone.size_bytes, groups.len());
            let additions = groups.iter().flatten().map(|r| (r.disk, share));
            self.check_room(&pool.spec, additions)?;
        }
        let number = parent.map_or(SnapshotNumber(0), |p| p.number);
        let made = self.install(Volume {
            id: clone.volume,
            name: clone.name.clone(),
            size_bytes: clone.size_bytes,
            pool: origin.pool,
            replicas: origin.replicas,
            min_replicas: clone.min_replicas,
            groups,
            epoch: parent.map_or(Epoch(0), |_| origin.epoch),
            holder: None,
            clean: true,
            // The first holder makes the replicas.
            opened_once: false,
            snapshot: number,
            revision: 0,
            created_unix_ms: clone.created_unix_ms,
            labels: clone.labels.clone(),
            publications: BTreeMap::new(),
            format: parent.and_then(|_| snapshot.format.clone()),
            readers: Vec::new(),
            reader_revoked: false,
            layers: LayerList {
                revision: u64::from(parent.is_some()),
                settled: number,
                live: Vec::new(),
            },
            hidden: false,
            parent,
            flatten: false,
            reverting: None,
            source: Some(clone.source),
        })?;
        if snapshot.for_clone {
            self.delete_snapshots(&[snapshot.id])?;
        }
        Ok(Answer::Volume(made))
    }

    /// The snapshot that a clone is made of.
    fn source_of(&self, clone: &CloneVolume) -> Result<&Snapshot, Refusal> {
        let snapshot = self.snapshots.get(clone.snapshot);
        let snapshot = snapshot.filter(|s| s.is_shown()).ok_or_else(|| {
            Refusal::not_found(format!(
                "snapshot {} does not exist (any more); see `ashlar snapshot list`",
                clone.snapshot
            ))
        })?;
        if snapshot.state == SnapshotState::Pending {
            return Err(busy(&snapshot.name));
        }
        if clone.size_bytes < snapshot.size_bytes {
            return Err(Refusal::invalid(format!(
                "size_bytes: {} is less than the {} bytes of the source; a clone is as large or larger",
                clone.size_bytes, snapshot.size_bytes
            )));
        }
        Ok(snapshot)
    }

    pub(super) fn flatten_volume(&mut self, id: VolumeId) -> Response {
        let volume = self.require_volume(id)?.clone();
        if volume.parent.is_none() || volume.flatten {
            return Ok(Answer::Volume(volume));
        }
        let mut next = Volume::clone(&volume);
        next.flatten = true;
        Ok(Answer::Volume(self.install(next)?))
    }

    pub(super) fn cut_parent(&mut self, id: VolumeId, parent: Parent) -> Response {
        let Some(volume) = self.volumes.get(&id).filter(|v| v.parent == Some(parent)) else {
            return Ok(Answer::Done);
        };
        let mut next = Volume::clone(volume);
        next.parent = None;
        next.flatten = false;
        for replica in next.groups.iter_mut().flatten() {
            replica.inherits = false;
        }
        self.install(next)?;
        self.release(parent);
        Ok(Answer::Done)
    }

    pub(super) fn set_flatten_policy(&mut self, pool: &str, policy: FlattenPolicy) -> Response {
        let pool = self.pool_by_name(pool).ok_or_else(|| no_such_pool(pool))?;
        let pool = pool.clone();
        self.flatten_policies.insert(pool.id, policy);
        self.layers_generation += 1;
        Ok(Answer::Pool(pool))
    }

    /// A snapshot that its user deleted stays for its clones (C2).
    pub(super) fn hide_snapshot(&mut self, id: SnapshotId) {
        if let Some(snapshot) = self.snapshots.get(id) {
            let mut snapshot = Snapshot::clone(snapshot);
            snapshot.state = SnapshotState::Hidden;
            self.snapshots.insert(snapshot);
            self.layers_generation += 1;
        }
    }

    /// A clone is gone or cut: deletes what was kept for it alone. Taking a volume away calls this for its parent, so it
    /// goes on up the chain, which is at most [`validate::CLONE_DEPTH_MAX`] long.
    pub(super) fn release(&mut self, parent: Parent) {
        if self.has_clones(parent.volume, parent.number)
            || !self.snapshots.is_hidden(parent.volume, parent.number)
        {
            return;
        }
        let snapshot = self.snapshots.numbered(parent.volume, parent.number);
        let volume = self.volumes.get(&parent.volume).cloned();
        let (Some(snapshot), Some(volume)) = (snapshot.cloned(), volume) else {
            return;
        };
        let mut next = Volume::clone(&volume);
        next.layers.live.retain(|n| *n != parent.number);
        next.layers.revision += 1;
        if next.hidden && next.layers.live.is_empty() {
            self.uninstall(&volume);
            return;
        }
        // Always a legal change; were it refused, the snapshot would only be kept.
        if let Ok(volume) = self.install(next) {
            let mut snapshot = Snapshot::clone(&snapshot);
            snapshot.state = SnapshotState::Deleting {
                revision: volume.layers.revision,
            };
            self.snapshots.insert(snapshot);
        }
    }

    /// C6: a parent's replica stays where its clones may inherit from it.
    ///
    /// # Errors
    /// The refusal, which names them.
    pub fn check_may_leave(&self, volume: &Volume, disk: DiskId) -> Result<(), Refusal> {
        let clones = self.clones_of(volume.id, None);
        let clones = clones.filter_map(|id| self.volume(id));
        let names: Vec<_> = clones
            .filter(|c| c.inherits_on(disk))
            .map(|c| c.name.as_str())
            .collect();
        if names.is_empty() {
            return Ok(());
        }
        let mut shown = names[..names.len().min(NAMED_MAX)].join(", ");
        if let more @ 1.. = names.len().saturating_sub(NAMED_MAX) {
            shown.push_str(&format!(" and {more} more"));
        }
        Err(Refusal::precondition(format!(
            "from_disk_id: clones of volume {} take their blocks from its replica on disk {disk}: {shown}; make them independent \
             first with `ashlar volume flatten`, then move it",
            volume.name
        )))
    }
}

/// The group of a clone: what is on its way to other disks stays where it is.
fn clone_group(group: &Group, of_origin: bool) -> Group {
    let arriving = |r: &&Replica| group.iter().any(|o| o.leaving_for == Some(r.disk));
    let staying = group.iter().filter(|r| !arriving(r));
    let clone = |r: &Replica| Replica {
        disk: r.disk,
        state: match r.state {
            ReplicaState::InSync => ReplicaState::InSync,
            ReplicaState::Rebuilding | ReplicaState::Stale => ReplicaState::Stale,
        },
        incarnation: Incarnation(0),
        rebuild_epoch: Epoch(0),
        leaving_for: None,
        inherits: of_origin || r.inherits,
    };
    staying.map(clone).collect()
}
