//! What a reader of a snapshot hears from metadata (docs/snapshots.md, S9).
//!
//! Invariant: nothing that happens to the volume ends its reader while the snapshot is there: neither holders that come and
//! go, nor the volume's deletion. A reader that was not told yet is refused by the replicas, and asks. So it is enough
//! to ask now and then; there is no watch.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ashlar_proto::ids::{ClusterId, SnapshotId, SnapshotNumber, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tonic::{Code, Status};

use super::attachment::Volume;
use super::host::{Host, HostedVolume, OpenSpec, SnapshotSpec};
use super::messages::{Endpoint, ToWorker};
use super::metadata::Members;
use crate::engine::{SessionEvent, SnapshotSource};

/// How often a reader looks whether its snapshot is still there, and where the disks are.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(2);

/// Why a snapshot cannot be opened.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unreadable {
    /// Metadata refuses to show it: it does not exist, or was deleted.
    #[error("{0}")]
    Refused(String),
    /// There are no replicas to read.
    #[error("its volume was never opened: there is nothing in it to read")]
    NeverOpened,
    /// An answer of metadata lacks something.
    #[error("metadata's answer makes no sense: report this bug")]
    Malformed,
}

impl OpenSpec {
    /// To read a snapshot, as metadata shows it (ViewSnapshot).
    ///
    /// # Errors
    /// If there is nothing to read.
    pub fn of_snapshot(view: &pb::SnapshotView, endpoint: Endpoint) -> Result<Self, Unreadable> {
        let malformed = || Unreadable::Malformed;
        let snapshot = view.snapshot.as_ref().ok_or_else(malformed)?;
        let volume = view.volume.as_ref().ok_or_else(malformed)?;
        if !volume.opened_once {
            return Err(Unreadable::NeverOpened);
        }
        let id = VolumeId::from_slice(&volume.volume_id).ok_or_else(malformed)?;
        Ok(Self {
            read_only: true,
            snapshot: Some(SnapshotSpec {
                id: SnapshotId::from_slice(&snapshot.snapshot_id).ok_or_else(malformed)?,
                source: SnapshotSource {
                    number: SnapshotNumber(snapshot.number),
                    size_bytes: snapshot.size_bytes,
                },
            }),
            ..Self::new(id, snapshot.name.clone(), endpoint)
        })
    }
}

impl Host {
    /// Begins to open a snapshot, which is only read; its status tells the rest.
    ///
    /// # Errors
    /// If it does not exist, or there is nothing to read.
    pub async fn open_snapshot(
        &self,
        snapshot: SnapshotId,
        endpoint: Endpoint,
    ) -> Result<HostedVolume, Unreadable> {
        let view = view_snapshot(self.members(), snapshot)
            .await
            .map_err(|status| Unreadable::Refused(status.message().to_owned()))?;
        let spec = OpenSpec::of_snapshot(&view, endpoint)?;
        Ok(self.open(spec).await)
    }
}

/// A snapshot and its volume, in a linearizable read.
pub(crate) async fn view_snapshot(
    members: &Members,
    snapshot: SnapshotId,
) -> Result<pb::SnapshotView, Status> {
    let request = pb::ViewSnapshotRequest {
        snapshot_id: snapshot.to_vec(),
    };
    members
        .ask("ViewSnapshot", |mut c| {
            let request = request.clone();
            async move { c.view_snapshot(request).await }
        })
        .await
}

/// A snapshot by its name or id, as [`view_snapshot`].
pub(crate) async fn find_snapshot(
    members: &Members,
    name: &str,
) -> Result<pb::SnapshotView, Status> {
    let id = uuid::Uuid::parse_str(name).ok();
    let request = pb::GetSnapshotRequest {
        name: if id.is_some() {
            String::new()
        } else {
            name.to_owned()
        },
        snapshot_id: id.map(|id| id.into_bytes().to_vec()).unwrap_or_default(),
    };
    let found = members
        .ask("GetSnapshot", |mut c| {
            let request = request.clone();
            async move { c.get_snapshot(request).await }
        })
        .await?;
    let id = SnapshotId::from_slice(&found.snapshot_id)
        .ok_or_else(|| Status::internal("metadata sent a snapshot without an id"))?;
    view_snapshot(members, id).await
}

impl Volume {
    /// The snapshot's volume as it is now; [`SessionEvent::Deleted`] if the snapshot is gone.
    pub(super) async fn refresh_snapshot(&self, snapshot: SnapshotId) -> Option<SessionEvent> {
        let shown = match view_snapshot(&self.members, snapshot).await {
            Ok(shown) => shown,
            Err(status) if status.code() == Code::NotFound => {
                tracing::error!(
                    snapshot = self.name,
                    "the snapshot was deleted while it was read"
                );
                return Some(SessionEvent::Deleted);
            }
            Err(status) => {
                tracing::error!(snapshot = self.name, %status, "metadata refuses to show the snapshot");
                return None;
            }
        };
        if let Some(cluster) = ClusterId::from_slice(&shown.cluster_id) {
            self.worker.send(ToWorker::Cluster(cluster)).await;
        }
        let view = self.view(shown.volume.as_ref(), &shown.disks)?;
        self.granted_epoch.store(view.epoch.0, Ordering::Relaxed);
        Some(SessionEvent::ConfigChanged(Box::new(view)))
    }

    /// Tells the session how the volume is, until its tasks end.
    pub(super) async fn follow_snapshot(&self, snapshot: SnapshotId) {
        loop {
            tokio::time::sleep(FOLLOW_INTERVAL).await;
            if let Some(event) = self.refresh_snapshot(snapshot).await {
                self.tell(event).await;
            }
        }
    }
}
