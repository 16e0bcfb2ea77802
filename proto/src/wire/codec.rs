//! Bytes of the data protocol (layout: docs/protocol.md).
//!
//! Invariants:
//! - `decode` never panics, never allocates more than the frame's declared and bounded size, and never
//!   returns a message that breaks the limits of `message.rs`.
//! - Data buffers are neither copied on encoding (they are appended by reference) nor on decoding
//!   (they are slices of the input).
//! - `decode` does not check the data's block checksums: the receiver of the data does, where it is used.

use bytes::{BufMut, Bytes, BytesMut};

use super::fields::{self, Fields};
use super::message::{MAX_META, MAX_PAYLOAD, Reply, ReplyBody, Request, RequestBody, Status};
use super::message::{PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN};
use crate::ids::{Epoch, Incarnation, RequestId, VolumeId};

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 64;
/// First four bytes of every frame: "ASHD".
pub const MAGIC: u32 = u32::from_le_bytes(*b"ASHD");
/// Set in the kind of a reply.
const REPLY: u8 = 0x80;

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

/// The fixed header, checked.
struct Header {
    kind: u8,
    status: u16,
    id: RequestId,
    volume: VolumeId,
    epoch: Epoch,
    incarnation: Incarnation,
    meta_len: usize,
    payload_len: usize,
    meta_crc: u32,
}

impl Header {
    /// Reads and checks the header at the front of `bytes` (at least [`HEADER_LEN`] of them).
    fn parse(bytes: &[u8], direction: Direction) -> Result<Self, FrameError> {
        let mut fields = Fields::new(&bytes[..HEADER_LEN]);
        let magic = fields.u32()?;
        if magic != MAGIC {
            return Err(FrameError::Magic(magic));
        }
        if crc32c::crc32c(&bytes[..HEADER_LEN - 4])
            != Fields::new(&bytes[HEADER_LEN - 4..HEADER_LEN]).u32()?
        {
            return Err(FrameError::Checksum);
        }
        let version = fields.u8()?;
        if !(PROTOCOL_VERSION_MIN..=PROTOCOL_VERSION_MAX).contains(&u16::from(version)) {
            return Err(FrameError::Version(version));
        }
        let kind = fields.u8()?;
        if (kind & REPLY != 0) != (direction == Direction::Replies) {
            return Err(FrameError::Unknown("kind", u32::from(kind)));
        }
        let header = Self {
            kind: kind & !REPLY,
            status: fields.u16()?,
            id: RequestId(fields.u64()?),
            volume: VolumeId(fields.id()?),
            epoch: Epoch(fields.u64()?),
            incarnation: Incarnation(fields.u64()?),
            meta_len: fields.u32()? as usize,
            payload_len: fields.u32()? as usize,
            meta_crc: fields.u32()?,
        };
        if header.meta_len > MAX_META {
            return Err(FrameError::Bounds("fields length"));
        }
        if header.payload_len > MAX_PAYLOAD {
            return Err(FrameError::Bounds("data length"));
        }
        Ok(header)
    }
}

/// Size of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameLength {
    /// Bytes of all of it.
    pub total: usize,
    /// Where its payload begins.
    pub payload_at: usize,
}

/// Bytes of the frame at the front of `input`, if its header is whole and its checksum right; else `decode`
/// says what is wrong. For receivers that make room for the rest of the frame without a copy.
pub fn frame_length(input: &[u8]) -> Option<FrameLength> {
    let header = input.first_chunk::<HEADER_LEN>()?;
    let number = |at: usize| header[at..at + 4].try_into().ok().map(u32::from_le_bytes);
    if number(0)? != MAGIC || number(HEADER_LEN - 4)? != crc32c::crc32c(&header[..HEADER_LEN - 4]) {
        return None;
    }
    let (fields, data) = (number(48)? as usize, number(52)? as usize);
    (fields <= MAX_META && data <= MAX_PAYLOAD).then_some(FrameLength {
        total: HEADER_LEN + fields + data,
        payload_at: HEADER_LEN + fields,
    })
}

/// Takes one whole frame off the front of `input`, or says with `Ok(None)` that more bytes are needed
/// (then room for the whole frame has been reserved in `input`).
pub fn decode(input: &mut BytesMut, direction: Direction) -> Result<Option<Decoded>, FrameError> {
    if input.len() < HEADER_LEN {
        return Ok(None);
    }
    let header = Header::parse(input, direction)?;
    let total = HEADER_LEN + header.meta_len + header.payload_len;
    if input.len() < total {
        let missing = total - input.len();
        input.reserve(missing);
        return Ok(None);
    }
    let mut frame = input.split_to(total);
    let payload = frame.split_off(HEADER_LEN + header.meta_len).freeze();
    let meta = &frame[HEADER_LEN..];
    if crc32c::crc32c(meta) != header.meta_crc {
        return Err(FrameError::Checksum);
    }
    let decoded = match direction {
        Direction::Requests => Decoded::Request(decode_request(&header, meta, payload)?),
        Direction::Replies => Decoded::Reply(decode_reply(&header, meta, payload)?),
    };
    Ok(Some(decoded))
}

