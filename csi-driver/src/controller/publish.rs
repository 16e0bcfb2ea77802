//! ControllerPublishVolume and ControllerUnpublishVolume.
//!
//! Invariant: unpublishing answers OK only once the node's right is gone in Raft: whoever opens the volume next
//! fences what is left of that node before any I/O, so this is also correct while the node may still be writing
//! (out-of-service taint, forced detach).

use std::collections::HashMap;

use ashlar_proto::rpc::metadata as pb;
use tonic::Code;

use super::ControllerService;
use crate::errors::{Error, Result};
use crate::metadata::request_id;
use crate::{rpc, validate, volume_id};

/// In the publish context: `true` if the volume is to be attached read-only.
pub const READ_ONLY_KEY: &str = "readOnly";

impl ControllerService {
    pub(super) async fn publish(
        &self,
        request: rpc::ControllerPublishVolumeRequest,
    ) -> Result<rpc::ControllerPublishVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        let node = validate::node_id(&request.node_id)?.to_owned();
        let capability =
            validate::capability("volume_capability", request.volume_capability.as_ref())?;
        validate::map("volume_context", &request.volume_context)?;
        let volume = volume_id::parse(id)
            .ok_or_else(|| Error::NotFound(format!("volume {id} does not exist")))?;
        let read_only = request.readonly || capability.mode.reads_only();
        let mode = match read_only {
            true => pb::AttachMode::ReadOnly,
            false => pb::AttachMode::Exclusive,
        };
        let metadata = self.metadata.clone();
        let publish = async move {
            let doing = format!("publish volume {volume} to node {node}");
            let request = pb::PublishVolumeRequest {
                request_id: request_id(),
                volume_id: volume.to_vec(),
                node_name: node.clone(),
                mode: mode.into(),
            };
            metadata
                .ask(&doing, request, async |mut c, q| c.publish_volume(q).await)
                .await?;
            tracing::info!(%volume, node, read_only, "volume published");
            let context = HashMap::from([(READ_ONLY_KEY.to_owned(), read_only.to_string())]);
            Ok(rpc::ControllerPublishVolumeResponse {
                publish_context: context,
            })
        };
        self.locks.run(id, publish).await
    }

    pub(super) async fn unpublish(
        &self,
        request: rpc::ControllerUnpublishVolumeRequest,
    ) -> Result<rpc::ControllerUnpublishVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        let node = match request.node_id.as_str() {
            "" => String::new(),
            node => validate::node_id(node)?.to_owned(),
        };
        let Some(volume) = volume_id::parse(id) else {
            return Ok(rpc::ControllerUnpublishVolumeResponse {});
        };
        let metadata = self.metadata.clone();
        let unpublish = async move {
            let doing = format!("unpublish volume {volume} from node {node}");
            let request = pb::UnpublishVolumeRequest {
                request_id: request_id(),
                volume_id: volume.to_vec(),
                node_name: node.clone(),
            };
            let unpublished = metadata
                .ask(&doing, request, async |mut c, q| {
                    c.unpublish_volume(q).await
                })
                .await;
            match unpublished {
                Ok(_) => tracing::info!(%volume, node, "volume unpublished"),
                // The volume or the node is gone, and its right with it.
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) => return Err(error),
            }
            Ok(rpc::ControllerUnpublishVolumeResponse {})
        };
        self.locks.run(id, unpublish).await
    }
}
