//! Listings of blocks with their versions: for reconciliation (R2) and rebuild (R7).
//!
//! Invariants:
//! - A listing is answered after every record that it may show is on the device.
//! - A part ends at a chunk whose sectors are not cached rather than holding many chunks at once; the
//!   first chunk of a part waits for its sectors, so that each part makes progress.
//! - What a clone's replica inherits was durable everywhere when it was cloned: it is nothing for reconciliation.
//! - Equal digests mean equal (layer, block, version, state), on every release that speaks protocol 1.

use ashlar_proto::ids::{BLOCKS_PER_CHUNK, ChunkIndex, SnapshotNumber, Version, VolumeId};
use ashlar_proto::wire::{
    BlockState, ChunkDigest, ChunkDigestList, Cursor, Entries, Entry, MAX_ENTRIES,
};
use smallvec::SmallVec;

use super::api::{StoreCommand, StoreError, StoreReply, StoreRequest};
use super::index::BlockKey;
use super::log::{Ack, Answer};
use super::{Parked, Store};

/// Chunks that one part of a listing looks at.
const CHUNKS_PER_PART: usize = 64;

/// What a listing found: an answer, or sectors to read first.
pub(super) type Listed = Result<StoreReply, Stop>;

pub(super) enum Stop {
    Refuse(StoreError),
    Sectors(SmallVec<[u32; 8]>),
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 30;
    x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The digest of a chunk's entries, in order.
pub fn digest_of(entries: &[Entry]) -> u64 {
    entries.iter().fold(0x6173_686c_6172_3031, |d, e| {
        let place = u64::from(e.at.snapshot.0) << 32
            | u64::from(e.at.block) << 8
            | u64::from(e.state as u8);
        mix(mix(mix(d ^ place) ^ e.version.epoch.0).wrapping_add(e.version.sequence.0))
    })
}

impl Store {
    pub(super) fn execute_listing(&mut self, p: Parked, out: &mut Vec<StoreCommand>) {
        let listed = match &p.request {
            StoreRequest::Collect { volume, collect } => {
                let (volume, c) = (*volume, *collect);
                let group = (c.group.0, c.group_count);
                self.list_entries(volume, group, Some(c.watermark), c.from, true)
            }
            StoreRequest::Digest { volume, digest } => {
                let from = Cursor {
                    chunk: digest.chunk,
                    ..digest.from
                };
                self.list_entries(*volume, (0, 1), None, from, false)
            }
            StoreRequest::ChunkDigests { volume, digests } => {
                let (volume, d) = (*volume, *digests);
                self.list_digests(volume, (d.group.0, d.group_count), d.from.0)
            }
            StoreRequest::ListBlocks { volume, order } => {
                let (volume, order) = (*volume, *order);
                self.list_blocks(volume, &order)
            }
            _ => Err(Stop::Refuse(StoreError::Invalid("not a listing"))),
        };
        match listed {
            Err(Stop::Refuse(error)) => Self::reply(out, p.tag, Err(error)),
            Err(Stop::Sectors(blocks)) => self.park(p, blocks, out),
            Ok(reply) => {
                let log = &self.log;
                let newest = if log.open.is_empty() {
                    log.last_sequence
                } else {
                    log.next_sequence
                };
                self.close_wanted |= newest == self.log.next_sequence;
                self.ack_after(
                    newest,
                    Ack {
                        tag: p.tag,
                        answer: Answer::Other(Box::new(reply)),
                        durable: false,
                    },
                    out,
                );
            }
        }
    }

    /// Chunks of a group from `from` on that may have something above `above`.
    pub(super) fn chunks_of(
        &self,
        volume: VolumeId,
        group: (u32, u32),
        above: Option<Version>,
        from: u32,
    ) -> Result<(u32, Vec<u32>), Stop> {
        let replica = self
            .index
            .replica(volume)
            .ok_or(Stop::Refuse(StoreError::UnknownVolume))?;
        if replica.base.is_some() && !self.inherits_intact(replica) {
            return Err(Stop::Refuse(StoreError::SnapshotGone));
        }
        if group.1 == 0 || group.0 >= group.1 {
            return Err(Stop::Refuse(StoreError::Invalid("group")));
        }
        let of_group = |i: &u32| *i % group.1 == group.0;
        let own = replica.chunks.range(from..);
        let own = own.filter(|(i, c)| of_group(i) && above.is_none_or(|w| c.highest > w));
        let mut chunks: Vec<u32> = own.map(|(i, _)| *i).take(CHUNKS_PER_PART + 1).collect();
        if above.is_none() && replica.base.is_some() {
            for base in self.index.bases(replica.slot) {
                let parent = self.index.by_slot(base.slot);
                let theirs = parent.into_iter().flat_map(|p| p.chunks.range(from..));
                let theirs = theirs.filter(|(i, c)| of_group(i) && c.has_below(base.number));
                chunks.extend(theirs.map(|(i, _)| *i).take(CHUNKS_PER_PART + 1));
            }
            chunks.sort_unstable();
            chunks.dedup();
            chunks.truncate(CHUNKS_PER_PART + 1);
        }
        Ok((replica.slot, chunks))
    }

