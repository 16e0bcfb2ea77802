//! The kind-specific fields of data frames: one writer and one reader for each, side by side.
//!
//! Invariants: readers take every byte (trailing bytes are an error), check every count against the
//! bytes that are there before they allocate, and refuse ranges outside a chunk.

use bytes::{BufMut, Bytes, BytesMut};
use smallvec::{SmallVec, smallvec};

use super::codec::FrameError;
use super::fence::{parse_fence, put_fence};
use super::layer_list::{parse_layers, put_layers};
use super::message::{
    BlockInfo, BlockState, Checksums, ChunkDigest, ChunkDigestList, ChunkDigests, Collect, Cursor,
    Digest, Entries, Entry, FenceReply, Flush, Hello, HelloReply, MAX_DATA_BLOCKS, MAX_ENTRIES,
    MAX_TICKET, Payload, PullProgress, PullStart, PullState, Read, ReadReply, ReplyBody,
    RequestBody, Trim, Write, WriteOutcome,
};
use crate::descriptor::{DescriptorError, VolumeDescriptor};
use crate::ids::{
    BLOCK_SIZE, BlockRange, ChunkIndex, ClientId, ClusterId, DiskId, Epoch, GroupIndex,
    Incarnation, SnapshotNumber, Version,
};

/// Longest `host:port`, in bytes.
const MAX_ADDRESS: usize = 300;

/// Reads little-endian fields off a slice.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], FrameError> {
        let (head, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(FrameError::Bounds("truncated fields"))?;
        self.0 = rest;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        self.take(N)?
            .try_into()
            .map_err(|_| FrameError::Bounds("truncated fields"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, FrameError> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, FrameError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn id(&mut self) -> Result<[u8; 16], FrameError> {
        self.array()
    }

    pub(super) fn boolean(&mut self) -> Result<bool, FrameError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(FrameError::Unknown("boolean", u32::from(other))),
        }
    }

    fn version(&mut self) -> Result<Version, FrameError> {
        Ok(Version::new(self.u64()?, self.u64()?))
    }

    fn range(&mut self) -> Result<BlockRange, FrameError> {
        let chunk = ChunkIndex(self.u32()?);
        let (first, count) = (self.u16()?, self.u16()?);
        BlockRange::new(chunk, u32::from(first), u32::from(count))
            .ok_or(FrameError::Bounds("block range"))
    }

    fn cursor(&mut self) -> Result<Cursor, FrameError> {
        Ok(Cursor {
            chunk: ChunkIndex(self.u32()?),
            snapshot: SnapshotNumber(self.u32()?),
            block: self.u16()?,
        })
    }

    fn groups(&mut self) -> Result<(GroupIndex, u32), FrameError> {
        let (group, count) = (self.u32()?, self.u32()?);
        if group >= count {
            return Err(FrameError::Bounds("group"));
        }
        Ok((GroupIndex(group), count))
    }

    /// Bytes with a 16-bit length before them.
    fn short_bytes(&mut self, limit: usize) -> Result<&'a [u8], FrameError> {
        let length = usize::from(self.u16()?);
        if length > limit {
            return Err(FrameError::Bounds("length of a text"));
        }
        self.take(length)
    }

    fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn finish(self) -> Result<(), FrameError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(FrameError::Bounds("trailing bytes"))
        }
    }
}

fn put_version(out: &mut BytesMut, version: Version) {
    out.put_u64_le(version.epoch.0);
    out.put_u64_le(version.sequence.0);
}

fn put_range(out: &mut BytesMut, range: BlockRange) {
    out.put_u32_le(range.chunk.0);
    out.put_u16_le(range.first);
    out.put_u16_le(range.count);
}

fn put_cursor(out: &mut BytesMut, cursor: Cursor) {
    out.put_u32_le(cursor.chunk.0);
    out.put_u32_le(cursor.snapshot.0);
    out.put_u16_le(cursor.block);
}

