//! Where a repository's objects are: a directory (also on NFS) or an S3 bucket.
//!
//! Invariants:
//! - An object appears whole or not at all, and is durable when [`Storage::put`] returns.
//! - Nothing is read beyond the limit that the reader names.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, PutPayload, aws, local,
    prefix,
};

use super::error::{BackupError, Damage, Result};

/// What to do at a directory that does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absent {
    /// Make it.
    Create,
    /// Say that there is no repository.
    Refuse,
}

/// Objects under an address.
#[derive(Clone, Debug)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    url: String,
    /// Of a local one.
    directory: Option<PathBuf>,
}

impl Storage {
    /// Over any store, for programs that have one; `url` is only shown.
    pub fn new(store: Arc<dyn ObjectStore>, url: &str) -> Self {
        Self {
            store,
            url: url.to_owned(),
            directory: None,
        }
    }

    /// At `file:///DIRECTORY` or `s3://BUCKET/PREFIX`. Endpoint, region and credentials of S3 come from the usual
    /// environment variables (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`,
    /// `AWS_SESSION_TOKEN`).
    ///
    /// # Errors
    /// No such scheme; a directory that does not exist or cannot be made.
    pub fn open(url: &str, absent: Absent) -> Result<Self> {
        let wrong = |reason: String| BackupError::Url {
            url: url.to_owned(),
            reason,
        };
        let parsed = url::Url::parse(url).map_err(|e| {
            wrong(format!(
                "{e}; it is file:///DIRECTORY or s3://BUCKET/PREFIX"
            ))
        })?;
        let has_secrets = !parsed.username().is_empty() || parsed.password().is_some();
        if has_secrets || parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(wrong(
                "only a place belongs there; credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".into(),
            ));
        }
        let mut local = None;
        let store: Arc<dyn ObjectStore> = match parsed.scheme() {
            "file" => {
                let directory = parsed
                    .to_file_path()
                    .map_err(|()| wrong("it names no directory of this machine".into()))?;
                if absent == Absent::Create {
                    std::fs::create_dir_all(&directory).map_err(|e| wrong(e.to_string()))?;
                } else if !directory.is_dir() {
                    return Err(BackupError::NoRepository(url.to_owned()));
                }
                let store = local::LocalFileSystem::new_with_prefix(&directory)
                    .map_err(|e| wrong(e.to_string()))?;
                local = Some(directory);
                Arc::new(store.with_fsync(true))
            }
            "s3" => s3(&parsed).map_err(wrong)?,
            other => {
                return Err(wrong(format!(
                    "{other}:// is not supported; it is file:///DIRECTORY or s3://BUCKET/PREFIX"
                )));
            }
        };
        Ok(Self {
            directory: local,
            ..Self::new(store, url)
        })
    }

    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stores an object, in the place of one of the same name.
    pub(super) async fn put(&self, name: &str, object: Vec<u8>) -> Result<()> {
        let result = self
            .store
            .put(&Path::from(name), PutPayload::from(object))
            .await;
        result.map(drop).map_err(|e| BackupError::storage(name, e))
    }

    /// Stores an object if there is none of the name; whether it did.
    pub(super) async fn put_new(&self, name: &str, object: Vec<u8>) -> Result<bool> {
        let options = PutOptions::from(PutMode::Create);
        let payload = PutPayload::from(object);
        match self
            .store
            .put_opts(&Path::from(name), payload, options)
            .await
        {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(e) => Err(BackupError::storage(name, e)),
        }
    }

    /// An object of at most `limit` bytes.
    pub(super) async fn get(&self, name: &str, limit: usize) -> Result<Bytes> {
        let failed = |e| BackupError::storage(name, e);
        let answer = self.store.get(&Path::from(name)).await.map_err(failed)?;
        let too_long = |found| {
            BackupError::damaged(
                name,
                Damage::TooLong {
                    found,
                    limit: limit as u64,
                },
            )
        };
        if answer.meta.size > limit as u64 {
            return Err(too_long(answer.meta.size));
        }
        let mut object = Vec::with_capacity(answer.meta.size as usize);
        let mut stream = answer.into_stream();
        while let Some(part) = stream.try_next().await.map_err(failed)? {
            if object.len() + part.len() > limit {
                return Err(too_long((object.len() + part.len()) as u64));
            }
            object.extend_from_slice(&part);
        }
        Ok(object.into())
    }

    /// What the storage says of an object; `None` if there is none.
    pub(super) async fn head(&self, name: &str) -> Result<Option<ObjectMeta>> {
        match self.store.head(&Path::from(name)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(BackupError::storage(name, e)),
        }
    }

    /// Deletes an object; one that is not there is deleted.
    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        match self.store.delete(&Path::from(name)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(BackupError::storage(name, e)),
        }
    }

    /// Deletes what puts that died left behind in a directory (files whose names end in `#` and a number, which are no
    /// objects), if it is older than `grace`. Returns how many. What cannot be looked at stays.
    pub(super) fn sweep_unfinished(&self, grace: Duration) -> u64 {
        let mut deleted = 0;
        let mut directories: Vec<PathBuf> = self.directory.iter().cloned().collect();
        while let Some(directory) = directories.pop() {
            let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
            for entry in entries {
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    directories.push(entry.path());
                    continue;
                }
                let age = meta.modified().ok().and_then(|t| t.elapsed().ok());
                let name = entry.file_name();
                let is_old = age.unwrap_or_default() >= grace;
                if is_old && is_unfinished(&name.to_string_lossy()) {
                    deleted += u64::from(std::fs::remove_file(entry.path()).is_ok());
                }
            }
        }
        deleted
    }

    /// The objects under a prefix that ends at a `/`, in no order.
    pub(super) fn list(&self, prefix: &str) -> BoxStream<'_, Result<ObjectMeta>> {
        let name = prefix.to_owned();
        self.store
            .list(Some(&Path::from(prefix)))
            .map_err(move |e| BackupError::storage(&name, e))
            .boxed()
    }
}

/// Whether a file is one that a put writes before it gives it the object's name.
fn is_unfinished(name: &str) -> bool {
    let number = name.rsplit_once('#').map(|(_, number)| number);
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn s3(url: &url::Url) -> std::result::Result<Arc<dyn ObjectStore>, String> {
    // Its HTTP client needs a provider of cryptography; one that is installed already is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let bucket = url.host_str().filter(|b| !b.is_empty());
    let bucket = bucket.ok_or("it names no bucket")?;
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
    let mut builder = aws::AmazonS3Builder::from_env().with_bucket_name(bucket);
    if let Some(endpoint) = endpoint {
        // Who names an address without TLS means it.
        builder = builder
            .with_allow_http(endpoint.starts_with("http://"))
            .with_endpoint(endpoint);
    }
    let store = builder.build().map_err(|e| e.to_string())?;
    let path = Path::from_url_path(url.path()).map_err(|e| e.to_string())?;
    Ok(Arc::new(prefix::PrefixStore::new(store, path)))
}
