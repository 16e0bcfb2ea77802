//! What a member tells of itself and, while it leads, of the cluster: collected at a scrape.
//!
//! Invariant: one pass over the volumes per scrape, under the state's read lock, nothing in between.

use std::sync::{Arc, PoisonError};

use ashlar_platform::observe::{Metric, Observer, Scrape};
use ashlar_proto::ids::ReplicaState;
use tonic_health::server::HealthReporter;

use super::liveness::View;
use super::member::Member;
use crate::metrics;
use crate::model::{Node, State, Volume, attacher_id, view};
use crate::planner::DiskView;

/// Name of the metadata service for the gRPC health service.
pub const SERVICE: &str = "ashlar.metadata.v1.Metadata";

/// The replicas of all volumes in numbers.
#[derive(Default)]
struct Counts {
    ok: u64,
    degraded: u64,
    waiting: u64,
    attached: u64,
    silent: u64,
    in_sync: u64,
    rebuilding: u64,
    stale: u64,
}

impl Counts {
    /// Of a deleted volume that is kept for its snapshots only the replicas count.
    fn add(&mut self, volume: &Volume, node_alive: impl Fn(&Volume) -> bool) {
        let (mut all_in_sync, mut waiting) = (true, false);
        for group in &volume.groups {
            let mut in_sync = 0_u64;
            for replica in group {
                match replica.state {
                    ReplicaState::InSync => in_sync += 1,
                    ReplicaState::Rebuilding => self.rebuilding += 1,
                    ReplicaState::Stale => self.stale += 1,
                }
            }
            self.in_sync += in_sync;
            all_in_sync &= in_sync == group.len() as u64;
            waiting |= in_sync < u64::from(volume.min_replicas);
        }
        if volume.hidden {
            return;
        }
        match (waiting, all_in_sync) {
            (true, _) => self.waiting += 1,
            (false, false) => self.degraded += 1,
            (false, true) => self.ok += 1,
        }
        if volume.holder.is_some() && !volume.is_in_care() {
            self.attached += 1;
            self.silent += u64::from(!node_alive(volume));
        }
    }
}

impl Member {
    /// Why this member cannot serve, if so.
    ///
    /// # Errors
    /// The reason.
    pub fn readiness(&self) -> Result<(), String> {
        let role = self.role.borrow();
        match (&role.leader, role.in_touch) {
            _ if role.stopping => Err("stopping".to_owned()),
            (None, _) => Err(
                "no leader is known: a majority of the metadata members must be up and reach each other"
                    .to_owned(),
            ),
            (Some((id, _)), false) if *id == self.id => {
                Err("this member leads, but no majority answers it".to_owned())
            }
            (Some((id, address)), false) => {
                Err(format!("the leader, member {id} at {address}, is silent"))
            }
            (Some(_), true) => Ok(()),
        }
    }

    /// Lets an observer tell of this member.
    pub fn observe(self: &Arc<Self>, observer: &Observer) {
        let member = self.clone();
        observer.ready_when(move || member.readiness());
        let member = self.clone();
        observer.on_scrape(move |scrape| {
            member.collect(&scrape);
            async {}
        });
    }

    fn collect(&self, scrape: &Scrape) {
        let cluster = self.cluster();
        let leads = self.role.borrow().leading_term.is_some();
        scrape.set(&metrics::IS_LEADER, &[], leads);
        scrape.set(&metrics::KNOWS_LEADER, &[], self.readiness().is_ok());
        scrape.set(&metrics::TERM, &[], cluster.term);
        scrape.set(&metrics::LAST_APPLIED, &[], cluster.last_applied);
        let voters = cluster.members.iter().filter(|m| m.voter).count();
        let learners = cluster.members.len() - voters;
        scrape.set(&metrics::MEMBERS, &["voter"], voters);
        scrape.set(&metrics::MEMBERS, &["learner"], learners);
        if leads {
            self.with_view(|state, view| collect_cluster(scrape, state, view));
            let repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
            let put = |label: &str, n: u32| scrape.set(&metrics::REPLICAS_TO_MOVE, &[label], n);
            put("waiting", repairs.waiting);
            put("unplaced", repairs.unplaced_total);
        }
    }

