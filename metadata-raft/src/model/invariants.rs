//! What must hold after every command.
//!
//! [`check_transition`] is cheap (one volume) and runs before every change takes effect, in release too.
//! [`check_state`] looks at everything and runs in tests and in debug builds of small clusters.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, Epoch, ReplicaState, SnapshotId, SnapshotNumber};

use super::service::{Part, Service};
use super::snapshot::{Snapshot, SnapshotState, Snapshots};
use super::volume::{AttachMode, FormatState, Volume};
use super::{DiskUse, PoolUse, State, validate};

type Check = Result<(), String>;

fn require(holds: bool, what: &str) -> Check {
    if holds { Ok(()) } else { Err(what.to_owned()) }
}

/// Checks a volume, and that it may follow what it was before.
pub fn check_transition(before: Option<&Volume>, after: &Volume) -> Check {
    check_volume(after)?;
    let Some(before) = before else {
        return check_new(after);
    };
    require(
        before.id == after.id && before.name == after.name,
        "identity never changes",
    )?;
    require(after.epoch >= before.epoch, "epochs only grow")?;
    require(after.revision > before.revision, "revisions only grow")?;
    require(after.size_bytes >= before.size_bytes, "volumes only grow")?;
    require(
        after.groups.len() == before.groups.len(),
        "the number of groups never changes",
    )?;
    require(
        after.opened_once || !before.opened_once,
        "an opened volume stays opened once",
    )?;
    let formatted = |v: &Volume| {
        let format = v.format.clone();
        format.filter(|f| f.state == FormatState::Formatted)
    };
    require(
        formatted(before).is_none() || before.format == after.format,
        "what is formatted stays so",
    )?;
    check_layers_transition(before, after)?;
    check_parent_transition(before, after)?;
    let same_epoch = after.epoch == before.epoch;
    require(
        !same_epoch || same_configuration(before, after),
        "a changed configuration has a new epoch",
    )?;
    if let Some(holder) = &after.holder
        && before.holder.as_ref() != Some(holder)
    {
        require(
            !same_epoch && holder.epoch == after.epoch,
            "a grant has a new epoch",
        )?;
    }
    for (old, new) in before.groups.iter().zip(&after.groups) {
        for replica in new {
            let was = old.iter().find(|r| r.disk == replica.disk).map(|r| r.state);
            let legal = before.is_unmade()
                || match (was, replica.state) {
                    (None | Some(ReplicaState::Stale), state) => state != ReplicaState::InSync,
                    (Some(ReplicaState::Rebuilding), _) => true,
                    (Some(ReplicaState::InSync), state) => state != ReplicaState::Rebuilding,
                };
            require(legal, "illegal transition of a replica")?;
        }
        let removed = old.iter().filter(|r| !new.iter().any(|n| n.disk == r.disk));
        for replica in removed {
            // Either its successor is in sync, or it was the successor of an abandoned move.
            let succeeded = replica.leaving_for.is_some_and(|to| {
                new.iter()
                    .any(|n| n.disk == to && n.state == ReplicaState::InSync)
            });
            let abandoned = old.iter().any(|o| o.leaving_for == Some(replica.disk));
            require(
                succeeded || abandoned || before.is_unmade(),
                "a replica leaves only for one in sync",
            )?;
        }
    }
    Ok(())
}

/// Whether the groups are the same, but for a parent that was cut off.
fn same_configuration(before: &Volume, after: &Volume) -> bool {
    let cut = before.parent.is_some() && after.parent.is_none();
    let configuration = |volume: &Volume| {
        let mut groups = volume.groups.clone();
        for replica in groups.iter_mut().flatten() {
            replica.inherits &= !cut;
        }
        groups
    };
    configuration(before) == configuration(after)
}

/// A volume that was not there before.
fn check_new(volume: &Volume) -> Check {
    let layers = &volume.layers;
    let empty = layers.live.is_empty() && layers.settled == volume.snapshot;
    require(
        volume.holder.is_none() && empty && !volume.opened_once,
        "a new volume is detached, not yet opened, without snapshots",
    )?;
    match volume.parent {
        None => require(
            volume.epoch == Epoch(0) && volume.snapshot.0 == 0,
            "a new volume begins at epoch 0 and with snapshot number 0",
        ),
        Some(parent) => require(
            volume.snapshot == parent.number && layers.revision == 1,
            "a new clone begins with its parent's snapshot number",
        ),
    }
}

