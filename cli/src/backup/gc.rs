//! Collecting garbage: objects that no backup needs, from deleted backups and from runs that were killed.
//!
//! Invariants:
//! - Nothing is deleted unless every manifest and page could be read: what a damaged one needs is not known.
//! - Nothing is deleted that is younger than the grace period, by the storage's own clock.
//! - No backup is made meanwhile (see [`super::lock`]).

use std::collections::HashSet;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};

use super::codec::Kind;
use super::error::{BackupError, Result};
use super::id::ContentId;
use super::lock::{Lock, Purpose};
use super::manifest::{content_name, parse_content_name};
use super::repository::{Repository, blocking};

/// Objects that are deleted at the same time.
const DELETIONS_IN_FLIGHT: usize = 16;

/// Objects that are younger stay, unless an operator says otherwise.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Younger objects stay.
    pub grace: Duration,
    /// Only say what would be deleted.
    pub dry_run: bool,
    /// Take the locks of others away: their owners are known to be gone.
    pub break_locks: bool,
}

/// What was collected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Collected {
    /// Objects that backups need.
    pub kept_objects: u64,
    /// Their size.
    pub kept_bytes: u64,
    /// Objects that none needs, and that are old enough.
    pub deleted_objects: u64,
    /// Their size.
    pub deleted_bytes: u64,
    /// Objects that none needs, within the grace period.
    pub young_objects: u64,
}

/// Deletes what no backup needs.
///
/// # Errors
/// Somebody works on the repository; a manifest or page cannot be read; or the storage failed. What was not deleted is next time.
pub async fn collect(repository: &Repository, options: Options) -> Result<Collected> {
    let what = "collection of garbage";
    let (storage, codec) = (&repository.storage, &repository.codec);
    let lock = Lock::take(storage, codec, Purpose::Gc, what, options.break_locks).await?;
    let result = sweep(repository, options, &lock).await;
    let released = lock.release().await;
    let collected = result?;
    released?;
    Ok(collected)
}

/// Every page and segment that a backup needs.
async fn needed(repository: &Repository) -> Result<HashSet<ContentId>> {
    let mut needed = HashSet::new();
    let unknown = |name: &str, e: BackupError| {
        if !e.is_damage() {
            return e;
        }
        BackupError::GarbageUnknown {
            name: name.to_owned(),
            reason: e.to_string(),
        }
    };
    for name in repository.manifest_names().await? {
        let manifest = repository
            .manifest(&name)
            .await
            .map_err(|e| unknown(&name, e))?;
        let geometry = manifest.geometry();
        for (index, page) in (0u64..).zip(manifest.page_ids()?) {
            if page.is_nothing() || !needed.insert(page) {
                continue;
            }
            let ids = repository.page(&geometry, index, page).await;
            let ids = ids.map_err(|e| unknown(&content_name(Kind::Page, page), e))?;
            needed.extend(ids);
        }
    }
    Ok(needed)
}

async fn sweep(repository: &Repository, options: Options, lock: &Lock) -> Result<Collected> {
    let storage = &repository.storage;
    let needed = needed(repository).await?;
    let now = lock.storage_time().await?;
    let mut collected = Collected::default();
    let mut garbage = Vec::new();
    for prefix in ["pages/", "data/"] {
        let mut listing = storage.list(prefix);
        while let Some(meta) = listing.try_next().await? {
            let name = meta.location.to_string();
            let Some((_, id)) = parse_content_name(&name) else {
                continue;
            };
            if needed.contains(&id) {
                collected.kept_objects += 1;
                collected.kept_bytes += meta.size;
            } else if (now - meta.last_modified).to_std().unwrap_or_default() < options.grace {
                collected.young_objects += 1;
            } else {
                collected.deleted_objects += 1;
                collected.deleted_bytes += meta.size;
                garbage.push(name);
            }
        }
    }
    if options.dry_run {
        return Ok(collected);
    }
    for part in garbage.chunks(DELETIONS_IN_FLIGHT * 64) {
        lock.check().await?;
        futures::stream::iter(part)
            .map(|name| storage.delete(name))
            .buffer_unordered(DELETIONS_IN_FLIGHT)
            .try_collect::<()>()
            .await?;
    }
    let (storage, grace) = (storage.clone(), options.grace);
    collected.deleted_objects += blocking(move || storage.sweep_unfinished(grace)).await?;
    Ok(collected)
}
