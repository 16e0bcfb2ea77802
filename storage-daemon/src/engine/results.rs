//! Answers of the store: what they mean for whoever asked.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, VolumeId};
use ashlar_proto::wire::{FenceReply, ReplyBody, Status};

use super::fencing::Tickets;
use super::{
    AdminReply, ChunkStore, ClientRequest, DiskEngine, EngineCommand, Life, Replica, Stage, Work,
    body_of,
};
use crate::store::{ReplicaInfo, StoreError, StoreReply, StoreRequest};

/// A request that is done, and its answer.
type Concluded = (ClientRequest, Result<ReplyBody, Status>);

/// How a store's refusal reads on the wire.
pub(super) fn status_of(error: &StoreError) -> Status {
    match error {
        StoreError::NotReady | StoreError::Busy => Status::Busy,
        StoreError::NoSpace => Status::NoSpace,
        StoreError::DiskFailed
        | StoreError::NotFormatted(_)
        | StoreError::FormatVersion(_)
        | StoreError::TooSmall(_) => Status::DiskFailed,
        StoreError::Invalid(_) => Status::Invalid,
        StoreError::Checksum => Status::Checksum,
        StoreError::UnknownVolume | StoreError::NoParent => Status::UnknownVolume,
        StoreError::SnapshotGone | StoreError::HasClones => Status::WrongState,
        StoreError::Fenced(_) => Status::Fenced,
    }
}

