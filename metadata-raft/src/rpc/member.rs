//! One member: consensus, state, liveness, and the routing of requests to the leader.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ashlar_proto::ids::DiskId;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use openraft::ReadPolicy;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use tokio::sync::{Notify, watch};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::care_loop::CareBoard;
use super::convert;
use super::liveness::{Liveness, View};
use super::read_barrier::ReadBarrier;
use super::taking::Takings;
use crate::metrics::{Outcome, Proposal};
use crate::model::{Answer, Command, State};
use crate::planner::DiskView;
use crate::raft::network::channel;
use crate::raft::state_machine::Shared;
use crate::raft::types::{MemberId, Raft, TypeConfig};

/// Marks a request that another member has forwarded.
const FORWARDED: &str = "ashlar-forwarded";
/// Time in which a request is routed, leader changes included.
const ROUTE_DEADLINE: Duration = Duration::from_secs(6);
/// Time that one attempt at the leader may take.
pub(super) const ATTEMPT_DEADLINE: Duration = Duration::from_secs(3);
/// Pause before a new attempt where no leader change wakes it.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Time for a majority to confirm a command or a read.
const MAJORITY_DEADLINE: Duration = Duration::from_millis(2500);
/// Longest message: a page of volumes or snapshots with many labels, a heartbeat of a node with many replicas.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Connections to members kept.
const CHANNELS_MAX: usize = 16;

/// What this member knows of the leadership.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Role {
    /// The leader and its address.
    pub leader: Option<(MemberId, String)>,
    /// This member leads, in this term.
    pub leading_term: Option<u64>,
    /// The leader (or a majority) was heard of lately.
    pub in_touch: bool,
    /// The process is about to stop.
    pub stopping: bool,
}

