//! A sorted listing that arrives in pages, from a peer or from the own store.
//!
//! Invariants:
//! - At most one page is buffered and at most one asked for: memory is bounded by a page.
//! - A page that is unsorted, lies before what was asked for, or does not advance is refused: a faulty
//!   peer ends its pull, it cannot make it loop or grow.

use std::collections::VecDeque;

use ashlar_proto::ids::ChunkIndex;
use ashlar_proto::wire::{ChunkDigest, Cursor, Entry};

/// An item of a listing, ordered by its key.
pub trait Item {
    /// Position in the listing.
    type Key: Copy + Ord;
    /// Where the item stands.
    fn key(&self) -> Self::Key;
}

impl Item for ChunkDigest {
    type Key = ChunkIndex;
    fn key(&self) -> ChunkIndex {
        self.chunk
    }
}

impl Item for Entry {
    type Key = Cursor;
    fn key(&self) -> Cursor {
        self.at
    }
}

/// A page was not what was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadPage;

/// See the module.
pub struct Listing<T: Item> {
    items: VecDeque<T>,
    next: Option<T::Key>,
    asked: bool,
}

impl<T: Item> Listing<T> {
    /// A listing that starts at a key.
    pub fn from(start: T::Key) -> Self {
        Self {
            items: VecDeque::new(),
            next: Some(start),
            asked: false,
        }
    }

    /// A listing of nothing.
    pub fn empty() -> Self {
        Self {
            items: VecDeque::new(),
            next: None,
            asked: false,
        }
    }

    /// The page to ask for now, if the buffer is empty, more is to come, and nothing is asked yet.
    pub fn wants(&mut self) -> Option<T::Key> {
        if self.asked || !self.items.is_empty() {
            return None;
        }
        let next = self.next?;
        self.asked = true;
        Some(next)
    }

    /// The page that was asked for will not come: ask once more.
    pub fn ask_again(&mut self) {
        self.asked = false;
    }

    /// Whether the next item is not known yet.
    pub fn starved(&self) -> bool {
        self.items.is_empty() && self.next.is_some()
    }

    /// The next item, if known.
    pub fn head(&self) -> Option<&T> {
        self.items.front()
    }

    /// Takes the next item.
    pub fn take(&mut self) -> Option<T> {
        self.items.pop_front()
    }

    /// Items that are known and not taken yet.
    pub fn buffered(&self) -> usize {
        self.items.len()
    }

    /// A page arrived.
    pub fn page(&mut self, items: Vec<T>, next: Option<T::Key>) -> Result<(), BadPage> {
        let Some(from) = self.next.filter(|_| self.asked) else {
            return Err(BadPage);
        };
        let first_fits = items.first().is_none_or(|i| i.key() >= from);
        let sorted = items.windows(2).all(|pair| pair[0].key() < pair[1].key());
        let advances =
            next.is_none_or(|n| n > from && items.last().is_none_or(|last| n > last.key()));
        if !(first_fits && sorted && advances) {
            return Err(BadPage);
        }
        self.asked = false;
        self.items = items.into();
        self.next = next;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn digest(chunk: u32) -> ChunkDigest {
        ChunkDigest {
            chunk: ChunkIndex(chunk),
            digest: 1,
        }
    }

    #[test]
    fn pages_follow_each_other_and_end() {
        let mut listing = Listing::from(ChunkIndex(2));
        assert_eq!(listing.wants(), Some(ChunkIndex(2)));
        assert_eq!(listing.wants(), None);
        listing
            .page(vec![digest(2), digest(5)], Some(ChunkIndex(6)))
            .unwrap();
        assert_eq!(listing.take().unwrap().chunk, ChunkIndex(2));
        assert_eq!(listing.wants(), None);
        assert_eq!(listing.take().unwrap().chunk, ChunkIndex(5));
        assert!(listing.starved());
        assert_eq!(listing.wants(), Some(ChunkIndex(6)));
        listing.page(vec![], None).unwrap();
        assert!(!listing.starved() && listing.head().is_none());
    }

    #[test]
    fn faulty_pages_are_refused() {
        let refused = |items: Vec<ChunkDigest>, next: Option<u32>| {
            let mut listing = Listing::from(ChunkIndex(4));
            listing.wants();
            listing.page(items, next.map(ChunkIndex)).is_err()
        };
        assert!(refused(vec![digest(3)], None));
        assert!(refused(vec![digest(6), digest(5)], None));
        assert!(refused(vec![digest(5), digest(5)], None));
        assert!(refused(vec![digest(5)], Some(5)));
        assert!(refused(vec![], Some(4)));
        assert!(!refused(vec![digest(5)], Some(6)));
        let mut unasked = Listing::<ChunkDigest>::from(ChunkIndex(0));
        assert!(unasked.page(vec![], None).is_err());
    }
}