/// C1, C7.
fn check_parent_transition(before: &Volume, after: &Volume) -> Check {
    require(
        after.parent.is_none() || after.parent == before.parent,
        "a parent is only ever cut off",
    )?;
    require(after.source == before.source, "a source never changes")?;
    let may = |disk| before.inherits_on(disk);
    require(
        after
            .all_replicas()
            .all(|(_, r)| !r.inherits || may(r.disk)),
        "a replica never begins to inherit",
    )
}

/// C1: a clone by itself.
fn check_parent(volume: &Volume) -> Check {
    let Some(parent) = volume.parent else {
        let inherits = volume.all_replicas().any(|(_, r)| r.inherits);
        return require(
            !inherits && !volume.flatten,
            "what has no parent inherits nothing",
        );
    };
    require(
        parent.volume != volume.id && parent.number.0 > 0,
        "a parent is a snapshot of another volume",
    )?;
    require(
        volume.reverting.is_none() || !volume.hidden,
        "a deleted volume is not reverted",
    )
}

/// S1, S6, S8.
fn check_layers_transition(before: &Volume, after: &Volume) -> Check {
    require(
        after.snapshot.0 == before.snapshot.0
            || (after.snapshot.0 == before.snapshot.0 + 1 && !before.is_snapshot_pending()),
        "one number at a time, and never one twice",
    )?;
    let (old, new) = (&before.layers, &after.layers);
    require(new.settled >= old.settled, "what is settled stays so")?;
    require(
        new.revision == old.revision + u64::from(old != new),
        "a changed layer list has the next revision",
    )?;
    require(
        new.live
            .iter()
            .all(|n| *n > old.settled || old.live.binary_search(n).is_ok()),
        "a number is not made live again",
    )?;
    require(
        after.hidden || !before.hidden,
        "a deleted volume stays deleted",
    )
}

/// S1, S6: the numbers of a volume by themselves.
fn check_layers(volume: &Volume) -> Check {
    volume.layers.check().map_err(|e| e.to_string())?;
    require(
        volume.layers.live.len() <= validate::SNAPSHOTS_MAX,
        "too many snapshots",
    )?;
    let settled = volume.layers.settled.0;
    require(
        settled == volume.snapshot.0 || settled + 1 == volume.snapshot.0,
        "at most the highest number is pending",
    )?;
    let unused = volume.holder.as_ref().is_none_or(|_| volume.is_in_care())
        && volume.readers.is_empty()
        && volume.publications.is_empty()
        && !volume.is_snapshot_pending();
    require(
        !volume.hidden || (unused && !volume.layers.live.is_empty()),
        "a deleted volume is kept for its snapshots, and unused",
    )
}

/// Checks a volume by itself.
fn check_volume(volume: &Volume) -> Check {
    require(
        !volume.groups.is_empty() && volume.groups.len() <= validate::GROUPS_MAX,
        "1 to 64 groups",
    )?;
    require(
        volume.min_replicas >= 1 && volume.min_replicas <= volume.replicas,
        "1 <= min_replicas <= replicas",
    )?;
    require(
        !(volume.clean && volume.holder.is_some()),
        "an attached volume is not clean",
    )?;
    if let Some(holder) = &volume.holder {
        require(
            holder.epoch <= volume.epoch && holder.epoch.0 > 0,
            "the holder's epoch was granted",
        )?;
    }
    require(
        volume.publications.len() <= validate::PUBLICATIONS_MAX
            && (volume.publications.len() <= 1
                || volume
                    .publications
                    .values()
                    .all(|m| *m == AttachMode::ReadOnly)),
        "published to one node, or read-only to a bounded number",
    )?;
    check_readers(volume)?;
    check_layers(volume)?;
    check_parent(volume)?;
    for group in &volume.groups {
        require(
            group.iter().any(|r| r.state == ReplicaState::InSync),
            "a group without in-sync replica",
        )?;
        require(
            group.len() <= 2 * usize::from(volume.replicas),
            "too many replicas in a group",
        )?;
        for (i, replica) in group.iter().enumerate() {
            require(
                group[..i].iter().all(|r| r.disk != replica.disk),
                "a disk twice in a group",
            )?;
            let rebuilding = replica.state == ReplicaState::Rebuilding;
            let expected = if rebuilding { volume.epoch } else { Epoch(0) };
            require(
                replica.rebuild_epoch == expected,
                "rebuild epoch of a replica",
            )?;
            if let Some(to) = replica.leaving_for {
                let successor = group.iter().find(|r| r.disk == to);
                require(
                    successor.is_some_and(|s| s.state != ReplicaState::InSync),
                    "a leaving replica has a successor that is not yet in sync",
                )?;
            }
        }
    }
    Ok(())
}

