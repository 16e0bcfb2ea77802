//! Updates that remove or replace: trims (R9) and the merge at a rebuild target (R7).
//!
//! Invariants:
//! - A trim never looks at home pages: its tombstone hides what is older, wherever that is.
//! - What a clone inherits comes back where its own becomes absent: there a tombstone is put instead (C5).
//! - The merge decides per block when it is applied: local versions of the rebuild's epoch win by version,
//!   for older ones the source is the truth, also where the version here is higher or the source has nothing.
//! - Records of tombstones stay a bounded share of the log, since they are logged again at write-back.

use ashlar_proto::ids::{BLOCK_SIZE, BlockRange, ChunkIndex, SnapshotNumber, Version, VolumeId};
use ashlar_proto::wire::{self, BlockState, WriteOutcome};
use smallvec::{SmallVec, smallvec};

use super::Store;
use super::api::{StoreCommand, StoreError, StoreReply, StoreRequest};
use super::index::{BlockKey, Overlay, PageKey, Place};
use super::log::{Ack, Answer};
use super::writes::{Stop, range_is_valid};
use crate::format::{ENTRY_BYTES, Record, RecordKind};

/// Share of the log that records of tombstones may fill (they are re-logged): one part in so many.
const TOMBSTONE_LOG_SHARE: u64 = 16;

impl Store {
    pub(super) fn trim(
        &mut self,
        tag: u64,
        volume: VolumeId,
        trim: &wire::Trim,
        client: bool,
        out: &mut Vec<StoreCommand>,
    ) -> Stop {
        if !range_is_valid(trim.range) || trim.version.is_zero() {
            return Stop::Refuse(StoreError::Invalid("range or version"));
        }
        let Some(replica) = self.index.replica(volume) else {
            return Stop::Refuse(StoreError::UnknownVolume);
        };
        let (slot, number) = (replica.slot, replica.header.replica);
        if client && trim.version <= replica.watermark {
            Self::reply(out, tag, Ok(StoreReply::Written(WriteOutcome::Superseded)));
            return Stop::Done;
        }
        if let Err(stop) = self.admit_tombstone(1) {
            return stop;
        }
        if let Err(stop) = self.admit_log(ENTRY_BYTES, 0) {
            return stop;
        }
        self.append_trim(slot, number, trim.range, trim.snapshot, trim.version);
        let answer = Answer::Written(WriteOutcome::Applied);
        self.log.open.acks.push(Ack {
            tag,
            answer,
            durable: trim.durable,
        });
        Stop::Done
    }

    pub(super) fn admit_tombstone(&self, count: u64) -> Result<(), Stop> {
        // A new range can split an old one: each counts twice.
        let bytes = (self.index.tombstones + 2 * count) * 2 * ENTRY_BYTES as u64;
        let fits = bytes <= self.log.bytes / TOMBSTONE_LOG_SHARE;
        if fits {
            Ok(())
        } else {
            Err(Stop::Refuse(StoreError::NoSpace))
        }
    }

    fn append_trim(
        &mut self,
        slot: u32,
        number: u64,
        range: BlockRange,
        layer: SnapshotNumber,
        version: Version,
    ) {
        self.log.open.fresh = true;
        self.last_write = self.now;
        let batch = self.log.next_sequence;
        self.index.apply_trim(slot, range, layer, version, batch);
        let kind = RecordKind::Trim;
        self.log.push(Record {
            replica: number,
            range,
            layer,
            version,
            kind,
        });
    }

    pub(super) fn pull(
        &mut self,
        tag: u64,
        request: &StoreRequest,
        first_time: bool,
        out: &mut Vec<StoreCommand>,
    ) -> Stop {
        let StoreRequest::PullApply {
            volume,
            rebuild_epoch,
            chunk,
            blocks,
        } = request
        else {
            return Stop::Refuse(StoreError::Invalid("not a pull"));
        };
        if first_time && let Err(error) = check_pull(blocks) {
            return Stop::Refuse(error);
        }
        let Some(replica) = self.index.replica(*volume) else {
            return Stop::Refuse(StoreError::UnknownVolume);
        };
        let (slot, number) = (replica.slot, replica.header.replica);
        // Nothing must not become what is inherited: there a tombstone says so.
        let lowest = replica.base.map(|_| replica.canonical(0));
        let mut need: SmallVec<[u32; 8]> = SmallVec::new();
        let mut apply: SmallVec<[(usize, Option<Version>); 32]> = SmallVec::new();
        let mut behind = 0;
        for (i, b) in blocks.iter().enumerate() {
            let key = BlockKey {
                slot,
                chunk: chunk.0,
                layer: b.snapshot.0,
                block: b.block,
            };
            match self.resolve_in_class(key) {
                Err(sectors) => need.push(sectors),
                Ok(local) => {
                    behind = behind.max(local.batch);
                    // What is rotten at the source and sound here stays.
                    let sound = local.state == BlockState::Data && !local.unversioned;
                    if b.state == BlockState::Bad && sound && local.version == b.version {
                        continue;
                    }
                    let own = local.version.epoch >= *rebuild_epoch && !local.unversioned;
                    let differs =
                        local.unversioned || (local.state, local.version) != (b.state, b.version);
                    let hides = b.state == BlockState::Absent && Some(b.snapshot.0) == lowest;
                    if hides && local.state == BlockState::Tombstone {
                        continue;
                    }
                    let hides = hides.then(|| local.version.max(Version::new(0, 1)));
                    if (own && b.version > local.version) || (!own && differs) {
                        apply.push((i, hides));
                    }
                }
            }
        }
        if !need.is_empty() {
            return Stop::Sectors(need);
        }
        let reply = StoreReply::Pulled {
            applied: apply.len() as u32,
        };
        let ack = Ack {
            tag,
            answer: Answer::Other(Box::new(reply)),
            durable: false,
        };
        if apply.is_empty() {
            self.ack_after(behind, ack, out);
            return Stop::Done;
        }
        let chosen = apply
            .iter()
            .map(|(i, hides)| (&blocks[*i], hides.is_some()));
        let stale = chosen
            .clone()
            .map(|(b, _)| self.stale_layers(slot, block_range(*chunk, b.block), b.snapshot))
            .collect::<Vec<_>>();
        let erasures = stale.iter().map(|layers| layers.len()).sum();
        if let Err(stop) = self.admit_pull(slot, chunk.0, chosen, erasures) {
            return stop;
        }
        for ((i, hides), layers) in apply.into_iter().zip(stale) {
            for layer in layers {
                let range = block_range(*chunk, blocks[i].block);
                self.append_erase(slot, number, range, layer, |_| true);
            }
            self.append_pulled(slot, number, *chunk, &blocks[i]);
            if let Some(version) = hides {
                let range = block_range(*chunk, blocks[i].block);
                self.append_trim(slot, number, range, blocks[i].snapshot, version);
            }
        }
        self.log.open.acks.push(ack);
        Stop::Done
    }

