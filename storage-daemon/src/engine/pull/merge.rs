//! What a rebuild target takes over from its source (R7), block by block.
//!
//! Invariant: versions with an epoch >= e win by version (they reach source and target alike); for
//! anything older the source is the truth, also where the target's version is higher (it was never
//! acknowledged) or the source has nothing.

use ashlar_proto::ids::{BLOCK_SIZE, BlockRange, ChunkIndex, Epoch, SnapshotNumber};
use ashlar_proto::wire::{BlockState, Cursor, Entry, Payload, ReadReply};
use bytes::{Bytes, BytesMut};

use super::listing::Listing;
use crate::store::PullBlock;

/// What to do about one (layer, block).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The target has what it needs.
    Keep,
    /// Read the source's data.
    Fetch,
    /// The source's tombstone.
    Tombstone,
    /// The source has nothing: nor may the target.
    Remove,
    /// The source's data is bad and the target has no copy of it: it is bad here, too.
    Bad,
}

/// Compares one (layer, block) at the source and at the target.
pub fn decide(source: Option<&Entry>, target: Option<&Entry>, rebuild: Epoch) -> Decision {
    let target_is_newer_kind = target.is_some_and(|t| t.version.epoch >= rebuild);
    let Some(source) = source.filter(|s| s.state != BlockState::Absent) else {
        let keep = target.is_none() || target_is_newer_kind;
        return if keep {
            Decision::Keep
        } else {
            Decision::Remove
        };
    };
    if let Some(target) = target {
        let sound = target.state != BlockState::Bad;
        let same_version = target.version == source.version;
        let equal = target.state == source.state && target.checksum == source.checksum;
        let bad = source.state == BlockState::Bad;
        let covered = if target_is_newer_kind {
            target.version > source.version || (same_version && (sound || bad))
        } else {
            same_version && (bad || (sound && equal))
        };
        if covered {
            return Decision::Keep;
        }
    }
    match source.state {
        BlockState::Data => Decision::Fetch,
        BlockState::Tombstone => Decision::Tombstone,
        BlockState::Bad => Decision::Bad,
        BlockState::Absent => Decision::Keep,
    }
}

/// A run of blocks of one layer to read from the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// The layer.
    pub snapshot: SnapshotNumber,
    /// Where.
    pub range: BlockRange,
}

/// What the comparison of two listings yields, bounded by its caller.
#[derive(Default)]
pub struct Plan {
    /// To read, in order.
    pub runs: std::collections::VecDeque<Run>,
    /// To apply without reading.
    pub direct: Vec<PullBlock>,
    /// Blocks whose data the source has lost.
    pub source_bad: u64,
}

impl Plan {
    fn add(
        &mut self,
        chunk: ChunkIndex,
        at: Cursor,
        decision: Decision,
        source: Option<&Entry>,
        run_max: u16,
    ) {
        match decision {
            Decision::Keep => {}
            Decision::Fetch => {
                if let Some(run) = self.runs.back_mut()
                    && run.snapshot == at.snapshot
                    && run.range.end() == at.block
                    && run.range.count < run_max
                {
                    run.range.count += 1;
                } else if let Some(range) = BlockRange::new(chunk, u32::from(at.block), 1) {
                    self.runs.push_back(Run {
                        snapshot: at.snapshot,
                        range,
                    });
                }
            }
            Decision::Tombstone | Decision::Remove | Decision::Bad => {
                let state = match decision {
                    Decision::Remove => BlockState::Absent,
                    Decision::Bad => BlockState::Bad,
                    _ => BlockState::Tombstone,
                };
                self.source_bad += u64::from(decision == Decision::Bad);
                self.direct.push(PullBlock {
                    snapshot: at.snapshot,
                    block: at.block,
                    state,
                    version: source.map(|s| s.version).unwrap_or_default(),
                    checksum: 0,
                    data: Bytes::new(),
                });
            }
        }
    }

