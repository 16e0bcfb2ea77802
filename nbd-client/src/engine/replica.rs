//! Peers (the disks that hold the volume's replicas), groups and their members, links and timeouts.
//!
//! Invariants:
//! - A peer is *usable* when its link is up, its incarnation is the trusted one and no newer fence was
//!   seen; only usable peers are sent anything but probes.
//! - `failed` means: it missed, or may miss, requests. While an in-sync or counted member of a group is
//!   failed, the group is on hold (R4): nothing in it is acknowledged. A failed peer that returns with
//!   the trusted incarnation before its exclusion was asked for is sent everything again.
//! - A peer that answers nothing for `answer_timeout` while a request is outstanding has failed; it is
//!   asked with a ping in good time, so that a slow request alone does not exclude it before
//!   [`REQUEST_TIMEOUT`].

use std::collections::VecDeque;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{DiskId, Epoch, Incarnation, ReplicaState, RequestId, Version};
use ashlar_proto::wire::{FenceReply, Request, RequestBody};
use smallvec::SmallVec;

use super::api::{PlantedBug, SessionCommand};
use super::reader::Role;
use super::rebuild::Target;
use super::reconcile::Reconcile;
use super::session::{Phase, Session};
use super::slots::{Key, PEERS_MAX, PeerSet};

/// A request that a living peer does not answer for this long fails the peer.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(6);
/// First pause before connecting again; doubles up to [`RECONNECT_MAX`].
const RECONNECT_MIN: Duration = Duration::from_millis(50);
/// Longest pause before connecting again.
const RECONNECT_MAX: Duration = Duration::from_millis(800);
/// After a peer said that it is busy.
const BUSY_PAUSE: Duration = Duration::from_millis(10);
/// After a blackout of a whole group, the others get this long to return before they are excluded.
const BLACKOUT_GRACE: Duration = Duration::from_millis(1000);

/// State of the connection to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Link {
    /// No connection; try at this time.
    Down { retry_at: Time },
    /// Asked for.
    Connecting,
    /// Up, its Fence is not answered yet.
    Probing,
    /// Up and fenced at an epoch of this session.
    Up,
}

/// One disk of the volume.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) disk: DiskId,
    pub(super) address: String,
    pub(super) local: bool,
    pub(super) link: Link,
    backoff: Duration,
    /// Trusted life of the store; 0: none yet.
    pub(super) incarnation: Incarnation,
    /// As of its last answer.
    pub(super) actual: Incarnation,
    /// Its incarnation changed, it is damaged, or the replica is gone.
    pub(super) lost: bool,
    /// Lost in a way that no replay repairs.
    pub(super) damaged: bool,
    pub(super) failed: bool,
    pub(super) failed_at: Time,
    /// A fence above the session's epoch was seen: wait for the metadata's answer.
    pub(super) blocked: bool,
    busy_until: Time,
    /// R1: fenced by this open.
    pub(super) fenced: bool,
    pub(super) suspect: bool,
    pub(super) written: bool,
    pub(super) watermark: Version,
    /// Newest configuration that it has made durable, and the one on its way.
    pub(super) configured: Epoch,
    pub(super) configuring: Epoch,
    /// R6: until when its last answers vouch for the lease.
    pub(super) lease_until: Time,
    last_answer: Time,
    pub(super) ping_outstanding: bool,
    /// Requests in order of sending; answered ones are dropped lazily from the front.
    queue: VecDeque<(Key, Time)>,
}

/// A replica of a group.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) peer: u8,
    pub(super) state: ReplicaState,
    pub(super) rebuild_epoch: Epoch,
    /// Changes whenever earlier answers of the peer must not count any longer (R3).
    pub(super) membership: u32,
    pub(super) target: Target,
}

