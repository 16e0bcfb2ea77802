//! The fields of a Fence (docs/protocol.md): with a link only where a clone's replica may be created.

use bytes::BufMut;

use super::codec::FrameError;
use super::fields::Fields;
use super::message::{Fence, FenceLink};
use crate::descriptor::Parent;
use crate::ids::{Epoch, SnapshotNumber, VolumeId};

/// Appends the fields.
pub(super) fn put_fence(fence: &Fence, out: &mut impl BufMut) {
    out.put_u8(u8::from(fence.create));
    out.put_u64_le(fence.rebuild_epoch.0);
    if let Some(link) = fence.link {
        out.put_slice(&link.parent.volume.0);
        out.put_u32_le(link.parent.number.0);
        out.put_u8(u8::from(link.required) | u8::from(link.whole) << 1);
    }
}

/// Reads the fields.
pub(super) fn parse_fence(f: &mut Fields<'_>) -> Result<Fence, FrameError> {
    let create = f.boolean()?;
    let rebuild_epoch = Epoch(f.u64()?);
    let mut link = None;
    if !f.is_empty() {
        let volume = VolumeId(f.array()?);
        let number = SnapshotNumber(f.u32()?);
        let flags = f.u8()?;
        let parent = Parent::of(volume, number).flatten();
        let parent = parent.filter(|_| create && flags <= 3);
        link = Some(FenceLink {
            parent: parent.ok_or(FrameError::Bounds("link of a replica"))?,
            required: flags & 1 != 0,
            whole: flags & 2 != 0,
        });
    }
    Ok(Fence {
        create,
        rebuild_epoch,
        link,
    })
}
