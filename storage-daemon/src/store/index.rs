//! What the store knows in memory: replicas (`replica`), and the overlay of blocks whose newest state is still in
//! the log.
//!
//! Invariants:
//! - An overlay entry was accepted later than the home block beneath it and always hides it; it goes only
//!   when its state is home and the log record is freed.
//! - The effects of a log record here do not depend on what is in home pages, so that replay
//!   reproduces them (`apply_*` serve both).
//! - The overlay is kept page by page: an entry per redirected page, not sixteen, and one look-up per page.
//!   `PageRef::reserved` says that one page is promised; a page without entries is not in the map.
//! - A layer's `logged` has the bit of every page with an entry in the overlay.

use ashlar_proto::ids::{BLOCKS_PER_PAGE, SnapshotNumber, Version, VolumeId};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::allocator::Allocator;
use super::replica::Replica;

/// No physical page.
pub(super) const NO_PAGE: u32 = u32::MAX;

/// A block of a layer of a chunk of the replica in a slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct BlockKey {
    pub(super) slot: u32,
    pub(super) chunk: u32,
    pub(super) layer: u32,
    pub(super) block: u16,
}

/// A page likewise.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(super) struct PageKey {
    pub(super) slot: u32,
    pub(super) chunk: u32,
    pub(super) layer: u32,
    pub(super) page: u8,
}

impl BlockKey {
    /// Its place within its page.
    pub(super) fn index(self) -> u8 {
        (self.block % BLOCKS_PER_PAGE as u16) as u8
    }

    pub(super) fn page(self) -> PageKey {
        let page = (self.block / BLOCKS_PER_PAGE as u16) as u8;
        PageKey {
            slot: self.slot,
            chunk: self.chunk,
            layer: self.layer,
            page,
        }
    }
}

impl PageKey {
    pub(super) fn block(self, index: u8) -> BlockKey {
        let block = u16::from(self.page) * BLOCKS_PER_PAGE as u16 + u16::from(index);
        BlockKey {
            slot: self.slot,
            chunk: self.chunk,
            layer: self.layer,
            block,
        }
    }
}

/// Where the newest state of a block in the log is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// This data block of its batch.
    Log(u32),
    /// In a fresh page that is not home yet.
    Page(u32),
    /// The block is absent in this layer.
    Erased,
    /// Its data in the log is rotten.
    Bad,
    /// Rotten, and its version is an upper bound.
    BadUnversioned,
}

/// Newest state of a block that is in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Overlay {
    pub(super) batch: u64,
    pub(super) version: Version,
    pub(super) checksum: u32,
    pub(super) place: Place,
}

/// A redirected write of a whole page.
#[derive(Clone, Debug)]
struct Whole {
    /// Blocks whose newest state it is, a bit each; never 0.
    live: u16,
    batch: u64,
    version: Version,
    physical: u32,
    checksums: [u32; BLOCKS_PER_PAGE as usize],
}

/// What the overlay holds of one page.
#[derive(Clone, Debug)]
pub(super) struct PageRef {
    pub(super) reserved: bool,
    /// Newest fresh page of a redirected write, or `NO_PAGE`.
    pub(super) redirect: u32,
    whole: Option<Box<Whole>>,
    /// By block; none that `whole` has.
    blocks: SmallVec<[(u8, Overlay); 1]>,
}

impl PageRef {
    const EMPTY: Self = Self {
        reserved: false,
        redirect: NO_PAGE,
        whole: None,
        blocks: SmallVec::new_const(),
    };

    fn get(&self, block: u8) -> Option<Overlay> {
        if let Some((_, entry)) = self.blocks.iter().find(|(b, _)| *b == block) {
            return Some(*entry);
        }
        let whole = self.whole.as_deref()?;
        (whole.live & 1 << block != 0).then(|| Overlay {
            batch: whole.batch,
            version: whole.version,
            checksum: whole.checksums[usize::from(block)],
            place: Place::Page(whole.physical),
        })
    }

    fn put(&mut self, block: u8, entry: Overlay) {
        match self.blocks.iter_mut().find(|(b, _)| *b == block) {
            Some((_, old)) => *old = entry,
            None => {
                self.bury(block);
                self.blocks.push((block, entry));
            }
        }
    }

