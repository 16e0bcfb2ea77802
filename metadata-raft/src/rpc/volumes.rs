//! Volumes, attachments and replicas, as served by the leader.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ashlar_proto::ids::{
    BLOCK_SIZE, ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, ReplicaState, VolumeId,
};
use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use super::clones;
use super::convert;
use super::member::{Fault, Member};
use crate::model::{
    self, Answer, ChangeReplicas, Command, CreateVolume, OpenVolume, Operation, ReplicaChange,
    RequestKey, State, Volume, validate, view,
};
use crate::planner::placement::{self, Wish};

/// Volumes of one page.
const PAGE_MAX: u32 = 1000;

type Result<T> = std::result::Result<T, Fault>;

pub(super) fn unexpected(answer: &Answer) -> Fault {
    tracing::error!(?answer, "unexpected answer of the state machine");
    Status::internal("unexpected answer of the state machine").into()
}

pub(super) fn unix_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn volume_id(bytes: &[u8]) -> std::result::Result<VolumeId, Status> {
    convert::id("volume_id", bytes, VolumeId::from_slice)
}

impl Member {
    pub(super) fn volume_message(&self, volume: &Volume) -> pb::Volume {
        view::volume(&self.shared.state(), volume)
    }

    /// Where the disks of a volume are, as this member knows.
    pub(super) fn endpoints(&self, state: &State, volume: &Volume) -> Vec<pb::DiskEndpoint> {
        view::endpoints(state, volume, |disk| self.disk_alive(state, disk))
    }

