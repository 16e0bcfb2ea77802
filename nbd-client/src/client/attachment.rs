//! One volume's dealings with the metadata cluster: open, change of replicas, close, refresh, watch.
//!
//! Invariant: every question of the engine is answered by exactly one event, however often it has to be
//! repeated; only the end of the volume's tasks cuts it short.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ashlar_platform::random;
use ashlar_proto::ids::{ClientId, ClusterId, DiskId, NodeId, SnapshotId, VolumeId};
use ashlar_proto::layers::REPORT_TIME;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::volume::VolumeView;
use tonic::{Code, Status};

use super::messages::ToWorker;
use super::metadata::Members;
use super::worker_handle::WorkerSender;
use crate::engine::{MetadataRequest, SessionEvent};

/// Pause before a watch is opened again.
const WATCH_PAUSE: Duration = Duration::from_millis(100);
/// How long a reader waits for a volume that somebody holds: another reader may be making it readable, which takes a
/// lease and a reconcile.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);
/// Refusals after which a volume that looks readable is not asked for again.
const JOIN_ATTEMPTS: u32 = 3;
/// Pause before it asks again.
const JOIN_PAUSE: Duration = Duration::from_millis(100);

/// What the tasks of one volume share.
pub(super) struct Volume {
    pub index: usize,
    pub name: String,
    pub id: VolumeId,
    pub client: ClientId,
    pub node: NodeId,
    pub force: bool,
    pub first_open: bool,
    pub revert: bool,
    /// Only so that it is rebuilt.
    pub care: bool,
    /// The snapshot that is read, if it is not the volume itself.
    pub snapshot: Option<SnapshotId>,
    pub members: Members,
    pub worker: WorkerSender,
    /// Where disks are reached, as last heard.
    pub disks: Mutex<BTreeMap<DiskId, pb::DiskEndpoint>>,
    /// The epoch in which it was opened.
    pub granted_epoch: AtomicU64,
    /// The volume's epoch when it was closed.
    pub closed_epoch: AtomicU64,
}

impl Volume {
    pub(super) async fn tell(&self, event: SessionEvent) {
        self.worker
            .send(ToWorker::Session {
                index: self.index,
                event: Box::new(event),
            })
            .await;
    }

    fn known_disks(&self) -> std::sync::MutexGuard<'_, BTreeMap<DiskId, pb::DiskEndpoint>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine's view of a volume; remembers where its disks are. `None` if it makes no sense.
    pub(super) fn view(
        &self,
        volume: Option<&pb::Volume>,
        disks: &[pb::DiskEndpoint],
    ) -> Option<VolumeView> {
        {
            let mut known = self.known_disks();
            for disk in disks {
                if let Some(id) = DiskId::from_slice(&disk.disk_id) {
                    known.insert(id, disk.clone());
                }
            }
        }
        let known: Vec<pb::DiskEndpoint> = self.known_disks().values().cloned().collect();
        let volume = volume.or_else(|| {
            tracing::error!(
                volume = self.name,
                "metadata answered without the volume: a bug"
            );
            None
        })?;
        match VolumeView::from_messages(volume, &known) {
            Ok(view) => Some(view),
            Err(error) => {
                tracing::error!(volume = self.name, %error, "metadata sent a malformed volume: a bug");
                None
            }
        }
    }