/// A replica group as the session sees it.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) members: SmallVec<[Member; 4]>,
    pub(super) in_sync: PeerSet,
    /// Rebuilding members that are fenced and receive writes.
    pub(super) targets: PeerSet,
    /// Targets whose answers acknowledgements wait for.
    pub(super) counted: PeerSet,
    /// The configuration that must be durable on every in-sync member before acknowledgements (R0).
    pub(super) configure_needed: Epoch,
    pub(super) reconcile: Option<Box<Reconcile>>,
    /// R5: every in-sync member lost power; reconcile, then replay, is under way.
    pub(super) recovering: bool,
    /// R2 is done in this open.
    pub(super) reconciled: bool,
    /// Acknowledgements are allowed now (cached by `refresh_group`).
    pub(super) acknowledging: bool,
    pub(super) grace_until: Time,
}

impl Group {
    pub(super) fn member(&self, peer: u8) -> Option<&Member> {
        self.members.iter().find(|m| m.peer == peer)
    }
    pub(super) fn member_mut(&mut self, peer: u8) -> Option<&mut Member> {
        self.members.iter_mut().find(|m| m.peer == peer)
    }
    /// Whose answers a write waits for.
    pub(super) fn needed(&self) -> PeerSet {
        self.in_sync.union(self.counted)
    }
}

/// What an outstanding request is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    Write {
        slot: Key,
        attempt: u16,
        membership: u32,
    },
    Read {
        slot: Key,
    },
    Probe,
    Ping,
    Configure {
        epoch: Epoch,
    },
    Flush {
        number: u64,
    },
    PreFlush {
        number: u64,
    },
    Collect {
        group: u32,
        number: u64,
    },
    ReconcileRead {
        group: u32,
        number: u64,
        fix: u32,
    },
    ReconcileWrite {
        group: u32,
        number: u64,
        fix: u32,
    },
    Digest {
        op: Key,
        chunk: u32,
    },
    TargetFence {
        group: u32,
        membership: u32,
    },
    PullStart {
        group: u32,
        membership: u32,
    },
    PullStatus {
        group: u32,
        membership: u32,
    },
    TargetFlush {
        group: u32,
        membership: u32,
    },
    Repair,
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) peer: u8,
    pub(super) sent: Time,
    pub(super) purpose: Purpose,
}

impl Session {
    /// The index of a disk, made if need be; `None` if the volume has too many disks.
    pub(super) fn peer_index(&mut self, disk: DiskId) -> Option<u8> {
        if let Some(index) = self.peers.iter().position(|p| p.disk == disk) {
            return Some(index as u8);
        }
        if self.peers.len() >= PEERS_MAX {
            return None;
        }
        let retry_at = self.now;
        self.peers.push(Peer {
            disk,
            address: String::new(),
            local: false,
            link: Link::Down { retry_at },
            backoff: RECONNECT_MIN,
            incarnation: Incarnation(0),
            actual: Incarnation(0),
            lost: false,
            damaged: false,
            failed: false,
            failed_at: retry_at,
            blocked: false,
            busy_until: Time(0),
            fenced: false,
            suspect: false,
            written: false,
            watermark: Version::ZERO,
            configured: Epoch(0),
            configuring: Epoch(0),
            lease_until: Time(0),
            last_answer: Time(0),
            ping_outstanding: false,
            queue: VecDeque::new(),
        });
        Some((self.peers.len() - 1) as u8)
    }

    /// Whether anything but a probe may be sent to the peer.
    pub(super) fn usable(&self, peer: u8) -> bool {
        let p = &self.peers[peer as usize];
        p.link == Link::Up && !p.lost && !p.blocked && self.now >= p.busy_until
    }

    /// Members that are in sync or rebuilding somewhere.
    pub(super) fn wanted_peers(&self) -> PeerSet {
        let mut set = PeerSet::EMPTY;
        for group in &self.groups {
            if self.role == Role::Reader {
                set = set.union(group.in_sync);
                continue;
            }
            for m in &group.members {
                if m.state != ReplicaState::Stale {
                    set.insert(m.peer);
                }
            }
        }
        set
    }

