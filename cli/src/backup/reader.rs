//! Restoring a backup to a volume that is zeros.
//!
//! Invariants:
//! - Content is checked (checksum, cipher, hash) before a byte of it is written.
//! - Blocks of zeros are not written: the volume stays as thin as it was.

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};

use super::codec::Kind;
use super::error::{BackupError, Result};
use super::id::ContentId;
use super::manifest::{BLOCK_BYTES, Manifest, content_name};
use super::repository::Repository;
use super::writer::is_zeros;
use super::{Progress, in_flight};

/// What a backup is restored to.
#[async_trait::async_trait]
pub trait Target: Send + Sync {
    /// Writes; offset and length are multiples of 4096.
    async fn write(&self, offset: u64, data: Bytes) -> std::io::Result<()>;
    /// Makes all writes durable.
    async fn flush(&self) -> std::io::Result<()>;
}

/// Writes a backup's content.
///
/// # Errors
/// An object is damaged or missing, or the storage or the volume failed.
pub async fn restore(
    repository: &Repository,
    manifest: &Manifest,
    target: &dyn Target,
    progress: &dyn Progress,
) -> Result<()> {
    let geometry = manifest.geometry();
    progress.begin(manifest.size_bytes);
    for (index, page) in (0u64..).zip(manifest.page_ids()?) {
        let range = geometry.segments_of(index);
        let ids = repository.page(&geometry, index, page).await?;
        let restored = futures::stream::iter(range.zip(ids)).map(async |(segment, id)| {
            let (offset, length) = (geometry.offset(segment), geometry.length(segment));
            let place = Place { offset, length };
            let moved = if id.is_nothing() {
                0
            } else {
                one(repository, target, place, id).await?
            };
            progress.step(u64::from(length), moved);
            Ok::<_, BackupError>(())
        });
        restored
            .buffer_unordered(in_flight(geometry.segment_bytes))
            .try_collect::<()>()
            .await?;
    }
    target.flush().await.map_err(|source| BackupError::Volume {
        doing: "flush the volume".into(),
        source,
    })
}

/// Where a segment lies.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    length: u32,
}

/// Restores a segment; returns the bytes read.
async fn one(
    repository: &Repository,
    target: &dyn Target,
    place: Place,
    id: ContentId,
) -> Result<u64> {
    let plain = segment(repository, id, place.length).await?;
    let plain = Bytes::from(plain);
    for run in runs(&plain) {
        let offset = place.offset + run.start as u64;
        let part = plain.slice(run);
        let length = part.len();
        target
            .write(offset, part)
            .await
            .map_err(|source| BackupError::Volume {
                doing: format!("write {length} bytes at {offset} of the volume"),
                source,
            })?;
    }
    Ok(plain.len() as u64)
}

/// The content of a segment that must have this length.
pub(super) async fn segment(
    repository: &Repository,
    id: ContentId,
    length: u32,
) -> Result<Vec<u8>> {
    let plain = repository.content(Kind::Segment, id).await?;
    if plain.len() != length as usize {
        return Err(BackupError::damaged(
            content_name(Kind::Segment, id),
            super::error::Damage::Length {
                expected: u64::from(length),
                found: plain.len() as u64,
            },
        ));
    }
    Ok(plain)
}

/// The runs of blocks that are not zeros.
fn runs(plain: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (index, block) in plain.chunks(BLOCK_BYTES as usize).enumerate() {
        if is_zeros(block) {
            continue;
        }
        let start = index * BLOCK_BYTES as usize;
        let end = start + block.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocks_with_something_in_them_are_written() {
        let mut plain = vec![0; 5 * 4096];
        assert!(runs(&plain).is_empty());
        plain[4096] = 1;
        plain[3 * 4096 - 1] = 1;
        plain[4 * 4096] = 1;
        assert_eq!(runs(&plain), [4096..3 * 4096, 4 * 4096..5 * 4096]);
    }
}
