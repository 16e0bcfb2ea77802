//! The state as the messages of `metadata.proto`, for the service and for the simulator.

use ashlar_proto::ids::{DiskId, ReplicaState};
use ashlar_proto::rpc::metadata as pb;

use super::State;
use super::cluster::{FailureDomain, FlattenPolicy, Pool, PoolSpec};
use super::snapshot::{Snapshot, SnapshotState};
use super::volume::{AttachMode, Attachment, Format, FormatState, Parent, Replica, Source, Volume};

/// A volume.
pub fn volume(state: &State, volume: &Volume) -> pb::Volume {
    pb::Volume {
        volume_id: volume.id.to_vec(),
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        pool: state
            .pool(volume.pool)
            .map(|p| p.name.clone())
            .unwrap_or_default(),
        replicas: u32::from(volume.replicas),
        min_replicas: u32::from(volume.min_replicas),
        groups: volume
            .groups
            .iter()
            .map(|g| pb::Group {
                replicas: g.iter().map(replica).collect(),
            })
            .collect(),
        epoch: volume.epoch.0,
        holder: volume.holder.as_ref().map(attachment),
        clean: volume.clean,
        opened_once: volume.opened_once,
        snapshot_number: volume.snapshot.0,
        snapshot_pending: volume.is_snapshot_pending(),
        layers: Some((&volume.layers).into()),
        revision: volume.revision,
        publications: volume
            .publications
            .iter()
            .map(|(node, mode)| pb::Publication {
                node_name: node.clone(),
                mode: attach_mode(*mode).into(),
            })
            .collect(),
        format: volume.format.as_ref().map(format),
        readers: volume.readers.iter().map(attachment).collect(),
        created_unix_ms: volume.created_unix_ms,
        labels: volume.labels.clone().into_iter().collect(),
        parent: volume.parent.map(|p| parent(state, p)),
        flatten: volume.parent.map(|_| pb::FlattenProgress {
            wanted: state.is_to_flatten(volume),
            ..pb::FlattenProgress::default()
        }),
        reverting: volume.reverting.map(|id| {
            let snapshot = state.snapshots().get(id);
            pb::Reverting {
                snapshot_id: id.to_vec(),
                snapshot_name: snapshot.map(|s| s.name.clone()).unwrap_or_default(),
            }
        }),
        source_snapshot_id: match volume.source {
            Some(Source::Snapshot(id)) => id.to_vec(),
            _ => Vec::new(),
        },
        source_volume_id: match volume.source {
            Some(Source::Volume(id)) => id.to_vec(),
            _ => Vec::new(),
        },
    }
}

fn parent(state: &State, parent: Parent) -> pb::VolumeParent {
    let volume = state.volume(parent.volume);
    let snapshot = state.snapshots().numbered(parent.volume, parent.number);
    pb::VolumeParent {
        volume_id: parent.volume.to_vec(),
        volume_name: volume.map(|v| v.name.clone()).unwrap_or_default(),
        volume_deleted: volume.is_none_or(|v| v.hidden),
        snapshot_number: parent.number.0,
        snapshot_name: snapshot.map(|s| s.name.clone()).unwrap_or_default(),
        snapshot_deleted: snapshot.is_none_or(|s| !s.is_shown()),
    }
}

/// A snapshot, without what is told by heartbeats.
pub fn snapshot(state: &State, snapshot: &Snapshot) -> pb::Snapshot {
    let volume = state.volume(snapshot.volume);
    let group = snapshot.group.as_ref();
    let clones = state
        .clones_of(snapshot.volume, Some(snapshot.number))
        .count();
    pb::Snapshot {
        snapshot_id: snapshot.id.to_vec(),
        name: snapshot.name.clone(),
        volume_id: snapshot.volume.to_vec(),
        volume_name: volume.map(|v| v.name.clone()).unwrap_or_default(),
        number: snapshot.number.0,
        size_bytes: snapshot.size_bytes,
        created_unix_ms: snapshot.created_unix_ms,
        labels: snapshot.labels.clone().into_iter().collect(),
        state: match snapshot.state {
            SnapshotState::Pending => pb::SnapshotState::Pending,
            SnapshotState::Ready => pb::SnapshotState::Ready,
            SnapshotState::Deleting { .. } | SnapshotState::Hidden => pb::SnapshotState::Deleting,
        }
        .into(),
        group_id: group.map(|g| g.id.to_vec()).unwrap_or_default(),
        group_name: group.map(|g| g.name.clone()).unwrap_or_default(),
        replicas_left: 0,
        chunks_left: 0,
        volume_deleted: volume.is_none_or(|v| v.hidden),
        clones: u32::try_from(clones).unwrap_or(u32::MAX),
    }
}

