//! Log batches: a header of whole 4 KiB blocks with all records, then the data of its Data records.
//!
//! Invariants:
//! - A batch names its predecessor by sequence and header checksum: remains of an earlier lap or of a
//!   discarded end are not taken for its continuation. It follows its predecessor at once, or lies at
//!   the log's start when that did not fit.
//! - `durable_sequence` is a claim about earlier batches that was true when the header was built.
//! - A record means "this was accepted": replay applies records in order, without comparing with homes.

use ashlar_proto::ids::{
    BLOCK_SIZE, BLOCKS_PER_CHUNK, BLOCKS_PER_PAGE, BlockRange, ChunkIndex, SnapshotNumber, Version,
};
use ashlar_proto::wire::Checksums;

use super::upgrade::{FORMAT_VERSION, check_version};
use super::{FormatError, checksum_with_hole, put, u16_at, u32_at, u64_at};

/// Fixed bytes of a batch header before its records.
pub const LOG_HEADER_BYTES: usize = 64;
/// Bytes of a record without its kind's additions.
pub const ENTRY_BYTES: usize = 40;
/// Most 4 KiB blocks of one batch's header.
const HEADER_BLOCKS_MAX: usize = 1024;
const MAGIC: u32 = u32::from_le_bytes(*b"ALOG");
const CHECKSUM_AT: usize = 8;

/// What a record says.
#[derive(Clone, PartialEq, Debug)]
pub enum RecordKind {
    /// Blocks whose data follows in the batch.
    Data(Checksums),
    /// A whole page whose data was written to a fresh physical page.
    Redirect {
        /// The physical page.
        physical: u32,
        /// 16 checksums.
        checksums: [u32; BLOCKS_PER_PAGE as usize],
    },
    /// A tombstone over the range, where nothing newer is.
    Trim,
    /// The blocks are absent, whatever was there (R7).
    Erase,
    /// The blocks had data of this version, and nobody has them any more (R7: the source's were rotten).
    Bad,
    /// The blocks are rotten; the version is an upper bound.
    BadUnversioned,
    /// Per replica: version is the watermark.
    Watermark {
        /// Tombstones at or below may be forgotten.
        forget_below: Version,
        /// Highest version ever applied.
        highest: Version,
    },
}

/// One record of a batch.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Number of the replica.
    pub replica: u64,
    /// Where (first and count 0 and 1 in a watermark).
    pub range: BlockRange,
    /// The layer.
    pub layer: SnapshotNumber,
    /// The version.
    pub version: Version,
    /// What it says.
    pub kind: RecordKind,
}

impl Record {
    /// Its bytes in a header.
    pub fn encoded_bytes(&self) -> usize {
        ENTRY_BYTES
            + match &self.kind {
                RecordKind::Data(checksums) => 4 * checksums.len(),
                RecordKind::Redirect { .. } => 4 + 4 * BLOCKS_PER_PAGE as usize,
                RecordKind::Trim
                | RecordKind::Erase
                | RecordKind::Bad
                | RecordKind::BadUnversioned => 0,
                RecordKind::Watermark { .. } => 32,
            }
    }

    /// Blocks of data that follow in the batch.
    pub fn data_blocks(&self) -> u32 {
        if matches!(self.kind, RecordKind::Data(_)) {
            u32::from(self.range.count)
        } else {
            0
        }
    }
}

/// The fixed part of a batch header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHeader {
    /// This batch.
    pub sequence: u64,
    /// The batch before.
    pub previous_sequence: u64,
    /// The checksum of its header.
    pub previous_chain: u32,
    /// Batches up to this one are durable.
    pub durable_sequence: u64,
    /// 4 KiB blocks of the header.
    pub header_blocks: u32,
    /// 4 KiB blocks of data.
    pub data_blocks: u32,
    /// This header's checksum.
    pub chain: u32,
}

impl BatchHeader {
    /// Bytes of the whole batch.
    pub fn total_bytes(&self) -> u64 {
        u64::from(self.header_blocks + self.data_blocks) * BLOCK_SIZE as u64
    }
}

/// 4 KiB blocks that the header of records of so many bytes needs.
pub fn header_blocks_for(record_bytes: usize) -> usize {
    (LOG_HEADER_BYTES + record_bytes).div_ceil(BLOCK_SIZE)
}

