//! Commands about snapshots: reserve, commit, cancel, delete, forget (docs/snapshots.md, S1, S3 to S6, S8).
//!
//! Invariants:
//! - Everything is checked before anything changes: a command takes effect on all its volumes or on none.
//! - A commit, a cancellation and a deletion give each of their volumes one new layer list (revision + 1). The epoch
//!   stays: a list is no configuration.
//! - A reservation is not among the remembered answers. Its names make it idempotent, and a retry must see whether
//!   the numbers are still pending.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{SnapshotId, SnapshotNumber, VolumeId};

use super::command::{Answer, CommitSnapshot, Refusal, ReserveSnapshots, Response};
use super::snapshot::{Snapshot, SnapshotState};
use super::volume::Volume;
use super::{State, validate};

/// What cancelling pending snapshots changes.
#[derive(Default)]
pub(super) struct Cancellation {
    /// The volumes with their new lists.
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// The snapshots that are gone.
    pub snapshots: Vec<SnapshotId>,
}

impl Volume {
    /// Settles the highest number: a new list (S6), on which it is live or not.
    fn settle(&mut self, live: bool) {
        self.layers.revision += 1;
        self.layers.settled = self.snapshot;
        if live {
            self.layers.live.push(self.snapshot);
        }
    }
}

pub(super) fn busy(name: &str) -> Refusal {
    Refusal::aborted(format!(
        "a snapshot of volume {name} is being taken at this moment; try again"
    ))
}

impl State {
    /// What a retried reservation gets, or the refusal because a name is taken.
    pub fn existing_snapshots(&self, reserve: &ReserveSnapshots) -> Option<Response> {
        let named = |name: &String| self.snapshots.by_name(name);
        let found: Vec<_> = reserve.snapshots.iter().map(|s| named(&s.name)).collect();
        let group = reserve.group.as_ref();
        let known = group.and_then(|g| self.snapshots.group_by_name(&g.name));
        let taken = found.iter().flatten().next();
        if taken.is_none() && known.is_none() {
            return None;
        }
        let same = reserve.snapshots.iter().zip(&found).all(|(new, found)| {
            found.is_some_and(|s| {
                s.volume == new.volume
                    && s.group.as_ref().map(|g| &g.name) == group.map(|g| &g.name)
            })
        });
        if same && known.is_none_or(|(_, members)| members == found.len()) {
            let ids = found.iter().flatten().map(|s| s.id).collect();
            return Some(Ok(Answer::Snapshots(ids)));
        }
        let what = match (taken, group) {
            (Some(s), _) => format!(
                "snapshot {} exists already, of another volume or in another group",
                s.name
            ),
            (None, group) => format!(
                "group {} exists already, with other snapshots",
                group.map_or("", |g| g.name.as_str())
            ),
        };
        Some(Err(Refusal::exists(format!(
            "{what}; choose another name, or delete it first (`ashlar snapshot list`)"
        ))))
    }

    pub(super) fn reserve_snapshots(
        &mut self,
        reserve: &ReserveSnapshots,
        for_clone: bool,
    ) -> Response {
        check_reservation(reserve)?;
        if let Some(existing) = self.existing_snapshots(reserve) {
            return existing;
        }
        let mut nexts = Vec::with_capacity(reserve.snapshots.len());
        for new in &reserve.snapshots {
            if new.id.is_nil() || self.snapshots.get(new.id).is_some() {
                return Err(Refusal::internal("snapshot_id: not fresh"));
            }
            let volume = self.require_volume(new.volume)?;
            self.check_may_reserve(volume)?;
            let mut next = Volume::clone(volume);
            next.snapshot = SnapshotNumber(next.snapshot.0 + 1);
            nexts.push(next);
        }
        if let Some(group) = &reserve.group
            && (group.id.is_nil() || {
                let mut of_group = self.snapshots.of_group(group.id, SnapshotId::NIL);
                of_group.next().is_some()
            })
        {
            return Err(Refusal::internal("group_id: not fresh"));
        }
        let volumes = self.install_all(nexts)?;
        for (new, volume) in reserve.snapshots.iter().zip(&volumes) {
            self.snapshots.insert(Snapshot {
                id: new.id,
                name: new.name.clone(),
                volume: new.volume,
                number: volume.snapshot,
                size_bytes: volume.size_bytes,
                created_unix_ms: reserve.created_unix_ms,
                labels: new.labels.clone(),
                state: SnapshotState::Pending,
                group: reserve.group.clone(),
                for_clone,
                format: volume.format.clone(),
            });
        }
        let ids = reserve.snapshots.iter().map(|s| s.id).collect();
        Ok(Answer::Snapshots(ids))
    }

