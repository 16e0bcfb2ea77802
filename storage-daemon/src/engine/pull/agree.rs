//! The exchange of layer lists (docs/snapshots.md, S6), so that what is compared was listed under one list.
//!
//! An exchange reads the own list, sends it to the source, which keeps the newer one and answers with it, and gives
//! that to the own store if it is newer. Two exchanges that found both sides at one revision, the same both times,
//! bracket a stretch: the revision of a replica never falls, so both sides were at it throughout, and every listing,
//! read and merge in between was made under that one list. Chunks that were done before the second exchange began are
//! then compared for good: what is equal under a list is equal under every later one, because later lists only merge
//! layers further. If the second exchange finds another revision, the stretch is compared once more.
//!
//! Invariants:
//! - Nothing is listed before the first exchange, nor while a merge of an earlier stretch is with the own store.
//! - Chunks below `verified` lie in stretches that are bracketed. A pull is complete when an exchange that began after
//!   the last chunk was done has closed the last one.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::ChunkIndex;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{PullState, RequestBody};

use super::listing::Listing;
use super::{Local, Pull, PullCommand, PullFailure, Remote};
use crate::store::{StoreReply, StoreRequest};

/// Chunks compared between two exchanges: what a new list costs is at most that many comparisons.
const STRETCH_CHUNKS: u32 = 1024;

/// Whom an exchange waits for.
enum Waiting {
    /// The own store, for its list.
    Own,
    /// The source, which was sent this revision.
    Source(u64),
    /// The own store, which was given a newer list.
    Adopting,
}

/// An exchange under way.
struct Exchange {
    waiting: Waiting,
    /// Chunks below were done when it began.
    done_below: ChunkIndex,
    /// All of them were.
    complete: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Agreement {
    exchange: Option<Exchange>,
    /// What both sides had at the last exchange.
    revision: Option<u64>,
    verified: ChunkIndex,
    /// An exchange is needed before anything is listed: at the start, and after a connection was lost.
    stands: bool,
    /// Value of `chunks_done` at the last exchange.
    counted: u32,
}

impl Pull {
    /// Starts an exchange where one is due; whether chunks may be compared.
    pub(super) fn agree(&mut self, out: &mut Vec<PullCommand>) -> bool {
        let due = self.chunks_done.wrapping_sub(self.agreement.counted) >= STRETCH_CHUNKS;
        let settled = self.agreement.stands || self.applies == 0;
        if self.agreement.exchange.is_none() && settled && (due || !self.agreement.stands) {
            self.begin_exchange(false, out);
        }
        self.agreement.stands
    }

    /// Everything is compared and applied: complete, once an exchange confirms it.
    pub(super) fn confirm(&mut self, out: &mut Vec<PullCommand>) {
        if self.agreement.exchange.is_none() {
            self.begin_exchange(true, out);
        }
    }

    fn begin_exchange(&mut self, complete: bool, out: &mut Vec<PullCommand>) {
        self.agreement.counted = self.chunks_done;
        self.agreement.exchange = Some(Exchange {
            waiting: Waiting::Own,
            done_below: self.done_below(),
            complete,
        });
        let volume = self.order.volume;
        self.ask_store(Local::Layers, StoreRequest::GetReplica { volume }, out);
    }

    /// Every chunk below is done.
    pub(super) fn done_below(&self) -> ChunkIndex {
        self.tasks.keys().next().copied().unwrap_or(self.position)
    }

    /// The connection is gone: another exchange comes before anything else.
    pub(super) fn disagree(&mut self) {
        self.agreement.exchange = None;
        self.agreement.stands = false;
    }

    /// The exchange is put off: somebody was busy.
    pub(super) fn exchange_again(&mut self) {
        self.agreement.exchange = None;
    }

    /// The own store answered in an exchange.
    pub(super) fn own_layers(
        &mut self,
        reply: StoreReply,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) -> Result<(), PullFailure> {
        let Some(exchange) = self.agreement.exchange.as_mut() else {
            return Ok(());
        };
        match (&exchange.waiting, reply) {
            (Waiting::Own, StoreReply::Replica(info)) => {
                exchange.waiting = Waiting::Source(info.layers.revision);
                self.send(Remote::Layers, RequestBody::Layers(info.layers), now, out);
                Ok(())
            }
            (Waiting::Adopting, StoreReply::Done) => {
                self.agreement.exchange = None;
                Ok(())
            }
            _ => Err(PullFailure::Protocol(
                "the own store gave an answer of another kind",
            )),
        }
    }

    /// The source answered with its list.
    pub(super) fn source_layers(
        &mut self,
        layers: LayerList,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) -> Result<(), PullFailure> {
        let Some(exchange) = self.agreement.exchange.as_mut() else {
            return Ok(());
        };
        let Waiting::Source(own) = exchange.waiting else {
            return Err(PullFailure::Protocol("a layer list that nobody asked for"));
        };
        if layers.revision < own {
            return Err(PullFailure::Protocol(
                "the source did not take a newer layer list",
            ));
        }
        let (below, complete) = (exchange.done_below, exchange.complete);
        if layers.revision > own {
            if self.agreement.stands {
                self.compare_again(now, out);
                return Ok(());
            }
            exchange.waiting = Waiting::Adopting;
            let volume = self.order.volume;
            let request = StoreRequest::PutLayers { volume, layers };
            self.ask_store(Local::Layers, request, out);
            return Ok(());
        }
        let before = self.agreement.revision.replace(own);
        let bracketed = before == Some(own);
        if bracketed {
            self.agreement.verified = below;
        } else if self.agreement.stands {
            self.compare_again(now, out);
            return Ok(());
        } else {
            let from = self.agreement.verified;
            self.position = from;
            self.source = Listing::from(from);
            self.target = Listing::from(from);
        }
        self.agreement.exchange = None;
        self.agreement.stands = true;
        if complete {
            self.end(PullState::Complete, out);
        }
        Ok(())
    }

    /// A list changed under a stretch: back to its beginning, on another connection, so that nothing of it is still
    /// under way.
    fn compare_again(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        self.agreement.revision = None;
        out.push(PullCommand::Disconnect);
        self.lost(now, out);
    }
}
