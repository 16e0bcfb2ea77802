//! The crash-safe chunk store of one disk (DESIGN section 5), sans-IO.
//!
//! | file | holds |
//! |---|---|
//! | `api` | requests, replies, events, commands |
//! | `log`, `index`, `replica`, `tombstones`, `allocator`, `cache` | the parts in memory, without I/O |
//! | `writes`, `removal`, `reads`, `resolve`, `listing`, `descriptors` | what requests do |
//! | `layers`, `merge`, `merge_steps` | layers that are one: their names, and merging them |
//! | `clones`, `flatten` | what a clone inherits, and copying it |
//! | `sync` | grouped fdatasync, the superblock |
//! | `writeback`, `burst` | from the log to the home pages |
//! | `recovery`, `recovery_log`, `replay` | opening a disk |
//! | `space` | high-water mark, pages given back later |
//! | `shutdown` | the two ends: closed cleanly, and poisoned |
//! | `discard` | free pages given back to the device |
//!
//! Invariants (each file has its own):
//! - A write is answered after its batch and all earlier ones are on the device, and its pages too.
//! - Nothing durable is overwritten before what replaces it is durable in the log, and known to be by a
//!   marker that is itself durable.
//! - A failed write or sync ends the store (poison); it is never repeated.
//! - Everything that waits is in a bounded queue; write-back never waits for foreground requests.

mod allocator;
mod api;
mod block_list;
mod burst;
mod cache;
mod clones;
mod descriptors;
mod discard;
mod flatten;
mod index;
mod layers;
mod listing;
mod log;
mod merge;
mod merge_steps;
mod pieces;
mod reads;
mod recovery;
mod recovery_log;
mod removal;
mod replay;
mod replica;
mod resolve;
mod shutdown;
mod space;
mod sync;
mod tombstones;
mod writeback;
mod writes;

use std::collections::{BTreeMap, VecDeque};

use ashlar_platform::clock::Time;
use ashlar_platform::disk::{DiskCommand, DiskCompletion, IoToken};
use ashlar_proto::ids::{PAGE_SIZE, VolumeId};
use bytes::Bytes;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

pub use api::*;

use crate::format::{Geometry, Superblock};
use allocator::Allocator;
use cache::SectorCache;
use index::Index;
use log::{Ack, Answer, Log};
use sync::{SyncAction, SyncState};

/// Most reads of data in flight that a store keeps state for; beyond it `Busy`.
const READS_MAX: usize = 16 * 1024;

/// What a completion belongs to.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// A batch of this sequence; whether it is written durably.
    Batch(u64, bool),
    Redirect(u64),
    Read {
        job: u64,
        segment: u32,
    },
    Sector(u32),
    Superblock,
    Admin,
    Sync,
    BurstRead(u32),
    BurstWrite,
    HighWater,
    Recovery(u64),
    /// A repair that an opening writes.
    Fix,
    Discard,
    MergeRead(u32),
    MergeWrite,
    FlattenRead(u32),
}

/// A request that waits for something.
#[derive(Debug)]
struct Parked {
    tag: u64,
    request: StoreRequest,
    /// Its data's checksums were verified.
    verified: bool,
    /// Times that a read was repeated because what it read had moved.
    attempts: u8,
}

enum Phase {
    Recovering(Box<recovery::Recovery>),
    Ready,
    /// Shutdown was asked for with this tag.
    Closing(u64),
    Closed,
    Failed(StoreError),
}