    fn check_may_reserve(&self, volume: &Volume) -> Result<(), Refusal> {
        let name = &volume.name;
        if volume.is_snapshot_pending() {
            return Err(busy(name));
        }
        if volume.reverting.is_some() {
            return Err(Refusal::precondition(format!(
                "volume {name} is being reverted to a snapshot; {}, then try again",
                self.revert_again(volume)
            )));
        }
        if volume.holder.is_none() && !volume.clean {
            return Err(Refusal::precondition(format!(
                "volume {name} is not attached and was not closed cleanly, so its replicas may differ; attach it once and \
                 detach it (that reconciles them), then try again"
            )));
        }
        if volume.layers.live.len() >= validate::SNAPSHOTS_MAX {
            return Err(Refusal::exhausted(format!(
                "volume {name} has {} snapshots, which is the most; delete some (`ashlar snapshot list {name}`)",
                validate::SNAPSHOTS_MAX
            )));
        }
        let kept = self.snapshots.of_volume(volume.id, SnapshotId::NIL).count();
        if kept >= validate::SNAPSHOTS_KEPT_MAX {
            return Err(Refusal::exhausted(format!(
                "volume {name} has {kept} snapshots, most of them being deleted; that goes on when every disk of the volume \
                 is there (`ashlar volume show {name}`)"
            )));
        }
        if volume.snapshot.0 == u32::MAX {
            return Err(Refusal::exhausted(format!(
                "volume {name} has used up its snapshot numbers; copy it to a new volume"
            )));
        }
        Ok(())
    }

    pub(super) fn commit_snapshots(&mut self, commits: &[CommitSnapshot]) -> Response {
        let named: BTreeSet<_> = commits.iter().map(|c| c.snapshot).collect();
        if commits.is_empty() || named.len() != commits.len() {
            return Err(Refusal::internal("commit: each snapshot once"));
        }
        let mut nexts = Vec::with_capacity(commits.len());
        for commit in commits {
            let snapshot = self.snapshots.get(commit.snapshot);
            let snapshot = snapshot
                .filter(|s| s.state == SnapshotState::Pending)
                .ok_or_else(|| {
                    Refusal::aborted("the snapshot was cancelled, because a volume was opened or the leader changed; try again")
                })?;
            if let Some(group) = &snapshot.group {
                let mut members = self.snapshots.of_group(group.id, SnapshotId::NIL);
                if !members.all(|s| named.contains(&s.id)) {
                    return Err(Refusal::internal("commit: a group as a whole"));
                }
            }
            let volume = self.require_volume(snapshot.volume)?;
            let current = match commit.holder {
                Some((client, epoch)) => volume.is_current(client, epoch),
                None => volume.holder.is_none() && volume.clean,
            };
            if !current {
                return Err(Refusal::aborted(format!(
                    "volume {} was opened, closed or reconfigured while its snapshot was being taken; try again",
                    volume.name
                )));
            }
            let mut next = Volume::clone(volume);
            next.settle(true);
            nexts.push(next);
        }
        for volume in self.install_all(nexts)? {
            for commit in commits {
                if let Some(snapshot) = self.snapshots.get(commit.snapshot)
                    && snapshot.volume == volume.id
                {
                    let mut snapshot = Snapshot::clone(snapshot);
                    snapshot.state = SnapshotState::Ready;
                    snapshot.size_bytes = volume.size_bytes;
                    self.snapshots.insert(snapshot);
                }
            }
        }
        let ids = commits.iter().map(|c| c.snapshot).collect();
        Ok(Answer::Snapshots(ids))
    }

    /// What cancelling the pending ones among some snapshots changes, those of their groups included (S5).
    pub(super) fn cancellation(&self, ids: impl Iterator<Item = SnapshotId>) -> Cancellation {
        let mut cancellation = Cancellation::default();
        for id in ids {
            let Some(named) = self.snapshots.get(id) else {
                continue;
            };
            let group = named.group.as_ref();
            let members = group.map(|g| self.snapshots.of_group(g.id, SnapshotId::NIL));
            for snapshot in members.into_iter().flatten().chain([named]) {
                let volumes = &mut cancellation.volumes;
                if snapshot.state != SnapshotState::Pending
                    || volumes.contains_key(&snapshot.volume)
                {
                    continue;
                }
                if let Some(volume) = self.volumes.get(&snapshot.volume) {
                    let mut next = Volume::clone(volume);
                    next.settle(false);
                    volumes.insert(next.id, next);
                }
                cancellation.snapshots.push(snapshot.id);
            }
        }
        cancellation
    }

    /// What an open of a volume cancels (S5).
    pub(super) fn cancellation_by_open(&self, volume: &Volume) -> Cancellation {
        if !volume.is_snapshot_pending() {
            return Cancellation::default();
        }
        let of_volume = self.snapshots.of_volume(volume.id, SnapshotId::NIL);
        self.cancellation(of_volume.map(|s| s.id))
    }

