//! `ashlar dev`: a development cluster on this machine.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use rustix::process::Signal;
use serde::Serialize;

use crate::dev::cluster::{DevCluster, first_taken, free_ports};
use crate::dev::process::Condition;
use crate::dev::state::{DAEMONS_MAX, DISKS_MAX, MEMBERS_MAX, Name, Spec, State};
use crate::error::{CliError, Result};
use crate::output::{Column, Output, cell, health};
use crate::size;

/// Size of a disk unless said otherwise.
const DISK_SIZE_DEFAULT: u64 = 4 << 30;
/// Smallest disk that makes sense.
const DISK_SIZE_MIN: u64 = 64 << 20;

/// A development cluster.
#[derive(Subcommand, Debug)]
pub enum DevCommand {
    /// Makes the cluster if there is none, starts what does not run, waits until it is ready
    Up(UpArgs),
    /// Stops its processes
    Down {
        /// Delete its data, too
        #[arg(long)]
        purge: bool,
    },
    /// Its processes
    Status,
    /// What other programs need to find it: `eval "$(ashlar dev env)"`
    Env,
    /// Starts one process (metadata-1, daemon-2, ...)
    Start {
        /// Which
        name: Name,
    },
    /// Kills one process with SIGKILL, as a crash would
    Kill {
        /// Which
        name: Name,
    },
    /// Freezes one process with SIGSTOP, as a hanging machine would
    Pause {
        /// Which
        name: Name,
    },
    /// Lets a frozen process go on
    Resume {
        /// Which
        name: Name,
    },
}

/// Of `dev up`. What is not given is as it was, or the default.
#[derive(Args, Debug)]
pub struct UpArgs {
    /// Storage daemons [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(DAEMONS_MAX)))]
    daemons: Option<u32>,
    /// Metadata members: 1, 3 or 5 [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MEMBERS_MAX)))]
    members: Option<u32>,
    /// Size of each disk [default: 4GiB]
    #[arg(long, value_parser = size::parse)]
    disk_size: Option<u64>,
    /// Disks of each daemon [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(DISKS_MAX)))]
    disks_per_daemon: Option<u32>,
    /// First of the ports [default: free ones are looked for]
    #[arg(long)]
    base_port: Option<u16>,
    /// Address to listen on: without TLS, so only where nobody else can reach it [default: 127.0.0.1]
    #[arg(long)]
    address: Option<IpAddr>,
    /// Seconds without a daemon after which its replicas get others [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    replace_after: Option<u64>,
    /// Write all of each new disk file first: as on a used disk, and for measurements
    #[arg(long)]
    preallocate: bool,
    /// How long to wait until it is ready, in seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    ready_timeout: u64,
}

impl UpArgs {
    fn spec(&self, existing: Option<&Spec>) -> Result<Spec> {
        if let Some(existing) = existing {
            self.check_same(existing)?;
            return Ok(existing.clone());
        }
        let mut spec = Spec {
            members: self.members.unwrap_or(3),
            daemons: self.daemons.unwrap_or(3),
            disks_per_daemon: self.disks_per_daemon.unwrap_or(1),
            disk_size_bytes: self.disk_size.unwrap_or(DISK_SIZE_DEFAULT),
            base_port: self.base_port.unwrap_or(0),
            address: self.address.unwrap_or(Ipv4Addr::LOCALHOST.into()),
            metrics: true,
            replace_after_seconds: self.replace_after,
        };
        if spec.members.is_multiple_of(2) {
            return Err(CliError::usage("a Raft cluster has 1, 3 or 5 members"));
        }
        if spec.disk_size_bytes < DISK_SIZE_MIN {
            return Err(CliError::usage(format!(
                "a disk has at least {}",
                size::format(DISK_SIZE_MIN)
            )));
        }
        if self.base_port.is_none() {
            spec.base_port = free_ports(spec.address, spec.port_count())?;
            return Ok(spec);
        }
        let count = u16::try_from(spec.port_count())
            .ok()
            .filter(|count| spec.base_port > 0 && spec.base_port.checked_add(*count).is_some())
            .ok_or_else(|| CliError::usage("--base-port leaves too few ports above it"))?;
        if let Some(port) = first_taken(spec.address, spec.base_port, count) {
            return Err(CliError::conflict(format!("port {port} is taken"))
                .hint(format!("the cluster needs {count} ports in a row; without --base-port free ones are looked for")));
        }
        Ok(spec)
    }

