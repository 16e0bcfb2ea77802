//! NodeStageVolume and NodeUnstageVolume.

use std::path::{Path, PathBuf};
use std::time::Instant;

use ashlar_proto::rpc::node as attach_pb;

use super::format::Wanted;
use super::{Device, NodeService, Staging, device, is_fenced, known_id};
use crate::controller::READ_ONLY_KEY;
use crate::errors::{Error, Result};
use crate::metrics::step;
use crate::mounter::{self, MountOptions, blocking, filesystem};
use crate::parameters::{FsType, VolumeContext};
use crate::validate::Access;
use crate::{rpc, validate};

impl Staging {
    /// Of a request to stage or to publish.
    pub(super) fn parse(
        volume_id: &str,
        path: &Path,
        capability: Option<&rpc::VolumeCapability>,
        publish_context: &std::collections::HashMap<String, String>,
        volume_context: &std::collections::HashMap<String, String>,
    ) -> Result<Self> {
        let capability = validate::capability("volume_capability", capability)?;
        validate::map("publish_context", publish_context)?;
        validate::map("volume_context", volume_context)?;
        let published_read_only = publish_context
            .get(READ_ONLY_KEY)
            .is_some_and(|v| v == "true");
        Ok(Self {
            id: known_id(volume_id)?,
            path: path.to_owned(),
            read_only: published_read_only || capability.mode.reads_only(),
            capability,
            context: VolumeContext::parse(volume_context)?,
        })
    }

    /// The file system that is asked for, if one is.
    fn fs(&self) -> Option<FsType> {
        match &self.capability.access {
            Access::Mount { fs_type, .. } => fs_type.or(self.context.fs_type),
            Access::Block => None,
        }
    }

    fn options(&self) -> Result<MountOptions> {
        match &self.capability.access {
            Access::Mount { flags, .. } => MountOptions::parse(flags),
            Access::Block => MountOptions::parse(&[]),
        }
    }
}

impl NodeService {
    pub(super) async fn stage(
        &self,
        request: rpc::NodeStageVolumeRequest,
    ) -> Result<rpc::NodeStageVolumeResponse> {
        validate::required("volume_id", &request.volume_id)?;
        let path = validate::path("staging_target_path", &request.staging_target_path)?;
        let staging = Staging::parse(
            &request.volume_id,
            path,
            request.volume_capability.as_ref(),
            &request.publish_context,
            &request.volume_context,
        )?;
        let this = self.clone();
        let stage = async move {
            this.ensure_staged(&staging).await?;
            Ok(rpc::NodeStageVolumeResponse {})
        };
        self.locks.run(&request.volume_id, stage).await
    }

    /// Attaches the volume, and mounts it at its staging path if it is to be mounted. The device.
    pub(super) async fn ensure_staged(&self, staging: &Staging) -> Result<Device> {
        if staging.capability.is_block() {
            return self.attach(staging, false).await;
        }
        let options = staging.options()?;
        if let Some(device) = self.staged(staging, &options).await? {
            return Ok(device);
        }
        let begun = Instant::now();
        let path = staging.path.clone();
        blocking(move || {
            // What is mounted there is not from the volume's device (any more).
            mounter::unmount(&path)?;
            mounter::make_directory(&path)
        })
        .await?;
        let device = step("attach", self.attach(staging, true)).await?;
        let volume = self.metadata.require(&staging.id.to_string()).await?;
        let wanted = Wanted {
            fs: staging.fs(),
            read_only: staging.read_only,
        };
        let fs = self.prepare(staging, &volume, &device, wanted).await?;
        let options = options.complete(fs, staging.read_only);
        let read_only = options.read_only();
        let (from, path) = (device.path.clone(), staging.path.clone());
        let mounting = blocking(move || mounter::mount(&from, &path, fs, &options));
        step("mount", mounting).await?;
        if !read_only {
            // The volume may have grown while it was not mounted.
            step("grow", filesystem::grow(fs, &device.path, &staging.path)).await?;
        }
        tracing::info!(
            volume = %staging.id,
            device = %device.path.display(),
            path = %staging.path.display(),
            %fs,
            read_only,
            took_ms = begun.elapsed().as_millis(),
            "volume staged"
        );
        Ok(device)
    }