/// Why a request could not be served here.
pub enum Fault {
    /// Another member leads (or nobody): route again.
    NotLeader,
    /// An answer for the client.
    Status(Box<Status>),
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl From<crate::model::Refusal> for Fault {
    fn from(refusal: crate::model::Refusal) -> Self {
        convert::status(refusal).into()
    }
}

/// See the module.
pub struct Member {
    /// This member's number.
    pub id: MemberId,
    pub(crate) raft: Raft,
    pub(crate) shared: Shared,
    pub(crate) role: watch::Receiver<Role>,
    /// Something may be repairable.
    pub(crate) repair: Notify,
    /// Wakes the loop that moves replicas.
    pub(super) moves: Notify,
    /// What that loop found last.
    pub(super) repairs: Mutex<pb::Repairs>,
    /// Schedules changed.
    pub(super) schedules: Notify,
    /// Snapshots that calls of this member take.
    pub(super) takings: Takings,
    /// Volumes that daemons care for.
    pub(super) care: CareBoard,
    liveness: Mutex<Liveness>,
    channels: Mutex<BTreeMap<String, Channel>>,
    reads: ReadBarrier<Result<(), Unconfirmed>>,
}

/// Why a read could not be confirmed.
#[derive(Clone, Debug)]
enum Unconfirmed {
    NotLeader,
    NoMajority,
    Stopped(String),
}

impl From<Unconfirmed> for Fault {
    fn from(why: Unconfirmed) -> Self {
        match why {
            Unconfirmed::NotLeader => Self::NotLeader,
            Unconfirmed::NoMajority => no_majority().into(),
            Unconfirmed::Stopped(error) => stopped(error).into(),
        }
    }
}

impl Member {
    pub(super) fn new(
        id: MemberId,
        raft: Raft,
        shared: Shared,
        role: watch::Receiver<Role>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            raft,
            shared,
            role,
            repair: Notify::new(),
            moves: Notify::new(),
            repairs: Mutex::default(),
            schedules: Notify::new(),
            takings: Takings::default(),
            care: CareBoard::default(),
            liveness: Mutex::default(),
            channels: Mutex::default(),
            reads: ReadBarrier::default(),
        })
    }

    pub(super) fn liveness(&self) -> MutexGuard<'_, Liveness> {
        self.liveness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` with the state and what is known of its disks.
    pub(super) fn with_view<T>(&self, f: impl FnOnce(&State, &View<'_>) -> T) -> T {
        let state = self.shared.state();
        let liveness = self.liveness();
        f(
            &state,
            &View {
                state: &state,
                liveness: &liveness,
                now: Instant::now(),
            },
        )
    }

    /// Whether a disk is alive as far as this member knows; followers hear no heartbeats and say yes.
    pub(super) fn disk_alive(&self, state: &State, disk: DiskId) -> bool {
        if self.role.borrow().leading_term.is_none() {
            return true;
        }
        let liveness = self.liveness();
        View {
            state,
            liveness: &liveness,
            now: Instant::now(),
        }
        .alive(disk)
    }

    /// Commits a command and returns its answer.
    pub(super) async fn propose(&self, command: Command) -> Result<Answer, Fault> {
        let proposal = Proposal::begin();
        let write = self.raft.client_write(command);
        let (outcome, answer) = match tokio::time::timeout(MAJORITY_DEADLINE, write).await {
            Err(_) => (Outcome::NoMajority, Err(no_majority().into())),
            Ok(Err(error)) => match write_fault(error) {
                Fault::NotLeader => (Outcome::NotLeader, Err(Fault::NotLeader)),
                fault => (Outcome::Failed, Err(fault)),
            },
            Ok(Ok(written)) => match written.data {
                Some(Ok(answer)) => (Outcome::Committed, Ok(answer)),
                Some(Err(refusal)) => (Outcome::Refused, Err(refusal.into())),
                None => {
                    let status = Status::internal("a command without response");
                    (Outcome::Failed, Err(status.into()))
                }
            },
        };
        proposal.end(outcome);
        answer
    }

    /// Returns when the local state contains everything committed before the call (ReadIndex).
    pub(super) async fn linearize(&self) -> Result<(), Fault> {
        // Boxed: openraft's future is large, and is in the future of every call.
        let confirm = || -> Pin<Box<dyn Future<Output = _> + Send + '_>> {
            Box::pin(self.confirm_leadership())
        };
        let pass = self.reads.pass(confirm);
        let confirmed = tokio::time::timeout(MAJORITY_DEADLINE, pass)
            .await
            .map_err(|_| no_majority())?;
        Ok(confirmed?)
    }

    async fn confirm_leadership(&self) -> Result<(), Unconfirmed> {
        match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => {
                Err(Unconfirmed::NotLeader)
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => {
                Err(Unconfirmed::NoMajority)
            }
            Err(RaftError::Fatal(error)) => Err(Unconfirmed::Stopped(error.to_string())),
        }
    }

    /// Members as the leader sees them, after a majority has confirmed it.
    pub(super) async fn confirmed_cluster(
        &self,
        request: Request<pb::GetClusterRequest>,
    ) -> Result<pb::Cluster, Status> {
        let local = |_| async {
            self.linearize().await?;
            Ok(self.cluster())
        };
        let remote = |mut c: MetadataClient<Channel>, r| async move { c.get_cluster(r).await };
        self.route(request, local, remote)
            .await
            .map(Response::into_inner)
    }

    /// Returns when this member has applied everything that was committed before the call.
    pub(super) async fn catch_up(&self) -> Result<(), Status> {
        let confirmed = self
            .confirmed_cluster(Request::new(pb::GetClusterRequest {}))
            .await?;
        self.raft
            .wait(Some(ATTEMPT_DEADLINE))
            .applied_index_at_least(Some(confirmed.last_applied), "catch up")
            .await
            .map_err(|_| Status::unavailable("this member lags behind; ask another one"))?;
        Ok(())
    }

    fn client(&self, address: &str) -> Result<MetadataClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(bounded(channel.clone()));
        }
        let new = channel(address).map_err(|e| {
            Status::internal(format!("the leader's address {address} is not usable: {e}"))
        })?;
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        channels.insert(address.to_owned(), new.clone());
        Ok(bounded(new))
    }

    /// Serves a request here if this member leads, else at the leader; waits for elections.
    pub(super) async fn route<Req, Rep, Local, Remote>(
        &self,
        request: Request<Req>,
        local: impl Fn(Req) -> Local,
        remote: impl Fn(MetadataClient<Channel>, Request<Req>) -> Remote,
    ) -> Result<Response<Rep>, Status>
    where
        Req: Clone,
        Local: Future<Output = Result<Rep, Fault>>,
        Remote: Future<Output = Result<Response<Rep>, Status>>,
    {
        self.route_within(ATTEMPT_DEADLINE, request, local, remote)
            .await
    }

    /// [`Self::route`] with another deadline of one attempt.
    pub(super) async fn route_within<Req, Rep, Local, Remote>(
        &self,
        attempt: Duration,
        request: Request<Req>,
        local: impl Fn(Req) -> Local,
        remote: impl Fn(MetadataClient<Channel>, Request<Req>) -> Remote,
    ) -> Result<Response<Rep>, Status>
    where
        Req: Clone,
        Local: Future<Output = Result<Rep, Fault>>,
        Remote: Future<Output = Result<Response<Rep>, Status>>,
    {
        let forwarded = is_forwarded(&request);
        let message = request.into_inner();
        let deadline = Instant::now() + ROUTE_DEADLINE.max(attempt);
        let mut role = self.role.clone();
        let mut last = Status::unavailable(
            "no leader: a majority of the metadata members must be up; try again",
        );
        loop {
            let leader = role.borrow_and_update().leader.clone();
            match leader {
                Some((id, _)) if id == self.id => match local(message.clone()).await {
                    Ok(reply) => return Ok(Response::new(reply)),
                    Err(Fault::Status(status)) if status.code() != Code::Unavailable => {
                        return Err(*status);
                    }
                    Err(Fault::Status(status)) => last = *status,
                    Err(Fault::NotLeader) => {}
                },
                Some((_, address)) if !forwarded => {
                    let mut request = Request::new(message.clone());
                    request
                        .metadata_mut()
                        .insert(FORWARDED, MetadataValue::from_static("1"));
                    let call = remote(self.client(&address)?, request);
                    match tokio::time::timeout(attempt, call).await {
                        Ok(Ok(reply)) => return Ok(reply),
                        Ok(Err(status)) if status.code() != Code::Unavailable => {
                            return Err(status);
                        }
                        Ok(Err(status)) => last = Status::unavailable(status.message().to_owned()),
                        Err(_) => {
                            last = Status::unavailable("the leader does not answer; try again")
                        }
                    }
                }
                _ => {}
            }
            if forwarded || Instant::now() >= deadline || role.borrow().stopping {
                return Err(last);
            }
            // A leader change or the pause, whichever comes first.
            let _ = tokio::time::timeout(RETRY_PAUSE, role.changed()).await;
        }
    }
}

/// A client that reads pages and lists as long as another member may send them.
fn bounded(channel: Channel) -> MetadataClient<Channel> {
    MetadataClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

/// Whether another member has forwarded a request.
pub(super) fn is_forwarded<T>(request: &Request<T>) -> bool {
    request.metadata().contains_key(FORWARDED)
}

fn no_majority() -> Status {
    Status::unavailable(
        "a majority of the metadata members does not answer; the outcome is unknown: try again with the same request_id",
    )
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("this member has stopped: {error}"))
}

/// What a failed write means for the routing.
pub(super) fn write_fault(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> Fault {
    match error {
        RaftError::APIError(
            ClientWriteError::ForwardToLeader(_) | ClientWriteError::LogEntryDiscarded(_),
        ) => Fault::NotLeader,
        RaftError::APIError(error) => Status::failed_precondition(error.to_string()).into(),
        RaftError::Fatal(error) => stopped(error).into(),
    }
}
