//! Which replicas get a new disk: those on disks that are lost, that are to be emptied, and that are much fuller than others.
//!
//! A disk is *lost* when its node was not heard of for the replacement time, or when it reports that it failed; who calls
//! decides that. A disk is *draining* when an operator wants it empty (`model::service`). A replica that has to leave moves to a
//! disk of the pool that lives, under the same rules as one that an operator moves. The rest is the business of R7: the new
//! replica is stale, is rebuilt from those in sync, and the old one leaves when it is.
//!
//! Invariants:
//! - The lost before the draining before the overfull (`balance`): what comes later waits while something before it waits.
//! - Those in danger first: the fewer living copies in sync a group has, the earlier; then in the order of identities.
//! - A group without a living copy in sync is left alone: there is nothing to rebuild from, and what is on the lost disk may
//!   be the only copy. It comes back with the disk.
//! - A replica whose successor's disk is good is not moved again. One whose successor has to leave, too, gets another.
//! - At most so many rebuilds are under way in the cluster and onto one disk as the caps say; what a round has planned counts.
//!   What nobody is in danger without is capped lower, so that a loss never waits behind it for long.

use std::collections::BTreeSet;

use ashlar_proto::ids::{DiskId, ReplicaState, VolumeId};

use super::DiskView;
use super::balance::{self, Balancing};
use super::placement::{Place, Placer};
use super::repair;
use crate::model::{Group, Operation, Replica, Service, State, Volume};

/// Rebuilds at a time.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// Of what is lost.
    pub lost: repair::Caps,
    /// Of what is there as long as it takes.
    pub calm: repair::Caps,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            lost: repair::Caps::default(),
            calm: repair::Caps {
                cluster: 32,
                disk: 4,
            },
        }
    }
}

/// Why a replica moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Its disk is lost.
    Lost,
    /// Its disk is to be emptied.
    Drained,
    /// Its disk is much fuller than another.
    Balanced,
}

/// A replica that moves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Move {
    /// Its volume.
    pub volume: VolumeId,
    /// Where it is.
    pub from: DiskId,
    /// Where it goes.
    pub to: DiskId,
    /// Why.
    pub reason: Reason,
}

impl Move {
    /// The command.
    pub fn operation(&self) -> Operation {
        Operation::MoveReplica {
            volume: self.volume,
            from: self.from,
            to: self.to,
        }
    }
}

/// What to do now.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct MovePlan {
    /// In the order in which it is to be done.
    pub moves: Vec<Move>,
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
    /// The disk that it has to leave.
    pub disk: DiskId,
    /// Why none will do.
    pub reason: String,
}

/// A replica that has to leave, and how many good copies its worst group has beside what is lost.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Leaving {
    good: usize,
    volume: VolumeId,
    disk: DiskId,
}

/// Replicas looked at in vain in a round: when so many disks have enough to do, the others wait for the next.
const CROWDED_MAX: usize = 256;

/// Plans one round; without `balancing` nothing moves from overfull disks.
pub fn plan(
    state: &State,
    view: &dyn DiskView,
    caps: Caps,
    lost: impl Fn(DiskId) -> bool,
    balancing: Option<&mut Balancing>,
) -> MovePlan {
    let draining: BTreeSet<_> = state.draining().filter(|d| !lost(*d)).collect();
    let unfit = |disk| lost(disk) || draining.contains(&disk);
    let all_lost: Vec<_> = state.disks().map(|d| d.id).filter(|d| lost(*d)).collect();
    let mut round = Round {
        state,
        placer: Placer::new(state, view, caps.lost.disk),
        budget: caps.lost.cluster.saturating_sub(state.rebuilding()),
        plan: MovePlan::default(),
    };
    round.empty(leaving(state, view, all_lost, &unfit), Reason::Lost);
    let begun = u32::try_from(round.plan.moves.len()).unwrap_or(u32::MAX);
    let calm = caps.calm.cluster.saturating_sub(state.rebuilding());
    round.budget = round.budget.min(calm.saturating_sub(begun));
    round.placer.set_per_disk(caps.calm.disk);
    round.empty(
        leaving(state, view, draining.iter().copied(), &unfit),
        Reason::Drained,
    );
    let Round {
        mut placer,
        budget,
        mut plan,
        ..
    } = round;
    let busy = plan.waiting > 0 || !plan.moves.is_empty();
    if let Some(balancing) = balancing.filter(|_| !busy) {
        let moves = balance::plan(state, view, &mut placer, budget, unfit, balancing);
        plan.moves.extend(moves);
    }
    plan
}

