//! The layer list at work (docs/snapshots.md, S7): requests name canonical layers, and what replaces a block whatever
//! its version was leaves nothing of it in the layers that are one with its own.
//!
//! Invariants:
//! - Whatever enters the log enters a layer that was canonical at that moment.
//! - Naming is repeated whenever a request is looked at again: canonical layers only become fewer, so that the name
//!   under an older list has the same name as the number itself.

use ashlar_proto::ids::{BlockRange, SnapshotNumber, Version};
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{self, BlockState};
use smallvec::SmallVec;

use super::Store;
use super::api::{LayerProgress, PullBlock, StoreRequest};
use super::index::{BlockKey, Index};
use super::replica::Layer;
use crate::format::{Record, RecordKind};

/// Names the layers of a merge. Blocks that fall together: the one with the highest version is the block.
fn name_pulled(list: &LayerList, blocks: &mut Vec<PullBlock>) {
    let mut changed = false;
    for b in blocks.iter_mut() {
        let name = list.canonical(b.snapshot);
        changed |= name != b.snapshot;
        b.snapshot = name;
    }
    if changed {
        blocks.sort_by(|a, b| {
            let place = (a.snapshot, a.block).cmp(&(b.snapshot, b.block));
            place.then(b.version.cmp(&a.version))
        });
        blocks.dedup_by_key(|b| (b.snapshot, b.block));
    }
}

impl Index {
    /// The layers below a canonical one that are one with it.
    pub(super) fn others_of_class(&self, key: BlockKey) -> &[Layer] {
        let Some(replica) = self.by_slot(key.slot) else {
            return &[];
        };
        let Some(chunk) = replica.chunks.get(&key.chunk) else {
            return &[];
        };
        match key.layer.checked_sub(1) {
            Some(below) => chunk.between(replica.oldest_of_class(key.layer), below),
            None => &[],
        }
    }
}

impl Store {
    /// Gives the layers of an update their canonical names.
    pub(super) fn name_layers(&self, request: &mut StoreRequest) {
        let volume = match request {
            StoreRequest::Write { volume, .. }
            | StoreRequest::Trim { volume, .. }
            | StoreRequest::PullApply { volume, .. } => *volume,
            _ => return,
        };
        let Some(replica) = self.index.replica(volume) else {
            return;
        };
        let list = &replica.layers;
        match request {
            StoreRequest::Write { write, .. } => {
                write.snapshot = list.canonical(write.snapshot);
            }
            StoreRequest::Trim { trim, .. } => trim.snapshot = list.canonical(trim.snapshot),
            StoreRequest::PullApply { blocks, .. } => name_pulled(list, blocks),
            _ => {}
        }
    }

    /// The canonical layer of the block that a read at a repair's number sees: that block is meant. `None`: there is
    /// none (any more). Or sectors to read first.
    pub(super) fn repaired_layer(
        &mut self,
        slot: u32,
        write: &wire::Write,
    ) -> Result<Option<SnapshotNumber>, u32> {
        let number = write.snapshot.0;
        let key = BlockKey {
            slot,
            chunk: write.range.chunk.0,
            layer: self
                .index
                .by_slot(slot)
                .map_or(number, |r| r.canonical(number)),
            block: write.range.first,
        };
        let (found, layer) = self.find_at_or_below(key)?;
        let known = found.state != BlockState::Absent;
        let replica = self.index.by_slot(slot).filter(|_| known);
        Ok(replica.map(|r| SnapshotNumber(r.canonical(layer))))
    }

    /// Layers below a canonical one that are one with it and may have something of a range.
    pub(super) fn stale_layers(
        &self,
        slot: u32,
        range: BlockRange,
        layer: SnapshotNumber,
    ) -> SmallVec<[u32; 2]> {
        let key = |block| BlockKey {
            slot,
            chunk: range.chunk.0,
            layer: layer.0,
            block,
        };
        let pages = key(range.first).page().page..=key(range.end() - 1).page().page;
        let others = self.index.others_of_class(key(range.first)).iter();
        others
            .filter(|l| pages.clone().any(|page| !l.is_vacant(page)))
            .map(|l| l.number)
            .collect()
    }

    /// Makes blocks of a range absent in one layer: those whose place in the range is chosen.
    pub(super) fn append_erase(
        &mut self,
        slot: u32,
        number: u64,
        range: BlockRange,
        layer: u32,
        chosen: impl Fn(u16) -> bool,
    ) {
        let batch = self.log.next_sequence;
        let mut at = 0;
        while at < range.count {
            let mut end = at;
            while end < range.count && chosen(end) {
                let key = BlockKey {
                    slot,
                    chunk: range.chunk.0,
                    layer,
                    block: range.first + end,
                };
                self.index.apply_erase(key, batch);
                end += 1;
            }
            if end > at {
                self.log.push(Record {
                    replica: number,
                    range: BlockRange {
                        chunk: range.chunk,
                        first: range.first + at,
                        count: end - at,
                    },
                    layer: SnapshotNumber(layer),
                    version: Version::ZERO,
                    kind: RecordKind::Erase,
                });
            }
            at = end + 1;
        }
    }

    /// Of every replica, in the order of volumes.
    pub(super) fn layer_progress(&self) -> Vec<LayerProgress> {
        let replicas = self.index.replicas.iter().flatten().map(|r| LayerProgress {
            volume: r.header.volume,
            revision: r.layers.revision,
            chunks_left: r.garbage.len() as u64,
            inherits: r.base.is_some(),
            inherited_left: self.inherited_left(r),
            pages: r.pages,
        });
        let mut all: Vec<_> = replicas.collect();
        all.sort_by_key(|p| p.volume);
        all
    }

    /// A newer layer list is durable.
    pub(super) fn adopt_layers(&mut self, slot: u32, list: LayerList) {
        let Some(replica) = self.index.by_slot_mut(slot) else {
            return;
        };
        if let Some(descriptor) = &mut replica.descriptor {
            descriptor.layers = list.clone();
        }
        replica.layers = list;
        replica.find_garbage();
        self.merge.wake();
    }
}
