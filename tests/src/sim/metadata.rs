//! The metadata cluster as its clients see it: one linearizable service that applies the real state
//! machine, with the leader's view of heartbeats and its repair loop. Delays, lost messages and lack of
//! a majority are the cluster's business (`cluster.rs`).

use std::collections::BTreeMap;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{
    ClientId, ClusterId, DiskId, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState, VolumeId,
};
use ashlar_proto::volume::VolumeView;
use metadata_raft::model::{
    self, Answer, ChangeReplicas, Command, CreateVolume, Disk, FailureDomain, Node, OpenVolume,
    Operation, Pool, PoolSpec, RequestKey, Response, State, Volume, view,
};
use nbd_client::engine::{MetadataRequest, SessionEvent};

use super::snapshots::Snapshots;

/// A node is dead after this long without heartbeat.
const DEAD_AFTER_NS: u64 = 1_500_000_000;

/// Shape of the cluster and its volume.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Storage nodes, one disk each.
    pub nodes: u32,
    /// Replicas of the volume.
    pub replicas: u8,
    /// Its fewest in-sync replicas.
    pub min_replicas: u8,
    /// Its replica groups.
    pub groups: u32,
    /// Its size.
    pub size_bytes: u64,
}

/// What a client asks, with what the answer needs.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Who.
    pub client: ClientId,
    /// Distinguishes the client's asks; a retry keeps it.
    pub number: u64,
    /// What.
    pub request: MetadataRequest,
    /// Take the volume from another holder.
    pub force: bool,
}

/// The service.
pub struct Metadata {
    state: State,
    volume: VolumeId,
    last_seen: BTreeMap<NodeId, Time>,
    requests: u64,
    /// Those of the volume.
    pub(super) snapshots: Snapshots,
}

/// The cluster's identity in simulations.
pub const CLUSTER: ClusterId = ClusterId([0xc1; 16]);
/// The volume's identity in simulations.
pub const VOLUME: VolumeId = VolumeId([0x70; 16]);

/// Identity of the node (1, 2, ..) of a disk.
pub fn node_id(number: u32) -> NodeId {
    let mut id = [0x0d; 16];
    id[15] = number as u8;
    NodeId(id)
}

/// Identity of a node's disk.
pub fn disk_id(number: u32) -> DiskId {
    let mut id = [0xd1; 16];
    id[15] = number as u8;
    DiskId(id)
}

/// Number of the node of a disk.
pub fn node_of(disk: DiskId) -> u32 {
    u32::from(disk.0[15])
}

/// The address under which a node's disk is reached.
pub fn address(number: u32) -> String {
    format!("10.0.0.{number}:7000")
}

/// The node behind an address.
pub fn node_at(address: &str) -> Option<u32> {
    address
        .strip_prefix("10.0.0.")?
        .strip_suffix(":7000")?
        .parse()
        .ok()
}

impl Metadata {
    /// A cluster with registered nodes and disks, and one volume of this identity.
    pub fn new(shape: Shape, volume: VolumeId) -> Self {
        let mut this = Self {
            state: State::new(),
            volume,
            last_seen: BTreeMap::new(),
            requests: 0,
            snapshots: Snapshots::default(),
        };
        this.must(Operation::InitializeCluster(CLUSTER));
        for number in 1..=shape.nodes {
            this.must(Operation::RegisterNode(Node {
                id: node_id(number),
                name: format!("node{number}"),
                labels: Default::default(),
                admin_address: format!("10.0.0.{number}:7001"),
            }));
            this.must(Operation::RegisterDisk(disk_record(number, Incarnation(0))));
        }
        let pool = PoolId([0x90; 16]);
        let spec = PoolSpec {
            failure_domain: FailureDomain::Node,
            ..PoolSpec::default()
        };
        this.must(Operation::CreatePool(Pool {
            id: pool,
            name: "pool".to_owned(),
            spec,
        }));
        let groups = (0..shape.groups).map(|g| {
            let disks = (0..u32::from(shape.replicas)).map(|r| disk_id((g + r) % shape.nodes + 1));
            disks.collect()
        });
        this.must(Operation::CreateVolume(CreateVolume {
            volume,
            name: "volume".to_owned(),
            size_bytes: shape.size_bytes,
            pool,
            replicas: shape.replicas,
            min_replicas: shape.min_replicas,
            groups: groups.collect(),
            labels: Default::default(),
            created_unix_ms: 1,
        }));
        this
    }

    pub(super) fn must(&mut self, operation: Operation) {
        if let Err(refusal) = self.apply(operation) {
            panic!("the simulated cluster cannot be set up: {refusal}");
        }
    }

    pub(super) fn apply(&mut self, operation: Operation) -> Response {
        self.requests += 1;
        let mut key = [0xee; 16];
        key[8..].copy_from_slice(&self.requests.to_be_bytes());
        model::apply(
            &mut self.state,
            &Command {
                request: RequestKey(key),
                operation,
            },
        )
    }

    /// The volume now. Panics if it does not exist: simulations never delete it.
    pub fn volume(&self) -> &Volume {
        match self.state.volume(self.volume) {
            Some(volume) => volume,
            None => panic!("the simulated volume is gone"),
        }
    }

    /// The volume that the volume was cloned from.
    pub fn origin(&self) -> Option<&Volume> {
        self.state.volume(super::clones::ORIGIN).map(|v| &**v)
    }

