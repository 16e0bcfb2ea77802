//! Snapshots, as served by the leader (docs/snapshots.md, S1, S3, S4).
//!
//! Invariants:
//! - Numbers are committed only if every holder's report came within half the hold time after the reservation was
//!   proposed, by this machine's clock (which goes on while it sleeps).
//! - A call that ends in any other way leaves nothing pending for long: it cancels, or `snapshot_loop` does.

use ashlar_platform::clock::{self, Time};
use ashlar_proto::ids::{ClientId, Epoch, SnapshotGroupId, SnapshotId, SnapshotNumber};
use ashlar_proto::layers::REPORT_TIME;
use ashlar_proto::rpc::metadata as pb;
use tokio::sync::broadcast;
use tonic::{Code, Status};

use super::convert;
use super::layers;
use super::liveness::View;
use super::member::{Fault, Member};
use super::taking::Taking;
use super::volumes::{unexpected, unix_ms, volume_id};
use crate::model::{
    Answer, Command, CommitSnapshot, NewSnapshot, Operation, RequestKey, ReserveSnapshots,
    Snapshot, SnapshotGroup, SnapshotState, State, validate, view,
};
use crate::raft::state_machine::Changes;

/// Snapshots of one page.
const PAGE_MAX: u32 = 1000;
/// Volumes named in a message.
const NAMED_MAX: usize = 5;

type Result<T> = std::result::Result<T, Fault>;

/// How far the holders of a reservation are.
enum Progress {
    /// All hold.
    Held(Vec<CommitSnapshot>),
    /// Volumes whose holders did not report yet, for people.
    Waiting(Vec<String>),
    /// It cannot be committed any more.
    Lost(String),
}

impl Member {
    pub(super) async fn create_snapshots(
        &self,
        request: pb::CreateSnapshotsRequest,
    ) -> Result<pb::CreateSnapshotsResponse> {
        let key = convert::request_key(&request.request_id)?;
        let reserve = reservation(request)?;
        self.linearize().await?;
        let remembered = {
            let state = self.shared.state();
            state.remembered(&key).map(|r| r.answer.clone())
        };
        if let Some(Answer::Snapshots(ids)) = remembered {
            return self.taken(&ids);
        }
        let ids: Vec<_> = reserve.snapshots.iter().map(|s| s.id).collect();
        let (taken, taking) = self
            .take(key, ids, Operation::ReserveSnapshots(reserve))
            .await?;
        drop(taking);
        self.taken(&taken)
    }

    /// Reserves numbers and commits them, under the caller's key; or finds the same snapshots. Nobody removes those that
    /// were taken for a clone before the guard is dropped.
    pub(super) async fn take(
        &self,
        key: RequestKey,
        ids: Vec<SnapshotId>,
        reserve: Operation,
    ) -> Result<(Vec<SnapshotId>, Taking<'_>)> {
        let taking = self.takings.begin(ids.clone());
        let changes = self.shared.subscribe();
        let began = clock::now();
        // Idempotent by its names, and so under a key of its own: the caller's is for the commit.
        let command = Command {
            request: RequestKey::generate(),
            operation: reserve,
        };
        let answer = self.propose(command).await?;
        let Answer::Snapshots(reserved) = answer else {
            return Err(unexpected(&answer));
        };
        if reserved != ids {
            return Ok((reserved, taking));
        }
        let reserved_after = clock::now().since(began);
        let commits = match self.held(&ids, began, changes).await {
            Ok(commits) => commits,
            Err(why) => {
                self.cancel(ids).await;
                return Err(Status::aborted(why).into());
            }
        };
        let command = Command {
            request: key,
            operation: Operation::CommitSnapshots(commits),
        };
        let held_after = clock::now().since(began);
        let committed = self.propose(command).await;
        match committed {
            Ok(Answer::Snapshots(ids)) => {
                let committed_after = clock::now().since(began);
                tracing::debug!(
                    ?reserved_after,
                    ?held_after,
                    ?committed_after,
                    "took snapshots"
                );
                Ok((ids, taking))
            }
            Ok(other) => Err(unexpected(&other)),
            Err(Fault::Status(status)) if status.code() == Code::Aborted => {
                self.cancel(ids).await;
                Err(Fault::Status(status))
            }
            // The outcome is unknown, or another member leads.
            Err(fault) => Err(fault),
        }
    }

    /// Gives up what was reserved; where that fails `snapshot_loop`, here or at the next leader, does it.
    async fn cancel(&self, ids: Vec<SnapshotId>) {
        let command = Command {
            request: RequestKey::generate(),
            operation: Operation::CancelSnapshots(ids),
        };
        if self.propose(command).await.is_err() {
            self.takings.attention.notify_one();
        }
    }

