//! The attachments of this node and the claims of operations on them.
//!
//! | state | next |
//! |---|---|
//! | Attaching | Attached; gone (the attach failed) |
//! | Recovering (after a start) | Attached; Fenced; gone (the device is) |
//! | Attached | Fenced (another client took the volume over); Detaching |
//! | Fenced | Detaching |
//! | Broken (after a start, a loop device whose server is gone) | gone, as soon as nobody uses it; Detaching |
//! | Detaching | gone; stays so if the volume cannot be closed now, and a further detach goes on |
//!
//! Invariants:
//! - One operation at a time works on a volume: it holds a [`Claim`]; others are refused, not queued.
//! - Operations run to their end even if their caller goes away: they are tasks of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ashlar_proto::ids::{ClientId, Epoch, NodeId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tokio::sync::{Notify, OnceCell};
use tonic::{Code, Status};

use super::device;
use super::error::NodeError;
use super::record::{Kind, Record, Records};
use crate::client::{Host, HostedVolume};
use crate::metrics::OPERATION_SECONDS;

/// Time for a question to the metadata cluster, while somebody waits for the operation.
const METADATA_TIMEOUT: Duration = Duration::from_secs(10);

/// Where an attachment is; see the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Being made.
    Attaching,
    /// Served.
    Attached,
    /// The device exists and waits.
    Recovering,
    /// Another client took the volume over.
    Fenced,
    /// Being taken down.
    Detaching,
    /// Its server ended with the last process, and requests fail for good.
    Broken,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Attaching,
        Self::Attached,
        Self::Recovering,
        Self::Fenced,
        Self::Detaching,
        Self::Broken,
    ];

    /// As metrics call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Recovering => "recovering",
            Self::Fenced => "fenced",
            Self::Detaching => "detaching",
            Self::Broken => "broken",
        }
    }
}

/// An attachment.
#[derive(Clone)]
pub struct Attachment {
    /// What is remembered of it.
    pub record: Record,
    /// Where it is.
    pub state: State,
    /// For people: why it is not attached.
    pub detail: String,
    /// The volume, while it is open here.
    pub hosted: Option<HostedVolume>,
    /// Watches over the connections.
    pub supervisor: Option<tokio::task::AbortHandle>,
}

impl Attachment {
    /// The device node, if there is a device.
    pub fn device(&self) -> Option<PathBuf> {
        let index = self.record.index?;
        Some(match self.record.kind {
            Kind::Nbd => device::path(index),
            Kind::Loop => PathBuf::from(format!("/dev/loop{index}")),
        })
    }

    /// The epoch in which the volume is open.
    pub fn epoch(&self) -> Epoch {
        let hosted = self.hosted.as_ref();
        hosted.map_or(Epoch(0), |h| h.status().epoch)
    }
}

#[derive(Default)]
struct Slot {
    claimed: bool,
    attachment: Option<Attachment>,
}

/// The attachments of this node. Clones share them.
#[derive(Clone)]
pub struct Attachments {
    pub(super) shared: Arc<Shared>,
}

/// What all operations share.
pub(super) struct Shared {
    pub host: Host,
    /// This process and those before and after it, as holders of volumes.
    pub client: ClientId,
    pub records: Records,
    pub boot_id: String,
    /// Where sockets of loop devices live.
    pub state_dir: PathBuf,
    pub node_name: String,
    /// Told when this process cannot go on and must be started again.
    pub broken: Notify,
    /// Another process takes over: no operation begins here.
    refusing: AtomicBool,
    node: OnceCell<NodeId>,
    slots: Mutex<BTreeMap<VolumeId, Slot>>,
}

/// The right to work on a volume, until it is dropped.
pub(super) struct Claim {
    shared: Arc<Shared>,
    pub volume: VolumeId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut slots = self.shared.slots();
        if let Some(slot) = slots.get_mut(&self.volume) {
            slot.claimed = false;
            if slot.attachment.is_none() {
                slots.remove(&self.volume);
            }
        }
    }
}

impl Claim {
    /// The attachment as it is now.
    pub fn get(&self) -> Option<Attachment> {
        self.shared.get(self.volume)
    }

    /// Installs or replaces the attachment.
    pub fn set(&self, attachment: Attachment) {
        let mut slots = self.shared.slots();
        slots.entry(self.volume).or_default().attachment = Some(attachment);
    }

    /// Changes the attachment, if there is one.
    pub fn change(&self, change: impl FnOnce(&mut Attachment)) {
        self.shared.change(self.volume, change);
    }

    /// Removes the attachment.
    pub fn clear(&self) {
        let mut slots = self.shared.slots();
        if let Some(slot) = slots.get_mut(&self.volume) {
            slot.attachment = None;
        }
    }
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, volume: VolumeId) -> Option<Attachment> {
        self.slots().get(&volume)?.attachment.clone()
    }

    pub fn change(&self, volume: VolumeId, change: impl FnOnce(&mut Attachment)) {
        let mut slots = self.slots();
        if let Some(attachment) = slots.get_mut(&volume).and_then(|s| s.attachment.as_mut()) {
            change(attachment);
        }
    }

    /// All attachments, by name.
    pub fn all(&self) -> Vec<Attachment> {
        let slots = self.slots();
        let mut all: Vec<_> = slots
            .values()
            .filter_map(|s| s.attachment.clone())
            .collect();
        all.sort_by(|a, b| a.record.volume.cmp(&b.record.volume));
        all
    }
}

/// A volume as a request names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeName {
    /// By identity.
    Id(VolumeId),
    /// By name.
    Name(String),
}

