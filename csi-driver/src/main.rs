//! `csi-driver`: volumes of an Ashlar cluster for Kubernetes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail};
use clap::{Parser, ValueEnum};
use csi_driver::node::NodeOptions;
use csi_driver::server::{NodeConfig, Options, serve};
use csi_driver::{identity, listener};
use tokio::signal::unix::{SignalKind, signal};

/// CSI driver of Ashlar.
#[derive(Parser, Debug)]
#[command(version)]
struct Arguments {
    /// Which services to serve.
    #[arg(long, value_enum)]
    mode: Mode,
    /// The unix socket for kubelet and the sidecars.
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///csi/csi.sock")]
    endpoint: String,
    /// Metadata members, `host:port`.
    #[arg(long, env = "ASHLAR_METADATA", value_delimiter = ',', required = true)]
    metadata: Vec<String>,
    /// This node's name, as Kubernetes knows it (modes node and all).
    #[arg(long, env = "ASHLAR_NODE")]
    node: Option<String>,
    /// Socket of this node's nbd-client (modes node and all).
    #[arg(long, value_name = "PATH", default_value = "/run/ashlar/nbd.sock")]
    nbd_socket: PathBuf,
    /// The driver's name.
    #[arg(long, default_value = "csi.ashlar.io", value_parser = identity::driver_name)]
    driver_name: String,
    /// Most volumes that Kubernetes may put on this node; 0: no limit.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(i64).range(0..=65_536))]
    max_volumes_per_node: i64,
    /// A label of this node, as `topology.kubernetes.io/zone=a` (repeatable). An empty value is passed over.
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    topology_label: Vec<(String, String)>,
    /// Serve /metrics, /healthz and /readyz on this address.
    #[arg(long, value_name = "IP:PORT")]
    metrics: Option<SocketAddr>,
    /// What to log: error, warn, info, debug, trace, or a filter such as `csi_driver=debug`.
    #[arg(long, env = "ASHLAR_LOG", default_value = "info")]
    log: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Identity and Controller.
    Controller,
    /// Identity and Node.
    Node,
    /// All three.
    All,
}

fn label(text: &str) -> anyhow::Result<(String, String)> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(anyhow!("{text:?} is not of the form KEY=VALUE")),
    }
}

fn options(arguments: Arguments) -> anyhow::Result<Options> {
    let node = match arguments.mode {
        Mode::Controller => None,
        Mode::Node | Mode::All => {
            let Some(name) = arguments.node.filter(|n| !n.is_empty()) else {
                bail!("--node NAME is needed in this mode: the node's name in Kubernetes");
            };
            let labels: HashMap<String, String> = arguments
                .topology_label
                .into_iter()
                .filter(|(_, value)| !value.is_empty())
                .collect();
            Some(NodeConfig {
                options: NodeOptions {
                    name,
                    labels,
                    max_volumes: arguments.max_volumes_per_node,
                },
                nbd_socket: arguments.nbd_socket,
            })
        }
    };
    Ok(Options {
        socket: listener::endpoint_path(&arguments.endpoint).context("--endpoint")?,
        metadata: arguments.metadata,
        driver_name: arguments.driver_name,
        controller: arguments.mode != Mode::Node,
        node,
        metrics: arguments.metrics,
    })
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&arguments.log).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let options = options(arguments)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::info!("stopping");
        };
        serve(options, shutdown).await?;
        Ok(())
    });
    // A thread that asks a silent name server, or a file system that hangs, is not waited for.
    runtime.shutdown_background();
    outcome
}
