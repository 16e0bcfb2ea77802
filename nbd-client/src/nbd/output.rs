//! Bytes on their way to a client: headers gathered in one buffer, data appended by reference.
//!
//! Invariant: the concatenation of the buffers is the byte stream; adjoining headers share a buffer, so
//! that a batch of acknowledgements costs one buffer.

use bytes::{BufMut as _, Bytes, BytesMut};

/// Room for headers that is allocated at once.
const HEADER_ROOM: usize = 4096;
/// Data up to this length are copied beside their header: cheaper than one more buffer in the send.
const COPY_LIMIT: usize = 512;

/// A run of zero bytes that costs no memory.
pub static ZEROES: &[u8] = &[0; 64 * 1024];

/// Bytes to send, in order.
#[derive(Default, Debug)]
pub struct Output {
    headers: BytesMut,
    buffers: Vec<Bytes>,
}

impl Output {
    /// Appends a header's bytes.
    pub(super) fn header(&mut self, bytes: &[u8]) {
        if self.headers.capacity() - self.headers.len() < bytes.len() {
            self.headers.reserve(bytes.len().max(HEADER_ROOM));
        }
        self.headers.put_slice(bytes);
    }

    /// Appends data by reference (small data are copied).
    pub(super) fn data(&mut self, data: Bytes) {
        if data.len() <= COPY_LIMIT {
            self.header(&data);
        } else {
            self.seal();
            self.buffers.push(data);
        }
    }

    /// Appends zero bytes.
    pub(super) fn zeroes(&mut self, mut length: usize) {
        while length > 0 {
            let part = length.min(ZEROES.len());
            self.data(Bytes::from_static(&ZEROES[..part]));
            length -= part;
        }
    }

    fn seal(&mut self) {
        if !self.headers.is_empty() {
            self.buffers.push(self.headers.split().freeze());
        }
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.headers.is_empty() && self.buffers.is_empty()
    }

    /// Takes everything out, in order.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Bytes> {
        self.seal();
        self.buffers.drain(..)
    }

    /// Everything as one buffer, for tests.
    #[cfg(test)]
    pub(super) fn take_all(&mut self) -> Vec<u8> {
        self.drain().flat_map(|b| b.to_vec()).collect()
    }
}