impl VolumeName {
    /// From the two fields of a request, of which one is set.
    pub fn parse(name: &str, id: &[u8]) -> Result<Self, NodeError> {
        let invalid = |field, why: &str| {
            Err(NodeError::Invalid {
                field,
                why: why.to_owned(),
            })
        };
        match (name, id) {
            ("", []) => invalid("volume_id", "name the volume, by this or by `volume`"),
            ("", id) => match VolumeId::from_slice(id) {
                Some(id) if !id.is_nil() => Ok(Self::Id(id)),
                _ => invalid("volume_id", "must have 16 bytes, not all zero"),
            },
            (name, []) => Ok(Self::Name(name.to_owned())),
            _ => invalid("volume", "give either this or `volume_id`"),
        }
    }
}

impl Attachments {
    /// None yet; see `recovery` for those of the last process.
    pub(super) fn new(
        host: Host,
        client: ClientId,
        records: Records,
        boot_id: String,
        state_dir: PathBuf,
        node_name: String,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                host,
                client,
                records,
                boot_id,
                state_dir,
                node_name,
                broken: Notify::new(),
                refusing: AtomicBool::new(false),
                node: OnceCell::new(),
                slots: Mutex::default(),
            }),
        }
    }

    /// Claims a volume.
    pub(super) fn claim(&self, volume: VolumeId) -> Result<Claim, NodeError> {
        if self.shared.refusing.load(Ordering::Relaxed) {
            return Err(NodeError::Unavailable(
                "another process is taking over: ask it in a moment".into(),
            ));
        }
        let mut slots = self.shared.slots();
        let slot = slots.entry(volume).or_default();
        if std::mem::replace(&mut slot.claimed, true) {
            return Err(NodeError::Pending(volume));
        }
        Ok(Claim {
            shared: self.shared.clone(),
            volume,
        })
    }

    /// No operation begins from now on.
    pub(super) fn refuse_operations(&self) {
        self.shared.refusing.store(true, Ordering::Relaxed);
    }

    /// Operations under way.
    pub(super) fn operations(&self) -> usize {
        self.shared.slots().values().filter(|s| s.claimed).count()
    }

    /// Whether a device is being taken back.
    pub(super) fn is_recovering(&self) -> bool {
        let all = self.shared.all();
        all.iter().any(|a| a.state == State::Recovering)
    }

    /// All attachments, or one.
    pub fn list(&self, only: Option<VolumeId>) -> Vec<Attachment> {
        let mut all = self.shared.all();
        all.retain(|a| only.is_none_or(|id| a.record.volume_id == id));
        all
    }

    /// The volume of this name among the attachments.
    pub(super) fn find(&self, name: &str) -> Option<VolumeId> {
        let all = self.shared.all();
        all.iter()
            .find(|a| a.record.volume == name)
            .map(|a| a.record.volume_id)
    }

    /// The volume as the metadata cluster has it.
    pub(super) async fn look_up(&self, name: &VolumeName) -> Result<pb::Volume, NodeError> {
        let question = match name {
            VolumeName::Id(id) => pb::GetVolumeRequest {
                name: String::new(),
                volume_id: id.to_vec(),
            },
            VolumeName::Name(name) => pb::GetVolumeRequest {
                name: name.clone(),
                volume_id: Vec::new(),
            },
        };
        let ask = self.shared.host.members().ask("GetVolume", |mut c| {
            let question = question.clone();
            async move { c.get_volume(question).await }
        });
        in_time(ask).await
    }

    /// The id of this node, registering it if need be.
    pub(super) async fn node(&self) -> Result<NodeId, NodeError> {
        let known = self.shared.node.get_or_try_init(|| async {
            let members = self.shared.host.members();
            let name = &self.shared.node_name;
            let all = in_time(members.ask("ListNodes", |mut c| async move {
                c.list_nodes(pb::ListNodesRequest {}).await
            }))
            .await?;
            if let Some(node) = all.nodes.iter().find(|n| n.name == *name) {
                return node_id(node);
            }
            let request = pb::RegisterNodeRequest {
                request_id: ashlar_platform::random::bytes::<16>().to_vec(),
                node_id: Vec::new(),
                name: name.clone(),
                labels: Default::default(),
                admin_address: String::new(),
            };
            let node = in_time(members.ask("RegisterNode", |mut c| {
                let request = request.clone();
                async move { c.register_node(request).await }
            }))
            .await?;
            node_id(&node)
        });
        known.await.copied()
    }
}

fn node_id(node: &pb::Node) -> Result<NodeId, NodeError> {
    NodeId::from_slice(&node.node_id)
        .ok_or_else(|| NodeError::Bug("metadata sent a node without an id".into()))
}

/// Counts an operation.
pub(super) fn observe<T>(
    operation: &str,
    started: std::time::Instant,
    outcome: &Result<T, NodeError>,
) {
    let outcome = if outcome.is_ok() { "ok" } else { "error" };
    OPERATION_SECONDS
        .histogram_of(&[operation, outcome])
        .record(started.elapsed());
}

/// An answer of the metadata cluster, within the time for it.
pub(super) async fn in_time<T>(
    question: impl Future<Output = Result<T, Status>>,
) -> Result<T, NodeError> {
    match tokio::time::timeout(METADATA_TIMEOUT, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => {
            let text = status.message().to_owned();
            Err(match status.code() {
                Code::NotFound => NodeError::NotFound(text),
                Code::InvalidArgument => NodeError::Invalid {
                    field: "metadata",
                    why: text,
                },
                Code::ResourceExhausted => NodeError::Exhausted(text),
                _ => NodeError::Precondition(text),
            })
        }
        Err(_) => Err(NodeError::Unavailable(
            "the metadata cluster does not answer: try again".into(),
        )),
    }
}
