//! Who works on a repository: an object per operation, put again while it works.
//!
//! Invariants:
//! - A collection of garbage excludes everything else that changes the repository; backups and deletions do not exclude each other.
//! - Everybody puts an own lock first and then looks at the others', so of two at the same time at least one sees the other.
//! - Ages are differences of times that the storage itself gave, so clocks of different machines do not matter.
//! - A lock that was not put again for [`STALE`] is nobody's; its owner, if it wakes up, notices (see [`Lock::check`])
//!   before it makes a backup visible.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::codec::{Codec, Compression, Kind};
use super::error::{BackupError, Result};
use super::storage::Storage;

/// Pause between two refreshes.
const REFRESH: Duration = Duration::from_secs(60);
/// Age from which a lock is nobody's.
pub const STALE: Duration = Duration::from_secs(15 * 60);
/// Age from which its owner no longer trusts it.
const DOUBTFUL: Duration = Duration::from_secs(10 * 60);
/// Most locks that are looked at.
const LOCKS_MAX: usize = 4096;
/// Where they are.
pub const PREFIX: &str = "locks/";

/// What for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Adds a backup.
    Backup,
    /// Deletes backups.
    Delete,
    /// Deletes what no backup needs.
    Gc,
}

impl Purpose {
    fn excludes(self, other: Self) -> bool {
        self == Self::Gc || other == Self::Gc
    }
}

/// What a lock says of its owner.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Owner {
    purpose: Purpose,
    host: String,
    pid: u32,
    what: String,
}

/// As storages give it.
pub(super) type Time = chrono::DateTime<chrono::Utc>;

/// The right to work on a repository.
#[derive(Debug)]
pub struct Lock {
    storage: Storage,
    name: String,
    refreshed: Arc<Mutex<Instant>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Lock {
    /// Takes it; `what` is shown to whoever is refused because of it. With `break_others`, locks in the way are removed
    /// instead: for an operator who knows that their owners are gone.
    ///
    /// # Errors
    /// Somebody else's excludes it.
    pub async fn take(
        storage: &Storage,
        codec: &Arc<Codec>,
        purpose: Purpose,
        what: &str,
        break_others: bool,
    ) -> Result<Self> {
        let owner = Owner {
            purpose,
            host: host(),
            pid: std::process::id(),
            what: what.to_owned(),
        };
        let name = format!("{PREFIX}{}.lock", Uuid::new_v4());
        let text = serde_json::to_vec(&owner).map_err(|e| BackupError::Worker(e.to_string()))?;
        let object = codec.encode(Kind::Lock, &name, &text, Compression::None)?;
        let began = Instant::now();
        storage.put(&name, object.clone()).await?;
        let refreshed = Arc::new(Mutex::new(began));
        let task = refresh(
            storage.clone(),
            name.clone(),
            object,
            Arc::clone(&refreshed),
        );
        let lock = Self {
            storage: storage.clone(),
            name,
            refreshed,
            task: tokio::spawn(task),
        };
        match lock.others(codec, purpose, break_others).await {
            Ok(()) => Ok(lock),
            Err(e) => {
                // The refusal matters more than what is left behind, which becomes stale.
                let _ = lock.release().await;
                Err(e)
            }
        }
    }

    async fn others(&self, codec: &Codec, purpose: Purpose, break_others: bool) -> Result<()> {
        let now = self.storage_time().await?;
        let listing = self.storage.list(PREFIX);
        let found: Vec<_> = futures::StreamExt::take(listing, LOCKS_MAX)
            .try_collect()
            .await?;
        for meta in found {
            let name = meta.location.to_string();
            if name == self.name {
                continue;
            }
            let age = (now - meta.last_modified).to_std().unwrap_or_default();
            if age >= STALE || break_others {
                // Only who excludes everybody may: so its owner cannot miss what happens next.
                if purpose == Purpose::Gc {
                    self.storage.delete(&name).await?;
                }
                continue;
            }
            let holder = match read(&self.storage, codec, &name).await {
                Ok(owner) if !purpose.excludes(owner.purpose) => continue,
                Ok(owner) => format!("{} by process {} on {}", owner.what, owner.pid, owner.host),
                // Ended in this moment.
                Err(BackupError::Missing(_)) => continue,
                Err(e) => format!("somebody ({e})"),
            };
            return Err(BackupError::Locked {
                holder,
                age_seconds: age.as_secs(),
            });
        }
        Ok(())
    }

    /// Makes sure that it still is.
    ///
    /// # Errors
    /// It was taken away, or could not be refreshed for so long that it may be.
    pub async fn check(&self) -> Result<()> {
        let refreshed = *self
            .refreshed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if refreshed.elapsed() >= DOUBTFUL {
            return Err(BackupError::LockLost);
        }
        let found = self.storage.head(&self.name).await?;
        found.map(drop).ok_or(BackupError::LockLost)
    }

    /// The time by the storage's clock, to compare with that of other objects.
    ///
    /// # Errors
    /// The storage failed, or the lock is gone.
    pub(super) async fn storage_time(&self) -> Result<Time> {
        let found = self.storage.head(&self.name).await?;
        Ok(found.ok_or(BackupError::LockLost)?.last_modified)
    }

    /// Gives it back.
    ///
    /// # Errors
    /// The storage failed; the lock becomes stale by itself.
    pub async fn release(self) -> Result<()> {
        self.task.abort();
        self.storage.delete(&self.name).await
    }
}

async fn read(storage: &Storage, codec: &Codec, name: &str) -> Result<Owner> {
    let object = storage.get(name, Kind::Lock.object_bytes_max()).await?;
    let text = codec.decode(Kind::Lock, name, &object)?;
    serde_json::from_slice(&text)
        .map_err(|e| BackupError::damaged(name, super::error::Damage::Nonsense(e.to_string())))
}

/// Puts the lock again and again, unless somebody took it away.
async fn refresh(storage: Storage, name: String, object: Vec<u8>, refreshed: Arc<Mutex<Instant>>) {
    loop {
        tokio::time::sleep(REFRESH).await;
        let began = Instant::now();
        let last = *refreshed.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= DOUBTFUL {
            // Somebody may be taking it away in this moment: it is not put again.
            return;
        }
        match storage.head(&name).await {
            Ok(None) => return,
            Err(_) => continue,
            Ok(Some(_)) => {}
        }
        if storage.put(&name, object.clone()).await.is_ok() {
            *refreshed.lock().unwrap_or_else(PoisonError::into_inner) = began;
        }
    }
}

fn host() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}
