//! Bytes of replies (spec, "Simple reply message", "Structured reply chunk message").
//!
//! Invariant: per request the caller sends either one simple reply, or chunks of which exactly the last
//! has the DONE flag.

use bytes::Bytes;

use super::Output;
use super::constants::{BASE_ALLOCATION_ID, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk};
use crate::engine::{ReadSegment, ReadSegments};

/// How a request is to be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyStyle {
    /// One simple reply.
    Simple,
    /// Chunks of a structured reply.
    Structured,
    /// A structured reply with at most one content chunk (the client's DF flag).
    Unfragmented,
}

/// One descriptor of a block status reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes, at least 1.
    pub length: u32,
    /// [`super::STATE_HOLE`] and [`super::STATE_ZERO`].
    pub flags: u32,
}

fn simple_header(out: &mut Output, cookie: u64, error: u32) {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    out.header(&bytes);
}

fn chunk_header(out: &mut Output, cookie: u64, kind: u16, done: bool, length: usize) {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(u16::from(done) * chunk::FLAG_DONE).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&(length as u32).to_be_bytes());
    out.header(&bytes);
}

/// The request is done and has no data.
pub(super) fn done(out: &mut Output, style: ReplyStyle, cookie: u64) {
    match style {
        ReplyStyle::Simple => simple_header(out, cookie, 0),
        ReplyStyle::Structured | ReplyStyle::Unfragmented => {
            chunk_header(out, cookie, chunk::NONE, true, 0);
        }
    }
}

/// The request failed. Content chunks may have been sent before.
pub(super) fn error(out: &mut Output, style: ReplyStyle, cookie: u64, error: u32) {
    match style {
        ReplyStyle::Simple => simple_header(out, cookie, error),
        ReplyStyle::Structured | ReplyStyle::Unfragmented => {
            chunk_header(out, cookie, chunk::ERROR, true, 6);
            out.header(&error.to_be_bytes());
            out.header(&0_u16.to_be_bytes());
        }
    }
}

fn segments_out(out: &mut Output, segments: impl IntoIterator<Item = ReadSegment>) {
    for segment in segments {
        match segment {
            ReadSegment::Data(data) => out.data(data),
            ReadSegment::Zeroes(length) => out.zeroes(length as usize),
        }
    }
}

/// A whole read at once: a simple reply, or one content chunk.
pub(super) fn read_whole(
    out: &mut Output,
    style: ReplyStyle,
    cookie: u64,
    offset: u64,
    segments: ReadSegments,
) {
    let length: usize = segments.iter().map(ReadSegment::len).sum();
    match style {
        ReplyStyle::Simple => simple_header(out, cookie, 0),
        ReplyStyle::Structured | ReplyStyle::Unfragmented => {
            chunk_header(out, cookie, chunk::OFFSET_DATA, true, 8 + length);
            out.header(&offset.to_be_bytes());
        }
    }
    segments_out(out, segments);
}

/// A part of a structured read: adjoining data as one OFFSET_DATA chunk, zeroes as OFFSET_HOLE.
pub(super) fn read_part(
    out: &mut Output,
    cookie: u64,
    mut offset: u64,
    segments: impl IntoIterator<Item = ReadSegment>,
    done: bool,
) {
    let mut segments = segments.into_iter().filter(|s| !s.is_empty()).peekable();
    while let Some(segment) = segments.next() {
        match segment {
            ReadSegment::Zeroes(mut length) => {
                while let Some(ReadSegment::Zeroes(more)) = segments.peek() {
                    length += more;
                    segments.next();
                }
                chunk_header(
                    out,
                    cookie,
                    chunk::OFFSET_HOLE,
                    done && segments.peek().is_none(),
                    12,
                );
                out.header(&offset.to_be_bytes());
                out.header(&length.to_be_bytes());
                offset += u64::from(length);
            }
            ReadSegment::Data(first) => {
                let mut length = first.len();
                let mut run = smallvec::SmallVec::<[Bytes; 8]>::from_iter([first]);
                while let Some(ReadSegment::Data(_)) = segments.peek() {
                    if let Some(ReadSegment::Data(more)) = segments.next() {
                        length += more.len();
                        run.push(more);
                    }
                }
                let last = done && segments.peek().is_none();
                chunk_header(out, cookie, chunk::OFFSET_DATA, last, 8 + length);
                out.header(&offset.to_be_bytes());
                for data in run {
                    out.data(data);
                }
                offset += length as u64;
            }
        }
    }
}

/// Spec, NBD_REPLY_TYPE_BLOCK_STATUS: one chunk for our one context, at least one descriptor.
pub(super) fn block_status(out: &mut Output, cookie: u64, extents: &[Extent]) {
    chunk_header(
        out,
        cookie,
        chunk::BLOCK_STATUS,
        true,
        4 + 8 * extents.len(),
    );
    out.header(&BASE_ALLOCATION_ID.to_be_bytes());
    for extent in extents {
        out.header(&extent.length.to_be_bytes());
        out.header(&extent.flags.to_be_bytes());
    }
}
