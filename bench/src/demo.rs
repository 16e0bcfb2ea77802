//! `make demo`: a replicated volume serves fio, with verification, while its machines die.
//!
//! Two fios run at once on different parts of the volume, which was filled before:
//! - the *ledger* writes each of its blocks once, evenly over the whole time, and in the end reads all of
//!   them back with their sequence numbers: what was acknowledged before, during or after a failure must
//!   be there. Every one of its latencies is logged, so it sees each stall;
//! - the *load* writes 4 KiB blocks at random at depth 32 as fast as it can and verifies as it goes.
//!
//! In the end the whole volume is read and verified once more.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;

use crate::cluster::{Cluster, Server};
use crate::fio::{self, Finished, Running, Target};
use crate::series::{self, Phase, Sample};

const MIB: u64 = 1 << 20;
/// The volume.
const VOLUME_BYTES: u64 = 1024 * MIB;
/// Part of the volume that the ledger writes.
const LEDGER_BYTES: u64 = 64 * MIB;
/// Part that the load writes, behind the ledger's.
const LOAD_BYTES: u64 = 256 * MIB;
const BLOCK_BYTES: u64 = 4096;
/// How long the daemon stays dead.
const OUTAGE: Duration = Duration::from_secs(7);
/// The metadata leader dies so long after the daemon.
const LEADER_AFTER: Duration = Duration::from_secs(3);
/// How long the other daemon is frozen.
const FREEZE: Duration = Duration::from_secs(4);
/// Longest time for a resync.
const RESYNC_LIMIT: Duration = Duration::from_secs(40);
/// Bars of DESIGN, section 4.
const STALL_DEATH_SECONDS_MAX: f64 = 0.5;
const STALL_SILENCE_SECONDS_MAX: f64 = 3.0;
/// A resync that moves more than this share of the volume is no delta.
const DELTA_SHARE_MAX: f64 = 0.5;
/// All of it, without the build.
const TOTAL_SECONDS_MAX: f64 = 90.0;

const VOLUME: &str = "demo";
const KILLED: u32 = 2;
const FROZEN: u32 = 3;