    /// Connects to the peers that are needed and lets go of the others.
    pub(super) fn ensure_links(&mut self) {
        let wanted = self.wanted_peers();
        for index in 0..self.peers.len() as u8 {
            let peer = &mut self.peers[index as usize];
            if wanted.contains(index) {
                if let Link::Down { retry_at } = peer.link
                    && self.now >= retry_at
                    && !peer.address.is_empty()
                {
                    peer.link = Link::Connecting;
                    let (disk, address) = (peer.disk, peer.address.clone());
                    self.out.push(SessionCommand::Connect { disk, address });
                }
            } else if !matches!(peer.link, Link::Down { .. }) {
                let disk = peer.disk;
                self.out.push(SessionCommand::Disconnect { disk });
                self.link_down(index);
            }
        }
    }

    /// The link is gone: everything outstanding on it gets no answer.
    pub(super) fn link_down(&mut self, index: u8) {
        let now = self.now;
        let peer = &mut self.peers[index as usize];
        peer.link = Link::Down {
            retry_at: now.after(peer.backoff),
        };
        peer.backoff = (peer.backoff * 2).min(RECONNECT_MAX);
        peer.ping_outstanding = false;
        peer.configuring = Epoch(0);
        peer.lease_until = Time(0);
        let queue = std::mem::take(&mut peer.queue);
        for (key, _) in queue {
            if let Some(gone) = self.requests.remove(key) {
                self.request_void(index, gone.purpose);
            }
        }
    }

    pub(super) fn on_replica_up(&mut self, disk: DiskId) {
        let Some(index) = self.peers.iter().position(|p| p.disk == disk) else {
            return;
        };
        if self.peers[index].link != Link::Connecting {
            return;
        }
        self.peers[index].link = Link::Probing;
        self.peers[index].last_answer = self.now;
        self.probe(index as u8);
    }

    /// Probes a peer again whose probe was refused by a newer fence.
    pub(super) fn reprobe(&mut self, index: u8) {
        if self.peers[index as usize].link == Link::Probing {
            self.probe(index);
        }
    }

    fn probe(&mut self, index: u8) {
        let create = self.role != Role::Reader
            && (self.first_open
                || self.groups.iter().any(|g| {
                    g.member(index)
                        .is_some_and(|m| m.state == ReplicaState::Rebuilding)
                }));
        let fence = self.fence(index, create, Epoch(0));
        self.send(index, Purpose::Probe, RequestBody::Fence(fence));
    }

    pub(super) fn on_replica_down(&mut self, disk: DiskId) {
        let Some(index) = self.peers.iter().position(|p| p.disk == disk) else {
            return;
        };
        if matches!(self.peers[index].link, Link::Down { .. }) {
            return;
        }
        self.link_down(index as u8);
        self.mark_failed(index as u8);
    }

    /// The peer does not do what it should: give the connection up, exclude it (R4).
    pub(super) fn fail_peer(&mut self, index: u8) {
        if !matches!(self.peers[index as usize].link, Link::Down { .. }) {
            let disk = self.peers[index as usize].disk;
            self.out.push(SessionCommand::Disconnect { disk });
            self.link_down(index);
        }
        self.mark_failed(index);
    }

    /// The peer's groups hold their acknowledgements until it is excluded or back.
    pub(super) fn mark_failed(&mut self, index: u8) {
        let peer = &mut self.peers[index as usize];
        if !peer.failed {
            tracing::warn!(volume = %self.config.volume, disk = %peer.disk, lost = peer.lost, "replica failed");
            peer.failed = true;
            peer.failed_at = self.now;
        }
        self.change_interrupted();
        for g in 0..self.groups.len() {
            if self.groups[g].member(index).is_some() {
                self.refresh_group(g);
                self.reconcile_restart(g);
            }
        }
        self.pump = true;
    }

