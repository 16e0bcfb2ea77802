//! The gRPC trait: one line per procedure, each routed to the leader.

use std::sync::Arc;
use std::time::Duration;

use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use ashlar_proto::rpc::metadata::metadata_server::Metadata;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::member::Member;
use super::watch::EventStream;
use crate::metrics::count_call;

/// A membership change may send a whole snapshot first.
const MEMBERSHIP_DEADLINE: Duration = Duration::from_secs(60);
/// Two commands, and the time in which holders report.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(8);

/// See the module.
pub struct Service(pub Arc<Member>);

type Reply<T> = Result<Response<T>, Status>;

macro_rules! routed {
    ($($name:ident: $request:ty => $reply:ty;)*) => {
        #[tonic::async_trait]
        impl Metadata for Service {
            type WatchVolumesStream = EventStream;

            async fn get_cluster(&self, request: Request<pb::GetClusterRequest>) -> Reply<pb::Cluster> {
                // From another member it asks how far the leader has applied; from anybody else it must
                // be answered without a leader, too.
                let call = async {
                    if super::member::is_forwarded(&request) {
                        return self.0.confirmed_cluster(request).await.map(Response::new);
                    }
                    Ok(Response::new(self.0.cluster()))
                };
                count_call("get_cluster", call).await
            }

            async fn add_member(&self, request: Request<pb::AddMemberRequest>) -> Reply<pb::Cluster> {
                let local = |r| self.0.add_member(r);
                let remote = |mut c: MetadataClient<Channel>, r| async move { c.add_member(r).await };
                count_call("add_member", self.0.route_within(MEMBERSHIP_DEADLINE, request, local, remote)).await
            }

            async fn remove_member(&self, request: Request<pb::RemoveMemberRequest>) -> Reply<pb::Cluster> {
                let local = |r| self.0.remove_member(r);
                let remote = |mut c: MetadataClient<Channel>, r| async move { c.remove_member(r).await };
                count_call("remove_member", self.0.route_within(MEMBERSHIP_DEADLINE, request, local, remote)).await
            }

            async fn create_snapshots(&self, request: Request<pb::CreateSnapshotsRequest>) -> Reply<pb::CreateSnapshotsResponse> {
                let local = |r| self.0.create_snapshots(r);
                let remote = |mut c: MetadataClient<Channel>, r| async move { c.create_snapshots(r).await };
                count_call("create_snapshots", self.0.route_within(SNAPSHOT_DEADLINE, request, local, remote)).await
            }

            async fn create_volume(&self, request: Request<pb::CreateVolumeRequest>) -> Reply<pb::Volume> {
                let local = |r| self.0.create_volume(r);
                let remote = |mut c: MetadataClient<Channel>, r| async move { c.create_volume(r).await };
                // For a clone of a volume a snapshot is taken.
                let deadline = match &request.get_ref().source {
                    Some(pb::create_volume_request::Source::VolumeId(_)) => SNAPSHOT_DEADLINE,
                    _ => super::member::ATTEMPT_DEADLINE,
                };
                count_call("create_volume", self.0.route_within(deadline, request, local, remote)).await
            }

            async fn watch_volumes(&self, request: Request<pb::WatchVolumesRequest>) -> Reply<EventStream> {
                let begin = async { super::watch::start(self.0.clone(), request.into_inner()).map(Response::new) };
                count_call("watch_volumes", begin).await
            }

            $(async fn $name(&self, request: Request<$request>) -> Reply<$reply> {
                let local = |r| self.0.$name(r);
                let remote = |mut c: MetadataClient<Channel>, r| async move { c.$name(r).await };
                count_call(stringify!($name), self.0.route(request, local, remote)).await
            })*
        }
    };
}

routed! {
    register_node: pb::RegisterNodeRequest => pb::Node;
    register_disk: pb::RegisterDiskRequest => pb::Disk;
    heartbeat: pb::HeartbeatRequest => pb::HeartbeatResponse;
    list_nodes: pb::ListNodesRequest => pb::ListNodesResponse;
    list_disks: pb::ListDisksRequest => pb::ListDisksResponse;
    remove_disk: pb::RemoveDiskRequest => pb::RemoveDiskResponse;
    set_service: pb::SetServiceRequest => pb::SetServiceResponse;
    get_repairs: pb::GetRepairsRequest => pb::Repairs;
    create_pool: pb::CreatePoolRequest => pb::Pool;
    update_pool: pb::UpdatePoolRequest => pb::Pool;
    delete_pool: pb::DeletePoolRequest => pb::DeletePoolResponse;
    list_pools: pb::ListPoolsRequest => pb::ListPoolsResponse;
    flatten_volume: pb::FlattenVolumeRequest => pb::Volume;
    begin_revert: pb::BeginRevertRequest => pb::Volume;
    end_revert: pb::EndRevertRequest => pb::Volume;
    get_volume: pb::GetVolumeRequest => pb::Volume;
    list_volumes: pb::ListVolumesRequest => pb::ListVolumesResponse;
    resize_volume: pb::ResizeVolumeRequest => pb::Volume;
    delete_volume: pb::DeleteVolumeRequest => pb::DeleteVolumeResponse;
    open_volume: pb::OpenVolumeRequest => pb::OpenVolumeResponse;
    close_volume: pb::CloseVolumeRequest => pb::Volume;
    change_replicas: pb::ChangeReplicasRequest => pb::ChangeReplicasResponse;
    publish_volume: pb::PublishVolumeRequest => pb::Volume;
    unpublish_volume: pb::UnpublishVolumeRequest => pb::Volume;
    set_volume_format: pb::SetVolumeFormatRequest => pb::Volume;
    rebuild_replica: pb::RebuildReplicaRequest => pb::Volume;
    move_replica: pb::MoveReplicaRequest => pb::Volume;
    get_snapshot: pb::GetSnapshotRequest => pb::Snapshot;
    view_snapshot: pb::ViewSnapshotRequest => pb::SnapshotView;
    list_snapshots: pb::ListSnapshotsRequest => pb::ListSnapshotsResponse;
    delete_snapshots: pb::DeleteSnapshotsRequest => pb::DeleteSnapshotsResponse;
    create_schedule: pb::CreateScheduleRequest => pb::Schedule;
    list_schedules: pb::ListSchedulesRequest => pb::ListSchedulesResponse;
    pause_schedule: pb::PauseScheduleRequest => pb::Schedule;
    delete_schedule: pb::DeleteScheduleRequest => pb::DeleteScheduleResponse;
    report_held: pb::ReportHeldRequest => pb::ReportHeldResponse;
}
