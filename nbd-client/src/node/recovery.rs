//! Devices outlive this process: taking those of the last one back, and watching over connections.
//!
//! Invariants:
//! - A volume is opened again for a device only if nobody else can have written since: metadata still
//!   names this client as its holder, or shows the very epoch in which the last process closed it.
//! - A device of another run of the kernel, or with another backend, is none of ours: its record goes,
//!   and the volume is not opened.
//! - Sockets are offered one at a time until the kernel has as many as it was given at first.

use std::time::Duration;

use ashlar_proto::ids::{ClientId, VolumeId};
use ashlar_proto::rpc::metadata as pb;

use super::attach::{blocking, is_healthy, wait_served};
use super::attachments::{Attachment, Attachments, State, VolumeName, observe};
use super::device;
use super::error::NodeError;
use super::loopdev;
use super::record::{Kind, Record};
use crate::client::{Ended, HostedVolume, OpenSpec, PassedSocket, Phase, is_first_open};

/// Pause between offers of a socket that the kernel does not want yet; doubles.
const OFFER_PAUSE_MIN: Duration = Duration::from_millis(10);
const OFFER_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Pause before a volume that cannot be opened is tried again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// How long one attempt to open may take before its reason is looked at again.
const REOPEN_TIMEOUT: Duration = Duration::from_secs(3600);
/// Time for a worker to take a connection.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether a volume may be opened again for a waiting device.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Open {
        first_open: bool,
    },
    /// Somebody else may have written; why.
    Lost(String),
}

/// `closed`: the epoch in which the last process closed the volume, if it did.
pub(super) fn verdict(volume: &pb::Volume, client: ClientId, closed: Option<u64>) -> Verdict {
    match &volume.holder {
        Some(holder) if holder.client_id == client.to_vec() => {}
        Some(holder) => {
            return Verdict::Lost(format!("{} holds it now", holder.client_name));
        }
        None if closed == Some(volume.epoch) => {}
        None => {
            return Verdict::Lost("its attachment was ended while this node was away".into());
        }
    }
    Verdict::Open {
        first_open: is_first_open(volume),
    }
}

impl Attachments {
    /// Begins to take back what the last process had; requests on the devices wait meanwhile.
    pub(super) async fn recover(&self, client: ClientId) -> Result<(), NodeError> {
        for record in self.shared.records.load().map_err(NodeError::Record)? {
            // Some may have been handed over.
            if self.shared.get(record.volume_id).is_none()
                && let Some(record) = self.leftover(record)?
            {
                match record.kind {
                    // Its connections ended with the last process.
                    Kind::Loop => self.break_off(record)?,
                    Kind::Nbd => self.take_back(record, client, Vec::new())?,
                }
            }
        }
        match blocking(device::connected).await {
            Ok(connected) => {
                for (index, backend) in self.others(&connected) {
                    let device = device::path(index);
                    tracing::info!(device = %device.display(), backend, "the kernel has a device that is none of ours");
                }
            }
            Err(error) => tracing::debug!(%error, "the kernel does not tell its devices"),
        }
        Ok(())
    }

    /// Of the devices that the kernel has set up, those that are no attachment here, with their backends: made by
    /// somebody else, or their records are lost.
    pub(super) fn others(&self, connected: &[u32]) -> Vec<(u32, String)> {
        let all = self.shared.all();
        let ours = |index: u32| {
            all.iter()
                .any(|a| a.record.kind == Kind::Nbd && a.record.index == Some(index))
        };
        let others = connected.iter().filter(|index| !ours(**index));
        others
            .map(|index| (*index, device::backend(*index).unwrap_or_default()))
            .collect()
    }

    /// The record with its device, if the device is there; else the record is dropped.
    fn leftover(&self, mut record: Record) -> Result<Option<Record>, NodeError> {
        let backend = record.backend();
        if record.boot_id == self.shared.boot_id && record.kind == Kind::Nbd {
            record.index = match record.index {
                Some(index) => Some(index).filter(|i| device::is_ours(*i, &backend)),
                // The last process ended between the device's making and its being noted.
                None => device::find(&backend),
            };
            if record.index.is_some() {
                return Ok(Some(record));
            }
        }
        if record.boot_id == self.shared.boot_id && record.kind == Kind::Loop {
            record.index = self.place(record.volume_id).find();
            return Ok(Some(record));
        }
        if record.kind == Kind::Loop {
            // What a former run of the kernel left in directories.
            let place = self.place(record.volume_id);
            if let Err(error) = loopdev::detach(&place, None) {
                tracing::warn!(volume = record.volume, %error, "cannot clear the place of a loop device");
            }
        }
        let volume = &record.volume;
        tracing::info!(volume, "the device of an attachment is gone: forgetting it");
        self.shared
            .records
            .remove(record.volume_id)
            .map_err(NodeError::Record)?;
        Ok(None)
    }

