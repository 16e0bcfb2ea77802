//! Clones: what they begin with, what they keep, how chains unwind, and how they are cut off.

use super::snapshots::{commit, delete, list, reserve, snapshot_id};
use super::*;
use ashlar_proto::ids::{SnapshotId, SnapshotNumber};

use RefusalCode::{
    Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted,
};

pub(super) fn clone_id(n: u8) -> VolumeId {
    let mut bytes = [20; 16];
    bytes[0] = n;
    VolumeId(bytes)
}

pub(super) fn clone_as(n: u8, snapshot: SnapshotId) -> CloneVolume {
    CloneVolume {
        volume: clone_id(n),
        name: format!("c{n}"),
        size_bytes: 64 << 20,
        min_replicas: 2,
        snapshot,
        source: Source::Snapshot(snapshot),
        labels: Labels::new(),
        created_unix_ms: 9,
    }
}

fn clone(n: u8, snapshot: u8) -> Operation {
    Operation::CloneVolume(clone_as(n, snapshot_id(snapshot)))
}

/// Opens a volume, records its replicas and closes it.
fn use_volume(m: &mut Machine, volume: VolumeId) {
    let named = |operation| match operation {
        Operation::OpenVolume(o) => Operation::OpenVolume(OpenVolume { volume, ..o }),
        other => other,
    };
    m.ok(named(open(1, false)));
    let found = m.state.volume(volume).unwrap();
    let changes = found
        .all_replicas()
        .filter(|(_, r)| r.state == InSync)
        .map(|(g, r)| ReplicaChange {
            group: GroupIndex(g as u32),
            disk: r.disk,
            state: InSync,
            incarnation: Incarnation(5),
        });
    let changes = ChangeReplicas {
        volume,
        client: client(1),
        epoch: found.epoch,
        changes: changes.collect(),
    };
    m.ok(Operation::ChangeReplicas(changes));
    let found = m.state.volume(volume).unwrap();
    assert!(found.opened_once);
    let epoch = found.epoch;
    m.ok(Operation::CloseVolume {
        volume,
        client: client(1),
        epoch,
        clean: true,
    });
}

fn snapshot_of(m: &mut Machine, n: u8, volume: VolumeId) {
    m.ok(Operation::ReserveSnapshots(ReserveSnapshots {
        snapshots: vec![NewSnapshot {
            id: snapshot_id(n),
            name: format!("s{n}"),
            volume,
            labels: Labels::new(),
        }],
        group: None,
        created_unix_ms: 5,
    }));
    m.ok(commit(&[(n, None)]));
}

/// A volume that was used, with snapshot 1.
fn used() -> Machine {
    let mut m = Machine::with_volume(4, 3);
    use_volume(&mut m, VOLUME);
    m.ok(reserve(1, "s1"));
    m.ok(commit(&[(1, None)]));
    m
}

fn volume(m: &Machine, n: u8) -> &Volume {
    m.state.volume(clone_id(n)).unwrap()
}

fn cut(m: &mut Machine, n: u8) {
    let parent = volume(m, n).parent.unwrap();
    let volume = clone_id(n);
    m.ok(Operation::CutParent { volume, parent });
}

fn image_is_as_good(m: &Machine) {
    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(restored.volumes, m.state.volumes);
    assert_eq!(restored.snapshots, m.state.snapshots);
    assert_eq!(restored.children, m.state.children);
    assert_eq!(restored.flatten_policies, m.state.flatten_policies);
}