    pub(super) fn cancel_snapshots(&mut self, ids: &[SnapshotId]) -> Response {
        let bounded = ids.iter().copied().take(validate::BATCH_MAX);
        let cancellation = self.cancellation(bounded);
        self.install_all(cancellation.volumes.into_values().collect())?;
        for id in cancellation.snapshots {
            self.snapshots.remove(id);
        }
        Ok(Answer::Done)
    }

    pub(super) fn delete_snapshots(&mut self, ids: &[SnapshotId]) -> Response {
        if ids.len() > validate::BATCH_MAX {
            return Err(Refusal::invalid(format!(
                "snapshot_ids: at most {} at once",
                validate::BATCH_MAX
            )));
        }
        let mut nexts = BTreeMap::<VolumeId, Volume>::new();
        let (mut gone, mut hidden) = (BTreeSet::new(), BTreeSet::new());
        for id in ids {
            let Some(snapshot) = self.snapshots.get(*id) else {
                continue;
            };
            match snapshot.state {
                SnapshotState::Deleting { .. } | SnapshotState::Hidden => continue,
                SnapshotState::Pending => {
                    return Err(Refusal::aborted(format!(
                        "snapshot {} is being taken at this moment; try again",
                        snapshot.name
                    )));
                }
                SnapshotState::Ready => {}
            }
            let Some(volume) = self.volumes.get(&snapshot.volume) else {
                return Err(Refusal::internal("a snapshot without volume"));
            };
            if volume.reverting == Some(*id) {
                return Err(Refusal::precondition(format!(
                    "snapshot {}: volume {} is being reverted to it; {}, then delete it",
                    snapshot.name,
                    volume.name,
                    self.revert_again(volume)
                )));
            }
            if self.has_clones(volume.id, snapshot.number) {
                hidden.insert(*id);
                continue;
            }
            let next = nexts
                .entry(volume.id)
                .or_insert_with(|| Volume::clone(volume));
            next.layers.live.retain(|n| *n != snapshot.number);
            next.layers.revision = volume.layers.revision + 1;
            gone.insert(*id);
        }
        let ends = |v: &Volume| v.hidden && v.layers.live.is_empty();
        let (ended, kept): (Vec<_>, Vec<_>) = nexts.into_values().partition(ends);
        let kept = self.install_all(kept)?;
        for volume in ended {
            if let Some(volume) = self.volumes.get(&volume.id).cloned() {
                self.uninstall(&volume);
            }
        }
        for id in hidden {
            self.hide_snapshot(id);
        }
        let revisions: BTreeMap<_, _> = kept.iter().map(|v| (v.id, v.layers.revision)).collect();
        for id in gone {
            if let Some(snapshot) = self.snapshots.get(id)
                && let Some(revision) = revisions.get(&snapshot.volume)
            {
                let mut snapshot = Snapshot::clone(snapshot);
                snapshot.state = SnapshotState::Deleting {
                    revision: *revision,
                };
                self.snapshots.insert(snapshot);
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn forget_snapshots(&mut self, ids: &[SnapshotId]) -> Answer {
        for id in ids.iter().take(validate::BATCH_MAX) {
            if self.snapshots.get(*id).is_some_and(|s| s.is_deleting()) {
                self.snapshots.remove(*id);
            }
        }
        Answer::Done
    }

    /// Deletes a volume that nobody uses: at once, or, while it has snapshots, by hiding it.
    pub(super) fn remove_or_hide(&mut self, volume: &std::sync::Arc<Volume>) -> Response {
        if volume.is_snapshot_pending() {
            return Err(busy(&volume.name));
        }
        if volume.layers.live.is_empty() {
            self.uninstall(volume);
        } else {
            let mut next = Volume::clone(volume);
            next.hidden = true;
            next.reverting = None;
            self.install(next)?;
            self.layers_generation += 1;
        }
        Ok(Answer::Done)
    }
}

fn check_reservation(reserve: &ReserveSnapshots) -> Result<(), Refusal> {
    let count = reserve.snapshots.len();
    if count == 0 || count > validate::SNAPSHOT_VOLUMES_MAX {
        return Err(Refusal::invalid(format!(
            "items: 1 to {} snapshots are taken at once",
            validate::SNAPSHOT_VOLUMES_MAX
        )));
    }
    match &reserve.group {
        Some(group) => validate::name("group_name", &group.name)?,
        None if count > 1 => {
            return Err(Refusal::invalid(
                "group_name: snapshots of several volumes form a group, which needs a name",
            ));
        }
        None => {}
    }
    let (mut names, mut volumes) = (BTreeSet::new(), BTreeSet::new());
    for new in &reserve.snapshots {
        validate::name("name", &new.name)?;
        validate::labels("labels", &new.labels)?;
        if !names.insert(&new.name) || !volumes.insert(new.volume) {
            return Err(Refusal::invalid(
                "items: every volume and every name only once",
            ));
        }
    }
    Ok(())
}
