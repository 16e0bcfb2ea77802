//! `ashlar snapshot`: volumes as they were at one point in time.
//!
//! Invariant: what is taken in one command is of one point in time: snapshots of several volumes are one group.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::Context;
use crate::args::parse_label;
use crate::client::request_id;
use crate::error::{CliError, Result};
use crate::output::{self, Column, cell, health};
use crate::size;

/// Snapshots.
#[derive(Subcommand, Debug)]
pub enum SnapshotCommand {
    /// Takes a snapshot of a volume, or of several volumes at one point in time, also while they are in use
    Create(CreateArgs),
    /// Every snapshot, oldest first
    List {
        /// Only those of this volume (name or id)
        volume: Option<String>,
        /// Only those of this group
        #[arg(long)]
        group: Option<String>,
    },
    /// One snapshot
    Show {
        /// Name or id
        snapshot: String,
    },
    /// Which bytes of a snapshot have data
    Extents {
        /// Name or id
        snapshot: String,
    },
    /// Which bytes differ between two snapshots of a volume
    Diff {
        /// Name or id of the older one
        base: String,
        /// Name or id of the newer one
        snapshot: String,
    },
    /// Brings a detached volume back to what a snapshot of it shows
    Revert(super::revert::RevertArgs),
    /// Deletes snapshots; what they alone kept is freed in the background
    Delete(DeleteArgs),
}

/// Of `snapshot create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Names or ids of the volumes
    #[arg(required = true, value_name = "VOLUME")]
    volumes: Vec<String>,
    /// The snapshot's name; of several volumes each is called NAME-VOLUME
    #[arg(long)]
    name: String,
    /// Name of the group [default: for several volumes NAME, for one volume none]
    #[arg(long)]
    group: Option<String>,
    /// NAME=VALUE (repeatable)
    #[arg(long = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
}

/// Of `snapshot delete`.
#[derive(Args, Debug)]
pub struct DeleteArgs {
    /// Names or ids
    #[arg(
        value_name = "SNAPSHOT",
        required_unless_present = "group",
        conflicts_with = "group"
    )]
    snapshots: Vec<String>,
    /// All of this group
    #[arg(long)]
    group: Option<String>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// A snapshot.
#[derive(Serialize)]
pub struct SnapshotView {
    id: String,
    name: String,
    volume_id: String,
    volume: String,
    /// The volume was deleted; it goes with its last snapshot.
    volume_deleted: bool,
    number: u32,
    size_bytes: u64,
    created_unix_ms: u64,
    /// `pending` (being taken), `ready` or `deleting`.
    state: &'static str,
    group_id: Option<String>,
    group: Option<String>,
    labels: BTreeMap<String, String>,
    /// While it is being deleted: replicas that are not done, and what they said is left to look at.
    replicas_left: u32,
    chunks_left: u64,
    /// Volumes that inherit from it.
    clones: u32,
}

impl SnapshotView {
    fn new(snapshot: &pb::Snapshot) -> Self {
        let given = |text: String| (!text.is_empty()).then_some(text);
        Self {
            id: output::id_text(&snapshot.snapshot_id),
            name: snapshot.name.clone(),
            volume_id: output::id_text(&snapshot.volume_id),
            volume: snapshot.volume_name.clone(),
            volume_deleted: snapshot.volume_deleted,
            number: snapshot.number,
            size_bytes: snapshot.size_bytes,
            created_unix_ms: snapshot.created_unix_ms,
            state: match snapshot.state() {
                pb::SnapshotState::Pending | pb::SnapshotState::Unspecified => "pending",
                pb::SnapshotState::Ready => "ready",
                pb::SnapshotState::Deleting => "deleting",
            },
            group_id: given(output::id_text(&snapshot.group_id)),
            group: given(snapshot.group_name.clone()),
            labels: snapshot.labels.clone().into_iter().collect(),
            replicas_left: snapshot.replicas_left,
            chunks_left: snapshot.chunks_left,
            clones: snapshot.clones,
        }
    }

    fn volume_text(&self) -> String {
        if self.volume_deleted {
            format!("{} (deleted)", self.volume)
        } else {
            self.volume.clone()
        }
    }