#[test]
fn a_clone_begins_where_its_source_is() {
    let mut m = used();
    m.open(2, false).unwrap();
    let epoch = m.volume().epoch.0;
    assert!(m.change(2, epoch, 3, Stale));
    assert!(m.change(2, epoch + 1, 2, Stale));
    m.ok(begin(epoch + 2, 2));
    assert_eq!(m.states(), [InSync, Rebuilding, Stale]);
    let made = m.ok(clone(1, 1));
    let made = match made {
        Answer::Volume(made) => made,
        other => panic!("{other:?}"),
    };
    let states: Vec<_> = made.groups[0].iter().map(|r| r.state).collect();
    assert_eq!(states, [InSync, Stale, Stale]);
    assert!(made.all_replicas().all(|(_, r)| r.inherits));
    assert_eq!(made.disks(), m.volume().disks());
    assert_eq!(made.epoch, m.volume().epoch);
    assert_eq!(made.snapshot, SnapshotNumber(1));
    assert_eq!(list(&made), (1, 1, vec![]));
    assert!(made.clean && !made.opened_once, "its holder makes them");
    let parent = Parent {
        volume: VOLUME,
        number: SnapshotNumber(1),
    };
    assert_eq!(made.parent, Some(parent));
    assert_eq!(
        m.state.layered_on(disk_id(1)).collect::<Vec<_>>(),
        [clone_id(1), VOLUME]
    );
    image_is_as_good(&m);
}

#[test]
fn name_and_source_make_a_creation_idempotent() {
    let mut m = used();
    snapshot_of(&mut m, 2, VOLUME);
    let first = m.ok(clone(1, 1));
    let again = CloneVolume {
        volume: clone_id(9),
        ..clone_as(1, snapshot_id(1))
    };
    let again = |change: fn(&mut CloneVolume)| {
        let mut again = again.clone();
        change(&mut again);
        Operation::CloneVolume(again)
    };
    assert_eq!(m.ok(again(|_| {})), first);
    assert_eq!(m.refused(again(|c| c.size_bytes *= 2)), AlreadyExists);
    let other = again(|c| c.source = Source::Snapshot(snapshot_id(2)));
    assert_eq!(m.refused(other), AlreadyExists);
    let plain = Operation::CreateVolume(create("c1", VolumeId([3; 16]), 3));
    assert_eq!(m.refused(plain), AlreadyExists);
    // The source may be gone.
    m.ok(delete(&[1]));
    assert_eq!(m.ok(again(|_| {})), first);
}

#[test]
fn what_cannot_be_cloned_is_refused() {
    let mut m = used();
    assert_eq!(m.refused(clone(1, 7)), NotFound);
    let smaller = CloneVolume {
        size_bytes: 32 << 20,
        ..clone_as(1, snapshot_id(1))
    };
    assert_eq!(m.refused(Operation::CloneVolume(smaller)), InvalidArgument);
    let larger = CloneVolume {
        size_bytes: 4 << 30,
        ..clone_as(1, snapshot_id(1))
    };
    assert_eq!(m.refused(Operation::CloneVolume(larger)), ResourceExhausted);
    m.ok(reserve(2, "s2"));
    assert_eq!(m.refused(clone(1, 2)), Aborted);
    m.ok(commit(&[(2, None)]));
    m.ok(delete(&[2]));
    assert_eq!(m.refused(clone(1, 2)), NotFound);
    let to_4 = Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(1),
        to: disk_id(4),
    };
    m.ok(to_4);
    assert_eq!(m.refused(clone(1, 1)), FailedPrecondition);
}

#[test]
fn what_was_never_opened_has_nothing_to_inherit() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(reserve(1, "s1"));
    m.ok(commit(&[(1, None)]));
    m.ok(clone(1, 1));
    let made = volume(&m, 1);
    assert_eq!((made.parent, made.epoch), (None, Epoch(0)));
    assert_eq!(list(made), (0, 0, vec![]));
    m.ok(delete(&[1]));
    assert_eq!(list(m.volume()), (2, 1, vec![]), "nothing keeps it");
    // Of a clone that was never opened: what that one inherits.
    use_volume(&mut m, VOLUME);
    m.ok(reserve(2, "s2"));
    m.ok(commit(&[(2, None)]));
    m.ok(clone(2, 2));
    snapshot_of(&mut m, 3, clone_id(2));
    m.ok(clone(3, 3));
    assert_eq!(volume(&m, 3).parent, volume(&m, 2).parent);
    assert!(volume(&m, 3).all_replicas().all(|(_, r)| r.inherits));
    m.ok(delete(&[3]));
    m.ok(Operation::DeleteVolume(clone_id(2)));
    assert!(m.state.volume(clone_id(2)).is_none());
    m.ok(delete(&[2]));
    assert!(m.state.snapshots().is_hidden(VOLUME, SnapshotNumber(2)));
}