/// Of `demo`.
#[derive(Args, Debug)]
pub struct DemoArgs {
    /// Where the cluster and the logs go
    #[arg(long, default_value = "target/ashlar-demo")]
    directory: PathBuf,
    /// How long the load runs, in seconds
    #[arg(long, default_value_t = 40)]
    seconds: u64,
    /// Leave the cluster's data behind, to look at them (as is done when something fails)
    #[arg(long)]
    keep: bool,
    /// Write the summary as JSON, too
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One thing that must hold.
#[derive(Serialize, Debug)]
struct Check {
    name: String,
    value: String,
    bar: String,
    holds: bool,
}

/// Throughput of the load in a phase.
#[derive(Serialize, Debug)]
struct Throughput {
    phase: &'static str,
    seconds: f64,
    write_iops: f64,
    write_mib_per_second: f64,
}

#[derive(Serialize, Debug)]
struct Summary {
    throughput: Vec<Throughput>,
    checks: Vec<Check>,
    seconds: f64,
    holds: bool,
}

/// When what happened.
struct Timeline {
    before: Phase,
    death: Phase,
    silence: Phase,
    after: Phase,
    blocks_after_death: u64,
    blocks_after_silence: u64,
}

/// Runs the demonstration; true if everything holds.
pub fn run(args: &DemoArgs) -> Result<bool> {
    let start = Instant::now();
    std::fs::create_dir_all(&args.directory)?;
    let directory = args.directory.canonicalize()?;
    let sockets = tempfile::tempdir()?;
    let socket = sockets.path().join("demo.sock");

    say(start, "starting 3 metadata members and 3 storage daemons");
    let mut cluster = Cluster::up(&directory.join("cluster"), &["--disk-size", "3GiB"])?;
    cluster.ashlar(&["pool", "create", "main"])?;
    let size = VOLUME_BYTES.to_string();
    cluster.ashlar(&[
        "volume",
        "create",
        VOLUME,
        "--pool",
        "main",
        "--replicas",
        "3",
        "--size",
        &size,
    ])?;
    let exports = [(VOLUME.to_owned(), socket.clone())];
    let client = Server::nbd_client(&cluster, &exports, &directory.join("nbd-client.log"))?;
    let target = Target::Nbd {
        socket,
        export: VOLUME.to_owned(),
    };
    say(
        start,
        &format!(
            "volume {VOLUME} (1 GiB, 3 replicas) is served at {}",
            target.uri()
        ),
    );

    fill(&directory, &target)?;
    say(start, "filled; now fio writes and verifies");
    let mut load = Running::start(&directory, "load", &load_options(&target, args.seconds))?;
    let ledger = Running::start(&directory, "ledger", &ledger_options(&target, args.seconds))?;
    let load_end = Instant::now() + Duration::from_secs(args.seconds);
    let timeline = misfortunes(start, &cluster, load_end, &mut load)?;
    let load = load.finish()?;
    let ledger = ledger.finish()?;
    say(
        start,
        "fio is done; the whole volume is read and verified once more",
    );
    let last = Running::start(&directory, "verify", &verify_options(&target))?.finish()?;
    let (in_sync, total) = cluster.redundancy(VOLUME)?;
    drop(client);
    // Stopped before the time is taken; started again never.
    cluster.ashlar(&["dev", "down"])?;

    let mut summary = summarise(&directory, &timeline, &load, &ledger, &last)?;
    summary.checks.push(Check {
        name: "replicas in sync at the end".into(),
        value: format!("{in_sync} of {total}"),
        bar: "all 3".into(),
        holds: in_sync == total && total == 3,
    });
    summary.seconds = start.elapsed().as_secs_f64();
    summary.checks.push(Check {
        name: "time for everything".into(),
        value: format!("{:.1} s", summary.seconds),
        bar: format!("< {TOTAL_SECONDS_MAX} s"),
        holds: summary.seconds < TOTAL_SECONDS_MAX,
    });
    summary.holds = summary.checks.iter().all(|c| c.holds);
    if summary.holds && !args.keep {
        cluster.discard_data();
    }
    print(&summary, &directory);
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&summary)?)?;
    }
    Ok(summary.holds)
}

fn say(start: Instant, text: &str) {
    println!("[{:5.1} s] {text}", start.elapsed().as_secs_f64());
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64
}

fn options(target: &Target, own: &[&str]) -> Vec<String> {
    let mut options = target.options();
    // Every 4 KiB carry a header of their own, so that each part can be verified by any job.
    options.extend([
        "--verify=crc32c".to_owned(),
        format!("--verify_interval={BLOCK_BYTES}"),
    ]);
    options.extend(own.iter().map(|o| (*o).to_owned()));
    options
}

fn fill(directory: &Path, target: &Target) -> Result<()> {
    let size = format!("--size={VOLUME_BYTES}");
    let own = [
        "--name=fill",
        "--rw=write",
        "--bs=1M",
        "--iodepth=8",
        "--do_verify=0",
        &size,
    ];
    fio::run(directory, "fill", &options(target, &own)).map(|_| ())
}

fn load_options(target: &Target, seconds: u64) -> Vec<String> {
    let mut own = options(
        target,
        &[
            "--name=load",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            "--time_based",
            "--verify_backlog=1024",
            "--verify_fatal=0",
            "--continue_on_error=verify",
            "--log_avg_msec=100",
            "--log_max_value=1",
            "--log_unix_epoch=1",
            "--write_lat_log=load",
            "--write_iops_log=load",
        ],
    );
    own.extend([
        format!("--offset={LEDGER_BYTES}"),
        format!("--size={LOAD_BYTES}"),
        format!("--runtime={seconds}"),
    ]);
    own
}

fn ledger_options(target: &Target, seconds: u64) -> Vec<String> {
    let rate = (LEDGER_BYTES / BLOCK_BYTES / seconds.max(1)).max(1);
    let mut own = options(
        target,
        &[
            "--name=ledger",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=4",
            "--verify_fatal=0",
            "--continue_on_error=verify",
            "--log_unix_epoch=1",
            "--write_lat_log=ledger",
        ],
    );
    own.extend([
        format!("--size={LEDGER_BYTES}"),
        format!("--rate_iops={rate}"),
    ]);
    own
}

