//! A rebuild target's pull of one group from one source (R7), sans-IO.
//!
//! The pull walks the source's and the own list of chunks side by side. Chunks with equal digests are
//! done; of the others it merges the two listings of (layer, block), reads from the source what differs
//! and hands it to the own store, which decides once more, block by block, when it applies it.
//!
//! Invariants:
//! - Source and own store list under one layer list: `agree` has the argument.
//! - Every request to the source names the rebuild epoch and the source's incarnation that the holder
//!   trusts: a source that was fenced further, or lost data, ends the pull.
//! - `Complete` means: every chunk was compared under one layer list after the pull began, and the store applied
//!   everything that differed. A pull with a block that the source cannot provide ends as `Failed`.
//! - A lost connection makes the pull start again at the lowest chunk that is not done; nothing that was
//!   under way is taken for done. Memory is bounded by the constants below.
//!
//! | state | on | becomes |
//! |---|---|---|
//! | Running | all compared and applied | Complete |
//! | Running | refusal, faulty peer, too many reconnects, higher fence | Failed |
//! | Complete, Failed | - | - (a new PullStart replaces the pull) |

mod agree;
mod budget;
mod listing;
mod merge;
mod pump;
mod work;

use std::collections::BTreeMap;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{
    ChunkIndex, ClientId, ClusterId, DiskId, Incarnation, RequestId, VolumeId,
};
use ashlar_proto::wire::{
    ChunkDigest, Hello, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, PullProgress, PullStart,
    PullState, Reply, ReplyBody, Request, RequestBody, Status,
};
use bytes::Bytes;

use self::agree::Agreement;
use self::budget::Budget;
use self::listing::Listing;
use self::merge::{PlanLimits, Run};
use self::work::ChunkTask;
use crate::store::{PullBlock, StoreError, StoreReply, StoreRequest};

/// Chunks compared at a time.
pub const PULL_CHUNKS_MAX: usize = 4;
/// Reads from the source in flight at a time.
pub const PULL_READS_MAX: usize = 8;
/// Blocks of one read (256 KiB).
pub const PULL_READ_BLOCKS: u16 = 64;
/// Merges being applied by the own store at a time; no reads are sent beyond it.
pub const PULL_APPLIES_MAX: usize = 16;
/// Connections tried one after the other without any progress in between.
pub const PULL_RECONNECTS_MAX: u32 = 40;
/// Between two of them.
pub const PULL_RECONNECT_DELAY: Duration = Duration::from_millis(250);
/// A source that leaves a request unanswered for this long is taken for gone.
pub const PULL_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Rest after "busy" from the source or the own store.
pub const PULL_BUSY_DELAY: Duration = Duration::from_millis(20);

const LIMITS: PlanLimits = PlanLimits {
    runs: 64,
    direct: 512,
    run_blocks: PULL_READ_BLOCKS,
};

/// What a pull is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PullOrder {
    /// The own cluster.
    pub cluster: ClusterId,
    /// The own disk, which names the puller to the source.
    pub target: DiskId,
    /// The volume.
    pub volume: VolumeId,
    /// The holder's order.
    pub start: PullStart,
}

/// What a pull wants done.
#[derive(Debug)]
pub enum PullCommand {
    /// Connect to the source; answered by `connected` or `lost`.
    Connect,
    /// Close the connection (no `lost` follows).
    Disconnect,
    /// A request to the source.
    Send(Request),
    /// A request to the own store; answered by `local` with the token.
    Local {
        /// Pairs the answer.
        token: u32,
        /// What is asked.
        request: StoreRequest,
    },
}

