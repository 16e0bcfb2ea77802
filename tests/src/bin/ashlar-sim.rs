//! Replays simulated clusters: `ashlar-sim --seed 42 --verbose` prints everything that happened in one,
//! `ashlar-sim --seed 0 --count 100000` looks for seeds that break a rule.

use std::process::ExitCode;
use std::time::Instant;

use ashlar_tests::sim::node::Backend;
use ashlar_tests::sim::run::{self, Options, Report};
use clap::Parser;

/// Runs simulated clusters from seeds and checks them.
#[derive(Parser)]
struct Args {
    /// First seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of seeds.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Clients that only read come and go.
    #[arg(long)]
    readers: bool,
    /// Snapshots are taken, deleted and read back
    #[arg(long)]
    snapshots: bool,
    /// The volume is a clone of another
    #[arg(long)]
    clones: bool,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Print every event.
    #[arg(long)]
    verbose: bool,
    /// Go on after failures, and list them.
    #[arg(long)]
    keep_going: bool,
    /// Use this chunk store: "memory" (the reference) or "disk" (the real one); the seed chooses
    /// otherwise.
    #[arg(long)]
    store: Option<String>,
    /// No bit flips and disk errors.
    #[arg(long)]
    no_damage: bool,
    /// The engine makes this mistake (needs feature `planted-bugs`), for instance AckBeforeExclusion.
    #[cfg(feature = "planted-bugs")]
    #[arg(long)]
    planted: Option<String>,
    /// With --planted or --keep-going: print only the numbers of failing seeds.
    #[arg(long)]
    quiet: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let backend = match args.store.as_deref() {
        None => None,
        Some("memory") => Some(Backend::Memory),
        Some("disk") => Some(Backend::Disk),
        Some(other) => {
            eprintln!("--store {other}: it must be memory or disk");
            return ExitCode::from(2);
        }
    };
    let options = Options {
        backend,
        damage: !args.no_damage,
        readers: args.readers,
        snapshots: args.snapshots,
        clones: args.clones,
        #[cfg(feature = "planted-bugs")]
        planted_bug: args.planted.as_deref().map(planted),
        verbose: args.verbose,
    };
    let started = Instant::now();
    let mut failed = 0u64;
    let seeds = args.seed..args.seed + args.count;
    let summary = run::many(seeds, args.threads, &options, |report| {
        print(&args, report);
        failed += u64::from(report.failure.is_some());
        report.failure.is_none() || args.keep_going
    });
    println!(
        "{} seeds, {failed} failed, {} of {} requests answered, {:.1} s",
        summary.seeds,
        summary.answered,
        summary.requests,
        started.elapsed().as_secs_f64()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn print(args: &Args, report: &Report) {
    for line in &report.trace {
        println!("{line}");
    }
    if args.count == 1 {
        println!("schedule: {:#?}", report.schedule);
        println!("digest {:016x}", report.digest);
    }
    if let Some(failure) = &report.failure {
        let first = failure.lines().next().unwrap_or_default();
        let text = if args.quiet { first } else { failure };
        println!("seed {} FAILED: {text}", report.seed);
    }
}

#[cfg(feature = "planted-bugs")]
fn planted(name: &str) -> nbd_client::engine::PlantedBug {
    let bug = run::PLANTED.iter().find(|bug| format!("{bug:?}") == name);
    *bug.unwrap_or_else(|| panic!("--planted: one of {:?}", run::PLANTED))
}
