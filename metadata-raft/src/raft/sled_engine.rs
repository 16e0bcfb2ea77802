//! [`LogEngine`] on sled 0.34.
//!
//! sled's own flush uses sync_file_range, which does not survive a power loss on Linux: after it this
//! engine calls fdatasync on sled's file itself. No flush timer runs (idle members do nothing).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use super::engine::{LogEngine, MetaKey};

/// Bytes that sled may cache: the log's tail.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// Indexes removed in one batch.
const REMOVE_BATCH: u64 = 4096;

/// See the module.
pub struct SledEngine {
    db: sled::Db,
    log: sled::Tree,
    meta: sled::Tree,
    file: File,
}

fn io_error(error: sled::Error) -> io::Error {
    match error {
        sled::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

impl SledEngine {
    /// Opens or creates the database in a directory.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let db = sled::Config::new()
            .path(directory)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(io_error)?;
        let log = db.open_tree("log").map_err(io_error)?;
        let meta = db.open_tree("meta").map_err(io_error)?;
        let file = File::open(directory.join("db"))?;
        let engine = Self {
            db,
            log,
            meta,
            file,
        };
        engine.sync()?;
        // The directory entries must survive as well.
        File::open(directory)?.sync_all()?;
        Ok(engine)
    }
}

fn meta_key(key: MetaKey) -> &'static [u8] {
    match key {
        MetaKey::Vote => b"vote",
        MetaKey::Purged => b"purged",
        MetaKey::Committed => b"committed",
    }
}

fn pair((key, value): (sled::IVec, sled::IVec)) -> io::Result<(u64, Vec<u8>)> {
    let key: [u8; 8] = key
        .as_ref()
        .try_into()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "log key is not 8 bytes long"))?;
    Ok((u64::from_be_bytes(key), value.to_vec()))
}

impl LogEngine for SledEngine {
    fn put(&self, entries: Vec<(u64, Vec<u8>)>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for (index, value) in entries {
            batch.insert(&index.to_be_bytes(), value);
        }
        self.log.apply_batch(batch).map_err(io_error)
    }

    fn remove(&self, indexes: Range<u64>) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        let mut count = 0;
        // Highest first: a crash between two batches leaves no hole below kept entries when a tail is cut.
        let range = indexes.start.to_be_bytes()..indexes.end.to_be_bytes();
        for key in self.log.range(range).keys().rev() {
            batch.remove(key.map_err(io_error)?);
            count += 1;
            if count % REMOVE_BATCH == 0 {
                self.log
                    .apply_batch(std::mem::take(&mut batch))
                    .map_err(io_error)?;
            }
        }
        self.log.apply_batch(batch).map_err(io_error)
    }

    fn remove_lowest(&self, end: u64, most: usize) -> io::Result<usize> {
        let mut batch = sled::Batch::default();
        let mut count = 0;
        for key in self.log.range(..end.to_be_bytes()).keys().take(most) {
            batch.remove(key.map_err(io_error)?);
            count += 1;
        }
        self.log.apply_batch(batch).map_err(io_error)?;
        Ok(count)
    }

    fn read(&self, indexes: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        let range = indexes.start.to_be_bytes()..indexes.end.to_be_bytes();
        self.log
            .range(range)
            .map(|item| pair(item.map_err(io_error)?))
            .collect()
    }

    fn last(&self) -> io::Result<Option<(u64, Vec<u8>)>> {
        self.log.last().map_err(io_error)?.map(pair).transpose()
    }

    fn set_meta(&self, key: MetaKey, value: Option<Vec<u8>>) -> io::Result<()> {
        match value {
            Some(value) => self.meta.insert(meta_key(key), value).map_err(io_error)?,
            None => self.meta.remove(meta_key(key)).map_err(io_error)?,
        };
        Ok(())
    }

    fn meta(&self, key: MetaKey) -> io::Result<Option<Vec<u8>>> {
        Ok(self
            .meta
            .get(meta_key(key))
            .map_err(io_error)?
            .map(|v| v.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        self.db.flush().map_err(io_error)?;
        self.file.sync_data()
    }
}
