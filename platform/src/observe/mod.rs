//! What a daemon tells about itself over HTTP: `/metrics` (Prometheus text), `/healthz`, `/readyz`.
//!
//! Invariants:
//! - A metric belongs to one of two sorts: *kept* (counted where things happen, by [`Metric::counter_of`]
//!   and its like) or *collected* (asked for at each scrape, by [`Observer::on_scrape`]), never both.
//!   Collected series are made anew for each scrape: what is gone (a removed disk) is not shown any more,
//!   and nothing is computed while nobody asks.
//! - Not ready until told otherwise; the reason is the body of `/readyz`.
//! - One request per connection, a bounded number of connections, a deadline for each.
//!
//! A daemon's `metrics.rs` holds its names, `main` starts the server:
//!
//! ```no_run
//! use ashlar_platform::observe::{Metric, Observer, Scrape, Unit};
//!
//! /// Attachments of this node.
//! pub const ATTACHED: Metric =
//!     Metric::gauge("ashlar_example_attached", Unit::Count, &[], "Volumes attached now");
//! /// Calls by outcome.
//! pub const CALLS: Metric =
//!     Metric::counter("ashlar_example_calls_total", Unit::Count, &["method", "code"], "Calls answered");
//! /// Time of a call.
//! pub const CALL_SECONDS: Metric =
//!     Metric::seconds("ashlar_example_call_seconds", &["method"], "Time to answer a call");
//! /// Every metric of this crate, for the descriptions and for docs/metrics.md.
//! pub const ALL: &[Metric] = &[ATTACHED, CALLS, CALL_SECONDS];
//!
//! # async fn attached_now() -> usize { 0 }
//! # async fn example(listen: std::net::SocketAddr) -> Result<(), Box<dyn std::error::Error>> {
//! // Once per process, before anything is counted; only with `--metrics`: without it all counting
//! // goes nowhere.
//! let observer = Observer::install("nbd-client", env!("CARGO_PKG_VERSION"), ALL)?;
//! observer.on_scrape(|scrape: Scrape| async move {
//!     scrape.set(&ATTACHED, &[], attached_now().await);
//! });
//! // The server ends when `served` is dropped; port 0 is any, `served.address()` says which.
//! let served = observer.serve(listen).await?;
//!
//! // Anywhere, by label values in the order of the metric's labels:
//! CALLS.counter_of(&["Attach", "ok"]).increment(1);
//! CALL_SECONDS.histogram_of(&["Attach"]).record(0.002);
//!
//! // As soon as it serves (or `observer.ready_when(|| ...)`, asked at each request):
//! observer.set_ready();
//! observer.set_not_ready("no metadata member answers");
//! # drop(served);
//! # Ok(())
//! # }
//! ```
//!
//! Every name is in `docs/metrics.md`; [`check_reference`] keeps it so, in a test of each crate.

mod metric;
mod process;
mod reference;
mod server;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

pub use metric::{Kind, Metric, Unit, Value};
pub use process::{PROCESS, resident_bytes};
pub use reference::check_reference;
pub use server::Served;

/// Upper bounds of every histogram's buckets, in seconds: from a fast disk to a slow mkfs.
const BUCKETS_SECONDS: [f64; 20] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
];
/// Time for what is collected at a scrape; less than Prometheus' default of 10 s.
const COLLECT_DEADLINE: Duration = Duration::from_secs(8);

/// Observation cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The address.
    #[error("--metrics {address}: cannot listen there (choose another port?): {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Called twice in one process.
    #[error("this process has metrics already")]
    Installed,
    /// The histogram's bounds are not accepted.
    #[error("metrics: {0}")]
    Bounds(#[from] BuildError),
    /// Collecting took too long.
    #[error("what is collected at a scrape was not there within {COLLECT_DEADLINE:?}")]
    Slow,
}

type Collecting = Pin<Box<dyn Future<Output = ()> + Send>>;
type Collector = Arc<dyn Fn(Scrape) -> Collecting + Send + Sync>;
type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// See the module.
pub struct Observer {
    component: &'static str,
    version: &'static str,
    tables: [&'static [Metric]; 2],
    /// What is kept.
    kept: OnceLock<PrometheusHandle>,
    collectors: Mutex<Vec<Collector>>,
    check: Mutex<Check>,
}

impl Observer {
    /// Makes the process's metrics; `table` is the daemon's, all its names.
    ///
    /// # Errors
    /// If the process has them already.
    pub fn install(
        component: &'static str,
        version: &'static str,
        table: &'static [Metric],
    ) -> Result<Arc<Self>, ObserveError> {
        let (observer, recorder) = Self::build(component, version, table)?;
        metrics::set_global_recorder(recorder).map_err(|_| ObserveError::Installed)?;
        Ok(observer)
    }

