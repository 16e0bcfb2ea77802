//! Receiving without copies: where the kernel writes, and what the consumer sees.
//!
//! A connection has two `BytesMut`: `received`, the consumer's, and `landing`, always of length 0, whose
//! spare capacity the kernel writes to while a receive is in flight. When the receive completes, the
//! filled part is split off `landing` and appended to `received`. Both are adjacent parts of one
//! allocation as a rule, and then `unsplit` appends by adding lengths.
//!
//! Why this is sound: `BytesMut` touches memory only within its own pointer and capacity, and parts that
//! were split from one allocation are disjoint. While both live, the allocation is shared, so nothing
//! that a consumer does to `received` (reserve, extend, split, clear, replace) can move or reuse
//! `landing`'s part. `landing` itself is private and left alone while a receive is in flight
//! (`prepare` asserts it), and is dropped only after the receive's completion (see `Connection`).
//!
//! Copies happen only when the landing part runs out in the middle of a frame: then the partial frame
//! moves to a new allocation, big enough for what the consumer `reserve`d. The size of landing parts
//! follows the frames seen, so that frames of 1 MiB arrive whole. A consumer can ask that a place in the
//! frame be aligned in memory, so that a device takes the data from there as they are. Used-up allocations are kept and used
//! again when nobody refers to them any more, which spares page faults.
#![expect(unsafe_code, reason = "the kernel fills the spare capacity")]

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, BytesMut};

/// A receive is not started into less than this.
const SPARE_MIN: usize = 64 * 1024;
/// Room beyond a reserved frame, for the beginning of the next one.
const SLACK: usize = 16 * 1024;
/// Alignment of the place that a consumer asks to be aligned: what any device wants.
const ALIGNMENT: usize = 4096;
/// Largest size that landing parts grow to by themselves.
const TARGET_MAX: usize = 4 * 1024 * 1024;
/// Largest frame that a consumer can reserve.
pub const RESERVE_MAX: usize = 64 * 1024 * 1024;
/// Received but unconsumed bytes at which receiving stops by itself.
pub const INPUT_MAX: usize = RESERVE_MAX + TARGET_MAX;
/// Used-up allocations that a reactor keeps for reuse, in bytes.
const RETIRED_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Retired allocations looked at in search of a free one.
const RETIRED_SEARCH: usize = 8;

pub(super) struct Input {
    /// The consumer's part.
    pub received: BytesMut,
    landing: BytesMut,
    /// Size of the allocation that `landing` belongs to.
    landing_size: usize,
    in_flight: bool,
    /// Total bytes of the frame that the consumer waits for; 0: unknown.
    wanted: usize,
    /// What is so far from the start of an allocation is to be aligned in memory.
    aligned_at: Option<usize>,
    /// Size of the next allocation.
    target: usize,
    reserved_since: bool,
}

impl Input {
    pub fn new(target: usize) -> Self {
        Self {
            received: BytesMut::new(),
            landing: BytesMut::new(),
            landing_size: 0,
            in_flight: false,
            wanted: 0,
            aligned_at: None,
            target,
            reserved_since: false,
        }
    }

    pub fn in_flight(&self) -> bool {
        self.in_flight
    }

    /// The consumer waits for `total` bytes in one piece, with the byte at `aligned_at` aligned if it can be
    /// had. Later frames are expected to be alike.
    pub fn reserve(&mut self, total: usize, aligned_at: Option<usize>) {
        self.aligned_at = aligned_at;
        self.wanted = total.min(RESERVE_MAX);
        self.reserved_since = true;
        self.target = self.target.max((self.wanted + SLACK).min(TARGET_MAX));
    }

