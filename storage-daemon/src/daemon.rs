//! The daemon of one node: its identity, its disks and their threads, its cluster.
//!
//! Invariants:
//! - A disk of another cluster is not served. A disk of none is given to the cluster that the metadata
//!   members name, before it is opened.
//! - A disk that cannot be served is kept in the list with its reason: it is reported, not forgotten, and
//!   does not keep the others from being served.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ashlar_proto::ids::{ClusterId, DiskId, NodeId};
use ashlar_proto::rpc::metadata::GetClusterRequest;
use tokio::sync::{Mutex, Notify, OnceCell};

use crate::config::{NodeFile, ServeConfig};
use crate::disk_handle::{DiskGone, DiskHandle, DiskState, DiskThreadConfig};
use crate::engine::{AdminReply, AdminRequest, EngineStatus};
use crate::error::{DiskError, IdentityError};
use crate::offline;
use crate::rpc::MetadataAccess;
use crate::store::StoreConfig;

/// How long a disk may take to finish what it was asked, when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A disk in the daemon's list.
#[derive(Clone)]
struct Slot {
    /// NIL as long as its superblock was not read.
    disk: DiskId,
    handle: Option<Arc<DiskHandle>>,
    failure: Option<String>,
    labels: BTreeMap<String, String>,
}

/// How a disk fares.
#[derive(Clone, PartialEq, Debug)]
pub struct DiskReport {
    /// The disk; NIL if its superblock could not be read.
    pub disk: DiskId,
    /// The file or device.
    pub path: PathBuf,
    /// Where it is reached; empty if it is not served.
    pub address: String,
    /// The store's life; 0 if it is not open.
    pub incarnation: u64,
    /// Labels of the disk.
    pub labels: BTreeMap<String, String>,
    /// Why it is not served, if so.
    pub failure: Option<String>,
    /// What its engine says.
    pub status: EngineStatus,
}

/// See the module.
pub struct Daemon {
    config: ServeConfig,
    node: NodeId,
    admin_address: SocketAddr,
    metadata: MetadataAccess,
    cluster: OnceCell<ClusterId>,
    file: Mutex<NodeFile>,
    disks: Mutex<BTreeMap<PathBuf, Slot>>,
    changed: Notify,
    /// Whether the node is of use to the cluster, or why not.
    standing: std::sync::Mutex<Result<(), String>>,
}

impl Daemon {
    /// A daemon that serves nothing yet.
    pub fn new(
        config: ServeConfig,
        file: NodeFile,
        metadata: MetadataAccess,
        admin_address: SocketAddr,
    ) -> Self {
        Self {
            node: file.node(),
            config,
            admin_address,
            metadata,
            cluster: OnceCell::new(),
            file: Mutex::new(file),
            disks: Mutex::new(BTreeMap::new()),
            changed: Notify::new(),
            standing: std::sync::Mutex::new(Err("not registered yet".to_owned())),
        }
    }

    /// Its settings.
    pub fn config(&self) -> &ServeConfig {
        &self.config
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Where its administration listens.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// The metadata cluster.
    pub fn metadata(&self) -> &MetadataAccess {
        &self.metadata
    }

    /// Whether this node is of use to the cluster.
    ///
    /// # Errors
    /// Why not.
    pub fn standing(&self) -> Result<(), String> {
        let standing = self.standing.lock();
        standing.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers how the last report to the metadata cluster went.
    pub fn set_standing(&self, standing: Result<(), String>) {
        *self.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
    }

    /// Disks in its list.
    pub async fn disk_count(&self) -> usize {
        self.disks.lock().await.len()
    }

    /// Disks that are neither served nor known to have failed: they are being opened.
    pub async fn disks_opening(&self) -> usize {
        let disks = self.disks.lock().await;
        let opening = |slot: &&Slot| match &slot.handle {
            None => slot.failure.is_none(),
            Some(handle) => *handle.state().borrow() == DiskState::Opening,
        };
        disks.values().filter(opening).count()
    }

    /// Waits for a change of the disks.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The cluster, as its members name it; waits until one answers.
    pub async fn cluster(&self) -> ClusterId {
        *self
            .cluster
            .get_or_init(|| async {
                loop {
                    let answer = self
                        .metadata
                        .call_until_answered("GetCluster", |mut client| async move {
                            client.get_cluster(GetClusterRequest {}).await
                        })
                        .await;
                    let named = answer
                        .as_ref()
                        .ok()
                        .and_then(|c| ClusterId::from_slice(&c.cluster_id));
                    match named {
                        Some(cluster) if !cluster.is_nil() => return cluster,
                        // Not bootstrapped yet.
                        _ => tokio::time::sleep(Duration::from_millis(200)).await,
                    }
                }
            })
            .await
    }

    /// Serves every disk of the command line and of the node file; returns when each is served or has
    /// failed, except for disks that wait for their first cluster.
    pub async fn serve_all(self: &Arc<Self>) -> Result<(), IdentityError> {
        let paths: Vec<PathBuf> = {
            let mut file = self.file.lock().await;
            file.retain_served(&self.config.disks);
            for path in &self.config.disks {
                file.disk(path, self.config.data_listen, false);
            }
            file.save()?;
            file.disks().iter().map(|d| d.path.clone()).collect()
        };
        for path in paths {
            let daemon = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = daemon.serve_disk(&path).await {
                    tracing::error!(%error, "a disk is not served");
                }
            });
        }
        let daemon = Arc::clone(self);
        tokio::spawn(async move { daemon.refuse_foreign_disks().await });
        Ok(())
    }

