//! Tests of repositories: golden bytes, random histories, flipped bits, and deaths at every put.

mod damage;
mod formats;
mod histories;
mod store;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use uuid::Uuid;

use super::key::Secret;
use super::manifest::{Geometry, Manifest, Origin};
use super::segments::SegmentSet;
use super::storage::Storage;
use super::writer::{Plan, Reading, Source};
use super::{Compression, Repository, Silent, reader, writer};

/// Small segments, so that a small volume has many.
const SEGMENT: u32 = 8192;

/// A volume in memory.
#[derive(Clone)]
struct Image(Arc<Mutex<Vec<u8>>>);

impl Image {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }

    fn zeros(length: usize) -> Self {
        Self::new(vec![0; length])
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

#[async_trait::async_trait]
impl Source for Image {
    async fn read(&self, offset: u64, length: u32) -> std::io::Result<Bytes> {
        let all = self.0.lock().unwrap();
        let start = offset as usize;
        Ok(Bytes::copy_from_slice(&all[start..start + length as usize]))
    }
}

#[async_trait::async_trait]
impl reader::Target for Image {
    async fn write(&self, offset: u64, data: Bytes) -> std::io::Result<()> {
        let start = offset as usize;
        self.0.lock().unwrap()[start..start + data.len()].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
}

fn secret() -> Secret {
    Secret::Raw([7; 32])
}

fn origin() -> Origin {
    Origin {
        cluster_id: Uuid::from_u128(1),
        volume_id: Uuid::from_u128(2),
        volume_name: "v".into(),
        pool: "default".into(),
        replicas: 3,
        snapshot_id: Uuid::from_u128(3),
        snapshot_name: "s".into(),
        snapshot_unix_ms: 1_700_000_000_000,
        labels: [("a".to_owned(), "b".to_owned())].into(),
    }
}

fn plan(size: usize, base: Option<Manifest>, read: Reading) -> Plan {
    Plan {
        origin: origin(),
        size_bytes: size as u64,
        base,
        read,
        schedule: None,
        compression: Compression::Zstd,
    }
}

/// The segments in which two images differ.
fn difference(old: &[u8], new: &[u8]) -> Reading {
    let mut set = SegmentSet::none(Geometry {
        size_bytes: new.len() as u64,
        segment_bytes: SEGMENT,
    });
    for (index, block) in new.chunks(4096).enumerate() {
        let at = index * 4096;
        // What the volume grew by is zeros until it is written.
        let before = old.get(at..at + block.len()).unwrap_or(&[0; 4096]);
        if before != block {
            set.add(at as u64, block.len() as u64);
        }
    }
    Reading::Only(set)
}

async fn repository(storage: &Storage, secret: Option<&Secret>) -> super::Result<Repository> {
    match Repository::open(storage.clone(), secret).await {
        Err(super::BackupError::NoRepository(_)) => {
            Repository::create(storage.clone(), secret, SEGMENT).await
        }
        other => other,
    }
}

async fn full(repository: &Repository, bytes: &[u8]) -> super::Result<Manifest> {
    let plan = plan(bytes.len(), None, Reading::All);
    writer::backup(repository, &Image::new(bytes.to_vec()), plan, &Silent).await
}

async fn restored(repository: &Repository, manifest: &Manifest) -> super::Result<Vec<u8>> {
    let target = Image::zeros(manifest.size_bytes as usize);
    reader::restore(repository, manifest, &target, &Silent).await?;
    Ok(target.bytes())
}

/// Bytes that do not shrink, the same for the same seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new_keyed(&[3; 32])
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}
