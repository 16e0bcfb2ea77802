//! Calls to the metadata cluster over all its members.
//!
//! Invariant: a call is tried at every member once before it fails; a member that answered is asked first
//! the next time. Mutations carry their request id, so trying again is harmless.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// Longest wait for a connection to a member.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest wait for a member's answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// First and longest pause between rounds over all members.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// The members, and which one answered last.
pub struct MetadataAccess {
    members: Vec<(String, MetadataClient<Channel>)>,
    preferred: AtomicUsize,
}

impl MetadataAccess {
    /// Members by `host:port`; connections are made when they are needed.
    ///
    /// # Errors
    /// An address that is no URI authority; none at all.
    pub fn new(addresses: &[String]) -> Result<Self, String> {
        let mut members = Vec::with_capacity(addresses.len());
        for address in addresses {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| format!("{address:?} is no metadata address: {error}"))?
                .connect_timeout(CONNECT_TIMEOUT)
                .tcp_nodelay(true);
            members.push((
                address.clone(),
                MetadataClient::new(endpoint.connect_lazy()),
            ));
        }
        if members.is_empty() {
            return Err("no metadata member is named".to_owned());
        }
        Ok(Self {
            members,
            preferred: AtomicUsize::new(0),
        })
    }

    /// One round over the members: the first answer that is not about the member itself.
    pub async fn call<T, F>(&self, call: impl Fn(MetadataClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let start = self.preferred.load(Ordering::Relaxed);
        let mut last = Status::unavailable("no metadata member answered");
        for step in 0..self.members.len() {
            let index = (start + step) % self.members.len();
            let (address, client) = &self.members[index];
            let outcome = tokio::time::timeout(CALL_TIMEOUT, call(client.clone())).await;
            match outcome {
                Ok(Ok(response)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) if is_about_the_member(&status) => {
                    tracing::debug!(%address, %status, "a metadata member cannot answer");
                    last = status;
                }
                Ok(Err(status)) => return Err(status),
                Err(_) => {
                    tracing::debug!(%address, "a metadata member does not answer");
                    last = Status::deadline_exceeded("a metadata member does not answer");
                }
            }
        }
        Err(last)
    }

    /// Rounds over the members until one answers; other errors are returned.
    pub async fn call_until_answered<T, F>(
        &self,
        what: &str,
        call: impl Fn(MetadataClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pause = PAUSE.0;
        let mut told = false;
        loop {
            match self.call(&call).await {
                Err(status) if is_about_the_member(&status) => {
                    if !told {
                        told = true;
                        tracing::warn!(what, %status, "no metadata member answers; trying on");
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
                other => return other,
            }
        }
    }
}

/// Whether another member, or the same one later, may answer differently.
pub(super) fn is_about_the_member(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Aborted
    )
}
