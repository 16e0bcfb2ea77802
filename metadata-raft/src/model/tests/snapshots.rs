//! Snapshots: numbers, lists, groups, and what cancels and hides.

use ashlar_proto::ids::{SnapshotGroupId, SnapshotId, SnapshotNumber};

use super::*;

const OTHER: VolumeId = VolumeId([8; 16]);

use RefusalCode::{Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound};

pub(super) fn snapshot_id(n: u8) -> SnapshotId {
    SnapshotId(id16(n))
}

fn new(n: u8, name: &str, volume: VolumeId) -> NewSnapshot {
    NewSnapshot {
        id: snapshot_id(n),
        name: name.into(),
        volume,
        labels: Labels::new(),
    }
}

pub(super) fn reserve(n: u8, name: &str) -> Operation {
    reserve_as(snapshot_id(n), name)
}

pub(super) fn reserve_as(id: SnapshotId, name: &str) -> Operation {
    Operation::ReserveSnapshots(ReserveSnapshots {
        snapshots: vec![NewSnapshot {
            id,
            ..new(0, name, VOLUME)
        }],
        group: None,
        created_unix_ms: 5,
    })
}

fn reserve_both(n: u8, group: &str) -> Operation {
    Operation::ReserveSnapshots(ReserveSnapshots {
        snapshots: vec![
            new(n, &format!("{group}-a"), VOLUME),
            new(n + 1, &format!("{group}-b"), OTHER),
        ],
        group: Some(SnapshotGroup {
            id: SnapshotGroupId(id16(n)),
            name: group.into(),
        }),
        created_unix_ms: 5,
    })
}

pub(super) fn commit(snapshots: &[(u8, Option<(u8, u64)>)]) -> Operation {
    let one = |(n, holder): &(u8, Option<(u8, u64)>)| CommitSnapshot {
        snapshot: snapshot_id(*n),
        holder: holder.map(|(c, e)| (client(c), Epoch(e))),
    };
    Operation::CommitSnapshots(snapshots.iter().map(one).collect())
}

pub(super) fn delete(ids: &[u8]) -> Operation {
    Operation::DeleteSnapshots(ids.iter().copied().map(snapshot_id).collect())
}

fn with_two() -> Machine {
    let mut m = Machine::with_volume(3, 3);
    m.ok(Operation::CreateVolume(create("two", OTHER, 3)));
    m
}

pub(super) fn list(volume: &Volume) -> (u64, u32, Vec<u32>) {
    let layers = &volume.layers;
    let live = layers.live.iter().map(|n| n.0).collect();
    (layers.revision, layers.settled.0, live)
}

fn ids(answer: Answer) -> Vec<SnapshotId> {
    match answer {
        Answer::Snapshots(ids) => ids,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_number_is_reserved_then_live() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    let revision = m.volume().revision;
    assert_eq!(ids(m.ok(reserve(1, "s"))), [snapshot_id(1)]);
    assert!(m.volume().is_snapshot_pending() && m.volume().snapshot == SnapshotNumber(1));
    assert_eq!(list(m.volume()), (0, 0, vec![]));
    m.ok(commit(&[(1, Some((1, 1)))]));
    assert_eq!(list(m.volume()), (1, 1, vec![1]));
    assert!(!m.volume().is_snapshot_pending());
    assert_eq!(m.volume().epoch, Epoch(1), "a list is no configuration");
    assert_eq!(m.volume().revision, revision + 2);
    let snapshot = m.state.snapshots().by_name("s").unwrap();
    assert_eq!(snapshot.state, SnapshotState::Ready);
    assert_eq!(
        (snapshot.number, snapshot.created_unix_ms),
        (SnapshotNumber(1), 5)
    );
}

#[test]
fn only_what_is_current_commits() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    m.ok(reserve(1, "s"));
    for wrong in [Some((2, 1)), Some((1, 0)), None] {
        assert_eq!(m.refused(commit(&[(1, wrong)])), Aborted);
    }
    // The holder's epoch changes with the configuration.
    assert!(m.change(1, 1, 3, ReplicaState::Stale));
    assert_eq!(m.refused(commit(&[(1, Some((1, 1)))])), Aborted);
    m.ok(commit(&[(1, Some((1, 2)))]));
    assert_eq!(m.refused(commit(&[(1, Some((1, 2)))])), Aborted, "once");
}

