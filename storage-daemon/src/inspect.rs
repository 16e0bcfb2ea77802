//! `storage-daemon inspect`: decodes a disk offline, without a lock and without writing: superblock,
//! replicas with their descriptors, the log from its tail, a summary of the page sectors.
//!
//! Invariant: nothing on the disk is believed; what does not decode is counted and shown.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use ashlar_platform::disk::{DiskFile, OpenOptions};
use ashlar_proto::ids::{PAGE_SIZE, ReplicaState, SnapshotNumber};
use ashlar_proto::layers::LayerList;
use serde::Serialize;

use crate::error::DiskError;
use crate::format::{
    BODY_BYTES_MAX, BatchHeader, IO_BLOCK, PAGE_SECTOR_BYTES, PageSector, PageState, Record,
    RecordKind, ReplicaHeader, SLOT_BYTES, SUPERBLOCK_OFFSETS, StoredState, Superblock,
    decode_batch, decode_body, peek_header_blocks, salt_of,
};

/// Bytes of page sectors read at a time.
const SECTORS_READ: usize = 1024 * 1024;

/// What is on a disk.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The file or device.
    pub path: PathBuf,
    /// Its size now.
    pub size_bytes: u64,
    /// What is wrong with each copy of the superblock; empty if it is sound.
    pub superblock_errors: Vec<String>,
    /// The newest sound superblock.
    pub superblock: Option<SuperblockReport>,
    /// Replicas in their slots.
    pub replicas: Vec<ReplicaReport>,
    /// Slots that do not decode.
    pub slot_errors: Vec<String>,
    /// The log.
    pub log: Option<LogReport>,
    /// The pages.
    pub pages: Option<PagesReport>,
}

/// The superblock.
#[derive(Debug, Serialize)]
pub struct SuperblockReport {
    /// The cluster; `None` before the first registration.
    pub cluster: Option<String>,
    /// The disk.
    pub disk: String,
    /// Writes of the superblock.
    pub generation: u64,
    /// The store's life.
    pub incarnation: u64,
    /// The life in which damage was found; 0 for none.
    pub damage_incarnation: u64,
    /// Kernel boot of the last open.
    pub boot_id: String,
    /// Closed by a graceful stop.
    pub clean: bool,
    /// Size when it was formatted.
    pub formatted_bytes: u64,
    /// Slots for replicas.
    pub slot_count: u32,
    /// Offset and bytes of the log.
    pub log: (u64, u64),
    /// Offset and number of the pages.
    pub pages: (u64, u32),
    /// Pages at or above were never used.
    pub page_high_water: u32,
}

/// A replica.
#[derive(Debug, Serialize)]
pub struct ReplicaReport {
    /// Slot.
    pub slot: u32,
    /// Number on this disk.
    pub replica: u64,
    /// The volume.
    pub volume: String,
    /// Its name, if a configuration was stored.
    pub name: Option<String>,
    /// Requests of lower epochs are refused.
    pub fence: u64,
    /// R7's e, or 0.
    pub rebuild_epoch: u64,
    /// Confirmed by a holder in another life of the store.
    pub suspect: bool,
    /// Epoch, size and groups of the stored configuration.
    pub configuration: Option<ConfigurationReport>,
    /// The layer list.
    pub layers: LayersReport,
    /// Bytes of the pages of each canonical layer: a snapshot's own, above the last live one the head's.
    pub layer_bytes: BTreeMap<u32, u64>,
    /// What is wrong with the stored configuration.
    pub error: Option<String>,
}

/// A layer list (docs/snapshots.md, S6).
#[derive(Debug, Default, Serialize)]
pub struct LayersReport {
    /// 0: the replica never got one.
    pub revision: u64,
    /// The highest number that was committed or cancelled.
    pub settled: u32,
    /// Snapshots that are not deleted.
    pub live: Vec<u32>,
    #[serde(skip)]
    list: LayerList,
}

