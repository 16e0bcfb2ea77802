//! `ashlar disk`: the disks of the nodes. Adding and removing is done by the node's storage daemon;
//! the metadata cluster refuses to forget a disk that holds replicas.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ashlar_proto::rpc::{daemon as daemon_pb, metadata as pb};
use clap::Subcommand;
use comfy_table::Cell;
use serde::Serialize;

use super::Context;
use super::service::{self, EmptyArgs, Named};
use crate::args::parse_label;
use crate::client::{self, find_disk, request_id};
use crate::error::{CliError, Result};
use crate::output::{self, Column, cell, health};
use crate::size;

/// Disks of the nodes.
#[derive(Subcommand, Debug)]
pub enum DiskCommand {
    /// Every disk
    List {
        /// Only those of this node (name or id)
        #[arg(long)]
        node: Option<String>,
    },
    /// Lets a node serve a disk: a device or file that is formatted, or blank and --format
    Add {
        /// The node (name or id)
        #[arg(long)]
        node: String,
        /// Path of the device or file on that node
        path: String,
        /// Format it first; refused when it holds data
        #[arg(long)]
        format: bool,
        /// Create a file of this size (with --format)
        #[arg(long, value_parser = size::parse, requires = "format")]
        size: Option<u64>,
        /// NAME=VALUE, for pools' selectors (repeatable)
        #[arg(long = "label", value_parser = parse_label)]
        labels: Vec<(String, String)>,
    },
    /// Lets no more replicas be placed on a disk; those that are there stay
    Cordon {
        /// Id, a part of the id, path, or NODE:PATH
        disk: String,
    },
    /// Ends a cordon or an evacuation: the disk is used again
    Uncordon {
        /// Id, a part of the id, path, or NODE:PATH
        disk: String,
    },
    /// Moves every replica to other disks, and lets none come, until `uncordon`
    Evacuate {
        /// Id, a part of the id, path, or NODE:PATH
        disk: String,
        /// Waiting
        #[command(flatten)]
        wait: EmptyArgs,
    },
    /// Moves every replica to a new disk of the same node (where the failure domains allow that, else to others)
    Replace {
        /// The old disk: id, a part of the id, path, or NODE:PATH
        disk: String,
        /// Path of the new device or file on its node: one that is served already, is formatted, or is blank with --format
        path: String,
        /// Format it first; refused when it holds data
        #[arg(long)]
        format: bool,
        /// Create a file of this size (with --format)
        #[arg(long, value_parser = size::parse, requires = "format")]
        size: Option<u64>,
        /// Waiting
        #[command(flatten)]
        wait: EmptyArgs,
    },
    /// Stops using a disk that holds no replica (any more); its contents stay
    Remove {
        /// Id, a part of the id, path, or NODE:PATH
        disk: String,
    },
}

/// Time for a daemon to register a disk that was added.
const REGISTERED_WITHIN: Duration = Duration::from_secs(15);
/// A disk that is fuller than this is worth a warning.
const NEARLY_FULL_PERCENT: u64 = 85;

/// Whether a disk is worth a warning.
pub fn is_nearly_full(used_bytes: u64, capacity_bytes: u64) -> bool {
    used_bytes.saturating_mul(100) >= capacity_bytes.saturating_mul(NEARLY_FULL_PERCENT)
        && capacity_bytes > 0
}

/// A disk as it is shown.
#[derive(Serialize)]
pub struct DiskView {
    id: String,
    node: String,
    path: String,
    state: &'static str,
    service: &'static str,
    alive: bool,
    failed: bool,
    data_address: String,
    capacity_bytes: u64,
    used_bytes: u64,
    provisioned_bytes: u64,
    replicas: u32,
    incarnation: u64,
    labels: BTreeMap<String, String>,
}

/// Columns of [`DiskView::row`].
pub const HEADER: [Column; 9] = [
    Column::Left("node"),
    Column::Left("path"),
    Column::Left("state"),
    Column::Right("capacity"),
    Column::Right("used"),
    Column::Right("provisioned"),
    Column::Right("replicas"),
    Column::Left("address"),
    Column::Left("id"),
];