    fn check_same(&self, existing: &Spec) -> Result<()> {
        let differs = [
            (
                "--members",
                self.members.is_some_and(|v| v != existing.members),
            ),
            (
                "--daemons",
                self.daemons.is_some_and(|v| v != existing.daemons),
            ),
            (
                "--disks-per-daemon",
                self.disks_per_daemon
                    .is_some_and(|v| v != existing.disks_per_daemon),
            ),
            (
                "--disk-size",
                self.disk_size
                    .is_some_and(|v| v != existing.disk_size_bytes),
            ),
            (
                "--base-port",
                self.base_port.is_some_and(|v| v != existing.base_port),
            ),
            (
                "--replace-after",
                self.replace_after
                    .is_some_and(|v| Some(v) != existing.replace_after_seconds),
            ),
            (
                "--address",
                self.address.is_some_and(|v| v != existing.address),
            ),
        ];
        match differs.iter().find(|(_, differs)| *differs) {
            None => Ok(()),
            Some((option, _)) => {
                Err(CliError::conflict(format!("the cluster exists with another {option}"))
                    .hint("leave the option out, delete the cluster (`ashlar dev down --purge`), or use another --dir"))
            }
        }
    }
}

#[derive(Serialize)]
struct ProcessView {
    name: String,
    condition: Condition,
    /// Of a metadata member; false where none is known.
    leader: bool,
    pid: Option<i32>,
    uptime_seconds: Option<u64>,
    rss_bytes: Option<u64>,
    address: String,
    /// Where /metrics, /healthz and /readyz are answered over HTTP, `IP:PORT`.
    metrics_address: Option<String>,
    log: PathBuf,
}

#[derive(Serialize)]
struct DevView {
    directory: PathBuf,
    /// For `--metadata`.
    metadata: Vec<String>,
    spec: Spec,
    leader_id: u64,
    processes: Vec<ProcessView>,
}

/// Carries out a command.
pub async fn run(command: &DevCommand, directory: &Path, output: Output) -> Result<()> {
    match command {
        DevCommand::Up(args) => up(args, directory, output).await,
        DevCommand::Down { purge } => down(directory, *purge, output),
        DevCommand::Env => {
            let state = State::load_existing(directory)?;
            let metadata = state.spec.member_addresses().join(",");
            let line = format!("export ASHLAR_METADATA={metadata}");
            output.done(&EnvView { metadata }, &line)
        }
        DevCommand::Status => status(&DevCluster::open(directory)?, output).await,
        DevCommand::Start { name } => {
            let started = DevCluster::open(directory)?.start(*name)?;
            done(
                *name,
                if started {
                    "started"
                } else {
                    "running already"
                },
                output,
            )
        }
        DevCommand::Kill { name } => {
            DevCluster::open(directory)?.kill(*name)?;
            done(*name, "killed", output)
        }
        DevCommand::Pause { name } => {
            DevCluster::open(directory)?.signal(*name, Signal::STOP)?;
            done(*name, "paused", output)
        }
        DevCommand::Resume { name } => {
            DevCluster::open(directory)?.signal(*name, Signal::CONT)?;
            done(*name, "resumed", output)
        }
    }
}

#[derive(Serialize)]
struct EnvView {
    metadata: String,
}

#[derive(Serialize)]
struct DoneView<'a> {
    name: String,
    result: &'a str,
}

fn done(name: Name, result: &str, output: Output) -> Result<()> {
    output.done(
        &DoneView {
            name: name.to_string(),
            result,
        },
        &format!("{name}: {result}"),
    )
}

async fn up(args: &UpArgs, directory: &Path, output: Output) -> Result<()> {
    let mut cluster = DevCluster::open_or_create(directory, |existing| args.spec(existing))?;
    cluster.preallocate = args.preallocate;
    let mut started = 0;
    for name in cluster.state.spec.names() {
        if cluster.condition(name) == Condition::Paused {
            cluster.signal(name, Signal::CONT)?;
        }
        started += usize::from(cluster.start(name)?);
    }
    cluster
        .wait_ready(Duration::from_secs(args.ready_timeout))
        .await?;
    status(&cluster, output).await?;
    let option = if directory == Path::new(".ashlar-dev") {
        String::new()
    } else {
        format!(" --dir {}", directory.display())
    };
    output.text(&format!(
        "\nReady ({started} processes started). Next:\n  eval \"$(ashlar{option} dev env)\"\n  ashlar pool create \
         main\n  ashlar volume create first --size 1GiB\n  nbd-client serve --volume first --socket /tmp/first.sock"
    ))
}

