//! The handle that the daemon holds of a disk's thread: starting it, asking it, and what it publishes.
//!
//! Invariants:
//! - Requests go over a bounded channel; a thread that does not take them counts as silent.
//! - A thread that ends without saying so is published as failed.
//! - A thread without a handle ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ashlar_platform::reactor::Waker;
use tokio::sync::{oneshot, watch};

use crate::config::DiscardPolicy;
use crate::engine::{AdminReply, AdminRequest};
use crate::error::DiskError;
use crate::node::DiskThread;
use crate::store::{StoreConfig, StoreIdentity};

/// Administrative requests that may wait for a disk's thread.
const CONTROL_QUEUE: usize = 64;
/// How long the daemon waits for an administrative answer.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(5);
/// What a disk's thread is told when it starts.
#[derive(Clone, Debug)]
pub struct DiskThreadConfig {
    /// The file or device.
    pub path: PathBuf,
    /// Where to listen; port 0 for any.
    pub listen: SocketAddr,
    /// Where to listen on a unix socket as well, `DISK-ID.sock` in this directory.
    pub local_sockets: Option<PathBuf>,
    /// What becomes of free space.
    pub discard: DiscardPolicy,
    /// The store's bounds.
    pub store: StoreConfig,
}

/// Where a disk's thread is.
#[derive(Clone, PartialEq, Debug)]
pub enum DiskState {
    /// Recovering.
    Opening,
    /// Serving at this address.
    Serving {
        /// Who the disk is.
        identity: StoreIdentity,
        /// Where it listens.
        address: SocketAddr,
    },
    /// Not served; the disk, if it could be opened, refuses every request.
    Failed {
        /// Why.
        message: String,
        /// Who the disk is and where it listens, if it was served.
        served: Option<(StoreIdentity, SocketAddr)>,
    },
    /// Closed cleanly.
    Stopped,
}

/// A request on its way to the thread.
pub(crate) struct Control {
    pub(crate) request: AdminRequest,
    pub(crate) answer: oneshot::Sender<AdminReply>,
}

/// The thread did not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskGone {
    /// It ended.
    #[error("the disk's thread has ended")]
    Ended,
    /// It has too much to do.
    #[error("the disk's thread does not answer")]
    Silent,
}

/// A disk's thread, as the daemon sees it.
pub struct DiskHandle {
    /// `None` only while it is dropped.
    control: Option<SyncSender<Control>>,
    waker: Waker,
    state: watch::Receiver<DiskState>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl DiskHandle {
    /// Opens the disk's file and starts its thread; `Serving` or `Failed` follows in `state`.
    ///
    /// # Errors
    /// If the file cannot be opened, or there is no io_uring.
    pub fn start(config: DiskThreadConfig) -> Result<Self, DiskError> {
        let path = config.path.clone();
        let failed = |message: String| DiskError::Thread {
            path: path.clone(),
            message,
        };
        let (control, receiver) = sync_channel(CONTROL_QUEUE);
        let (publish, state) = watch::channel(DiskState::Opening);
        // The reactor is made on the thread that uses it; its waker comes back once.
        let (ready, made) = sync_channel::<Result<Waker, DiskError>>(1);
        let name = path
            .file_name()
            .map_or("disk".into(), |n| n.to_string_lossy().into_owned());
        let thread = std::thread::Builder::new()
            .name(format!("disk {name}"))
            .spawn(move || {
                let guard = Obituary(publish.clone());
                let prepared = DiskThread::prepare(config, publish);
                match prepared {
                    Err(error) => {
                        let _ = ready.send(Err(error));
                    }
                    Ok(mut thread) => {
                        let _ = ready.send(Ok(thread.reactor.waker()));
                        thread.run(&receiver);
                    }
                }
                drop(guard);
            })
            .map_err(|error| failed(format!("cannot start its thread: {error}")))?;
        let waker = made
            .recv()
            .map_err(|_| failed("its thread ended at once".to_owned()))??;
        Ok(Self {
            control: Some(control),
            waker,
            state,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// What the thread publishes.
    pub fn state(&self) -> watch::Receiver<DiskState> {
        self.state.clone()
    }

    /// Asks the thread.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminReply, DiskGone> {
        let answer = self.post(request)?;
        match tokio::time::timeout(ADMIN_TIMEOUT, answer).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(DiskGone::Ended),
            Err(_) => Err(DiskGone::Silent),
        }
    }

    /// Asks the thread, from code without a runtime.
    pub fn admin_blocking(&self, request: AdminRequest) -> Result<AdminReply, DiskGone> {
        self.post(request)?
            .blocking_recv()
            .map_err(|_| DiskGone::Ended)
    }

    fn post(&self, request: AdminRequest) -> Result<oneshot::Receiver<AdminReply>, DiskGone> {
        let (answer, receiver) = oneshot::channel();
        let control = self.control.as_ref().ok_or(DiskGone::Ended)?;
        match control.try_send(Control { request, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(DiskGone::Silent),
            Err(TrySendError::Disconnected(_)) => return Err(DiskGone::Ended),
        }
        self.waker.wake();
        Ok(receiver)
    }

    /// Waits for the thread's end, after [`AdminRequest::Stop`].
    pub fn join(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a disk's thread panicked");
        }
    }
}

impl DiskHandle {
    /// Ends the thread as the death of the process would: nothing is finished, flushed or marked.
    pub fn abandon(self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(self);
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("a disk's thread panicked");
        }
    }
}

/// A thread without a handle ends.
impl Drop for DiskHandle {
    fn drop(&mut self) {
        self.control = None;
        self.waker.wake();
    }
}

/// Publishes the end of a thread that ended without saying so.
struct Obituary(watch::Sender<DiskState>);

impl Drop for Obituary {
    fn drop(&mut self) {
        self.0.send_if_modified(|state| {
            let served = match state {
                DiskState::Stopped | DiskState::Failed { .. } => return false,
                DiskState::Serving { identity, address } => Some((*identity, *address)),
                DiskState::Opening => None,
            };
            *state = DiskState::Failed {
                message: "the disk's thread ended".to_owned(),
                served,
            };
            true
        });
    }
}
