//! `ashlar volume`: block devices.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::Context;
use super::clone::{self, FlattenView, ParentView};
use super::cluster::redundancy;
use super::pool;
use super::snapshot::{self, SnapshotView};
use crate::args::parse_label;
use crate::client::request_id;
use crate::error::{CliError, Result};
use crate::output::{self, Column, cell, health};
use crate::progress::{WaitArgs, wait_in_sync};
use crate::size;

/// Volumes.
#[derive(Subcommand, Debug)]
pub enum VolumeCommand {
    /// Makes a volume; it takes space only as it is written
    Create(CreateArgs),
    /// Every volume
    List {
        /// Only those of this pool
        #[arg(long)]
        pool: Option<String>,
    },
    /// One volume and its replicas
    Show {
        /// Name or id
        volume: String,
    },
    /// Grows a volume, also while it is in use
    Resize {
        /// Name or id
        volume: String,
        /// The new size, as in 20GiB
        #[arg(value_parser = size::parse)]
        size: u64,
    },
    /// Deletes a volume that nobody uses, with its data; its snapshots stay, and with them what they show
    Delete {
        /// Name or id
        volume: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Makes a copy independent of what it was copied from, in the background
    Flatten(clone::FlattenArgs),
    /// Takes back the right to attach a volume, for a node that is gone for good; a client that still
    /// holds the volume there loses it at once
    Unpublish {
        /// Name or id
        volume: String,
        /// Only this node's [default: every node's]
        #[arg(long)]
        node: Option<String>,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
}

/// Of `volume create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its name
    name: String,
    /// Its size, as in 10GiB [of a copy: the source's]
    #[arg(long, value_parser = size::parse, required_unless_present_any = ["from_snapshot", "from_volume"])]
    size: Option<u64>,
    /// What it is a copy of; it is there at once, on the same disks
    #[command(flatten)]
    source: clone::SourceArgs,
    /// Pool for its replicas [default: the only pool]
    #[arg(long)]
    pool: Option<String>,
    /// Replicas [default: the pool's]
    #[arg(long)]
    replicas: Option<u32>,
    /// Fewest replicas in sync with which writes go on [default: 2 of 3 and more, else 1]
    #[arg(long)]
    min_replicas: Option<u32>,
    /// Replica groups that the volume is spread over [default: by size and number of disks]
    #[arg(long)]
    groups: Option<u32>,
    /// A node that should hold a replica
    #[arg(long)]
    preferred_node: Option<String>,
    /// NAME=VALUE (repeatable)
    #[arg(long = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Waiting
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Serialize)]
struct HolderView {
    client_id: String,
    client: String,
    node_id: String,
    mode: &'static str,
    epoch: u64,
}

impl HolderView {
    fn new(attachment: &pb::Attachment) -> Self {
        Self {
            client_id: output::id_text(&attachment.client_id),
            client: attachment.client_name.clone(),
            node_id: output::id_text(&attachment.node_id),
            mode: mode_name(attachment.mode()),
            epoch: attachment.epoch,
        }
    }
}

#[derive(Serialize)]
struct PublicationView {
    node: String,
    mode: &'static str,
}

#[derive(Serialize)]
struct FormatView {
    /// `formatting` (an unfinished one is worth nothing) or `formatted`.
    state: &'static str,
    fs_type: String,
}

#[derive(Serialize)]
struct VolumeReplicaView {
    group: usize,
    disk_id: String,
    node: String,
    path: String,
    disk_alive: bool,
    state: &'static str,
}

#[derive(Serialize)]
struct VolumeView {
    id: String,
    name: String,
    size_bytes: u64,
    pool: String,
    /// `ok`, `degraded` (replicas are missing) or `waiting` (too few to write).
    health: &'static str,
    replicas: u32,
    min_replicas: u32,
    groups: usize,
    replicas_in_sync: usize,
    replicas_total: usize,
    epoch: u64,
    revision: u64,
    clean: bool,
    opened_once: bool,
    created_unix_ms: u64,
    labels: BTreeMap<String, String>,
    holder: Option<HolderView>,
    readers: Vec<HolderView>,
    publications: Vec<PublicationView>,
    format: Option<FormatView>,
    /// What it inherits from, if it is a copy that is not independent.
    parent: Option<ParentView>,
    flatten: Option<FlattenView>,
    /// The snapshot that it is being reverted to.
    reverting: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replica_list: Vec<VolumeReplicaView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots: Option<Vec<SnapshotView>>,
}

