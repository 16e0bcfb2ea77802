//! openraft's log storage on a [`LogEngine`].
//!
//! Invariants:
//! - `append` makes entries readable, then hands the callback to the flush thread, which groups all
//!   callbacks that wait behind one sync: entries count only once they are on the device.
//! - A vote is durable before `save_vote` returns; it goes through the same thread, so that writes
//!   become durable in the order of the calls.
//! - Purging persists the purged id, and from then on no read returns what is purged. The entries themselves are
//!   removed afterwards by the flush thread, a few at a time between its syncs: openraft waits for a purge in the
//!   loop that also appends and answers, and removing thousands of entries there would stop it for 0.1 s. What a
//!   crash leaves of them is removed after the next start.
//! - A failed sync or removal is final: every later callback fails, openraft stops, the member must restart.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use tokio::sync::oneshot;

use super::codec;
use super::engine::{LogEngine, MetaKey};
use super::types::{Entry, LogId, TypeConfig, Vote};

/// Flush requests that may wait; more block the sender.
const FLUSH_QUEUE_MAX: usize = 1024;
/// Most bytes of entries returned by one limited read.
const READ_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most purged entries removed at a time: about a millisecond.
const REMOVE_STEP: usize = 128;

enum Waiter {
    Append(IOFlushed<TypeConfig>),
    Call(oneshot::Sender<io::Result<()>>),
    /// [`LogStore::first`] has grown.
    Purged,
}

/// The log, the vote and what is around them.
#[derive(Clone)]
pub struct LogStore {
    engine: Arc<dyn LogEngine>,
    flush: mpsc::SyncSender<Waiter>,
    /// The lowest index that is not purged.
    first: Arc<AtomicU64>,
}

impl LogStore {
    /// A log store on an engine; starts its flush thread, which ends with the last clone.
    pub fn new(engine: Arc<dyn LogEngine>) -> io::Result<Self> {
        let (flush, waiters) = mpsc::sync_channel(FLUSH_QUEUE_MAX);
        let first = match purged(&*engine)? {
            Some(id) => id.index.saturating_add(1),
            None => 0,
        };
        let first = Arc::new(AtomicU64::new(first));
        let thread = FlushThread {
            engine: engine.clone(),
            first: first.clone(),
            removed_below: 0,
            failed: None,
        };
        std::thread::Builder::new()
            .name("raft-flush".to_owned())
            .spawn(move || thread.run(&waiters))?;
        Ok(Self {
            engine,
            flush,
            first,
        })
    }

    async fn sync(&self) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        self.flush.send(Waiter::Call(done)).map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }

    /// Entries of a range that are not purged, ascending.
    fn read(&self, start: u64, end: u64) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let start = start.max(self.first.load(Ordering::Acquire));
        if start >= end {
            return Ok(Vec::new());
        }
        self.engine.read(start..end)
    }
}

fn purged(engine: &dyn LogEngine) -> io::Result<Option<LogId>> {
    engine
        .meta(MetaKey::Purged)?
        .map(|b| codec::decode(&b))
        .transpose()
}

fn gone() -> io::Error {
    io::Error::other("the log's flush thread has ended")
}

/// Makes entries durable and removes purged ones.
struct FlushThread {
    engine: Arc<dyn LogEngine>,
    first: Arc<AtomicU64>,
    /// No entry below this index is left.
    removed_below: u64,
    failed: Option<String>,
}

