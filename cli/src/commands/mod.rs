//! One noun per file. Each turns arguments into requests and answers into a table or JSON.

pub mod backup;
pub mod clone;
pub mod cluster;
pub mod dev;
pub mod disk;
pub mod extents;
pub mod node;
pub mod pool;
pub mod repairs;
pub mod replica;
pub mod revert;
pub mod schedule;
pub mod service;
pub mod snapshot;
pub mod volume;

use std::io::IsTerminal as _;

use clap::CommandFactory as _;

use crate::args::{Cli, Command};
use crate::client::{self, Metadata};
use crate::error::{CliError, Result};
use crate::output::Output;

/// What every command gets: the cluster to ask and where the result goes.
#[derive(Debug)]
pub struct Context {
    /// The cluster.
    pub metadata: Metadata,
    /// The result.
    pub output: Output,
}

/// Carries out a command line.
pub async fn run(cli: Cli) -> Result<()> {
    let output = Output::new(cli.output);
    match &cli.command {
        Command::Dev(command) => dev::run(command, &cli.dir, output).await,
        Command::Completions { shell } => {
            clap_complete::generate(
                *shell,
                &mut Cli::command(),
                "ashlar",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Command::ExecDetached { command } => Err(crate::dev::process::exec_detached(command)),
        Command::Cluster(command) => cluster::run(command, &mut context(&cli)?).await,
        Command::Node(command) => node::run(command, &mut context(&cli)?).await,
        Command::Disk(command) => disk::run(command, &mut context(&cli)?).await,
        Command::Pool(command) => pool::run(command, &mut context(&cli)?).await,
        Command::Volume(command) => volume::run(command, &mut context(&cli)?).await,
        Command::Snapshot(command) => snapshot::run(command, &mut context(&cli)?).await,
        Command::Backup(command) => match backup::run_alone(command, output).await {
            Some(result) => result,
            None => backup::run(command, &mut context(&cli)?).await,
        },
        Command::ExecBound { command } => Err(crate::dev::process::exec_bound(command)),
        Command::Schedule(command) => schedule::run(command, &mut context(&cli)?).await,
        Command::Replica(command) => replica::run(command, &mut context(&cli)?).await,
    }
}

fn context(cli: &Cli) -> Result<Context> {
    let endpoints = if cli.metadata.is_empty() {
        client::dev_endpoints(&cli.dir).unwrap_or_default()
    } else {
        cli.metadata
            .iter()
            .map(|e| e.trim().to_owned())
            .filter(|e| !e.is_empty())
            .collect()
    };
    Ok(Context {
        metadata: Metadata::new(endpoints, cli.timeout())?,
        output: Output::new(cli.output),
    })
}

/// Asks before something is destroyed: `--yes`, or the name typed on a terminal.
pub fn confirm(what: &str, name: &str, yes: bool) -> Result<()> {
    confirm_that(&format!("deletes {what} {name:?} and its data"), name, yes)
}

/// Asks before something is done that hurts: `doing` as in "deletes it", after "this".
pub fn confirm_that(doing: &str, name: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(CliError::usage(format!("not confirmed: this {doing}"))
            .hint("add --yes if that is meant"));
    }
    eprint!("This {doing}. Type {name} to go on: ");
    let mut answer = String::new();
    match std::io::stdin().read_line(&mut answer) {
        Ok(_) if answer.trim() == name => Ok(()),
        _ => Err(CliError::conflict("not confirmed; nothing was changed")),
    }
}
