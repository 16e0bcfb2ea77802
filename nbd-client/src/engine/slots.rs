//! Small containers of the hot path: a slab with generations, a set of peers, the window of versions.
//!
//! Invariants:
//! - A [`Key`] never reaches a later value in the same slot (its generation differs).
//! - [`Window`] knows for every sequence drawn whether its write is still in flight; its front is the
//!   oldest write in flight, so the watermark (R5) and the drain test (R7) cost nothing.

use std::collections::VecDeque;

use ashlar_proto::ids::{Epoch, Version};

/// Generations fit in the request id beside the slot.
const GENERATION_MASK: u32 = 0x00ff_ffff;

/// Names a value in a [`Slab`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Key {
    pub(super) index: u32,
    pub(super) generation: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// Values in reusable slots.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }

    pub(super) fn insert(&mut self, value: T) -> Key {
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.value = Some(value);
            return Key {
                index,
                generation: slot.generation,
            };
        }
        let index = self.slots.len() as u32;
        self.slots.push(Slot {
            generation: 1,
            value: Some(value),
        });
        Key {
            index,
            generation: 1,
        }
    }

    pub(super) fn get(&self, key: Key) -> Option<&T> {
        let slot = self.slots.get(key.index as usize)?;
        if slot.generation == key.generation {
            slot.value.as_ref()
        } else {
            None
        }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation == key.generation {
            slot.value.as_mut()
        } else {
            None
        }
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) & GENERATION_MASK;
        self.free.push(key.index);
        Some(value)
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// In slot order: deterministic.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| {
            let key = Key {
                index: i as u32,
                generation: s.generation,
            };
            s.value.as_ref().map(|v| (key, v))
        })
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        self.slots.iter_mut().enumerate().filter_map(|(i, s)| {
            let key = Key {
                index: i as u32,
                generation: s.generation,
            };
            s.value.as_mut().map(|v| (key, v))
        })
    }

    /// The keys whose values satisfy a test, for loops that change the slab.
    pub(super) fn keys_where(&self, mut test: impl FnMut(&T) -> bool) -> Vec<Key> {
        self.iter()
            .filter(|(_, v)| test(v))
            .map(|(k, _)| k)
            .collect()
    }
}

/// Most disks of one volume that a session can talk to.
pub(super) const PEERS_MAX: usize = 64;

/// A set of peers (indexes below [`PEERS_MAX`]).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct PeerSet(pub(super) u64);

impl PeerSet {
    pub(super) const EMPTY: Self = Self(0);

    pub(super) fn contains(self, peer: u8) -> bool {
        self.0 >> peer & 1 == 1
    }
    pub(super) fn insert(&mut self, peer: u8) {
        self.0 |= 1 << peer;
    }
    pub(super) fn remove(&mut self, peer: u8) {
        self.0 &= !(1 << peer);
    }
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
    pub(super) fn len(self) -> usize {
        self.0.count_ones() as usize
    }
    pub(super) fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    pub(super) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    pub(super) fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
    pub(super) fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    pub(super) fn covers(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }
    pub(super) fn first(self) -> Option<u8> {
        (self.0 != 0).then(|| self.0.trailing_zeros() as u8)
    }
    /// The n-th member (n below `len`), counting from the lowest.
    pub(super) fn nth(self, n: usize) -> Option<u8> {
        self.iter().nth(n)
    }
    pub(super) fn iter(self) -> impl Iterator<Item = u8> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let peer = rest.trailing_zeros() as u8;
            rest &= rest - 1;
            Some(peer)
        })
    }
}

impl FromIterator<u8> for PeerSet {
    fn from_iter<I: IntoIterator<Item = u8>>(peers: I) -> Self {
        Self(peers.into_iter().fold(0, |mask, peer| mask | 1 << peer))
    }
}

/// Draws versions and knows which of them belong to writes in flight.
#[derive(Debug)]
pub(super) struct Window {
    /// Sequence of the front entry.
    base: u64,
    entries: VecDeque<(Epoch, bool)>,
    last: Version,
}

impl Window {
    pub(super) fn new(epoch: Epoch) -> Self {
        Self {
            base: 1,
            entries: VecDeque::new(),
            last: Version {
                epoch,
                ..Version::ZERO
            },
        }
    }

    /// A new version, higher than all before; in flight until [`Self::settle`].
    pub(super) fn draw(&mut self, epoch: Epoch) -> Version {
        let sequence = self.base + self.entries.len() as u64;
        self.entries.push_back((epoch, true));
        self.last = Version::new(epoch.0, sequence);
        self.last
    }

    /// The write of a version is acknowledged (or failed everywhere).
    pub(super) fn settle(&mut self, version: Version) {
        if let Some(index) = version.sequence.0.checked_sub(self.base)
            && let Some(entry) = self.entries.get_mut(index as usize)
        {
            entry.1 = false;
        }
        while let Some((_, false)) = self.entries.front() {
            self.entries.pop_front();
            self.base += 1;
        }
    }

    /// Whether a version belongs to one of this session's writes in flight.
    pub(super) fn in_flight(&self, version: Version) -> bool {
        version
            .sequence
            .0
            .checked_sub(self.base)
            .and_then(|i| self.entries.get(i as usize))
            .is_some_and(|e| e.1 && e.0 == version.epoch)
    }

    /// The highest version V such that no write with a version at or below V is in flight.
    pub(super) fn settled_below(&self) -> Version {
        match self.entries.front() {
            Some((epoch, _)) => Version::new(epoch.0, self.base - 1),
            None => self.last,
        }
    }

    /// Whether a write with a version of an epoch below `epoch` is in flight.
    pub(super) fn in_flight_below(&self, epoch: Epoch) -> bool {
        self.entries.front().is_some_and(|e| e.0 < epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_does_not_reach_the_slot_s_next_value() {
        let mut slab = Slab::new();
        let a = slab.insert(1);
        assert_eq!(slab.remove(a), Some(1));
        let b = slab.insert(2);
        assert_eq!(a.index, b.index);
        assert_eq!(slab.get(a), None);
        assert_eq!(slab.get(b), Some(&2));
    }

    #[test]
    fn the_window_s_front_is_the_oldest_write_in_flight() {
        let mut window = Window::new(Epoch(3));
        assert_eq!(window.settled_below(), Version::new(3, 0));
        let a = window.draw(Epoch(3));
        let b = window.draw(Epoch(4));
        assert!(window.in_flight_below(Epoch(4)));
        window.settle(b);
        assert!(window.in_flight(a) && !window.in_flight(b));
        assert_eq!(window.settled_below(), Version::new(3, 0));
        window.settle(a);
        assert!(!window.in_flight_below(Epoch(9)));
        assert_eq!(window.settled_below(), Version::new(4, 2));
    }
}
