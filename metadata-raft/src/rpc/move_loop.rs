//! The leader's loop that moves replicas to other disks (`planner::moves`): from lost, draining and overfull ones.
//!
//! Invariants: it runs only while this member leads; it remembers only what it has said already, which pools it balances, and since
//! when it has watched without a gap. How long a disk has been away is known from when this member began to lead at the earliest: a
//! new leader waits the whole time again, and so does one that stood still itself (stopped, swapped out): it heard nobody, which
//! says nothing of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, VolumeId};
use ashlar_proto::rpc::metadata as pb;

use super::member::Member;
use crate::model::{Command, RequestKey};
use crate::planner::balance::Balancing;
use crate::planner::moves::{self, Caps, MovePlan, Reason};

/// Between two looks, at most; also after a round that only balanced, so that heartbeats tell of what it did.
const PERIOD_MAX: Duration = Duration::from_secs(5);
/// Between two looks while something waits or was begun.
const PERIOD_BUSY: Duration = Duration::from_millis(500);
/// A look that is later than this was late because this process stood still.
const LATE: Duration = Duration::from_secs(2);
/// A volume that was moved to balance disks stays for this long.
const RESTS_FOR: Duration = Duration::from_secs(600);
/// Unplaced replicas that are named to those who ask.
const UNPLACED_MAX: usize = 100;
/// Time in which every node alive tells how full its disks are.
const HEARD_ALL_AFTER: Duration = Duration::from_secs(15);

/// Runs for the life of the member; a disk is lost after `replace_after` without its node.
pub async fn run(member: Arc<Member>, replace_after: Duration) {
    let mut role = member.role.clone();
    let period = (replace_after / 4).clamp(Duration::from_millis(250), PERIOD_MAX);
    let mut watch = Watch::new(period + LATE);
    let mut round = Round::default();
    loop {
        let leads = role.wait_for(|r| r.leading_term.is_some() || r.stopping);
        if leads.await.is_err() || role.borrow().stopping {
            return;
        }
        let watched = watch.look(Instant::now());
        let away = (watched >= replace_after).then_some(replace_after);
        let busy = round.run(&member, away, watched >= HEARD_ALL_AFTER).await;
        let pause = if busy {
            period.min(PERIOD_BUSY)
        } else {
            period
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = member.moves.notified() => {}
            _ = role.changed() => {}
        }
    }
}

/// How long this loop has run without standing still.
struct Watch {
    gap_max: Duration,
    began_and_last: Option<(Instant, Instant)>,
}

impl Watch {
    fn new(gap_max: Duration) -> Self {
        Self {
            gap_max,
            began_and_last: None,
        }
    }

    /// It looks now: since when without a gap.
    fn look(&mut self, now: Instant) -> Duration {
        let goes_on = |(_, last): &(Instant, Instant)| now.duration_since(*last) <= self.gap_max;
        let began = self.began_and_last.filter(goes_on).map_or(now, |(b, _)| b);
        self.began_and_last = Some((began, now));
        now.duration_since(began)
    }
}

#[derive(Default)]
struct Round {
    /// Unplaced replicas that were told of.
    said: BTreeSet<(VolumeId, DiskId)>,
    balancing: Balancing,
    /// Volumes that were moved to balance, and when.
    balanced: BTreeMap<VolumeId, Instant>,
}

impl Round {
    /// `away`: after which absence a disk is lost; none: only disks that report it are. Whether there is more to do soon.
    async fn run(&mut self, member: &Member, away: Option<Duration>, heard_all: bool) -> bool {
        let now = Instant::now();
        self.balanced
            .retain(|_, at| now.duration_since(*at) < RESTS_FOR);
        self.balancing.resting = self.balanced.keys().copied().collect();
        let balancing = heard_all.then_some(&mut self.balancing);
        let plan = member.with_view(|state, view| {
            let lost = |disk| view.is_lost(disk, away);
            moves::plan(state, view, Caps::default(), lost, balancing)
        });
        note(member, &plan);
        let unplaced: BTreeSet<_> = plan.unplaced.iter().map(|u| (u.volume, u.disk)).collect();
        self.said.retain(|key| unplaced.contains(key));
        for one in plan.unplaced {
            if self.said.insert((one.volume, one.disk)) {
                let (volume, disk, reason) = (one.volume, one.disk, one.reason);
                tracing::warn!(%volume, %disk, reason, "a replica has to leave its disk, and there is no disk for another");
            }
        }
        let mut busy = plan.waiting > 0;
        for one in plan.moves {
            let (volume, from, to, reason) = (one.volume, one.from, one.to, one.reason);
            tracing::info!(%volume, %from, %to, ?reason, "moving a replica");
            let command = Command {
                request: RequestKey::generate(),
                operation: one.operation(),
            };
            match member.propose(command).await {
                Ok(_) if reason == Reason::Balanced => drop(self.balanced.insert(volume, now)),
                Ok(_) => busy = true,
                // The volume changed, or may not move: the next round looks again, at the others now.
                Err(super::member::Fault::Status(status)) => {
                    tracing::debug!(%status, "not moved");
                }
                // Not leader any more, or no majority.
                Err(_) => return false,
            }
        }
        member.repair.notify_one();
        busy
    }
}

/// Keeps what operators ask for.
fn note(member: &Member, plan: &MovePlan) {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let unplaced = plan.unplaced.iter().take(UNPLACED_MAX);
    let state = member.shared.state();
    let unplaced = unplaced.map(|u| pb::Unplaced {
        volume_id: u.volume.to_vec(),
        volume_name: state
            .volume(u.volume)
            .map(|v| v.name.clone())
            .unwrap_or_default(),
        disk_id: u.disk.to_vec(),
        reason: u.reason.clone(),
    });
    let repairs = pb::Repairs {
        rebuilding: 0,
        waiting: count(plan.waiting),
        unplaced_total: count(plan.unplaced.len()),
        unplaced: unplaced.collect(),
    };
    *member
        .repairs
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = repairs;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_stood_still_begins_to_watch_again() {
        let mut watch = Watch::new(Duration::from_secs(7));
        let at = Instant::now();
        let mut look = |s| watch.look(at + Duration::from_secs(s)).as_secs();
        assert_eq!([look(0), look(5), look(12), look(19)], [0, 5, 12, 19]);
        assert_eq!([look(600), look(605)], [0, 5]);
    }
}
