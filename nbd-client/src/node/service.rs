//! `ashlar.node.v1.NodeAttach`: the attachments' operations as gRPC.
//!
//! Invariant: an operation goes on when its caller goes away; the caller's retry finds it pending, or done.

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::node as pb;
use ashlar_proto::rpc::node::node_attach_server::NodeAttach;
use tonic::{Request, Response, Status};

use super::attach::{AttachRequest, blocking};
use super::attachments::{Attachment, Attachments, State, VolumeName};
use super::device;
use super::error::NodeError;
use super::record::Kind;
use crate::client::stats::VolumeStats;

/// The service.
#[derive(Clone)]
pub(super) struct Service {
    pub attachments: Attachments,
}

/// Runs an operation to its end whatever becomes of the caller.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, NodeError>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(work).await {
        Ok(outcome) => Ok(outcome?),
        Err(error) => Err(NodeError::Bug(error.to_string()).into()),
    }
}

fn optional_id(bytes: &[u8]) -> Result<Option<VolumeId>, NodeError> {
    match bytes {
        [] => Ok(None),
        bytes => match VolumeName::parse("", bytes)? {
            VolumeName::Id(id) => Ok(Some(id)),
            VolumeName::Name(_) => Ok(None),
        },
    }
}

#[tonic::async_trait]
impl NodeAttach for Service {
    async fn attach(
        &self,
        request: Request<pb::AttachRequest>,
    ) -> Result<Response<pb::Attachment>, Status> {
        let request = request.into_inner();
        let kind = match pb::DeviceKind::try_from(request.kind) {
            Ok(pb::DeviceKind::Unspecified | pb::DeviceKind::Nbd) => Kind::Nbd,
            Ok(pb::DeviceKind::Loop) => Kind::Loop,
            Err(_) => {
                let why = "is unknown".to_owned();
                return Err(NodeError::Invalid { field: "kind", why }.into());
            }
        };
        let request = AttachRequest {
            volume: VolumeName::parse(&request.volume, &request.volume_id)?,
            read_only: request.read_only,
            kind,
            connections: request.connections,
            block_size: request.block_size,
            force: request.force,
            probe_data: request.probe_data,
        };
        let this = self.attachments.clone();
        let (made, has_data) = detached(async move { this.attach(request).await }).await?;
        let mut message = message(&made);
        message.has_data = has_data;
        Ok(Response::new(message))
    }

    async fn detach(
        &self,
        request: Request<pb::DetachRequest>,
    ) -> Result<Response<pb::DetachResponse>, Status> {
        let request = request.into_inner();
        let volume = VolumeName::parse(&request.volume, &request.volume_id)?;
        let this = self.attachments.clone();
        detached(async move { this.detach(&volume, request.force).await }).await?;
        Ok(Response::new(pb::DetachResponse {}))
    }

    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let only = optional_id(&request.into_inner().volume_id)?;
        let all = self.attachments.list(only);
        // Without NBD there is nothing to tell.
        let connected = blocking(device::connected).await.ok();
        let with_kernel = |a: &Attachment| {
            let nbd = (a.record.kind == Kind::Nbd).then_some(a.record.index);
            let mut message = message(a);
            message.connected = nbd.flatten().and_then(|index| {
                let connected = connected.as_ref()?;
                Some(connected.contains(&index))
            });
            message
        };
        let others = match &connected {
            Some(connected) if only.is_none() => self.attachments.others(connected),
            _ => Vec::new(),
        };
        let other = |(index, backend)| pb::OtherDevice {
            device: device::path(index).display().to_string(),
            backend,
        };
        Ok(Response::new(pb::ListResponse {
            attachments: all.iter().map(with_kernel).collect(),
            others: others.into_iter().map(other).collect(),
        }))
    }

    async fn resize(
        &self,
        request: Request<pb::ResizeRequest>,
    ) -> Result<Response<pb::Attachment>, Status> {
        let volume = VolumeName::parse("", &request.into_inner().volume_id)?;
        let VolumeName::Id(volume) = volume else {
            return Err(Status::internal("a name was not asked for"));
        };
        let this = self.attachments.clone();
        let present = detached(async move { this.resize(volume).await }).await?;
        Ok(Response::new(message(&present)))
    }

    async fn get_stats(
        &self,
        request: Request<pb::GetStatsRequest>,
    ) -> Result<Response<pb::GetStatsResponse>, Status> {
        let only = optional_id(&request.into_inner().volume_id)?;
        let statistics = self.attachments.shared.host.stats(false).await;
        let wanted = only.map(|id| id.to_string());
        let volumes = statistics
            .volumes
            .iter()
            .filter(|v| wanted.as_ref().is_none_or(|id| *id == v.volume_id))
            .map(stats_message)
            .collect();
        Ok(Response::new(pb::GetStatsResponse { volumes }))
    }
}

fn message(a: &Attachment) -> pb::Attachment {
    let record = &a.record;
    let (kind, size) = match record.kind {
        Kind::Nbd => (
            pb::DeviceKind::Nbd,
            record.index.and_then(device::size_bytes),
        ),
        Kind::Loop => (
            pb::DeviceKind::Loop,
            record.index.and_then(device::loop_size_bytes),
        ),
    };
    let state = match a.state {
        State::Attaching => pb::AttachmentState::Attaching,
        State::Attached => pb::AttachmentState::Attached,
        State::Recovering => pb::AttachmentState::Recovering,
        State::Fenced => pb::AttachmentState::Fenced,
        State::Detaching => pb::AttachmentState::Detaching,
        State::Broken => pb::AttachmentState::Broken,
    };
    let volume_size = || a.hosted.as_ref().map_or(0, |h| h.status().size_bytes);
    pb::Attachment {
        volume_id: record.volume_id.to_vec(),
        volume: record.volume.clone(),
        device: a
            .device()
            .map_or_else(String::new, |p| p.display().to_string()),
        kind: kind as i32,
        size_bytes: size.unwrap_or_else(volume_size),
        read_only: record.read_only,
        block_size: record.block_size,
        connections: record.connections,
        epoch: a.epoch().0,
        state: state as i32,
        detail: a.detail.clone(),
        has_data: None,
        attached_unix_ms: record.attached_unix_ms,
        connected: None,
    }
}

fn stats_message(v: &VolumeStats) -> pb::VolumeStats {
    pb::VolumeStats {
        volume_id: v
            .volume_id
            .parse::<VolumeId>()
            .map_or_else(|_| Vec::new(), VolumeId::to_vec),
        volume: v.name.clone(),
        reads: v.reads,
        read_bytes: v.read_bytes,
        writes: v.writes,
        write_bytes: v.written_bytes,
        flushes: v.flushes,
        discards: v.discards,
        errors: v.errors,
        in_flight: v.requests_in_flight as u32,
        longest_stall_us: v.longest_stall_us,
    }
}
