//! Attach: open the volume, make a device of it, remember it. And growing the device.
//!
//! Invariants:
//! - The answer comes when requests on the device are served.
//! - What fails leaves nothing behind: neither device nor record nor open volume.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::metadata as pb;

use super::attachments::{Attachment, Attachments, Claim, State, VolumeName, observe};
use super::device::{self, Spec};
use super::error::NodeError;
use super::loopdev::{self, Place};
use super::record::{Kind, Record};
use super::recovery;
use crate::client::{
    Ended, Endpoint, HostedVolume, OpenSpec, PassedSocket, Phase, VolumeStatus, is_clone,
    is_first_open,
};
use crate::engine::{ClientOp, ClientReply};

/// Connections of a device unless told otherwise.
const CONNECTIONS_DEFAULT: u32 = 2;
/// Most connections of a device.
const CONNECTIONS_MAX: u32 = 16;
/// Time for a volume to open: fencing, a lease, reconciling, and replicas that come back.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(45);
/// Time for what this process does alone.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a volume that could not be opened to be closed.
pub(super) const UNDO_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the metadata cluster's new size to reach the volume's session.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a read that shows that the device's connections carry requests.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);
/// Block status requests at once.
const PROBES_AT_ONCE: u64 = 16;
/// Bytes that one of them covers.
const PROBE_BYTES: u64 = 64 * 1024 * 1024;

/// What is asked of an attachment.
#[derive(Clone, Debug)]
pub struct AttachRequest {
    /// The volume.
    pub volume: VolumeName,
    /// Refuse writes.
    pub read_only: bool,
    /// The kind of device.
    pub kind: Kind,
    /// Connections; 0 for the default.
    pub connections: u32,
    /// Logical block size; 0 for the default.
    pub block_size: u32,
    /// Take the volume over from another holder.
    pub force: bool,
    /// Ask whether the volume holds data.
    pub probe_data: bool,
}

impl AttachRequest {
    fn validate(&mut self) -> Result<(), NodeError> {
        if self.connections == 0 {
            self.connections = CONNECTIONS_DEFAULT;
        }
        if self.connections > CONNECTIONS_MAX {
            return Err(NodeError::Invalid {
                field: "connections",
                why: format!("must be at most {CONNECTIONS_MAX}"),
            });
        }
        if self.block_size == 0 {
            self.block_size = 512;
        }
        if !matches!(self.block_size, 512 | 4096) {
            return Err(NodeError::Invalid {
                field: "block_size",
                why: "must be 512 or 4096".into(),
            });
        }
        Ok(())
    }

    /// An attachment that is there answers this request, or says why not.
    fn fits(&self, present: &Attachment) -> Result<(), NodeError> {
        let record = &present.record;
        let name = &record.volume;
        match present.state {
            State::Attached => {}
            State::Attaching | State::Detaching => {
                return Err(NodeError::Precondition(format!(
                    "volume {name} is half detached: detach it again"
                )));
            }
            State::Recovering => {
                return Err(NodeError::Unavailable(format!(
                    "the device of volume {name} is being taken back: {}",
                    present.detail
                )));
            }
            State::Broken => {
                return Err(NodeError::Precondition(format!(
                    "volume {name} was attached before: {}",
                    present.detail
                )));
            }
            State::Fenced => {
                return Err(NodeError::Precondition(format!(
                    "volume {name} was taken from this node: {}; detach it before it is attached again",
                    present.detail
                )));
            }
        }
        let same = record.read_only == self.read_only
            && record.kind == self.kind
            && record.block_size == self.block_size;
        if same {
            return Ok(());
        }
        Err(NodeError::Precondition(format!(
            "volume {name} is attached with other options ({}, block size {}); detach it first",
            if record.read_only {
                "read-only"
            } else {
                "read-write"
            },
            record.block_size
        )))
    }
}

