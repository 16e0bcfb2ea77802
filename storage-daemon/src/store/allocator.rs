//! Which pages are free, and how many are promised.
//!
//! Invariants:
//! - `available() >= reserved`: every block that the log admitted and that has no home finds a page.
//! - A page is handed out only below the high-water mark, where its sector is initialised on disk.
//! - Pages are given back (`release`) only when nothing on disk names them any more.
//! - A page that is held for a discard is available, and not free: it comes back soon.
//! - `fresh` and `due` are subsets of `free`.

/// The pages of a disk.
#[derive(Debug)]
pub(super) struct Allocator {
    /// Bit set: free.
    free: Vec<u64>,
    free_count: u32,
    page_count: u32,
    high_water: u32,
    reserved: u32,
    cursor: usize,
    /// Free pages that the device has not been told of: given back lately, and before that.
    fresh: Vec<u64>,
    fresh_count: u32,
    due: Vec<u64>,
    due_count: u32,
    /// Pages that are being discarded.
    held: u32,
    /// Where the next page to be discarded is looked for.
    discard_cursor: usize,
}

/// Clears a bit; whether it was set.
fn clear(map: &mut [u64], page: u32) -> bool {
    let Some(word) = map.get_mut(page as usize / 64) else {
        return false;
    };
    let before = *word;
    *word &= !(1 << (page % 64));
    *word != before
}

impl Allocator {
    /// Everything below `high_water` is in use until released.
    pub(super) fn new(page_count: u32, high_water: u32) -> Self {
        Self {
            free: vec![0; (high_water as usize).div_ceil(64)],
            free_count: 0,
            page_count,
            high_water,
            reserved: 0,
            cursor: 0,
            fresh: Vec::new(),
            fresh_count: 0,
            due: Vec::new(),
            due_count: 0,
            held: 0,
            discard_cursor: 0,
        }
    }

    pub(super) fn page_count(&self) -> u32 {
        self.page_count
    }

    pub(super) fn high_water(&self) -> u32 {
        self.high_water
    }

    /// Free pages below the high-water mark: those that `allocate` can hand out now.
    pub(super) fn ready(&self) -> u32 {
        self.free_count
    }

    /// Free pages in all.
    pub(super) fn available(&self) -> u32 {
        self.free_count + self.held + (self.page_count - self.high_water)
    }

    /// Pages in use or promised.
    pub(super) fn used(&self) -> u32 {
        self.page_count - self.available() + self.reserved
    }

    /// Pages promised.
    pub(super) fn reserved(&self) -> u32 {
        self.reserved
    }

    pub(super) fn can_reserve(&self, count: u32) -> bool {
        self.available() >= self.reserved.saturating_add(count)
    }

    pub(super) fn reserve(&mut self) {
        self.reserved += 1;
    }

