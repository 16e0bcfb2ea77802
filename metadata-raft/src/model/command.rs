//! Commands of the replicated log and their answers.
//!
//! Invariants:
//! - A command carries everything that its effect depends on (identities, times, placements): apply
//!   draws nothing itself.
//! - Variants are only appended, and what was released gets no more fields (its form has no room for one that is
//!   missing): a new variant takes them. A change of meaning takes a new log version (`raft::codec`).

use std::sync::Arc;

use ashlar_proto::ids::{
    ClientId, ClusterId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState,
    SnapshotId, VolumeId,
};
use serde::{Deserialize, Serialize};

use super::cluster::{Disk, FlattenPolicy, Labels, Node, Pool, PoolSpec};
use super::schedule::{Run, Schedule, ScheduleId};
use super::service::{Part, Service};
use super::snapshot::SnapshotGroup;
use super::volume::{AttachMode, Format, Parent, Source, Volume};

/// Identifies a request: a retry with the same id gets the same answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct RequestKey(pub [u8; 16]);

impl RequestKey {
    /// A fresh random key.
    pub fn generate() -> Self {
        Self(uuid::Uuid::new_v4().into_bytes())
    }
}

/// One mutation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Command {
    /// Names the request, for retries.
    pub request: RequestKey,
    /// What to do.
    pub operation: Operation,
}

