//! Which replicas move because their disk is much fuller than others of the pool.
//!
//! How full a disk is: [`Candidate::fill`], by what is used and by what is provisioned.
//!
//! Invariants:
//! - Hysteresis: a pool begins to be balanced when its fullest and its emptiest disk differ by [`BEGIN_AT`], and ends when they
//!   differ by less than [`END_AT`], or when no move helps any more.
//! - A move leaves both disks less full than the source was, and closer to each other than they were, each by [`GAIN`] at least.
//!   So the fills of all disks, sorted from the fullest, become smaller with every move, and no arrangement comes a second time:
//!   it cannot oscillate while nothing else changes (a property test).
//! - One move from and one to a disk at a time, and none while the disk still has to drop what left it: what heartbeats say of its
//!   use is what it will be.
//! - What is used is what replicas use, not what writes under way reserve; and what was moved stays for a while.
//! - The failure domains are those of every move; what is not wholly in sync, moves already, is being reverted or shares blocks
//!   with a clone on its disk stays where it is.

use std::collections::BTreeSet;

use ashlar_proto::ids::{DiskId, PoolId, ReplicaState, VolumeId};

use super::DiskView;
use super::moves::{Move, Reason};
use super::placement::{Candidate, Placer};
use crate::model::{State, Volume};

/// Fills differ by so much (in millionths) before anything moves.
pub const BEGIN_AT: u64 = 100_000;
/// They are alike when they differ by less.
pub const END_AT: u64 = 50_000;
/// What a move has to gain.
const GAIN: u64 = 10_000;
/// Disks, the fullest first, and replicas of each that are looked at in a round.
const SOURCES_MAX: usize = 32;
const REPLICAS_MAX: usize = 512;

/// What balancing remembers, in the leader's memory.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Balancing {
    /// Pools that are being balanced.
    pools: BTreeSet<PoolId>,
    /// Volumes that were moved a short time ago and stay: whatever else changes, none is carried around.
    pub resting: BTreeSet<VolumeId>,
}

/// Plans one round of at most `budget` moves; nothing comes from or goes to disks that are `unfit`.
pub fn plan<'a>(
    state: &'a State,
    view: &dyn DiskView,
    placer: &mut Placer<'a>,
    budget: u32,
    unfit: impl Fn(DiskId) -> bool,
    balancing: &mut Balancing,
) -> Vec<Move> {
    balancing.pools.retain(|pool| state.pool(*pool).is_some());
    let mut moves = Vec::new();
    // What is under way shows in no figure yet.
    let mut busy = None;
    for pool in state.pools() {
        let mut disks = placer.disks(pool);
        disks.retain(|c| !unfit(c.disk.id));
        disks.sort_by_key(|c| (c.fill(0), c.disk.id));
        let (Some(emptiest), Some(fullest)) = (disks.first(), disks.last()) else {
            continue;
        };
        let emptiest = emptiest.fill(0);
        let apart = fullest.fill(0) - emptiest;
        let active = if balancing.pools.contains(&pool.id) {
            apart >= END_AT
        } else {
            apart >= BEGIN_AT
        };
        if !active {
            balancing.pools.remove(&pool.id);
            continue;
        }
        balancing.pools.insert(pool.id);
        let busy = busy.get_or_insert_with(|| disks_of_moves(state));
        for source in disks.iter().rev().take(SOURCES_MAX) {
            let few = source.fill(0) < emptiest + END_AT;
            if few || moves.len() >= budget as usize {
                break;
            }
            let id = source.disk.id;
            if busy.contains(&id) || state.garbage_on(id).next().is_some() {
                continue;
            }
            if let Some(to) = best(
                state,
                view,
                placer,
                (pool.id, source),
                busy,
                &balancing.resting,
            ) {
                busy.extend([to.from, to.to]);
                moves.push(to);
            }
        }
    }
    moves
}

/// The move away from a disk that gains most.
fn best(
    state: &State,
    view: &dyn DiskView,
    placer: &mut Placer<'_>,
    (pool, source): (PoolId, &Candidate<'_>),
    busy: &BTreeSet<DiskId>,
    resting: &BTreeSet<VolumeId>,
) -> Option<Move> {
    let from = source.disk.id;
    let before = source.fill(0);
    let mut best = None;
    for id in state.volumes_on(from).take(REPLICAS_MAX) {
        let volume = state
            .volume(id)
            .filter(|v| v.pool == pool && !resting.contains(&id));
        let Some(volume) = volume.filter(|v| may_move(state, v)) else {
            continue;
        };
        let share = volume.share_bytes();
        let used = view.replica_bytes(from, id);
        let left = source.with(
            |bytes| bytes.saturating_sub(share),
            |u| u.saturating_sub(used),
        );
        let Ok((_, targets)) = placer.fitting(volume, from) else {
            continue;
        };
        let targets = targets.iter().filter(|c| !busy.contains(&c.disk.id));
        let target = targets.min_by_key(|c| (c.fill(share), c.disk.id));
        let Some(target) = target.filter(|t| !placer.is_crowded(t.disk.id)) else {
            continue;
        };
        let got = target.with(|b| b.saturating_add(share), |u| u.saturating_add(used));
        let helps = got + GAIN <= before
            && left + GAIN <= before
            && left.abs_diff(got) + GAIN <= before.saturating_sub(target.fill(0));
        let key = (left.max(got), id);
        if helps && best.as_ref().is_none_or(|(k, _)| key < *k) {
            let to = target.disk.id;
            let reason = Reason::Balanced;
            let volume = id;
            best = Some((
                key,
                Move {
                    volume,
                    from,
                    to,
                    reason,
                },
            ));
        }
    }
    best.map(|(_, to)| to)
}

fn may_move(state: &State, volume: &Volume) -> bool {
    let whole = volume
        .all_replicas()
        .all(|(_, r)| r.state == ReplicaState::InSync && r.leaving_for.is_none());
    let alone = volume.parent.is_none() && state.clones_of(volume.id, None).next().is_none();
    whole && alone && !volume.hidden && volume.reverting.is_none() && !volume.is_snapshot_pending()
}

/// Disks with a replica of which some are not in sync, or move.
fn disks_of_moves(state: &State) -> BTreeSet<DiskId> {
    let mut disks = BTreeSet::new();
    for volume in state.volumes() {
        let changes = volume
            .all_replicas()
            .any(|(_, r)| r.state != ReplicaState::InSync || r.leaving_for.is_some());
        if changes {
            disks.extend(volume.disks());
        }
    }
    disks
}
