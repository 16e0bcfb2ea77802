//! Layer lists on their way to the replicas, and what is left of deleted snapshots: heartbeats and the leader's memory
//! (docs/snapshots.md, S6 and S8).
//!
//! Invariants:
//! - A replica that reports an older list than its volume's is sent the current one until it reports it. An answer
//!   carries a bounded number of lists.
//! - A disk that says the same as before costs a digest and no look at its volumes, while no list has changed.
//! - A replica that says that it inherits, of a clone that is to be flattened, is told so until it says otherwise (C7).
//! - What was not reported to this leader is not assumed.

use std::collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher};
use std::hash::{Hash as _, Hasher as _};

use ashlar_proto::ids::{DiskId, VolumeId};
use ashlar_proto::rpc::metadata as pb;

use super::liveness::Liveness;
use crate::model::{Snapshot, SnapshotState, State, Volume};

/// Replicas that one answer tells to cut their links.
const FLATTEN_MAX: usize = 256;
/// Lists in one answer.
pub const SET_LAYERS_MAX: usize = 256;

/// What a replica reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Reported {
    revision: u64,
    chunks_left: u64,
    /// Linked to the parent's; `None`: not said.
    inherits: Option<bool>,
    inherited_left: u64,
}

/// A disk that has no replica of the volume: nothing is left there.
const ABSENT: Reported = Reported {
    revision: u64::MAX,
    chunks_left: 0,
    inherits: None,
    inherited_left: 0,
};

/// What a disk reported of its replicas of volumes with snapshots.
#[derive(Default, Debug)]
pub struct DiskLayers {
    /// Digest of the last report and generation of the lists, if every replica was current then.
    settled: Option<(u64, u64)>,
    replicas: BTreeMap<VolumeId, Reported>,
}

impl DiskLayers {
    /// Takes a disk's report in, and adds to an answer the lists that it lacks and the links that it is to cut. Whether
    /// some clone may have no link left.
    pub fn hear(
        &mut self,
        state: &State,
        status: &pb::DiskStatus,
        disk: DiskId,
        out: &mut pb::HeartbeatResponse,
    ) -> bool {
        let generation = state.layers_generation();
        let digest = digest(status);
        if self.settled == Some((digest, generation)) {
            return false;
        }
        self.settled = None;
        self.replicas.clear();
        let held: BTreeSet<&[u8]> = status.volumes.iter().map(Vec::as_slice).collect();
        let layers: BTreeMap<&[u8], &pb::ReplicaLayers> = status
            .layers
            .iter()
            .map(|l| (l.volume_id.as_slice(), l))
            .collect();
        let (mut current, mut cut) = (true, false);
        for id in state.layered_on(disk) {
            let Some(volume) = state.volume(id) else {
                continue;
            };
            let key = id.0.as_slice();
            let reported = match layers.get(key) {
                Some(l) => Reported {
                    revision: l.revision,
                    chunks_left: l.chunks_left,
                    inherits: l.inherits,
                    inherited_left: l.inherited_left,
                },
                None if held.contains(key) => Reported {
                    revision: 0,
                    ..ABSENT
                },
                None => ABSENT,
            };
            self.replicas.insert(id, reported);
            cut |= volume.parent.is_some() && reported.inherits == Some(false);
            if reported.inherits == Some(true) && state.is_to_flatten(volume) {
                current = false;
                if out.flatten.len() < FLATTEN_MAX {
                    out.flatten.push(pb::Flatten {
                        disk_id: disk.to_vec(),
                        volume_id: id.to_vec(),
                    });
                }
            }
            if reported.revision < volume.layers.revision {
                current = false;
                if out.set_layers.len() < SET_LAYERS_MAX {
                    out.set_layers.push(pb::SetLayers {
                        disk_id: disk.to_vec(),
                        volume_id: id.to_vec(),
                        layers: Some((&volume.layers).into()),
                    });
                }
            }
        }
        if current {
            self.settled = Some((digest, generation));
        }
        cut
    }
}

fn digest(status: &pb::DiskStatus) -> u64 {
    let mut hasher = DefaultHasher::new();
    status.volumes.hash(&mut hasher);
    for layers in &status.layers {
        layers.volume_id.hash(&mut hasher);
        (layers.revision, layers.chunks_left).hash(&mut hasher);
        (layers.inherits, layers.inherited_left).hash(&mut hasher);
    }
    hasher.finish()
}

/// What is left of a snapshot that is being deleted, or of what a clone inherits.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Left {
    /// Replicas that did not report yet that they are done.
    pub replicas: u32,
    /// Chunks that they still have to look at, or to copy, as far as they said.
    pub chunks: u64,
}

/// What is left of a snapshot; nothing of one that is not being deleted.
pub fn left(state: &State, liveness: &Liveness, snapshot: &Snapshot) -> Left {
    let mut left = Left::default();
    let SnapshotState::Deleting { revision } = snapshot.state else {
        return left;
    };
    // A volume that was never opened has no data.
    let volume = state.volume(snapshot.volume).filter(|v| v.opened_once);
    for disk in volume.map(|v| v.disks()).into_iter().flatten() {
        let layers = liveness.layers(disk);
        let reported = layers.and_then(|l| l.replicas.get(&snapshot.volume));
        let done = reported.is_some_and(|r| r.revision >= revision && r.chunks_left == 0);
        left.replicas += u32::from(!done);
        left.chunks += reported.map_or(0, |r| r.chunks_left);
    }
    left
}

/// What a clone may still inherit: a replica counts until its disk said to this leader that it is not linked.
pub fn inherited(liveness: &Liveness, clone: &Volume) -> Left {
    let mut left = Left::default();
    if clone.parent.is_none() {
        return left;
    }
    for disk in clone.disks() {
        let layers = liveness.layers(disk);
        let reported = layers.and_then(|l| l.replicas.get(&clone.id));
        let cut = reported.is_some_and(|r| r.inherits == Some(false));
        left.replicas += u32::from(!cut);
        left.chunks += reported.map_or(0, |r| r.inherited_left);
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_differs_from_what_is_not() {
        let volume = vec![1; 16];
        let status = |layers| pb::DiskStatus {
            volumes: vec![volume.clone()],
            layers,
            ..pb::DiskStatus::default()
        };
        let layers = |revision, chunks_left| {
            vec![pb::ReplicaLayers {
                volume_id: vec![1; 16],
                revision,
                chunks_left,
                ..pb::ReplicaLayers::default()
            }]
        };
        let all = [
            status(Vec::new()),
            status(layers(1, 0)),
            status(layers(1, 2)),
            status(layers(2, 0)),
            pb::DiskStatus::default(),
        ];
        let digests: BTreeSet<_> = all.iter().map(digest).collect();
        assert_eq!(digests.len(), all.len());
    }
}
