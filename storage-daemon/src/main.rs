//! Entry point of `storage-daemon`: serve disks, format one, look into one.

use std::io::{IsTerminal as _, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ashlar_platform::observe::Observer;
use ashlar_proto::rpc::daemon::storage_daemon_server::StorageDaemonServer;
use clap::{Args, Parser, Subcommand, ValueEnum};
use storage_daemon::config::{DataListen, DiscardPolicy, NodeFile, ServeConfig, parse_label};
use storage_daemon::daemon::Daemon;
use storage_daemon::rpc::{AdminService, Care, MetadataAccess, observe, register_and_report};
use storage_daemon::{check, inspect, metrics, offline};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::TcpListenerStream;
use tracing_subscriber::EnvFilter;

/// Threads of the control plane; the disks have their own.
const CONTROL_THREADS: usize = 1;
/// How long calls of the administration may still take when the daemon stops.
const CALLS_TIMEOUT: Duration = Duration::from_secs(2);
/// At the end, time for threads that still look at a disk that does not answer, or wait for a name server.
const THREADS_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves a node's disks to Ashlar's volumes.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    /// What to log: a level, or a filter such as `info,storage_daemon=debug`.
    #[arg(long, global = true, env = "ASHLAR_LOG", default_value = "info")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve disks until SIGTERM or SIGINT.
    Serve(Serve),
    /// Make a blank file or device an Ashlar disk.
    Format(Format),
    /// Show what is on a disk, offline.
    Inspect(Inspect),
    /// Prove, offline, that what is on a disk agrees with itself. Ends with 1 if it does not.
    Check(Check),
}

#[derive(Args)]
struct Serve {
    /// Metadata members, `host:port`, separated by commas.
    #[arg(long, env = "ASHLAR_METADATA", value_delimiter = ',', required = true)]
    metadata: Vec<String>,
    /// Unique name of this node.
    #[arg(long)]
    node_name: String,
    /// Labels of this node, `KEY=VALUE` (such as topology.kubernetes.io/zone=a).
    #[arg(long = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Where the node's identity and its list of disks are kept.
    #[arg(long)]
    data_dir: PathBuf,
    /// Where the administration (gRPC) listens.
    #[arg(long, default_value = "127.0.0.1:0")]
    admin_listen: SocketAddr,
    /// Where the disks are served: an address, or ADDRESS:PORT with the first disk's port.
    #[arg(long, default_value = "127.0.0.1")]
    data_listen: DataListen,
    /// Address that others reach this node by, if it listens on all of its addresses.
    #[arg(long)]
    advertise: Option<IpAddr>,
    /// A formatted disk: file or block device. May be repeated; more can be added while it runs.
    #[arg(long = "disk")]
    disks: Vec<PathBuf>,
    /// Serve each disk on a unix socket in this directory as well, for nbd-client on the same machine.
    #[arg(long, value_name = "DIR", env = "ASHLAR_LOCAL_SOCKETS")]
    local_sockets: Option<PathBuf>,
    /// Address of the HTTP server for /metrics, /healthz and /readyz; none without it.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// Cache of page metadata per disk, in MiB.
    #[arg(long, default_value_t = 128)]
    cache_mib: usize,
    /// Give space that becomes free back to the device (TRIM, UNMAP; holes in files). `auto`: to block devices and
    /// to files that have holes.
    #[arg(long, value_enum, default_value_t)]
    discard: DiscardPolicy,
}

#[derive(Args)]
struct Format {
    /// The file or block device.
    disk: PathBuf,
    /// Create a file of this size, or make it so large: bytes, or with KiB, MiB, GiB, TiB.
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Also over data of something else, which is lost.
    #[arg(long)]
    force: bool,
    /// Size of the log; chosen by the disk's size without it.
    #[arg(long, value_parser = parse_size)]
    log_size: Option<u64>,
    /// Replicas that the disk can hold; chosen by the disk's size without it.
    #[arg(long)]
    replicas: Option<u32>,
}

#[derive(Args)]
struct Inspect {
    /// The file or block device.
    disk: PathBuf,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Args)]
struct Check {
    /// The file or block device.
    disk: PathBuf,
    /// Verify all data at home, too, which takes as long as reading it.
    #[arg(long)]
    data: bool,
    /// How to say it.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("unknown unit {unit:?}; use KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| format!("{text:?} is not a size"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = start_logging(&cli.log).and_then(|()| match cli.command {
        Command::Serve(arguments) => serve(arguments),
        Command::Format(arguments) => format(&arguments),
        Command::Inspect(arguments) => show(&arguments),
        Command::Check(arguments) => check_disk(&arguments),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storage-daemon: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).context("--log is no filter")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

