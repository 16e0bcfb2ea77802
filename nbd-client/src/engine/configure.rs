//! Adopting configurations (R0) and making them durable on the replicas.
//!
//! Invariants:
//! - A view in which another client holds the volume ends the session; for a reader, any view in which
//!   somebody holds it or the reader is not listed (R10).
//! - Epochs only grow; a view older than the adopted one changes nothing.
//! - When a group loses an in-sync member, its writes in flight are renewed and nothing in it is
//!   acknowledged until the configuration is durable on every remaining in-sync member.
//! - A member whose state or rebuild epoch changed is another membership: its earlier answers do not
//!   count. Promotion keeps the membership.

use ashlar_proto::ids::{Epoch, Incarnation, ReplicaState};
use ashlar_proto::volume::VolumeView;
use ashlar_proto::wire::RequestBody;
use smallvec::SmallVec;

use super::api::{MetadataRequest, PlantedBug, SessionCommand, StopReason};
use super::reader::Role;
use super::rebuild::Target;
use super::replica::{Group, Member, Purpose};
use super::session::{Phase, Session};
use super::slots::PeerSet;

impl Session {
    /// Takes a view from metadata. Returns whether it was newer than what the session had.
    pub(super) fn adopt(&mut self, view: VolumeView) -> bool {
        if view.volume != self.config.volume || view.groups.is_empty() {
            return false;
        }
        if view.epoch < self.epoch || view.revision < self.view.revision {
            return false;
        }
        if !self.may_go_on(&view) {
            // The news of our own close may come before its answer.
            if self.phase == Phase::Closing && view.holder.is_none() {
                self.closed();
            } else if self.role == Role::Preparing && !self.close_asked {
                self.join_again();
            } else if self.config.snapshot.is_some() {
                self.stop(StopReason::Deleted);
            } else {
                self.stop(StopReason::Superseded);
            }
            return true;
        }
        if view.groups.len() != self.groups.len() && !self.groups.is_empty() {
            tracing::error!(volume = %view.volume, "metadata changed the number of groups; ignored");
            return false;
        }
        let newer = view.epoch > self.epoch;
        let mut view = view;
        view.size_bytes = self.seen_size(&view);
        let grown = view.size_bytes > self.view.size_bytes && self.phase == Phase::Serving;
        self.epoch = view.epoch;
        self.view = view;
        if self.groups.is_empty() {
            self.groups
                .resize_with(self.view.groups.len(), Group::default);
        }
        self.learn_addresses();
        for g in 0..self.groups.len() {
            self.adopt_group(g);
        }
        if grown {
            self.out.push(SessionCommand::Resized {
                size_bytes: self.view.size_bytes,
            });
        }
        self.switch_seen();
        if newer {
            self.report_held();
            self.change_interrupted();
            if self.phase == Phase::Closing {
                self.ask_close();
            }
        }
        for index in 0..self.peers.len() as u8 {
            if std::mem::replace(&mut self.peers[index as usize].blocked, false) {
                self.reprobe(index);
                self.resume_peer(index);
            }
        }
        self.pump = true;
        newer
    }

    fn learn_addresses(&mut self) {
        let endpoints: SmallVec<[_; 4]> = self.view.disks.values().cloned().collect();
        for endpoint in endpoints {
            if let Some(index) = self.peer_index(endpoint.disk) {
                let peer = &mut self.peers[index as usize];
                peer.local = !self.config.node.is_nil() && endpoint.node == self.config.node;
                peer.address = endpoint.address;
            }
        }
    }