fn replica(replica: &Replica) -> pb::Replica {
    pb::Replica {
        disk_id: replica.disk.to_vec(),
        state: match replica.state {
            ReplicaState::Stale => pb::ReplicaState::Stale,
            ReplicaState::Rebuilding => pb::ReplicaState::Rebuilding,
            ReplicaState::InSync => pb::ReplicaState::InSync,
        }
        .into(),
        incarnation: replica.incarnation.0,
        rebuild_epoch: replica.rebuild_epoch.0,
        inherits: replica.inherits,
    }
}

fn attachment(attachment: &Attachment) -> pb::Attachment {
    pb::Attachment {
        client_id: attachment.client.to_vec(),
        node_id: attachment.node.to_vec(),
        client_name: attachment.client_name.clone(),
        mode: attach_mode(attachment.mode).into(),
        epoch: attachment.epoch.0,
    }
}

fn attach_mode(mode: AttachMode) -> pb::AttachMode {
    match mode {
        AttachMode::Exclusive => pb::AttachMode::Exclusive,
        AttachMode::ReadOnly => pb::AttachMode::ReadOnly,
        AttachMode::Care => pb::AttachMode::Care,
    }
}

fn format(format: &Format) -> pb::VolumeFormat {
    pb::VolumeFormat {
        state: match format.state {
            FormatState::Formatting => pb::FormatState::Formatting,
            FormatState::Formatted => pb::FormatState::Formatted,
        }
        .into(),
        fs_type: format.fs_type.clone(),
    }
}

/// Where the disks of a volume are reached; `alive` is the leader's belief.
pub fn endpoints(
    state: &State,
    volume: &Volume,
    alive: impl Fn(DiskId) -> bool,
) -> Vec<pb::DiskEndpoint> {
    volume
        .disks()
        .into_iter()
        .filter_map(|id| {
            let disk = state.disk(id)?;
            Some(pb::DiskEndpoint {
                disk_id: id.to_vec(),
                node_id: disk.node.to_vec(),
                data_address: disk.data_address.clone(),
                incarnation: disk.incarnation.0,
                alive: alive(id),
            })
        })
        .collect()
}

/// A pool's specification.
pub fn pool_spec(spec: &PoolSpec, policy: FlattenPolicy) -> pb::PoolSpec {
    pb::PoolSpec {
        selector: spec.selector.clone().into_iter().collect(),
        replicas: u32::from(spec.replicas),
        failure_domain: match spec.failure_domain {
            FailureDomain::Node => pb::FailureDomain::Node,
            FailureDomain::Zone => pb::FailureDomain::Zone,
            FailureDomain::Disk => pb::FailureDomain::Disk,
        }
        .into(),
        overprovision_percent: spec.overprovision_percent,
        flatten: match policy {
            FlattenPolicy::Never => pb::FlattenPolicy::Never,
            FlattenPolicy::Orphaned => pb::FlattenPolicy::Orphaned,
            FlattenPolicy::Always => pb::FlattenPolicy::Always,
        }
        .into(),
    }
}

/// A pool; `used` gives a disk's used bytes from heartbeats.
pub fn pool(state: &State, pool: &Pool, used: impl Fn(DiskId) -> u64) -> pb::Pool {
    let usage = state.pool_use(pool.id);
    let mut message = pb::Pool {
        pool_id: pool.id.to_vec(),
        name: pool.name.clone(),
        spec: Some(pool_spec(&pool.spec, state.flatten_policy(pool.id))),
        disk_count: 0,
        capacity_bytes: 0,
        used_bytes: 0,
        provisioned_bytes: usage.provisioned_bytes,
        volume_count: usage.volumes,
    };
    for disk in state.disks() {
        if state
            .node(disk.node)
            .is_some_and(|node| pool.spec.selects(disk, node))
        {
            message.disk_count += 1;
            message.capacity_bytes += disk.capacity_bytes;
            message.used_bytes += used(disk.id);
        }
    }
    message
}