    /// Metrics that are not the process's: several daemons in one process, as in tests. Only what is
    /// collected at scrapes is shown.
    ///
    /// # Errors
    /// Never, unless the histogram's bounds are wrong.
    pub fn apart(
        component: &'static str,
        version: &'static str,
        table: &'static [Metric],
    ) -> Result<Arc<Self>, ObserveError> {
        Self::build(component, version, table).map(|(observer, _)| observer)
    }

    fn build(
        component: &'static str,
        version: &'static str,
        table: &'static [Metric],
    ) -> Result<(Arc<Self>, PrometheusRecorder), ObserveError> {
        let observer = Arc::new(Self {
            component,
            version,
            tables: [PROCESS, table],
            kept: OnceLock::new(),
            collectors: Mutex::new(Vec::new()),
            check: Mutex::new(Arc::new(|| Err("starting".to_owned()))),
        });
        let recorder = observer.recorder()?;
        let _ = observer.kept.set(recorder.handle());
        Ok((observer, recorder))
    }

    /// Ready from now on.
    pub fn set_ready(&self) {
        self.ready_when(|| Ok(()));
    }

    /// Not ready from now on, because of this.
    pub fn set_not_ready(&self, reason: impl Into<String>) {
        let reason = reason.into();
        self.ready_when(move || Err(reason.clone()));
    }

    /// Ready as this says, asked whenever somebody wants to know; it must not block.
    pub fn ready_when(&self, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) {
        *lock(&self.check) = Arc::new(check);
    }

    /// Whether it is ready, or why not.
    ///
    /// # Errors
    /// The reason.
    pub fn readiness(&self) -> Result<(), String> {
        let check = lock(&self.check).clone();
        check()
    }

    /// Called at each scrape; it sets what it knows then.
    pub fn on_scrape<F, Fut>(&self, collect: F)
    where
        F: Fn(Scrape) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        lock(&self.collectors).push(Arc::new(move |scrape| Box::pin(collect(scrape))));
    }

    /// Starts the server; returns when it listens.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub async fn serve(self: &Arc<Self>, address: SocketAddr) -> Result<Served, ObserveError> {
        server::start(self.clone(), address).await
    }

    /// Everything, in Prometheus' text format.
    ///
    /// # Errors
    /// If a collector does not end in time.
    pub async fn render(&self) -> Result<String, ObserveError> {
        let scrape = Scrape {
            recorder: Arc::new(self.recorder()?),
        };
        process::collect(&scrape, self.component, self.version);
        let collectors = lock(&self.collectors).clone();
        let collecting = async {
            for collect in collectors {
                collect(scrape.clone()).await;
            }
        };
        tokio::time::timeout(COLLECT_DEADLINE, collecting)
            .await
            .map_err(|_| ObserveError::Slow)?;
        let mut text = self
            .kept
            .get()
            .map(PrometheusHandle::render)
            .unwrap_or_default();
        text.push_str(&scrape.recorder.handle().render());
        Ok(text)
    }

    /// Sums up the samples of histograms, which otherwise wait in memory for the next scrape.
    fn upkeep(&self) {
        if let Some(kept) = self.kept.get() {
            kept.run_upkeep();
        }
    }

    /// A recorder that knows the descriptions; the first one is kept, others live for one scrape.
    fn recorder(&self) -> Result<PrometheusRecorder, ObserveError> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS_SECONDS)?
            .build_recorder();
        for metric in self.tables.into_iter().flatten() {
            metric.describe(&recorder);
        }
        Ok(recorder)
    }
}

/// What a scrape collects.
#[derive(Clone)]
pub struct Scrape {
    recorder: Arc<PrometheusRecorder>,
}

impl Scrape {
    /// The present value of a gauge, or what a counter has reached; label values in the metric's order.
    ///
    /// # Panics
    /// For a histogram, a float of a counter, or the wrong number of label values.
    pub fn set(&self, metric: &Metric, labels: &[&str], value: impl Into<Value>) {
        metric.put(&*self.recorder, labels, value.into());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
