//! Loop devices whose server ended for good with the last process: nothing can make them work again.
//!
//! | the device | what happens |
//! |---|---|
//! | nobody uses it | it is taken down, and its volume closed; the record goes |
//! | it is mounted, or open | the attachment is `broken` and says what to do; as soon as nobody uses it: as above |
//!
//! Invariants:
//! - The volume of a broken device does not stay held by this node: it is opened once more (which reconciles what the
//!   last process left) and closed, unless somebody else has it by now.
//! - The record stays until the volume is given back, so that the next process goes on where this one stopped.

use std::time::Duration;

use super::attach::{OPEN_TIMEOUT, UNDO_TIMEOUT, wait_served};
use super::attachments::{Attachment, Attachments, Claim, State, VolumeName};
use super::detach::require_unused;
use super::error::NodeError;
use super::record::Record;
use super::recovery::{Verdict, verdict};
use crate::client::{Endpoint, OpenSpec};

/// Pause between looks at whether a broken device is still used.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

impl Attachments {
    /// Shows a device that cannot be taken back, and clears it away as soon as nobody uses it.
    pub(super) fn break_off(&self, record: Record) -> Result<(), NodeError> {
        let claim = self.claim(record.volume_id)?;
        let volume = record.volume_id;
        let mut broken = Attachment {
            record,
            state: State::Broken,
            detail: String::new(),
            hosted: None,
            supervisor: None,
        };
        broken.detail = match broken.device() {
            Some(device) => format!(
                "its server ended with the last process: requests on {} fail for good; unmount it (and close it), then it \
                 is detached by itself",
                device.display()
            ),
            None => "the volume is being given back".into(),
        };
        tracing::error!(
            volume = broken.record.volume,
            device = ?broken.device(),
            "the server of a loop device ended with the last process: unmount it, then attach the volume again"
        );
        claim.set(broken);
        let this = self.clone();
        let task = tokio::spawn(async move {
            loop {
                match this.try_clear(volume).await {
                    Ok(()) => return,
                    Err(error) => tracing::debug!(%volume, %error, "a broken device stays"),
                }
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        });
        claim.change(|a| a.supervisor = Some(task.abort_handle()));
        Ok(())
    }

    async fn try_clear(&self, volume: ashlar_proto::ids::VolumeId) -> Result<(), NodeError> {
        let claim = self.claim(volume)?;
        match claim.get() {
            Some(present) if present.state == State::Broken => {
                self.clear_away(&claim, &present).await
            }
            _ => Ok(()),
        }
    }

    /// Takes a broken device down and gives its volume back.
    pub(super) async fn clear_away(
        &self,
        claim: &Claim,
        present: &Attachment,
    ) -> Result<(), NodeError> {
        require_unused(present).await?;
        self.take_down(present).await?;
        // The process that listened there did not come to remove it.
        let _ = std::fs::remove_file(self.place(claim.volume).socket);
        claim.change(|a| {
            a.record.index = None;
            a.detail = "the volume is being given back".into();
        });
        if let Err(error) = self.give_back(&present.record).await {
            claim.change(|a| {
                a.detail = format!("the device is gone, the volume is not given back yet: {error}");
            });
            return Err(error);
        }
        self.shared
            .records
            .remove(claim.volume)
            .map_err(NodeError::Record)?;
        claim.clear();
        tracing::info!(
            volume = present.record.volume,
            "a broken device is detached"
        );
        Ok(())
    }

    /// Closes the volume that the last process left open, unless it is somebody else's by now.
    async fn give_back(&self, record: &Record) -> Result<(), NodeError> {
        let found = match self.look_up(&VolumeName::Id(record.volume_id)).await {
            Err(NodeError::NotFound(_)) => return Ok(()),
            other => other?,
        };
        let client = self.shared.client;
        let first_open = match verdict(&found, client, None) {
            Verdict::Open { first_open } => first_open,
            Verdict::Lost(_) => return Ok(()),
        };
        let spec = OpenSpec {
            read_only: record.read_only,
            node: self.node().await?,
            first_open,
            ..OpenSpec::new(record.volume_id, found.name.clone(), Endpoint::Given)
        };
        let hosted = self.shared.host.open(spec).await;
        let served = wait_served(&hosted, OPEN_TIMEOUT).await;
        hosted.close().await;
        if tokio::time::timeout(UNDO_TIMEOUT, hosted.ended())
            .await
            .is_err()
        {
            hosted.abandon().await;
            return Err(NodeError::Unavailable(
                "the metadata cluster or the volume's replicas do not answer the close".into(),
            ));
        }
        match served {
            // Somebody was quicker: it is theirs.
            Err(NodeError::Precondition(_) | NodeError::NotFound(_)) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