fn format(arguments: &Format) -> anyhow::Result<()> {
    let request = offline::FormatRequest {
        size_bytes: arguments.size,
        force: arguments.force,
        log_bytes: arguments.log_size,
        replica_slots: arguments.replicas,
    };
    let superblock = offline::format(&arguments.disk, &request)?;
    let geometry = superblock.geometry;
    println!(
        "formatted {} as disk {}: {} MiB for data, {} MiB of log, {} replicas at most",
        arguments.disk.display(),
        superblock.disk,
        (u64::from(geometry.page_count) * ashlar_proto::ids::PAGE_SIZE as u64) >> 20,
        geometry.log_bytes >> 20,
        geometry.slot_count,
    );
    Ok(())
}

fn show(arguments: &Inspect) -> anyhow::Result<()> {
    let report = inspect::inspect(&arguments.disk)?;
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(())
}

fn check_disk(arguments: &Check) -> anyhow::Result<()> {
    let report = check::check(&arguments.disk, arguments.data)?;
    let mut out = std::io::stdout().lock();
    match arguments.output {
        Output::Json => {
            serde_json::to_writer_pretty(&mut out, &report)?;
            writeln!(out)?;
        }
        Output::Text => write!(out, "{report}")?,
    }
    anyhow::ensure!(
        report.sound(),
        "{}: {} problems",
        arguments.disk.display(),
        report.problem_count
    );
    Ok(())
}

fn serve(arguments: Serve) -> anyhow::Result<()> {
    let mut disks = Vec::with_capacity(arguments.disks.len());
    for disk in arguments.disks {
        // The same disk under two names would be opened twice.
        let absolute = std::path::absolute(&disk)?;
        let canonical = absolute.canonicalize().unwrap_or(absolute);
        if !disks.contains(&canonical) {
            disks.push(canonical);
        }
    }
    let config = ServeConfig {
        metadata: arguments.metadata,
        node_name: arguments.node_name,
        labels: arguments.labels.into_iter().collect(),
        data_dir: arguments.data_dir,
        admin_listen: arguments.admin_listen,
        data_listen: arguments.data_listen,
        advertise: arguments.advertise,
        local_sockets: arguments.local_sockets,
        disks,
        cache_bytes: arguments.cache_mib << 20,
        discard: arguments.discard,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .max_blocking_threads(4)
        .enable_all()
        .build()
        .context("cannot start the control plane's threads")?;
    let outcome = runtime.block_on(run(config, arguments.metrics));
    runtime.shutdown_timeout(THREADS_TIMEOUT);
    outcome
}

async fn run(config: ServeConfig, observed_at: Option<SocketAddr>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let observed = match observed_at {
        None => None,
        Some(listen) => {
            let observer =
                Observer::install("storage-daemon", env!("CARGO_PKG_VERSION"), metrics::ALL)?;
            let served = observer.serve(listen).await?;
            Some((observer, served))
        }
    };
    let file = NodeFile::open(&config.data_dir)?;
    let metadata = MetadataAccess::new(&config.metadata).map_err(anyhow::Error::msg)?;
    let listener = TcpListener::bind(config.admin_listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.admin_listen))?;
    let admin_address = listener.local_addr()?;
    tracing::info!(node = %file.node(), name = config.node_name, admin = %admin_address, "starting");
    let daemon = Arc::new(Daemon::new(config, file, metadata, admin_address));

    if let Some((observer, _)) = &observed {
        observe(&daemon, observer);
    }

    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::Serving)
        .await;
    health
        .set_serving::<StorageDaemonServer<AdminService>>()
        .await;
    let service = AdminService::server(Arc::clone(&daemon));
    let mut server = tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(health_service)
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async move {
                // Ends also if the sender is gone.
                let _ = stopped.wait_for(|&stop| stop).await;
            }),
    );

    daemon.serve_all().await?;
    let care = Care::new(
        daemon.config().metadata.clone(),
        daemon.node(),
        daemon.config().local_sockets.clone(),
    );
    let care = Arc::new(tokio::sync::Mutex::new(care));
    let reporter = tokio::spawn(register_and_report(Arc::clone(&daemon), Arc::clone(&care)));
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut server => Some(ended),
    };
    tracing::info!("stopping");
    reporter.abort();
    care.lock().await.shut_down().await;
    daemon.stop_all().await;
    stop.send_replace(true);
    match ended {
        Some(ended) => ended?.context("the administration service ended")?,
        None => {
            if tokio::time::timeout(CALLS_TIMEOUT, server).await.is_err() {
                tracing::warn!("calls of the administration were cut off");
            }
        }
    }
    tracing::info!("stopped");
    Ok(())
}
