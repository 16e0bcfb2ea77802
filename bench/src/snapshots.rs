//! What snapshots and clones cost: how long it takes to make them, and what they do to the head's reads and writes.
//!
//! Invariants:
//! - Times are those of the requests to the metadata cluster, by a client that is connected already.
//! - "Before" and "after" take turns on one volume; their medians are compared.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use clap::Args;
use serde::Serialize;
use tonic::transport::{Channel, Endpoint};

use crate::cluster::{Cluster, Server};
use crate::fio::{self, Running, Target};
use crate::report::{self, Row, floor_row, limit_row, number, table};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Bytes of a volume that the load is on.
const HOT_BYTES: u64 = GIB;
/// Making a snapshot must be this fast, in milliseconds (99th percentile).
const CREATE_P99_MS_MAX: f64 = 20.0;
/// And a clone of 100 GiB.
const CLONE_MS_MAX: f64 = 100.0;
/// Writes after a snapshot, of those before it.
const WRITES_AFTER_MIN: f64 = 0.8;
/// Reads likewise.
const READS_AFTER_MIN: f64 = 0.95;
/// With many snapshots.
const MANY_MIN: f64 = 0.9;
const MANY: usize = 500;
/// Pause between snapshots under load.
const PAUSE: Duration = Duration::from_millis(60);
/// After it what was written is home: an idle store begins after 2 s.
const SETTLES: Duration = Duration::from_secs(6);
const GONE_LIMIT: Duration = Duration::from_secs(120);

/// Of `snapshots`.
#[derive(Args, Debug)]
pub struct SnapshotArgs {
    /// Where results and working files go
    #[arg(long, default_value = "bench/out")]
    out: PathBuf,
    /// Short runs
    #[arg(long)]
    quick: bool,
    /// Exit with 1 when a row falls short
    #[arg(long)]
    strict: bool,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    seconds: u64,
    rounds: usize,
    snapshots: usize,
    clones: usize,
}

impl Size {
    /// The one of `make bench`.
    pub fn of_bench(quick: bool) -> Self {
        if quick {
            Self {
                seconds: 3,
                rounds: 2,
                snapshots: 60,
                clones: 10,
            }
        } else {
            Self {
                seconds: 6,
                rounds: 3,
                snapshots: 200,
                clones: 20,
            }
        }
    }
}

/// What was measured.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Milliseconds of CreateSnapshots under load, ascending: of a volume of 1 TiB and one of 1 GiB.
    create_ms: [Vec<f64>; 2],
    /// Milliseconds of CreateVolume from a snapshot, ascending.
    clone_ms: Vec<f64>,
    /// IOPS of each round: before and after a snapshot.
    writes: Vec<[f64; 2]>,
    reads: Vec<[f64; 2]>,
    /// With no snapshot and with [`MANY`].
    many_writes: Vec<[f64; 2]>,
    many_reads: Vec<[f64; 2]>,
}

fn percentile(sorted: &[f64], of: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * of).ceil() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// The medians of both sides.
fn medians(rounds: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|side| {
        let mut values: Vec<f64> = rounds.iter().map(|r| r[side]).collect();
        values.sort_by(f64::total_cmp);
        percentile(&values, 0.5)
    })
}

impl Report {
    /// The rows with a bar.
    pub fn rows(&self) -> Vec<Row> {
        let create = |id, title, index: usize| {
            let p99 = percentile(&self.create_ms[index], 0.99);
            limit_row(id, title, "ms", p99, CREATE_P99_MS_MAX)
        };
        let kept = |id, title, rounds: &[[f64; 2]], least| {
            let [before, after] = medians(rounds);
            floor_row(id, title, "of before", after / before, least)
        };
        vec![
            create(
                "snapshot-1t-p99",
                "snapshot of 1 TiB under 4k writes, depth 32, p99",
                0,
            ),
            create(
                "snapshot-1g-p99",
                "snapshot of 1 GiB under 4k writes, depth 32, p99",
                1,
            ),
            limit_row(
                "clone-100g",
                "clone of a written volume of 100 GiB, slowest",
                "ms",
                percentile(&self.clone_ms, 1.0),
                CLONE_MS_MAX,
            ),
            kept(
                "snapshot-writes",
                "4k random writes after a snapshot",
                &self.writes,
                WRITES_AFTER_MIN,
            ),
            kept(
                "snapshot-reads",
                "4k random reads after a snapshot",
                &self.reads,
                READS_AFTER_MIN,
            ),
            kept(
                "snapshots-500-writes",
                "4k random writes with 500 snapshots",
                &self.many_writes,
                MANY_MIN,
            ),
            kept(
                "snapshots-500-reads",
                "4k random reads with 500 snapshots",
                &self.many_reads,
                MANY_MIN,
            ),
        ]
    }