/// The store of one disk.
pub struct Store {
    config: StoreConfig,
    phase: Phase,
    now: Time,
    boot_id: [u8; 16],
    disk_bytes: u64,
    superblock: Superblock,
    geometry: Geometry,
    salt: u32,
    identity: Option<StoreIdentity>,
    index: Index,
    log: Log,
    allocator: Allocator,
    cache: SectorCache,
    sync: SyncState,
    admin: descriptors::AdminState,
    burst: writeback::BurstState,
    space: space::SpaceState,
    discard: discard::DiscardState,
    merge: merge::MergeState,
    flattening: flatten::FlattenState,
    io: FxHashMap<u64, Target>,
    next_token: u64,
    /// Requests that wait for room in the log, in order.
    queue: VecDeque<Parked>,
    queue_bytes: usize,
    /// Requests that wait for page sectors, and how many.
    parked: FxHashMap<u64, (Parked, u32)>,
    next_parked: u64,
    sector_waiters: FxHashMap<u32, SmallVec<[u64; 2]>>,
    /// Reads that wait for a batch.
    batch_waiters: BTreeMap<u64, Vec<Parked>>,
    reads: FxHashMap<u64, reads::ReadJob>,
    next_read: u64,
    close_wanted: bool,
    marker_deadline: Option<Time>,
    last_write: Time,
    generation: u64,
    stats: StoreStats,
}

impl Store {
    /// A store that recovers what `format_plan` or an earlier life left on a disk of `disk_bytes`.
    /// `boot_id` names the running kernel's boot. The first `step` (a Tick will do) starts it.
    pub fn open(config: StoreConfig, disk_bytes: u64, boot_id: [u8; 16], now: Time) -> Self {
        let superblock = recovery::blank_superblock();
        let geometry = superblock.geometry;
        let cache = SectorCache::new(config.cache_bytes);
        Self {
            phase: Phase::Recovering(Box::default()),
            now,
            boot_id,
            disk_bytes,
            geometry,
            salt: 0,
            identity: None,
            index: Index::default(),
            log: Log::new(geometry.log_bytes, 0),
            allocator: Allocator::new(0, 0),
            cache,
            sync: SyncState::default(),
            admin: descriptors::AdminState::default(),
            burst: writeback::BurstState::default(),
            space: space::SpaceState::default(),
            discard: discard::DiscardState::default(),
            merge: merge::MergeState::default(),
            flattening: flatten::FlattenState::default(),
            io: FxHashMap::default(),
            next_token: 0,
            queue: VecDeque::new(),
            queue_bytes: 0,
            parked: FxHashMap::default(),
            next_parked: 0,
            sector_waiters: FxHashMap::default(),
            batch_waiters: BTreeMap::new(),
            reads: FxHashMap::default(),
            next_read: 0,
            close_wanted: false,
            marker_deadline: None,
            last_write: now,
            generation: 0,
            stats: StoreStats::default(),
            superblock,
            config,
        }
    }

    /// Handles one event.
    pub fn step(&mut self, now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>) {
        self.now = self.now.max(now);
        match event {
            StoreEvent::Request { tag, request } => self.on_request(tag, request, out),
            StoreEvent::Disk(completion) => self.on_disk(completion, out),
            StoreEvent::Tick => self.close_wanted = true,
        }
        self.pump(out);
    }

    /// Closes the batch of this iteration: the same as a Tick.
    pub fn flush_batch(&mut self, now: Time, out: &mut Vec<StoreCommand>) {
        self.step(now, StoreEvent::Tick, out);
    }

    /// When a Tick is needed at the latest.
    pub fn next_deadline(&self) -> Option<Time> {
        if !matches!(self.phase, Phase::Ready) {
            return None;
        }
        let quiet = self.idle_work()
            && !self.moves_go_on()
            && self.sync.idle()
            && self.log.flights() == 0
            && self.log.open.is_empty()
            && self.admin.is_idle();
        let idle = quiet.then(|| self.last_write.after(self.config.idle_write_back));
        let merge = self.merge.deadline(self.now);
        let flatten = self.flattening.deadline(self.now);
        [
            idle,
            self.marker_deadline,
            self.discard.age_at,
            merge,
            flatten,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether requests are served.
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready)
    }

    /// Who the disk is, once it is open.
    pub fn identity(&self) -> Option<StoreIdentity> {
        self.identity
    }

    /// What is known of a replica.
    pub fn replica(&self, volume: VolumeId) -> Option<ReplicaInfo> {
        self.index.replica(volume).map(|r| self.replica_info(r))
    }

