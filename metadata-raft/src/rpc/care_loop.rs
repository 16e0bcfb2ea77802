//! The leader's loop that lets daemons hold volumes which nobody uses, so that they are rebuilt (`planner::care`).
//!
//! Orders go out with heartbeats, all of a node's in each: what is not named any more is closed. Who wants such a volume has it
//! vacated first ([`Member::vacate`]): a volume that was closed cleanly opens without reconciling and without waiting for a lease.
//!
//! Invariants:
//! - A member that does not lead, or has not planned since it does, says nothing; daemons then hold what they have.
//! - A volume that somebody wanted is left alone for [`WANTED_FOR`].
//! - A daemon that does not leave in time loses the volume like any holder that is detached by force: whoever opens it fences it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ashlar_proto::ids::{ClientId, Epoch, NodeId, VolumeId};
use ashlar_proto::rpc::metadata as pb;

use super::member::{Fault, Member};
use crate::model::{Command, Operation, RequestKey};
use crate::planner::care::{self, Caps, Orders};

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a volume is left alone after somebody wanted it.
const WANTED_FOR: Duration = Duration::from_secs(30);
/// Time for a daemon to hear that it is to leave (a heartbeat), and to close.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(1500);

/// What the leader has ordered.
#[derive(Default)]
pub struct CareBoard(Mutex<Board>);

#[derive(Default)]
struct Board {
    /// `None`: not planned yet.
    orders: Option<Orders>,
    /// Until when volumes are left alone.
    wanted: BTreeMap<VolumeId, Instant>,
}

impl CareBoard {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, volume: VolumeId, now: Instant) {
        let mut board = self.lock();
        board.wanted.insert(volume, now + WANTED_FOR);
        for volumes in board.orders.iter_mut().flat_map(BTreeMap::values_mut) {
            volumes.remove(&volume);
        }
    }
}

/// Runs for the life of the member.
pub async fn run(member: Arc<Member>) {
    let mut role = member.role.clone();
    loop {
        let leads = role.wait_for(|r| r.leading_term.is_some() || r.stopping);
        if leads.await.is_err() || role.borrow().stopping {
            return;
        }
        round(&member);
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            _ = role.changed() => {}
        }
        if role.borrow().leading_term.is_none() {
            member.care.lock().orders = None;
        }
    }
}

fn round(member: &Member) {
    let now = Instant::now();
    member.with_view(|state, view| {
        let mut board = member.care.lock();
        let Board { orders, wanted } = &mut *board;
        wanted.retain(|_, until| now < *until);
        let before = orders.take().unwrap_or_default();
        let next = care::plan(state, view, Caps::default(), &before, |volume| {
            wanted.contains_key(&volume)
        });
        for (node, volumes) in &next {
            for volume in volumes.iter().filter(|v| !has(&before, *node, **v)) {
                tracing::info!(%volume, %node, "nobody uses a volume that is to be rebuilt: a daemon holds it");
            }
        }
        *orders = Some(next);
    });
}

fn has(orders: &Orders, node: NodeId, volume: VolumeId) -> bool {
    orders.get(&node).is_some_and(|v| v.contains(&volume))
}

impl Member {
    /// What a heartbeat's answer says to a node.
    pub(super) fn care_orders(&self, node: NodeId) -> Option<pb::CareOrders> {
        // In the order of `round`.
        let state = self.shared.state();
        let board = self.care.lock();
        let ordered = board.orders.as_ref()?.get(&node);
        let volumes = ordered.into_iter().flatten();
        let volumes = volumes.filter_map(|id| state.volume(*id));
        let volumes = volumes.map(|v| pb::Care {
            volume_id: v.id.to_vec(),
            volume_name: v.name.clone(),
            first_open: !v.opened_once && (v.source.is_none() || v.parent.is_some()),
        });
        Some(pb::CareOrders {
            volumes: volumes.collect(),
        })
    }

    fn carer(&self, id: VolumeId) -> Option<(ClientId, Epoch)> {
        let state = self.shared.state();
        let volume = state.volume(id).filter(|v| v.is_in_care())?;
        let holder = volume.holder.as_ref()?;
        Some((holder.client, volume.epoch))
    }

    /// Lets a daemon leave that holds the volume only to care for it.
    pub(super) async fn vacate(&self, id: VolumeId) -> Result<(), Fault> {
        if self.role.borrow().leading_term.is_none() {
            return Err(Fault::NotLeader);
        }
        if self.carer(id).is_none() {
            return Ok(());
        }
        let began = Instant::now();
        self.care.want(id, began);
        let mut changes = self.shared.subscribe();
        while let Some((client, epoch)) = self.carer(id) {
            let left = LEAVE_TIMEOUT.saturating_sub(began.elapsed());
            // However the wait ends, the state tells.
            if !left.is_zero() {
                let _ = tokio::time::timeout(left, changes.recv()).await;
                continue;
            }
            tracing::warn!(volume = %id, %client, "a daemon that cares for a volume does not leave it: it is taken from it");
            let command = Command {
                request: RequestKey::generate(),
                operation: Operation::CloseVolume {
                    volume: id,
                    client,
                    epoch,
                    clean: false,
                },
            };
            return match self.propose(command).await {
                // A refusal: it changed at this moment; what is asked for next finds out.
                Ok(_) | Err(Fault::Status(_)) => Ok(()),
                Err(fault) => Err(fault),
            };
        }
        Ok(())
    }
}