    fn adopt_group(&mut self, g: usize) {
        let views = self.view.groups[g].clone();
        let old = std::mem::take(&mut self.groups[g].members);
        let old_in_sync = self.groups[g].in_sync;
        let mut members: SmallVec<[Member; 4]> = SmallVec::new();
        let (mut in_sync, mut kept) = (PeerSet::EMPTY, PeerSet::EMPTY);
        for view in &views {
            let Some(peer) = self.peer_index(view.disk) else {
                tracing::error!(volume = %self.config.volume, disk = %view.disk, "too many disks in one volume");
                continue;
            };
            let before = old.iter().find(|m| m.peer == peer);
            let same = before.is_some_and(|m| match view.state {
                ReplicaState::InSync => m.state != ReplicaState::Stale,
                ReplicaState::Rebuilding => {
                    m.state == ReplicaState::Rebuilding && m.rebuild_epoch == view.rebuild_epoch
                }
                ReplicaState::Stale => false,
            });
            if view.state == ReplicaState::InSync {
                in_sync.insert(peer);
            }
            let promoted = before.is_some_and(|m| m.state == ReplicaState::Rebuilding)
                && view.state == ReplicaState::InSync;
            self.stats.promotions += u64::from(promoted);
            self.memberships += 1;
            let mut member = Member {
                peer,
                state: view.state,
                rebuild_epoch: view.rebuild_epoch,
                membership: self.memberships,
                target: Target::default(),
            };
            if let Some(before) = before.filter(|_| same) {
                kept.insert(peer);
                member.membership = before.membership;
                if view.state == ReplicaState::Rebuilding {
                    member.target = before.target.clone();
                }
            }
            members.push(member);
        }
        let rebuilding: PeerSet = members
            .iter()
            .filter(|m| m.state == ReplicaState::Rebuilding)
            .map(|m| m.peer)
            .collect();
        let group = &mut self.groups[g];
        group.members = members;
        group.in_sync = in_sync;
        let still = kept.common(rebuilding);
        group.targets = group.targets.common(still);
        group.counted = group.counted.common(still);
        let changed: PeerSet = old
            .iter()
            .map(|m| m.peer)
            .filter(|p| !kept.contains(*p))
            .collect();
        let shrunk = !old_in_sync.without(in_sync).is_empty();
        self.group_changed(g, changed, shrunk, old_in_sync);
    }

    fn group_changed(&mut self, g: usize, changed: PeerSet, shrunk: bool, old_in_sync: PeerSet) {
        for peer in changed.iter() {
            self.release_peer(peer);
        }
        if shrunk {
            self.stats.exclusions += old_in_sync.without(self.groups[g].in_sync).len() as u64;
            self.groups[g].configure_needed = self.epoch;
            self.groups[g].acknowledging = false;
            if !self.planted(PlantedBug::SkipExclusionFlush) {
                self.renew_writes(g);
            }
            self.reconcile_restart(g);
            self.rebuild_sources_changed(g);
        }
        if !changed.is_empty() {
            self.forget_answers(g, changed);
            self.flush_forget(changed);
            self.reread_group(g);
        }
        self.refresh_group(g);
        self.settle_group(g);
        self.send_group(g);
    }

    /// A peer left a membership: if it is in sync nowhere, nothing known of it holds any longer.
    fn release_peer(&mut self, index: u8) {
        if self
            .groups
            .iter()
            .any(|g| g.in_sync.contains(index) || g.targets.contains(index))
        {
            return;
        }
        let peer = &mut self.peers[index as usize];
        peer.failed = false;
        peer.lost = false;
        peer.damaged = false;
        peer.incarnation = Incarnation(0);
        peer.configured = Epoch(0);
        peer.fenced = false;
    }

    /// Sends the newest configuration to every member that lacks it.
    pub(super) fn configure_pump(&mut self) {
        let ready = match self.phase {
            Phase::Opening => self.opening_reconciled(),
            Phase::Serving | Phase::Draining => true,
            _ => false,
        };
        if !ready {
            return;
        }
        let mut members = PeerSet::EMPTY;
        for group in &self.groups {
            members = members.union(group.in_sync).union(group.targets);
        }
        for index in members.iter() {
            let epoch = self.epoch;
            let peer = &self.peers[index as usize];
            if self.usable(index) && peer.configured < epoch && peer.configuring < epoch {
                self.peers[index as usize].configuring = epoch;
                let body = RequestBody::Configure(self.view.descriptor());
                self.send(index, Purpose::Configure { epoch }, body);
            }
        }
    }

    pub(super) fn on_configured(&mut self, index: u8, epoch: Epoch) {
        let peer = &mut self.peers[index as usize];
        peer.configured = peer.configured.max(epoch);
        for g in 0..self.groups.len() {
            self.refresh_group(g);
        }
        self.pump = true;
    }

    /// A replica has a fence above the session's epoch: only metadata knows what that means (R0).
    pub(super) fn fenced_above(&mut self, index: u8) {
        let peer = &mut self.peers[index as usize];
        peer.blocked = true;
        peer.lease_until = ashlar_platform::clock::Time(0);
        if !std::mem::replace(&mut self.refreshing, true) {
            self.out
                .push(SessionCommand::Metadata(MetadataRequest::Refresh));
        }
    }
}
