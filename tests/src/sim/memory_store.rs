//! A reference chunk store in memory: the store's interface with the simplest semantics that satisfy it.
//!
//! It lets the session and the disk engine be simulated against something obviously right, so that a
//! failing seed tells whether the chunk store is to blame. It does a dummy I/O on its [`SimDisk`] for
//! every request, so answers are delayed, reordered, and fail when the disk fails.
//!
//! Persistence: a request takes effect when its I/O completes; a sync makes durable what had taken
//! effect when it was submitted. The contents live in [`Media`], which outlives the process.
//!
//! [`SimDisk`]: ashlar_platform::sim::SimDisk

mod requests;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use ashlar_platform::clock::Time;
use ashlar_platform::disk::{DiskCommand, IoToken};
use ashlar_platform::sim::Rng;
use ashlar_proto::ids::{ChunkIndex, Incarnation, SnapshotNumber, Version, VolumeId};
use ashlar_proto::wire::{BlockState, Cursor};
use bytes::Bytes;
use smallvec::smallvec;
use storage_daemon::engine::ChunkStore;
use storage_daemon::store::{
    ReplicaInfo, StoreCommand, StoreError, StoreEvent, StoreIdentity, StoreReply, StoreRequest,
};

/// Entries per answer: small, so that paging is exercised.
const PAGE_ENTRIES: usize = 7;
const BLOCK: usize = 4096;

#[derive(Clone, Debug)]
struct Block {
    state: BlockState,
    version: Version,
    checksum: u32,
    data: Bytes,
}

#[derive(Clone, Debug)]
struct Replica {
    info: ReplicaInfo,
    blocks: BTreeMap<Cursor, Block>,
}

/// What is on the medium of one disk.
#[derive(Clone, Debug)]
pub struct Media {
    /// Who the disk is.
    pub identity: StoreIdentity,
    current: BTreeMap<VolumeId, Replica>,
    durable: BTreeMap<VolumeId, Replica>,
    /// Number of the sync that made `durable`: an older one that ends later changes nothing.
    durable_as_of: u64,
}

impl Media {
    /// An empty disk.
    pub fn new(identity: StoreIdentity) -> Self {
        Self {
            identity,
            current: BTreeMap::new(),
            durable: BTreeMap::new(),
            durable_as_of: 0,
        }
    }

    /// The machine lost power: blocks that are not durable are kept or lost one by one; the store begins
    /// another life.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        let lose_all = rng.chance(1, 4);
        let mut after = self.durable.clone();
        for (volume, replica) in &mut after {
            let Some(newer) = self.current.get(volume) else {
                continue;
            };
            for (at, block) in &newer.blocks {
                let known = replica
                    .blocks
                    .get(at)
                    .is_some_and(|b| b.version >= block.version);
                if !known && !lose_all && rng.coin() {
                    replica.info.highest = replica.info.highest.max(block.version);
                    replica.blocks.insert(*at, block.clone());
                }
            }
            replica.info.written |= !replica.blocks.is_empty();
        }
        for replica in after.values_mut() {
            replica.info.suspect = true;
        }
        self.identity.incarnation = Incarnation(rng.next_u64() | 1);
        self.identity.incarnation_changed = true;
        self.current = after.clone();
        self.durable = after;
        self.durable_as_of = 0;
    }
}

enum Work {
    Ready,
    Request {
        tag: u64,
        request: StoreRequest,
    },
    /// A write that must be durable, or a flush: the second I/O is a sync of what was current then.
    Synced {
        tag: u64,
        reply: StoreReply,
        as_of: u64,
        snapshot: BTreeMap<VolumeId, Replica>,
    },
}

/// The store of one process.
pub struct MemoryStore {
    media: Rc<RefCell<Media>>,
    work: BTreeMap<u64, Work>,
    next_token: u64,
    poisoned: bool,
    started: bool,
}

impl MemoryStore {
    /// A store on a medium; becomes ready after its first I/O.
    pub fn open(media: Rc<RefCell<Media>>) -> Self {
        media.borrow_mut().durable_as_of = 0;
        Self {
            media,
            work: BTreeMap::new(),
            next_token: 1,
            poisoned: false,
            started: false,
        }
    }

