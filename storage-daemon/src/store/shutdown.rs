//! The two ends of a store: closed cleanly, and poisoned.
//!
//! Invariants:
//! - The clean mark is written after everything that was admitted is done and durable.
//! - Poison answers everything that waits, once; nothing is written after it.

use std::io;

use super::api::{StoreCommand, StoreError, StoreReply};
use super::sync::{SuperblockAction, SyncAction};
use super::{Phase, Store};

impl Store {
    pub(super) fn pump_shutdown(&mut self, out: &mut Vec<StoreCommand>) {
        let Phase::Closing(_) = self.phase else {
            return;
        };
        if self.space.shutdown_started {
            return;
        }
        let busy = !self.queue.is_empty()
            || !self.parked.is_empty()
            || !self.reads.is_empty()
            || self.log.flights() > 0
            || !self.admin.is_idle()
            || !self.burst.is_idle()
            || !self.merge.is_idle()
            || !self.flattening.is_idle()
            || self.space.is_busy();
        if busy {
            self.close_wanted = true;
            return;
        }
        if self.log.open.is_empty() {
            self.append_watermarks(0);
        }
        if !self.log.open.is_empty() {
            self.close_wanted = true;
            self.submit_batch(out);
            return;
        }
        self.space.shutdown_started = true;
        self.sync.dirty = true;
        self.want_sync(SyncAction::Shutdown, out);
    }

    pub(super) fn shutdown_synced(&mut self) {
        self.superblock.clean = true;
        self.superblock.durable_sequence = self.log.durable;
        self.want_superblock(SuperblockAction::Shutdown);
    }

    pub(super) fn shutdown_done(&mut self, out: &mut Vec<StoreCommand>) {
        if let Phase::Closing(tag) = self.phase {
            Self::reply(out, tag, Ok(StoreReply::Done));
            out.push(StoreCommand::Closed);
            self.phase = Phase::Closed;
        }
    }

    /// Fail-stop: answers everything that waits with `DiskFailed`.
    pub(super) fn poison(&mut self, error: &io::Error, out: &mut Vec<StoreCommand>) {
        let mut tags: Vec<u64> = self.log.drain_acks().into_iter().map(|a| a.tag).collect();
        tags.extend(self.sync.take_replies());
        tags.extend(self.queue.drain(..).map(|p| p.tag));
        tags.extend(self.parked.drain().map(|(_, (p, _))| p.tag));
        tags.extend(
            std::mem::take(&mut self.batch_waiters)
                .into_values()
                .flatten()
                .map(|p| p.tag),
        );
        tags.extend(self.reads.drain().map(|(_, job)| job.tag()));
        tags.extend(self.admin.take_tags());
        if let Phase::Closing(tag) = self.phase {
            tags.push(tag);
        }
        tags.sort_unstable();
        let recovering = matches!(self.phase, Phase::Recovering(_));
        self.phase = Phase::Failed(StoreError::DiskFailed);
        for tag in tags {
            Self::reply(out, tag, Err(StoreError::DiskFailed));
        }
        tracing::error!(%error, "the disk failed: its replicas are lost until it is replaced or reopened");
        out.push(StoreCommand::Poisoned {
            kind: error.kind(),
            message: error.to_string(),
        });
        if recovering {
            out.push(StoreCommand::OpenFailed(StoreError::DiskFailed));
        }
    }
}
