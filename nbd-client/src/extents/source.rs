//! What is listed, and where its replicas are.

use std::collections::BTreeMap;

use ashlar_proto::ids::{DiskId, ReplicaState, SnapshotId, SnapshotNumber};
use ashlar_proto::rpc::daemon as daemon_pb;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::volume::VolumeView;
use tonic::{Code, Status};

use super::ExtentsError;
use crate::client::metadata::Members;
use crate::client::view_snapshot;

/// What is compared with what.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    /// `None`: what the volume shows now.
    snapshot: Option<SnapshotNumber>,
    base: Option<SnapshotNumber>,
}

/// See the module.
pub(super) struct Source {
    members: Members,
    /// The snapshot that is asked for in metadata: what is listed, or the base of the head.
    id: SnapshotId,
    numbers: Numbers,
    size_bytes: u64,
    view: VolumeView,
    daemons: BTreeMap<DiskId, String>,
}

fn malformed(what: &str) -> ExtentsError {
    ExtentsError::Failed(format!("metadata's answer lacks {what}: report this bug"))
}

fn refused(status: &Status) -> ExtentsError {
    match status.code() {
        Code::NotFound => ExtentsError::NotFound(status.message().to_owned()),
        _ => ExtentsError::Failed(status.message().to_owned()),
    }
}

async fn look(members: &Members, id: SnapshotId) -> Result<pb::SnapshotView, ExtentsError> {
    view_snapshot(members, id)
        .await
        .map_err(|status| refused(&status))
}

fn snapshot_of(shown: &pb::SnapshotView) -> Result<&pb::Snapshot, ExtentsError> {
    shown
        .snapshot
        .as_ref()
        .ok_or_else(|| malformed("a snapshot"))
}

impl Source {
    pub async fn of_snapshot(
        members: Members,
        id: SnapshotId,
        base: Option<SnapshotId>,
    ) -> Result<Self, ExtentsError> {
        let base = match base {
            Some(base) => Some(look(&members, base).await?),
            None => None,
        };
        let shown = look(&members, id).await?;
        let snapshot = snapshot_of(&shown)?;
        let mut numbers = Numbers {
            snapshot: Some(SnapshotNumber(snapshot.number)),
            base: None,
        };
        if let Some(base) = &base {
            let base = snapshot_of(base)?;
            let (old, new) = (&base.name, &snapshot.name);
            if base.volume_id != snapshot.volume_id {
                return Err(ExtentsError::NotComparable(format!(
                    "snapshots {old:?} and {new:?} are of different volumes ({} and {}): only two of one volume can be compared",
                    base.volume_name, snapshot.volume_name
                )));
            }
            if base.number > snapshot.number {
                return Err(ExtentsError::NotComparable(format!(
                    "the base {old:?} is newer than {new:?}: name the older snapshot first"
                )));
            }
            numbers.base = Some(SnapshotNumber(base.number));
        }
        let size_bytes = snapshot.size_bytes;
        Self::new(members, id, numbers, size_bytes, &shown)
    }

    pub async fn of_head(members: Members, base: SnapshotId) -> Result<Self, ExtentsError> {
        let shown = look(&members, base).await?;
        let numbers = Numbers {
            snapshot: None,
            base: Some(SnapshotNumber(snapshot_of(&shown)?.number)),
        };
        let volume = shown.volume.as_ref().ok_or_else(|| malformed("a volume"))?;
        let size_bytes = volume.size_bytes;
        Self::new(members, base, numbers, size_bytes, &shown)
    }

    fn new(
        members: Members,
        id: SnapshotId,
        numbers: Numbers,
        size_bytes: u64,
        shown: &pb::SnapshotView,
    ) -> Result<Self, ExtentsError> {
        let (view, daemons) = read(shown)?;
        let source = Self {
            members,
            id,
            numbers,
            size_bytes,
            view,
            daemons,
        };
        source.check_live()?;
        Ok(source)
    }

    /// Looks again where the replicas are, and whether the snapshots are still there.
    pub async fn refresh(&mut self) -> Result<(), ExtentsError> {
        let shown = look(&self.members, self.id).await?;
        (self.view, self.daemons) = read(&shown)?;
        self.check_live()
    }

    fn check_live(&self) -> Result<(), ExtentsError> {
        let both = [self.numbers.snapshot, self.numbers.base];
        match both
            .iter()
            .flatten()
            .find(|n| !self.view.layers.live.contains(n))
        {
            Some(_) => Err(ExtentsError::NotFound(
                "a snapshot was deleted meanwhile; see `ashlar snapshot list`".to_owned(),
            )),
            None => Ok(()),
        }
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether there is anything to be listed: a volume that was never opened has no replicas yet, and two equal
    /// numbers no difference.
    pub fn has_replicas(&self) -> bool {
        self.view.opened_once && self.numbers.snapshot != self.numbers.base
    }

    pub fn group_count(&self) -> u32 {
        self.view.groups.len() as u32
    }

    /// Replicas of a group that may be asked, those on living nodes first.
    pub fn replicas(&self, group: u32) -> Vec<DiskId> {
        let members = self.view.groups.get(group as usize);
        let in_sync = members
            .into_iter()
            .flatten()
            .filter(|r| r.state == ReplicaState::InSync);
        let mut disks: Vec<DiskId> = in_sync.map(|r| r.disk).collect();
        disks.sort_by_key(|d| self.view.disks.get(d).is_none_or(|e| !e.alive));
        disks
    }

    /// gRPC of the daemon that has a disk.
    pub fn daemon(&self, disk: DiskId) -> Option<&str> {
        self.daemons
            .get(&disk)
            .map(String::as_str)
            .filter(|a| !a.is_empty())
    }

    pub fn request(&self, disk: DiskId, group: u32, chunk: u32) -> daemon_pb::ListBlocksRequest {
        daemon_pb::ListBlocksRequest {
            disk_id: disk.to_vec(),
            volume_id: self.view.volume.to_vec(),
            epoch: self.view.epoch.0,
            group,
            group_count: self.group_count(),
            snapshot_number: self.numbers.snapshot.map_or(0, |n| n.0),
            base_number: self.numbers.base.map_or(0, |n| n.0),
            first_chunk: chunk,
            head: self.numbers.snapshot.is_none(),
        }
    }
}

fn read(shown: &pb::SnapshotView) -> Result<(VolumeView, BTreeMap<DiskId, String>), ExtentsError> {
    let volume = shown.volume.as_ref().ok_or_else(|| malformed("a volume"))?;
    let view = VolumeView::from_messages(volume, &shown.disks)
        .map_err(|error| ExtentsError::Failed(error.to_string()))?;
    let daemons = shown.daemons.iter().filter_map(|d| {
        let disk = DiskId::from_slice(&d.disk_id)?;
        Some((disk, d.admin_address.clone()))
    });
    Ok((view, daemons.collect()))
}
