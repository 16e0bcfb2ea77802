//! Memory for O_DIRECT: buffers aligned to 4096 bytes, drawn from a pool and returned to it when the last
//! reference is dropped, on whichever thread that happens.
//!
//! Invariants:
//! - The whole capacity of a buffer is initialised from birth (zeroed once, later old contents), so no
//!   method can expose uninitialised memory; `resize` zeroes what it adds, `set_len` does not.
//! - A buffer has one owner until `freeze`, and is immutable after it.
//! - A pool keeps at most its bound of idle bytes; the rest goes back to the allocator.
#![expect(unsafe_code, reason = "aligned allocation")]

use std::alloc::{self, Layout};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Alignment of every buffer's start and capacity.
pub const ALIGNMENT: usize = 4096;
/// Largest buffer that a pool keeps; larger ones are allocated exactly and freed.
pub const POOLED_MAX: usize = 4 * 1024 * 1024;
/// Idle bytes that a pool keeps unless told otherwise.
pub const POOL_IDLE_MAX: usize = 16 * 1024 * 1024;
/// Capacities of pooled buffers: 2^k and 3 * 2^(k-1) times 4 KiB, so that at most a third is wasted.
const CLASSES: usize = 21;

/// Memory of `ALIGNMENT`-aligned, fully initialised bytes.
struct Block {
    start: NonNull<u8>,
    capacity: usize,
}

// SAFETY: a Block owns its memory exclusively, as a Vec does.
unsafe impl Send for Block {}
// SAFETY: shared access to a Block only reads.
unsafe impl Sync for Block {}

impl Block {
    fn layout(capacity: usize) -> Layout {
        debug_assert!(capacity > 0 && capacity.is_multiple_of(ALIGNMENT));
        Layout::from_size_align(capacity, ALIGNMENT).expect("a capacity below isize::MAX")
    }

    fn allocate(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero: callers round up to at least one ALIGNMENT.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            alloc::handle_alloc_error(layout)
        };
        Self { start, capacity }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `allocate` with the same layout and owned by this Block alone.
        unsafe { alloc::dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
    }
}

/// A growable-up-to-its-capacity byte buffer whose start is aligned to [`ALIGNMENT`].
pub struct AlignedBuffer {
    /// Always some, except while being dropped.
    block: Option<Block>,
    length: usize,
    pool: Option<BufferPool>,
}