    /// Merges two listings of a chunk as far as both are known and the plan stays small.
    pub fn extend(
        &mut self,
        chunk: ChunkIndex,
        source: &mut Listing<Entry>,
        target: &mut Listing<Entry>,
        rebuild: Epoch,
        limits: PlanLimits,
    ) {
        while self.runs.len() < limits.runs && self.direct.len() < limits.direct {
            if source.starved() || target.starved() {
                return;
            }
            let at = match (source.head().map(|e| e.at), target.head().map(|e| e.at)) {
                (None, None) => return,
                (Some(s), Some(t)) => s.min(t),
                (Some(at), None) | (None, Some(at)) => at,
            };
            let s = if source.head().is_some_and(|e| e.at == at) {
                source.take()
            } else {
                None
            };
            let t = if target.head().is_some_and(|e| e.at == at) {
                target.take()
            } else {
                None
            };
            let decision = decide(s.as_ref(), t.as_ref(), rebuild);
            self.add(chunk, at, decision, s.as_ref(), limits.run_blocks);
        }
    }
}

/// Bounds of a [`Plan`].
#[derive(Clone, Copy)]
pub struct PlanLimits {
    /// Runs waiting.
    pub runs: usize,
    /// Blocks to apply directly.
    pub direct: usize,
    /// Blocks of a run.
    pub run_blocks: u16,
}

/// The blocks of a read's answer as the store takes them, and how many were bad at the source.
/// `None` if the answer is not what was asked for.
pub fn blocks_of_reply(run: Run, reply: &ReadReply) -> Option<(Vec<PullBlock>, u64)> {
    if reply.range != run.range || reply.blocks.len() != usize::from(run.range.count) {
        return None;
    }
    let mut data = Slicer {
        payload: &reply.data,
        buffer: 0,
        offset: 0,
    };
    let mut blocks = Vec::with_capacity(reply.blocks.len());
    let mut bad = 0;
    for (index, info) in run.range.blocks().zip(&reply.blocks) {
        let bytes = match info.state {
            BlockState::Data => data.take_block()?,
            BlockState::Bad => {
                bad += 1;
                Bytes::new()
            }
            BlockState::Absent | BlockState::Tombstone => Bytes::new(),
        };
        blocks.push(PullBlock {
            snapshot: run.snapshot,
            block: index,
            state: info.state,
            version: info.version,
            checksum: info.checksum,
            data: bytes,
        });
    }
    Some((blocks, bad))
}

/// Takes whole blocks off a payload; copies only a block that straddles two buffers.
struct Slicer<'a> {
    payload: &'a Payload,
    buffer: usize,
    offset: usize,
}