struct Round<'a> {
    state: &'a State,
    placer: Placer<'a>,
    budget: u32,
    plan: MovePlan,
}

impl Round<'_> {
    fn empty(&mut self, leaving: BTreeSet<Leaving>, reason: Reason) {
        let mut crowded = 0;
        for one in leaving {
            let Some(volume) = self.state.volume(one.volume) else {
                continue;
            };
            // Its clones on that disk leave first.
            let blocked = self.state.check_may_leave(volume, one.disk).is_err();
            if blocked || self.budget == 0 || crowded >= CROWDED_MAX {
                self.plan.waiting += 1;
                continue;
            }
            let wanted = match self.state.disk_service(one.disk) {
                Service::Draining { to } => to,
                Service::InUse | Service::Cordoned => None,
            };
            match self.placer.place(volume, one.disk, wanted) {
                Place::On(to) => {
                    self.budget -= 1;
                    self.plan.moves.push(Move {
                        volume: one.volume,
                        from: one.disk,
                        to,
                        reason,
                    });
                }
                Place::Crowded => {
                    crowded += 1;
                    self.plan.waiting += 1;
                }
                Place::Nowhere(refusal) => self.plan.unplaced.push(Unplaced {
                    volume: one.volume,
                    disk: one.disk,
                    reason: refusal.message,
                }),
            }
        }
    }
}

/// Replicas that have to leave these disks, in order of danger.
fn leaving(
    state: &State,
    view: &dyn DiskView,
    disks: impl IntoIterator<Item = DiskId>,
    unfit: &impl Fn(DiskId) -> bool,
) -> BTreeSet<Leaving> {
    let mut all = BTreeSet::new();
    for disk in disks {
        for id in state.volumes_on(disk) {
            let Some(volume) = state.volume(id) else {
                continue;
            };
            all.extend(leaves(volume, disk, unfit).map(|disk| Leaving {
                good: good_copies(volume, disk, view),
                volume: id,
                disk,
            }));
        }
    }
    let unmade = |id| state.volume(id).is_some_and(|v| v.is_unmade());
    all.retain(|one| one.good > 0 || unmade(one.volume));
    all
}

/// The disk that a replica has to leave because `disk` is no place for it: itself, or the one that it was to take over from.
fn leaves(volume: &Volume, disk: DiskId, unfit: impl Fn(DiskId) -> bool) -> Option<DiskId> {
    let groups = || volume.groups.iter().filter(|g| has(g, disk));
    let replicas = || groups().flatten();
    if let Some(former) = replicas().find(|r| r.leaving_for == Some(disk)) {
        return Some(former.disk);
    }
    let moves_on = |r: &Replica| r.leaving_for.is_some_and(|to| !unfit(to));
    let stays = replicas().any(|r| r.disk == disk && !moves_on(r));
    stays.then_some(disk)
}

fn has(group: &Group, disk: DiskId) -> bool {
    group.iter().any(|r| r.disk == disk)
}

/// Living replicas in sync of the group that has fewest, of those with a replica on this disk; that one counts, too, while it lives.
fn good_copies(volume: &Volume, disk: DiskId, view: &dyn DiskView) -> usize {
    let groups = volume.groups.iter().filter(|g| has(g, disk));
    let good = groups.map(|g| {
        g.iter()
            .filter(|r| r.state == ReplicaState::InSync && view.alive(r.disk))
            .count()
    });
    good.min().unwrap_or(0)
}
