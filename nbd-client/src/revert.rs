//! Brings a detached volume back to a snapshot of it: what differs is copied back.
//!
//! Invariants:
//! - From `BeginRevert` to `EndRevert` nobody else opens the volume, whatever becomes of this process. Carried out again, it goes
//!   on with what still differs; that it copies some of it twice does no harm.
//! - `EndRevert` comes after everything was copied and flushed and the volume was closed, under the epoch of that close. Before it
//!   the same command takes the volume over; after it nobody holds the volume: a process that dies leaves nothing for people to mend.
//! - The copy is a write like any other: replicated, versioned, and part of the next difference.

use std::time::Duration;

use ashlar_platform::random;
use ashlar_proto::ids::{ClientId, SnapshotId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tokio::task::JoinSet;
use tonic::Status;

use crate::client::{
    BadAddress, Ended, Endpoint, Host, HostConfig, HostError, HostedVolume, OpenSpec, Phase,
    Unreadable,
};
use crate::engine::{ClientOp, ClientReply, ReadSegment};
use crate::extents::{BlockLists, Extent, ExtentsError};

/// Bytes that one request copies.
const PIECE_BYTES: u64 = 1 << 20;
/// Copies under way at once.
const COPIES_MAX: usize = 8;
/// Time for volume and snapshot to be open: as long as a reconciliation may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a volume is not what the snapshot shows.
#[derive(Debug, thiserror::Error)]
pub enum RevertError {
    /// An address is none.
    #[error(transparent)]
    Address(#[from] BadAddress),
    /// No threads.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The snapshot cannot be read.
    #[error("the snapshot: {0}")]
    Snapshot(#[from] Unreadable),
    /// What differs cannot be listed.
    #[error(transparent)]
    Extents(#[from] ExtentsError),
    /// Metadata refuses.
    #[error("{}", .0.message())]
    Metadata(Box<Status>),
    /// The volume or the snapshot ended on the way.
    #[error("{what}: {why}")]
    Ended {
        /// Which.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// A request failed.
    #[error("cannot {doing} at byte {offset}: {why}")]
    Copy {
        /// What was tried.
        doing: &'static str,
        /// Where.
        offset: u64,
        /// Why not.
        why: String,
    },
}

/// What is to be brought back, and how.
#[derive(Clone, Debug)]
pub struct Revert {
    /// The volume.
    pub volume: VolumeId,
    /// Its name, for messages.
    pub name: String,
    /// A snapshot of it.
    pub snapshot: SnapshotId,
    /// Its size: what lies beyond becomes zeroes.
    pub snapshot_bytes: u64,
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Reverted {
    /// Bytes that differed and were brought back.
    pub bytes: u64,
}

fn refused(status: Status) -> RevertError {
    RevertError::Metadata(Box::new(status))
}

impl Revert {
    /// Carries it out; `progress` is told the bytes done so far.
    ///
    /// # Errors
    /// If it cannot be completed: the volume stays as it is, half brought back, until it is carried out again.
    pub async fn run(
        &self,
        host_config: HostConfig,
        progress: impl Fn(u64),
    ) -> Result<Reverted, RevertError> {
        let lists = BlockLists::new(&host_config.metadata)?;
        let client = host_config.client;
        // A host serves a volume once: the snapshot has another one.
        let (reader, reader_threads) = Host::start(HostConfig {
            client: ClientId::generate(),
            ..host_config.clone()
        })?;
        let (host, threads) = Host::start(host_config)?;
        let result = self.with_hosts(&host, &reader, client, &lists, progress);
        let result = result.await;
        for host in [&host, &reader] {
            host.shut_down().await;
        }
        threads.join();
        reader_threads.join();
        result
    }

    async fn with_hosts(
        &self,
        host: &Host,
        reader: &Host,
        client: ClientId,
        lists: &BlockLists,
        progress: impl Fn(u64),
    ) -> Result<Reverted, RevertError> {
        let again = self.begin(host).await?;
        let volume = host
            .open(OpenSpec {
                force: again,
                revert: true,
                ..OpenSpec::new(self.volume, self.name.clone(), Endpoint::Given)
            })
            .await;
        let copied = match serving(&volume, "the volume").await {
            Ok(()) => self.copy_back(reader, &volume, lists, progress).await,
            Err(error) => return Err(error),
        };
        volume.close().await;
        let ended = volume.ended().await;
        // What went wrong first says more.
        let done = copied?;
        let Ended::Closed { epoch } = ended else {
            return Err(RevertError::Ended {
                what: "the volume",
                why: ended.to_string(),
            });
        };
        self.end(host, client, epoch).await.map(|()| done)
    }

    /// True: it was begun before. Whoever did that has the volume perhaps, and is dead or does the same: it is taken over.
    async fn begin(&self, host: &Host) -> Result<bool, RevertError> {
        let reverting = self.volume(host).await?.reverting;
        if reverting.is_some_and(|r| r.snapshot_id == self.snapshot.to_vec()) {
            return Ok(true);
        }
        let request = pb::BeginRevertRequest {
            request_id: random::bytes::<16>().to_vec(),
            volume_id: self.volume.to_vec(),
            snapshot_id: self.snapshot.to_vec(),
        };
        let begun = host.members().ask("BeginRevert", |mut c| {
            let request = request.clone();
            async move { c.begin_revert(request).await }
        });
        begun.await.map(|_| false).map_err(refused)
    }

    async fn volume(&self, host: &Host) -> Result<pb::Volume, RevertError> {
        let question = pb::GetVolumeRequest {
            name: String::new(),
            volume_id: self.volume.to_vec(),
        };
        let found = host.members().ask("GetVolume", |mut c| {
            let question = question.clone();
            async move { c.get_volume(question).await }
        });
        found.await.map_err(refused)
    }

    /// Refused if somebody opened the volume since the close in `epoch`.
    async fn end(&self, host: &Host, client: ClientId, epoch: u64) -> Result<(), RevertError> {
        let request = pb::EndRevertRequest {
            request_id: random::bytes::<16>().to_vec(),
            volume_id: self.volume.to_vec(),
            snapshot_id: self.snapshot.to_vec(),
            client_id: client.to_vec(),
            epoch,
        };
        let ended = host.members().ask("EndRevert", |mut c| {
            let request = request.clone();
            async move { c.end_revert(request).await }
        });
        ended.await.map(|_| ()).map_err(refused)
    }

    async fn copy_back(
        &self,
        reader: &Host,
        volume: &HostedVolume,
        lists: &BlockLists,
        progress: impl Fn(u64),
    ) -> Result<Reverted, RevertError> {
        let source = reader.open_snapshot(self.snapshot, Endpoint::Given).await?;
        serving(&source, "the snapshot").await?;
        let result = self.copy_extents(&source, volume, lists, progress).await;
        source.close().await;
        let done = result?;
        request(volume, "flush", 0, ClientOp::Flush).await?;
        Ok(done)
    }

    async fn copy_extents(
        &self,
        source: &HostedVolume,
        volume: &HostedVolume,
        lists: &BlockLists,
        progress: impl Fn(u64),
    ) -> Result<Reverted, RevertError> {
        let mut differing = lists.changed_since(self.snapshot).await?;
        let mut copies: JoinSet<Result<u64, RevertError>> = JoinSet::new();
        let mut done = Reverted::default();
        while let Some(extent) = differing.next().await? {
            for piece in pieces(extent, self.snapshot_bytes) {
                while copies.len() >= COPIES_MAX {
                    done.bytes += finished(copies.join_next().await)?;
                    progress(done.bytes);
                }
                let (source, volume, end) = (source.clone(), volume.clone(), self.snapshot_bytes);
                copies.spawn(async move { copy(&source, &volume, piece, end).await });
            }
        }
        while let Some(copied) = copies.join_next().await {
            done.bytes += finished(Some(copied))?;
            progress(done.bytes);
        }
        Ok(done)
    }
}

/// An extent in pieces, none of which crosses the snapshot's end.
fn pieces(extent: Extent, snapshot_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = extent.offset;
    std::iter::from_fn(move || {
        let mut stop = (at + PIECE_BYTES).min(extent.end());
        if at < snapshot_bytes {
            stop = stop.min(snapshot_bytes);
        }
        let piece = (at < stop).then_some((at, stop - at));
        at = stop;
        piece
    })
}

fn finished(
    joined: Option<Result<Result<u64, RevertError>, tokio::task::JoinError>>,
) -> Result<u64, RevertError> {
    match joined {
        None => Ok(0),
        Some(Ok(copied)) => copied,
        Some(Err(error)) => Err(RevertError::Copy {
            doing: "copy",
            offset: 0,
            why: error.to_string(),
        }),
    }
}

async fn serving(volume: &HostedVolume, what: &'static str) -> Result<(), RevertError> {
    let wait = volume.wait(|s| s.phase == Phase::Serving);
    let ended = |why: String| RevertError::Ended { what, why };
    match tokio::time::timeout(OPEN_TIMEOUT, wait).await {
        Err(_) => Err(ended(
            "not open in time; are its replicas there?".to_owned(),
        )),
        Ok(status) => match status.phase {
            Phase::Serving => Ok(()),
            Phase::Opening => Err(ended("not open".to_owned())),
            Phase::Ended(why) => Err(ended(why.to_string())),
        },
    }
}

async fn request(
    volume: &HostedVolume,
    doing: &'static str,
    offset: u64,
    op: ClientOp,
) -> Result<ClientReply, RevertError> {
    let failed = |why: String| RevertError::Copy { doing, offset, why };
    match volume.ask(op).await {
        Some(Ok(reply)) => Ok(reply),
        Some(Err(error)) => Err(failed(error.to_string())),
        None => Err(failed(volume.ended().await.to_string())),
    }
}

/// Copies a piece: data as data, zeroes as trims.
async fn copy(
    source: &HostedVolume,
    volume: &HostedVolume,
    (offset, length): (u64, u64),
    snapshot_bytes: u64,
) -> Result<u64, RevertError> {
    if offset >= snapshot_bytes {
        trim(volume, offset, length).await?;
        return Ok(length);
    }
    let read = ClientOp::Read {
        offset,
        // At most PIECE_BYTES.
        length: length as u32,
    };
    let ClientReply::Data(segments) = request(source, "read the snapshot", offset, read).await?
    else {
        return Err(RevertError::Copy {
            doing: "read the snapshot",
            offset,
            why: "an answer of another kind: report this bug".to_owned(),
        });
    };
    let mut at = offset;
    for segment in segments {
        let bytes = segment.len() as u64;
        match segment {
            ReadSegment::Data(data) => {
                let write = ClientOp::Write {
                    offset: at,
                    data: ashlar_proto::wire::Payload::from_iter([data]),
                    fua: false,
                };
                request(volume, "write", at, write).await?;
            }
            ReadSegment::Zeroes(_) => trim(volume, at, bytes).await?,
        }
        at += bytes;
    }
    Ok(length)
}

async fn trim(volume: &HostedVolume, offset: u64, length: u64) -> Result<(), RevertError> {
    let trim = ClientOp::Trim {
        offset,
        length,
        fua: false,
    };
    request(volume, "trim", offset, trim).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_an_extent_and_do_not_cross_the_snapshots_end() {
        let extent = Extent {
            offset: 4096,
            length: 3 * PIECE_BYTES,
            data: true,
        };
        let end = PIECE_BYTES + 8192;
        let all: Vec<_> = pieces(extent, end).collect();
        assert_eq!(
            all.iter().map(|(_, length)| length).sum::<u64>(),
            3 * PIECE_BYTES
        );
        let mut at = 4096;
        for (offset, length) in all {
            assert_eq!(offset, at);
            assert!(length <= PIECE_BYTES && (offset >= end || offset + length <= end));
            at += length;
        }
    }
}