    /// Where the next receive goes: pointer and length, valid until `complete`. The caller starts a
    /// receive.
    pub fn prepare(&mut self, retired: &mut Retired) -> (*mut u8, u32) {
        assert!(!self.in_flight, "one receive at a time");
        let have = self.received.len();
        if have == 0 {
            // Gives up the consumer's reference, so that the allocation can be used from its start.
            self.received = BytesMut::new();
            // No matter if it cannot: what remains of it is checked below.
            let _ = self.landing.try_reclaim(self.landing_size);
            self.align();
        }
        let missing = self.wanted.saturating_sub(have);
        if self.landing.capacity() < missing.max(SPARE_MIN) {
            self.replace(have, retired);
        }
        self.in_flight = true;
        let spare = self.landing.spare_capacity_mut();
        (
            spare.as_mut_ptr().cast(),
            u32::try_from(spare.len()).unwrap_or(u32::MAX),
        )
    }

    /// Moves the start of the landing part to where `aligned_at` bytes further is aligned.
    fn align(&mut self) {
        let Some(at) = self.aligned_at else { return };
        let start = self.landing.as_ptr() as usize + at;
        let pad = start.next_multiple_of(ALIGNMENT) - start;
        if pad > 0 && self.landing.capacity() > pad + self.wanted.max(SPARE_MIN) {
            self.landing.put_bytes(0, pad);
            self.landing.advance(pad);
        }
    }

    fn replace(&mut self, have: usize, retired: &mut Retired) {
        if !self.reserved_since {
            self.target = (self.target - self.target / 8).max(retired.size_default);
        }
        self.reserved_since = false;
        let frame = if self.wanted > have {
            self.wanted + SLACK
        } else {
            have * 2 + SPARE_MIN
        };
        let size = if have == 0 && self.wanted == 0 {
            self.target
        } else {
            frame.max(self.target)
        };
        let slack = self.aligned_at.map_or(0, |_| ALIGNMENT);
        let (fresh, fresh_size) = retired.take(size + slack);
        retired.put(
            std::mem::replace(&mut self.landing, fresh),
            self.landing_size,
        );
        self.landing_size = fresh_size;
        self.align();
        if have > 0 {
            self.landing.extend_from_slice(&self.received);
            self.received = self.landing.split();
        }
    }

    /// The receive ended with `count` bytes.
    ///
    /// # Safety
    /// The kernel has written `count` bytes to where the last `prepare` pointed, and is done.
    pub unsafe fn complete(&mut self, count: usize) {
        assert!(
            self.in_flight && count <= self.landing.capacity(),
            "more bytes than there was room for"
        );
        self.in_flight = false;
        // SAFETY: within the capacity, and initialised by the kernel as the caller promises.
        unsafe { self.landing.set_len(count) };
        let filled = self.landing.split();
        if self.received.is_empty() {
            self.received = filled;
        } else {
            self.received.unsplit(filled);
        }
        if self.received.len() >= self.wanted {
            self.wanted = 0;
        }
    }
}

/// Allocations whose landing part ran out, for reuse once their data is dropped.
pub(super) struct Retired {
    parts: VecDeque<(BytesMut, usize)>,
    bytes: usize,
    size_default: usize,
}

impl Retired {
    pub fn new(size_default: usize) -> Self {
        Self {
            parts: VecDeque::new(),
            bytes: 0,
            size_default,
        }
    }

    fn take(&mut self, size: usize) -> (BytesMut, usize) {
        for index in 0..self.parts.len().min(RETIRED_SEARCH) {
            let (part, part_size) = &mut self.parts[index];
            if *part_size >= size && part.try_reclaim(*part_size) {
                self.bytes -= *part_size;
                return self.parts.swap_remove_back(index).expect("just looked at");
            }
        }
        (BytesMut::with_capacity(size), size)
    }

    fn put(&mut self, part: BytesMut, size: usize) {
        if size == 0 {
            return;
        }
        self.bytes += size;
        self.parts.push_back((part, size));
        while self.bytes > RETIRED_BYTES_MAX {
            let Some((_, size)) = self.parts.pop_front() else {
                break;
            };
            self.bytes -= size;
        }
    }
}
