//! The daemon's gRPC administration service (proto/daemon.proto).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ashlar_platform::observe::resident_bytes;
use ashlar_proto::ids::{
    BLOCK_SIZE, CHUNK_SIZE, ChunkIndex, DiskId, Epoch, GroupIndex, PAGE_SIZE, SnapshotNumber,
    VolumeId,
};
use ashlar_proto::rpc::daemon as pb;
use ashlar_proto::rpc::daemon::storage_daemon_server::{StorageDaemon, StorageDaemonServer};
use ashlar_proto::wire;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::daemon::{Daemon, DiskReport};
use crate::engine::{AdminReply, AdminRequest, BlockList, ReplicaStatus};
use crate::error::DiskError;
use crate::offline::FormatRequest;
use crate::store::{BlockListOrder, BlockRun, BlockRuns};

/// Parts of a list of blocks that wait for a slow receiver.
const PARTS_QUEUE: usize = 1;

/// See the module.
pub struct AdminService {
    daemon: Arc<Daemon>,
}

impl AdminService {
    /// The service over a daemon.
    pub fn server(daemon: Arc<Daemon>) -> StorageDaemonServer<Self> {
        StorageDaemonServer::new(Self { daemon })
    }

    async fn replicas_of(&self, disk: DiskId) -> Result<Vec<pb::ReplicaInfo>, Status> {
        match self.daemon.admin(disk, AdminRequest::ListReplicas).await {
            Ok(AdminReply::Replicas(list)) => {
                Ok(list.iter().map(|r| replica_info(disk, r)).collect())
            }
            Ok(AdminReply::Refused(status)) => Err(refused(status)),
            Ok(_) => Err(Status::internal(
                "the disk's engine gave an answer of another kind",
            )),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }
}

#[tonic::async_trait]
impl StorageDaemon for AdminService {
    type ListBlocksStream = ReceiverStream<Result<pb::ListBlocksPart, Status>>;

    async fn list_blocks(
        &self,
        request: Request<pb::ListBlocksRequest>,
    ) -> Result<Response<Self::ListBlocksStream>, Status> {
        let request = request.into_inner();
        let disk = disk_id(&request.disk_id)?;
        let list = block_list(&request)?;
        let (parts, receiver) = mpsc::channel(PARTS_QUEUE);
        tokio::spawn(stream_blocks(self.daemon.clone(), disk, list, parts));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_status(
        &self,
        _request: Request<pb::GetStatusRequest>,
    ) -> Result<Response<pb::Status>, Status> {
        let disks = self.daemon.reports().await.iter().map(disk_info).collect();
        Ok(Response::new(pb::Status {
            node_id: self.daemon.node().to_vec(),
            name: self.daemon.config().node_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            disks,
            rss_bytes: resident_bytes().unwrap_or(0),
        }))
    }

    async fn add_disk(
        &self,
        request: Request<pb::AddDiskRequest>,
    ) -> Result<Response<pb::DiskInfo>, Status> {
        let request = request.into_inner();
        let path = PathBuf::from(&request.path);
        if !path.is_absolute() {
            return Err(Status::invalid_argument("path: must be absolute"));
        }
        let format = request.format.then(|| FormatRequest {
            size_bytes: (request.size_bytes > 0).then_some(request.size_bytes),
            ..FormatRequest::default()
        });
        let labels: BTreeMap<String, String> = request.labels.into_iter().collect();
        let report = self
            .daemon
            .add_disk(&path, format, labels)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(disk_info(&report)))
    }