    /// The answer to a probe.
    pub(super) fn on_probe(&mut self, index: u8, actual: Incarnation, reply: FenceReply) {
        let opening = self.phase == Phase::Opening;
        let first_open = self.first_open;
        let now = self.now;
        let in_sync = self.groups.iter().any(|g| g.in_sync.contains(index));
        let target = self.groups.iter().any(|g| g.targets.contains(index));
        let peer = &mut self.peers[index as usize];
        peer.link = Link::Up;
        peer.backoff = RECONNECT_MIN;
        peer.suspect = reply.suspect;
        peer.watermark = reply.watermark;
        peer.written = reply.written;
        peer.blocked = false;
        if in_sync || target {
            let may_be_new = opening && first_open && !peer.fenced;
            peer.damaged = reply.damaged || !(reply.existed || may_be_new);
            // What a reader reads was flushed everywhere: a store that lost what was not has it still (R10).
            let reads = self.role == Role::Reader;
            let changed = !peer.incarnation_is(actual) && !opening && !reads;
            peer.lost = peer.damaged || changed;
        } else {
            peer.lost = false;
            peer.damaged = false;
        }
        if !peer.lost {
            // While opening, a store that changed its life since its first Fence is reconciled like any.
            peer.incarnation = actual;
        }
        peer.fenced = true;
        let lost = peer.lost;
        if lost {
            self.mark_failed(index);
            return;
        }
        let was_failed = std::mem::replace(&mut self.peers[index as usize].failed, false);
        if was_failed {
            self.change_interrupted();
        }
        for g in 0..self.groups.len() {
            if self.groups[g].member(index).is_none() {
                continue;
            }
            let others_failed = self.groups[g]
                .in_sync
                .iter()
                .any(|p| self.peers[p as usize].failed);
            if was_failed && others_failed {
                self.groups[g].grace_until = now.after(BLACKOUT_GRACE);
            }
            self.refresh_group(g);
        }
        self.resume_peer(index);
        self.pump = true;
    }

    /// Sends the peer whatever it has not been sent: after a connection, a pause, a new configuration.
    pub(super) fn resume_peer(&mut self, index: u8) {
        if !self.usable(index) {
            return;
        }
        self.resend_writes(index);
        self.pump = true;
    }

    /// A request got no usable answer: forget that it was sent, so that the pumps send it again.
    pub(super) fn request_void(&mut self, peer: u8, purpose: Purpose) {
        match purpose {
            Purpose::Write { slot, attempt, .. } => self.write_void(peer, slot, attempt),
            Purpose::Read { slot } => self.read_void(peer, slot),
            Purpose::Probe | Purpose::Repair => {}
            Purpose::Ping => self.peers[peer as usize].ping_outstanding = false,
            Purpose::Configure { .. } => self.peers[peer as usize].configuring = Epoch(0),
            Purpose::Flush { number } => self.flush_void(peer, number),
            Purpose::PreFlush { number } => self.preflush_void(peer, number),
            Purpose::Collect { group, number }
            | Purpose::ReconcileRead { group, number, .. }
            | Purpose::ReconcileWrite { group, number, .. } => self.reconcile_void(group, number),
            Purpose::Digest { op, chunk } => self.status_void(op, chunk),
            Purpose::TargetFence { group, membership }
            | Purpose::PullStart { group, membership }
            | Purpose::PullStatus { group, membership }
            | Purpose::TargetFlush { group, membership } => {
                self.target_void(group as usize, peer, membership);
            }
        }
    }

    /// Sends one request; the caller has checked `usable` (or probes).
    pub(super) fn send(&mut self, index: u8, purpose: Purpose, body: RequestBody) {
        let sent = self.now;
        let key = self.requests.insert(Outstanding {
            peer: index,
            sent,
            purpose,
        });
        let peer = &mut self.peers[index as usize];
        peer.queue.push_back((key, sent));
        let unchecked = matches!(body, RequestBody::Fence(_));
        let request = Request {
            id: self.request_id_base.with(key),
            volume: self.config.volume,
            epoch: self.epoch,
            incarnation: if unchecked {
                Incarnation(0)
            } else {
                peer.incarnation
            },
            body,
        };
        self.out.push(SessionCommand::Send {
            disk: peer.disk,
            request,
        });
    }

