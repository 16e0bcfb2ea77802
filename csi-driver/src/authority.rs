//! Lets clients in whose `:authority` is no authority: some gRPC clients put the path of the unix socket there, as
//! in `/csi/csi.sock`, and the HTTP/2 library answers those with a protocol error before any of our code runs.
//!
//! The bytes that a client sends pass through [`Sanitizer`], which replaces the *value* of every literal
//! `:authority` by as many zeros, and leaves everything else as it is.
//!
//! Invariants:
//! - The value keeps its decoded length. An entry of HPACK's dynamic table counts by its decoded length (RFC 7541
//!   section 4.1), so both ends go on agreeing about what is in the table and at which index; hence no table is
//!   needed here, and an index (as of the second request) needs no change.
//! - A frame never grows: `0` has one of the shortest Huffman codes, 5 bits.
//! - What is not understood goes through unchanged, for the HTTP/2 library to judge. Memory is bounded by
//!   [`BLOCK_BYTES_MAX`].

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// What a client sends first (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of a frame's header: length 24 bits, type 8, flags 8, stream 32.
const FRAME_HEADER_LEN: usize = 9;
/// Largest payload that every receiver takes.
const FRAME_PAYLOAD_MAX: usize = 16_384;
/// Largest block of header fields that is looked at.
const BLOCK_BYTES_MAX: usize = 64 * 1024;
/// Bytes read at a time.
const READ_BYTES: usize = 16 * 1024;

const TYPE_HEADERS: u8 = 1;
const TYPE_CONTINUATION: u8 = 9;
const FLAG_END_HEADERS: u8 = 0x4;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// Index of `:authority` in the static table.
const STATIC_AUTHORITY: usize = 1;

/// How many symbols HPACK's Huffman code has of each length in bits. The code is canonical (RFC 7541 appendix B),
/// so this says where each code ends.
const HUFFMAN_LENGTHS: [u16; 31] = [
    0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19,
    29, 0, 4,
];

/// The transformation of a client's bytes.
#[derive(Debug, Default)]
pub struct Sanitizer {
    state: State,
    /// Bytes that wait for more.
    held: Vec<u8>,
    /// A header block whose end is not there yet.
    block: Option<Block>,
}

#[derive(Debug, Default, PartialEq)]
enum State {
    #[default]
    Preface,
    FrameHeader,
    /// So many bytes of a frame's payload go through.
    Pass(usize),
    /// A frame of a header block, payload of so many bytes.
    Collect(usize),
    /// No HTTP/2 that we understand: everything goes through.
    Blind,
}

#[derive(Debug)]
struct Block {
    flags: u8,
    stream: [u8; 4],
    /// Stream dependency and weight.
    priority: Vec<u8>,
    fragment: Vec<u8>,
}