impl Attachments {
    /// Makes a device of a volume; whether it holds data, if that was asked for.
    ///
    /// # Errors
    /// See `node.proto`.
    pub async fn attach(
        &self,
        mut request: AttachRequest,
    ) -> Result<(Attachment, Option<bool>), NodeError> {
        request.validate()?;
        let known = match &request.volume {
            VolumeName::Name(name) => self.find(name),
            VolumeName::Id(id) => Some(*id),
        };
        if let Some(id) = known {
            // What is there needs no metadata.
            let claim = self.claim(id)?;
            if let Some(present) = claim.get().filter(|a| a.state == State::Broken) {
                self.clear_away(&claim, &present).await?;
            }
            if let Some(present) = claim.get() {
                request.fits(&present)?;
                let hosted = present.hosted.clone();
                let data = match hosted.filter(|_| request.probe_data) {
                    Some(hosted) => Some(holds_data(&hosted).await?),
                    None => None,
                };
                return Ok((present, data));
            }
        }
        let volume = self.look_up(&request.volume).await?;
        let id = VolumeId::from_slice(&volume.volume_id)
            .ok_or_else(|| NodeError::Bug("metadata sent a volume without an id".into()))?;
        let claim = self.claim(id)?;
        if claim.get().is_some() {
            return Err(NodeError::Pending(id));
        }
        let started = std::time::Instant::now();
        let outcome = self.attach_new(&claim, &request, &volume).await;
        observe("attach", started, &outcome);
        match &outcome {
            Ok((made, _)) => tracing::info!(
                volume = volume.name,
                device = ?made.device(),
                milliseconds = started.elapsed().as_millis() as u64,
                "attached"
            ),
            Err(error) => {
                tracing::warn!(volume = volume.name, %error, "cannot attach");
                self.undo(&claim).await;
            }
        }
        outcome
    }

    async fn attach_new(
        &self,
        claim: &Claim,
        request: &AttachRequest,
        volume: &pb::Volume,
    ) -> Result<(Attachment, Option<bool>), NodeError> {
        match request.kind {
            Kind::Nbd => blocking(device::require_nbd).await?,
            Kind::Loop => self.place(claim.volume).make().map_err(NodeError::Record)?,
        }
        let node = self.node().await?;
        let record = Record {
            volume_id: claim.volume,
            volume: volume.name.clone(),
            kind: request.kind,
            boot_id: self.shared.boot_id.clone(),
            index: None,
            read_only: request.read_only,
            block_size: request.block_size,
            connections: request.connections,
            attached_unix_ms: unix_ms(),
            fenced: None,
            closed_epoch: None,
        };
        let hosted = self
            .shared
            .host
            .open(OpenSpec {
                read_only: request.read_only,
                force: request.force,
                node,
                first_open: is_first_open(volume),
                ..OpenSpec::new(claim.volume, volume.name.clone(), self.endpoint(&record))
            })
            .await;
        claim.set(Attachment {
            record: record.clone(),
            state: State::Attaching,
            detail: "the volume is being opened".into(),
            hosted: Some(hosted.clone()),
            supervisor: None,
        });
        let status = wait_served(&hosted, OPEN_TIMEOUT).await?;
        // A clone has what it inherits, or what its disks copied of that.
        let written = volume.opened_once || is_clone(volume);
        let data = match (request.probe_data, written) {
            (false, _) => None,
            // Nobody was ever served: nobody can have written.
            (true, false) => Some(false),
            (true, true) => Some(holds_data(&hosted).await?),
        };
        self.shared
            .records
            .save(&record)
            .map_err(NodeError::Record)?;
        let index = match request.kind {
            Kind::Nbd => connect(&record, &hosted, &status).await?,
            Kind::Loop => {
                let place = self.place(claim.volume);
                let (read_only, block_size) = (record.read_only, record.block_size);
                blocking(move || loopdev::attach(&place, read_only, block_size)).await?
            }
        };
        claim.change(|a| {
            a.record.index = Some(index);
            a.detail.clear();
        });
        let made = claim
            .get()
            .ok_or_else(|| NodeError::Bug("an attachment vanished under its claim".into()))?;
        self.shared
            .records
            .save(&made.record)
            .map_err(NodeError::Record)?;
        claim.change(|a| a.state = State::Attached);
        self.supervise(claim.volume);
        let made = claim.get().unwrap_or(made);
        Ok((made, data))
    }