    fn submit(&mut self, work: Work, sync: bool, out: &mut Vec<StoreCommand>) {
        let token = IoToken(self.next_token);
        self.next_token += 1;
        self.work.insert(token.0, work);
        out.push(StoreCommand::Disk(if sync {
            DiskCommand::Sync { token }
        } else {
            let data = smallvec![Bytes::from_static(&[0; 512])];
            DiskCommand::Write {
                durable: false,
                token,
                offset: 0,
                data,
            }
        }));
    }

    fn on_done(&mut self, work: Work, out: &mut Vec<StoreCommand>) {
        match work {
            Work::Ready => out.push(StoreCommand::Ready(self.media.borrow().identity)),
            Work::Synced {
                tag,
                reply,
                as_of,
                snapshot,
            } => {
                let mut media = self.media.borrow_mut();
                if as_of > media.durable_as_of {
                    media.durable = snapshot;
                    media.durable_as_of = as_of;
                }
                out.push(StoreCommand::Reply {
                    tag,
                    result: Ok(reply),
                });
            }
            Work::Request { tag, request } => {
                let durable = is_durable(&request);
                let result = self.media.borrow_mut().execute(request);
                match result {
                    Ok(reply) if durable => {
                        let snapshot = self.media.borrow().current.clone();
                        let as_of = self.next_token;
                        self.submit(
                            Work::Synced {
                                tag,
                                reply,
                                as_of,
                                snapshot,
                            },
                            true,
                            out,
                        );
                    }
                    result => out.push(StoreCommand::Reply { tag, result }),
                }
            }
        }
    }

    fn poison(&mut self, message: String, out: &mut Vec<StoreCommand>) {
        for work in std::mem::take(&mut self.work).into_values() {
            if let Work::Request { tag, .. } | Work::Synced { tag, .. } = work {
                out.push(StoreCommand::Reply {
                    tag,
                    result: Err(StoreError::DiskFailed),
                });
            }
        }
        if !std::mem::replace(&mut self.poisoned, true) {
            out.push(StoreCommand::Poisoned {
                kind: std::io::ErrorKind::Other,
                message,
            });
        }
    }
}

fn is_durable(request: &StoreRequest) -> bool {
    match request {
        StoreRequest::Write { write, .. } => write.durable,
        StoreRequest::Trim { trim, .. } => trim.durable,
        StoreRequest::Flush { .. }
        | StoreRequest::PutFence { .. }
        | StoreRequest::PutDescriptor { .. }
        | StoreRequest::PutLayers { .. }
        | StoreRequest::ClearSuspect { .. }
        | StoreRequest::DropReplica { .. }
        | StoreRequest::Shutdown => true,
        _ => false,
    }
}

impl ChunkStore for MemoryStore {
    fn step(&mut self, _now: Time, event: StoreEvent, out: &mut Vec<StoreCommand>) {
        match event {
            StoreEvent::Request { tag, request } => {
                if self.poisoned {
                    out.push(StoreCommand::Reply {
                        tag,
                        result: Err(StoreError::DiskFailed),
                    });
                } else {
                    self.submit(Work::Request { tag, request }, false, out);
                }
            }
            StoreEvent::Disk(completion) => {
                let Some(work) = self.work.remove(&completion.token.0) else {
                    return;
                };
                match completion.result {
                    Ok(_) => self.on_done(work, out),
                    Err(error) => {
                        self.work.insert(completion.token.0, work);
                        self.poison(error.to_string(), out);
                    }
                }
            }
            StoreEvent::Tick => {
                if !std::mem::replace(&mut self.started, true) {
                    self.submit(Work::Ready, false, out);
                }
            }
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        (!self.started).then_some(Time(0))
    }
}

fn at(chunk: ChunkIndex, snapshot: SnapshotNumber, block: u16) -> Cursor {
    Cursor {
        chunk,
        snapshot,
        block,
    }
}

fn chunk_range(chunk: ChunkIndex) -> Range<Cursor> {
    let next = ChunkIndex(chunk.0 + 1);
    at(chunk, SnapshotNumber(0), 0)..at(next, SnapshotNumber(0), 0)
}
