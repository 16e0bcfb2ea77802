//! What a backup is: a manifest, which names pages, which name segments.
//!
//! Invariants:
//! - A backup needs no other backup: its manifest and pages name every segment of the volume that is not zeros.
//! - A page stands for [`PAGE_SEGMENTS`] segments (the last one for fewer), and is 32 bytes for each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::codec::{Compression, Kind};
use super::error::{BackupError, Damage, Result};
use super::id::ContentId;

/// Segments of a page.
pub const PAGE_SEGMENTS: u64 = 4096;
/// The format of manifests that is written.
pub const FORMAT: u32 = 1;
/// Volumes are multiples of it.
pub const BLOCK_BYTES: u64 = 4096;

/// A volume's snapshot, as its backup remembers it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// The cluster.
    pub cluster_id: Uuid,
    /// The volume.
    pub volume_id: Uuid,
    /// Its name then.
    pub volume_name: String,
    /// Its pool then.
    pub pool: String,
    /// Its number of replicas.
    pub replicas: u32,
    /// The snapshot.
    pub snapshot_id: Uuid,
    /// Its name.
    pub snapshot_name: String,
    /// When it was taken.
    pub snapshot_unix_ms: u64,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// A backup.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this text.
    pub format: u32,
    /// The backup.
    pub backup_id: Uuid,
    /// Of what.
    pub origin: Origin,
    /// The schedule that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Size of the volume.
    pub size_bytes: u64,
    /// Size of its segments.
    pub segment_bytes: u32,
    /// The backup whose segments were taken over where the volume had not changed.
    pub base: Option<Uuid>,
    /// When the work began.
    pub began_unix_ms: u64,
    /// When it was done.
    pub finished_unix_ms: u64,
    /// How its new objects were packed.
    pub compression: Compression,
    /// Bytes of the volume that were read.
    pub read_bytes: u64,
    /// Bytes of the objects that were sent: all others were there.
    pub sent_bytes: u64,
    /// Number of those.
    pub sent_objects: u64,
    /// The pages, as hexadecimal digits; empty for zeros.
    pub pages: Vec<String>,
}

impl Manifest {
    /// Its object's name.
    pub fn object_name(&self) -> String {
        object_name(self.origin.volume_id, self.backup_id)
    }

    /// The pages.
    ///
    /// # Errors
    /// A page's name is none.
    pub fn page_ids(&self) -> Result<Vec<ContentId>> {
        let parse = |text: &String| {
            if text.is_empty() {
                return Some(ContentId::NOTHING);
            }
            ContentId::parse(text)
        };
        let ids: Option<Vec<_>> = self.pages.iter().map(parse).collect();
        ids.ok_or_else(|| self.nonsense("a page has no proper name"))
    }

    /// Where its segments lie.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            segment_bytes: self.segment_bytes,
        }
    }

    fn nonsense(&self, what: &str) -> BackupError {
        BackupError::damaged(self.object_name(), Damage::Nonsense(what.to_owned()))
    }

    /// Its text.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|e| BackupError::Worker(e.to_string()))
    }

    /// From its text, which the object of this name held.
    ///
    /// # Errors
    /// It is of a newer format, or makes no sense.
    pub fn parse(name: &str, text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let damaged =
            |e: serde_json::Error| BackupError::damaged(name, Damage::Nonsense(e.to_string()));
        let Format { format } = serde_json::from_slice(text).map_err(damaged)?;
        if format > FORMAT {
            return Err(BackupError::TooNew {
                name: name.to_owned(),
                found: format,
                known: FORMAT,
            });
        }
        let manifest: Self = serde_json::from_slice(text).map_err(damaged)?;
        if manifest.object_name() != name {
            return Err(BackupError::damaged(
                name,
                Damage::Nonsense("it is the manifest of another backup".into()),
            ));
        }
        let geometry = manifest.geometry();
        geometry.check().map_err(|e| manifest.nonsense(&e))?;
        if geometry.pages() != manifest.pages.len() as u64 {
            return Err(manifest.nonsense("its number of pages does not fit its size"));
        }
        Ok(manifest)
    }
}

