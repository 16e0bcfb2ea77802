//! Replay: the accepted batches take effect in memory, in order.
//!
//! Invariants:
//! - Replay uses the same `apply_*` as live requests and does not look at home pages.
//! - A page that any accepted record names is in use, also when the record is superseded: it is given
//!   back when the record is freed.
//! - Records of replicas that were dropped are ignored, but their batches stay until write-back.

use std::collections::BTreeSet;

use super::Store;
use super::index::{BlockKey, Overlay, Place};
use super::log::BatchInfo;
use super::recovery::{Found, Recovery};
use crate::format::{Record, RecordKind};

impl Store {
    pub(super) fn replay_log(&mut self, r: &mut Recovery) {
        let mut named: BTreeSet<u32> = BTreeSet::new();
        let mut at = self.superblock.tail_offset;
        self.log.head = at;
        self.log.last_chain = self.superblock.tail_chain;
        for found in std::mem::take(&mut r.found) {
            let skipped = if found.offset == at {
                0
            } else {
                self.geometry.log_bytes - at
            };
            let total = found.header.total_bytes();
            let mut data_index = 0;
            for record in &found.records {
                self.replay_record(r, &found, record, data_index, &mut named);
                data_index += record.data_blocks();
            }
            at = found.offset + total;
            self.log.head = at;
            self.log.used += skipped + total;
            self.log.last_chain = found.header.chain;
            self.log.batches.push_back(BatchInfo {
                sequence: found.header.sequence,
                offset: found.offset,
                used: skipped + total,
                header_blocks: found.header.header_blocks,
                data_blocks: found.header.data_blocks,
                chain: found.header.chain,
                records: found.records,
            });
        }
        let fixed: BTreeSet<u32> = r.to_fix().collect();
        for (page, generation) in r.owned.iter().enumerate() {
            let page = page as u32;
            if *generation == 0 && !named.contains(&page) && !fixed.contains(&page) {
                self.allocator.release(page);
            }
        }
        r.keep_named(&named);
        r.owned = Vec::new();
        for replica in self.index.replicas.iter_mut().flatten() {
            replica.find_garbage();
        }
        self.merge.wake();
    }

    fn replay_record(
        &mut self,
        r: &mut Recovery,
        found: &Found,
        record: &Record,
        data_index: u32,
        named: &mut BTreeSet<u32>,
    ) {
        let batch = found.header.sequence;
        if let RecordKind::Redirect { physical, .. } = record.kind
            && physical < self.superblock.page_high_water
        {
            named.insert(physical);
        }
        let Some(&slot) = self.index.by_number.get(&record.replica) else {
            return;
        };
        let (chunk, layer) = (record.range.chunk.0, record.layer.0);
        let key = |block| BlockKey {
            slot,
            chunk,
            layer,
            block,
        };
        match &record.kind {
            RecordKind::Data(checksums) => {
                for (i, checksum) in checksums.iter().enumerate() {
                    let index = data_index + i as u32;
                    let bad = found.bad.contains(&index);
                    r.bad_blocks += u64::from(bad);
                    self.stats.checksum_errors += u64::from(bad);
                    let entry = Overlay {
                        batch,
                        version: record.version,
                        checksum: *checksum,
                        place: if bad { Place::Bad } else { Place::Log(index) },
                    };
                    let key = key(record.range.first + i as u16);
                    self.index.apply_data(key, entry, &mut self.allocator);
                }
            }
            RecordKind::Redirect {
                physical,
                checksums,
            } => {
                let (page, origin) = (key(record.range.first).page(), (batch, record.version));
                self.index
                    .apply_redirect(page, origin, *physical, checksums, &mut self.allocator);
            }
            RecordKind::Trim => {
                self.index
                    .apply_trim(slot, record.range, record.layer, record.version, batch);
            }
            RecordKind::Erase => {
                for block in record.range.blocks() {
                    self.index.apply_erase(key(block), batch);
                }
            }
            RecordKind::Bad | RecordKind::BadUnversioned => {
                let place = match record.kind {
                    RecordKind::Bad => Place::Bad,
                    _ => Place::BadUnversioned,
                };
                let entry = Overlay {
                    batch,
                    version: record.version,
                    checksum: 0,
                    place,
                };
                for block in record.range.blocks() {
                    self.index
                        .apply_data(key(block), entry, &mut self.allocator);
                }
            }
            RecordKind::Watermark {
                forget_below,
                highest,
            } => {
                if let Some(replica) = self.index.by_slot_mut(slot) {
                    replica.watermark = replica.watermark.max(record.version);
                    replica.forget_below = *forget_below;
                    replica.highest = replica.highest.max(*highest);
                    replica.watermark_batch = batch;
                }
            }
        }
    }
}