/// R10.
fn check_readers(volume: &Volume) -> Check {
    require(
        volume.readers.is_empty() || volume.is_readable(),
        "what is read is clean, made, and not held",
    )?;
    let holds = volume.holder.as_ref().map(|h| h.mode);
    require(
        holds.is_none_or(|mode| mode != AttachMode::ReadOnly),
        "a holder that only reads",
    )?;
    for (i, reader) in volume.readers.iter().enumerate() {
        require(
            reader.mode == AttachMode::ReadOnly && reader.epoch <= volume.epoch,
            "a reader joined at an epoch that was granted",
        )?;
        require(
            volume.readers[..i]
                .iter()
                .all(|r| r.client != reader.client),
            "a reader twice",
        )?;
    }
    Ok(())
}

/// Checks everything, indexes included: O(size of the state).
pub fn check_state(state: &State) -> Check {
    let mut disk_use = BTreeMap::<DiskId, DiskUse>::new();
    let mut pool_use = BTreeMap::<_, PoolUse>::new();
    let mut disk_volumes = BTreeSet::new();
    let mut repairable = BTreeSet::new();
    let mut layered = BTreeSet::new();
    let mut children = BTreeSet::new();
    let mut neglected = BTreeSet::new();
    let mut rebuilding = 0;
    for (id, volume) in &state.volumes {
        require(*id == volume.id, "volume under another id")?;
        check_volume(volume).map_err(|broken| format!("volume {}: {broken}", volume.name))?;
        require(
            volume.hidden || state.volume_by_name.get(&volume.name) == Some(id),
            "index of volume names",
        )?;
        check_snapshots_of(&state.snapshots, volume)
            .and_then(|()| check_clone(state, volume))
            .map_err(|broken| format!("volume {}: {broken}", volume.name))?;
        require(
            state.pools.contains_key(&volume.pool),
            "volume without pool",
        )?;
        children.extend(volume.parent.map(|p| (p, *id)));
        neglected.extend(volume.needs_care().then_some(*id));
        let pool = pool_use.entry(volume.pool).or_default();
        pool.volumes += 1;
        for (_, replica) in volume.all_replicas() {
            require(
                state.disks.contains_key(&replica.disk),
                "replica without disk",
            )?;
            require(
                !state.garbage.contains_key(&(replica.disk, *id)),
                "a replica is not garbage",
            )?;
            let disk = disk_use.entry(replica.disk).or_default();
            disk.replicas += 1;
            disk.provisioned_bytes += volume.share_bytes();
            pool.provisioned_bytes += volume.share_bytes();
            disk_volumes.insert((replica.disk, *id));
            if volume.layers.revision > 0 {
                layered.insert((replica.disk, *id));
            }
            if volume.holder.is_some() {
                match replica.state {
                    ReplicaState::Stale => drop(repairable.insert((replica.disk, *id))),
                    ReplicaState::Rebuilding => {
                        disk.rebuilding += 1;
                        rebuilding += 1;
                    }
                    ReplicaState::InSync => {}
                }
            }
        }
    }
    require(
        state.volume_by_name.len() == state.volumes.values().filter(|v| !v.hidden).count(),
        "index of volume names",
    )?;
    require(disk_use == state.disk_use, "use of disks")?;
    require(pool_use == state.pool_use, "use of pools")?;
    require(
        disk_volumes == state.disk_volumes,
        "index of volumes by disk",
    )?;
    require(
        repairable == state.repairable,
        "index of repairable replicas",
    )?;
    require(layered == state.layered, "index of layered replicas")?;
    require(children == state.children, "index of clones")?;
    require(
        neglected == state.neglected,
        "index of volumes that need care",
    )?;
    require(
        state
            .flatten_policies
            .keys()
            .all(|p| state.pools.contains_key(p)),
        "a policy without pool",
    )?;
    require(rebuilding == state.rebuilding, "number of rebuilds")?;
    check_snapshots(state)?;
    check_names(state)
}

