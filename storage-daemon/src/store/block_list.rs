//! What a snapshot shows, and how it differs from an older one (docs/snapshots.md, S10): runs of blocks of a replica.
//!
//! Invariants:
//! - A block is *changed* if what reads at the two numbers see differs in version, or if only one of them sees data.
//!   A block that reads as zeroes at both is not changed, whether it was trimmed or never written.
//! - Only pages that a layer between the two numbers may have something of are looked at: the cost is that of what
//!   changed, not that of what is stored.
//! - A part ends with a chunk, after at most [`CHUNKS_PER_PART`] chunks or soon after [`RUNS_PER_PART`] runs, so that
//!   neither its time on the disk's thread nor its size has to do with the volume's.

use ashlar_proto::ids::{BLOCKS_PER_PAGE, BlockRange, ChunkIndex, SnapshotNumber, VolumeId};
use ashlar_proto::wire::BlockState;
use smallvec::SmallVec;

use super::Store;
use super::api::{BlockListOrder, BlockRun, BlockRuns, StoreError, StoreReply};
use super::index::BlockKey;
use super::listing::{Listed, Stop};
use super::replica::{Layer, Replica};
use super::resolve::Resolved;

/// Chunks that one part looks at.
pub(super) const CHUNKS_PER_PART: usize = 16;
/// Runs after which a part ends.
const RUNS_PER_PART: usize = 4096;

/// The two numbers to be compared, as reads name them.
#[derive(Clone, Copy)]
struct Span {
    newer: u32,
    older: Option<u32>,
}

/// The number at which a snapshot is read (S9).
fn read_number(snapshot: SnapshotNumber) -> u32 {
    match snapshot {
        SnapshotNumber::HEAD => snapshot.0,
        SnapshotNumber(n) => n.saturating_sub(1),
    }
}

/// Whether a block reads as zeroes.
fn is_hole(found: &Resolved) -> bool {
    matches!(found.state, BlockState::Absent | BlockState::Tombstone)
}

fn differ(newer: &Resolved, older: &Resolved) -> bool {
    match (is_hole(newer), is_hole(older)) {
        (true, true) => false,
        (false, false) => newer.version != older.version || newer.unversioned || older.unversioned,
        _ => true,
    }
}

/// Pages of which layers may have something: a bit for each.
fn pages_of(layers: &[Layer]) -> u64 {
    let pages = |l: &Layer| match l.tombstones.len() {
        0 => l.occupied(),
        _ => u64::MAX,
    };
    layers.iter().fold(0, |mask, l| mask | pages(l))
}

impl Span {
    /// Of an order, if both snapshots can be read here.
    fn of(order: &BlockListOrder, replica: &Replica) -> Result<Self, StoreError> {
        let readable = |number: u32| replica.canonical(number) == number;
        let span = Self {
            newer: read_number(order.snapshot),
            older: order.base.map(read_number),
        };
        if order.snapshot.0 == 0 || order.base.is_some_and(|base| base >= order.snapshot) {
            return Err(StoreError::Invalid("snapshot numbers"));
        }
        if !readable(span.newer) || !span.older.is_none_or(readable) {
            return Err(StoreError::SnapshotGone);
        }
        Ok(span)
    }
}

impl Store {
    pub(super) fn list_blocks(&mut self, volume: VolumeId, order: &BlockListOrder) -> Listed {
        let replica = self.index.replica(volume);
        // What is damaged is as good as nothing.
        let damage = self.superblock.damage_incarnation;
        let replica = replica.filter(|r| r.header.sound >= damage);
        let replica = replica.ok_or(Stop::Refuse(StoreError::UnknownVolume))?;
        let span = Span::of(order, replica).map_err(Stop::Refuse)?;
        let group = (order.group.0, order.group_count);
        let (slot, mut chunks) = self.chunks_of(volume, group, None, order.from.0)?;
        let after = (chunks.len() > CHUNKS_PER_PART).then(|| chunks[CHUNKS_PER_PART]);
        chunks.truncate(CHUNKS_PER_PART);
        let mut runs = Vec::new();
        let stop = |runs, next: Option<u32>| {
            let next = next.map(ChunkIndex);
            Ok(StoreReply::Blocks(BlockRuns { runs, next }))
        };
        for (seen, chunk) in chunks.into_iter().enumerate() {
            if runs.len() >= RUNS_PER_PART {
                return stop(runs, Some(chunk));
            }
            match self.chunk_runs(slot, chunk, span) {
                Ok(found) => runs.extend(found),
                Err(need) if seen == 0 => return Err(Stop::Sectors(need)),
                Err(_) => return stop(runs, Some(chunk)),
            }
        }
        stop(runs, after)
    }

    /// Pages of a chunk in which blocks may differ.
    fn pages_between(&self, slot: u32, chunk: u32, span: Span) -> u64 {
        let own = self.index.by_slot(slot).and_then(|r| r.chunks.get(&chunk));
        let floor = span.older.map_or(0, |older| older.saturating_add(1));
        let own = pages_of(own.map_or(&[][..], |c| c.between(floor, span.newer)));
        match span.older {
            // What is inherited is the same at both numbers, unless a layer between them hides it.
            Some(_) => own,
            None => own | self.index.inherited_pages(slot, chunk),
        }
    }

    /// The runs of a chunk, ascending; or sectors to read first.
    fn chunk_runs(
        &mut self,
        slot: u32,
        chunk: u32,
        span: Span,
    ) -> Result<Vec<BlockRun>, SmallVec<[u32; 8]>> {
        let mut need: SmallVec<[u32; 8]> = SmallVec::new();
        let mut runs: Vec<BlockRun> = Vec::new();
        let mut pages = self.pages_between(slot, chunk, span);
        while pages != 0 {
            let page = pages.trailing_zeros() as u16;
            pages &= pages - 1;
            let first = page * BLOCKS_PER_PAGE as u16;
            for block in first..first + BLOCKS_PER_PAGE as u16 {
                match self.data_if_changed(slot, chunk, block, span) {
                    Err(sectors) => {
                        need.push(sectors);
                        break;
                    }
                    Ok(Some(data)) => push_block(&mut runs, chunk, block, data),
                    Ok(None) => {}
                }
            }
        }
        if need.is_empty() { Ok(runs) } else { Err(need) }
    }

    /// Whether a changed block has data; `None` if it did not change.
    fn data_if_changed(
        &mut self,
        slot: u32,
        chunk: u32,
        block: u16,
        span: Span,
    ) -> Result<Option<bool>, u32> {
        let key = |layer| BlockKey {
            slot,
            chunk,
            layer,
            block,
        };
        let (newer, _) = self.find_at_or_below(key(span.newer))?;
        let changed = match span.older {
            None => !is_hole(&newer),
            Some(older) => differ(&newer, &self.find_at_or_below(key(older))?.0),
        };
        Ok(changed.then_some(!is_hole(&newer)))
    }
}

/// Adds a block to the last run, or begins another.
fn push_block(runs: &mut Vec<BlockRun>, chunk: u32, block: u16, data: bool) {
    if let Some(last) = runs.last_mut()
        && last.data == data
        && last.range.end() == block
    {
        last.range.count += 1;
        return;
    }
    let range = BlockRange {
        chunk: ChunkIndex(chunk),
        first: block,
        count: 1,
    };
    runs.push(BlockRun { range, data });
}