    fn admit_pull<'a>(
        &self,
        slot: u32,
        chunk: u32,
        blocks: impl Iterator<Item = (&'a super::api::PullBlock, bool)>,
        erasures: usize,
    ) -> Result<(), Stop> {
        let (mut data, mut records, mut trims) = (0, erasures, 0);
        let mut pages: SmallVec<[PageKey; 16]> = SmallVec::new();
        for (b, hides) in blocks {
            records += 2;
            match b.state {
                BlockState::Data | BlockState::Bad => {
                    data += u32::from(b.state == BlockState::Data);
                    let key = BlockKey {
                        slot,
                        chunk,
                        layer: b.snapshot.0,
                        block: b.block,
                    }
                    .page();
                    if self.index.needs_reservation(key) {
                        pages.push(key);
                    }
                }
                BlockState::Tombstone => trims += 1,
                BlockState::Absent => trims += u64::from(hides),
            }
        }
        pages.sort_unstable();
        pages.dedup();
        if !self.allocator.can_reserve(pages.len() as u32) {
            return Err(Stop::Refuse(StoreError::NoSpace));
        }
        // Data can split a range of tombstones as well.
        self.admit_tombstone(trims + u64::from(data))?;
        self.admit_log(records * (ENTRY_BYTES + 4), data)
    }

    fn append_pulled(
        &mut self,
        slot: u32,
        number: u64,
        chunk: ChunkIndex,
        b: &super::api::PullBlock,
    ) {
        self.log.open.fresh = true;
        self.last_write = self.now;
        let range = block_range(chunk, b.block);
        let key = BlockKey {
            slot,
            chunk: chunk.0,
            layer: b.snapshot.0,
            block: b.block,
        };
        let batch = self.log.next_sequence;
        let (layer, version) = (b.snapshot, b.version);
        if b.state == BlockState::Data {
            let place = Place::Log(self.log.open.data_blocks);
            let entry = Overlay {
                batch,
                version,
                checksum: b.checksum,
                place,
            };
            self.index.apply_data(key, entry, &mut self.allocator);
            self.log.push_block(&[&b.data]);
            self.stats.log_blocks += 1;
            let kind = RecordKind::Data(smallvec![b.checksum]);
            self.log.push(Record {
                replica: number,
                range,
                layer,
                version,
                kind,
            });
            return;
        }
        if b.state == BlockState::Bad {
            let entry = Overlay {
                batch,
                version,
                checksum: 0,
                place: Place::Bad,
            };
            self.index.apply_data(key, entry, &mut self.allocator);
            self.log.push(Record {
                replica: number,
                range,
                layer,
                version,
                kind: RecordKind::Bad,
            });
            return;
        }
        // The source is the truth, also where the version here is higher: first nothing, then its tombstone.
        self.index.apply_erase(key, batch);
        let kind = RecordKind::Erase;
        self.log.push(Record {
            replica: number,
            range,
            layer,
            version: Version::ZERO,
            kind,
        });
        if b.state == BlockState::Tombstone {
            self.append_trim(slot, number, range, layer, version);
        }
    }
}

fn block_range(chunk: ChunkIndex, first: u16) -> BlockRange {
    BlockRange {
        chunk,
        first,
        count: 1,
    }
}

fn check_pull(blocks: &[super::api::PullBlock]) -> Result<(), StoreError> {
    let data = blocks
        .iter()
        .filter(|b| b.state == BlockState::Data)
        .count();
    if blocks.len() > wire::MAX_ENTRIES || data > wire::MAX_DATA_BLOCKS as usize {
        return Err(StoreError::Invalid("too many blocks"));
    }
    for b in blocks {
        let bytes = if b.state == BlockState::Data {
            BLOCK_SIZE
        } else {
            0
        };
        let versioned = b.version.is_zero() == (b.state == BlockState::Absent);
        if u32::from(b.block) >= ashlar_proto::ids::BLOCKS_PER_CHUNK
            || b.data.len() != bytes
            || !versioned
        {
            return Err(StoreError::Invalid("block of a pull"));
        }
        if b.state == BlockState::Data && crc32c::crc32c(&b.data) != b.checksum {
            return Err(StoreError::Checksum);
        }
    }
    Ok(())
}
