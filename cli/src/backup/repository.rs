//! A repository: a description, and operations that name its objects.
//!
//! Invariant: the description is put once and never changed, so what was opened stays right.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::codec::{Codec, Compression, Kind};
use super::error::{BackupError, Damage, Result};
use super::id::ContentId;
use super::key::{KeySpec, Keys, Secret};
use super::manifest::{
    Geometry, Manifest, content_name, page_to_bytes, parse_object_name, parse_page,
};
use super::storage::Storage;

/// Name of the description.
pub const DESCRIPTION: &str = "ashlar-repository";
/// The format of repositories that is written.
const FORMAT: u32 = 1;
/// Segments of a new repository: 1 MiB.
pub const SEGMENT_BYTES: u32 = 1024 * 1024;
/// Most manifests that are listed.
const MANIFESTS_MAX: usize = 1_000_000;

/// What a repository is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Description {
    /// Of this text and of all objects.
    pub format: u32,
    /// The repository.
    pub repository_id: Uuid,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Size of the segments of every backup in it.
    pub segment_bytes: u32,
    /// How its key is made; absent without encryption.
    pub key: Option<KeySpec>,
}

/// An open repository.
#[derive(Clone, Debug)]
pub struct Repository {
    pub(super) storage: Storage,
    pub(super) codec: Arc<Codec>,
    description: Description,
}

/// What content became in the repository.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stored {
    /// Its name.
    pub id: ContentId,
    /// Bytes that were sent; 0 if it was there.
    pub sent_bytes: u64,
}

impl Repository {
    /// Opens the repository in a storage.
    ///
    /// # Errors
    /// There is none; or the key is missing, wrong or not wanted; or its description is damaged.
    pub async fn open(storage: Storage, secret: Option<&Secret>) -> Result<Self> {
        let object = storage
            .get(DESCRIPTION, Kind::Repository.object_bytes_max())
            .await;
        let object = match object {
            Err(BackupError::Missing(_)) => {
                return Err(BackupError::NoRepository(storage.url().to_owned()));
            }
            other => other?,
        };
        let text = Codec::new(None).decode(Kind::Repository, DESCRIPTION, &object)?;
        let nonsense = |what: String| BackupError::damaged(DESCRIPTION, Damage::Nonsense(what));
        let description: Description =
            serde_json::from_slice(&text).map_err(|e| nonsense(e.to_string()))?;
        if description.format > FORMAT {
            return Err(BackupError::TooNew {
                name: DESCRIPTION.to_owned(),
                found: description.format,
                known: FORMAT,
            });
        }
        let geometry = Geometry {
            size_bytes: u64::from(description.segment_bytes),
            segment_bytes: description.segment_bytes,
        };
        geometry.check().map_err(nonsense)?;
        let keys = match (&description.key, secret) {
            (None, None) => None,
            (None, Some(_)) => return Err(BackupError::KeyUnused),
            (Some(_), None) => return Err(BackupError::KeyMissing),
            (Some(spec), Some(secret)) => Some(Keys::open(spec, secret)?),
        };
        Ok(Self {
            storage,
            codec: Arc::new(Codec::new(keys)),
            description,
        })
    }

    /// Opens the repository in a storage, or makes one there; with a secret it is encrypted.
    ///
    /// # Errors
    /// As [`Repository::open`], or it cannot be made.
    pub async fn open_or_create(storage: Storage, secret: Option<&Secret>) -> Result<Self> {
        match Self::open(storage.clone(), secret).await {
            Err(BackupError::NoRepository(_)) => Self::create(storage, secret, SEGMENT_BYTES).await,
            other => other,
        }
    }

    /// Makes a repository, or opens the one that somebody else makes in the same moment.
    ///
    /// # Errors
    /// As [`Repository::open`], or it cannot be made.
    pub async fn create(
        storage: Storage,
        secret: Option<&Secret>,
        segment_bytes: u32,
    ) -> Result<Self> {
        let description = Description {
            format: FORMAT,
            repository_id: Uuid::new_v4(),
            created_unix_ms: now_unix_ms(),
            segment_bytes,
            key: secret.map(Keys::create).transpose()?.map(|(spec, _)| spec),
        };
        let text = serde_json::to_vec_pretty(&description)
            .map_err(|e| BackupError::Worker(e.to_string()))?;
        let object =
            Codec::new(None).encode(Kind::Repository, DESCRIPTION, &text, Compression::None)?;
        storage.put_new(DESCRIPTION, object).await?;
        Self::open(storage, secret).await
    }

    /// What it is.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Its address.
    pub fn url(&self) -> &str {
        self.storage.url()
    }

