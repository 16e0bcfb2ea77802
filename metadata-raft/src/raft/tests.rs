//! openraft's own conformance suite on the log store and the state machine, and what it does not ask.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openraft::storage::{RaftLogStorage as _, RaftLogStorageExt as _};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::testing::{blank_ent, log_id};
use openraft::{RaftLogReader as _, StorageError};
use tempfile::TempDir;

use super::codec;
use super::engine::{LogEngine, MetaKey};
use super::log_store::LogStore;
use super::sled_engine::SledEngine;
use super::snapshot_file::SnapshotDirectory;
use super::state_machine::StateMachine;
use super::types::{Entry, TypeConfig};

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let directory = tempfile::tempdir().unwrap();
        let engine = SledEngine::open(&directory.path().join("log")).unwrap();
        let store = LogStore::new(Arc::new(engine)).unwrap();
        let snapshots = SnapshotDirectory::open(&directory.path().join("snapshots")).unwrap();
        Ok((directory, store, StateMachine::open(snapshots).unwrap()))
    }
}

#[tokio::test]
async fn conforms_to_openraft() {
    Suite::test_all(Builder).await.unwrap();
}

/// Sled, and how many entries each removal took.
struct Noting {
    sled: SledEngine,
    removals: Mutex<Vec<usize>>,
}

impl LogEngine for Noting {
    fn put(&self, entries: Vec<(u64, Vec<u8>)>) -> io::Result<()> {
        self.sled.put(entries)
    }

    fn remove(&self, indexes: Range<u64>) -> io::Result<()> {
        let count = self.sled.read(indexes.clone())?.len();
        self.removals.lock().unwrap().push(count);
        self.sled.remove(indexes)
    }

    fn remove_lowest(&self, end: u64, most: usize) -> io::Result<usize> {
        let count = self.sled.remove_lowest(end, most)?;
        self.removals.lock().unwrap().push(count);
        Ok(count)
    }

    fn read(&self, indexes: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>> {
        self.sled.read(indexes)
    }

    fn last(&self) -> io::Result<Option<(u64, Vec<u8>)>> {
        self.sled.last()
    }

    fn set_meta(&self, key: MetaKey, value: Option<Vec<u8>>) -> io::Result<()> {
        self.sled.set_meta(key, value)
    }

    fn meta(&self, key: MetaKey) -> io::Result<Option<Vec<u8>>> {
        self.sled.meta(key)
    }

    fn sync(&self) -> io::Result<()> {
        self.sled.sync()
    }
}

fn noting(directory: &TempDir) -> Arc<Noting> {
    Arc::new(Noting {
        sled: SledEngine::open(&directory.path().join("log")).unwrap(),
        removals: Mutex::default(),
    })
}

fn entries(indexes: Range<u64>) -> Vec<Entry> {
    indexes.map(|i| blank_ent::<TypeConfig>(1, 1, i)).collect()
}

async fn indexes(store: &mut LogStore) -> Vec<u64> {
    let entries = store.try_get_log_entries(0..u64::MAX).await.unwrap();
    entries.iter().map(|e| e.log_id.index).collect()
}

fn wait_removed(engine: &Noting, below: u64) {
    let begun = Instant::now();
    while !engine.read(0..below).unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(30), "not removed");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn a_purge_hides_entries_at_once_and_removes_them_a_few_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let engine = noting(&directory);
    let mut store = LogStore::new(engine.clone()).unwrap();
    store.blocking_append(entries(1..3001)).await.unwrap();
    store.purge(log_id::<TypeConfig>(1, 1, 2900)).await.unwrap();
    assert_eq!(indexes(&mut store).await, (2901..3001).collect::<Vec<_>>());
    let limited = store.limited_get_log_entries(1, 3001).await.unwrap();
    assert_eq!(limited.len(), 100);
    // The log goes on meanwhile.
    store.blocking_append(entries(3001..3002)).await.unwrap();
    wait_removed(&engine, 2901);
    assert_eq!(indexes(&mut store).await, (2901..3002).collect::<Vec<_>>());
    let removals = engine.removals.lock().unwrap();
    assert_eq!(removals.iter().sum::<usize>(), 2900);
    assert!(removals.iter().all(|count| *count <= 128), "{removals:?}");
}

#[tokio::test]
async fn what_a_crash_left_of_a_purge_is_hidden_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let engine = noting(&directory);
    let encoded = entries(1..501)
        .iter()
        .map(|e| (e.log_id.index, codec::encode(e).unwrap()))
        .collect();
    engine.put(encoded).unwrap();
    let purged = log_id::<TypeConfig>(1, 1, 500);
    let value = codec::encode(&purged).unwrap();
    engine.set_meta(MetaKey::Purged, Some(value)).unwrap();
    let mut store = LogStore::new(engine.clone()).unwrap();
    assert_eq!(indexes(&mut store).await, Vec::<u64>::new());
    let state = store.get_log_state().await.unwrap();
    assert_eq!(state.last_log_id, Some(purged));
    store.blocking_append(entries(501..502)).await.unwrap();
    wait_removed(&engine, 501);
    assert_eq!(indexes(&mut store).await, [501]);
}
