//! A replica slot: what a disk remembers of one volume's replica, apart from its blocks.
//!
//! A slot has 64 KiB: the header's two copies (512 bytes each, in a 4 KiB block each), then two areas
//! for descriptor bodies, used in turn. The header names the area, length and checksum of the body.
//!
//! Invariants:
//! - A header copy is old or new, never torn; both copies are durable before a change is answered, so
//!   when one is rotten the other says the same or something that was never answered.
//! - A body is durable before a header names it: a body that does not match its header is rot.

use ashlar_proto::descriptor::Parent;
use ashlar_proto::ids::{Epoch, Incarnation, SnapshotNumber, VolumeId};

use super::upgrade::{FORMAT_VERSION, check_version};
use super::{
    FormatError, IO_BLOCK, SECTOR, array_at, checksum_with_hole, put, u16_at, u32_at, u64_at,
};

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 64 * 1024;
const MAGIC: u32 = u32::from_le_bytes(*b"ARPL");
const CHECKSUM_AT: usize = 8;

/// The header of a slot.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplicaHeader {
    /// Grows with every write of the slot.
    pub generation: u64,
    /// Unique number of this replica on this disk, never given twice; 0: the slot is free.
    pub replica: u64,
    /// The volume.
    pub volume: VolumeId,
    /// Requests of lower epochs are refused.
    pub fence: Epoch,
    /// R7's e, or 0.
    pub rebuild_epoch: Epoch,
    /// Incarnation in which a holder last confirmed the replica; another one: suspect.
    pub trusted: Incarnation,
    /// Incarnation since which the replica has been sound (see `Superblock::damage_incarnation`).
    pub sound: Incarnation,
    /// Which of the two areas holds the descriptor (0 or 1).
    pub body_area: u8,
    /// Bytes of the descriptor; 0: none.
    pub body_bytes: u32,
    /// crc32c of the descriptor's bytes.
    pub body_checksum: u32,
    /// What it inherits, if it is linked.
    pub link: Option<Link>,
    /// The disk's salt.
    pub salt: u32,
}

/// The tie of a clone's replica to its parent's on the same disk (docs/snapshots.md, C3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// Number of the parent's replica on this disk; lower than that of the replica that has the link.
    pub replica: u64,
    /// The parent's volume and snapshot.
    pub parent: Parent,
    /// The parent's replica was whole, for this snapshot, when the link was made.
    pub whole: bool,
}

impl ReplicaHeader {
    /// Offsets of the header's copies within the slot.
    pub const COPIES: [u64; 2] = [0, IO_BLOCK as u64];

    /// Offset of a body area within the slot.
    pub fn body_offset(area: u8) -> u64 {
        2 * IO_BLOCK as u64 + u64::from(area & 1) * super::BODY_BYTES_MAX as u64
    }

    /// Its 512 bytes.
    pub fn encode(&self) -> [u8; SECTOR] {
        let mut b = [0; SECTOR];
        put(&mut b, 0, &MAGIC.to_le_bytes());
        put(&mut b, 4, &FORMAT_VERSION.to_le_bytes());
        put(&mut b, 12, &self.salt.to_le_bytes());
        put(&mut b, 16, &self.generation.to_le_bytes());
        put(&mut b, 24, &self.replica.to_le_bytes());
        put(&mut b, 32, &self.volume.0);
        put(&mut b, 48, &self.fence.0.to_le_bytes());
        put(&mut b, 56, &self.rebuild_epoch.0.to_le_bytes());
        put(&mut b, 64, &self.trusted.0.to_le_bytes());
        put(&mut b, 72, &self.sound.0.to_le_bytes());
        put(&mut b, 80, &self.body_bytes.to_le_bytes());
        put(&mut b, 84, &self.body_checksum.to_le_bytes());
        b[88] = self.body_area;
        if let Some(link) = &self.link {
            b[89] = u8::from(link.whole);
            put(&mut b, 92, &link.parent.number.0.to_le_bytes());
            put(&mut b, 96, &link.replica.to_le_bytes());
            put(&mut b, 104, &link.parent.volume.0);
        }
        let checksum = checksum_with_hole(&b, CHECKSUM_AT);
        put(&mut b, CHECKSUM_AT, &checksum.to_le_bytes());
        b
    }

