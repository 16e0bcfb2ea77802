//! The session of one volume: its state, the dispatch of events, and the pumps that run after them.
//!
//! Architecture invariant: events only change state; whatever follows from a changed state is done by
//! *pumps*, which look at the state and send what is missing. A lost answer, a reconnection or a new
//! configuration therefore need no code of their own: the state says what is missing. Pumps run when
//! `pump` is set; the paths of single writes and reads do not set it.

use std::collections::VecDeque;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{DiskId, Epoch, RequestId, SnapshotNumber, Version};
use ashlar_proto::volume::VolumeView;
use ashlar_proto::wire::{Reply, ReplyBody, Status};
use bytes::Bytes;

use super::api::{
    ClientRequest, MetadataRequest, PlantedBug, SessionCommand, SessionConfig, SessionEvent,
    SessionStats, StopReason,
};
use super::exclude::Change;
use super::flush::{FlushRun, Rhythm};
use super::op::Op;
use super::read::ReadSlot;
use super::reader::{Confirmation, Role};
use super::replica::{Group, Outstanding, Peer, Purpose};
use super::rmw::Rmw;
use super::slots::{Key, Slab, Window};
use super::switch::Switch;
use super::write::{Retained, WriteSlot};

/// Rounds of pumps after one event; more would mean that they feed each other.
const PUMP_ROUNDS_MAX: usize = 64;

/// Where a session is.
///
/// | from | to |
/// |---|---|
/// | Idle | Asking (start) |
/// | Asking | Opening (granted), Stopped |
/// | Opening | Serving, Closing (asked to close), Stopped |
/// | Serving | Draining (asked to close), Stopped |
/// | Draining | Closing, Stopped |
/// | Closing | Stopped |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Idle,
    Asking,
    Opening,
    Serving,
    Draining,
    Closing,
    Stopped,
}

/// Makes request ids of slab keys and back: session (16 bits), generation (24), slot (24).
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestIds(u16);

impl RequestIds {
    pub(super) fn with(self, key: Key) -> RequestId {
        let session = u64::from(self.0) << 48;
        RequestId(session | u64::from(key.generation & 0xff_ffff) << 24 | u64::from(key.index))
    }

    pub(super) fn key(self, id: RequestId) -> Option<Key> {
        (id.0 >> 48 == u64::from(self.0)).then_some(Key {
            index: (id.0 & 0xff_ffff) as u32,
            generation: (id.0 >> 24 & 0xff_ffff) as u32,
        })
    }
}

/// The holder of one volume: see the module's documentation.
#[derive(Debug)]
pub struct Session {
    pub(super) config: SessionConfig,
    pub(super) stats: SessionStats,
    pub(super) now: Time,
    pub(super) out: Vec<SessionCommand>,
    pub(super) phase: Phase,
    pub(super) role: Role,
    pub(super) confirmation: Confirmation,
    /// Exclusive opens of a reader that were refused.
    pub(super) preparations_refused: u32,
    /// Something happened that pumps should look at.
    pub(super) pump: bool,
    /// A write was acknowledged in this step.
    pub(super) settled: bool,
    /// The adopted configuration, and its epoch: what requests carry.
    pub(super) view: VolumeView,
    pub(super) epoch: Epoch,
    /// Number that writes carry.
    pub(super) layer: SnapshotNumber,
    pub(super) switch: Switch,
    pub(super) peers: Vec<Peer>,
    pub(super) groups: Vec<Group>,
    pub(super) memberships: u32,
    pub(super) requests: Slab<Outstanding>,
    pub(super) request_id_base: RequestIds,
    // Opening and closing.
    pub(super) opened_at: Time,
    pub(super) all_fenced_at: Option<Time>,
    pub(super) clean: bool,
    pub(super) first_open: bool,
    pub(super) close_asked: bool,
    pub(super) closed_clean: bool,
    // Configuration changes.
    pub(super) change: Change,
    pub(super) change_pause: Time,
    pub(super) refreshing: bool,
    // Requests of clients.
    pub(super) waiting: VecDeque<ClientRequest>,
    pub(super) ops: Slab<Op>,
    pub(super) writes: Slab<WriteSlot>,
    /// Acknowledged writes that a rebuild target has not answered.
    pub(super) lingering: usize,
    pub(super) reads: Slab<ReadSlot>,
    pub(super) parked: Vec<Key>,
    pub(super) rmws: Slab<Rmw>,
    pub(super) rmw_waiting: usize,
    pub(super) rmw_arrivals: u64,
    pub(super) status_parked: Vec<(Key, u32)>,
    pub(super) window: Window,
    pub(super) zeroes: Bytes,
    // Flush.
    pub(super) flush: Option<FlushRun>,
    pub(super) flush_number: u64,
    /// Number of the last flush that ended.
    pub(super) flushed: u64,
    pub(super) flush_waiters: Vec<u64>,
    pub(super) rhythm: Rhythm,
    /// Something was acknowledged since the last flush began, and is not durable by itself.
    pub(super) dirty: bool,
    /// Everything at or below it is durable on every in-sync replica.
    pub(super) confirmed: Version,
    pub(super) retained: VecDeque<Retained>,
    pub(super) retained_base: u64,
    pub(super) reconciles: u64,
    pub(super) replays: usize,
}

