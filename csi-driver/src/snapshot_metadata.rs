//! The SnapshotMetadata service: which blocks of a snapshot have data, and which changed between two.
//!
//! Invariants:
//! - Every message of a stream has the same type and capacity; a stream has at least one, and ends with an error or
//!   complete.
//! - Ranges begin at multiples of 4096, ascend and do not touch. A range that holds the starting offset is told from
//!   there on (from the block that the offset lies in).
//! - Memory is bounded: a slow caller slows the storage daemons down.

use std::pin::Pin;

use ashlar_proto::ids::{BLOCK_SIZE, SnapshotId};
use nbd_client::extents::{BlockLists, Extent, Extents, ExtentsError};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::errors::{Error, Result};
use crate::rpc::snapshot_metadata_server::SnapshotMetadata;
use crate::rpc::{self, BlockMetadata, BlockMetadataType};
use crate::{snapshots, validate};

/// Ranges of one message, if the caller does not say how many it wants.
const RANGES_DEFAULT: usize = 512;
/// Most ranges of one message, whatever the caller wants.
const RANGES_MAX: usize = 16 * 1024;
/// Messages that wait for a slow caller.
const MESSAGES_QUEUE: usize = 2;

type Messages<T> = Pin<Box<dyn Stream<Item = std::result::Result<T, Status>> + Send>>;
type Answer<T> = std::result::Result<Response<Messages<T>>, Status>;

/// The service.
#[derive(Clone)]
pub struct SnapshotMetadataService {
    lists: BlockLists,
}

/// What is asked for.
struct Question {
    snapshot: SnapshotId,
    base: Option<SnapshotId>,
    offset: u64,
    per_message: usize,
}

impl From<ExtentsError> for Error {
    fn from(error: ExtentsError) -> Self {
        let text = error.to_string();
        match error {
            ExtentsError::NotFound(_) => Self::NotFound(text),
            ExtentsError::NotComparable(_) => Self::Precondition(text),
            ExtentsError::OutOfRange { .. } => Self::OutOfRange(format!("starting_offset: {text}")),
            ExtentsError::Unavailable(_) => Self::remote("list blocks", Status::unavailable(text)),
            ExtentsError::Failed(_) => Self::remote("list blocks", Status::internal(text)),
        }
    }
}

fn snapshot(field: &str, text: &str) -> Result<SnapshotId> {
    let text = validate::required(field, text)?;
    snapshots::parse(text)
        .ok_or_else(|| Error::NotFound(format!("{field}: snapshot {text} does not exist")))
}

impl Question {
    fn new(
        snapshot: SnapshotId,
        base: Option<SnapshotId>,
        starting_offset: i64,
        max_results: i32,
    ) -> Result<Self> {
        let offset = u64::try_from(starting_offset)
            .map_err(|_| Error::invalid("starting_offset", "is negative"))?;
        let wanted = usize::try_from(max_results)
            .map_err(|_| Error::invalid("max_results", "is negative"))?;
        Ok(Self {
            snapshot,
            base,
            offset,
            per_message: match wanted {
                0 => RANGES_DEFAULT,
                wanted => wanted.min(RANGES_MAX),
            },
        })
    }

    fn allocated(request: &rpc::GetMetadataAllocatedRequest) -> Result<Self> {
        validate::map("secrets", &request.secrets)?;
        let id = snapshot("snapshot_id", &request.snapshot_id)?;
        Self::new(id, None, request.starting_offset, request.max_results)
    }

    fn delta(request: &rpc::GetMetadataDeltaRequest) -> Result<Self> {
        validate::map("secrets", &request.secrets)?;
        let base = snapshot("base_snapshot_id", &request.base_snapshot_id)?;
        let target = snapshot("target_snapshot_id", &request.target_snapshot_id)?;
        let (offset, results) = (request.starting_offset, request.max_results);
        Self::new(target, Some(base), offset, results)
    }
}

/// One message's worth of a list.
struct Part {
    capacity: i64,
    ranges: Vec<BlockMetadata>,
}

impl SnapshotMetadataService {
    /// Of a cluster's lists.
    pub fn new(lists: BlockLists) -> Self {
        Self { lists }
    }

