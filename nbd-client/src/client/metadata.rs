//! Access to the metadata cluster: any member may be asked; one that does not answer is passed over.
//!
//! Invariant: a request is repeated with the same request id until it has an answer, so that it takes
//! effect once whatever was lost on the way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

/// Time for one attempt at one member.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for a connection to one member.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Pause after all members were tried in vain; doubles.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// HTTP/2 pings, so that a stream from a member that is cut off ends.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// The members of the cluster.
#[derive(Clone)]
pub(crate) struct Members {
    shared: Arc<Shared>,
}

struct Shared {
    channels: Vec<(String, Channel)>,
    current: AtomicUsize,
}

/// An address that is none.
#[derive(Debug, thiserror::Error)]
#[error("metadata address {address:?}: {source}")]
pub struct BadAddress {
    address: String,
    #[source]
    source: tonic::transport::Error,
}

impl Members {
    /// Connects lazily; `addresses` are `host:port`, at least one.
    pub fn new(addresses: &[String]) -> Result<Self, BadAddress> {
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
        let channels = addresses.iter().map(channel).collect::<Result<_, _>>()?;
        Ok(Self {
            shared: Arc::new(Shared {
                channels,
                current: AtomicUsize::new(0),
            }),
        })
    }

    /// The member to ask now, and its position.
    pub fn client(&self) -> (usize, MetadataClient<Channel>) {
        let at = self.shared.current.load(Ordering::Relaxed) % self.shared.channels.len();
        (at, MetadataClient::new(self.shared.channels[at].1.clone()))
    }

    /// The member at `at` does not answer: the next one is asked from now on.
    pub fn pass_over(&self, at: usize) {
        let next = (at + 1) % self.shared.channels.len();
        let current = &self.shared.current;
        // Only one of those who found it dead moves on.
        let _ = current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Asks until there is an answer, or an error that repeating does not help against.
    pub async fn ask<T, F>(
        &self,
        what: &'static str,
        mut request: impl FnMut(MetadataClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut pause = PAUSE_MIN;
        let mut failures = 0_usize;
        loop {
            let (at, client) = self.client();
            let result = tokio::time::timeout(ATTEMPT_TIMEOUT, request(client)).await;
            let status = match result {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if !is_passing(&status) => return Err(status),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer"),
            };
            let member = &self.shared.channels[at].0;
            tracing::debug!(what, member, %status, "metadata did not answer; trying the next member");
            self.pass_over(at);
            failures += 1;
            if failures.is_multiple_of(self.shared.channels.len()) {
                if failures == 10 * self.shared.channels.len() {
                    tracing::warn!(what, %status, "no metadata member answers; still trying");
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Whether another attempt may fare better.
fn is_passing(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Aborted
    )
}
