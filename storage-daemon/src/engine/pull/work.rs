//! One chunk being compared and copied.

use ashlar_proto::ids::ChunkIndex;
use ashlar_proto::wire::{Cursor, Entry};

use super::listing::Listing;
use super::merge::Plan;

/// See the module.
pub struct ChunkTask {
    /// Entries at the source.
    pub source: Listing<Entry>,
    /// Entries in the own store.
    pub target: Listing<Entry>,
    /// What differs and is not asked for yet.
    pub plan: Plan,
    /// Reads of this chunk that the source has not answered.
    pub reads: usize,
    /// Merges of this chunk that the store has not answered.
    pub applies: usize,
}

impl ChunkTask {
    /// A chunk that the source, the own store, or both have.
    pub fn new(chunk: ChunkIndex, at_source: bool, at_target: bool) -> Self {
        let start = Cursor {
            chunk,
            ..Cursor::default()
        };
        let listing = |there| {
            if there {
                Listing::from(start)
            } else {
                Listing::empty()
            }
        };
        Self {
            source: listing(at_source),
            target: listing(at_target),
            plan: Plan::default(),
            reads: 0,
            applies: 0,
        }
    }

    /// Whether everything was compared and what differed has been applied.
    pub fn done(&self) -> bool {
        let listed = !self.source.starved() && !self.target.starved();
        let merged = self.source.head().is_none() && self.target.head().is_none();
        let planned = self.plan.runs.is_empty() && self.plan.direct.is_empty();
        listed && merged && planned && self.reads == 0 && self.applies == 0
    }
}