    pub(super) async fn propose_volume(
        &self,
        request: RequestKey,
        operation: Operation,
    ) -> Result<pb::Volume> {
        match self.propose(Command { request, operation }).await? {
            Answer::Volume(volume) => Ok(self.volume_message(&volume)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn create_volume(
        &self,
        request: pb::CreateVolumeRequest,
    ) -> Result<pb::Volume> {
        let key = convert::request_key(&request.request_id)?;
        if let Some(source) = request.source.clone() {
            return self.create_clone(key, request, &source).await;
        }
        self.linearize().await?;
        // A retry or an existing volume is answered without placing anything: there may be no room left.
        let planned = self.with_view(|state, view| {
            if let Some(Answer::Volume(volume)) = state.remembered(&key).map(|r| &r.answer) {
                return Ok(Err(volume.clone()));
            }
            let mut create = wish(state, &request)?;
            if let Some(existing) = state.existing_volume(&create) {
                return match existing? {
                    Answer::Volume(volume) => Ok(Err(volume)),
                    other => Err(unexpected(&other)),
                };
            }
            let pool = state
                .pool(create.pool)
                .ok_or_else(|| model::no_such_pool(&request.pool))?;
            let preferred = state.node_by_name(&request.preferred_node).map(|n| n.id);
            if request.require_preferred_node && preferred.is_none() {
                let shown: String = request
                    .preferred_node
                    .chars()
                    .take(validate::NAME_BYTES_MAX)
                    .collect();
                return Err(Status::not_found(format!(
                    "preferred_node: no node {shown:?} is registered; see `ashlar node list`"
                ))
                .into());
            }
            let wish = Wish {
                pool: &pool.spec,
                size_bytes: create.size_bytes,
                replicas: create.replicas,
                groups: request.groups,
                preferred,
                require_preferred: request.require_preferred_node,
            };
            create.groups = placement::place(state, view, &wish)?;
            Ok::<_, Fault>(Ok(create))
        })?;
        match planned {
            Ok(create) => {
                self.propose_volume(key, Operation::CreateVolume(create))
                    .await
            }
            Err(existing) => Ok(self.volume_message(&existing)),
        }
    }

    pub(super) async fn get_volume(&self, request: pb::GetVolumeRequest) -> Result<pb::Volume> {
        let id = if request.volume_id.is_empty() {
            None
        } else {
            Some(volume_id(&request.volume_id)?)
        };
        self.linearize().await?;
        let found = self.with_view(|state, view| {
            let volume = match id {
                Some(id) => state.volume(id).filter(|v| !v.hidden),
                None => state.volume_by_name(&request.name),
            };
            volume.map(|v| clones::message(state, view, v))
        });
        let volume = found.ok_or_else(|| {
            let shown: String = request
                .name
                .chars()
                .take(validate::NAME_BYTES_MAX)
                .collect();
            Status::not_found(format!(
                "volume {shown:?} does not exist; see `ashlar volume list`"
            ))
        })?;
        Ok(volume)
    }

    pub(super) async fn list_volumes(
        &self,
        request: pb::ListVolumesRequest,
    ) -> Result<pb::ListVolumesResponse> {
        self.linearize().await?;
        let size = match request.page_size {
            0 => PAGE_MAX,
            size => size.min(PAGE_MAX),
        } as usize;
        let state = self.shared.state();
        let mut volumes: Vec<_> = state
            .volumes_by_name_after(&request.page_token)
            .take(size + 1)
            .map(|v| view::volume(&state, v))
            .collect();
        let more = volumes.len() > size;
        volumes.truncate(size);
        let last = volumes.last().filter(|_| more).map(|v| v.name.clone());
        Ok(pb::ListVolumesResponse {
            volumes,
            next_page_token: last.unwrap_or_default(),
        })
    }

    pub(super) async fn resize_volume(
        &self,
        request: pb::ResizeVolumeRequest,
    ) -> Result<pb::Volume> {
        let volume = volume_id(&request.volume_id)?;
        let size_bytes = round_up(request.size_bytes);
        let key = convert::request_key(&request.request_id)?;
        self.propose_volume(key, Operation::ResizeVolume { volume, size_bytes })
            .await
    }

    pub(super) async fn delete_volume(
        &self,
        request: pb::DeleteVolumeRequest,
    ) -> Result<pb::DeleteVolumeResponse> {
        let volume = volume_id(&request.volume_id)?;
        let operation = Operation::DeleteVolume(volume);
        let request = convert::request_key(&request.request_id)?;
        self.vacate(volume).await?;
        self.propose(Command { request, operation }).await?;
        Ok(pb::DeleteVolumeResponse {})
    }

    pub(super) async fn open_volume(
        &self,
        request: pb::OpenVolumeRequest,
    ) -> Result<pb::OpenVolumeResponse> {
        let mode = pb::AttachMode::try_from(request.mode);
        let operation = match mode {
            Ok(pb::AttachMode::Unspecified | pb::AttachMode::Exclusive) if request.revert => {
                Operation::OpenToRevert
            }
            Ok(pb::AttachMode::Unspecified | pb::AttachMode::Exclusive) => Operation::OpenVolume,
            Ok(pb::AttachMode::ReadOnly) if !request.revert => Operation::JoinVolume,
            Ok(pb::AttachMode::Care) if !request.revert => Operation::OpenToCare,
            Ok(pb::AttachMode::ReadOnly | pb::AttachMode::Care) => {
                return Err(Status::invalid_argument(
                    "mode: a volume is opened exclusively to revert it",
                )
                .into());
            }
            Ok(pb::AttachMode::Shared) | Err(_) => {
                return Err(Status::invalid_argument(
                    "mode: this version attaches volumes exclusively or read-only",
                )
                .into());
            }
        };
        let open = OpenVolume {
            volume: volume_id(&request.volume_id)?,
            client: convert::id("client_id", &request.client_id, ClientId::from_slice)?,
            node: NodeId::from_slice(&request.node_id).unwrap_or(NodeId::NIL),
            client_name: request.client_name,
            force: request.force,
        };
        let request = convert::request_key(&request.request_id)?;
        if mode != Ok(pb::AttachMode::Care) {
            self.vacate(open.volume).await?;
        }
        let answer = self
            .propose(Command {
                request,
                operation: operation(open),
            })
            .await?;
        let Answer::Opened {
            volume,
            previous_clean,
        } = answer
        else {
            return Err(unexpected(&answer));
        };
        self.repair.notify_one();
        let state = self.shared.state();
        Ok(pb::OpenVolumeResponse {
            volume: Some(view::volume(&state, &volume)),
            disks: self.endpoints(&state, &volume),
            cluster_id: state.cluster().to_vec(),
            previous_clean,
            ticket: Vec::new(),
        })
    }

    pub(super) async fn close_volume(&self, request: pb::CloseVolumeRequest) -> Result<pb::Volume> {
        let operation = Operation::CloseVolume {
            volume: volume_id(&request.volume_id)?,
            client: convert::id("client_id", &request.client_id, ClientId::from_slice)?,
            epoch: Epoch(request.epoch),
            clean: request.clean,
        };
        self.propose_volume(convert::request_key(&request.request_id)?, operation)
            .await
    }

    pub(super) async fn change_replicas(
        &self,
        request: pb::ChangeReplicasRequest,
    ) -> Result<pb::ChangeReplicasResponse> {
        let changes = request
            .changes
            .iter()
            .map(change)
            .collect::<std::result::Result<Vec<_>, Status>>()?;
        let operation = Operation::ChangeReplicas(ChangeReplicas {
            volume: volume_id(&request.volume_id)?,
            client: convert::id("client_id", &request.client_id, ClientId::from_slice)?,
            epoch: Epoch(request.epoch),
            changes,
        });
        let request = convert::request_key(&request.request_id)?;
        let answer = self.propose(Command { request, operation }).await?;
        let Answer::Changed {
            applied,
            volume,
            reason,
        } = answer
        else {
            return Err(unexpected(&answer));
        };
        self.repair.notify_one();
        let state = self.shared.state();
        Ok(pb::ChangeReplicasResponse {
            applied,
            volume: Some(view::volume(&state, &volume)),
            reason,
            disks: self.endpoints(&state, &volume),
        })
    }

    pub(super) async fn rebuild_replica(
        &self,
        request: pb::RebuildReplicaRequest,
    ) -> Result<pb::Volume> {
        let id = volume_id(&request.volume_id)?;
        let disk = convert::id("disk_id", &request.disk_id, DiskId::from_slice)?;
        let key = convert::request_key(&request.request_id)?;
        self.linearize().await?;
        let volume = self.require(id)?;
        let mut replicas = Vec::new();
        for (group, replica) in volume.all_replicas().filter(|(_, r)| r.disk == disk) {
            match replica.state {
                ReplicaState::Stale => {
                    replicas.push((GroupIndex(u32::try_from(group).unwrap_or(u32::MAX)), disk))
                }
                ReplicaState::Rebuilding => return Ok(self.volume_message(&volume)),
                ReplicaState::InSync => {}
            }
        }
        if replicas.is_empty() {
            return Err(Status::failed_precondition(format!(
                "volume {} has no stale replica on disk {disk}: there is nothing to rebuild",
                volume.name
            ))
            .into());
        }
        let operation = Operation::BeginRebuild {
            volume: id,
            epoch: volume.epoch,
            replicas,
        };
        match self
            .propose(Command {
                request: key,
                operation,
            })
            .await?
        {
            Answer::Changed {
                applied: true,
                volume,
                ..
            } => Ok(self.volume_message(&volume)),
            Answer::Changed { reason, .. } => Err(Status::failed_precondition(format!(
                "the volume changed meanwhile ({reason}); try again"
            ))
            .into()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn move_replica(&self, request: pb::MoveReplicaRequest) -> Result<pb::Volume> {
        let id = volume_id(&request.volume_id)?;
        let from = convert::id("from_disk_id", &request.from_disk_id, DiskId::from_slice)?;
        let key = convert::request_key(&request.request_id)?;
        self.linearize().await?;
        let volume = self.require(id)?;
        if let Some(Answer::Volume(volume)) =
            self.shared.state().remembered(&key).map(|r| &r.answer)
        {
            return Ok(view::volume(&self.shared.state(), volume));
        }
        let to = if request.to_disk_id.is_empty() {
            self.with_view(|state, view| placement::place_move(state, view, &volume, from))?
        } else {
            convert::id("to_disk_id", &request.to_disk_id, DiskId::from_slice)?
        };
        self.propose_volume(
            key,
            Operation::MoveReplica {
                volume: id,
                from,
                to,
            },
        )
        .await
    }

    fn require(&self, id: VolumeId) -> std::result::Result<Arc<Volume>, Status> {
        let volume = self.shared.state().volume(id).cloned();
        volume.filter(|v| !v.hidden).ok_or_else(|| {
            Status::not_found(format!(
                "volume {id} does not exist; see `ashlar volume list`"
            ))
        })
    }
}

pub(super) fn round_up(bytes: u64) -> u64 {
    bytes
        .checked_next_multiple_of(BLOCK_SIZE as u64)
        .unwrap_or(u64::MAX)
}

/// A creation with its defaults, without a placement.
fn wish(state: &State, request: &pb::CreateVolumeRequest) -> Result<CreateVolume> {
    let pool = state
        .pool_by_name(&request.pool)
        .ok_or_else(|| model::no_such_pool(&request.pool))?;
    let replicas = match request.replicas {
        0 => pool.spec.replicas,
        replicas => convert::count("replicas", replicas)?,
    };
    let min_replicas = match request.min_replicas {
        0 => validate::default_min_replicas(replicas),
        min => convert::count("min_replicas", min)?,
    };
    let size_bytes = round_up(request.size_bytes);
    validate::name("name", &request.name)?;
    validate::size("size_bytes", size_bytes)?;
    validate::replica_counts(replicas, min_replicas)?;
    Ok(CreateVolume {
        volume: VolumeId::generate(),
        name: request.name.clone(),
        size_bytes,
        pool: pool.id,
        replicas,
        min_replicas,
        groups: Vec::new(),
        labels: convert::labels(request.labels.clone()),
        created_unix_ms: unix_ms(),
    })
}

fn change(change: &pb::ReplicaChange) -> std::result::Result<ReplicaChange, Status> {
    let state = match pb::ReplicaState::try_from(change.state) {
        Ok(pb::ReplicaState::Stale) => ReplicaState::Stale,
        Ok(pb::ReplicaState::Rebuilding) => ReplicaState::Rebuilding,
        Ok(pb::ReplicaState::InSync) => ReplicaState::InSync,
        Err(_) => return Err(Status::invalid_argument("changes.state: unknown value")),
    };
    Ok(ReplicaChange {
        group: GroupIndex(change.group),
        disk: convert::id("changes.disk_id", &change.disk_id, DiskId::from_slice)?,
        state,
        incarnation: Incarnation(change.incarnation),
    })
}
