//! Making a backup.
//!
//! Invariants:
//! - The manifest is put after every page and segment that it names is stored, and after the lock was found to be still
//!   ours; if the lock turns out to be lost right after, the manifest is taken back.
//! - What was stored by a run that was killed is found by its name and not sent again.
//! - Segments that are not to be read are those of the base, or zeros without one.

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use uuid::Uuid;

use super::codec::{Compression, Kind};
use super::error::{BackupError, Result};
use super::id::ContentId;
use super::lock::{Lock, Purpose};
use super::manifest::{FORMAT, Geometry, Manifest, Origin};
use super::repository::{Repository, Stored, blocking, now_unix_ms};
use super::segments::SegmentSet;
use super::{Progress, in_flight};

/// What a backup is read from: a snapshot, which does not change.
#[async_trait::async_trait]
pub trait Source: Send + Sync {
    /// Bytes of the volume; both numbers are multiples of 4096.
    async fn read(&self, offset: u64, length: u32) -> std::io::Result<Bytes>;
}

/// A backup to be made.
#[derive(Debug)]
pub struct Plan {
    /// Of what.
    pub origin: Origin,
    /// Its size.
    pub size_bytes: u64,
    /// The backup to which `changed` refers; of the same volume, and complete.
    pub base: Option<Manifest>,
    /// What must be read: what changed since the base, or, without one, what is not zeros.
    pub read: Reading,
    /// The schedule that makes it.
    pub schedule: Option<String>,
    /// How new objects are packed.
    pub compression: Compression,
}

impl Plan {
    /// Whether the source is not needed.
    pub fn reads_nothing(&self) -> bool {
        match &self.read {
            Reading::All => self.size_bytes == 0,
            Reading::Only(segments) => segments.bytes() == 0,
        }
    }
}

/// What must be read of a volume.
#[derive(Debug)]
pub enum Reading {
    /// All of it.
    All,
    /// These segments.
    Only(SegmentSet),
}

/// Makes a backup.
///
/// # Errors
/// The storage or the volume failed, the repository is locked, or the lock was lost. Nothing is listed then, and the same call
/// again sends only what is still missing.
pub async fn backup(
    repository: &Repository,
    source: &dyn Source,
    plan: Plan,
    progress: &dyn Progress,
) -> Result<Manifest> {
    let geometry = Geometry {
        size_bytes: plan.size_bytes,
        segment_bytes: repository.description().segment_bytes,
    };
    geometry.check().map_err(BackupError::Mismatch)?;
    if let Some(base) = &plan.base
        && (base.origin.volume_id != plan.origin.volume_id || base.size_bytes > plan.size_bytes)
    {
        return Err(BackupError::Mismatch(format!(
            "backup {} is no base for this one: it is of another volume, or of a larger one",
            base.backup_id
        )));
    }
    let what = format!("backup of volume {}", plan.origin.volume_name);
    let lock = take_lock(repository, Purpose::Backup, &what).await?;
    let result = Writer::new(repository, source, geometry, &plan, progress)
        .run(&lock)
        .await;
    // A lock that stays becomes stale; the backup's outcome matters more.
    let released = lock.release().await;
    let manifest = result?;
    if let Err(e) = released {
        tracing::warn!(
            "{e}: a collection of garbage is refused until the lock left behind is stale"
        );
    }
    Ok(manifest)
}

async fn take_lock(repository: &Repository, purpose: Purpose, what: &str) -> Result<Lock> {
    Lock::take(&repository.storage, &repository.codec, purpose, what, false).await
}

/// Deletes a backup's manifest; what it alone needed is garbage from then on.
///
/// # Errors
/// The storage failed, or garbage is being collected.
pub async fn delete(repository: &Repository, manifest_name: &str) -> Result<()> {
    let lock = take_lock(repository, Purpose::Delete, "deletion of a backup").await?;
    let result = repository.storage.delete(manifest_name).await;
    let released = lock.release().await;
    result.and(released)
}

struct Writer<'a> {
    repository: &'a Repository,
    source: &'a dyn Source,
    geometry: Geometry,
    plan: &'a Plan,
    progress: &'a dyn Progress,
    read_bytes: u64,
    sent_bytes: u64,
    sent_objects: u64,
}

