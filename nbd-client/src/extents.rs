//! What a snapshot shows data in, and what changed between two: lists of the storage daemons, put together
//! (docs/snapshots.md, S10).
//!
//! Invariants:
//! - Extents are ascending, do not overlap, touch only where they differ in kind, and lie within the snapshot's size.
//! - Of each group one replica in sync is asked. When it fails, another goes on behind what was told completely; what
//!   snapshots show is the same on all.
//! - A slow reader slows the daemons down: little waits on the way.

mod group;
mod merge;
mod source;

use std::pin::Pin;
use std::task::{Context, Poll};

use ashlar_proto::ids::SnapshotId;
use tokio::sync::mpsc;
use tokio_stream::Stream;

use crate::client::BadAddress;
use crate::client::metadata::Members;

/// Extents that wait for a slow reader.
const EXTENTS_QUEUE: usize = 256;

/// A run of bytes of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte, a multiple of 4096.
    pub offset: u64,
    /// Bytes, a multiple of 4096.
    pub length: u64,
    /// It has data. False: it reads as zeroes, and did not in the base.
    pub data: bool,
}

impl Extent {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Why there is no list, or no more of it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ExtentsError {
    /// A snapshot does not exist, or was deleted meanwhile.
    #[error("{0}")]
    NotFound(String),
    /// The two are not of one volume, or in the wrong order.
    #[error("{0}")]
    NotComparable(String),
    /// The first byte lies beyond the snapshot's end.
    #[error("offset {offset} is beyond the snapshot's end at {size_bytes} bytes")]
    OutOfRange {
        /// What was asked for.
        offset: u64,
        /// The snapshot's size.
        size_bytes: u64,
    },
    /// No replica could be asked for some time.
    #[error("{0}")]
    Unavailable(String),
    /// Metadata refused, or an answer makes no sense.
    #[error("{0}")]
    Failed(String),
}

/// A list on its way.
#[derive(Debug)]
pub struct Extents {
    size_bytes: u64,
    receiver: mpsc::Receiver<Result<Extent, ExtentsError>>,
}

impl Extents {
    /// Size of the snapshot.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The next extent; `None` at the end. Nothing follows an error.
    ///
    /// # Errors
    /// If the list cannot be completed.
    pub async fn next(&mut self) -> Result<Option<Extent>, ExtentsError> {
        self.receiver.recv().await.transpose()
    }
}

impl Stream for Extents {
    type Item = Result<Extent, ExtentsError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context)
    }
}

/// Asks for lists.
#[derive(Clone)]
pub struct BlockLists {
    members: Members,
}

impl BlockLists {
    /// Of a cluster; `metadata` are `host:port`, at least one.
    ///
    /// # Errors
    /// If an address is malformed.
    pub fn new(metadata: &[String]) -> Result<Self, BadAddress> {
        let members = Members::new(metadata)?;
        Ok(Self { members })
    }

    /// Extents of a snapshot from an offset on that have data; with a base (an older snapshot of the volume) those
    /// that differ from it.
    ///
    /// # Errors
    /// If a snapshot does not exist, they cannot be compared, or the offset is beyond the end.
    pub async fn changed(
        &self,
        snapshot: SnapshotId,
        base: Option<SnapshotId>,
        start_offset: u64,
    ) -> Result<Extents, ExtentsError> {
        let source = source::Source::of_snapshot(self.members.clone(), snapshot, base).await?;
        start(source, start_offset)
    }

    /// Extents in which a volume differs now from a snapshot of it. For its holder, who knows what is written
    /// meanwhile.
    ///
    /// # Errors
    /// If the snapshot does not exist.
    pub async fn changed_since(&self, base: SnapshotId) -> Result<Extents, ExtentsError> {
        start(
            source::Source::of_head(self.members.clone(), base).await?,
            0,
        )
    }
}

fn start(source: source::Source, start_offset: u64) -> Result<Extents, ExtentsError> {
    let size_bytes = source.size_bytes();
    if start_offset > size_bytes {
        return Err(ExtentsError::OutOfRange {
            offset: start_offset,
            size_bytes,
        });
    }
    let (sender, receiver) = mpsc::channel(EXTENTS_QUEUE);
    if source.has_replicas() {
        tokio::spawn(async move {
            let gone = sender.clone();
            // A reader that went away wants nothing more, whatever is being waited for.
            tokio::select! {
                () = merge::run(source, start_offset, sender) => {}
                () = gone.closed() => {}
            }
        });
    }
    Ok(Extents {
        size_bytes,
        receiver,
    })
}
