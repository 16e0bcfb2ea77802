//! What must hold after every command.
//!
//! [`check_transition`] is cheap (one volume) and runs before every change takes effect, in release too.
//! [`check_state`] looks at everything and runs in tests and in debug builds of small clusters.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, Epoch, ReplicaState};

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
        return require(
            after.epoch == Epoch(0) && after.holder.is_none(),
            "a new volume is detached, at epoch 0",
        );
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
    let same_epoch = after.epoch == before.epoch;
    require(
        !same_epoch || after.groups == before.groups,
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
            let legal = match (was, replica.state) {
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
                succeeded || abandoned,
                "a replica leaves only for one in sync",
            )?;
        }
    }
    Ok(())
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
        holds.is_none_or(|mode| mode == AttachMode::Exclusive),
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
    let mut rebuilding = 0;
    for (id, volume) in &state.volumes {
        require(*id == volume.id, "volume under another id")?;
        check_volume(volume).map_err(|broken| format!("volume {}: {broken}", volume.name))?;
        require(
            state.volume_by_name.get(&volume.name) == Some(id),
            "index of volume names",
        )?;
        require(
            state.pools.contains_key(&volume.pool),
            "volume without pool",
        )?;
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
        state.volume_by_name.len() == state.volumes.len(),
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
    require(rebuilding == state.rebuilding, "number of rebuilds")?;
    check_names(state)
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