    fn state_text(&self) -> String {
        if self.state == "deleting" {
            format!(
                "deleting, {} chunks to look at on {} replicas",
                self.chunks_left, self.replicas_left
            )
        } else {
            self.state.to_owned()
        }
    }

    fn group_text(&self) -> &str {
        self.group.as_deref().unwrap_or("-")
    }
}

/// Carries out a command.
pub async fn run(command: &SnapshotCommand, context: &mut Context) -> Result<()> {
    match command {
        SnapshotCommand::Create(args) => create(args, context).await,
        SnapshotCommand::List { volume, group } => {
            list(volume.as_deref(), group.as_deref(), context).await
        }
        SnapshotCommand::Show { snapshot } => show(snapshot, context).await,
        SnapshotCommand::Extents { snapshot } => super::extents::extents(snapshot, context).await,
        SnapshotCommand::Diff { base, snapshot } => {
            super::extents::diff(base, snapshot, context).await
        }
        SnapshotCommand::Revert(args) => super::revert::run(args, context).await,
        SnapshotCommand::Delete(args) => delete(args, context).await,
    }
}

/// The snapshots of a volume, oldest first.
pub async fn of_volume(volume: &pb::Volume, context: &mut Context) -> Result<Vec<SnapshotView>> {
    let request = pb::ListSnapshotsRequest {
        volume_id: volume.volume_id.clone(),
        ..pb::ListSnapshotsRequest::default()
    };
    let found = context.metadata.snapshots(request).await?;
    Ok(found.iter().map(SnapshotView::new).collect())
}

/// The table of a volume's snapshots under the volume, for people.
pub fn table_of_volume(snapshots: &[SnapshotView], context: &Context) -> Result<()> {
    if snapshots.is_empty() {
        return Ok(());
    }
    let header = [
        Column::Left("snapshot"),
        Column::Right("size"),
        Column::Left("created"),
        Column::Left("state"),
        Column::Left("group"),
    ];
    let row = |s: &SnapshotView| {
        vec![
            cell(&s.name),
            cell(size::format(s.size_bytes)),
            cell(output::time(s.created_unix_ms)),
            health(s.state_text(), s.state != "pending"),
            cell(s.group_text()),
        ]
    };
    context.output.text("")?;
    context
        .output
        .table(&header, snapshots.iter().map(row).collect())
}

async fn create(args: &CreateArgs, context: &mut Context) -> Result<()> {
    let mut items = Vec::with_capacity(args.volumes.len());
    let several = args.volumes.len() > 1;
    for name in &args.volumes {
        let volume = context.metadata.volume(name).await?;
        items.push(pb::CreateSnapshotItem {
            name: if several {
                format!("{}-{}", args.name, volume.name)
            } else {
                args.name.clone()
            },
            volume_id: volume.volume_id,
            labels: args.labels.iter().cloned().collect(),
        });
    }
    let group = args.group.as_ref().or(several.then_some(&args.name));
    let request = pb::CreateSnapshotsRequest {
        request_id: request_id(),
        items,
        group_name: group.cloned().unwrap_or_default(),
    };
    let doing = format!("take the snapshot {:?}", args.name);
    let taken = context
        .metadata
        .call(&doing, request, async |mut c, q| {
            c.create_snapshots(q).await
        })
        .await
        // What to do stands in the refusal; general advice about disks does not fit.
        .map_err(|e| CliError { hint: None, ..e })?;
    let views: Vec<_> = taken.snapshots.iter().map(SnapshotView::new).collect();
    let (names, volumes): (Vec<_>, Vec<_>) = views
        .iter()
        .map(|v| (v.name.as_str(), v.volume.as_str()))
        .unzip();
    let sentence = match views.as_slice() {
        [one] => format!("snapshot {} of volume {} is taken", one.name, one.volume),
        _ => format!(
            "snapshots {} of volumes {} are taken, at one point in time (group {})",
            names.join(", "),
            volumes.join(", "),
            views.first().map_or("-", SnapshotView::group_text)
        ),
    };
    context.output.done(&views, &sentence)
}

