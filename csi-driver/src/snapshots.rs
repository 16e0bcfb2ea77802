//! What the Controller and the GroupController share about snapshots: ids, names, parameters, messages.
//!
//! Invariants: a CSI name makes one snapshot (or group), whoever asks and however often; a snapshot that is being taken
//! or deleted is shown to nobody; an unknown parameter is refused with its key.

use std::collections::{BTreeMap, HashMap};

use ashlar_proto::ids::{SnapshotGroupId, SnapshotId};
use ashlar_proto::rpc::metadata as pb;
use prost_types::Timestamp;

use crate::errors::{Error, Result};
use crate::metadata::{Metadata, request_id};
use crate::parameters::NAME_LABEL;
use crate::{rpc, validate, volume_id};

/// What external-snapshotter adds with --extra-create-metadata; kept as labels for people.
const METADATA_KEYS: [&str; 6] = [
    "csi.storage.k8s.io/volumesnapshot/name",
    "csi.storage.k8s.io/volumesnapshot/namespace",
    "csi.storage.k8s.io/volumesnapshotcontent/name",
    "csi.storage.k8s.io/volumegroupsnapshot/name",
    "csi.storage.k8s.io/volumegroupsnapshot/namespace",
    "csi.storage.k8s.io/volumegroupsnapshotcontent/name",
];
/// Longest value of a label.
const LABEL_BYTES_MAX: usize = 320;

/// Reads a CSI snapshot id; `None` is the id of no snapshot of ours. One spelling only, as for volumes.
pub fn parse(text: &str) -> Option<SnapshotId> {
    let id: SnapshotId = text.parse().ok()?;
    (id.to_string() == text && !id.is_nil()).then_some(id)
}

/// Reads a CSI group snapshot id, likewise.
pub fn parse_group(text: &str) -> Option<SnapshotGroupId> {
    let id: SnapshotGroupId = text.parse().ok()?;
    (id.to_string() == text && !id.is_nil()).then_some(id)
}

/// The parameters of a VolumeSnapshotClass or VolumeGroupSnapshotClass, as labels.
pub fn labels(csi_name: &str, map: &HashMap<String, String>) -> Result<HashMap<String, String>> {
    let mut labels = HashMap::from([(NAME_LABEL.to_owned(), csi_name.to_owned())]);
    // In order, so that the same mistake gives the same message.
    for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
        let field = || format!("parameters[{key}]");
        if !METADATA_KEYS.contains(&key.as_str()) {
            return Err(Error::invalid(
                field(),
                "unknown parameter; accepted: none (a VolumeSnapshotClass of Ashlar has no parameters)",
            ));
        }
        if value.len() > LABEL_BYTES_MAX {
            return Err(Error::invalid(
                field(),
                format!("longer than {LABEL_BYTES_MAX} bytes"),
            ));
        }
        labels.insert(key.clone(), value.clone());
    }
    Ok(labels)
}

/// A moment as CSI writes it.
pub fn timestamp(unix_ms: u64) -> Timestamp {
    Timestamp {
        seconds: validate::signed(unix_ms / 1000),
        // Below a thousand million.
        nanos: i32::try_from(unix_ms % 1000 * 1_000_000).unwrap_or(0),
    }
}

/// Whether callers are to see a snapshot.
pub fn is_ready(snapshot: &pb::Snapshot) -> bool {
    snapshot.state() == pb::SnapshotState::Ready
}

/// A snapshot as CSI sees it.
pub fn csi_snapshot(snapshot: &pb::Snapshot) -> rpc::Snapshot {
    let group = SnapshotGroupId::from_slice(&snapshot.group_id);
    rpc::Snapshot {
        size_bytes: validate::signed(snapshot.size_bytes),
        snapshot_id: SnapshotId::from_slice(&snapshot.snapshot_id)
            .map_or_else(String::new, |id| id.to_string()),
        source_volume_id: volume_id::format(&snapshot.volume_id),
        creation_time: Some(timestamp(snapshot.created_unix_ms)),
        ready_to_use: is_ready(snapshot),
        group_snapshot_id: group.map_or_else(String::new, |id| id.to_string()),
        accessible_topology: Vec::new(),
    }
}