fn verify_options(target: &Target) -> Vec<String> {
    let size = format!("--size={VOLUME_BYTES}");
    let own = [
        "--name=verify",
        "--rw=read",
        "--bs=1M",
        "--iodepth=8",
        "--verify_fatal=0",
        "--continue_on_error=verify",
        &size,
    ];
    options(target, &own)
}

/// Kills, freezes and restarts, while the load runs.
fn misfortunes(
    start: Instant,
    cluster: &Cluster,
    load_end: Instant,
    load: &mut Running,
) -> Result<Timeline> {
    let begin_ms = now_ms() + 1000;
    std::thread::sleep(Duration::from_secs(6));
    if load.has_ended()? {
        bail!("fio ended before anything was killed: see load.messages in the demo's directory");
    }
    let (daemon, node) = (format!("daemon-{KILLED}"), format!("node-{KILLED}"));
    let before = Phase {
        start_ms: begin_ms,
        end_ms: now_ms(),
    };
    say(start, &format!("kill -9 {daemon}"));
    let death_ms = now_ms();
    cluster.ashlar(&["dev", "kill", &daemon])?;
    std::thread::sleep(LEADER_AFTER);
    let leader = cluster.leader()?;
    say(
        start,
        &format!("kill -9 {leader}, which leads the metadata"),
    );
    cluster.ashlar(&["dev", "kill", &leader])?;
    std::thread::sleep(OUTAGE.saturating_sub(LEADER_AFTER));
    say(start, &format!("starting {daemon} and {leader} again"));
    cluster.ashlar(&["dev", "start", &daemon])?;
    cluster.ashlar(&["dev", "start", &leader])?;
    wait_noticed(cluster)?;
    let took = cluster.wait_redundant(VOLUME, RESYNC_LIMIT)?;
    let death = Phase {
        start_ms: death_ms,
        end_ms: now_ms(),
    };
    let blocks_after_death = cluster.blocks_moved(VOLUME, &node)?;
    say(
        start,
        &format!(
            "fully redundant {:.1} s after the start; {blocks_after_death} blocks resynced",
            took.as_secs_f64()
        ),
    );
    std::thread::sleep(Duration::from_secs(1));

    let (daemon, node) = (format!("daemon-{FROZEN}"), format!("node-{FROZEN}"));
    say(
        start,
        &format!(
            "freezing {daemon} for {} s (SIGSTOP): it is silent, not dead",
            FREEZE.as_secs()
        ),
    );
    let silence_ms = now_ms();
    cluster.ashlar(&["dev", "pause", &daemon])?;
    std::thread::sleep(FREEZE);
    cluster.ashlar(&["dev", "resume", &daemon])?;
    let took = cluster.wait_redundant(VOLUME, RESYNC_LIMIT)?;
    let silence = Phase {
        start_ms: silence_ms,
        end_ms: now_ms(),
    };
    let blocks_after_silence = cluster.blocks_moved(VOLUME, &node)?;
    say(
        start,
        &format!(
            "fully redundant {:.1} s later; {blocks_after_silence} blocks resynced",
            took.as_secs_f64()
        ),
    );
    let after_ms = now_ms();
    std::thread::sleep(load_end.saturating_duration_since(Instant::now()));
    let after = Phase {
        start_ms: after_ms,
        end_ms: now_ms(),
    };
    Ok(Timeline {
        before,
        death,
        silence,
        after,
        blocks_after_death,
        blocks_after_silence,
    })
}

/// The outage must have been noticed, or "fully redundant" afterwards would mean nothing.
fn wait_noticed(cluster: &Cluster) -> Result<()> {
    let (in_sync, total) = cluster.redundancy(VOLUME).context("after the outage")?;
    if in_sync == total {
        let log = cluster.ashlar(&["replica", "list", VOLUME])?;
        let moved = log.as_array().into_iter().flatten().any(|r| {
            r["rebuild_blocks_moved"]
                .as_u64()
                .is_some_and(|blocks| blocks > 0)
        });
        if !moved {
            bail!("a daemon was dead for {OUTAGE:?} under writes, and no replica was excluded");
        }
    }
    Ok(())
}

