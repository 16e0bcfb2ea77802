//! `ashlar snapshot revert`: a volume becomes what a snapshot of it shows.
//!
//! Invariant: the copy is made by this process, as the volume's holder; when it ends early, the volume stays closed to
//! all others until the command is carried out again.

use std::time::Duration;

use ashlar_proto::ids::{ClientId, VolumeId};
use clap::Args;
use nbd_client::client::HostConfig;
use nbd_client::revert::{Revert, RevertError};
use serde::Serialize;

use super::{Context, extents};
use crate::error::{CliError, Result};
use crate::size;

/// Of `snapshot revert`.
#[derive(Args, Debug)]
pub struct RevertArgs {
    /// Name or id of the volume, which nobody may have attached
    volume: String,
    /// Name or id of a snapshot of it
    snapshot: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Serialize)]
struct RevertedView {
    volume: String,
    volume_id: String,
    snapshot: String,
    snapshot_id: String,
    reverted_bytes: u64,
}

/// Time for the orderly end of the volume.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(20);

/// Carries the command out.
pub async fn run(args: &RevertArgs, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(&args.volume).await?;
    let snapshot = context.metadata.snapshot(&args.snapshot).await?;
    if snapshot.volume_id != volume.volume_id {
        return Err(CliError::conflict(format!(
            "snapshot {:?} is of volume {:?}, not of {:?}",
            snapshot.name, snapshot.volume_name, volume.name
        ))
        .hint("`ashlar snapshot list VOLUME` shows a volume's snapshots"));
    }
    if !volume.opened_once {
        return Err(CliError::conflict(format!(
            "volume {:?} was never opened: it is what the snapshot shows",
            volume.name
        )));
    }
    let doing = format!(
        "overwrites what volume {:?} has now with snapshot {:?}; what was written since is lost unless another snapshot has it",
        volume.name, snapshot.name
    );
    super::confirm_that(&doing, &volume.name, args.yes)?;
    let no_id = || CliError::error("the cluster sent a volume without an id: report this bug");
    let revert = Revert {
        volume: VolumeId::from_slice(&volume.volume_id).ok_or_else(no_id)?,
        name: volume.name.clone(),
        snapshot: extents::id(&snapshot)?,
        snapshot_bytes: snapshot.size_bytes,
    };
    let host = HostConfig {
        metadata: context.metadata.addresses(),
        client: ClientId::generate(),
        threads: 1,
        local_sockets: None,
        close_timeout: CLOSE_TIMEOUT,
    };
    let done = revert.run(host, |_| {}).await;
    let done = done.map_err(|error| failure(&volume.name, &error))?;
    let view = RevertedView {
        volume_id: crate::output::id_text(&volume.volume_id),
        volume: volume.name,
        snapshot_id: crate::output::id_text(&snapshot.snapshot_id),
        snapshot: snapshot.name,
        reverted_bytes: done.bytes,
    };
    let sentence = format!(
        "volume {} is what snapshot {} shows; {} were brought back",
        view.volume,
        view.snapshot,
        size::format(done.bytes)
    );
    context.output.done(&view, &sentence)
}

fn failure(volume: &str, error: &RevertError) -> CliError {
    let doing = format!("revert volume {volume:?}");
    match error {
        RevertError::Extents(error) => extents::failure(&doing, error),
        RevertError::Metadata(status) => CliError::from_status(&doing, status),
        other => CliError::error(format!("cannot {doing}: {other}")).hint(
            "nobody else can open the volume until the same command (or a revert to another snapshot) is done",
        ),
    }
}