#[test]
fn without_a_holder_it_takes_a_clean_close() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(reserve(1, "never-opened"));
    m.ok(commit(&[(1, None)]));
    m.open(1, false).unwrap();
    m.ok(close(1, 1, false));
    let refusal = m.run(reserve(2, "t")).unwrap_err();
    assert_eq!(refusal.code, FailedPrecondition);
    assert!(refusal.message.contains("attach it once"), "{refusal}");
    m.open(1, false).unwrap();
    m.ok(reserve(2, "t"));
    m.ok(close(1, 2, false));
    assert_eq!(m.refused(commit(&[(2, None)])), Aborted);
    m.ok(Operation::CancelSnapshots(vec![snapshot_id(2)]));
    assert_eq!(list(m.volume()), (2, 2, vec![1]), "an empty layer");
    assert!(m.state.snapshots().by_name("t").is_none());
}

#[test]
fn a_volume_has_one_pending_number() {
    let mut m = with_two();
    m.ok(reserve(1, "s"));
    let refusal = m.run(reserve(2, "t")).unwrap_err();
    assert_eq!(refusal.code, Aborted);
    assert!(refusal.message.contains("being taken"), "{refusal}");
    assert_eq!(m.refused(reserve_both(3, "g")), Aborted);
    assert!(
        !m.state.volume(OTHER).unwrap().is_snapshot_pending(),
        "all or none"
    );
    assert_eq!(m.refused(delete(&[1])), Aborted);
    assert_eq!(m.refused(Operation::DeleteVolume(VOLUME)), Aborted);
}

#[test]
fn names_make_a_reservation_idempotent() {
    let mut m = with_two();
    m.ok(reserve(1, "s"));
    assert_eq!(ids(m.ok(reserve(2, "s"))), [snapshot_id(1)]);
    m.ok(commit(&[(1, None)]));
    assert_eq!(ids(m.ok(reserve(3, "s"))), [snapshot_id(1)]);
    let elsewhere = Operation::ReserveSnapshots(ReserveSnapshots {
        snapshots: vec![new(4, "s", OTHER)],
        group: None,
        created_unix_ms: 5,
    });
    assert_eq!(m.refused(elsewhere), AlreadyExists);
    m.ok(reserve_both(5, "g"));
    m.ok(commit(&[(5, None), (6, None)]));
    assert_eq!(
        ids(m.ok(reserve_both(7, "g"))),
        [snapshot_id(5), snapshot_id(6)]
    );
    // Not all of the group, or a name of the group alone.
    m.ok(delete(&[6]));
    assert_eq!(m.refused(reserve_both(8, "g")), AlreadyExists);
    assert_eq!(m.refused(reserve(8, "g-a")), AlreadyExists);
    // Names are free again at once.
    m.ok(delete(&[1, 5]));
    m.ok(reserve_both(8, "g"));
    m.ok(commit(&[(8, None), (9, None)]));
    assert_eq!(ids(m.ok(reserve(1_0, "s"))), [snapshot_id(10)]);
}

#[test]
fn what_cannot_be_reserved_is_refused() {
    let mut m = with_two();
    let ask = |snapshots: Vec<NewSnapshot>, group: Option<&str>| {
        Operation::ReserveSnapshots(ReserveSnapshots {
            snapshots,
            group: group.map(|name| SnapshotGroup {
                id: SnapshotGroupId(id16(1)),
                name: name.into(),
            }),
            created_unix_ms: 5,
        })
    };
    let two = || vec![new(1, "a", VOLUME), new(2, "b", OTHER)];
    assert_eq!(m.refused(ask(vec![], None)), InvalidArgument);
    assert_eq!(
        m.refused(ask(two(), None)),
        InvalidArgument,
        "a group has a name"
    );
    assert_eq!(m.refused(ask(two(), Some("No Name"))), InvalidArgument);
    let twice = vec![new(1, "a", VOLUME), new(2, "b", VOLUME)];
    assert_eq!(m.refused(ask(twice, Some("g"))), InvalidArgument);
    let same_name = vec![new(1, "a", VOLUME), new(2, "a", OTHER)];
    assert_eq!(m.refused(ask(same_name, Some("g"))), InvalidArgument);
    let unknown = vec![new(1, "a", VolumeId([3; 16]))];
    assert_eq!(m.refused(ask(unknown, None)), NotFound);
    m.ok(ask(two(), Some("g")));
}

