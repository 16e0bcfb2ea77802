//! `ashlar cluster`: is all well?

use ashlar_proto::rpc::metadata as pb;
use clap::Subcommand;
use serde::Serialize;

use super::Context;
use crate::error::Result;
use crate::output::{self, Column, cell};
use crate::size;

/// The cluster as a whole.
#[derive(Subcommand, Debug)]
pub enum ClusterCommand {
    /// Members, nodes, disks, space and redundancy in one view
    Status,
    /// What is rebuilt or moved, how far it is and how long it will take
    Repairs,
}

#[derive(Serialize)]
struct MemberView {
    id: u64,
    address: String,
    voter: bool,
    leader: bool,
}

#[derive(Serialize)]
struct StatusView {
    cluster_id: String,
    /// `ok`, `degraded` (something is missing, all data are reachable and redundant enough to write)
    /// or `impaired` (a volume waits).
    health: &'static str,
    leader_id: u64,
    term: u64,
    last_applied: u64,
    members: Vec<MemberView>,
    nodes_alive: usize,
    nodes: usize,
    disks_alive: usize,
    disks: usize,
    /// Disks that are fuller than 85 %.
    disks_nearly_full: usize,
    capacity_bytes: u64,
    used_bytes: u64,
    provisioned_bytes: u64,
    volumes: usize,
    volumes_attached: usize,
    volumes_degraded: usize,
    volumes_waiting: usize,
    replicas_in_sync: usize,
    replicas: usize,
}

/// Carries out a command.
pub async fn run(command: &ClusterCommand, context: &mut Context) -> Result<()> {
    match command {
        ClusterCommand::Status => status(context).await,
        ClusterCommand::Repairs => super::repairs::show(context).await,
    }
}

/// Whether a client holds it, and not only a storage daemon for its rebuild.
fn is_attached(volume: &pb::Volume) -> bool {
    let holder = volume.holder.as_ref();
    holder.is_some_and(|h| h.mode() != pb::AttachMode::Care)
}

/// How redundant a volume is: (replicas in sync, replicas, some group has fewer than it needs to write).
pub fn redundancy(volume: &pb::Volume) -> (usize, usize, bool) {
    let (mut in_sync, mut total, mut waiting) = (0, 0, false);
    for group in &volume.groups {
        let here = group
            .replicas
            .iter()
            .filter(|r| r.state() == pb::ReplicaState::InSync)
            .count();
        in_sync += here;
        total += group.replicas.len();
        waiting |= here < volume.min_replicas.max(1) as usize;
    }
    (in_sync, total, waiting)
}

async fn status(context: &mut Context) -> Result<()> {
    let cluster = context.metadata.cluster().await?;
    let nodes = context.metadata.nodes().await?;
    let disks = context.metadata.disks().await?;
    let volumes = context.metadata.volumes().await?;
    let view = build(cluster, &nodes, &disks, &volumes);
    let fields = [
        ("Cluster", view.cluster_id.clone()),
        ("Health", view.health.to_owned()),
        (
            "Nodes",
            format!("{} of {} alive", view.nodes_alive, view.nodes),
        ),
        (
            "Disks",
            match view.disks_nearly_full {
                0 => format!("{} of {} alive", view.disks_alive, view.disks),
                full => format!(
                    "{} of {} alive, {full} nearly full",
                    view.disks_alive, view.disks
                ),
            },
        ),
        (
            "Space",
            format!(
                "{} used of {}, {} provisioned",
                size::format(view.used_bytes),
                size::format(view.capacity_bytes),
                size::format(view.provisioned_bytes)
            ),
        ),
        (
            "Volumes",
            format!(
                "{}, {} attached, {} degraded, {} waiting",
                view.volumes, view.volumes_attached, view.volumes_degraded, view.volumes_waiting
            ),
        ),
        (
            "Replicas",
            format!("{} of {} in sync", view.replicas_in_sync, view.replicas),
        ),
        (
            "Raft",
            format!("term {}, index {}", view.term, view.last_applied),
        ),
    ];
    context.output.object(&view, &fields)?;
    let header = [
        Column::Right("member"),
        Column::Left("address"),
        Column::Left("role"),
    ];
    let rows = view
        .members
        .iter()
        .map(|m| {
            let role = match (m.leader, m.voter) {
                (true, _) => "leader",
                (false, true) => "follower",
                (false, false) => "learner",
            };
            vec![cell(m.id), cell(&m.address), cell(role)]
        })
        .collect();
    context.output.text("")?;
    context.output.table(&header, rows)
}

fn build(
    cluster: pb::Cluster,
    nodes: &[pb::Node],
    disks: &[pb::Disk],
    volumes: &[pb::Volume],
) -> StatusView {
    let mut view = StatusView {
        cluster_id: output::id_text(&cluster.cluster_id),
        health: "ok",
        leader_id: cluster.leader_id,
        term: cluster.term,
        last_applied: cluster.last_applied,
        members: cluster
            .members
            .into_iter()
            .map(|m| MemberView {
                id: m.id,
                address: m.address,
                voter: m.voter,
                leader: m.leader,
            })
            .collect(),
        nodes_alive: nodes.iter().filter(|n| n.alive).count(),
        nodes: nodes.len(),
        disks_alive: disks.iter().filter(|d| d.alive).count(),
        disks: disks.len(),
        disks_nearly_full: disks
            .iter()
            .filter(|d| super::disk::is_nearly_full(d.used_bytes, d.capacity_bytes))
            .count(),
        capacity_bytes: disks.iter().map(|d| d.capacity_bytes).sum(),
        used_bytes: disks.iter().map(|d| d.used_bytes).sum(),
        provisioned_bytes: disks.iter().map(|d| d.provisioned_bytes).sum(),
        volumes: volumes.len(),
        volumes_attached: volumes.iter().filter(|v| is_attached(v)).count(),
        volumes_degraded: 0,
        volumes_waiting: 0,
        replicas_in_sync: 0,
        replicas: 0,
    };
    for volume in volumes {
        let (in_sync, total, waiting) = redundancy(volume);
        view.replicas_in_sync += in_sync;
        view.replicas += total;
        view.volumes_degraded += usize::from(in_sync < total);
        view.volumes_waiting += usize::from(waiting);
    }
    if view.volumes_waiting > 0 || view.leader_id == 0 {
        view.health = "impaired";
    } else if view.volumes_degraded > 0
        || view.nodes_alive < view.nodes
        || view.disks_alive < view.disks
    {
        view.health = "degraded";
    }
    view
}
