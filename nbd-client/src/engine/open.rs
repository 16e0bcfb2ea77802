//! Open (R1): grant, fence every in-sync replica, lease wait, reconcile, configure, serve; and close.
//!
//! Invariants:
//! - Nothing is served before every in-sync replica of the adopted configuration is fenced, reconciled
//!   (unless the last close was clean) and has the configuration on its disk.
//! - After an unclean close a full lease passes between the last fence and the first service.
//! - A close is clean only when nothing is in flight and a flush covered every write.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{GroupIndex, ReplicaState};
use ashlar_proto::volume::VolumeView;

use super::api::{MetadataRequest, PlantedBug, ReplicaChange, SessionCommand, StopReason};
use super::exclude::Change;
use super::reader::Role;
use super::replica::Link;
use super::session::{Phase, Session};
use super::slots::{PeerSet, Window};

impl Session {
    pub(super) fn on_granted(&mut self, view: VolumeView, previous_clean: bool, first_open: bool) {
        if self.phase != Phase::Asking {
            return;
        }
        if self.role == Role::Reader {
            return self.on_joined(view);
        }
        self.phase = Phase::Opening;
        self.opened_at = self.now;
        self.first_open = first_open;
        self.clean = previous_clean || first_open;
        self.window = Window::new(view.epoch);
        // The grant cancelled what was pending (S5).
        self.layer = view.snapshot;
        self.adopt(view);
        if self.close_asked && self.phase == Phase::Opening {
            self.phase = Phase::Closing;
            self.ask_close();
        }
    }

    /// In-sync replicas of all groups.
    pub(super) fn in_sync_peers(&self) -> PeerSet {
        self.groups
            .iter()
            .fold(PeerSet::EMPTY, |set, g| set.union(g.in_sync))
    }

    pub(super) fn opening_reconciled(&self) -> bool {
        self.all_fenced_at.is_some()
            && (self.clean
                || self.planted(PlantedBug::SkipReconcile)
                || self.groups.iter().all(|g| g.reconciled))
    }

    /// Goes as far as the open can go now.
    pub(super) fn opening_pump(&mut self) {
        if self.phase != Phase::Opening {
            return;
        }
        let in_sync = self.in_sync_peers();
        let fenced = in_sync.iter().all(|p| {
            let peer = &self.peers[p as usize];
            peer.fenced && !peer.lost && peer.link == Link::Up
        });
        if !fenced {
            return;
        }
        if self.all_fenced_at.is_none() {
            if self.first_open && in_sync.iter().any(|p| self.peers[p as usize].written) {
                // Somebody wrote after all: treat it as any unclean volume.
                self.clean = false;
            }
            self.all_fenced_at = Some(self.now);
        }
        if !self.opening_reconciled() {
            for g in 0..self.groups.len() {
                if !self.groups[g].reconciled {
                    self.reconcile_pump(g);
                }
            }
            return;
        }
        let configured = in_sync
            .iter()
            .all(|p| self.peers[p as usize].configured >= self.epoch);
        let waited = self
            .lease_wait_until()
            .is_none_or(|until| self.now >= until);
        if !configured || !waited {
            return;
        }
        if !self.view.opened_once {
            self.confirm_creation();
        } else {
            self.serve();
        }
    }

    /// The replicas of a new volume exist: metadata records their lives before anything is served, so that
    /// a missing replica means "to be made" before, and "lost" ever after.
    fn confirm_creation(&mut self) {
        if !matches!(self.change, Change::Idle) || self.now < self.change_pause {
            return;
        }
        let mut changes = Vec::new();
        for (g, group) in self.groups.iter().enumerate() {
            changes.extend(group.in_sync.iter().map(|p| ReplicaChange {
                group: GroupIndex(g as u32),
                disk: self.peers[p as usize].disk,
                state: ReplicaState::InSync,
                incarnation: self.peers[p as usize].incarnation,
            }));
        }
        self.ask_change(changes);
    }

    fn lease_wait_until(&self) -> Option<Time> {
        let from = self.all_fenced_at.filter(|_| !self.clean)?;
        Some(from.after(self.config.lease))
    }

    fn serve(&mut self) {
        if self.role == Role::Preparing {
            return self.prepared();
        }
        self.phase = Phase::Serving;
        self.first_open = false;
        self.confirmed = self
            .in_sync_peers()
            .iter()
            .map(|p| self.peers[p as usize].watermark)
            .max()
            .unwrap_or_default();
        self.dirty = !self.clean;
        for g in 0..self.groups.len() {
            self.refresh_group(g);
        }
        tracing::info!(volume = %self.config.volume, epoch = self.epoch.0, "serving");
        self.out.push(SessionCommand::Serving {
            size_bytes: self.view.size_bytes,
        });
        self.switch_seen();
        self.begin_waiting();
        self.pump = true;
    }

    /// When `opening_pump` has something to do.
    pub(super) fn opening_deadline(&self) -> Option<Time> {
        if self.phase != Phase::Opening {
            return None;
        }
        self.lease_wait_until().filter(|until| *until > self.now)
    }

    pub(super) fn on_close(&mut self) {
        self.close_asked = true;
        match self.phase {
            Phase::Idle => self.stop(StopReason::Closed),
            Phase::Opening => {
                self.phase = Phase::Closing;
                self.ask_close();
            }
            Phase::Serving => {
                self.switch_end();
                self.phase = Phase::Draining;
                self.pump = true;
            }
            Phase::Asking | Phase::Draining | Phase::Closing | Phase::Stopped => {}
        }
    }

    /// Drains, flushes, closes.
    pub(super) fn closing_pump(&mut self) {
        if self.phase != Phase::Draining || !self.ops.is_empty() || !self.rmws.is_empty() {
            return;
        }
        if self.config.snapshot.is_some() {
            return self.stop(StopReason::Closed);
        }
        if self.role == Role::Reader {
            self.phase = Phase::Closing;
            self.closed_clean = true;
            return self.ask_close();
        }
        if self.flush.is_some() {
            return;
        }
        if self.dirty || !self.retained.is_empty() {
            self.start_flush();
            return;
        }
        if matches!(self.change, Change::Asked)
            || self
                .groups
                .iter()
                .any(|g| g.in_sync.iter().any(|p| self.peers[p as usize].failed))
        {
            // A failed replica is excluded first, so that "clean" is true of every in-sync one.
            return;
        }
        self.phase = Phase::Closing;
        self.closed_clean = true;
        self.ask_close();
    }

    pub(super) fn ask_close(&mut self) {
        let (epoch, clean) = (self.epoch, self.closed_clean);
        self.out
            .push(SessionCommand::Metadata(MetadataRequest::Close {
                epoch,
                clean,
            }));
    }

    /// The end: nothing follows.
    pub(super) fn stop(&mut self, reason: StopReason) {
        if self.phase == Phase::Stopped {
            return;
        }
        tracing::info!(volume = %self.config.volume, ?reason, "session stopped");
        self.phase = Phase::Stopped;
        for peer in &mut self.peers {
            if !matches!(peer.link, Link::Down { .. }) {
                peer.link = Link::Down {
                    retry_at: Time(u64::MAX),
                };
                self.out
                    .push(SessionCommand::Disconnect { disk: peer.disk });
            }
        }
        self.out.push(SessionCommand::Stopped { reason });
    }
}
