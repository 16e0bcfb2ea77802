//! Merging layers, the two ways: a page's sector under a new name, or its blocks through the log.
//!
//! Invariants: those of `merge`; and
//! - Data is verified when it is moved. What does not match, or cannot be read, is bad under its version from then on.
//! - Between the look at what a page has and the records nothing comes: what changed while data was read is not moved.

use std::collections::BTreeSet;

use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::{BLOCKS_PER_PAGE, BlockRange, ChunkIndex, SnapshotNumber, Version};
use ashlar_proto::wire::BlockState;
use bytes::Bytes;
use smallvec::smallvec;

use super::api::StoreCommand;
use super::cache::SECTORS_PER_BLOCK;
use super::index::{BlockKey, Overlay, PageKey, Place};
use super::merge::{MergePage, Step};
use super::pieces::{Part, Pieces};
use super::resolve::Resolved;
use super::sync::SyncAction;
use super::{Store, Target};
use crate::format::{ENTRY_BYTES, PageSector, PageState, Record, RecordKind};

/// What became of a page whose blocks were to move.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moved {
    Done,
    /// It is not as it was planned.
    Changed,
    /// The log takes no more of it now.
    NoRoom,
}

impl Store {
    pub(super) fn begin_relabel(
        &mut self,
        slot: u32,
        chunk: u32,
        from: u32,
        pages: Vec<(u8, u32)>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some(replica) = self.index.by_slot(slot) else {
            return;
        };
        let to = replica.canonical(from);
        let (number, volume) = (replica.header.replica, replica.header.volume);
        let bound = replica.home_highest;
        self.generation += 1;
        let mut pinned = BTreeSet::new();
        for (page, physical) in &pages {
            let mut sector = PageSector::free(*physical, self.generation);
            sector.blocks = self.home_blocks(*physical, bound);
            sector.state = PageState::Owned;
            sector.replica = number;
            sector.volume = volume;
            sector.chunk = ChunkIndex(chunk);
            sector.layer = SnapshotNumber(to);
            sector.page = *page;
            self.cache.update(&sector, self.salt);
            pinned.insert(*physical / SECTORS_PER_BLOCK);
        }
        let mut outstanding = 0;
        for block in &pinned {
            self.cache.pin(*block);
            if let Some(bytes) = self.cache.bytes(*block).map(super::space::block_of) {
                outstanding += 1;
                let offset = self.sector_block_offset(*block);
                self.write_block(Target::MergeWrite, offset, bytes, out);
            }
        }
        let step = Step::Relabel {
            from,
            to,
            pages,
            pinned,
            outstanding,
        };
        self.merge.step = Some((slot, chunk, step));
    }

    pub(super) fn on_merge_written(&mut self, out: &mut Vec<StoreCommand>) {
        if let Some((_, _, Step::Relabel { outstanding, .. })) = &mut self.merge.step {
            *outstanding -= 1;
            if *outstanding == 0 {
                self.want_sync(SyncAction::Merge, out);
            }
        }
    }

    /// The sectors of relabelled pages are durable.
    pub(super) fn merge_synced(&mut self) {
        let Some((slot, chunk, step)) = self.merge.step.take() else {
            return;
        };
        let Step::Relabel {
            from,
            to,
            pages,
            pinned,
            ..
        } = step
        else {
            return;
        };
        for block in pinned {
            self.cache.unpin(block);
        }
        if let Some(replica) = self.index.by_slot_mut(slot) {
            let highest = replica
                .layer(chunk, from)
                .map_or(Version::ZERO, |l| l.highest);
            for (page, physical) in pages {
                let key = |layer| PageKey {
                    slot,
                    chunk,
                    layer,
                    page,
                };
                replica.clear_home(key(from));
                replica.note(chunk, to, highest);
                replica.set_home(key(to), physical);
                self.stats.merged_pages += 1;
            }
            replica.prune(chunk);
        }
        self.end_step(slot, chunk, true);
    }

