//! Requests under way, found by the tag that travels through the store.
//!
//! Invariant: a tag is a slot and its generation, so an answer that comes twice or late finds nothing.

/// A slab with generations.
pub struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    used: usize,
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            used: 0,
        }
    }
}

impl<T> Table<T> {
    /// Entries.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Adds an entry; its tag.
    pub fn insert(&mut self, value: T) -> u64 {
        self.used += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                value: None,
            });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.value = Some(value);
        u64::from(slot.generation) << 32 | u64::from(index)
    }

    /// Takes an entry out.
    pub fn remove(&mut self, tag: u64) -> Option<T> {
        let slot = self.slots.get_mut((tag & u64::from(u32::MAX)) as usize)?;
        if u64::from(slot.generation) != tag >> 32 {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(tag as u32);
        self.used -= 1;
        Some(value)
    }

    /// Takes an entry out by its slot alone, for those that know it is theirs.
    pub fn remove_slot(&mut self, index: u32) -> Option<T> {
        let generation = self.slots.get(index as usize)?.generation;
        self.remove(u64::from(generation) << 32 | u64::from(index))
    }

    /// The entries, for the invariants.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_not_reused() {
        let mut table = Table::default();
        let first = table.insert("a");
        assert_eq!(table.remove(first), Some("a"));
        let second = table.insert("b");
        assert_ne!(first, second);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.remove_slot(second as u32), Some("b"));
        assert_eq!(table.len(), 0);
        assert_eq!(table.remove(u64::MAX), None);
    }
}
