//! Waking a reactor from other threads: an eventfd, written once however many wake before it is heard.
//!
//! Invariant: `pending` is cleared before [`super::Event::Woken`] is delivered, so whatever a thread queued
//! before its `wake` is seen by a consumer that looks at its queue upon `Woken`.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::EventfdFlags;

/// Wakes one reactor: its `wait` returns with [`super::Event::Woken`].
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
}

struct Shared {
    eventfd: OwnedFd,
    pending: AtomicBool,
}

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        let eventfd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self {
            shared: Arc::new(Shared {
                eventfd,
                pending: AtomicBool::new(false),
            }),
        })
    }

    /// Wakes the reactor, from any thread. Cheap while an earlier wake is still unheard.
    pub fn wake(&self) {
        if self.shared.pending.swap(true, Ordering::AcqRel) {
            return;
        }
        // The counter never comes near its limit (one unit per unheard wake), so this does not block.
        if let Err(error) = rustix::io::write(&self.shared.eventfd, &1_u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake a reactor; restart the process");
        }
    }

    /// The reactor heard it.
    pub(super) fn heard(&self) {
        self.shared.pending.swap(false, Ordering::AcqRel);
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.shared.eventfd.as_raw_fd()
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}
