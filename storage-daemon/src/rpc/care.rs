//! Volumes that this daemon holds because nobody uses them and they are to be rebuilt: a rebuild needs a holder.
//!
//! Invariants:
//! - It holds what the last orders name and nothing else; what they do not name any more is closed cleanly.
//! - Nothing is read or written here: opening reconciles, the repair loop of the metadata leader starts the rebuilds, the session
//!   of the holder carries them through.
//! - Threads and memory for it are there only while something is held.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{ClientId, NodeId, VolumeId};
use ashlar_proto::rpc::metadata::CareOrders;
use nbd_client::client::{
    Ended, Endpoint, Host, HostConfig, HostThreads, HostedVolume, OpenSpec, Phase,
};

/// Time for an orderly end of a volume.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Threads end when nothing was held for so long.
const IDLE: Duration = Duration::from_secs(30);
/// After an open that failed, and after no threads could be had.
const RETRY_AFTER: Duration = Duration::from_secs(5);

struct Held {
    volume: HostedVolume,
    name: String,
    closing: bool,
    /// When its end was noticed: kept for a pause.
    ended: Option<Instant>,
}

/// See the module.
pub struct Care {
    metadata: Vec<String>,
    node: NodeId,
    local_sockets: Option<PathBuf>,
    host: Option<(Host, HostThreads)>,
    held: BTreeMap<VolumeId, Held>,
    last_used: Instant,
    retry_at: Option<Instant>,
}

impl Care {
    /// Holds nothing yet.
    pub fn new(metadata: Vec<String>, node: NodeId, local_sockets: Option<PathBuf>) -> Self {
        Self {
            metadata,
            node,
            local_sockets,
            host: None,
            held: BTreeMap::new(),
            last_used: Instant::now(),
            retry_at: None,
        }
    }

    /// Carries out what a heartbeat's answer said.
    pub async fn follow(&mut self, orders: CareOrders, now: Instant) {
        let mut named = BTreeMap::new();
        for order in orders.volumes {
            match VolumeId::from_slice(&order.volume_id) {
                Some(id) => drop(named.insert(id, (order.volume_name, order.first_open))),
                None => {
                    tracing::warn!("the metadata cluster orders to hold a volume without naming it")
                }
            }
        }
        self.notice_ends(now);
        for (id, held) in &mut self.held {
            if !named.contains_key(id) && !held.closing && held.ended.is_none() {
                held.closing = true;
                held.volume.close().await;
            }
        }
        for (id, (name, first_open)) in named {
            if !self.held.contains_key(&id) {
                self.open(id, name, first_open, now).await;
            }
        }
        self.rest(now).await;
    }

    fn notice_ends(&mut self, now: Instant) {
        for held in self.held.values_mut().filter(|h| h.ended.is_none()) {
            let Phase::Ended(how) = held.volume.status().phase else {
                continue;
            };
            held.ended = Some(now);
            let volume = held.name.as_str();
            if held.closing || matches!(how, Ended::Superseded | Ended::Deleted) {
                tracing::info!(volume, %how, "no longer holds a volume for its rebuild");
            } else {
                tracing::warn!(volume, %how, "cannot hold a volume for its rebuild");
            }
        }
        self.held.retain(|_, held| match held.ended {
            Some(_) if held.closing => false,
            Some(ended) => now.duration_since(ended) < RETRY_AFTER,
            None => true,
        });
    }

    async fn open(&mut self, id: VolumeId, name: String, first_open: bool, now: Instant) {
        let Some(host) = self.host(now) else {
            return;
        };
        tracing::info!(
            volume = name,
            "holds a volume that nobody uses, so that it is rebuilt"
        );
        let spec = OpenSpec {
            node: self.node,
            care: true,
            first_open,
            ..OpenSpec::new(id, name.clone(), Endpoint::Given)
        };
        let held = Held {
            volume: host.open(spec).await,
            name,
            closing: false,
            ended: None,
        };
        self.held.insert(id, held);
    }

    fn host(&mut self, now: Instant) -> Option<Host> {
        if let Some((host, _)) = &self.host {
            return Some(host.clone());
        }
        if self.retry_at.is_some_and(|at| now < at) {
            return None;
        }
        let config = HostConfig {
            metadata: self.metadata.clone(),
            client: ClientId::generate(),
            threads: 1,
            local_sockets: self.local_sockets.clone(),
            close_timeout: CLOSE_TIMEOUT,
        };
        match Host::start(config) {
            Ok(started) => {
                let host = started.0.clone();
                self.host = Some(started);
                Some(host)
            }
            Err(error) => {
                tracing::error!(%error, "cannot hold volumes for their rebuilds");
                self.retry_at = Some(now + RETRY_AFTER);
                None
            }
        }
    }

    async fn rest(&mut self, now: Instant) {
        if !self.held.is_empty() {
            self.last_used = now;
        } else if now.duration_since(self.last_used) >= IDLE
            && let Some((host, threads)) = self.host.take()
        {
            host.shut_down().await;
            threads.join();
        }
    }

    /// Closes everything, before the disks stop.
    pub async fn shut_down(&mut self) {
        let open = |h: &&Held| h.ended.is_none();
        for held in self.held.values().filter(open) {
            held.volume.close().await;
        }
        let ends = self.held.values().filter(open).map(|h| h.volume.ended());
        let all = futures::future::join_all(ends);
        if tokio::time::timeout(CLOSE_TIMEOUT * 2, all).await.is_err() {
            tracing::warn!(
                "volumes held for their rebuilds were not closed in time; their next open reconciles"
            );
        }
        self.held.clear();
        if let Some((host, threads)) = self.host.take() {
            host.shut_down().await;
            threads.join();
        }
    }
}
