//! Sending: a queue of shared buffers, and one vectored send in flight that carries all that is ready.
//!
//! Invariants:
//! - While a send is in flight, the buffers that it names stay at the front of `queue`, and `header` and
//!   `vectors` are not touched. Moving an `Output` or a `Bytes` moves neither the bytes nor the vectors.
//! - `queued` is the number of bytes in `queue` and `staging` that are not sent yet.

use std::collections::VecDeque;
use std::ptr;

use bytes::{Buf, Bytes, BytesMut};

/// Buffers of one send.
const VECTORS_MAX: usize = 256;
/// Buffers up to this size are copied together: cheaper than a vector and an allocation each.
const COPY_MAX: usize = 512;
/// Room for copied buffers that is allocated at once.
const STAGING: usize = 16 * 1024;
/// Bytes of one send at most, so that its result fits into an i32.
const SEND_MAX: usize = 1 << 30;

/// What to hand to the kernel.
pub(super) enum Send {
    /// One buffer.
    Plain(*const u8, u32),
    /// Several.
    Vectored(*const libc::msghdr),
}

pub(super) struct Output {
    queue: VecDeque<Bytes>,
    /// Small buffers, behind all of `queue`.
    staging: BytesMut,
    queued: usize,
    in_flight: bool,
    vectors: Vec<libc::iovec>,
    header: Box<libc::msghdr>,
}

impl Output {
    pub fn new() -> Self {
        let header = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: ptr::null_mut(),
            msg_iovlen: 0,
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        Self {
            queue: VecDeque::new(),
            staging: BytesMut::new(),
            queued: 0,
            in_flight: false,
            vectors: Vec::new(),
            header: Box::new(header),
        }
    }

    pub fn queued(&self) -> usize {
        self.queued
    }

    pub fn in_flight(&self) -> bool {
        self.in_flight
    }

    pub fn is_ready(&self) -> bool {
        self.queued > 0 && !self.in_flight
    }

    pub fn push_copy(&mut self, bytes: &[u8]) {
        self.queued += bytes.len();
        if self.staging.capacity() - self.staging.len() < bytes.len() {
            self.staging.reserve(STAGING.max(bytes.len()));
        }
        self.staging.extend_from_slice(bytes);
    }

    pub fn push(&mut self, bytes: Bytes) {
        if bytes.len() <= COPY_MAX {
            return self.push_copy(&bytes);
        }
        self.seal();
        self.queued += bytes.len();
        self.queue.push_back(bytes);
    }

    fn seal(&mut self) {
        if !self.staging.is_empty() {
            self.queue.push_back(self.staging.split().freeze());
        }
    }

    /// Starts a send of what is queued. The pointers are valid until `complete`, if this Output is
    /// neither dropped nor cleared before.
    pub fn prepare(&mut self) -> Send {
        assert!(self.is_ready(), "one send at a time, of something");
        self.in_flight = true;
        self.seal();
        if let (1, Some(only)) = (self.queue.len(), self.queue.front()) {
            return Send::Plain(only.as_ptr(), only.len().min(SEND_MAX) as u32);
        }
        self.vectors.clear();
        let mut total = 0;
        for bytes in self.queue.iter().take(VECTORS_MAX) {
            let iov_len = bytes.len().min(SEND_MAX - total);
            total += iov_len;
            self.vectors.push(libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len,
            });
        }
        self.header.msg_iov = self.vectors.as_mut_ptr();
        self.header.msg_iovlen = self.vectors.len() as _;
        Send::Vectored(&raw const *self.header)
    }

    /// The send ended; `count` bytes are sent.
    pub fn complete(&mut self, count: usize) {
        assert!(
            self.in_flight && count <= self.queued,
            "more bytes sent than queued"
        );
        self.in_flight = false;
        self.queued -= count;
        let mut rest = count;
        while let Some(front) = self.queue.front_mut() {
            if rest < front.len() {
                front.advance(rest);
                return;
            }
            rest -= front.len();
            self.queue.pop_front();
        }
        assert_eq!(rest, 0, "the queue held what was sent");
    }

    /// Forgets what is not in flight.
    pub fn discard(&mut self) {
        if !self.in_flight {
            self.queue.clear();
            self.staging.clear();
            self.queued = 0;
        }
    }
}
