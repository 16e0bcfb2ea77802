//! FLUSH (R5), the watermark (R2) and the writes retained until a flush covers them.
//!
//! Invariants:
//! - One flush is under way at a time; requests that arrive meanwhile are covered by the next one.
//! - A flush is answered when every in-sync member and counted target of every group, as of the current
//!   configuration, answered a request of this flush.
//! - The watermark of a flush is taken when it starts, becomes *confirmed* when it ends, and travels on
//!   the flushes after it, to in-sync members only: a target may still lack writes below it.
//! - A write stays retained until a flush that started after its acknowledgement has ended.
//! - A flush with nothing but durable writes behind it is answered without asking anybody: each of them was
//!   durable on every in-sync member before it was acknowledged (R3). Every so often it is sent all the
//!   same, so that the watermark moves.
//!
//! Databases commit by one write and one flush. A session that sees this rhythm asks for durable writes:
//! the replica then writes and hardens in one go, and the flush costs nothing. A wrong guess costs one
//! write the time of a sync, and ends the guessing until the rhythm is seen again.

use ashlar_proto::ids::{ReplicaState, Version};
use ashlar_proto::wire::{Flush, RequestBody};

use super::api::ClientReply;
use super::replica::Purpose;
use super::session::Session;
use super::slots::PeerSet;

/// Flushes after exactly one write each that make the rhythm.
const RHYTHM_MIN: u8 = 2;
/// Flushes in a row that may be answered without asking anybody.
const SPARED_MAX: u32 = 64;

/// How the client's writes and flushes follow each other.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Rhythm {
    /// Writes since the last flush.
    writes: u32,
    /// Flushes in a row that came after one write.
    steps: u8,
    /// Flushes in a row that nobody was asked for.
    spared: u32,
}

impl Rhythm {
    /// A write arrives; whether a flush is expected after it.
    pub(super) fn write(&mut self) -> bool {
        self.writes = self.writes.saturating_add(1);
        self.steps >= RHYTHM_MIN && self.writes == 1
    }

    fn flush(&mut self) {
        self.steps = match self.writes {
            1 => (self.steps + 1).min(RHYTHM_MIN),
            _ => 0,
        };
        self.writes = 0;
    }
}

/// A flush under way.
#[derive(Debug)]
pub(super) struct FlushRun {
    number: u64,
    /// Retained writes before this count are covered.
    mark: u64,
    watermark: Version,
    sent: PeerSet,
    answered: PeerSet,
    waiters: Vec<u64>,
}

impl Session {
    /// A client's FLUSH.
    pub(super) fn begin_flush(&mut self, tag: u64) {
        self.rhythm.flush();
        let due = self.rhythm.spared >= SPARED_MAX && self.window.settled_below() > self.confirmed;
        if !self.dirty && self.flush.is_none() && !due {
            self.rhythm.spared += 1;
            self.stats.flushes += 1;
            self.stats.flushes_spared += 1;
            return self.answer(tag, Ok(ClientReply::Done));
        }
        self.flush_waiters.push(tag);
        if self.flush.is_none() {
            self.start_flush();
        }
    }

    /// Starts a flush that covers everything acknowledged so far.
    pub(super) fn start_flush(&mut self) {
        self.flush_number += 1;
        self.dirty = false;
        self.rhythm.spared = 0;
        self.flush = Some(FlushRun {
            number: self.flush_number,
            mark: self.retained_base + self.retained.len() as u64,
            watermark: self.window.settled_below(),
            sent: PeerSet::EMPTY,
            answered: PeerSet::EMPTY,
            waiters: std::mem::take(&mut self.flush_waiters),
        });
        self.flush_pump();
    }

    fn flush_needed(&self) -> PeerSet {
        self.groups
            .iter()
            .fold(PeerSet::EMPTY, |set, g| set.union(g.needed()))
    }

    /// Sends what is to be sent; ends the flush when all have answered.
    pub(super) fn flush_pump(&mut self) {
        let needed = self.flush_needed();
        let Some(run) = &self.flush else { return };
        // While a group lost everything and is replayed, an answer would promise too much.
        if self.groups.iter().any(|g| g.recovering) {
            return;
        }
        let (number, missing) = (run.number, needed.without(run.sent));
        if run.answered.covers(needed) {
            return self.end_flush();
        }
        for peer in missing.iter() {
            if self.usable(peer) {
                if let Some(run) = &mut self.flush {
                    run.sent.insert(peer);
                }
                let flush = self.flush_body(peer);
                self.send(peer, Purpose::Flush { number }, RequestBody::Flush(flush));
            }
        }
    }

    /// What a flush tells a peer besides "flush".
    pub(super) fn flush_body(&self, peer: u8) -> Flush {
        let member_everywhere = self
            .groups
            .iter()
            .filter_map(|g| g.member(peer))
            .all(|m| m.state == ReplicaState::InSync);
        let whole = self
            .groups
            .iter()
            .all(|g| g.members.iter().all(|m| m.state == ReplicaState::InSync));
        let watermark = if member_everywhere {
            self.confirmed
        } else {
            Version::ZERO
        };
        Flush {
            watermark,
            forget_below: if whole { self.confirmed } else { Version::ZERO },
        }
    }

    pub(super) fn on_flushed(&mut self, peer: u8, number: u64) {
        if let Some(run) = &mut self.flush
            && run.number == number
            && run.sent.contains(peer)
        {
            run.answered.insert(peer);
            self.flush_pump();
        }
    }

    pub(super) fn flush_void(&mut self, peer: u8, number: u64) {
        if let Some(run) = &mut self.flush
            && run.number == number
        {
            run.sent.remove(peer);
            run.answered.remove(peer);
            self.pump = true;
        }
    }

    /// Answers of these peers to the flush under way count no longer.
    pub(super) fn flush_forget(&mut self, peers: PeerSet) {
        if let Some(run) = &mut self.flush {
            run.sent = run.sent.without(peers);
            run.answered = run.answered.without(peers);
        }
    }

    fn end_flush(&mut self) {
        let Some(run) = self.flush.take() else { return };
        self.flushed = run.number;
        self.confirmed = self.confirmed.max(run.watermark);
        while self.retained_base < run.mark {
            self.retained_base += 1;
            if let Some(gone) = self.retained.pop_front() {
                self.stats.retained_bytes -= gone.bytes();
            }
        }
        for tag in run.waiters {
            self.stats.flushes += 1;
            self.answer(tag, Ok(ClientReply::Done));
        }
        self.pump = true;
        if !self.flush_waiters.is_empty() {
            self.start_flush();
        }
        self.bound_retained();
    }
}