/// Name of a manifest.
pub fn object_name(volume: Uuid, backup: Uuid) -> String {
    format!("volumes/{volume}/{backup}.manifest")
}

/// The volume and the backup of a manifest's name.
pub fn parse_object_name(name: &str) -> Option<(Uuid, Uuid)> {
    let (volume, file) = name.strip_prefix("volumes/")?.split_once('/')?;
    let backup = file.strip_suffix(".manifest")?;
    let (volume, backup) = (Uuid::parse_str(volume).ok()?, Uuid::parse_str(backup).ok()?);
    (object_name(volume, backup) == name).then_some((volume, backup))
}

/// Name of content's object.
pub fn content_name(kind: Kind, id: ContentId) -> String {
    let text = id.to_string();
    let folder = if kind == Kind::Page { "pages" } else { "data" };
    format!("{folder}/{}/{text}", &text[..2])
}

/// The content that an object's name names.
pub fn parse_content_name(name: &str) -> Option<(Kind, ContentId)> {
    let (folder, rest) = name.split_once('/')?;
    let kind = match folder {
        "pages" => Kind::Page,
        "data" => Kind::Segment,
        _ => return None,
    };
    let id = ContentId::parse(rest.split_once('/')?.1)?;
    (content_name(kind, id) == name).then_some((kind, id))
}

/// How a volume is cut into segments and pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Size of the volume.
    pub size_bytes: u64,
    /// Size of a segment, a power of two.
    pub segment_bytes: u32,
}

impl Geometry {
    /// Sizes of segments that there may be.
    const SEGMENT_BYTES: std::ops::RangeInclusive<u32> = 4096..=Kind::Segment.bytes_max() as u32;
    /// The largest volume: its manifest stays within its limit.
    const SIZE_BYTES_MAX: u64 = 1 << 50;
    /// Most pages of a manifest.
    const PAGES_MAX: u64 = 1 << 17;

    /// Whether there can be such a volume.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> std::result::Result<(), String> {
        let segment = self.segment_bytes;
        if !Self::SEGMENT_BYTES.contains(&segment) || !segment.is_power_of_two() {
            return Err(format!("segments of {segment} bytes are impossible"));
        }
        let size = self.size_bytes;
        if size == 0 || !size.is_multiple_of(BLOCK_BYTES) || size > Self::SIZE_BYTES_MAX {
            return Err(format!("a volume of {size} bytes is impossible"));
        }
        if self.pages() > Self::PAGES_MAX {
            return Err(format!(
                "a volume of {size} bytes is too large for segments of {segment} bytes"
            ));
        }
        Ok(())
    }

    /// Number of segments.
    pub fn segments(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.segment_bytes))
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.segments().div_ceil(PAGE_SEGMENTS)
    }

    /// The segments of a page.
    pub fn segments_of(&self, page: u64) -> std::ops::Range<u64> {
        let first = page * PAGE_SEGMENTS;
        first..(first + PAGE_SEGMENTS).min(self.segments())
    }

    /// Where a segment begins.
    pub fn offset(&self, segment: u64) -> u64 {
        segment * u64::from(self.segment_bytes)
    }

    /// How long it is: the last one may be shorter.
    pub fn length(&self, segment: u64) -> u32 {
        let left = self.size_bytes.saturating_sub(self.offset(segment));
        left.min(u64::from(self.segment_bytes)) as u32
    }
}

/// The text of a page.
pub(super) fn page_to_bytes(ids: &[ContentId]) -> Vec<u8> {
    ids.iter().flat_map(|id| *id.bytes()).collect()
}

/// A page of `count` segments from its text.
pub(super) fn parse_page(name: &str, text: &[u8], count: usize) -> Result<Vec<ContentId>> {
    let (ids, rest) = text.as_chunks::<{ ContentId::BYTES }>();
    if ids.len() != count || !rest.is_empty() {
        return Err(BackupError::damaged(
            name,
            Damage::Nonsense(format!("it has not {count} references")),
        ));
    }
    Ok(ids.iter().map(|id| ContentId::new(*id)).collect())
}
