//! Nodes and disks that are taken out of service by an operator.
//!
//! Invariants:
//! - Nothing new is placed on what is not in use: no new volume, no replica that moves. What is there already goes on, is read,
//!   written and rebuilt: only its place is in question.
//! - What is draining is emptied by the leader's planner (`planner::moves`); the state only says that it is wanted.
//! - Nodes and disks in use have no entry; an entry goes with its node or disk.

use ashlar_proto::ids::{DiskId, NodeId};
use serde::{Deserialize, Serialize};

use super::State;
use super::command::{Answer, Refusal, Response};

/// A node or a disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Part {
    /// A node with all its disks.
    Node(NodeId),
    /// A disk.
    Disk(DiskId),
}

/// What a node or disk is there for.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub enum Service {
    /// Replicas are placed on it.
    #[default]
    InUse,
    /// What is there stays, and nothing new comes.
    Cordoned,
    /// What is there moves away, and nothing new comes.
    Draining {
        /// The disk that gets it where that is allowed; of disks only.
        to: Option<DiskId>,
    },
}

impl State {
    /// What an operator said of a node or disk itself.
    pub fn service(&self, part: Part) -> Service {
        self.services.get(&part).copied().unwrap_or_default()
    }

    /// What counts for a disk: what was said of it or of its node.
    pub fn disk_service(&self, id: DiskId) -> Service {
        let node = self.disks.get(&id).map(|d| Part::Node(d.node));
        let of_node = node.map_or(Service::InUse, |n| self.service(n));
        match (self.service(Part::Disk(id)), of_node) {
            (own @ Service::Draining { .. }, _) => own,
            (_, of_node @ Service::Draining { .. }) => of_node,
            (Service::InUse, of_node) => of_node,
            (own, _) => own,
        }
    }

    /// Disks that are to be emptied.
    pub fn draining(&self) -> impl Iterator<Item = DiskId> {
        let parts = self.services.iter();
        let parts = parts.filter(|(_, s)| matches!(s, Service::Draining { .. }));
        parts.flat_map(|(part, _)| {
            let (node, disk) = match part {
                Part::Node(node) => (Some(*node), None),
                Part::Disk(disk) => (None, Some(*disk)),
            };
            let of_node = node.into_iter().flat_map(|n| self.disks_of(n));
            of_node.chain(disk)
        })
    }

    /// Disks of a node.
    pub fn disks_of(&self, node: NodeId) -> impl Iterator<Item = DiskId> {
        let (low, high) = ((node, DiskId([0; 16])), (node, DiskId([0xff; 16])));
        self.node_disks.range(low..=high).map(|(_, d)| *d)
    }

    pub(super) fn set_service(&mut self, part: Part, service: Service) -> Response {
        match part {
            Part::Node(id) if !self.nodes.contains_key(&id) => {
                return Err(Refusal::not_found(format!(
                    "node {id} does not exist; see `ashlar node list`"
                )));
            }
            Part::Disk(id) if !self.disks.contains_key(&id) => {
                return Err(Refusal::not_found(format!(
                    "disk {id} does not exist; see `ashlar disk list`"
                )));
            }
            Part::Node(_) | Part::Disk(_) => {}
        }
        if let Service::Draining { to: Some(to) } = service {
            if matches!(part, Part::Node(_)) || part == Part::Disk(to) {
                return Err(Refusal::invalid(
                    "to_disk_id: a disk is replaced by another disk",
                ));
            }
            if !self.disks.contains_key(&to) {
                return Err(Refusal::not_found(format!(
                    "to_disk_id: disk {to} does not exist; see `ashlar disk list`"
                )));
            }
            if self.disk_service(to) != Service::InUse {
                return Err(Refusal::precondition(format!(
                    "to_disk_id: disk {to} is itself cordoned or draining; end that with `ashlar disk uncordon` or `ashlar node \
                     uncordon`, or choose another disk"
                )));
            }
        }
        if service == Service::InUse {
            self.services.remove(&part);
        } else {
            self.services.insert(part, service);
        }
        Ok(Answer::Done)
    }
}
