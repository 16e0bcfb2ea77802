//! What a log may show of requests.
//!
//! Invariant: the messages with secrets or mount flags have no other `Debug` than the ones written here (the build
//! leaves the generated ones out), so no log line and no error can hold a secret by carelessness.

use std::fmt;

use crate::rpc;
use crate::rpc::volume_capability::MountVolume;

/// `Debug` with these fields only.
macro_rules! shown {
    ($($message:ty { $($field:ident),* $(,)? })*) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut shown = f.debug_struct(stringify!($message));
                $(shown.field(stringify!($field), &self.$field);)*
                shown.finish_non_exhaustive()
            }
        }
    )*};
}

shown! {
    MountVolume { fs_type, volume_mount_group }
    rpc::CreateVolumeRequest {
        name, capacity_range, volume_capabilities, parameters, volume_content_source, accessibility_requirements,
        mutable_parameters,
    }
    rpc::DeleteVolumeRequest { volume_id }
    rpc::ControllerPublishVolumeRequest { volume_id, node_id, volume_capability, readonly, volume_context }
    rpc::ControllerUnpublishVolumeRequest { volume_id, node_id }
    rpc::ValidateVolumeCapabilitiesRequest {
        volume_id, volume_context, volume_capabilities, parameters, mutable_parameters,
    }
    rpc::ControllerListVolumeHealthRequest { max_entries, starting_token }
    rpc::ControllerGetVolumeHealthRequest { volume_id }
    rpc::ControllerModifyVolumeRequest { volume_id, mutable_parameters }
    rpc::CreateSnapshotRequest { source_volume_id, name, parameters }
    rpc::DeleteSnapshotRequest { snapshot_id }
    rpc::ListSnapshotsRequest { max_entries, starting_token, source_volume_id, snapshot_id }
    rpc::GetSnapshotRequest { snapshot_id }
    rpc::ControllerExpandVolumeRequest { volume_id, capacity_range, volume_capability }
    rpc::NodeStageVolumeRequest {
        volume_id, publish_context, staging_target_path, volume_capability, volume_context,
    }
    rpc::NodePublishVolumeRequest {
        volume_id, publish_context, staging_target_path, target_path, volume_capability, readonly, volume_context,
    }
    rpc::NodeGetStorageHealthRequest {}
    rpc::NodeExpandVolumeRequest {
        volume_id, volume_path, capacity_range, staging_target_path, volume_capability,
    }
    rpc::CreateVolumeGroupSnapshotRequest { name, source_volume_ids, parameters }
    rpc::DeleteVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids }
    rpc::GetVolumeGroupSnapshotRequest { group_snapshot_id, snapshot_ids }
    rpc::GetMetadataAllocatedRequest { snapshot_id, starting_offset, max_results }
    rpc::GetMetadataDeltaRequest { base_snapshot_id, target_snapshot_id, starting_offset, max_results }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::VolumeCapability;
    use crate::rpc::volume_capability::AccessType;
    use std::collections::HashMap;

    #[test]
    fn secrets_and_mount_flags_are_not_shown() {
        let secrets = HashMap::from([("password".to_owned(), "hunter2".to_owned())]);
        let capability = VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: "ext4".into(),
                mount_flags: vec!["password=hunter2".into()],
                ..Default::default()
            })),
            access_mode: None,
        };
        let create = rpc::CreateVolumeRequest {
            name: "pvc-1".into(),
            volume_capabilities: vec![capability.clone()],
            secrets: secrets.clone(),
            ..Default::default()
        };
        let stage = rpc::NodeStageVolumeRequest {
            volume_id: "pvc-1".into(),
            volume_capability: Some(capability.clone()),
            secrets: secrets.clone(),
            ..Default::default()
        };
        let publish = rpc::NodePublishVolumeRequest {
            volume_id: "pvc-1".into(),
            volume_capability: Some(capability),
            secrets,
            ..Default::default()
        };
        for text in [
            format!("{create:?}"),
            format!("{stage:#?}"),
            format!("{publish:?}"),
        ] {
            assert!(text.contains("pvc-1") && text.contains("ext4"), "{text}");
            assert!(
                !text.contains("hunter2") && !text.contains("password"),
                "{text}"
            );
        }
    }
}
