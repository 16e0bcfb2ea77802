//! `ashlar replica`: where the copies are, in which state, and moving them.

use ashlar_proto::rpc::metadata as pb;
use clap::Subcommand;
use serde::Serialize;

use super::Context;
use super::volume::state_name;
use crate::client::{find_disk, request_id};
use crate::error::{CliError, Result};
use crate::output::{self, Column, cell, health};
use crate::progress::{WaitArgs, replica_infos, wait_in_sync};
use crate::size;

/// Replicas of volumes.
#[derive(Subcommand, Debug)]
pub enum ReplicaCommand {
    /// Every replica, with what the storage daemons say of it
    List {
        /// Only those of this volume (name or id)
        volume: Option<String>,
        /// Only those on this disk (id, part of the id, path, NODE:PATH)
        #[arg(long)]
        disk: Option<String>,
    },
    /// Rebuilds a stale replica now instead of when the repair loop comes to it
    Rebuild {
        /// The volume (name or id)
        volume: String,
        /// The disk that holds the stale replica
        disk: String,
        /// Waiting
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Moves a replica to another disk: a new one is built there, then the old one is dropped
    Move {
        /// The volume (name or id)
        volume: String,
        /// The disk that holds it
        from: String,
        /// The disk that gets it [default: chosen like a new replica's]
        #[arg(long)]
        to: Option<String>,
        /// Waiting
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Serialize)]
struct ReplicaView {
    volume: String,
    volume_id: String,
    group: usize,
    disk_id: String,
    node: String,
    path: String,
    state: &'static str,
    incarnation: u64,
    rebuild_epoch: u64,
    /// Absent where the daemon does not answer.
    used_bytes: Option<u64>,
    fence_epoch: Option<u64>,
    suspect: Option<bool>,
    damaged: Option<bool>,
    rebuild_chunks_done: Option<u32>,
    rebuild_chunks_total: Option<u32>,
    rebuild_blocks_moved: Option<u64>,
}

/// Carries out a command.
pub async fn run(command: &ReplicaCommand, context: &mut Context) -> Result<()> {
    match command {
        ReplicaCommand::List { volume, disk } => {
            list(volume.as_deref(), disk.as_deref(), context).await
        }
        ReplicaCommand::Rebuild { volume, disk, wait } => {
            rebuild(volume, disk, *wait, context).await
        }
        ReplicaCommand::Move {
            volume,
            from,
            to,
            wait,
        } => move_replica(volume, from, to.as_deref(), *wait, context).await,
    }
}

async fn list(volume: Option<&str>, disk: Option<&str>, context: &mut Context) -> Result<()> {
    let mut volumes = match volume {
        Some(name) => vec![context.metadata.volume(name).await?],
        None => context.metadata.volumes().await?,
    };
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    let disks = context.metadata.disks().await?;
    let only = disk.map(|text| find_disk(&disks, text)).transpose()?;
    let infos = replica_infos(&mut context.metadata).await?;
    let mut views = Vec::new();
    for volume in &volumes {
        for (group, replica) in volume
            .groups
            .iter()
            .enumerate()
            .flat_map(|(i, g)| g.replicas.iter().map(move |r| (i, r)))
        {
            if only.is_some_and(|d| d.disk_id != replica.disk_id) {
                continue;
            }
            let disk = disks.iter().find(|d| d.disk_id == replica.disk_id);
            let info = infos.get(&(replica.disk_id.clone(), volume.volume_id.clone()));
            views.push(ReplicaView {
                volume: volume.name.clone(),
                volume_id: output::id_text(&volume.volume_id),
                group,
                disk_id: output::id_text(&replica.disk_id),
                node: disk.map(|d| d.node_name.clone()).unwrap_or_default(),
                path: disk.map(|d| d.path.clone()).unwrap_or_default(),
                state: state_name(replica.state()),
                incarnation: replica.incarnation,
                rebuild_epoch: replica.rebuild_epoch,
                used_bytes: info.map(|i| i.used_bytes),
                fence_epoch: info.map(|i| i.fence_epoch),
                suspect: info.map(|i| i.suspect),
                damaged: info.map(|i| i.damaged),
                rebuild_chunks_done: info.map(|i| i.rebuild_chunks_done),
                rebuild_chunks_total: info.map(|i| i.rebuild_chunks_total),
                rebuild_blocks_moved: info.map(|i| i.rebuild_blocks_moved),
            });
        }
    }
    let header = [
        Column::Left("volume"),
        Column::Right("group"),
        Column::Left("state"),
        Column::Left("node"),
        Column::Left("path"),
        Column::Right("used"),
        Column::Left("rebuild"),
        Column::Left("disk id"),
    ];
    context.output.list(&views, &header, |r| {
        vec![
            cell(&r.volume),
            cell(r.group),
            health(r.state, r.state == "in-sync"),
            cell(&r.node),
            cell(&r.path),
            cell(r.used_bytes.map_or_else(|| "-".to_owned(), size::format)),
            cell(rebuild_text(r)),
            cell(&r.disk_id),
        ]
    })
}

/// `12/40 chunks, 300 blocks` of the last rebuild since the daemon started; `-` if there was none.
fn rebuild_text(replica: &ReplicaView) -> String {
    match (
        replica.rebuild_chunks_done,
        replica.rebuild_chunks_total,
        replica.rebuild_blocks_moved,
    ) {
        (Some(done), Some(total), Some(moved)) if total > 0 || moved > 0 => {
            format!("{done}/{total} chunks, {moved} blocks")
        }
        _ => "-".to_owned(),
    }
}

#[derive(Serialize)]
struct ChangedView {
    volume: String,
    volume_id: String,
    epoch: u64,
    replicas_in_sync: usize,
    replicas_total: usize,
}

fn changed(volume: &pb::Volume) -> ChangedView {
    let (replicas_in_sync, replicas_total, _) = super::cluster::redundancy(volume);
    ChangedView {
        volume: volume.name.clone(),
        volume_id: output::id_text(&volume.volume_id),
        epoch: volume.epoch,
        replicas_in_sync,
        replicas_total,
    }
}

async fn finish(
    context: &mut Context,
    mut volume: pb::Volume,
    wait: WaitArgs,
    begun: &str,
) -> Result<()> {
    if wait.wait {
        volume = wait_in_sync(&mut context.metadata, &volume.name.clone(), wait).await?;
    }
    let view = changed(&volume);
    let sentence = if wait.wait {
        format!(
            "volume {}: all {} replicas are in sync",
            view.volume, view.replicas_total
        )
    } else {
        format!(
            "volume {}: {begun}; `ashlar replica list {}` shows how far it is",
            view.volume, view.volume
        )
    };
    context.output.done(&view, &sentence)
}

/// The disk with that name, which must hold a replica of the volume.
fn replica_disk(volume: &pb::Volume, disks: &[pb::Disk], text: &str) -> Result<Vec<u8>> {
    let disk = find_disk(disks, text)?;
    let holds = volume
        .groups
        .iter()
        .flat_map(|g| &g.replicas)
        .any(|r| r.disk_id == disk.disk_id);
    if holds {
        return Ok(disk.disk_id.clone());
    }
    Err(CliError::not_found(format!(
        "volume {} has no replica on disk {text}",
        volume.name
    ))
    .hint(format!(
        "`ashlar replica list {}` shows where they are",
        volume.name
    )))
}

async fn rebuild(volume: &str, disk: &str, wait: WaitArgs, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(volume).await?;
    let disks = context.metadata.disks().await?;
    let disk_id = replica_disk(&volume, &disks, disk)?;
    let request = pb::RebuildReplicaRequest {
        request_id: request_id(),
        volume_id: volume.volume_id.clone(),
        disk_id,
    };
    let doing = format!("rebuild the replica of {:?}", volume.name);
    let volume = context
        .metadata
        .call(&doing, request, async |mut c, q| c.rebuild_replica(q).await)
        .await?;
    finish(context, volume, wait, "the rebuild is begun").await
}

async fn move_replica(
    volume: &str,
    from: &str,
    to: Option<&str>,
    wait: WaitArgs,
    context: &mut Context,
) -> Result<()> {
    let volume = context.metadata.volume(volume).await?;
    let disks = context.metadata.disks().await?;
    let from_disk_id = replica_disk(&volume, &disks, from)?;
    let to_disk_id = match to {
        Some(text) => find_disk(&disks, text)?.disk_id.clone(),
        None => Vec::new(),
    };
    let request = pb::MoveReplicaRequest {
        request_id: request_id(),
        volume_id: volume.volume_id.clone(),
        from_disk_id,
        to_disk_id,
    };
    let doing = format!("move the replica of {:?}", volume.name);
    let volume = context
        .metadata
        .call(&doing, request, async |mut c, q| c.move_replica(q).await)
        .await?;
    let begun = match volume.holder {
        Some(_) => "the move is begun",
        None => "the move is noted, and a storage daemon will do it",
    };
    finish(context, volume, wait, begun).await
}
