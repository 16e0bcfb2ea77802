//! Records of images of version 2, as the program wrote them before there were snapshots of volumes.
//!
//! Invariant: only read, never changed: the order and kind of the fields are what is on disk. An old
//! volume never had a snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;

use ashlar_proto::ids::{
    ClusterId, DiskId, Epoch, Incarnation, PoolId, ReplicaState, SnapshotNumber, VolumeId,
};
use ashlar_proto::layers::LayerList;
use serde::Deserialize;

use super::answers::Remembered;
use super::cluster::{self, Labels};
use super::command::{Answer, RequestKey};
use super::image;
use super::volume::{self, AttachMode, Attachment, Format};

/// Version of an image of these records.
pub const IMAGE_VERSION: u32 = 2;

#[derive(Deserialize)]
pub enum Record {
    Cluster(ClusterId),
    Node(cluster::Node),
    Disk(cluster::Disk),
    Pool(cluster::Pool),
    Volume(Volume),
    Garbage(DiskId, VolumeId, Epoch),
    Answer {
        request: RequestKey,
        kind: u8,
        answer: OldAnswer,
    },
    End(u64),
    AttacherLabels(String, Labels),
}

#[derive(Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    pub pool: PoolId,
    pub replicas: u8,
    pub min_replicas: u8,
    pub groups: Vec<Vec<Replica>>,
    pub epoch: Epoch,
    pub holder: Option<Attachment>,
    pub clean: bool,
    pub opened_once: bool,
    pub snapshot: SnapshotNumber,
    pub revision: u64,
    pub created_unix_ms: u64,
    pub labels: Labels,
    pub publications: BTreeMap<String, AttachMode>,
    pub format: Option<Format>,
    pub readers: Vec<Attachment>,
    pub reader_revoked: bool,
}

/// A replica as it was.
#[derive(Deserialize)]
pub struct Replica {
    pub disk: DiskId,
    pub state: ReplicaState,
    pub incarnation: Incarnation,
    pub rebuild_epoch: Epoch,
    pub leaving_for: Option<DiskId>,
}

#[derive(Deserialize)]
pub enum OldAnswer {
    Done,
    Node(cluster::Node),
    Disk(cluster::Disk),
    Pool(cluster::Pool),
    Volume(Volume),
    Opened {
        volume: Volume,
        previous_clean: bool,
    },
    Changed {
        applied: bool,
        volume: Volume,
        reason: String,
    },
}

impl Record {
    /// The record as this program has it.
    pub fn upgrade(self) -> image::Record {
        match self {
            Self::Cluster(id) => image::Record::Cluster(id),
            Self::Node(node) => image::Record::Node(node),
            Self::Disk(disk) => image::Record::Disk(disk),
            Self::Pool(pool) => image::Record::Pool(pool),
            Self::Volume(volume) => image::Record::Volume(volume.upgrade()),
            Self::Garbage(disk, volume, epoch) => image::Record::Garbage(disk, volume, epoch),
            Self::Answer {
                request,
                kind,
                answer,
            } => image::Record::Answer(Remembered {
                request,
                kind,
                answer: answer.upgrade(),
            }),
            Self::End(count) => image::Record::End(count),
            Self::AttacherLabels(node, labels) => image::Record::AttacherLabels(node, labels),
        }
    }
}

impl Volume {
    fn upgrade(self) -> Arc<volume::Volume> {
        Arc::new(volume::Volume {
            id: self.id,
            name: self.name,
            size_bytes: self.size_bytes,
            pool: self.pool,
            replicas: self.replicas,
            min_replicas: self.min_replicas,
            groups: self
                .groups
                .into_iter()
                .map(|g| g.into_iter().map(Replica::upgrade).collect())
                .collect(),
            epoch: self.epoch,
            holder: self.holder,
            clean: self.clean,
            opened_once: self.opened_once,
            snapshot: self.snapshot,
            revision: self.revision,
            created_unix_ms: self.created_unix_ms,
            labels: self.labels,
            publications: self.publications,
            format: self.format,
            readers: self.readers,
            reader_revoked: self.reader_revoked,
            layers: LayerList::default(),
            hidden: false,
            parent: None,
            flatten: false,
            reverting: None,
            source: None,
        })
    }
}

impl Replica {
    fn upgrade(self) -> volume::Replica {
        volume::Replica {
            disk: self.disk,
            state: self.state,
            incarnation: self.incarnation,
            rebuild_epoch: self.rebuild_epoch,
            leaving_for: self.leaving_for,
            inherits: false,
        }
    }
}

impl OldAnswer {
    fn upgrade(self) -> Answer {
        match self {
            Self::Done => Answer::Done,
            Self::Node(node) => Answer::Node(node),
            Self::Disk(disk) => Answer::Disk(disk),
            Self::Pool(pool) => Answer::Pool(pool),
            Self::Volume(volume) => Answer::Volume(volume.upgrade()),
            Self::Opened {
                volume,
                previous_clean,
            } => Answer::Opened {
                volume: volume.upgrade(),
                previous_clean,
            },
            Self::Changed {
                applied,
                volume,
                reason,
            } => Answer::Changed {
                applied,
                volume: volume.upgrade(),
                reason,
            },
        }
    }
}
