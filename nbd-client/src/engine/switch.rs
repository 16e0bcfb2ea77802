//! The switch to a new snapshot number (docs/snapshots.md, S2): hold, drain, flush, take the number, report.
//!
//! | state | what happens | next |
//! |---|---|---|
//! | Idle | a pending number above the session's is seen | Draining |
//! | Draining | new writes and trims wait; those admitted are acknowledged | Flushing |
//! | Flushing | a flush that began after the drain | Holding: the number is taken, *held* is reported |
//! | Holding | the number is settled, or the hold time is over | Idle: the held requests begin |
//!
//! Invariants:
//! - Writes begun in `Idle` and `Holding` carry `layer`; none begins in `Draining` and `Flushing`.
//! - *Held* is only ever reported for `layer`, while every write below it is acknowledged and flushed.
//! - Nothing is held for longer than the hold time after the number was first seen. A number that was not taken by
//!   then is not tried again: nobody can commit it, and the session's own number goes on to be right (S7).
//! - Reads, block status and flushes are never held.

use std::collections::VecDeque;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::SnapshotNumber;
use ashlar_proto::layers::HOLD_TIME;

use super::api::{ClientOp, ClientRequest, MetadataRequest, SessionCommand};
use super::op::OpKind;
use super::reader::Role;
use super::session::{Phase, Session};

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum State {
    #[default]
    Idle,
    Draining,
    /// The flush with this number is waited for.
    Flushing(u64),
    Holding,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Switch {
    state: State,
    /// The number that is switched to, or was last.
    number: SnapshotNumber,
    began: Time,
    until: Time,
    held: VecDeque<ClientRequest>,
}

impl Switch {
    /// Whether new writes wait.
    pub(super) fn holds(&self) -> bool {
        self.state != State::Idle
    }
}

fn writes(op: &ClientOp) -> bool {
    match op {
        ClientOp::Write { .. } | ClientOp::Trim { .. } | ClientOp::WriteZeroes { .. } => true,
        ClientOp::Read { .. } | ClientOp::Flush | ClientOp::BlockStatus { .. } => false,
    }
}

impl Session {
    /// The view or the session's phase changed: a switch may be due, or over.
    pub(super) fn switch_seen(&mut self) {
        if self.role != Role::Holder || self.phase != Phase::Serving {
            return;
        }
        let pending = self.view.snapshot_pending.then_some(self.view.snapshot);
        if self.switch.holds() && pending != Some(self.switch.number) {
            self.switch_end();
        }
        if let Some(number) = pending
            && !self.switch.holds()
            && number > self.layer
            && number > self.switch.number
        {
            self.switch.state = State::Draining;
            self.switch.number = number;
            self.switch.began = self.now;
            self.switch.until = self.now.after(HOLD_TIME);
            self.pump = true;
        }
    }

    /// Keeps a request that is to wait; gives back one that is not.
    pub(super) fn hold(&mut self, request: ClientRequest) -> Option<ClientRequest> {
        if self.switch.holds() && writes(&request.op) {
            self.switch.held.push_back(request);
            return None;
        }
        Some(request)
    }

    /// Goes on with a switch.
    pub(super) fn switch_pump(&mut self) {
        if !self.switch.holds() {
            return;
        }
        if self.now >= self.switch.until {
            return self.switch_end();
        }
        if self.switch.state == State::Draining && self.drained() {
            // One that is under way may have begun before the last acknowledgement.
            let after = self.flush_number + 1;
            self.switch.state = State::Flushing(after);
            let took = self.now.since(self.switch.began);
            tracing::debug!(number = self.switch.number.0, ?took, "drained");
        }
        if let State::Flushing(number) = self.switch.state {
            if self.flush.is_none() && self.flush_number < number {
                self.start_flush();
            }
            // Clients that flush all the time may have begun the next one already.
            if self.flushed >= number {
                self.switch.state = State::Holding;
                self.layer = self.switch.number;
                self.stats.switches += 1;
                let took = self.now.since(self.switch.began);
                tracing::debug!(number = self.layer.0, ?took, "holds its writes");
                self.report_held();
            }
        }
    }

    /// The epoch changed: a report under the old one is worth nothing.
    pub(super) fn report_held(&mut self) {
        if self.switch.state == State::Holding {
            let (epoch, number) = (self.epoch, self.switch.number);
            self.out
                .push(SessionCommand::Metadata(MetadataRequest::ReportHeld {
                    epoch,
                    number,
                }));
        }
    }

    fn drained(&self) -> bool {
        let writing = |kind: &OpKind| matches!(kind, OpKind::Write);
        self.rmws.is_empty()
            && self.writes.iter().all(|(_, w)| w.done)
            && !self.ops.iter().any(|(_, op)| writing(&op.kind))
    }

    /// Lets go what was held.
    pub(super) fn switch_end(&mut self) {
        self.switch.state = State::Idle;
        for request in std::mem::take(&mut self.switch.held) {
            self.begin(request);
        }
        self.pump = true;
    }

    pub(super) fn switch_deadline(&self) -> Option<Time> {
        self.switch.holds().then_some(self.switch.until)
    }
}
