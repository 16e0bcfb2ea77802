//! The tokio side of the workers: gives them their volumes, answers what they ask of the metadata
//! cluster, watches the volumes, and tells their owners how they are.
//!
//! Invariants:
//! - A volume's index is never used again in a process, so a late message finds nothing.
//! - Whoever opened a volume learns of its end exactly once, by [`Phase::Ended`] in its status.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ashlar_platform::clock;
use ashlar_proto::ids::{ClientId, Epoch};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::attachment::Volume;
use super::host::{Ended, OpenSpec, Phase, SnapshotSpec, VolumeStatus};
use super::messages::{FromWorker, ToWorker, VolumeSetup};
use super::metadata::Members;
use super::worker_handle::WorkerSender;
use crate::engine::{MetadataRequest, Session, SessionConfig, StopReason};

/// Session numbers: upper 16 bits of request ids, of which one is not for sessions.
const SESSION_NUMBERS: usize = u16::MAX as usize;

/// A volume to be opened, and where its status goes.
pub(super) struct Open {
    pub index: usize,
    pub spec: OpenSpec,
    pub status: watch::Sender<VolumeStatus>,
}

/// A volume that is being served.
struct Served {
    volume: Arc<Volume>,
    session_number: u16,
    status: watch::Sender<VolumeStatus>,
    tasks: JoinSet<()>,
    watching: bool,
}

/// See the module.
pub(super) struct Control {
    pub client: ClientId,
    pub members: Members,
    pub senders: Vec<WorkerSender>,
    pub inbox: mpsc::Receiver<FromWorker>,
    pub opens: mpsc::Receiver<Box<Open>>,
    served: BTreeMap<usize, Served>,
}

impl Control {
    pub fn new(
        client: ClientId,
        members: Members,
        senders: Vec<WorkerSender>,
        inbox: mpsc::Receiver<FromWorker>,
        opens: mpsc::Receiver<Box<Open>>,
    ) -> Self {
        Self {
            client,
            members,
            senders,
            inbox,
            opens,
            served: BTreeMap::new(),
        }
    }

    /// Runs until every worker has ended.
    pub async fn run(mut self) {
        let mut opening = true;
        loop {
            tokio::select! {
                message = self.inbox.recv() => match message {
                    Some(message) => self.message(message).await,
                    None => break,
                },
                open = self.opens.recv(), if opening => match open {
                    Some(open) => self.open(*open).await,
                    None => opening = false,
                },
            }
        }
        for (_, served) in std::mem::take(&mut self.served) {
            end(&served, Ended::Failed("the reactor threads ended".into()));
        }
    }

    async fn open(&mut self, open: Open) {
        let Open {
            index,
            spec,
            status,
        } = open;
        let used = |n: u16| self.served.values().any(|s| s.session_number == n);
        let numbers = (0..SESSION_NUMBERS).map(|n| ((index + n) % SESSION_NUMBERS) as u16);
        let Some(session_number) = numbers.clone().find(|n| !used(*n)) else {
            let error = "too many volumes in one process".to_owned();
            status.send_modify(|s| s.phase = Phase::Ended(Ended::Failed(error)));
            return;
        };
        let worker = self.senders[index % self.senders.len()].clone();
        let volume = Volume {
            index,
            name: spec.name.clone(),
            id: spec.volume,
            client: self.client,
            node: spec.node,
            force: spec.force,
            first_open: spec.first_open,
            revert: spec.revert,
            care: spec.care,
            snapshot: spec.snapshot.map(|s| s.id),
            members: self.members.clone(),
            worker,
            disks: Mutex::default(),
            granted_epoch: AtomicU64::new(0),
            closed_epoch: AtomicU64::new(0),
        };
        let setup = VolumeSetup {
            index,
            volume: volume.id,
            name: spec.name,
            endpoint: spec.endpoint,
            read_only: spec.read_only || spec.snapshot.is_some(),
            engine: Box::new(engine(
                &volume,
                session_number,
                spec.read_only,
                spec.snapshot,
            )),
        };
        let served = Served {
            volume: Arc::new(volume),
            session_number,
            status,
            tasks: JoinSet::new(),
            watching: false,
        };
        let worker = served.volume.worker.clone();
        self.served.insert(index, served);
        worker.send(ToWorker::Add(Box::new(setup))).await;
    }

