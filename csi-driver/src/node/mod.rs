//! The Node service: devices become mounts.
//!
//! Invariants: what is there is read from the kernel and from nbd-client in every call, never remembered, so a
//! restart at any moment is harmless; one operation per volume at a time; a mount is trusted only when it is from
//! the device that nbd-client has for the volume.

mod expand;
mod format;
mod info;
mod publish;
mod stage;
mod stats;

use std::collections::HashMap;
use std::path::PathBuf;

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::node as attach_pb;
use tonic::{Request, Response, Status};

use crate::attach::Attacher;
use crate::errors::{Error, Result};
use crate::locks::Locks;
use crate::metadata::Metadata;
use crate::mounter::{self, DeviceNumber};
use crate::parameters::VolumeContext;
use crate::rpc::node_server::Node;
use crate::rpc::node_service_capability::rpc::Type as Kind;
use crate::rpc::{self, NodeServiceCapability, node_service_capability};
use crate::validate::Capability;
use crate::{validate, volume_id};

/// What the node service can do. No VOLUME_MOUNT_GROUP: ext4 and xfs cannot be mounted for a group.
const CAPABILITIES: [Kind; 4] = [
    Kind::StageUnstageVolume,
    Kind::GetVolumeStats,
    Kind::ExpandVolume,
    Kind::SingleNodeMultiWriter,
];

/// What the node service must know.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// The node's name, as Kubernetes and metadata know it.
    pub name: String,
    /// Labels of the node, as `topology.kubernetes.io/zone`.
    pub labels: HashMap<String, String>,
    /// Most volumes on this node; 0: no limit.
    pub max_volumes: i64,
}

/// The service.
#[derive(Clone, Debug)]
pub struct NodeService {
    options: NodeOptions,
    metadata: Metadata,
    attacher: Attacher,
    locks: Locks,
}

/// A volume that is to be staged, or was.
#[derive(Clone, Debug)]
struct Staging {
    id: VolumeId,
    path: PathBuf,
    capability: Capability,
    read_only: bool,
    context: VolumeContext,
}

/// A device of nbd-client.
#[derive(Clone, Debug)]
struct Device {
    path: PathBuf,
    number: DeviceNumber,
    attachment: attach_pb::Attachment,
}

type Answer<T> = std::result::Result<Response<T>, Status>;

impl NodeService {
    /// Of this node.
    pub fn new(options: NodeOptions, metadata: Metadata, attacher: Attacher) -> Self {
        Self {
            options,
            metadata,
            attacher,
            locks: Locks::default(),
        }
    }

    /// Whether nbd-client answers.
    pub async fn nbd_client_answers(&self) -> bool {
        self.attacher.answers().await
    }

    /// The device of a volume, if it is attached and not fenced.
    async fn device(&self, id: VolumeId) -> Result<Option<Device>> {
        match self.attacher.find(id).await? {
            Some(attachment) if is_fenced(&attachment) => Ok(None),
            Some(attachment) => Ok(Some(device(attachment)?)),
            None => Ok(None),
        }
    }
}

fn is_fenced(attachment: &attach_pb::Attachment) -> bool {
    attachment.state() == attach_pb::AttachmentState::Fenced
}

fn device(attachment: attach_pb::Attachment) -> Result<Device> {
    let path = PathBuf::from(&attachment.device);
    let number = mounter::device_number(&path)?;
    Ok(Device {
        path,
        number,
        attachment,
    })
}

/// A volume id of a request. An id that is none of ours belongs to no volume that there is.
fn known_id(text: &str) -> Result<VolumeId> {
    let text = validate::required("volume_id", text)?;
    volume_id::parse(text).ok_or_else(|| Error::NotFound(format!("volume {text} does not exist")))
}

fn answer<T>(result: Result<T>) -> Answer<T> {
    Ok(Response::new(result?))
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<rpc::NodeStageVolumeRequest>,
    ) -> Answer<rpc::NodeStageVolumeResponse> {
        answer(self.stage(request.into_inner()).await)
    }

    async fn node_unstage_volume(
        &self,
        request: Request<rpc::NodeUnstageVolumeRequest>,
    ) -> Answer<rpc::NodeUnstageVolumeResponse> {
        answer(self.unstage(request.into_inner()).await)
    }

    async fn node_publish_volume(
        &self,
        request: Request<rpc::NodePublishVolumeRequest>,
    ) -> Answer<rpc::NodePublishVolumeResponse> {
        answer(self.publish(request.into_inner()).await)
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<rpc::NodeUnpublishVolumeRequest>,
    ) -> Answer<rpc::NodeUnpublishVolumeResponse> {
        answer(self.unpublish(request.into_inner()).await)
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<rpc::NodeGetVolumeStatsRequest>,
    ) -> Answer<rpc::NodeGetVolumeStatsResponse> {
        answer(self.stats(request.into_inner()).await)
    }

    async fn node_expand_volume(
        &self,
        request: Request<rpc::NodeExpandVolumeRequest>,
    ) -> Answer<rpc::NodeExpandVolumeResponse> {
        answer(self.expand(request.into_inner()).await)
    }

    async fn node_get_info(
        &self,
        _: Request<rpc::NodeGetInfoRequest>,
    ) -> Answer<rpc::NodeGetInfoResponse> {
        answer(self.info().await)
    }

    async fn node_get_capabilities(
        &self,
        _: Request<rpc::NodeGetCapabilitiesRequest>,
    ) -> Answer<rpc::NodeGetCapabilitiesResponse> {
        let capability = |kind: Kind| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(
                node_service_capability::Rpc {
                    r#type: kind.into(),
                },
            )),
        };
        Ok(Response::new(rpc::NodeGetCapabilitiesResponse {
            capabilities: CAPABILITIES.into_iter().map(capability).collect(),
        }))
    }

    async fn node_get_volume_health(
        &self,
        _: Request<rpc::NodeGetVolumeHealthRequest>,
    ) -> Answer<rpc::NodeGetVolumeHealthResponse> {
        Err(Error::Unsupported("volume health is not offered over CSI; see the metrics").into())
    }

    async fn node_get_storage_health(
        &self,
        _: Request<rpc::NodeGetStorageHealthRequest>,
    ) -> Answer<rpc::NodeGetStorageHealthResponse> {
        Err(Error::Unsupported("storage health is not offered over CSI; see the metrics").into())
    }
}
