//! A store in memory that a test can end at any operation, and whose objects it can damage.
//!
//! Invariant: an operation that fails here did nothing, and all later ones fail, as when the process had died there.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::backup::storage::Storage;

#[derive(Debug)]
pub struct Mortal {
    inner: Arc<InMemory>,
    /// Changes that are still carried out.
    left: Arc<AtomicI64>,
}

impl fmt::Display for Mortal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mortal store")
    }
}

/// Objects in memory.
#[derive(Clone)]
pub struct Objects(pub Arc<InMemory>);

impl Objects {
    pub fn new() -> Self {
        Self(Arc::new(InMemory::new()))
    }

    /// Storage that works.
    pub fn storage(&self) -> Storage {
        Storage::new(self.0.clone(), "memory://")
    }

    /// Storage that dies after so many changes; what is left of them is in the counter.
    pub fn dying(&self, changes: i64) -> (Storage, Arc<AtomicI64>) {
        let left = Arc::new(AtomicI64::new(changes));
        let store = Mortal {
            inner: self.0.clone(),
            left: left.clone(),
        };
        (Storage::new(Arc::new(store), "memory://"), left)
    }

    pub async fn names(&self) -> Vec<String> {
        let list = self.0.list(None).map_ok(|m| m.location.to_string());
        let mut names: Vec<String> = list.try_collect().await.unwrap();
        names.sort();
        names
    }

    pub async fn get(&self, name: &str) -> Vec<u8> {
        let found = self.0.get(&Path::from(name)).await.unwrap();
        found.bytes().await.unwrap().to_vec()
    }

    pub async fn put(&self, name: &str, bytes: Vec<u8>) {
        self.0.put(&Path::from(name), bytes.into()).await.unwrap();
    }

    pub async fn delete(&self, name: &str) {
        self.0.delete(&Path::from(name)).await.unwrap();
    }
}

impl Mortal {
    fn change(&self) -> Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        Err(object_store::Error::Generic {
            store: "mortal",
            source: "it died".into(),
        })
    }

    fn alive(&self) -> Result<()> {
        if self.left.load(Ordering::SeqCst) >= 0 {
            return Ok(());
        }
        self.change()
    }
}

#[async_trait::async_trait]
impl ObjectStore for Mortal {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.change()?;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.change()?;
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.alive()?;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.change() {
            Ok(()) => self.inner.delete_stream(locations),
            Err(e) => futures::stream::once(async { Err(e) }).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.alive() {
            Ok(()) => self.inner.list(prefix),
            Err(e) => futures::stream::once(async { Err(e) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.alive()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.change()?;
        self.inner.copy_opts(from, to, options).await
    }
}
