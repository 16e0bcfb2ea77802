//! The GroupController service: snapshots of several volumes at one point in time.
//!
//! Invariants: no state, as the Controller; a group is made and deleted as a whole, and ids that the caller lists are
//! compared with what the group has (CSI: INVALID_ARGUMENT on a mismatch).

use std::collections::BTreeSet;

use ashlar_proto::ids::{SnapshotGroupId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use tonic::{Request, Response, Status};

use crate::errors::{Error, Result};
use crate::locks::Locks;
use crate::metadata::Metadata;
use crate::rpc::group_controller_server::GroupController;
use crate::rpc::group_controller_service_capability::{self, rpc::Type as Capability};
use crate::rpc::{self, GroupControllerServiceCapability};
use crate::snapshots::{csi_snapshot, is_ready, labels, parse, parse_group, timestamp};
use crate::{validate, volume_id};

/// Most volumes of one group: what metadata takes at once.
const VOLUMES_MAX: usize = 256;

/// The service.
#[derive(Clone, Debug)]
pub struct GroupControllerService {
    metadata: Metadata,
    locks: Locks,
}

type Answer<T> = std::result::Result<Response<T>, Status>;

/// A checked CreateVolumeGroupSnapshot.
#[derive(Debug)]
struct Wish {
    csi_name: String,
    items: Vec<pb::CreateSnapshotItem>,
}

impl Wish {
    fn parse(request: &rpc::CreateVolumeGroupSnapshotRequest) -> Result<Self> {
        let csi_name = validate::required("name", &request.name)?.to_owned();
        validate::map("parameters", &request.parameters)?;
        validate::map("secrets", &request.secrets)?;
        let labels = labels(&csi_name, &request.parameters)?;
        let count = request.source_volume_ids.len();
        if count == 0 || count > VOLUMES_MAX {
            return Err(Error::invalid(
                "source_volume_ids",
                format!("{count} volumes; a group snapshot has 1 to {VOLUMES_MAX}"),
            ));
        }
        let mut volumes = BTreeSet::<VolumeId>::new();
        for source in &request.source_volume_ids {
            validate::required("source_volume_ids", source)?;
            let volume = volume_id::parse(source)
                .ok_or_else(|| Error::NotFound(format!("volume {source} does not exist")))?;
            if !volumes.insert(volume) {
                return Err(Error::invalid(
                    "source_volume_ids",
                    format!("names volume {volume} twice"),
                ));
            }
        }
        let item = |volume: VolumeId| pb::CreateSnapshotItem {
            name: volume_id::volume_name(&format!("{csi_name}-{volume}")),
            volume_id: volume.to_vec(),
            labels: labels.clone(),
        };
        let items = volumes.into_iter().map(item).collect();
        Ok(Self { csi_name, items })
    }
}

/// A group as CSI sees it.
fn csi_group(id: SnapshotGroupId, members: &[pb::Snapshot]) -> rpc::VolumeGroupSnapshot {
    let created = members.iter().map(|s| s.created_unix_ms).min();
    rpc::VolumeGroupSnapshot {
        group_snapshot_id: id.to_string(),
        snapshots: members.iter().map(csi_snapshot).collect(),
        creation_time: created.map(timestamp),
        ready_to_use: true,
    }
}

/// What of a caller's list and of a group has no counterpart.
struct Mismatch {
    /// Ids that are not in the group.
    foreign: Vec<String>,
    /// A snapshot of the group that is not listed.
    missing: bool,
}

fn mismatch(listed: &[String], members: &[pb::Snapshot]) -> Mismatch {
    let members: BTreeSet<String> = members
        .iter()
        .map(|s| csi_snapshot(s).snapshot_id)
        .collect();
    let foreign = listed.iter().filter(|id| !members.contains(*id));
    Mismatch {
        foreign: foreign.cloned().collect(),
        missing: members.iter().any(|id| !listed.contains(id)),
    }
}

fn differs(id: SnapshotGroupId) -> Error {
    Error::invalid(
        "snapshot_ids",
        format!("are not the snapshots of group snapshot {id}"),
    )
}

impl GroupControllerService {
    /// Of this cluster.
    pub fn new(metadata: Metadata) -> Self {
        Self {
            metadata,
            locks: Locks::default(),
        }
    }

    async fn create(
        &self,
        request: rpc::CreateVolumeGroupSnapshotRequest,
    ) -> Result<rpc::CreateVolumeGroupSnapshotResponse> {
        let Wish { csi_name, items } = Wish::parse(&request)?;
        let group_name = volume_id::volume_name(&csi_name);
        let metadata = self.metadata.clone();
        let key = group_name.clone();
        let take = async move {
            let doing = format!("take group snapshot {csi_name}");
            let taken = metadata.take_snapshots(&doing, items, group_name).await?;
            let id = taken
                .first()
                .and_then(|s| SnapshotGroupId::from_slice(&s.group_id));
            let id = id.ok_or(Error::Internal(
                "metadata took a group snapshot and does not show it",
            ))?;
            tracing::info!(name = csi_name, group = %id, volumes = taken.len(), "group snapshot taken");
            Ok(rpc::CreateVolumeGroupSnapshotResponse {
                group_snapshot: Some(csi_group(id, &taken)),
            })
        };
        self.locks.run(&key, take).await
    }

    async fn delete(
        &self,
        request: rpc::DeleteVolumeGroupSnapshotRequest,
    ) -> Result<rpc::DeleteVolumeGroupSnapshotResponse> {
        let text = validate::required("group_snapshot_id", &request.group_snapshot_id)?;
        validate::map("secrets", &request.secrets)?;
        let Some(id) = parse_group(text) else {
            return Ok(rpc::DeleteVolumeGroupSnapshotResponse {});
        };
        let metadata = self.metadata.clone();
        let listed = request.snapshot_ids;
        let delete = async move {
            let members = members(&metadata, id).await?;
            if members.is_empty() {
                return Ok(rpc::DeleteVolumeGroupSnapshotResponse {});
            }
            let mismatch = mismatch(&listed, &members);
            if mismatch.missing {
                return Err(differs(id));
            }
            // One that an operator has deleted alone is no mismatch.
            for foreign in mismatch.foreign {
                if let Some(snapshot) = parse(&foreign)
                    && let Some(found) = metadata.snapshot(snapshot).await?
                    && found.group_id != id.to_vec()
                {
                    return Err(differs(id));
                }
            }
            let ids = members.into_iter().map(|s| s.snapshot_id).collect();
            let doing = format!("delete group snapshot {id}");
            metadata.drop_snapshots(&doing, ids).await?;
            tracing::info!(group = %id, "group snapshot deleted");
            Ok(rpc::DeleteVolumeGroupSnapshotResponse {})
        };
        self.locks.run(text, delete).await
    }

    async fn get(
        &self,
        request: rpc::GetVolumeGroupSnapshotRequest,
    ) -> Result<rpc::GetVolumeGroupSnapshotResponse> {
        let text = validate::required("group_snapshot_id", &request.group_snapshot_id)?;
        validate::map("secrets", &request.secrets)?;
        let absent = || Error::NotFound(format!("group snapshot {text} does not exist"));
        let id = parse_group(text).ok_or_else(absent)?;
        let members = members(&self.metadata, id).await?;
        if members.is_empty() {
            return Err(absent());
        }
        let mismatch = mismatch(&request.snapshot_ids, &members);
        if mismatch.missing || !mismatch.foreign.is_empty() {
            return Err(differs(id));
        }
        Ok(rpc::GetVolumeGroupSnapshotResponse {
            group_snapshot: Some(csi_group(id, &members)),
        })
    }
}

/// The snapshots of a group that are there; none of an unknown group.
async fn members(metadata: &Metadata, id: SnapshotGroupId) -> Result<Vec<pb::Snapshot>> {
    // A group is smaller than a page.
    let request = pb::ListSnapshotsRequest {
        group_id: id.to_vec(),
        ..pb::ListSnapshotsRequest::default()
    };
    let doing = format!("list group snapshot {id}");
    let page = metadata
        .ask(&doing, request, async |mut c, q| c.list_snapshots(q).await)
        .await?;
    Ok(page.snapshots.into_iter().filter(is_ready).collect())
}

#[tonic::async_trait]
impl GroupController for GroupControllerService {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<rpc::GroupControllerGetCapabilitiesRequest>,
    ) -> Answer<rpc::GroupControllerGetCapabilitiesResponse> {
        let capability = GroupControllerServiceCapability {
            r#type: Some(group_controller_service_capability::Type::Rpc(
                group_controller_service_capability::Rpc {
                    r#type: Capability::CreateDeleteGetVolumeGroupSnapshot.into(),
                },
            )),
        };
        Ok(Response::new(rpc::GroupControllerGetCapabilitiesResponse {
            capabilities: vec![capability],
        }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<rpc::CreateVolumeGroupSnapshotRequest>,
    ) -> Answer<rpc::CreateVolumeGroupSnapshotResponse> {
        Ok(Response::new(self.create(request.into_inner()).await?))
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<rpc::DeleteVolumeGroupSnapshotRequest>,
    ) -> Answer<rpc::DeleteVolumeGroupSnapshotResponse> {
        Ok(Response::new(self.delete(request.into_inner()).await?))
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<rpc::GetVolumeGroupSnapshotRequest>,
    ) -> Answer<rpc::GetVolumeGroupSnapshotResponse> {
        Ok(Response::new(self.get(request.into_inner()).await?))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use ashlar_proto::ids::SnapshotId;
    use tonic::Code;

    fn request(sources: &[&str]) -> rpc::CreateVolumeGroupSnapshotRequest {
        rpc::CreateVolumeGroupSnapshotRequest {
            name: "groupsnapshot-1".into(),
            source_volume_ids: sources.iter().map(|s| (*s).to_owned()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_group_is_the_same_in_any_order() {
        let (a, b) = (VolumeId([1; 16]).to_string(), VolumeId([2; 16]).to_string());
        let one = Wish::parse(&request(&[&a, &b])).unwrap();
        let other = Wish::parse(&request(&[&b, &a])).unwrap();
        assert_eq!(one.items, other.items);
        assert_eq!(one.items[0].name, format!("groupsnapshot-1-{a}"));
        assert_ne!(one.items[0].name, one.items[1].name);
    }

    #[test]
    fn what_is_no_group_is_refused() {
        let a = VolumeId([1; 16]).to_string();
        for (sources, code) in [
            (vec![], Code::InvalidArgument),
            (vec![""], Code::InvalidArgument),
            (vec!["none"], Code::NotFound),
            (vec![a.as_str(), a.as_str()], Code::InvalidArgument),
        ] {
            assert_eq!(Wish::parse(&request(&sources)).unwrap_err().code(), code);
        }
        let mut unnamed = request(&[&a]);
        unnamed.name.clear();
        let error = Wish::parse(&unnamed).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        let mut unknown = request(&[&a]);
        unknown.parameters.insert("k".into(), "v".into());
        let error = Wish::parse(&unknown).unwrap_err();
        assert!(error.to_string().contains("parameters[k]"), "{error}");
    }

    #[test]
    fn lists_are_compared_with_the_group() {
        let ids = [
            SnapshotId([1; 16]),
            SnapshotId([2; 16]),
            SnapshotId([3; 16]),
        ];
        let members: Vec<_> = ids[..2]
            .iter()
            .map(|id| pb::Snapshot {
                snapshot_id: id.to_vec(),
                state: pb::SnapshotState::Ready.into(),
                created_unix_ms: 1000,
                ..Default::default()
            })
            .collect();
        let texts: Vec<_> = ids.iter().map(ToString::to_string).collect();
        let same = mismatch(&texts[..2], &members);
        assert!(!same.missing && same.foreign.is_empty());
        assert!(mismatch(&texts[..1], &members).missing);
        assert_eq!(mismatch(&texts, &members).foreign, texts[2..]);
        let group = csi_group(SnapshotGroupId([9; 16]), &members);
        assert!(group.ready_to_use && group.snapshots.len() == 2);
        assert_eq!(group.creation_time.unwrap().seconds, 1);
    }
}