    /// From at least 512 bytes.
    pub fn decode(bytes: &[u8], salt: u32) -> Result<Self, FormatError> {
        let b = bytes.get(..SECTOR).ok_or(FormatError::Bounds("length"))?;
        if u32_at(b, 0) != MAGIC {
            return Err(FormatError::Magic);
        }
        if checksum_with_hole(b, CHECKSUM_AT) != u32_at(b, CHECKSUM_AT) {
            return Err(FormatError::Checksum);
        }
        check_version(u16_at(b, 4))?;
        let parent = Parent::of(VolumeId(array_at(b, 104)), SnapshotNumber(u32_at(b, 92)));
        let parent = parent.ok_or(FormatError::Bounds("parent"))?;
        let link = parent.map(|parent| Link {
            replica: u64_at(b, 96),
            parent,
            whole: b[89] != 0,
        });
        let header = Self {
            salt: u32_at(b, 12),
            generation: u64_at(b, 16),
            replica: u64_at(b, 24),
            volume: VolumeId(array_at(b, 32)),
            fence: Epoch(u64_at(b, 48)),
            rebuild_epoch: Epoch(u64_at(b, 56)),
            trusted: Incarnation(u64_at(b, 64)),
            sound: Incarnation(u64_at(b, 72)),
            body_bytes: u32_at(b, 80),
            body_checksum: u32_at(b, 84),
            body_area: b[88],
            link,
        };
        if header.salt != salt {
            return Err(FormatError::Foreign);
        }
        if header.body_area > 1 || header.body_bytes as usize > super::BODY_BYTES_MAX {
            return Err(FormatError::Bounds("body"));
        }
        // So links cannot make a circle.
        if header
            .link
            .is_some_and(|l| l.replica == 0 || l.replica >= header.replica)
        {
            return Err(FormatError::Bounds("link"));
        }
        Ok(header)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn example() -> ReplicaHeader {
        ReplicaHeader {
            generation: 1,
            replica: 2,
            volume: VolumeId([3; 16]),
            fence: Epoch(4),
            rebuild_epoch: Epoch(5),
            trusted: Incarnation(6),
            sound: Incarnation(7),
            body_area: 1,
            body_bytes: 8,
            body_checksum: 9,
            link: None,
            salt: 10,
        }
    }

    #[test]
    fn golden_bytes_and_round_trip() {
        let b = example().encode();
        assert_eq!(&b[..8], b"ARPL\x01\x00\x00\x00");
        assert_eq!(&b[12..20], &[10, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(b[48], 4);
        assert_eq!(b[88], 1);
        assert_eq!(ReplicaHeader::decode(&b, 10).unwrap(), example());
        assert_eq!(ReplicaHeader::decode(&b, 11), Err(FormatError::Foreign));
    }

    #[test]
    fn a_link_has_golden_bytes_and_points_to_an_older_replica() {
        let linked = |replica| ReplicaHeader {
            link: Some(Link {
                replica,
                parent: Parent {
                    volume: VolumeId([11; 16]),
                    number: SnapshotNumber(12),
                },
                whole: true,
            }),
            ..example()
        };
        let b = linked(1).encode();
        assert_eq!(
            (&b[89..104], &b[104..121]),
            (
                &[1, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..],
                &[
                    11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 0
                ][..]
            )
        );
        assert_eq!(ReplicaHeader::decode(&b, 10).unwrap(), linked(1));
        for replica in [0, 2, 3] {
            let b = linked(replica).encode();
            assert_eq!(
                ReplicaHeader::decode(&b, 10),
                Err(FormatError::Bounds("link"))
            );
        }
    }

    #[test]
    fn every_single_bit_flip_is_noticed() {
        let good = example().encode();
        for bit in 0..SECTOR * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(ReplicaHeader::decode(&bad, 10).is_err(), "bit {bit}");
        }
    }
}
