//! Rebuild, the holder's part (R7).
//!
//! | phase | leaves it when |
//! |---|---|
//! | Waiting | the target is reachable: Fence(rebuild epoch e) is sent |
//! | Fencing | the Fence is answered: the target receives every write with an epoch >= e from now on |
//! | Draining | every write with an epoch < e is applied on all in-sync members, where e is durable too |
//! | Starting | PullStart is answered |
//! | Pulling | PullStatus says complete (failed, or none: Draining again) |
//! | Settling | the target counts in acknowledgements and has answered every acknowledged write |
//! | Flushing | the target's Flush is answered |
//! | Promoting | metadata makes it in sync |
//!
//! Invariants:
//! - A target that fails after Fencing is made Stale before anything else is acknowledged (`exclude`).
//! - Any loss of an in-sync member sends the target back to Draining: the pull starts again at chunk 0,
//!   which equal digests make cheap.

use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, GroupIndex, Incarnation, ReplicaState, Version};
use ashlar_proto::volume::ReplicaView;
use ashlar_proto::wire::{
    Fence, FenceLink, Flush, PullProgress, PullStart, PullState, RequestBody,
};

use super::api::{PlantedBug, ReplicaChange};
use super::exclude::Change;
use super::replica::{Member, Purpose};
use super::session::{Phase, Session};

/// Between two questions how far a pull is.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Before a failed pull is started again.
const RESTART_PAUSE: Duration = Duration::from_millis(300);
/// Acknowledged writes that a target may lag behind before acknowledgements wait for it.
const LINGERING_MAX: usize = 256;

/// How far a rebuild is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub(super) enum TargetPhase {
    #[default]
    Waiting,
    Fencing,
    Draining,
    Starting,
    Pulling,
    Settling,
    Flushing,
    Promoting,
}

/// The holder's view of a rebuild target.
#[derive(Clone, Default, Debug)]
pub(super) struct Target {
    pub(super) phase: TargetPhase,
    /// A request of this phase is outstanding.
    waiting: bool,
    next_at: Time,
    moved: u64,
}

impl Session {
    /// Takes every rebuild as far as it can go now.
    pub(super) fn rebuild_pump(&mut self) {
        if self.phase != Phase::Serving {
            return;
        }
        for g in 0..self.groups.len() {
            for m in 0..self.groups[g].members.len() {
                let member = &self.groups[g].members[m];
                if member.state == ReplicaState::Rebuilding {
                    self.target_pump(g, member.peer);
                }
            }
        }
    }

    /// A fence; one that may create a replica says what it is linked to.
    pub(super) fn fence(&self, index: u8, create: bool, rebuild_epoch: Epoch) -> Fence {
        let link = self.link_of(index).filter(|_| create);
        Fence {
            create,
            rebuild_epoch,
            link,
        }
    }

    /// What a replica that is created is linked to (docs/snapshots.md, C3). A disk has one replica of the volume for all
    /// of its groups there.
    fn link_of(&self, index: u8) -> Option<FenceLink> {
        let parent = self.view.parent?;
        let disk = self.peers[index as usize].disk;
        let replicas = self.view.groups.iter().flatten();
        let here = replicas.filter(|r| r.disk == disk);
        let inherits = here.clone().filter(|r| r.inherits);
        inherits.clone().next()?;
        let in_sync = |r: &ReplicaView| r.state == ReplicaState::InSync;
        Some(FenceLink {
            parent,
            required: inherits.clone().any(in_sync),
            whole: here.clone().all(|r| r.inherits && in_sync(r)),
        })
    }

    fn target_pump(&mut self, g: usize, peer: u8) {
        let Some(member) = self.groups[g].member(peer) else {
            return;
        };
        let target = &member.target;
        if target.waiting || self.now < target.next_at || !self.usable(peer) {
            return;
        }
        let (group, membership) = (g as u32, member.membership);
        match target.phase {
            TargetPhase::Waiting => {
                let fence = self.fence(peer, true, member.rebuild_epoch);
                self.set_target(g, peer, TargetPhase::Fencing, true);
                let purpose = Purpose::TargetFence { group, membership };
                self.send(peer, purpose, RequestBody::Fence(fence));
            }
            TargetPhase::Fencing => self.set_target(g, peer, TargetPhase::Waiting, false),
            TargetPhase::Draining => self.pull_start(g, peer),
            TargetPhase::Starting => self.set_target(g, peer, TargetPhase::Draining, false),
            TargetPhase::Pulling => {
                self.set_target(g, peer, TargetPhase::Pulling, true);
                let purpose = Purpose::PullStatus { group, membership };
                let body = RequestBody::PullStatus {
                    group: GroupIndex(group),
                };
                self.send(peer, purpose, body);
            }
            TargetPhase::Settling => self.target_settle(g, peer),
            TargetPhase::Flushing => self.set_target(g, peer, TargetPhase::Settling, false),
            TargetPhase::Promoting => self.promote(g, peer),
        }
    }