impl<S: ChunkStore> DiskEngine<S> {
    pub(super) fn on_result(
        &mut self,
        now: Time,
        tag: u64,
        result: Result<StoreReply, StoreError>,
        out: &mut Vec<EngineCommand>,
    ) {
        let Some(work) = self.table.remove(tag) else {
            debug_assert!(false, "the store answered what nobody asked");
            return;
        };
        match work {
            Work::Client(client) => self.on_client_result(now, client, result, out),
            Work::Pull {
                volume,
                group,
                number,
                token,
                admitted,
            } => {
                if let Some(epoch) = admitted {
                    self.finish(now, volume, epoch, out);
                }
                self.on_pull_result(now, (volume, group), number, token, result, out);
            }
            Work::Load => self.on_load(now, result, out),
            Work::Status { tag } => {
                if let Ok(StoreReply::Stats(stats)) = result {
                    self.last_stats = stats;
                }
                self.ask(
                    now,
                    Work::Progress { tag },
                    StoreRequest::LayerProgress,
                    out,
                );
            }
            Work::Progress { tag } => {
                if let Ok(StoreReply::LayerProgress(layers)) = result {
                    self.last_layers = layers;
                }
                let reply = AdminReply::Status(Box::new(self.status()));
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::Layers { tag } => {
                let reply = match result {
                    Ok(_) => AdminReply::LayersKept,
                    Err(error) => AdminReply::Refused(status_of(&error)),
                };
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::Flatten { tag } => {
                let reply = match result {
                    Ok(_) => AdminReply::Flattening,
                    Err(error) => AdminReply::Refused(status_of(&error)),
                };
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::List { tag } => {
                let reply = match result {
                    Ok(StoreReply::Replicas(list)) => {
                        AdminReply::Replicas(self.describe(now, list))
                    }
                    Ok(_) => AdminReply::Refused(Status::Invalid),
                    Err(error) => AdminReply::Refused(status_of(&error)),
                };
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::Blocks { tag, volume, epoch } => {
                let reply = self.blocks_listed(volume, epoch, result);
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::Drop { tag, volume } => {
                let reply = match result {
                    Ok(_) | Err(StoreError::UnknownVolume) => {
                        self.replicas.remove(&volume);
                        self.fencing.forget_if_idle(volume);
                        AdminReply::Dropped
                    }
                    Err(error) => {
                        if let Some(replica) = self.replicas.get_mut(&volume) {
                            replica.dropping = false;
                        }
                        AdminReply::Refused(status_of(&error))
                    }
                };
                out.push(EngineCommand::Admin { tag, reply });
            }
            Work::Shutdown => {
                if let Err(error) = result {
                    self.failed(
                        now,
                        format!("the disk could not be closed cleanly: {error}"),
                        out,
                    );
                }
            }
        }
    }

    fn on_load(
        &mut self,
        now: Time,
        result: Result<StoreReply, StoreError>,
        out: &mut Vec<EngineCommand>,
    ) {
        let Ok(StoreReply::Replicas(list)) = result else {
            return self.failed(now, "the disk's replicas cannot be listed".to_owned(), out);
        };
        for info in &list {
            self.remember(info);
        }
        if self.life == Life::Opening {
            self.life = Life::Serving;
            if let Some(identity) = self.identity {
                out.push(EngineCommand::Ready(identity));
            }
        }
    }

    fn remember(&mut self, info: &ReplicaInfo) {
        let replica = Replica {
            fence: info.fence,
            rebuild_epoch: info.rebuild_epoch,
            suspect: info.suspect,
            dropping: false,
        };
        self.replicas.insert(info.volume, replica);
    }

    /// An admitted request is done: fences that waited for it go on.
    fn finish(&mut self, now: Time, volume: VolumeId, epoch: Epoch, out: &mut Vec<EngineCommand>) {
        let mut released = Tickets::new();
        self.fencing.finish(volume, epoch, &mut released);
        for ticket in released {
            self.put_fence(now, ticket, out);
        }
    }

    fn on_client_result(
        &mut self,
        now: Time,
        client: ClientRequest,
        result: Result<StoreReply, StoreError>,
        out: &mut Vec<EngineCommand>,
    ) {
        let (conn, id, volume, epoch) = (client.conn, client.id, client.volume, client.epoch);
        let answer = match self.conclude(now, client, result, out) {
            None => return,
            Some((client, answer)) => {
                self.unaccount(&client, out);
                answer
            }
        };
        // The reply first: it is in the connection before anything that a released fence answers.
        self.reply(conn, id, volume, answer, out);
        self.finish(now, volume, epoch, out);
        if !self.replicas.contains_key(&volume) {
            self.fencing.forget_if_idle(volume);
        }
    }

    /// The next step of a request after an answer of the store: its answer, or another request to the store
    /// (`None`).
    fn conclude(
        &mut self,
        now: Time,
        mut client: ClientRequest,
        result: Result<StoreReply, StoreError>,
        out: &mut Vec<EngineCommand>,
    ) -> Option<Concluded> {
        let volume = client.volume;
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => return Some((client, Err(status_of(&error)))),
        };
        match client.stage {
            Stage::Plain => {
                let answer = body_of(reply).ok_or(Status::Invalid);
                Some((client, answer))
            }
            Stage::Flush => {
                client.stage = Stage::ClearSuspect;
                self.ask(
                    now,
                    Work::Client(client),
                    StoreRequest::ClearSuspect { volume },
                    out,
                );
                None
            }
            Stage::ClearSuspect => {
                if let Some(replica) = self.replicas.get_mut(&volume) {
                    replica.suspect = false;
                }
                Some((client, Ok(ReplyBody::Flush)))
            }
            Stage::Fence => {
                let StoreReply::Fenced { existed, replica } = reply else {
                    return Some((client, Err(Status::Invalid)));
                };
                self.remember(&replica);
                let body = FenceReply {
                    existed,
                    suspect: replica.suspect,
                    damaged: replica.damaged,
                    watermark: replica.watermark,
                    highest: replica.highest,
                    written: replica.written,
                };
                Some((client, Ok(ReplyBody::Fence(body))))
            }
            Stage::Descriptor => {
                // The store decides what a configuration changes in the replica: ask it.
                client.stage = Stage::Refresh;
                self.ask(
                    now,
                    Work::Client(client),
                    StoreRequest::GetReplica { volume },
                    out,
                );
                None
            }
            Stage::Refresh => {
                if let StoreReply::Replica(info) = reply {
                    self.remember(&info);
                }
                Some((client, Ok(ReplyBody::Configure)))
            }
            Stage::Layers => {
                client.stage = Stage::LayersHeld;
                let request = StoreRequest::GetReplica { volume };
                self.ask(now, Work::Client(client), request, out);
                None
            }
            Stage::LayersHeld => {
                let answer = match reply {
                    StoreReply::Replica(info) => Ok(ReplyBody::Layers(info.layers)),
                    _ => Err(Status::Invalid),
                };
                Some((client, answer))
            }
            Stage::WaitingFence(_) => {
                debug_assert!(false, "a waiting fence is not with the store");
                Some((client, Err(Status::Invalid)))
            }
        }
    }
}
