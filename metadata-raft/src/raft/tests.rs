//! openraft's own conformance suite on the log store and the state machine.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use super::log_store::LogStore;
use super::sled_engine::SledEngine;
use super::snapshot_file::SnapshotDirectory;
use super::state_machine::StateMachine;
use super::types::TypeConfig;

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
