//! Tells the metadata cluster who this node is, which disks it serves, and how they fare; carries out
//! what comes back.
//!
//! Invariants:
//! - Node and disks are registered before they are reported, and again whenever an address or an
//!   incarnation changed or the cluster does not know the node.
//! - A layer list is given to the disk again until a heartbeat reports its revision.
//! - A replica is dropped only if its fence is not above the epoch that the order names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, Epoch, PAGE_SIZE, SnapshotNumber, VolumeId};
use ashlar_proto::layers::LayerList;
use ashlar_proto::rpc::metadata::{
    DiskStatus, DropReplica, Flatten, HeartbeatRequest, RegisterDiskRequest, RegisterNodeRequest,
    ReplicaLayers, SetLayers,
};
use tokio::sync::Mutex;
use tonic::{Code, Status};

use super::care::Care;
use crate::daemon::{Daemon, DiskReport};
use crate::engine::{AdminReply, AdminRequest};

/// Between heartbeats, until the cluster says otherwise.
const INTERVAL_DEFAULT: Duration = Duration::from_millis(500);
/// Bounds of what the cluster may say.
const INTERVAL_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// After a refusal that only an operator can end.
const REFUSED_PAUSE: Duration = Duration::from_secs(5);

/// A disk is nearly full from the second, and until it falls below the first.
const NEARLY_FULL_PERCENTS: (u64, u64) = (80, 85);

/// What was registered of a disk.
#[derive(PartialEq, Eq)]
struct Registered {
    address: String,
    incarnation: u64,
    capacity_bytes: u64,
}

