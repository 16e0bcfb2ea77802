//! Starting a worker, and the handles by which others reach it.
//!
//! Invariant: a worker's inbox is bounded, and every message is followed by a wake-up of its reactor.

use std::io;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use ashlar_platform::reactor::{Reactor, ReactorConfig, Waker};
use ashlar_proto::ids::ClientId;
use tokio::sync::mpsc;

use super::messages::{FromWorker, ToWorker};
use super::worker::Worker;

/// Messages that may wait for a worker.
const INBOX_MAX: usize = 1024;
/// Settings of a worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Names the worker in messages.
    pub number: usize,
    /// This client process.
    pub client: ClientId,
    /// At shutdown, time for requests under way to be answered.
    pub drain_timeout: Duration,
    /// Where daemons on this machine have a unix socket per disk.
    pub local_sockets: Option<PathBuf>,
}

/// A running worker.
pub struct WorkerHandle {
    inbox: mpsc::Sender<ToWorker>,
    waker: Waker,
    /// Ends when the worker has shut down.
    pub thread: JoinHandle<io::Result<()>>,
}

/// Sends to a worker.
#[derive(Clone)]
pub struct WorkerSender {
    inbox: mpsc::Sender<ToWorker>,
    waker: Waker,
}

impl WorkerHandle {
    /// A way to send to the worker.
    pub fn sender(&self) -> WorkerSender {
        WorkerSender {
            inbox: self.inbox.clone(),
            waker: self.waker.clone(),
        }
    }
}

impl WorkerSender {
    /// Sends a message, waiting while the worker's inbox is full. False if the worker has ended.
    pub async fn send(&self, message: ToWorker) -> bool {
        let sent = self.inbox.send(message).await.is_ok();
        self.waker.wake();
        sent
    }

    /// As [`Self::send`], from a thread without runtime.
    pub fn blocking_send(&self, message: ToWorker) -> bool {
        let sent = self.inbox.blocking_send(message).is_ok();
        self.waker.wake();
        sent
    }
}

/// Starts a worker; its messages go to `control`.
///
/// # Errors
/// If there is no thread or no io_uring to be had.
pub fn spawn_worker(
    config: WorkerConfig,
    control: mpsc::Sender<FromWorker>,
) -> io::Result<WorkerHandle> {
    let (inbox, receiver) = mpsc::channel(INBOX_MAX);
    let (started, start) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{}", config.number))
        .spawn(move || {
            let reactor = match Reactor::new(ReactorConfig::default()) {
                Ok(reactor) => reactor,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let _ = started.send(Ok(reactor.waker()));
            Worker::new(config, reactor, receiver, control).run()
        })?;
    let waker = start
        .recv()
        .map_err(|_| io::Error::other("the worker ended at once"))??;
    Ok(WorkerHandle {
        inbox,
        waker,
        thread,
    })
}
