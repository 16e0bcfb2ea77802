//! Publications and formats of volumes, as served by the leader.

use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use super::convert;
use super::member::{Fault, Member};
use super::volumes::volume_id;
use crate::model::{AttachMode, Format, FormatState, Operation};

type Result<T> = std::result::Result<T, Fault>;

impl Member {
    pub(super) async fn publish_volume(
        &self,
        request: pb::PublishVolumeRequest,
    ) -> Result<pb::Volume> {
        let volume = volume_id(&request.volume_id)?;
        let operation = Operation::PublishVolume {
            volume,
            node: request.node_name,
            mode: mode(request.mode)?,
        };
        let key = convert::request_key(&request.request_id)?;
        self.vacate(volume).await?;
        self.propose_volume(key, operation).await
    }

    pub(super) async fn unpublish_volume(
        &self,
        request: pb::UnpublishVolumeRequest,
    ) -> Result<pb::Volume> {
        let operation = Operation::UnpublishVolume {
            volume: volume_id(&request.volume_id)?,
            node: request.node_name,
        };
        self.propose_volume(convert::request_key(&request.request_id)?, operation)
            .await
    }

    pub(super) async fn set_volume_format(
        &self,
        request: pb::SetVolumeFormatRequest,
    ) -> Result<pb::Volume> {
        let operation = Operation::SetVolumeFormat {
            volume: volume_id(&request.volume_id)?,
            format: format(request.format)?,
        };
        self.propose_volume(convert::request_key(&request.request_id)?, operation)
            .await
    }
}

fn mode(mode: i32) -> std::result::Result<AttachMode, Status> {
    match pb::AttachMode::try_from(mode) {
        Ok(pb::AttachMode::Exclusive | pb::AttachMode::Unspecified) => Ok(AttachMode::Exclusive),
        Ok(pb::AttachMode::ReadOnly) => Ok(AttachMode::ReadOnly),
        Ok(pb::AttachMode::Shared | pb::AttachMode::Care) | Err(_) => Err(
            Status::invalid_argument("mode: a volume is published exclusively or read-only"),
        ),
    }
}

fn format(format: Option<pb::VolumeFormat>) -> std::result::Result<Format, Status> {
    let format = format.unwrap_or_default();
    let state = match pb::FormatState::try_from(format.state) {
        Ok(pb::FormatState::Formatting) => FormatState::Formatting,
        Ok(pb::FormatState::Formatted) => FormatState::Formatted,
        Ok(pb::FormatState::Unspecified) | Err(_) => {
            return Err(Status::invalid_argument(
                "format.state: must be FORMATTING or FORMATTED",
            ));
        }
    };
    Ok(Format {
        state,
        fs_type: format.fs_type,
    })
}