fn put_short_bytes(out: &mut BytesMut, bytes: &[u8]) {
    assert!(
        bytes.len() <= usize::from(u16::MAX),
        "text too long for a frame"
    );
    out.put_u16_le(bytes.len() as u16);
    out.put_slice(bytes);
}

/// Number of a request's kind; a reply's is the same with the top bit set.
pub(super) fn request_kind(body: &RequestBody) -> u8 {
    match body {
        RequestBody::Hello(_) => 1,
        RequestBody::Fence(_) => 2,
        RequestBody::Configure(_) => 3,
        RequestBody::Write(_) => 4,
        RequestBody::Trim(_) => 5,
        RequestBody::Read(_) => 6,
        RequestBody::Flush(_) => 7,
        RequestBody::Collect(_) => 8,
        RequestBody::Digest(_) => 9,
        RequestBody::ChunkDigests(_) => 10,
        RequestBody::PullStart(_) => 11,
        RequestBody::PullStatus { .. } => 12,
        RequestBody::Repair(_) => 13,
        RequestBody::Ping => 14,
        RequestBody::Layers(_) => 15,
    }
}

/// Number of a reply's kind, without the top bit.
pub(super) fn reply_kind(body: &ReplyBody) -> u8 {
    match body {
        ReplyBody::Hello(_) => 1,
        ReplyBody::Fence(_) => 2,
        ReplyBody::Configure => 3,
        ReplyBody::Written(_) => 4,
        ReplyBody::Read(_) => 6,
        ReplyBody::Flush => 7,
        ReplyBody::Entries(_) => 8,
        ReplyBody::ChunkDigests(_) => 10,
        ReplyBody::PullStart => 11,
        ReplyBody::PullStatus(_) => 12,
        ReplyBody::Ping => 14,
        ReplyBody::Layers(_) => 15,
    }
}

/// Appends the fields of a request.
pub(super) fn put_request(body: &RequestBody, out: &mut BytesMut) {
    match body {
        RequestBody::Hello(hello) => {
            out.put_u16_le(hello.version_min);
            out.put_u16_le(hello.version_max);
            out.put_slice(&hello.cluster.0);
            out.put_slice(&hello.disk.0);
            out.put_slice(&hello.client.0);
            put_short_bytes(out, &hello.ticket);
        }
        RequestBody::Fence(fence) => put_fence(fence, out),
        RequestBody::Configure(descriptor) => descriptor.encode(out),
        RequestBody::Write(write) | RequestBody::Repair(write) => put_write(write, out),
        RequestBody::Trim(trim) => {
            put_range(out, trim.range);
            out.put_u32_le(trim.snapshot.0);
            put_version(out, trim.version);
            out.put_u8(u8::from(trim.durable));
        }
        RequestBody::Read(read) => {
            put_range(out, read.range);
            out.put_u32_le(read.snapshot.0);
            out.put_u8(u8::from(read.exact_layer));
        }
        RequestBody::Flush(flush) => {
            put_version(out, flush.watermark);
            put_version(out, flush.forget_below);
        }
        RequestBody::Collect(collect) => {
            out.put_u32_le(collect.group.0);
            out.put_u32_le(collect.group_count);
            put_version(out, collect.watermark);
            put_cursor(out, collect.from);
        }
        RequestBody::Digest(digest) => {
            out.put_u32_le(digest.chunk.0);
            put_cursor(out, digest.from);
        }
        RequestBody::ChunkDigests(list) => {
            out.put_u32_le(list.group.0);
            out.put_u32_le(list.group_count);
            out.put_u32_le(list.from.0);
        }
        RequestBody::PullStart(pull) => {
            out.put_u32_le(pull.group.0);
            out.put_u32_le(pull.group_count);
            out.put_u64_le(pull.rebuild_epoch.0);
            out.put_slice(&pull.source.0);
            out.put_u64_le(pull.source_incarnation.0);
            out.put_u64_le(pull.bytes_per_second);
            put_short_bytes(out, pull.source_address.as_bytes());
        }
        RequestBody::PullStatus { group } => out.put_u32_le(group.0),
        RequestBody::Ping => {}
        RequestBody::Layers(layers) => put_layers(layers, out),
    }
}

