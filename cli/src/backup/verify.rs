//! Checking backups without restoring them.
//!
//! Invariants:
//! - A backup is good if its manifest, all its pages and all its segments are there and, with `deep`, have the content that they should have.
//! - Each object is read once, however many backups need it. Memory: 40 bytes per segment that the backups need.

use std::collections::HashMap;

use futures::{StreamExt as _, TryStreamExt as _};

use super::codec::{HEADER_BYTES, Kind};
use super::error::{BackupError, Result};
use super::id::ContentId;
use super::lock::{Lock, Purpose};
use super::manifest::{Manifest, content_name, parse_content_name, parse_object_name};
use super::repository::Repository;
use super::{Progress, in_flight, reader};

/// What is wrong with an object.
#[derive(Debug)]
pub struct Problem {
    /// The object.
    pub object: String,
    /// What is wrong.
    pub error: BackupError,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// Backups that were looked at.
    pub backups: usize,
    /// Objects that they need.
    pub objects: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
    /// Ids of the backups that cannot be restored, or not rightly.
    pub bad_backups: Vec<String>,
}

/// Checks the backups of these manifests (all, if none is named).
///
/// # Errors
/// The storage failed in a way that says nothing of its objects.
pub async fn verify(
    repository: &Repository,
    names: Option<Vec<String>>,
    deep: bool,
    progress: &dyn Progress,
) -> Result<Report> {
    let names = match names {
        Some(names) => names,
        None => repository.manifest_names().await?,
    };
    let mut report = Report {
        backups: names.len(),
        ..Report::default()
    };
    let mut manifests = Vec::new();
    for name in names {
        report.objects += 1;
        match repository.manifest(&name).await {
            Ok(manifest) => manifests.push(manifest),
            Err(e) => {
                let id = parse_object_name(&name).map_or(name.clone(), |(_, b)| b.to_string());
                report.bad_backups.push(id);
                report.note(name, e)?;
            }
        }
    }
    let mut bad: HashMap<ContentId, ()> = HashMap::new();
    let needed = pages(repository, &manifests, &mut report, &mut bad).await?;
    let segments = if deep {
        read_all(repository, &needed, progress).await?
    } else {
        look_for(repository, &needed).await?
    };
    report.objects += needed.len() as u64;
    for (id, error) in segments {
        bad.insert(id, ());
        report.note(content_name(Kind::Segment, id), error)?;
    }
    if !bad.is_empty() {
        for manifest in &manifests {
            if needs_any(repository, manifest, &bad).await {
                report.bad_backups.push(manifest.backup_id.to_string());
            }
        }
    }
    Ok(report)
}

/// Deletes the pages and segments that were found to be damaged, so that the next backup that reads their content stores
/// them again, which heals every backup that needs them. Returns how many.
///
/// # Errors
/// Somebody works on the repository, or the storage failed.
pub async fn delete_damaged(repository: &Repository, report: &Report) -> Result<usize> {
    let damaged: Vec<_> = report
        .problems
        .iter()
        .filter(|p| matches!(p.error, BackupError::Damaged { .. }))
        .filter(|p| parse_content_name(&p.object).is_some())
        .collect();
    if damaged.is_empty() {
        return Ok(0);
    }
    // A backup that is being made may rely on them.
    let (storage, codec) = (&repository.storage, &repository.codec);
    let lock = Lock::take(
        storage,
        codec,
        Purpose::Gc,
        "deletion of damaged objects",
        false,
    )
    .await?;
    for problem in &damaged {
        storage.delete(&problem.object).await?;
    }
    lock.release().await?;
    Ok(damaged.len())
}

impl Report {
    fn note(&mut self, object: String, error: BackupError) -> Result<()> {
        if !error.is_damage() {
            return Err(error);
        }
        self.problems.push(Problem { object, error });
        Ok(())
    }
}

/// Lengths of the segments that the backups need; pages that are damaged are noted.
async fn pages(
    repository: &Repository,
    manifests: &[Manifest],
    report: &mut Report,
    bad: &mut HashMap<ContentId, ()>,
) -> Result<HashMap<ContentId, u32>> {
    let mut seen: HashMap<ContentId, ()> = HashMap::new();
    let mut needed = HashMap::new();
    for manifest in manifests {
        let geometry = manifest.geometry();
        for (index, page) in (0u64..).zip(manifest.page_ids()?) {
            if page.is_nothing() || seen.insert(page, ()).is_some() {
                continue;
            }
            report.objects += 1;
            match repository.page(&geometry, index, page).await {
                Ok(ids) => {
                    let segments = geometry.segments_of(index).zip(ids);
                    let some = segments.filter(|(_, id)| !id.is_nothing());
                    needed.extend(some.map(|(segment, id)| (id, geometry.length(segment))));
                }
                Err(error) => {
                    bad.insert(page, ());
                    report.note(content_name(Kind::Page, page), error)?;
                }
            }
        }
    }
    Ok(needed)
}

/// Segments that are not there, or too short to be any.
async fn look_for(
    repository: &Repository,
    needed: &HashMap<ContentId, u32>,
) -> Result<Vec<(ContentId, BackupError)>> {
    let mut missing: HashMap<ContentId, u32> = needed.clone();
    let mut listing = repository.storage.list("data/");
    while let Some(meta) = listing.try_next().await? {
        if let Some((_, id)) = parse_content_name(meta.location.as_ref())
            && meta.size > HEADER_BYTES as u64
        {
            missing.remove(&id);
        }
    }
    let name = |id| content_name(Kind::Segment, id);
    let missing = missing.into_keys();
    Ok(missing
        .map(|id| (id, BackupError::Missing(name(id))))
        .collect())
}

/// Reads every segment; returns those that are not as they should be.
async fn read_all(
    repository: &Repository,
    needed: &HashMap<ContentId, u32>,
    progress: &dyn Progress,
) -> Result<Vec<(ContentId, BackupError)>> {
    progress.begin(needed.values().map(|length| u64::from(*length)).sum());
    let width = in_flight(repository.description().segment_bytes);
    let mut checked = futures::stream::iter(needed)
        .map(async |(id, length)| {
            let result = reader::segment(repository, *id, *length).await;
            progress.step(u64::from(*length), u64::from(*length));
            (*id, result.map(drop))
        })
        .buffer_unordered(width);
    let mut wrong = Vec::new();
    while let Some((id, result)) = checked.next().await {
        match result {
            Ok(()) => {}
            Err(error) if error.is_damage() => wrong.push((id, error)),
            Err(error) => return Err(error),
        }
    }
    Ok(wrong)
}

async fn needs_any(
    repository: &Repository,
    manifest: &Manifest,
    bad: &HashMap<ContentId, ()>,
) -> bool {
    let geometry = manifest.geometry();
    let Ok(pages) = manifest.page_ids() else {
        return true;
    };
    for (index, page) in (0u64..).zip(pages) {
        if bad.contains_key(&page) {
            return true;
        }
        match repository.page(&geometry, index, page).await {
            Ok(ids) if !ids.iter().any(|id| bad.contains_key(id)) => {}
            _ => return true,
        }
    }
    false
}
