//! The CSI driver under load: a real `csi-driver --mode controller` on a real cluster, asked by many at a time.
//!
//! Invariants: the bar is held against all requests of all rounds, the first ones on a fresh cluster among them;
//! a round counts only if nothing of its volumes is left afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use ashlar_bench::csi_inventory::{Inventory, register_nodes};
use ashlar_bench::csi_load::{Latency, Load, Plan, Samples};
use ashlar_bench::machine;
use clap::Args;
use serde::Serialize;

use crate::cluster::{Cluster, Server};
use crate::report::{self, Row, limit_row, number, table};

/// CreateVolume must be this fast, in milliseconds.
const CREATE_P99_MS_MAX: f64 = 100.0;
/// Thin: only promised, so they count against the pool's over-provisioning and not against the disk.
const VOLUME_BYTES: i64 = 16 << 20;
/// Room for the promises of 1,000 volumes, ten times over-provisioned, and more.
const DISK_SIZE: &str = "4GiB";
/// Entries of a page of ListVolumes.
const PAGE: usize = 100;
/// Nodes without a storage daemon, beside the three that have one.
const WORKERS: usize = 5;
/// Time for the daemons to free what was deleted.
const RESTORED_LIMIT: Duration = Duration::from_secs(60);
const MIB: f64 = 1_048_576.0;

/// Of `csi`.
#[derive(Args, Debug)]
pub struct CsiArgs {
    /// Where results and working files go
    #[arg(long, default_value = "bench/out")]
    out: PathBuf,
    /// Volumes of each round
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..=2000))]
    volumes: u16,
    /// Requests under way at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    in_flight: u16,
    /// Rounds
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// Exit with 1 when a row falls short
    #[arg(long)]
    strict: bool,
}

/// How large the load is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    volumes: usize,
    in_flight: usize,
    rounds: usize,
}

impl Size {
    /// The one of `make bench`.
    pub fn of_bench(quick: bool) -> Self {
        Self {
            volumes: 1000,
            in_flight: 32,
            rounds: if quick { 1 } else { 3 },
        }
    }
}

/// What a process costs.
#[derive(Clone, Copy, Debug, Serialize)]
struct Cost {
    rss_mib: f64,
    descriptors: usize,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    size: Size,
    /// By request, over all rounds.
    latencies: BTreeMap<&'static str, Latency>,
    /// CreateVolume's 99th percentile of each round.
    create_p99_ms: Vec<f64>,
    /// Seconds until nothing was left, after each round.
    restored_seconds: Vec<f64>,
    /// By process, at the start and after each round.
    costs: BTreeMap<String, Vec<Cost>>,
}

impl Report {
    /// The rows with a bar.
    pub fn rows(&self) -> Vec<Row> {
        let create = self.latencies.get(CREATE).map_or(f64::NAN, |l| l.p99_ms);
        let Size {
            volumes, in_flight, ..
        } = self.size;
        let title = format!(
            "CSI CreateVolume p99 ({} volumes, {in_flight} in flight)",
            thousands(volumes)
        );
        vec![limit_row(
            "csi-create-p99",
            title,
            "ms",
            create,
            CREATE_P99_MS_MAX,
        )]
    }

    /// All of it, for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<30} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
            "CSI request (times in ms)", "requests", "per s", "p50", "p90", "p99", "slowest"
        );
        for (name, l) in &self.latencies {
            text += &format!(
                "{name:<30} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
                l.requests,
                number(l.per_second),
                number(l.p50_ms),
                number(l.p90_ms),
                number(l.p99_ms),
                number(l.max_ms)
            );
        }
        text += "after each round nothing was left of its volumes, in metadata or on a disk\n";
        for (name, costs) in &self.costs {
            let shown: Vec<String> = costs
                .iter()
                .map(|c| format!("{} MiB, {} fds", number(c.rss_mib), c.descriptors))
                .collect();
            text += &format!("{name:<14} {}\n", shown.join("  >  "));
        }
        text
    }
}

fn thousands(value: usize) -> String {
    match value / 1000 {
        0 => value.to_string(),
        thousands => format!("{thousands},{:03}", value % 1000),
    }
}

const CREATE: &str = "CreateVolume";