    async fn answer<T: Send + 'static>(
        &self,
        question: Result<Question>,
        message: impl Fn(Part) -> T + Send + 'static,
    ) -> Answer<T> {
        let question = question?;
        // Whole blocks: the one that the offset lies in is told whole.
        let size = BLOCK_SIZE as u64;
        let within = question.offset % size;
        let extents = self
            .lists
            .changed(question.snapshot, question.base, question.offset - within)
            .await
            .map_err(Error::from)?;
        if question.offset > extents.size_bytes() {
            return Err(Error::from(ExtentsError::OutOfRange {
                offset: question.offset,
                size_bytes: extents.size_bytes(),
            })
            .into());
        }
        let (sender, receiver) = mpsc::channel(MESSAGES_QUEUE);
        tokio::spawn(send_parts(
            extents,
            question.per_message,
            move |part| message(part),
            sender,
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Collects extents into messages. Whoever goes away ends it.
async fn send_parts<T>(
    mut extents: Extents,
    per_message: usize,
    message: impl Fn(Part) -> T,
    sender: mpsc::Sender<std::result::Result<T, Status>>,
) {
    let capacity = validate::signed(extents.size_bytes());
    let mut ranges: Vec<BlockMetadata> = Vec::new();
    let mut first = true;
    loop {
        let next = tokio::select! {
            next = extents.next() => next,
            () = sender.closed() => return,
        };
        let extent = match next {
            Err(error) => {
                // A caller that is gone misses nothing.
                let _ = sender.send(Err(Error::from(error).into())).await;
                return;
            }
            Ok(None) => break,
            Ok(Some(extent)) => extent,
        };
        let next = range(&extent);
        // What has data and what was trimmed is the same to CSI: it changed.
        if let Some(last) = ranges.last_mut()
            && last.byte_offset + last.size_bytes == next.byte_offset
        {
            last.size_bytes += next.size_bytes;
            continue;
        }
        if ranges.len() == per_message {
            let part = Part {
                capacity,
                ranges: std::mem::take(&mut ranges),
            };
            first = false;
            if sender.send(Ok(message(part))).await.is_err() {
                return;
            }
        }
        ranges.push(next);
    }
    if first || !ranges.is_empty() {
        let _ = sender.send(Ok(message(Part { capacity, ranges }))).await;
    }
}

fn range(extent: &Extent) -> BlockMetadata {
    BlockMetadata {
        byte_offset: validate::signed(extent.offset),
        size_bytes: validate::signed(extent.length),
    }
}

#[tonic::async_trait]
impl SnapshotMetadata for SnapshotMetadataService {
    type GetMetadataAllocatedStream = Messages<rpc::GetMetadataAllocatedResponse>;
    type GetMetadataDeltaStream = Messages<rpc::GetMetadataDeltaResponse>;

    async fn get_metadata_allocated(
        &self,
        request: Request<rpc::GetMetadataAllocatedRequest>,
    ) -> Answer<rpc::GetMetadataAllocatedResponse> {
        let question = Question::allocated(request.get_ref());
        self.answer(question, |part| rpc::GetMetadataAllocatedResponse {
            block_metadata_type: BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes: part.capacity,
            block_metadata: part.ranges,
        })
        .await
    }

    async fn get_metadata_delta(
        &self,
        request: Request<rpc::GetMetadataDeltaRequest>,
    ) -> Answer<rpc::GetMetadataDeltaResponse> {
        let question = Question::delta(request.get_ref());
        self.answer(question, |part| rpc::GetMetadataDeltaResponse {
            block_metadata_type: BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes: part.capacity,
            block_metadata: part.ranges,
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn code(question: Result<Question>) -> Option<Code> {
        question.err().map(|e| e.code())
    }

    #[test]
    fn questions_that_make_no_sense_are_refused() {
        let id = SnapshotId::generate().to_string();
        let ask = |snapshot_id: &str, starting_offset, max_results| {
            code(Question::allocated(&rpc::GetMetadataAllocatedRequest {
                snapshot_id: snapshot_id.to_owned(),
                starting_offset,
                max_results,
                ..Default::default()
            }))
        };
        assert_eq!(ask(&id, 0, 0), None);
        assert_eq!(ask("", 0, 0), Some(Code::InvalidArgument));
        assert_eq!(ask("none", 0, 0), Some(Code::NotFound));
        assert_eq!(ask(&id, -1, 0), Some(Code::InvalidArgument));
        assert_eq!(ask(&id, 0, -1), Some(Code::InvalidArgument));
        let one = rpc::GetMetadataDeltaRequest {
            target_snapshot_id: id,
            ..Default::default()
        };
        assert_eq!(code(Question::delta(&one)), Some(Code::InvalidArgument));
    }
}