impl FlushThread {
    /// Runs until the last [`LogStore`] is gone.
    fn run(mut self, waiters: &mpsc::Receiver<Waiter>) {
        let mut batch = Vec::new();
        loop {
            let lags = self.removed_below < self.first.load(Ordering::Acquire);
            let next = match lags && self.failed.is_none() {
                true => waiters.try_recv(),
                false => waiters.recv().map_err(|_| mpsc::TryRecvError::Disconnected),
            };
            match next {
                Ok(first) => {
                    batch.push(first);
                    batch.extend(waiters.try_iter());
                    self.flush(&mut batch);
                }
                Err(mpsc::TryRecvError::Empty) => {}
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
            // Also while flushes are asked for all the time: else the log would grow.
            self.remove_some();
        }
    }

    fn flush(&mut self, batch: &mut Vec<Waiter>) {
        let asked = batch.iter().any(|w| !matches!(w, Waiter::Purged));
        if asked
            && self.failed.is_none()
            && let Err(error) = self.engine.sync()
        {
            tracing::error!(%error, "the log cannot be made durable: this member stops; check its disk and restart it");
            self.failed = Some(error.to_string());
        }
        for waiter in batch.drain(..) {
            let result = match &self.failed {
                None => Ok(()),
                Some(error) => Err(io::Error::other(error.clone())),
            };
            match waiter {
                Waiter::Append(callback) => callback.io_completed(result),
                // A receiver that has gone away no longer cares.
                Waiter::Call(done) => drop(done.send(result)),
                Waiter::Purged => {}
            }
        }
    }

    /// Removes some of what is purged, if anything is left of it.
    fn remove_some(&mut self) {
        let end = self.first.load(Ordering::Acquire);
        if self.removed_below >= end || self.failed.is_some() {
            return;
        }
        match self.engine.remove_lowest(end, REMOVE_STEP) {
            Ok(count) if count < REMOVE_STEP => self.removed_below = end,
            Ok(_) => {}
            Err(error) => {
                tracing::error!(%error, "purged entries of the log cannot be removed: this member stops; check its disk and restart it");
                self.failed = Some(error.to_string());
            }
        }
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let start = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(i) => i.saturating_add(1),
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end)?
            .iter()
            .map(|(_, bytes)| codec::decode(bytes))
            .collect()
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.engine
            .meta(MetaKey::Vote)?
            .map(|b| codec::decode(&b))
            .transpose()
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        let mut bytes = 0;
        let mut entries = Vec::new();
        for (_, encoded) in self.read(start, end)? {
            bytes += encoded.len();
            if bytes > READ_BYTES_MAX && !entries.is_empty() {
                break;
            }
            entries.push(codec::decode(&encoded)?);
        }
        Ok(entries)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let purged = purged(&*self.engine)?;
        let last = match self.engine.last()? {
            Some((_, bytes)) => Some(codec::decode::<Entry>(&bytes)?.log_id()),
            None => None,
        };
        // Entries at or below the purged id may still be there.
        let last_log_id = last.max(purged);
        Ok(LogState {
            last_purged_log_id: purged,
            last_log_id,
        })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.engine
            .set_meta(MetaKey::Vote, Some(codec::encode(vote)?))?;
        self.sync().await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Not synced: it becomes durable with the next entry, and a lower one is only a later start.
        let value = committed.map(|id| codec::encode(&id)).transpose()?;
        self.engine.set_meta(MetaKey::Committed, value)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.engine
            .meta(MetaKey::Committed)?
            .map(|b| codec::decode(&b))
            .transpose()
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = entries
            .into_iter()
            .map(|e| Ok((e.log_id().index, codec::encode(&e)?)))
            .collect::<io::Result<Vec<_>>>()?;
        self.engine.put(encoded)?;
        self.flush
            .send(Waiter::Append(callback))
            .map_err(|_| gone())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let first = last_log_id.map_or(0, |id| id.index.saturating_add(1));
        self.engine.remove(first..u64::MAX)?;
        self.sync().await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        if purged(&*self.engine)?.is_some_and(|p| p >= log_id) {
            return Ok(());
        }
        self.engine
            .set_meta(MetaKey::Purged, Some(codec::encode(&log_id)?))?;
        self.sync().await?;
        self.first
            .fetch_max(log_id.index.saturating_add(1), Ordering::Release);
        // It may wait for something to do.
        self.flush.send(Waiter::Purged).map_err(|_| gone())
    }
}