impl Sanitizer {
    /// Takes bytes of the client; what may go on is added to `out`.
    pub fn push(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            let wanted = match self.state {
                State::Blind => {
                    out.extend_from_slice(input);
                    return;
                }
                State::Pass(left) => {
                    let (now, later) = input.split_at(left.min(input.len()));
                    out.extend_from_slice(now);
                    input = later;
                    self.state = match left - now.len() {
                        0 => State::FrameHeader,
                        left => State::Pass(left),
                    };
                    continue;
                }
                State::Preface => PREFACE.len(),
                State::FrameHeader => FRAME_HEADER_LEN,
                State::Collect(payload) => FRAME_HEADER_LEN + payload,
            };
            let take = (wanted - self.held.len()).min(input.len());
            let (now, later) = input.split_at(take);
            self.held.extend_from_slice(now);
            input = later;
            if self.held.len() == wanted {
                self.complete(out);
            }
        }
    }

    /// All that the state waited for is held.
    fn complete(&mut self, out: &mut Vec<u8>) {
        match self.state {
            State::Preface => {
                self.state = match self.held.as_slice() == PREFACE {
                    true => State::FrameHeader,
                    false => State::Blind,
                };
                out.append(&mut self.held);
            }
            State::FrameHeader => {
                let payload = usize::from(self.held[0]) << 16
                    | usize::from(self.held[1]) << 8
                    | usize::from(self.held[2]);
                let headers = matches!(self.held[3], TYPE_HEADERS | TYPE_CONTINUATION);
                if headers && payload > FRAME_PAYLOAD_MAX {
                    // An error of the client; the HTTP/2 library says so.
                    self.give_up(out);
                } else if headers && payload > 0 {
                    self.state = State::Collect(payload);
                } else if headers {
                    self.collected(out);
                } else {
                    out.append(&mut self.held);
                    if payload > 0 {
                        self.state = State::Pass(payload);
                    }
                }
            }
            State::Collect(_) => self.collected(out),
            State::Pass(_) | State::Blind => {}
        }
    }

    /// A whole frame of a header block is held.
    fn collected(&mut self, out: &mut Vec<u8>) {
        self.state = State::FrameHeader;
        if self.add_frame().is_none() {
            return self.give_up(out);
        }
        self.held.clear();
        let complete = |b: &Block| b.flags & FLAG_END_HEADERS != 0;
        if let Some(block) = self.block.take_if(|b| complete(b)) {
            block.write(out);
        }
    }

    /// Adds the held frame to the block; None if that cannot be.
    fn add_frame(&mut self) -> Option<()> {
        let (header, payload) = self.held.split_first_chunk::<FRAME_HEADER_LEN>()?;
        let flags = header[4];
        let stream = [header[5], header[6], header[7], header[8]];
        if header[3] == TYPE_CONTINUATION {
            let block = self.block.as_mut().filter(|b| b.stream == stream)?;
            if block.fragment.len() + payload.len() > BLOCK_BYTES_MAX {
                return None;
            }
            block.fragment.extend_from_slice(payload);
            block.flags |= flags & FLAG_END_HEADERS;
            return Some(());
        }
        if self.block.is_some() {
            return None;
        }
        let mut rest = payload;
        if flags & FLAG_PADDED != 0 {
            let (padding, after) = rest.split_first()?;
            rest = after.get(..after.len().checked_sub(usize::from(*padding))?)?;
        }
        let priority_len = if flags & FLAG_PRIORITY != 0 { 5 } else { 0 };
        let (priority, fragment) = rest.split_at_checked(priority_len)?;
        self.block = Some(Block {
            flags: flags & !FLAG_PADDED,
            stream,
            priority: priority.to_vec(),
            fragment: fragment.to_vec(),
        });
        Some(())
    }

    /// Lets everything that was held, and everything that comes, go through.
    fn give_up(&mut self, out: &mut Vec<u8>) {
        self.state = State::Blind;
        if let Some(mut block) = self.block.take() {
            block.flags &= !FLAG_END_HEADERS;
            block.write(out);
        }
        out.append(&mut self.held);
    }
}

impl Block {
    /// Writes the block as one frame of HEADERS and as many of CONTINUATION as it takes.
    fn write(self, out: &mut Vec<u8>) {
        let fragment = sanitize(&self.fragment).unwrap_or(self.fragment);
        let end = self.flags & FLAG_END_HEADERS;
        let first_len = fragment.len().min(FRAME_PAYLOAD_MAX - self.priority.len());
        let (first, mut rest) = fragment.split_at(first_len);
        let last = |rest: &[u8]| if rest.is_empty() { end } else { 0 };
        let flags = self.flags & !FLAG_END_HEADERS | last(rest);
        frame(
            TYPE_HEADERS,
            flags,
            self.stream,
            &[&self.priority, first],
            out,
        );
        while !rest.is_empty() {
            let (next, after) = rest.split_at(rest.len().min(FRAME_PAYLOAD_MAX));
            rest = after;
            frame(TYPE_CONTINUATION, last(rest), self.stream, &[next], out);
        }
    }
}

