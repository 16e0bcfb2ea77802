//! `ashlar backup create`.
//!
//! Invariants:
//! - A base is used only if its snapshot is still in this cluster: then the difference of the two snapshots is exact.
//! - The snapshot that `--volume` takes stays as the base of the next backup; the one before it is deleted only when the new
//!   backup is complete.

use std::collections::BTreeMap;

use ashlar_cli::backup::manifest::{Geometry, Origin};
use ashlar_cli::backup::segments::SegmentSet;
use ashlar_cli::backup::writer::{self, Plan, Reading};
use ashlar_cli::backup::{Compression, Manifest, Repository, gc};
use ashlar_proto::ids::SnapshotId;
use ashlar_proto::rpc::metadata as pb;
use clap::Args;
use nbd_client::extents::{BlockLists, ExtentsError};
use serde::Serialize;
use uuid::Uuid;

use super::export::{Export, What};
use super::{BackupView, Bar, RepositoryArgs, failed};
use crate::client::{Metadata, request_id};
use crate::commands::Context;
use crate::error::{CliError, Kind, Result};
use crate::output;
use crate::size;

/// Label of a snapshot that was taken for a backup; the value is the repository's id.
const LABEL: &str = "ashlar.io/backup-repository";

/// Of `backup create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// The snapshot (name or id)
    #[arg(long, required_unless_present = "volume", conflicts_with = "volume")]
    snapshot: Option<String>,
    /// A volume (name or id): a snapshot is taken, and kept as the base of the next backup
    #[arg(long)]
    volume: Option<String>,
    /// Where to; a repository is made there if there is none
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Backup whose data are taken over where nothing changed: its id, `none` (everything is read and compared), or
    /// `auto`: the newest backup of the volume whose snapshot is still there
    #[arg(long, default_value = "auto")]
    base: String,
    /// How new objects are packed
    #[arg(long, value_enum, default_value_t)]
    compression: Compression,
    /// Name to be kept with the backup, of the schedule that makes it
    #[arg(long)]
    schedule: Option<String>,
    /// Deletes older backups of the volume by the same schedule: so many stay
    #[arg(long, requires = "schedule", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
}

#[derive(Serialize)]
struct CreatedView {
    #[serde(flatten)]
    backup: BackupView,
    /// The repository had this snapshot already.
    existed: bool,
}

/// Carries out the command.
pub async fn run(args: &CreateArgs, context: &mut Context) -> Result<()> {
    let repository = args.repository.open_or_create().await?;
    let repository_id = repository.description().repository_id;
    let metadata = &mut context.metadata;
    let (snapshot, taken) = match (&args.snapshot, &args.volume) {
        (Some(name), _) => (metadata.snapshot(name).await?, false),
        (None, Some(name)) => (take(metadata, name, repository_id).await?, true),
        (None, None) => return Err(CliError::usage("give --snapshot or --volume")),
    };
    let result = back_up(args, metadata, &repository, &snapshot).await;
    let (manifest, existed) = match result {
        Ok(done) => done,
        Err(error) => {
            if taken {
                // It would be of no use; the error matters more than its deletion.
                let _ = delete(metadata, vec![snapshot.snapshot_id]).await;
            }
            return Err(error);
        }
    };
    if taken && let Err(error) = delete_older(metadata, &snapshot, repository_id).await {
        tracing::warn!("the snapshot of the backup before could not be deleted: {error}");
    }
    if let (Some(schedule), Some(keep)) = (&args.schedule, args.keep) {
        retain(&repository, &manifest, schedule, keep).await?;
    }
    let view = CreatedView {
        backup: BackupView::new(&manifest),
        existed,
    };
    let sentence = if existed {
        format!(
            "snapshot {} is in the repository already: backup {}",
            snapshot.name, view.backup.id
        )
    } else {
        format!(
            "backup {} of volume {}: {}, {} read of {}, {} sent",
            view.backup.id,
            view.backup.volume,
            view.backup.kind,
            size::format(manifest.read_bytes),
            size::format(manifest.size_bytes),
            size::format(manifest.sent_bytes)
        )
    };
    context.output.done(&view, &sentence)
}

/// Takes a snapshot for a backup.
async fn take(metadata: &mut Metadata, volume: &str, repository: Uuid) -> Result<pb::Snapshot> {
    let volume = metadata.volume(volume).await?;
    let item = pb::CreateSnapshotItem {
        name: format!("backup-{}", Uuid::now_v7()),
        volume_id: volume.volume_id,
        labels: [(LABEL.to_owned(), repository.to_string())].into(),
    };
    let request = pb::CreateSnapshotsRequest {
        request_id: request_id(),
        items: vec![item],
        group_name: String::new(),
    };
    let doing = format!("take a snapshot of volume {}", volume.name);
    let taken = metadata
        .call(&doing, request, async |mut c, q| {
            c.create_snapshots(q).await
        })
        .await
        .map_err(|e| CliError { hint: None, ..e })?;
    taken
        .snapshots
        .into_iter()
        .next()
        .ok_or_else(|| CliError::error("metadata's answer lacks the snapshot: report this bug"))
}