    /// Waits until every volume of a reservation is held; otherwise says why it is given up.
    async fn held(
        &self,
        ids: &[SnapshotId],
        began: Time,
        mut changes: broadcast::Receiver<Changes>,
    ) -> std::result::Result<Vec<CommitSnapshot>, String> {
        loop {
            let reported = self.takings.reported.notified();
            tokio::pin!(reported);
            reported.as_mut().enable();
            let progress = self.progress(ids);
            let passed = clock::now().since(began);
            let in_time = passed < REPORT_TIME;
            match progress {
                Progress::Held(commits) if in_time => return Ok(commits),
                Progress::Held(_) => {
                    return Err(
                        "the volumes' writes were held, but too late to be of one point in time; try again"
                            .to_owned(),
                    );
                }
                Progress::Lost(why) => return Err(why),
                Progress::Waiting(volumes) if !in_time => {
                    return Err(format!(
                        "not all writes were held in time: no answer for {}; try again, and if it stays so see whether those \
                         clients are there and of a version that knows snapshots",
                        some_of(&volumes)
                    ));
                }
                Progress::Waiting(_) => {}
            }
            tokio::select! {
                () = reported => {}
                // One that lags has missed nothing that the state does not tell.
                change = changes.recv() => {
                    if matches!(change, Err(broadcast::error::RecvError::Closed)) {
                        return Err("this member stops; try again".to_owned());
                    }
                }
                () = tokio::time::sleep(REPORT_TIME.saturating_sub(passed)) => {}
            }
        }
    }

    fn progress(&self, ids: &[SnapshotId]) -> Progress {
        let state = self.shared.state();
        let mut commits = Vec::with_capacity(ids.len());
        let mut waiting = Vec::new();
        for id in ids {
            let snapshot = state.snapshots().get(*id);
            let pending = snapshot.filter(|s| s.state == SnapshotState::Pending);
            let volume = pending.and_then(|s| state.volume(s.volume));
            let Some(volume) = volume else {
                return Progress::Lost(
                    "the snapshot was cancelled, because a volume was opened meanwhile; try again"
                        .to_owned(),
                );
            };
            let holder = match &volume.holder {
                None if volume.clean => None,
                None => {
                    return Progress::Lost(format!(
                        "volume {} lost its client while the snapshot was being taken; try again when it is attached again",
                        volume.name
                    ));
                }
                Some(holder) => {
                    let current = (holder.client, volume.epoch);
                    if self.takings.reporter(*id) != Some(current) {
                        waiting.push(format!("{} ({})", volume.name, holder.client_name));
                        continue;
                    }
                    Some(current)
                }
            };
            commits.push(CommitSnapshot {
                snapshot: *id,
                holder,
            });
        }
        if waiting.is_empty() {
            Progress::Held(commits)
        } else {
            Progress::Waiting(waiting)
        }
    }

    /// The answer to a creation whose snapshots are there.
    fn taken(&self, ids: &[SnapshotId]) -> Result<pb::CreateSnapshotsResponse> {
        let snapshots = self.with_view(|state, view| {
            let ready = ids.iter().map(|id| {
                let snapshot = state.snapshots().get(*id);
                let snapshot = snapshot.ok_or_else(|| {
                    Status::aborted(
                        "the snapshot was cancelled or deleted meanwhile; try again with a new request_id",
                    )
                })?;
                if snapshot.state == SnapshotState::Pending {
                    return Err(Status::aborted(format!(
                        "snapshot {} is being taken by another request; try again",
                        snapshot.name
                    )));
                }
                Ok(message(state, view, snapshot))
            });
            ready.collect::<std::result::Result<Vec<_>, Status>>()
        })?;
        Ok(pb::CreateSnapshotsResponse { snapshots })
    }

    pub(super) async fn get_snapshot(
        &self,
        request: pb::GetSnapshotRequest,
    ) -> Result<pb::Snapshot> {
        let id = if request.snapshot_id.is_empty() {
            None
        } else {
            Some(snapshot_id(&request.snapshot_id)?)
        };
        self.linearize().await?;
        self.with_view(|state, view| {
            let snapshots = state.snapshots();
            let found = match id {
                Some(id) => snapshots
                    .get(id)
                    .filter(|s| s.state != SnapshotState::Hidden),
                None => snapshots.by_name(&request.name),
            };
            let found = found.ok_or_else(|| {
                let shown: String = match id {
                    Some(id) => id.to_string(),
                    None => request
                        .name
                        .chars()
                        .take(validate::NAME_BYTES_MAX)
                        .collect(),
                };
                Status::not_found(format!(
                    "snapshot {shown:?} does not exist; see `ashlar snapshot list`"
                ))
            })?;
            Ok(message(state, view, found))
        })
    }