impl Session {
    /// A session that has not started; feed it [`SessionEvent::Start`].
    pub fn new(config: SessionConfig, now: Time) -> Self {
        let request_id_base = RequestIds(config.session_number);
        let view = empty_view(&config);
        let role = Role::of(&config);
        Self {
            config,
            stats: SessionStats::default(),
            now,
            out: Vec::new(),
            phase: Phase::Idle,
            role,
            confirmation: Confirmation::default(),
            preparations_refused: 0,
            pump: false,
            settled: false,
            view,
            epoch: Epoch(0),
            layer: SnapshotNumber(0),
            switch: Switch::default(),
            peers: Vec::new(),
            groups: Vec::new(),
            memberships: 0,
            requests: Slab::new(),
            request_id_base,
            opened_at: now,
            all_fenced_at: None,
            clean: false,
            first_open: false,
            close_asked: false,
            closed_clean: false,
            change: Change::Idle,
            change_pause: Time(0),
            refreshing: false,
            waiting: VecDeque::new(),
            ops: Slab::new(),
            writes: Slab::new(),
            lingering: 0,
            reads: Slab::new(),
            parked: Vec::new(),
            rmws: Slab::new(),
            rmw_waiting: 0,
            rmw_arrivals: 0,
            status_parked: Vec::new(),
            window: Window::new(Epoch(0)),
            zeroes: Bytes::from_static(&[0; ashlar_proto::ids::BLOCK_SIZE]),
            flush: None,
            flush_number: 0,
            flushed: 0,
            flush_waiters: Vec::new(),
            rhythm: Rhythm::default(),
            dirty: false,
            confirmed: Version::ZERO,
            retained: VecDeque::new(),
            retained_base: 0,
            reconciles: 0,
            replays: 0,
        }
    }

    /// Takes one event and appends what is to be done about it.
    pub fn step(&mut self, now: Time, event: SessionEvent, out: &mut Vec<SessionCommand>) {
        if self.phase == Phase::Stopped {
            return;
        }
        // A process that was stopped for a while hears of other things first: what was due meanwhile must
        // not be forgotten, for deadlines in the past are not asked for again.
        self.pump |= self.passed_deadline(now);
        self.now = now.max(self.now);
        std::mem::swap(&mut self.out, out);
        self.on_event(event);
        if self.settled {
            self.after_acknowledgements();
        }
        let mut rounds = 0;
        while self.pump && self.phase != Phase::Stopped && rounds < PUMP_ROUNDS_MAX {
            self.pump = false;
            rounds += 1;
            self.run_pumps();
        }
        debug_assert!(rounds < PUMP_ROUNDS_MAX, "the pumps do not come to rest");
        #[cfg(debug_assertions)]
        self.check_invariants();
        std::mem::swap(&mut self.out, out);
    }

