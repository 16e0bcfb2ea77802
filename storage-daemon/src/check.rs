//! `storage-daemon check`: proves offline, without writing, that a disk's structures agree with each other.
//!
//! Invariants:
//! - Nothing on the disk is believed: what does not decode is a problem, and what a valid structure says is
//!   compared with what the others say.
//! - A disk that was not closed cleanly may hold what its next opening puts right (docs/formats.md, "Crash cases"):
//!   that is counted as left to recovery, and is no problem. On a disk that was closed cleanly it is one.
//! - Blocks that the store knows to be bad are counted; they are no contradiction.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use ashlar_platform::disk::{DiskFile, OpenOptions};
use ashlar_proto::ids::{BLOCK_SIZE, BLOCKS_PER_PAGE, PAGE_SIZE};
use ashlar_proto::layers::LayerList;
use bytes::Bytes;
use serde::Serialize;

use crate::error::DiskError;
use crate::format::{
    Body, IO_BLOCK, PAGE_SECTOR_BYTES, PageSector, PageState, RecordKind, ReplicaHeader,
    SLOT_BYTES, SUPERBLOCK_OFFSETS, StoredState, Superblock, decode_batch, decode_body,
    peek_header_blocks, salt_of,
};

/// Problems that are listed; all are counted.
const LISTED_MAX: usize = 100;
/// Bytes of page sectors read at a time.
const SECTORS_READ: usize = 1024 * 1024;

/// Something that can be read like a disk.
pub trait Image {
    /// Its bytes.
    fn size(&self) -> u64;
    /// Some of them.
    ///
    /// # Errors
    /// What the device says, or that there are none.
    fn read(&self, offset: u64, length: usize) -> Result<Bytes, String>;
}

impl Image for DiskFile {
    fn size(&self) -> u64 {
        DiskFile::size(self)
    }

    fn read(&self, offset: u64, length: usize) -> Result<Bytes, String> {
        self.read_at(offset, length).map_err(|e| e.to_string())
    }
}

impl Image for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, length: usize) -> Result<Bytes, String> {
        let bytes = self.get(offset as usize..).and_then(|b| b.get(..length));
        let bytes = bytes.ok_or_else(|| "beyond the end".to_owned())?;
        Ok(Bytes::copy_from_slice(bytes))
    }
}

/// What a check found.
#[derive(Debug, Default, Serialize)]
pub struct CheckReport {
    /// Number of contradictions.
    pub problem_count: u64,
    /// The first of them.
    pub problems: Vec<String>,
    /// Closed by a graceful stop.
    pub clean: bool,
    /// Leftovers of a crash that the next opening puts right.
    pub left_to_recovery: u64,
    /// Replicas.
    pub replicas: u64,
    /// Log batches in the chain.
    pub batches: u64,
    /// Pages that are a replica's home.
    pub owned_pages: u64,
    /// Pages that only the log names.
    pub logged_pages: u64,
    /// Pages below the high-water mark that nobody uses.
    pub free_pages: u64,
    /// Pages of layers that are still to be merged.
    pub unmerged_pages: u64,
    /// Blocks with data at home.
    pub data_blocks: u64,
    /// Of these and of the log's, verified.
    pub verified_blocks: u64,
    /// Blocks that the store knows to be bad.
    pub known_bad_blocks: u64,
}

impl CheckReport {
    /// Whether nothing contradicts anything.
    pub fn sound(&self) -> bool {
        self.problem_count == 0
    }

    fn problem(&mut self, text: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < LISTED_MAX {
            self.problems.push(text.into());
        }
    }

    /// Something that a crash leaves, and a clean close does not.
    fn leftover(&mut self, text: impl Into<String>) {
        if self.clean {
            self.problem(text);
        } else {
            self.left_to_recovery += 1;
        }
    }
}

/// A page of a layer of a chunk of a replica.
type Place = (u64, u32, u32, u8);

/// Checks a file or device.
///
/// # Errors
/// If it cannot be opened. What it holds is never an error.
pub fn check(path: &Path, data: bool) -> Result<CheckReport, DiskError> {
    let disk = DiskFile::open(path, OpenOptions::inspect())?;
    Ok(check_image(&disk, data))
}

/// Checks what is on a disk; with `data` also what its pages hold.
pub fn check_image(image: &(impl Image + ?Sized), data: bool) -> CheckReport {
    let mut report = CheckReport::default();
    let Some(superblock) = superblock(image, &mut report) else {
        return report;
    };
    let mut check = Check {
        image,
        salt: salt_of(superblock.disk),
        superblock,
        data,
        report,
        replicas: BTreeMap::new(),
        redirects: BTreeMap::new(),
        logged: BTreeSet::new(),
        homes: Vec::new(),
    };
    check.slots();
    check.log();
    check.sectors();
    check.ownership();
    check.report
}

