//! Detach: flush, take the device down, close the volume, forget it.
//!
//! Invariants:
//! - A device that is mounted is not taken down, unless by force or because its volume is lost anyway.
//! - Before the device is gone, whatever was acknowledged is durable on the replicas (except by force).
//! - Each step may be repeated: a detach that fails goes on where it stopped when it is asked again.

use std::time::Duration;

use super::attach::blocking;
use super::attachments::{Attachment, Attachments, Claim, State, VolumeName, observe};
use super::device;
use super::error::NodeError;
use super::loopdev;
use super::record::Kind;
use crate::client::{Ended, HostedVolume, Phase};
use crate::engine::ClientOp;

/// Time for a flush before the device is taken down.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(20);
/// Time for the volume to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time for a look at whether a device is mounted.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

impl Attachments {
    /// Ends an attachment; there need not be one.
    ///
    /// # Errors
    /// See `node.proto`.
    pub async fn detach(&self, volume: &VolumeName, force: bool) -> Result<(), NodeError> {
        let id = match volume {
            VolumeName::Id(id) => *id,
            VolumeName::Name(name) => match self.find(name) {
                Some(id) => id,
                None => return Ok(()),
            },
        };
        let claim = self.claim(id)?;
        let Some(present) = claim.get() else {
            return Ok(());
        };
        let started = std::time::Instant::now();
        let outcome = self.detach_present(&claim, &present, force).await;
        observe("detach", started, &outcome);
        outcome
    }

    async fn detach_present(
        &self,
        claim: &Claim,
        present: &Attachment,
        force: bool,
    ) -> Result<(), NodeError> {
        if present.state == State::Broken {
            return self.detach_broken(claim, present, force).await;
        }
        let lost = present.state == State::Fenced;
        if !force && !lost {
            require_unused(present).await?;
            if present.state == State::Recovering {
                return Err(NodeError::Unavailable(format!(
                    "the device of volume {} is being taken back: {}; try again, or detach it by force",
                    present.record.volume, present.detail
                )));
            }
            if let Some(hosted) = &present.hosted {
                flush(hosted).await?;
            }
        }
        if let Some(supervisor) = &present.supervisor {
            supervisor.abort();
        }
        claim.change(|a| {
            a.state = State::Detaching;
            a.detail = "being detached".into();
        });
        self.take_down(present).await?;
        close(claim, present, force || lost).await?;
        self.shared
            .records
            .remove(claim.volume)
            .map_err(NodeError::Record)?;
        claim.clear();
        tracing::info!(volume = present.record.volume, "detached");
        Ok(())
    }

    /// What the task that watches over a broken device would do by itself; by force also while it is used.
    async fn detach_broken(
        &self,
        claim: &Claim,
        present: &Attachment,
        force: bool,
    ) -> Result<(), NodeError> {
        if force && require_unused(present).await.is_err() {
            // It goes with its last user, who gets errors anyway.
            self.take_down(present).await?;
            claim.change(|a| a.record.index = None);
        }
        let present = claim.get().unwrap_or_else(|| present.clone());
        self.clear_away(claim, &present).await
    }

    /// Takes the device down, if it is still this volume's.
    pub(super) async fn take_down(&self, present: &Attachment) -> Result<(), NodeError> {
        let index = present.record.index;
        let backend = present.record.backend();
        match present.record.kind {
            Kind::Nbd => {
                blocking(move || match index {
                    Some(index) if device::is_ours(index, &backend) => {
                        device::disconnect(index, &backend)
                    }
                    _ => Ok(()),
                })
                .await
            }
            Kind::Loop => {
                let place = self.place(present.record.volume_id);
                blocking(move || loopdev::detach(&place, index)).await
            }
        }
    }
}

pub(super) async fn require_unused(present: &Attachment) -> Result<(), NodeError> {
    let Some(path) = present.device() else {
        return Ok(());
    };
    let look = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || device::in_use(&path))
    };
    match tokio::time::timeout(LOOK_TIMEOUT, look).await {
        Ok(Ok(Ok(true))) => Err(NodeError::Precondition(format!(
            "{} is in use: unmount it first",
            path.display()
        ))),
        // Without a node, or with one that does not open, nothing can be mounted from here.
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(NodeError::Unavailable(format!(
            "{} does not answer: wait for the volume's replicas, or detach it by force and lose what is not flushed",
            path.display()
        ))),
    }
}

async fn flush(hosted: &HostedVolume) -> Result<(), NodeError> {
    match tokio::time::timeout(FLUSH_TIMEOUT, hosted.ask(ClientOp::Flush)).await {
        Ok(Some(Ok(_)) | None) => Ok(()),
        Ok(Some(Err(error))) => Err(NodeError::Precondition(format!(
            "the volume cannot be flushed ({error}): detach it by force to lose what was written last"
        ))),
        Err(_) => Err(NodeError::Unavailable(
            "the volume's replicas do not answer: try again, or detach it by force and lose what is not flushed".into(),
        )),
    }
}

/// Closes the volume, or leaves it if it does not close and that is allowed.
async fn close(claim: &Claim, present: &Attachment, force: bool) -> Result<(), NodeError> {
    let Some(hosted) = &present.hosted else {
        return Ok(());
    };
    if !matches!(hosted.status().phase, Phase::Ended(_)) {
        hosted.close().await;
    }
    let ended = match tokio::time::timeout(CLOSE_TIMEOUT, hosted.ended()).await {
        Ok(ended) => ended,
        Err(_) if force => {
            hosted.abandon().await;
            hosted.ended().await
        }
        Err(_) => {
            claim.change(|a| a.detail = "the volume does not close".into());
            return Err(NodeError::Unavailable(
                "the device is gone, but the metadata cluster or the volume's replicas do not answer the close: try again".into(),
            ));
        }
    };
    if !matches!(ended, Ended::Closed { .. }) {
        tracing::warn!(volume = present.record.volume, how = %ended, "detached a volume that was not closed");
    }
    claim.change(|a| a.hosted = None);
    Ok(())
}
