//! Records of images of version 1, as the program wrote them before volumes had publications and a format.
//!
//! Invariant: only read, never changed: the order and kind of the fields are what is on disk. They upgrade to
//! version 2, and by way of it to the newest. An old
//! volume is published to nobody, and nothing is known of its format.

use std::collections::BTreeMap;

use ashlar_proto::ids::{ClusterId, DiskId, Epoch, PoolId, SnapshotNumber, VolumeId};
use serde::Deserialize;

use super::cluster::{self, Labels};
use super::command::RequestKey;
use super::image_v2;
use super::volume::Attachment;

/// Version of an image of these records.
pub const IMAGE_VERSION: u32 = 1;

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
}

#[derive(Deserialize)]
pub struct Volume {
    id: VolumeId,
    name: String,
    size_bytes: u64,
    pool: PoolId,
    replicas: u8,
    min_replicas: u8,
    groups: Vec<Vec<image_v2::Replica>>,
    epoch: Epoch,
    holder: Option<Attachment>,
    clean: bool,
    opened_once: bool,
    snapshot: SnapshotNumber,
    revision: u64,
    created_unix_ms: u64,
    labels: Labels,
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
    /// The record as version 2 has it.
    pub fn upgrade(self) -> image_v2::Record {
        match self {
            Self::Cluster(id) => image_v2::Record::Cluster(id),
            Self::Node(node) => image_v2::Record::Node(node),
            Self::Disk(disk) => image_v2::Record::Disk(disk),
            Self::Pool(pool) => image_v2::Record::Pool(pool),
            Self::Volume(volume) => image_v2::Record::Volume(volume.upgrade()),
            Self::Garbage(disk, volume, epoch) => image_v2::Record::Garbage(disk, volume, epoch),
            Self::Answer {
                request,
                kind,
                answer,
            } => image_v2::Record::Answer {
                request,
                kind,
                answer: answer.upgrade(),
            },
            Self::End(count) => image_v2::Record::End(count),
        }
    }
}

impl Volume {
    fn upgrade(self) -> image_v2::Volume {
        image_v2::Volume {
            id: self.id,
            name: self.name,
            size_bytes: self.size_bytes,
            pool: self.pool,
            replicas: self.replicas,
            min_replicas: self.min_replicas,
            groups: self.groups,
            epoch: self.epoch,
            holder: self.holder,
            clean: self.clean,
            opened_once: self.opened_once,
            snapshot: self.snapshot,
            revision: self.revision,
            created_unix_ms: self.created_unix_ms,
            labels: self.labels,
            publications: BTreeMap::new(),
            format: None,
            readers: Vec::new(),
            reader_revoked: false,
        }
    }
}

impl OldAnswer {
    fn upgrade(self) -> image_v2::OldAnswer {
        match self {
            Self::Done => image_v2::OldAnswer::Done,
            Self::Node(node) => image_v2::OldAnswer::Node(node),
            Self::Disk(disk) => image_v2::OldAnswer::Disk(disk),
            Self::Pool(pool) => image_v2::OldAnswer::Pool(pool),
            Self::Volume(volume) => image_v2::OldAnswer::Volume(volume.upgrade()),
            Self::Opened {
                volume,
                previous_clean,
            } => image_v2::OldAnswer::Opened {
                volume: volume.upgrade(),
                previous_clean,
            },
            Self::Changed {
                applied,
                volume,
                reason,
            } => image_v2::OldAnswer::Changed {
                applied,
                volume: volume.upgrade(),
                reason,
            },
        }
    }
}