impl<'a> Writer<'a> {
    fn new(
        repository: &'a Repository,
        source: &'a dyn Source,
        geometry: Geometry,
        plan: &'a Plan,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            repository,
            source,
            geometry,
            plan,
            progress,
            read_bytes: 0,
            sent_bytes: 0,
            sent_objects: 0,
        }
    }

    async fn run(mut self, lock: &Lock) -> Result<Manifest> {
        let began_unix_ms = now_unix_ms();
        let to_read = self.to_read();
        self.progress.begin(to_read.bytes());
        let base = self.base_pages()?;
        let mut pages = Vec::with_capacity(self.geometry.pages() as usize);
        for page in 0..self.geometry.pages() {
            let base = base.get(page as usize).copied();
            let id = self
                .page(page, base.unwrap_or(ContentId::NOTHING), &to_read)
                .await?;
            pages.push(if id.is_nothing() {
                String::new()
            } else {
                id.to_string()
            });
        }
        let manifest = Manifest {
            format: FORMAT,
            backup_id: Uuid::now_v7(),
            origin: self.plan.origin.clone(),
            schedule: self.plan.schedule.clone(),
            size_bytes: self.geometry.size_bytes,
            segment_bytes: self.geometry.segment_bytes,
            base: self.plan.base.as_ref().map(|b| b.backup_id),
            began_unix_ms,
            finished_unix_ms: now_unix_ms(),
            compression: self.plan.compression,
            read_bytes: self.read_bytes,
            sent_bytes: self.sent_bytes,
            sent_objects: self.sent_objects,
            pages,
        };
        self.publish(&manifest, lock).await?;
        Ok(manifest)
    }

    /// The segments to read.
    fn to_read(&self) -> SegmentSet {
        let mut set = match &self.plan.read {
            Reading::All => SegmentSet::all(self.geometry),
            Reading::Only(set) => set.clone(),
        };
        if let Some(base) = &self.plan.base {
            // If the volume grew, the base's last segment may have been shorter. What was written behind it is among
            // what changed.
            if self.geometry.size_bytes > base.size_bytes {
                set.add(base.size_bytes - 1, 1);
            }
        }
        set
    }

    fn base_pages(&self) -> Result<Vec<ContentId>> {
        match &self.plan.base {
            Some(base) if base.segment_bytes == self.geometry.segment_bytes => base.page_ids(),
            Some(_) => Err(BackupError::Mismatch(
                "the base has segments of another size".into(),
            )),
            None => Ok(Vec::new()),
        }
    }

    /// Stores a page and those of its segments that are to be read.
    async fn page(
        &mut self,
        page: u64,
        base: ContentId,
        to_read: &SegmentSet,
    ) -> Result<ContentId> {
        let range = self.geometry.segments_of(page);
        let whole = self.base_has_whole(page);
        let mut touched = to_read.within(range.clone()).peekable();
        if touched.peek().is_none() && (base.is_nothing() || whole) {
            return Ok(base);
        }
        let mut ids = self.base_ids(page, base).await?;
        let (this, before) = (&*self, &ids);
        let mut stored = futures::stream::iter(touched)
            .map(async |segment| {
                let old = before.get((segment - range.start) as usize).copied();
                let stored = this
                    .segment(segment, old.unwrap_or(ContentId::NOTHING))
                    .await?;
                Ok::<_, BackupError>((segment, stored))
            })
            .buffer_unordered(in_flight(self.geometry.segment_bytes));
        let mut news = Vec::new();
        let (mut read_bytes, mut sent_bytes, mut sent_objects) = (0, 0, 0);
        while let Some((segment, stored)) = stored.try_next().await? {
            let length = u64::from(this.geometry.length(segment));
            read_bytes += length;
            sent_bytes += stored.sent_bytes;
            sent_objects += u64::from(stored.sent_bytes > 0);
            this.progress.step(length, stored.sent_bytes);
            news.push(((segment - range.start) as usize, stored.id));
        }
        drop(stored);
        self.read_bytes += read_bytes;
        self.sent_bytes += sent_bytes;
        self.sent_objects += sent_objects;
        for (index, id) in news {
            ids[index] = id;
        }
        let stored = self
            .repository
            .store_page(&ids, self.plan.compression)
            .await?;
        self.sent_bytes += stored.sent_bytes;
        self.sent_objects += u64::from(stored.sent_bytes > 0);
        Ok(stored.id)
    }

    /// Whether the base has this page with all the segments that it has now.
    fn base_has_whole(&self, page: u64) -> bool {
        self.plan.base.as_ref().is_some_and(|base| {
            base.geometry().segments_of(page) == self.geometry.segments_of(page)
        })
    }

    /// The references of the base's page, with zeros for segments that the volume did not have then.
    async fn base_ids(&self, page: u64, base: ContentId) -> Result<Vec<ContentId>> {
        let range = self.geometry.segments_of(page);
        let mut ids = match &self.plan.base {
            Some(manifest) if !base.is_nothing() => {
                self.repository
                    .page(&manifest.geometry(), page, base)
                    .await?
            }
            _ => Vec::new(),
        };
        ids.resize((range.end - range.start) as usize, ContentId::NOTHING);
        Ok(ids)
    }

    /// Reads a segment and stores it, if it is not what it was.
    async fn segment(&self, segment: u64, old: ContentId) -> Result<Stored> {
        let (offset, length) = (self.geometry.offset(segment), self.geometry.length(segment));
        let failed = |source| BackupError::Volume {
            doing: format!("read {length} bytes at {offset} of the snapshot"),
            source,
        };
        let plain = self.source.read(offset, length).await.map_err(failed)?;
        if plain.len() != length as usize {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let (codec, to_hash) = (self.repository.codec.clone(), plain.clone());
        let id = blocking(move || {
            if is_zeros(&to_hash) {
                return ContentId::NOTHING;
            }
            codec.id(Kind::Segment, &to_hash)
        })
        .await?;
        if id.is_nothing() || id == old {
            return Ok(Stored { id, sent_bytes: 0 });
        }
        self.repository
            .store(Kind::Segment, id, plain, self.plan.compression)
            .await
    }

    async fn publish(&self, manifest: &Manifest, lock: &Lock) -> Result<()> {
        let name = manifest.object_name();
        let text = manifest.to_bytes()?;
        let object =
            self.repository
                .codec
                .encode(Kind::Manifest, &name, &text, Compression::Zstd)?;
        lock.check().await?;
        if !self.repository.storage.put_new(&name, object).await? {
            return Err(BackupError::Mismatch(format!("{name} exists already")));
        }
        // Had it been lost before the put, garbage may have been collected that this backup needs.
        if let Err(e) = lock.check().await {
            self.repository.storage.delete(&name).await?;
            return Err(e);
        }
        Ok(())
    }
}

/// Whether there is nothing but zeros.
pub(super) fn is_zeros(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}
