//! The Controller service: volumes are made, published, grown and listed by metadata; this is a translation.
//!
//! Invariants: the controller holds no state, and nothing depends on there being one of it: two that overlap are
//! kept apart by metadata (names, publications, request ids). The locks only spare work.

mod capacity;
mod create;
mod expand;
mod publish;
mod snapshots;
mod source;
mod volumes;

pub use publish::READ_ONLY_KEY;

use std::collections::HashMap;

use ashlar_proto::rpc::metadata as pb;
use tonic::{Request, Response, Status};

use crate::errors::{Error, Result};
use crate::locks::Locks;
use crate::metadata::Metadata;
use crate::parameters::context_of_labels;
use crate::rpc::controller_server::Controller;
use crate::rpc::controller_service_capability::rpc::Type as Capability;
use crate::rpc::{self, ControllerServiceCapability, controller_service_capability};
use crate::{validate, volume_id};

/// What the controller can do.
const CAPABILITIES: [Capability; 14] = [
    Capability::CreateDeleteVolume,
    Capability::PublishUnpublishVolume,
    Capability::ListVolumes,
    Capability::GetCapacity,
    Capability::PublishReadonly,
    Capability::ExpandVolume,
    Capability::ListVolumesPublishedNodes,
    Capability::GetVolume,
    Capability::SingleNodeMultiWriter,
    Capability::ModifyVolume,
    Capability::CreateDeleteSnapshot,
    Capability::ListSnapshots,
    Capability::GetSnapshot,
    Capability::CloneVolume,
];

/// The service.
#[derive(Clone, Debug)]
pub struct ControllerService {
    metadata: Metadata,
    locks: Locks,
}

type Answer<T> = std::result::Result<Response<T>, Status>;

impl ControllerService {
    /// Of this cluster.
    pub fn new(metadata: Metadata) -> Self {
        Self {
            metadata,
            locks: Locks::default(),
        }
    }
}

/// A volume as CSI sees it. No topology: it can be used from every node.
fn csi_volume(volume: &pb::Volume) -> rpc::Volume {
    rpc::Volume {
        capacity_bytes: validate::signed(volume.size_bytes),
        volume_id: volume_id::format(&volume.volume_id),
        volume_context: context_of_labels(&volume.labels),
        content_source: source::Source::of(volume).map(source::Source::message),
        accessible_topology: Vec::new(),
    }
}

/// The nodes that a volume is published to.
fn published_nodes(volume: &pb::Volume) -> Vec<String> {
    let nodes = volume.publications.iter();
    nodes.map(|p| p.node_name.clone()).collect()
}

/// Refuses every mutable parameter: there is none yet.
fn no_mutable_parameters(map: &HashMap<String, String>) -> Result<()> {
    match map.keys().min() {
        None => Ok(()),
        Some(key) => Err(Error::invalid(
            format!("mutable_parameters[{key}]"),
            "unknown parameter; accepted: none (a VolumeAttributesClass of Ashlar has no parameters yet)",
        )),
    }
}

fn answer<T>(result: Result<T>) -> Answer<T> {
    Ok(Response::new(result?))
}

fn unsupported<T>(what: &'static str) -> Answer<T> {
    Err(Error::Unsupported(what).into())
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<rpc::CreateVolumeRequest>,
    ) -> Answer<rpc::CreateVolumeResponse> {
        answer(self.create(request.into_inner()).await)
    }

    async fn delete_volume(
        &self,
        request: Request<rpc::DeleteVolumeRequest>,
    ) -> Answer<rpc::DeleteVolumeResponse> {
        answer(self.delete(request.into_inner()).await)
    }

    async fn controller_publish_volume(
        &self,
        request: Request<rpc::ControllerPublishVolumeRequest>,
    ) -> Answer<rpc::ControllerPublishVolumeResponse> {
        answer(self.publish(request.into_inner()).await)
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<rpc::ControllerUnpublishVolumeRequest>,
    ) -> Answer<rpc::ControllerUnpublishVolumeResponse> {
        answer(self.unpublish(request.into_inner()).await)
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<rpc::ValidateVolumeCapabilitiesRequest>,
    ) -> Answer<rpc::ValidateVolumeCapabilitiesResponse> {
        answer(self.validate(request.into_inner()).await)
    }

    async fn list_volumes(
        &self,
        request: Request<rpc::ListVolumesRequest>,
    ) -> Answer<rpc::ListVolumesResponse> {
        answer(self.list(request.into_inner()).await)
    }

    async fn controller_get_volume(
        &self,
        request: Request<rpc::ControllerGetVolumeRequest>,
    ) -> Answer<rpc::ControllerGetVolumeResponse> {
        answer(self.get(request.into_inner()).await)
    }

    async fn get_capacity(
        &self,
        request: Request<rpc::GetCapacityRequest>,
    ) -> Answer<rpc::GetCapacityResponse> {
        answer(self.capacity(request.into_inner()).await)
    }

    async fn controller_expand_volume(
        &self,
        request: Request<rpc::ControllerExpandVolumeRequest>,
    ) -> Answer<rpc::ControllerExpandVolumeResponse> {
        answer(self.expand(request.into_inner()).await)
    }

    async fn controller_modify_volume(
        &self,
        request: Request<rpc::ControllerModifyVolumeRequest>,
    ) -> Answer<rpc::ControllerModifyVolumeResponse> {
        answer(self.modify(request.into_inner()).await)
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<rpc::ControllerGetCapabilitiesRequest>,
    ) -> Answer<rpc::ControllerGetCapabilitiesResponse> {
        let capability = |kind: Capability| ControllerServiceCapability {
            r#type: Some(controller_service_capability::Type::Rpc(
                controller_service_capability::Rpc {
                    r#type: kind.into(),
                },
            )),
        };
        Ok(Response::new(rpc::ControllerGetCapabilitiesResponse {
            capabilities: CAPABILITIES.into_iter().map(capability).collect(),
        }))
    }

    async fn controller_list_volume_health(
        &self,
        _: Request<rpc::ControllerListVolumeHealthRequest>,
    ) -> Answer<rpc::ControllerListVolumeHealthResponse> {
        unsupported(
            "volume health is not offered over CSI; see `ashlar volume list` and the metrics",
        )
    }

    async fn controller_get_volume_health(
        &self,
        _: Request<rpc::ControllerGetVolumeHealthRequest>,
    ) -> Answer<rpc::ControllerGetVolumeHealthResponse> {
        unsupported(
            "volume health is not offered over CSI; see `ashlar volume show` and the metrics",
        )
    }

    async fn create_snapshot(
        &self,
        request: Request<rpc::CreateSnapshotRequest>,
    ) -> Answer<rpc::CreateSnapshotResponse> {
        answer(self.take_snapshot(request.into_inner()).await)
    }

    async fn delete_snapshot(
        &self,
        request: Request<rpc::DeleteSnapshotRequest>,
    ) -> Answer<rpc::DeleteSnapshotResponse> {
        answer(self.drop_snapshot(request.into_inner()).await)
    }

    async fn list_snapshots(
        &self,
        request: Request<rpc::ListSnapshotsRequest>,
    ) -> Answer<rpc::ListSnapshotsResponse> {
        answer(self.snapshots(request.into_inner()).await)
    }

    async fn get_snapshot(
        &self,
        request: Request<rpc::GetSnapshotRequest>,
    ) -> Answer<rpc::GetSnapshotResponse> {
        answer(self.snapshot(request.into_inner()).await)
    }
}
