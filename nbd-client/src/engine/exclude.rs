//! Exclusion of failed replicas (R1, R4) and the one change of configuration that may be under way.
//!
//! Invariants:
//! - Before an in-sync replica's exclusion is asked for, a remaining in-sync replica of trusted
//!   incarnation has answered a flush sent after the failure was seen, and the group has been on hold
//!   since (`refresh_group`).
//! - The last in-sync replica of a group is never excluded: I/O waits for one of them to return.
//! - While opening, a replica is excluded only if a remaining fenced one is not suspect.
//! - At most one ChangeReplicas is outstanding; a peer that is named in it stays failed until the
//!   answer.

use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{GroupIndex, Incarnation, ReplicaState};
use ashlar_proto::wire::RequestBody;

use super::api::{MetadataRequest, PlantedBug, ReplicaChange, SessionCommand};
use super::replica::{Link, Purpose};
use super::session::{Phase, Session};
use super::slots::PeerSet;

/// An opener tries to reach a replica for this long before it excludes it.
pub(super) const OPEN_PATIENCE: Duration = Duration::from_millis(1500);
/// Pause after metadata refused a change without naming a newer configuration.
const CHANGE_PAUSE: Duration = Duration::from_millis(200);

/// The change of configuration under way.
#[derive(Debug)]
pub(super) enum Change {
    Idle,
    /// R4: flushing a remaining replica of each group before asking.
    Flushing {
        number: u64,
        sent: PeerSet,
        answered: PeerSet,
    },
    /// ChangeReplicas is outstanding.
    Asked,
}

impl Session {
    /// Something about failed peers changed: a preparation under way starts again.
    pub(super) fn change_interrupted(&mut self) {
        if matches!(self.change, Change::Flushing { .. }) {
            self.change = Change::Idle;
        }
        self.pump = true;
    }

    /// Replicas to exclude now: (group, peer), those of in-sync state marked.
    fn to_exclude(&self) -> Vec<(usize, u8, bool)> {
        let mut list = Vec::new();
        for (g, group) in self.groups.iter().enumerate() {
            let failed = |p: &u8| self.exclusion_due(*p);
            let gone: PeerSet = group.in_sync.iter().filter(failed).collect();
            let rest = group.in_sync.without(gone);
            let allowed = if self.phase == Phase::Opening {
                rest.iter().any(|p| {
                    let peer = &self.peers[p as usize];
                    peer.fenced && !peer.lost && !peer.suspect && peer.link == Link::Up
                })
            } else {
                rest.iter().any(|p| !self.peers[p as usize].failed) && self.now >= group.grace_until
            };
            if allowed {
                list.extend(gone.iter().map(|p| (g, p, true)));
            }
            for p in group.targets.iter().filter(failed) {
                list.push((g, p, false));
            }
        }
        list
    }

    fn exclusion_due(&self, index: u8) -> bool {
        let peer = &self.peers[index as usize];
        if self.phase == Phase::Opening {
            let since = peer.failed_at.max(self.opened_at);
            peer.lost || (peer.link != Link::Up && self.now.since(since) >= OPEN_PATIENCE)
        } else {
            peer.failed
        }
    }

    /// Prepares and asks for the exclusion of failed replicas.
    pub(super) fn exclusion_pump(&mut self) {
        if matches!(self.change, Change::Asked) || self.now < self.change_pause {
            return;
        }
        if !matches!(
            self.phase,
            Phase::Opening | Phase::Serving | Phase::Draining
        ) {
            return;
        }
        let list = self.to_exclude();
        if list.is_empty() {
            self.change = Change::Idle;
            return;
        }
        let skip = self.phase == Phase::Opening || self.planted(PlantedBug::SkipExclusionFlush);
        if !skip && !self.flushed_before(&list) {
            return;
        }
        let changes = list
            .iter()
            .map(|(g, p, _)| ReplicaChange {
                group: GroupIndex(*g as u32),
                disk: self.peers[*p as usize].disk,
                state: ReplicaState::Stale,
                incarnation: Incarnation(0),
            })
            .collect();
        self.ask_change(changes);
    }

    /// Whether a remaining in-sync replica of every group that loses one has been flushed; sends the
    /// flushes if not.
    fn flushed_before(&mut self, list: &[(usize, u8, bool)]) -> bool {
        if !matches!(self.change, Change::Flushing { .. }) {
            self.flush_number += 1;
            let number = self.flush_number;
            self.change = Change::Flushing {
                number,
                sent: PeerSet::EMPTY,
                answered: PeerSet::EMPTY,
            };
        }
        let mut ready = true;
        let mut ask = PeerSet::EMPTY;
        for (g, _, in_sync) in list {
            if !in_sync {
                continue;
            }
            let in_sync = self.groups[*g].in_sync;
            let rest: PeerSet = in_sync
                .iter()
                .filter(|p| !self.peers[*p as usize].failed)
                .collect();
            let Change::Flushing { answered, .. } = &self.change else {
                return false;
            };
            if !answered.intersects(rest) {
                ready = false;
                ask = ask.union(rest);
            }
        }
        for peer in ask.iter() {
            let usable = self.usable(peer);
            let Change::Flushing { number, sent, .. } = &mut self.change else {
                return false;
            };
            if usable && !sent.contains(peer) {
                sent.insert(peer);
                let number = *number;
                let flush = self.flush_body(peer);
                self.send(
                    peer,
                    Purpose::PreFlush { number },
                    RequestBody::Flush(flush),
                );
            }
        }
        ready
    }

    pub(super) fn on_preflushed(&mut self, peer: u8, flushed: u64) {
        if let Change::Flushing {
            number, answered, ..
        } = &mut self.change
            && *number == flushed
        {
            answered.insert(peer);
            self.pump = true;
        }
    }

    pub(super) fn preflush_void(&mut self, peer: u8, flushed: u64) {
        if let Change::Flushing { number, sent, .. } = &mut self.change
            && *number == flushed
        {
            sent.remove(peer);
            self.pump = true;
        }
    }

    pub(super) fn ask_change(&mut self, changes: Vec<ReplicaChange>) {
        self.change = Change::Asked;
        let epoch = self.epoch;
        tracing::info!(volume = %self.config.volume, ?changes, "asking for a change of replicas");
        self.out
            .push(SessionCommand::Metadata(MetadataRequest::ChangeReplicas {
                epoch,
                changes,
            }));
    }

    /// Metadata answered a ChangeReplicas (the view is adopted by the caller).
    pub(super) fn on_change_answer(&mut self, applied: bool, newer: bool) {
        self.change = Change::Idle;
        if !applied && !newer {
            self.change_pause = self.now.after(CHANGE_PAUSE);
        }
        self.rebuild_change_answered();
        self.pump = true;
    }

    /// When `exclusion_pump` has something to do.
    pub(super) fn exclusion_deadline(&self) -> Option<Time> {
        let mut deadline: Option<Time> = None;
        let mut add = |t: Time| deadline = Some(deadline.map_or(t, |d| d.min(t)));
        if self.change_pause > self.now {
            add(self.change_pause);
        }
        for group in &self.groups {
            if group.grace_until > self.now {
                add(group.grace_until);
            }
            if self.phase == Phase::Opening {
                for p in group.in_sync.iter() {
                    let peer = &self.peers[p as usize];
                    let due = peer.failed_at.max(self.opened_at).after(OPEN_PATIENCE);
                    if peer.link != Link::Up && due > self.now {
                        add(due);
                    }
                }
            }
        }
        deadline
    }
}