    /// The device, if the volume is mounted from it at the staging path already.
    async fn staged(&self, staging: &Staging, options: &MountOptions) -> Result<Option<Device>> {
        let path = staging.path.clone();
        let found = blocking(move || Ok(mounter::at(&mounter::mounts()?, &path).cloned())).await?;
        let Some(mount) = found else { return Ok(None) };
        let Some(device) = self.device(staging.id).await? else {
            return Ok(None);
        };
        if mount.device != device.number {
            tracing::warn!(
                volume = %staging.id,
                path = %staging.path.display(),
                "another device is mounted at the staging path; it is unmounted"
            );
            return Ok(None);
        }
        let read_only = staging.read_only || options.read_only();
        let other_fs = staging.fs().is_some_and(|f| f.name() != mount.fs_type);
        if other_fs || mount.read_only != read_only {
            return Err(Error::Exists(format!(
                "volume {} is staged at {} as {}{}; unstage it first",
                staging.id,
                staging.path.display(),
                mount.fs_type,
                if mount.read_only { ", read-only" } else { "" },
            )));
        }
        Ok(Some(device))
    }

    /// Attaches the volume; its device, as large as the volume.
    async fn attach(&self, staging: &Staging, probe_data: bool) -> Result<Device> {
        if let Some(old) = self.attacher.find(staging.id).await?
            && is_fenced(&old)
        {
            self.give_up_fenced(staging, &old).await?;
        }
        let request = attach_pb::AttachRequest {
            volume_id: staging.id.to_vec(),
            read_only: staging.read_only,
            block_size: staging.context.block_size,
            probe_data,
            ..Default::default()
        };
        let attachment = self.attacher.attach(request).await?;
        let has_data = attachment.has_data;
        let mut device = device(attachment)?;
        if device.attachment.read_only != staging.read_only {
            return Err(Error::Exists(format!(
                "volume {} is attached at {} {}; unstage it first",
                staging.id,
                device.path.display(),
                if staging.read_only {
                    "for writing"
                } else {
                    "read-only"
                },
            )));
        }
        // It may have been attached before the volume grew.
        let resized = self.attacher.resize(staging.id).await?;
        device.attachment.size_bytes = resized.size_bytes;
        device.attachment.has_data = has_data;
        Ok(device)
    }

    /// Another node took the volume over and gave it back since. The old device can only be taken away, and that
    /// only if nobody uses it.
    async fn give_up_fenced(&self, staging: &Staging, old: &attach_pb::Attachment) -> Result<()> {
        if let Some(user) = mounted_at(PathBuf::from(&old.device), None).await? {
            return Err(Error::Precondition(format!(
                "volume {} was taken over by another node while it was mounted here, at {}: end the pods that use it, \
                 and unmount it",
                staging.id,
                user.display()
            )));
        }
        self.attacher.detach(staging.id).await
    }

    pub(super) async fn unstage(
        &self,
        request: rpc::NodeUnstageVolumeRequest,
    ) -> Result<rpc::NodeUnstageVolumeResponse> {
        validate::required("volume_id", &request.volume_id)?;
        let path = validate::path("staging_target_path", &request.staging_target_path)?.to_owned();
        let Ok(id) = known_id(&request.volume_id) else {
            return Ok(rpc::NodeUnstageVolumeResponse {});
        };
        let this = self.clone();
        let unstage = async move {
            let staging = path.clone();
            blocking(move || mounter::unmount(&staging)).await?;
            // Also when the staging path has vanished: the device is what matters.
            if let Some(attachment) = this.attacher.find(id).await? {
                let device = PathBuf::from(&attachment.device);
                if let Some(user) = mounted_at(device, None).await? {
                    return Err(Error::Precondition(format!(
                        "volume {id} is still mounted at {}; unpublish it there first",
                        user.display()
                    )));
                }
                this.attacher.detach(id).await?;
                tracing::info!(volume = %id, path = %path.display(), "volume unstaged");
            }
            Ok(rpc::NodeUnstageVolumeResponse {})
        };
        self.locks.run(&request.volume_id, unstage).await
    }
}

/// A path at which a device (its file system, or the device itself) is mounted, other than `except`.
pub(super) async fn mounted_at(
    device: PathBuf,
    except: Option<PathBuf>,
) -> Result<Option<PathBuf>> {
    blocking(move || {
        let Ok(number) = mounter::device_number(&device) else {
            return Ok(None);
        };
        let mounts = mounter::mounts()?;
        let uses = |m: &&mounter::Mount| m.device == number || is_device_file(m, &device);
        let others = mounts.iter().filter(uses).map(|m| &m.target);
        Ok(others
            .into_iter()
            .find(|t| except.as_ref() != Some(*t))
            .cloned())
    })
    .await
}

/// Whether a mount is a bind mount of a device's file.
pub(super) fn is_device_file(mount: &mounter::Mount, device: &Path) -> bool {
    mount.fs_type == "devtmpfs"
        && device.file_name().is_some()
        && mount.root.file_name() == device.file_name()
}