#[test]
fn a_snapshot_with_clones_is_hidden_until_the_last_is_gone() {
    let mut m = used();
    m.ok(clone(1, 1));
    m.ok(clone(2, 1));
    m.ok(delete(&[1]));
    m.ok(delete(&[1]));
    assert!(m.state.snapshots().by_name("s1").is_none(), "name is free");
    assert_eq!(list(m.volume()), (1, 1, vec![1]), "still live");
    assert_eq!(m.refused(clone(3, 1)), NotFound);
    m.ok(reserve(4, "s1"));
    m.ok(commit(&[(4, None)]));
    m.ok(Operation::ForgetSnapshots(vec![snapshot_id(1)]));
    image_is_as_good(&m);
    m.ok(Operation::DeleteVolume(clone_id(1)));
    assert_eq!(list(m.volume()), (2, 2, vec![1, 2]));
    cut(&mut m, 2);
    assert_eq!(list(m.volume()), (3, 2, vec![2]));
    let snapshot = m.state.snapshots().get(snapshot_id(1)).unwrap();
    assert_eq!(snapshot.state, SnapshotState::Deleting { revision: 3 });
}

#[test]
fn chains_unwind_to_the_end() {
    let mut m = used();
    m.ok(clone(1, 1));
    use_volume(&mut m, clone_id(1));
    snapshot_of(&mut m, 2, clone_id(1));
    m.ok(clone(2, 2));
    use_volume(&mut m, clone_id(2));
    // Everything above the last clone is deleted by its users.
    m.ok(delete(&[1, 2]));
    m.ok(Operation::DeleteVolume(VOLUME));
    m.ok(Operation::DeleteVolume(clone_id(1)));
    assert!(m.volume().hidden && volume(&m, 1).hidden);
    image_is_as_good(&m);
    m.ok(Operation::DeleteVolume(clone_id(2)));
    assert_eq!(m.state.volume_count(), 0);
    assert_eq!(m.state.snapshots().iter().count(), 0);
    assert_eq!(m.state.garbage_count(), 9);
}

#[test]
fn a_chain_is_bounded() {
    let mut m = Machine::with_volume(4, 3);
    m.ok(Operation::UpdatePool {
        name: "fast".into(),
        spec: PoolSpec {
            overprovision_percent: 1000,
            ..PoolSpec::default()
        },
    });
    use_volume(&mut m, VOLUME);
    let mut of = VOLUME;
    for n in 1..=16 {
        snapshot_of(&mut m, n, of);
        m.ok(clone(n, n));
        of = clone_id(n);
        use_volume(&mut m, of);
    }
    snapshot_of(&mut m, 17, of);
    let refusal = m.run(clone(17, 17)).unwrap_err();
    assert_eq!(refusal.code, FailedPrecondition);
    let advice = "`ashlar volume flatten c16`";
    assert!(refusal.message.contains(advice), "{refusal}");
    cut(&mut m, 8);
    m.ok(clone(17, 17));
}

#[test]
fn cutting_changes_no_configuration() {
    let mut m = used();
    m.ok(clone(1, 1));
    use_volume(&mut m, clone_id(1));
    m.ok(Operation::FlattenVolume(VOLUME));
    assert!(!m.volume().flatten, "it is no clone");
    m.ok(Operation::FlattenVolume(clone_id(1)));
    assert!(volume(&m, 1).flatten && m.state.is_to_flatten(volume(&m, 1)));
    let before = volume(&m, 1).clone();
    let parent = before.parent.unwrap();
    let other = Operation::CutParent {
        volume: clone_id(1),
        parent: Parent {
            number: SnapshotNumber(7),
            ..parent
        },
    };
    m.ok(other);
    assert_eq!(volume(&m, 1).parent, Some(parent), "not that one");
    cut(&mut m, 1);
    let after = volume(&m, 1);
    assert_eq!((after.parent, after.flatten), (None, false));
    assert_eq!(after.epoch, before.epoch);
    assert!(after.all_replicas().all(|(_, r)| !r.inherits));
    m.ok(delete(&[1]));
    assert_eq!(list(m.volume()), (2, 1, vec![]));
}