    fn set_target(&mut self, g: usize, peer: u8, phase: TargetPhase, waiting: bool) {
        if let Some(member) = self.groups[g].member_mut(peer) {
            member.target.phase = phase;
            member.target.waiting = waiting;
        }
        self.pump |= !waiting;
    }

    /// The member that an answer is for, if it still is what it was.
    fn target_of(&mut self, g: usize, peer: u8, membership: u32) -> Option<&mut Member> {
        self.groups
            .get_mut(g)?
            .member_mut(peer)
            .filter(|m| m.membership == membership && m.state == ReplicaState::Rebuilding)
    }

    pub(super) fn on_target_fence(
        &mut self,
        g: usize,
        peer: u8,
        membership: u32,
        actual: Incarnation,
    ) {
        let Some(member) = self.target_of(g, peer, membership) else {
            return;
        };
        if member.target.phase != TargetPhase::Fencing {
            return;
        }
        member.target = Target {
            phase: TargetPhase::Draining,
            ..Target::default()
        };
        if !self
            .groups
            .iter()
            .any(|g| g.in_sync.contains(peer) || g.targets.contains(peer))
        {
            self.peers[peer as usize].incarnation = actual;
            self.peers[peer as usize].configured = Epoch(0);
        }
        self.groups[g].targets.insert(peer);
        self.send_group(g);
        self.pump = true;
    }

    /// The holder confirms, and the target pulls.
    fn pull_start(&mut self, g: usize, peer: u8) {
        let group = &self.groups[g];
        let Some(member) = group.member(peer) else {
            return;
        };
        let (rebuild_epoch, membership) = (member.rebuild_epoch, member.membership);
        let configured = group
            .in_sync
            .iter()
            .all(|p| self.peers[p as usize].configured >= rebuild_epoch);
        if !configured || group.recovering || !self.drained_below(g, rebuild_epoch) {
            return;
        }
        let Some(source) = self.choose_source(g, g as u32, Default::default()) else {
            return;
        };
        let source = &self.peers[source as usize];
        let body = RequestBody::PullStart(PullStart {
            group: GroupIndex(g as u32),
            group_count: self.groups.len() as u32,
            rebuild_epoch,
            source: source.disk,
            source_incarnation: source.incarnation,
            source_address: source.address.clone(),
            bytes_per_second: self.config.rebuild_bytes_per_second,
        });
        self.set_target(g, peer, TargetPhase::Starting, true);
        self.send(
            peer,
            Purpose::PullStart {
                group: g as u32,
                membership,
            },
            body,
        );
    }

    pub(super) fn on_pull_started(&mut self, g: usize, peer: u8, membership: u32) {
        let next_at = self.now.after(POLL_INTERVAL / 10);
        if let Some(member) = self.target_of(g, peer, membership)
            && member.target.phase == TargetPhase::Starting
        {
            let moved = member.target.moved;
            member.target = Target {
                phase: TargetPhase::Pulling,
                waiting: false,
                next_at,
                moved,
            };
        }
    }

    pub(super) fn on_pull_status(
        &mut self,
        g: usize,
        peer: u8,
        membership: u32,
        progress: PullProgress,
    ) {
        let now = self.now;
        let Some(member) = self.target_of(g, peer, membership) else {
            return;
        };
        if member.target.phase != TargetPhase::Pulling {
            return;
        }
        let same = progress.rebuild_epoch == member.rebuild_epoch;
        let target = &mut member.target;
        target.waiting = false;
        let moved = progress.blocks_moved.saturating_sub(target.moved);
        target.moved = target.moved.max(progress.blocks_moved);
        match progress.state {
            PullState::Running if same => target.next_at = now.after(POLL_INTERVAL),
            PullState::Complete if same => {
                target.phase = TargetPhase::Settling;
                target.next_at = Time(0);
            }
            PullState::None | PullState::Failed | PullState::Running | PullState::Complete => {
                target.phase = TargetPhase::Draining;
                target.next_at = now.after(RESTART_PAUSE);
                // The source may have gone or changed its life, and an idle client would not hear of it.
                for source in self.groups[g].in_sync.iter() {
                    self.ping(source);
                }
            }
        }
        self.stats.rebuild_blocks_moved += moved;
        self.pump = true;
    }