fn put_record(b: &mut [u8], at: usize, record: &Record) -> usize {
    b[at] = match record.kind {
        RecordKind::Data(_) => 1,
        RecordKind::Redirect { .. } => 2,
        RecordKind::Trim => 3,
        RecordKind::Erase => 4,
        RecordKind::Watermark { .. } => 5,
        RecordKind::Bad => 6,
        RecordKind::BadUnversioned => 7,
    };
    put(b, at + 2, &record.range.count.to_le_bytes());
    put(b, at + 4, &record.range.first.to_le_bytes());
    put(b, at + 8, &record.range.chunk.0.to_le_bytes());
    put(b, at + 12, &record.layer.0.to_le_bytes());
    put(b, at + 16, &record.replica.to_le_bytes());
    put_version(b, at + 24, record.version);
    let mut at = at + ENTRY_BYTES;
    match &record.kind {
        RecordKind::Data(checksums) => {
            for c in checksums {
                put(b, at, &c.to_le_bytes());
                at += 4;
            }
        }
        RecordKind::Redirect {
            physical,
            checksums,
        } => {
            put(b, at, &physical.to_le_bytes());
            at += 4;
            for c in checksums {
                put(b, at, &c.to_le_bytes());
                at += 4;
            }
        }
        RecordKind::Trim | RecordKind::Erase | RecordKind::Bad | RecordKind::BadUnversioned => {}
        RecordKind::Watermark {
            forget_below,
            highest,
        } => {
            put_version(b, at, *forget_below);
            put_version(b, at + 16, *highest);
            at += 32;
        }
    }
    at
}

fn put_version(b: &mut [u8], at: usize, version: Version) {
    put(b, at, &version.epoch.0.to_le_bytes());
    put(b, at + 8, &version.sequence.0.to_le_bytes());
}

fn version_at(b: &[u8], at: usize) -> Version {
    Version::new(u64_at(b, at), u64_at(b, at + 8))
}

/// Writes a batch header into `b` (exactly its 4 KiB blocks, zeroed) and returns its checksum.
pub fn encode_batch(b: &mut [u8], header: &BatchHeader, records: &[Record], salt: u32) -> u32 {
    put(b, 0, &MAGIC.to_le_bytes());
    put(b, 4, &FORMAT_VERSION.to_le_bytes());
    put(b, 6, &(header.header_blocks as u16).to_le_bytes());
    put(b, 12, &(records.len() as u32).to_le_bytes());
    put(b, 16, &header.sequence.to_le_bytes());
    put(b, 24, &header.previous_sequence.to_le_bytes());
    put(b, 32, &header.previous_chain.to_le_bytes());
    put(b, 36, &header.data_blocks.to_le_bytes());
    put(b, 40, &header.durable_sequence.to_le_bytes());
    put(b, 48, &salt.to_le_bytes());
    let mut at = LOG_HEADER_BYTES;
    for record in records {
        at = put_record(b, at, record);
    }
    let chain = checksum_with_hole(b, CHECKSUM_AT);
    put(b, CHECKSUM_AT, &chain.to_le_bytes());
    chain
}

/// How many 4 KiB blocks the header that begins here claims to have, if it looks like one.
pub fn peek_header_blocks(b: &[u8], salt: u32) -> Option<usize> {
    let n = usize::from(u16_at(b.get(..LOG_HEADER_BYTES)?, 6));
    let plausible =
        u32_at(b, 0) == MAGIC && u32_at(b, 48) == salt && (1..=HEADER_BLOCKS_MAX).contains(&n);
    plausible.then_some(n)
}

fn take_record(b: &[u8], at: &mut usize) -> Result<Record, FormatError> {
    let short = FormatError::Bounds("record");
    let e = b.get(*at..*at + ENTRY_BYTES).ok_or(short)?;
    let (count, first) = (u16_at(e, 2), u16_at(e, 4));
    let range = BlockRange::new(ChunkIndex(u32_at(e, 8)), first.into(), count.into())
        .ok_or(FormatError::Bounds("range"))?;
    *at += ENTRY_BYTES;
    let mut words = |n: usize| -> Result<&[u8], FormatError> {
        let bytes = b.get(*at..*at + n).ok_or(short)?;
        *at += n;
        Ok(bytes)
    };
    let kind = match e[0] {
        1 => {
            let bytes = words(4 * usize::from(count))?;
            RecordKind::Data(
                (0..usize::from(count))
                    .map(|i| u32_at(bytes, 4 * i))
                    .collect(),
            )
        }
        2 => {
            if u32::from(count) != BLOCKS_PER_PAGE
                || !u32::from(first).is_multiple_of(BLOCKS_PER_PAGE)
            {
                return Err(FormatError::Bounds("redirect"));
            }
            let bytes = words(4 + 4 * BLOCKS_PER_PAGE as usize)?;
            let mut checksums = [0; BLOCKS_PER_PAGE as usize];
            for (i, c) in checksums.iter_mut().enumerate() {
                *c = u32_at(bytes, 4 + 4 * i);
            }
            RecordKind::Redirect {
                physical: u32_at(bytes, 0),
                checksums,
            }
        }
        3 => RecordKind::Trim,
        4 => RecordKind::Erase,
        5 => {
            let bytes = words(32)?;
            RecordKind::Watermark {
                forget_below: version_at(bytes, 0),
                highest: version_at(bytes, 16),
            }
        }
        6 => RecordKind::Bad,
        7 => RecordKind::BadUnversioned,
        _ => return Err(FormatError::Bounds("record kind")),
    };
    Ok(Record {
        replica: u64_at(e, 16),
        range,
        layer: SnapshotNumber(u32_at(e, 12)),
        version: version_at(e, 24),
        kind,
    })
}