async fn delete(metadata: &mut Metadata, snapshot_ids: Vec<Vec<u8>>) -> Result<()> {
    let request = pb::DeleteSnapshotsRequest {
        request_id: request_id(),
        snapshot_ids,
    };
    let doing = "delete the snapshot of a backup";
    let deleted = metadata.call(doing, request, async |mut c, q| c.delete_snapshots(q).await);
    deleted.await.map(drop)
}

/// Deletes the snapshots that were taken for earlier backups to the same repository.
async fn delete_older(
    metadata: &mut Metadata,
    newest: &pb::Snapshot,
    repository: Uuid,
) -> Result<()> {
    let snapshots = of_volume(metadata, &newest.volume_id).await?;
    let older: Vec<_> = snapshots
        .into_iter()
        .filter(|s| s.labels.get(LABEL) == Some(&repository.to_string()))
        .filter(|s| s.number < newest.number && s.state() == pb::SnapshotState::Ready)
        .map(|s| s.snapshot_id)
        .collect();
    if older.is_empty() {
        return Ok(());
    }
    delete(metadata, older).await
}

/// Deletes all but the newest backups of a schedule, and what they alone needed.
async fn retain(
    repository: &Repository,
    newest: &Manifest,
    schedule: &str,
    keep: u32,
) -> Result<()> {
    let (backups, _) = repository.backups().await.map_err(failed)?;
    let own: Vec<_> = backups
        .iter()
        .filter(|m| m.schedule.as_deref() == Some(schedule))
        .filter(|m| m.origin.volume_id == newest.origin.volume_id)
        .filter(|m| m.origin.cluster_id == newest.origin.cluster_id)
        .collect();
    let superfluous = own.len().saturating_sub(keep as usize);
    for manifest in &own[..superfluous] {
        writer::delete(repository, &manifest.object_name())
            .await
            .map_err(failed)?;
    }
    if superfluous == 0 {
        return Ok(());
    }
    let options = gc::Options {
        grace: gc::GRACE,
        dry_run: false,
        break_locks: false,
    };
    // Another backup may be going on: then the next run collects what this one left.
    if let Err(error) = gc::collect(repository, options).await {
        tracing::info!("space of older backups is not freed yet: {error}");
    }
    Ok(())
}

async fn of_volume(metadata: &mut Metadata, volume_id: &[u8]) -> Result<Vec<pb::Snapshot>> {
    let request = pb::ListSnapshotsRequest {
        volume_id: volume_id.to_vec(),
        ..pb::ListSnapshotsRequest::default()
    };
    metadata.snapshots(request).await
}

/// Makes the backup; whether it was there already.
async fn back_up(
    args: &CreateArgs,
    metadata: &mut Metadata,
    repository: &Repository,
    snapshot: &pb::Snapshot,
) -> Result<(Manifest, bool)> {
    let origin = origin(metadata, snapshot).await?;
    let (backups, _) = repository.backups().await.map_err(failed)?;
    let same = backups
        .iter()
        .rev()
        .find(|m| m.origin.snapshot_id == origin.snapshot_id);
    if let (Some(same), "auto") = (same, args.base.as_str()) {
        return Ok((same.clone(), true));
    }
    let base = base(args, metadata, snapshot, &origin, backups).await?;
    let geometry = Geometry {
        size_bytes: snapshot.size_bytes,
        segment_bytes: repository.description().segment_bytes,
    };
    geometry.check().map_err(CliError::usage)?;
    let read = changed(metadata, &origin, base.as_ref(), geometry).await?;
    let plan = Plan {
        origin,
        size_bytes: snapshot.size_bytes,
        base,
        read: Reading::Only(read),
        schedule: args.schedule.clone(),
        compression: args.compression,
    };
    if plan.reads_nothing() {
        // Of a volume that was never attached there is nothing to be served either.
        let bar = Bar::new("backup");
        let made = writer::backup(repository, &Nothing, plan, &bar).await;
        return Ok((made.map_err(failed)?, false));
    }
    let id = output::id_text(&snapshot.snapshot_id);
    let what = What::Snapshot {
        id: &id,
        name: &snapshot.name,
    };
    let export = Export::start(&metadata.addresses(), what).await?;
    if export.client.size_bytes() != snapshot.size_bytes {
        return Err(CliError::error(format!(
            "nbd-client serves {} bytes, and the snapshot has {}: report this bug",
            export.client.size_bytes(),
            snapshot.size_bytes
        )));
    }
    let bar = Bar::new("backup");
    let result = writer::backup(repository, &export.client, plan, &bar).await;
    drop(bar);
    // A snapshot is only read: how its export ends does not matter to the backup.
    if let Err(error) = export.stop().await {
        tracing::warn!("{error}");
    }
    Ok((result.map_err(failed)?, false))
}