/// Registers and reports until the daemon ends.
pub async fn run(daemon: Arc<Daemon>, care: Arc<Mutex<Care>>) {
    let mut node_known = false;
    let mut disks = BTreeMap::<DiskId, Registered>::new();
    let mut nearly_full = BTreeSet::new();
    let mut interval = INTERVAL_DEFAULT;
    loop {
        warn_nearly_full(&daemon.reports().await, &mut nearly_full);
        let outcome = round(&daemon, &care, &mut node_known, &mut disks).await;
        daemon.set_standing(standing(&daemon, &outcome, node_known).await);
        match outcome {
            Ok(Some(wanted)) => interval = wanted.clamp(INTERVAL_BOUNDS.0, INTERVAL_BOUNDS.1),
            Ok(None) => {}
            Err(status) if super::metadata::is_about_the_member(&status) => {
                tracing::debug!(%status, "no metadata member answers");
            }
            Err(status) => {
                tracing::error!(%status, node = daemon.config().node_name,
                    "the metadata cluster refuses this node; see its message");
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            () = daemon.changed() => {}
        }
    }
}

/// Says of each disk once that it is nearly full, and again only after it was not.
fn warn_nearly_full(reports: &[DiskReport], nearly_full: &mut BTreeSet<DiskId>) {
    for report in reports {
        let store = &report.status.store;
        let used = store.used_bytes.saturating_mul(100);
        let reaches = |percent| {
            store.capacity_bytes > 0 && used >= store.capacity_bytes.saturating_mul(percent)
        };
        if !reaches(NEARLY_FULL_PERCENTS.0) {
            nearly_full.remove(&report.disk);
        } else if reaches(NEARLY_FULL_PERCENTS.1) && nearly_full.insert(report.disk) {
            tracing::warn!(disk = %report.disk, path = %report.path.display(), used_bytes = store.used_bytes,
                capacity_bytes = store.capacity_bytes,
                "a disk is nearly full: add disks, delete volumes or snapshots, or trim; writes fail once it is full");
        }
    }
}

/// What a round's outcome means for whoever asks whether this node is ready.
async fn standing(
    daemon: &Daemon,
    outcome: &Result<Option<Duration>, Status>,
    node_known: bool,
) -> Result<(), String> {
    match outcome {
        Err(status) if super::metadata::is_about_the_member(status) => {
            return Err(format!("no metadata member answers: {}", status.message()));
        }
        Err(status) => {
            return Err(format!(
                "the metadata cluster refuses this node: {}",
                status.message()
            ));
        }
        Ok(_) if !node_known => return Err("registering again".to_owned()),
        Ok(_) => {}
    }
    match daemon.disks_opening().await {
        0 => Ok(()),
        opening => Err(format!("{opening} disks are being opened")),
    }
}

async fn round(
    daemon: &Arc<Daemon>,
    care: &Mutex<Care>,
    node_known: &mut bool,
    disks: &mut BTreeMap<DiskId, Registered>,
) -> Result<Option<Duration>, Status> {
    if !*node_known {
        register_node(daemon).await?;
        *node_known = true;
        disks.clear();
    }
    let reports = daemon.reports().await;
    for report in &reports {
        let wanted = Registered {
            address: report.address.clone(),
            incarnation: report.incarnation,
            capacity_bytes: report.status.store.capacity_bytes,
        };
        if report.failure.is_none() && disks.get(&report.disk) != Some(&wanted) {
            register_disk(daemon, report).await?;
            disks.insert(report.disk, wanted);
        }
    }
    let request = HeartbeatRequest {
        node_id: daemon.node().to_vec(),
        // A disk that failed was registered by an earlier run, if ever.
        disks: reports
            .iter()
            .filter(|r| r.failure.is_some() || disks.contains_key(&r.disk))
            .map(disk_status)
            .collect(),
    };
    let heartbeat = daemon
        .metadata()
        .call(|mut client| {
            let request = request.clone();
            async move { client.heartbeat(request).await }
        })
        .await;
    let response = match heartbeat {
        Err(status) if status.code() == Code::NotFound => {
            *node_known = false;
            return Ok(None);
        }
        other => other?,
    };
    if !response.known {
        *node_known = false;
    }
    for order in response.drop {
        drop_replica(daemon, &order).await;
    }
    for order in response.set_layers {
        set_layers(daemon, order).await;
    }
    for order in response.flatten {
        flatten(daemon, &order).await;
    }
    if let Some(orders) = response.care {
        care.lock().await.follow(orders, Instant::now()).await;
    }
    let wanted = Duration::from_millis(u64::from(response.interval_ms));
    Ok((response.interval_ms > 0).then_some(wanted))
}

async fn register_node(daemon: &Daemon) -> Result<(), Status> {
    let config = daemon.config();
    let request = RegisterNodeRequest {
        request_id: request_id(),
        node_id: daemon.node().to_vec(),
        name: config.node_name.clone(),
        labels: config.labels.clone().into_iter().collect(),
        admin_address: config.advertised(daemon.admin_address()).to_string(),
    };
    daemon
        .metadata()
        .call(|mut client| {
            let request = request.clone();
            async move { client.register_node(request).await }
        })
        .await?;
    tracing::info!(node = %daemon.node(), name = config.node_name, "registered this node");
    Ok(())
}

async fn register_disk(daemon: &Daemon, report: &DiskReport) -> Result<(), Status> {
    let request = RegisterDiskRequest {
        request_id: request_id(),
        disk_id: report.disk.to_vec(),
        node_id: daemon.node().to_vec(),
        path: report.path.display().to_string(),
        data_address: report.address.clone(),
        capacity_bytes: report.status.store.capacity_bytes,
        incarnation: report.incarnation,
        labels: report.labels.clone().into_iter().collect(),
    };
    daemon
        .metadata()
        .call(|mut client| {
            let request = request.clone();
            async move { client.register_disk(request).await }
        })
        .await?;
    tracing::info!(disk = %report.disk, address = report.address, "registered a disk");
    Ok(())
}

fn disk_status(report: &DiskReport) -> DiskStatus {
    let layers = &report.status.layers;
    let used = |(volume, _): &(VolumeId, Epoch)| {
        let found = layers.binary_search_by_key(volume, |l| l.volume);
        found.map_or(0, |at| layers[at].pages * PAGE_SIZE as u64)
    };
    DiskStatus {
        disk_id: report.disk.to_vec(),
        used_bytes: report.status.store.used_bytes,
        capacity_bytes: report.status.store.capacity_bytes,
        incarnation: report.incarnation,
        failed: report.failure.is_some(),
        error: report.failure.clone().unwrap_or_default(),
        volumes: report
            .status
            .volumes
            .iter()
            .map(|(volume, _)| volume.to_vec())
            .collect(),
        volume_bytes: report.status.volumes.iter().map(used).collect(),
        layers: report
            .status
            .layers
            .iter()
            .filter(|l| l.is_layered())
            .map(|l| ReplicaLayers {
                volume_id: l.volume.to_vec(),
                revision: l.revision,
                chunks_left: l.chunks_left,
                inherits: Some(l.inherits),
                inherited_left: l.inherited_left,
            })
            .collect(),
    }
}

async fn drop_replica(daemon: &Daemon, order: &DropReplica) {
    let (Some(disk), Some(volume)) = (
        DiskId::from_slice(&order.disk_id),
        VolumeId::from_slice(&order.volume_id),
    ) else {
        tracing::warn!("the metadata cluster orders to drop a replica without naming it");
        return;
    };
    let request = AdminRequest::DropReplica {
        volume,
        epoch: Epoch(order.epoch),
    };
    match daemon.admin(disk, request).await {
        Ok(AdminReply::Dropped) => {
            tracing::info!(%volume, %disk, "dropped a replica that is no longer needed")
        }
        Ok(reply) => tracing::debug!(%volume, %disk, ?reply, "a replica is not dropped now"),
        Err(error) => tracing::debug!(%volume, %disk, %error, "a replica cannot be dropped"),
    }
}

async fn flatten(daemon: &Daemon, order: &Flatten) {
    let (Some(disk), Some(volume)) = (
        DiskId::from_slice(&order.disk_id),
        VolumeId::from_slice(&order.volume_id),
    ) else {
        tracing::warn!("the metadata cluster orders to flatten a replica without naming it");
        return;
    };
    match daemon.admin(disk, AdminRequest::Flatten { volume }).await {
        Ok(AdminReply::Flattening) => tracing::debug!(%volume, %disk, "a clone is being flattened"),
        // It is said again with the next heartbeat.
        Ok(reply) => tracing::debug!(%volume, %disk, ?reply, "a clone is not flattened now"),
        Err(error) => tracing::debug!(%volume, %disk, %error, "a clone cannot be flattened"),
    }
}

async fn set_layers(daemon: &Daemon, order: SetLayers) {
    let (Some(disk), Some(volume), Some(list)) = (
        DiskId::from_slice(&order.disk_id),
        VolumeId::from_slice(&order.volume_id),
        order.layers,
    ) else {
        tracing::warn!("the metadata cluster sends a layer list without saying of what");
        return;
    };
    let layers = LayerList {
        revision: list.revision,
        settled: SnapshotNumber(list.settled),
        live: list.live.into_iter().map(SnapshotNumber).collect(),
    };
    if let Err(error) = layers.check() {
        tracing::warn!(%volume, %error, "the metadata cluster sends a layer list that is none");
        return;
    }
    let revision = layers.revision;
    match daemon
        .admin(disk, AdminRequest::PutLayers { volume, layers })
        .await
    {
        Ok(AdminReply::LayersKept) => {
            tracing::debug!(%volume, %disk, revision, "a replica has a newer layer list");
        }
        // The next heartbeat says that it is missing, and brings it again.
        Ok(reply) => tracing::debug!(%volume, %disk, ?reply, "a layer list is not kept now"),
        Err(error) => tracing::debug!(%volume, %disk, %error, "a layer list cannot be kept"),
    }
}

fn request_id() -> Vec<u8> {
    ashlar_platform::random::bytes::<16>().to_vec()
}