impl Metadata {
    /// A snapshot by its id, also one that is being deleted; None if there is none.
    pub async fn snapshot(&self, id: SnapshotId) -> Result<Option<pb::Snapshot>> {
        let request = pb::GetSnapshotRequest {
            name: String::new(),
            snapshot_id: id.to_vec(),
        };
        let answer = self
            .ask(&format!("find snapshot {id}"), request, async |mut c, q| {
                c.get_snapshot(q).await
            })
            .await;
        match answer {
            Ok(snapshot) => Ok(Some(snapshot)),
            Err(error) if error.code() == tonic::Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes snapshots at one point in time.
    pub async fn take_snapshots(
        &self,
        doing: &str,
        items: Vec<pb::CreateSnapshotItem>,
        group_name: String,
    ) -> Result<Vec<pb::Snapshot>> {
        let request = pb::CreateSnapshotsRequest {
            request_id: request_id(),
            items,
            group_name,
        };
        let taken = self
            .ask(doing, request, async |mut c, q| c.create_snapshots(q).await)
            .await?;
        Ok(taken.snapshots)
    }

    /// Deletes snapshots; those that do not exist are passed over.
    pub async fn drop_snapshots(&self, doing: &str, snapshot_ids: Vec<Vec<u8>>) -> Result<()> {
        let request = pb::DeleteSnapshotsRequest {
            request_id: request_id(),
            snapshot_ids,
        };
        self.ask(doing, request, async |mut c, q| c.delete_snapshots(q).await)
            .await
            .map(drop)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn a_snapshot_class_has_no_parameters() {
        let map = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        assert_eq!(labels("s", &HashMap::new()).unwrap()[NAME_LABEL], "s");
        let told = labels("s", &map(METADATA_KEYS[0], "mine")).unwrap();
        assert_eq!(told[METADATA_KEYS[0]], "mine");
        let error = labels("s", &map("color", "red")).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.to_string().contains("parameters[color]"), "{error}");
        let long = map(METADATA_KEYS[0], &"x".repeat(321));
        assert_eq!(
            labels("s", &long).unwrap_err().code(),
            Code::InvalidArgument
        );
    }

    #[test]
    fn a_snapshot_is_shown_as_csi_wants_it() {
        let id = SnapshotId::generate();
        let snapshot = pb::Snapshot {
            snapshot_id: id.to_vec(),
            volume_id: vec![7; 16],
            size_bytes: 1 << 30,
            created_unix_ms: 1_700_000_000_250,
            state: pb::SnapshotState::Ready.into(),
            ..Default::default()
        };
        let shown = csi_snapshot(&snapshot);
        assert_eq!(parse(&shown.snapshot_id), Some(id));
        assert!(shown.ready_to_use && shown.group_snapshot_id.is_empty());
        let time = shown.creation_time.unwrap();
        assert_eq!((time.seconds, time.nanos), (1_700_000_000, 250_000_000));
        assert_eq!(shown.size_bytes, 1 << 30);
        let deleting = pb::Snapshot {
            state: pb::SnapshotState::Deleting.into(),
            ..snapshot
        };
        assert!(!csi_snapshot(&deleting).ready_to_use);
    }

    #[test]
    fn ids_have_one_spelling() {
        let id = SnapshotId::generate().to_string();
        assert!(parse(&id).is_some() && parse_group(&id).is_some());
        for wrong in [
            &id.to_uppercase(),
            "none",
            "",
            "00000000-0000-0000-0000-000000000000",
        ] {
            assert!(parse(wrong).is_none() && parse_group(wrong).is_none());
        }
    }
}