impl VolumeView {
    fn new(volume: &pb::Volume) -> Self {
        let (in_sync, total, waiting) = redundancy(volume);
        Self {
            id: output::id_text(&volume.volume_id),
            name: volume.name.clone(),
            size_bytes: volume.size_bytes,
            pool: volume.pool.clone(),
            health: match (waiting, in_sync < total) {
                (true, _) => "waiting",
                (false, true) => "degraded",
                (false, false) => "ok",
            },
            replicas: volume.replicas,
            min_replicas: volume.min_replicas,
            groups: volume.groups.len(),
            replicas_in_sync: in_sync,
            replicas_total: total,
            epoch: volume.epoch,
            revision: volume.revision,
            clean: volume.clean,
            opened_once: volume.opened_once,
            created_unix_ms: volume.created_unix_ms,
            labels: volume.labels.clone().into_iter().collect(),
            holder: volume.holder.as_ref().map(HolderView::new),
            readers: volume.readers.iter().map(HolderView::new).collect(),
            publications: volume
                .publications
                .iter()
                .map(|p| PublicationView {
                    node: p.node_name.clone(),
                    mode: mode_name(p.mode()),
                })
                .collect(),
            format: volume.format.as_ref().map(|f| FormatView {
                state: match f.state() {
                    pb::FormatState::Formatted => "formatted",
                    pb::FormatState::Formatting | pb::FormatState::Unspecified => "formatting",
                },
                fs_type: f.fs_type.clone(),
            }),
            parent: volume.parent.as_ref().map(ParentView::new),
            flatten: volume.flatten.as_ref().map(FlattenView::new),
            reverting: volume.reverting.as_ref().map(|r| r.snapshot_name.clone()),
            replica_list: Vec::new(),
            snapshots: None,
        }
    }

    fn published_text(&self) -> String {
        let one = |p: &PublicationView| format!("{} ({})", p.node, p.mode);
        let all: Vec<_> = self.publications.iter().map(one).collect();
        if all.is_empty() {
            "-".to_owned()
        } else {
            all.join(", ")
        }
    }

    fn format_text(&self) -> String {
        match &self.format {
            None => "-".to_owned(),
            Some(f) if f.state == "formatted" => f.fs_type.clone(),
            Some(f) => format!("{}, not finished", f.fs_type),
        }
    }

    fn holder_text(&self) -> String {
        match (&self.holder, self.readers.as_slice()) {
            (Some(holder), _) => holder.client.clone(),
            (None, []) => "-".to_owned(),
            (None, [one]) => format!("{} (reads)", one.client),
            (None, [one, rest @ ..]) => format!("{} and {} more (read)", one.client, rest.len()),
        }
    }

    fn in_sync_text(&self) -> String {
        format!("{}/{}", self.replicas_in_sync, self.replicas_total)
    }
}

fn mode_name(mode: pb::AttachMode) -> &'static str {
    match mode {
        pb::AttachMode::Shared => "shared",
        pb::AttachMode::ReadOnly => "read-only",
        pb::AttachMode::Care => "care",
        pb::AttachMode::Exclusive | pb::AttachMode::Unspecified => "exclusive",
    }
}

/// Carries out a command.
pub async fn run(command: &VolumeCommand, context: &mut Context) -> Result<()> {
    match command {
        VolumeCommand::Create(args) => create(args, context).await,
        VolumeCommand::List { pool } => list(pool.as_deref(), context).await,
        VolumeCommand::Show { volume } => show(volume, context).await,
        VolumeCommand::Resize { volume, size } => resize(volume, *size, context).await,
        VolumeCommand::Delete { volume, yes } => delete(volume, *yes, context).await,
        VolumeCommand::Flatten(args) => clone::flatten(args, context).await,
        VolumeCommand::Unpublish { volume, node, yes } => {
            unpublish(volume, node.as_deref(), *yes, context).await
        }
    }
}

async fn create(args: &CreateArgs, context: &mut Context) -> Result<()> {
    let source = args.source.find(context).await?;
    let pool = match &args.pool {
        Some(pool) => pool.clone(),
        None if source.is_some() => String::new(),
        None => pool::only_one(context).await?,
    };
    let request = pb::CreateVolumeRequest {
        request_id: request_id(),
        name: args.name.clone(),
        size_bytes: args.size.unwrap_or(0),
        pool,
        replicas: args.replicas.unwrap_or(0),
        min_replicas: args.min_replicas.unwrap_or(0),
        groups: args.groups.unwrap_or(0),
        labels: args.labels.iter().cloned().collect(),
        preferred_node: args.preferred_node.clone().unwrap_or_default(),
        require_preferred_node: false,
        source,
    };
    let doing = format!("create the volume {:?}", args.name);
    let mut volume = context
        .metadata
        .call(&doing, request, async |mut c, q| c.create_volume(q).await)
        .await?;
    if args.wait.wait {
        volume = wait_in_sync(&mut context.metadata, &args.name, args.wait).await?;
    }
    let view = VolumeView::new(&volume);
    let sentence = format!(
        "volume {} is there: {}, {} replicas in {} group(s) of pool {}",
        view.name,
        size::format(view.size_bytes),
        view.replicas,
        view.groups,
        view.pool
    );
    context.output.done(&view, &sentence)
}