    /// Begins to take a device back: with connections that were passed, or by new ones.
    pub(super) fn take_back(
        &self,
        record: Record,
        client: ClientId,
        passed: Vec<PassedSocket>,
    ) -> Result<(), NodeError> {
        let claim = self.claim(record.volume_id)?;
        let volume = record.volume_id;
        let fenced = record.fenced.clone();
        let lost = fenced.is_some();
        claim.set(Attachment {
            record,
            state: if lost {
                State::Fenced
            } else {
                State::Recovering
            },
            detail: fenced.unwrap_or_else(|| "the volume is being opened".into()),
            hosted: None,
            supervisor: None,
        });
        if lost {
            return Ok(());
        }
        let this = self.clone();
        let task = tokio::spawn(async move {
            if this.reopen(volume, client, passed).await {
                this.watch(volume).await;
            }
        });
        claim.change(|a| a.supervisor = Some(task.abort_handle()));
        Ok(())
    }

    /// Watches over the connections of a new attachment from now on.
    pub(super) fn supervise(&self, volume: VolumeId) {
        let this = self.clone();
        let task = tokio::spawn(async move { this.watch(volume).await });
        self.shared
            .change(volume, |a| a.supervisor = Some(task.abort_handle()));
    }

    /// Opens the volume of a waiting device; false if it is lost.
    async fn reopen(&self, volume: VolumeId, client: ClientId, passed: Vec<PassedSocket>) -> bool {
        let started = std::time::Instant::now();
        let hosted = loop {
            match self.try_reopen(volume, client).await {
                Ok(Ok(hosted)) => break hosted,
                Ok(Err(why)) => {
                    self.lost(volume, why).await;
                    return false;
                }
                Err(error) => {
                    tracing::warn!(%volume, %error, "cannot open the volume of a waiting device yet");
                    self.shared.change(volume, |a| a.detail = error.to_string());
                    tokio::time::sleep(REOPEN_PAUSE).await;
                }
            }
        };
        let passed_count = passed.len();
        hosted.adopt(passed).await;
        let adopted = hosted.wait(|s| s.connections >= passed_count);
        // Those that died on the way are replaced below.
        let _ = tokio::time::timeout(ADOPT_TIMEOUT, adopted).await;
        let Some(present) = self.shared.get(volume) else {
            return false;
        };
        if let Err(error) = self.reconnect(&present, &hosted).await {
            tracing::warn!(%volume, %error, "cannot give the device its connections");
        }
        self.shared.change(volume, |a| {
            a.state = State::Attached;
            a.detail.clear();
        });
        observe("take-back", started, &Ok(()));
        tracing::info!(
            volume = present.record.volume,
            device = ?present.device(),
            milliseconds = started.elapsed().as_millis() as u64,
            passed_count,
            "took a device back"
        );
        if let (Kind::Nbd, Some(index)) = (present.record.kind, present.record.index) {
            let size = hosted.status().size_bytes;
            if let Err(error) = fit_size(&present.record, index, &hosted, size).await {
                tracing::warn!(%volume, %error, "the device keeps its size for now");
            }
        }
        true
    }

    /// One attempt: the open volume, or why it is lost.
    async fn try_reopen(
        &self,
        volume: VolumeId,
        client: ClientId,
    ) -> Result<Result<HostedVolume, String>, NodeError> {
        let found = match self.look_up(&VolumeName::Id(volume)).await {
            Err(NodeError::NotFound(why)) => return Ok(Err(why)),
            other => other?,
        };
        let Some(present) = self.shared.get(volume) else {
            return Ok(Err("it was detached".into()));
        };
        let first_open = match verdict(&found, client, present.record.closed_epoch) {
            Verdict::Open { first_open } => first_open,
            Verdict::Lost(why) => return Ok(Err(why)),
        };
        let endpoint = self.endpoint(&present.record);
        let spec = OpenSpec {
            read_only: present.record.read_only,
            node: self.node().await?,
            first_open,
            ..OpenSpec::new(volume, found.name.clone(), endpoint)
        };
        let hosted = self.shared.host.open(spec).await;
        self.shared
            .change(volume, |a| a.hosted = Some(hosted.clone()));
        let status = wait_served(&hosted, REOPEN_TIMEOUT).await?;
        // Metadata was asked before the volume was opened: was anybody quicker?
        if found.holder.is_none() && status.epoch.0 != found.epoch + 1 {
            hosted.abandon().await;
            return Ok(Err("somebody else had it between two processes".into()));
        }
        Ok(Ok(hosted))
    }

    /// Gives the kernel new connections for those that are gone, until the volume ends.
    async fn watch(&self, volume: VolumeId) {
        while let Some(present) = self.shared.get(volume)
            && let Some(hosted) = &present.hosted
        {
            let wanted = present.record.connections as usize;
            let nbd = present.record.kind == Kind::Nbd;
            let status = hosted.wait(|s| nbd && s.connections < wanted).await;
            if let Phase::Ended(ended) = status.phase {
                return self.ended(volume, ended).await;
            }
            tracing::info!(
                volume = present.record.volume,
                connections = status.connections,
                "the kernel gave up connections: offering new ones"
            );
            if let Err(error) = self.reconnect(&present, hosted).await {
                tracing::error!(
                    volume = present.record.volume, %error,
                    "the device cannot have new connections: detach it"
                );
                self.shared.change(volume, |a| a.detail = error.to_string());
                let ended = hosted.ended().await;
                return self.ended(volume, ended).await;
            }
        }
    }

