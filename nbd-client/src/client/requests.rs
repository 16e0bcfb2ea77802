//! The NBD requests of one volume that are under way: which parts of them the engine has, and how they
//! are answered when all parts are done.
//!
//! Invariants:
//! - A request is answered exactly once, when no part is open and none will follow.
//! - A tag given to the engine names slot (low 32 bits) and part (high 32 bits) of an occupied slot
//!   until the engine has answered it.

use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::ConnId;

use super::stats::{Histogram, Latencies};
use crate::engine::{ClientError, ClientReply, ReadSegments};
use crate::metrics::REQUEST_SECONDS;
use crate::nbd::{
    Connection, EINVAL, EIO, ENOSPC, Extent, MAX_PART_LENGTH, ReplyStyle, STATE_HOLE, STATE_ZERO,
};

/// Most extents of one block status reply; the client asks again for the rest.
const EXTENTS_MAX: usize = 16 * 1024;

/// What kind of answer a request gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// Data from this offset, of this length.
    Read { offset: u64, length: u32 },
    /// Nothing but success.
    Write,
    /// The same.
    Flush,
    /// The same: trims and zeroes.
    Discard,
    /// Extents of so many bytes.
    Status { length: u32, one: bool },
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Pending {
    pub conn: ConnId,
    pub cookie: u64,
    pub style: ReplyStyle,
    pub kind: Kind,
    pub started: Time,
    parts_open: u32,
    parts_begun: u32,
    complete: bool,
    failed: bool,
    error: Option<u32>,
    gathered: Vec<(u64, ReadSegments)>,
}

/// Slots of requests.
#[derive(Default, Debug)]
pub(super) struct Requests {
    slots: Vec<Option<Pending>>,
    free: Vec<u32>,
    last_progress: Time,
    /// Longest time in which requests were under way and none was answered.
    pub longest_stall: Duration,
    /// Longest time that a request took.
    pub longest_request: Duration,
    /// Times that requests took.
    pub latencies: Latencies,
    /// The same, for Prometheus.
    observed: Option<Box<Observed>>,
    /// Trims and zeroes that succeeded.
    pub discards: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// End of part `part` of a range that is split at multiples of [`MAX_PART_LENGTH`].
pub(super) fn part_end(start: u64, end: u64) -> u64 {
    let part = u64::from(MAX_PART_LENGTH);
    (start / part * part + part).min(end)
}

/// Histograms of one volume that Prometheus sees.
struct Observed {
    read: metrics::Histogram,
    write: metrics::Histogram,
    flush: metrics::Histogram,
    discard: metrics::Histogram,
    status: metrics::Histogram,
}

impl std::fmt::Debug for Observed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Observed")
    }
}

impl Observed {
    fn new(volume: &str) -> Self {
        let of = |operation| REQUEST_SECONDS.histogram_of(&[volume, operation]);
        Self {
            read: of("read"),
            write: of("write"),
            flush: of("flush"),
            discard: of("discard"),
            status: of("status"),
        }
    }

    fn of(&self, kind: Kind) -> &metrics::Histogram {
        match kind {
            Kind::Read { .. } => &self.read,
            Kind::Write => &self.write,
            Kind::Flush => &self.flush,
            Kind::Discard => &self.discard,
            Kind::Status { .. } => &self.status,
        }
    }
}

impl Latencies {
    fn of(&mut self, kind: Kind) -> &mut Histogram {
        match kind {
            Kind::Read { .. } => &mut self.read,
            Kind::Write => &mut self.write,
            Kind::Flush => &mut self.flush,
            Kind::Discard => &mut self.discard,
            Kind::Status { .. } => &mut self.status,
        }
    }
}

impl Requests {
    /// Those of a volume, which Prometheus sees under its name.
    pub fn of(volume: &str) -> Self {
        Self {
            observed: Some(Box::new(Observed::new(volume))),
            ..Self::default()
        }
    }

