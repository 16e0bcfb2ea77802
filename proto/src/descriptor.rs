//! The volume descriptor: what every replica of a volume remembers of it, so that metadata can be
//! rebuilt from the disks alone, and the configuration of a holder is durable before it is relied on.
//!
//! Invariants:
//! - The byte form is fixed little-endian (docs/protocol.md), independent of struct layout.
//! - `epoch` is the configuration's epoch: a replica never replaces a descriptor by one of a lower epoch.

use crate::ids::{DiskId, Epoch, ReplicaState, SnapshotNumber, VolumeId};
use crate::layers::LayerList;

/// One replica of a group as Raft knew it at the descriptor's epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplicaDescriptor {
    /// The disk that holds the replica.
    pub disk: DiskId,
    /// Its state.
    pub state: ReplicaState,
    /// It may be linked to the parent's replica on its disk (docs/snapshots.md, C3); the store knows.
    pub inherits: bool,
}

/// The snapshot that a clone was made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parent {
    /// The volume that was cloned.
    pub volume: VolumeId,
    /// Its snapshot; never 0.
    pub number: SnapshotNumber,
}

/// A volume and its configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeDescriptor {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of this configuration.
    pub epoch: Epoch,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// Number that new writes carry.
    pub snapshot: SnapshotNumber,
    /// Which snapshots are live.
    pub layers: LayerList,
    /// Where blocks come from that the volume never wrote (C1).
    pub parent: Option<Parent>,
    /// Replica groups, in order; chunk `c` belongs to group `c mod groups.len()`.
    pub groups: Vec<Vec<ReplicaDescriptor>>,
    /// Name given by the user, at most 128 bytes of UTF-8.
    pub name: String,
}

/// Version of the byte form. Version 1 had no revision and no settled number, and there were no snapshots; version 2 had
/// no parent.
const FORMAT_VERSION: u8 = 3;
/// Set in a replica's state: it may be linked.
const INHERITS: u8 = 0x80;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 128;
/// Most replica groups of a volume.
pub const MAX_GROUPS: usize = 256;
/// Most replicas of a group, those that are being moved included.
pub const MAX_REPLICAS: usize = 8;
/// Most snapshots named in one descriptor.
pub const MAX_SNAPSHOTS: usize = 4096;

