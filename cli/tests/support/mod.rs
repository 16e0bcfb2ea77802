//! A metadata server that keeps everything in memory and decides nothing: enough for the command's
//! output, exit codes and failover.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_server::{Metadata, MetadataServer};
use tonic::{Request, Response, Status};

/// What the server knows.
#[derive(Default)]
pub struct Model {
    pub nodes: Vec<pb::Node>,
    pub disks: Vec<pb::Disk>,
    pub pools: Vec<pb::Pool>,
    pub volumes: Vec<pb::Volume>,
    pub snapshots: Vec<pb::Snapshot>,
    /// Refuse to take snapshots with this.
    pub no_snapshots: Option<Status>,
    /// What is said to be repaired.
    pub repairs: pb::Repairs,
    /// Answer everything with UNAVAILABLE.
    pub unavailable: bool,
    /// Request ids of mutations, in the order in which they came.
    pub request_ids: Vec<Vec<u8>>,
    /// Answer so many mutations with UNAVAILABLE after having noted their id.
    pub lose_answers: usize,
}

/// The running server.
pub struct FakeMetadata {
    pub model: Arc<Mutex<Model>>,
    pub address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl FakeMetadata {
    /// Starts one on a free port.
    pub fn start(model: Model) -> Self {
        let model = Arc::new(Mutex::new(model));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let service = MetadataServer::new(Service(Arc::clone(&model)));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        Self {
            model,
            address,
            _runtime: runtime,
        }
    }
}

struct Service(Arc<Mutex<Model>>);

type Answer<T> = Result<Response<T>, Status>;

impl Service {
    fn read<T>(&self, f: impl FnOnce(&mut Model) -> Result<T, Status>) -> Answer<T> {
        let mut model = self.0.lock().unwrap();
        if model.unavailable {
            return Err(Status::unavailable("no leader"));
        }
        f(&mut model).map(Response::new)
    }

