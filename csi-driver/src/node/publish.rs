//! NodePublishVolume and NodeUnpublishVolume: a pod's path to a staged volume.

use std::path::PathBuf;

use super::stage::is_device_file;
use super::{Device, NodeService, Staging};
use crate::errors::{Error, Result};
use crate::mounter::{self, Mount, blocking};
use crate::validate::Mode;
use crate::{rpc, validate};

/// What a pod is given.
struct Publishing {
    staging: Staging,
    target: PathBuf,
    read_only: bool,
}

impl NodeService {
    pub(super) async fn publish(
        &self,
        request: rpc::NodePublishVolumeRequest,
    ) -> Result<rpc::NodePublishVolumeResponse> {
        validate::required("volume_id", &request.volume_id)?;
        let target = validate::path("target_path", &request.target_path)?.to_owned();
        let capability = request.volume_capability.as_ref();
        validate::capability("volume_capability", capability)?;
        if request.staging_target_path.is_empty() {
            return Err(Error::Precondition(
                "staging_target_path is missing: the volume must be staged first".to_owned(),
            ));
        }
        let path = validate::path("staging_target_path", &request.staging_target_path)?;
        let staging = Staging::parse(
            &request.volume_id,
            path,
            capability,
            &request.publish_context,
            &request.volume_context,
        )?;
        let publishing = Publishing {
            read_only: request.readonly || staging.read_only,
            staging,
            target,
        };
        let this = self.clone();
        let publish = async move {
            // Also brings a staging mount back that vanished, or is from another device.
            let device = this.ensure_staged(&publishing.staging).await?;
            blocking(move || match publishing.staging.capability.is_block() {
                true => publishing.block(&device),
                false => publishing.mount(&device),
            })
            .await?;
            Ok(rpc::NodePublishVolumeResponse {})
        };
        self.locks.run(&request.volume_id, publish).await
    }

    pub(super) async fn unpublish(
        &self,
        request: rpc::NodeUnpublishVolumeRequest,
    ) -> Result<rpc::NodeUnpublishVolumeResponse> {
        validate::required("volume_id", &request.volume_id)?;
        let target = validate::path("target_path", &request.target_path)?.to_owned();
        let unpublish = blocking(move || {
            if mounter::exists(&target) {
                mounter::unmount(&target)?;
                mounter::remove_mount_point(&target)?;
            }
            Ok(rpc::NodeUnpublishVolumeResponse {})
        });
        self.locks.run(&request.volume_id, unpublish).await
    }
}

impl Publishing {
    /// ReadWriteOncePod: one target per node, and the volume is on one node.
    fn check_single(&self, mounts: &[Mount], uses: impl Fn(&Mount) -> bool) -> Result<()> {
        if self.staging.capability.mode != Mode::PodWriter {
            return Ok(());
        }
        let other = mounts
            .iter()
            .find(|m| uses(m) && m.target != self.staging.path && m.target != self.target);
        match other {
            None => Ok(()),
            Some(mount) => Err(Error::Precondition(format!(
                "volume {} may be used by one pod only (SINGLE_NODE_SINGLE_WRITER), and is published at {} already",
                self.staging.id,
                mount.target.display()
            ))),
        }
    }

    fn otherwise(&self, how: &str) -> Error {
        Error::Exists(format!(
            "volume {} is published at {} {how}; unpublish it there first",
            self.staging.id,
            self.target.display()
        ))
    }

    fn mount(&self, device: &Device) -> Result<()> {
        let mounts = mounter::mounts()?;
        let whole = |m: &Mount| m.device == device.number && m.root == std::path::Path::new("/");
        self.check_single(&mounts, whole)?;
        if let Some(there) = mounter::at(&mounts, &self.target) {
            if there.device == device.number {
                return match there.read_only == self.read_only_in_the_end(&mounts) {
                    true => Ok(()),
                    false if there.read_only => Err(self.otherwise("read-only")),
                    false => Err(self.otherwise("for writing")),
                };
            }
            // From a device that the volume had before.
            mounter::unmount(&self.target)?;
        }
        mounter::make_directory(&self.target)?;
        mounter::bind(&self.staging.path, &self.target, self.read_only)?;
        self.verify(&mounter::mounts()?, whole)
    }

    /// Read-only also if the staging mount is.
    fn read_only_in_the_end(&self, mounts: &[Mount]) -> bool {
        let staged = mounter::at(mounts, &self.staging.path);
        self.read_only || staged.is_some_and(|m| m.read_only)
    }

    fn block(&self, device: &Device) -> Result<()> {
        if self.read_only && !device.attachment.read_only {
            // A read-only mount of a device's file does not keep anybody from writing to the device.
            return Err(Error::Precondition(format!(
                "volume {} is attached for writing, so its device cannot be given out read-only; publish it read-only \
                 (readOnly in the PersistentVolume's csi source), or use ReadOnlyMany",
                self.staging.id
            )));
        }
        let mounts = mounter::mounts()?;
        let file = |m: &Mount| is_device_file(m, &device.path);
        self.check_single(&mounts, file)?;
        if let Some(there) = mounter::at(&mounts, &self.target) {
            if file(there) {
                return Ok(());
            }
            mounter::unmount(&self.target)?;
        }
        mounter::make_file(&self.target)?;
        mounter::bind(&device.path, &self.target, false)?;
        match mounter::device_number(&self.target)? == device.number {
            true => Ok(()),
            false => Err(Error::Internal(
                "another device appeared at the target path",
            )),
        }
    }

    /// Asks the kernel whether the target is what it is to be.
    fn verify(&self, mounts: &[Mount], is_ours: impl Fn(&Mount) -> bool) -> Result<()> {
        match mounter::at(mounts, &self.target) {
            Some(mount) if is_ours(mount) && (mount.read_only || !self.read_only) => Ok(()),
            _ => Err(Error::Internal(
                "the target path is not mounted as it should be",
            )),
        }
    }
}