/// A source of which nothing is to be read.
struct Nothing;

#[async_trait::async_trait]
impl writer::Source for Nothing {
    async fn read(&self, _offset: u64, _length: u32) -> std::io::Result<bytes::Bytes> {
        Err(std::io::Error::other(
            "a snapshot without data was to be read",
        ))
    }
}

/// What the manifest says of where the data came from.
async fn origin(metadata: &mut Metadata, snapshot: &pb::Snapshot) -> Result<Origin> {
    let request = pb::ViewSnapshotRequest {
        snapshot_id: snapshot.snapshot_id.clone(),
    };
    let doing = format!("read the snapshot {:?}", snapshot.name);
    let view = metadata
        .call(&doing, request, async |mut c, q| c.view_snapshot(q).await)
        .await?;
    let volume = view.volume.unwrap_or_default();
    let id = |bytes: &[u8], what: &str| {
        Uuid::from_slice(bytes).map_err(|_| {
            CliError::error(format!(
                "metadata's answer has no proper id of the {what}: report this bug"
            ))
        })
    };
    let labels: BTreeMap<_, _> = volume.labels.into_iter().collect();
    Ok(Origin {
        cluster_id: id(&view.cluster_id, "cluster")?,
        volume_id: id(&snapshot.volume_id, "volume")?,
        volume_name: snapshot.volume_name.clone(),
        pool: volume.pool,
        replicas: volume.replicas,
        snapshot_id: id(&snapshot.snapshot_id, "snapshot")?,
        snapshot_name: snapshot.name.clone(),
        snapshot_unix_ms: snapshot.created_unix_ms,
        labels,
    })
}

/// The backup to start from.
async fn base(
    args: &CreateArgs,
    metadata: &mut Metadata,
    snapshot: &pb::Snapshot,
    origin: &Origin,
    backups: Vec<Manifest>,
) -> Result<Option<Manifest>> {
    if args.base == "none" {
        return Ok(None);
    }
    let live: BTreeMap<Uuid, u32> = of_volume(metadata, &snapshot.volume_id)
        .await?
        .iter()
        .filter(|s| s.state() == pb::SnapshotState::Ready && s.number < snapshot.number)
        .filter_map(|s| Some((Uuid::from_slice(&s.snapshot_id).ok()?, s.number)))
        .collect();
    let number = |m: &Manifest| {
        let same_volume = m.origin.volume_id == origin.volume_id
            && m.origin.cluster_id == origin.cluster_id
            && m.size_bytes <= snapshot.size_bytes;
        same_volume
            .then(|| live.get(&m.origin.snapshot_id).copied())
            .flatten()
    };
    if args.base == "auto" {
        let usable = backups.into_iter().filter(|m| number(m).is_some());
        return Ok(usable.max_by_key(|m| (number(m), m.finished_unix_ms)));
    }
    let mut named = backups.into_iter().filter(|m| {
        m.backup_id
            .to_string()
            .starts_with(&args.base.to_ascii_lowercase())
    });
    match (named.next(), named.next()) {
        (Some(base), None) if number(&base).is_some() => Ok(Some(base)),
        (Some(base), None) => Err(CliError::conflict(format!(
            "backup {} is no base: its snapshot ({}) is no older snapshot of this volume in this cluster (any more)",
            base.backup_id, base.origin.snapshot_name
        ))
        .hint("leave --base out: without a base everything is read, and still only sent if it is new")),
        (Some(_), Some(_)) => Err(CliError::usage(format!("several backups match {:?}", args.base))),
        (None, _) => Err(CliError::not_found(format!("no backup {:?} is in the repository", args.base))
            .hint("`ashlar backup list` shows what there is")),
    }
}

/// The segments that hold data, or changed since the base.
async fn changed(
    metadata: &Metadata,
    origin: &Origin,
    base: Option<&Manifest>,
    geometry: Geometry,
) -> Result<SegmentSet> {
    let lists = BlockLists::new(&metadata.addresses())
        .map_err(|e| CliError::usage(format!("an address of metadata: {e}")))?;
    let id = |id: Uuid| SnapshotId(id.into_bytes());
    let base = base.map(|m| id(m.origin.snapshot_id));
    let refused = |e: ExtentsError| {
        let kind = match &e {
            ExtentsError::NotFound(_) => Kind::NotFound,
            ExtentsError::Unavailable(_) => Kind::Unavailable,
            ExtentsError::NotComparable(_) => Kind::Conflict,
            _ => Kind::Error,
        };
        CliError::new(kind, format!("list what the snapshot has: {e}"))
    };
    let mut extents = lists
        .changed(id(origin.snapshot_id), base, 0)
        .await
        .map_err(refused)?;
    let mut set = SegmentSet::none(geometry);
    while let Some(extent) = extents.next().await.map_err(refused)? {
        // Without a base, what reads as zeros is zeros already.
        if extent.data || base.is_some() {
            set.add(extent.offset, extent.length);
        }
    }
    Ok(set)
}