async fn list(pool: Option<&str>, context: &mut Context) -> Result<()> {
    let mut volumes = context.metadata.volumes().await?;
    if let Some(pool) = pool {
        volumes.retain(|v| v.pool == pool);
    }
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    let views: Vec<VolumeView> = volumes.iter().map(VolumeView::new).collect();
    let header = [
        Column::Left("name"),
        Column::Right("size"),
        Column::Left("pool"),
        Column::Left("health"),
        Column::Right("in sync"),
        Column::Right("groups"),
        Column::Right("epoch"),
        Column::Left("holder"),
        Column::Left("copy of"),
        Column::Left("id"),
    ];
    context.output.list(&views, &header, |v| {
        vec![
            cell(&v.name),
            cell(size::format(v.size_bytes)),
            cell(&v.pool),
            health(v.health, v.health == "ok"),
            cell(v.in_sync_text()),
            cell(v.groups),
            cell(v.epoch),
            cell(v.holder_text()),
            cell(clone::text(v.parent.as_ref(), None)),
            cell(&v.id),
        ]
    })
}

/// The name of a replica state.
pub fn state_name(state: pb::ReplicaState) -> &'static str {
    match state {
        pb::ReplicaState::InSync => "in-sync",
        pb::ReplicaState::Rebuilding => "rebuilding",
        pb::ReplicaState::Stale => "stale",
    }
}

