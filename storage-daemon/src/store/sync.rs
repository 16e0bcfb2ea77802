//! Grouped fdatasync, and the superblock's writer.
//!
//! Invariants:
//! - One sync is in flight; a waiter is only served by a sync submitted after it began to wait (or, if
//!   nothing completed in between, by the one in flight).
//! - The superblock's copies are written together, one change at a time; a change counts after a sync.

use ashlar_platform::disk::DiskCommand;
use bytes::Bytes;
use smallvec::smallvec;

use super::api::StoreCommand;
use super::log::Answer;
use super::{Store, Target};
use crate::format::{IO_BLOCK, SUPERBLOCK_OFFSETS};

/// What follows a sync.
#[derive(Debug)]
pub(super) enum SyncAction {
    Reply(u64, Answer),
    Superblock,
    Admin,
    WriteBack,
    Merge,
    /// Slot and number of the replica.
    Flatten(u32, u64),
    HighWater,
    /// Nothing but the knowledge.
    Marker,
    Shutdown,
    Recovery,
}

/// What follows a durable superblock.
#[derive(Debug)]
pub(super) enum SuperblockAction {
    TailFree,
    HighWater(u32),
    Admin,
    Shutdown,
    Recovery,
}

/// State of both.
#[derive(Default)]
pub(super) struct SyncState {
    waiting: Vec<SyncAction>,
    current: Vec<SyncAction>,
    in_flight: bool,
    covers: u64,
    /// Something was written since the last sync was submitted.
    pub(super) dirty: bool,
    superblock_waiting: Vec<SuperblockAction>,
    superblock_current: Vec<SuperblockAction>,
    superblock_pending: u8,
    superblock_busy: bool,
    pub(super) count: u64,
}

impl SyncState {
    pub(super) fn take_replies(&mut self) -> Vec<u64> {
        let all = self.waiting.drain(..).chain(self.current.drain(..));
        all.filter_map(|a| {
            if let SyncAction::Reply(tag, _) = a {
                Some(tag)
            } else {
                None
            }
        })
        .collect()
    }

    pub(super) fn idle(&self) -> bool {
        !self.in_flight && self.waiting.is_empty() && !self.superblock_busy
    }
}

impl Store {
    /// Asks for a sync of everything completed so far.
    pub(super) fn want_sync(&mut self, action: SyncAction, out: &mut Vec<StoreCommand>) {
        if self.sync.dirty || !self.sync.waiting.is_empty() {
            self.sync.waiting.push(action);
        } else if self.sync.in_flight {
            self.sync.current.push(action);
        } else {
            // Nothing was written since the last completed sync: already durable.
            self.run_sync_action(action, out);
        }
    }

    pub(super) fn start_sync(&mut self, out: &mut Vec<StoreCommand>) {
        if self.sync.in_flight || self.sync.waiting.is_empty() {
            return;
        }
        std::mem::swap(&mut self.sync.waiting, &mut self.sync.current);
        self.sync.in_flight = true;
        self.sync.dirty = false;
        self.sync.covers = self.log.completed;
        self.sync.count += 1;
        let token = self.token(Target::Sync);
        out.push(StoreCommand::Disk(DiskCommand::Sync { token }));
    }

    pub(super) fn on_synced(&mut self, out: &mut Vec<StoreCommand>) {
        self.sync.in_flight = false;
        self.log.synced(self.sync.covers);
        for action in std::mem::take(&mut self.sync.current) {
            self.run_sync_action(action, out);
        }
    }

    fn run_sync_action(&mut self, action: SyncAction, out: &mut Vec<StoreCommand>) {
        match action {
            SyncAction::Reply(tag, answer) => Self::reply(out, tag, Ok(answer.into_reply())),
            SyncAction::Superblock => {
                self.sync.superblock_busy = false;
                for action in std::mem::take(&mut self.sync.superblock_current) {
                    match action {
                        SuperblockAction::TailFree => self.finish_burst(out),
                        SuperblockAction::HighWater(to) => self.high_water_raised(to),
                        SuperblockAction::Admin => self.admin_advance(out),
                        SuperblockAction::Shutdown => self.shutdown_done(out),
                        SuperblockAction::Recovery => self.recovery_advance(out),
                    }
                }
            }
            SyncAction::Admin => self.admin_advance(out),
            SyncAction::WriteBack => self.burst_synced(out),
            SyncAction::Merge => self.merge_synced(),
            SyncAction::Flatten(slot, number) => self.flatten_synced(slot, number),
            SyncAction::HighWater => self.high_water_sectors_durable(),
            SyncAction::Marker => {}
            SyncAction::Shutdown => self.shutdown_synced(),
            SyncAction::Recovery => self.recovery_advance(out),
        }
    }

    /// Asks for the superblock, as it is when the write starts, to be made durable.
    pub(super) fn want_superblock(&mut self, action: SuperblockAction) {
        self.sync.superblock_waiting.push(action);
    }

    pub(super) fn start_superblock(&mut self, out: &mut Vec<StoreCommand>) {
        if self.sync.superblock_busy || self.sync.superblock_waiting.is_empty() {
            return;
        }
        self.sync.superblock_busy = true;
        self.sync.superblock_current = std::mem::take(&mut self.sync.superblock_waiting);
        self.superblock.generation += 1;
        self.superblock.durable_sequence = self.superblock.durable_sequence.max(self.log.durable);
        let mut block = ashlar_platform::buffer::AlignedBuffer::zeroed(IO_BLOCK);
        block[..crate::format::SECTOR].copy_from_slice(&self.superblock.encode());
        let block: Bytes = block.freeze();
        self.sync.superblock_pending = SUPERBLOCK_OFFSETS.len() as u8;
        for offset in SUPERBLOCK_OFFSETS {
            let token = self.token(Target::Superblock);
            let data = smallvec![block.clone()];
            out.push(StoreCommand::Disk(DiskCommand::Write {
                durable: false,
                token,
                offset,
                data,
            }));
        }
    }

    pub(super) fn on_superblock_written(&mut self, out: &mut Vec<StoreCommand>) {
        self.sync.superblock_pending -= 1;
        if self.sync.superblock_pending == 0 {
            self.want_sync(SyncAction::Superblock, out);
        }
    }
}