#[test]
fn a_parent_does_not_leave_a_disk_where_a_clone_inherits() {
    let mut m = used();
    m.ok(clone(1, 1));
    use_volume(&mut m, clone_id(1));
    let go = |volume| Operation::MoveReplica {
        volume,
        from: disk_id(1),
        to: disk_id(4),
    };
    let refusal = m.run(go(VOLUME)).unwrap_err();
    assert_eq!(refusal.code, FailedPrecondition);
    assert!(refusal.message.contains("c1"), "{refusal}");
    // The clone itself does, and inherits nothing there.
    m.ok(go(clone_id(1)));
    let arriving = volume(&m, 1)
        .all_replicas()
        .find(|r| r.1.disk == disk_id(4));
    assert!(!arriving.unwrap().1.inherits);
    cut(&mut m, 1);
    m.ok(go(VOLUME));
}

#[test]
fn one_that_is_taken_for_a_clone_goes_with_its_creation() {
    let mut m = used();
    let ask = |n: u8| {
        Operation::ReserveForClone(ReserveSnapshots {
            snapshots: vec![NewSnapshot {
                id: snapshot_id(n),
                name: format!("clone-{n}"),
                volume: VOLUME,
                labels: Labels::new(),
            }],
            group: None,
            created_unix_ms: 5,
        })
    };
    m.ok(ask(2));
    m.ok(commit(&[(2, None)]));
    assert_eq!(m.state.snapshots().for_clones().count(), 1);
    let mut of_volume = clone_as(1, snapshot_id(2));
    of_volume.source = Source::Volume(VOLUME);
    m.ok(Operation::CloneVolume(of_volume));
    assert!(m.state.snapshots().is_hidden(VOLUME, SnapshotNumber(2)));
    assert_eq!(m.state.snapshots().for_clones().count(), 0);
    assert!(!m.state.is_to_flatten(volume(&m, 1)), "no user deleted it");
    m.ok(Operation::DeleteVolume(VOLUME));
    assert!(m.state.is_to_flatten(volume(&m, 1)));
    image_is_as_good(&m);
}

#[test]
fn a_pool_says_which_clones_are_flattened() {
    let mut m = used();
    m.ok(clone(1, 1));
    let wanted = |m: &Machine| m.state.is_to_flatten(volume(m, 1));
    let set = |policy| Operation::SetFlattenPolicy {
        pool: "fast".into(),
        policy,
    };
    assert!(!wanted(&m));
    let before = m.state.layers_generation();
    m.ok(set(FlattenPolicy::Always));
    assert!(wanted(&m) && m.state.layers_generation() != before);
    m.ok(set(FlattenPolicy::Never));
    m.ok(delete(&[1]));
    assert!(!wanted(&m));
    m.ok(set(FlattenPolicy::Orphaned));
    assert!(wanted(&m));
    image_is_as_good(&m);
    m.ok(Operation::DeleteVolume(clone_id(1)));
    m.ok(Operation::DeleteVolume(VOLUME));
    m.ok(Operation::DeletePool("fast".into()));
    image_is_as_good(&m);
}

#[test]
fn a_clone_is_formatted_as_its_snapshot_was() {
    let mut m = used();
    let format = |state| Operation::SetVolumeFormat {
        volume: VOLUME,
        format: Format {
            state,
            fs_type: "ext4".into(),
        },
    };
    m.ok(format(FormatState::Formatting));
    m.ok(format(FormatState::Formatted));
    snapshot_of(&mut m, 2, VOLUME);
    m.ok(clone(1, 1));
    m.ok(clone(2, 2));
    assert_eq!(volume(&m, 1).format, None, "it was not then");
    assert_eq!(volume(&m, 2).format, m.volume().format);
}
