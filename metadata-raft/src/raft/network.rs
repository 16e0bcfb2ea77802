//! Raft messages to other members, over the gRPC service of `raft.proto`.
//!
//! Invariants: every message names the cluster and the member that it is meant for, so that a reused
//! address cannot mix clusters; snapshots travel on a connection of their own.

use std::future::Future;
use std::time::Duration;

use ashlar_proto::rpc::raft as pb;
use openraft::BasicNode;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tonic::transport::{Channel, Endpoint};

use super::codec::{self, CODEC_VERSION, VALUE_BYTES_MAX};
use super::snapshot_file::SnapshotHandle;
use super::state_machine::Shared;
use super::types::{MemberId, SnapshotMeta, TypeConfig, Vote};

type Client = pb::raft_client::RaftClient<Channel>;
type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotHandle>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of one part of a snapshot.
const PART_BYTES: usize = 512 * 1024;
/// Parts that wait for the connection.
const PARTS_QUEUE: usize = 4;

/// What precedes every message.
#[derive(Serialize, Deserialize)]
pub struct Addressed<T> {
    /// The member that it is meant for.
    pub to: MemberId,
    /// The message.
    pub message: T,
}

/// Both kinds of vote request share a procedure.
#[derive(Serialize, Deserialize)]
pub enum Ballot {
    /// Would you vote for me?
    PreVote(VoteRequest<TypeConfig>),
    /// Vote for me.
    Vote(VoteRequest<TypeConfig>),
}

/// What precedes the bytes of a snapshot.
#[derive(Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// The leader's vote.
    pub vote: Vote,
    /// What the snapshot covers.
    pub meta: SnapshotMeta,
    /// Its length in bytes.
    pub length: u64,
}

/// A lazily connected channel to a member.
pub fn channel(address: &str) -> Result<Channel, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .connect_lazy())
}

/// Makes connections.
#[derive(Clone)]
pub struct NetworkFactory {
    shared: Shared,
}

impl NetworkFactory {
    /// Names the cluster of the state in its messages.
    pub fn new(shared: Shared) -> Self {
        Self { shared }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Peer;

    async fn new_client(&mut self, target: MemberId, node: &BasicNode) -> Peer {
        let client = channel(&node.addr).map(|channel| {
            Client::new(channel)
                .max_decoding_message_size(VALUE_BYTES_MAX)
                .max_encoding_message_size(VALUE_BYTES_MAX)
        });
        if let Err(error) = &client {
            tracing::error!(member = target, address = node.addr, %error, "member has no usable address");
        }
        Peer {
            target,
            client: client.ok(),
            shared: self.shared.clone(),
        }
    }
}

/// A connection to one member.
pub struct Peer {
    target: MemberId,
    client: Option<Client>,
    shared: Shared,
}

fn unreachable(error: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(error))
}

fn network(error: impl ToString) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

fn failed(status: &tonic::Status) -> RPCError<TypeConfig> {
    match status.code() {
        tonic::Code::Unavailable => unreachable(status),
        _ => network(status),
    }
}

impl Peer {
    fn client(&self) -> Result<Client, RPCError<TypeConfig>> {
        self.client
            .clone()
            .ok_or_else(|| unreachable("no usable address"))
    }

    fn envelope<T: Serialize>(&self, message: T) -> Result<pb::Envelope, RPCError<TypeConfig>> {
        let payload = codec::encode(&Addressed {
            to: self.target,
            message,
        })
        .map_err(network)?;
        let cluster = self.shared.state().cluster();
        Ok(pb::Envelope {
            version: u32::from(CODEC_VERSION),
            cluster_id: cluster.to_vec(),
            payload,
        })
    }

    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<TypeConfig>, RPCError<TypeConfig>> {
        let handle = snapshot.snapshot;
        let header = SnapshotHeader {
            vote,
            meta: snapshot.meta,
            length: handle.length(),
        };
        let header = self.envelope(header)?;
        let (parts, receiver) = tokio::sync::mpsc::channel(PARTS_QUEUE);
        let reading = tokio::task::spawn_blocking(move || {
            let send = |part| {
                parts
                    .blocking_send(pb::SnapshotPart { part: Some(part) })
                    .is_ok()
            };
            if !send(pb::snapshot_part::Part::Header(header)) {
                return Ok(());
            }
            let mut offset = 0;
            while offset < handle.length() {
                let bytes = handle.read_at(offset, PART_BYTES)?;
                offset += bytes.len() as u64;
                if !send(pb::snapshot_part::Part::Data(bytes)) {
                    break;
                }
            }
            Ok::<_, std::io::Error>(())
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let reply = self
            .client()?
            .install_snapshot(stream)
            .await
            .map_err(|s| failed(&s))?;
        reading.await.map_err(network)?.map_err(network)?;
        codec::decode(&reply.into_inner().payload).map_err(network)
    }
}

/// One call with a deadline.
async fn within<T>(
    option: &RPCOption,
    call: impl Future<Output = Result<tonic::Response<pb::Envelope>, tonic::Status>>,
) -> Result<T, RPCError<TypeConfig>>
where
    T: DeserializeOwned,
{
    let reply = tokio::time::timeout(option.hard_ttl(), call)
        .await
        .map_err(|_| unreachable("no answer in time"))?
        .map_err(|status| failed(&status))?;
    codec::decode(&reply.into_inner().payload).map_err(network)
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let envelope = self.envelope(rpc)?;
        within(&option, self.client()?.append_entries(envelope)).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let envelope = self.envelope(Ballot::Vote(rpc))?;
        within(&option, self.client()?.vote(envelope)).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let envelope = self.envelope(Ballot::PreVote(rpc))?;
        within(&option, self.client()?.vote(envelope)).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = tokio::time::timeout(option.hard_ttl(), self.send_snapshot(vote, snapshot)) => match sent {
                Ok(Ok(response)) => Ok(response),
                Ok(Err(RPCError::Timeout(error))) => Err(StreamingError::Timeout(error)),
                Ok(Err(RPCError::Unreachable(error))) => Err(StreamingError::Unreachable(error)),
                Ok(Err(RPCError::Network(error))) => Err(StreamingError::Network(error)),
                Err(_) => Err(StreamingError::Unreachable(Unreachable::from_string("snapshot took too long"))),
            },
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let envelope = self.envelope(request)?;
        within(&option, self.client()?.transfer_leader(envelope)).await
    }
}
