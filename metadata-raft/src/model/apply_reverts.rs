//! Commands about bringing a volume back to a snapshot of it.
//!
//! Invariants:
//! - From the begin to the end only a holder that says that it reverts gets the volume, and nobody reads it: its content is
//!   neither what it was nor what the snapshot shows.
//! - The snapshot stays meanwhile, and no other one is taken. Deleting the volume ends the matter.
//! - The end is told by the holder, or after its close under the same epoch: then nobody holds a volume that no longer has to be
//!   finished, whenever the process that reverts it dies.
//! - What the holder writes is written as anything else is; metadata only remember that it has to be finished.

use ashlar_proto::ids::{ClientId, Epoch, SnapshotId, VolumeId};

use super::State;
use super::apply_snapshots::busy;
use super::apply_volume::not_current;
use super::command::{Answer, Refusal, Response};
use super::snapshot::SnapshotState;
use super::volume::Volume;

impl State {
    /// What to do about a volume that is being reverted, for people.
    pub(super) fn revert_again(&self, volume: &Volume) -> String {
        let snapshot = volume.reverting.and_then(|id| self.snapshots.get(id));
        let name = snapshot.map_or("SNAPSHOT", |s| s.name.as_str());
        format!(
            "run `ashlar snapshot revert {} {name}` again to finish that",
            volume.name
        )
    }

    /// Whether a volume may be opened to revert it, or for anything else.
    pub(super) fn check_reverting(&self, volume: &Volume, to_revert: bool) -> Result<(), Refusal> {
        match (volume.reverting, to_revert) {
            (Some(_), true) | (None, false) => Ok(()),
            (Some(_), false) => Err(Refusal::precondition(format!(
                "volume {} is being reverted to a snapshot and was not finished; {}",
                volume.name,
                self.revert_again(volume)
            ))),
            (None, true) => Err(Refusal::precondition(format!(
                "volume {} is not being reverted; begin with `ashlar snapshot revert {} SNAPSHOT`",
                volume.name, volume.name
            ))),
        }
    }

    pub(super) fn begin_revert(&mut self, id: VolumeId, snapshot: SnapshotId) -> Response {
        let volume = self.require_volume(id)?.clone();
        let name = &volume.name;
        let found = self.snapshots.get(snapshot).filter(|s| s.is_shown());
        let found = found.ok_or_else(|| {
            Refusal::not_found(format!(
                "snapshot {snapshot} does not exist; see `ashlar snapshot list`"
            ))
        })?;
        if found.volume != id {
            return Err(Refusal::invalid(format!(
                "snapshot_id: snapshot {} is not one of volume {name}; make a new volume of it with `ashlar volume create \
                 NAME --from-snapshot {}`",
                found.name, found.name
            )));
        }
        if volume.is_snapshot_pending() || found.state != SnapshotState::Ready {
            return Err(busy(name));
        }
        if let Some(user) = volume.holder.iter().chain(&volume.readers).next() {
            return Err(Refusal::precondition(format!(
                "volume {name} is attached by {}; detach it first: it can only be reverted while nobody uses it",
                user.client_name
            )));
        }
        match volume.reverting {
            Some(current) if current == snapshot => return Ok(Answer::Volume(volume)),
            // Whatever was begun is overwritten by this one.
            Some(_) | None => {}
        }
        let mut next = Volume::clone(&volume);
        next.reverting = Some(snapshot);
        Ok(Answer::Volume(self.install(next)?))
    }

    pub(super) fn end_revert(
        &mut self,
        id: VolumeId,
        snapshot: SnapshotId,
        client: ClientId,
        epoch: Epoch,
    ) -> Response {
        let volume = self.require_volume(id)?.clone();
        // Closing leaves the epoch as it is, and nobody wrote since.
        let closed = volume.holder.is_none() && volume.epoch == epoch;
        if !closed && !volume.is_current(client, epoch) {
            return Err(not_current(&volume, client, epoch));
        }
        match volume.reverting {
            None => return Ok(Answer::Volume(volume)),
            Some(current) if current == snapshot => {}
            Some(_) => {
                return Err(Refusal::precondition(format!(
                    "volume {} is being reverted to another snapshot by now; {}",
                    volume.name,
                    self.revert_again(&volume)
                )));
            }
        }
        let mut next = Volume::clone(&volume);
        next.reverting = None;
        Ok(Answer::Volume(self.install(next)?))
    }
}
