//! Commands that change states of replicas: by the holder, by the repair loop, by an operator.
//!
//! Legal transitions of a replica (R0, R4, R7), everything else is refused:
//!
//! | from \ to  | Stale  | Rebuilding      | InSync |
//! |------------|--------|-----------------|--------|
//! | Stale      | -      | holder, planner | no     |
//! | Rebuilding | holder, open | -         | holder |
//! | InSync     | holder, never the group's last | no | holder: records the incarnation |
//!
//! The first holder of a volume records the incarnation of every in-sync replica once it has made them, and
//! serves only then: `opened_once` says that they exist. Until then any opener may make them.

use std::sync::Arc;

use ashlar_proto::ids::{DiskId, Epoch, GroupIndex, ReplicaState, VolumeId};

use super::command::{Answer, ChangeReplicas, Refusal, ReplicaChange, Response};
use super::volume::{Group, Replica, Volume};
use super::{State, validate};

fn refused(volume: &Arc<Volume>, reason: impl Into<String>) -> Response {
    Ok(Answer::Changed {
        applied: false,
        volume: volume.clone(),
        reason: reason.into(),
    })
}

fn applied(volume: Arc<Volume>) -> Response {
    Ok(Answer::Changed {
        applied: true,
        volume,
        reason: String::new(),
    })
}

impl State {
    pub(super) fn change_replicas(&mut self, change: &ChangeReplicas) -> Response {
        if change.changes.is_empty() || change.changes.len() > validate::BATCH_MAX {
            return Err(Refusal::invalid(format!(
                "changes: between 1 and {} are allowed",
                validate::BATCH_MAX
            )));
        }
        let volume = self.require_replicas(change.volume)?.clone();
        if !volume.is_current(change.client, change.epoch) {
            let reason = format!("the current epoch is {}", volume.epoch.0);
            return refused(&volume, reason);
        }
        let mut next = Volume::clone(&volume);
        let mut changed = false;
        for one in &change.changes {
            match change_one(&mut next, one) {
                Ok(did) => changed |= did,
                Err(reason) => return refused(&volume, reason),
            }
        }
        if !changed {
            return applied(volume);
        }
        let dropped = finish_moves(&mut next);
        let made = next
            .all_replicas()
            .all(|(_, r)| r.state != ReplicaState::InSync || r.incarnation.0 != 0);
        next.opened_once |= made;
        if next
            .groups
            .iter()
            .any(|g| !g.iter().any(|r| r.state == ReplicaState::InSync))
        {
            return refused(
                &volume,
                "the last in-sync replica of a group never becomes stale",
            );
        }
        next.bump_epoch();
        self.install_dropping(next, &dropped).and_then(applied)
    }

    pub(super) fn begin_rebuild(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        replicas: &[(GroupIndex, DiskId)],
    ) -> Response {
        let volume = self.require_replicas(id)?.clone();
        if volume.holder.is_none() {
            return Err(Refusal::precondition(format!(
                "volume {} is not attached: a rebuild needs the holder's confirmation; it starts by itself when a client \
                 opens the volume",
                volume.name
            )));
        }
        if volume.epoch != epoch {
            let reason = format!("the current epoch is {}", volume.epoch.0);
            return refused(&volume, reason);
        }
        let mut next = Volume::clone(&volume);
        let mut changed = false;
        for &(group, disk) in replicas.iter().take(validate::BATCH_MAX) {
            let Some(replica) = find(&mut next, group, disk) else {
                return refused(&volume, format!("disk {disk} is not in group {}", group.0));
            };
            if replica.state == ReplicaState::Stale {
                replica.state = ReplicaState::Rebuilding;
                changed = true;
            }
        }
        if !changed {
            return applied(volume);
        }
        next.bump_epoch();
        applied(self.install(next)?)
    }