impl DiskView {
    /// From the message.
    pub fn new(disk: pb::Disk) -> Self {
        Self {
            id: output::id_text(&disk.disk_id),
            state: match (disk.failed, disk.alive) {
                (true, _) => "failed",
                (false, true) => "alive",
                (false, false) => "silent",
            },
            service: service::name(disk.service()),
            node: disk.node_name,
            path: disk.path,
            alive: disk.alive,
            failed: disk.failed,
            data_address: disk.data_address,
            capacity_bytes: disk.capacity_bytes,
            used_bytes: disk.used_bytes,
            provisioned_bytes: disk.provisioned_bytes,
            replicas: disk.replica_count,
            incarnation: disk.incarnation,
            labels: disk.labels.into_iter().collect(),
        }
    }

    fn shown(&self) -> String {
        let mut shown = service::with_state(self.state, self.service);
        if is_nearly_full(self.used_bytes, self.capacity_bytes) {
            shown.push_str(", nearly full");
        }
        shown
    }

    /// One row of the table.
    pub fn row(&self) -> Vec<Cell> {
        vec![
            cell(&self.node),
            cell(&self.path),
            health(self.shown(), self.alive && !self.failed),
            cell(size::format(self.capacity_bytes)),
            cell(size::format(self.used_bytes)),
            cell(size::format(self.provisioned_bytes)),
            cell(self.replicas),
            cell(&self.data_address),
            cell(&self.id),
        ]
    }
}

/// Carries out a command.
pub async fn run(command: &DiskCommand, context: &mut Context) -> Result<()> {
    match command {
        DiskCommand::List { node } => list(node.as_deref(), context).await,
        DiskCommand::Add {
            node,
            path,
            format,
            size,
            labels,
        } => {
            let request = daemon_pb::AddDiskRequest {
                path: path.clone(),
                format: *format,
                size_bytes: size.unwrap_or(0),
                labels: labels.iter().cloned().collect(),
            };
            add(node, request, context).await
        }
        DiskCommand::Remove { disk } => remove(disk, context).await,
        DiskCommand::Cordon { disk } => {
            let disk = named(disk, context).await?;
            service::change(context, &disk, pb::Service::Cordoned).await
        }
        DiskCommand::Uncordon { disk } => {
            let disk = named(disk, context).await?;
            service::change(context, &disk, pb::Service::InUse).await
        }
        DiskCommand::Evacuate { disk, wait } => {
            let disk = named(disk, context).await?;
            service::empty(context, &disk, Vec::new(), *wait).await
        }
        DiskCommand::Replace {
            disk,
            path,
            format,
            size,
            wait,
        } => {
            let disks = context.metadata.disks().await?;
            let old = find_disk(&disks, disk)?.clone();
            let served = disks
                .iter()
                .find(|d| d.node_id == old.node_id && d.path == *path);
            if served.is_some_and(|d| d.disk_id == old.disk_id) {
                return Err(CliError::usage(format!(
                    "{path} is the old disk itself; give the path of the new one"
                )));
            }
            let new = match served {
                Some(disk) => disk.disk_id.clone(),
                None => {
                    let request = daemon_pb::AddDiskRequest {
                        path: path.clone(),
                        format: *format,
                        size_bytes: size.unwrap_or(0),
                        labels: old.labels.clone(),
                    };
                    let id = begin_to_serve(&old.node_id, request, context)
                        .await?
                        .1
                        .disk_id;
                    wait_registered(&id, context).await?;
                    id
                }
            };
            service::empty(context, &Named::disk(&old), new, *wait).await
        }
    }
}

async fn named(text: &str, context: &mut Context) -> Result<Named> {
    let disks = context.metadata.disks().await?;
    Ok(Named::disk(find_disk(&disks, text)?))
}

