//! Which replicas get a new disk because the one they are on is lost.
//!
//! A disk is *lost* when its node was not heard of for the replacement time, or when it reports that it failed; who calls
//! decides that. A replica on it moves to a disk of the pool that lives, under the same rules as one that an operator moves. The
//! rest is the business of R7: the new replica is stale, is rebuilt from those in sync, and the old one leaves when it is.
//!
//! Invariants:
//! - Those in danger first: the fewer living copies in sync a group has, the earlier; then in the order of identities.
//! - A group without a living copy in sync is left alone: there is nothing to rebuild from, and what is on the lost disk may
//!   be the only copy. It comes back with the disk.
//! - A replica whose successor lives is not moved again. One whose successor is lost too gets another.
//! - At most so many rebuilds are under way in the cluster and onto one disk as the caps say; what a round has planned counts.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, ReplicaState, VolumeId};

use super::DiskView;
use super::placement::{Planned, place_move};
use super::repair::Caps;
use crate::model::{Group, Operation, Replica, State, Volume};

/// What to do now.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct HealPlan {
    /// `MoveReplica` commands, those in danger first.
    pub operations: Vec<Operation>,
    /// Replicas that need another disk and get none, and why.
    pub unplaced: Vec<Unplaced>,
    /// Replicas that wait for others: because of the caps, or because their clones are to leave first.
    pub waiting: usize,
}

/// A replica for which there is no disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unplaced {
    /// Its volume.
    pub volume: VolumeId,
    /// The lost disk.
    pub disk: DiskId,
    /// Why none will do.
    pub reason: String,
}

/// A replica that is to leave, and how many good copies its worst group has without it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Loss {
    good: usize,
    volume: VolumeId,
    disk: DiskId,
}

/// Plans one round.
pub fn plan(
    state: &State,
    view: &dyn DiskView,
    caps: Caps,
    lost: impl Fn(DiskId) -> bool,
) -> HealPlan {
    let losses = losses(state, view, &lost);
    let mut budget = caps.cluster.saturating_sub(state.rebuilding());
    let mut planned = Planned::new();
    let mut per_disk = BTreeMap::<DiskId, u32>::new();
    let mut plan = HealPlan::default();
    for loss in losses {
        if budget == 0 {
            plan.waiting += 1;
            continue;
        }
        let Some(volume) = state.volume(loss.volume) else {
            continue;
        };
        // Its clones on that disk leave first.
        if state.check_may_leave(volume, loss.disk).is_err() {
            plan.waiting += 1;
            continue;
        }
        let crowded = |disk: DiskId| {
            let here = per_disk.get(&disk).copied().unwrap_or(0);
            state.disk_use(disk).rebuilding + here >= caps.disk
        };
        match place_move(state, view, volume, loss.disk, &planned) {
            Ok(to) if crowded(to) => plan.waiting += 1,
            Ok(to) => {
                *per_disk.entry(to).or_default() += 1;
                budget -= 1;
                *planned.entry(to).or_default() += volume.share_bytes();
                plan.operations.push(Operation::MoveReplica {
                    volume: loss.volume,
                    from: loss.disk,
                    to,
                });
            }
            Err(refusal) => plan.unplaced.push(Unplaced {
                volume: loss.volume,
                disk: loss.disk,
                reason: refusal.message,
            }),
        }
    }
    plan
}

/// Replicas that have to leave the disk they are on, in order of danger.
fn losses(state: &State, view: &dyn DiskView, lost: &impl Fn(DiskId) -> bool) -> Vec<Loss> {
    let mut losses = BTreeSet::new();
    for disk in state.disks().filter(|d| lost(d.id)) {
        for id in state.volumes_on(disk.id) {
            let Some(volume) = state.volume(id) else {
                continue;
            };
            losses.extend(leaving(volume, disk.id, lost).map(|leaving| Loss {
                good: good_copies(volume, leaving, view),
                volume: id,
                disk: leaving,
            }));
        }
    }
    losses.into_iter().filter(|loss| loss.good > 0).collect()
}

/// The disk that a replica has to leave because `disk` is lost: itself, or the one that it was to take over from.
fn leaving(volume: &Volume, disk: DiskId, lost: impl Fn(DiskId) -> bool) -> Option<DiskId> {
    let groups = || volume.groups.iter().filter(|g| has(g, disk));
    let replicas = || groups().flatten();
    if let Some(former) = replicas().find(|r| r.leaving_for == Some(disk)) {
        return Some(former.disk);
    }
    let moves_on = |r: &Replica| r.leaving_for.is_some_and(|to| !lost(to));
    let stays = replicas().any(|r| r.disk == disk && !moves_on(r));
    stays.then_some(disk)
}

fn has(group: &Group, disk: DiskId) -> bool {
    group.iter().any(|r| r.disk == disk)
}

/// Living replicas in sync beside the one that leaves, of the group that has fewest.
fn good_copies(volume: &Volume, leaving: DiskId, view: &dyn DiskView) -> usize {
    let groups = volume.groups.iter().filter(|g| has(g, leaving));
    let good = groups.map(|g| {
        let others = g.iter().filter(|r| r.disk != leaving);
        others
            .filter(|r| r.state == ReplicaState::InSync && view.alive(r.disk))
            .count()
    });
    good.min().unwrap_or(0)
}
