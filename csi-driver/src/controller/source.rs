//! What a volume is made from: a snapshot or another volume (CSI: VolumeContentSource).
//!
//! Invariants: a source that is not there is NOT_FOUND; a size below the source's is OUT_OF_RANGE; a volume that was made from
//! something else is not what was asked for, also when the source is gone.

use ashlar_proto::ids::{SnapshotId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use pb::create_volume_request::Source as Asked;

use crate::errors::{Error, Result};
use crate::metadata::Metadata;
use crate::rpc::volume_content_source::{SnapshotSource, Type, VolumeSource};
use crate::validate::{self, Range};
use crate::{rpc, snapshots, volume_id};

/// A source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// A volume as it is.
    Volume(VolumeId),
}

impl Source {
    /// Reads a source; `None` if the volume is to be empty.
    pub(super) fn parse(source: Option<&rpc::VolumeContentSource>) -> Result<Option<Self>> {
        const FIELD: &str = "volume_content_source";
        let Some(source) = source else {
            return Ok(None);
        };
        match &source.r#type {
            Some(Type::Snapshot(s)) => {
                let id = validate::required(
                    "volume_content_source.snapshot.snapshot_id",
                    &s.snapshot_id,
                )?;
                let known = snapshots::parse(id).map(Self::Snapshot);
                known
                    .map(Some)
                    .ok_or_else(|| Error::NotFound(format!("snapshot {id} does not exist")))
            }
            Some(Type::Volume(v)) => {
                let id =
                    validate::required("volume_content_source.volume.volume_id", &v.volume_id)?;
                let known = volume_id::parse(id).map(Self::Volume);
                known
                    .map(Some)
                    .ok_or_else(|| Error::NotFound(format!("volume {id} does not exist")))
            }
            None => Err(Error::invalid(
                FIELD,
                "names neither a snapshot nor a volume",
            )),
        }
    }

    /// What a volume says that it was made from.
    pub(super) fn of(volume: &pb::Volume) -> Option<Self> {
        let snapshot = SnapshotId::from_slice(&volume.source_snapshot_id).map(Self::Snapshot);
        snapshot.or_else(|| VolumeId::from_slice(&volume.source_volume_id).map(Self::Volume))
    }

    /// As metadata is asked for it.
    pub(super) fn asked(self) -> Asked {
        match self {
            Self::Snapshot(id) => Asked::SnapshotId(id.to_vec()),
            Self::Volume(id) => Asked::VolumeId(id.to_vec()),
        }
    }

    /// As CSI writes it.
    pub(super) fn message(self) -> rpc::VolumeContentSource {
        let source = match self {
            Self::Snapshot(id) => Type::Snapshot(SnapshotSource {
                snapshot_id: id.to_string(),
            }),
            Self::Volume(id) => Type::Volume(VolumeSource {
                volume_id: volume_id::format(&id.to_vec()),
            }),
        };
        rpc::VolumeContentSource {
            r#type: Some(source),
        }
    }

    /// The size of a volume that is made from this; `min` as for an empty one.
    pub(super) async fn choose(self, metadata: &Metadata, range: &Range, min: u64) -> Result<u64> {
        let absent = |what: String| Error::NotFound(format!("{what} does not exist"));
        let size = match self {
            Self::Snapshot(id) => {
                let found = metadata.snapshot(id).await?.filter(snapshots::is_ready);
                let found = found.ok_or_else(|| absent(format!("snapshot {id}")))?;
                found.size_bytes
            }
            Self::Volume(id) => {
                let found = metadata.volume(id).await?;
                found
                    .ok_or_else(|| absent(format!("volume {id}")))?
                    .size_bytes
            }
        };
        let range = Range {
            required: Some(range.required.unwrap_or(size)),
            limit: range.limit,
        };
        let chosen = range.choose(min.min(size))?;
        if chosen < size {
            return Err(Error::OutOfRange(format!(
                "capacity_range: {chosen} bytes are less than the {size} bytes of the source; ask for at least as much"
            )));
        }
        Ok(chosen)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn a_source_is_read_and_written_alike() {
        assert_eq!(Source::parse(None).unwrap(), None);
        for source in [
            Source::Snapshot(SnapshotId::generate()),
            Source::Volume(VolumeId::generate()),
        ] {
            let message = source.message();
            assert_eq!(Source::parse(Some(&message)).unwrap(), Some(source));
            let volume = match source.asked() {
                Asked::SnapshotId(source_snapshot_id) => pb::Volume {
                    source_snapshot_id,
                    ..Default::default()
                },
                Asked::VolumeId(source_volume_id) => pb::Volume {
                    source_volume_id,
                    ..Default::default()
                },
            };
            assert_eq!(Source::of(&volume), Some(source));
        }
        assert_eq!(Source::of(&pb::Volume::default()), None);
    }

    #[test]
    fn what_cannot_be_a_source_is_refused() {
        let snapshot = |id: &str| {
            Some(Type::Snapshot(SnapshotSource {
                snapshot_id: id.into(),
            }))
        };
        for (r#type, code) in [
            (None, Code::InvalidArgument),
            (snapshot(""), Code::InvalidArgument),
            (snapshot("none"), Code::NotFound),
        ] {
            let source = rpc::VolumeContentSource { r#type };
            let error = Source::parse(Some(&source)).unwrap_err();
            assert_eq!(error.code(), code, "{error}");
        }
    }
}