impl AlignedBuffer {
    /// An empty buffer outside any pool, of at least `capacity` bytes.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            block: Some(Block::allocate(round_up(capacity))),
            length: 0,
            pool: None,
        }
    }

    /// A buffer of `length` zero bytes outside any pool.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let mut buffer = Self::with_capacity(length);
        buffer.length = length;
        buffer
    }

    fn block(&self) -> &Block {
        self.block.as_ref().expect("present until dropped")
    }

    /// Bytes that fit: a multiple of [`ALIGNMENT`].
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.block().capacity
    }

    /// Bytes that may still be appended.
    #[must_use]
    pub fn spare(&self) -> usize {
        self.capacity() - self.length
    }

    /// Sets the length; bytes that it adds have unspecified (old) contents.
    ///
    /// # Panics
    /// If `length` exceeds the capacity.
    pub fn set_len(&mut self, length: usize) {
        assert!(
            length <= self.capacity(),
            "{length} bytes in a buffer of {}",
            self.capacity()
        );
        self.length = length;
    }

    /// Sets the length; bytes that it adds are zero.
    ///
    /// # Panics
    /// If `length` exceeds the capacity.
    pub fn resize(&mut self, length: usize) {
        let old = self.length;
        self.set_len(length);
        if length > old {
            self[old..].fill(0);
        }
    }

    /// Appends zeros up to a multiple of `alignment` bytes.
    ///
    /// # Panics
    /// If that exceeds the capacity or `alignment` is zero.
    pub fn pad_to(&mut self, alignment: usize) {
        self.resize(self.length.next_multiple_of(alignment));
    }

    /// Appends bytes.
    ///
    /// # Panics
    /// If they exceed the capacity.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let old = self.length;
        self.set_len(old + bytes.len());
        self[old..].copy_from_slice(bytes);
    }

    /// Empties the buffer.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// Makes the buffer immutable and shareable, without a copy. It returns to its pool when the last
    /// slice of it is dropped.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        if self.length == 0 {
            Bytes::new()
        } else {
            Bytes::from_owner(self)
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the block is valid and initialised for its capacity, and length <= capacity.
        unsafe { std::slice::from_raw_parts(self.block().start.as_ptr(), self.length) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the block is owned by this buffer alone.
        unsafe { std::slice::from_raw_parts_mut(self.block().start.as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for AlignedBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "AlignedBuffer({} of {} bytes)",
            self.length,
            self.capacity()
        )
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        if let (Some(pool), Some(block)) = (self.pool.take(), self.block.take()) {
            pool.put_back(block);
        }
    }
}

/// Idle buffers by size class; clones share them.
#[derive(Clone)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

struct Shared {
    idle: Mutex<Idle>,
    idle_max: usize,
}

struct Idle {
    classes: [Vec<Block>; CLASSES],
    bytes: usize,
}

impl Default for BufferPool {
    fn default() -> Self {
        Self::new(POOL_IDLE_MAX)
    }
}

impl BufferPool {
    /// A pool that keeps at most `idle_max` bytes of unused buffers.
    #[must_use]
    pub fn new(idle_max: usize) -> Self {
        let idle = Mutex::new(Idle {
            classes: std::array::from_fn(|_| Vec::new()),
            bytes: 0,
        });
        Self {
            shared: Arc::new(Shared { idle, idle_max }),
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.shared
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty buffer of at least `capacity` bytes.
    #[must_use]
    pub fn with_capacity(&self, capacity: usize) -> AlignedBuffer {
        let Some((class, capacity)) = class_for(capacity) else {
            return AlignedBuffer::with_capacity(capacity);
        };
        let reused = {
            let mut idle = self.idle();
            let block = idle.classes[class].pop();
            if block.is_some() {
                idle.bytes -= capacity;
            }
            block
        };
        let block = reused.unwrap_or_else(|| Block::allocate(capacity));
        AlignedBuffer {
            block: Some(block),
            length: 0,
            pool: Some(self.clone()),
        }
    }

    /// A buffer of `length` bytes with unspecified contents: for reads, which overwrite them.
    #[must_use]
    pub fn take(&self, length: usize) -> AlignedBuffer {
        let mut buffer = self.with_capacity(length);
        buffer.set_len(length);
        buffer
    }

    /// A copy of `bytes` in an aligned buffer.
    #[must_use]
    pub fn copy_of(&self, bytes: &[u8]) -> AlignedBuffer {
        let mut buffer = self.with_capacity(bytes.len());
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Bytes of unused buffers that the pool holds.
    #[must_use]
    pub fn idle_bytes(&self) -> usize {
        self.idle().bytes
    }

    fn put_back(&self, block: Block) {
        let Some((class, capacity)) = class_for(block.capacity) else {
            return;
        };
        debug_assert_eq!(capacity, block.capacity);
        let mut idle = self.idle();
        if idle.bytes + capacity <= self.shared.idle_max {
            idle.bytes += capacity;
            idle.classes[class].push(block);
        }
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferPool({} bytes idle)", self.idle_bytes())
    }
}

/// A capacity of at least one and otherwise whole multiples of [`ALIGNMENT`].
fn round_up(capacity: usize) -> usize {
    capacity.max(1).next_multiple_of(ALIGNMENT)
}

/// The size class that holds `capacity` bytes, and its capacity; `None` above [`POOLED_MAX`].
fn class_for(capacity: usize) -> Option<(usize, usize)> {
    if capacity > POOLED_MAX {
        return None;
    }
    let pages = round_up(capacity) / ALIGNMENT;
    // Classes: 1, 2, 3, 4, 6, 8, 12, ... pages: index 2k-1 is 3 * 2^(k-1) for k >= 1, index 2k is 2^k
    // shifted so that indexes ascend with sizes.
    let power = pages.next_power_of_two();
    let exponent = power.trailing_zeros() as usize;
    let three_quarters = power / 4 * 3;
    if exponent >= 2 && pages <= three_quarters {
        Some((2 * exponent - 1, three_quarters * ALIGNMENT))
    } else {
        Some((2 * exponent, power * ALIGNMENT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_ascend_hold_what_they_promise_and_map_to_themselves() {
        let mut last = (0, 0);
        for pages in 1..=POOLED_MAX / ALIGNMENT {
            let (class, capacity) = class_for(pages * ALIGNMENT - 1).expect("pooled");
            assert!(
                capacity >= pages * ALIGNMENT && capacity * 2 < pages * ALIGNMENT * 3 + ALIGNMENT
            );
            assert!(class < CLASSES && class >= last.0 && capacity >= last.1);
            assert_eq!(class_for(capacity), Some((class, capacity)));
            assert_eq!(class == last.0 && last.1 != 0, capacity == last.1);
            last = (class, capacity);
        }
        assert_eq!(class_for(POOLED_MAX + 1), None);
        assert_eq!(class_for(0), Some((0, ALIGNMENT)));
    }

    #[test]
    fn buffers_are_aligned_and_return_to_the_pool_after_the_last_slice() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(5000);
        assert_eq!(buffer.as_ptr().align_offset(ALIGNMENT), 0);
        buffer.fill(7);
        let address = buffer.as_ptr();
        let whole = buffer.freeze();
        assert_eq!(whole.as_ptr(), address);
        let slice = whole.slice(4096..);
        drop(whole);
        assert_eq!(pool.idle_bytes(), 0);
        assert!(slice.iter().all(|&byte| byte == 7));
        std::thread::spawn(move || drop(slice))
            .join()
            .expect("no panic");
        assert_eq!(pool.idle_bytes(), 8192);
        assert_eq!(pool.take(8192).as_ptr(), address);
    }

    #[test]
    fn the_pool_is_bounded_and_big_buffers_bypass_it() {
        let pool = BufferPool::new(10_000);
        let buffers = [
            pool.take(4096),
            pool.take(4096),
            pool.take(4096),
            pool.take(POOLED_MAX + 1),
        ];
        drop(buffers);
        assert_eq!(pool.idle_bytes(), 8192);
    }

    #[test]
    fn growth_is_zeroed_although_the_memory_was_used() {
        let pool = BufferPool::default();
        pool.take(4096).fill(9);
        let mut buffer = pool.with_capacity(4096);
        buffer.extend_from_slice(&[1, 2, 3]);
        buffer.pad_to(512);
        assert_eq!(buffer.len(), 512);
        assert_eq!(&buffer[..4], &[1, 2, 3, 0]);
        assert!(buffer[3..].iter().all(|&byte| byte == 0));
        buffer.clear();
        assert!(buffer.freeze().is_empty());
    }

    #[test]
    #[should_panic(expected = "in a buffer of")]
    fn a_buffer_does_not_grow_beyond_its_capacity() {
        AlignedBuffer::with_capacity(10).set_len(4097);
    }
}