    pub(super) fn unreserve(&mut self) {
        debug_assert!(self.reserved > 0);
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// A page that was not promised to anybody.
    pub(super) fn allocate_unreserved(&mut self) -> Option<u32> {
        if self.available() > self.reserved {
            self.take()
        } else {
            None
        }
    }

    /// A page against one reservation.
    pub(super) fn allocate_reserved(&mut self) -> Option<u32> {
        let page = self.take()?;
        self.unreserve();
        Some(page)
    }

    fn take(&mut self) -> Option<u32> {
        if self.free_count == 0 {
            return None;
        }
        let words = self.free.len();
        for step in 0..=words {
            let word = (self.cursor + step) % words;
            if self.free[word] != 0 {
                let bit = self.free[word].trailing_zeros();
                self.free[word] &= !(1 << bit);
                self.free_count -= 1;
                self.cursor = word;
                let page = word as u32 * 64 + bit;
                self.fresh_count -= u32::from(clear(&mut self.fresh, page));
                self.due_count -= u32::from(clear(&mut self.due, page));
                return Some(page);
            }
        }
        None
    }

    /// The page is free again, and the device does not know it.
    pub(super) fn release(&mut self, page: u32) {
        self.set_free(page);
        self.fresh.resize(self.free.len(), 0);
        if let Some(word) = self.fresh.get_mut(page as usize / 64) {
            *word |= 1 << (page % 64);
            self.fresh_count += 1;
        }
    }

    fn set_free(&mut self, page: u32) {
        debug_assert!(page < self.high_water);
        let (word, bit) = (page as usize / 64, page % 64);
        if let Some(w) = self.free.get_mut(word) {
            debug_assert!(*w & (1 << bit) == 0, "page {page} released twice");
            if *w & (1 << bit) == 0 {
                *w |= 1 << bit;
                self.free_count += 1;
            }
        }
    }

    /// The sectors below the new mark are initialised: its pages are free.
    pub(super) fn raise_high_water(&mut self, high_water: u32) {
        let from = self.high_water;
        self.free.resize((high_water as usize).div_ceil(64), 0);
        self.high_water = high_water;
        for page in from..high_water {
            self.set_free(page);
        }
    }

    /// Whether there are pages that were given back since the last `age`.
    pub(super) fn has_fresh(&self) -> bool {
        self.fresh_count > 0
    }

    /// What was given back until now is due for a discard, unless it is handed out before.
    pub(super) fn age(&mut self) {
        self.due.resize(self.fresh.len(), 0);
        for (due, fresh) in self.due.iter_mut().zip(&mut self.fresh) {
            *due |= std::mem::take(fresh);
        }
        self.due_count += std::mem::take(&mut self.fresh_count);
    }

    /// Takes a run of pages that are due, at most `max` and half of those that could be handed out: (first,
    /// count). They come back with `put_back`.
    pub(super) fn hold_due(&mut self, max: u32) -> Option<(u32, u32)> {
        let max = max.min(self.free_count / 2);
        if max == 0 || self.due_count == 0 {
            return None;
        }
        let words = self.due.len();
        let word = (0..words)
            .map(|step| (self.discard_cursor + step) % words)
            .find(|word| self.due[*word] != 0)?;
        let first = word as u32 * 64 + self.due[word].trailing_zeros();
        let mut count = 0;
        while count < max && clear(&mut self.due, first + count) {
            clear(&mut self.free, first + count);
            count += 1;
        }
        self.discard_cursor = word;
        self.due_count -= count;
        self.free_count -= count;
        self.held += count;
        Some((first, count))
    }

    /// The discard of these pages is done.
    pub(super) fn put_back(&mut self, first: u32, count: u32) {
        for page in first..first + count {
            self.set_free(page);
        }
        self.held -= count;
    }

    /// No page is to be discarded.
    pub(super) fn forget_discards(&mut self) {
        (self.fresh, self.due) = (Vec::new(), Vec::new());
        (self.fresh_count, self.due_count) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_kept_and_pages_come_back() {
        let mut a = Allocator::new(4, 0);
        a.raise_high_water(4);
        a.reserve();
        assert_eq!((a.used(), a.reserved()), (1, 1));
        assert!(a.can_reserve(3) && !a.can_reserve(4));
        assert_eq!(
            [(); 3].map(|()| a.allocate_unreserved()),
            [Some(0), Some(1), Some(2)]
        );
        assert_eq!(a.allocate_unreserved(), None);
        assert_eq!(a.allocate_reserved(), Some(3));
        assert_eq!((a.used(), a.reserved()), (4, 0));
        a.release(2);
        assert_eq!(a.allocate_unreserved(), Some(2));
    }

    #[test]
    fn pages_that_stay_free_are_held_for_a_discard_and_come_back() {
        let mut a = Allocator::new(200, 200);
        for page in [3, 4, 5, 9, 130, 131] {
            a.release(page);
        }
        assert!(a.has_fresh());
        assert_eq!(a.hold_due(10), None, "not before they aged");
        a.age();
        assert!(!a.has_fresh());
        assert_eq!(a.hold_due(10), Some((3, 3)), "half of the free pages");
        assert_eq!((a.available(), a.ready()), (6, 3));
        // What is held is not handed out; what is handed out is not discarded.
        assert_eq!(a.allocate_unreserved(), Some(9));
        assert_eq!(a.hold_due(10), Some((130, 1)));
        a.put_back(3, 3);
        a.put_back(130, 1);
        assert_eq!((a.available(), a.ready()), (5, 5));
        assert_eq!(a.hold_due(10), Some((131, 1)));
        a.put_back(131, 1);
        assert_eq!(a.hold_due(10), None, "each of them once");
        let pages: Vec<_> = std::iter::from_fn(|| a.allocate_unreserved()).collect();
        assert_eq!(pages.len(), 5);
    }

    #[test]
    fn the_last_free_page_is_never_held() {
        let mut a = Allocator::new(1, 1);
        a.release(0);
        a.age();
        assert_eq!(a.hold_due(10), None);
        assert_eq!(a.allocate_unreserved(), Some(0));
    }
}
