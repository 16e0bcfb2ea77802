//! `ashlar-bench`: the demonstration (`demo`, behind `make demo`) and the measurements (`run`, behind
//! `make bench`; `csi`: only its load on the CSI driver; `snapshots`: only snapshots and clones; `scale`: only the decisions of the
//! metadata leader, of which there are no processes). All others drive the real programs of the same build over their public
//! interfaces: the `ashlar` command, `nbd-client`, and fio's nbd engine.
//!
//! Invariants:
//! - Nothing is reported that was not measured in this run; a bar that is missed is printed as missed.
//! - Every process that is started is stopped again: children are killed when their guard is dropped, the
//!   cluster through `ashlar dev down`.

mod chart;
mod cluster;
mod csi;
mod demo;
mod fio;
mod matrix;
mod report;
mod run;
mod scale;
mod series;
mod snapshots;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Demonstrates and measures Ashlar.
#[derive(Parser, Debug)]
#[command(name = "ashlar-bench", version)]
struct Cli {
    /// What to do
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// A replicated volume under load while processes are killed: exits 0 only if everything holds
    Demo(demo::DemoArgs),
    /// Speed, CPU and memory against the raw disk and qemu-nbd
    Run(run::RunArgs),
    /// Only the load on the CSI driver: volumes made, published, listed, unpublished and deleted
    Csi(csi::CsiArgs),
    /// Only what snapshots and clones cost
    Snapshots(snapshots::SnapshotArgs),
    /// Only what the metadata leader decides and keeps on a cluster of 1,000 nodes
    Scale(scale::ScaleArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Csi(args) => csi::run(&args),
        Command::Snapshots(args) => snapshots::run(&args),
        Command::Scale(args) => scale::run(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::from(2)
        }
    }
}
