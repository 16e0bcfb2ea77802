//! What the daemon itself asks of a disk's engine: how it fares, dropping replicas, stopping.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, VolumeId};
use ashlar_proto::wire::Status;

use super::results::status_of;
use super::{
    AdminReply, AdminRequest, BlockList, ChunkStore, DiskEngine, EngineCommand, EngineStatus, Life,
    ReplicaStatus, Work,
};
use crate::store::{ReplicaInfo, StoreError, StoreReply, StoreRequest};

impl<S: ChunkStore> DiskEngine<S> {
    pub(super) fn on_admin(
        &mut self,
        now: Time,
        tag: u64,
        request: AdminRequest,
        out: &mut Vec<EngineCommand>,
    ) {
        match request {
            AdminRequest::Status => {
                self.ask(now, Work::Status { tag }, StoreRequest::Stats, out);
            }
            AdminRequest::ListReplicas => {
                self.ask(now, Work::List { tag }, StoreRequest::ListReplicas, out);
            }
            AdminRequest::DropReplica { volume, epoch } => {
                let reply = match self.drop_replica(now, tag, volume, epoch, out) {
                    Ok(true) => return,
                    Ok(false) => AdminReply::Dropped,
                    Err(status) => AdminReply::Refused(status),
                };
                out.push(EngineCommand::Admin { tag, reply });
            }
            AdminRequest::PutLayers { volume, layers } => {
                let known = self.replicas.get(&volume).is_some_and(|r| !r.dropping);
                let refused = match self.refusal() {
                    None if known => None,
                    None => Some(Status::UnknownVolume),
                    refused => refused,
                };
                if let Some(status) = refused {
                    let reply = AdminReply::Refused(status);
                    return out.push(EngineCommand::Admin { tag, reply });
                }
                let request = StoreRequest::PutLayers { volume, layers };
                self.ask(now, Work::Layers { tag }, request, out);
            }
            AdminRequest::Flatten { volume } => {
                let request = StoreRequest::Flatten { volume };
                self.ask(now, Work::Flatten { tag }, request, out);
            }
            AdminRequest::ListBlocks(list) => {
                if let Err(status) = self.admit_list(&list) {
                    let reply = AdminReply::Refused(status);
                    return out.push(EngineCommand::Admin { tag, reply });
                }
                let BlockList {
                    volume,
                    epoch,
                    order,
                } = list;
                let work = Work::Blocks { tag, volume, epoch };
                self.ask(now, work, StoreRequest::ListBlocks { volume, order }, out);
            }
            AdminRequest::Stop => {
                if matches!(self.life, Life::Opening | Life::Serving) {
                    self.life = Life::Stopping(false);
                    self.cancel_pulls(now, |_, _| true, out);
                }
                out.push(EngineCommand::Admin {
                    tag,
                    reply: AdminReply::Stopping,
                });
                if matches!(self.life, Life::Failed(_) | Life::Stopped) {
                    out.push(EngineCommand::Stopped);
                }
            }
        }
    }

    /// Whether blocks may be listed. Snapshots were flushed everywhere: another incarnation has them still (S10).
    fn admit_list(&self, list: &BlockList) -> Result<(), Status> {
        if let Some(status) = self.refusal() {
            return Err(status);
        }
        if self.replicas.get(&list.volume).is_none_or(|r| r.dropping) {
            return Err(Status::UnknownVolume);
        }
        if list.epoch < self.fence_of(list.volume) {
            return Err(Status::Fenced);
        }
        Ok(())
    }

    /// A part of a list. A fence that was raised meanwhile may be a rebuild's, which changes layers.
    pub(super) fn blocks_listed(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        result: Result<StoreReply, StoreError>,
    ) -> AdminReply {
        match result {
            Ok(_) if epoch < self.fence_of(volume) => AdminReply::Refused(Status::Fenced),
            Ok(StoreReply::Blocks(runs)) => AdminReply::Blocks(runs),
            Ok(_) => AdminReply::Refused(Status::Invalid),
            Err(error) => AdminReply::Refused(status_of(&error)),
        }
    }

    /// Starts dropping a replica; false if there is none.
    fn drop_replica(
        &mut self,
        now: Time,
        tag: u64,
        volume: VolumeId,
        epoch: Epoch,
        out: &mut Vec<EngineCommand>,
    ) -> Result<bool, Status> {
        if let Some(status) = self.refusal() {
            return Err(status);
        }
        let fence = self.fence_of(volume);
        let Some(replica) = self.replicas.get(&volume) else {
            return Ok(false);
        };
        if fence > epoch {
            return Err(Status::Fenced);
        }
        if replica.dropping {
            return Err(Status::Busy);
        }
        self.forget_pulls(now, volume, out);
        if self.fencing.in_flight(volume) > 0 {
            // Somebody still uses it; the next heartbeat asks again.
            return Err(Status::Busy);
        }
        if let Some(replica) = self.replicas.get_mut(&volume) {
            replica.dropping = true;
        }
        self.ask(
            now,
            Work::Drop { tag, volume },
            StoreRequest::DropReplica { volume },
            out,
        );
        Ok(true)
    }

    pub(super) fn status(&self) -> EngineStatus {
        EngineStatus {
            identity: self.identity,
            store: self.last_stats,
            counters: self.counters,
            connections: self.connections.len() as u32,
            layers: self.last_layers.clone(),
            failure: match &self.life {
                Life::Failed(message) => Some(message.clone()),
                _ => None,
            },
            volumes: self
                .replicas
                .keys()
                .map(|&volume| (volume, self.fence_of(volume)))
                .collect(),
        }
    }

    pub(super) fn describe(&self, now: Time, list: Vec<ReplicaInfo>) -> Vec<ReplicaStatus> {
        list.into_iter()
            .map(|info| ReplicaStatus {
                pull: self.pull_summary(info.volume),
                pace: self.pull_pace(info.volume, now),
                info,
            })
            .collect()
    }

    /// While stopping: closes the store when nothing is under way any more.
    pub(super) fn shut_down_if_drained(&mut self, now: Time, out: &mut Vec<EngineCommand>) {
        if self.life == Life::Stopping(false) && self.identity.is_some() && self.table.len() == 0 {
            self.life = Life::Stopping(true);
            self.ask(now, Work::Shutdown, StoreRequest::Shutdown, out);
        }
    }
}