async fn list(volume: Option<&str>, group: Option<&str>, context: &mut Context) -> Result<()> {
    let mut request = pb::ListSnapshotsRequest::default();
    if let Some(name) = volume {
        request.volume_id = volume_or_deleted(name, context).await?;
    }
    request.group_name = group.unwrap_or_default().to_owned();
    let found = context.metadata.snapshots(request).await?;
    let views: Vec<_> = found.iter().map(SnapshotView::new).collect();
    let header = [
        Column::Left("name"),
        Column::Left("volume"),
        Column::Right("size"),
        Column::Left("created"),
        Column::Left("state"),
        Column::Left("group"),
        Column::Left("id"),
    ];
    context.output.list(&views, &header, |s| {
        vec![
            cell(&s.name),
            cell(s.volume_text()),
            cell(size::format(s.size_bytes)),
            cell(output::time(s.created_unix_ms)),
            health(s.state_text(), s.state != "pending"),
            cell(s.group_text()),
            cell(&s.id),
        ]
    })
}

/// The id of a volume: one that was deleted is named by its id.
async fn volume_or_deleted(name: &str, context: &mut Context) -> Result<Vec<u8>> {
    match uuid::Uuid::parse_str(name) {
        Ok(id) => Ok(id.into_bytes().to_vec()),
        Err(_) => Ok(context.metadata.volume(name).await?.volume_id),
    }
}

async fn show(name: &str, context: &mut Context) -> Result<()> {
    let view = SnapshotView::new(&context.metadata.snapshot(name).await?);
    let fields = [
        ("Snapshot", view.name.clone()),
        ("Id", view.id.clone()),
        ("Volume", view.volume_text()),
        ("Volume id", view.volume_id.clone()),
        (
            "Size",
            format!(
                "{} ({} bytes)",
                size::format(view.size_bytes),
                view.size_bytes
            ),
        ),
        ("Created", output::time(view.created_unix_ms)),
        ("State", view.state_text()),
        ("Group", view.group_text().to_owned()),
        ("Number", view.number.to_string()),
        ("Labels", output::labels(&view.labels)),
    ];
    context.output.object(&view, &fields)
}

#[derive(Serialize)]
struct DeletedView {
    id: String,
    name: String,
    deleted: bool,
}

async fn delete(args: &DeleteArgs, context: &mut Context) -> Result<()> {
    let mut found = Vec::new();
    for name in &args.snapshots {
        found.push(context.metadata.snapshot(name).await?);
    }
    if let Some(group) = &args.group {
        let request = pb::ListSnapshotsRequest {
            group_name: group.clone(),
            ..pb::ListSnapshotsRequest::default()
        };
        found = context.metadata.snapshots(request).await?;
        if found.is_empty() {
            return Err(
                CliError::not_found(format!("no group of snapshots is named {group:?}"))
                    .hint("`ashlar snapshot list` shows what there is"),
            );
        }
    }
    let names: Vec<_> = found.iter().map(|s| s.name.as_str()).collect();
    let names = names.join(", ");
    match (found.as_slice(), &args.group) {
        ([one], None) => super::confirm("snapshot", &one.name, args.yes)?,
        (_, Some(group)) => {
            let doing = format!("deletes the group {group:?} of snapshots: {names}");
            super::confirm_that(&doing, group, args.yes)?;
        }
        (several, None) => {
            let doing = format!("deletes {} snapshots: {names}", several.len());
            super::confirm_that(&doing, "yes", args.yes)?;
        }
    }
    let request = pb::DeleteSnapshotsRequest {
        request_id: request_id(),
        snapshot_ids: found.iter().map(|s| s.snapshot_id.clone()).collect(),
    };
    let doing = format!("delete the snapshots {names}");
    context
        .metadata
        .call(&doing, request, async |mut c, q| {
            c.delete_snapshots(q).await
        })
        .await?;
    let views: Vec<_> = found
        .iter()
        .map(|s| DeletedView {
            id: output::id_text(&s.snapshot_id),
            name: s.name.clone(),
            deleted: true,
        })
        .collect();
    let (noun, verb) = if views.len() == 1 {
        ("snapshot", "is")
    } else {
        ("snapshots", "are")
    };
    let sentence = format!("{noun} {names} {verb} deleted; space is freed in the background");
    context.output.done(&views, &sentence)
}