    fn on_event(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Start => {
                if self.phase == Phase::Idle {
                    self.phase = Phase::Asking;
                    match self.role {
                        Role::Reader => self.ask_join(),
                        Role::Holder | Role::Preparing => self.ask_open(),
                    }
                }
            }
            SessionEvent::Client(request) => self.on_client(request),
            SessionEvent::ReplicaUp { disk } => self.on_replica_up(disk),
            SessionEvent::ReplicaDown { disk } => self.on_replica_down(disk),
            SessionEvent::Reply { disk, reply } => self.on_reply(disk, reply),
            SessionEvent::Granted {
                view,
                previous_clean,
                first_open,
            } => {
                self.on_granted(*view, previous_clean, first_open);
            }
            SessionEvent::NotReadable => self.on_not_readable(),
            SessionEvent::Confirmed(view) => self.on_confirmed(*view),
            SessionEvent::OpenRefused { reason } => self.on_open_refused(reason),
            SessionEvent::ConfigChanged(view) => {
                self.refreshing = false;
                if !matches!(self.phase, Phase::Idle | Phase::Asking) {
                    self.adopt(*view);
                    self.unblock();
                }
            }
            SessionEvent::ChangeAnswer { applied, view } => {
                if matches!(self.change, Change::Asked) {
                    let newer = self.adopt(*view);
                    self.on_change_answer(applied, newer);
                }
            }
            SessionEvent::CloseAnswer => {
                if self.phase == Phase::Closing {
                    self.closed();
                }
            }
            SessionEvent::Deleted => self.stop(StopReason::Deleted),
            SessionEvent::Close => self.on_close(),
            SessionEvent::Tick => {
                self.links_tick();
                self.pump = true;
            }
        }
    }

    /// What acknowledged writes may have been waited for.
    fn after_acknowledgements(&mut self) {
        self.settled = false;
        self.reads_pump();
        self.rmw_pump();
        if self.lingering > 0 {
            self.bound_lingering();
        }
        // Rebuilds wait for writes of older epochs; closing waits for everything.
        let rebuilding = self.groups.iter().any(|g| !g.targets.is_empty());
        let drains = self.phase == Phase::Draining || self.switch.holds();
        self.pump |= rebuilding || drains || self.replays > 0;
    }

    fn run_pumps(&mut self) {
        self.ensure_links();
        if self.role == Role::Reader {
            return self.reader_pumps();
        }
        self.exclusion_pump();
        self.opening_pump();
        self.configure_pump();
        self.recovery_pump();
        self.rebuild_pump();
        self.flush_pump();
        self.reads_pump();
        self.rmw_pump();
        self.status_pump();
        self.switch_pump();
        self.closing_pump();
        if std::mem::take(&mut self.settled) {
            self.pump = true;
        }
    }

    fn on_reply(&mut self, disk: DiskId, reply: Reply) {
        let Some(index) = self.peers.iter().position(|p| p.disk == disk) else {
            return;
        };
        let index = index as u8;
        if reply.volume != self.config.volume {
            return;
        }
        let Some(outstanding) = self.take_request(index, reply.id) else {
            return;
        };
        let peer = &mut self.peers[index as usize];
        peer.actual = reply.incarnation;
        match reply.result {
            Ok(body) => {
                self.renew_lease(index, outstanding.sent);
                if !self.parked.is_empty() {
                    self.reads_pump();
                }
                self.on_success(index, outstanding.purpose, reply.incarnation, body);
            }
            Err(status) => self.on_refusal(index, outstanding.purpose, status, reply.fence),
        }
    }

    fn on_success(
        &mut self,
        peer: u8,
        purpose: Purpose,
        actual: ashlar_proto::ids::Incarnation,
        body: ReplyBody,
    ) {
        match (purpose, body) {
            (
                Purpose::Write {
                    slot,
                    attempt,
                    membership,
                },
                ReplyBody::Written(_),
            ) => {
                self.on_written(peer, slot, attempt, membership);
            }
            (Purpose::Read { slot }, ReplyBody::Read(reply)) => self.on_read(peer, slot, reply),
            (Purpose::Ping, ReplyBody::Ping) => {
                self.peers[peer as usize].ping_outstanding = false;
                self.reads_pump();
            }
            (Purpose::Probe, ReplyBody::Fence(reply)) => self.on_probe(peer, actual, reply),
            (Purpose::Configure { epoch }, ReplyBody::Configure) => self.on_configured(peer, epoch),
            (Purpose::Flush { number }, ReplyBody::Flush) => self.on_flushed(peer, number),
            (Purpose::PreFlush { number }, ReplyBody::Flush) => self.on_preflushed(peer, number),
            (Purpose::Collect { group, number }, ReplyBody::Entries(entries)) => {
                self.on_collected(peer, group as usize, number, entries);
            }
            (Purpose::ReconcileRead { group, number, fix }, ReplyBody::Read(reply)) => {
                self.on_reconcile_read(peer, group as usize, number, fix, &reply);
            }
            (Purpose::ReconcileWrite { group, number, fix }, ReplyBody::Written(_)) => {
                self.on_reconcile_written(peer, group as usize, number, fix);
            }
            (Purpose::Digest { op, chunk }, ReplyBody::Entries(entries)) => {
                self.on_digest(op, chunk, &entries);
            }
            (Purpose::TargetFence { group, membership }, ReplyBody::Fence(_)) => {
                self.on_target_fence(group as usize, peer, membership, actual);
            }
            (Purpose::PullStart { group, membership }, ReplyBody::PullStart) => {
                self.on_pull_started(group as usize, peer, membership);
            }
            (Purpose::PullStatus { group, membership }, ReplyBody::PullStatus(progress)) => {
                self.on_pull_status(group as usize, peer, membership, progress);
            }
            (Purpose::TargetFlush { group, membership }, ReplyBody::Flush) => {
                self.on_target_flushed(group as usize, peer, membership);
            }
            (Purpose::Repair, ReplyBody::Written(_)) => self.stats.bad_blocks_repaired += 1,
            (purpose, _) => {
                // An answer of another kind than asked for: the peer cannot be trusted.
                self.request_void(peer, purpose);
                self.fail_peer(peer);
            }
        }
    }

    /// A replica refused a request.
    fn on_refusal(&mut self, peer: u8, purpose: Purpose, status: Status, fence: Epoch) {
        match (status, purpose) {
            (
                Status::NoSpace,
                Purpose::Write {
                    slot,
                    attempt,
                    membership,
                },
            ) => {
                return self.on_write_no_space(peer, slot, attempt, membership);
            }
            (_, Purpose::Repair) => return,
            _ => {}
        }
        self.request_void(peer, purpose);
        match (status, purpose) {
            (Status::WrongState, Purpose::Read { .. } | Purpose::Digest { .. })
                if self.config.snapshot.is_some() =>
            {
                // Deleted, most likely (S9): metadata knows. If it is not, another replica is read.
                self.fenced_above(peer);
                self.fail_peer(peer);
            }
            (Status::Fenced, _) if fence > self.epoch => self.fenced_above(peer),
            (Status::Fenced, Purpose::Probe) => self.reprobe(peer),
            (Status::Fenced, _) => self.resume_peer(peer),
            (Status::Busy, Purpose::Probe) => self.fail_peer(peer),
            (Status::Busy, _) => self.busy(peer),
            (
                Status::WrongState | Status::IncarnationMismatch | Status::UnknownVolume,
                Purpose::PullStart { group, membership }
                | Purpose::PullStatus { group, membership },
            ) => self.target_refused(group as usize, peer, membership),
            (
                Status::IncarnationMismatch
                | Status::NoSpace
                | Status::DiskFailed
                | Status::Invalid
                | Status::UnknownVolume
                | Status::Version
                | Status::WrongTarget
                | Status::Unauthorized
                | Status::Checksum
                | Status::WrongState,
                _,
            ) => {
                let disk = self.peers[peer as usize].disk;
                tracing::warn!(volume = %self.config.volume, %disk, %status, ?purpose, "a replica refused a request");
                self.fail_peer(peer);
            }
        }
        self.pump = true;
    }

    fn unblock(&mut self) {
        for index in 0..self.peers.len() as u8 {
            if std::mem::replace(&mut self.peers[index as usize].blocked, false) {
                self.reprobe(index);
                self.resume_peer(index);
            }
        }
    }

    /// Whether a deadline of the pumps lies between the last event and `now`.
    fn passed_deadline(&self, now: Time) -> bool {
        if self.role == Role::Reader {
            return false;
        }
        [
            self.opening_deadline(),
            self.exclusion_deadline(),
            self.rebuild_deadline(),
            self.switch_deadline(),
        ]
        .into_iter()
        .flatten()
        .any(|deadline| deadline <= now)
    }

    pub(super) fn ask_open(&mut self) {
        self.out
            .push(SessionCommand::Metadata(MetadataRequest::Open));
    }

    /// When [`SessionEvent::Tick`] is due; `None`: an idle session needs no timer.
    pub fn next_deadline(&self) -> Option<Time> {
        if matches!(self.phase, Phase::Idle | Phase::Asking | Phase::Stopped) {
            return None;
        }
        if self.role == Role::Reader {
            return self.links_deadline();
        }
        [
            self.links_deadline(),
            self.opening_deadline(),
            self.exclusion_deadline(),
            self.rebuild_deadline(),
            self.switch_deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether the session takes more client requests now (back-pressure). A request given
    /// nevertheless is served; memory is bounded only if the owner obeys.
    pub fn accepting(&self) -> bool {
        self.stats.in_flight_bytes < self.config.in_flight_bytes_max
            && self.stats.retained_bytes < self.config.retained_bytes_max
    }

    /// Counters and gauges.
    pub fn stats(&self) -> SessionStats {
        self.stats
    }

    /// Whether the session is to make a mistake on purpose.
    pub(super) fn planted(&self, bug: PlantedBug) -> bool {
        #[cfg(feature = "planted-bugs")]
        {
            self.config.planted_bug == Some(bug)
        }
        #[cfg(not(feature = "planted-bugs"))]
        {
            let _ = bug;
            false
        }
    }
}

fn empty_view(config: &SessionConfig) -> VolumeView {
    VolumeView {
        volume: config.volume,
        name: String::new(),
        size_bytes: 0,
        min_replicas: 1,
        groups: Vec::new(),
        epoch: Epoch(0),
        holder: None,
        readers: Vec::new(),
        opened_once: false,
        snapshot: Default::default(),
        snapshot_pending: false,
        layers: Default::default(),
        parent: None,
        revision: 0,
        disks: Default::default(),
    }
}