    /// Opens and serves a disk of the node file; returns when it is served or why it is not.
    pub async fn serve_disk(&self, path: &Path) -> Result<DiskId, DiskError> {
        {
            let mut disks = self.disks.lock().await;
            if disks.get(path).is_some_and(|s| s.failure.is_none()) {
                return Err(DiskError::AlreadyServed {
                    path: path.to_owned(),
                });
            }
            let slot = Slot {
                disk: DiskId::NIL,
                handle: None,
                failure: None,
                labels: BTreeMap::new(),
            };
            disks.insert(path.to_owned(), slot);
        }
        let outcome = self.open_disk(path).await;
        if let Err(error) = &outcome {
            self.update_slot(path, |slot| slot.failure = Some(error.to_string()))
                .await;
        }
        self.changed.notify_one();
        outcome
    }

    async fn open_disk(&self, path: &Path) -> Result<DiskId, DiskError> {
        let owned = path.to_owned();
        let mut superblock = blocking(path, move || offline::superblock(&owned)).await?;
        self.update_slot(path, |slot| slot.disk = superblock.disk)
            .await;
        if superblock.cluster.is_nil() {
            let cluster = self.cluster().await;
            let owned = path.to_owned();
            superblock = blocking(path, move || offline::join_cluster(&owned, cluster)).await?;
        }
        if let Some(&ours) = self.cluster.get()
            && superblock.cluster != ours
        {
            let theirs = superblock.cluster;
            return Err(DiskError::OtherCluster {
                path: path.to_owned(),
                theirs,
                ours,
            });
        }
        let entry = self
            .file
            .lock()
            .await
            .disk(path, self.config.data_listen, false);
        let config = DiskThreadConfig {
            path: path.to_owned(),
            listen: SocketAddr::new(self.config.data_listen.ip, entry.port.unwrap_or(0)),
            local_sockets: self.config.local_sockets.clone(),
            discard: self.config.discard,
            store: StoreConfig {
                cache_bytes: self.config.cache_bytes,
                ..StoreConfig::default()
            },
        };
        let handle = Arc::new(blocking(path, move || DiskHandle::start(config)).await?);
        let mut state = handle.state();
        self.update_slot(path, |slot| {
            slot.labels = entry.labels.clone();
            slot.handle = Some(handle);
        })
        .await;
        let opened = state.wait_for(|state| *state != DiskState::Opening).await;
        let opened = opened
            .map(|state| state.clone())
            .unwrap_or(DiskState::Stopped);
        match opened {
            DiskState::Serving { address, .. } => {
                self.file
                    .lock()
                    .await
                    .update(path, |e| e.port = Some(address.port()))?;
                Ok(superblock.disk)
            }
            DiskState::Failed { message, .. } => Err(DiskError::Thread {
                path: path.to_owned(),
                message,
            }),
            DiskState::Opening | DiskState::Stopped => {
                let message = "stopped while it was opened".to_owned();
                Err(DiskError::Thread {
                    path: path.to_owned(),
                    message,
                })
            }
        }
    }

    async fn update_slot(&self, path: &Path, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.disks.lock().await.get_mut(path) {
            change(slot);
        }
    }

    /// Disks are served before the metadata members answer; one that turns out to belong to another
    /// cluster is stopped.
    async fn refuse_foreign_disks(&self) {
        let ours = self.cluster().await;
        let slots: Vec<(PathBuf, Slot)> = self
            .disks
            .lock()
            .await
            .iter()
            .map(|(p, s)| (p.clone(), s.clone()))
            .collect();
        for (path, slot) in slots {
            let Some(handle) = slot.handle else { continue };
            let state = handle.state().borrow().clone();
            if let DiskState::Serving { identity, .. } = state
                && identity.cluster != ours
            {
                let error = DiskError::OtherCluster {
                    path: path.clone(),
                    theirs: identity.cluster,
                    ours,
                };
                tracing::error!(%error, "a disk is not served");
                stop(&handle).await;
                self.update_slot(&path, |slot| {
                    slot.handle = None;
                    slot.failure = Some(error.to_string());
                })
                .await;
            }
        }
    }

