//! Bytes of a volume descriptor, or of a layer list alone, on disk; their checksum is in the slot's header.
//!
//! Invariant: the bytes say everything that is needed to rebuild the metadata of the volume, and are
//! independent of the wire's encoding of the same descriptor.

use ashlar_proto::descriptor::{Parent, ReplicaDescriptor, VolumeDescriptor};
use ashlar_proto::ids::{DiskId, Epoch, ReplicaState, SnapshotNumber, VolumeId};
use ashlar_proto::layers::LayerList;

use super::FormatError;

/// Most bytes of a descriptor: two areas and two headers fill a slot.
pub const BODY_BYTES_MAX: usize = 28 * 1024;
/// Version 1 had no revision and no settled number of the layer list, and no snapshots; version 2 had no parent.
const BODY_VERSION: u8 = 3;
/// Set in a replica's state: it may be linked to the parent's.
const INHERITS: u8 = 0x80;
const NAME_BYTES_MAX: usize = 128;

/// Instead of a version: a layer list without a descriptor.
const LAYERS_ONLY: u8 = 0xfe;

/// What a slot's area holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Body {
    /// The last configuration, with the same layer list.
    pub descriptor: Option<VolumeDescriptor>,
    /// The newest layer list.
    pub layers: LayerList,
}

/// The bytes of a body; an error if it is larger than a slot's area.
pub fn encode_body(body: &Body) -> Result<Vec<u8>, FormatError> {
    if let Some(d) = &body.descriptor {
        return encode_descriptor(d);
    }
    let mut b = vec![LAYERS_ONLY, 0, 0, 0];
    b.extend_from_slice(&body.layers.revision.to_le_bytes());
    b.extend_from_slice(&body.layers.settled.0.to_le_bytes());
    b.extend_from_slice(&(body.layers.live.len() as u32).to_le_bytes());
    for s in &body.layers.live {
        b.extend_from_slice(&s.0.to_le_bytes());
    }
    if b.len() > BODY_BYTES_MAX {
        Err(FormatError::Bounds("layer list"))
    } else {
        Ok(b)
    }
}

/// A body from its bytes (all of them).
pub fn decode_body(bytes: &[u8]) -> Result<Body, FormatError> {
    if bytes.first() != Some(&LAYERS_ONLY) {
        let descriptor = decode_descriptor(bytes)?;
        return Ok(Body {
            layers: descriptor.layers.clone(),
            descriptor: Some(descriptor),
        });
    }
    let mut r = Reader(bytes);
    r.bytes(4)?;
    let mut layers = LayerList {
        revision: r.u64()?,
        settled: SnapshotNumber(r.u32()?),
        live: Vec::new(),
    };
    let count = r.u32()? as usize;
    if count != r.0.len() / 4 {
        return Err(FormatError::Bounds("counts"));
    }
    for _ in 0..count {
        layers.live.push(SnapshotNumber(r.u32()?));
    }
    if !r.0.is_empty() {
        return Err(FormatError::Bounds("trailing bytes"));
    }
    layers
        .check()
        .map_err(|_| FormatError::Bounds("layer list"))?;
    Ok(Body {
        descriptor: None,
        layers,
    })
}

/// The descriptor's bytes; an error if it is larger than a slot's area.
pub fn encode_descriptor(d: &VolumeDescriptor) -> Result<Vec<u8>, FormatError> {
    let name = d.name.as_bytes();
    if name.len() > NAME_BYTES_MAX {
        return Err(FormatError::Bounds("name"));
    }
    let mut b = Vec::with_capacity(256);
    b.push(BODY_VERSION);
    b.push(d.min_replicas);
    b.extend_from_slice(&(name.len() as u16).to_le_bytes());
    b.extend_from_slice(&d.snapshot.0.to_le_bytes());
    b.extend_from_slice(&d.volume.0);
    b.extend_from_slice(&d.epoch.0.to_le_bytes());
    b.extend_from_slice(&d.size_bytes.to_le_bytes());
    b.extend_from_slice(&(d.layers.live.len() as u32).to_le_bytes());
    b.extend_from_slice(&(d.groups.len() as u32).to_le_bytes());
    b.extend_from_slice(&d.layers.revision.to_le_bytes());
    b.extend_from_slice(&d.layers.settled.0.to_le_bytes());
    let parent = d.parent.unwrap_or(Parent::NONE);
    b.extend_from_slice(&parent.volume.0);
    b.extend_from_slice(&parent.number.0.to_le_bytes());
    b.extend_from_slice(name);
    for s in &d.layers.live {
        b.extend_from_slice(&s.0.to_le_bytes());
    }
    for group in &d.groups {
        b.push(u8::try_from(group.len()).map_err(|_| FormatError::Bounds("group"))?);
        for r in group {
            b.extend_from_slice(&r.disk.0);
            b.push(r.state as u8 | if r.inherits { INHERITS } else { 0 });
        }
    }
    if b.len() > BODY_BYTES_MAX {
        Err(FormatError::Bounds("descriptor"))
    } else {
        Ok(b)
    }
}

