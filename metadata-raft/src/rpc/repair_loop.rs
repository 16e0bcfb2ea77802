//! The leader's loop that starts rebuilds of returning replicas.
//!
//! Invariants: it runs only while this member leads, sleeps while nothing is repairable, and remembers
//! nothing that a crash could harm: back-offs only pace it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, VolumeId};

use super::member::Member;
use crate::model::{Command, RequestKey};
use crate::planner::repair::{self, Caps};

/// Between two looks while something is repairable.
const PERIOD: Duration = Duration::from_millis(250);
/// Back-off after the first and at most after many rebuilds that did not last.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// A replica that stayed quiet for this long starts afresh.
const FORGET_AFTER: Duration = Duration::from_secs(120);

struct Attempt {
    tries: u32,
    next: Instant,
}

/// Runs for the life of the member.
pub async fn run(member: Arc<Member>) {
    let mut role = member.role.clone();
    let mut attempts = BTreeMap::<(VolumeId, DiskId), Attempt>::new();
    loop {
        if role
            .wait_for(|r| r.leading_term.is_some() || r.stopping)
            .await
            .is_err()
            || role.borrow().stopping
        {
            return;
        }
        round(&member, &mut attempts).await;
        let idle = !member.shared.state().has_repairable();
        tokio::select! {
            () = member.repair.notified() => {}
            () = tokio::time::sleep(PERIOD), if !idle => {}
            _ = role.changed() => {}
        }
    }
}

async fn round(member: &Member, attempts: &mut BTreeMap<(VolumeId, DiskId), Attempt>) {
    let now = Instant::now();
    attempts.retain(|_, a| now.saturating_duration_since(a.next) < FORGET_AFTER);
    let ready = |volume, disk| attempts.get(&(volume, disk)).is_none_or(|a| a.next <= now);
    let plan = member.with_view(|state, view| repair::plan(state, view, Caps::default(), ready));
    for key in plan.begun {
        let attempt = attempts.entry(key).or_insert(Attempt {
            tries: 0,
            next: now,
        });
        attempt.next = now
            + BACKOFF_MIN
                .saturating_mul(1 << attempt.tries.min(8))
                .min(BACKOFF_MAX);
        attempt.tries += 1;
    }
    for operation in plan.operations {
        tracing::info!(?operation, "beginning a rebuild");
        if member
            .propose(Command {
                request: RequestKey::generate(),
                operation,
            })
            .await
            .is_err()
        {
            // Not leader any more, no majority, or the volume changed: the next round looks again.
            return;
        }
    }
}