    fn change<T>(
        &self,
        request_id: Vec<u8>,
        f: impl FnOnce(&mut Model) -> Result<T, Status>,
    ) -> Answer<T> {
        self.read(|model| {
            assert_eq!(request_id.len(), 16, "every mutation carries a request id");
            model.request_ids.push(request_id);
            if model.lose_answers > 0 {
                model.lose_answers -= 1;
                return Err(Status::unavailable("leader lost"));
            }
            f(model)
        })
    }
}

fn unused<T>() -> Answer<T> {
    Err(Status::unimplemented("not in this test"))
}

#[tonic::async_trait]
impl Metadata for Service {
    async fn get_cluster(&self, _: Request<pb::GetClusterRequest>) -> Answer<pb::Cluster> {
        self.read(|_| {
            Ok(pb::Cluster {
                cluster_id: vec![7; 16],
                members: vec![pb::Member {
                    id: 1,
                    address: "127.0.0.1:7101".into(),
                    voter: true,
                    leader: true,
                }],
                leader_id: 1,
                term: 4,
                last_applied: 99,
                answered_by: 1,
            })
        })
    }
    async fn add_member(&self, _: Request<pb::AddMemberRequest>) -> Answer<pb::Cluster> {
        unused()
    }
    async fn remove_member(&self, _: Request<pb::RemoveMemberRequest>) -> Answer<pb::Cluster> {
        unused()
    }
    async fn register_node(&self, _: Request<pb::RegisterNodeRequest>) -> Answer<pb::Node> {
        unused()
    }
    async fn register_disk(&self, _: Request<pb::RegisterDiskRequest>) -> Answer<pb::Disk> {
        unused()
    }
    async fn heartbeat(&self, _: Request<pb::HeartbeatRequest>) -> Answer<pb::HeartbeatResponse> {
        unused()
    }
    async fn list_nodes(&self, _: Request<pb::ListNodesRequest>) -> Answer<pb::ListNodesResponse> {
        self.read(|m| {
            Ok(pb::ListNodesResponse {
                nodes: m.nodes.clone(),
            })
        })
    }
    async fn list_disks(&self, _: Request<pb::ListDisksRequest>) -> Answer<pb::ListDisksResponse> {
        self.read(|m| {
            Ok(pb::ListDisksResponse {
                disks: m.disks.clone(),
            })
        })
    }
    async fn remove_disk(
        &self,
        request: Request<pb::RemoveDiskRequest>,
    ) -> Answer<pb::RemoveDiskResponse> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            m.disks.retain(|d| d.disk_id != request.disk_id);
            Ok(pb::RemoveDiskResponse {})
        })
    }
    async fn set_service(
        &self,
        request: Request<pb::SetServiceRequest>,
    ) -> Answer<pb::SetServiceResponse> {
        let request = request.into_inner();
        self.change(request.request_id.clone(), |m| {
            match request.part.as_ref() {
                Some(pb::set_service_request::Part::NodeId(id)) => {
                    let node = m.nodes.iter_mut().find(|n| n.node_id == *id);
                    node.ok_or_else(|| Status::not_found("no such node"))?
                        .service = request.service;
                }
                Some(pb::set_service_request::Part::DiskId(id)) => {
                    let disk = m.disks.iter_mut().find(|d| d.disk_id == *id);
                    disk.ok_or_else(|| Status::not_found("no such disk"))?
                        .service = request.service;
                }
                None => return Err(Status::invalid_argument("part: missing")),
            }
            Ok(pb::SetServiceResponse {})
        })
    }
    async fn get_repairs(&self, _: Request<pb::GetRepairsRequest>) -> Answer<pb::Repairs> {
        self.read(|m| Ok(m.repairs.clone()))
    }
    async fn create_pool(&self, request: Request<pb::CreatePoolRequest>) -> Answer<pb::Pool> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            if m.pools.iter().any(|p| p.name == request.name) {
                return Err(Status::already_exists("pool exists with another spec"));
            }
            let pool = pb::Pool {
                pool_id: vec![3; 16],
                name: request.name,
                spec: request.spec,
                disk_count: m.disks.len() as u32,
                capacity_bytes: 30 << 30,
                ..Default::default()
            };
            m.pools.push(pool.clone());
            Ok(pool)
        })
    }
    async fn update_pool(&self, request: Request<pb::UpdatePoolRequest>) -> Answer<pb::Pool> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            let pool = m.pools.iter_mut().find(|p| p.name == request.name);
            let pool = pool.ok_or_else(|| Status::not_found("no such pool"))?;
            pool.spec = request.spec;
            Ok(pool.clone())
        })
    }
    async fn delete_pool(
        &self,
        request: Request<pb::DeletePoolRequest>,
    ) -> Answer<pb::DeletePoolResponse> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            if m.volumes.iter().any(|v| v.pool == request.name) {
                return Err(Status::failed_precondition("the pool has volumes"));
            }
            m.pools.retain(|p| p.name != request.name);
            Ok(pb::DeletePoolResponse {})
        })
    }
    async fn list_pools(
        &self,
        request: Request<pb::ListPoolsRequest>,
    ) -> Answer<pb::ListPoolsResponse> {
        let name = request.into_inner().name;
        self.read(|m| {
            let pools = m
                .pools
                .iter()
                .filter(|p| name.is_empty() || p.name == name)
                .cloned()
                .collect();
            Ok(pb::ListPoolsResponse { pools })
        })
    }
    async fn create_volume(&self, request: Request<pb::CreateVolumeRequest>) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            if !m.pools.iter().any(|p| p.name == request.pool) {
                return Err(Status::not_found("no such pool"));
            }
            let replicas = m
                .disks
                .iter()
                .map(|d| pb::Replica {
                    disk_id: d.disk_id.clone(),
                    state: pb::ReplicaState::InSync as i32,
                    ..Default::default()
                })
                .collect();
            let volume = pb::Volume {
                volume_id: vec![m.volumes.len() as u8 + 1; 16],
                name: request.name,
                size_bytes: request.size_bytes,
                pool: request.pool,
                replicas: 3,
                min_replicas: 2,
                groups: vec![pb::Group { replicas }],
                ..Default::default()
            };
            m.volumes.push(volume.clone());
            Ok(volume)
        })
    }
    async fn get_volume(&self, request: Request<pb::GetVolumeRequest>) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.read(|m| {
            m.volumes
                .iter()
                .find(|v| v.name == request.name || v.volume_id == request.volume_id)
                .cloned()
                .ok_or_else(|| Status::not_found("no such volume"))
        })
    }
    async fn list_volumes(
        &self,
        request: Request<pb::ListVolumesRequest>,
    ) -> Answer<pb::ListVolumesResponse> {
        // One volume per page, so that paging is seen.
        let token = request.into_inner().page_token;
        self.read(|m| {
            let start: usize = token.parse().unwrap_or(0);
            let volumes: Vec<_> = m.volumes.iter().skip(start).take(1).cloned().collect();
            let next = start + volumes.len();
            let next_page_token = if next < m.volumes.len() {
                next.to_string()
            } else {
                String::new()
            };
            Ok(pb::ListVolumesResponse {
                volumes,
                next_page_token,
            })
        })
    }
    async fn resize_volume(&self, request: Request<pb::ResizeVolumeRequest>) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            let volume = m
                .volumes
                .iter_mut()
                .find(|v| v.volume_id == request.volume_id);
            let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
            volume.size_bytes = request.size_bytes;
            Ok(volume.clone())
        })
    }
    async fn delete_volume(
        &self,
        request: Request<pb::DeleteVolumeRequest>,
    ) -> Answer<pb::DeleteVolumeResponse> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            m.volumes.retain(|v| v.volume_id != request.volume_id);
            Ok(pb::DeleteVolumeResponse {})
        })
    }
    async fn open_volume(
        &self,
        _: Request<pb::OpenVolumeRequest>,
    ) -> Answer<pb::OpenVolumeResponse> {
        unused()
    }
    async fn close_volume(&self, _: Request<pb::CloseVolumeRequest>) -> Answer<pb::Volume> {
        unused()
    }
    async fn change_replicas(
        &self,
        _: Request<pb::ChangeReplicasRequest>,
    ) -> Answer<pb::ChangeReplicasResponse> {
        unused()
    }
    async fn publish_volume(&self, _: Request<pb::PublishVolumeRequest>) -> Answer<pb::Volume> {
        unused()
    }
    async fn unpublish_volume(
        &self,
        request: Request<pb::UnpublishVolumeRequest>,
    ) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            let volume = m
                .volumes
                .iter_mut()
                .find(|v| v.volume_id == request.volume_id);
            let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
            let all = request.node_name.is_empty();
            volume
                .publications
                .retain(|p| !all && p.node_name != request.node_name);
            if volume.publications.is_empty() {
                volume.holder = None;
            }
            Ok(volume.clone())
        })
    }
    async fn set_volume_format(
        &self,
        _: Request<pb::SetVolumeFormatRequest>,
    ) -> Answer<pb::Volume> {
        unused()
    }
    async fn rebuild_replica(
        &self,
        request: Request<pb::RebuildReplicaRequest>,
    ) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            let volume = m
                .volumes
                .iter_mut()
                .find(|v| v.volume_id == request.volume_id);
            let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
            let replica = volume
                .groups
                .iter_mut()
                .flat_map(|g| &mut g.replicas)
                .find(|r| r.disk_id == request.disk_id)
                .ok_or_else(|| Status::not_found("no such replica"))?;
            if replica.state() != pb::ReplicaState::Stale {
                return Err(Status::failed_precondition("the replica is not stale"));
            }
            replica.set_state(pb::ReplicaState::InSync);
            Ok(volume.clone())
        })
    }
    async fn move_replica(&self, request: Request<pb::MoveReplicaRequest>) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |_| {
            Err(Status::resource_exhausted("no disk of the pool has room"))
        })
    }
    async fn create_snapshots(
        &self,
        request: Request<pb::CreateSnapshotsRequest>,
    ) -> Answer<pb::CreateSnapshotsResponse> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            if let Some(status) = &m.no_snapshots {
                return Err(status.clone());
            }
            let mut taken = Vec::new();
            for item in request.items {
                let named = |v: &&pb::Volume| v.volume_id == item.volume_id;
                let volume = m.volumes.iter().find(named);
                let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
                taken.push(pb::Snapshot {
                    snapshot_id: vec![0x50 + (m.snapshots.len() + taken.len()) as u8; 16],
                    name: item.name,
                    volume_id: item.volume_id,
                    volume_name: volume.name.clone(),
                    number: 1,
                    size_bytes: volume.size_bytes,
                    created_unix_ms: 1_700_000_000_000,
                    labels: item.labels,
                    state: pb::SnapshotState::Ready.into(),
                    group_name: request.group_name.clone(),
                    ..Default::default()
                });
            }
            m.snapshots.extend(taken.iter().cloned());
            Ok(pb::CreateSnapshotsResponse { snapshots: taken })
        })
    }
    async fn get_snapshot(&self, request: Request<pb::GetSnapshotRequest>) -> Answer<pb::Snapshot> {
        let request = request.into_inner();
        self.read(|m| {
            m.snapshots
                .iter()
                .find(|s| s.name == request.name || s.snapshot_id == request.snapshot_id)
                .cloned()
                .ok_or_else(|| Status::not_found("no such snapshot"))
        })
    }
    async fn view_snapshot(
        &self,
        _request: Request<pb::ViewSnapshotRequest>,
    ) -> Answer<pb::SnapshotView> {
        Err(Status::unimplemented("reading snapshots"))
    }
    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Answer<pb::ListSnapshotsResponse> {
        // One snapshot per page, so that paging is seen.
        let request = request.into_inner();
        let start: usize = request.page_token.parse().unwrap_or(0);
        self.read(|m| {
            let wanted = |s: &&pb::Snapshot| {
                (request.volume_id.is_empty() || s.volume_id == request.volume_id)
                    && (request.group_name.is_empty() || s.group_name == request.group_name)
            };
            let mut left = m.snapshots.iter().filter(wanted).skip(start).cloned();
            let snapshots: Vec<_> = left.next().into_iter().collect();
            let next_page_token = match left.next() {
                Some(_) => (start + 1).to_string(),
                None => String::new(),
            };
            Ok(pb::ListSnapshotsResponse {
                snapshots,
                next_page_token,
            })
        })
    }
    async fn delete_snapshots(
        &self,
        request: Request<pb::DeleteSnapshotsRequest>,
    ) -> Answer<pb::DeleteSnapshotsResponse> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            m.snapshots
                .retain(|s| !request.snapshot_ids.contains(&s.snapshot_id));
            Ok(pb::DeleteSnapshotsResponse {})
        })
    }
    async fn create_schedule(
        &self,
        _request: Request<pb::CreateScheduleRequest>,
    ) -> Answer<pb::Schedule> {
        Err(Status::unimplemented("schedules"))
    }
    async fn list_schedules(
        &self,
        _request: Request<pb::ListSchedulesRequest>,
    ) -> Answer<pb::ListSchedulesResponse> {
        Err(Status::unimplemented("schedules"))
    }
    async fn pause_schedule(
        &self,
        _request: Request<pb::PauseScheduleRequest>,
    ) -> Answer<pb::Schedule> {
        Err(Status::unimplemented("schedules"))
    }
    async fn delete_schedule(
        &self,
        _request: Request<pb::DeleteScheduleRequest>,
    ) -> Answer<pb::DeleteScheduleResponse> {
        Err(Status::unimplemented("schedules"))
    }
    async fn flatten_volume(
        &self,
        request: Request<pb::FlattenVolumeRequest>,
    ) -> Answer<pb::Volume> {
        let request = request.into_inner();
        self.change(request.request_id, |m| {
            let mut volumes = m.volumes.iter_mut();
            let volume = volumes.find(|v| v.volume_id == request.volume_id);
            let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
            if let Some(flatten) = &mut volume.flatten {
                flatten.wanted = true;
            }
            Ok(volume.clone())
        })
    }
    async fn begin_revert(&self, _: Request<pb::BeginRevertRequest>) -> Answer<pb::Volume> {
        unused()
    }
    async fn end_revert(&self, _: Request<pb::EndRevertRequest>) -> Answer<pb::Volume> {
        unused()
    }
    async fn report_held(
        &self,
        _: Request<pb::ReportHeldRequest>,
    ) -> Answer<pb::ReportHeldResponse> {
        unused()
    }

    type WatchVolumesStream =
        tokio_stream::wrappers::ReceiverStream<Result<pb::VolumeEvent, Status>>;
    async fn watch_volumes(
        &self,
        _: Request<pb::WatchVolumesRequest>,
    ) -> Answer<Self::WatchVolumesStream> {
        unused()
    }
}
