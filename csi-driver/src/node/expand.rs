//! NodeExpandVolume: the device grows, then the file system on it.

use std::path::PathBuf;

use super::{Device, NodeService, known_id};
use crate::errors::{Error, Result};
use crate::mounter::{self, blocking, filesystem};
use crate::parameters::FsType;
use crate::rpc;
use crate::validate::{self, Range, signed};

/// How a volume is used at a path.
enum Use {
    /// As a device.
    Block,
    /// Mounted.
    Mounted { fs: FsType, at: PathBuf },
}

impl NodeService {
    pub(super) async fn expand(
        &self,
        request: rpc::NodeExpandVolumeRequest,
    ) -> Result<rpc::NodeExpandVolumeResponse> {
        validate::required("volume_id", &request.volume_id)?;
        validate::required_path("volume_path", &request.volume_path)?;
        let range = Range::parse(request.capacity_range.as_ref())?;
        if request.volume_capability.is_some() {
            validate::capability("volume_capability", request.volume_capability.as_ref())?;
        }
        let id = known_id(&request.volume_id)?;
        let mut paths = vec![PathBuf::from(&request.volume_path)];
        if !request.staging_target_path.is_empty() {
            paths.push(PathBuf::from(&request.staging_target_path));
        }
        let this = self.clone();
        let expand = async move {
            let not_there =
                || Error::NotFound(format!("volume {id} is not at {}", paths[0].display()));
            let device = this.device(id).await?.ok_or_else(not_there)?;
            let (at, before) = (paths.clone(), device.clone());
            let usage = blocking(move || find(&at, &before)).await?;
            let usage = usage.ok_or_else(not_there)?;
            let device = Device {
                attachment: this.attacher.resize(id).await?,
                ..device
            };
            let size = device.attachment.size_bytes;
            if range.required.is_some_and(|r| size < r) {
                return Err(Error::OutOfRange(format!(
                    "capacity_range.required_bytes: the volume has {size} bytes; it must grow first \
                     (ControllerExpandVolume)"
                )));
            }
            if let Use::Mounted { fs, at } = usage {
                filesystem::grow(fs, &device.path, &at).await?;
            }
            tracing::info!(volume = %id, size, "volume grown on this node");
            Ok(rpc::NodeExpandVolumeResponse {
                capacity_bytes: signed(size),
            })
        };
        self.locks.run(&request.volume_id, expand).await
    }
}

/// How the volume is used at one of the paths; None: not at all.
fn find(paths: &[PathBuf], device: &Device) -> Result<Option<Use>> {
    let mounts = mounter::mounts()?;
    for path in paths {
        if mounter::device_number(path).is_ok_and(|n| n == device.number) {
            return Ok(Some(Use::Block));
        }
        let Some(mount) = mounter::at(&mounts, path).filter(|m| m.device == device.number) else {
            continue;
        };
        let Some(fs) = FsType::parse("file system", &mount.fs_type)? else {
            continue;
        };
        // The file system grows through a mount that may be written to, if there is one.
        let writable = mounts
            .iter()
            .find(|m| m.device == device.number && !m.read_only);
        return match writable {
            Some(mount) => Ok(Some(Use::Mounted {
                fs,
                at: mount.target.clone(),
            })),
            None => Err(Error::Precondition(format!(
                "{} is mounted read-only: its file system cannot grow",
                path.display()
            ))),
        };
    }
    Ok(None)
}
