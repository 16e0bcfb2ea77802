//! Where the newest state of a block is: in a layer, among the layers that are one (docs/snapshots.md, S7), and at or
//! below a number.
//!
//! Invariants:
//! - At or below a number the block of the highest version is the block, whatever its layer: until all replicas have
//!   one list, an older block may bear a higher number (docs/snapshots.md, S9). What is rotten without a known version
//!   counts as its layer's, that is above what lower layers have. So it does not matter how far merging is.
//! - A layer with nothing above the version that was found is passed over without a look at its sectors.
//! - A layer that cannot have the block costs a look at two bitmaps: neither a map nor a sector is asked.

use ashlar_proto::ids::{BLOCK_SIZE, BLOCKS_PER_PAGE, PAGE_SIZE, Version};
use ashlar_proto::wire::{self, BlockState};

use super::Store;
use super::cache::{Lookup, SECTORS_PER_BLOCK, SectorCache};
use super::index::{BlockKey, Overlay, Place};
use super::log::Log;
use super::replica::Layer;
use crate::format::{Geometry, PageSector, StoredState};

/// The state of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Resolved {
    pub(super) state: BlockState,
    /// ZERO if absent; an upper bound if `unversioned`.
    pub(super) version: Version,
    pub(super) checksum: u32,
    /// Where the data is on the disk, if `Data`.
    pub(super) offset: u64,
    /// The batch whose completion makes this visible, 0: none.
    pub(super) batch: u64,
    /// Bad, and the version is not known.
    pub(super) unversioned: bool,
}

pub(super) const ABSENT: Resolved = Resolved {
    state: BlockState::Absent,
    version: Version::ZERO,
    checksum: 0,
    offset: 0,
    batch: 0,
    unversioned: false,
};

impl Resolved {
    /// Whether this, of a lower layer, is the block rather than what a higher layer has that is one with it.
    pub(super) fn beats(&self, higher: &Self) -> bool {
        self.state != BlockState::Absent
            && (higher.state == BlockState::Absent
                || (!self.unversioned && !higher.unversioned && self.version > higher.version))
    }
}

/// What the state of a block is read from.
struct Places<'a> {
    cache: &'a mut SectorCache,
    log: &'a Log,
    geometry: &'a Geometry,
    /// Bound of versions at home.
    home_highest: Version,
}

impl Places<'_> {
    fn page_block(&self, physical: u32, block: u16) -> u64 {
        let within = u64::from(block) % u64::from(BLOCKS_PER_PAGE);
        self.geometry.pages_offset
            + u64::from(physical) * PAGE_SIZE as u64
            + within * BLOCK_SIZE as u64
    }

    fn logged(&self, overlay: &Overlay, block: u16) -> Resolved {
        let (version, checksum, batch) = (overlay.version, overlay.checksum, overlay.batch);
        let found = Resolved {
            version,
            checksum,
            batch,
            ..ABSENT
        };
        match overlay.place {
            Place::Erased => Resolved { batch, ..ABSENT },
            Place::Bad | Place::BadUnversioned => Resolved {
                state: BlockState::Bad,
                unversioned: overlay.place == Place::BadUnversioned,
                ..found
            },
            Place::Log(index) => {
                let offset = self.log.batch(batch).map_or(0, |b| b.data_offset(index));
                Resolved {
                    state: BlockState::Data,
                    offset: self.geometry.log_offset + offset,
                    ..found
                }
            }
            Place::Page(physical) => Resolved {
                state: BlockState::Data,
                offset: self.page_block(physical, block),
                ..found
            },
        }
    }

    fn home(&mut self, physical: u32, block: u16) -> Result<Resolved, u32> {
        let bytes = match self.cache.sector(physical) {
            Lookup::Missing => return Err(physical / SECTORS_PER_BLOCK),
            Lookup::Rotten => {
                return Ok(Resolved {
                    state: BlockState::Bad,
                    version: self.home_highest,
                    unversioned: true,
                    ..ABSENT
                });
            }
            Lookup::Sector(bytes) => bytes,
        };
        let b = PageSector::block_of(bytes, usize::from(block) % BLOCKS_PER_PAGE as usize);
        let found = Resolved {
            version: b.version,
            checksum: b.checksum,
            ..ABSENT
        };
        Ok(match b.state {
            StoredState::Absent => ABSENT,
            StoredState::Bad | StoredState::BadUnversioned => Resolved {
                state: BlockState::Bad,
                unversioned: b.state == StoredState::BadUnversioned,
                ..found
            },
            StoredState::Data => Resolved {
                state: BlockState::Data,
                offset: self.page_block(physical, block),
                ..found
            },
        })
    }

    /// The state of a block within a layer, whose entry of the overlay is given; an error names sectors to read first.
    fn in_layer(
        &mut self,
        layer: &Layer,
        block: u16,
        overlay: Option<Overlay>,
    ) -> Result<Resolved, u32> {
        let tombstone = layer.tombstones.covering(block).map(|e| Resolved {
            state: BlockState::Tombstone,
            version: e.version,
            batch: e.batch,
            ..ABSENT
        });
        let found = match (
            overlay,
            layer.pages.get((block / BLOCKS_PER_PAGE as u16) as u8),
        ) {
            (Some(overlay), _) => self.logged(&overlay, block),
            (None, None) => return Ok(tombstone.unwrap_or(ABSENT)),
            (None, Some(physical)) => {
                if let Some(t) = tombstone.filter(|t| t.version >= self.home_highest) {
                    return Ok(t);
                }
                self.home(physical, block)?
            }
        };
        Ok(tombstone
            .filter(|t| t.version > found.version)
            .unwrap_or(found))
    }
}

