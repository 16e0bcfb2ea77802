//! A member of the metadata cluster.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use ashlar_platform::observe::Observer;
use clap::Parser;
use metadata_raft::metrics;
use metadata_raft::raft::config::Tuning;
use metadata_raft::rpc::{Options, Running};
use tokio::signal::unix::{SignalKind, signal};

/// At the end, time for threads that still write a snapshot or wait for a name server. What is cut off is as after a
/// crash.
const THREADS_LIMIT: Duration = Duration::from_secs(2);

/// A member of Ashlar's metadata cluster (1, 3 or 5 of them decide by majority).
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// This member's number: unique, never reused for an empty directory.
    #[arg(long)]
    id: u64,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:7101")]
    listen: SocketAddr,
    /// Address by which other members reach this one, if it differs from --listen.
    #[arg(long)]
    advertise: Option<String>,
    /// Directory of the log and the snapshots.
    #[arg(long)]
    data: PathBuf,
    /// The initial members of a new cluster, the same list for each: 1=HOST:PORT,2=HOST:PORT,...
    #[arg(long, value_delimiter = ',', value_parser = member, conflicts_with = "join")]
    bootstrap: Vec<(u64, String)>,
    /// Members of an existing cluster to join: HOST:PORT,...
    #[arg(long, value_delimiter = ',')]
    join: Vec<String>,
    /// Seconds without a node after which the replicas on its disks get others.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    replace_after: u64,
    /// Address of the HTTP server for /metrics, /healthz and /readyz; none without it.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// What to log: a level, or directives as in `info,openraft=debug`.
    #[arg(long, env = "ASHLAR_LOG", default_value = "info,openraft=warn")]
    log: String,
}

fn member(text: &str) -> anyhow::Result<(u64, String)> {
    let (id, address) = text
        .split_once('=')
        .ok_or_else(|| anyhow!("{text} is not of the form ID=HOST:PORT"))?;
    Ok((
        id.parse().context("the id is not a number")?,
        address.to_owned(),
    ))
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&arguments.log).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(run(arguments));
    runtime.shutdown_timeout(THREADS_LIMIT);
    outcome
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    // First of all, so that a member that takes long to start is seen to be alive.
    let observed = match arguments.metrics {
        None => None,
        Some(listen) => {
            let observer =
                Observer::install("metadata-raft", env!("CARGO_PKG_VERSION"), metrics::ALL)?;
            let served = observer.serve(listen).await?;
            Some((observer, served))
        }
    };
    let running = Running::start(Options {
        id: arguments.id,
        listen: arguments.listen,
        advertise: arguments.advertise,
        data: arguments.data,
        bootstrap: arguments.bootstrap.into_iter().collect::<BTreeMap<_, _>>(),
        join: arguments.join,
        replace_after: Duration::from_secs(arguments.replace_after),
        tuning: Tuning::default(),
    })
    .await?;
    if let Some((observer, _)) = &observed {
        running.member.observe(observer);
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    running.stop().await;
    Ok(())
}
