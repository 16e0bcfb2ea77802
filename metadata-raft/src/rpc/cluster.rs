//! Members, nodes, disks, pools and heartbeats, as served by the leader.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, Incarnation, NodeId, PoolId, VolumeId};
use ashlar_proto::rpc::metadata as pb;
use openraft::async_runtime::WatchReceiver;
use openraft::{BasicNode, ChangeMembers};
use tonic::Status;

use super::convert;
use super::liveness::{DiskReport, View};
use super::member::{Fault, Member, write_fault};
use super::part_service;
use crate::model::{
    Answer, Attacher, Command, Disk, FlattenPolicy, Node, Operation, Part, Pool, RequestKey, State,
    attacher_id, view,
};
use crate::planner::{DiskView, placement};

/// Most voters.
const VOTERS_MAX: usize = 7;
/// Time for a new member to catch up.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(45);
/// Time for a removed leader to hand over first.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// Disks in one heartbeat, and volumes of one disk.
const DISKS_MAX: usize = 256;
const VOLUMES_MAX: usize = 100_000;
/// Orders to drop a replica in one answer.
const DROPS_MAX: usize = 256;
/// Nodes above which heartbeats are sent less often.
const MANY_NODES: usize = 200;
const HEARTBEAT_MS: u32 = 500;
const HEARTBEAT_MANY_MS: u32 = 900;

type Result<T> = std::result::Result<T, Fault>;

fn unexpected(answer: &Answer) -> Fault {
    tracing::error!(?answer, "unexpected answer of the state machine");
    Status::internal("unexpected answer of the state machine").into()
}

impl Member {
    /// Members and leadership as this member sees them.
    pub fn cluster(&self) -> pb::Cluster {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let leader = metrics.current_leader.unwrap_or(0);
        pb::Cluster {
            cluster_id: self.shared.state().cluster().to_vec(),
            members: membership
                .nodes()
                .map(|(id, node)| pb::Member {
                    id: *id,
                    address: node.addr.clone(),
                    voter: voters.contains(id),
                    leader: *id == leader,
                })
                .collect(),
            leader_id: leader,
            term: metrics.current_term,
            last_applied: metrics.last_applied.map_or(0, |id| id.index),
            answered_by: self.id,
        }
    }

    pub(super) async fn add_member(&self, request: pb::AddMemberRequest) -> Result<pb::Cluster> {
        if request.id == 0 || request.address.is_empty() {
            return Err(
                Status::invalid_argument("id and address: both are needed, id is not 0").into(),
            );
        }
        self.linearize().await?;
        let cluster = self.cluster();
        if let Some(member) = cluster.members.iter().find(|m| m.id == request.id) {
            if member.address != request.address {
                return Err(Status::already_exists(format!(
                    "id: member {} exists with address {}; remove it first, and never reuse an id for an empty directory",
                    member.id, member.address
                ))
                .into());
            }
            if member.voter {
                return Ok(cluster);
            }
        }
        if cluster.members.iter().filter(|m| m.voter).count() >= VOTERS_MAX {
            return Err(Status::failed_precondition(format!(
                "a cluster has at most {VOTERS_MAX} members"
            ))
            .into());
        }
        let node = BasicNode::new(&request.address);
        tokio::time::timeout(
            CATCH_UP_DEADLINE,
            self.raft.add_learner(request.id, node, true),
        )
        .await
        .map_err(|_| {
            Status::deadline_exceeded(
                "the new member does not catch up; is it running and reachable?",
            )
        })?
        .map_err(write_fault)?;
        let add = ChangeMembers::AddVoterIds(BTreeSet::from([request.id]));
        self.raft
            .change_membership(add, true)
            .await
            .map_err(write_fault)?;
        Ok(self.cluster())
    }

    pub(super) async fn remove_member(
        &self,
        request: pb::RemoveMemberRequest,
    ) -> Result<pb::Cluster> {
        self.linearize().await?;
        let cluster = self.cluster();
        let Some(member) = cluster.members.iter().find(|m| m.id == request.id) else {
            return Ok(cluster);
        };
        let voters: Vec<u64> = cluster
            .members
            .iter()
            .filter(|m| m.voter)
            .map(|m| m.id)
            .collect();
        if member.voter && voters.len() == 1 {
            return Err(Status::failed_precondition("the last member cannot be removed").into());
        }
        if request.id == self.id {
            self.hand_over().await;
            return Err(Fault::NotLeader);
        }
        let ids = BTreeSet::from([request.id]);
        let change = if member.voter {
            ChangeMembers::RemoveVoters(ids)
        } else {
            ChangeMembers::RemoveNodes(ids)
        };
        self.raft
            .change_membership(change, false)
            .await
            .map_err(write_fault)?;
        Ok(self.cluster())
    }

