//! `make bench`: the same jobs on the raw file, on qemu-nbd with one raw copy, and on Ashlar with three
//! replicas on three files of the same disk; then failover, idle cost and memory; then, with a cluster of its
//! own, the CSI driver under load.
//!
//! The targets take turns, job by job and round by round, so that a disk that changes its mood meets all
//! of them; the medians of the rounds are compared. All files are written in full before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use ashlar_bench::machine;

use crate::cluster::{Cluster, Server};
use crate::fio::{self, Running, Target};
use crate::matrix::{JOBS, Measurement, median};
use crate::report::{self, Medians, Row, limit_row, speed_rows, table};
use crate::series::{self, Phase};
use crate::{chart, csi, scale, snapshots};

const GIB: u64 = 1 << 30;
const MIB: f64 = 1_048_576.0;
const VOLUME: &str = "bench";
/// Volumes that are exported and not used, for the idle cost.
const IDLE_VOLUMES: usize = 50;
/// Small, since the pool's over-provisioning has a limit.
const IDLE_VOLUME_SIZE: &str = "64MiB";
/// Idle share of one core, in percent.
const IDLE_PERCENT_MAX: f64 = 2.0;
const STALL_DEATH_SECONDS_MAX: f64 = 0.5;
const STALL_SILENCE_SECONDS_MAX: f64 = 3.0;
const RESYNC_LIMIT: Duration = Duration::from_secs(60);

/// A higher load before the start gets a warning.
const LOAD_MAX: f64 = 0.7;

/// Of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Short runs on small files: shows that everything works, the numbers say little
    #[arg(long)]
    quick: bool,
    /// Where results and working files go
    #[arg(long, default_value = "bench/out")]
    out: PathBuf,
    /// Seconds per job and target [default: 8, quick: 3]
    #[arg(long)]
    seconds: Option<u64>,
    /// Rounds [default: 3, quick: 1]
    #[arg(long)]
    rounds: Option<u32>,
    /// Exit with 1 when a row falls short
    #[arg(long)]
    strict: bool,
    /// Only the raw file and qemu-nbd
    #[arg(long)]
    only_baselines: bool,
}

/// The plan after the defaults.
#[derive(Clone, Copy, Debug, Serialize)]
struct Plan {
    /// Of the machine before anything was started.
    load_average: f64,
    quick: bool,
    seconds: u64,
    rounds: u32,
    /// Of the raw file and of the volume.
    bytes: u64,
    disk_bytes: u64,
}

#[derive(Serialize)]
struct Results<'a> {
    machine: String,
    unix_time: u64,
    plan: Plan,
    rows: &'a [Row],
    medians: BTreeMap<&'static str, &'a Medians>,
    rounds: &'a BTreeMap<&'static str, Rounds>,
    /// The load on the CSI driver, unless only the baselines were measured.
    csi: Option<&'a csi::Report>,
    /// Likewise what snapshots and clones cost.
    snapshots: Option<&'a snapshots::Report>,
    /// What the metadata leader decides and keeps.
    scale: &'a scale::Report,
}

/// Every round of every job of one target.
type Rounds = BTreeMap<&'static str, Vec<Measurement>>;

/// Runs the measurements; true unless strict and a row falls short.
pub fn run(args: &RunArgs) -> Result<bool> {
    let plan = Plan {
        load_average: machine::load_average(),
        quick: args.quick,
        seconds: args.seconds.unwrap_or(if args.quick { 3 } else { 8 }),
        rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 3 }).max(1),
        bytes: if args.quick { GIB } else { 4 * GIB },
        disk_bytes: if args.quick { 4 * GIB } else { 6 * GIB },
    };
    let work = report::work_directory(&args.out)?;
    let out = args.out.canonicalize()?;
    let result = measure_all(args, plan, &out, &work);
    // Gigabytes that nobody needs afterwards.
    let _ = std::fs::remove_file(work.join("raw.img"));
    result
}