fn decode_request(header: &Header, meta: &[u8], payload: Bytes) -> Result<Request, FrameError> {
    if header.status != 0 {
        return Err(FrameError::Bounds("status of a request"));
    }
    Ok(Request {
        id: header.id,
        volume: header.volume,
        epoch: header.epoch,
        incarnation: header.incarnation,
        body: fields::parse_request(header.kind, meta, payload)?,
    })
}

fn decode_reply(header: &Header, meta: &[u8], payload: Bytes) -> Result<Reply, FrameError> {
    let result = if header.status == 0 {
        Ok(fields::parse_reply(header.kind, meta, payload)?)
    } else {
        if !meta.is_empty() || !payload.is_empty() {
            return Err(FrameError::Bounds("an error with a body"));
        }
        let status = Status::from_u16(header.status)
            .ok_or(FrameError::Unknown("status", u32::from(header.status)))?;
        Err(status)
    };
    Ok(Reply {
        id: header.id,
        volume: header.volume,
        fence: header.epoch,
        incarnation: header.incarnation,
        result,
    })
}

/// What the header says beside the body.
struct Envelope {
    kind: u8,
    status: u16,
    id: RequestId,
    volume: VolumeId,
    epoch: Epoch,
    incarnation: Incarnation,
}

/// Builds the head (header and fields) of a frame. `fields` appends the fields.
fn head(envelope: &Envelope, payload_len: usize, fields: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_LEN + 64);
    out.put_bytes(0, HEADER_LEN);
    fields(&mut out);
    let meta_len = out.len() - HEADER_LEN;
    assert!(
        meta_len <= MAX_META,
        "fields of {meta_len} bytes: the caller must split the message"
    );
    assert!(
        payload_len <= MAX_PAYLOAD,
        "data of {payload_len} bytes: the caller must split it"
    );
    let meta_crc = crc32c::crc32c(&out[HEADER_LEN..]);
    {
        let mut h = &mut out[..HEADER_LEN];
        h.put_u32_le(MAGIC);
        h.put_u8(PROTOCOL_VERSION_MAX as u8);
        h.put_u8(envelope.kind);
        h.put_u16_le(envelope.status);
        h.put_u64_le(envelope.id.0);
        h.put_slice(&envelope.volume.0);
        h.put_u64_le(envelope.epoch.0);
        h.put_u64_le(envelope.incarnation.0);
        h.put_u32_le(meta_len as u32);
        h.put_u32_le(payload_len as u32);
        h.put_u32_le(meta_crc);
    }
    let crc = crc32c::crc32c(&out[..HEADER_LEN - 4]);
    out[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&crc.to_le_bytes());
    out.freeze()
}

/// Appends a request to `out` as header and fields in one buffer, then its data by reference.
///
/// # Panics
/// If the message breaks the limits of `message.rs`: a fault of the caller, never of the peer.
pub fn encode_request(request: &Request, out: &mut Vec<Bytes>) {
    let data = match &request.body {
        RequestBody::Write(w) | RequestBody::Repair(w) => Some(&w.data),
        _ => None,
    };
    let payload_len = data.map_or(0, |d| d.iter().map(Bytes::len).sum());
    let envelope = Envelope {
        kind: fields::request_kind(&request.body),
        status: 0,
        id: request.id,
        volume: request.volume,
        epoch: request.epoch,
        incarnation: request.incarnation,
    };
    out.push(head(&envelope, payload_len, |b| {
        fields::put_request(&request.body, b)
    }));
    out.extend(
        data.into_iter()
            .flatten()
            .filter(|b| !b.is_empty())
            .cloned(),
    );
}

/// Appends a reply to `out` as header and fields in one buffer, then its data by reference. `kind` of an
/// error reply is that of no particular request: replies are paired by id.
///
/// # Panics
/// If the message breaks the limits of `message.rs`: a fault of the caller, never of the peer.
pub fn encode_reply(reply: &Reply, out: &mut Vec<Bytes>) {
    let (kind, status, data) = match &reply.result {
        Ok(body) => {
            let data = match body {
                ReplyBody::Read(read) => Some(&read.data),
                _ => None,
            };
            (fields::reply_kind(body), 0, data)
        }
        Err(status) => (0, *status as u16, None),
    };
    let payload_len = data.map_or(0, |d| d.iter().map(Bytes::len).sum());
    let envelope = Envelope {
        kind: kind | REPLY,
        status,
        id: reply.id,
        volume: reply.volume,
        epoch: reply.fence,
        incarnation: reply.incarnation,
    };
    out.push(head(&envelope, payload_len, |b| {
        if let Ok(body) = &reply.result {
            fields::put_reply(body, b);
        }
    }));
    out.extend(
        data.into_iter()
            .flatten()
            .filter(|b| !b.is_empty())
            .cloned(),
    );
}