/// A disk was added: its daemon registers it at once.
async fn wait_registered(id: &[u8], context: &mut Context) -> Result<()> {
    let deadline = Instant::now() + REGISTERED_WITHIN;
    loop {
        let disks = context.metadata.disks().await?;
        if disks.iter().any(|d| d.disk_id == id && d.alive) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(CliError::unavailable(format!(
                "the new disk {} is added, and its daemon does not register it",
                output::id_text(id)
            ))
            .hint("run the same command again; the daemon's log says why"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn list(node: Option<&str>, context: &mut Context) -> Result<()> {
    let mut disks = context.metadata.disks().await?;
    if let Some(name) = node {
        let node = context.metadata.node(name).await?;
        disks.retain(|d| d.node_id == node.node_id);
    }
    let disks: Vec<DiskView> = disks.into_iter().map(DiskView::new).collect();
    context.output.list(&disks, &HEADER, DiskView::row)
}

#[derive(Serialize)]
struct AddedView {
    id: String,
    node: String,
    path: String,
    capacity_bytes: u64,
}

/// Lets a node's daemon serve a disk.
async fn begin_to_serve(
    node: &[u8],
    request: daemon_pb::AddDiskRequest,
    context: &mut Context,
) -> Result<(pb::Node, daemon_pb::DiskInfo)> {
    let node = context.metadata.node(&output::id_text(node)).await?;
    let mut daemon = client::daemon(&node.admin_address).await?;
    let doing = format!("add the disk {} on {}", request.path, node.name);
    let info = daemon
        .add_disk(request)
        .await
        .map_err(|status| {
            let error = CliError::from_status(&doing, &status);
            match status.code() {
                tonic::Code::FailedPrecondition => error.hint(
                    "a blank disk needs --format; a disk with other data must be wiped first",
                ),
                tonic::Code::AlreadyExists => error.hint("`ashlar disk list` shows it"),
                _ => error,
            }
        })?
        .into_inner();
    Ok((node, info))
}

async fn add(node: &str, request: daemon_pb::AddDiskRequest, context: &mut Context) -> Result<()> {
    let node = context.metadata.node(node).await?;
    let (node, info) = begin_to_serve(&node.node_id, request, context).await?;
    let view = AddedView {
        id: output::id_text(&info.disk_id),
        node: node.name,
        path: info.path,
        capacity_bytes: info.capacity_bytes,
    };
    let sentence = format!(
        "disk {} ({} on {}) is in use, {} for data",
        view.id,
        view.path,
        view.node,
        size::format(view.capacity_bytes)
    );
    context.output.done(&view, &sentence)
}

#[derive(Serialize)]
struct RemovedView {
    id: String,
    node: String,
    path: String,
    /// The node's daemon was told to stop serving it; false when the node is silent.
    daemon_told: bool,
}

async fn remove(text: &str, context: &mut Context) -> Result<()> {
    let disks = context.metadata.disks().await?;
    let disk = find_disk(&disks, text)?;
    let id = output::id_text(&disk.disk_id);
    if disk.replica_count > 0 {
        return Err(
            CliError::conflict(format!("disk {id} holds {} replicas", disk.replica_count)).hint(
                format!("move them away first: `ashlar disk evacuate {id} --wait`"),
            ),
        );
    }
    // The daemon first: else its next heartbeat would register the disk again.
    let nodes = context.metadata.nodes().await?;
    let node = nodes.iter().find(|n| n.node_id == disk.node_id);
    let mut daemon_told = false;
    if let Some(node) = node.filter(|n| n.alive) {
        let mut daemon = client::daemon(&node.admin_address).await?;
        let request = daemon_pb::RemoveDiskRequest {
            disk_id: disk.disk_id.clone(),
        };
        match daemon.remove_disk(request).await {
            Ok(_) => daemon_told = true,
            // An earlier attempt may have got this far.
            Err(status) if status.code() == tonic::Code::NotFound => {}
            Err(status) => {
                return Err(CliError::from_status(&format!("remove disk {id}"), &status));
            }
        }
    }
    let request = pb::RemoveDiskRequest {
        request_id: request_id(),
        disk_id: disk.disk_id.clone(),
    };
    context
        .metadata
        .call(&format!("remove disk {id}"), request, async |mut c, q| {
            c.remove_disk(q).await
        })
        .await
        .map_err(|e| {
            e.hint(format!(
                "to serve it again: `ashlar disk add --node {} {}`",
                disk.node_name, disk.path
            ))
        })?;
    let view = RemovedView {
        id,
        node: disk.node_name.clone(),
        path: disk.path.clone(),
        daemon_told,
    };
    let sentence = format!(
        "disk {} ({} on {}) is no longer in use",
        view.id, view.path, view.node
    );
    context.output.done(&view, &sentence)
}