    /// Names of all manifests.
    pub(super) async fn manifest_names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let mut listing = self.storage.list("volumes/");
        while let Some(meta) = listing.try_next().await? {
            let name = meta.location.to_string();
            // Anything else is not ours, or a part that a file system left of a put that died.
            if parse_object_name(&name).is_some() {
                names.push(name);
            }
            if names.len() > MANIFESTS_MAX {
                return Err(BackupError::Mismatch(format!(
                    "the repository has more than {MANIFESTS_MAX} backups"
                )));
            }
        }
        names.sort();
        Ok(names)
    }

    /// One manifest.
    pub(super) async fn manifest(&self, name: &str) -> Result<Manifest> {
        let object = self
            .storage
            .get(name, Kind::Manifest.object_bytes_max())
            .await?;
        let text = self.codec.decode(Kind::Manifest, name, &object)?;
        let manifest = Manifest::parse(name, &text)?;
        if manifest.segment_bytes != self.description.segment_bytes {
            return Err(BackupError::damaged(
                name,
                Damage::Nonsense("its segments have another size than the repository's".into()),
            ));
        }
        Ok(manifest)
    }

    /// The backups, oldest first, and what is wrong with those that cannot be read.
    ///
    /// # Errors
    /// The storage failed.
    pub async fn backups(&self) -> Result<(Vec<Manifest>, Vec<BackupError>)> {
        let (mut backups, mut damaged) = (Vec::new(), Vec::new());
        for name in self.manifest_names().await? {
            match self.manifest(&name).await {
                Ok(manifest) => backups.push(manifest),
                // Deleted in this moment.
                Err(BackupError::Missing(_)) => {}
                Err(e) if e.is_damage() => damaged.push(e),
                Err(e) => return Err(e),
            }
        }
        backups.sort_by_key(|m| (m.finished_unix_ms, m.backup_id));
        Ok((backups, damaged))
    }

    /// The name of a backup's manifest, by its id or the beginning of it; the manifest may be damaged.
    ///
    /// # Errors
    /// None, or several.
    pub async fn find(&self, id: &str) -> Result<String> {
        let wanted = id.to_ascii_lowercase();
        let names = self.manifest_names().await?;
        let mut found = names.into_iter().filter(|name| {
            parse_object_name(name).is_some_and(|(_, b)| b.to_string().starts_with(&wanted))
        });
        match (found.next(), found.next()) {
            (Some(name), None) if !wanted.is_empty() => Ok(name),
            (Some(_), Some(_)) => Err(BackupError::Ambiguous(id.to_owned())),
            _ => Err(BackupError::NoBackup(id.to_owned())),
        }
    }

    /// A backup, by its id or the beginning of it.
    ///
    /// # Errors
    /// None, several, or it is damaged.
    pub async fn backup(&self, id: &str) -> Result<Manifest> {
        let name = self.find(id).await?;
        self.manifest(&name).await
    }

    /// The references of a page of a backup.
    pub(super) async fn page(
        &self,
        geometry: &Geometry,
        index: u64,
        id: ContentId,
    ) -> Result<Vec<ContentId>> {
        let range = geometry.segments_of(index);
        let count = (range.end - range.start) as usize;
        if id.is_nothing() {
            return Ok(vec![ContentId::NOTHING; count]);
        }
        let name = content_name(Kind::Page, id);
        let text = self.content(Kind::Page, id).await?;
        parse_page(&name, &text, count)
    }

    /// The content of a name.
    pub(super) async fn content(&self, kind: Kind, id: ContentId) -> Result<Vec<u8>> {
        let name = content_name(kind, id);
        let object: Bytes = self.storage.get(&name, kind.object_bytes_max()).await?;
        let codec = Arc::clone(&self.codec);
        blocking(move || codec.decode_content(kind, id, &name, &object)).await?
    }

    /// Stores content that is not zeros only, unless it is there.
    pub(super) async fn store(
        &self,
        kind: Kind,
        id: ContentId,
        plain: Bytes,
        compression: Compression,
    ) -> Result<Stored> {
        let name = content_name(kind, id);
        if self.storage.head(&name).await?.is_some() {
            return Ok(Stored { id, sent_bytes: 0 });
        }
        let codec = Arc::clone(&self.codec);
        let to_encode = name.clone();
        let encode = move || codec.encode(kind, &to_encode, &plain, compression);
        let object = blocking(encode).await??;
        let sent_bytes = object.len() as u64;
        self.storage.put(&name, object).await?;
        Ok(Stored { id, sent_bytes })
    }

    /// Stores a page.
    pub(super) async fn store_page(
        &self,
        ids: &[ContentId],
        compression: Compression,
    ) -> Result<Stored> {
        if ids.iter().all(ContentId::is_nothing) {
            let id = ContentId::NOTHING;
            return Ok(Stored { id, sent_bytes: 0 });
        }
        let text = page_to_bytes(ids);
        let id = self.codec.id(Kind::Page, &text);
        self.store(Kind::Page, id, text.into(), compression).await
    }
}

/// Runs what computes for long where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| BackupError::Worker(e.to_string()))
}

/// The time by this machine's clock; it is only shown, and sorts backups of one machine.
pub(super) fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_millis() as u64
}