/// What a command does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Operation {
    /// Gives the cluster its identity, once.
    InitializeCluster(ClusterId),
    /// Adds a node or replaces what is known of it.
    RegisterNode(Node),
    /// Adds a disk or replaces what is known of it.
    RegisterDisk(Disk),
    /// Forgets a disk without replicas.
    RemoveDisk(DiskId),
    /// Creates a pool.
    CreatePool(Pool),
    /// Replaces a pool's specification.
    UpdatePool {
        /// The pool's name.
        name: String,
        /// The new specification.
        spec: PoolSpec,
    },
    /// Deletes a pool without volumes, by name.
    DeletePool(String),
    /// Creates a volume on disks that the leader has chosen.
    CreateVolume(CreateVolume),
    /// Grows a volume.
    ResizeVolume {
        /// The volume.
        volume: VolumeId,
        /// New size, a multiple of 4096.
        size_bytes: u64,
    },
    /// Deletes a detached volume.
    DeleteVolume(VolumeId),
    /// Grants a new epoch (R1).
    OpenVolume(OpenVolume),
    /// Ends an attachment.
    CloseVolume {
        /// The volume.
        volume: VolumeId,
        /// The holder.
        client: ClientId,
        /// The current epoch.
        epoch: Epoch,
        /// Drained and flushed on every in-sync replica.
        clean: bool,
    },
    /// The holder changes states of replicas (R0, R4, R7).
    ChangeReplicas(ChangeReplicas),
    /// The repair loop (or an operator) starts rebuilds (R7).
    BeginRebuild {
        /// The volume.
        volume: VolumeId,
        /// The epoch that the decision was made under; must be current.
        epoch: Epoch,
        /// Stale replicas that become `Rebuilding`.
        replicas: Vec<(GroupIndex, DiskId)>,
    },
    /// Moves every replica of a volume on one disk to another.
    MoveReplica {
        /// The volume.
        volume: VolumeId,
        /// The disk to leave.
        from: DiskId,
        /// The disk to move to.
        to: DiskId,
    },
    /// Replicas whose data are gone from their former disks need no reminder any more.
    ForgetGarbage(Vec<(DiskId, VolumeId)>),
    /// A node that attaches volumes says that it is there; a storage daemon of its name keeps its identity.
    RegisterAttacher(Attacher),
    /// Gives a node the right to attach a volume.
    PublishVolume {
        /// The volume.
        volume: VolumeId,
        /// The node's name.
        node: String,
        /// What it may do.
        mode: AttachMode,
    },
    /// Takes the right back, with the epoch of a holder that had it.
    UnpublishVolume {
        /// The volume.
        volume: VolumeId,
        /// The node's name; empty: every node.
        node: String,
    },
    /// Records what a node formats a volume with.
    SetVolumeFormat {
        /// The volume.
        volume: VolumeId,
        /// What it is from now on.
        format: Format,
    },
    /// A client joins the readers (R10).
    JoinVolume(OpenVolume),
    /// Gives out a snapshot number for each of some volumes (S1).
    ReserveSnapshots(ReserveSnapshots),
    /// The leader that reserved them heard that all their writers hold (S3).
    CommitSnapshots(Vec<CommitSnapshot>),
    /// Gives pending ones up, with the others of their groups.
    CancelSnapshots(Vec<SnapshotId>),
    /// Takes ready ones off the live lists (S8).
    DeleteSnapshots(Vec<SnapshotId>),
    /// Nothing is left of deleting ones.
    ForgetSnapshots(Vec<SnapshotId>),
    /// Begins to bring a detached volume back to a snapshot of it.
    BeginRevert {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Grants a new epoch of a volume that is being reverted.
    OpenToRevert(OpenVolume),
    /// The holder, or who closed it last, says that the volume is what the snapshot shows.
    EndRevert {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
        /// The holder.
        client: ClientId,
        /// The current epoch.
        epoch: Epoch,
    },
    /// Makes a volume of a snapshot (C1).
    CloneVolume(CloneVolume),
    /// Gives out a snapshot number for one clone.
    ReserveForClone(ReserveSnapshots),
    /// Wants a clone to depend on its parent no more.
    FlattenVolume(VolumeId),
    /// Every disk of a clone said that it depends on the parent no more (C7).
    CutParent {
        /// The clone.
        volume: VolumeId,
        /// The parent that it had then.
        parent: Parent,
    },
    /// Says which clones of a pool are made independent without being asked.
    SetFlattenPolicy {
        /// The pool's name.
        pool: String,
        /// From now on.
        policy: FlattenPolicy,
    },
    /// Adds a schedule.
    CreateSchedule(Schedule),
    /// Pauses or resumes one.
    PauseSchedule {
        /// Its name.
        name: String,
        /// From now on.
        paused: bool,
        /// The leader's clock.
        now_unix_ms: u64,
    },
    /// Forgets one, by name; what it made stays.
    DeleteSchedule(String),
    /// A run began, ended, or was skipped.
    RecordRun {
        /// The schedule.
        schedule: ScheduleId,
        /// The run.
        run: Run,
    },
    /// Grants a new epoch to a storage daemon that holds the volume so that it can be rebuilt ([`Volume::needs_care`]).
    OpenToCare(OpenVolume),
    /// Takes a node or disk out of service, or back into it.
    SetService {
        /// Which.
        part: Part,
        /// What it is there for from now on.
        service: Service,
    },
}

/// See [`Operation::CloneVolume`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CloneVolume {
    /// Identity of the new volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size, a multiple of 4096, not below the snapshot's.
    pub size_bytes: u64,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// The snapshot; one that was taken for this clone is deleted with it.
    pub snapshot: SnapshotId,
    /// What the user named.
    pub source: Source,
    /// Labels.
    pub labels: Labels,
    /// The leader's clock.
    pub created_unix_ms: u64,
}

/// See [`Operation::ReserveSnapshots`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReserveSnapshots {
    /// One per volume.
    pub snapshots: Vec<NewSnapshot>,
    /// Of all of them; needed for more than one.
    pub group: Option<SnapshotGroup>,
    /// The leader's clock.
    pub created_unix_ms: u64,
}

/// A snapshot to take.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewSnapshot {
    /// Identity of the new snapshot.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// The volume.
    pub volume: VolumeId,
    /// Labels.
    pub labels: Labels,
}

/// A pending snapshot, and who held its volume's writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CommitSnapshot {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The holder that reported; `None`: nobody has the volume, and its last close was clean (S4).
    pub holder: Option<(ClientId, Epoch)>,
}

