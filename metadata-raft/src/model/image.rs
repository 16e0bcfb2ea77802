//! The state as bytes, for snapshots: a stream of bounded records.
//!
//! Form: a version (u32), then records, each a u32 length and that many bytes of bincode (little-endian,
//! varint) of one [`Record`]; the last is `End` with the number of records before it. The file around it
//! (`raft::snapshot_file`) has its own checksum.
//!
//! Invariants: a record is at most [`RECORD_BYTES_MAX`] long, trailing bytes and an unknown version are
//! refused; derived indexes are rebuilt, and every volume is checked.

use std::io::{self, Read, Write};
use std::sync::Arc;

use ashlar_proto::ids::{ClusterId, DiskId, Epoch, PoolId, VolumeId};
use serde::{Deserialize, Serialize};

use super::answers::Remembered;
use super::cluster::{Disk, FlattenPolicy, Labels, Node, Pool};
use super::schedule::Schedule;
use super::service::{Part, Service};
use super::snapshot::Snapshot;
use super::volume::Volume;
use super::{State, check_state, image_v1, image_v2};

/// Version of the form; older ones are read by an upgrade, newer ones refused.
pub const IMAGE_VERSION: u32 = 3;
/// Longest record.
const RECORD_BYTES_MAX: usize = 1024 * 1024;

/// An image cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Reading or writing failed.
    #[error("snapshot image: {0}")]
    Io(#[from] io::Error),
    /// A record does not decode.
    #[error("snapshot image: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// A record does not encode.
    #[error("snapshot image: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// Made by a newer version of the program.
    #[error(
        "snapshot image has version {0}, this program knows {IMAGE_VERSION}: use the newer program"
    )]
    Version(u32),
    /// The content contradicts itself.
    #[error("snapshot image is not consistent: {0}")]
    Inconsistent(String),
}

#[derive(Serialize, Deserialize)]
pub(super) enum Record {
    Cluster(ClusterId),
    Node(Node),
    Disk(Disk),
    Pool(Pool),
    Volume(Arc<Volume>),
    Garbage(DiskId, VolumeId, Epoch),
    Answer(Remembered),
    End(u64),
    AttacherLabels(String, Labels),
    Snapshot(Arc<Snapshot>),
    FlattenPolicy(PoolId, FlattenPolicy),
    Schedule(Schedule),
    Service(Part, Service),
}

fn config() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<RECORD_BYTES_MAX>,
> {
    bincode::config::standard().with_limit::<RECORD_BYTES_MAX>()
}

/// A record of a known version as this program has it, and the bytes that it took.
fn decode(version: u32, bytes: &[u8]) -> Result<(Record, usize), ImageError> {
    Ok(match version {
        image_v1::IMAGE_VERSION => {
            let (old, used): (image_v1::Record, usize) =
                bincode::serde::decode_from_slice(bytes, config())?;
            (old.upgrade().upgrade(), used)
        }
        image_v2::IMAGE_VERSION => {
            let (old, used): (image_v2::Record, usize) =
                bincode::serde::decode_from_slice(bytes, config())?;
            (old.upgrade(), used)
        }
        _ => bincode::serde::decode_from_slice(bytes, config())?,
    })
}

impl State {
    /// What a snapshot needs of the state: the derived indexes are left out, volumes are shared.
    pub fn for_image(&self) -> Self {
        Self {
            cluster: self.cluster,
            nodes: self.nodes.clone(),
            disks: self.disks.clone(),
            pools: self.pools.clone(),
            volumes: self.volumes.clone(),
            snapshots: self.snapshots.clone(),
            garbage: self.garbage.clone(),
            answers: self.answers.clone(),
            attacher_labels: self.attacher_labels.clone(),
            flatten_policies: self.flatten_policies.clone(),
            schedules: self.schedules.clone(),
            services: self.services.clone(),
            ..Self::default()
        }
    }