/// A stored configuration.
#[derive(Debug, Serialize)]
pub struct ConfigurationReport {
    /// Its epoch.
    pub epoch: u64,
    /// Size of the volume.
    pub size_bytes: u64,
    /// Fewest in-sync replicas.
    pub min_replicas: u8,
    /// Number that new writes carry.
    pub snapshot: u32,
    /// Disks and states, by group.
    pub groups: Vec<Vec<(String, &'static str)>>,
}

/// The log.
#[derive(Debug, Default, Serialize)]
pub struct LogReport {
    /// Where it begins, relative to the log's first byte.
    pub tail_offset: u64,
    /// Batches that follow each other from there.
    pub batches: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Last sequence.
    pub last_sequence: u64,
    /// Batches up to this one are known durable.
    pub durable_sequence: u64,
    /// Records by kind.
    pub records: BTreeMap<&'static str, u64>,
    /// Blocks whose data are in the log.
    pub data_blocks: u64,
    /// Blocks of them that do not match their checksum.
    pub bad_blocks: u64,
}

/// The pages.
#[derive(Debug, Default, Serialize)]
pub struct PagesReport {
    /// Pages that were ever used.
    pub initialised: u64,
    /// Nobody's, among them.
    pub free: u64,
    /// Somebody's.
    pub owned: u64,
    /// Sectors that do not verify.
    pub bad_sectors: u64,
    /// Blocks with data.
    pub data_blocks: u64,
    /// Blocks known to be bad.
    pub bad_blocks: u64,
    /// Pages by volume.
    pub by_volume: BTreeMap<String, u64>,
    /// Pages by replica number and layer.
    #[serde(skip)]
    by_layer: BTreeMap<(u64, SnapshotNumber), u64>,
}

/// Looks into a disk.
///
/// # Errors
/// If it cannot be read. What it holds is never an error.
pub fn inspect(path: &Path) -> Result<Report, DiskError> {
    let disk = DiskFile::open(path, OpenOptions::inspect())?;
    let mut report = Report {
        path: path.to_owned(),
        size_bytes: disk.size(),
        superblock_errors: Vec::new(),
        superblock: None,
        replicas: Vec::new(),
        slot_errors: Vec::new(),
        log: None,
        pages: None,
    };
    let mut best: Option<Superblock> = None;
    for offset in SUPERBLOCK_OFFSETS {
        let decoded = read(&disk, offset, IO_BLOCK)
            .map_err(|e| e.to_string())
            .and_then(|b| Superblock::decode(&b).map_err(|e| e.to_string()));
        match decoded {
            Ok(copy) if best.as_ref().is_none_or(|b| copy.generation > b.generation) => {
                best = Some(copy)
            }
            Ok(_) => {}
            Err(error) => report
                .superblock_errors
                .push(format!("copy at {offset}: {error}")),
        }
    }
    if let Some(superblock) = best {
        report.superblock = Some(describe(&superblock));
        slots(&disk, &superblock, &mut report)?;
        report.log = Some(log(&disk, &superblock)?);
        let pages = pages(&disk, &superblock)?;
        for r in &mut report.replicas {
            let layers = (r.replica, SnapshotNumber(0))..=(r.replica, SnapshotNumber(u32::MAX));
            for ((_, layer), count) in pages.by_layer.range(layers) {
                let layer = r.layers.list.canonical(*layer);
                *r.layer_bytes.entry(layer.0).or_default() += count * PAGE_SIZE as u64;
            }
        }
        report.pages = Some(pages);
    }
    Ok(report)
}

fn read(disk: &DiskFile, offset: u64, length: usize) -> Result<bytes::Bytes, DiskError> {
    disk.read_at(offset, length)
        .map_err(|source| DiskError::Io {
            path: disk.path().to_owned(),
            action: "read",
            source,
        })
}

fn describe(s: &Superblock) -> SuperblockReport {
    SuperblockReport {
        cluster: (!s.cluster.is_nil()).then(|| s.cluster.to_string()),
        disk: s.disk.to_string(),
        generation: s.generation,
        incarnation: s.incarnation.0,
        damage_incarnation: s.damage_incarnation.0,
        boot_id: uuid::Uuid::from_bytes(s.boot_id).to_string(),
        clean: s.clean,
        formatted_bytes: s.geometry.size_bytes,
        slot_count: s.geometry.slot_count,
        log: (s.geometry.log_offset, s.geometry.log_bytes),
        pages: (s.geometry.pages_offset, s.geometry.page_count),
        page_high_water: s.page_high_water,
    }
}

fn slots(disk: &DiskFile, s: &Superblock, report: &mut Report) -> Result<(), DiskError> {
    let salt = salt_of(s.disk);
    for slot in 0..s.geometry.slot_count {
        let offset = s.geometry.slots_offset + u64::from(slot) * SLOT_BYTES as u64;
        let bytes = read(disk, offset, SLOT_BYTES)?;
        if bytes.iter().all(|&b| b == 0) {
            continue;
        }
        let copies =
            ReplicaHeader::COPIES.map(|at| ReplicaHeader::decode(&bytes[at as usize..], salt));
        for (index, copy) in copies.iter().enumerate() {
            if let Err(error) = copy {
                report
                    .slot_errors
                    .push(format!("slot {slot}, copy {index}: {error}"));
            }
        }
        let newest = copies.into_iter().flatten().max_by_key(|h| h.generation);
        if let Some(header) = newest.filter(|h| h.replica != 0) {
            report.replicas.push(replica(s, slot, &header, &bytes));
        }
    }
    Ok(())
}

fn replica(s: &Superblock, slot: u32, header: &ReplicaHeader, bytes: &[u8]) -> ReplicaReport {
    let mut report = ReplicaReport {
        slot,
        replica: header.replica,
        volume: header.volume.to_string(),
        name: None,
        fence: header.fence.0,
        rebuild_epoch: header.rebuild_epoch.0,
        suspect: header.trusted != s.incarnation,
        configuration: None,
        layers: LayersReport::default(),
        layer_bytes: BTreeMap::new(),
        error: None,
    };
    let length = (header.body_bytes as usize).min(BODY_BYTES_MAX);
    if length == 0 {
        return report;
    }
    let start = ReplicaHeader::body_offset(header.body_area) as usize;
    let Some(body) = bytes.get(start..start + length) else {
        report.error = Some("the configuration lies outside its slot".to_owned());
        return report;
    };
    if crc32c::crc32c(body) != header.body_checksum {
        report.error = Some("the configuration does not match its checksum".to_owned());
        return report;
    }
    let body = match decode_body(body) {
        Err(error) => {
            report.error = Some(error.to_string());
            return report;
        }
        Ok(body) => body,
    };
    report.layers = LayersReport {
        revision: body.layers.revision,
        settled: body.layers.settled.0,
        live: body.layers.live.iter().map(|n| n.0).collect(),
        list: body.layers,
    };
    if let Some(descriptor) = body.descriptor {
        let state = |state| match state {
            ReplicaState::Stale => "stale",
            ReplicaState::Rebuilding => "rebuilding",
            ReplicaState::InSync => "in-sync",
        };
        let groups = descriptor.groups.iter();
        report.configuration = Some(ConfigurationReport {
            epoch: descriptor.epoch.0,
            size_bytes: descriptor.size_bytes,
            min_replicas: descriptor.min_replicas,
            snapshot: descriptor.snapshot.0,
            groups: groups
                .map(|g| {
                    g.iter()
                        .map(|r| (r.disk.to_string(), state(r.state)))
                        .collect()
                })
                .collect(),
        });
        report.name = Some(descriptor.name);
    }
    report
}

fn log(disk: &DiskFile, s: &Superblock) -> Result<LogReport, DiskError> {
    let mut report = LogReport {
        tail_offset: s.tail_offset,
        last_sequence: s.tail_sequence,
        durable_sequence: s.durable_sequence,
        ..LogReport::default()
    };
    let (mut offset, mut chain) = (s.tail_offset, s.tail_chain);
    // A log cannot hold more batches than blocks.
    for _ in 0..s.geometry.log_bytes / IO_BLOCK as u64 {
        // A batch follows its predecessor at once, or lies at the log's start.
        let mut found = None;
        for place in [offset, 0] {
            if let Some((header, records)) = batch(disk, s, place)?
                && header.previous_sequence == report.last_sequence
                && header.previous_chain == chain
                && header.sequence > report.last_sequence
            {
                found = Some((place, header, records));
                break;
            }
        }
        let Some((place, header, records)) = found else {
            break;
        };
        count_batch(disk, s, place, &header, &records, &mut report)?;
        offset = place + header.total_bytes();
        chain = header.chain;
    }
    Ok(report)
}

fn batch(
    disk: &DiskFile,
    s: &Superblock,
    place: u64,
) -> Result<Option<(BatchHeader, Vec<Record>)>, DiskError> {
    let (salt, start, end) = (salt_of(s.disk), s.geometry.log_offset, s.geometry.log_bytes);
    if place + IO_BLOCK as u64 > end {
        return Ok(None);
    }
    let mut bytes = read(disk, start + place, IO_BLOCK)?;
    let Some(blocks) = peek_header_blocks(&bytes, salt) else {
        return Ok(None);
    };
    let length = blocks * IO_BLOCK;
    if place + length as u64 > end {
        return Ok(None);
    }
    if blocks > 1 {
        bytes = read(disk, start + place, length)?;
    }
    let decoded = decode_batch(&bytes, salt).ok();
    Ok(decoded.filter(|(header, _)| place + header.total_bytes() <= end))
}

fn count_batch(
    disk: &DiskFile,
    s: &Superblock,
    place: u64,
    header: &BatchHeader,
    records: &[Record],
    report: &mut LogReport,
) -> Result<(), DiskError> {
    report.batches += 1;
    report.bytes += header.total_bytes();
    report.last_sequence = header.sequence;
    report.durable_sequence = report.durable_sequence.max(header.durable_sequence);
    report.data_blocks += u64::from(header.data_blocks);
    let mut at = s.geometry.log_offset + place + u64::from(header.header_blocks) * IO_BLOCK as u64;
    for record in records {
        let kind = match &record.kind {
            RecordKind::Data(_) => "data",
            RecordKind::Redirect { .. } => "redirect",
            RecordKind::Trim => "trim",
            RecordKind::Erase => "erase",
            RecordKind::Bad => "bad",
            RecordKind::BadUnversioned => "bad-unversioned",
            RecordKind::Watermark { .. } => "watermark",
        };
        *report.records.entry(kind).or_default() += 1;
        if let RecordKind::Data(checksums) = &record.kind {
            let data = read(disk, at, checksums.len() * IO_BLOCK)?;
            at += data.len() as u64;
            let blocks = data.chunks(IO_BLOCK).zip(checksums);
            report.bad_blocks += blocks
                .filter(|(block, sum)| crc32c::crc32c(block) != **sum)
                .count() as u64;
        }
    }
    Ok(())
}

fn pages(disk: &DiskFile, s: &Superblock) -> Result<PagesReport, DiskError> {
    let salt = salt_of(s.disk);
    let mut report = PagesReport {
        initialised: u64::from(s.page_high_water),
        ..PagesReport::default()
    };
    let per_read = (SECTORS_READ / PAGE_SECTOR_BYTES) as u32;
    let mut first = 0;
    while first < s.page_high_water {
        let count = per_read.min(s.page_high_water - first);
        let offset = s.geometry.sectors_offset + u64::from(first) * PAGE_SECTOR_BYTES as u64;
        let bytes = read(disk, offset, count as usize * PAGE_SECTOR_BYTES)?;
        for (index, sector) in (first..).zip(bytes.chunks(PAGE_SECTOR_BYTES)) {
            count_sector(PageSector::decode(sector, index, salt).ok(), &mut report);
        }
        first += count;
    }
    Ok(report)
}

fn count_sector(sector: Option<PageSector>, report: &mut PagesReport) {
    match sector {
        None => report.bad_sectors += 1,
        Some(sector) if sector.state == PageState::Free => report.free += 1,
        Some(sector) => {
            report.owned += 1;
            *report
                .by_layer
                .entry((sector.replica, sector.layer))
                .or_default() += 1;
            *report
                .by_volume
                .entry(sector.volume.to_string())
                .or_default() += 1;
            for block in &sector.blocks {
                match block.state {
                    StoredState::Absent => {}
                    StoredState::Data => report.data_blocks += 1,
                    StoredState::Bad | StoredState::BadUnversioned => report.bad_blocks += 1,
                }
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} bytes", self.path.display(), self.size_bytes)?;
        for error in &self.superblock_errors {
            writeln!(f, "  superblock, {error}")?;
        }
        let Some(s) = &self.superblock else {
            return writeln!(f, "  not an Ashlar disk");
        };
        writeln!(f, "  disk         {}", s.disk)?;
        writeln!(
            f,
            "  cluster      {}",
            s.cluster.as_deref().unwrap_or("none yet")
        )?;
        writeln!(
            f,
            "  incarnation  {} (boot {}, {})",
            s.incarnation,
            s.boot_id,
            if s.clean {
                "closed cleanly"
            } else {
                "open, or not closed cleanly"
            }
        )?;
        if s.damage_incarnation != 0 {
            writeln!(
                f,
                "  DAMAGED      since incarnation {}",
                s.damage_incarnation
            )?;
        }
        writeln!(
            f,
            "  superblock   generation {}, formatted with {} bytes",
            s.generation, s.formatted_bytes
        )?;
        writeln!(
            f,
            "  pages        {} of {} KiB, at byte {}",
            s.pages.1,
            PAGE_SIZE / 1024,
            s.pages.0
        )?;
        if let Some(p) = &self.pages {
            writeln!(
                f,
                "    {} used once: {} owned, {} free, {} with a bad sector; {} blocks of data, {} known bad",
                p.initialised, p.owned, p.free, p.bad_sectors, p.data_blocks, p.bad_blocks
            )?;
            for (volume, count) in &p.by_volume {
                writeln!(f, "    volume {volume}: {count} pages")?;
            }
        }
        if let Some(l) = &self.log {
            writeln!(f, "  log          {} bytes at byte {}", s.log.1, s.log.0)?;
            writeln!(
                f,
                "    from {}: {} batches, {} bytes, up to sequence {} ({} known durable)",
                l.tail_offset, l.batches, l.bytes, l.last_sequence, l.durable_sequence
            )?;
            writeln!(
                f,
                "    records {:?}; {} blocks of data, {} bad",
                l.records, l.data_blocks, l.bad_blocks
            )?;
        }
        writeln!(
            f,
            "  replicas     {} of {} slots",
            self.replicas.len(),
            s.slot_count
        )?;
        for error in &self.slot_errors {
            writeln!(f, "    {error}")?;
        }
        for r in &self.replicas {
            writeln!(
                f,
                "    {} {:?}: fence {}, rebuild {}{}",
                r.volume,
                r.name.as_deref().unwrap_or(""),
                r.fence,
                r.rebuild_epoch,
                if r.suspect { ", suspect" } else { "" }
            )?;
            if let Some(c) = &r.configuration {
                writeln!(
                    f,
                    "      epoch {}, {} bytes, at least {} replicas, snapshot {}",
                    c.epoch, c.size_bytes, c.min_replicas, c.snapshot
                )?;
                for (index, group) in c.groups.iter().enumerate() {
                    let members: Vec<String> =
                        group.iter().map(|(d, s)| format!("{d} {s}")).collect();
                    writeln!(f, "      group {index}: {}", members.join(", "))?;
                }
            }
            if r.layers.revision > 0 {
                writeln!(
                    f,
                    "      layer list {}, settled {}, live snapshots {:?}",
                    r.layers.revision, r.layers.settled, r.layers.live
                )?;
            }
            for (layer, bytes) in &r.layer_bytes {
                writeln!(f, "      layer {layer}: {bytes} bytes")?;
            }
            if let Some(error) = &r.error {
                writeln!(f, "      {error}")?;
            }
        }
        Ok(())
    }
}