fn throughput(phase: Phase, name: &'static str, iops: &[Sample]) -> Throughput {
    let write_iops = series::mean_rate(iops, 1, phase);
    Throughput {
        phase: name,
        seconds: phase.seconds(),
        write_iops,
        write_mib_per_second: write_iops * BLOCK_BYTES as f64 / MIB as f64,
    }
}

fn verify_errors(finished: &Finished) -> u64 {
    let counted: u64 = finished
        .jobs
        .iter()
        .map(|j| j.total_err.max(u64::from(j.error != 0)))
        .sum();
    let said = finished
        .messages
        .lines()
        .filter(|l| l.contains("verify:"))
        .count() as u64;
    // A fio that failed without a count has failed all the same.
    counted
        .max(said)
        .max(u64::from(!finished.success || finished.jobs.is_empty()))
}

fn summarise(
    directory: &Path,
    timeline: &Timeline,
    load: &Finished,
    ledger: &Finished,
    last: &Finished,
) -> Result<Summary> {
    let iops = series::read(&directory.join("load_iops.1.log"))?;
    let mut latencies = series::read(&directory.join("load_lat.1.log"))?;
    latencies.extend(series::read(&directory.join("ledger_lat.1.log"))?);
    let total_blocks = VOLUME_BYTES / BLOCK_BYTES;
    let mut checks = Vec::new();
    for (name, phase, bar) in [
        (
            "longest I/O stall, daemon and leader killed",
            timeline.death,
            STALL_DEATH_SECONDS_MAX,
        ),
        (
            "longest I/O stall, daemon frozen",
            timeline.silence,
            STALL_SILENCE_SECONDS_MAX,
        ),
    ] {
        let longest = series::longest(&latencies, phase);
        checks.push(Check {
            name: name.into(),
            value: format!("{longest:.3} s"),
            bar: format!("< {bar} s"),
            holds: longest > 0.0 && longest < bar,
        });
    }
    for (name, blocks) in [
        (
            "blocks resynced after the kill",
            timeline.blocks_after_death,
        ),
        (
            "blocks resynced after the freeze",
            timeline.blocks_after_silence,
        ),
    ] {
        let share = blocks as f64 / total_blocks as f64;
        checks.push(Check {
            name: name.into(),
            value: format!("{blocks} of {total_blocks} ({:.1} %)", share * 100.0),
            bar: format!("> 0, < {:.0} %", DELTA_SHARE_MAX * 100.0),
            holds: blocks > 0 && share < DELTA_SHARE_MAX,
        });
    }
    for (name, finished) in [("load", load), ("ledger", ledger), ("whole volume", last)] {
        let errors = verify_errors(finished);
        let reads: u64 = finished.jobs.iter().map(|j| j.read.total_ios).sum();
        checks.push(Check {
            name: format!("verify errors, {name}"),
            value: format!("{errors} (of {reads} reads)"),
            bar: "0".into(),
            holds: errors == 0 && reads > 0,
        });
    }
    Ok(Summary {
        throughput: vec![
            throughput(timeline.before, "before", &iops),
            throughput(timeline.death, "daemon and leader dead, resync", &iops),
            throughput(timeline.silence, "daemon frozen, resync", &iops),
            throughput(timeline.after, "after", &iops),
        ],
        checks,
        seconds: 0.0,
        holds: false,
    })
}

fn print(summary: &Summary, directory: &Path) {
    println!(
        "\nThroughput (4 KiB random, depth 32, 3 replicas; as many reads verify it as it goes)"
    );
    for t in &summary.throughput {
        println!(
            "  {:<32} {:>5.1} s  {:>7.0} writes/s ({:>6.1} MiB/s)",
            t.phase, t.seconds, t.write_iops, t.write_mib_per_second
        );
    }
    println!("\nChecks");
    for c in &summary.checks {
        let verdict = if c.holds { "ok  " } else { "FAIL" };
        println!(
            "  {verdict} {:<46} {:<28} (must be {})",
            c.name, c.value, c.bar
        );
    }
    if summary.holds {
        println!("\nAll of it holds.");
    } else {
        println!("\nNOT all of it holds. Logs: {}", directory.display());
    }
}
