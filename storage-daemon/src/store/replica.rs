//! A replica in memory: its chunks, their layers, and the home page of each page of a layer.
//!
//! Invariants:
//! - `home_highest` is at least the highest version in any home page of the replica, `Layer::highest` at least that
//!   of any block of the layer.
//! - Layers of a chunk ascend by number. A layer that holds nothing may stay until it is merged.
//! - `garbage` has every chunk with a layer whose number is not canonical under `layers` (docs/snapshots.md, S7).
//! - `layer_pages` counts the home pages of each layer number; none is 0.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::descriptor::VolumeDescriptor;
use ashlar_proto::ids::{SnapshotNumber, Version};
use ashlar_proto::layers::LayerList;
use smallvec::SmallVec;

use super::clones::Base;
use super::flatten::Flatten;
use super::index::PageKey;
use super::tombstones::Tombstones;
use crate::format::ReplicaHeader;

/// Home pages of one layer of a chunk: a bitmap of those present, and their numbers in order.
#[derive(Clone, Debug, Default)]
pub(super) struct PageTable {
    present: u64,
    physical: Vec<u32>,
}

impl PageTable {
    fn rank(&self, page: u8) -> usize {
        (self.present & ((1u64 << page) - 1)).count_ones() as usize
    }

    pub(super) fn get(&self, page: u8) -> Option<u32> {
        (self.present & (1 << page) != 0).then(|| self.physical[self.rank(page)])
    }

    fn set(&mut self, page: u8, physical: u32) -> Option<u32> {
        let at = self.rank(page);
        if self.present & (1 << page) != 0 {
            return Some(std::mem::replace(&mut self.physical[at], physical));
        }
        self.present |= 1 << page;
        if self.physical.len() == self.physical.capacity() {
            self.physical
                .reserve_exact((self.physical.len() / 2).max(1));
        }
        self.physical.insert(at, physical);
        None
    }

    fn remove(&mut self, page: u8) -> Option<u32> {
        let physical = self.get(page)?;
        self.physical.remove(self.rank(page));
        self.present &= !(1 << page);
        Some(physical)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u8, u32)> {
        (0..64u8)
            .filter(|p| self.present & (1 << p) != 0)
            .zip(self.physical.iter().copied())
    }
}

/// One layer of a chunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Layer {
    pub(super) number: u32,
    /// At least the highest version in it.
    pub(super) highest: Version,
    /// Pages with entries in the overlay, a bit each.
    pub(super) logged: u64,
    pub(super) pages: PageTable,
    pub(super) tombstones: Tombstones,
}

impl Layer {
    /// Whether no block of a page can be in this layer.
    pub(super) fn is_vacant(&self, page: u8) -> bool {
        (self.pages.present | self.logged) & (1 << page) == 0 && self.tombstones.len() == 0
    }

    /// The pages with blocks, or with entries of the overlay: a bit for each.
    pub(super) fn occupied(&self) -> u64 {
        self.pages.present | self.logged
    }

    /// Whether the layer holds nothing, not even an entry of the overlay.
    pub(super) fn is_empty(&self) -> bool {
        self.pages.present | self.logged == 0 && self.tombstones.len() == 0
    }
}

/// A chunk of a replica.
#[derive(Clone, Debug, Default)]
pub(super) struct Chunk {
    /// At least the highest version in it.
    pub(super) highest: Version,
    /// Ascending by number.
    pub(super) layers: SmallVec<[Layer; 1]>,
}

impl Chunk {
    pub(super) fn layer(&self, number: u32) -> Option<&Layer> {
        let at = self.layers.partition_point(|l| l.number < number);
        self.layers.get(at).filter(|l| l.number == number)
    }

    /// The layers with numbers from `first` to `last`.
    pub(super) fn between(&self, first: u32, last: u32) -> &[Layer] {
        let from = self.layers.partition_point(|l| l.number < first);
        let to = self.layers.partition_point(|l| l.number <= last);
        &self.layers[from.min(to)..to]
    }

    fn layer_mut(&mut self, number: u32) -> &mut Layer {
        let at = self.layers.partition_point(|l| l.number < number);
        if self.layers.get(at).is_none_or(|l| l.number != number) {
            self.layers.insert(
                at,
                Layer {
                    number,
                    ..Layer::default()
                },
            );
        }
        &mut self.layers[at]
    }

    /// Whether a layer below a number may hold something.
    pub(super) fn has_below(&self, number: u32) -> bool {
        let below = self.between(0, number.saturating_sub(1));
        below.iter().any(|l| !l.is_empty())
    }

    fn has_garbage(&self, list: &LayerList) -> bool {
        let canonical = |l: &Layer| list.canonical(SnapshotNumber(l.number)).0 == l.number;
        !self.layers.iter().all(canonical)
    }

    /// Forgets layers that are not canonical and hold nothing.
    pub(super) fn prune(&mut self, list: &LayerList) {
        let keep =
            |l: &Layer| !l.is_empty() || list.canonical(SnapshotNumber(l.number)).0 == l.number;
        self.layers.retain(|l| keep(l));
        self.layers.shrink_to_fit();
    }
}

