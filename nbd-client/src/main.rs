//! `nbd-client`: serves volumes over NBD, and shows what it is doing.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ashlar_platform::observe::{Observer, Served};
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use nbd_client::client::{Endpoint, Outcome, ServeConfig, VolumeSpec, serve, stats};
use nbd_client::node;
use tracing_subscriber::EnvFilter;

/// Volume client of an Ashlar cluster.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Arguments {
    /// What to log: error, warn, info, debug, trace, or a filter such as `nbd_client=debug`.
    #[arg(long, global = true, env = "ASHLAR_LOG", default_value = "info")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Open volumes and serve them over NBD.
    Serve(Serve),
    /// Show the statistics of a running `serve` as JSON.
    Stats(Stats),
    /// Run the node's service, which makes block devices of volumes.
    Node(Node),
    #[command(flatten)]
    Attachments(node::command::Command),
}

#[derive(Args, Debug)]
struct Node {
    /// Metadata members, `host:port`.
    #[arg(long, env = "ASHLAR_METADATA", value_delimiter = ',', required = true)]
    metadata: Vec<String>,
    /// Name of this node in the cluster.
    #[arg(long, env = "ASHLAR_NODE")]
    node: String,
    /// Where attachments are remembered across restarts; on a disk of this machine.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ashlar/nbd")]
    state_dir: PathBuf,
    /// The service's unix socket (mode 0600).
    #[arg(
        long,
        value_name = "PATH",
        env = "ASHLAR_NBD_SOCKET",
        default_value = "/run/ashlar/nbd.sock"
    )]
    socket: PathBuf,
    /// Reactor threads; volumes are spread over them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Directory in which storage daemons on this machine have a unix socket per disk (their option of the
    /// same name): used instead of TCP for the disks found there.
    #[arg(long, value_name = "DIR", env = "ASHLAR_LOCAL_SOCKETS")]
    local_sockets: Option<PathBuf>,
    /// Serve metrics, health and readiness over HTTP on this address: /metrics, /healthz, /readyz.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// Seconds for an orderly end of a volume.
    #[arg(long, default_value_t = 10)]
    close_timeout: u64,
}

#[derive(Args, Debug)]
struct Serve {
    /// Metadata members, `host:port`.
    #[arg(long, env = "ASHLAR_METADATA", value_delimiter = ',', required = true)]
    metadata: Vec<String>,
    /// A volume, followed by where to serve it: --socket or --listen. May be repeated.
    #[arg(long, value_name = "NAME", required_unless_present = "snapshot")]
    volume: Vec<String>,
    /// A snapshot (name or id), likewise: it is served read-only, whoever has the volume, also if that is deleted.
    #[arg(long, value_name = "NAME")]
    snapshot: Vec<String>,
    /// Serve the volume before it on this unix socket (mode 0600).
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Serve the volume before it on this TCP address.
    #[arg(long, value_name = "IP:PORT")]
    listen: Vec<SocketAddr>,
    /// Only read, beside any number of other clients that only read; a client that writes is refused meanwhile.
    #[arg(long)]
    read_only: bool,
    /// Take the volumes over from clients that hold them: those are fenced and stop.
    #[arg(long)]
    force: bool,
    /// Reactor threads; volumes are spread over them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// Name of the node of the storage daemon on this machine: its replicas are read first.
    #[arg(long, env = "ASHLAR_NODE")]
    node: Option<String>,
    /// Directory in which storage daemons on this machine have a unix socket per disk (their option of the
    /// same name): used instead of TCP for the disks found there.
    #[arg(long, value_name = "DIR", env = "ASHLAR_LOCAL_SOCKETS")]
    local_sockets: Option<PathBuf>,
    /// Serve statistics on this unix socket: one JSON line per line received.
    #[arg(long, value_name = "PATH")]
    stats_socket: Option<PathBuf>,
    /// Serve metrics, health and readiness over HTTP on this address: /metrics, /healthz, /readyz.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// Seconds for an orderly end after SIGTERM.
    #[arg(long, default_value_t = 10)]
    close_timeout: u64,
}

#[derive(Args, Debug)]
struct Stats {
    /// The socket given to `serve --stats-socket`.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Start the longest times anew afterwards.
    #[arg(long)]
    reset: bool,
}