impl Slicer<'_> {
    fn take_block(&mut self) -> Option<Bytes> {
        let mut joined = BytesMut::new();
        loop {
            let buffer = self.payload.get(self.buffer)?;
            let want = BLOCK_SIZE - joined.len();
            let have = buffer.len() - self.offset;
            if joined.is_empty() && have >= want {
                let block = buffer.slice(self.offset..self.offset + want);
                self.offset += want;
                return Some(block);
            }
            let take = want.min(have);
            joined.extend_from_slice(&buffer[self.offset..self.offset + take]);
            self.offset += take;
            if joined.len() == BLOCK_SIZE {
                return Some(joined.freeze());
            }
            self.buffer += 1;
            self.offset = 0;
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use ashlar_proto::ids::Version;
    use ashlar_proto::wire::BlockInfo;

    use super::*;

    const E: Epoch = Epoch(10);

    fn entry(epoch: u64, sequence: u64, state: BlockState, checksum: u32) -> Entry {
        Entry {
            at: Cursor::default(),
            state,
            version: Version::new(epoch, sequence),
            checksum,
        }
    }

    #[test]
    fn older_than_the_rebuild_the_source_is_the_truth() {
        use BlockState::{Bad, Data, Tombstone};
        let d = |epoch, sequence| entry(epoch, sequence, Data, 7);
        // (source, target) -> decision
        let cases = [
            (Some(d(5, 1)), None, Decision::Fetch),
            (Some(d(5, 1)), Some(d(5, 1)), Decision::Keep),
            (Some(d(5, 1)), Some(entry(5, 1, Data, 8)), Decision::Fetch),
            (Some(d(5, 1)), Some(d(4, 9)), Decision::Fetch),
            (Some(d(5, 1)), Some(d(9, 9)), Decision::Fetch),
            (Some(d(5, 1)), Some(entry(5, 1, Bad, 0)), Decision::Fetch),
            (
                Some(entry(5, 1, Tombstone, 0)),
                Some(d(9, 9)),
                Decision::Tombstone,
            ),
            (
                Some(entry(5, 1, Tombstone, 0)),
                Some(entry(5, 1, Tombstone, 0)),
                Decision::Keep,
            ),
            (None, Some(d(9, 9)), Decision::Remove),
            (None, Some(entry(9, 9, Tombstone, 0)), Decision::Remove),
            (None, None, Decision::Keep),
            (Some(entry(5, 1, Bad, 0)), Some(d(5, 1)), Decision::Keep),
            (Some(entry(5, 1, Bad, 0)), Some(d(4, 1)), Decision::Bad),
            (Some(entry(5, 1, Bad, 0)), None, Decision::Bad),
            (
                Some(entry(5, 1, Bad, 0)),
                Some(entry(5, 1, Bad, 0)),
                Decision::Keep,
            ),
        ];
        for (source, target, expected) in cases {
            assert_eq!(
                decide(source.as_ref(), target.as_ref(), E),
                expected,
                "{source:?} {target:?}"
            );
        }
    }

    #[test]
    fn from_the_rebuild_on_the_higher_version_wins() {
        use BlockState::{Bad, Data, Tombstone};
        let d = |epoch, sequence| entry(epoch, sequence, Data, 7);
        let cases = [
            (Some(d(10, 5)), Some(d(10, 4)), Decision::Fetch),
            (Some(d(10, 4)), Some(d(10, 5)), Decision::Keep),
            (Some(d(10, 4)), Some(d(9, 99)), Decision::Fetch),
            (Some(d(9, 99)), Some(d(10, 1)), Decision::Keep),
            (None, Some(d(10, 1)), Decision::Keep),
            (Some(d(10, 5)), Some(d(10, 5)), Decision::Keep),
            (Some(d(10, 5)), Some(entry(10, 5, Bad, 0)), Decision::Fetch),
            (
                Some(entry(11, 1, Tombstone, 0)),
                Some(d(10, 5)),
                Decision::Tombstone,
            ),
        ];
        for (source, target, expected) in cases {
            assert_eq!(
                decide(source.as_ref(), target.as_ref(), E),
                expected,
                "{source:?} {target:?}"
            );
        }
    }

    #[test]
    fn blocks_are_sliced_out_of_any_split_of_the_payload() {
        let range = BlockRange::new(ChunkIndex(0), 4, 3).unwrap();
        let run = Run {
            snapshot: SnapshotNumber(2),
            range,
        };
        let info = |state| BlockInfo {
            state,
            version: Version::new(1, 1),
            checksum: 3,
        };
        let bytes: Vec<u8> = (0..2 * BLOCK_SIZE).map(|i| (i / 4096 + 1) as u8).collect();
        for split in [0, 100, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE] {
            let reply = ReadReply {
                range,
                blocks: [BlockState::Data, BlockState::Absent, BlockState::Data]
                    .map(info)
                    .into_iter()
                    .collect(),
                data: [
                    Bytes::copy_from_slice(&bytes[..split]),
                    Bytes::copy_from_slice(&bytes[split..]),
                ]
                .into_iter()
                .collect(),
            };
            let (blocks, bad) = blocks_of_reply(run, &reply).unwrap();
            assert_eq!(bad, 0);
            assert_eq!(
                blocks.iter().map(|b| b.block).collect::<Vec<_>>(),
                [4, 5, 6]
            );
            assert!(blocks[0].data.iter().all(|&b| b == 1) && blocks[0].data.len() == BLOCK_SIZE);
            assert!(blocks[1].data.is_empty());
            assert!(blocks[2].data.iter().all(|&b| b == 2) && blocks[2].data.len() == BLOCK_SIZE);
        }
        let short = ReadReply {
            range,
            blocks: [BlockState::Data; 3].map(info).into_iter().collect(),
            data: [Bytes::from(bytes)].into_iter().collect(),
        };
        assert!(blocks_of_reply(run, &short).is_none());
    }
}