async fn show(name: &str, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(name).await?;
    let disks: BTreeMap<Vec<u8>, pb::Disk> = context
        .metadata
        .disks()
        .await?
        .into_iter()
        .map(|d| (d.disk_id.clone(), d))
        .collect();
    let mut view = VolumeView::new(&volume);
    let snapshots = snapshot::of_volume(&volume, context).await?;
    let snapshots = view.snapshots.insert(snapshots).len();
    for (group, replica) in volume
        .groups
        .iter()
        .enumerate()
        .flat_map(|(i, g)| g.replicas.iter().map(move |r| (i, r)))
    {
        let disk = disks.get(&replica.disk_id);
        view.replica_list.push(VolumeReplicaView {
            group,
            disk_id: output::id_text(&replica.disk_id),
            node: disk.map(|d| d.node_name.clone()).unwrap_or_default(),
            path: disk.map(|d| d.path.clone()).unwrap_or_default(),
            disk_alive: disk.is_some_and(|d| d.alive),
            state: state_name(replica.state()),
        });
    }
    let fields = [
        ("Volume", view.name.clone()),
        ("Id", view.id.clone()),
        (
            "Size",
            format!(
                "{} ({} bytes)",
                size::format(view.size_bytes),
                view.size_bytes
            ),
        ),
        ("Pool", view.pool.clone()),
        ("Health", view.health.to_owned()),
        (
            "Replicas",
            format!("{}, writes need {}", view.replicas, view.min_replicas),
        ),
        ("In sync", view.in_sync_text()),
        ("Groups", view.groups.to_string()),
        ("Epoch", view.epoch.to_string()),
        ("Holder", view.holder_text()),
        ("Published to", view.published_text()),
        ("Format", view.format_text()),
        (
            "Last close",
            if view.clean {
                "clean"
            } else {
                "not clean (or in use)"
            }
            .to_owned(),
        ),
        ("Snapshots", snapshots.to_string()),
        (
            "Copy of",
            clone::text(view.parent.as_ref(), view.flatten.as_ref()),
        ),
        (
            "Reverting to",
            view.reverting.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("Labels", output::labels(&view.labels)),
    ];
    context.output.object(&view, &fields)?;
    let header = [
        Column::Right("group"),
        Column::Left("state"),
        Column::Left("node"),
        Column::Left("path"),
        Column::Left("disk"),
        Column::Left("disk id"),
    ];
    let rows = view
        .replica_list
        .iter()
        .map(|r| {
            vec![
                cell(r.group),
                health(r.state, r.state == "in-sync"),
                cell(&r.node),
                cell(&r.path),
                health(if r.disk_alive { "alive" } else { "silent" }, r.disk_alive),
                cell(&r.disk_id),
            ]
        })
        .collect();
    context.output.text("")?;
    context.output.table(&header, rows)?;
    snapshot::table_of_volume(view.snapshots.as_deref().unwrap_or_default(), context)
}

async fn resize(name: &str, size_bytes: u64, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(name).await?;
    if size_bytes < volume.size_bytes {
        return Err(CliError::conflict(format!(
            "{} has {} already: a volume only grows",
            volume.name,
            size::format(volume.size_bytes)
        ))
        .hint("to get a smaller one, create it and copy (for instance with nbdcopy)"));
    }
    let request = pb::ResizeVolumeRequest {
        request_id: request_id(),
        volume_id: volume.volume_id,
        size_bytes,
    };
    let doing = format!("resize the volume {:?}", volume.name);
    let volume = context
        .metadata
        .call(&doing, request, async |mut c, q| c.resize_volume(q).await)
        .await?;
    let view = VolumeView::new(&volume);
    let sentence = format!(
        "volume {} has {} now",
        view.name,
        size::format(view.size_bytes)
    );
    context.output.done(&view, &sentence)
}

#[derive(Serialize)]
struct DeletedView {
    id: String,
    name: String,
    deleted: bool,
    /// They stay until they are deleted, too.
    snapshots: usize,
}

async fn delete(name: &str, yes: bool, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(name).await?;
    if let Some(holder) = &volume.holder {
        return Err(CliError::conflict(format!(
            "volume {} is in use by {}",
            volume.name, holder.client_name
        ))
        .hint("stop that client (or detach the volume there) first"));
    }
    if !volume.publications.is_empty() {
        return Err(CliError::conflict(format!(
            "volume {} is still published to {}",
            volume.name,
            VolumeView::new(&volume).published_text()
        ))
        .hint(
            "end what uses it there first (in Kubernetes: the pod); for a node that is gone for good: \
             `ashlar volume unpublish`",
        ));
    }
    super::confirm("volume", &volume.name, yes)?;
    let request = pb::DeleteVolumeRequest {
        request_id: request_id(),
        volume_id: volume.volume_id.clone(),
    };
    let doing = format!("delete the volume {:?}", volume.name);
    context
        .metadata
        .call(&doing, request, async |mut c, q| c.delete_volume(q).await)
        .await?;
    let view = DeletedView {
        id: output::id_text(&volume.volume_id),
        name: volume.name,
        deleted: true,
        snapshots: volume.layers.map_or(0, |l| l.live.len()),
    };
    let mut sentence = format!("volume {} is deleted", view.name);
    if view.snapshots > 0 {
        sentence.push_str(&format!(
            "; its snapshots ({}) are there until they are deleted (`ashlar snapshot list {}`)",
            view.snapshots, view.id
        ));
    }
    context.output.done(&view, &sentence)
}

async fn unpublish(name: &str, node: Option<&str>, yes: bool, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(name).await?;
    let affected: Vec<&str> = volume
        .publications
        .iter()
        .map(|p| p.node_name.as_str())
        .filter(|n| node.is_none_or(|node| node == *n))
        .collect();
    if affected.is_empty() {
        let sentence = match node {
            Some(node) => format!("volume {} is not published to {node}", volume.name),
            None => format!("volume {} is published to no node", volume.name),
        };
        return context.output.done(&VolumeView::new(&volume), &sentence);
    }
    let nodes = affected.join(", ");
    let mut doing = format!("takes volume {:?} away from {nodes}", volume.name);
    if let Some(holder) = &volume.holder {
        doing.push_str(&format!(
            "; {} holds it now, and loses it with what it has not written yet if it is there",
            holder.client_name
        ));
    }
    super::confirm_that(&doing, &volume.name, yes)?;
    let request = pb::UnpublishVolumeRequest {
        request_id: request_id(),
        volume_id: volume.volume_id.clone(),
        node_name: node.unwrap_or_default().to_owned(),
    };
    let doing = format!("unpublish the volume {:?}", volume.name);
    let after = context
        .metadata
        .call(&doing, request, async |mut c, q| {
            c.unpublish_volume(q).await
        })
        .await?;
    let view = VolumeView::new(&after);
    let lost = volume.holder.as_ref().filter(|_| after.holder.is_none());
    let lost = lost.map_or(String::new(), |h| format!("; {} lost it", h.client_name));
    let sentence = format!(
        "volume {} is no longer published to {nodes}{lost}",
        view.name
    );
    context.output.done(&view, &sentence)
}
