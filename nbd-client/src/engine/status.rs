//! Block status: which blocks are allocated, from the digests of one in-sync replica per chunk.
//!
//! Invariants:
//! - One answer covers at most [`CHUNKS_MAX`] chunks, so its cost is bounded; callers ask on.
//! - The highest version of a block decides (docs/snapshots.md, S9): `Data` and `Bad` are allocated, tombstones are holes.

use std::collections::BTreeMap;

use ashlar_proto::ids::{BLOCK_SIZE, BLOCKS_PER_CHUNK, CHUNK_SIZE, ChunkIndex, Version};
use ashlar_proto::wire::{BlockState, Cursor, Digest, Entries, RequestBody};

use super::api::Extent;
use super::op::OpKind;
use super::reader::Role;
use super::replica::Purpose;
use super::session::Session;
use super::slots::Key;

/// Chunks (64 MiB) that one answer covers.
const CHUNKS_MAX: u64 = 16;
const WORDS: usize = BLOCKS_PER_CHUNK as usize / 64;

/// Allocation of the chunks of a request.
#[derive(Debug)]
pub(super) struct StatusMap {
    offset: u64,
    length: u64,
    first: u32,
    chunks: Vec<[u64; WORDS]>,
    /// The versions that decided so far, of the chunks that have any.
    versions: BTreeMap<u32, Box<[Version]>>,
}

impl StatusMap {
    pub(super) fn new(offset: u64, length: u64) -> Self {
        let first = offset / CHUNK_SIZE;
        let end = (offset + length).min((first + CHUNKS_MAX) * CHUNK_SIZE);
        let count = end.div_ceil(CHUNK_SIZE).saturating_sub(first);
        Self {
            offset,
            length: end - offset,
            first: first as u32,
            chunks: vec![[0; WORDS]; count as usize],
            versions: BTreeMap::new(),
        }
    }

    fn set(&mut self, chunk: u32, block: u16, version: Version, allocated: bool) {
        let none = || vec![Version::ZERO; BLOCKS_PER_CHUNK as usize].into();
        let versions = self.versions.entry(chunk).or_insert_with(none);
        match versions.get_mut(block as usize) {
            Some(known) if *known <= version => *known = version,
            _ => return,
        }
        let Some(map) = self
            .chunks
            .get_mut((chunk.wrapping_sub(self.first)) as usize)
        else {
            return;
        };
        let Some(word) = map.get_mut(block as usize / 64) else {
            return;
        };
        let bit = 1 << (block % 64);
        *word = if allocated { *word | bit } else { *word & !bit };
    }

    fn get(&self, block: u64) -> bool {
        let index = block - u64::from(self.first) * u64::from(BLOCKS_PER_CHUNK);
        let within = (index % u64::from(BLOCKS_PER_CHUNK)) as usize;
        self.chunks
            .get((index / u64::from(BLOCKS_PER_CHUNK)) as usize)
            .is_some_and(|map| map[within / 64] >> (within % 64) & 1 == 1)
    }

    /// The answer: adjacent runs from the offset asked for.
    pub(super) fn extents(&self) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        let block = BLOCK_SIZE as u64;
        let (mut at, end) = (self.offset, self.offset + self.length);
        while at < end {
            let allocated = self.get(at / block);
            let stop = ((at / block + 1) * block).min(end);
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.length += stop - at,
                _ => extents.push(Extent {
                    length: stop - at,
                    allocated,
                }),
            }
            at = stop;
        }
        extents
    }
}

impl Session {
    pub(super) fn begin_status(&mut self, op: Key) {
        let Some(OpKind::Status(map)) = self.ops.get(op).map(|o| &o.kind) else {
            return;
        };
        let (first, count) = (map.first, map.chunks.len() as u32);
        for chunk in first..first + count {
            self.op_add_part(op);
            self.ask_status(
                op,
                chunk,
                Cursor {
                    chunk: ChunkIndex(chunk),
                    ..Cursor::default()
                },
            );
        }
    }

    fn ask_status(&mut self, op: Key, chunk: u32, from: Cursor) {
        let g = self.view.group_of(ChunkIndex(chunk)).0 as usize;
        match self.choose_source(g, chunk, Default::default()) {
            Some(peer) => {
                let digest = Digest {
                    chunk: ChunkIndex(chunk),
                    from,
                };
                self.send(
                    peer,
                    Purpose::Digest { op, chunk },
                    RequestBody::Digest(digest),
                );
            }
            None => self.status_parked.push((op, chunk)),
        }
    }

    pub(super) fn on_digest(&mut self, op: Key, chunk: u32, entries: &Entries) {
        let newest = self.read_number();
        if let Some(OpKind::Status(map)) = self.ops.get_mut(op).map(|o| &mut o.kind) {
            for entry in entries.entries.iter().filter(|e| e.at.snapshot <= newest) {
                let allocated = matches!(entry.state, BlockState::Data | BlockState::Bad);
                map.set(chunk, entry.at.block, entry.version, allocated);
            }
        }
        match entries.next.filter(|next| next.chunk.0 == chunk) {
            Some(next) => self.ask_status(op, chunk, next),
            None if self.role == Role::Reader && !self.reader_lease_holds() => {
                self.status_parked.push((op, chunk));
            }
            None => self.op_part_done(op, None),
        }
    }

    /// A request got no answer: the chunk is asked for again.
    pub(super) fn status_void(&mut self, op: Key, chunk: u32) {
        self.status_parked.push((op, chunk));
        self.pump = true;
    }

    pub(super) fn status_pump(&mut self) {
        if self.status_parked.is_empty() {
            return;
        }
        if self.role == Role::Reader && !self.reader_lease_holds() {
            return;
        }
        for (op, chunk) in std::mem::take(&mut self.status_parked) {
            self.ask_status(
                op,
                chunk,
                Cursor {
                    chunk: ChunkIndex(chunk),
                    ..Cursor::default()
                },
            );
        }
    }
}