    pub(super) fn begin_move(
        &mut self,
        slot: u32,
        chunk: u32,
        from: u32,
        pages: &[MergePage],
        out: &mut Vec<StoreCommand>,
    ) {
        let moved = pages.iter().flat_map(|p| &p.moved);
        let data = moved.filter(|(_, r)| r.state == BlockState::Data);
        let offsets = data.map(|(_, r)| r.offset).collect();
        let pieces = self.read_pieces(offsets, Target::MergeRead, out);
        let complete = pieces.is_complete();
        let pages = pages.iter().fold(0, |map, p| map | 1 << p.page);
        let step = Step::Read {
            from,
            pages,
            pieces,
        };
        self.merge.step = Some((slot, chunk, step));
        if complete {
            self.finish_move();
        }
    }

    /// Begins to read the blocks at these offsets.
    pub(super) fn read_pieces(
        &mut self,
        offsets: Vec<u64>,
        target: fn(u32) -> Target,
        out: &mut Vec<StoreCommand>,
    ) -> Pieces {
        let (pieces, parts) = Pieces::new(offsets);
        self.read_parts(parts, target, out);
        pieces
    }

    /// Reads parts of what a step needs.
    pub(super) fn read_parts(
        &mut self,
        parts: Vec<Part>,
        target: fn(u32) -> Target,
        out: &mut Vec<StoreCommand>,
    ) {
        for (index, offset, length) in parts {
            let token = self.token(target(index));
            out.push(StoreCommand::Disk(DiskCommand::Read {
                token,
                offset,
                length,
            }));
        }
    }

    pub(super) fn on_merge_read(
        &mut self,
        index: u32,
        bytes: Option<Bytes>,
        out: &mut Vec<StoreCommand>,
    ) {
        let Some((_, _, Step::Read { pieces, .. })) = &mut self.merge.step else {
            return;
        };
        let singles = pieces.arrived(index, bytes);
        if pieces.is_complete() {
            return self.finish_move();
        }
        self.read_parts(singles, Target::MergeRead, out);
    }

    /// The data is there: what is still as it was when it was read enters the log.
    fn finish_move(&mut self) {
        let Some((
            slot,
            chunk,
            Step::Read {
                from,
                pages,
                pieces,
            },
        )) = self.merge.step.take()
        else {
            return;
        };
        let to = self.index.by_slot(slot).map(|r| r.canonical(from));
        let Some(to) = to.filter(|to| *to != from) else {
            return;
        };
        let (mut done, mut moved) = (0, Moved::Done);
        // Ranges of one version become one range again.
        let mut trims: Vec<(BlockRange, Version)> = Vec::new();
        for page in (0..64u8).filter(|page| pages & (1 << page) != 0) {
            let key = PageKey {
                slot,
                chunk,
                layer: from,
                page,
            };
            moved = self.move_page(key, to, &pieces, &mut trims);
            if moved != Moved::Done {
                break;
            }
            done += 1;
        }
        for (range, version) in trims {
            self.append_moved_trim(slot, range, to, version);
        }
        // What changed meanwhile is planned anew; where there is no room, others are first.
        self.end_step(slot, chunk, done > 0 || moved == Moved::Changed);
        if moved == Moved::NoRoom {
            self.merge.at = (slot, chunk.saturating_add(1));
        }
    }