/// Only this load; true unless strict and a row falls short.
pub fn run(args: &CsiArgs) -> Result<bool> {
    let work = report::begin(&args.out)?;
    let size = Size {
        volumes: args.volumes.into(),
        in_flight: args.in_flight.into(),
        rounds: args.rounds.into(),
    };
    let report = measure(&size, &work)?;
    let rows = report.rows();
    let json = args.out.join("csi.json");
    std::fs::write(&json, serde_json::to_string_pretty(&report)?)?;
    println!("\n{}\n{}", table(&rows), report.table());
    println!("CreateVolume p99 by round: {:.1?} ms", report.create_p99_ms);
    println!("Written: {}", json.display());
    Ok(!args.strict || rows.iter().all(|r| r.passes))
}

/// Starts a cluster and a driver, and asks it.
pub fn measure(size: &Size, work: &Path) -> Result<Report> {
    println!(
        "CSI: {} round(s) of {} volumes, {} in flight",
        size.rounds, size.volumes, size.in_flight
    );
    let mut cluster = Cluster::up(&work.join("csi-cluster"), &["--disk-size", DISK_SIZE])?;
    cluster.ashlar(&["pool", "create", "main"])?;
    let sockets = tempfile::tempdir()?;
    let socket = sockets.path().join("csi.sock");
    let driver = Server::csi_controller(&cluster, &socket, &work.join("csi-driver.log"))?;
    let report = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(rounds(size, &cluster, &driver, &socket))
        .context("the load on the CSI driver")?;
    drop(driver);
    cluster.discard_data();
    Ok(report)
}

async fn rounds(size: &Size, cluster: &Cluster, driver: &Server, socket: &Path) -> Result<Report> {
    let workers: Vec<String> = (1..=WORKERS).map(|n| format!("worker-{n}")).collect();
    register_nodes(&cluster.metadata, &workers).await?;
    let daemons = (1..=3).map(|n| format!("node-{n}"));
    let plan = Plan {
        volumes: size.volumes,
        in_flight: size.in_flight,
        size_bytes: VOLUME_BYTES,
        nodes: daemons.chain(workers).collect(),
        page_size: PAGE,
        prefix: "load".into(),
    };
    let mut load = Load::connect(socket, plan).await?;
    let before = Inventory::take(&cluster.metadata).await?;
    let mut all: BTreeMap<&'static str, Samples> = BTreeMap::new();
    let mut report = Report {
        size: *size,
        latencies: BTreeMap::new(),
        create_p99_ms: Vec::new(),
        restored_seconds: Vec::new(),
        costs: BTreeMap::new(),
    };
    let mut processes = vec![("csi-driver".to_owned(), driver.pid())];
    for kind in ["metadata-", "daemon-"] {
        let pids = cluster.pids(kind)?;
        processes.extend(
            pids.iter()
                .zip(1..)
                .map(|(p, n)| (format!("{kind}{n}"), *p)),
        );
    }
    report.weigh(&processes)?;
    for round in 1..=size.rounds {
        let created = load.create().await?;
        report.create_p99_ms.push(created.latency().p99_ms);
        let published = load.publish().await?;
        let listed = load.list(true).await?;
        let unpublished = load.unpublish().await?;
        let deleted = load.delete().await?;
        let restored = before
            .wait_restored(&cluster.metadata, RESTORED_LIMIT)
            .await?;
        report.restored_seconds.push(restored.as_secs_f64());
        report.weigh(&processes)?;
        println!("round {round}: CreateVolume {:?}", created.latency());
        for (name, samples) in [
            (CREATE, created),
            ("ControllerPublishVolume", published),
            ("ListVolumes (pages of 100)", listed),
            ("ControllerUnpublishVolume", unpublished),
            ("DeleteVolume", deleted),
        ] {
            all.entry(name).or_default().extend(&samples);
        }
    }
    report.latencies = all.iter().map(|(name, s)| (*name, s.latency())).collect();
    Ok(report)
}

impl Report {
    fn weigh(&mut self, processes: &[(String, u32)]) -> Result<()> {
        for (name, pid) in processes {
            let cost = Cost {
                rss_mib: machine::process_rss_bytes(*pid)? as f64 / MIB,
                descriptors: machine::process_descriptors(*pid)?,
            };
            self.costs.entry(name.clone()).or_default().push(cost);
        }
        Ok(())
    }
}
