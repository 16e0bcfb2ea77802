//! Giving free pages back to the device: a discard (TRIM, UNMAP), or a hole in a file.
//!
//! Invariants:
//! - A page may be discarded when it may be allocated, and not before: then nothing on disk names it, so that
//!   what it holds afterwards does not matter, whatever a crash makes of the discard.
//! - A page is not handed out while its discard is in flight; it counts as available.
//! - One command is in flight, of at most half of the pages that could be handed out.
//! - A discard is advice: one that fails ends discarding until the disk is opened again, nothing else.

use std::io;

use ashlar_platform::clock::Time;
use ashlar_platform::disk::DiskCommand;
use ashlar_proto::ids::PAGE_SIZE;

use super::api::StoreCommand;
use super::{Phase, Store, Target};

/// Pages of one command: 64 MiB.
const PAGES_MAX: u32 = 1024;

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct DiscardState {
    /// First page and count of the command in flight.
    in_flight: Option<(u32, u32)>,
    /// When the pages that were given back lately become due.
    pub(super) age_at: Option<Time>,
}

impl Store {
    /// Lets free pages age, and discards those that stayed free for long enough.
    pub(super) fn pump_discard(&mut self, out: &mut Vec<StoreCommand>) {
        let Some(after) = self.config.discard_after else {
            return;
        };
        if !matches!(self.phase, Phase::Ready) {
            return;
        }
        if self.discard.age_at.is_some_and(|at| at <= self.now) {
            self.discard.age_at = None;
            self.allocator.age();
        }
        if self.discard.age_at.is_none() && self.allocator.has_fresh() {
            self.discard.age_at = Some(self.now.after(after));
        }
        if self.discard.in_flight.is_some() {
            return;
        }
        if let Some((first, count)) = self.allocator.hold_due(PAGES_MAX) {
            self.discard.in_flight = Some((first, count));
            let token = self.token(Target::Discard);
            out.push(StoreCommand::Disk(DiskCommand::Discard {
                token,
                offset: self.page_offset(first),
                length: u64::from(count) * PAGE_SIZE as u64,
            }));
        }
    }

    /// The command in flight is done.
    pub(super) fn on_discarded(&mut self, result: Result<(), io::Error>) {
        let Some((first, count)) = self.discard.in_flight.take() else {
            return;
        };
        self.allocator.put_back(first, count);
        match result {
            Ok(()) => self.stats.discarded_bytes += u64::from(count) * PAGE_SIZE as u64,
            Err(error) => {
                if error.kind() == io::ErrorKind::Unsupported {
                    tracing::info!("the disk takes no discards: free space stays allocated there");
                } else {
                    tracing::warn!(%error, "a discard failed: no more until the disk is opened again");
                }
                self.config.discard_after = None;
                self.discard.age_at = None;
                self.allocator.forget_discards();
            }
        }
    }
}
