//! Metrics and health as a scraper sees them: over a socket.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ashlar_platform::observe::{Metric, ObserveError, Observer, Scrape, Served, Unit};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const CALLS: Metric = Metric::counter(
    "ashlar_test_calls_total",
    Unit::Count,
    &["method", "code"],
    "Calls answered",
);
const CALL_SECONDS: Metric =
    Metric::seconds("ashlar_test_call_seconds", &[], "Time to answer a call");
const USED: Metric = Metric::gauge("ashlar_test_used_bytes", Unit::Bytes, &["disk"], "In use");
const READS: Metric = Metric::counter(
    "ashlar_test_reads_total",
    Unit::Count,
    &["disk"],
    "Read requests",
);
const ALL: &[Metric] = &[CALLS, CALL_SECONDS, USED, READS];

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn send(served: &Served, request: &str) -> String {
    let mut stream = TcpStream::connect(served.address()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn get(served: &Served, path: &str) -> (u16, String) {
    let answer = send(
        served,
        &format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"),
    )
    .await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[tokio::test]
async fn health_readiness_and_what_is_not_there() {
    let observer = Observer::apart("test", "1", ALL).unwrap();
    let served = observer.serve(any()).await.unwrap();
    assert_eq!(get(&served, "/healthz").await, (200, "alive\n".into()));
    assert_eq!(
        get(&served, "/readyz").await,
        (503, "not ready: starting\n".into())
    );
    observer.set_ready();
    assert_eq!(get(&served, "/readyz").await, (200, "ready\n".into()));
    observer.set_not_ready("no leader");
    assert_eq!(
        get(&served, "/readyz").await,
        (503, "not ready: no leader\n".into())
    );
    assert_eq!(get(&served, "/").await.0, 404);
    assert_eq!(get(&served, "/metrics/").await.0, 404);
    let post = send(
        &served,
        "POST /metrics HTTP/1.1\r\nhost: test\r\ncontent-length: 0\r\n\r\n",
    )
    .await;
    assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
    assert!(post.contains("allow: GET, HEAD\r\n"), "{post}");
    let head = send(&served, "HEAD /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"));
}

#[tokio::test]
async fn kept_metrics_show_with_description_labels_and_buckets() {
    let observer = Observer::install("test", "1.2.3", ALL).unwrap();
    assert!(matches!(
        Observer::install("test", "1", ALL),
        Err(ObserveError::Installed)
    ));
    let served = observer.serve(any()).await.unwrap();
    CALLS.counter_of(&["Attach", "ok"]).increment(2);
    CALLS.counter_of(&["Attach", "ok"]).increment(1);
    CALL_SECONDS.histogram_of(&[]).record(0.002);
    CALL_SECONDS.histogram_of(&[]).record(500.0);
    let answer = send(&served, "GET /metrics HTTP/1.1\r\nhost: test\r\n\r\n").await;
    for line in [
        "content-type: text/plain; version=0.0.4; charset=utf-8\r",
        "# HELP ashlar_test_calls_total Calls answered",
        "# TYPE ashlar_test_calls_total counter",
        "ashlar_test_calls_total{method=\"Attach\",code=\"ok\"} 3",
        "# TYPE ashlar_test_call_seconds histogram",
        "ashlar_test_call_seconds_bucket{le=\"0.001\"} 0",
        "ashlar_test_call_seconds_bucket{le=\"0.0025\"} 1",
        "ashlar_test_call_seconds_bucket{le=\"120\"} 1",
        "ashlar_test_call_seconds_bucket{le=\"+Inf\"} 2",
        "ashlar_test_call_seconds_count 2",
        "ashlar_build_info{component=\"test\",version=\"1.2.3\"} 1",
    ] {
        assert!(
            answer.split('\n').any(|l| l == line),
            "no line {line} in\n{answer}"
        );
    }
    assert!(answer.contains("\nashlar_process_resident_memory_bytes "));
}

#[tokio::test]
async fn what_is_collected_costs_nothing_unasked_and_goes_with_its_subject() {
    let observer = Observer::apart("test", "1", ALL).unwrap();
    let scrapes = Arc::new(AtomicU64::new(0));
    let counted = scrapes.clone();
    observer.on_scrape(move |scrape: Scrape| {
        let n = counted.fetch_add(1, Ordering::Relaxed);
        async move {
            scrape.set(&USED, &["a"], 4096_u64);
            scrape.set(&READS, &["a"], 7 + n);
            if n == 0 {
                scrape.set(&USED, &["removed"], 1_u64);
            }
        }
    });
    let served = observer.serve(any()).await.unwrap();
    get(&served, "/healthz").await;
    assert_eq!(scrapes.load(Ordering::Relaxed), 0);
    let (status, first) = get(&served, "/metrics").await;
    assert_eq!(status, 200);
    assert!(first.contains("\nashlar_test_used_bytes{disk=\"removed\"} 1\n"));
    assert!(first.contains("\nashlar_test_reads_total{disk=\"a\"} 7\n"));
    let (_, second) = get(&served, "/metrics").await;
    assert!(!second.contains("removed"));
    assert!(second.contains("\nashlar_test_used_bytes{disk=\"a\"} 4096\n"));
    assert!(second.contains("\nashlar_test_reads_total{disk=\"a\"} 8\n"));
    assert_eq!(second.matches("# TYPE ashlar_test_used_bytes ").count(), 1);
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_let_go_and_idle_ones_are_bounded() {
    let observer = Observer::apart("test", "1", ALL).unwrap();
    let served = observer.serve(any()).await.unwrap();
    // More than are served at a time: the probe has to wait until idle ones were let go.
    let mut idle = Vec::new();
    for _ in 0..40 {
        let mut stream = TcpStream::connect(served.address()).await.unwrap();
        stream.write_all(b"GET /healthz HT").await.unwrap();
        idle.push(stream);
    }
    let probe = tokio::time::timeout(Duration::from_secs(20), get(&served, "/healthz"));
    assert_eq!(probe.await.unwrap().0, 200);
    let mut rest = Vec::new();
    idle[0].read_to_end(&mut rest).await.unwrap();
}

#[tokio::test]
async fn the_server_ends_with_its_guard_and_its_address_is_reported_if_taken() {
    let observer = Observer::apart("test", "1", ALL).unwrap();
    let served = observer.serve(any()).await.unwrap();
    let address = served.address();
    let taken = observer.serve(address).await.unwrap_err();
    assert!(matches!(taken, ObserveError::Listen { .. }));
    assert!(taken.to_string().contains(&address.to_string()));
    drop(served);
    // The task ends at its next turn.
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}
