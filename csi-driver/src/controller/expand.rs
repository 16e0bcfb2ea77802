//! ControllerExpandVolume.

use ashlar_proto::rpc::metadata as pb;

use super::ControllerService;
use crate::errors::{Error, Result};
use crate::metadata::request_id;
use crate::validate::Range;
use crate::{rpc, validate, volume_id};

/// The size to grow a volume to; None if it is large enough.
fn plan(size: u64, range: &Range) -> Result<Option<u64>> {
    let Some(required) = range.required else {
        return Err(Error::invalid(
            "capacity_range.required_bytes",
            "is missing",
        ));
    };
    if size < required {
        return range.choose(size).map(Some);
    }
    match range.limit {
        Some(limit) if size > limit => Err(Error::OutOfRange(format!(
            "capacity_range.limit_bytes: the volume already has {size} bytes, and volumes do not shrink"
        ))),
        _ => Ok(None),
    }
}

impl ControllerService {
    pub(super) async fn expand(
        &self,
        request: rpc::ControllerExpandVolumeRequest,
    ) -> Result<rpc::ControllerExpandVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        if request.capacity_range.is_none() {
            return Err(Error::invalid("capacity_range", "is missing"));
        }
        let range = Range::parse(request.capacity_range.as_ref())?;
        if request.volume_capability.is_some() {
            validate::capability("volume_capability", request.volume_capability.as_ref())?;
        }
        let metadata = self.metadata.clone();
        let csi_id = id.to_owned();
        let expand = async move {
            let mut volume = metadata.require(&csi_id).await?;
            if let Some(size_bytes) = plan(volume.size_bytes, &range)? {
                let request = pb::ResizeVolumeRequest {
                    request_id: request_id(),
                    volume_id: volume.volume_id.clone(),
                    size_bytes,
                };
                let doing = format!("grow volume {csi_id} to {size_bytes} bytes");
                volume = metadata
                    .ask(&doing, request, async |mut c, q| c.resize_volume(q).await)
                    .await?;
                let volume = volume_id::format(&volume.volume_id);
                tracing::info!(volume, size_bytes, "volume grown");
            }
            Ok(rpc::ControllerExpandVolumeResponse {
                capacity_bytes: validate::signed(volume.size_bytes),
                // The device must grow on its node, also for a raw block volume.
                node_expansion_required: true,
            })
        };
        self.locks.run(id, expand).await
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    fn range(required: u64, limit: u64) -> Range {
        Range {
            required: (required > 0).then_some(required),
            limit: (limit > 0).then_some(limit),
        }
    }

    #[test]
    fn a_volume_grows_to_whole_blocks_and_never_shrinks() {
        assert_eq!(plan(8192, &range(8193, 0)).unwrap(), Some(12_288));
        assert_eq!(plan(8192, &range(8192, 0)).unwrap(), None);
        assert_eq!(plan(8192, &range(4096, 0)).unwrap(), None);
        let error = plan(8192, &range(4096, 4096)).unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange);
        let error = plan(8192, &range(8193, 8200)).unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange);
        let error = plan(8192, &range(0, 4096)).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
    }
}
