//! Clones, flattening and reverting, as served by the leader (docs/snapshots.md, C1, C7).
//!
//! Invariants:
//! - A clone of a volume is one of a snapshot that is taken for it and deleted with its creation. Where the leader does not
//!   come that far, `snapshot_loop`, here or at the next leader, removes the snapshot.
//! - A retry finds the volume by its name and source, also when the source is gone meanwhile.

use ashlar_proto::ids::{ClientId, Epoch, SnapshotId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use super::convert;
use super::layers;
use super::liveness::View;
use super::member::{Fault, Member};
use super::snapshots::snapshot_id;
use super::volumes::{round_up, unexpected, unix_ms, volume_id};
use crate::model::{
    Answer, CloneVolume, NewSnapshot, Operation, RequestKey, ReserveSnapshots, Source, State,
    Volume, validate, view,
};

type Result<T> = std::result::Result<T, Fault>;

/// What is to be done for a creation from a source.
enum Plan {
    /// It is there.
    Existing(Box<pb::Volume>),
    /// Of the snapshot that is named; of one that is to be taken of this volume, if the snapshot is `NIL`.
    Make(CloneVolume, VolumeId),
}

impl Member {
    pub(super) async fn create_clone(
        &self,
        key: RequestKey,
        request: pb::CreateVolumeRequest,
        source: &pb::create_volume_request::Source,
    ) -> Result<pb::Volume> {
        use pb::create_volume_request::Source as Asked;
        let source = match source {
            Asked::SnapshotId(id) => Source::Snapshot(snapshot_id(id)?),
            Asked::VolumeId(id) => Source::Volume(volume_id(id)?),
        };
        self.linearize().await?;
        let plan = self.with_view(|state, _| plan(state, &key, &request, source))?;
        let (mut clone, of) = match plan {
            Plan::Existing(volume) => return Ok(*volume),
            Plan::Make(clone, of) => (clone, of),
        };
        if !clone.snapshot.is_nil() {
            return self
                .propose_volume(key, Operation::CloneVolume(clone))
                .await;
        }
        let id = SnapshotId::generate();
        let reserve = ReserveSnapshots {
            snapshots: vec![NewSnapshot {
                id,
                name: format!("clone-{id}"),
                volume: of,
                labels: crate::model::Labels::new(),
            }],
            group: None,
            created_unix_ms: clone.created_unix_ms,
        };
        // The commit goes under a key of its own: the caller's is for the clone.
        let commit = RequestKey::generate();
        let (ids, taking) = self
            .take(commit, vec![id], Operation::ReserveForClone(reserve))
            .await?;
        clone.snapshot = ids.first().copied().unwrap_or(id);
        if request.size_bytes == 0
            && let Some(taken) = self.shared.state().snapshots().get(clone.snapshot)
        {
            clone.size_bytes = taken.size_bytes;
        }
        let made = self
            .propose_volume(key, Operation::CloneVolume(clone))
            .await;
        drop(taking);
        made
    }

    pub(super) async fn flatten_volume(
        &self,
        request: pb::FlattenVolumeRequest,
    ) -> Result<pb::Volume> {
        let key = convert::request_key(&request.request_id)?;
        let operation = Operation::FlattenVolume(volume_id(&request.volume_id)?);
        self.propose_volume(key, operation).await
    }

    pub(super) async fn begin_revert(&self, request: pb::BeginRevertRequest) -> Result<pb::Volume> {
        let key = convert::request_key(&request.request_id)?;
        let volume = volume_id(&request.volume_id)?;
        let operation = Operation::BeginRevert {
            volume,
            snapshot: snapshot_id(&request.snapshot_id)?,
        };
        self.vacate(volume).await?;
        self.propose_volume(key, operation).await
    }

    pub(super) async fn end_revert(&self, request: pb::EndRevertRequest) -> Result<pb::Volume> {
        let key = convert::request_key(&request.request_id)?;
        let operation = Operation::EndRevert {
            volume: volume_id(&request.volume_id)?,
            snapshot: snapshot_id(&request.snapshot_id)?,
            client: convert::id("client_id", &request.client_id, ClientId::from_slice)?,
            epoch: Epoch(request.epoch),
        };
        self.propose_volume(key, operation).await
    }

    /// The clones of which every disk reported to this leader that it depends on the parent no more: to be cut.
    pub(super) fn cuttable(state: &State, view: &View<'_>) -> Vec<Operation> {
        let clones = state.clones().filter_map(|id| state.volume(id));
        let cut = clones.filter_map(|clone| {
            let parent = clone.parent.filter(|_| clone.opened_once)?;
            let left = layers::inherited(view.liveness, clone);
            (left == layers::Left::default()).then_some(Operation::CutParent {
                volume: clone.id,
                parent,
            })
        });
        cut.take(validate::BATCH_MAX).collect()
    }
}

/// A volume with what heartbeats tell of it.
pub(super) fn message(state: &State, view: &View<'_>, volume: &Volume) -> pb::Volume {
    let mut message = view::volume(state, volume);
    if let Some(flatten) = &mut message.flatten {
        let left = layers::inherited(view.liveness, volume);
        flatten.replicas_left = left.replicas;
        flatten.chunks_left = left.chunks;
    }
    message
}

fn plan(
    state: &State,
    key: &RequestKey,
    request: &pb::CreateVolumeRequest,
    source: Source,
) -> Result<Plan> {
    if let Some(Answer::Volume(volume)) = state.remembered(key).map(|r| &r.answer) {
        return Ok(Plan::Existing(Box::new(view::volume(state, volume))));
    }
    validate::name("name", &request.name)?;
    let min_replicas = match request.min_replicas {
        0 => None,
        min => Some(convert::count("min_replicas", min)?),
    };
    let size_bytes = match request.size_bytes {
        0 => None,
        size => Some(round_up(size)),
    };
    let mut clone = CloneVolume {
        volume: VolumeId::generate(),
        name: request.name.clone(),
        size_bytes: size_bytes.unwrap_or(0),
        min_replicas: min_replicas.unwrap_or(0),
        snapshot: SnapshotId::NIL,
        source,
        labels: convert::labels(request.labels.clone()),
        created_unix_ms: unix_ms(),
    };
    if let Some(existing) = state.volume_by_name(&request.name) {
        clone.size_bytes = size_bytes.unwrap_or(existing.size_bytes);
        clone.min_replicas = min_replicas.unwrap_or(existing.min_replicas);
        return match state.existing_clone(&clone) {
            Some(Ok(Answer::Volume(volume))) => {
                Ok(Plan::Existing(Box::new(view::volume(state, &volume))))
            }
            Some(Ok(other)) => Err(unexpected(&other)),
            Some(Err(refusal)) => Err(refusal.into()),
            None => Err(Status::internal("a volume by name is not there").into()),
        };
    }
    let (origin, size) = match source {
        Source::Snapshot(id) => {
            let snapshot = state.snapshots().get(id).filter(|s| s.is_shown());
            let snapshot = snapshot.ok_or_else(|| {
                Status::not_found(format!(
                    "source: snapshot {id} does not exist; see `ashlar snapshot list`"
                ))
            })?;
            clone.snapshot = id;
            (state.volume(snapshot.volume), snapshot.size_bytes)
        }
        Source::Volume(id) => {
            let volume = state.volume(id).filter(|v| !v.hidden);
            (volume, volume.map_or(0, |v| v.size_bytes))
        }
    };
    let origin = origin.ok_or_else(|| {
        Status::not_found("source: that volume does not exist; see `ashlar volume list`")
    })?;
    clone.size_bytes = size_bytes.unwrap_or(size);
    clone.min_replicas = min_replicas.unwrap_or(origin.min_replicas);
    validate::size("size_bytes", clone.size_bytes)?;
    validate::replica_counts(origin.replicas, clone.min_replicas)?;
    if clone.size_bytes < size {
        return Err(Status::invalid_argument(format!(
            "size_bytes: {} is less than the {size} bytes of the source; a clone is as large or larger",
            clone.size_bytes
        ))
        .into());
    }
    check_place(state, request, origin)?;
    state.check_may_clone(origin)?;
    Ok(Plan::Make(clone, origin.id))
}

/// A clone lies where its source does: whether that is what was asked for.
fn check_place(state: &State, request: &pb::CreateVolumeRequest, origin: &Volume) -> Result<()> {
    let pool = state
        .pool(origin.pool)
        .map_or("", |pool| pool.name.as_str());
    let (replicas, groups) = (u32::from(origin.replicas), origin.groups.len() as u32);
    let same = (request.pool.is_empty() || request.pool == pool)
        && (request.replicas == 0 || request.replicas == replicas)
        && (request.groups == 0 || request.groups == groups);
    if !same {
        return Err(Status::invalid_argument(format!(
            "a clone lies on the disks of its source, so it is in pool {pool} with {replicas} replicas in {groups} groups; leave \
             pool, replicas and groups out, or create an empty volume and copy into it"
        ))
        .into());
    }
    let node = state.node_by_name(&request.preferred_node).map(|n| n.id);
    let on_node = |disk| state.disk(disk).is_some_and(|d| Some(d.node) == node);
    if request.require_preferred_node && !origin.disks().into_iter().any(on_node) {
        return Err(Status::resource_exhausted(format!(
            "preferred_node: no replica of the source is on node {:?}, and a clone lies on the disks of its source; move one \
             there first (`ashlar replica move`)",
            request.preferred_node
        ))
        .into());
    }
    Ok(())
}