    /// Every (canonical layer, block) of a chunk that is not absent, ascending; what is inherited is in the lowest.
    fn chunk_entries(
        &mut self,
        slot: u32,
        chunk: u32,
        inherited: bool,
    ) -> Result<Vec<Entry>, SmallVec<[u32; 8]>> {
        let mut need: SmallVec<[u32; 8]> = SmallVec::new();
        let mut entries = Vec::new();
        let mut layers: SmallVec<[u32; 8]> = SmallVec::new();
        let mut pages = 0;
        if let Some(r) = self.index.by_slot(slot) {
            if inherited && r.base.is_some() {
                pages = self.index.inherited_pages(slot, chunk);
                layers.push(r.canonical(0));
            }
            let own = r.chunks.get(&chunk).map_or(&[][..], |c| &c.layers);
            layers.extend(own.iter().map(|l| r.canonical(l.number)));
            layers.dedup();
        }
        for layer in layers {
            let mut block = 0u16;
            while u32::from(block) < BLOCKS_PER_CHUNK {
                let key = BlockKey {
                    slot,
                    chunk,
                    layer,
                    block,
                };
                let here = pages & (1 << key.page().page) != 0;
                if block.is_multiple_of(16) && !here && self.page_is_vacant(key) {
                    block += 16;
                    continue;
                }
                let found = if inherited {
                    self.resolve_in_class(key)
                } else {
                    self.resolve_own_class(key)
                };
                match found {
                    Err(sectors) => {
                        need.push(sectors);
                        block = (block / 16 + 1) * 16;
                        continue;
                    }
                    Ok(r) if r.state != BlockState::Absent => entries.push(Entry {
                        at: Cursor {
                            chunk: ChunkIndex(chunk),
                            snapshot: SnapshotNumber(layer),
                            block,
                        },
                        state: r.state,
                        version: if r.unversioned {
                            Version::ZERO
                        } else {
                            r.version
                        },
                        checksum: if r.state == BlockState::Data {
                            r.checksum
                        } else {
                            0
                        },
                    }),
                    Ok(_) => {}
                }
                block += 1;
            }
        }
        if need.is_empty() {
            Ok(entries)
        } else {
            Err(need)
        }
    }

    /// Whether no layer that is one with this canonical one can have a block of the page.
    fn page_is_vacant(&self, key: BlockKey) -> bool {
        let Some(replica) = self.index.by_slot(key.slot) else {
            return true;
        };
        let Some(chunk) = replica.chunks.get(&key.chunk) else {
            return true;
        };
        let class = chunk.between(replica.oldest_of_class(key.layer), key.layer);
        class.iter().all(|l| l.is_vacant(key.page().page))
    }

    fn list_entries(
        &mut self,
        volume: VolumeId,
        group: (u32, u32),
        above: Option<Version>,
        from: Cursor,
        many: bool,
    ) -> Listed {
        let (slot, mut chunks) = self.chunks_of(volume, group, above, from.chunk.0)?;
        if !many {
            chunks.retain(|c| *c == from.chunk.0);
        }
        let mut entries: Vec<Entry> = Vec::new();
        for (seen, chunk) in chunks.iter().enumerate() {
            let here = Cursor {
                chunk: ChunkIndex(*chunk),
                ..Cursor::default()
            };
            let stop = |entries, next| {
                Ok(StoreReply::Entries(Entries {
                    entries,
                    next: Some(next),
                }))
            };
            if seen == CHUNKS_PER_PART {
                return stop(entries, here);
            }
            let listed = match self.chunk_entries(slot, *chunk, above.is_none()) {
                Ok(listed) => listed,
                Err(need) if seen == 0 => return Err(Stop::Sectors(need)),
                Err(_) => return stop(entries, here),
            };
            let wanted = listed.into_iter().filter(|e| {
                // A block of unknown version may be above the watermark.
                e.at >= from && above.is_none_or(|w| e.version > w || e.version.is_zero())
            });
            for e in wanted {
                if entries.len() == MAX_ENTRIES {
                    return stop(entries, e.at);
                }
                entries.push(e);
            }
        }
        Ok(StoreReply::Entries(Entries {
            entries,
            next: None,
        }))
    }

    fn list_digests(&mut self, volume: VolumeId, group: (u32, u32), from: u32) -> Listed {
        let (slot, found) = self.chunks_of(volume, group, None, from)?;
        let mut chunks = Vec::new();
        for (seen, chunk) in found.iter().enumerate() {
            let next = Some(ChunkIndex(*chunk));
            if seen == CHUNKS_PER_PART {
                return Ok(StoreReply::ChunkDigests(ChunkDigestList { chunks, next }));
            }
            match self.chunk_entries(slot, *chunk, true) {
                Ok(entries) if entries.is_empty() => {}
                Ok(entries) => chunks.push(ChunkDigest {
                    chunk: ChunkIndex(*chunk),
                    digest: digest_of(&entries),
                }),
                Err(need) if seen == 0 => return Err(Stop::Sectors(need)),
                Err(_) => return Ok(StoreReply::ChunkDigests(ChunkDigestList { chunks, next })),
            }
        }
        Ok(StoreReply::ChunkDigests(ChunkDigestList {
            chunks,
            next: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_fixed_and_sees_every_field() {
        let e = Entry {
            at: Cursor {
                chunk: ChunkIndex(9),
                snapshot: SnapshotNumber(1),
                block: 2,
            },
            state: BlockState::Data,
            version: Version::new(3, 4),
            checksum: 5,
        };
        let base = digest_of(&[e]);
        assert_eq!(
            base,
            digest_of(&[Entry { checksum: 6, ..e }]),
            "checksums follow from versions"
        );
        let at = |snapshot, block| Cursor {
            snapshot: SnapshotNumber(snapshot),
            block,
            ..e.at
        };
        for other in [
            Entry { at: at(2, 2), ..e },
            Entry { at: at(1, 3), ..e },
            Entry {
                state: BlockState::Bad,
                ..e
            },
            Entry {
                version: Version::new(4, 4),
                ..e
            },
            Entry {
                version: Version::new(3, 5),
                ..e
            },
        ] {
            assert_ne!(base, digest_of(&[other]));
        }
        assert_ne!(base, digest_of(&[e, e]));
    }
}