    pub(super) async fn list_snapshots(
        &self,
        request: pb::ListSnapshotsRequest,
    ) -> Result<pb::ListSnapshotsResponse> {
        let after = match request.page_token.as_str() {
            "" => SnapshotId::NIL,
            token => token.parse().map_err(|_| {
                Status::invalid_argument("page_token: not one that an earlier answer gave")
            })?,
        };
        let volume = if request.volume_id.is_empty() {
            None
        } else {
            Some(volume_id(&request.volume_id)?)
        };
        let group = if request.group_id.is_empty() {
            None
        } else {
            let id = &request.group_id;
            Some(convert::id("group_id", id, SnapshotGroupId::from_slice)?)
        };
        let size = match request.page_size {
            0 => PAGE_MAX,
            size => size.min(PAGE_MAX),
        } as usize;
        self.linearize().await?;
        Ok(self.with_view(|state, view| {
            let all = state.snapshots();
            let named = &request.group_name;
            let group = match group {
                None if named.is_empty() => None,
                // A group that is not there has no snapshots.
                None => Some(
                    all.group_by_name(named)
                        .map_or(SnapshotGroupId::NIL, |(id, _)| id),
                ),
                some => some,
            };
            let found: Box<dyn Iterator<Item = _>> = match (group, volume) {
                (Some(group), _) => Box::new(all.of_group(group, after)),
                (None, Some(volume)) => Box::new(all.of_volume(volume, after)),
                (None, None) => Box::new(all.after(after)),
            };
            let mut snapshots: Vec<_> = found
                .filter(|s| volume.is_none_or(|v| v == s.volume))
                // Those that only clones know are not shown (C2).
                .filter(|s| s.state != SnapshotState::Hidden && !s.for_clone)
                .take(size + 1)
                .map(|s| (s.id, message(state, view, s)))
                .collect();
            let more = snapshots.len() > size;
            snapshots.truncate(size);
            let last = snapshots.last().filter(|_| more).map(|s| s.0.to_string());
            pb::ListSnapshotsResponse {
                snapshots: snapshots.into_iter().map(|s| s.1).collect(),
                next_page_token: last.unwrap_or_default(),
            }
        }))
    }

    pub(super) async fn delete_snapshots(
        &self,
        request: pb::DeleteSnapshotsRequest,
    ) -> Result<pb::DeleteSnapshotsResponse> {
        let ids = request.snapshot_ids.iter().map(|id| snapshot_id(id));
        let ids = ids.collect::<std::result::Result<Vec<_>, Status>>()?;
        let command = Command {
            request: convert::request_key(&request.request_id)?,
            operation: Operation::DeleteSnapshots(ids),
        };
        self.propose(command).await?;
        self.takings.attention.notify_one();
        Ok(pb::DeleteSnapshotsResponse {})
    }

    pub(super) async fn report_held(
        &self,
        request: pb::ReportHeldRequest,
    ) -> Result<pb::ReportHeldResponse> {
        let id = volume_id(&request.volume_id)?;
        let client = convert::id("client_id", &request.client_id, ClientId::from_slice)?;
        let (epoch, number) = (Epoch(request.epoch), SnapshotNumber(request.number));
        // The holder may have seen the number where it was applied earlier than here.
        self.linearize().await?;
        let pending = {
            let state = self.shared.state();
            let volume = state.volume(id).filter(|v| v.is_current(client, epoch));
            let volume = volume.ok_or_else(|| {
                Status::failed_precondition(format!(
                    "volume {id}: client {client} does not hold it at epoch {}",
                    epoch.0
                ))
            })?;
            let mut pending = state
                .snapshots()
                .pending()
                .filter_map(|s| state.snapshots().get(s));
            pending
                .find(|s| s.volume == id && s.number == number)
                .map(|s| s.id)
                .ok_or_else(|| {
                    Status::failed_precondition(format!(
                        "volume {}: snapshot number {} is not pending",
                        volume.name, number.0
                    ))
                })?
        };
        self.takings.report(pending, (client, epoch));
        Ok(pb::ReportHeldResponse {})
    }
}

/// A snapshot, with the progress of its deletion as far as this member heard of it.
fn message(state: &State, view: &View<'_>, snapshot: &Snapshot) -> pb::Snapshot {
    let left = layers::left(state, view.liveness, snapshot);
    pb::Snapshot {
        replicas_left: left.replicas,
        chunks_left: left.chunks,
        ..view::snapshot(state, snapshot)
    }
}

pub(super) fn snapshot_id(bytes: &[u8]) -> std::result::Result<SnapshotId, Status> {
    convert::id("snapshot_id", bytes, SnapshotId::from_slice)
}

fn reservation(
    request: pb::CreateSnapshotsRequest,
) -> std::result::Result<ReserveSnapshots, Status> {
    let snapshots = request.items.into_iter().map(|item| {
        Ok(NewSnapshot {
            id: SnapshotId::generate(),
            name: item.name,
            volume: volume_id(&item.volume_id)?,
            labels: convert::labels(item.labels),
        })
    });
    Ok(ReserveSnapshots {
        snapshots: snapshots.collect::<std::result::Result<_, Status>>()?,
        group: (!request.group_name.is_empty()).then(|| SnapshotGroup {
            id: SnapshotGroupId::generate(),
            name: request.group_name,
        }),
        created_unix_ms: unix_ms(),
    })
}

fn some_of(names: &[String]) -> String {
    let mut text = names[..names.len().min(NAMED_MAX)].join(", ");
    if let more @ 1.. = names.len().saturating_sub(NAMED_MAX) {
        text.push_str(&format!(" and {more} more"));
    }
    text
}