    async fn remove_disk(
        &self,
        request: Request<pb::RemoveDiskRequest>,
    ) -> Result<Response<pb::RemoveDiskResponse>, Status> {
        let disk = disk_id(&request.into_inner().disk_id)?;
        match self.daemon.remove_disk(disk).await {
            Ok(true) => Ok(Response::new(pb::RemoveDiskResponse {})),
            Ok(false) => Err(Status::not_found(format!("disk {disk} is not served here"))),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    async fn list_replicas(
        &self,
        request: Request<pb::ListReplicasRequest>,
    ) -> Result<Response<pb::ListReplicasResponse>, Status> {
        let wanted = request.into_inner().disk_id;
        let mut replicas = Vec::new();
        if wanted.is_empty() {
            for report in self
                .daemon
                .reports()
                .await
                .iter()
                .filter(|r| r.failure.is_none())
            {
                replicas.extend(self.replicas_of(report.disk).await?);
            }
        } else {
            replicas = self.replicas_of(disk_id(&wanted)?).await?;
        }
        Ok(Response::new(pb::ListReplicasResponse { replicas }))
    }

    async fn drop_replica(
        &self,
        request: Request<pb::DropReplicaRequest>,
    ) -> Result<Response<pb::DropReplicaResponse>, Status> {
        let request = request.into_inner();
        let disk = disk_id(&request.disk_id)?;
        let volume = VolumeId::from_slice(&request.volume_id)
            .ok_or_else(|| Status::invalid_argument("volume_id: must have 16 bytes"))?;
        let order = AdminRequest::DropReplica {
            volume,
            epoch: Epoch(request.epoch),
        };
        match self.daemon.admin(disk, order).await {
            Ok(AdminReply::Dropped) => Ok(Response::new(pb::DropReplicaResponse {})),
            Ok(AdminReply::Refused(status)) => Err(refused(status)),
            Ok(_) => Err(Status::internal(
                "the disk's engine gave an answer of another kind",
            )),
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }
}

/// Streams a list part by part: the next is asked for when the receiver takes the last but one.
async fn stream_blocks(
    daemon: Arc<Daemon>,
    disk: DiskId,
    mut list: BlockList,
    parts: mpsc::Sender<Result<pb::ListBlocksPart, Status>>,
) {
    loop {
        let answer = match daemon.admin(disk, AdminRequest::ListBlocks(list)).await {
            Ok(AdminReply::Blocks(runs)) => Ok(runs),
            Ok(AdminReply::Refused(status)) => Err(list_refused(status)),
            Ok(_) => Err(other_kind()),
            Err(error) => Err(Status::unavailable(error.to_string())),
        };
        let next = answer.as_ref().ok().and_then(|runs| runs.next);
        // A receiver that is gone wants no more.
        let sent = parts.send(answer.map(|runs| blocks_part(&runs))).await;
        match next.filter(|_| sent.is_ok()) {
            Some(next) => list.order.from = next,
            None => return,
        }
    }
}

fn block_list(request: &pb::ListBlocksRequest) -> Result<BlockList, Status> {
    let volume = VolumeId::from_slice(&request.volume_id)
        .ok_or_else(|| Status::invalid_argument("volume_id: must have 16 bytes"))?;
    let snapshot = if request.head {
        SnapshotNumber::HEAD
    } else {
        SnapshotNumber(request.snapshot_number)
    };
    Ok(BlockList {
        volume,
        epoch: Epoch(request.epoch),
        order: BlockListOrder {
            group: GroupIndex(request.group),
            group_count: request.group_count,
            snapshot,
            base: (request.base_number > 0).then_some(SnapshotNumber(request.base_number)),
            from: ChunkIndex(request.first_chunk),
        },
    })
}

fn blocks_part(runs: &BlockRuns) -> pb::ListBlocksPart {
    let extent = |run: &BlockRun| pb::BlockExtent {
        offset: u64::from(run.range.chunk.0) * CHUNK_SIZE
            + u64::from(run.range.first) * BLOCK_SIZE as u64,
        length: run.range.byte_len() as u64,
        hole: !run.data,
    };
    pb::ListBlocksPart {
        extents: runs.runs.iter().map(extent).collect(),
        next_chunk: runs.next.map_or(0, |chunk| chunk.0),
        last: runs.next.is_none(),
    }
}

fn list_refused(status: wire::Status) -> Status {
    match status {
        wire::Status::Busy => Status::unavailable("the disk is busy; try again"),
        wire::Status::WrongState => Status::failed_precondition(
            "the snapshot, or the one that it is compared with, is deleted: nothing is listed of it any more",
        ),
        wire::Status::Invalid => Status::invalid_argument(
            "snapshot_number, base_number: a snapshot's number is at least 1 and above that of its base; group: below group_count",
        ),
        wire::Status::Fenced | wire::Status::IncarnationMismatch | wire::Status::UnknownVolume => {
            Status::aborted(format!("{status}: get a new view of the volume"))
        }
        other => Status::unavailable(format!("{other}: try another replica")),
    }
}

fn other_kind() -> Status {
    Status::internal("the disk's engine gave an answer of another kind")
}

fn disk_id(bytes: &[u8]) -> Result<DiskId, Status> {
    DiskId::from_slice(bytes).ok_or_else(|| Status::invalid_argument("disk_id: must have 16 bytes"))
}

fn refused(status: wire::Status) -> Status {
    match status {
        wire::Status::Busy => Status::unavailable("the replica is in use; try again"),
        wire::Status::Fenced => Status::failed_precondition(
            "the replica's fence is newer than the epoch of the request",
        ),
        other => Status::failed_precondition(other.to_string()),
    }
}

fn status_of(error: &DiskError) -> Status {
    let message = error.to_string();
    match error {
        DiskError::Foreign { .. }
        | DiskError::Formatted { .. }
        | DiskError::NotFormatted { .. }
        | DiskError::Damaged { .. }
        | DiskError::OtherCluster { .. } => Status::failed_precondition(message),
        DiskError::AlreadyServed { .. } => Status::already_exists(message),
        DiskError::Open(_) | DiskError::Store { .. } => Status::invalid_argument(message),
        DiskError::Io { .. } | DiskError::Thread { .. } | DiskError::Identity(_) => {
            Status::internal(message)
        }
    }
}

fn disk_info(report: &DiskReport) -> pb::DiskInfo {
    let (store, counters) = (&report.status.store, &report.status.counters);
    pb::DiskInfo {
        disk_id: report.disk.to_vec(),
        path: report.path.display().to_string(),
        data_address: report.address.clone(),
        capacity_bytes: store.capacity_bytes,
        used_bytes: store.used_bytes,
        reserved_bytes: store.reserved_bytes,
        log_bytes: store.log_bytes,
        log_used_bytes: store.log_used_bytes,
        incarnation: report.incarnation,
        failed: report.failure.is_some(),
        error: report.failure.clone().unwrap_or_default(),
        bad_blocks_found: counters.bad_blocks,
        bad_blocks_repaired: store.repaired_blocks,
        reads: counters.reads,
        writes: counters.writes,
        flushes: counters.flushes,
    }
}

fn replica_info(disk: DiskId, replica: &ReplicaStatus) -> pb::ReplicaInfo {
    let info = &replica.info;
    let pull = replica.pull;
    let pace = replica.pace;
    pb::ReplicaInfo {
        disk_id: disk.to_vec(),
        volume_id: info.volume.to_vec(),
        volume_name: info
            .descriptor
            .as_ref()
            .map(|d| d.name.clone())
            .unwrap_or_default(),
        fence_epoch: info.fence.0,
        used_bytes: info.pages * PAGE_SIZE as u64,
        chunks: info.chunks,
        suspect: info.suspect,
        damaged: info.damaged,
        rebuild_chunks_done: pull.map_or(0, |p| p.chunks_done),
        rebuild_chunks_total: pull.map_or(0, |p| p.chunks_total),
        rebuild_blocks_moved: pull.map_or(0, |p| p.blocks_moved),
        rebuild_ms: pace.map_or(0, |p| p.running.as_millis() as u64),
        rebuild_bytes_compared: pace.map_or(0, |p| p.position.saturating_mul(CHUNK_SIZE)),
        rebuild_groups: pace.map_or(0, |p| p.groups),
    }
}
