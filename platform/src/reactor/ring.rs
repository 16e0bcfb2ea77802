//! The io_uring instance: set-up with fallbacks, submission that never fails, one system call that both
//! submits and waits.
//!
//! Invariants:
//! - Every pushed entry yields exactly one completion (no multishot operations are used), so `in_flight`
//!   counts the operations whose memory the kernel may still touch.
//! - Whoever pushes an entry keeps its memory alive and in place until its completion (see `push`).
#![expect(unsafe_code, reason = "io_uring submission")]

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, squeue};

/// Completion entries per submission entry: connections and disks complete in bursts.
const COMPLETIONS_PER_SUBMISSION: u32 = 8;

/// What an operation came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub user_data: u64,
    /// Bytes or a descriptor, or a negative error number.
    pub result: i32,
}

impl Completion {
    /// The result as `io::Result`.
    pub fn outcome(self) -> io::Result<usize> {
        usize::try_from(self.result).map_err(|_| io::Error::from_raw_os_error(-self.result))
    }
}

pub(super) struct Ring {
    uring: IoUring,
    /// Entries that did not fit; submitted first.
    backlog: VecDeque<squeue::Entry>,
    in_flight: usize,
}

impl Ring {
    /// Sets up a ring, with the modern flags if the kernel has them.
    ///
    /// # Errors
    /// If the kernel has no io_uring, forbids it, or is too old (before 5.11).
    pub fn new(entries: u32) -> io::Result<Self> {
        let uring = build(entries)?;
        let params = uring.params();
        if !(params.is_feature_nodrop()
            && params.is_feature_ext_arg()
            && params.is_feature_submit_stable()
            && params.is_feature_fast_poll())
        {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old: Linux 5.11 or newer is needed",
            ));
        }
        Ok(Self {
            uring,
            backlog: VecDeque::new(),
            in_flight: 0,
        })
    }

    /// Operations whose completion has not been taken with [`Ring::next`] yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Queues an operation for the next [`Ring::enter`].
    ///
    /// # Safety
    /// All memory and descriptors that the entry names stay valid, and buffers unaliased as the
    /// operation needs, until the operation's completion was taken with [`Ring::next`].
    pub unsafe fn push(&mut self, entry: squeue::Entry) {
        self.in_flight += 1;
        if self.backlog.is_empty() {
            // SAFETY: passed on to this function's caller.
            if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                return;
            }
            // A full queue: make room. A failure leaves the entry in the backlog, for the next enter.
            if self.uring.submit().is_ok() {
                // SAFETY: as above.
                if unsafe { self.uring.submission().push(&entry) }.is_ok() {
                    return;
                }
            }
        }
        self.backlog.push_back(entry);
    }

    fn move_backlog(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: promised by the caller of `push`, who queued the entry.
            if unsafe { self.uring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits all that is queued and, if `wait`, waits for a completion or the timeout.
    ///
    /// # Errors
    /// Only those that mean that the ring is unusable.
    pub fn enter(&mut self, wait: bool, timeout: Option<Duration>) -> io::Result<()> {
        self.move_backlog();
        let wait = wait && self.backlog.is_empty() && self.uring.completion().is_empty();
        let want = usize::from(wait);
        let result = match timeout {
            Some(timeout) if wait => {
                let time = Timespec::from(timeout);
                self.uring
                    .submitter()
                    .submit_with_args(want, &SubmitArgs::new().timespec(&time))
            }
            _ => self.uring.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Timed out, interrupted by a signal, or short of memory or completion entries for now:
                // the caller looks at the completions and comes back.
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completion, if there is one.
    #[inline]
    pub fn next(&mut self) -> Option<Completion> {
        let entry = self.uring.completion().next()?;
        self.in_flight -= 1;
        Some(Completion {
            user_data: entry.user_data(),
            result: entry.result(),
        })
    }

    /// Registers an empty table of `count` files; false if the kernel refuses.
    pub fn register_files(&mut self, count: u32) -> bool {
        self.uring.submitter().register_files_sparse(count).is_ok()
    }

    /// Puts a descriptor (or -1: none) at `index` of the table; false if the kernel refuses.
    pub fn register_file(&mut self, index: u32, descriptor: i32) -> bool {
        self.uring
            .submitter()
            .register_files_update(index, &[descriptor])
            .is_ok()
    }
}

/// Tries the flags from best to plainest: some kernels and sandboxes refuse the newer ones.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut base = IoUring::builder();
    base.dontfork()
        .setup_clamp()
        .setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_SUBMISSION));
    // Linux 6.1: completions are processed only when this thread asks for them.
    let mut deferred = base.clone();
    deferred
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag();
    // Linux 5.19: no interrupts of the running thread for completions.
    let mut cooperative = base.clone();
    cooperative
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag();
    let mut last = None;
    for (name, builder) in [
        ("deferred", &deferred),
        ("cooperative", &cooperative),
        ("plain", &base),
    ] {
        match builder.build(entries) {
            Ok(uring) => {
                tracing::debug!(mode = name, "io_uring is set up");
                return Ok(uring);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}