#[test]
fn an_open_cancels_the_group() {
    let mut m = with_two();
    m.ok(reserve_both(1, "g"));
    m.open(1, false).unwrap();
    assert_eq!(list(m.volume()), (1, 1, vec![]));
    assert_eq!(list(m.state.volume(OTHER).unwrap()), (1, 1, vec![]));
    assert_eq!(m.state.snapshots().iter().count(), 0);
    assert_eq!(
        m.volume().snapshot,
        SnapshotNumber(1),
        "writes still carry it"
    );
    assert_eq!(m.refused(commit(&[(1, None), (2, None)])), Aborted);
    // What is committed stays.
    m.ok(reserve_both(3, "g"));
    m.ok(commit(&[(3, Some((1, 1))), (4, None)]));
    m.open(2, true).unwrap();
    assert_eq!(list(m.volume()), (2, 2, vec![2]));
}

#[test]
fn a_group_commits_as_a_whole() {
    let mut m = with_two();
    m.ok(reserve_both(1, "g"));
    assert_eq!(m.refused(commit(&[(1, None)])), RefusalCode::Internal);
    assert_eq!(list(m.volume()), (0, 0, vec![]));
    assert_eq!(m.refused(commit(&[(1, None), (2, Some((1, 1)))])), Aborted);
    assert_eq!(list(m.volume()), (0, 0, vec![]));
    m.ok(commit(&[(1, None), (2, None)]));
    assert_eq!(m.state.snapshots().group_by_name("g").unwrap().1, 2);
}

#[test]
fn a_resize_while_pending_counts() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(reserve(1, "s"));
    let resize = |size_bytes| Operation::ResizeVolume {
        volume: VOLUME,
        size_bytes,
    };
    m.ok(resize(96 << 20));
    m.ok(commit(&[(1, None)]));
    m.ok(resize(128 << 20));
    let snapshot = m.state.snapshots().by_name("s").unwrap();
    assert_eq!(
        snapshot.size_bytes,
        96 << 20,
        "no write before it is outside"
    );
}

#[test]
fn deleted_snapshots_are_off_the_list_until_forgotten() {
    let mut m = Machine::with_volume(3, 3);
    for n in 1..=3 {
        m.ok(reserve(n, &format!("s{n}")));
        m.ok(commit(&[(n, None)]));
    }
    m.ok(delete(&[2, 77]));
    assert_eq!(list(m.volume()), (4, 3, vec![1, 3]));
    m.ok(delete(&[2]));
    m.ok(delete(&[1, 3]));
    assert_eq!(list(m.volume()), (5, 3, vec![]), "one list for both");
    let deleting: Vec<_> = m.state.snapshots().deleting().map(|s| s.state).collect();
    let at = |revision| SnapshotState::Deleting { revision };
    assert_eq!(deleting, [at(5), at(4), at(5)]);
    m.ok(reserve(4, "s4"));
    m.ok(commit(&[(4, None)]));
    m.ok(Operation::ForgetSnapshots(
        (1..=4).map(snapshot_id).collect(),
    ));
    let left: Vec<_> = m.state.snapshots().iter().map(|s| s.id).collect();
    assert_eq!(left, [snapshot_id(4)]);
    assert_eq!(list(m.volume()), (6, 4, vec![4]));
}

#[test]
fn a_deleted_volume_is_hidden_until_its_last_snapshot_goes() {
    let mut m = Machine::with_volume(3, 3);
    for n in 1..=2 {
        m.ok(reserve(n, &format!("s{n}")));
        m.ok(commit(&[(n, None)]));
    }
    m.ok(Operation::DeleteVolume(VOLUME));
    m.ok(Operation::DeleteVolume(VOLUME));
    assert!(m.volume().hidden && m.state.volume_by_name("one").is_none());
    assert_eq!(m.state.volumes_by_name_after("").count(), 0);
    assert_eq!(m.open(1, true).unwrap_err().code, NotFound);
    assert_eq!(m.refused(reserve(3, "s3")), NotFound);
    let publish = publications::publish("node-1", AttachMode::Exclusive);
    assert_eq!(m.refused(publish), NotFound);
    assert_eq!(ids(m.ok(reserve(9, "s1"))), [snapshot_id(1)], "there it is");
    // Its name is free; its replicas stay.
    m.ok(Operation::CreateVolume(create("one", OTHER, 3)));
    assert_eq!(m.state.disk_use(disk_id(1)).replicas, 2);
    m.ok(delete(&[1]));
    assert_eq!(m.state.volume_by_name("one").unwrap().id, OTHER);
    m.ok(delete(&[2]));
    assert!(m.state.volume(VOLUME).is_none());
    assert_eq!(m.state.snapshots().iter().count(), 0);
    assert_eq!(m.state.garbage_count(), 3);
    assert_eq!(m.state.volume_by_name("one").unwrap().id, OTHER);
}

