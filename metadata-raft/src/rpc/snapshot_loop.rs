//! The leader's loop that gives up pending snapshots that nobody takes, forgets deleted ones of which nothing is left, deletes
//! those that were taken for a clone that was not made, and cuts clones off that inherit nothing any more.
//!
//! Invariants: it runs only while this member leads, sleeps while nothing is pending or deleting, and remembers nothing.
//! Cancelling what was committed meanwhile has no effect.

use std::sync::Arc;
use std::time::Duration;

use super::layers::{self, Left};
use super::member::Member;
use crate::model::{Command, Operation, RequestKey, validate};

/// Between two looks while something is pending or deleting.
const PERIOD: Duration = Duration::from_millis(500);

/// Runs for the life of the member.
pub async fn run(member: Arc<Member>) {
    let mut role = member.role.clone();
    loop {
        let leads = role.wait_for(|r| r.leading_term.is_some() || r.stopping);
        if leads.await.is_err() || role.borrow().stopping {
            return;
        }
        let looked = round(&member).await;
        let busy = !looked || member.shared.state().snapshots().is_busy();
        tokio::select! {
            () = member.takings.attention.notified() => {}
            () = tokio::time::sleep(PERIOD), if busy => {}
            _ = role.changed() => {}
        }
    }
}

/// Whether it could look.
async fn round(member: &Member) -> bool {
    // A new leader may not have applied yet what an earlier one has committed.
    if !member.shared.state().snapshots().is_busy() && member.linearize().await.is_err() {
        return false;
    }
    let (abandoned, done, left_over, cuts) = member.with_view(|state, view| {
        let snapshots = state.snapshots();
        let pending = snapshots.pending();
        let abandoned = pending.filter(|id| !member.takings.contains(*id));
        let nothing_left = |s: &&Arc<_>| layers::left(state, view.liveness, s) == Left::default();
        let done = snapshots.deleting().filter(nothing_left).map(|s| s.id);
        let for_clones = snapshots.for_clones();
        let left_over = for_clones.filter(|id| !member.takings.contains(*id));
        (
            abandoned.take(validate::BATCH_MAX).collect::<Vec<_>>(),
            done.take(validate::BATCH_MAX).collect::<Vec<_>>(),
            left_over.take(validate::BATCH_MAX).collect::<Vec<_>>(),
            Member::cuttable(state, view),
        )
    });
    let operations = [
        (!abandoned.is_empty()).then_some(Operation::CancelSnapshots(abandoned)),
        (!done.is_empty()).then_some(Operation::ForgetSnapshots(done)),
        (!left_over.is_empty()).then_some(Operation::DeleteSnapshots(left_over)),
    ];
    for operation in operations.into_iter().flatten().chain(cuts) {
        tracing::info!(?operation, "settling snapshots");
        let command = Command {
            request: RequestKey::generate(),
            operation,
        };
        if member.propose(command).await.is_err() {
            // Not leader any more, or no majority: the next round looks again.
            return false;
        }
    }
    true
}