    /// Counters and gauges.
    pub fn stats(&self) -> StoreStats {
        StoreStats {
            capacity_bytes: u64::from(self.allocator.page_count()) * PAGE_SIZE as u64,
            used_bytes: u64::from(self.allocator.used()) * PAGE_SIZE as u64,
            reserved_bytes: u64::from(self.allocator.reserved()) * PAGE_SIZE as u64,
            log_bytes: self.log.bytes,
            log_used_bytes: self.log.used,
            replicas: self.index.by_volume.len() as u32,
            syncs: self.sync.count,
            tombstones: self.index.tombstones,
            queued_requests: (self.queue.len() + self.parked.len()) as u64,
            cache_hits: self.cache.hits,
            cache_misses: self.cache.misses,
            ..self.stats
        }
    }

    fn token(&mut self, target: Target) -> IoToken {
        self.next_token += 1;
        self.io.insert(self.next_token, target);
        IoToken(self.next_token)
    }

    fn reply(out: &mut Vec<StoreCommand>, tag: u64, result: Result<StoreReply, StoreError>) {
        out.push(StoreCommand::Reply { tag, result });
    }

    fn on_request(&mut self, tag: u64, request: StoreRequest, out: &mut Vec<StoreCommand>) {
        let refusal = match &self.phase {
            Phase::Ready => None,
            Phase::Failed(error) => Some(error.clone()),
            Phase::Recovering(_) | Phase::Closing(_) | Phase::Closed => Some(StoreError::NotReady),
        };
        if let Some(error) = refusal {
            return Self::reply(out, tag, Err(error));
        }
        self.execute(
            Parked {
                tag,
                request,
                verified: false,
                attempts: 0,
            },
            out,
        );
    }

    /// Runs a request, or parks it until what it needs is there.
    fn execute(&mut self, p: Parked, out: &mut Vec<StoreCommand>) {
        match &p.request {
            StoreRequest::Write { .. }
            | StoreRequest::Trim { .. }
            | StoreRequest::Repair { .. }
            | StoreRequest::PullApply { .. } => self.execute_update(p, out),
            StoreRequest::Read { .. } => self.execute_read(p, out),
            StoreRequest::Collect { .. }
            | StoreRequest::Digest { .. }
            | StoreRequest::ChunkDigests { .. }
            | StoreRequest::ListBlocks { .. } => self.execute_listing(p, out),
            StoreRequest::Flush {
                volume,
                watermark,
                forget_below,
            } => {
                let (volume, watermark, forget) = (*volume, *watermark, *forget_below);
                self.execute_flush(p.tag, volume, watermark, forget, out);
            }
            StoreRequest::PutFence { .. }
            | StoreRequest::PutDescriptor { .. }
            | StoreRequest::PutLayers { .. }
            | StoreRequest::ClearSuspect { .. }
            | StoreRequest::DropReplica { .. } => self.queue_admin(p.tag, p.request, out),
            StoreRequest::GetReplica { volume } => {
                let info = self.replica(*volume).ok_or(StoreError::UnknownVolume);
                Self::reply(out, p.tag, info.map(|r| StoreReply::Replica(Box::new(r))));
            }
            StoreRequest::ListReplicas => {
                let mut all: Vec<_> = self
                    .index
                    .replicas
                    .iter()
                    .flatten()
                    .map(|r| self.replica_info(r))
                    .collect();
                all.sort_by_key(|r| r.volume);
                Self::reply(out, p.tag, Ok(StoreReply::Replicas(all)));
            }
            StoreRequest::Flatten { volume } => {
                let reply = self.flatten(*volume).map(|()| StoreReply::Done);
                Self::reply(out, p.tag, reply);
            }
            StoreRequest::LayerProgress => {
                let progress = self.layer_progress();
                Self::reply(out, p.tag, Ok(StoreReply::LayerProgress(progress)));
            }
            StoreRequest::Stats => {
                Self::reply(out, p.tag, Ok(StoreReply::Stats(self.stats())));
            }
            StoreRequest::Shutdown => self.phase = Phase::Closing(p.tag),
        }
    }