    /// Answers a question of the engine.
    pub async fn answer(&self, request: MetadataRequest) {
        match request {
            MetadataRequest::Open => self.open().await,
            MetadataRequest::Join => self.join().await,
            MetadataRequest::Confirm => match self.refresh().await {
                Some(SessionEvent::ConfigChanged(view)) => {
                    self.tell(SessionEvent::Confirmed(view)).await;
                }
                Some(event) => self.tell(event).await,
                None => {}
            },
            MetadataRequest::ChangeReplicas { epoch, changes } => {
                let changes = changes
                    .iter()
                    .map(|c| pb::ReplicaChange {
                        group: c.group.0,
                        disk_id: c.disk.to_vec(),
                        state: c.state as i32,
                        incarnation: c.incarnation.0,
                    })
                    .collect();
                let request = pb::ChangeReplicasRequest {
                    request_id: random::bytes::<16>().to_vec(),
                    volume_id: self.id.to_vec(),
                    client_id: self.client.to_vec(),
                    epoch: epoch.0,
                    changes,
                };
                self.change(request).await;
            }
            MetadataRequest::Close { epoch, clean } => {
                let request = pb::CloseVolumeRequest {
                    request_id: random::bytes::<16>().to_vec(),
                    volume_id: self.id.to_vec(),
                    client_id: self.client.to_vec(),
                    epoch: epoch.0,
                    clean,
                };
                // Closing leaves the epoch as it is. Noted before: the watch may tell of the close, and end
                // the session, before the answer does.
                self.closed_epoch.store(epoch.0, Ordering::Relaxed);
                let result = self
                    .members
                    .ask("CloseVolume", |mut c| {
                        let request = request.clone();
                        async move { c.close_volume(request).await }
                    })
                    .await;
                match result {
                    Ok(_) => self.tell(SessionEvent::CloseAnswer).await,
                    Err(status) => self.refused("CloseVolume", &status).await,
                }
            }
            MetadataRequest::ReportHeld { epoch, number } => {
                let request = pb::ReportHeldRequest {
                    volume_id: self.id.to_vec(),
                    client_id: self.client.to_vec(),
                    epoch: epoch.0,
                    number: number.0,
                };
                // Later it is worth nothing (S3); what became of the number comes with the watch.
                let report = self.members.ask("ReportHeld", |mut c| {
                    let request = request.clone();
                    async move { c.report_held(request).await }
                });
                match tokio::time::timeout(REPORT_TIME, report).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(status)) => {
                        tracing::info!(volume = self.name, %status, "a snapshot is not waited for any more");
                    }
                    Err(_) => {
                        tracing::warn!(
                            volume = self.name,
                            "cannot tell metadata in time that writes are held for a snapshot"
                        );
                    }
                }
            }
            MetadataRequest::Refresh => {
                if let Some(event) = self.refresh().await {
                    self.tell(event).await;
                }
            }
        }
    }

    async fn ask_open(&self, mode: pb::AttachMode) -> Result<pb::OpenVolumeResponse, Status> {
        let request = pb::OpenVolumeRequest {
            request_id: random::bytes::<16>().to_vec(),
            volume_id: self.id.to_vec(),
            client_id: self.client.to_vec(),
            node_id: self.node.to_vec(),
            client_name: client_name(),
            mode: mode as i32,
            revert: self.revert,
            force: self.force,
        };
        self.members
            .ask("OpenVolume", |mut c| {
                let request = request.clone();
                async move { c.open_volume(request).await }
            })
            .await
    }

    async fn open(&self) {
        let mode = if self.care {
            pb::AttachMode::Care
        } else {
            pb::AttachMode::Exclusive
        };
        match self.ask_open(mode).await {
            Ok(response) => self.granted(response).await,
            Err(status) => self.open_refused(&status).await,
        }
    }

    /// R10: joins the readers. Whoever holds the volume may be a reader that makes it readable, and is given time.
    async fn join(&self) {
        let patience = tokio::time::Instant::now() + JOIN_PATIENCE;
        let mut refused = 0;
        loop {
            let status = match self.ask_open(pb::AttachMode::ReadOnly).await {
                Ok(response) => return self.granted(response).await,
                Err(status) => status,
            };
            let volume = match status.code() {
                Code::FailedPrecondition => self.get_volume().await.ok(),
                _ => None,
            };
            let Some(volume) = volume else {
                return self.open_refused(&status).await;
            };
            let wait = match &volume.holder {
                // It became readable just now, or there is no right to read it.
                None if volume.clean && volume.opened_once => {
                    refused += 1;
                    refused < JOIN_ATTEMPTS
                }
                None => return self.tell(SessionEvent::NotReadable).await,
                // This client's own, from before it was started again; or to be taken over.
                Some(holder) if self.force || holder.client_id == self.client.to_vec() => {
                    return self.tell(SessionEvent::NotReadable).await;
                }
                Some(_) => !volume
                    .publications
                    .iter()
                    .any(|p| p.mode() == pb::AttachMode::Exclusive),
            };
            if !wait || tokio::time::Instant::now() >= patience {
                return self.open_refused(&status).await;
            }
            tokio::time::sleep(JOIN_PAUSE).await;
        }
    }

    async fn open_refused(&self, status: &Status) {
        let reason = status.message().to_owned();
        self.tell(SessionEvent::OpenRefused { reason }).await;
    }

    async fn granted(&self, response: pb::OpenVolumeResponse) {
        let cluster = ClusterId::from_slice(&response.cluster_id);
        let view = self.view(response.volume.as_ref(), &response.disks);
        let (Some(cluster), Some(view)) = (cluster, view) else {
            let reason = "metadata's answer makes no sense".to_owned();
            return self.tell(SessionEvent::OpenRefused { reason }).await;
        };
        self.granted_epoch.store(view.epoch.0, Ordering::Relaxed);
        self.worker.send(ToWorker::Cluster(cluster)).await;
        self.tell(SessionEvent::Granted {
            view: Box::new(view),
            previous_clean: response.previous_clean,
            first_open: self.first_open,
        })
        .await;
    }

    /// The first open (or join); then follows the volume's changes for as long as it is served.
    pub async fn open_and_watch(&self, request: MetadataRequest) {
        self.answer(request).await;
        match self.snapshot {
            Some(snapshot) => self.follow_snapshot(snapshot).await,
            None => self.watch().await,
        }
    }

    async fn change(&self, request: pb::ChangeReplicasRequest) {
        let result = self
            .members
            .ask("ChangeReplicas", |mut c| {
                let request = request.clone();
                async move { c.change_replicas(request).await }
            })
            .await;
        match result {
            Ok(response) => {
                if !response.applied {
                    let reason = response.reason.as_str();
                    tracing::info!(
                        volume = self.name,
                        reason,
                        "a change of replicas was refused"
                    );
                }
                if let Some(view) = self.view(response.volume.as_ref(), &response.disks) {
                    let applied = response.applied;
                    self.tell(SessionEvent::ChangeAnswer {
                        applied,
                        view: Box::new(view),
                    })
                    .await;
                }
            }
            Err(status) => {
                tracing::warn!(volume = self.name, %status, "metadata refuses a change of replicas");
                match self.refresh().await {
                    Some(SessionEvent::ConfigChanged(view)) => {
                        self.tell(SessionEvent::ChangeAnswer {
                            applied: false,
                            view,
                        })
                        .await;
                    }
                    Some(event) => self.tell(event).await,
                    None => {}
                }
            }
        }
    }

    /// A mutation was refused: the engine learns how the volume is now.
    async fn refused(&self, what: &str, status: &Status) {
        tracing::warn!(volume = self.name, what, %status, "metadata refuses");
        if let Some(event) = self.refresh().await {
            self.tell(event).await;
        }
    }

    async fn get_volume(&self) -> Result<pb::Volume, Status> {
        let request = pb::GetVolumeRequest {
            name: String::new(),
            volume_id: self.id.to_vec(),
        };
        self.members
            .ask("GetVolume", |mut c| {
                let request = request.clone();
                async move { c.get_volume(request).await }
            })
            .await
    }

    /// The volume as the metadata cluster has it, in a linearizable read.
    async fn refresh(&self) -> Option<SessionEvent> {
        if let Some(snapshot) = self.snapshot {
            return self.refresh_snapshot(snapshot).await;
        }
        let volume = match self.get_volume().await {
            Ok(volume) => volume,
            Err(status) if status.code() == Code::NotFound => return Some(SessionEvent::Deleted),
            Err(status) => {
                tracing::error!(volume = self.name, %status, "metadata refuses to show the volume");
                return None;
            }
        };
        let known = {
            let disks = self.known_disks();
            let mut replicas = volume.groups.iter().flat_map(|g| &g.replicas);
            replicas.all(|r| DiskId::from_slice(&r.disk_id).is_some_and(|d| disks.contains_key(&d)))
        };
        if !known {
            self.learn_disks().await;
        }
        let view = self.view(Some(&volume), &[])?;
        Some(SessionEvent::ConfigChanged(Box::new(view)))
    }

    async fn learn_disks(&self) {
        let result = self
            .members
            .ask("ListDisks", |mut c| async move {
                c.list_disks(pb::ListDisksRequest {
                    node_id: Vec::new(),
                })
                .await
            })
            .await;
        let Ok(found) = result else { return };
        let mut known = self.known_disks();
        for disk in found.disks {
            if let Some(id) = DiskId::from_slice(&disk.disk_id) {
                let endpoint = pb::DiskEndpoint {
                    disk_id: disk.disk_id,
                    node_id: disk.node_id,
                    data_address: disk.data_address,
                    incarnation: disk.incarnation,
                    alive: disk.alive,
                };
                known.insert(id, endpoint);
            }
        }
    }

    async fn watch(&self) {
        loop {
            let (at, mut client) = self.members.client();
            let request = pb::WatchVolumesRequest {
                volume_ids: vec![self.id.to_vec()],
            };
            match client.watch_volumes(request).await {
                Ok(response) => {
                    let mut stream = response.into_inner();
                    while let Ok(Some(event)) = stream.message().await {
                        if event.deleted {
                            self.tell(SessionEvent::Deleted).await;
                        } else if let Some(view) = self.view(event.volume.as_ref(), &event.disks) {
                            self.tell(SessionEvent::ConfigChanged(Box::new(view))).await;
                        }
                    }
                }
                Err(status) => {
                    tracing::debug!(volume = self.name, %status, "cannot watch; trying again");
                }
            }
            self.members.pass_over(at);
            tokio::time::sleep(WATCH_PAUSE).await;
        }
    }
}

/// For people: host name and process.
fn client_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}:{}", host.trim(), std::process::id())
}
