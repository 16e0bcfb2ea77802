//! Which pages are free, and how many are promised.
//!
//! Invariants:
//! - `available() >= reserved`: every block that the log admitted and that has no home finds a page.
//! - A page is handed out only below the high-water mark, where its sector is initialised on disk.
//! - Pages are given back (`release`) only when nothing on disk names them any more.

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
        self.free_count + (self.page_count - self.high_water)
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
                return Some(word as u32 * 64 + bit);
            }
        }
        None
    }

    /// The page is free again.
    pub(super) fn release(&mut self, page: u32) {
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
            self.release(page);
        }
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
}
