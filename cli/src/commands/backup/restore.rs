//! `ashlar backup restore`.
//!
//! Invariants:
//! - A backup is restored to a volume that this command makes; a volume that exists is never written.
//! - A volume that could not be restored whole is deleted again. (If this process is killed, it stays, with the label
//!   below, and its name is taken until somebody deletes it.)

use ashlar_cli::backup::{BackupError, Manifest, Repository, reader};
use ashlar_proto::rpc::metadata as pb;
use clap::Args;
use serde::Serialize;

use super::export::{Export, What};
use super::{Bar, RepositoryArgs, failed};
use crate::args::parse_label;
use crate::client::{Metadata, request_id};
use crate::commands::Context;
use crate::error::{CliError, Kind, Result};
use crate::output;
use crate::size;

/// Label of a volume that was made by a restore; the value is the backup's id.
const LABEL: &str = "ashlar.io/restored-from";

/// Of `backup restore`.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// Id of the backup, or the beginning of it
    backup: String,
    /// Where it is
    #[command(flatten)]
    repository: RepositoryArgs,
    /// Name of the new volume
    #[arg(long)]
    volume: String,
    /// Pool for its replicas [default: the one that the volume had, or the only pool]
    #[arg(long)]
    pool: Option<String>,
    /// Replicas [default: the pool's]
    #[arg(long)]
    replicas: Option<u32>,
    /// A larger size, as in 20GiB [default: the one that the volume had]
    #[arg(long, value_parser = size::parse)]
    size: Option<u64>,
    /// NAME=VALUE (repeatable)
    #[arg(long = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
}

#[derive(Serialize)]
struct RestoredView {
    backup: String,
    volume: String,
    volume_id: String,
    size_bytes: u64,
}

/// Carries out the command.
pub async fn run(args: &RestoreArgs, context: &mut Context) -> Result<()> {
    let repository = args.repository.open().await?;
    let manifest = repository.backup(&args.backup).await.map_err(failed)?;
    let metadata = &mut context.metadata;
    let volume = make(args, metadata, &manifest).await?;
    let id = output::id_text(&volume.volume_id);
    if let Err(error) = fill(metadata, &volume.name, &repository, &manifest).await {
        let request = pb::DeleteVolumeRequest {
            request_id: request_id(),
            volume_id: volume.volume_id,
        };
        let deleted = metadata
            .call("delete the volume", request, async |mut c, q| {
                c.delete_volume(q).await
            })
            .await;
        let left = match deleted {
            Ok(_) => "the new volume was deleted again".to_owned(),
            Err(e) => format!("the new volume is incomplete, and must be deleted: {e}"),
        };
        let message = format!("{}; {left}", error.message);
        return Err(CliError { message, ..error });
    }
    let view = RestoredView {
        backup: manifest.backup_id.to_string(),
        volume: volume.name.clone(),
        volume_id: id,
        size_bytes: volume.size_bytes,
    };
    let sentence = format!(
        "volume {} ({}) is as volume {} was at {}",
        view.volume,
        size::format(view.size_bytes),
        manifest.origin.volume_name,
        output::time(manifest.origin.snapshot_unix_ms)
    );
    context.output.done(&view, &sentence)
}

async fn make(
    args: &RestoreArgs,
    metadata: &mut Metadata,
    manifest: &Manifest,
) -> Result<pb::Volume> {
    let size_bytes = args.size.unwrap_or(manifest.size_bytes);
    if size_bytes < manifest.size_bytes {
        return Err(CliError::usage(format!(
            "the volume had {}: the new one cannot be smaller",
            size::format(manifest.size_bytes)
        )));
    }
    match metadata.volume(&args.volume).await {
        Ok(volume) => {
            let id = manifest.backup_id.to_string();
            let hint = if volume.labels.get(LABEL) == Some(&id) {
                format!(
                    "it is from a restore of this backup; if that was killed, delete it (`ashlar volume delete {}`) and try again",
                    volume.name
                )
            } else {
                "choose another name".to_owned()
            };
            return Err(
                CliError::conflict(format!("a volume {:?} exists already", args.volume)).hint(hint),
            );
        }
        Err(e) if e.kind == Kind::NotFound => {}
        Err(e) => return Err(e),
    }
    let mut labels: std::collections::HashMap<_, _> = args.labels.iter().cloned().collect();
    labels.insert(LABEL.to_owned(), manifest.backup_id.to_string());
    let request = pb::CreateVolumeRequest {
        request_id: request_id(),
        name: args.volume.clone(),
        size_bytes,
        pool: pool(args, metadata, manifest).await?,
        replicas: args.replicas.unwrap_or(0),
        labels,
        ..pb::CreateVolumeRequest::default()
    };
    let doing = format!("create the volume {:?}", args.volume);
    metadata
        .call(&doing, request, async |mut c, q| c.create_volume(q).await)
        .await
}

async fn pool(args: &RestoreArgs, metadata: &mut Metadata, manifest: &Manifest) -> Result<String> {
    if let Some(pool) = &args.pool {
        return Ok(pool.clone());
    }
    let pools = metadata.pools("").await?;
    let same = pools.iter().find(|p| p.name == manifest.origin.pool);
    match (same, pools.as_slice()) {
        (Some(pool), _) => Ok(pool.name.clone()),
        (None, [only]) => Ok(only.name.clone()),
        (None, _) => Err(CliError::usage(format!(
            "the cluster has no pool {:?}, as the volume's was",
            manifest.origin.pool
        ))
        .hint("name one with --pool (`ashlar pool list`)")),
    }
}

/// Writes the backup into the new volume.
async fn fill(
    metadata: &Metadata,
    volume: &str,
    repository: &Repository,
    manifest: &Manifest,
) -> Result<()> {
    let export = Export::start(&metadata.addresses(), What::Volume(volume)).await?;
    let bar = Bar::new("restore");
    let result: std::result::Result<(), BackupError> =
        reader::restore(repository, manifest, &export.client, &bar).await;
    drop(bar);
    let stopped = export.stop().await;
    result.map_err(failed)?;
    stopped
}
