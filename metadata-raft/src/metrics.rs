//! Every metric of this crate. Meanings and units are in `docs/metrics.md`, which a test compares with this.
//!
//! Invariant: what is kept is counted here ([`Proposal`], [`count_call`]); everything else is collected at
//! a scrape (`rpc::observe`). What concerns the whole cluster is told by the leader only, so that a sum over
//! the members is right.

use std::time::Instant;

use ashlar_platform::observe::{Metric, Unit};
use tonic::{Code, Response, Status};

/// Leadership.
pub const IS_LEADER: Metric = Metric::gauge(
    "ashlar_metadata_is_leader",
    Unit::Count,
    &[],
    "1 on the member that leads, else 0",
);
/// Readiness.
pub const KNOWS_LEADER: Metric = Metric::gauge(
    "ashlar_metadata_knows_leader",
    Unit::Count,
    &[],
    "1 where a leader is known and was heard of lately (or has a majority), else 0",
);
/// Raft's term.
pub const TERM: Metric = Metric::gauge(
    "ashlar_metadata_term",
    Unit::Count,
    &[],
    "Raft term that this member is in",
);
/// Raft's progress.
pub const LAST_APPLIED: Metric = Metric::gauge(
    "ashlar_metadata_last_applied",
    Unit::Count,
    &[],
    "Index of the last log entry that this member has applied",
);
/// Membership.
pub const MEMBERS: Metric = Metric::gauge(
    "ashlar_metadata_members",
    Unit::Count,
    &["kind"],
    "Members that this one knows, by kind: voter or learner",
);
/// Commands.
pub const PROPOSALS: Metric = Metric::counter(
    "ashlar_metadata_proposals_total",
    Unit::Count,
    &["outcome"],
    "Commands proposed by this member while it led: committed, refused, not_leader, no_majority, failed",
);
/// Their time.
pub const PROPOSAL_SECONDS: Metric = Metric::seconds(
    "ashlar_metadata_proposal_seconds",
    &[],
    "Time from proposing a command until it is applied, for those that a majority committed",
);
/// Calls.
pub const RPCS: Metric = Metric::counter(
    "ashlar_metadata_rpcs_total",
    Unit::Count,
    &["method", "code"],
    "Calls of the metadata service answered by this member; one that it forwards counts at the leader, too",
);
/// Their time.
pub const RPC_SECONDS: Metric = Metric::seconds(
    "ashlar_metadata_rpc_seconds",
    &["method"],
    "Time to answer a call, waiting for the leader included",
);
/// Volumes.
pub const VOLUMES: Metric = Metric::gauge(
    "ashlar_metadata_volumes",
    Unit::Count,
    &["health"],
    "Volumes by health: ok, degraded (replicas are not in sync) or waiting (too few are in sync to write)",
);
/// Attached volumes.
pub const VOLUMES_ATTACHED: Metric = Metric::gauge(
    "ashlar_metadata_volumes_attached",
    Unit::Count,
    &[],
    "Volumes that a client holds",
);
/// Attachments in doubt.
pub const ATTACHMENTS_SILENT: Metric = Metric::gauge(
    "ashlar_metadata_attachments_silent",
    Unit::Count,
    &[],
    "Volumes held by a client on a node whose storage daemon is silent",
);
/// Replicas.
pub const REPLICAS: Metric = Metric::gauge(
    "ashlar_metadata_replicas",
    Unit::Count,
    &["state"],
    "Replicas by state: in_sync, rebuilding or stale",
);
/// Snapshots.
pub const SNAPSHOTS: Metric = Metric::gauge(
    "ashlar_metadata_snapshots",
    Unit::Count,
    &["state"],
    "Snapshots by state: pending (being taken), ready, deleting (a disk still has to free what they kept), or hidden (deleted, and \
     kept for clones)",
);
/// What disks have to drop.
pub const REPLICAS_TO_DROP: Metric = Metric::gauge(
    "ashlar_metadata_replicas_to_drop",
    Unit::Count,
    &[],
    "Replicas of deleted volumes, and moved ones, whose disk has not confirmed yet that it dropped them",
);
/// Nodes.
pub const NODES: Metric = Metric::gauge(
    "ashlar_metadata_nodes",
    Unit::Count,
    &["state"],
    "Registered nodes by state: alive, silent, or attach_only (no storage daemon, so no heartbeats)",
);
/// Replicas without a good place.
pub const REPLICAS_TO_MOVE: Metric = Metric::gauge(
    "ashlar_metadata_replicas_to_move",
    Unit::Count,
    &["state"],
    "Replicas that have to leave a lost or draining disk: waiting for their turn, or unplaced (no disk will do)",
);
/// Disks.
pub const DISKS: Metric = Metric::gauge(
    "ashlar_metadata_disks",
    Unit::Count,
    &["state"],
    "Registered disks by state: alive, failed, or silent with their node",
);
/// Capacity.
pub const POOL_CAPACITY: Metric = Metric::gauge(
    "ashlar_metadata_pool_capacity_bytes",
    Unit::Bytes,
    &["pool"],
    "Capacity of the disks of a pool",
);
/// Use.
pub const POOL_USED: Metric = Metric::gauge(
    "ashlar_metadata_pool_used_bytes",
    Unit::Bytes,
    &["pool"],
    "Bytes in use on the disks of a pool, as their last heartbeats said",
);
/// Promises.
pub const POOL_PROVISIONED: Metric = Metric::gauge(
    "ashlar_metadata_pool_provisioned_bytes",
    Unit::Bytes,
    &["pool"],
    "Sizes of a pool's volumes, times their replicas",
);

