//! Readers (R10): a session that only reads, beside any number of others.
//!
//! Invariants:
//! - A reader returns data only within the lease time after it *asked* metadata whether it is still listed and
//!   nobody holds the volume, if the answer was yes; with metadata away its reads wait.
//! - It never creates, configures, repairs or excludes a replica, and fences none above its own epoch, which is the
//!   current one.
//! - A volume that was not closed cleanly is held exclusively first, reconciled and closed (R1, R2): only then is
//!   there anything that every in-sync replica has. That is the work of [`Role::Preparing`].
//!
//! A reader of a snapshot (S9) is one that nobody lists and no lease binds: what it reads does not change, every
//! replica that is in sync in a view that shows the snapshot as live has all of it, and a store does not answer once
//! the snapshot's layers may have been merged with others.
//!
//! | role | becomes |
//! |---|---|
//! | Holder | - |
//! | Reader | Preparing (asked to join, the volume is not readable) |
//! | Preparing | Reader (closed cleanly, refused or taken over: join again) |

use ashlar_platform::clock::Time;
use ashlar_proto::ids::SnapshotNumber;
use ashlar_proto::volume::VolumeView;

use super::api::{
    ClientError, ClientOp, ClientReply, MetadataRequest, PlantedBug, SessionCommand, SessionConfig,
    SnapshotSource, StopReason,
};
use super::exclude::Change;
use super::replica::Link;
use super::session::{Phase, Session};

/// Refused exclusive opens after which a reader gives up.
const PREPARATIONS_REFUSED_MAX: u32 = 5;

/// What a session is to its volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// The only client.
    Holder,
    /// One of the readers.
    Reader,
    /// Holds the volume only to make it readable.
    Preparing,
}

impl Role {
    pub(super) fn of(config: &SessionConfig) -> Self {
        if config.read_only {
            Self::Reader
        } else {
            Self::Holder
        }
    }
}

/// A reader's lease: what metadata confirmed.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Confirmation {
    /// When the question on its way was asked.
    asked: Option<Time>,
    /// Reads may be answered before it.
    until: Time,
}

/// What a client gets that asks a reader for anything but data.
pub(super) fn read_only_answer(op: &ClientOp) -> Result<ClientReply, ClientError> {
    match op {
        ClientOp::Flush => Ok(ClientReply::Done),
        _ => Err(ClientError::Invalid),
    }
}

impl Session {
    pub(super) fn ask_join(&mut self) {
        if self.config.snapshot.is_some() {
            self.out
                .push(SessionCommand::Metadata(MetadataRequest::Confirm));
            return;
        }
        self.confirmation = Confirmation {
            asked: Some(self.now),
            until: Time(0),
        };
        self.out
            .push(SessionCommand::Metadata(MetadataRequest::Join));
    }

    /// The volume is to be reconciled (or made) before it can be read.
    pub(super) fn on_not_readable(&mut self) {
        if self.role == Role::Reader && self.phase == Phase::Asking {
            if self.close_asked {
                return self.stop(StopReason::Closed);
            }
            self.role = Role::Preparing;
            self.ask_open();
        }
    }

    /// Another reader was faster, and will soon be done; or this client has no right to the volume.
    pub(super) fn on_open_refused(&mut self, reason: String) {
        if self.role == Role::Preparing && self.preparations_refused < PREPARATIONS_REFUSED_MAX {
            self.preparations_refused += 1;
            self.join_again();
        } else {
            self.stop(StopReason::OpenRefused(reason));
        }
    }

    /// Held, fenced, reconciled: closed at once, cleanly, for all readers.
    pub(super) fn prepared(&mut self) {
        self.first_open = false;
        self.dirty = !self.clean;
        self.confirmed = self
            .in_sync_peers()
            .iter()
            .map(|p| self.peers[p as usize].watermark)
            .max()
            .unwrap_or_default();
        for g in 0..self.groups.len() {
            self.refresh_group(g);
        }
        self.phase = Phase::Draining;
        self.pump = true;
    }

