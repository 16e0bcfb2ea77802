//! Cache of page sectors, in 4 KiB blocks of eight, as they are on disk.
//!
//! Invariants:
//! - A cached block is what the disk holds or is about to hold; blocks with writes in flight are pinned
//!   and never evicted.
//! - A sector that did not verify when it was read stays marked rotten until it is rewritten whole.

use ashlar_proto::ids::BLOCK_SIZE;
use rustc_hash::FxHashMap;

use crate::format::{PAGE_SECTOR_BYTES, PageSector};

/// Sectors in a cached block.
pub(super) const SECTORS_PER_BLOCK: u32 = (BLOCK_SIZE / PAGE_SECTOR_BYTES) as u32;
/// Fewest blocks that are kept whatever the budget says: more than one request ever needs.
const BLOCKS_MIN: usize = 1024;

struct Slot {
    block: u32,
    bytes: Box<[u8; BLOCK_SIZE]>,
    /// Bit set: the sector verified.
    valid: u8,
    recent: bool,
    pins: u32,
}

/// What the cache knows of a page's sector.
pub(super) enum Lookup<'a> {
    /// Read it first.
    Missing,
    /// It does not verify.
    Rotten,
    /// Its verified bytes.
    Sector(&'a [u8]),
}

/// See the module.
pub(super) struct SectorCache {
    slots: Vec<Slot>,
    by_block: FxHashMap<u32, u32>,
    capacity: usize,
    hand: usize,
    pub(super) hits: u64,
    pub(super) misses: u64,
}

impl SectorCache {
    pub(super) fn new(budget: usize) -> Self {
        // A block costs its bytes, its slot and its entry in the map.
        let capacity = (budget / (BLOCK_SIZE + 64)).max(BLOCKS_MIN);
        Self {
            slots: Vec::new(),
            by_block: FxHashMap::default(),
            capacity,
            hand: 0,
            hits: 0,
            misses: 0,
        }
    }

    pub(super) fn contains(&self, block: u32) -> bool {
        self.by_block.contains_key(&block)
    }

    pub(super) fn sector(&mut self, page: u32) -> Lookup<'_> {
        let Some(&slot) = self.by_block.get(&(page / SECTORS_PER_BLOCK)) else {
            self.misses += 1;
            return Lookup::Missing;
        };
        self.hits += 1;
        let slot = &mut self.slots[slot as usize];
        slot.recent = true;
        let index = page % SECTORS_PER_BLOCK;
        if slot.valid & (1 << index) == 0 {
            return Lookup::Rotten;
        }
        let at = index as usize * PAGE_SECTOR_BYTES;
        Lookup::Sector(&slot.bytes[at..at + PAGE_SECTOR_BYTES])
    }

    /// Adds a block that was read; `None` bytes: the device could not read it.
    pub(super) fn insert(&mut self, block: u32, bytes: Option<&[u8]>, salt: u32) {
        if self.by_block.contains_key(&block) {
            return;
        }
        let mut copy = Box::new([0; BLOCK_SIZE]);
        let mut valid = 0;
        if let Some(bytes) = bytes.filter(|b| b.len() == BLOCK_SIZE) {
            copy.copy_from_slice(bytes);
            for index in 0..SECTORS_PER_BLOCK {
                let at = index as usize * PAGE_SECTOR_BYTES;
                let sector = &copy[at..at + PAGE_SECTOR_BYTES];
                if PageSector::verify(sector, block * SECTORS_PER_BLOCK + index, salt).is_ok() {
                    valid |= 1 << index;
                }
            }
        }
        let slot = Slot {
            block,
            bytes: copy,
            valid,
            recent: true,
            pins: 0,
        };
        match self.victim() {
            Some(at) => {
                self.by_block.remove(&self.slots[at].block);
                self.slots[at] = slot;
                self.by_block.insert(block, at as u32);
            }
            None => {
                self.by_block.insert(block, self.slots.len() as u32);
                self.slots.push(slot);
            }
        }
    }

    /// Second chance over what is not pinned; `None`: grow.
    fn victim(&mut self) -> Option<usize> {
        if self.slots.len() < self.capacity {
            return None;
        }
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[self.hand];
            if slot.pins == 0 && !slot.recent {
                return Some(self.hand);
            }
            slot.recent = false;
        }
        None
    }

    pub(super) fn pin(&mut self, block: u32) {
        if let Some(&at) = self.by_block.get(&block) {
            self.slots[at as usize].pins += 1;
        }
    }

    pub(super) fn unpin(&mut self, block: u32) {
        if let Some(&at) = self.by_block.get(&block) {
            let slot = &mut self.slots[at as usize];
            slot.pins = slot.pins.saturating_sub(1);
        }
    }

    /// Replaces a sector of a block that is present.
    pub(super) fn update(&mut self, sector: &PageSector, salt: u32) {
        if let Some(&at) = self.by_block.get(&(sector.physical / SECTORS_PER_BLOCK)) {
            let slot = &mut self.slots[at as usize];
            let index = sector.physical % SECTORS_PER_BLOCK;
            let at = index as usize * PAGE_SECTOR_BYTES;
            sector.encode_into(&mut slot.bytes[at..at + PAGE_SECTOR_BYTES], salt);
            slot.valid |= 1 << index;
        }
    }

    /// The bytes of a block that is present, to be written.
    pub(super) fn bytes(&self, block: u32) -> Option<&[u8]> {
        self.by_block
            .get(&block)
            .map(|&at| &self.slots[at as usize].bytes[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pinned_blocks_stay_and_others_make_room() {
        let mut c = SectorCache::new(0);
        let mut bytes = vec![0; BLOCK_SIZE];
        for i in 0..8 {
            PageSector::free(i, 1).encode_into(&mut bytes[i as usize * 512..], 3);
        }
        c.insert(0, Some(&bytes), 3);
        c.pin(0);
        for block in 1..3000 {
            c.insert(block, Some(&bytes), 3);
        }
        assert!(matches!(c.sector(7), Lookup::Sector(_)));
        assert!(c.slots.len() <= c.capacity);
        assert!(
            matches!(c.sector(8 * 2999), Lookup::Rotten),
            "sectors of other pages do not verify"
        );
        assert!(matches!(c.sector(8), Lookup::Missing));
    }
}