/// All of them.
pub const ALL: &[Metric] = &[
    IS_LEADER,
    KNOWS_LEADER,
    TERM,
    LAST_APPLIED,
    MEMBERS,
    PROPOSALS,
    PROPOSAL_SECONDS,
    RPCS,
    RPC_SECONDS,
    VOLUMES,
    VOLUMES_ATTACHED,
    ATTACHMENTS_SILENT,
    REPLICAS,
    SNAPSHOTS,
    REPLICAS_TO_DROP,
    REPLICAS_TO_MOVE,
    NODES,
    DISKS,
    POOL_CAPACITY,
    POOL_USED,
    POOL_PROVISIONED,
];

/// How a proposal ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Applied, with effect (or as a retry).
    Committed,
    /// Applied, and refused by the state machine.
    Refused,
    /// Another member leads.
    NotLeader,
    /// No majority answered in time; the outcome is unknown.
    NoMajority,
    /// Anything else.
    Failed,
}

/// A command on its way.
pub struct Proposal {
    began: Instant,
}

impl Proposal {
    /// It is proposed now.
    pub fn begin() -> Self {
        Self {
            began: Instant::now(),
        }
    }

    /// It ended.
    pub fn end(self, outcome: Outcome) {
        let name = match outcome {
            Outcome::Committed => "committed",
            Outcome::Refused => "refused",
            Outcome::NotLeader => "not_leader",
            Outcome::NoMajority => "no_majority",
            Outcome::Failed => "failed",
        };
        PROPOSALS.counter_of(&[name]).increment(1);
        if matches!(outcome, Outcome::Committed | Outcome::Refused) {
            PROPOSAL_SECONDS
                .histogram_of(&[])
                .record(self.began.elapsed());
        }
    }
}

/// Answers a call and counts it.
pub async fn count_call<T>(
    method: &'static str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<Response<T>, Status> {
    let began = Instant::now();
    let answer = call.await;
    let code = answer.as_ref().err().map_or(Code::Ok, Status::code);
    RPCS.counter_of(&[method, code_name(code)]).increment(1);
    RPC_SECONDS.histogram_of(&[method]).record(began.elapsed());
    answer
}

/// The code as gRPC's documentation writes it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_reference_is_complete() {
        let reference = include_str!("../../docs/metrics.md");
        ashlar_platform::observe::check_reference(reference, "metadata-raft", super::ALL)
            .unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}