fn superblock(image: &(impl Image + ?Sized), report: &mut CheckReport) -> Option<Superblock> {
    let mut copies = Vec::new();
    for offset in SUPERBLOCK_OFFSETS {
        let bytes = image.read(offset, IO_BLOCK);
        match bytes.and_then(|b| Superblock::decode(&b).map_err(|e| e.to_string())) {
            Ok(copy) => copies.push(copy),
            Err(error) => report.problem(format!("superblock at {offset}: {error}")),
        }
    }
    copies.sort_by_key(|s| s.generation);
    let newest = copies.pop()?;
    report.clean = newest.clean;
    if copies.iter().any(|s| s.generation != newest.generation) {
        report.leftover("the superblock's copies differ");
    }
    let g = newest.geometry;
    let end = g.pages_offset + u64::from(g.page_count) * PAGE_SIZE as u64;
    let sectors_end = g.sectors_offset + u64::from(g.page_count) * PAGE_SECTOR_BYTES as u64;
    let slots_end = g.slots_offset + u64::from(g.slot_count) * SLOT_BYTES as u64;
    let in_order = slots_end <= g.sectors_offset
        && sectors_end <= g.log_offset
        && g.log_offset + g.log_bytes <= g.pages_offset
        && end <= g.size_bytes
        && g.size_bytes <= image.size();
    if !in_order || newest.page_high_water > g.page_count || newest.tail_offset > g.log_bytes {
        report.problem("the superblock's layout does not fit the disk");
        return None;
    }
    Some(newest)
}

struct Replica {
    header: ReplicaHeader,
    layers: LayerList,
}

struct Check<'a, I: ?Sized> {
    image: &'a I,
    superblock: Superblock,
    salt: u32,
    data: bool,
    report: CheckReport,
    replicas: BTreeMap<u64, Replica>,
    /// Fresh pages that log records name, and for whom.
    redirects: BTreeMap<u32, Place>,
    /// Pages with records in the log.
    logged: BTreeSet<Place>,
    /// Owned pages: place, generation, physical page.
    homes: Vec<(Place, u64, u32)>,
}

