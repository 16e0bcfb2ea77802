//! Opening a disk, the log: walking the chain of batches, where it ends, and whether more should be there.
//!
//! Invariants: those of `recovery`; and
//! - A batch is only taken as the continuation of the one before it (sequence and chain).
//! - After an unreadable window, only what is needed is read again: one bad sector costs its batch.

use std::collections::BTreeSet;

use ashlar_proto::ids::{BLOCK_SIZE, BLOCKS_PER_PAGE, PAGE_SIZE};
use bytes::Bytes;

use super::Store;
use super::recovery::{Found, Recovery, WINDOW};
use crate::format::{Record, RecordKind, decode_batch, peek_header_blocks};

impl Store {
    /// The bytes of the log at `at`, if the window has them; else asks for them.
    fn window(&self, r: &mut Recovery, at: u64, length: u64) -> Option<Bytes> {
        let start = at.checked_sub(r.window_at).map(|s| s as usize);
        if let Some(start) = start
            && let Some(end) = start.checked_add(length as usize)
            && end <= r.window.len()
        {
            return Some(r.window.slice(start..end));
        }
        let failed = r.window.is_empty() && r.window_at == at && r.short_window;
        if failed {
            return None;
        }
        // After a read that failed, only what is needed.
        r.short_window = r.window.is_empty() && r.window_at == at && r.window_at != u64::MAX;
        let room = self.geometry.log_bytes - at;
        let bytes = if r.short_window {
            length
        } else {
            WINDOW.max(length)
        }
        .min(room);
        r.window_at = at;
        r.window = Bytes::new();
        r.reads
            .push_back((at, self.geometry.log_offset + at, bytes));
        None
    }

    /// One step of the walk; true: go on (perhaps after a read).
    pub(super) fn walk_log(&mut self, r: &mut Recovery) -> bool {
        match self.batch_here(r) {
            Walk::Wait => true,
            Walk::Found(found) => {
                r.at = found.offset + found.header.total_bytes();
                r.wrapped = false;
                r.highest_sequence = r.highest_sequence.max(found.header.sequence);
                r.found.push(*found);
                true
            }
            Walk::Nothing if !r.wrapped && r.at != 0 => {
                r.at = 0;
                r.wrapped = true;
                true
            }
            Walk::Nothing => false,
        }
    }

    fn batch_here(&mut self, r: &mut Recovery) -> Walk {
        let (at, block) = (r.at, BLOCK_SIZE as u64);
        let log_bytes = self.geometry.log_bytes;
        if at + block > log_bytes {
            return Walk::Nothing;
        }
        let Some(first) = self.window(r, at, block) else {
            return Walk::after(r);
        };
        let Some(blocks) = peek_header_blocks(&first, self.salt) else {
            return Walk::Nothing;
        };
        let header_bytes = blocks as u64 * block;
        if at + header_bytes > log_bytes {
            return Walk::Nothing;
        }
        let Some(bytes) = self.window(r, at, header_bytes) else {
            return Walk::after(r);
        };
        let Ok((header, records)) = decode_batch(&bytes, self.salt) else {
            return Walk::Nothing;
        };
        let (last, chain) = r.found.last().map_or(
            (self.superblock.tail_sequence, self.superblock.tail_chain),
            |f| (f.header.sequence, f.header.chain),
        );
        let continues = header.previous_sequence == last
            && header.previous_chain == chain
            && header.sequence > last
            && at + header.total_bytes() <= log_bytes;
        if !continues {
            return Walk::Nothing;
        }
        let data_blocks = u64::from(header.data_blocks);
        let mut bad = BTreeSet::new();
        if data_blocks > 0 {
            match self.window(r, at, header.total_bytes()) {
                Some(bytes) => check_data(&records, &bytes[header_bytes as usize..], &mut bad),
                None if !r.reads.is_empty() => return Walk::Wait,
                None => bad.extend(0..header.data_blocks),
            }
        }
        Walk::Found(Box::new(Found {
            header,
            records,
            offset: at,
            bad,
        }))
    }

