//! Commands about readers (R10): joining, leaving, and who may write nevertheless.
//!
//! Invariants:
//! - Readers are listed only while nobody holds the volume, its last close was clean and its replicas are made; they
//!   have no epoch of their own.
//! - A reader that leaves by itself answers nothing any more. One that is taken off the list may, for a lease: the
//!   volume remembers that (`reader_revoked`) until the next open.
//! - Where a volume is published read-only, its nodes open it exclusively only to make it readable.

use ashlar_proto::ids::{ClientId, NodeId, VolumeId};

use super::command::{Answer, OpenVolume, Refusal, Response};
use super::volume::{AttachMode, Attachment, Volume};
use super::{State, validate};

impl State {
    /// Whether a node that may attach a volume may open it exclusively.
    pub(super) fn check_may_write(&self, volume: &Volume, node: NodeId) -> Result<(), Refusal> {
        let mut rights = volume.publications.iter();
        let Some((name, AttachMode::ReadOnly)) = rights.find(|(name, _)| self.is_on(node, name))
        else {
            return Ok(());
        };
        if !volume.clean || !volume.opened_once {
            return Ok(());
        }
        Err(Refusal::precondition(format!(
            "volume {} is published to node {name} for reading only; attach it read-only, or publish it exclusively",
            volume.name
        )))
    }

    pub(super) fn join_volume(&mut self, open: &OpenVolume) -> Response {
        validate::text("client_name", &open.client_name)?;
        if open.client.is_nil() {
            return Err(Refusal::invalid("client_id: must not be zero"));
        }
        let volume = self.require_volume(open.volume)?;
        self.check_published(volume, open.node)?;
        self.check_reverting(volume, false)?;
        if let Some(holder) = &volume.holder {
            return Err(Refusal::precondition(format!(
                "volume {} is attached by {} ({}), which may write; detach it there first",
                volume.name, holder.client_name, holder.client
            )));
        }
        if !volume.is_readable() {
            return Err(Refusal::precondition(format!(
                "volume {} was never opened, or not closed cleanly: it is opened exclusively once before it is read",
                volume.name
            )));
        }
        let mut next = Volume::clone(volume);
        next.readers.retain(|r| r.client != open.client);
        if next.readers.len() >= validate::READERS_MAX {
            return Err(Refusal::exhausted(format!(
                "volume {} has {} readers, which is the most; detach it somewhere",
                volume.name,
                validate::READERS_MAX
            )));
        }
        next.readers.push(Attachment {
            client: open.client,
            node: open.node,
            client_name: open.client_name.clone(),
            mode: AttachMode::ReadOnly,
            epoch: next.epoch,
        });
        Ok(Answer::Opened {
            volume: self.install(next)?,
            previous_clean: true,
        })
    }

    pub(super) fn leave_volume(&mut self, id: VolumeId, client: ClientId) -> Response {
        let mut next = Volume::clone(self.require_volume(id)?);
        next.readers.retain(|r| r.client != client);
        Ok(Answer::Volume(self.install(next)?))
    }
}