    /// Gives the leadership to another voter, if there is one that answers.
    pub(crate) async fn hand_over(&self) {
        let mut role = self.role.clone();
        if role.borrow_and_update().leading_term.is_none() {
            return;
        }
        let deadline = tokio::time::Instant::now() + HAND_OVER_DEADLINE;
        for member in self
            .cluster()
            .members
            .iter()
            .filter(|m| m.voter && m.id != self.id)
        {
            if let Err(error) = self.raft.trigger().transfer_leader(member.id).await {
                tracing::warn!(%error, "cannot hand the leadership over");
                return;
            }
            let follows = role.wait_for(|r| r.leading_term.is_none() && r.leader.is_some());
            let attempt = tokio::time::Instant::now() + HAND_OVER_DEADLINE / 2;
            if tokio::time::timeout_at(deadline.min(attempt), follows)
                .await
                .is_ok()
            {
                return;
            }
        }
    }

    pub(super) async fn register_node(&self, request: pb::RegisterNodeRequest) -> Result<pb::Node> {
        if request.node_id.is_empty() {
            return self.register_attacher(request).await;
        }
        let node = Node {
            id: convert::id("node_id", &request.node_id, NodeId::from_slice)?,
            name: request.name,
            labels: convert::labels(request.labels),
            admin_address: request.admin_address,
        };
        let request = convert::request_key(&request.request_id)?;
        self.linearize().await?;
        let same = self.shared.state().node(node.id) == Some(&node);
        let node = if same {
            node
        } else {
            self.propose_node(request, Operation::RegisterNode(node))
                .await?
        };
        self.liveness()
            .hear(Instant::now(), node.id, std::iter::empty());
        Ok(self.with_view(|_, view| node_message(&node, view)))
    }

    /// A node that attaches volumes. Only a storage daemon's registration and heartbeats say that a
    /// daemon lives, so nothing is heard here of a node that has one.
    async fn register_attacher(&self, request: pb::RegisterNodeRequest) -> Result<pb::Node> {
        let attacher = Attacher {
            name: request.name,
            labels: convert::labels(request.labels),
            address: request.admin_address,
        };
        let key = convert::request_key(&request.request_id)?;
        self.linearize().await?;
        let node = {
            let state = self.shared.state();
            state
                .knows_attacher(&attacher)
                .then(|| state.attacher_node(&attacher))
        };
        let node = match node {
            Some(node) => node,
            None => {
                self.propose_node(key, Operation::RegisterAttacher(attacher))
                    .await?
            }
        };
        if node.id == attacher_id(&node.name) {
            self.liveness()
                .hear(Instant::now(), node.id, std::iter::empty());
        }
        Ok(self.with_view(|_, view| node_message(&node, view)))
    }