    fn execute_flush(
        &mut self,
        tag: u64,
        volume: VolumeId,
        watermark: ashlar_proto::ids::Version,
        forget_below: ashlar_proto::ids::Version,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some(replica) = self.index.replica_mut(volume) else {
            return Self::reply(out, tag, Err(StoreError::UnknownVolume));
        };
        if watermark > replica.watermark {
            replica.watermark = watermark;
            replica.watermark_dirty = true;
        }
        replica.forget_below = forget_below.min(replica.watermark);
        self.want_sync(SyncAction::Reply(tag, Answer::Done), out);
    }

    fn on_disk(&mut self, completion: DiskCompletion, out: &mut Vec<StoreCommand>) {
        let Some(target) = self.io.remove(&completion.token.0) else {
            return;
        };
        if matches!(self.phase, Phase::Failed(_) | Phase::Closed) {
            return;
        }
        if let Target::Discard = target {
            return self.on_discarded(completion.result.map(drop));
        }
        let is_write = !matches!(
            target,
            Target::Read { .. }
                | Target::Sector(_)
                | Target::BurstRead(_)
                | Target::Recovery(_)
                | Target::MergeRead(_)
                | Target::FlattenRead(_)
        );
        let bytes = match completion.result {
            Ok(bytes) => Some(bytes),
            Err(error) if is_write => return self.poison(&error, out),
            Err(_) => {
                self.stats.read_errors += 1;
                None
            }
        };
        self.sync.dirty |= is_write && !matches!(target, Target::Sync | Target::Batch(_, true));
        self.dispatch(target, bytes, out);
    }

    fn dispatch(&mut self, target: Target, bytes: Option<Bytes>, out: &mut Vec<StoreCommand>) {
        match target {
            Target::Batch(sequence, _) | Target::Redirect(sequence) => {
                let due = self.log.complete(sequence);
                self.settle(due, out);
                self.wake_batch_waiters(out);
            }
            Target::Read { job, segment } => self.on_read(job, segment, bytes, out),
            Target::Sector(block) => self.on_sector(block, bytes, out),
            Target::Superblock => self.on_superblock_written(out),
            Target::Admin => self.on_admin_written(out),
            Target::Sync => self.on_synced(out),
            Target::BurstRead(index) => self.on_burst_read(index, bytes, out),
            Target::BurstWrite => self.on_burst_write(),
            Target::HighWater => self.on_high_water_written(out),
            Target::Recovery(id) => self.on_recovery(id, bytes, out),
            Target::Fix => self.on_fix_written(),
            Target::MergeRead(index) => self.on_merge_read(index, bytes, out),
            Target::MergeWrite => self.on_merge_written(out),
            Target::FlattenRead(index) => self.on_flatten_read(index, bytes, out),
            // Its errors are its own: see `on_disk`.
            Target::Discard => {}
        }
    }

    /// Sends answers whose batch is complete, after a sync where that is asked for.
    fn settle(&mut self, due: Vec<Ack>, out: &mut Vec<StoreCommand>) {
        for ack in due {
            if ack.durable && self.log.durable < self.log.completed {
                self.want_sync(SyncAction::Reply(ack.tag, ack.answer), out);
            } else {
                Self::reply(out, ack.tag, Ok(ack.answer.into_reply()));
            }
        }
    }

    fn wake_batch_waiters(&mut self, out: &mut Vec<StoreCommand>) {
        while let Some(entry) = self.batch_waiters.first_entry() {
            if *entry.key() > self.log.completed {
                break;
            }
            for p in entry.remove() {
                self.execute(p, out);
            }
        }
    }

    /// Starts reading a block of sectors unless it is on its way.
    fn load_sectors(&mut self, block: u32, out: &mut Vec<StoreCommand>) {
        if self.cache.contains(block) || self.sector_waiters.contains_key(&block) {
            return;
        }
        self.sector_waiters.insert(block, SmallVec::new());
        let token = self.token(Target::Sector(block));
        out.push(StoreCommand::Disk(DiskCommand::Read {
            token,
            offset: self.sector_block_offset(block),
            length: crate::format::IO_BLOCK,
        }));
    }