/// The snapshots of a volume are what its numbers say.
fn check_snapshots_of(snapshots: &Snapshots, volume: &Volume) -> Check {
    let mut ready = BTreeSet::new();
    let mut pending = Vec::new();
    for snapshot in snapshots.of_volume(volume.id, SnapshotId::NIL) {
        match snapshot.state {
            SnapshotState::Pending => pending.push(snapshot.number),
            SnapshotState::Ready | SnapshotState::Hidden => {
                require(ready.insert(snapshot.number), "a number twice")?;
                require(
                    snapshot.size_bytes <= volume.size_bytes,
                    "a snapshot larger than its volume",
                )?;
            }
            SnapshotState::Deleting { revision } => require(
                revision <= volume.layers.revision
                    && volume.layers.live.binary_search(&snapshot.number).is_err(),
                "a deleting snapshot is off the list",
            )?,
        }
    }
    let expected: &[SnapshotNumber] = if volume.is_snapshot_pending() {
        &[volume.snapshot]
    } else {
        &[]
    };
    require(pending == expected, "the pending snapshot of a volume")?;
    require(
        ready.iter().eq(&volume.layers.live),
        "ready and hidden snapshots are the live numbers",
    )
}

/// C2, C6: what a clone inherits from is there; what is being reverted to, too.
fn check_clone(state: &State, volume: &Volume) -> Check {
    if let Some(snapshot) = volume.reverting {
        let snapshot = state.snapshots.get(snapshot);
        require(
            snapshot.is_some_and(|s| s.volume == volume.id && s.state == SnapshotState::Ready),
            "what a volume is reverted to is a snapshot of it",
        )?;
    }
    let Some(parent) = volume.parent else {
        return Ok(());
    };
    let Some(origin) = state.volumes.get(&parent.volume) else {
        return Err("a clone without its parent".to_owned());
    };
    require(
        origin.layers.live.binary_search(&parent.number).is_ok(),
        "what a clone inherits from is live",
    )?;
    let disks = origin.disks();
    require(
        volume
            .all_replicas()
            .all(|(_, r)| !r.inherits || disks.binary_search(&r.disk).is_ok()),
        "a clone inherits only where its parent is",
    )?;
    let mut above = Some(parent);
    for _ in 0..validate::CLONE_DEPTH_MAX {
        above = above.and_then(|p| state.volumes.get(&p.volume)?.parent);
    }
    require(above.is_none(), "a chain of clones is too long")
}

/// Every snapshot has its volume, names are unique, and a group is pending as a whole.
fn check_snapshots(state: &State) -> Check {
    let mut again = Snapshots::default();
    let mut names = BTreeSet::new();
    let mut groups = BTreeMap::new();
    for snapshot in state.snapshots.iter() {
        require(
            snapshot.state != SnapshotState::Hidden
                || state.has_clones(snapshot.volume, snapshot.number),
            "a hidden snapshot without clone",
        )?;
        require(
            state.volumes.contains_key(&snapshot.volume),
            "snapshot without volume",
        )?;
        require(
            !snapshot.is_shown() || names.insert(&snapshot.name),
            "a snapshot's name twice",
        )?;
        if let Some(group) = snapshot.group.as_ref().filter(|_| snapshot.is_shown()) {
            let pending = snapshot.state == SnapshotState::Pending;
            let known = groups.entry(&group.name).or_insert((group.id, pending));
            require(
                *known == (group.id, pending),
                "a group's name is one group, pending as a whole",
            )?;
        }
        again.insert(Snapshot::clone(snapshot));
    }
    require(again == state.snapshots, "index of snapshots")
}

fn check_names(state: &State) -> Check {
    require(
        state.node_by_name.len() == state.nodes.len(),
        "index of node names",
    )?;
    require(
        state.pool_by_name.len() == state.pools.len(),
        "index of pool names",
    )?;
    for node in state.nodes.values() {
        require(
            state.node_by_name.get(&node.name) == Some(&node.id),
            "index of node names",
        )?;
    }
    for pool in state.pools.values() {
        require(
            state.pool_by_name.get(&pool.name) == Some(&pool.id),
            "index of pool names",
        )?;
    }
    for (part, service) in &state.services {
        let exists = match part {
            Part::Node(id) => state.nodes.contains_key(id),
            Part::Disk(id) => state.disks.contains_key(id),
        };
        require(
            exists && *service != Service::InUse,
            "what is out of service",
        )?;
    }
    for disk in state.disks.values() {
        require(state.nodes.contains_key(&disk.node), "disk without node")?;
        require(
            state.node_disks.contains(&(disk.node, disk.id)),
            "index of disks by node",
        )?;
    }
    require(
        state.node_disks.len() == state.disks.len(),
        "index of disks by node",
    )
}