fn frame(kind: u8, flags: u8, stream: [u8; 4], parts: &[&[u8]], out: &mut Vec<u8>) {
    let len: usize = parts.iter().map(|p| p.len()).sum();
    // At most FRAME_PAYLOAD_MAX: three bytes hold it.
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    out.extend_from_slice(&len[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream);
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// A header block with other values of `:authority`; None if it cannot be read.
fn sanitize(block: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(block.len());
    let mut at = 0;
    while at < block.len() {
        let start = at;
        let first = block[at];
        // The representations of RFC 7541 section 6, and the bits of their integer.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let index = integer(block, &mut at, prefix)?;
        if !literal {
            out.extend_from_slice(&block[start..at]);
            continue;
        }
        let mut authority = index == STATIC_AUTHORITY;
        if index == 0 {
            let (huffman, name) = string(block, &mut at)?;
            authority = !huffman && name == b":authority";
        }
        out.extend_from_slice(&block[start..at]);
        let value_at = at;
        let (huffman, value) = string(block, &mut at)?;
        if authority && !value.is_empty() {
            let len = match huffman {
                true => huffman_symbols(value)?,
                false => value.len(),
            };
            zeros(len, &mut out);
        } else {
            out.extend_from_slice(&block[value_at..at]);
        }
    }
    Some(out)
}

/// Reads an integer with a prefix of so many bits (RFC 7541 section 5.1).
fn integer(block: &[u8], at: &mut usize, prefix: u32) -> Option<usize> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    // Four more bytes say more than any length or index that may come.
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Reads a string (RFC 7541 section 5.2): whether it is in Huffman code, and its bytes.
fn string<'a>(block: &'a [u8], at: &mut usize) -> Option<(bool, &'a [u8])> {
    let huffman = block.get(*at)? & 0x80 != 0;
    let len = integer(block, at, 7)?;
    let bytes = block.get(*at..at.checked_add(len)?)?;
    *at += len;
    Some((huffman, bytes))
}

/// How many symbols a string in Huffman code has; None if it is malformed.
fn huffman_symbols(bytes: &[u8]) -> Option<usize> {
    let mut symbols = 0;
    // The canonical code: of each length, `first` is the lowest code.
    let (mut code, mut first, mut bits) = (0_u32, 0_u32, 0_usize);
    for byte in bytes {
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            first <<= 1;
            bits += 1;
            let count = u32::from(*HUFFMAN_LENGTHS.get(bits)?);
            if code - first < count {
                symbols += 1;
                (code, first, bits) = (0, 0, 0);
            } else {
                first += count;
            }
        }
    }
    // The rest is padding: less than a byte, ones only.
    (bits < 8 && code == (1 << bits) - 1).then_some(symbols)
}

/// Writes a string of `len` zeros in Huffman code: 5 bits each, all 0, padded with ones.
fn zeros(len: usize, out: &mut Vec<u8>) {
    let bits = len * 5;
    let bytes = bits.div_ceil(8);
    const MASK: usize = 0x7f;
    if bytes < MASK {
        out.push(0x80 | u8::try_from(bytes).unwrap_or(0));
    } else {
        out.push(0xff);
        let mut rest = bytes - MASK;
        while rest >= 0x80 {
            out.push(u8::try_from(rest & MASK).unwrap_or(0) | 0x80);
            rest >>= 7;
        }
        out.push(u8::try_from(rest).unwrap_or(0));
    }
    out.resize(out.len() + bytes, 0);
    if let Some(last) = out.last_mut() {
        let padding = bytes * 8 - bits;
        *last |= u8::try_from((1_u32 << padding) - 1).unwrap_or(0);
    }
}

/// A connection whose incoming bytes are sanitised.
#[derive(Debug)]
pub struct Sanitized<S> {
    inner: S,
    sanitizer: Sanitizer,
    ready: Vec<u8>,
    given: usize,
}

impl<S> Sanitized<S> {
    /// Wraps a connection that was just accepted.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            sanitizer: Sanitizer::default(),
            ready: Vec::new(),
            given: 0,
        }
    }
}

impl<S: Connected> Connected for Sanitized<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.inner.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Sanitized<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        while this.given == this.ready.len() {
            this.ready.clear();
            this.given = 0;
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.sanitizer.push(read.filled(), &mut this.ready);
        }
        let left = &this.ready[this.given..];
        let now = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..now]);
        this.given += now;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Sanitized<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