    /// From now on the clone is the volume.
    pub(super) fn is_cloned(&mut self) {
        self.volume = VOLUME;
    }

    /// Whether every replica is in sync.
    pub fn fully_redundant(&self) -> bool {
        self.volume()
            .all_replicas()
            .all(|(_, r)| r.state == ReplicaState::InSync)
    }

    /// The volume as its clients get it.
    pub fn view(&self, now: Time) -> VolumeView {
        self.view_of(self.volume(), now)
    }

    fn view_of(&self, volume: &Volume, now: Time) -> VolumeView {
        let message = view::volume(&self.state, volume);
        let disks = view::endpoints(&self.state, volume, |d| {
            self.alive(node_id(node_of(d)), now)
        });
        match VolumeView::from_messages(&message, &disks) {
            Ok(view) => view,
            Err(error) => panic!("metadata made a view that its clients refuse: {error}"),
        }
    }

    fn alive(&self, node: NodeId, now: Time) -> bool {
        self.last_seen
            .get(&node)
            .is_some_and(|seen| now.0 - seen.0 < DEAD_AFTER_NS)
    }

    /// A heartbeat of a node; its disk registers again when its incarnation changed.
    pub fn heartbeat(&mut self, now: Time, number: u32, incarnation: Incarnation) {
        self.last_seen.insert(node_id(number), now);
        let known = self.state.disk(disk_id(number)).map(|d| d.incarnation);
        if known != Some(incarnation) {
            self.must(Operation::RegisterDisk(disk_record(number, incarnation)));
        }
    }

    /// The repair loop: stale replicas of a held volume on live disks are rebuilt. Whether it did
    /// anything.
    pub fn repair(&mut self, now: Time) -> bool {
        let volume = self.volume();
        if volume.holder.is_none() {
            return false;
        }
        let stale = volume.all_replicas().filter(|(_, r)| {
            r.state == ReplicaState::Stale && self.alive(node_id(node_of(r.disk)), now)
        });
        let replicas: Vec<_> = stale.map(|(g, r)| (GroupIndex(g as u32), r.disk)).collect();
        if replicas.is_empty() {
            return false;
        }
        let (volume, epoch) = (volume.id, volume.epoch);
        self.must(Operation::BeginRebuild {
            volume,
            epoch,
            replicas,
        });
        true
    }

    /// Carries out what a client asks; the event to answer it with. (*Held* has no answer: see `held`.)
    pub fn answer(&mut self, now: Time, ask: &Ask, opened_once_before: bool) -> SessionEvent {
        let operation = match &ask.request {
            MetadataRequest::Refresh => {
                return SessionEvent::ConfigChanged(Box::new(self.view(now)));
            }
            MetadataRequest::ReportHeld { .. } | MetadataRequest::Confirm => {
                return SessionEvent::Confirmed(Box::new(self.view(now)));
            }
            MetadataRequest::Join => Operation::JoinVolume(OpenVolume {
                volume: self.volume,
                client: ask.client,
                node: NodeId::NIL,
                client_name: format!("client {}", ask.client.0[15]),
                force: ask.force,
            }),
            MetadataRequest::Open => Operation::OpenVolume(OpenVolume {
                volume: self.volume,
                client: ask.client,
                node: NodeId::NIL,
                client_name: format!("client {}", ask.client.0[15]),
                force: ask.force,
            }),
            MetadataRequest::ChangeReplicas { epoch, changes } => {
                let changes = changes.iter().map(|c| model::ReplicaChange {
                    group: c.group,
                    disk: c.disk,
                    state: c.state,
                    incarnation: c.incarnation,
                });
                Operation::ChangeReplicas(ChangeReplicas {
                    volume: self.volume,
                    client: ask.client,
                    epoch: *epoch,
                    changes: changes.collect(),
                })
            }
            MetadataRequest::Close { epoch, clean } => Operation::CloseVolume {
                volume: self.volume,
                client: ask.client,
                epoch: *epoch,
                clean: *clean,
            },
        };
        let mut key = ask.client.0;
        key[..8].copy_from_slice(&ask.number.to_be_bytes());
        let response = model::apply(
            &mut self.state,
            &Command {
                request: RequestKey(key),
                operation,
            },
        );
        match response {
            Ok(Answer::Opened {
                volume,
                previous_clean,
            }) => SessionEvent::Granted {
                view: Box::new(self.view_of(&volume, now)),
                previous_clean,
                first_open: !opened_once_before,
            },
            Ok(Answer::Changed {
                applied, volume, ..
            }) => SessionEvent::ChangeAnswer {
                applied,
                view: Box::new(self.view_of(&volume, now)),
            },
            Ok(_) => SessionEvent::CloseAnswer,
            Err(refusal) => match ask.request {
                MetadataRequest::Join if !self.volume().is_readable() => SessionEvent::NotReadable,
                MetadataRequest::Open | MetadataRequest::Join => SessionEvent::OpenRefused {
                    reason: refusal.message,
                },
                _ => SessionEvent::ConfigChanged(Box::new(self.view(now))),
            },
        }
    }
}

fn disk_record(number: u32, incarnation: Incarnation) -> Disk {
    Disk {
        id: disk_id(number),
        node: node_id(number),
        path: "/dev/sim".to_owned(),
        data_address: address(number),
        capacity_bytes: 1 << 30,
        incarnation,
        labels: Default::default(),
    }
}
