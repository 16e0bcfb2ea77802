//! Which stale replicas start to be rebuilt now.
//!
//! A stale replica of an attached volume is rebuilt as soon as its disk is alive, within the caps; all
//! such replicas of a volume begin in one command, because each new epoch restarts the volume's other
//! rebuilds (R7). Volumes without a holder are left alone: their rebuild needs somebody who holds them;
//! [`RepairPlan::detached`] is where that would hook in.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, GroupIndex, ReplicaState, VolumeId};

use super::DiskView;
use crate::model::{Operation, State};

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

/// Volumes looked at per disk and round, so that a round is bounded.
const VOLUMES_PER_DISK_MAX: usize = 4096;

/// What to do now.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct RepairPlan {
    /// `BeginRebuild` commands.
    pub operations: Vec<Operation>,
    /// The replicas that they are about, for the back-off.
    pub begun: Vec<(VolumeId, DiskId)>,
    /// Volumes without holder that would need a daemon to hold them: always empty in this version.
    pub detached: Vec<VolumeId>,
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
    let mut seen = BTreeSet::new();
    let mut plan = RepairPlan::default();
    for disk in state.disks().filter(|d| view.alive(d.id)) {
        for id in state.repairable_on(disk.id).take(VOLUMES_PER_DISK_MAX) {
            if budget == 0 {
                return plan;
            }
            let Some(volume) = state.volume(id).filter(|_| seen.insert(id)) else {
                continue;
            };
            let mut replicas = Vec::new();
            for (group, replica) in volume.all_replicas() {
                let wanted = replica.state == ReplicaState::Stale
                    && view.alive(replica.disk)
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
    }
    plan
}