    /// Where the file of a volume appears that a loop device is made of.
    pub(super) fn place(&self, volume: VolumeId) -> Place {
        Place::new(&self.shared.state_dir, volume)
    }

    /// Where a volume is served for its kind of device.
    pub(super) fn endpoint(&self, record: &Record) -> Endpoint {
        match record.kind {
            Kind::Nbd => Endpoint::Given,
            Kind::Loop => Endpoint::Unix(self.place(record.volume_id).socket),
        }
    }

    /// Takes back what a failed attach has done.
    async fn undo(&self, claim: &Claim) {
        let Some(failed) = claim.get() else { return };
        if failed.record.kind == Kind::Nbd && failed.record.index.is_none() {
            // The kernel may have made it before something else failed.
            let backend = failed.record.backend();
            claim.change(|a| a.record.index = device::find(&backend));
        }
        let failed = claim.get().unwrap_or(failed);
        let taken_down = self.take_down(&failed).await;
        if let Err(error) = taken_down {
            tracing::warn!(%error, "cannot take down the device of a failed attach");
        }
        if let Some(hosted) = &failed.hosted {
            hosted.close().await;
            if tokio::time::timeout(UNDO_TIMEOUT, hosted.ended())
                .await
                .is_err()
            {
                hosted.abandon().await;
                hosted.ended().await;
            }
        }
        if let Err(error) = self.shared.records.remove(claim.volume) {
            tracing::error!(%error, "cannot remove the record of a failed attach");
        }
        claim.clear();
    }

    /// Makes a device as large as its volume.
    ///
    /// # Errors
    /// See `node.proto`.
    pub async fn resize(&self, volume: VolumeId) -> Result<Attachment, NodeError> {
        let claim = self.claim(volume)?;
        let present = claim.get().ok_or_else(|| {
            NodeError::NotFound(format!("volume {volume} is not attached to this node"))
        })?;
        let (State::Attached, Some(hosted), Some(index)) =
            (present.state, &present.hosted, present.record.index)
        else {
            return Err(NodeError::Precondition(format!(
                "volume {} is not served now: {}",
                present.record.volume, present.detail
            )));
        };
        let wanted = self.look_up(&VolumeName::Id(volume)).await?.size_bytes;
        let grown = hosted.wait(|s| s.size_bytes >= wanted);
        let status = tokio::time::timeout(RESIZE_TIMEOUT, grown)
            .await
            .map_err(|_| {
                NodeError::Unavailable("the new size has not arrived yet: try again".into())
            })?;
        match present.record.kind {
            Kind::Nbd => {
                recovery::fit_size(&present.record, index, hosted, status.size_bytes).await?;
            }
            // nbdfuse has taken the size when it was started.
            Kind::Loop if device::loop_size_bytes(index) != Some(status.size_bytes) => {
                return Err(NodeError::Precondition(
                    "a loop device keeps its size: detach the volume and attach it again".into(),
                ));
            }
            Kind::Loop => {}
        }
        Ok(present)
    }
}

/// Hands the kernel sockets that are served.
async fn connect(
    record: &Record,
    hosted: &HostedVolume,
    status: &VolumeStatus,
) -> Result<u32, NodeError> {
    let mut ours = Vec::new();
    let mut kernels = Vec::new();
    for _ in 0..record.connections {
        let (our, kernel) = device::socket_pair()?;
        ours.push(PassedSocket {
            socket: our,
            received: Default::default(),
            negotiated: Default::default(),
        });
        kernels.push(kernel);
    }
    let count = ours.len();
    hosted.adopt(ours).await;
    let adopted = hosted.wait(|s| s.connections == count);
    let served = tokio::time::timeout(LOCAL_TIMEOUT, adopted).await;
    if !served.is_ok_and(|s| s.connections == count) {
        return Err(NodeError::Bug("a worker does not take connections".into()));
    }
    let spec = Spec {
        backend: record.backend(),
        size_bytes: status.size_bytes,
        block_size: record.block_size,
        flags: crate::nbd::kernel_flags(record.read_only),
    };
    blocking(move || device::connect(&spec, &kernels)).await
}