    /// A volume ended without being asked to.
    async fn ended(&self, volume: VolumeId, ended: Ended) {
        match ended {
            Ended::Superseded | Ended::Deleted | Ended::Refused(_) => {
                self.lost(volume, ended.to_string()).await;
            }
            // The device waits for the next process.
            Ended::Failed(_) => self.shared.broken.notify_one(),
            Ended::Closed { .. } | Ended::Abandoned => {}
        }
    }

    /// Somebody else may write to the volume: the device's users get errors from now on.
    async fn lost(&self, volume: VolumeId, why: String) {
        let Some(present) = self.shared.get(volume) else {
            return;
        };
        tracing::error!(
            volume = present.record.volume, why, device = ?present.device(),
            "the volume was taken from this node; its device is taken down: unmount it, then detach it"
        );
        let mut record = present.record.clone();
        record.fenced = Some(why.clone());
        if let Err(error) = self.shared.records.save(&record) {
            tracing::error!(%error, "cannot note that a volume was lost");
        }
        self.shared.change(volume, |a| {
            a.state = State::Fenced;
            a.detail = why;
            a.hosted = None;
            a.record = record;
        });
        if let Err(error) = self.take_down(&present).await {
            tracing::error!(%error, "cannot take down the device of a lost volume");
        }
    }

    /// Offers sockets until the device has all its connections again.
    async fn reconnect(
        &self,
        present: &Attachment,
        hosted: &HostedVolume,
    ) -> Result<(), NodeError> {
        let (Kind::Nbd, Some(index)) = (present.record.kind, present.record.index) else {
            return Ok(());
        };
        let wanted = present.record.connections as usize;
        let mut pause = OFFER_PAUSE_MIN;
        loop {
            let status = hosted.status();
            if status.connections >= wanted || matches!(status.phase, Phase::Ended(_)) {
                return Ok(());
            }
            let backend = present.record.backend();
            match blocking(move || device::replace_socket(index, &backend)).await? {
                Some(socket) => {
                    pause = OFFER_PAUSE_MIN;
                    let passed = PassedSocket {
                        socket,
                        received: Default::default(),
                        negotiated: Default::default(),
                    };
                    hosted.adopt(vec![passed]).await;
                    let count = status.connections + 1;
                    let adopted = hosted.wait(|s| s.connections >= count);
                    // If it is lost again meanwhile the next turn offers another.
                    let _ = tokio::time::timeout(ADOPT_TIMEOUT, adopted).await;
                }
                None => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(OFFER_PAUSE_MAX);
                }
            }
        }
    }
}

/// Makes the device as large as the volume, if all its connections carry requests.
pub(super) async fn fit_size(
    record: &Record,
    index: u32,
    hosted: &HostedVolume,
    size_bytes: u64,
) -> Result<(), NodeError> {
    if device::size_bytes(index).is_some_and(|size| size >= size_bytes) {
        return Ok(());
    }
    if hosted.status().connections < record.connections as usize || !is_healthy(hosted).await {
        return Err(NodeError::Unavailable(
            "requests on the device wait now: it is resized when they do not; try again".into(),
        ));
    }
    let backend = record.backend();
    blocking(move || device::resize(index, &backend, size_bytes)).await?;
    tracing::info!(volume = record.volume, size_bytes, "resized the device");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::is_clone;

    fn volume(holder: Option<ClientId>, epoch: u64) -> pb::Volume {
        pb::Volume {
            epoch,
            opened_once: true,
            holder: holder.map(|client| pb::Attachment {
                client_id: client.to_vec(),
                client_name: "host:1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_a_clone_s_disks_copied_is_not_made_anew() {
        let new = pb::Volume::default();
        let clone = pb::Volume {
            source_volume_id: vec![1; 16],
            parent: Some(pb::VolumeParent::default()),
            ..new.clone()
        };
        let cut = pb::Volume {
            parent: None,
            ..clone.clone()
        };
        let used = pb::Volume {
            opened_once: true,
            ..new.clone()
        };
        let first = [&new, &clone, &cut, &used].map(is_first_open);
        assert_eq!(first, [true, true, false, false]);
        assert_eq!([&new, &cut].map(is_clone), [false, true]);
    }

    #[test]
    fn a_volume_is_opened_again_only_if_nobody_else_can_have_written() {
        let (me, other) = (ClientId::generate(), ClientId::generate());
        let open = Verdict::Open { first_open: false };
        assert_eq!(verdict(&volume(Some(me), 7), me, None), open);
        assert_eq!(verdict(&volume(None, 7), me, Some(7)), open);
        // The last process opened it again after it had closed it.
        assert_eq!(verdict(&volume(Some(me), 8), me, Some(7)), open);
        for (state, closed) in [
            (volume(Some(other), 7), None),
            (volume(Some(other), 8), Some(7)),
            (volume(None, 7), None),
            (volume(None, 9), Some(7)),
        ] {
            assert!(matches!(verdict(&state, me, closed), Verdict::Lost(_)));
        }
    }
}