    /// Requests under way.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes in a request.
    pub fn begin(
        &mut self,
        now: Time,
        conn: ConnId,
        cookie: u64,
        style: ReplyStyle,
        kind: Kind,
    ) -> u32 {
        if self.len() == 0 {
            self.last_progress = now;
        }
        let pending = Pending {
            conn,
            cookie,
            style,
            kind,
            started: now,
            parts_open: 0,
            parts_begun: 0,
            complete: false,
            failed: false,
            error: None,
            gathered: Vec::new(),
        };
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(pending);
            return slot;
        }
        self.slots.push(Some(pending));
        (self.slots.len() - 1) as u32
    }

    /// The tag for the next part of a request; `last`: none follows.
    pub fn part(&mut self, slot: u32, last: bool) -> u64 {
        let Some(pending) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else {
            return u64::from(slot);
        };
        let tag = u64::from(slot) | u64::from(pending.parts_begun) << 32;
        pending.parts_begun += 1;
        pending.parts_open += 1;
        pending.complete |= last;
        tag
    }

    /// No further part follows, although the last was not seen: the connection is gone.
    pub fn abandon(&mut self, slot: u32) {
        let Some(pending) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        pending.complete = true;
        if pending.parts_open == 0 {
            self.slots[slot as usize] = None;
            self.free.push(slot);
        }
    }

    /// See [`Self::abandon`].
    pub fn abandon_all(&mut self, slots: [Option<u32>; 2]) {
        for slot in slots.into_iter().flatten() {
            self.abandon(slot);
        }
    }

    /// Connection of the request that a tag names.
    pub fn connection_of(&self, tag: u64) -> Option<ConnId> {
        self.slots
            .get(tag as u32 as usize)?
            .as_ref()
            .map(|p| p.conn)
    }

    /// The engine has answered a part; `protocol` is the request's connection if that is still there.
    /// True if the request is done.
    pub fn finish_part(
        &mut self,
        now: Time,
        tag: u64,
        result: Result<ClientReply, ClientError>,
        protocol: Option<&mut Connection>,
    ) -> bool {
        let slot = tag as u32;
        let Some(pending) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else {
            return false;
        };
        pending.parts_open -= 1;
        pending.failed |= result.is_err();
        let done = pending.complete && pending.parts_open == 0;
        if let Some(protocol) = protocol {
            pending.answer(tag >> 32, result, done, protocol);
        }
        if done {
            self.errors += u64::from(pending.failed);
            self.discards += u64::from(pending.kind == Kind::Discard && !pending.failed);
            let took = now.since(pending.started);
            self.latencies.of(pending.kind).record(took);
            if let Some(observed) = &self.observed {
                observed.of(pending.kind).record(took);
            }
            self.longest_request = self.longest_request.max(now.since(pending.started));
            self.longest_stall = self.longest_stall.max(now.since(self.last_progress));
            self.last_progress = now;
            self.slots[slot as usize] = None;
            self.free.push(slot);
        }
        done
    }

    /// Time since anything was answered, while requests are under way.
    pub fn current_stall(&self, now: Time) -> Duration {
        if self.len() == 0 {
            Duration::ZERO
        } else {
            now.since(self.last_progress)
        }
    }
}

impl Pending {
    fn part_offset(&self, part: u64, offset: u64) -> u64 {
        if part == 0 {
            return offset;
        }
        let unit = u64::from(MAX_PART_LENGTH);
        (offset / unit + part) * unit
    }

    fn answer(
        &mut self,
        part: u64,
        result: Result<ClientReply, ClientError>,
        done: bool,
        protocol: &mut Connection,
    ) {
        match (result, self.kind) {
            (Ok(ClientReply::Data(segments)), Kind::Read { offset, length }) => {
                self.answer_read(part, segments, (offset, length), done, protocol);
                return;
            }
            (Ok(ClientReply::Extents(extents)), Kind::Status { length, one }) => {
                let extents = wire_extents(&extents, length, one);
                if done && self.error.is_none() && !extents.is_empty() {
                    protocol.reply_block_status(self.cookie, &extents);
                    return;
                }
                self.error.get_or_insert(EIO);
            }
            (Ok(ClientReply::Done), Kind::Write | Kind::Flush | Kind::Discard) => {}
            (Ok(_), _) => {
                tracing::error!("the engine's answer does not fit the request: report this bug");
                self.error.get_or_insert(EIO);
            }
            (Err(error), _) => {
                self.error.get_or_insert(match error {
                    ClientError::Io => EIO,
                    ClientError::NoSpace => ENOSPC,
                    ClientError::Invalid => EINVAL,
                });
            }
        }
        if done {
            match self.error {
                Some(error) => protocol.reply_error(self.style, self.cookie, error),
                None => protocol.reply_done(self.style, self.cookie),
            }
        }
    }

    fn answer_read(
        &mut self,
        part: u64,
        segments: ReadSegments,
        (offset, length): (u64, u32),
        done: bool,
        protocol: &mut Connection,
    ) {
        let end = offset + u64::from(length);
        let start = self.part_offset(part, offset);
        let got: usize = segments.iter().map(crate::engine::ReadSegment::len).sum();
        let whole = self.parts_begun == 1 && done;
        let expected = if whole {
            end - offset
        } else {
            part_end(start, end) - start
        };
        if got as u64 != expected {
            tracing::error!(
                got,
                expected,
                "a read's answer has the wrong length: report this bug"
            );
            self.error.get_or_insert(EIO);
        } else if whole && self.error.is_none() {
            protocol.reply_read(self.style, self.cookie, offset, segments);
            return;
        } else if self.style == ReplyStyle::Structured {
            let last = done && self.error.is_none();
            protocol.reply_read_part(self.cookie, start, segments, last);
            if last {
                return;
            }
        } else {
            self.gathered.push((start, segments));
        }
        if !done {
            return;
        }
        if let Some(error) = self.error {
            protocol.reply_error(self.style, self.cookie, error);
            return;
        }
        self.gathered.sort_unstable_by_key(|(start, _)| *start);
        let all = self
            .gathered
            .drain(..)
            .flat_map(|(_, segments)| segments)
            .collect();
        protocol.reply_read(self.style, self.cookie, offset, all);
    }
}

/// Extents in the protocol's form: bounded, adjoining ones of one kind joined.
fn wire_extents(extents: &[crate::engine::Extent], length: u32, one: bool) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len().min(EXTENTS_MAX));
    let most = if one { 1 } else { EXTENTS_MAX };
    let mut left = u64::from(length);
    for extent in extents {
        let length = extent.length.min(left) as u32;
        if length == 0 {
            continue;
        }
        left -= u64::from(length);
        let flags = if extent.allocated {
            0
        } else {
            STATE_HOLE | STATE_ZERO
        };
        let full = out.len() == most;
        match out.last_mut() {
            Some(last) if last.flags == flags => last.length += length,
            _ if full => break,
            _ => out.push(Extent { length, flags }),
        }
    }
    out
}
