//! Which storage daemons hold volumes that nobody uses, so that they can be rebuilt.
//!
//! A rebuild needs a holder (R7). A volume that nobody holds and of which replicas are behind is held by the daemon of a node that
//! has a good copy, for as long as something can be rebuilt.
//!
//! Invariants:
//! - Only volumes that need it (`Volume::needs_care`), of which a replica that is behind is on a living disk, and every group of
//!   which has a living copy in sync: such an open completes.
//! - One daemon per volume, and the same one from round to round while its node lives.
//! - Those in danger first, within the caps.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{NodeId, ReplicaState, VolumeId};

use super::DiskView;
use crate::model::{State, Volume};

/// Volumes held at a time.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// In the whole cluster.
    pub cluster: usize,
    /// By one daemon.
    pub node: usize,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            cluster: 128,
            node: 8,
        }
    }
}

/// Volumes looked at in a round, so that it is bounded; what is done makes room for others.
const VOLUMES_MAX: usize = 65_536;

/// Who holds what.
pub type Orders = BTreeMap<NodeId, BTreeSet<VolumeId>>;

/// Plans one round; `before`: of the last one. `wanted` says that somebody wants the volume now: it is left alone.
pub fn plan(
    state: &State,
    view: &dyn DiskView,
    caps: Caps,
    before: &Orders,
    wanted: impl Fn(VolumeId) -> bool,
) -> Orders {
    let mut candidates = BTreeSet::new();
    for id in state.neglected().take(VOLUMES_MAX) {
        let volume = state.volume(id).filter(|_| !wanted(id));
        if let Some(good) = volume.and_then(|v| rebuildable(v, view)) {
            candidates.insert((good, id));
        }
    }
    let assigned: BTreeMap<VolumeId, NodeId> = before
        .iter()
        .flat_map(|(node, volumes)| volumes.iter().map(|v| (*v, *node)))
        .collect();
    let mut orders = Orders::new();
    for (_, id) in candidates.into_iter().take(caps.cluster) {
        let Some(volume) = state.volume(id) else {
            continue;
        };
        let nodes = nodes_with_good_copies(state, view, volume);
        let holds = volume.holder.as_ref().map(|h| h.node);
        let keeps = holds.or_else(|| assigned.get(&id).copied());
        let load = |node: &NodeId| orders.get(node).map_or(0, BTreeSet::len);
        let kept = keeps.filter(|node| nodes.contains(node));
        let node = kept.or_else(|| nodes.iter().copied().min_by_key(load));
        if let Some(node) = node.filter(|n| load(n) < caps.node) {
            orders.entry(node).or_default().insert(id);
        }
    }
    orders
}

/// The copies in sync of the worst group, if something can be rebuilt now.
fn rebuildable(volume: &Volume, view: &dyn DiskView) -> Option<usize> {
    let mut behind = volume.all_replicas().map(|(_, r)| r);
    behind.find(|r| r.state != ReplicaState::InSync && view.alive(r.disk))?;
    let good = volume.groups.iter().map(|g| {
        g.iter()
            .filter(|r| r.state == ReplicaState::InSync && view.alive(r.disk))
            .count()
    });
    good.min().filter(|good| *good > 0)
}

fn nodes_with_good_copies(state: &State, view: &dyn DiskView, volume: &Volume) -> BTreeSet<NodeId> {
    let replicas = volume.all_replicas().map(|(_, r)| r);
    replicas
        .filter(|r| r.state == ReplicaState::InSync && view.alive(r.disk))
        .filter_map(|r| state.disk(r.disk).map(|d| d.node))
        .collect()
}
