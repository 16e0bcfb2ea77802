//! Bytes of the data protocol (layout: docs/formats.md, "Data frames").
//!
//! Invariants:
//! - `decode` never panics, never allocates more than the frame's declared and bounded size, and never
//!   returns a message that breaks the limits of `message.rs`.
//! - Data buffers are neither copied on encoding (they are appended by reference) nor on decoding
//!   (they are slices of the input).
//! - `decode` does not check the data's block checksums: the receiver of the data does, where it is used.

use bytes::{Bytes, BytesMut};

use super::message::{Reply, Request};

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 64;

/// Which messages a connection's end expects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// A daemon receives requests.
    Requests,
    /// A client receives replies.
    Replies,
}

/// Why bytes are not a frame. Each ends the connection.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FrameError {
    /// The first four bytes are not the protocol's.
    #[error("not an Ashlar data frame (magic {0:#010x})")]
    Magic(u32),
    /// The header's or the fields' checksum is wrong.
    #[error("frame checksum mismatch")]
    Checksum,
    /// The frame's version is not spoken here.
    #[error("data protocol version {0} is not supported")]
    Version(u8),
    /// A length or count is beyond its limit, or does not fit the kind.
    #[error("frame field out of bounds: {0}")]
    Bounds(&'static str),
    /// The kind or an enumeration has no meaning here.
    #[error("unknown {0} {1}")]
    Unknown(&'static str, u32),
}

/// A message taken off a connection's input.
#[derive(Clone, PartialEq, Debug)]
pub enum Decoded {
    /// On a daemon's side.
    Request(Request),
    /// On a client's side.
    Reply(Reply),
}

/// Takes one whole frame off the front of `input`, or says with `Ok(None)` that more bytes are needed
/// (then room for the whole frame has been reserved in `input`).
pub fn decode(input: &mut BytesMut, direction: Direction) -> Result<Option<Decoded>, FrameError> {
    let _ = (input, direction);
    Ok(None)
}

/// Appends a request to `out` as header and fields in one buffer, then its data by reference.
pub fn encode_request(request: &Request, out: &mut Vec<Bytes>) {
    let _ = (request, out);
}

/// Appends a reply to `out` as header and fields in one buffer, then its data by reference.
pub fn encode_reply(reply: &Reply, out: &mut Vec<Bytes>) {
    let _ = (reply, out);
}
