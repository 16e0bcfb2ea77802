//! CreateSnapshot, DeleteSnapshot, ListSnapshots and GetSnapshot.
//!
//! Invariant: a snapshot that belongs to a group goes with its group (CSI: INVALID_ARGUMENT for one alone).

use ashlar_proto::rpc::metadata as pb;

use super::ControllerService;
use super::volumes::{PAGE_MAX, TOKEN_PREFIX};
use crate::errors::{Error, Result};
use crate::snapshots::{csi_snapshot, is_ready, labels, parse};
use crate::{rpc, validate, volume_id};

/// The last snapshot of the page before.
fn read_token(token: &str) -> Result<&str> {
    if token.is_empty() {
        return Ok("");
    }
    match token.strip_prefix(TOKEN_PREFIX) {
        Some(id) if parse(id).is_some() => Ok(id),
        _ => Err(Error::BadToken(
            "was not given out by this driver; begin again without a token".to_owned(),
        )),
    }
}

impl ControllerService {
    pub(super) async fn take_snapshot(
        &self,
        request: rpc::CreateSnapshotRequest,
    ) -> Result<rpc::CreateSnapshotResponse> {
        let csi_name = validate::required("name", &request.name)?.to_owned();
        let source = validate::required("source_volume_id", &request.source_volume_id)?;
        validate::map("parameters", &request.parameters)?;
        validate::map("secrets", &request.secrets)?;
        let labels = labels(&csi_name, &request.parameters)?;
        let volume = volume_id::parse(source)
            .ok_or_else(|| Error::NotFound(format!("volume {source} does not exist")))?;
        let item = pb::CreateSnapshotItem {
            name: volume_id::volume_name(&csi_name),
            volume_id: volume.to_vec(),
            labels,
        };
        let metadata = self.metadata.clone();
        let key = format!("snapshot {}", item.name);
        let take = async move {
            let doing = format!("take snapshot {csi_name} of volume {volume}");
            let taken = metadata
                .take_snapshots(&doing, vec![item], String::new())
                .await?;
            let snapshot = taken.first().ok_or(Error::Internal(
                "metadata took a snapshot and does not show it",
            ))?;
            let snapshot = csi_snapshot(snapshot);
            tracing::info!(name = csi_name, %volume, snapshot = snapshot.snapshot_id, "snapshot taken");
            Ok(rpc::CreateSnapshotResponse {
                snapshot: Some(snapshot),
            })
        };
        self.locks.run(&key, take).await
    }

    pub(super) async fn drop_snapshot(
        &self,
        request: rpc::DeleteSnapshotRequest,
    ) -> Result<rpc::DeleteSnapshotResponse> {
        let text = validate::required("snapshot_id", &request.snapshot_id)?;
        validate::map("secrets", &request.secrets)?;
        // An id that is none of ours cannot be the id of a snapshot that there is.
        let Some(id) = parse(text) else {
            return Ok(rpc::DeleteSnapshotResponse {});
        };
        let metadata = self.metadata.clone();
        let drop = async move {
            let found = metadata.snapshot(id).await?;
            let found = found.filter(|s| s.state() != pb::SnapshotState::Deleting);
            let Some(snapshot) = found else {
                return Ok(rpc::DeleteSnapshotResponse {});
            };
            if !snapshot.group_id.is_empty() {
                return Err(Error::invalid(
                    "snapshot_id",
                    format!(
                        "belongs to the group snapshot {}, and is deleted with it",
                        snapshot.group_name
                    ),
                ));
            }
            let doing = format!("delete snapshot {id}");
            metadata.drop_snapshots(&doing, vec![id.to_vec()]).await?;
            tracing::info!(snapshot = %id, "snapshot deleted");
            Ok(rpc::DeleteSnapshotResponse {})
        };
        self.locks.run(text, drop).await
    }

    pub(super) async fn snapshots(
        &self,
        request: rpc::ListSnapshotsRequest,
    ) -> Result<rpc::ListSnapshotsResponse> {
        let wanted = u32::try_from(request.max_entries)
            .map_err(|_| Error::invalid("max_entries", "is negative"))?;
        let page_token = read_token(&request.starting_token)?.to_owned();
        let source = &request.source_volume_id;
        if !request.snapshot_id.is_empty() {
            let found = match parse(&request.snapshot_id) {
                Some(id) => self.metadata.snapshot(id).await?,
                None => None,
            };
            let found = found.iter().filter(|s| is_ready(s)).map(csi_snapshot);
            let found = found.filter(|s| source.is_empty() || s.source_volume_id == *source);
            return Ok(listed(found.collect(), String::new()));
        }
        let volume_id = match source.as_str() {
            "" => Vec::new(),
            source => match volume_id::parse(source) {
                Some(id) => id.to_vec(),
                None => return Ok(listed(Vec::new(), String::new())),
            },
        };
        let ask = pb::ListSnapshotsRequest {
            volume_id,
            page_token,
            page_size: match wanted {
                0 => PAGE_MAX,
                wanted => wanted.min(PAGE_MAX),
            },
            ..pb::ListSnapshotsRequest::default()
        };
        let page = self
            .metadata
            .ask("list the snapshots", ask, async |mut c, q| {
                c.list_snapshots(q).await
            })
            .await?;
        let next_token = match page.next_page_token.as_str() {
            "" => String::new(),
            id => format!("{TOKEN_PREFIX}{id}"),
        };
        let ready = page.snapshots.iter().filter(|s| is_ready(s));
        Ok(listed(ready.map(csi_snapshot).collect(), next_token))
    }

    pub(super) async fn snapshot(
        &self,
        request: rpc::GetSnapshotRequest,
    ) -> Result<rpc::GetSnapshotResponse> {
        let text = validate::required("snapshot_id", &request.snapshot_id)?;
        let found = match parse(text) {
            Some(id) => self.metadata.snapshot(id).await?,
            None => None,
        };
        let found = found
            .filter(is_ready)
            .ok_or_else(|| Error::NotFound(format!("snapshot {text} does not exist")))?;
        Ok(rpc::GetSnapshotResponse {
            snapshot: Some(csi_snapshot(&found)),
        })
    }
}

fn listed(snapshots: Vec<rpc::Snapshot>, next_token: String) -> rpc::ListSnapshotsResponse {
    let entry = |snapshot| rpc::list_snapshots_response::Entry {
        snapshot: Some(snapshot),
    };
    rpc::ListSnapshotsResponse {
        entries: snapshots.into_iter().map(entry).collect(),
        next_token,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use ashlar_proto::ids::SnapshotId;
    use tonic::Code;

    #[test]
    fn tokens_of_others_are_refused() {
        let id = SnapshotId::generate().to_string();
        assert_eq!(read_token("").unwrap(), "");
        assert_eq!(read_token(&format!("after:{id}")).unwrap(), id);
        for wrong in ["invalid-token", "after:", "after:pvc-1", id.as_str()] {
            assert_eq!(read_token(wrong).unwrap_err().code(), Code::Aborted);
        }
    }
}