/// Why a pull failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PullFailure {
    /// The source refused.
    #[error("the source refused: {0}")]
    Refused(Status),
    /// The own store refused.
    #[error("the own store refused: {0}")]
    Store(StoreError),
    /// The source does not follow the protocol.
    #[error("the source does not follow the protocol: {0}")]
    Protocol(&'static str),
    /// The source cannot be reached.
    #[error("the source cannot be reached")]
    Unreachable,
    /// A newer epoch ended it.
    #[error("a newer epoch ended the pull")]
    Superseded,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Link {
    Connecting { since: Time },
    Greeting,
    Up,
    Waiting { until: Time },
    Off,
}

/// A request to the source that is unanswered.
enum Remote {
    Hello,
    Layers,
    Chunks,
    Entries(ChunkIndex),
    Data(Run),
}

/// A request to the own store that is unanswered.
enum Local {
    /// A part of an exchange of layer lists.
    Layers,
    Chunks,
    Entries(ChunkIndex),
    Apply {
        chunk: ChunkIndex,
        blocks: Vec<PullBlock>,
    },
}

/// See the module.
pub struct Pull {
    order: PullOrder,
    state: PullState,
    failure: Option<PullFailure>,
    link: Link,
    reconnects: u32,
    remote: BTreeMap<u64, (Time, Remote)>,
    remote_next: u64,
    local: BTreeMap<u32, Local>,
    local_next: u32,
    /// Chunks of the source and of the own store, walked side by side.
    source: Listing<ChunkDigest>,
    target: Listing<ChunkDigest>,
    /// Every chunk below was taken off both lists.
    position: ChunkIndex,
    tasks: BTreeMap<ChunkIndex, ChunkTask>,
    reads: usize,
    applies: usize,
    /// Merges that the own store was too busy for.
    again: Vec<(ChunkIndex, Vec<PullBlock>)>,
    budget: Budget,
    hold_until: Option<Time>,
    chunks_done: u32,
    blocks_moved: u64,
    source_bad: u64,
    agreement: Agreement,
}

impl Pull {
    /// A pull that starts at once.
    pub fn start(order: PullOrder, now: Time, out: &mut Vec<PullCommand>) -> Self {
        out.push(PullCommand::Connect);
        let budget = Budget::new(order.start.bytes_per_second, now);
        Self {
            order,
            state: PullState::Running,
            failure: None,
            link: Link::Connecting { since: now },
            reconnects: 0,
            remote: BTreeMap::new(),
            remote_next: 1,
            local: BTreeMap::new(),
            local_next: 0,
            source: Listing::from(ChunkIndex(0)),
            target: Listing::from(ChunkIndex(0)),
            position: ChunkIndex(0),
            tasks: BTreeMap::new(),
            reads: 0,
            applies: 0,
            again: Vec::new(),
            budget,
            hold_until: None,
            chunks_done: 0,
            blocks_moved: 0,
            source_bad: 0,
            agreement: Agreement::default(),
        }
    }

    /// Blocks whose data the source had lost, and which are known bad here now.
    pub fn source_bad(&self) -> u64 {
        self.source_bad
    }

    /// What it is for.
    pub fn order(&self) -> &PullOrder {
        &self.order
    }

    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&PullFailure> {
        self.failure.as_ref()
    }

    /// Whether it is under way.
    pub fn running(&self) -> bool {
        self.state == PullState::Running
    }

    /// Every chunk below was compared.
    pub fn position(&self) -> ChunkIndex {
        self.position
    }

    /// How far it is.
    pub fn progress(&self) -> PullProgress {
        let listed = self.source.buffered().max(self.target.buffered()) + self.tasks.len();
        PullProgress {
            rebuild_epoch: self.order.start.rebuild_epoch,
            state: self.state,
            chunks_done: self.chunks_done,
            chunks_total: self
                .chunks_done
                .saturating_add(u32::try_from(listed).unwrap_or(u32::MAX)),
            blocks_moved: self.blocks_moved,
        }
    }

    /// When `tick` is needed at the latest.
    pub fn next_deadline(&self) -> Option<Time> {
        if !self.running() {
            return None;
        }
        let answer = self
            .remote
            .values()
            .next()
            .map(|(sent, _)| sent.after(PULL_ANSWER_TIMEOUT));
        let link = match self.link {
            Link::Connecting { since } => Some(since.after(PULL_ANSWER_TIMEOUT)),
            Link::Waiting { until } => Some(until),
            Link::Greeting | Link::Up | Link::Off => None,
        };
        // Only where the next `pump` would really read: else the deadline would stay in the past.
        let may_read = self.link == Link::Up
            && self.hold_until.is_none()
            && self.reads < PULL_READS_MAX
            && self.applies < PULL_APPLIES_MAX;
        let throttled = may_read && self.tasks.values().any(|t| !t.plan.runs.is_empty());
        let budget = if throttled {
            self.budget.ready_at()
        } else {
            None
        };
        [answer, link, budget, self.hold_until]
            .into_iter()
            .flatten()
            .min()
    }

    /// Ends the pull: an epoch above its own fences this replica, or the replica is dropped.
    pub fn cancel(&mut self, out: &mut Vec<PullCommand>) {
        self.fail(PullFailure::Superseded, out);
    }

    /// The connection to the source stands.
    pub fn connected(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        if !self.running() || !matches!(self.link, Link::Connecting { .. }) {
            return;
        }
        self.link = Link::Greeting;
        let hello = Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            cluster: self.order.cluster,
            disk: self.order.start.source,
            client: ClientId(self.order.target.0),
            ticket: Bytes::new(),
        };
        self.send(Remote::Hello, RequestBody::Hello(hello), now, out);
    }

    /// The connection could not be made or broke.
    pub fn lost(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        if !self.running() {
            return;
        }
        self.reconnects += 1;
        if self.reconnects > PULL_RECONNECTS_MAX {
            return self.fail(PullFailure::Unreachable, out);
        }
        let resume = self.done_below();
        self.position = resume;
        self.disagree();
        self.source = Listing::from(resume);
        self.target = Listing::from(resume);
        self.tasks.clear();
        self.remote.clear();
        self.reads = 0;
        self.again.clear();
        // What the store is applying right now counts until it answers; its listings are stale.
        self.local
            .retain(|_, work| matches!(work, Local::Apply { .. }));
        self.hold_until = None;
        self.link = Link::Waiting {
            until: now.after(PULL_RECONNECT_DELAY),
        };
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        if !self.running() {
            return;
        }
        let unanswered = self
            .remote
            .values()
            .next()
            .is_some_and(|(sent, _)| now >= sent.after(PULL_ANSWER_TIMEOUT));
        let unconnected = matches!(self.link, Link::Connecting { since } if now >= since.after(PULL_ANSWER_TIMEOUT));
        if unanswered || unconnected {
            out.push(PullCommand::Disconnect);
            return self.lost(now, out);
        }
        if matches!(self.link, Link::Waiting { until } if now >= until) {
            self.link = Link::Connecting { since: now };
            out.push(PullCommand::Connect);
        }
        if self.hold_until.is_some_and(|until| now >= until) {
            self.hold_until = None;
        }
        self.pump(now, out);
    }

    /// The source answered.
    pub fn reply(&mut self, reply: Reply, now: Time, out: &mut Vec<PullCommand>) {
        if !self.running() {
            return;
        }
        let Some((_, work)) = self.remote.remove(&reply.id.0) else {
            return self.fail(PullFailure::Protocol("an answer to nothing asked"), out);
        };
        if matches!(work, Remote::Data(_)) {
            self.reads -= 1;
        }
        let outcome = match reply.result {
            Ok(body) => self.accept(work, body, now, out),
            Err(Status::Busy) => {
                self.ask_again(work, now, out);
                Ok(())
            }
            Err(status) => Err(PullFailure::Refused(status)),
        };
        match outcome {
            Ok(()) => self.pump(now, out),
            Err(failure) => self.fail(failure, out),
        }
    }

    fn accept(
        &mut self,
        work: Remote,
        body: ReplyBody,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) -> Result<(), PullFailure> {
        match (work, body) {
            (Remote::Layers, ReplyBody::Layers(layers)) => self.source_layers(layers, now, out),
            (Remote::Hello, ReplyBody::Hello(hello)) => {
                if hello.disk != self.order.start.source {
                    return Err(PullFailure::Refused(Status::WrongTarget));
                }
                self.link = Link::Up;
                Ok(())
            }
            (Remote::Chunks, ReplyBody::ChunkDigests(list)) => {
                self.reconnects = 0;
                let page = self.source.page(list.chunks, list.next);
                page.map_err(|_| PullFailure::Protocol("chunk digests out of order"))
            }
            (Remote::Entries(chunk), ReplyBody::Entries(list)) => {
                self.reconnects = 0;
                if list.entries.iter().any(|e| e.at.chunk != chunk) {
                    return Err(PullFailure::Protocol("entries of another chunk"));
                }
                let Some(task) = self.tasks.get_mut(&chunk) else {
                    return Ok(());
                };
                let next = list.next.filter(|n| n.chunk == chunk);
                let page = task.source.page(list.entries, next);
                page.map_err(|_| PullFailure::Protocol("entries out of order"))
            }
            (Remote::Data(run), ReplyBody::Read(reply)) => {
                self.reconnects = 0;
                let Some((blocks, bad)) = merge::blocks_of_reply(run, &reply) else {
                    return Err(PullFailure::Protocol("a read's answer has another shape"));
                };
                self.source_bad += bad;
                if let Some(task) = self.tasks.get_mut(&run.range.chunk) {
                    task.reads -= 1;
                }
                self.apply(run.range.chunk, blocks, out);
                Ok(())
            }
            _ => Err(PullFailure::Protocol("an answer of another kind")),
        }
    }

    fn ask_again(&mut self, work: Remote, now: Time, out: &mut Vec<PullCommand>) {
        self.hold_until = Some(now.after(PULL_BUSY_DELAY));
        match work {
            // A source that is still opening its disk: come back later.
            Remote::Hello => {
                out.push(PullCommand::Disconnect);
                self.lost(now, out);
            }
            Remote::Layers => self.exchange_again(),
            Remote::Chunks => self.source.ask_again(),
            Remote::Entries(chunk) => {
                if let Some(task) = self.tasks.get_mut(&chunk) {
                    task.source.ask_again();
                }
            }
            Remote::Data(run) => {
                if let Some(task) = self.tasks.get_mut(&run.range.chunk) {
                    task.reads -= 1;
                    task.plan.runs.push_front(run);
                }
            }
        }
    }

    /// The own store answered.
    pub fn local(
        &mut self,
        token: u32,
        result: Result<StoreReply, StoreError>,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) {
        let Some(work) = self.local.remove(&token) else {
            return;
        };
        if matches!(work, Local::Apply { .. }) {
            self.applies -= 1;
        }
        if !self.running() {
            return;
        }
        let outcome = match result {
            Ok(reply) => self.accept_local(work, reply, now, out),
            Err(StoreError::Busy) => {
                self.hold_until = Some(now.after(PULL_BUSY_DELAY));
                match work {
                    Local::Layers => self.exchange_again(),
                    Local::Chunks => self.target.ask_again(),
                    Local::Entries(chunk) => {
                        if let Some(task) = self.tasks.get_mut(&chunk) {
                            task.target.ask_again();
                        }
                    }
                    Local::Apply { chunk, blocks } => self.again.push((chunk, blocks)),
                }
                Ok(())
            }
            Err(error) => Err(PullFailure::Store(error)),
        };
        match outcome {
            Ok(()) => self.pump(now, out),
            Err(failure) => self.fail(failure, out),
        }
    }

    fn accept_local(
        &mut self,
        work: Local,
        reply: StoreReply,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) -> Result<(), PullFailure> {
        const ORDER: PullFailure = PullFailure::Protocol("the own store's listing is out of order");
        match (work, reply) {
            (Local::Layers, reply) => self.own_layers(reply, now, out),
            (Local::Chunks, StoreReply::ChunkDigests(list)) => {
                self.target.page(list.chunks, list.next).map_err(|_| ORDER)
            }
            (Local::Entries(chunk), StoreReply::Entries(list)) => {
                let Some(task) = self.tasks.get_mut(&chunk) else {
                    return Ok(());
                };
                let next = list.next.filter(|n| n.chunk == chunk);
                task.target.page(list.entries, next).map_err(|_| ORDER)
            }
            (Local::Apply { chunk, .. }, StoreReply::Pulled { applied }) => {
                self.blocks_moved += u64::from(applied);
                if let Some(task) = self.tasks.get_mut(&chunk) {
                    task.applies = task.applies.saturating_sub(1);
                }
                Ok(())
            }
            _ => Err(PullFailure::Protocol(
                "the own store gave an answer of another kind",
            )),
        }
    }

    fn fail(&mut self, failure: PullFailure, out: &mut Vec<PullCommand>) {
        if !self.running() {
            return;
        }
        self.failure = Some(failure);
        self.end(PullState::Failed, out);
    }

    fn end(&mut self, state: PullState, out: &mut Vec<PullCommand>) {
        self.state = state;
        if !matches!(self.link, Link::Off | Link::Waiting { .. }) {
            out.push(PullCommand::Disconnect);
        }
        self.link = Link::Off;
        self.remote.clear();
        self.tasks.clear();
        self.again.clear();
        self.source = Listing::empty();
        self.target = Listing::empty();
        self.hold_until = None;
    }

    fn send(&mut self, work: Remote, body: RequestBody, now: Time, out: &mut Vec<PullCommand>) {
        let id = self.remote_next;
        self.remote_next += 1;
        let hello = matches!(work, Remote::Hello);
        self.remote.insert(id, (now, work));
        let start = &self.order.start;
        out.push(PullCommand::Send(Request {
            id: RequestId(id),
            volume: if hello {
                VolumeId::NIL
            } else {
                self.order.volume
            },
            epoch: start.rebuild_epoch,
            incarnation: if hello {
                Incarnation(0)
            } else {
                start.source_incarnation
            },
            body,
        }));
    }

    fn ask_store(&mut self, work: Local, request: StoreRequest, out: &mut Vec<PullCommand>) {
        let token = self.local_next;
        self.local_next = self.local_next.wrapping_add(1);
        self.local.insert(token, work);
        out.push(PullCommand::Local { token, request });
    }

    fn apply(&mut self, chunk: ChunkIndex, blocks: Vec<PullBlock>, out: &mut Vec<PullCommand>) {
        if blocks.is_empty() {
            return;
        }
        self.applies += 1;
        if let Some(task) = self.tasks.get_mut(&chunk) {
            task.applies += 1;
        }
        let request = StoreRequest::PullApply {
            volume: self.order.volume,
            rebuild_epoch: self.order.start.rebuild_epoch,
            chunk,
            blocks: blocks.clone(),
        };
        self.ask_store(Local::Apply { chunk, blocks }, request, out);
    }
}