    pub(super) fn move_replica(&mut self, id: VolumeId, from: DiskId, to: DiskId) -> Response {
        let volume = self.require_replicas(id)?.clone();
        if from == to {
            return Err(Refusal::invalid("to_disk_id: the replica is already there"));
        }
        let pool = self
            .pool(volume.pool)
            .ok_or_else(|| Refusal::internal("volume without a pool"))?;
        self.check_disk(&pool.spec, to)?;
        let mut next = Volume::clone(&volume);
        let attached = volume.holder.is_some();
        let mut dropped = Vec::new();
        let mut found = false;
        for group in &mut next.groups {
            let Some(leaving) = group.iter().position(|r| r.disk == from) else {
                continue;
            };
            found = true;
            if group[leaving].leaving_for == Some(to) {
                continue;
            }
            if group.iter().any(|r| r.leaving_for == Some(from)) {
                return Err(Refusal::precondition(format!(
                    "disk {from} is itself the target of a move in progress; move the replica that it replaces instead"
                )));
            }
            if let Some(abandoned) = group[leaving].leaving_for.take() {
                group.retain(|r| r.disk != abandoned);
                dropped.push(abandoned);
            }
            self.check_may_leave(&volume, from)?;
            self.check_move(&pool.spec, &volume, group, from, to)?;
            if volume.is_unmade() {
                group.retain(|r| r.disk != from);
                group.push(Replica::new_in_sync(to));
                dropped.push(from);
                continue;
            }
            for replica in group.iter_mut().filter(|r| r.disk == from) {
                replica.leaving_for = Some(to);
            }
            let mut incoming = Replica::new_stale(to);
            if attached {
                incoming.state = ReplicaState::Rebuilding;
            }
            group.push(incoming);
        }
        if !found {
            return Err(Refusal::not_found(format!(
                "volume {} has no replica on disk {from}",
                volume.name
            )));
        }
        if next == *volume {
            return Ok(Answer::Volume(volume));
        }
        next.bump_epoch();
        Ok(Answer::Volume(self.install_dropping(next, &dropped)?))
    }

    fn check_move(
        &self,
        spec: &super::PoolSpec,
        volume: &Volume,
        group: &Group,
        from: DiskId,
        to: DiskId,
    ) -> Result<(), Refusal> {
        let domain = self.domain_of(spec.failure_domain, to);
        for other in group.iter().filter(|r| r.disk != from) {
            if other.disk == to || self.domain_of(spec.failure_domain, other.disk) == domain {
                return Err(Refusal::precondition(format!(
                    "to_disk_id: disk {to} shares a failure domain with the replica on disk {}; choose another disk",
                    other.disk
                )));
            }
        }
        self.check_room(spec, std::iter::once((to, volume.share_bytes())))
    }

    /// Installs a volume and remembers that disks which left it are to drop their data.
    fn install_dropping(&mut self, next: Volume, left: &[DiskId]) -> Result<Arc<Volume>, Refusal> {
        let previous_epoch = self.volumes.get(&next.id).map_or(Epoch(0), |v| v.epoch);
        let next = self.install(next)?;
        for &disk in left {
            if !next.all_replicas().any(|(_, r)| r.disk == disk) {
                self.garbage.insert((disk, next.id), previous_epoch);
            }
        }
        for disk in next.disks() {
            self.garbage.remove(&(disk, next.id));
        }
        Ok(next)
    }
}

fn find(volume: &mut Volume, group: GroupIndex, disk: DiskId) -> Option<&mut Replica> {
    volume
        .groups
        .get_mut(group.0 as usize)?
        .iter_mut()
        .find(|r| r.disk == disk)
}

/// Applies one change of the holder; whether it changed anything, or why it is not legal.
fn change_one(volume: &mut Volume, change: &ReplicaChange) -> Result<bool, String> {
    let Some(replica) = find(volume, change.group, change.disk) else {
        return Err(format!(
            "disk {} is not in group {}",
            change.disk, change.group.0
        ));
    };
    let from = replica.state;
    match (from, change.state) {
        (ReplicaState::Stale, ReplicaState::Stale)
        | (ReplicaState::Rebuilding, ReplicaState::Rebuilding) => return Ok(false),
        (ReplicaState::InSync, ReplicaState::InSync) => {
            if change.incarnation.0 == 0 || change.incarnation == replica.incarnation {
                return Ok(false);
            }
            replica.incarnation = change.incarnation;
        }
        (_, ReplicaState::Stale) => replica.rebuild_epoch = Epoch(0),
        // `bump_epoch` sets the rebuild epoch.
        (ReplicaState::Stale, ReplicaState::Rebuilding) => {}
        (ReplicaState::Rebuilding, ReplicaState::InSync) => {
            replica.rebuild_epoch = Epoch(0);
            replica.incarnation = change.incarnation;
        }
        (ReplicaState::Stale, ReplicaState::InSync) => {
            return Err("a stale replica becomes in-sync only by a rebuild".to_owned());
        }
        (ReplicaState::InSync, ReplicaState::Rebuilding) => {
            return Err("an in-sync replica becomes stale before it is rebuilt".to_owned());
        }
    }
    replica.state = change.state;
    Ok(true)
}

/// Takes out the replicas whose successors are in sync; returns their disks.
fn finish_moves(volume: &mut Volume) -> Vec<DiskId> {
    let mut dropped = Vec::new();
    for group in &mut volume.groups {
        let in_sync: Vec<_> = group
            .iter()
            .filter(|r| r.state == ReplicaState::InSync)
            .map(|r| r.disk)
            .collect();
        group.retain(|r| {
            let leaves = r.leaving_for.is_some_and(|to| in_sync.contains(&to));
            if leaves {
                dropped.push(r.disk);
            }
            !leaves
        });
    }
    dropped
}