impl<I: Image + ?Sized> Check<'_, I> {
    fn slots(&mut self) {
        let mut volumes = BTreeSet::new();
        for slot in 0..self.superblock.geometry.slot_count {
            let offset =
                self.superblock.geometry.slots_offset + u64::from(slot) * SLOT_BYTES as u64;
            let bytes = match self.image.read(offset, SLOT_BYTES) {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.report.problem(format!("slot {slot}: {error}"));
                    continue;
                }
            };
            let copies = ReplicaHeader::COPIES
                .map(|at| ReplicaHeader::decode(&bytes[at as usize..], self.salt));
            for (index, copy) in copies.iter().enumerate() {
                if let Err(error) = copy {
                    self.report
                        .problem(format!("slot {slot}, copy {index}: {error}"));
                }
            }
            let [a, b] = copies.map(Result::ok);
            if let (Some(a), Some(b)) = (&a, &b)
                && a != b
            {
                // A crash while a change was written; the newer one counts, until the next change.
                self.report.left_to_recovery += 1;
            }
            let newest = [a, b].into_iter().flatten().max_by_key(|h| h.generation);
            let Some(header) = newest.filter(|h| h.replica != 0) else {
                continue;
            };
            let layers = self.body(slot, &header, &bytes);
            if header.replica >= self.superblock.next_replica {
                self.report.problem(format!(
                    "slot {slot}: replica number {} was never given",
                    header.replica
                ));
            }
            if !volumes.insert(header.volume) {
                self.report.problem(format!(
                    "slot {slot}: a second replica of {}",
                    header.volume
                ));
            }
            let number = header.replica;
            let replica = Replica { header, layers };
            if self.replicas.insert(number, replica).is_some() {
                self.report.problem(format!(
                    "slot {slot}: replica number {number} is given twice"
                ));
            }
            self.report.replicas += 1;
        }
    }

    /// The layer list of a slot's body, which is checked.
    fn body(&mut self, slot: u32, header: &ReplicaHeader, bytes: &[u8]) -> LayerList {
        if header.body_bytes == 0 {
            return LayerList::default();
        }
        let start = ReplicaHeader::body_offset(header.body_area) as usize;
        let body = bytes
            .get(start..)
            .and_then(|b| b.get(..header.body_bytes as usize))
            .filter(|b| crc32c::crc32c(b) == header.body_checksum)
            .ok_or_else(|| "does not match its checksum".to_owned())
            .and_then(|b| decode_body(b).map_err(|e| e.to_string()));
        match body {
            Ok(Body { descriptor, layers }) => {
                if descriptor.is_some_and(|d| d.volume != header.volume) {
                    self.report.problem(format!(
                        "slot {slot}: the configuration is another volume's"
                    ));
                }
                layers
            }
            Err(error) => {
                self.report
                    .problem(format!("slot {slot}: the configuration: {error}"));
                LayerList::default()
            }
        }
    }

    fn log(&mut self) {
        let s = &self.superblock;
        let (mut at, mut chain, mut last) = (s.tail_offset, s.tail_chain, s.tail_sequence);
        let mut durable = s.durable_sequence;
        let mut suspects: Vec<(u64, String)> = Vec::new();
        // A log cannot hold more batches than blocks.
        for _ in 0..s.geometry.log_bytes / IO_BLOCK as u64 {
            let Some((place, header, records)) = [at, 0].into_iter().find_map(|place| {
                let (header, records) = self.batch(place)?;
                let continues = header.previous_sequence == last
                    && header.previous_chain == chain
                    && header.sequence > last;
                continues.then_some((place, header, records))
            }) else {
                break;
            };
            (chain, last) = (header.chain, header.sequence);
            durable = durable.max(header.durable_sequence);
            at = place + header.total_bytes();
            self.report.batches += 1;
            let data_at = place + u64::from(header.header_blocks) * IO_BLOCK as u64;
            let mut index = 0;
            for record in &records {
                if let RecordKind::Data(checksums) = &record.kind {
                    for sum in checksums {
                        let at = data_at + index * BLOCK_SIZE as u64;
                        let offset = self.superblock.geometry.log_offset + at;
                        if !self.matches(offset, *sum) {
                            let text = format!("a block of log batch {last} does not match");
                            suspects.push((last, text));
                        }
                        index += 1;
                    }
                }
                self.record(last, record, &mut suspects);
            }
        }
        if durable > last {
            self.report.problem(format!(
                "the log ends at batch {last}, but batch {durable} was durable"
            ));
        }
        for (batch, text) in suspects {
            // Above what is known to be durable it is a torn write.
            if batch <= durable {
                self.report.problem(text);
            } else {
                self.report.leftover(text);
            }
        }
    }

    fn batch(
        &self,
        place: u64,
    ) -> Option<(crate::format::BatchHeader, Vec<crate::format::Record>)> {
        let (start, end) = (
            self.superblock.geometry.log_offset,
            self.superblock.geometry.log_bytes,
        );
        if place + IO_BLOCK as u64 > end {
            return None;
        }
        let first = self.image.read(start + place, IO_BLOCK).ok()?;
        let length = peek_header_blocks(&first, self.salt)? * IO_BLOCK;
        if place + length as u64 > end {
            return None;
        }
        let bytes = self.image.read(start + place, length).ok()?;
        let (header, records) = decode_batch(&bytes, self.salt).ok()?;
        (place + header.total_bytes() <= end).then_some((header, records))
    }

    fn record(
        &mut self,
        batch: u64,
        record: &crate::format::Record,
        suspects: &mut Vec<(u64, String)>,
    ) {
        if matches!(record.kind, RecordKind::Watermark { .. }) {
            return;
        }
        let per_page = BLOCKS_PER_PAGE as u16;
        let pages = record.range.first / per_page..=(record.range.end() - 1) / per_page;
        let place = |page: u16| {
            (
                record.replica,
                record.range.chunk.0,
                record.layer.0,
                page as u8,
            )
        };
        self.logged.extend(pages.clone().map(place));
        let RecordKind::Redirect {
            physical,
            checksums,
        } = &record.kind
        else {
            return;
        };
        if *physical >= self.superblock.page_high_water {
            suspects.push((
                batch,
                format!("log batch {batch} names page {physical}, which was never used"),
            ));
            return;
        }
        if self
            .redirects
            .insert(*physical, place(*pages.start()))
            .is_some()
        {
            self.report.problem(format!(
                "page {physical} is named by two records of the log"
            ));
        }
        // An interrupted write-back may have changed it in place already.
        if self.data && self.report.clean {
            for (i, sum) in checksums.iter().enumerate() {
                if !self.matches(self.block_offset(*physical, i), *sum) {
                    suspects.push((batch, format!("block {i} of fresh page {physical}")));
                }
            }
        }
    }

    fn block_offset(&self, physical: u32, index: usize) -> u64 {
        let page = u64::from(physical) * PAGE_SIZE as u64;
        self.superblock.geometry.pages_offset + page + (index * BLOCK_SIZE) as u64
    }

    fn matches(&mut self, offset: u64, checksum: u32) -> bool {
        self.report.verified_blocks += 1;
        let bytes = self.image.read(offset, BLOCK_SIZE);
        bytes.is_ok_and(|b| crc32c::crc32c(&b) == checksum)
    }

    fn sectors(&mut self) {
        let high_water = self.superblock.page_high_water;
        let per_read = (SECTORS_READ / PAGE_SECTOR_BYTES) as u32;
        let mut first = 0;
        while first < high_water {
            let count = per_read.min(high_water - first);
            let offset = self.superblock.geometry.sectors_offset
                + u64::from(first) * PAGE_SECTOR_BYTES as u64;
            // Whole blocks, since devices are read so.
            let length = (count as usize * PAGE_SECTOR_BYTES).next_multiple_of(IO_BLOCK);
            match self.image.read(offset, length) {
                Err(error) => self
                    .report
                    .problem(format!("sectors of pages from {first} on: {error}")),
                Ok(bytes) => {
                    let sectors = bytes.chunks_exact(PAGE_SECTOR_BYTES);
                    for (page, sector) in (first..first + count).zip(sectors) {
                        match PageSector::decode(sector, page, self.salt) {
                            Ok(sector) => self.sector(&sector),
                            Err(error) => self
                                .report
                                .problem(format!("sector of page {page}: {error}")),
                        }
                    }
                }
            }
            first += count;
        }
    }

    fn sector(&mut self, sector: &PageSector) {
        let physical = sector.physical;
        let owner = self.replicas.get(&sector.replica);
        let Some(owner) = owner.filter(|_| sector.state == PageState::Owned) else {
            // Free, or of a replica that was dropped.
            if !self.redirects.contains_key(&physical) {
                self.report.free_pages += 1;
            }
            return;
        };
        let foreign = owner.header.volume != sector.volume;
        let unmerged = owner.layers.canonical(sector.layer) != sector.layer;
        if foreign {
            self.report.problem(format!(
                "page {physical} names another volume than its replica"
            ));
        }
        if sector.is_empty() {
            self.report
                .problem(format!("page {physical} is owned and holds nothing"));
        }
        self.report.unmerged_pages += u64::from(unmerged);
        let place = (sector.replica, sector.chunk.0, sector.layer.0, sector.page);
        self.homes.push((place, sector.generation, physical));
        // What the log holds may be home already, and its sector not yet.
        let skipped = !self.report.clean && self.logged.contains(&place);
        for (i, block) in sector.blocks.iter().enumerate() {
            match block.state {
                StoredState::Absent => {}
                StoredState::Bad | StoredState::BadUnversioned => self.report.known_bad_blocks += 1,
                StoredState::Data => {
                    self.report.data_blocks += 1;
                    if self.data
                        && !skipped
                        && !self.matches(self.block_offset(physical, i), block.checksum)
                    {
                        self.report
                            .problem(format!("block {i} of page {physical} does not match"));
                    }
                }
            }
        }
    }

    /// Every page has one owner, and every place one page.
    fn ownership(&mut self) {
        self.homes.sort_unstable();
        for pair in self.homes.windows(2) {
            if pair[0].0 == pair[1].0 {
                let text = format!("pages {} and {} have one place", pair[0].2, pair[1].2);
                self.report.leftover(text);
            }
        }
        let mut owned = 0;
        for (place, _, physical) in &self.homes {
            owned += 1;
            if let Some(named) = self.redirects.remove(physical)
                && named != *place
            {
                self.report.problem(format!(
                    "page {physical} is a home, and named by the log for another place"
                ));
            }
        }
        self.report.owned_pages = owned;
        self.report.logged_pages = self.redirects.len() as u64;
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} replicas, {} log batches; pages: {} owned ({} to be merged), {} only in the log, {} free",
            self.replicas,
            self.batches,
            self.owned_pages,
            self.unmerged_pages,
            self.logged_pages,
            self.free_pages
        )?;
        writeln!(
            f,
            "{} blocks of data at home; {} blocks verified, {} known bad",
            self.data_blocks, self.verified_blocks, self.known_bad_blocks
        )?;
        if !self.clean {
            writeln!(
                f,
                "not closed cleanly: {} leftovers are left to the next opening",
                self.left_to_recovery
            )?;
        }
        for problem in &self.problems {
            writeln!(f, "PROBLEM: {problem}")?;
        }
        let more = self.problem_count - self.problems.len() as u64;
        if more > 0 {
            writeln!(f, "and {more} more problems")?;
        }
        if self.sound() {
            writeln!(f, "sound")?;
        }
        Ok(())
    }
}