    /// Parks a request until these blocks of sectors are cached.
    fn park(&mut self, p: Parked, mut blocks: SmallVec<[u32; 8]>, out: &mut Vec<StoreCommand>) {
        if self.parked.len() >= self.config.queue_requests_max {
            return Self::reply(out, p.tag, Err(StoreError::Busy));
        }
        blocks.sort_unstable();
        blocks.dedup();
        let id = self.next_parked;
        self.next_parked += 1;
        for block in &blocks {
            self.load_sectors(*block, out);
            if let Some(waiters) = self.sector_waiters.get_mut(block) {
                waiters.push(id);
            }
        }
        self.parked.insert(id, (p, blocks.len() as u32));
    }

    fn on_sector(&mut self, block: u32, bytes: Option<Bytes>, out: &mut Vec<StoreCommand>) {
        self.cache.insert(block, bytes.as_deref(), self.salt);
        self.burst_sector(block);
        self.merge_sector(block);
        self.flatten_sector(block);
        for id in self.sector_waiters.remove(&block).unwrap_or_default() {
            let Some((_, missing)) = self.parked.get_mut(&id) else {
                continue;
            };
            *missing -= 1;
            if *missing == 0
                && let Some((p, _)) = self.parked.remove(&id)
            {
                self.execute(p, out);
            }
        }
    }

    /// Everything that may go on after an event.
    fn pump(&mut self, out: &mut Vec<StoreCommand>) {
        match self.phase {
            Phase::Recovering(_) => self.recovery_pump(out),
            Phase::Ready | Phase::Closing(_) => {
                self.release_deferred();
                self.check_marker(out);
                let moves_first = self.moves_go_first();
                self.pump_burst(out);
                self.raise_high_water(out);
                self.pump_discard(out);
                self.start_admin(out);
                self.drain_queue(out);
                self.pump_merge(out);
                self.pump_flatten(out);
                if moves_first {
                    self.pump_burst(out);
                }
                while self.submit_batch(out) && !self.queue.is_empty() {
                    self.drain_queue(out);
                }
                self.pump_shutdown(out);
            }
            Phase::Closed | Phase::Failed(_) => return,
        }
        self.start_superblock(out);
        self.start_sync(out);
    }

    /// Writes the open batch if that is due and possible.
    fn submit_batch(&mut self, out: &mut Vec<StoreCommand>) -> bool {
        if !self.close_wanted || self.log.flights() >= self.config.batches_in_flight_max {
            return false;
        }
        self.close_wanted = false;
        if self.log.open.is_empty() {
            return false;
        }
        let submission = self.log.close();
        self.stats.batches += 1;
        let durable = submission.durable;
        let token = self.token(Target::Batch(submission.sequence, durable));
        self.stats.durable_batches += u64::from(durable);
        out.push(StoreCommand::Disk(DiskCommand::Write {
            token,
            offset: self.geometry.log_offset + submission.offset,
            data: submission.data,
            durable,
        }));
        true
    }

    /// Makes the marker of the last flush durable after a while without other batches.
    fn check_marker(&mut self, out: &mut Vec<StoreCommand>) {
        let behind = self.log.marker < self.log.last_fresh.min(self.log.durable);
        let dirty = behind && self.log.open.is_empty() && self.log.flights() == 0;
        match self.marker_deadline {
            _ if !dirty => self.marker_deadline = None,
            None => self.marker_deadline = Some(self.now.after(self.config.marker_delay)),
            Some(deadline) if deadline <= self.now => {
                self.marker_deadline = None;
                if self.log.claimed() >= self.log.last_fresh.min(self.log.durable) {
                    // A batch says so already; what is missing is its sync.
                    self.want_sync(SyncAction::Marker, out);
                } else if self.log.admits_marker() {
                    self.log.open.forced = true;
                    self.close_wanted = true;
                    self.marker_deadline = Some(self.now.after(self.config.marker_delay));
                }
            }
            Some(_) => {}
        }
    }
}
