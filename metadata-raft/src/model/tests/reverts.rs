//! Reverting a volume: who gets it meanwhile, and what is refused.

use ashlar_proto::ids::SnapshotId;

use super::snapshots::{commit, delete, reserve, snapshot_id};
use super::*;

use RefusalCode::{Aborted, FailedPrecondition, InvalidArgument, NotFound};

fn begin_revert(n: u8) -> Operation {
    Operation::BeginRevert {
        volume: VOLUME,
        snapshot: snapshot_id(n),
    }
}

fn end_revert(n: u8, by: u8, epoch: u64) -> Operation {
    Operation::EndRevert {
        volume: VOLUME,
        snapshot: snapshot_id(n),
        client: client(by),
        epoch: Epoch(epoch),
    }
}

fn open_to_revert(by: u8) -> Operation {
    match open(by, false) {
        Operation::OpenVolume(open) => Operation::OpenToRevert(open),
        other => panic!("{other:?}"),
    }
}

/// A volume that was used, with snapshots 1 and 2, at epoch 2.
fn used() -> Machine {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    for disk in 1..=3 {
        let epoch = m.volume().epoch.0;
        assert!(m.change(1, epoch, disk, InSync));
    }
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, true));
    for n in 1..=2 {
        m.ok(reserve(n, &format!("s{n}")));
        m.ok(commit(&[(n, None)]));
    }
    m
}

#[test]
fn only_who_reverts_opens_until_it_is_done() {
    let mut m = used();
    assert_eq!(m.refused(open_to_revert(1)), FailedPrecondition);
    m.ok(begin_revert(1));
    assert_eq!(m.volume().reverting, Some(snapshot_id(1)));
    let refusal = m.open(1, true).unwrap_err();
    assert_eq!(refusal.code, FailedPrecondition);
    let advice = "`ashlar snapshot revert one s1` again";
    assert!(refusal.message.contains(advice), "{refusal}");
    assert_eq!(m.refused(readers::join(2, 0)), FailedPrecondition);
    m.ok(open_to_revert(1));
    let epoch = m.volume().epoch.0;
    assert_eq!(m.refused(end_revert(1, 2, epoch)), FailedPrecondition);
    assert_eq!(m.refused(end_revert(1, 1, epoch - 1)), FailedPrecondition);
    assert_eq!(m.refused(end_revert(2, 1, epoch)), FailedPrecondition);
    // Nothing else happens to its snapshots meanwhile.
    assert_eq!(m.refused(reserve(3, "s3")), FailedPrecondition);
    assert_eq!(m.refused(delete(&[1])), FailedPrecondition);
    m.ok(delete(&[2]));
    m.ok(end_revert(1, 1, epoch));
    m.ok(end_revert(1, 1, epoch));
    m.ok(close(1, epoch, true));
    assert_eq!(m.volume().reverting, None);
    m.open(2, false).unwrap();
    m.ok(delete(&[1]));
}

#[test]
fn the_end_is_told_after_the_close_and_not_after_another_open() {
    let mut m = used();
    m.ok(begin_revert(1));
    m.ok(open_to_revert(1));
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, true));
    // Nobody holds it and it is not finished: the same command takes it again.
    m.ok(open_to_revert(2));
    let again = m.volume().epoch.0;
    assert_eq!(m.refused(end_revert(1, 1, epoch)), FailedPrecondition);
    m.ok(close(2, again, true));
    assert_eq!(m.refused(end_revert(1, 1, epoch)), FailedPrecondition);
    assert_eq!(m.refused(end_revert(2, 2, again)), FailedPrecondition);
    m.ok(end_revert(1, 2, again));
    assert_eq!(m.volume().reverting, None);
    m.open(3, false).unwrap();
}

#[test]
fn one_that_broke_off_begins_again_with_any_snapshot() {
    let mut m = used();
    m.ok(begin_revert(1));
    m.ok(open_to_revert(1));
    let epoch = m.volume().epoch.0;
    assert_eq!(m.refused(begin_revert(2)), FailedPrecondition, "attached");
    m.ok(close(1, epoch, false));
    m.ok(begin_revert(1));
    m.ok(begin_revert(2));
    assert_eq!(m.refused(delete(&[2])), FailedPrecondition);
    m.ok(delete(&[1]));
    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(restored.volumes, m.state.volumes);
    m.ok(Operation::DeleteVolume(VOLUME));
    assert_eq!(m.volume().reverting, None);
    m.ok(delete(&[2]));
    assert!(m.state.volume(VOLUME).is_none());
}

#[test]
fn what_cannot_be_reverted_is_refused() {
    let mut m = used();
    let unknown = Operation::BeginRevert {
        volume: VOLUME,
        snapshot: SnapshotId(id16(99)),
    };
    assert_eq!(m.refused(unknown), NotFound);
    m.ok(reserve(3, "s3"));
    assert_eq!(m.refused(begin_revert(1)), Aborted);
    m.ok(commit(&[(3, None)]));
    m.ok(readers::join(2, 0));
    assert_eq!(m.refused(begin_revert(1)), FailedPrecondition);
    let other = VolumeId([8; 16]);
    m.ok(Operation::CreateVolume(create("two", other, 3)));
    let elsewhere = Operation::BeginRevert {
        volume: other,
        snapshot: snapshot_id(1),
    };
    assert_eq!(m.refused(elsewhere), InvalidArgument);
}
