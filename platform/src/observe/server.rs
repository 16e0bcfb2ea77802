//! The HTTP/1.1 server of an [`Observer`].
//!
//! Invariants: at most [`CONNECTIONS_MAX`] connections, others wait in the kernel's queue; each serves one
//! request and ends within [`CONNECTION_DEADLINE`], so that no idle or slow peer keeps a probe out for long.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::{ObserveError, Observer};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 32;
/// Time for a request's head.
pub const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// Time for a request and its answer.
pub const CONNECTION_DEADLINE: Duration = Duration::from_secs(15);
/// A head is shorter than that.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Pause after a failed accept: no descriptor is free, for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often the histograms' samples are summed up.
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);
/// Media type of Prometheus' text format, version 0.0.4.
const METRICS_TYPE: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const TEXT_TYPE: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// A running server; it ends when this is dropped.
#[derive(Debug)]
pub struct Served {
    address: SocketAddr,
    tasks: [JoinHandle<()>; 2],
}

impl Served {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

pub(super) async fn start(
    observer: Arc<Observer>,
    address: SocketAddr,
) -> Result<Served, ObserveError> {
    let failed = |source| ObserveError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tracing::info!(address = %bound, "metrics and health over HTTP");
    let upkeep = {
        let observer = observer.clone();
        async move {
            let mut period = tokio::time::interval(UPKEEP_PERIOD);
            loop {
                period.tick().await;
                observer.upkeep();
            }
        }
    };
    Ok(Served {
        address: bound,
        tasks: [
            tokio::spawn(accept(observer, listener)),
            tokio::spawn(upkeep),
        ],
    })
}

async fn accept(observer: Arc<Observer>, listener: TcpListener) {
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Ends the connections, too, when this task is aborted.
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = free.clone().acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let observer = observer.clone();
                connections.spawn(async move {
                    serve(observer, stream).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(observer: Arc<Observer>, stream: TcpStream) {
    let service = service_fn(move |request: Request<Incoming>| {
        let observer = observer.clone();
        async move { Ok::<_, Infallible>(answer(&observer, &request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_DEADLINE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection for metrics ended"),
        Err(_) => tracing::debug!("a connection for metrics took too long"),
    }
}

async fn answer(observer: &Observer, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/healthz" | "/readyz") {
        return text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n",
        );
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
        // RFC 9110, 15.5.6.
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" => text(StatusCode::OK, "alive\n"),
        "/readyz" => match observer.readiness() {
            Ok(()) => text(StatusCode::OK, "ready\n"),
            Err(reason) => text(
                StatusCode::SERVICE_UNAVAILABLE,
                format!("not ready: {reason}\n"),
            ),
        },
        _ => match observer.render().await {
            Ok(metrics) => {
                let mut response = text(StatusCode::OK, metrics);
                response.headers_mut().insert(CONTENT_TYPE, METRICS_TYPE);
                response
            }
            Err(error) => {
                tracing::warn!(%error, "a scrape failed");
                text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))
            }
        },
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, TEXT_TYPE);
    response
}
