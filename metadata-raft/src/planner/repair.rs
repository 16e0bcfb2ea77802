//! Which stale replicas start to be rebuilt now.
//!
//! A stale replica of an attached volume is rebuilt as soon as its disk is alive, within the caps, volumes with the fewest good
//! copies first; all such replicas of a volume begin in one command, because each new epoch restarts the volume's other rebuilds
//! (R7). No whole replica is begun on a disk that is nearly full. Volumes without a holder are left alone: their rebuild needs somebody who holds them (`care`).

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, GroupIndex, ReplicaState, VolumeId};

use super::DiskView;
use super::placement::is_below;
use crate::model::{Operation, Replica, State, Volume};

/// Rebuilds at a time.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// In the whole cluster.
    pub cluster: u32,
    /// Onto one disk.
    pub disk: u32,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            cluster: 128,
            disk: 32,
        }
    }
}

/// No whole replica is built on a disk that is fuller than this; what was begun goes on.
const FULL_PERCENT: u64 = 95;
/// Volumes looked at per disk and round, so that a round is bounded.
const VOLUMES_PER_DISK_MAX: usize = 4096;

/// What to do now.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct RepairPlan {
    /// `BeginRebuild` commands.
    pub operations: Vec<Operation>,
    /// The replicas that they are about, for the back-off.
    pub begun: Vec<(VolumeId, DiskId)>,
}

/// Plans one round. `ready` says whether a replica's back-off is over.
pub fn plan(
    state: &State,
    view: &dyn DiskView,
    caps: Caps,
    ready: impl Fn(VolumeId, DiskId) -> bool,
) -> RepairPlan {
    let mut budget = caps.cluster.saturating_sub(state.rebuilding());
    let mut per_disk = BTreeMap::<DiskId, u32>::new();
    let mut plan = RepairPlan::default();
    if budget == 0 {
        return plan;
    }
    let mut waiting = BTreeSet::new();
    for disk in state.disks().filter(|d| view.alive(d.id)) {
        let volumes = state.repairable_on(disk.id).take(VOLUMES_PER_DISK_MAX);
        waiting.extend(volumes.filter_map(|id| Some((good_copies(state.volume(id)?, view), id))));
    }
    for (_, id) in waiting {
        if budget == 0 {
            break;
        }
        let Some(volume) = state.volume(id) else {
            continue;
        };
        let mut replicas = Vec::new();
        for (group, replica) in volume.all_replicas() {
            let wanted = replica.state == ReplicaState::Stale
                && view.alive(replica.disk)
                && (replica.incarnation.0 != 0 || has_room(state, view, replica.disk))
                && ready(id, replica.disk);
            let planned = per_disk
                .entry(replica.disk)
                .or_insert_with(|| state.disk_use(replica.disk).rebuilding);
            if wanted && budget > 0 && *planned < caps.disk {
                *planned += 1;
                budget -= 1;
                replicas.push((
                    GroupIndex(u32::try_from(group).unwrap_or(u32::MAX)),
                    replica.disk,
                ));
                plan.begun.push((id, replica.disk));
            }
        }
        if !replicas.is_empty() {
            plan.operations.push(Operation::BeginRebuild {
                volume: id,
                epoch: volume.epoch,
                replicas,
            });
        }
    }
    plan
}

/// Whether a whole replica may be built on the disk. One that was there already only catches up.
fn has_room(state: &State, view: &dyn DiskView, disk: DiskId) -> bool {
    let capacity = state.disk(disk).map_or(0, |d| d.capacity_bytes);
    is_below(view.used_bytes(disk), capacity, FULL_PERCENT)
}

/// Living replicas in sync of the volume's worst group among those that a rebuild helps.
fn good_copies(volume: &Volume, view: &dyn DiskView) -> usize {
    let stale = |r: &Replica| r.state == ReplicaState::Stale;
    let groups = volume.groups.iter().filter(|g| g.iter().any(stale));
    let good = groups.map(|g| {
        let good = |r: &&Replica| r.state == ReplicaState::InSync && view.alive(r.disk);
        g.iter().filter(good).count()
    });
    good.min().unwrap_or(0)
}