    /// The volume is not this client's any more, because it said so.
    pub(super) fn closed(&mut self) {
        if self.role == Role::Preparing && !self.close_asked {
            self.join_again();
        } else {
            self.stop(StopReason::Closed);
        }
    }

    /// The preparation is over, one way or the other.
    pub(super) fn join_again(&mut self) {
        self.role = Role::Reader;
        if self.close_asked {
            return self.stop(StopReason::Closed);
        }
        self.phase = Phase::Asking;
        self.forget_replicas();
        self.ask_join();
    }

    /// Nothing that was learned as the holder counts in another epoch: every replica is fenced anew (R1).
    fn forget_replicas(&mut self) {
        for index in 0..self.peers.len() as u8 {
            if !matches!(self.peers[index as usize].link, Link::Down { .. }) {
                let disk = self.peers[index as usize].disk;
                self.out.push(SessionCommand::Disconnect { disk });
                self.link_down(index);
            }
        }
        self.peers.clear();
        self.groups.clear();
        self.change = Change::Idle;
        self.flush = None;
        self.refreshing = false;
        self.closed_clean = false;
        self.all_fenced_at = None;
    }

    pub(super) fn on_joined(&mut self, view: VolumeView) {
        let size_bytes = self.seen_size(&view);
        self.confirmation_answered(&view);
        self.phase = Phase::Serving;
        self.adopt(view);
        if self.phase != Phase::Serving {
            return;
        }
        if self.close_asked {
            self.phase = Phase::Draining;
            self.pump = true;
            return;
        }
        tracing::info!(volume = %self.config.volume, epoch = self.epoch.0, "serving reads");
        self.out.push(SessionCommand::Serving { size_bytes });
        self.begin_waiting();
        self.pump = true;
    }

    /// The size that the session's user sees.
    pub(super) fn seen_size(&self, view: &VolumeView) -> u64 {
        self.config
            .snapshot
            .map_or(view.size_bytes, |s| s.size_bytes)
    }

    /// The number that reads ask for.
    pub(super) fn read_number(&self) -> SnapshotNumber {
        let below = |s: SnapshotSource| SnapshotNumber(s.number.0.saturating_sub(1));
        self.config.snapshot.map_or(SnapshotNumber::HEAD, below)
    }

    /// Whether a configuration leaves the session its place.
    pub(super) fn may_go_on(&self, view: &VolumeView) -> bool {
        if let Some(source) = self.config.snapshot {
            return view.layers.live.contains(&source.number);
        }
        match self.role {
            Role::Holder | Role::Preparing => view.holder == Some(self.config.client),
            Role::Reader => view.holder.is_none() && view.readers.contains(&self.config.client),
        }
    }

    pub(super) fn on_confirmed(&mut self, view: VolumeView) {
        if self.role != Role::Reader || self.phase == Phase::Idle {
            return;
        }
        if self.phase == Phase::Asking {
            if self.config.snapshot.is_some() {
                self.on_joined(view);
            }
            return;
        }
        self.confirmation_answered(&view);
        self.adopt(view);
        self.pump = true;
    }

    fn confirmation_answered(&mut self, view: &VolumeView) {
        let Some(asked) = self.confirmation.asked.take() else {
            return;
        };
        if self.may_go_on(view) {
            let lease = self.config.lease;
            let until = asked.after(lease.saturating_sub(self.config.lease_drift_margin));
            self.confirmation.until = self.confirmation.until.max(until);
        }
    }

    /// Whether reads may be answered now. Asks metadata where that will soon be doubtful.
    pub(super) fn reader_lease_holds(&mut self) -> bool {
        if self.config.snapshot.is_some() || self.planted(PlantedBug::ReadWithoutConfirmation) {
            return true;
        }
        let until = self.confirmation.until;
        let soon = self.now.after(self.config.lease / 4);
        if until <= soon && self.confirmation.asked.is_none() {
            self.confirmation.asked = Some(self.now);
            self.out
                .push(SessionCommand::Metadata(MetadataRequest::Confirm));
        }
        until > self.now
    }

    pub(super) fn reader_pumps(&mut self) {
        self.reads_pump();
        self.status_pump();
        self.closing_pump();
        self.settled = false;
    }
}
