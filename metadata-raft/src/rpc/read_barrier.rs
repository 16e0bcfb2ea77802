//! Confirmations of leadership for reads, shared by all who ask at about the same time.
//!
//! A linearizable read costs a message to every member and back. With many reads in flight each would send its own:
//! here those that arrive while one confirmation is under way share the next one.
//!
//! Invariants: a caller is answered by a confirmation that began after the call (so what was committed before the
//! call is covered); at most one is under way; if the task that runs it goes away, another one that waits for it
//! begins it again.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

/// See the module.
#[derive(Debug)]
pub struct ReadBarrier<T> {
    /// The confirmation that has not begun yet; who comes now joins it.
    next: Mutex<Option<Arc<OnceCell<T>>>>,
    /// Held by the one that is under way.
    running: tokio::sync::Mutex<()>,
}

impl<T> Default for ReadBarrier<T> {
    fn default() -> Self {
        Self {
            next: Mutex::new(None),
            running: tokio::sync::Mutex::new(()),
        }
    }
}

impl<T: Clone> ReadBarrier<T> {
    /// The outcome of a confirmation that began after this call.
    pub async fn pass<F>(&self, confirm: impl FnOnce() -> F) -> T
    where
        F: Future<Output = T>,
    {
        let round = self
            .next
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_default()
            .clone();
        let begin = async || {
            let _running = self.running.lock().await;
            self.close(&round);
            confirm().await
        };
        round.get_or_init(begin).await.clone()
    }

    /// From now on nobody joins this round.
    fn close(&self, round: &Arc<OnceCell<T>>) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.as_ref().is_some_and(|n| Arc::ptr_eq(n, round)) {
            *next = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;
    use tokio::task::JoinHandle;

    use super::*;

    /// Confirmations that end when they are let; each yields its number.
    struct World {
        barrier: ReadBarrier<usize>,
        begun: AtomicUsize,
        let_end: Semaphore,
    }

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                barrier: ReadBarrier::default(),
                begun: AtomicUsize::new(0),
                let_end: Semaphore::new(0),
            })
        }

        fn call(self: &Arc<Self>) -> JoinHandle<usize> {
            let this = self.clone();
            tokio::spawn(async move {
                let confirm = || async {
                    let number = this.begun.fetch_add(1, Ordering::SeqCst);
                    this.let_end.acquire().await.unwrap().forget();
                    number
                };
                this.barrier.pass(confirm).await
            })
        }

        fn begun(&self) -> usize {
            self.begun.load(Ordering::SeqCst)
        }
    }

    /// Lets every task run as far as it gets (the runtime has one thread).
    async fn settle() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_comes_during_a_confirmation_shares_the_next_one() {
        let world = World::new();
        let first = world.call();
        settle().await;
        let others: Vec<_> = (0..31).map(|_| world.call()).collect();
        settle().await;
        assert_eq!(world.begun(), 1, "one at a time");
        world.let_end.add_permits(1);
        assert_eq!(first.await.unwrap(), 0);
        settle().await;
        assert!(
            others.iter().all(|o| !o.is_finished()),
            "the first began before they came"
        );
        world.let_end.add_permits(1);
        for other in others {
            assert_eq!(other.await.unwrap(), 1);
        }
        let last = world.call();
        world.let_end.add_permits(1);
        assert_eq!(last.await.unwrap(), 2, "nothing is remembered");
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_does_not_take_the_others_along() {
        let world = World::new();
        let first = world.call();
        let second = world.call();
        settle().await;
        first.abort();
        settle().await;
        assert_eq!(world.begun(), 2, "the second begins it again");
        // It is closed already: a later one does not join it.
        let later = world.call();
        settle().await;
        world.let_end.add_permits(2);
        assert_eq!(second.await.unwrap(), 1);
        assert_eq!(later.await.unwrap(), 2);
    }
}
