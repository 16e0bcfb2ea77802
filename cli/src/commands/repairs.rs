//! `ashlar cluster repairs`: what is rebuilt or moved, how far it is and how long it will take.

use std::time::Duration;

use ashlar_proto::ids::{CHUNK_SIZE, VolumeId};
use ashlar_proto::rpc::{daemon as daemon_pb, metadata as pb};
use serde::Serialize;

use super::Context;
use super::service::repairs;
use super::volume::state_name;
use crate::error::Result;
use crate::output::{self, Column, cell, health};
use crate::progress::replica_infos;
use crate::size;

#[derive(Serialize)]
struct RepairsView {
    /// Replicas of volumes that somebody holds, being rebuilt.
    rebuilding: u32,
    /// Replicas that wait for their turn to leave a lost or draining disk.
    waiting: u32,
    /// Replicas that have to leave and for which there is no disk.
    unplaced: u32,
    unplaced_reasons: Vec<UnplacedView>,
    replicas: Vec<RepairView>,
}

#[derive(Serialize)]
struct UnplacedView {
    volume: String,
    disk_id: String,
    reason: String,
}

#[derive(Serialize)]
struct RepairView {
    volume: String,
    volume_id: String,
    disk_id: String,
    node: String,
    path: String,
    state: &'static str,
    /// Of the replica's share of the volume, compared so far; absent where nothing is under way.
    percent: Option<u64>,
    bytes_moved: Option<u64>,
    running_ms: Option<u64>,
    /// Estimated from the pace so far.
    left_ms: Option<u64>,
}

/// How much of a running rebuild is done, in parts of 1, from what its daemon says.
fn done(info: &daemon_pb::ReplicaInfo, share: u64) -> Option<f64> {
    let total = share.saturating_mul(u64::from(info.rebuild_groups));
    (total > 0).then(|| info.rebuild_bytes_compared.min(total) as f64 / total as f64)
}

/// What is left at the pace so far; none before there is any.
fn left(done: f64, running_ms: u64) -> Option<u64> {
    (done > 0.01).then(|| (running_ms as f64 * (1.0 - done) / done) as u64)
}

/// Bytes of the volume that each of its groups has at most.
fn share(volume: &pb::Volume) -> u64 {
    let groups = volume.groups.len().max(1) as u64;
    let chunks = volume.size_bytes.div_ceil(CHUNK_SIZE);
    chunks.div_ceil(groups).saturating_mul(CHUNK_SIZE)
}

fn text(ms: u64) -> String {
    indicatif::HumanDuration(Duration::from_millis(ms)).to_string()
}

/// Shows them.
pub async fn show(context: &mut Context) -> Result<()> {
    let now = repairs(&mut context.metadata).await?;
    let disks = context.metadata.disks().await?;
    let mut volumes = context.metadata.volumes().await?;
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    let infos = replica_infos(&mut context.metadata).await?;
    let mut replicas = Vec::new();
    for volume in &volumes {
        let share = share(volume);
        for replica in volume.groups.iter().flat_map(|g| &g.replicas) {
            if replica.state() == pb::ReplicaState::InSync {
                continue;
            }
            let disk = disks.iter().find(|d| d.disk_id == replica.disk_id);
            let info = infos.get(&(replica.disk_id.clone(), volume.volume_id.clone()));
            let runs = info.filter(|i| i.rebuild_groups > 0);
            let done = runs.and_then(|i| done(i, share));
            replicas.push(RepairView {
                volume: volume.name.clone(),
                volume_id: output::id_text(&volume.volume_id),
                disk_id: output::id_text(&replica.disk_id),
                node: disk.map(|d| d.node_name.clone()).unwrap_or_default(),
                path: disk.map(|d| d.path.clone()).unwrap_or_default(),
                state: state_name(replica.state()),
                percent: done.map(|d| (d * 100.0) as u64),
                bytes_moved: runs.map(|i| i.rebuild_blocks_moved * 4096),
                running_ms: runs.map(|i| i.rebuild_ms),
                left_ms: runs.zip(done).and_then(|(i, d)| left(d, i.rebuild_ms)),
            });
        }
    }
    let unplaced = now.unplaced.iter().map(|u| UnplacedView {
        volume: if u.volume_name.is_empty() {
            VolumeId::from_slice(&u.volume_id).map_or_else(String::new, |id| id.to_string())
        } else {
            u.volume_name.clone()
        },
        disk_id: output::id_text(&u.disk_id),
        reason: u.reason.clone(),
    });
    let view = RepairsView {
        rebuilding: now.rebuilding,
        waiting: now.waiting,
        unplaced: now.unplaced_total,
        unplaced_reasons: unplaced.collect(),
        replicas,
    };
    let mut fields = vec![
        ("Rebuilding", view.rebuilding.to_string()),
        ("Waiting", view.waiting.to_string()),
        ("Without a place", view.unplaced.to_string()),
    ];
    if let Some(one) = view.unplaced_reasons.first() {
        fields.push((
            "For instance",
            format!("volume {}: {}", one.volume, one.reason),
        ));
    }
    context.output.object(&view, &fields)?;
    let header = [
        Column::Left("volume"),
        Column::Left("state"),
        Column::Left("node"),
        Column::Left("path"),
        Column::Right("done"),
        Column::Right("moved"),
        Column::Left("left"),
        Column::Left("disk id"),
    ];
    let dash = || "-".to_owned();
    let rows = view.replicas.iter().map(|r| {
        vec![
            cell(&r.volume),
            health(r.state, false),
            cell(&r.node),
            cell(&r.path),
            cell(r.percent.map_or_else(dash, |p| format!("{p} %"))),
            cell(r.bytes_moved.map_or_else(dash, size::format)),
            cell(r.left_ms.map_or_else(dash, text)),
            cell(&r.disk_id),
        ]
    });
    let rows = rows.collect();
    context.output.text("")?;
    context.output.table(&header, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_pace() {
        let info = daemon_pb::ReplicaInfo {
            rebuild_groups: 2,
            rebuild_bytes_compared: 32 << 20,
            rebuild_ms: 3000,
            ..Default::default()
        };
        assert_eq!(done(&info, 64 << 20), Some(0.25));
        assert_eq!(left(0.25, 3000), Some(9000));
        assert_eq!(left(0.0, 3000), None);
        assert_eq!(done(&daemon_pb::ReplicaInfo::default(), 64 << 20), None);
        let volume = pb::Volume {
            size_bytes: 100 << 20,
            groups: vec![pb::Group::default(); 2],
            ..Default::default()
        };
        assert_eq!(share(&volume), 52 << 20);
    }
}