fn put_write(write: &Write, out: &mut BytesMut) {
    assert_eq!(
        write.checksums.len(),
        usize::from(write.range.count),
        "a checksum per block"
    );
    put_range(out, write.range);
    out.put_u32_le(write.snapshot.0);
    put_version(out, write.version);
    out.put_u8(u8::from(write.durable));
    for checksum in &write.checksums {
        out.put_u32_le(*checksum);
    }
}

fn parse_write(fields: &mut Fields<'_>, payload: Bytes) -> Result<Write, FrameError> {
    let range = fields.range()?;
    if u32::from(range.count) > MAX_DATA_BLOCKS {
        return Err(FrameError::Bounds("blocks of a write"));
    }
    let snapshot = SnapshotNumber(fields.u32()?);
    let version = fields.version()?;
    let durable = fields.boolean()?;
    let sums = fields.take(usize::from(range.count) * 4)?;
    if payload.len() != range.byte_len() {
        return Err(FrameError::Bounds("data of a write"));
    }
    let checksums: Checksums = sums
        .as_chunks::<4>()
        .0
        .iter()
        .map(|c| u32::from_le_bytes(*c))
        .collect();
    Ok(Write {
        range,
        snapshot,
        version,
        durable,
        checksums,
        data: smallvec![payload],
    })
}

/// Reads the fields of a request of kind `kind`.
pub(super) fn parse_request(
    kind: u8,
    meta: &[u8],
    payload: Bytes,
) -> Result<RequestBody, FrameError> {
    let mut f = Fields::new(meta);
    let has_data = matches!(kind, 4 | 13);
    if !has_data && !payload.is_empty() {
        return Err(FrameError::Bounds("data with a kind that has none"));
    }
    let body = match kind {
        1 => RequestBody::Hello(Hello {
            version_min: f.u16()?,
            version_max: f.u16()?,
            cluster: ClusterId(f.id()?),
            disk: DiskId(f.id()?),
            client: ClientId(f.id()?),
            ticket: Bytes::copy_from_slice(f.short_bytes(MAX_TICKET)?),
        }),
        2 => RequestBody::Fence(parse_fence(&mut f)?),
        3 => RequestBody::Configure(VolumeDescriptor::decode(f.rest()).map_err(descriptor)?),
        4 => RequestBody::Write(parse_write(&mut f, payload)?),
        5 => RequestBody::Trim(Trim {
            range: f.range()?,
            snapshot: SnapshotNumber(f.u32()?),
            version: f.version()?,
            durable: f.boolean()?,
        }),
        6 => RequestBody::Read(parse_read(&mut f)?),
        7 => RequestBody::Flush(Flush {
            watermark: f.version()?,
            forget_below: f.version()?,
        }),
        8 => {
            let (group, group_count) = f.groups()?;
            let watermark = f.version()?;
            RequestBody::Collect(Collect {
                group,
                group_count,
                watermark,
                from: f.cursor()?,
            })
        }
        9 => RequestBody::Digest(Digest {
            chunk: ChunkIndex(f.u32()?),
            from: f.cursor()?,
        }),
        10 => {
            let (group, group_count) = f.groups()?;
            let from = ChunkIndex(f.u32()?);
            RequestBody::ChunkDigests(ChunkDigests {
                group,
                group_count,
                from,
            })
        }
        11 => RequestBody::PullStart(parse_pull_start(&mut f)?),
        12 => RequestBody::PullStatus {
            group: GroupIndex(f.u32()?),
        },
        13 => RequestBody::Repair(parse_write(&mut f, payload)?),
        14 => RequestBody::Ping,
        15 => RequestBody::Layers(parse_layers(&mut f)?),
        other => return Err(FrameError::Unknown("request kind", u32::from(other))),
    };
    f.finish()?;
    Ok(body)
}

fn descriptor(error: DescriptorError) -> FrameError {
    FrameError::Bounds(error.0)
}