    /// Logs one page's blocks under their new name, and collects its tombstones.
    fn move_page(
        &mut self,
        from: PageKey,
        to: u32,
        pieces: &Pieces,
        trims: &mut Vec<(BlockRange, Version)>,
    ) -> Moved {
        let Ok(states) = self.page_states(from, to) else {
            return Moved::Changed;
        };
        let Some(number) = self.index.by_slot(from.slot).map(|r| r.header.replica) else {
            return Moved::Changed;
        };
        let wins = states.iter().filter(|(_, here, there)| here.beats(there));
        let (tombstones, blocks): (Vec<_>, Vec<_>) = wins
            .map(|(block, here, _)| (*block, *here))
            .partition(|(_, r)| r.state == BlockState::Tombstone);
        let is_data = |r: &Resolved| r.state == BlockState::Data;
        let read = |r: &Resolved| !is_data(r) || pieces.covers(r.offset);
        let target = PageKey { layer: to, ..from };
        let homed = blocks.is_empty() || !self.index.needs_reservation(target);
        let chunk = ChunkIndex(from.chunk);
        let mut ranges = trims.clone();
        for (block, r) in &tombstones {
            match ranges.last_mut() {
                Some((range, version)) if range.end() == *block && *version == r.version => {
                    range.count += 1;
                }
                _ => {
                    let range = BlockRange {
                        chunk,
                        first: *block,
                        count: 1,
                    };
                    ranges.push((range, r.version));
                }
            }
        }
        let data = blocks.iter().filter(|(_, r)| is_data(r)).count();
        let records = blocks.len() + ranges.len() + BLOCKS_PER_PAGE as usize;
        let room = self
            .admit_log(records * (ENTRY_BYTES + 4), data as u32)
            .is_ok()
            && (ranges.is_empty() || self.admit_tombstone(ranges.len() as u64).is_ok());
        if !(blocks.iter().all(|(_, r)| read(r)) && homed) {
            return Moved::Changed;
        }
        if !room {
            return Moved::NoRoom;
        }
        *trims = ranges;
        self.log.open.fresh = true;
        self.close_wanted = true;
        let page = BlockRange {
            chunk,
            first: from.block(0).block,
            count: BLOCKS_PER_PAGE as u16,
        };
        self.append_erase(from.slot, number, page, from.layer, |i| {
            states.iter().any(|(b, _, _)| *b == page.first + i)
        });
        for (block, r) in blocks {
            let bytes = is_data(&r).then(|| pieces.block(r.offset)).flatten();
            let key = target.block((block % BLOCKS_PER_PAGE as u16) as u8);
            self.append_moved(key, number, &r, bytes);
        }
        self.stats.merged_pages += 1;
        Moved::Done
    }

    fn append_moved_trim(&mut self, slot: u32, range: BlockRange, to: u32, version: Version) {
        let Some(number) = self.index.by_slot(slot).map(|r| r.header.replica) else {
            return;
        };
        let (layer, batch) = (SnapshotNumber(to), self.log.next_sequence);
        self.index.apply_trim(slot, range, layer, version, batch);
        self.log.push(Record {
            replica: number,
            range,
            layer,
            version,
            kind: RecordKind::Trim,
        });
    }

    /// Logs a block of a lower layer as one of the canonical layer.
    pub(super) fn append_moved(
        &mut self,
        key: BlockKey,
        number: u64,
        r: &Resolved,
        bytes: Option<Bytes>,
    ) {
        let range = BlockRange {
            chunk: ChunkIndex(key.chunk),
            first: key.block,
            count: 1,
        };
        let layer = SnapshotNumber(key.layer);
        let batch = self.log.next_sequence;
        let good = bytes.filter(|b| crc32c::crc32c(b) == r.checksum);
        let (place, kind) = match (r.state, good) {
            (BlockState::Data, Some(bytes)) => {
                let place = Place::Log(self.log.open.data_blocks);
                self.log.push_block(&[&bytes]);
                self.stats.log_blocks += 1;
                (place, RecordKind::Data(smallvec![r.checksum]))
            }
            (BlockState::Data, None) => {
                self.stats.checksum_errors += 1;
                (Place::Bad, RecordKind::Bad)
            }
            _ if r.unversioned => (Place::BadUnversioned, RecordKind::BadUnversioned),
            _ => (Place::Bad, RecordKind::Bad),
        };
        let entry = Overlay {
            batch,
            version: r.version,
            checksum: r.checksum,
            place,
        };
        self.index.apply_data(key, entry, &mut self.allocator);
        self.log.push(Record {
            replica: number,
            range,
            layer,
            version: r.version,
            kind,
        });
    }
}