/// Bytes that are not a descriptor: what is wrong with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed volume descriptor: {0}")]
pub struct DescriptorError(pub &'static str);

impl VolumeDescriptor {
    /// Appends the byte form (docs/protocol.md, "Volume descriptor"); it has no checksum of its own, its
    /// container has one.
    ///
    /// # Panics
    /// If a list is longer than its limit, which the constructor of the volume must prevent.
    pub fn encode(&self, out: &mut impl bytes::BufMut) {
        assert!(self.name.len() <= MAX_NAME && self.groups.len() <= MAX_GROUPS);
        assert!(self.layers.live.len() <= MAX_SNAPSHOTS);
        out.put_u8(FORMAT_VERSION);
        out.put_slice(&self.volume.0);
        out.put_u64_le(self.epoch.0);
        out.put_u64_le(self.size_bytes);
        out.put_u8(self.min_replicas);
        out.put_u32_le(self.snapshot.0);
        out.put_u64_le(self.layers.revision);
        out.put_u32_le(self.layers.settled.0);
        out.put_u16_le(self.layers.live.len() as u16);
        for snapshot in &self.layers.live {
            out.put_u32_le(snapshot.0);
        }
        let parent = self.parent.unwrap_or(Parent::NONE);
        out.put_slice(&parent.volume.0);
        out.put_u32_le(parent.number.0);
        out.put_u16_le(self.groups.len() as u16);
        for group in &self.groups {
            assert!(group.len() <= MAX_REPLICAS);
            out.put_u8(group.len() as u8);
            for replica in group {
                out.put_slice(&replica.disk.0);
                let inherits = if replica.inherits { INHERITS } else { 0 };
                out.put_u8(replica.state as u8 | inherits);
            }
        }
        out.put_u8(self.name.len() as u8);
        out.put_slice(self.name.as_bytes());
    }

    /// Reads the byte form; every byte must belong to it.
    ///
    /// # Errors
    /// Truncated or trailing bytes, a list beyond its limit or out of order, an unknown state or version.
    pub fn decode(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let mut reader = Reader(bytes);
        let format = reader.take::<1>()?[0];
        if format == 0 || format > FORMAT_VERSION {
            return Err(DescriptorError("version"));
        }
        let volume = VolumeId(reader.take()?);
        let epoch = Epoch(u64::from_le_bytes(reader.take()?));
        let size_bytes = u64::from_le_bytes(reader.take()?);
        let min_replicas = reader.take::<1>()?[0];
        let snapshot = SnapshotNumber(u32::from_le_bytes(reader.take()?));
        let mut layers = LayerList::default();
        if format > 1 {
            layers.revision = u64::from_le_bytes(reader.take()?);
            layers.settled = SnapshotNumber(u32::from_le_bytes(reader.take()?));
        }
        for _ in 0..reader.count(MAX_SNAPSHOTS)? {
            let number = SnapshotNumber(u32::from_le_bytes(reader.take()?));
            layers.live.push(number);
        }
        layers.check().map_err(|e| DescriptorError(e.0))?;
        let mut parent = None;
        if format > 2 {
            let volume = VolumeId(reader.take()?);
            let number = SnapshotNumber(u32::from_le_bytes(reader.take()?));
            parent = Parent::of(volume, number).ok_or(DescriptorError("parent"))?;
        }
        let count = reader.count(MAX_GROUPS)?;
        let mut groups = Vec::new();
        for _ in 0..count {
            let replicas = usize::from(reader.take::<1>()?[0]);
            if replicas > MAX_REPLICAS {
                return Err(DescriptorError("number of replicas"));
            }
            let mut group = Vec::with_capacity(replicas);
            for _ in 0..replicas {
                let disk = DiskId(reader.take()?);
                let byte = reader.take::<1>()?[0];
                let inherits = format > 2 && byte & INHERITS != 0;
                let state = if inherits { byte & !INHERITS } else { byte };
                let state = ReplicaState::from_u8(state).ok_or(DescriptorError("replica state"))?;
                group.push(ReplicaDescriptor {
                    disk,
                    state,
                    inherits,
                });
            }
            groups.push(group);
        }
        let length = usize::from(reader.take::<1>()?[0]);
        if length > MAX_NAME || reader.0.len() != length {
            return Err(DescriptorError("length of the name"));
        }
        let name = std::str::from_utf8(reader.0)
            .map_err(|_| DescriptorError("name is not UTF-8"))?
            .to_owned();
        Ok(Self {
            volume,
            epoch,
            size_bytes,
            min_replicas,
            snapshot,
            layers,
            parent,
            groups,
            name,
        })
    }
}

impl Parent {
    /// No parent, in the byte forms.
    pub const NONE: Self = Self {
        volume: VolumeId::NIL,
        number: SnapshotNumber(0),
    };

    /// From the fields of a byte form: none if both are 0, an error (`None`) if one is.
    pub fn of(volume: VolumeId, number: SnapshotNumber) -> Option<Option<Self>> {
        match (volume.is_nil(), number.0 == 0) {
            (true, true) => Some(None),
            (false, false) => Some(Some(Self { volume, number })),
            _ => None,
        }
    }
}

/// Takes fixed-size fields off a slice.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], DescriptorError> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(DescriptorError("truncated"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn count(&mut self, limit: usize) -> Result<usize, DescriptorError> {
        let count = usize::from(u16::from_le_bytes(self.take()?));
        if count > limit {
            Err(DescriptorError("length of a list"))
        } else {
            Ok(count)
        }
    }
}