#[derive(Serialize)]
struct DownView<'a> {
    directory: &'a Path,
    killed: Vec<String>,
    purged: bool,
}

fn down(directory: &Path, purge: bool, output: Output) -> Result<()> {
    let cluster = match DevCluster::open(directory) {
        Ok(cluster) => cluster,
        // Nothing to stop is what was asked for.
        Err(e) if e.kind == crate::error::Kind::NotFound => {
            let view = DownView {
                directory,
                killed: Vec::new(),
                purged: purge,
            };
            return output.done(&view, &e.message);
        }
        Err(e) => return Err(e),
    };
    let killed: Vec<String> = cluster
        .stop_all()?
        .iter()
        .map(ToString::to_string)
        .collect();
    let count = cluster.state.spec.names().len();
    if purge {
        cluster.purge()?;
    }
    let mut sentence = format!("{count} processes are stopped");
    if !killed.is_empty() {
        sentence += &format!(
            " (killed, since they did not end in time: {})",
            killed.join(", ")
        );
    }
    sentence += if purge {
        ", the data are deleted"
    } else {
        "; the data stay (`ashlar dev up` goes on, `ashlar dev down --purge` deletes them)"
    };
    output.done(
        &DownView {
            directory,
            killed,
            purged: purge,
        },
        &sentence,
    )
}

async fn status(cluster: &DevCluster, output: Output) -> Result<()> {
    let spec = cluster.state.spec.clone();
    let any_member = spec
        .names()
        .into_iter()
        .any(|n| matches!(n, Name::Metadata(_)) && cluster.condition(n) == Condition::Running);
    let leader = if any_member {
        cluster.leader().await.map_or(0, |c| c.leader_id)
    } else {
        0
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis() as u64;
    let processes = spec
        .names()
        .into_iter()
        .map(|name| {
            let record = cluster.record(name).filter(|r| r.is_alive());
            ProcessView {
                name: name.to_string(),
                condition: cluster.condition(name),
                leader: matches!(name, Name::Metadata(n) if u64::from(n) == leader),
                pid: record.map(|r| r.pid),
                uptime_seconds: record.map(|r| now.saturating_sub(r.started_unix_ms) / 1000),
                rss_bytes: record.and_then(|r| r.rss_bytes()),
                address: match name {
                    Name::Metadata(n) => spec.member_address(n),
                    Name::Daemon(n) => spec.admin_address(n),
                },
                metrics_address: spec.metrics_address(name),
                log: cluster.log(name),
            }
        })
        .collect();
    let view = DevView {
        directory: cluster.directory().to_owned(),
        metadata: spec.member_addresses(),
        spec,
        leader_id: leader,
        processes,
    };
    if output.is_json() {
        return output.done(&view, "");
    }
    show_table(&view, output)
}

fn show_table(view: &DevView, output: Output) -> Result<()> {
    let header = [
        Column::Left("process"),
        Column::Left("state"),
        Column::Left("role"),
        Column::Right("pid"),
        Column::Right("uptime"),
        Column::Right("memory"),
        Column::Left("address"),
        Column::Left("metrics"),
    ];
    let dash = || "-".to_owned();
    let rows = view
        .processes
        .iter()
        .map(|p| {
            let state = match p.condition {
                Condition::Running => "running",
                Condition::Paused => "paused",
                Condition::Stopped => "stopped",
            };
            vec![
                cell(&p.name),
                health(state, p.condition == Condition::Running),
                cell(if p.leader { "leader" } else { "-" }),
                cell(p.pid.map_or_else(dash, |v| v.to_string())),
                cell(p.uptime_seconds.map_or_else(dash, |v| format!("{v} s"))),
                cell(p.rss_bytes.map_or_else(dash, size::format)),
                cell(&p.address),
                cell(p.metrics_address.as_deref().unwrap_or("-")),
            ]
        })
        .collect();
    output.table(&header, rows)
}
