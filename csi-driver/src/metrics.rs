//! Every metric of the driver, and the layer that counts requests.
//!
//! Invariant: label values are bounded: methods of CSI and gRPC codes only, whatever a client sends.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ashlar_platform::observe::Metric;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};

/// Requests by method and code.
pub const RPC_SECONDS: Metric = Metric::seconds(
    "ashlar_csi_rpc_seconds",
    &["method", "code"],
    "Time to answer a CSI request, by method and gRPC code",
);
/// Parts of staging.
pub const STAGE_SECONDS: Metric = Metric::seconds(
    "ashlar_csi_stage_seconds",
    &["step"],
    "Time of the steps of NodeStageVolume: attach, probe, check, format, mount, grow",
);
/// All of them.
pub const ALL: &[Metric] = &[RPC_SECONDS, STAGE_SECONDS];

/// Measures a step of staging.
pub async fn step<T>(name: &'static str, work: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let result = work.await;
    STAGE_SECONDS
        .histogram_of(&[name])
        .record(begun.elapsed().as_secs_f64());
    result
}

/// Counts the requests that go through, and logs those that are refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct CountLayer;

impl<S> tower::Layer<S> for CountLayer {
    type Service = Count<S>;

    fn layer(&self, inner: S) -> Count<S> {
        Count { inner }
    }
}

/// A service whose requests are counted.
#[derive(Clone, Debug)]
pub struct Count<S> {
    inner: S,
}

impl<S, A, B> Service<Request<A>> for Count<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let method = method(request.uri().path());
        let begun = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if let Ok(response) = &answer {
                // An error has its status in the headers; a success has it in the trailers.
                let status = Status::from_header_map(response.headers());
                let code = status.as_ref().map_or(Code::Ok, Status::code);
                if let Some(status) = status.filter(|s| s.code() != Code::Ok) {
                    tracing::info!(method, ?code, message = status.message(), "request refused");
                }
                let took = begun.elapsed().as_secs_f64();
                RPC_SECONDS
                    .histogram_of(&[&method, &format!("{code:?}")])
                    .record(took);
            }
            answer
        })
    }
}

/// The method of a path, if it is one of CSI.
fn method(path: &str) -> String {
    const SERVICES: [&str; 3] = ["Identity", "Controller", "Node"];
    let known = path
        .strip_prefix("/csi.v1.")
        .and_then(|rest| rest.split_once('/'))
        .filter(|(service, _)| SERVICES.contains(service));
    match known {
        Some((_, method)) if crate::rpc::is_method(method) => method.to_owned(),
        _ => "other".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_has_every_metric() {
        let reference = include_str!("../../docs/metrics.md");
        ashlar_platform::observe::check_reference(reference, "csi-driver", ALL)
            .unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    #[test]
    fn methods_are_those_of_csi() {
        assert_eq!(method("/csi.v1.Controller/CreateVolume"), "CreateVolume");
        assert_eq!(method("/csi.v1.Node/NodeGetInfo"), "NodeGetInfo");
        for other in [
            "/csi.v1.Controller/Evil",
            "/x/CreateVolume",
            "",
            "/csi.v1.Node",
        ] {
            assert_eq!(method(other), "other");
        }
    }
}