    /// The redirected write is no longer a block's newest state.
    fn bury(&mut self, block: u8) {
        if let Some(whole) = &mut self.whole {
            whole.live &= !(1 << block);
            if whole.live == 0 {
                self.whole = None;
            }
        }
    }

    fn retire(&mut self, block: u8, batch: u64) {
        if let Some(at) = self.blocks.iter().position(|(b, _)| *b == block) {
            if self.blocks[at].1.batch == batch {
                self.blocks.swap_remove(at);
            }
        } else if self.whole.as_ref().is_some_and(|w| w.batch == batch) {
            self.bury(block);
        }
    }

    fn is_empty(&self) -> bool {
        self.whole.is_none() && self.blocks.is_empty()
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Index {
    pub(super) replicas: Vec<Option<Box<Replica>>>,
    pub(super) by_volume: FxHashMap<VolumeId, u32>,
    pub(super) by_number: FxHashMap<u64, u32>,
    pub(super) pages: FxHashMap<PageKey, PageRef>,
    pub(super) tombstones: u64,
}

impl Index {
    pub(super) fn replica(&self, volume: VolumeId) -> Option<&Replica> {
        self.by_slot(*self.by_volume.get(&volume)?)
    }

    pub(super) fn replica_mut(&mut self, volume: VolumeId) -> Option<&mut Replica> {
        let slot = *self.by_volume.get(&volume)?;
        self.by_slot_mut(slot)
    }

    pub(super) fn by_slot(&self, slot: u32) -> Option<&Replica> {
        self.replicas.get(slot as usize)?.as_deref()
    }

    pub(super) fn by_slot_mut(&mut self, slot: u32) -> Option<&mut Replica> {
        self.replicas.get_mut(slot as usize)?.as_deref_mut()
    }

    pub(super) fn add(&mut self, replica: Replica) {
        let slot = replica.slot;
        self.by_volume.insert(replica.header.volume, slot);
        self.by_number.insert(replica.header.replica, slot);
        if self.replicas.len() <= slot as usize {
            self.replicas.resize_with(slot as usize + 1, || None);
        }
        self.replicas[slot as usize] = Some(Box::new(replica));
    }

    /// Takes a replica out with everything that the overlay holds of it; returns its pages.
    pub(super) fn remove(&mut self, slot: u32, allocator: &mut Allocator) -> Vec<u32> {
        let Some(replica) = self.replicas.get_mut(slot as usize).and_then(Option::take) else {
            return Vec::new();
        };
        self.by_volume.remove(&replica.header.volume);
        self.by_number.remove(&replica.header.replica);
        let mut pages: Vec<u32> = Vec::new();
        for layer in replica.chunks.values().flat_map(|c| c.layers.iter()) {
            pages.extend(layer.pages.iter().map(|(_, p)| p));
            self.tombstones -= layer.tombstones.len() as u64;
        }
        self.pages.retain(|k, r| {
            if k.slot == slot && r.reserved {
                allocator.unreserve();
            }
            k.slot != slot
        });
        pages
    }

    /// Whether writing this page through the log needs a page that is not promised yet.
    pub(super) fn needs_reservation(&self, key: PageKey) -> bool {
        match self.pages.get(&key) {
            Some(r) if r.reserved || r.redirect != NO_PAGE => false,
            _ => self.by_slot(key.slot).is_none_or(|r| r.home(key).is_none()),
        }
    }

    /// The newest state of a block that is in the log.
    pub(super) fn overlay(&self, key: BlockKey) -> Option<Overlay> {
        self.pages.get(&key.page())?.get(key.index())
    }

    fn page_ref(&mut self, key: PageKey) -> &mut PageRef {
        self.pages.entry(key).or_insert(PageRef::EMPTY)
    }

    /// A Data record (or one block of it) takes effect.
    pub(super) fn apply_data(&mut self, key: BlockKey, entry: Overlay, allocator: &mut Allocator) {
        let reserve = self.needs_reservation(key.page());
        let page = self.page_ref(key.page());
        page.put(key.index(), entry);
        if reserve {
            allocator.reserve();
            page.reserved = true;
        }
        self.uncover(key, 1, entry.version);
    }

    /// Removes tombstones over blocks that are now at `version`, unless the version alone beats them.
    fn uncover(&mut self, first: BlockKey, count: u16, version: Version) {
        let Some(replica) = self.replicas[first.slot as usize].as_deref_mut() else {
            return;
        };
        let layer = replica.note(first.chunk, first.layer, version);
        layer.logged |= 1 << first.page().page;
        let before = layer.tombstones.len();
        if before == 0 {
            return;
        }
        for block in first.block..first.block + count {
            let covering = layer.tombstones.covering(block);
            if covering.is_some_and(|e| e.version >= version) {
                layer.tombstones.punch(block);
            }
        }
        self.tombstones = self.tombstones + layer.tombstones.len() as u64 - before as u64;
    }

    /// A Redirect record takes effect.
    pub(super) fn apply_redirect(
        &mut self,
        key: PageKey,
        (batch, version): (u64, Version),
        physical: u32,
        checksums: &[u32; BLOCKS_PER_PAGE as usize],
        allocator: &mut Allocator,
    ) {
        let page = self.page_ref(key);
        page.blocks.clear();
        page.whole = Some(Box::new(Whole {
            live: u16::MAX,
            batch,
            version,
            physical,
            checksums: *checksums,
        }));
        page.redirect = physical;
        if std::mem::take(&mut page.reserved) {
            allocator.unreserve();
        }
        self.uncover(key.block(0), BLOCKS_PER_PAGE as u16, version);
    }

    /// An Erase record takes effect on one block.
    pub(super) fn apply_erase(&mut self, key: BlockKey, batch: u64) {
        let entry = Overlay {
            batch,
            version: Version::ZERO,
            checksum: 0,
            place: Place::Erased,
        };
        self.page_ref(key.page()).put(key.index(), entry);
        self.uncover(key, 1, Version::ZERO);
    }

    /// A Trim record takes effect. Log entries that it beats become erasures: they go on hiding a home
    /// block whose version may be higher (R7 can lower versions).
    pub(super) fn apply_trim(
        &mut self,
        slot: u32,
        range: ashlar_proto::ids::BlockRange,
        layer: SnapshotNumber,
        version: Version,
        batch: u64,
    ) {
        let Some(replica) = self.replicas[slot as usize].as_deref_mut() else {
            return;
        };
        let tombstones = &mut replica.note(range.chunk.0, layer.0, version).tombstones;
        let before = tombstones.len() as u64;
        tombstones.insert(range.first, range.end(), version, batch);
        self.tombstones = self.tombstones + tombstones.len() as u64 - before;
        let erased = Overlay {
            batch,
            version: Version::ZERO,
            checksum: 0,
            place: Place::Erased,
        };
        let mut block = range.first;
        while block < range.end() {
            let key = BlockKey {
                slot,
                chunk: range.chunk.0,
                layer: layer.0,
                block,
            };
            let page_end = (block / BLOCKS_PER_PAGE as u16 + 1) * BLOCKS_PER_PAGE as u16;
            let end = page_end.min(range.end());
            if let Some(page) = self.pages.get_mut(&key.page()) {
                for block in block..end {
                    let index = BlockKey { block, ..key }.index();
                    if page
                        .get(index)
                        .is_some_and(|o| o.version < version && o.place != Place::Erased)
                    {
                        page.put(index, erased);
                    }
                }
            }
            block = end;
        }
    }

    /// Drops overlay entries of a page whose state is home now, each if it is still the one of its batch.
    pub(super) fn retire(
        &mut self,
        key: PageKey,
        entries: impl Iterator<Item = (u8, u64)>,
        allocator: &mut Allocator,
    ) {
        let Some(page) = self.pages.get_mut(&key) else {
            return;
        };
        for (block, batch) in entries {
            page.retire(block, batch);
        }
        if page.is_empty() {
            if page.reserved {
                allocator.unreserve();
            }
            self.pages.remove(&key);
            let replica = self.by_slot_mut(key.slot);
            if let Some(layer) = replica.and_then(|r| r.layer_mut(key.chunk, key.layer)) {
                layer.logged &= !(1 << key.page);
            }
        }
    }
}