/// Takes bytes off the front, or says that there are too few.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, rest) = self
            .0
            .split_at_checked(n)
            .ok_or(FormatError::Bounds("length"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        Ok(super::array_at(self.bytes(N)?, 0))
    }

    fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

/// The descriptor from its bytes (all of them).
pub fn decode_descriptor(bytes: &[u8]) -> Result<VolumeDescriptor, FormatError> {
    let mut r = Reader(bytes);
    let version = r.u8()?;
    if version == 0 || version > BODY_VERSION {
        return Err(FormatError::Version(u16::from(version)));
    }
    let min_replicas = r.u8()?;
    let name_bytes = usize::from(u16::from_le_bytes(r.array()?));
    let snapshot = SnapshotNumber(r.u32()?);
    let volume = VolumeId(r.array()?);
    let epoch = Epoch(r.u64()?);
    let size_bytes = r.u64()?;
    let snapshot_count = r.u32()? as usize;
    let group_count = r.u32()? as usize;
    let mut layers = LayerList::default();
    if version > 1 {
        layers.revision = r.u64()?;
        layers.settled = SnapshotNumber(r.u32()?);
    }
    let mut parent = None;
    if version > 2 {
        let volume = VolumeId(r.array()?);
        let number = SnapshotNumber(r.u32()?);
        parent = Parent::of(volume, number).ok_or(FormatError::Bounds("parent"))?;
    }
    let name = std::str::from_utf8(r.bytes(name_bytes)?)
        .map_err(|_| FormatError::Bounds("name"))?
        .to_owned();
    if snapshot_count * 4 > BODY_BYTES_MAX || group_count > BODY_BYTES_MAX {
        return Err(FormatError::Bounds("counts"));
    }
    for _ in 0..snapshot_count {
        layers.live.push(SnapshotNumber(r.u32()?));
    }
    layers
        .check()
        .map_err(|_| FormatError::Bounds("layer list"))?;
    let mut groups = Vec::with_capacity(group_count.min(1024));
    for _ in 0..group_count {
        let members = usize::from(r.u8()?);
        let mut group = Vec::with_capacity(members);
        for _ in 0..members {
            let disk = DiskId(r.array()?);
            let byte = r.u8()?;
            let inherits = version > 2 && byte & INHERITS != 0;
            let byte = if inherits { byte & !INHERITS } else { byte };
            let state = ReplicaState::from_u8(byte).ok_or(FormatError::Bounds("replica state"))?;
            group.push(ReplicaDescriptor {
                disk,
                state,
                inherits,
            });
        }
        groups.push(group);
    }
    if !r.0.is_empty() {
        return Err(FormatError::Bounds("trailing bytes"));
    }
    Ok(VolumeDescriptor {
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn example() -> VolumeDescriptor {
        VolumeDescriptor {
            volume: VolumeId([1; 16]),
            epoch: Epoch(2),
            size_bytes: 4096,
            min_replicas: 2,
            snapshot: SnapshotNumber(3),
            layers: LayerList {
                revision: 9,
                settled: SnapshotNumber(2),
                live: vec![SnapshotNumber(1)],
            },
            parent: Some(Parent {
                volume: VolumeId([5; 16]),
                number: SnapshotNumber(6),
            }),
            groups: vec![vec![ReplicaDescriptor {
                disk: DiskId([4; 16]),
                state: ReplicaState::InSync,
                inherits: true,
            }]],
            name: "db".to_owned(),
        }
    }

    #[test]
    fn golden_bytes_and_round_trip() {
        let b = encode_descriptor(&example()).unwrap();
        let mut expected = vec![3, 2, 2, 0, 3, 0, 0, 0];
        expected.extend([1; 16]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]);
        expected.extend([1, 0, 0, 0, 1, 0, 0, 0]);
        expected.extend([9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        expected.extend([5; 16]);
        expected.extend([6, 0, 0, 0]);
        expected.extend([b'd', b'b', 1, 0, 0, 0, 1]);
        expected.extend([4; 16]);
        expected.push(0x82);
        assert_eq!(b, expected);
        assert_eq!(decode_descriptor(&b).unwrap(), example());
        // Version 2: no parent.
        expected.drain(60..80);
        expected[0] = 2;
        *expected.last_mut().unwrap() = 2;
        let old = decode_descriptor(&expected).unwrap();
        assert_eq!((old.parent, &old.layers), (None, &example().layers));
        assert!(!old.groups[0][0].inherits);
        // Version 1: no layer list but the live numbers, of which there were none.
        expected.drain(48..60);
        expected[0] = 1;
        expected[40] = 0;
        expected.drain(50..54);
        let old = decode_descriptor(&expected).unwrap();
        assert_eq!(old.layers, LayerList::default());
        assert_eq!(old.name, example().name);
    }

    #[test]
    fn a_list_alone_has_golden_bytes() {
        let body = Body {
            descriptor: None,
            layers: example().layers,
        };
        let b = encode_body(&body).unwrap();
        let mut expected = vec![0xfe, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0];
        expected.extend([1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(b, expected);
        assert_eq!(decode_body(&b).unwrap(), body);
        let with = Body {
            descriptor: Some(example()),
            ..body
        };
        assert_eq!(decode_body(&encode_body(&with).unwrap()).unwrap(), with);
    }

    #[test]
    fn truncated_bytes_are_errors() {
        let layers = example().layers;
        let alone = Body {
            descriptor: None,
            layers,
        };
        for b in [
            encode_descriptor(&example()).unwrap(),
            encode_body(&alone).unwrap(),
        ] {
            for n in 0..b.len() {
                assert!(decode_body(&b[..n]).is_err());
            }
        }
    }
}