/// Waits until an opening volume is served; its status then.
pub(super) async fn wait_served(
    hosted: &HostedVolume,
    limit: Duration,
) -> Result<VolumeStatus, NodeError> {
    let served = hosted.wait(|s| s.phase == Phase::Serving);
    let Ok(status) = tokio::time::timeout(limit, served).await else {
        return Err(NodeError::Unavailable(
            "the metadata cluster or the volume's replicas do not answer: see `ashlar replica list`, and try again".into(),
        ));
    };
    match &status.phase {
        Phase::Serving => Ok(status),
        Phase::Ended(Ended::Refused(why)) => Err(NodeError::Precondition(why.clone())),
        Phase::Ended(Ended::Deleted) => Err(NodeError::NotFound("the volume was deleted".into())),
        Phase::Ended(ended) => Err(NodeError::Precondition(format!("the volume: {ended}"))),
        Phase::Opening => Err(NodeError::Bug("the volume is still opening".into())),
    }
}

/// Whether any block of an open volume holds data.
async fn holds_data(hosted: &HostedVolume) -> Result<bool, NodeError> {
    let size = hosted.status().size_bytes;
    let mut at = 0;
    while at < size {
        let mut asked = tokio::task::JoinSet::new();
        for part in 0..PROBES_AT_ONCE {
            let offset = at + part * PROBE_BYTES;
            if offset < size {
                let hosted = hosted.clone();
                let length = PROBE_BYTES.min(size - offset);
                asked.spawn(async move { part_holds_data(&hosted, offset, length).await });
            }
        }
        while let Some(part) = asked.join_next().await {
            if part.map_err(|e| NodeError::Bug(e.to_string()))?? {
                return Ok(true);
            }
        }
        at += PROBES_AT_ONCE * PROBE_BYTES;
    }
    Ok(false)
}

async fn part_holds_data(
    hosted: &HostedVolume,
    mut offset: u64,
    length: u64,
) -> Result<bool, NodeError> {
    let end = offset + length;
    while offset < end {
        let op = ClientOp::BlockStatus {
            offset,
            length: end - offset,
        };
        let extents = match hosted.ask(op).await {
            Some(Ok(ClientReply::Extents(extents))) if !extents.is_empty() => extents,
            Some(Ok(_)) => return Err(NodeError::Bug("no extents in a block status".into())),
            Some(Err(error)) => return Err(NodeError::Precondition(error.to_string())),
            None => return Err(NodeError::Precondition("the volume was lost".into())),
        };
        for extent in extents {
            if extent.allocated {
                return Ok(true);
            }
            offset += extent.length;
        }
    }
    Ok(false)
}

/// Whether requests are carried now: a read of the first block is answered.
pub(super) async fn is_healthy(hosted: &HostedVolume) -> bool {
    let read = hosted.ask(ClientOp::Read {
        offset: 0,
        length: 4096,
    });
    matches!(
        tokio::time::timeout(HEALTH_TIMEOUT, read).await,
        Ok(Some(Ok(_)))
    )
}

/// Runs what blocks on a thread for it.
pub(super) async fn blocking<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, NodeError>
where
    T: Send + 'static,
    E: Send + 'static,
    NodeError: From<E>,
{
    let outcome = tokio::task::spawn_blocking(work).await;
    Ok(outcome.map_err(|e| NodeError::Bug(e.to_string()))??)
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |t| t.as_millis() as u64)
}