fn parse_read(f: &mut Fields<'_>) -> Result<Read, FrameError> {
    let range = f.range()?;
    if u32::from(range.count) > MAX_DATA_BLOCKS {
        return Err(FrameError::Bounds("blocks of a read"));
    }
    Ok(Read {
        range,
        snapshot: SnapshotNumber(f.u32()?),
        exact_layer: f.boolean()?,
    })
}

fn parse_pull_start(f: &mut Fields<'_>) -> Result<PullStart, FrameError> {
    let (group, group_count) = f.groups()?;
    let rebuild_epoch = Epoch(f.u64()?);
    let source = DiskId(f.id()?);
    let source_incarnation = Incarnation(f.u64()?);
    let bytes_per_second = f.u64()?;
    let address = f.short_bytes(MAX_ADDRESS)?;
    let source_address = std::str::from_utf8(address)
        .map_err(|_| FrameError::Bounds("address is not UTF-8"))?
        .to_owned();
    Ok(PullStart {
        group,
        group_count,
        rebuild_epoch,
        source,
        source_incarnation,
        source_address,
        bytes_per_second,
    })
}

/// Appends the fields of a reply.
pub(super) fn put_reply(body: &ReplyBody, out: &mut BytesMut) {
    match body {
        ReplyBody::Hello(hello) => {
            out.put_u16_le(hello.version);
            out.put_slice(&hello.disk.0);
        }
        ReplyBody::Fence(fence) => {
            out.put_u8(u8::from(fence.existed));
            out.put_u8(u8::from(fence.suspect));
            out.put_u8(u8::from(fence.damaged));
            out.put_u8(u8::from(fence.written));
            put_version(out, fence.watermark);
            put_version(out, fence.highest);
        }
        ReplyBody::Written(outcome) => out.put_u8(match outcome {
            WriteOutcome::Applied => 0,
            WriteOutcome::Superseded => 1,
        }),
        ReplyBody::Read(read) => {
            put_range(out, read.range);
            for block in &read.blocks {
                out.put_u8(block.state as u8);
                put_version(out, block.version);
                out.put_u32_le(block.checksum);
            }
        }
        ReplyBody::Entries(list) => {
            put_next(out, list.next, put_cursor);
            for entry in &list.entries {
                put_cursor(out, entry.at);
                out.put_u8(entry.state as u8);
                put_version(out, entry.version);
                out.put_u32_le(entry.checksum);
            }
        }
        ReplyBody::ChunkDigests(list) => {
            put_next(out, list.next, |out, chunk| out.put_u32_le(chunk.0));
            for chunk in &list.chunks {
                out.put_u32_le(chunk.chunk.0);
                out.put_u64_le(chunk.digest);
            }
        }
        ReplyBody::PullStatus(progress) => {
            out.put_u64_le(progress.rebuild_epoch.0);
            out.put_u8(progress.state as u8);
            out.put_u32_le(progress.chunks_done);
            out.put_u32_le(progress.chunks_total);
            out.put_u64_le(progress.blocks_moved);
        }
        ReplyBody::Layers(layers) => put_layers(layers, out),
        ReplyBody::Configure | ReplyBody::Flush | ReplyBody::PullStart | ReplyBody::Ping => {}
    }
}

fn put_next<T>(out: &mut BytesMut, next: Option<T>, put: impl FnOnce(&mut BytesMut, T)) {
    out.put_u8(u8::from(next.is_some()));
    if let Some(next) = next {
        put(out, next);
    }
}

