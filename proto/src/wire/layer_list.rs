//! The fields of a layer list in data frames.
//!
//! Invariant: what is read is a list (`LayerList::check`), with at most as many snapshots as a volume may have.

use bytes::{BufMut, BytesMut};

use super::codec::FrameError;
use super::fields::Fields;
use crate::descriptor::MAX_SNAPSHOTS;
use crate::ids::SnapshotNumber;
use crate::layers::LayerList;

/// Appends a list.
pub(super) fn put_layers(layers: &LayerList, out: &mut BytesMut) {
    assert!(layers.live.len() <= MAX_SNAPSHOTS, "too many snapshots");
    out.put_u64_le(layers.revision);
    out.put_u32_le(layers.settled.0);
    out.put_u16_le(layers.live.len() as u16);
    for snapshot in &layers.live {
        out.put_u32_le(snapshot.0);
    }
}

/// Reads a list.
pub(super) fn parse_layers(f: &mut Fields<'_>) -> Result<LayerList, FrameError> {
    let revision = f.u64()?;
    let settled = SnapshotNumber(f.u32()?);
    let count = usize::from(f.u16()?);
    if count > MAX_SNAPSHOTS {
        return Err(FrameError::Bounds("number of snapshots"));
    }
    let live = f.take(count * 4)?.as_chunks::<4>().0.iter();
    let layers = LayerList {
        revision,
        settled,
        live: live
            .map(|n| SnapshotNumber(u32::from_le_bytes(*n)))
            .collect(),
    };
    layers.check().map_err(|e| FrameError::Bounds(e.0))?;
    Ok(layers)
}
