//! `ashlar snapshot extents` and `diff`: which bytes of a snapshot have data, and which differ between two.
//!
//! Invariant: output is written while the list comes in: a volume of any size takes no memory here.

use ashlar_proto::ids::SnapshotId;
use ashlar_proto::rpc::metadata as pb;
use nbd_client::extents::{BlockLists, Extent, Extents, ExtentsError};
use serde::Serialize;

use super::Context;
use crate::error::{CliError, Result};
use crate::size;

#[derive(Serialize)]
struct ExtentView {
    offset: u64,
    length: u64,
    /// `data`, or `zeroes`: what was there in the base was trimmed or overwritten with zeroes.
    kind: &'static str,
}

impl ExtentView {
    fn new(extent: &Extent) -> Self {
        Self {
            offset: extent.offset,
            length: extent.length,
            kind: if extent.data { "data" } else { "zeroes" },
        }
    }
}

/// The extents of a snapshot that have data.
pub async fn extents(snapshot: &str, context: &mut Context) -> Result<()> {
    let snapshot = context.metadata.snapshot(snapshot).await?;
    show(&snapshot, None, context).await
}

/// The extents in which a snapshot differs from an older one.
pub async fn diff(base: &str, snapshot: &str, context: &mut Context) -> Result<()> {
    let base = context.metadata.snapshot(base).await?;
    let snapshot = context.metadata.snapshot(snapshot).await?;
    show(&snapshot, Some(&base), context).await
}

async fn show(
    snapshot: &pb::Snapshot,
    base: Option<&pb::Snapshot>,
    context: &mut Context,
) -> Result<()> {
    let base_id = base.map(id).transpose()?;
    let lists = block_lists(context)?;
    let doing = match base {
        None => format!("list the extents of {:?}", snapshot.name),
        Some(base) => format!("compare {:?} with {:?}", snapshot.name, base.name),
    };
    let failed = |error| failure(&doing, &error);
    let found = lists.changed(id(snapshot)?, base_id, 0).await;
    print(found.map_err(failed)?, context, failed).await
}

async fn print(
    mut found: Extents,
    context: &Context,
    failed: impl Fn(ExtentsError) -> CliError,
) -> Result<()> {
    let header = format!("{:>20} {:>20}  KIND", "OFFSET", "LENGTH");
    let mut rows = context.output.rows(&header)?;
    let (mut count, mut data, mut zeroes) = (0u64, 0u64, 0u64);
    while let Some(extent) = found.next().await.map_err(&failed)? {
        let view = ExtentView::new(&extent);
        let line = format!("{:>20} {:>20}  {}", view.offset, view.length, view.kind);
        if !rows.row(&view, &line)? {
            return Ok(());
        }
        count += 1;
        *(if extent.data { &mut data } else { &mut zeroes }) += extent.length;
    }
    let zeroes = match zeroes {
        0 => String::new(),
        bytes => format!(", {} that read as zeroes now", size::format(bytes)),
    };
    rows.end(&format!(
        "{count} extents with {} of data{zeroes}",
        size::format(data)
    ))
}

/// What asks for lists.
pub(super) fn block_lists(context: &Context) -> Result<BlockLists> {
    BlockLists::new(&context.metadata.addresses())
        .map_err(|error| CliError::usage(error.to_string()))
}

pub(super) fn id(snapshot: &pb::Snapshot) -> Result<SnapshotId> {
    SnapshotId::from_slice(&snapshot.snapshot_id).ok_or_else(|| {
        CliError::error("the cluster sent a snapshot without an id: report this bug")
    })
}

pub(super) fn failure(doing: &str, error: &ExtentsError) -> CliError {
    let message = format!("cannot {doing}: {error}");
    match error {
        ExtentsError::NotFound(_) => CliError::not_found(message),
        ExtentsError::NotComparable(_) | ExtentsError::OutOfRange { .. } => {
            CliError::conflict(message)
        }
        ExtentsError::Unavailable(_) => CliError::unavailable(message),
        ExtentsError::Failed(_) => CliError::error(message),
    }
}
