//! What a clone's replica inherits from its parent's on the same disk (docs/snapshots.md, C3 to C6).
//!
//! Invariants:
//! - A link names the parent's replica by its number, which is lower than that of the replica that has the link: links
//!   make no circle. It is durable before the creation is answered, and is only ever cut.
//! - What a replica has of its own, a tombstone too, hides what it inherits, whatever the versions. So it never
//!   becomes absent where something is inherited: a tombstone takes its place.
//! - Inherited blocks belong to the lowest canonical layer, with the parent's versions; a tombstone of the parent is
//!   nothing.
//! - A replica that others on the disk are linked to is not dropped.

use ashlar_proto::ids::{Epoch, SnapshotNumber};
use ashlar_proto::wire::{BlockState, FenceLink};
use smallvec::SmallVec;

use super::Store;
use super::api::StoreError;
use super::index::{BlockKey, Index};
use super::replica::Replica;
use super::resolve::{ABSENT, Resolved};
use crate::format::{Link, ReplicaHeader};

/// Where the blocks come from that a replica has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Base {
    /// Slot of the parent's replica.
    pub(super) slot: u32,
    /// The parent's snapshot: its layers below are seen.
    pub(super) number: u32,
}

impl Index {
    /// The base of a header's link; `None` if the parent's replica is not there.
    pub(super) fn base_of(&self, link: &Link) -> Option<Base> {
        let slot = *self.by_number.get(&link.replica)?;
        let number = link.parent.number.0;
        Some(Base { slot, number })
    }

    /// The replicas that a replica inherits from, nearest first, each with the number at which it is seen.
    pub(super) fn bases(&self, slot: u32) -> SmallVec<[Base; 2]> {
        let mut bases = SmallVec::new();
        let mut at = self.by_slot(slot).and_then(|r| r.base);
        while let Some(base) = at {
            bases.push(base);
            at = self.by_slot(base.slot).and_then(|r| r.base);
        }
        bases
    }

    /// Whether some replica is linked to that in a slot.
    pub(super) fn has_clones(&self, slot: u32) -> bool {
        let mut replicas = self.replicas.iter().flatten();
        replicas.any(|r| r.base.is_some_and(|b| b.slot == slot))
    }

    /// The pages of a chunk of which something may be inherited: a bit for each.
    pub(super) fn inherited_pages(&self, slot: u32, chunk: u32) -> u64 {
        self.bases(slot).iter().fold(0, |mask, base| {
            let chunk = self.by_slot(base.slot).and_then(|r| r.chunks.get(&chunk));
            let layers = chunk.map_or(&[][..], |c| c.between(0, base.number.saturating_sub(1)));
            layers.iter().fold(mask, |mask, l| mask | l.occupied())
        })
    }

    /// Whether what a replica inherits may yet change: a replica that it comes from was not whole, or is being made
    /// whole again.
    pub(super) fn inherits_unsettled(
        &self,
        slot: u32,
        damage: ashlar_proto::ids::Incarnation,
    ) -> bool {
        let mut at = self.by_slot(slot);
        while let Some((replica, base)) = at.and_then(|r| Some((r, r.base?))) {
            let whole = replica.header.link.is_some_and(|l| l.whole);
            let parent = self.by_slot(base.slot);
            let settled = parent
                .is_some_and(|p| p.header.rebuild_epoch == Epoch(0) && p.header.sound >= damage);
            if !(whole && settled) {
                return true;
            }
            at = parent;
        }
        false
    }
}

impl Store {
    /// The link of a replica that is to be created; its `sound` becomes that of what it inherits.
    pub(super) fn plan_link(
        &self,
        header: &mut ReplicaHeader,
        wanted: Option<FenceLink>,
    ) -> Result<(), StoreError> {
        let Some(wanted) = wanted else {
            return Ok(());
        };
        let Some(parent) = self.index.replica(wanted.parent.volume) else {
            return if wanted.required {
                Err(StoreError::NoParent)
            } else {
                Ok(())
            };
        };
        header.link = Some(Link {
            replica: parent.header.replica,
            parent: wanted.parent,
            whole: wanted.whole,
        });
        header.sound = header.sound.min(parent.header.sound);
        Ok(())
    }

    /// Ties replicas to what they inherit, once all are known. Whether the parent of one is missing: it lost what it
    /// inherited.
    pub(super) fn tie_links(&mut self) -> bool {
        let mut lost = false;
        for slot in 0..self.index.replicas.len() as u32 {
            let link = self.index.by_slot(slot).and_then(|r| r.header.link);
            let Some(link) = link else { continue };
            let base = self.index.base_of(&link);
            if let Some(replica) = self.index.by_slot_mut(slot) {
                replica.base = base;
                if base.is_none() {
                    lost |= replica.header.sound >= self.superblock.damage_incarnation;
                    tracing::error!(
                        volume = %replica.header.volume, parent = %link.parent.volume,
                        "the replica of a clone has lost its parent's on this disk: it must be rebuilt from others"
                    );
                }
            }
        }
        lost
    }

    /// Whether what a replica inherits is what its parents showed: no layer of it was merged with a later one (S9).
    pub(super) fn inherits_intact(&self, replica: &Replica) -> bool {
        let mut base = replica.base;
        while let Some(b) = base {
            let Some(parent) = self.index.by_slot(b.slot) else {
                return false;
            };
            let seen = SnapshotNumber(b.number.saturating_sub(1));
            if parent.layers.canonical(seen) != seen {
                return false;
            }
            base = parent.base;
        }
        true
    }

    /// What a block is where its replica has nothing of its own; an error names sectors to read first.
    pub(super) fn inherited(&mut self, key: BlockKey) -> Result<Resolved, u32> {
        let mut batch = 0;
        for base in self.index.bases(key.slot) {
            let key = BlockKey {
                slot: base.slot,
                layer: base.number.saturating_sub(1),
                ..key
            };
            let (found, _) = self.find_own(key, 0)?;
            batch = batch.max(found.batch);
            match found.state {
                BlockState::Absent => {}
                BlockState::Tombstone => break,
                BlockState::Data | BlockState::Bad => return Ok(Resolved { batch, ..found }),
            }
        }
        Ok(Resolved { batch, ..ABSENT })
    }
}
