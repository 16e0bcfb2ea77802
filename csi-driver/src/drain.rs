//! The end of requests under way when this process is asked to end.
//!
//! Kubernetes gives a pod a time to end and then kills it; a rolling update waits for it. A request may wait much longer
//! than that for a metadata cluster or an nbd-client that is gone, and a client may hold a stream open for ever.
//!
//! | time since the end was asked for | |
//! |---|---|
//! | 0 | no connection is taken any more; the clients of those that there are learn that no request is to follow |
//! | up to [`FINISH_LIMIT`] | requests under way may finish |
//! | then | those that have not are answered UNAVAILABLE, which sidecars and kubelet take for "perhaps done: ask again" |
//! | [`ANSWER_LIMIT`] later | what is still open (streams, clients that do not read) is cut off |
//!
//! Invariant: a request that is cut off is dropped as when its caller goes away, which every RPC withstands: it is
//! idempotent, and goes on where it stopped when it is asked again.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::watch;
use tonic::Status;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

/// Time for requests under way to finish.
pub const FINISH_LIMIT: Duration = Duration::from_secs(3);
/// Time for the answers of those that did not to reach their callers.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Ends the requests of all services with a [`CutLayer`] of its own; dropping it ends them, too.
#[derive(Debug)]
pub struct Cut {
    sender: watch::Sender<bool>,
}

impl Cut {
    /// Nothing is cut off yet.
    pub fn new() -> (Self, CutLayer) {
        let (sender, receiver) = watch::channel(false);
        (Self { sender }, CutLayer { receiver })
    }

    /// Waits out the limits, once the end was asked for; then nothing is left to wait for.
    pub async fn after_limits(self) {
        tokio::time::sleep(FINISH_LIMIT).await;
        tracing::warn!("requests did not finish within {FINISH_LIMIT:?}: answering UNAVAILABLE");
        self.sender.send_replace(true);
        tokio::time::sleep(ANSWER_LIMIT).await;
        tracing::warn!("connections that do not end are cut off");
    }
}

/// Makes requests end when their [`Cut`] says so.
#[derive(Clone, Debug)]
pub struct CutLayer {
    receiver: watch::Receiver<bool>,
}

impl<S> Layer<S> for CutLayer {
    type Service = CutService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CutService {
            inner,
            receiver: self.receiver.clone(),
        }
    }
}

/// See [`CutLayer`].
#[derive(Clone, Debug)]
pub struct CutService<S> {
    inner: S,
    receiver: watch::Receiver<bool>,
}

impl<S, A, B> Service<Request<A>> for CutService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Default + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let answer = self.inner.call(request);
        let mut receiver = self.receiver.clone();
        Box::pin(async move {
            tokio::select! {
                biased;
                answer = answer => answer,
                _ = receiver.wait_for(|cut| *cut) => {
                    let status = Status::unavailable("csi-driver is being stopped: ask again");
                    Ok(status.into_http())
                }
            }
        })
    }
}