    async fn message(&mut self, message: FromWorker) {
        match message {
            FromWorker::Metadata { index, request } => self.metadata(index, request),
            FromWorker::Resolve {
                worker,
                disk,
                address,
            } => {
                let Some(sender) = self.senders.get(worker).cloned() else {
                    return;
                };
                tokio::spawn(async move {
                    let address = match tokio::net::lookup_host(&address).await {
                        Ok(mut found) => found.next().ok_or_else(|| "no address".to_owned()),
                        Err(error) => Err(error.to_string()),
                    };
                    sender.send(ToWorker::Resolved { disk, address }).await;
                });
            }
            FromWorker::Listening { index, address } => {
                let Some(served) = self.served.get(&index) else {
                    return;
                };
                let name = &served.volume.name;
                match address {
                    Some(address) => tracing::info!(volume = name, %address, "listening"),
                    None => tracing::info!(volume = name, "listening"),
                }
            }
            FromWorker::Serving { index, size_bytes } => {
                if let Some(served) = self.served.get(&index) {
                    if served.status.borrow().phase == Phase::Opening {
                        tracing::info!(volume = served.volume.name, "open and served");
                    }
                    let epoch = served.volume.granted_epoch.load(Ordering::Relaxed);
                    served.status.send_modify(|s| {
                        s.phase = Phase::Serving;
                        s.size_bytes = size_bytes;
                        s.epoch = Epoch(epoch);
                    });
                }
            }
            FromWorker::Connections { index, count } => {
                if let Some(served) = self.served.get(&index) {
                    served.status.send_modify(|s| s.connections = count);
                }
            }
            FromWorker::Stopped { index, reason } => {
                if let Some(served) = self.served.remove(&index) {
                    stopped(&served, reason);
                }
            }
            FromWorker::Abandoned { index } => {
                if let Some(served) = self.served.remove(&index) {
                    tracing::info!(volume = served.volume.name, "left without closing it");
                    end(&served, Ended::Abandoned);
                }
            }
            FromWorker::Failed { index, error } => {
                if let Some(served) = self.served.remove(&index) {
                    let volume = &served.volume.name;
                    tracing::error!(volume, error, "cannot serve the volume: check its socket");
                    end(&served, Ended::Failed(error));
                }
            }
        }
    }

    fn metadata(&mut self, index: usize, request: MetadataRequest) {
        let Some(served) = self.served.get_mut(&index) else {
            return;
        };
        // Finished tasks are cleared away, so that the set stays small.
        while served.tasks.try_join_next().is_some() {}
        let volume = served.volume.clone();
        // The first question of a session, whatever it is.
        let opens = match request {
            MetadataRequest::Open | MetadataRequest::Join => true,
            MetadataRequest::Confirm => volume.snapshot.is_some(),
            _ => false,
        };
        if opens && !served.watching {
            served.watching = true;
            served
                .tasks
                .spawn(async move { volume.open_and_watch(request).await });
        } else {
            served
                .tasks
                .spawn(async move { volume.answer(request).await });
        }
    }
}

fn engine(
    volume: &Volume,
    session_number: u16,
    read_only: bool,
    snapshot: Option<SnapshotSpec>,
) -> Session {
    let mut config = SessionConfig::new(volume.id, volume.client);
    config.node = volume.node;
    config.session_number = session_number;
    config.read_only = read_only || snapshot.is_some();
    config.snapshot = snapshot.map(|s| s.source);
    Session::new(config, clock::now())
}

fn end(served: &Served, ended: Ended) {
    served.status.send_modify(|s| {
        s.connections = 0;
        s.phase = Phase::Ended(ended);
    });
}

fn stopped(served: &Served, reason: StopReason) {
    let volume = &served.volume.name;
    let ended = match reason {
        StopReason::Closed => {
            tracing::info!(volume, "closed");
            let epoch = served.volume.closed_epoch.load(Ordering::Relaxed);
            Ended::Closed { epoch }
        }
        StopReason::Superseded => Ended::Superseded,
        StopReason::OpenRefused(reason) => Ended::Refused(reason),
        StopReason::Deleted => Ended::Deleted,
    };
    if !matches!(ended, Ended::Closed { .. }) {
        tracing::error!(volume, why = %ended, "stopped serving a volume; its connections are dropped");
    }
    end(served, ended);
}
