//! NodeGetVolumeStats: bytes and inodes of a mounted volume, bytes of a raw block volume.

use std::path::{Path, PathBuf};

use super::{Device, NodeService, known_id};
use crate::errors::{Error, Result};
use crate::mounter::{self, blocking};
use crate::rpc::{self, VolumeUsage, volume_usage::Unit};
use crate::validate::{self, signed};

impl NodeService {
    pub(super) async fn stats(
        &self,
        request: rpc::NodeGetVolumeStatsRequest,
    ) -> Result<rpc::NodeGetVolumeStatsResponse> {
        validate::required("volume_id", &request.volume_id)?;
        validate::required_path("volume_path", &request.volume_path)?;
        let id = known_id(&request.volume_id)?;
        let not_there = || {
            Error::NotFound(format!(
                "volume {id} is not at {} on this node",
                request.volume_path
            ))
        };
        let device = self.device(id).await?.ok_or_else(not_there)?;
        let path = PathBuf::from(&request.volume_path);
        let usage = blocking(move || usage(&device, &path)).await?;
        Ok(rpc::NodeGetVolumeStatsResponse {
            usage: usage.ok_or_else(not_there)?,
        })
    }
}

/// None if the volume is not at that path.
fn usage(device: &Device, path: &Path) -> Result<Option<Vec<VolumeUsage>>> {
    if mounter::device_number(path).is_ok_and(|n| n == device.number) {
        let total = signed(device.attachment.size_bytes);
        return Ok(Some(vec![VolumeUsage {
            total,
            unit: Unit::Bytes.into(),
            ..Default::default()
        }]));
    }
    let mounts = mounter::mounts()?;
    if mounter::at(&mounts, path).is_none_or(|m| m.device != device.number) {
        return Ok(None);
    }
    let stat = rustix::fs::statvfs(path)
        .map_err(|e| Error::system(format!("statvfs {}", path.display()), e))?;
    let bytes = |blocks: u64| signed(blocks.saturating_mul(stat.f_frsize));
    Ok(Some(vec![
        VolumeUsage {
            available: bytes(stat.f_bavail),
            total: bytes(stat.f_blocks),
            used: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
            unit: Unit::Bytes.into(),
        },
        VolumeUsage {
            available: signed(stat.f_ffree),
            total: signed(stat.f_files),
            used: signed(stat.f_files.saturating_sub(stat.f_ffree)),
            unit: Unit::Inodes.into(),
        },
    ]))
}
