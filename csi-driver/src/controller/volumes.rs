//! ListVolumes, ControllerGetVolume, ValidateVolumeCapabilities and ControllerModifyVolume.

use ashlar_proto::rpc::metadata as pb;

use super::{ControllerService, csi_volume, no_mutable_parameters, published_nodes};
use crate::errors::{Error, Result};
use crate::parameters::{Parameters, context_of_labels};
use crate::volume_id::STRING_BYTES_MAX;
use crate::{rpc, validate};

/// Prefix of the tokens that this driver gives out.
pub(super) const TOKEN_PREFIX: &str = "after:";
/// Most entries of one answer.
pub(super) const PAGE_MAX: u32 = 1000;

/// The last volume of the page before.
fn read_token(token: &str) -> Result<&str> {
    if token.is_empty() {
        return Ok("");
    }
    match token.strip_prefix(TOKEN_PREFIX) {
        Some(name) if !name.is_empty() && name.len() <= STRING_BYTES_MAX => Ok(name),
        _ => Err(Error::BadToken(
            "was not given out by this driver; begin again without a token".to_owned(),
        )),
    }
}

impl ControllerService {
    pub(super) async fn list(
        &self,
        request: rpc::ListVolumesRequest,
    ) -> Result<rpc::ListVolumesResponse> {
        let wanted = u32::try_from(request.max_entries)
            .map_err(|_| Error::invalid("max_entries", "is negative"))?;
        let page_size = match wanted {
            0 => PAGE_MAX,
            wanted => wanted.min(PAGE_MAX),
        };
        let ask = pb::ListVolumesRequest {
            page_token: read_token(&request.starting_token)?.to_owned(),
            page_size,
        };
        let page = self
            .metadata
            .ask("list the volumes", ask, async |mut c, q| {
                c.list_volumes(q).await
            })
            .await?;
        let entry = |volume: &pb::Volume| rpc::list_volumes_response::Entry {
            volume: Some(csi_volume(volume)),
            status: Some(rpc::list_volumes_response::VolumeStatus {
                published_node_ids: published_nodes(volume),
            }),
        };
        let next_token = match page.next_page_token.as_str() {
            "" => String::new(),
            name => format!("{TOKEN_PREFIX}{name}"),
        };
        Ok(rpc::ListVolumesResponse {
            entries: page.volumes.iter().map(entry).collect(),
            next_token,
        })
    }

    pub(super) async fn get(
        &self,
        request: rpc::ControllerGetVolumeRequest,
    ) -> Result<rpc::ControllerGetVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        let volume = self.metadata.require(id).await?;
        Ok(rpc::ControllerGetVolumeResponse {
            volume: Some(csi_volume(&volume)),
            status: Some(rpc::controller_get_volume_response::VolumeStatus {
                published_node_ids: published_nodes(&volume),
            }),
        })
    }

    pub(super) async fn validate(
        &self,
        request: rpc::ValidateVolumeCapabilitiesRequest,
    ) -> Result<rpc::ValidateVolumeCapabilitiesResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Error::invalid("volume_capabilities", "is missing"));
        }
        let volume = self.metadata.require(id).await?;
        let refused = |message: String| rpc::ValidateVolumeCapabilitiesResponse {
            confirmed: None,
            message,
        };
        let checked = validate::capabilities("volume_capabilities", &request.volume_capabilities)
            .and_then(|_| Parameters::parse(&request.parameters))
            .and_then(|_| no_mutable_parameters(&request.mutable_parameters));
        if let Err(error) = checked {
            return Ok(refused(error.to_string()));
        }
        if let Some(key) = foreign_context(&volume, &request) {
            return Ok(refused(format!(
                "volume_context[{key}]: differs from the volume's"
            )));
        }
        Ok(rpc::ValidateVolumeCapabilitiesResponse {
            confirmed: Some(rpc::validate_volume_capabilities_response::Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities,
                parameters: request.parameters,
                mutable_parameters: request.mutable_parameters,
            }),
            message: String::new(),
        })
    }

    pub(super) async fn modify(
        &self,
        request: rpc::ControllerModifyVolumeRequest,
    ) -> Result<rpc::ControllerModifyVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        validate::map("mutable_parameters", &request.mutable_parameters)?;
        self.metadata.require(id).await?;
        no_mutable_parameters(&request.mutable_parameters)?;
        Ok(rpc::ControllerModifyVolumeResponse {})
    }
}

/// A key of ours in the caller's volume context that the volume has otherwise.
fn foreign_context(
    volume: &pb::Volume,
    request: &rpc::ValidateVolumeCapabilitiesRequest,
) -> Option<String> {
    let own = context_of_labels(&volume.labels);
    let differs = |key: &&String| request.volume_context.get(*key) != own.get(*key);
    match request.volume_context.is_empty() {
        true => None,
        false => own.keys().find(differs).cloned(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn tokens_of_others_are_refused() {
        assert_eq!(read_token("").unwrap(), "");
        assert_eq!(read_token("after:pvc-1").unwrap(), "pvc-1");
        for wrong in [
            "invalid-token",
            "after:",
            &format!("after:{}", "x".repeat(129)),
        ] {
            assert_eq!(read_token(wrong).unwrap_err().code(), Code::Aborted);
        }
    }
}