/// Decodes and verifies a whole header (exactly as many blocks as it claims).
pub fn decode_batch(b: &[u8], salt: u32) -> Result<(BatchHeader, Vec<Record>), FormatError> {
    let blocks = peek_header_blocks(b, salt).ok_or(FormatError::Magic)?;
    let b = b
        .get(..blocks * BLOCK_SIZE)
        .ok_or(FormatError::Bounds("length"))?;
    let chain = u32_at(b, CHECKSUM_AT);
    if checksum_with_hole(b, CHECKSUM_AT) != chain {
        return Err(FormatError::Checksum);
    }
    check_version(u16_at(b, 4))?;
    let count = u32_at(b, 12) as usize;
    if count > b.len() / ENTRY_BYTES {
        return Err(FormatError::Bounds("record count"));
    }
    let mut records = Vec::with_capacity(count);
    let mut at = LOG_HEADER_BYTES;
    for _ in 0..count {
        records.push(take_record(b, &mut at)?);
    }
    let data: u32 = records.iter().map(Record::data_blocks).sum();
    let header = BatchHeader {
        sequence: u64_at(b, 16),
        previous_sequence: u64_at(b, 24),
        previous_chain: u32_at(b, 32),
        data_blocks: u32_at(b, 36),
        durable_sequence: u64_at(b, 40),
        header_blocks: blocks as u32,
        chain,
    };
    if header.data_blocks != data || data > BLOCKS_PER_CHUNK * 64 {
        return Err(FormatError::Bounds("data blocks"));
    }
    Ok((header, records))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use smallvec::smallvec;

    fn record(kind: RecordKind, first: u32, count: u32) -> Record {
        Record {
            replica: 1,
            range: BlockRange::new(ChunkIndex(2), first, count).unwrap(),
            layer: SnapshotNumber(3),
            version: Version::new(4, 5),
            kind,
        }
    }

    fn example() -> (BatchHeader, Vec<Record>) {
        let records = vec![
            record(RecordKind::Data(smallvec![6, 7]), 8, 2),
            record(
                RecordKind::Redirect {
                    physical: 9,
                    checksums: [10; 16],
                },
                16,
                16,
            ),
            record(RecordKind::Trim, 0, 1024),
            record(RecordKind::Erase, 5, 1),
            record(RecordKind::Bad, 6, 1),
            record(RecordKind::BadUnversioned, 6, 1),
            record(
                RecordKind::Watermark {
                    forget_below: Version::new(1, 2),
                    highest: Version::new(3, 4),
                },
                0,
                1,
            ),
        ];
        let header = BatchHeader {
            sequence: 11,
            previous_sequence: 10,
            previous_chain: 12,
            durable_sequence: 9,
            header_blocks: 1,
            data_blocks: 2,
            chain: 0,
        };
        (header, records)
    }

    #[test]
    fn golden_bytes_and_round_trip() {
        let (header, records) = example();
        let mut b = vec![0; 4096];
        let chain = encode_batch(&mut b, &header, &records, 13);
        assert_eq!(&b[..8], b"ALOG\x01\x00\x01\x00");
        assert_eq!(&b[12..20], &[7, 0, 0, 0, 11, 0, 0, 0]);
        assert_eq!(
            &b[64..80],
            &[1, 0, 2, 0, 8, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]
        );
        assert_eq!(&b[104..112], &[6, 0, 0, 0, 7, 0, 0, 0]);
        // After two checksums, a redirect (68 more), a tombstone and an erasure.
        let bad = 64 + 4 * ENTRY_BYTES + 8 + 68;
        assert_eq!(&b[bad..bad + 8], &[6, 0, 1, 0, 6, 0, 0, 0]);
        let unversioned = bad + ENTRY_BYTES;
        assert_eq!(&b[unversioned..unversioned + 8], &[7, 0, 1, 0, 6, 0, 0, 0]);
        let (h, r) = decode_batch(&b, 13).unwrap();
        assert_eq!(
            (h.sequence, h.chain, h.total_bytes()),
            (11, chain, 3 * 4096)
        );
        assert_eq!(r, records);
    }

    #[test]
    fn flipped_bits_are_noticed() {
        let (header, records) = example();
        let mut good = vec![0; 4096];
        encode_batch(&mut good, &header, &records, 13);
        for bit in (0..good.len() * 8).step_by(7) {
            good[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_batch(&good, 13).is_err(), "bit {bit}");
            good[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