/// A replica.
#[derive(Clone, Debug)]
pub(super) struct Replica {
    pub(super) slot: u32,
    pub(super) header: ReplicaHeader,
    pub(super) descriptor: Option<VolumeDescriptor>,
    /// The newest layer list; that of the descriptor, if there is one.
    pub(super) layers: LayerList,
    /// Where the header's link leads.
    pub(super) base: Option<Base>,
    pub(super) flatten: Option<Flatten>,
    pub(super) watermark: Version,
    pub(super) forget_below: Version,
    pub(super) highest: Version,
    pub(super) home_highest: Version,
    /// Batch that holds the newest Watermark record, 0: none.
    pub(super) watermark_batch: u64,
    pub(super) watermark_dirty: bool,
    pub(super) pages: u64,
    pub(super) layer_pages: BTreeMap<u32, u64>,
    pub(super) chunks: BTreeMap<u32, Chunk>,
    pub(super) garbage: BTreeSet<u32>,
}

impl Replica {
    pub(super) fn new(slot: u32, header: ReplicaHeader) -> Self {
        Self {
            slot,
            header,
            descriptor: None,
            layers: LayerList::default(),
            base: None,
            flatten: None,
            watermark: Version::ZERO,
            forget_below: Version::ZERO,
            highest: Version::ZERO,
            home_highest: Version::ZERO,
            watermark_batch: 0,
            watermark_dirty: false,
            pages: 0,
            layer_pages: BTreeMap::new(),
            chunks: BTreeMap::new(),
            garbage: BTreeSet::new(),
        }
    }

    pub(super) fn canonical(&self, layer: u32) -> u32 {
        self.layers.canonical(SnapshotNumber(layer)).0
    }

    /// The lowest number that has the same canonical layer.
    pub(super) fn oldest_of_class(&self, layer: u32) -> u32 {
        if layer > self.layers.settled.0 {
            return layer;
        }
        let live = &self.layers.live;
        let above = live.partition_point(|n| n.0 <= layer);
        above.checked_sub(1).map_or(0, |at| live[at].0)
    }

    pub(super) fn layer(&self, chunk: u32, layer: u32) -> Option<&Layer> {
        self.chunks.get(&chunk)?.layer(layer)
    }

    pub(super) fn layer_mut(&mut self, chunk: u32, layer: u32) -> Option<&mut Layer> {
        let chunk = self.chunks.get_mut(&chunk)?;
        let at = chunk.layers.partition_point(|l| l.number < layer);
        chunk.layers.get_mut(at).filter(|l| l.number == layer)
    }

    pub(super) fn home(&self, key: PageKey) -> Option<u32> {
        self.layer(key.chunk, key.layer)?.pages.get(key.page)
    }

    /// Enters a page's home; returns the one that it had.
    pub(super) fn set_home(&mut self, key: PageKey, physical: u32) -> Option<u32> {
        let layer = self
            .chunks
            .entry(key.chunk)
            .or_default()
            .layer_mut(key.layer);
        let old = layer.pages.set(key.page, physical);
        if old.is_none() {
            self.pages += 1;
            *self.layer_pages.entry(key.layer).or_default() += 1;
        }
        old
    }

    /// A page has no home any more.
    pub(super) fn clear_home(&mut self, key: PageKey) -> Option<u32> {
        let old = self
            .layer_mut(key.chunk, key.layer)
            .and_then(|l| l.pages.remove(key.page))?;
        self.pages -= 1;
        if let Some(count) = self.layer_pages.get_mut(&key.layer) {
            *count -= 1;
            if *count == 0 {
                self.layer_pages.remove(&key.layer);
            }
        }
        Some(old)
    }

    /// Records that a version was applied in a layer of a chunk.
    pub(super) fn note(&mut self, chunk: u32, layer: u32, version: Version) -> &mut Layer {
        self.highest = self.highest.max(version);
        let chunk = self.chunks.entry(chunk).or_default();
        chunk.highest = chunk.highest.max(version);
        let layer = chunk.layer_mut(layer);
        layer.highest = layer.highest.max(version);
        layer
    }

    /// Finds the chunks that are to be merged under the list.
    pub(super) fn find_garbage(&mut self) {
        let garbage = self.chunks.iter();
        let garbage = garbage.filter(|(_, c)| c.has_garbage(&self.layers));
        self.garbage = garbage.map(|(index, _)| *index).collect();
    }

    /// Drops what is empty of a chunk; whether something is still to be merged there.
    pub(super) fn prune(&mut self, chunk: u32) -> bool {
        let left = self.chunks.get_mut(&chunk).is_some_and(|c| {
            c.prune(&self.layers);
            c.has_garbage(&self.layers)
        });
        if left {
            self.garbage.insert(chunk);
        } else {
            self.garbage.remove(&chunk);
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_table_keeps_order() {
        let mut t = PageTable::default();
        assert_eq!(t.set(63, 1), None);
        assert_eq!(t.set(0, 2), None);
        assert_eq!(t.set(7, 3), None);
        assert_eq!(t.set(7, 4), Some(3));
        assert_eq!(t.iter().collect::<Vec<_>>(), vec![(0, 2), (7, 4), (63, 1)]);
        assert_eq!(t.remove(0), Some(2));
        assert_eq!((t.get(0), t.get(7), t.get(63)), (None, Some(4), Some(1)));
    }
}