    /// The target counts from now on; when it has answered everything acknowledged, it is flushed.
    fn target_settle(&mut self, g: usize, peer: u8) {
        self.groups[g].counted.insert(peer);
        let careless = self.planted(PlantedBug::PromoteWithoutTargetAcks);
        let behind = self
            .writes
            .iter()
            .any(|(_, w)| w.group as usize == g && w.done && !w.answered.contains(peer));
        if behind && !careless {
            return;
        }
        let Some(membership) = self.groups[g].member(peer).map(|m| m.membership) else {
            return;
        };
        self.set_target(g, peer, TargetPhase::Flushing, true);
        let flush = Flush {
            watermark: Version::ZERO,
            forget_below: Version::ZERO,
        };
        let purpose = Purpose::TargetFlush {
            group: g as u32,
            membership,
        };
        self.send(peer, purpose, RequestBody::Flush(flush));
    }

    pub(super) fn on_target_flushed(&mut self, g: usize, peer: u8, membership: u32) {
        if let Some(member) = self.target_of(g, peer, membership)
            && member.target.phase == TargetPhase::Flushing
        {
            self.set_target(g, peer, TargetPhase::Promoting, false);
        }
    }

    fn promote(&mut self, g: usize, peer: u8) {
        let healthy = self.groups[g]
            .needed()
            .iter()
            .all(|p| !self.peers[p as usize].failed);
        if !matches!(self.change, Change::Idle) || !healthy || self.now < self.change_pause {
            return;
        }
        self.set_target(g, peer, TargetPhase::Promoting, true);
        let change = ReplicaChange {
            group: GroupIndex(g as u32),
            disk: self.peers[peer as usize].disk,
            state: ReplicaState::InSync,
            incarnation: self.peers[peer as usize].incarnation,
        };
        self.ask_change(vec![change]);
    }

    /// Whatever metadata answered: a promotion that is still wanted is asked for again.
    pub(super) fn rebuild_change_answered(&mut self) {
        for group in &mut self.groups {
            for member in &mut group.members {
                if member.target.phase == TargetPhase::Promoting {
                    member.target.waiting = false;
                }
            }
        }
    }

    /// A request of a rebuild got no answer.
    pub(super) fn target_void(&mut self, g: usize, peer: u8, membership: u32) {
        let next_at = self.now.after(RESTART_PAUSE);
        let Some(member) = self.target_of(g, peer, membership) else {
            return;
        };
        let target = &mut member.target;
        target.waiting = false;
        target.phase = match target.phase {
            TargetPhase::Waiting | TargetPhase::Fencing => TargetPhase::Waiting,
            TargetPhase::Draining | TargetPhase::Starting => TargetPhase::Draining,
            TargetPhase::Pulling => TargetPhase::Pulling,
            TargetPhase::Settling | TargetPhase::Flushing => TargetPhase::Settling,
            TargetPhase::Promoting => TargetPhase::Promoting,
        };
        if target.phase == TargetPhase::Draining {
            target.next_at = next_at;
        }
        self.pump = true;
    }

    /// The target refused: it forgot the rebuild, or never knew it. From the beginning.
    pub(super) fn target_refused(&mut self, g: usize, peer: u8, membership: u32) {
        let next_at = self.now.after(RESTART_PAUSE);
        if let Some(member) = self.target_of(g, peer, membership) {
            let phase = match member.target.phase {
                TargetPhase::Waiting | TargetPhase::Fencing => TargetPhase::Waiting,
                _ => TargetPhase::Draining,
            };
            member.target = Target {
                phase,
                waiting: false,
                next_at,
                moved: member.target.moved,
            };
        }
    }

    /// The group lost an in-sync member: compare again from chunk 0.
    pub(super) fn rebuild_sources_changed(&mut self, g: usize) {
        for member in &mut self.groups[g].members {
            if member.target.phase > TargetPhase::Draining {
                let moved = member.target.moved;
                member.target = Target {
                    phase: TargetPhase::Draining,
                    moved,
                    ..Target::default()
                };
            }
        }
    }

    /// Bounds what an uncounted target may lag behind.
    pub(super) fn bound_lingering(&mut self) {
        if self.lingering <= LINGERING_MAX {
            return;
        }
        for group in &mut self.groups {
            group.counted = group.counted.union(group.targets);
        }
    }

    /// When `rebuild_pump` has something to do.
    pub(super) fn rebuild_deadline(&self) -> Option<Time> {
        let members = self.groups.iter().flat_map(|g| &g.members);
        members
            .filter(|m| m.state == ReplicaState::Rebuilding && !m.target.waiting)
            .map(|m| m.target.next_at)
            .filter(|at| *at > self.now)
            .min()
    }
}
