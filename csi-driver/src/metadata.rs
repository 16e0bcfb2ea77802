//! The metadata cluster as the driver sees it: any member may be asked.
//!
//! Invariants: a request is repeated at other members with the same request id, so that it takes effect once
//! whatever was lost on the way; after [`OVERALL_TIMEOUT`] the caller is told to try again, well before the
//! sidecars' own timeouts (60 s and more).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::errors::{Error, Result};

/// Time for one attempt at one member.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for a request, over all attempts.
const OVERALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Time for a connection to one member.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause after all members were tried in vain; doubles.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// HTTP/2 pings, so that a member that is cut off is noticed.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest answer that is read.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A client of the metadata cluster.
#[derive(Clone, Debug)]
pub struct Metadata {
    members: Arc<Members>,
}

#[derive(Debug)]
struct Members {
    channels: Vec<(String, Channel)>,
    current: AtomicUsize,
}

/// An address that is none.
#[derive(Debug, thiserror::Error)]
#[error("metadata address {address:?} is not HOST:PORT: {source}")]
pub struct BadAddress {
    address: String,
    #[source]
    source: tonic::transport::Error,
}

/// A fresh request id.
pub fn request_id() -> Vec<u8> {
    uuid::Uuid::new_v4().into_bytes().to_vec()
}

impl Metadata {
    /// Connects lazily; `addresses` are `host:port`, at least one.
    pub fn new(addresses: &[String]) -> std::result::Result<Self, BadAddress> {
        let channel = |address: &String| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|source| BadAddress {
                    address: address.clone(),
                    source,
                })?
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE)
                .tcp_nodelay(true);
            Ok((address.clone(), endpoint.connect_lazy()))
        };
        let channels = addresses
            .iter()
            .map(channel)
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self {
            members: Arc::new(Members {
                channels,
                current: AtomicUsize::new(0),
            }),
        })
    }

    /// Asks until a member answers, or says no. `doing` says what for, as in "create volume x".
    pub async fn ask<Q, A, F>(&self, doing: &str, request: Q, call: F) -> Result<A>
    where
        Q: Clone,
        F: AsyncFn(MetadataClient<Channel>, Q) -> std::result::Result<Response<A>, Status>,
    {
        let members = &self.members;
        let deadline = Instant::now() + OVERALL_TIMEOUT;
        let mut pause = PAUSE_MIN;
        let mut failures = 0_usize;
        loop {
            let at = members.current.load(Ordering::Relaxed) % members.channels.len();
            let (address, channel) = &members.channels[at];
            let client =
                MetadataClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX);
            let answer = tokio::time::timeout(ATTEMPT_TIMEOUT, call(client, request.clone())).await;
            let status = match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if !is_passing(status.code()) => {
                    return Err(Error::remote(doing, status));
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer in time"),
            };
            tracing::debug!(doing, address, %status, "metadata member did not answer; asking the next one");
            members.pass_over(at);
            failures += 1;
            if Instant::now() >= deadline {
                let text = format!(
                    "no metadata member answers ({}; last: {}); a majority of them must run",
                    members.addresses(),
                    status.message()
                );
                return Err(Error::remote(doing, Status::unavailable(text)));
            }
            if failures.is_multiple_of(members.channels.len()) {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }

    /// Whether a member answers.
    pub async fn answers(&self) -> bool {
        let request = pb::GetClusterRequest {};
        let asked = self.ask("look at the cluster", request, async |mut c, q| {
            c.get_cluster(q).await
        });
        asked.await.is_ok()
    }

    /// A volume by its id; None if there is none.
    pub async fn volume(&self, id: VolumeId) -> Result<Option<pb::Volume>> {
        let request = pb::GetVolumeRequest {
            name: String::new(),
            volume_id: id.to_vec(),
        };
        self.find(request, &format!("find volume {id}")).await
    }

    /// A volume by its name; None if there is none.
    pub async fn volume_named(&self, name: &str) -> Result<Option<pb::Volume>> {
        let request = pb::GetVolumeRequest {
            name: name.to_owned(),
            volume_id: Vec::new(),
        };
        self.find(request, &format!("find volume {name}")).await
    }

    async fn find(&self, request: pb::GetVolumeRequest, doing: &str) -> Result<Option<pb::Volume>> {
        let answer = self
            .ask(doing, request, async |mut c, q| c.get_volume(q).await)
            .await;
        match answer {
            Ok(volume) => Ok(Some(volume)),
            Err(error) if error.code() == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A volume by its CSI id, which must exist.
    pub async fn require(&self, csi_id: &str) -> Result<pb::Volume> {
        let absent = || Error::NotFound(format!("volume {csi_id} does not exist"));
        let id = crate::volume_id::parse(csi_id).ok_or_else(absent)?;
        self.volume(id).await?.ok_or_else(absent)
    }

    /// Every pool.
    pub async fn pools(&self) -> Result<Vec<pb::Pool>> {
        let request = pb::ListPoolsRequest {
            name: String::new(),
        };
        let answer = self
            .ask("list the pools", request, async |mut c, q| {
                c.list_pools(q).await
            })
            .await?;
        Ok(answer.pools)
    }

    /// Every node.
    pub async fn nodes(&self) -> Result<Vec<pb::Node>> {
        let answer = self
            .ask(
                "list the nodes",
                pb::ListNodesRequest {},
                async |mut c, q| c.list_nodes(q).await,
            )
            .await?;
        Ok(answer.nodes)
    }

    /// Every disk.
    pub async fn disks(&self) -> Result<Vec<pb::Disk>> {
        let request = pb::ListDisksRequest {
            node_id: Vec::new(),
        };
        let answer = self
            .ask("list the disks", request, async |mut c, q| {
                c.list_disks(q).await
            })
            .await?;
        Ok(answer.disks)
    }
}

impl Members {
    /// The member at `at` does not answer: the next one is asked from now on.
    fn pass_over(&self, at: usize) {
        let next = (at + 1) % self.channels.len();
        // Only one of those who found it silent moves on.
        let _ = self
            .current
            .compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn addresses(&self) -> String {
        let all: Vec<&str> = self.channels.iter().map(|(a, _)| a.as_str()).collect();
        all.join(",")
    }
}

/// Whether another attempt may fare better.
fn is_passing(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}
