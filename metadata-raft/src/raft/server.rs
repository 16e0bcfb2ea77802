//! The receiving side of Raft messages: the gRPC service of `raft.proto`.
//!
//! Invariant: a message of another cluster, for another member, or of another version is refused before
//! openraft sees it.

use ashlar_proto::ids::ClusterId;
use ashlar_proto::rpc::raft as pb;
use ashlar_proto::rpc::raft::snapshot_part::Part;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::{Request, Response, Status, Streaming};

use super::codec::{self, CODEC_VERSION};
use super::network::{Addressed, Ballot, SnapshotHeader};
use super::snapshot_file::{SnapshotDirectory, SnapshotHandle};
use super::state_machine::Shared;
use super::types::{MemberId, Raft, TypeConfig};

type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotHandle>;

/// Longest snapshot that is accepted.
const SNAPSHOT_BYTES_MAX: u64 = 4 << 30;

/// See the module.
pub struct RaftServer {
    id: MemberId,
    raft: Raft,
    shared: Shared,
    directory: SnapshotDirectory,
    on_append: Box<dyn Fn() + Send + Sync>,
}

impl RaftServer {
    /// Serves a member.
    pub fn new(id: MemberId, raft: Raft, shared: Shared, directory: SnapshotDirectory) -> Self {
        Self {
            id,
            raft,
            shared,
            directory,
            on_append: Box::new(|| ()),
        }
    }

    /// Calls `f` whenever a leader's message was accepted.
    #[must_use]
    pub fn on_append(mut self, f: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_append = Box::new(f);
        self
    }

    fn open<T: DeserializeOwned>(&self, envelope: &pb::Envelope) -> Result<T, Status> {
        if envelope.version != u32::from(CODEC_VERSION) {
            return Err(Status::failed_precondition(format!(
                "raft message of version {}, this member speaks {CODEC_VERSION}",
                envelope.version
            )));
        }
        let theirs = ClusterId::from_slice(&envelope.cluster_id).unwrap_or_default();
        let ours = self.shared.state().cluster();
        if !theirs.is_nil() && !ours.is_nil() && theirs != ours {
            return Err(Status::failed_precondition(format!(
                "this member belongs to cluster {ours}, not {theirs}"
            )));
        }
        let Addressed { to, message } = codec::decode(&envelope.payload)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        if to != self.id {
            return Err(Status::failed_precondition(format!(
                "this is member {}, not {to}",
                self.id
            )));
        }
        Ok(message)
    }

    fn seal<T: Serialize>(&self, message: &T) -> Result<Response<pb::Envelope>, Status> {
        let payload = codec::encode(message).map_err(|e| Status::internal(e.to_string()))?;
        let cluster_id = self.shared.state().cluster().to_vec();
        Ok(Response::new(pb::Envelope {
            version: u32::from(CODEC_VERSION),
            cluster_id,
            payload,
        }))
    }
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("raft has stopped: {error}"))
}

#[tonic::async_trait]
impl pb::raft_server::Raft for RaftServer {
    async fn append_entries(
        &self,
        request: Request<pb::Envelope>,
    ) -> Result<Response<pb::Envelope>, Status> {
        let message: AppendEntriesRequest<TypeConfig> = self.open(request.get_ref())?;
        let answer = self.raft.append_entries(message).await.map_err(stopped)?;
        (self.on_append)();
        self.seal(&answer)
    }

    async fn vote(&self, request: Request<pb::Envelope>) -> Result<Response<pb::Envelope>, Status> {
        let answer = match self.open(request.get_ref())? {
            Ballot::Vote(ballot) => self.raft.vote(ballot).await.map_err(stopped)?,
            Ballot::PreVote(ballot) => self.raft.pre_vote(ballot).await.map_err(stopped)?,
        };
        self.seal(&answer)
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::Envelope>,
    ) -> Result<Response<pb::Envelope>, Status> {
        let message: TransferLeaderRequest<TypeConfig> = self.open(request.get_ref())?;
        let answer = self
            .raft
            .handle_transfer_leader(message)
            .await
            .map_err(stopped)?;
        self.seal(&answer)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<pb::SnapshotPart>>,
    ) -> Result<Response<pb::Envelope>, Status> {
        let mut parts = request.into_inner();
        let Some(Part::Header(envelope)) = parts.message().await?.and_then(|p| p.part) else {
            return Err(Status::invalid_argument(
                "a snapshot begins with its header",
            ));
        };
        let header: SnapshotHeader = self.open(&envelope)?;
        if header.length > SNAPSHOT_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "a snapshot has at most {SNAPSHOT_BYTES_MAX} bytes"
            )));
        }
        let io = |e: std::io::Error| Status::internal(format!("cannot store the snapshot: {e}"));
        let mut incoming = self.directory.receive().map_err(io)?;
        let mut length = 0_u64;
        while let Some(part) = parts.message().await? {
            let Some(Part::Data(bytes)) = part.part else {
                return Err(Status::invalid_argument("a snapshot has one header"));
            };
            length += bytes.len() as u64;
            if length > header.length {
                break;
            }
            incoming.write(&bytes).map_err(io)?;
        }
        if length != header.length {
            return Err(Status::data_loss(
                "the snapshot is not as long as announced",
            ));
        }
        let snapshot = Snapshot {
            meta: header.meta,
            snapshot: incoming.finish(),
        };
        let answer = self
            .raft
            .install_full_snapshot(header.vote, snapshot)
            .await
            .map_err(stopped)?;
        self.seal(&answer)
    }

    async fn propose(
        &self,
        _request: Request<pb::Envelope>,
    ) -> Result<Response<pb::Envelope>, Status> {
        // Placement needs the leader's view of the disks: requests are forwarded as they came, not as commands.
        Err(Status::unimplemented(
            "members forward requests as calls of the metadata service",
        ))
    }
}