    /// All of it, for people.
    pub fn table(&self) -> String {
        let times = |name: &str, ms: &[f64]| {
            let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|of| number(percentile(ms, of)));
            format!(
                "{name:<34} {:>6}  p50 {p50}  p90 {p90}  p99 {p99}  slowest {max}\n",
                ms.len()
            )
        };
        let rates = |name: &str, rounds: &[[f64; 2]]| {
            let shown: Vec<String> = rounds
                .iter()
                .map(|[a, b]| format!("{} > {}", number(*a), number(*b)))
                .collect();
            format!("{name:<34} {}\n", shown.join(", "))
        };
        times("snapshot of 1 TiB (ms)", &self.create_ms[0])
            + &times("snapshot of 1 GiB (ms)", &self.create_ms[1])
            + &times("clone of 100 GiB (ms)", &self.clone_ms)
            + &rates("writes, before > after (IOPS)", &self.writes)
            + &rates("reads, before > after (IOPS)", &self.reads)
            + &rates("writes, with 500 snapshots", &self.many_writes)
            + &rates("reads, with 500 snapshots", &self.many_reads)
    }
}

/// Only this; true unless strict and a row falls short.
pub fn run(args: &SnapshotArgs) -> Result<bool> {
    let work = report::begin(&args.out)?;
    let report = measure(&Size::of_bench(args.quick), &work)?;
    let rows = report.rows();
    let json = args.out.join("snapshots.json");
    std::fs::write(&json, serde_json::to_string_pretty(&report)?)?;
    println!("\n{}\n{}", table(&rows), report.table());
    println!("Written: {}", json.display());
    Ok(!args.strict || rows.iter().all(|r| r.passes))
}

/// A cluster with volumes and their exports, and a client of its metadata.
struct Bench<'a> {
    size: &'a Size,
    work: &'a Path,
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    client: MetadataClient<Channel>,
    count: usize,
}

/// One volume and what is done to it.
struct Volume {
    id: Vec<u8>,
    target: Target,
    // Fields are dropped in this order: the server last.
    _server: Server,
}

/// All of it, on a cluster of its own.
pub fn measure(size: &Size, work: &Path) -> Result<Report> {
    println!("snapshots and clones");
    let sockets = tempfile::tempdir()?;
    let options = [
        "--disk-size",
        "12GiB",
        "--preallocate",
        "--ready-timeout",
        "120",
    ];
    let cluster = Cluster::up(&work.join("cluster"), &options)?;
    cluster.ashlar(&["pool", "create", "main", "--overprovision", "100000"])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let first = cluster.metadata.split(',').next().unwrap_or_default();
    let endpoint = Endpoint::from_shared(format!("http://{first}"))?;
    let channel = runtime.block_on(endpoint.connect())?;
    let mut bench = Bench {
        size,
        work,
        cluster,
        runtime,
        client: MetadataClient::new(channel),
        count: 0,
    };
    let mut report = Report::default();
    println!("  clones of 100 GiB");
    bench.clones(sockets.path(), &mut report)?;
    for (index, (name, bytes)) in [("big", 1024 * GIB), ("small", GIB)].iter().enumerate() {
        println!("  snapshots of {} GiB", bytes / GIB);
        let volume = bench.volume(sockets.path(), name, *bytes)?;
        bench.fill(&volume)?;
        report.create_ms[index] = bench.under_load(&volume)?;
        if index == 1 {
            bench.before_and_after(&volume, &mut report)?;
        }
        drop(volume);
        bench.cluster.ashlar(&["volume", "delete", name, "--yes"])?;
    }
    println!("  {MANY} snapshots of one volume");
    bench.many(sockets.path(), &mut report)?;
    bench.cluster.discard_data();
    Ok(report)
}

