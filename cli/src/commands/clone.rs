//! Of `ashlar volume`: copies of snapshots and volumes, and making them independent.

use std::time::{Duration, Instant};

use ashlar_proto::rpc::metadata as pb;
use clap::Args;
use pb::create_volume_request::Source;
use serde::Serialize;

use super::Context;
use crate::client::request_id;
use crate::error::{CliError, Result};
use crate::{output, progress};

/// Pause between two looks.
const INTERVAL: Duration = Duration::from_millis(300);

/// What a volume is copied from.
#[derive(Args, Debug)]
pub struct SourceArgs {
    /// Copy this snapshot (name or id); the copy is there at once, on the same disks
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "from_volume")]
    from_snapshot: Option<String>,
    /// Copy this volume (name or id) as it is now, also while it is in use
    #[arg(long, value_name = "VOLUME")]
    from_volume: Option<String>,
}

impl SourceArgs {
    /// As metadata is asked for it.
    pub async fn find(&self, context: &mut Context) -> Result<Option<Source>> {
        Ok(match (&self.from_snapshot, &self.from_volume) {
            (Some(name), _) => {
                let snapshot = context.metadata.snapshot(name).await?;
                Some(Source::SnapshotId(snapshot.snapshot_id))
            }
            (None, Some(name)) => {
                let volume = context.metadata.volume(name).await?;
                Some(Source::VolumeId(volume.volume_id))
            }
            (None, None) => None,
        })
    }
}

/// Of `volume flatten`.
#[derive(Args, Debug)]
pub struct FlattenArgs {
    /// Name or id
    volume: String,
    /// Wait until it depends on nothing any more
    #[arg(long)]
    wait: bool,
    /// Give up waiting after this time (exit code 5); what was begun goes on
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 3600,
        requires = "wait"
    )]
    wait_timeout: u64,
}

/// What a volume inherits from.
#[derive(Serialize)]
pub struct ParentView {
    volume_id: String,
    volume: String,
    /// It was deleted, and is kept for its copies.
    volume_deleted: bool,
    snapshot: String,
    snapshot_number: u32,
    /// It was deleted, or was only taken for the copy.
    snapshot_deleted: bool,
}

impl ParentView {
    /// From the message.
    pub fn new(parent: &pb::VolumeParent) -> Self {
        Self {
            volume_id: output::id_text(&parent.volume_id),
            volume: parent.volume_name.clone(),
            volume_deleted: parent.volume_deleted,
            snapshot: parent.snapshot_name.clone(),
            snapshot_number: parent.snapshot_number,
            snapshot_deleted: parent.snapshot_deleted,
        }
    }
}

/// How far a copy is with becoming independent.
#[derive(Serialize)]
pub struct FlattenView {
    /// Asked for, or the pool's policy.
    wanted: bool,
    replicas_left: u32,
    chunks_left: u64,
}

impl FlattenView {
    /// From the message.
    pub fn new(flatten: &pb::FlattenProgress) -> Self {
        Self {
            wanted: flatten.wanted,
            replicas_left: flatten.replicas_left,
            chunks_left: flatten.chunks_left,
        }
    }
}

/// What a volume is a copy of, for people.
pub fn text(parent: Option<&ParentView>, flatten: Option<&FlattenView>) -> String {
    let Some(parent) = parent else {
        return "-".to_owned();
    };
    let mut text = parent.volume.clone();
    if parent.volume_deleted {
        text.push_str(" (deleted)");
    }
    if !parent.snapshot_deleted {
        text.push_str(&format!(", snapshot {}", parent.snapshot));
    }
    if let Some(flatten) = flatten.filter(|f| f.wanted) {
        text.push_str(&format!(
            "; becomes independent: {} chunks left on {} disks",
            flatten.chunks_left, flatten.replicas_left
        ));
    }
    text
}

#[derive(Serialize)]
struct FlattenedView {
    id: String,
    name: String,
    /// It depends on nothing any more.
    independent: bool,
    flatten: Option<FlattenView>,
}

/// Carries out `volume flatten`.
pub async fn flatten(args: &FlattenArgs, context: &mut Context) -> Result<()> {
    let volume = context.metadata.volume(&args.volume).await?;
    let request = pb::FlattenVolumeRequest {
        request_id: request_id(),
        volume_id: volume.volume_id,
    };
    let doing = format!("make the volume {:?} independent", volume.name);
    let mut volume = context
        .metadata
        .call(&doing, request, async |mut c, q| c.flatten_volume(q).await)
        .await?;
    if args.wait {
        volume = wait_independent(args, context).await?;
    }
    let view = FlattenedView {
        id: output::id_text(&volume.volume_id),
        name: volume.name,
        independent: volume.parent.is_none(),
        flatten: volume.flatten.as_ref().map(FlattenView::new),
    };
    let sentence = if view.independent {
        format!("volume {} depends on no other", view.name)
    } else if volume.opened_once {
        format!(
            "volume {} is being made independent; `ashlar volume show {}` shows how far it is",
            view.name, view.name
        )
    } else {
        format!(
            "volume {} is made independent when it has been attached for the first time: until then its disks have nothing of it",
            view.name
        )
    };
    context.output.done(&view, &sentence)
}

async fn wait_independent(args: &FlattenArgs, context: &mut Context) -> Result<pb::Volume> {
    let deadline = Instant::now() + Duration::from_secs(args.wait_timeout);
    let bar = progress::bar(&args.volume, progress::STEPS);
    let mut most = 1;
    loop {
        let volume = context.metadata.volume(&args.volume).await?;
        let Some(flatten) = volume.flatten.filter(|_| volume.parent.is_some()) else {
            bar.finish_and_clear();
            return Ok(volume);
        };
        most = most.max(flatten.chunks_left);
        bar.set_length(most);
        bar.set_position(most - flatten.chunks_left);
        bar.set_message(format!(
            "{} chunks to copy, on {} disks",
            flatten.chunks_left, flatten.replicas_left
        ));
        if Instant::now() >= deadline {
            bar.abandon();
            return Err(CliError::unavailable(format!(
                "{}: after {} s {} of its replicas still depend on what it was copied from",
                volume.name, args.wait_timeout, flatten.replicas_left
            ))
            .hint(format!(
                "`ashlar volume show {}` shows whether a disk of it is away; it must have been attached once",
                volume.name
            )));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