    async fn propose_node(&self, request: RequestKey, operation: Operation) -> Result<Node> {
        match self.propose(Command { request, operation }).await? {
            Answer::Node(node) => Ok(node),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn register_disk(&self, request: pb::RegisterDiskRequest) -> Result<pb::Disk> {
        let disk = Disk {
            id: convert::id("disk_id", &request.disk_id, DiskId::from_slice)?,
            node: convert::id("node_id", &request.node_id, NodeId::from_slice)?,
            path: request.path,
            data_address: request.data_address,
            capacity_bytes: request.capacity_bytes,
            incarnation: Incarnation(request.incarnation),
            labels: convert::labels(request.labels),
        };
        let request = convert::request_key(&request.request_id)?;
        self.linearize().await?;
        let same = self.shared.state().disk(disk.id) == Some(&disk);
        if !same {
            self.propose(Command {
                request,
                operation: Operation::RegisterDisk(disk.clone()),
            })
            .await?;
        }
        let report = DiskReport::default();
        self.liveness().hear(
            Instant::now(),
            disk.node,
            std::iter::once((disk.id, report)),
        );
        self.repair.notify_one();
        Ok(self.with_view(|state, view| disk_message(state, &disk, view)))
    }

    pub(super) async fn heartbeat(
        &self,
        request: pb::HeartbeatRequest,
    ) -> Result<pb::HeartbeatResponse> {
        if self.role.borrow().leading_term.is_none() {
            return Err(Fault::NotLeader);
        }
        let node = convert::id("node_id", &request.node_id, NodeId::from_slice)?;
        if request.disks.len() > DISKS_MAX
            || request
                .disks
                .iter()
                .any(|d| d.volumes.len() > VOLUMES_MAX || d.layers.len() > VOLUMES_MAX)
        {
            return Err(Status::invalid_argument("disks: too many in one heartbeat").into());
        }
        let mut response = pb::HeartbeatResponse {
            known: true,
            drop: Vec::new(),
            interval_ms: HEARTBEAT_MS,
            set_layers: Vec::new(),
            flatten: Vec::new(),
            care: self.care_orders(node),
        };
        let mut gone = Vec::new();
        let mut cut = false;
        let mut reports = Vec::new();
        {
            let state = self.shared.state();
            response.known = state.node(node).is_some();
            if state.nodes().count() > MANY_NODES {
                response.interval_ms = HEARTBEAT_MANY_MS;
            }
            for status in &request.disks {
                let id = convert::id("disk_id", &status.disk_id, DiskId::from_slice)?;
                let registered = state.disk(id).is_some_and(|d| {
                    d.node == node
                        && d.incarnation.0 == status.incarnation
                        && d.capacity_bytes == status.capacity_bytes
                });
                response.known &= registered;
                if registered {
                    let volumes = volume_bytes(status);
                    let report = DiskReport {
                        settled_bytes: volumes.iter().map(|(_, bytes)| bytes).sum(),
                        used_bytes: status.used_bytes,
                        failed: status.failed,
                        volumes,
                    };
                    reports.push((id, report));
                }
                if registered && !status.failed {
                    garbage(&state, id, status, &mut response.drop, &mut gone);
                    let mut liveness = self.liveness();
                    let disk = liveness.layers_mut(id);
                    cut |= disk.hear(&state, status, id, &mut response);
                }
            }
        }
        let known = response.known || !reports.is_empty();
        if known {
            self.liveness()
                .hear(Instant::now(), node, reports.into_iter());
        }
        if cut {
            self.takings.attention.notify_one();
        }
        if !gone.is_empty() {
            let command = Command {
                request: RequestKey::generate(),
                operation: Operation::ForgetGarbage(gone),
            };
            self.propose(command).await?;
        }
        Ok(response)
    }

    pub(super) async fn list_nodes(
        &self,
        _: pb::ListNodesRequest,
    ) -> Result<pb::ListNodesResponse> {
        self.linearize().await?;
        Ok(self.with_view(|state, view| pb::ListNodesResponse {
            nodes: state.nodes().map(|n| node_message(n, view)).collect(),
        }))
    }

    pub(super) async fn list_disks(
        &self,
        request: pb::ListDisksRequest,
    ) -> Result<pb::ListDisksResponse> {
        let node = if request.node_id.is_empty() {
            None
        } else {
            Some(convert::id(
                "node_id",
                &request.node_id,
                NodeId::from_slice,
            )?)
        };
        self.linearize().await?;
        Ok(self.with_view(|state, view| pb::ListDisksResponse {
            disks: state
                .disks()
                .filter(|d| node.is_none_or(|n| n == d.node))
                .map(|d| disk_message(state, d, view))
                .collect(),
        }))
    }

    pub(super) async fn remove_disk(
        &self,
        request: pb::RemoveDiskRequest,
    ) -> Result<pb::RemoveDiskResponse> {
        let disk = convert::id("disk_id", &request.disk_id, DiskId::from_slice)?;
        let request = convert::request_key(&request.request_id)?;
        self.propose(Command {
            request,
            operation: Operation::RemoveDisk(disk),
        })
        .await?;
        self.liveness().forget(disk);
        Ok(pb::RemoveDiskResponse {})
    }

    fn pool_message(&self, pool: &Pool) -> pb::Pool {
        self.with_view(|state, view| view::pool(state, pool, |disk| view.used_bytes(disk)))
    }

    async fn propose_pool(&self, request: RequestKey, operation: Operation) -> Result<pb::Pool> {
        match self.propose(Command { request, operation }).await? {
            Answer::Pool(pool) => Ok(self.pool_message(&pool)),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn create_pool(&self, request: pb::CreatePoolRequest) -> Result<pb::Pool> {
        let policy = convert::flatten_policy(request.spec.as_ref())?;
        let spec = convert::pool_spec(request.spec)?;
        let pool = Pool {
            id: PoolId::generate(),
            name: request.name.clone(),
            spec,
        };
        let key = convert::request_key(&request.request_id)?;
        let made = self.propose_pool(key, Operation::CreatePool(pool)).await?;
        self.set_flatten_policy(request.name, policy, made).await
    }

    pub(super) async fn update_pool(&self, request: pb::UpdatePoolRequest) -> Result<pb::Pool> {
        let policy = convert::flatten_policy(request.spec.as_ref())?;
        let spec = convert::pool_spec(request.spec)?;
        let operation = Operation::UpdatePool {
            name: request.name.clone(),
            spec,
        };
        let key = convert::request_key(&request.request_id)?;
        let updated = self.propose_pool(key, operation).await?;
        self.set_flatten_policy(request.name, policy, updated).await
    }

    /// The policy is no part of the specification in the log; a retry of the request says it again.
    async fn set_flatten_policy(
        &self,
        pool: String,
        policy: Option<FlattenPolicy>,
        made: pb::Pool,
    ) -> Result<pb::Pool> {
        let current = {
            let state = self.shared.state();
            let found = state.pool_by_name(&pool);
            found.map(|p| state.flatten_policy(p.id))
        };
        match policy {
            Some(policy) if current != Some(policy) => {
                let operation = Operation::SetFlattenPolicy { pool, policy };
                self.propose_pool(RequestKey::generate(), operation).await
            }
            _ => Ok(made),
        }
    }

    pub(super) async fn delete_pool(
        &self,
        request: pb::DeletePoolRequest,
    ) -> Result<pb::DeletePoolResponse> {
        let key = convert::request_key(&request.request_id)?;
        self.propose(Command {
            request: key,
            operation: Operation::DeletePool(request.name),
        })
        .await?;
        Ok(pb::DeletePoolResponse {})
    }

    pub(super) async fn list_pools(
        &self,
        request: pb::ListPoolsRequest,
    ) -> Result<pb::ListPoolsResponse> {
        self.linearize().await?;
        self.with_view(|state, view| {
            let message = |pool: &Pool| view::pool(state, pool, |disk| view.used_bytes(disk));
            if request.name.is_empty() {
                return Ok(pb::ListPoolsResponse {
                    pools: state.pools().map(message).collect(),
                });
            }
            let pool = state
                .pool_by_name(&request.name)
                .ok_or_else(|| crate::model::no_such_pool(&request.name))?;
            Ok(pb::ListPoolsResponse {
                pools: vec![message(pool)],
            })
        })
    }
}

/// What volumes use on a disk.
fn volume_bytes(status: &pb::DiskStatus) -> Vec<(VolumeId, u64)> {
    let ids = status.volumes.iter().map(|v| VolumeId::from_slice(v));
    let told = ids.zip(&status.volume_bytes);
    let mut volumes: Vec<_> = told.filter_map(|(id, bytes)| Some((id?, *bytes))).collect();
    volumes.sort_unstable();
    volumes
}

/// What a disk is to drop, and what it has dropped.
fn garbage(
    state: &State,
    disk: DiskId,
    status: &pb::DiskStatus,
    drop: &mut Vec<pb::DropReplica>,
    gone: &mut Vec<(DiskId, VolumeId)>,
) {
    let mut entries = state.garbage_on(disk).peekable();
    if entries.peek().is_none() {
        return;
    }
    let held: BTreeSet<&[u8]> = status.volumes.iter().map(Vec::as_slice).collect();
    for (volume, epoch) in entries {
        if !held.contains(volume.0.as_slice()) {
            if gone.len() < crate::model::validate::BATCH_MAX {
                gone.push((disk, volume));
            }
        } else if drop.len() < DROPS_MAX {
            let (disk_id, volume_id) = (disk.to_vec(), volume.to_vec());
            drop.push(pb::DropReplica {
                disk_id,
                volume_id,
                epoch: epoch.0,
            });
        }
    }
}

fn node_message(node: &Node, view: &View<'_>) -> pb::Node {
    let age = view.liveness.age(view.now, node.id);
    pb::Node {
        node_id: node.id.to_vec(),
        name: node.name.clone(),
        labels: node.labels.clone().into_iter().collect(),
        admin_address: node.admin_address.clone(),
        alive: view.liveness.node_alive(view.now, node.id),
        last_heartbeat_age_ms: age.map_or(u64::MAX, |a| {
            u64::try_from(a.as_millis()).unwrap_or(u64::MAX)
        }),
        service: part_service::message(view.state.service(Part::Node(node.id))).into(),
    }
}

fn disk_message(state: &State, disk: &Disk, view: &View<'_>) -> pb::Disk {
    let report = view.liveness.disk(disk.id);
    let usage = state.disk_use(disk.id);
    pb::Disk {
        disk_id: disk.id.to_vec(),
        node_id: disk.node.to_vec(),
        node_name: state
            .node(disk.node)
            .map(|n| n.name.clone())
            .unwrap_or_default(),
        path: disk.path.clone(),
        data_address: disk.data_address.clone(),
        capacity_bytes: disk.capacity_bytes,
        used_bytes: report.used_bytes,
        incarnation: disk.incarnation.0,
        labels: disk.labels.clone().into_iter().collect(),
        alive: view.alive(disk.id),
        failed: report.failed,
        replica_count: usage.replicas,
        provisioned_bytes: usage.provisioned_bytes,
        service: part_service::message(state.disk_service(disk.id)).into(),
        takes_replicas: placement::takes_replicas(state, view, disk),
    }
}