impl Store {
    /// The state of a block within its layer alone; an error names sectors to read first.
    pub(super) fn resolve_in_layer(&mut self, key: BlockKey) -> Result<Resolved, u32> {
        let Some(replica) = self.index.by_slot(key.slot) else {
            return Ok(ABSENT);
        };
        let Some(layer) = replica.layer(key.chunk, key.layer) else {
            return Ok(ABSENT);
        };
        let overlay = self.index.overlay(key);
        let mut places = Places {
            cache: &mut self.cache,
            log: &self.log,
            geometry: &self.geometry,
            home_highest: replica.home_highest,
        };
        places.in_layer(layer, key.block, overlay)
    }

    /// The state of a block of a canonical layer: of all layers that are one with it.
    pub(super) fn resolve_in_class(&mut self, key: BlockKey) -> Result<Resolved, u32> {
        let floor = self.index.by_slot(key.slot);
        let floor = floor.map_or(0, |r| r.oldest_of_class(key.layer));
        self.resolve_from(key, floor)
    }

    /// Likewise, of what the replica has itself.
    pub(super) fn resolve_own_class(&mut self, key: BlockKey) -> Result<Resolved, u32> {
        let floor = self.index.by_slot(key.slot);
        let floor = floor.map_or(0, |r| r.oldest_of_class(key.layer));
        self.find_own(key, floor).map(|(found, _)| found)
    }

    /// The state that a reader sees; the read's number is canonical.
    pub(super) fn resolve(
        &mut self,
        slot: u32,
        read: &wire::Read,
        block: u16,
    ) -> Result<Resolved, u32> {
        let key = BlockKey {
            slot,
            chunk: read.range.chunk.0,
            layer: read.snapshot.0,
            block,
        };
        if read.exact_layer {
            self.resolve_in_class(key)
        } else {
            self.resolve_from(key, 0)
        }
    }

    /// The block of the highest version in the layers from the key's down to `floor`.
    fn resolve_from(&mut self, key: BlockKey, floor: u32) -> Result<Resolved, u32> {
        self.find_from(key, floor).map(|(found, _)| found)
    }

    /// The block that a read at the key's number sees, and the number of its layer.
    pub(super) fn find_at_or_below(&mut self, key: BlockKey) -> Result<(Resolved, u32), u32> {
        self.find_from(key, 0)
    }

    fn find_from(&mut self, key: BlockKey, floor: u32) -> Result<(Resolved, u32), u32> {
        let (found, at) = self.find_own(key, floor)?;
        let linked = self
            .index
            .by_slot(key.slot)
            .is_some_and(|r| r.base.is_some());
        if found.state != BlockState::Absent || floor > 0 || !linked {
            return Ok((found, at));
        }
        let inherited = self.inherited(key)?;
        let batch = found.batch.max(inherited.batch);
        Ok((Resolved { batch, ..inherited }, 0))
    }

    /// Likewise, of what the replica has itself.
    pub(super) fn find_own(&mut self, key: BlockKey, floor: u32) -> Result<(Resolved, u32), u32> {
        let nothing = Ok((ABSENT, key.layer));
        let Some(replica) = self.index.by_slot(key.slot) else {
            return nothing;
        };
        let Some(chunk) = replica.chunks.get(&key.chunk) else {
            return nothing;
        };
        let page = key.page().page;
        let mut places = Places {
            cache: &mut self.cache,
            log: &self.log,
            geometry: &self.geometry,
            home_highest: replica.home_highest,
        };
        let (mut best, mut at) = (ABSENT, key.layer);
        // An erasure that is in flight hides a newer block: wait for it as well.
        let mut batch = 0;
        for layer in chunk.between(floor, key.layer).iter().rev() {
            if layer.number < floor {
                break;
            }
            if layer.is_vacant(page) {
                continue;
            }
            let absent = best.state == BlockState::Absent;
            if !absent && (best.unversioned || layer.highest <= best.version) {
                continue;
            }
            let overlay = if layer.logged & (1 << page) == 0 {
                None
            } else {
                self.index.overlay(BlockKey {
                    layer: layer.number,
                    ..key
                })
            };
            let found = places.in_layer(layer, key.block, overlay)?;
            batch = batch.max(found.batch);
            if found.beats(&best) {
                (best, at) = (found, layer.number);
            }
        }
        Ok((Resolved { batch, ..best }, at))
    }
}