    /// Keeps the gRPC health service current: the process serves, the metadata service is of use while
    /// this member is in touch with a leader.
    pub(super) async fn report_health(self: Arc<Self>, health: HealthReporter) {
        let mut role = self.role.clone();
        loop {
            let stopping = role.borrow_and_update().stopping;
            let status = |serves| {
                if serves {
                    tonic_health::ServingStatus::Serving
                } else {
                    tonic_health::ServingStatus::NotServing
                }
            };
            health.set_service_status("", status(!stopping)).await;
            let ready = self.readiness().is_ok();
            health.set_service_status(SERVICE, status(ready)).await;
            if stopping || role.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Whether no storage daemon has registered this node: it attaches volumes and sends no heartbeats.
fn only_attaches(node: &Node) -> bool {
    node.id == attacher_id(&node.name)
}

fn collect_cluster(scrape: &Scrape, state: &State, view: &View<'_>) {
    let mut counts = Counts::default();
    for volume in state.volumes() {
        counts.add(volume, |volume| {
            // Only storage daemons send heartbeats: of a client elsewhere nothing is known.
            let holder = volume.holder.as_ref().and_then(|h| state.node(h.node));
            holder.is_none_or(|node| {
                only_attaches(node) || view.liveness.node_alive(view.now, node.id)
            })
        });
    }
    let put = |metric: &Metric, label: &str, value: u64| scrape.set(metric, &[label], value);
    put(&metrics::VOLUMES, "ok", counts.ok);
    put(&metrics::VOLUMES, "degraded", counts.degraded);
    put(&metrics::VOLUMES, "waiting", counts.waiting);
    scrape.set(&metrics::VOLUMES_ATTACHED, &[], counts.attached);
    scrape.set(&metrics::ATTACHMENTS_SILENT, &[], counts.silent);
    put(&metrics::REPLICAS, "in_sync", counts.in_sync);
    put(&metrics::REPLICAS, "rebuilding", counts.rebuilding);
    put(&metrics::REPLICAS, "stale", counts.stale);
    scrape.set(&metrics::REPLICAS_TO_DROP, &[], state.garbage_count());

    let [pending, ready, deleting, hidden] = state.snapshots().counts();
    scrape.set(&metrics::SNAPSHOTS, &["pending"], pending);
    scrape.set(&metrics::SNAPSHOTS, &["ready"], ready);
    scrape.set(&metrics::SNAPSHOTS, &["deleting"], deleting);
    scrape.set(&metrics::SNAPSHOTS, &["hidden"], hidden);

    let (mut alive, mut silent, mut attach_only) = (0, 0, 0);
    for node in state.nodes() {
        if only_attaches(node) {
            attach_only += 1;
        } else if view.liveness.node_alive(view.now, node.id) {
            alive += 1;
        } else {
            silent += 1;
        }
    }
    put(&metrics::NODES, "alive", alive);
    put(&metrics::NODES, "silent", silent);
    put(&metrics::NODES, "attach_only", attach_only);

    let (mut alive, mut silent, mut failed) = (0, 0, 0);
    for disk in state.disks() {
        if view.liveness.disk(disk.id).failed {
            failed += 1;
        } else if view.alive(disk.id) {
            alive += 1;
        } else {
            silent += 1;
        }
    }
    put(&metrics::DISKS, "alive", alive);
    put(&metrics::DISKS, "silent", silent);
    put(&metrics::DISKS, "failed", failed);

    for pool in state.pools() {
        let pool = view::pool(state, pool, |disk| view.used_bytes(disk));
        put(&metrics::POOL_CAPACITY, &pool.name, pool.capacity_bytes);
        put(&metrics::POOL_USED, &pool.name, pool.used_bytes);
        put(
            &metrics::POOL_PROVISIONED,
            &pool.name,
            pool.provisioned_bytes,
        );
    }
}