impl Bench<'_> {
    fn volume(&self, sockets: &Path, name: &str, bytes: u64) -> Result<Volume> {
        let size = bytes.to_string();
        let made =
            self.cluster
                .ashlar(&["volume", "create", name, "--replicas", "3", "--size", &size])?;
        let id = made["id"].as_str().context("volume create")?;
        let id = parse_id(id)?;
        let socket = sockets.join(format!("{name}.sock"));
        let exports = [(name.to_owned(), socket.clone())];
        let log = self.work.join(format!("nbd-client-{name}.log"));
        let server = Server::nbd_client(&self.cluster, &exports, &log)?;
        let target = Target::Nbd {
            socket,
            export: name.to_owned(),
        };
        Ok(Volume {
            id,
            target,
            _server: server,
        })
    }

    fn options(target: &Target, rw: &str, rest: &[String]) -> Vec<String> {
        let mut options = target.options();
        options.push(format!("--name={rw}"));
        options.push(format!("--rw={rw}"));
        options.extend_from_slice(rest);
        options
    }

    fn fill(&self, volume: &Volume) -> Result<()> {
        let rest = [
            "--bs=1M".to_owned(),
            "--iodepth=8".into(),
            format!("--size={HOT_BYTES}"),
        ];
        fio::run(
            self.work,
            "fill",
            &Self::options(&volume.target, "write", &rest),
        )?;
        Ok(())
    }

    fn load(seconds: u64) -> [String; 6] {
        [
            "--bs=4k".into(),
            "--iodepth=32".into(),
            "--time_based".into(),
            "--norandommap".into(),
            format!("--runtime={seconds}"),
            format!("--size={HOT_BYTES}"),
        ]
    }

    fn iops(&self, volume: &Volume, rw: &str) -> Result<f64> {
        let options = Self::options(&volume.target, rw, &Self::load(self.size.seconds));
        let jobs = fio::run(self.work, rw, &options)?;
        let job = jobs.first().context("fio reported no job")?;
        let iops = if rw == "randread" {
            job.read.iops
        } else {
            job.write.iops
        };
        ensure!(iops > 0.0, "{rw}: nothing was done");
        Ok(iops)
    }

    /// Takes a snapshot; its identity, and how long it took in milliseconds.
    fn snapshot(&mut self, volume: &[u8]) -> Result<(Vec<u8>, f64)> {
        self.count += 1;
        let request = pb::CreateSnapshotsRequest {
            request_id: format!("{:016}", self.count).into_bytes(),
            items: vec![pb::CreateSnapshotItem {
                name: format!("s{}", self.count),
                volume_id: volume.to_vec(),
                labels: Default::default(),
            }],
            group_name: String::new(),
        };
        let began = Instant::now();
        let answer = self
            .runtime
            .block_on(self.client.create_snapshots(request))?;
        let took = began.elapsed().as_secs_f64() * 1e3;
        let snapshots = answer.into_inner().snapshots;
        let snapshot = snapshots.into_iter().next().context("no snapshot")?;
        Ok((snapshot.snapshot_id, took))
    }

    fn delete(&mut self, snapshots: Vec<Vec<u8>>) -> Result<()> {
        self.count += 1;
        let request = pb::DeleteSnapshotsRequest {
            request_id: format!("{:016}", self.count).into_bytes(),
            snapshot_ids: snapshots,
        };
        self.runtime
            .block_on(self.client.delete_snapshots(request))?;
        Ok(())
    }

    fn wait_gone(&self) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < GONE_LIMIT {
            let left = self.cluster.ashlar(&["snapshot", "list"])?;
            if left.as_array().is_some_and(Vec::is_empty) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        anyhow::bail!("deleted snapshots are still there after {GONE_LIMIT:?}")
    }

    /// Snapshots of a volume that is written at depth 32; their times, ascending.
    fn under_load(&mut self, volume: &Volume) -> Result<Vec<f64>> {
        let load = Self::options(&volume.target, "randwrite", &Self::load(3600));
        let mut fio = Running::start(self.work, "load", &load)?;
        std::thread::sleep(Duration::from_secs(1));
        let mut times = Vec::new();
        for _ in 0..self.size.snapshots {
            let (id, took) = self.snapshot(&volume.id)?;
            times.push(took);
            self.delete(vec![id])?;
            std::thread::sleep(PAUSE);
            ensure!(!fio.has_ended()?, "fio ended under snapshots");
        }
        drop(fio);
        self.wait_gone()?;
        times.sort_by(f64::total_cmp);
        Ok(times)
    }

    /// Brings the volume to where write-back goes on all the time, as it does under lasting load.
    fn warm(&self, volume: &Volume) -> Result<()> {
        self.iops(volume, "randwrite")?;
        Ok(())
    }

    /// Reads while everything is home.
    fn settled_reads(&self, volume: &Volume) -> Result<f64> {
        std::thread::sleep(SETTLES);
        self.iops(volume, "randread")
    }

    fn before_and_after(&mut self, volume: &Volume, report: &mut Report) -> Result<()> {
        for _ in 0..self.size.rounds {
            self.warm(volume)?;
            let before = self.iops(volume, "randwrite")?;
            let (id, _) = self.snapshot(&volume.id)?;
            let after = self.iops(volume, "randwrite")?;
            report.writes.push([before, after]);
            self.delete(vec![id])?;
            self.wait_gone()?;
            // Reads of a head of which half lies in another layer.
            let before = self.settled_reads(volume)?;
            let (id, _) = self.snapshot(&volume.id)?;
            self.warm(volume)?;
            let after = self.settled_reads(volume)?;
            report.reads.push([before, after]);
            self.delete(vec![id])?;
            self.wait_gone()?;
        }
        Ok(())
    }

    /// Many snapshots, with some writes between any two.
    fn many(&mut self, sockets: &Path, report: &mut Report) -> Result<()> {
        let volume = self.volume(sockets, "many", GIB)?;
        self.fill(&volume)?;
        let mut before = Vec::new();
        for _ in 0..self.size.rounds {
            self.warm(&volume)?;
            before.push([
                self.iops(&volume, "randwrite")?,
                self.settled_reads(&volume)?,
            ]);
        }
        let mut load = Self::options(&volume.target, "randwrite", &Self::load(3600));
        load.push("--rate_iops=400".to_owned());
        let fio = Running::start(self.work, "slow", &load)?;
        for _ in 0..MANY {
            self.snapshot(&volume.id)?;
        }
        drop(fio);
        for [writes, reads] in before {
            self.warm(&volume)?;
            let now = [
                self.iops(&volume, "randwrite")?,
                self.settled_reads(&volume)?,
            ];
            report.many_writes.push([writes, now[0]]);
            report.many_reads.push([reads, now[1]]);
        }
        Ok(())
    }

    /// Clones of a volume of 100 GiB with something in every chunk.
    fn clones(&mut self, sockets: &Path, report: &mut Report) -> Result<()> {
        let volume = self.volume(sockets, "origin", 100 * GIB)?;
        let skip = 4 * MIB - 4096;
        let rest = [
            "--bs=4k".to_owned(),
            "--iodepth=32".into(),
            format!("--size={}", 100 * GIB),
            // Without it fio begins again until it has written the size.
            format!("--io_size={}", 100 * GIB / (4 * MIB) * 4096),
        ];
        let mut options = Self::options(&volume.target, "write", &rest);
        options.retain(|o| !o.starts_with("--rw="));
        options.push(format!("--rw=write:{}", skip));
        fio::run(self.work, "sparse", &options)?;
        let (snapshot, _) = self.snapshot(&volume.id)?;
        for i in 0..self.size.clones {
            self.count += 1;
            let request = pb::CreateVolumeRequest {
                request_id: format!("{:016}", self.count).into_bytes(),
                name: format!("clone-{i}"),
                source: Some(pb::create_volume_request::Source::SnapshotId(
                    snapshot.clone(),
                )),
                ..pb::CreateVolumeRequest::default()
            };
            let began = Instant::now();
            self.runtime.block_on(self.client.create_volume(request))?;
            report.clone_ms.push(began.elapsed().as_secs_f64() * 1e3);
        }
        report.clone_ms.sort_by(f64::total_cmp);
        drop(volume);
        for i in 0..self.size.clones {
            let name = format!("clone-{i}");
            self.cluster.ashlar(&["volume", "delete", &name, "--yes"])?;
        }
        let named = format!("s{}", self.count - self.size.clones);
        self.cluster
            .ashlar(&["snapshot", "delete", &named, "--yes"])?;
        self.cluster
            .ashlar(&["volume", "delete", "origin", "--yes"])?;
        Ok(())
    }
}

/// Bytes of an identity as it is printed.
fn parse_id(text: &str) -> Result<Vec<u8>> {
    let digits: Vec<char> = text.chars().filter(|c| *c != '-').collect();
    ensure!(digits.len() == 32, "{text} is no identity");
    let bytes = digits.chunks(2).map(|pair| {
        let pair: String = pair.iter().collect();
        u8::from_str_radix(&pair, 16)
    });
    bytes.collect::<Result<_, _>>().context("an identity")
}
