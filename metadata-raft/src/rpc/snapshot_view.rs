//! What a reader of a snapshot needs (docs/snapshots.md, S9): the configuration of its volume, hidden or not.

use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use super::member::{Fault, Member};
use super::snapshots::snapshot_id;
use crate::model::{SnapshotState, view};

impl Member {
    pub(super) async fn view_snapshot(
        &self,
        request: pb::ViewSnapshotRequest,
    ) -> Result<pb::SnapshotView, Fault> {
        let id = snapshot_id(&request.snapshot_id)?;
        self.linearize().await?;
        let state = self.shared.state();
        let found = state.snapshots().get(id);
        let found = found.filter(|s| s.state == SnapshotState::Ready);
        let found = found.and_then(|s| Some((s, state.volume(s.volume)?)));
        let (snapshot, volume) = found.ok_or_else(|| {
            Status::not_found(format!(
                "snapshot {id} does not exist (any more); see `ashlar snapshot list`"
            ))
        })?;
        let disks = volume.disks().into_iter().filter_map(|d| state.disk(d));
        let daemons = disks.filter_map(|disk| {
            let node = state.node(disk.node)?;
            Some(pb::DaemonEndpoint {
                disk_id: disk.id.to_vec(),
                admin_address: node.admin_address.clone(),
            })
        });
        Ok(pb::SnapshotView {
            snapshot: Some(view::snapshot(&state, snapshot)),
            volume: Some(view::volume(&state, volume)),
            disks: self.endpoints(&state, volume),
            daemons: daemons.collect(),
            cluster_id: state.cluster().to_vec(),
        })
    }
}