/// Reads the fields of a reply of kind `kind` (top bit clear).
pub(super) fn parse_reply(kind: u8, meta: &[u8], payload: Bytes) -> Result<ReplyBody, FrameError> {
    let mut f = Fields::new(meta);
    if kind != 6 && !payload.is_empty() {
        return Err(FrameError::Bounds("data with a kind that has none"));
    }
    let body = match kind {
        1 => ReplyBody::Hello(HelloReply {
            version: f.u16()?,
            disk: DiskId(f.id()?),
        }),
        2 => ReplyBody::Fence(FenceReply {
            existed: f.boolean()?,
            suspect: f.boolean()?,
            damaged: f.boolean()?,
            written: f.boolean()?,
            watermark: f.version()?,
            highest: f.version()?,
        }),
        3 => ReplyBody::Configure,
        4 => ReplyBody::Written(match f.u8()? {
            0 => WriteOutcome::Applied,
            1 => WriteOutcome::Superseded,
            other => return Err(FrameError::Unknown("write outcome", u32::from(other))),
        }),
        6 => ReplyBody::Read(parse_read_reply(&mut f, payload)?),
        7 => ReplyBody::Flush,
        8 => ReplyBody::Entries(parse_entries(&mut f)?),
        10 => ReplyBody::ChunkDigests(parse_chunk_digests(&mut f)?),
        11 => ReplyBody::PullStart,
        12 => ReplyBody::PullStatus(PullProgress {
            rebuild_epoch: Epoch(f.u64()?),
            state: match f.u8()? {
                0 => PullState::None,
                1 => PullState::Running,
                2 => PullState::Complete,
                3 => PullState::Failed,
                other => return Err(FrameError::Unknown("pull state", u32::from(other))),
            },
            chunks_done: f.u32()?,
            chunks_total: f.u32()?,
            blocks_moved: f.u64()?,
        }),
        14 => ReplyBody::Ping,
        15 => ReplyBody::Layers(parse_layers(&mut f)?),
        other => return Err(FrameError::Unknown("reply kind", u32::from(other))),
    };
    f.finish()?;
    Ok(body)
}

fn block_state(f: &mut Fields<'_>) -> Result<BlockState, FrameError> {
    let value = f.u8()?;
    BlockState::from_u8(value).ok_or(FrameError::Unknown("block state", u32::from(value)))
}

fn parse_read_reply(f: &mut Fields<'_>, payload: Bytes) -> Result<ReadReply, FrameError> {
    let range = f.range()?;
    if u32::from(range.count) > MAX_DATA_BLOCKS {
        return Err(FrameError::Bounds("blocks of a read"));
    }
    let mut blocks: SmallVec<[BlockInfo; 4]> = SmallVec::with_capacity(usize::from(range.count));
    let mut data_blocks = 0;
    for _ in range.blocks() {
        let state = block_state(f)?;
        data_blocks += usize::from(state == BlockState::Data);
        blocks.push(BlockInfo {
            state,
            version: f.version()?,
            checksum: f.u32()?,
        });
    }
    if payload.len() != data_blocks * BLOCK_SIZE {
        return Err(FrameError::Bounds("data of a read"));
    }
    let data: Payload = if payload.is_empty() {
        smallvec![]
    } else {
        smallvec![payload]
    };
    Ok(ReadReply {
        range,
        blocks,
        data,
    })
}

fn parse_entries(f: &mut Fields<'_>) -> Result<Entries, FrameError> {
    const ENTRY_LEN: usize = 10 + 1 + 16 + 4;
    let next = if f.boolean()? {
        Some(f.cursor()?)
    } else {
        None
    };
    let count = f.0.len() / ENTRY_LEN;
    if count > MAX_ENTRIES {
        return Err(FrameError::Bounds("entries"));
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(Entry {
            at: f.cursor()?,
            state: block_state(f)?,
            version: f.version()?,
            checksum: f.u32()?,
        });
    }
    Ok(Entries { entries, next })
}

fn parse_chunk_digests(f: &mut Fields<'_>) -> Result<ChunkDigestList, FrameError> {
    let next = if f.boolean()? {
        Some(ChunkIndex(f.u32()?))
    } else {
        None
    };
    let count = f.0.len() / 12;
    if count > MAX_ENTRIES {
        return Err(FrameError::Bounds("chunks"));
    }
    let mut chunks = Vec::with_capacity(count);
    for _ in 0..count {
        chunks.push(ChunkDigest {
            chunk: ChunkIndex(f.u32()?),
            digest: f.u64()?,
        });
    }
    Ok(ChunkDigestList { chunks, next })
}