#[test]
fn deleting_snapshots_do_not_keep_a_volume() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(reserve(1, "s"));
    m.ok(commit(&[(1, None)]));
    m.ok(delete(&[1]));
    m.ok(Operation::DeleteVolume(VOLUME));
    assert!(m.state.volume(VOLUME).is_none());
    assert_eq!(m.state.snapshots().iter().count(), 0);
}

#[test]
fn a_volume_has_at_most_a_thousand() {
    let mut m = Machine::with_volume(3, 3);
    let id = |n: u16| {
        let mut bytes = [1; 16];
        bytes[..2].copy_from_slice(&n.to_be_bytes());
        SnapshotId(bytes)
    };
    let ask = |n: u16| {
        Operation::ReserveSnapshots(ReserveSnapshots {
            snapshots: vec![NewSnapshot {
                id: id(n),
                name: format!("s{n}"),
                volume: VOLUME,
                labels: Labels::new(),
            }],
            group: None,
            created_unix_ms: 5,
        })
    };
    for n in 1..=1000 {
        m.ok(ask(n));
        m.ok(Operation::CommitSnapshots(vec![CommitSnapshot {
            snapshot: id(n),
            holder: None,
        }]));
    }
    assert_eq!(m.refused(ask(1001)), RefusalCode::ResourceExhausted);
    m.ok(Operation::DeleteSnapshots(vec![id(500)]));
    m.ok(ask(1001));
    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(restored.snapshots, m.state.snapshots);
    assert_eq!(restored.volumes, m.state.volumes);
    assert_eq!(restored.layered, m.state.layered);
}

/// Written by the program as it was before snapshots.
#[test]
fn an_image_of_the_version_before_is_read() {
    let image: &[u8] = include_bytes!("../../../testdata/image-v2.bin");
    assert_eq!(image[..4], [2, 0, 0, 0]);
    let mut state = State::read_image(&mut &image[..]).unwrap();
    let volume = state.volume(VOLUME).unwrap();
    assert_eq!(volume.epoch, Epoch(1));
    assert_eq!(volume.publications["node-1"], AttachMode::Exclusive);
    assert_eq!(list(volume), (0, 0, vec![]));
    assert!(!volume.hidden);
    assert_eq!(state.volume_by_name("two").unwrap().labels["a"], "b");
    assert!(state.answers.iter().any(|r| r.kind == 10));
    let command = Command {
        request: key(1 << 100),
        operation: reserve(1, "s"),
    };
    apply(&mut state, &command).unwrap();
    assert!(state.volume(VOLUME).unwrap().is_snapshot_pending());
}

#[test]
fn only_what_concerns_lists_changes_their_generation() {
    let mut m = Machine::with_volume(4, 3);
    m.open(1, false).unwrap();
    let none = m.state.layers_generation();
    assert_eq!(m.state.layered_on(disk_id(1)).count(), 0);
    m.ok(reserve(1, "s"));
    m.ok(commit(&[(1, Some((1, 1)))]));
    let listed = m.state.layers_generation();
    assert_ne!(listed, none);
    assert_eq!(m.state.layered_on(disk_id(1)).collect::<Vec<_>>(), [VOLUME]);
    m.ok(close(1, 1, true));
    m.open(1, false).unwrap();
    assert_eq!(m.state.layers_generation(), listed);
    m.ok(Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(1),
        to: disk_id(4),
    });
    let moved = m.state.layers_generation();
    assert_ne!(moved, listed);
    assert_eq!(m.state.layered_on(disk_id(4)).count(), 1);
    m.ok(delete(&[1]));
    assert_ne!(m.state.layers_generation(), moved);
}