    /// Serves one more disk, now and after every restart.
    pub async fn add_disk(
        &self,
        path: &Path,
        format: Option<offline::FormatRequest>,
        labels: BTreeMap<String, String>,
    ) -> Result<DiskReport, DiskError> {
        if self
            .disks
            .lock()
            .await
            .get(path)
            .is_some_and(|s| s.failure.is_none())
        {
            return Err(DiskError::AlreadyServed {
                path: path.to_owned(),
            });
        }
        if let Some(request) = format {
            let owned = path.to_owned();
            let formatted = blocking(path, move || offline::format(&owned, &request)).await;
            match formatted {
                // Asked twice: the first answer was lost.
                Ok(_) | Err(DiskError::Formatted { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let listed = {
            let mut file = self.file.lock().await;
            let listed = file.disks().iter().any(|d| d.path == path);
            file.disk(path, self.config.data_listen, true);
            file.update(path, |entry| entry.labels = labels)?;
            listed
        };
        let served = self.serve_disk(path).await;
        match served {
            Ok(disk) => self
                .reports()
                .await
                .into_iter()
                .find(|r| r.disk == disk)
                .ok_or(DiskError::NotFormatted {
                    path: path.to_owned(),
                }),
            Err(error) => {
                if !listed {
                    self.disks.lock().await.remove(path);
                    self.file.lock().await.remove(path)?;
                }
                Err(error)
            }
        }
    }

    /// Stops serving a disk; false if there is none.
    pub async fn remove_disk(&self, disk: DiskId) -> Result<bool, IdentityError> {
        let found = {
            let mut disks = self.disks.lock().await;
            let path = disks
                .iter()
                .find(|(_, s)| s.disk == disk)
                .map(|(p, _)| p.clone());
            path.and_then(|path| disks.remove(&path).map(|slot| (path, slot)))
        };
        let Some((path, slot)) = found else {
            return Ok(false);
        };
        if let Some(handle) = slot.handle {
            stop(&handle).await;
        }
        self.file.lock().await.remove(&path)?;
        self.changed.notify_one();
        Ok(true)
    }

    /// Asks a disk's engine.
    pub async fn admin(&self, disk: DiskId, request: AdminRequest) -> Result<AdminReply, DiskGone> {
        let handle = {
            let disks = self.disks.lock().await;
            disks
                .values()
                .find(|s| s.disk == disk)
                .and_then(|s| s.handle.clone())
        };
        handle.ok_or(DiskGone::Ended)?.admin(request).await
    }

    /// How every disk fares. Disks that are being opened, or do not answer now, are left out.
    pub async fn reports(&self) -> Vec<DiskReport> {
        let slots: Vec<(PathBuf, Slot)> = self
            .disks
            .lock()
            .await
            .iter()
            .map(|(p, s)| (p.clone(), s.clone()))
            .collect();
        // All at once: one that does not answer keeps nobody waiting for the others.
        let reports = slots
            .into_iter()
            .map(|(path, slot)| self.report(path, slot));
        futures::future::join_all(reports)
            .await
            .into_iter()
            .flatten()
            .collect()
    }

    async fn report(&self, path: PathBuf, slot: Slot) -> Option<DiskReport> {
        let mut report = DiskReport {
            disk: slot.disk,
            path,
            address: String::new(),
            incarnation: 0,
            labels: slot.labels,
            failure: slot.failure,
            status: EngineStatus::default(),
        };
        let Some(handle) = slot.handle else {
            return report.failure.is_some().then_some(report);
        };
        let state = handle.state().borrow().clone();
        let served = match state {
            DiskState::Opening | DiskState::Stopped => return None,
            DiskState::Serving { identity, address } => Some((identity, address)),
            DiskState::Failed { message, served } => {
                report.failure = Some(message);
                served
            }
        };
        if let Some((identity, address)) = served {
            report.address = self.config.advertised(address).to_string();
            report.incarnation = identity.incarnation.0;
        }
        match handle.admin(AdminRequest::Status).await {
            Ok(AdminReply::Status(status)) => report.status = *status,
            _ if report.failure.is_some() => {}
            _ => return None,
        }
        Some(report)
    }

    /// Stops every disk cleanly.
    pub async fn stop_all(&self) {
        let slots: Vec<Slot> = std::mem::take(&mut *self.disks.lock().await)
            .into_values()
            .collect();
        let mut stopping = Vec::new();
        for handle in slots.into_iter().filter_map(|s| s.handle) {
            stopping.push(tokio::spawn(async move { stop(&handle).await }));
        }
        for task in stopping {
            if task.await.is_err() {
                tracing::error!("stopping a disk panicked");
            }
        }
    }
}

/// Stops a disk: it finishes, flushes and marks itself clean.
async fn stop(handle: &Arc<DiskHandle>) {
    let mut state = handle.state();
    if handle.admin(AdminRequest::Stop).await.is_ok() {
        let ended = state.wait_for(|s| matches!(s, DiskState::Stopped | DiskState::Failed { .. }));
        if tokio::time::timeout(STOP_TIMEOUT, ended).await.is_err() {
            tracing::error!(
                "a disk did not stop in time; it recovers from its log when it is opened again"
            );
            return;
        }
    }
    let handle = Arc::clone(handle);
    // The thread ends at once; joining it makes its file closed and unlocked.
    let _ = tokio::task::spawn_blocking(move || handle.join()).await;
}

/// Runs blocking work on a disk off the runtime's threads.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, DiskError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(DiskError::Thread {
            path: path.to_owned(),
            message: error.to_string(),
        }),
    }
}
