//! openraft's state machine around `model::State`.
//!
//! Invariants:
//! - State, last applied position and membership change together, under one lock.
//! - A snapshot is taken from a consistent copy (volumes are shared, not copied) and written to its file
//!   outside of the lock and of the async threads.
//! - Every change is published after it is applied; a subscriber that cannot keep up learns that it lost
//!   some.

use std::io;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use futures::{Stream, TryStreamExt};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::broadcast;

use super::snapshot_file::{self, SnapshotDirectory, SnapshotHandle};
use super::types::{LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::model::{self, Change, State};

type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotHandle>;

/// Batches of changes that a subscriber may lag behind.
const CHANGES_QUEUE: usize = 1024;

/// What changed; `None`: too much to list.
pub type Changes = Option<Arc<[Change]>>;

#[derive(Default)]
struct Applied {
    state: State,
    last_applied: Option<LogId>,
    membership: StoredMembership,
}

/// The state as the rest of the process reads it.
#[derive(Clone)]
pub struct Shared {
    applied: Arc<RwLock<Applied>>,
    changes: broadcast::Sender<Changes>,
}

/// Access to the applied state.
pub struct StateGuard<'a>(RwLockReadGuard<'a, Applied>);

impl std::ops::Deref for StateGuard<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.0.state
    }
}

impl Shared {
    /// The state as applied by this member. Never hold it across an await.
    pub fn state(&self) -> StateGuard<'_> {
        StateGuard(self.applied.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Changes> {
        self.changes.subscribe()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Applied> {
        self.applied.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, changes: Option<Vec<Change>>) {
        match changes {
            Some(changes) if changes.is_empty() => {}
            // No subscriber is no error.
            Some(changes) => drop(self.changes.send(Some(changes.into()))),
            None => drop(self.changes.send(None)),
        }
    }
}

/// See the module.
pub struct StateMachine {
    shared: Shared,
    directory: SnapshotDirectory,
    current: Arc<RwLock<Option<(SnapshotMeta, SnapshotHandle)>>>,
}

impl StateMachine {
    /// Loads the newest snapshot of a directory.
    pub fn open(directory: SnapshotDirectory) -> io::Result<Self> {
        let mut applied = Applied::default();
        let mut current = None;
        if let Some((meta, state, handle)) = directory.load_newest()? {
            applied = Applied {
                state,
                last_applied: meta.last_log_id,
                membership: meta.last_membership.clone(),
            };
            current = Some((meta, handle));
        }
        let shared = Shared {
            applied: Arc::new(RwLock::new(applied)),
            changes: broadcast::channel(CHANGES_QUEUE).0,
        };
        Ok(Self {
            shared,
            directory,
            current: Arc::new(RwLock::new(current)),
        })
    }

    /// Access for readers.
    pub fn shared(&self) -> Shared {
        self.shared.clone()
    }
}

/// Writes a snapshot of the state that it was created with.
pub struct SnapshotBuilder {
    meta: SnapshotMeta,
    state: Option<State>,
    directory: SnapshotDirectory,
    current: Arc<RwLock<Option<(SnapshotMeta, SnapshotHandle)>>>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let state = self
            .state
            .take()
            .ok_or_else(|| io::Error::other("a builder builds one snapshot"))?;
        let (meta, directory) = (self.meta.clone(), self.directory.clone());
        let handle = tokio::task::spawn_blocking(move || directory.write(&meta, &state))
            .await
            .map_err(io::Error::other)??;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        // A newer one may have been installed meanwhile.
        if current
            .as_ref()
            .is_none_or(|(m, _)| m.last_log_id <= self.meta.last_log_id)
        {
            *current = Some((self.meta.clone(), handle.clone()));
        }
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot: handle,
        })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.shared.write();
        Ok((applied.last_applied, applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let log_id = entry.log_id();
            let (response, changes) = {
                let mut applied = self.shared.write();
                applied.last_applied = Some(log_id);
                let response = match entry.payload {
                    EntryPayload::Blank => None,
                    EntryPayload::Normal(command) => {
                        Some(model::apply(&mut applied.state, &command))
                    }
                    EntryPayload::Membership(membership) => {
                        applied.membership = StoredMembership::new(Some(log_id), membership);
                        None
                    }
                };
                (response, applied.state.take_changes())
            };
            self.shared.publish(changes);
            if let Some(responder) = responder {
                responder.send(response);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        let applied = self
            .shared
            .applied
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        SnapshotBuilder {
            meta: SnapshotMeta {
                last_log_id: applied.last_applied,
                last_membership: applied.membership.clone(),
            },
            state: Some(applied.state.for_image()),
            directory: self.directory.clone(),
            current: self.current.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotHandle,
    ) -> Result<(), io::Error> {
        let (directory, expected) = (self.directory.clone(), meta.clone());
        let received = snapshot.clone();
        let state = tokio::task::spawn_blocking(move || {
            let (inner, state) = snapshot_file::read(&received)?;
            if inner != expected {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "snapshot of another position",
                ));
            }
            directory.adopt(&expected, &received)?;
            Ok(state)
        })
        .await
        .map_err(io::Error::other)??;
        {
            let mut applied = self.shared.write();
            *applied = Applied {
                state,
                last_applied: meta.last_log_id,
                membership: meta.last_membership.clone(),
            };
        }
        *self.current.write().unwrap_or_else(PoisonError::into_inner) =
            Some((meta.clone(), snapshot));
        self.shared.publish(None);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        Ok(current.as_ref().map(|(meta, handle)| Snapshot {
            meta: meta.clone(),
            snapshot: handle.clone(),
        }))
    }
}
