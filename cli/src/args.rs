//! The command line: global options and the nouns.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::commands;
use crate::output::Format;

/// Administers an Ashlar cluster: replicated block storage from the disks that the nodes already have.
#[derive(Parser, Debug)]
#[command(name = "ashlar", version, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// Metadata members, HOST:PORT separated by commas (default: the development cluster in --dir)
    #[arg(long, env = "ASHLAR_METADATA", value_delimiter = ',', global = true)]
    pub metadata: Vec<String>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    pub output: Format,
    /// How long to try before giving up, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, global = true)]
    pub timeout: u64,
    /// Directory of the development cluster
    #[arg(
        long,
        env = "ASHLAR_DEV_DIR",
        default_value = ".ashlar-dev",
        global = true
    )]
    pub dir: PathBuf,
    /// Messages on standard error: error, warn, info, debug, or a tracing filter
    #[arg(long, env = "ASHLAR_LOG", default_value = "warn", global = true)]
    pub log: String,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The nouns.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// A real cluster of real processes on this machine, for development and demonstrations
    #[command(subcommand)]
    Dev(commands::dev::DevCommand),
    /// The cluster as a whole
    #[command(subcommand)]
    Cluster(commands::cluster::ClusterCommand),
    /// Machines that run a storage daemon
    #[command(subcommand)]
    Node(commands::node::NodeCommand),
    /// Disks of the nodes
    #[command(subcommand)]
    Disk(commands::disk::DiskCommand),
    /// Pools of disks
    #[command(subcommand)]
    Pool(commands::pool::PoolCommand),
    /// Volumes
    #[command(subcommand)]
    Volume(commands::volume::VolumeCommand),
    /// Volumes as they were at one point in time
    #[command(subcommand)]
    Snapshot(commands::snapshot::SnapshotCommand),
    /// Snapshots in object storage (S3, NFS or a directory)
    #[command(subcommand)]
    Backup(commands::backup::BackupCommand),
    /// Snapshots or backups at times, with retention
    #[command(subcommand)]
    Schedule(commands::schedule::ScheduleCommand),
    /// Replicas of volumes
    #[command(subcommand)]
    Replica(commands::replica::ReplicaCommand),
    /// Prints the completion script of a shell: `source <(ashlar completions bash)`
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Becomes a program that ends when the process that started this one does
    #[command(name = "exec-bound", hide = true)]
    ExecBound {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Starts a program in a session of its own, in place of this process
    #[command(name = "exec-detached", hide = true)]
    ExecDetached {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
}

impl Cli {
    /// The overall time for one request.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.max(1))
    }
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 error, 2 usage, 3 not found, 4 conflict or failed \
precondition, 5 unavailable or timed out.";

/// Reads `name=value`.
pub fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not NAME=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