/// See [`Operation::RegisterAttacher`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attacher {
    /// The node's name.
    pub name: String,
    /// Labels to add to the node's.
    pub labels: Labels,
    /// `host:port`, or empty.
    pub address: String,
}

/// See [`Operation::CreateVolume`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateVolume {
    /// Identity of the new volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size, a multiple of 4096.
    pub size_bytes: u64,
    /// Its pool.
    pub pool: PoolId,
    /// Replicas per group.
    pub replicas: u8,
    /// Fewest in-sync replicas with which writes are acknowledged.
    pub min_replicas: u8,
    /// Disks of each group.
    pub groups: Vec<Vec<DiskId>>,
    /// Labels.
    pub labels: Labels,
    /// The leader's clock.
    pub created_unix_ms: u64,
}

/// See [`Operation::OpenVolume`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenVolume {
    /// The volume.
    pub volume: VolumeId,
    /// The client that will hold it.
    pub client: ClientId,
    /// Its node, or NIL.
    pub node: NodeId,
    /// For people.
    pub client_name: String,
    /// Take over from another holder.
    pub force: bool,
}

/// See [`Operation::ChangeReplicas`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChangeReplicas {
    /// The volume.
    pub volume: VolumeId,
    /// The holder.
    pub client: ClientId,
    /// The current epoch.
    pub epoch: Epoch,
    /// Applied all or none.
    pub changes: Vec<ReplicaChange>,
}

/// The new state of one replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaChange {
    /// Its group.
    pub group: GroupIndex,
    /// Its disk.
    pub disk: DiskId,
    /// The new state.
    pub state: ReplicaState,
    /// Recorded when the state is `InSync`.
    pub incarnation: Incarnation,
}

/// Result of a command that was understood.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Nothing to report.
    Done,
    /// The node as registered.
    Node(Node),
    /// The disk as registered.
    Disk(Disk),
    /// The pool.
    Pool(Pool),
    /// The volume after the command.
    Volume(Arc<Volume>),
    /// The volume was granted to the client.
    Opened {
        /// With the new epoch.
        volume: Arc<Volume>,
        /// No reconcile and no lease wait are needed.
        previous_clean: bool,
    },
    /// Answer to [`Operation::ChangeReplicas`] and [`Operation::BeginRebuild`].
    Changed {
        /// False: refused, nothing changed.
        applied: bool,
        /// The current state.
        volume: Arc<Volume>,
        /// Why it was refused.
        reason: String,
    },
    /// Snapshots, in the order of the command. Identities only: what they are changes.
    Snapshots(Vec<SnapshotId>),
}

/// Why a command was refused, as the gRPC codes of `metadata.proto`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RefusalCode {
    /// A field is out of range.
    InvalidArgument,
    /// No such thing.
    NotFound,
    /// The name is taken by something with other arguments.
    AlreadyExists,
    /// State or epoch does not allow it.
    FailedPrecondition,
    /// No room.
    ResourceExhausted,
    /// An invariant would have been broken: a bug; nothing was changed.
    Internal,
    /// Something that lasts moments is in the way: try again.
    Aborted,
}

/// A refused command: nothing changed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Kind.
    pub code: RefusalCode,
    /// For people: what is wrong and what to do.
    pub message: String,
}

macro_rules! refusal_constructors {
    ($($(#[$doc:meta])* $name:ident => $code:ident),*) => {
        impl Refusal {
            $($(#[$doc])*
            pub fn $name(message: impl Into<String>) -> Self {
                Self { code: RefusalCode::$code, message: message.into() }
            })*
        }
    };
}

refusal_constructors! {
    /// A field is out of range.
    invalid => InvalidArgument,
    /// No such thing.
    not_found => NotFound,
    /// Taken.
    exists => AlreadyExists,
    /// Not allowed now.
    precondition => FailedPrecondition,
    /// No room.
    exhausted => ResourceExhausted,
    /// A bug.
    internal => Internal,
    /// Try again.
    aborted => Aborted
}

/// What apply answers.
pub type Response = Result<Answer, Refusal>;