fn main() -> ExitCode {
    let matches = Arguments::command().get_matches();
    let result = Arguments::from_arg_matches(&matches)
        .map_err(anyhow::Error::from)
        .and_then(|arguments| {
            start_log(&arguments.log)?;
            match arguments.command {
                Command::Serve(options) => {
                    let pairs = pair(&matches, &options)?;
                    run_serve(options, pairs)
                }
                Command::Stats(options) => run_stats(&options),
                Command::Node(options) => run_node(options),
                Command::Attachments(command) => {
                    runtime()?.block_on(node::command::run(command))?;
                    Ok(ExitCode::SUCCESS)
                }
            }
        });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("nbd-client: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// Pairs each --volume and --snapshot with the --socket or --listen that follows it.
fn pair(matches: &clap::ArgMatches, options: &Serve) -> anyhow::Result<Vec<VolumeSpec>> {
    let Some((_, serve)) = matches.subcommand() else {
        bail!("no command")
    };
    let positions = |name: &str| serve.indices_of(name).into_iter().flatten();
    let mut places: Vec<(usize, Endpoint)> = Vec::new();
    places.extend(positions("socket").zip(options.socket.iter().cloned().map(Endpoint::Unix)));
    places.extend(positions("listen").zip(options.listen.iter().copied().map(Endpoint::Tcp)));
    places.sort_by_key(|(at, _)| *at);
    let of =
        |kind: &'static str, names| positions(kind).zip(names).map(move |(at, n)| (at, kind, n));
    let mut volumes: Vec<(usize, &str, &String)> = of("volume", &options.volume)
        .chain(of("snapshot", &options.snapshot))
        .collect();
    volumes.sort_by_key(|(at, _, _)| *at);
    if volumes.len() > usize::from(u16::MAX) - 1 {
        bail!("too many volumes");
    }
    let mut pairs = Vec::with_capacity(volumes.len());
    for (number, (at, kind, name)) in volumes.iter().enumerate() {
        let end = volumes
            .get(number + 1)
            .map_or(usize::MAX, |(next, _, _)| *next);
        let mut own = places
            .iter()
            .filter(|(place, _)| place > at && *place < end);
        let (Some((_, endpoint)), None) = (own.next(), own.next()) else {
            bail!("--{kind} {name} must be followed by one --socket or --listen");
        };
        pairs.push(VolumeSpec {
            name: (*name).clone(),
            snapshot: *kind == "snapshot",
            endpoint: endpoint.clone(),
        });
    }
    if pairs.len() != places.len() {
        bail!("a --socket or --listen stands before the first --volume or --snapshot");
    }
    Ok(pairs)
}

fn run_serve(options: Serve, volumes: Vec<VolumeSpec>) -> anyhow::Result<ExitCode> {
    let config = ServeConfig {
        metadata: options.metadata,
        volumes,
        read_only: options.read_only,
        force: options.force,
        threads: usize::from(options.threads),
        node: options.node,
        local_sockets: options.local_sockets,
        stats_socket: options.stats_socket,
        observer: observer(options.metrics)?,
        close_timeout: Duration::from_secs(options.close_timeout),
    };
    let metrics = options.metrics;
    let outcome = run_to_end(async {
        let _served = show(config.observer.as_ref(), metrics).await?;
        anyhow::Ok(serve(config, shutdown_signal()?).await?)
    })?;
    Ok(match outcome {
        Outcome::Closed => ExitCode::SUCCESS,
        Outcome::TimedOut(names) => {
            let names = names.join(", ");
            eprintln!("nbd-client: not closed in time: {names}; the next open reconciles");
            ExitCode::FAILURE
        }
        Outcome::NothingLeft(why) => {
            eprintln!("nbd-client: {why}");
            ExitCode::FAILURE
        }
    })
}

/// Metrics of this process, if they are to be shown.
fn observer(listen: Option<SocketAddr>) -> anyhow::Result<Option<Arc<Observer>>> {
    let install = |_| {
        Observer::install(
            "nbd-client",
            env!("CARGO_PKG_VERSION"),
            nbd_client::metrics::ALL,
        )
    };
    Ok(listen.map(install).transpose()?)
}

/// Shows them until the result is dropped.
async fn show(
    observer: Option<&Arc<Observer>>,
    listen: Option<SocketAddr>,
) -> anyhow::Result<Option<Served>> {
    Ok(match (observer, listen) {
        (Some(observer), Some(listen)) => Some(observer.serve(listen).await?),
        _ => None,
    })
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Runs a daemon, whose end does not wait for threads: one may wait for a silent name server, or for a device.
fn run_to_end<T>(daemon: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon);
    runtime.shutdown_background();
    outcome
}

/// Ends at SIGTERM or SIGINT.
fn shutdown_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    })
}

fn run_node(options: Node) -> anyhow::Result<ExitCode> {
    let config = node::NodeConfig {
        metadata: options.metadata,
        node: options.node,
        state_dir: options.state_dir,
        socket: options.socket,
        local_sockets: options.local_sockets,
        threads: usize::from(options.threads),
        close_timeout: Duration::from_secs(options.close_timeout),
        observer: observer(options.metrics)?,
    };
    let metrics = options.metrics;
    run_to_end(async {
        let _served = show(config.observer.as_ref(), metrics).await?;
        anyhow::Ok(node::run(config, shutdown_signal()?).await?)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn run_stats(options: &Stats) -> anyhow::Result<ExitCode> {
    let statistics = runtime()?
        .block_on(stats::ask(&options.socket, options.reset))
        .with_context(|| format!("ask {}", options.socket.display()))?;
    println!("{}", serde_json::to_string_pretty(&statistics)?);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn pairs(arguments: &str) -> anyhow::Result<Vec<VolumeSpec>> {
        let words = format!("nbd-client serve --metadata a:1,b:2 {arguments}");
        let matches = Arguments::command().get_matches_from(words.split_whitespace());
        let Command::Serve(options) = Arguments::from_arg_matches(&matches).unwrap().command else {
            panic!("serve");
        };
        assert_eq!(options.metadata, ["a:1", "b:2"]);
        pair(&matches, &options)
    }

    #[test]
    fn each_volume_is_served_where_the_option_after_it_says() {
        let found =
            pairs("--volume a --socket /s --volume b --listen [::1]:10809 --volume c --socket /t");
        let found: Vec<(String, Endpoint)> = found
            .unwrap()
            .into_iter()
            .map(|v| (v.name, v.endpoint))
            .collect();
        let expected = [
            ("a".to_owned(), Endpoint::Unix("/s".into())),
            (
                "b".to_owned(),
                Endpoint::Tcp("[::1]:10809".parse().unwrap()),
            ),
            ("c".to_owned(), Endpoint::Unix("/t".into())),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn volumes_and_places_that_do_not_pair_are_refused() {
        for wrong in [
            "--volume a",
            "--volume a --volume b --socket /s --socket /t",
            "--socket /s --volume a",
            "--volume a --socket /s --listen 127.0.0.1:1",
        ] {
            assert!(pairs(wrong).is_err(), "{wrong}");
        }
    }
}