    /// Takes the request that a reply answers; `None` if it is not (or no longer) outstanding.
    pub(super) fn take_request(&mut self, index: u8, id: RequestId) -> Option<Outstanding> {
        let key = self.request_id_base.key(id)?;
        if self.requests.get(key)?.peer != index {
            return None;
        }
        let outstanding = self.requests.remove(key)?;
        let peer = &mut self.peers[index as usize];
        peer.last_answer = self.now;
        while let Some((front, _)) = peer.queue.front() {
            if self.requests.get(*front).is_some() {
                break;
            }
            peer.queue.pop_front();
        }
        Some(outstanding)
    }

    /// The peer asked for a pause.
    pub(super) fn busy(&mut self, index: u8) {
        self.peers[index as usize].busy_until = self.now.after(BUSY_PAUSE);
    }

    /// Asks a peer for a sign of life and a fresh lease.
    pub(super) fn ping(&mut self, index: u8) {
        if self.usable(index) && !self.peers[index as usize].ping_outstanding {
            self.peers[index as usize].ping_outstanding = true;
            self.send(index, Purpose::Ping, RequestBody::Ping);
        }
    }

    /// Timeouts, pauses that are over, connections to try again.
    pub(super) fn links_tick(&mut self) {
        for index in 0..self.peers.len() as u8 {
            let peer = &self.peers[index as usize];
            if peer.busy_until > Time(0) && self.now >= peer.busy_until {
                self.peers[index as usize].busy_until = Time(0);
                self.resume_peer(index);
            }
            let peer = &self.peers[index as usize];
            let Some((_, oldest)) = peer.queue.front().copied() else {
                continue;
            };
            let silent = self.now.since(peer.last_answer.max(oldest));
            let age = self.now.since(oldest);
            if silent >= self.config.answer_timeout || age >= REQUEST_TIMEOUT {
                self.fail_peer(index);
            } else if silent >= self.config.answer_timeout / 3 {
                self.ping(index);
            }
        }
        self.ensure_links();
    }

    /// When `links_tick` has something to do.
    pub(super) fn links_deadline(&self) -> Option<Time> {
        let mut deadline: Option<Time> = None;
        let mut add = |t: Time| deadline = Some(deadline.map_or(t, |d| d.min(t)));
        let wanted = self.wanted_peers();
        for (index, peer) in self.peers.iter().enumerate() {
            if let Link::Down { retry_at } = peer.link {
                if wanted.contains(index as u8) && !peer.address.is_empty() {
                    add(retry_at);
                }
                continue;
            }
            if peer.busy_until > Time(0) {
                add(peer.busy_until);
            }
            if let Some((_, oldest)) = peer.queue.front() {
                let base = peer.last_answer.max(*oldest);
                let timeout = self.config.answer_timeout;
                let can_ping =
                    peer.link == Link::Up && !peer.ping_outstanding && !peer.lost && !peer.blocked;
                add(base.after(if can_ping { timeout / 3 } else { timeout }));
                add(oldest.after(REQUEST_TIMEOUT));
            }
        }
        deadline
    }

    /// Recomputes whether a group may acknowledge (R0, R4, R5), and goes on with what waited for it.
    pub(super) fn refresh_group(&mut self, g: usize) {
        let group = &self.groups[g];
        let early = self.planted(PlantedBug::AckBeforeExclusion);
        let hold = group
            .needed()
            .union(group.targets)
            .iter()
            .any(|p| self.peers[p as usize].failed);
        let configured = group
            .in_sync
            .iter()
            .all(|p| self.peers[p as usize].configured >= group.configure_needed);
        let allowed = (early || (configured && !hold))
            && !group.recovering
            && group.in_sync.len() >= usize::from(self.view.min_replicas)
            && matches!(self.phase, Phase::Serving | Phase::Draining);
        let before = std::mem::replace(&mut self.groups[g].acknowledging, allowed);
        if allowed && (!before || early) {
            self.settle_group(g);
        }
    }
}

impl Peer {
    fn incarnation_is(&self, actual: Incarnation) -> bool {
        self.incarnation == Incarnation(0) || self.incarnation == actual
    }
}
