//! One operation per volume at a time; a second one is told so (`ABORTED`) instead of being queued.
//!
//! Invariant: an operation runs to its end on a task of its own, with its lock held, also if the caller goes away
//! in the middle: a mkfs never runs on beside its successor.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::errors::{Error, Result};

/// The volumes with an operation in progress.
#[derive(Clone, Debug, Default)]
pub struct Locks {
    held: Arc<Mutex<HashSet<String>>>,
}

/// A lock; given back when dropped.
#[derive(Debug)]
pub struct Guard {
    held: Arc<Mutex<HashSet<String>>>,
    key: String,
}

impl Locks {
    /// Takes the lock of `key` (a volume's id or name).
    pub fn take(&self, key: &str) -> Result<Guard> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if !held.insert(key.to_owned()) {
            return Err(Error::Busy(format!("volume {key}")));
        }
        Ok(Guard {
            held: self.held.clone(),
            key: key.to_owned(),
        })
    }

    /// Runs an operation under the lock of `key`, to its end.
    pub async fn run<T, F>(&self, key: &str, operation: F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let guard = self.take(key)?;
        let task = tokio::spawn(async move {
            let result = operation.await;
            drop(guard);
            result
        });
        task.await
            .map_err(|_| Error::Internal("the operation stopped short; see the driver's log"))?
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&self.key);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tokio::sync::oneshot;
    use tonic::Code;

    #[test]
    fn a_second_operation_on_the_volume_is_refused_and_another_volume_is_free() {
        let locks = Locks::default();
        let guard = locks.take("a").unwrap();
        assert_eq!(locks.take("a").unwrap_err().code(), Code::Aborted);
        locks.take("b").unwrap();
        drop(guard);
        locks.take("a").unwrap();
    }

    #[tokio::test]
    async fn an_operation_keeps_its_lock_when_the_caller_goes_away() {
        let locks = Locks::default();
        let (started, is_started) = oneshot::channel();
        let (finish, may_finish) = oneshot::channel::<()>();
        let (ended, has_ended) = oneshot::channel();
        let caller = tokio::spawn({
            let locks = locks.clone();
            async move {
                let operation = async move {
                    started.send(()).unwrap();
                    may_finish.await.unwrap();
                    ended.send(()).unwrap();
                    Ok(())
                };
                locks.run("a", operation).await
            }
        });
        is_started.await.unwrap();
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        assert_eq!(locks.take("a").unwrap_err().code(), Code::Aborted);
        finish.send(()).unwrap();
        has_ended.await.unwrap();
        while locks.take("a").is_err() {
            tokio::task::yield_now().await;
        }
    }
}
