//! Failure detection from heartbeats, in the leader's memory.
//!
//! Invariants: a node is dead when no heartbeat came for [`DEAD_AFTER`]; a new leader has heard nobody
//! yet and presumes everyone alive for one grace period.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ashlar_proto::ids::{DiskId, NodeId, VolumeId};

use super::layers::DiskLayers;
use crate::model::State;
use crate::planner::DiskView;

/// Without a heartbeat for this long a node is dead.
pub const DEAD_AFTER: Duration = Duration::from_secs(2);
/// How long a new leader presumes everyone alive.
pub const GRACE: Duration = Duration::from_millis(2500);

/// What the last heartbeat said of a disk.
#[derive(Clone, Default, Debug)]
pub struct DiskReport {
    /// Bytes in use.
    pub used_bytes: u64,
    /// The disk poisoned itself.
    pub failed: bool,
    /// Sum of the following.
    pub settled_bytes: u64,
    /// Bytes that volumes use on it, in the order of their identities.
    pub volumes: Vec<(VolumeId, u64)>,
}

/// What this member heard while it leads.
#[derive(Default, Debug)]
pub struct Liveness {
    leading_since: Option<Instant>,
    nodes: BTreeMap<NodeId, Instant>,
    disks: BTreeMap<DiskId, DiskReport>,
    layers: BTreeMap<DiskId, DiskLayers>,
}

impl Liveness {
    /// Leadership began: forget what an earlier one heard.
    pub fn begin(&mut self, now: Instant) {
        *self = Self {
            leading_since: Some(now),
            ..Self::default()
        };
    }

    /// A node was heard; only registered disks are to be reported.
    pub fn hear(
        &mut self,
        now: Instant,
        node: NodeId,
        disks: impl Iterator<Item = (DiskId, DiskReport)>,
    ) {
        self.nodes.insert(node, now);
        self.disks.extend(disks);
    }

    /// A disk was removed.
    pub fn forget(&mut self, disk: DiskId) {
        self.disks.remove(&disk);
        self.layers.remove(&disk);
    }

    /// What a disk reported of its replicas' layer lists.
    pub fn layers(&self, disk: DiskId) -> Option<&DiskLayers> {
        self.layers.get(&disk)
    }

    /// The same, to take a report in; only for registered disks.
    pub fn layers_mut(&mut self, disk: DiskId) -> &mut DiskLayers {
        self.layers.entry(disk).or_default()
    }

    /// Whether a node is alive.
    pub fn node_alive(&self, now: Instant, node: NodeId) -> bool {
        match self.nodes.get(&node) {
            Some(heard) => now.saturating_duration_since(*heard) < DEAD_AFTER,
            None => self
                .leading_since
                .is_some_and(|since| now.saturating_duration_since(since) < GRACE),
        }
    }

    /// Time since the last heartbeat.
    pub fn age(&self, now: Instant, node: NodeId) -> Option<Duration> {
        let heard = self.nodes.get(&node).copied().or(self.leading_since)?;
        Some(now.saturating_duration_since(heard))
    }

    /// The last report of a disk.
    pub fn disk(&self, disk: DiskId) -> &DiskReport {
        static NONE: DiskReport = DiskReport {
            used_bytes: 0,
            failed: false,
            settled_bytes: 0,
            volumes: Vec::new(),
        };
        self.disks.get(&disk).unwrap_or(&NONE)
    }
}

/// State and liveness at one moment.
pub struct View<'a> {
    /// The replicated state.
    pub state: &'a State,
    /// What was heard.
    pub liveness: &'a Liveness,
    /// The moment.
    pub now: Instant,
}

impl View<'_> {
    /// Whether a disk failed, or its node was not heard of for as long as `away`.
    pub fn is_lost(&self, disk: DiskId, away: Option<Duration>) -> bool {
        let Some(record) = self.state.disk(disk) else {
            return true;
        };
        let age = self.liveness.age(self.now, record.node);
        let is_away = away.zip(age).is_some_and(|(away, age)| age >= away);
        self.liveness.disk(disk).failed || is_away
    }
}

impl DiskView for View<'_> {
    fn alive(&self, disk: DiskId) -> bool {
        self.state.disk(disk).is_some_and(|d| {
            self.liveness.node_alive(self.now, d.node) && !self.liveness.disk(disk).failed
        })
    }

    fn used_bytes(&self, disk: DiskId) -> u64 {
        self.liveness.disk(disk).used_bytes
    }

    fn settled_bytes(&self, disk: DiskId) -> u64 {
        self.liveness.disk(disk).settled_bytes
    }

    fn replica_bytes(&self, disk: DiskId, volume: VolumeId) -> u64 {
        let volumes = &self.liveness.disk(disk).volumes;
        let found = volumes.binary_search_by_key(&volume, |(id, _)| *id);
        found.map_or(0, |at| volumes[at].1)
    }
}
