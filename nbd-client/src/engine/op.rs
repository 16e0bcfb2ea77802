//! Client requests: admission, parts, answers.
//!
//! Invariants:
//! - A request is answered exactly once, when its last part is done; its error is the first one met.
//! - Requests that arrive before the session serves wait in order of arrival.

use ashlar_proto::ids::{BLOCK_SIZE, CHUNK_SIZE};
use smallvec::SmallVec;

use super::api::{
    ClientError, ClientOp, ClientReply, ClientRequest, REQUEST_BYTES_MAX, ReadSegments,
    SessionCommand,
};
use super::reader::{Role, read_only_answer};
use super::session::{Phase, Session};
use super::slots::Key;
use super::status::StatusMap;
use super::write::payload_len;

/// What a client's request will be answered with.
#[derive(Debug)]
pub(super) enum OpKind {
    Read { parts: SmallVec<[ReadSegments; 1]> },
    Write,
    Status(Box<StatusMap>),
}

/// A client's request in progress.
#[derive(Debug)]
pub(super) struct Op {
    tag: u64,
    bytes: u64,
    /// Parts that are not done, plus one while parts are being made.
    pending: u32,
    error: Option<ClientError>,
    pub(super) kind: OpKind,
}

/// Bytes of the block-aligned cover of a request: what it costs in memory.
fn cost(op: &ClientOp) -> u64 {
    let block = BLOCK_SIZE as u64;
    match op {
        ClientOp::Read { length, .. } => u64::from(*length).max(block),
        ClientOp::Write { data, .. } => (payload_len(data) as u64).max(block),
        ClientOp::Flush => 0,
        ClientOp::Trim { length, .. }
        | ClientOp::WriteZeroes { length, .. }
        | ClientOp::BlockStatus { length, .. } => block * (1 + length / CHUNK_SIZE).min(1024),
    }
}

impl Session {
    /// Takes a client's request.
    pub(super) fn on_client(&mut self, request: ClientRequest) {
        self.stats.in_flight_bytes += cost(&request.op);
        if self.phase == Phase::Serving {
            if let Some(request) = self.hold(request) {
                self.begin(request);
            }
        } else {
            self.waiting.push_back(request);
        }
    }

    /// Serves what arrived before the volume was open.
    pub(super) fn begin_waiting(&mut self) {
        while let Some(request) = self.waiting.pop_front() {
            if let Some(request) = self.hold(request) {
                self.begin(request);
            }
        }
    }

    fn in_range(&self, offset: u64, length: u64) -> bool {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= self.view.size_bytes)
    }

    fn valid(&self, op: &ClientOp) -> bool {
        match op {
            ClientOp::Read { offset, length } => {
                u64::from(*length) <= REQUEST_BYTES_MAX
                    && self.in_range(*offset, u64::from(*length))
            }
            ClientOp::Write { offset, data, .. } => {
                let length = payload_len(data) as u64;
                length <= REQUEST_BYTES_MAX && self.in_range(*offset, length)
            }
            ClientOp::Flush => true,
            ClientOp::Trim { offset, length, .. }
            | ClientOp::WriteZeroes { offset, length, .. }
            | ClientOp::BlockStatus { offset, length } => self.in_range(*offset, *length),
        }
    }

    pub(super) fn begin(&mut self, request: ClientRequest) {
        let ClientRequest { tag, op: what } = request;
        let bytes = cost(&what);
        if !self.valid(&what) {
            self.stats.in_flight_bytes -= bytes;
            return self.answer(tag, Err(ClientError::Invalid));
        }
        if self.role == Role::Reader
            && !matches!(what, ClientOp::Read { .. } | ClientOp::BlockStatus { .. })
        {
            self.stats.in_flight_bytes -= bytes;
            return self.answer(tag, read_only_answer(&what));
        }
        if matches!(what, ClientOp::Flush) {
            return self.begin_flush(tag);
        }
        let kind = match &what {
            ClientOp::Read { .. } => OpKind::Read {
                parts: SmallVec::new(),
            },
            ClientOp::BlockStatus { offset, length } => {
                OpKind::Status(Box::new(StatusMap::new(*offset, *length)))
            }
            _ => OpKind::Write,
        };
        let op = self.ops.insert(Op {
            tag,
            bytes,
            pending: 1,
            error: None,
            kind,
        });
        match what {
            ClientOp::Read { offset, length } => {
                self.stats.read_bytes += u64::from(length);
                self.begin_read(op, offset, u64::from(length));
            }
            ClientOp::Write { offset, data, fua } => {
                self.stats.written_bytes += payload_len(&data) as u64;
                self.begin_write(op, offset, &data, fua);
            }
            ClientOp::Trim {
                offset,
                length,
                fua,
            } => self.begin_trim(op, offset, length, fua, false),
            ClientOp::WriteZeroes {
                offset,
                length,
                fua,
            } => {
                self.begin_trim(op, offset, length, fua, true);
            }
            ClientOp::BlockStatus { .. } => self.begin_status(op),
            ClientOp::Flush => {}
        }
        self.op_part_done(op, None);
    }

    /// One more part is to be waited for.
    pub(super) fn op_add_part(&mut self, op: Key) {
        if let Some(op) = self.ops.get_mut(op) {
            op.pending += 1;
        }
    }

    /// One more part of a read; its number.
    pub(super) fn op_add_read_part(&mut self, op: Key) -> u32 {
        let Some(op) = self.ops.get_mut(op) else {
            return 0;
        };
        op.pending += 1;
        let OpKind::Read { parts } = &mut op.kind else {
            return 0;
        };
        parts.push(ReadSegments::new());
        (parts.len() - 1) as u32
    }

    /// A part of a read is done.
    pub(super) fn op_read_done(
        &mut self,
        key: Key,
        part: u32,
        result: Result<ReadSegments, ClientError>,
    ) {
        let error = match result {
            Ok(segments) => {
                if let Some(op) = self.ops.get_mut(key)
                    && let OpKind::Read { parts } = &mut op.kind
                    && let Some(slot) = parts.get_mut(part as usize)
                {
                    *slot = segments;
                }
                None
            }
            Err(error) => Some(error),
        };
        self.op_part_done(key, error);
    }

    /// A part is done; the last one answers the request.
    pub(super) fn op_part_done(&mut self, key: Key, error: Option<ClientError>) {
        let Some(op) = self.ops.get_mut(key) else {
            return;
        };
        op.error = op.error.or(error);
        op.pending -= 1;
        if op.pending > 0 {
            return;
        }
        let Some(op) = self.ops.remove(key) else {
            return;
        };
        self.stats.in_flight_bytes -= op.bytes;
        self.pump |= self.switch.holds();
        if self.ops.is_empty() {
            self.pump |= self.phase == Phase::Draining;
        }
        let result = match (op.error, op.kind) {
            (Some(error), _) => Err(error),
            (None, OpKind::Write) => {
                self.stats.writes += 1;
                Ok(ClientReply::Done)
            }
            (None, OpKind::Read { parts }) => {
                self.stats.reads += 1;
                let mut parts = parts.into_iter();
                let mut all = parts.next().unwrap_or_default();
                all.extend(parts.flatten());
                Ok(ClientReply::Data(all))
            }
            (None, OpKind::Status(map)) => Ok(ClientReply::Extents(map.extents())),
        };
        self.answer(op.tag, result);
    }

    /// Answers a client.
    pub(super) fn answer(&mut self, tag: u64, result: Result<ClientReply, ClientError>) {
        self.out.push(SessionCommand::Reply { tag, result });
    }
}