    pub(super) fn on_scan(&mut self, r: &mut Recovery, bytes: Option<&[u8]>) {
        let last = r
            .found
            .last()
            .map_or(self.superblock.tail_sequence, |f| f.header.sequence);
        let bytes = bytes.unwrap_or_default();
        for at in (0..bytes.len()).step_by(BLOCK_SIZE) {
            let rest = &bytes[at..];
            if peek_header_blocks(rest, self.salt).is_none() {
                continue;
            }
            if let Ok((h, _)) = decode_batch(rest, self.salt) {
                r.highest_sequence = r.highest_sequence.max(h.sequence);
                r.evidence |= h.sequence > last && h.durable_sequence > last;
            }
        }
    }

    /// Above the marker the log ends at the first batch whose data does not verify.
    pub(super) fn cut_log(&mut self, r: &mut Recovery) {
        let last = r
            .found
            .last()
            .map_or(self.superblock.tail_sequence, |f| f.header.sequence);
        let marker = self.marker_of(r);
        r.damage |= r.evidence || marker > last;
        let cut = r
            .found
            .iter()
            .position(|f| f.header.sequence > marker && !f.bad.is_empty());
        if let Some(cut) = cut {
            r.found.truncate(cut);
        }
    }

    pub(super) fn marker_of(&self, r: &Recovery) -> u64 {
        let claims = r.found.iter().map(|f| f.header.durable_sequence);
        claims.fold(self.superblock.durable_sequence, u64::max)
    }

    /// Fresh pages above the marker are verified.
    pub(super) fn read_fresh_pages(&mut self, r: &mut Recovery) {
        let marker = self.marker_of(r);
        for (i, f) in r
            .found
            .iter()
            .enumerate()
            .filter(|(_, f)| f.header.sequence > marker)
        {
            for (n, record) in f.records.iter().enumerate() {
                if let RecordKind::Redirect { physical, .. } = record.kind {
                    if physical >= self.superblock.page_high_water {
                        r.bad_pages.insert(i);
                        continue;
                    }
                    let id = (i as u64) << 32 | n as u64;
                    r.reads
                        .push_back((id, self.page_offset(physical), PAGE_SIZE as u64));
                }
            }
        }
    }

    pub(super) fn on_fresh_page(&mut self, r: &mut Recovery, id: u64, bytes: Option<&[u8]>) {
        let (batch, record) = ((id >> 32) as usize, (id & 0xffff_ffff) as usize);
        let Some(record) = r.found.get(batch).and_then(|f| f.records.get(record)) else {
            return;
        };
        let RecordKind::Redirect { checksums, .. } = &record.kind else {
            return;
        };
        let good = bytes.is_some_and(|b| {
            b.len() == PAGE_SIZE
                && (0..BLOCKS_PER_PAGE as usize).all(|i| {
                    crc32c::crc32c(&b[i * BLOCK_SIZE..(i + 1) * BLOCK_SIZE]) == checksums[i]
                })
        });
        if !good {
            r.bad_pages.insert(batch);
        }
    }
}

enum Walk {
    Found(Box<Found>),
    /// No batch continues the chain here.
    Nothing,
    /// Bytes are on their way.
    Wait,
}

impl Walk {
    fn after(r: &Recovery) -> Self {
        if r.reads.is_empty() {
            Self::Nothing
        } else {
            Self::Wait
        }
    }
}

/// Finds the data blocks of a batch that do not match.
fn check_data(records: &[Record], data: &[u8], bad: &mut BTreeSet<u32>) {
    let mut index = 0u32;
    for record in records {
        let RecordKind::Data(checksums) = &record.kind else {
            continue;
        };
        for expected in checksums {
            let at = index as usize * BLOCK_SIZE;
            let good = data
                .get(at..at + BLOCK_SIZE)
                .is_some_and(|d| crc32c::crc32c(d) == *expected);
            if !good {
                bad.insert(index);
            }
            index += 1;
        }
    }
}
