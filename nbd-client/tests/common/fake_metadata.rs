//! A metadata member in memory with one volume: open, change of replicas, close, watch.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use ashlar_proto::ids::{ClientId, ClusterId, DiskId, NodeId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_server::{Metadata, MetadataServer};
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[derive(Clone)]
struct Fake {
    cluster: ClusterId,
    volume: Arc<watch::Sender<pb::Volume>>,
    disks: Vec<pb::DiskEndpoint>,
    clean_close: Arc<Mutex<bool>>,
}

/// The member; it serves as long as the runtime lives.
pub struct FakeMetadata {
    pub address: SocketAddr,
    fake: Fake,
}

impl FakeMetadata {
    pub async fn start(
        cluster: ClusterId,
        name: &str,
        size: u64,
        disks: &[(DiskId, String)],
    ) -> Self {
        let replicas = disks.iter().map(|(disk, _)| pb::Replica {
            disk_id: disk.to_vec(),
            state: pb::ReplicaState::InSync as i32,
            ..Default::default()
        });
        let volume = pb::Volume {
            volume_id: VolumeId::generate().to_vec(),
            name: name.into(),
            size_bytes: size,
            replicas: 3,
            min_replicas: 2,
            groups: vec![pb::Group {
                replicas: replicas.collect(),
            }],
            clean: true,
            revision: 1,
            ..Default::default()
        };
        let disks = disks.iter().map(|(disk, address)| pb::DiskEndpoint {
            disk_id: disk.to_vec(),
            node_id: NodeId::NIL.to_vec(),
            // A host name, to be looked up.
            data_address: address.replace("127.0.0.1", "localhost"),
            incarnation: 7,
            alive: true,
        });
        let fake = Fake {
            cluster,
            volume: Arc::new(watch::Sender::new(volume)),
            disks: disks.collect(),
            clean_close: Arc::default(),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(MetadataServer::new(fake.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        Self { address, fake }
    }

    /// Another client becomes the holder.
    pub fn take_over(&self, client: ClientId) {
        self.fake.volume.send_modify(|volume| {
            volume.epoch += 1;
            volume.revision += 1;
            volume.clean = false;
            volume.opened_once = true;
            volume.holder = Some(holder(client.to_vec(), volume.epoch));
        });
    }

    pub fn closed_cleanly(&self) -> bool {
        *self.fake.clean_close.lock().unwrap()
    }
}

fn holder(client_id: Vec<u8>, epoch: u64) -> pb::Attachment {
    pb::Attachment {
        client_id,
        epoch,
        ..Default::default()
    }
}

impl Fake {
    fn is_holder(volume: &pb::Volume, client: &[u8], epoch: u64) -> bool {
        volume.epoch == epoch
            && volume
                .holder
                .as_ref()
                .is_some_and(|h| h.client_id == client)
    }
}

macro_rules! unserved {
    ($($name:ident($request:ident) -> $answer:ident;)*) => {
        #[tonic::async_trait]
        impl Metadata for Fake {
            $(async fn $name(&self, _: Request<pb::$request>) -> Answer<pb::$answer> {
                Err(Status::unimplemented(stringify!($name)))
            })*

            async fn get_volume(&self, r: Request<pb::GetVolumeRequest>) -> Answer<pb::Volume> {
                self.get(&r.into_inner())
            }

            async fn open_volume(
                &self,
                r: Request<pb::OpenVolumeRequest>,
            ) -> Answer<pb::OpenVolumeResponse> {
                self.open(r.into_inner())
            }

            async fn close_volume(&self, r: Request<pb::CloseVolumeRequest>) -> Answer<pb::Volume> {
                self.close(&r.into_inner())
            }

            async fn change_replicas(
                &self,
                r: Request<pb::ChangeReplicasRequest>,
            ) -> Answer<pb::ChangeReplicasResponse> {
                self.change(&r.into_inner())
            }

            type WatchVolumesStream =
                Pin<Box<dyn Stream<Item = Result<pb::VolumeEvent, Status>> + Send>>;

            async fn watch_volumes(
                &self,
                _: Request<pb::WatchVolumesRequest>,
            ) -> Answer<Self::WatchVolumesStream> {
                let disks = self.disks.clone();
                let stream = WatchStream::new(self.volume.subscribe()).map(move |volume| {
                    let disks = disks.clone();
                    Ok(pb::VolumeEvent { volume: Some(volume), disks, deleted: false })
                });
                Ok(Response::new(Box::pin(stream)))
            }
        }
    };
}

unserved! {
    get_cluster(GetClusterRequest) -> Cluster;
    add_member(AddMemberRequest) -> Cluster;
    set_service(SetServiceRequest) -> SetServiceResponse;
    get_repairs(GetRepairsRequest) -> Repairs;
    remove_member(RemoveMemberRequest) -> Cluster;
    register_node(RegisterNodeRequest) -> Node;
    register_disk(RegisterDiskRequest) -> Disk;
    heartbeat(HeartbeatRequest) -> HeartbeatResponse;
    list_nodes(ListNodesRequest) -> ListNodesResponse;
    list_disks(ListDisksRequest) -> ListDisksResponse;
    remove_disk(RemoveDiskRequest) -> RemoveDiskResponse;
    create_pool(CreatePoolRequest) -> Pool;
    update_pool(UpdatePoolRequest) -> Pool;
    delete_pool(DeletePoolRequest) -> DeletePoolResponse;
    list_pools(ListPoolsRequest) -> ListPoolsResponse;
    create_volume(CreateVolumeRequest) -> Volume;
    flatten_volume(FlattenVolumeRequest) -> Volume;
    create_schedule(CreateScheduleRequest) -> Schedule;
    list_schedules(ListSchedulesRequest) -> ListSchedulesResponse;
    pause_schedule(PauseScheduleRequest) -> Schedule;
    delete_schedule(DeleteScheduleRequest) -> DeleteScheduleResponse;
    begin_revert(BeginRevertRequest) -> Volume;
    end_revert(EndRevertRequest) -> Volume;
    list_volumes(ListVolumesRequest) -> ListVolumesResponse;
    resize_volume(ResizeVolumeRequest) -> Volume;
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse;
    publish_volume(PublishVolumeRequest) -> Volume;
    unpublish_volume(UnpublishVolumeRequest) -> Volume;
    set_volume_format(SetVolumeFormatRequest) -> Volume;
    rebuild_replica(RebuildReplicaRequest) -> Volume;
    move_replica(MoveReplicaRequest) -> Volume;
    create_snapshots(CreateSnapshotsRequest) -> CreateSnapshotsResponse;
    get_snapshot(GetSnapshotRequest) -> Snapshot;
    view_snapshot(ViewSnapshotRequest) -> SnapshotView;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse;
    delete_snapshots(DeleteSnapshotsRequest) -> DeleteSnapshotsResponse;
    report_held(ReportHeldRequest) -> ReportHeldResponse;
}

impl Fake {
    fn get(&self, request: &pb::GetVolumeRequest) -> Answer<pb::Volume> {
        let volume = self.volume.borrow().clone();
        if request.name == volume.name || request.volume_id == volume.volume_id {
            Ok(Response::new(volume))
        } else {
            Err(Status::not_found("no such volume"))
        }
    }

    fn open(&self, request: pb::OpenVolumeRequest) -> Answer<pb::OpenVolumeResponse> {
        let before = self.volume.borrow().clone();
        if before
            .holder
            .is_some_and(|h| h.client_id != request.client_id)
            && !request.force
        {
            return Err(Status::failed_precondition("held by another client"));
        }
        self.volume.send_modify(|volume| {
            volume.epoch += 1;
            volume.revision += 1;
            volume.clean = false;
            volume.opened_once = true;
            volume.holder = Some(holder(request.client_id, volume.epoch));
        });
        Ok(Response::new(pb::OpenVolumeResponse {
            volume: Some(self.volume.borrow().clone()),
            disks: self.disks.clone(),
            cluster_id: self.cluster.to_vec(),
            previous_clean: before.clean,
            ticket: Vec::new(),
        }))
    }

    fn close(&self, request: &pb::CloseVolumeRequest) -> Answer<pb::Volume> {
        if !Self::is_holder(&self.volume.borrow(), &request.client_id, request.epoch) {
            return Err(Status::failed_precondition("the epoch is not current"));
        }
        *self.clean_close.lock().unwrap() = request.clean;
        self.volume.send_modify(|volume| {
            volume.revision += 1;
            volume.clean = request.clean;
            volume.holder = None;
        });
        Ok(Response::new(self.volume.borrow().clone()))
    }

    fn change(&self, request: &pb::ChangeReplicasRequest) -> Answer<pb::ChangeReplicasResponse> {
        let applied = Self::is_holder(&self.volume.borrow(), &request.client_id, request.epoch);
        if applied {
            self.volume.send_modify(|volume| {
                volume.epoch += 1;
                volume.revision += 1;
                for change in &request.changes {
                    let group = &mut volume.groups[change.group as usize];
                    for replica in &mut group.replicas {
                        if replica.disk_id == change.disk_id {
                            replica.state = change.state;
                        }
                    }
                }
            });
        }
        Ok(Response::new(pb::ChangeReplicasResponse {
            applied,
            volume: Some(self.volume.borrow().clone()),
            reason: String::new(),
            disks: self.disks.clone(),
        }))
    }
}