    /// Writes the image of the state.
    pub fn write_image(&self, out: &mut impl Write) -> Result<(), ImageError> {
        out.write_all(&IMAGE_VERSION.to_le_bytes())?;
        let mut count = 0_u64;
        let mut put = |record: Record| -> Result<(), ImageError> {
            let bytes = bincode::serde::encode_to_vec(&record, config())?;
            let length = u32::try_from(bytes.len())
                .ok()
                .filter(|l| *l as usize <= RECORD_BYTES_MAX)
                .ok_or_else(|| ImageError::Inconsistent("a record is too long".to_owned()))?;
            out.write_all(&length.to_le_bytes())?;
            out.write_all(&bytes)?;
            count += 1;
            Ok(())
        };
        put(Record::Cluster(self.cluster))?;
        self.nodes
            .values()
            .try_for_each(|n| put(Record::Node(n.clone())))?;
        self.disks
            .values()
            .try_for_each(|d| put(Record::Disk(d.clone())))?;
        self.pools
            .values()
            .try_for_each(|p| put(Record::Pool(p.clone())))?;
        self.volumes
            .values()
            .try_for_each(|v| put(Record::Volume(v.clone())))?;
        self.garbage
            .iter()
            .try_for_each(|((d, v), e)| put(Record::Garbage(*d, *v, *e)))?;
        self.answers
            .iter()
            .try_for_each(|a| put(Record::Answer(a.clone())))?;
        self.attacher_labels
            .iter()
            .try_for_each(|(n, l)| put(Record::AttacherLabels(n.clone(), l.clone())))?;
        self.snapshots
            .iter()
            .try_for_each(|s| put(Record::Snapshot(s.clone())))?;
        self.flatten_policies
            .iter()
            .try_for_each(|(p, f)| put(Record::FlattenPolicy(*p, *f)))?;
        self.schedules
            .iter()
            .try_for_each(|s| put(Record::Schedule(s.clone())))?;
        self.services
            .iter()
            .try_for_each(|(p, s)| put(Record::Service(*p, *s)))?;
        let bytes = bincode::serde::encode_to_vec(Record::End(count), config())?;
        out.write_all(&(bytes.len() as u32).to_le_bytes())?;
        out.write_all(&bytes)?;
        Ok(())
    }

    /// Reads an image up to its end record, and checks it.
    pub fn read_image(input: &mut impl Read) -> Result<Self, ImageError> {
        let mut word = [0_u8; 4];
        input.read_exact(&mut word)?;
        let version = u32::from_le_bytes(word);
        if !(image_v1::IMAGE_VERSION..=IMAGE_VERSION).contains(&version) {
            return Err(ImageError::Version(version));
        }
        let inconsistent = |what: &str| ImageError::Inconsistent(what.to_owned());
        let mut state = Self::default();
        let mut buffer = Vec::new();
        for count in 0_u64.. {
            input.read_exact(&mut word)?;
            let length = u32::from_le_bytes(word) as usize;
            if length > RECORD_BYTES_MAX {
                return Err(inconsistent("a record is too long"));
            }
            buffer.resize(length, 0);
            input.read_exact(&mut buffer)?;
            let (record, used) = decode(version, &buffer)?;
            if used != length {
                return Err(inconsistent("a record has trailing bytes"));
            }
            match record {
                Record::End(expected) if expected == count => break,
                Record::End(_) => return Err(inconsistent("records are missing")),
                record => state.restore(record),
            }
        }
        check_state(&state).map_err(ImageError::Inconsistent)?;
        Ok(state)
    }

    fn restore(&mut self, record: Record) {
        match record {
            Record::Cluster(id) => self.cluster = id,
            Record::Node(node) => {
                self.node_by_name.insert(node.name.clone(), node.id);
                self.nodes.insert(node.id, node);
            }
            Record::Disk(disk) => {
                self.node_disks.insert((disk.node, disk.id));
                self.disks.insert(disk.id, disk);
            }
            Record::Pool(pool) => {
                self.pool_by_name.insert(pool.name.clone(), pool.id);
                self.pools.insert(pool.id, pool);
            }
            Record::Volume(volume) => {
                if let Some(twice) = self.volumes.insert(volume.id, volume.clone()) {
                    self.index(&twice, false);
                }
                self.index(&volume, true);
            }
            Record::Garbage(disk, volume, epoch) => {
                self.garbage.insert((disk, volume), epoch);
            }
            Record::Answer(answer) => self.answers.insert(answer),
            Record::AttacherLabels(node, labels) => {
                self.attacher_labels.insert(node, labels);
            }
            Record::Snapshot(snapshot) => self.snapshots.insert(Arc::unwrap_or_clone(snapshot)),
            Record::FlattenPolicy(pool, policy) => {
                self.flatten_policies.insert(pool, policy);
            }
            Record::Schedule(schedule) => self.schedules.insert(schedule),
            Record::Service(part, service) => {
                self.services.insert(part, service);
            }
            Record::End(_) => {}
        }
    }
}
