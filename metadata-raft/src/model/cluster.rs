//! Nodes, disks and pools: the parts of the cluster that volumes are placed on.
//!
//! Invariants: names are unique among nodes and among pools; a disk names a registered node.

use std::collections::BTreeMap;

use ashlar_proto::ids::{DiskId, Incarnation, NodeId, PoolId};
use serde::{Deserialize, Serialize};

/// Labels of nodes, disks and volumes.
pub type Labels = BTreeMap<String, String>;

/// The label that names a node's zone.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A machine that runs a storage daemon.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Identity, kept in the daemon's data directory.
    pub id: NodeId,
    /// Host name, unique.
    pub name: String,
    /// Labels; [`ZONE_LABEL`] names the failure domain "zone".
    pub labels: Labels,
    /// `host:port` of the daemon's gRPC service.
    pub admin_address: String,
}

/// A disk of a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Disk {
    /// Identity, from the superblock.
    pub id: DiskId,
    /// The node that serves it now.
    pub node: NodeId,
    /// Path as the node knows it.
    pub path: String,
    /// `host:port` of the data protocol.
    pub data_address: String,
    /// Bytes usable for data.
    pub capacity_bytes: u64,
    /// The store's current incarnation.
    pub incarnation: Incarnation,
    /// Labels, `media=ssd` for instance.
    pub labels: Labels,
}

/// Which parts must differ between the replicas of one group.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum FailureDomain {
    /// Replicas on different nodes.
    Node,
    /// Replicas in different zones (nodes without a zone label count as a zone each).
    Zone,
    /// Replicas on different disks, perhaps of one node.
    Disk,
}

/// What a pool asks of its disks and volumes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PoolSpec {
    /// Labels that a disk or its node must carry; empty: every disk.
    pub selector: Labels,
    /// Replicas of a volume that does not say otherwise.
    pub replicas: u8,
    /// What must differ between replicas.
    pub failure_domain: FailureDomain,
    /// Limit of provisioned bytes, in per cent of a disk's capacity.
    pub overprovision_percent: u32,
}

impl Default for PoolSpec {
    fn default() -> Self {
        Self {
            selector: Labels::new(),
            replicas: 3,
            failure_domain: FailureDomain::Node,
            overprovision_percent: 1000,
        }
    }
}

impl PoolSpec {
    /// Whether a disk belongs to the pool.
    pub fn selects(&self, disk: &Disk, node: &Node) -> bool {
        self.selector
            .iter()
            .all(|(k, v)| disk.labels.get(k) == Some(v) || node.labels.get(k) == Some(v))
    }

    /// Bytes that may be provisioned on a disk of this capacity.
    pub fn provision_limit(&self, capacity_bytes: u64) -> u64 {
        let limit = u128::from(capacity_bytes) * u128::from(self.overprovision_percent) / 100;
        u64::try_from(limit).unwrap_or(u64::MAX)
    }
}

/// Which clones of a pool are made independent of their parents without being asked (docs/snapshots.md, C7).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub enum FlattenPolicy {
    /// None.
    Never,
    /// Those of a volume or snapshot that was deleted.
    #[default]
    Orphaned,
    /// All.
    Always,
}

/// Disks chosen by a selector, with defaults for volumes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pool {
    /// Identity.
    pub id: PoolId,
    /// Unique name.
    pub name: String,
    /// What it asks for.
    pub spec: PoolSpec,
}

/// The failure domain that a disk lies in; two replicas of a group never share one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Domain {
    /// A node.
    Node(NodeId),
    /// A named zone.
    Zone(String),
    /// A disk.
    Disk(DiskId),
}

impl Domain {
    /// The domain of a disk at a level.
    pub fn of(level: FailureDomain, disk: &Disk, node: &Node) -> Self {
        match level {
            FailureDomain::Disk => Self::Disk(disk.id),
            FailureDomain::Node => Self::Node(disk.node),
            FailureDomain::Zone => match node.labels.get(ZONE_LABEL) {
                Some(zone) => Self::Zone(zone.clone()),
                None => Self::Node(disk.node),
            },
        }
    }
}