fn measure_all(args: &RunArgs, plan: Plan, out: &Path, work: &Path) -> Result<bool> {
    let sockets = tempfile::tempdir()?;
    println!(
        "{}; {} round(s) of {} s per job\n",
        machine::description(),
        plan.rounds,
        plan.seconds
    );
    if plan.load_average > LOAD_MAX {
        println!(
            "WARNING: others use this machine (load {:.1}): the numbers say little\n",
            plan.load_average
        );
    }
    let raw_path = work.join("raw.img");
    let raw = Target::File(raw_path.clone());
    precondition(work, "raw", &raw, plan.bytes)?;
    let (_qemu_server, qemu) = start_qemu_nbd(&raw_path, sockets.path(), work)?;
    let mut targets = vec![("raw", raw), ("qemu-nbd", qemu)];
    let mut ashlar = None;
    if !args.only_baselines {
        let bench = Ashlar::start(plan, sockets.path(), work)?;
        precondition(work, "ashlar", &bench.target, plan.bytes)?;
        targets.push(("ashlar", bench.target.clone()));
        ashlar = Some(bench);
    }
    let rounds = take_turns(&targets, plan, work)?;
    let medians: BTreeMap<&'static str, Medians> = rounds
        .iter()
        .map(|(name, jobs)| (*name, medians_of(jobs)))
        .collect();
    let empty = Medians::new();
    let of = |name: &str| medians.get(name).unwrap_or(&empty);
    let mut rows = speed_rows(of("raw"), of("qemu-nbd"), of("ashlar"));
    let mut csi_report = None;
    let mut snapshot_report = None;
    if let Some(bench) = ashlar {
        rows.extend(bench.further_rows(plan, sockets.path(), work)?);
        let measured = csi::measure(&csi::Size::of_bench(plan.quick), work)?;
        rows.extend(measured.rows());
        csi_report = Some(measured);
        let measured = snapshots::measure(&snapshots::Size::of_bench(plan.quick), work)?;
        rows.extend(measured.rows());
        snapshot_report = Some(measured);
    }
    let scale = scale::measure(scale::Size::of_bench(plan.quick))?;
    rows.extend(scale.rows());
    let further = (csi_report.as_ref(), snapshot_report.as_ref(), &scale);
    report(out, plan, &rows, &medians, &rounds, further)?;
    Ok(!args.strict || rows.iter().all(|r| r.passes))
}

fn medians_of(jobs: &Rounds) -> Medians {
    jobs.iter()
        .filter_map(|(id, rounds)| Some((*id, median(rounds)?)))
        .collect()
}

fn report(
    out: &Path,
    plan: Plan,
    rows: &[Row],
    medians: &BTreeMap<&'static str, Medians>,
    rounds: &BTreeMap<&'static str, Rounds>,
    (csi, snapshots, scale): (
        Option<&csi::Report>,
        Option<&snapshots::Report>,
        &scale::Report,
    ),
) -> Result<()> {
    let results = Results {
        machine: machine::description(),
        unix_time: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        plan,
        rows,
        medians: medians.iter().map(|(name, m)| (*name, m)).collect(),
        rounds,
        csi,
        snapshots,
        scale,
    };
    let json = out.join("bench.json");
    std::fs::write(&json, serde_json::to_string_pretty(&results)?)?;
    let svg = out.join("bench.svg");
    chart::draw(rows, &results.machine, &svg)?;
    println!("\n{}", table(rows));
    if let Some(csi) = csi {
        println!("{}", csi.table());
    }
    if let Some(snapshots) = snapshots {
        println!("{}", snapshots.table());
    }
    println!("{}", scale.table());
    let short = rows.iter().filter(|r| !r.passes).count();
    if short > 0 {
        println!("{short} of {} rows fall short.", rows.len());
    }
    if plan.load_average > LOAD_MAX {
        println!(
            "WARNING: others used the machine (load {:.1} at the start).",
            plan.load_average
        );
    }
    println!("Written: {}, {}", json.display(), svg.display());
    Ok(())
}

fn precondition(work: &Path, name: &str, target: &Target, bytes: u64) -> Result<()> {
    println!("writing all of {name}");
    let mut options = target.options();
    options.extend(
        [
            "--name=fill",
            "--rw=write",
            "--bs=1M",
            "--iodepth=8",
            "--refill_buffers",
        ]
        .map(str::to_owned),
    );
    options.push(format!("--size={bytes}"));
    fio::run(work, &format!("fill-{name}"), &options)?;
    // Some random overwriting: no target is measured fresh.
    let mut options = target.options();
    options.extend(
        [
            "--name=age",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--time_based",
            "--runtime=3",
            "--norandommap",
        ]
        .map(str::to_owned),
    );
    options.push(format!("--size={bytes}"));
    fio::run(work, &format!("age-{name}"), &options)?;
    Ok(())
}

