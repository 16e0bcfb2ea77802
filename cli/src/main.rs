//! `ashlar`: the operator's command. Administration of a cluster, and `ashlar dev`: a real cluster of
//! real processes on one machine.
//!
//! Invariants:
//! - Standard output carries results only (a table, or JSON with `-o json`); everything else goes to
//!   standard error.
//! - The exit code says what kind of outcome it was (see [`error::Kind`]): 0 done, 1 error, 2 usage,
//!   3 not found, 4 conflict or failed precondition, 5 unavailable or timed out.
//! - A command that changes something is one idempotent request: repeating it after a lost answer is safe.

mod args;
mod client;
mod commands;
mod dev;
mod error;
mod output;
mod progress;
mod size;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    start_log(&cli.log);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("error: cannot start the runtime: {e}");
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", e.message);
            if let Some(hint) = &e.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::from(e.kind.exit_code())
        }
    }
}

fn start_log(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // A second subscriber cannot exist in this process, so the result says nothing.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .try_init();
}
