//! The leader's loop that gives replicas on lost disks a new home (`planner::heal`).
//!
//! Invariants: it runs only while this member leads; it remembers only what it has said already and since when it has watched
//! without a gap. How long a disk has been away is known from when this member began to lead at the earliest: a new leader waits
//! the whole time again, and so does one that stood still itself (stopped, swapped out): it heard nobody, which says nothing of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, VolumeId};

use super::member::Member;
use crate::model::{Command, RequestKey};
use crate::planner::heal;
use crate::planner::repair::Caps;

/// Between two looks, at most.
const PERIOD_MAX: Duration = Duration::from_secs(5);
/// A look that is later than this was late because this process stood still.
const LATE: Duration = Duration::from_secs(2);

/// Runs for the life of the member; a disk is lost after `replace_after` without its node.
pub async fn run(member: Arc<Member>, replace_after: Duration) {
    let mut role = member.role.clone();
    let period = (replace_after / 4).clamp(Duration::from_millis(250), PERIOD_MAX);
    let mut said = BTreeSet::new();
    let mut watch = Watch::new(period + LATE);
    loop {
        let leads = role.wait_for(|r| r.leading_term.is_some() || r.stopping);
        if leads.await.is_err() || role.borrow().stopping {
            return;
        }
        let watched = watch.look(Instant::now());
        let away = (watched >= replace_after).then_some(replace_after);
        round(&member, away, &mut said).await;
        tokio::select! {
            () = tokio::time::sleep(period) => {}
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

/// `away`: after which absence a disk is lost; none: only disks that report it are.
async fn round(member: &Member, away: Option<Duration>, said: &mut BTreeSet<(VolumeId, DiskId)>) {
    let plan = member.with_view(|state, view| {
        let lost = |disk| view.is_lost(disk, away);
        heal::plan(state, view, Caps::default(), lost)
    });
    let unplaced: BTreeSet<_> = plan.unplaced.iter().map(|u| (u.volume, u.disk)).collect();
    said.retain(|key| unplaced.contains(key));
    for one in plan.unplaced {
        if said.insert((one.volume, one.disk)) {
            let (volume, disk, reason) = (one.volume, one.disk, one.reason);
            tracing::warn!(%volume, %disk, reason, "a replica is lost, and there is no disk for another");
        }
    }
    for operation in plan.operations {
        tracing::info!(?operation, "replacing a replica whose disk is lost");
        let command = Command {
            request: RequestKey::generate(),
            operation,
        };
        match member.propose(command).await {
            Ok(_) => {}
            // The volume changed, or may not move: the next round looks again, at the others now.
            Err(super::member::Fault::Status(status)) => {
                tracing::debug!(%status, "not replaced");
            }
            // Not leader any more, or no majority.
            Err(_) => return,
        }
    }
    member.repair.notify_one();
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