fn start_qemu_nbd(file: &Path, sockets: &Path, work: &Path) -> Result<(Server, Target)> {
    let socket = sockets.join("qemu.sock");
    // The fastest of its modes with O_DIRECT on this class of machine (native; io_uring and threads were
    // slower).
    let arguments = [
        "--persistent".to_owned(),
        "--format=raw".into(),
        "--cache=none".into(),
        "--aio=native".into(),
        "--shared=8".into(),
        format!("--socket={}", socket.display()),
        "--export-name=raw".into(),
        file.display().to_string(),
    ];
    let program = Path::new("qemu-nbd");
    let mut server = Server::start(program, &arguments, &work.join("qemu-nbd.log"))
        .context("Debian: apt-get install qemu-utils")?;
    server.wait_nbd(&socket, Duration::from_secs(10))?;
    Ok((
        server,
        Target::Nbd {
            socket,
            export: "raw".into(),
        },
    ))
}

fn take_turns(
    targets: &[(&'static str, Target)],
    plan: Plan,
    work: &Path,
) -> Result<BTreeMap<&'static str, Rounds>> {
    let mut all: BTreeMap<&'static str, Rounds> = BTreeMap::new();
    for round in 1..=plan.rounds {
        for job in &JOBS {
            let mut line = format!("round {round}  {:<18}", job.id);
            for (name, target) in targets {
                let result = job
                    .measure(target, plan.bytes, plan.seconds, work)
                    .with_context(|| format!("{} on {name}", job.id))?;
                line += &format!(
                    "  {name}: {:.0} IOPS, {:.0} µs, {:.1} CPU µs",
                    result.iops, result.latency_us, result.cpu_us_per_op
                );
                all.entry(name)
                    .or_default()
                    .entry(job.id)
                    .or_default()
                    .push(result);
            }
            println!("{line}");
        }
    }
    Ok(all)
}

/// The cluster under test and its client.
struct Ashlar {
    // The client before the cluster: fields are dropped in this order.
    client: Server,
    cluster: Cluster,
    target: Target,
}

impl Ashlar {
    fn start(plan: Plan, sockets: &Path, work: &Path) -> Result<Self> {
        let disk_size = plan.disk_bytes.to_string();
        let options = [
            "--disk-size",
            &disk_size,
            "--preallocate",
            "--ready-timeout",
            "120",
        ];
        let cluster = Cluster::up(&work.join("cluster"), &options)?;
        cluster.ashlar(&["pool", "create", "main"])?;
        let size = plan.bytes.to_string();
        cluster.ashlar(&[
            "volume",
            "create",
            VOLUME,
            "--replicas",
            "3",
            "--size",
            &size,
        ])?;
        let socket = sockets.join("bench.sock");
        let exports = [(VOLUME.to_owned(), socket.clone())];
        let client = Server::nbd_client(&cluster, &exports, &work.join("nbd-client.log"))?;
        Ok(Self {
            client,
            cluster,
            target: Target::Nbd {
                socket,
                export: VOLUME.into(),
            },
        })
    }

    /// Memory after the jobs, failover, then what an idle cluster costs.
    fn further_rows(self, plan: Plan, sockets: &Path, work: &Path) -> Result<Vec<Row>> {
        let mut rows = self.memory_rows(plan)?;
        println!("failover");
        rows.extend(self.failover_rows(plan, work)?);
        println!("{IDLE_VOLUMES} idle volumes");
        rows.push(self.idle_row(plan, sockets, work)?);
        Ok(rows)
    }

    fn memory_rows(&self, plan: Plan) -> Result<Vec<Row>> {
        let largest = |pids: Vec<u32>| -> Result<f64> {
            let mut largest: f64 = 0.0;
            for pid in pids {
                largest = largest.max(machine::process_rss_bytes(pid)? as f64 / MIB);
            }
            Ok(largest)
        };
        let daemon = largest(self.cluster.pids("daemon-")?)?;
        let metadata = largest(self.cluster.pids("metadata-")?)?;
        let client = machine::process_rss_bytes(self.client.pid())? as f64 / MIB;
        // 256 MiB and 1 GiB per TiB stored on each disk.
        let daemon_max = 256.0 + plan.bytes as f64 / MIB / 1024.0;
        Ok(vec![
            limit_row(
                "rss-daemon",
                "memory of a storage daemon (largest)",
                "MiB",
                daemon,
                daemon_max,
            ),
            limit_row(
                "rss-client",
                "memory of nbd-client, 1 busy volume",
                "MiB",
                client,
                64.0 + 16.0,
            ),
            limit_row(
                "rss-metadata",
                "memory of a metadata member (largest)",
                "MiB",
                metadata,
                128.0,
            ),
        ])
    }

    fn failover_rows(&self, plan: Plan, work: &Path) -> Result<Vec<Row>> {
        let death = self.longest_stall(plan, work, "stall-death", |cluster| {
            cluster.ashlar(&["dev", "kill", "daemon-2"])?;
            std::thread::sleep(Duration::from_secs(3));
            cluster.ashlar(&["dev", "start", "daemon-2"])
        })?;
        let silence = self.longest_stall(plan, work, "stall-silence", |cluster| {
            cluster.ashlar(&["dev", "pause", "daemon-3"])?;
            std::thread::sleep(Duration::from_secs(4));
            cluster.ashlar(&["dev", "resume", "daemon-3"])
        })?;
        let (death_max, silence_max) = (STALL_DEATH_SECONDS_MAX, STALL_SILENCE_SECONDS_MAX);
        Ok(vec![
            limit_row(
                "stall-death",
                "longest stall, daemon killed",
                "s",
                death,
                death_max,
            ),
            limit_row(
                "stall-silence",
                "longest stall, daemon frozen",
                "s",
                silence,
                silence_max,
            ),
        ])
    }

    /// The longest latency of 4k writes while something happens to a daemon.
    fn longest_stall(
        &self,
        plan: Plan,
        work: &Path,
        name: &str,
        misfortune: impl FnOnce(&Cluster) -> Result<serde_json::Value>,
    ) -> Result<f64> {
        let mut options = self.target.options();
        options.extend(
            [
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=8",
                "--time_based",
                "--runtime=10",
                "--log_avg_msec=100",
                "--log_max_value=1",
                "--log_unix_epoch=1",
            ]
            .map(str::to_owned),
        );
        options.extend([
            format!("--name={name}"),
            format!("--size={}", plan.bytes),
            format!("--write_lat_log={name}"),
        ]);
        let load = Running::start(work, name, &options)?;
        std::thread::sleep(Duration::from_secs(3));
        misfortune(&self.cluster)?;
        let finished = load.finish()?;
        anyhow::ensure!(
            finished.success,
            "{name}: fio failed: {}",
            finished.messages
        );
        self.cluster.wait_redundant(VOLUME, RESYNC_LIMIT)?;
        let samples = series::read(&work.join(format!("{name}_lat.1.log")))?;
        Ok(series::longest(
            &samples,
            Phase {
                start_ms: 0,
                end_ms: u64::MAX,
            },
        ))
    }

    fn idle_row(self, plan: Plan, sockets: &Path, work: &Path) -> Result<Row> {
        let Self {
            client,
            mut cluster,
            ..
        } = self;
        drop(client);
        let mut exports = Vec::new();
        for n in 0..IDLE_VOLUMES {
            let name = format!("idle-{n}");
            cluster.ashlar(&["volume", "create", &name, "--size", IDLE_VOLUME_SIZE])?;
            exports.push((name, sockets.join(format!("{n}.sock"))));
        }
        let client = Server::nbd_client(&cluster, &exports, &work.join("nbd-client-idle.log"))?;
        let mut pids = cluster.pids("")?;
        pids.push(client.pid());
        // Opening has its aftermath (write-back, watches); then it is idle.
        std::thread::sleep(Duration::from_secs(5));
        let seconds = if plan.quick { 5 } else { 20 };
        cluster.discard_data();
        let percent = 100.0 * machine::share_of_core(&pids, Duration::from_secs(seconds))?;
        Ok(limit_row(
            "idle-cpu",
            "idle cluster, 50 exported volumes",
            "% core",
            percent,
            IDLE_PERCENT_MAX,
        ))
    }
}
