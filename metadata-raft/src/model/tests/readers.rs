//! R10: readers.

use super::publications::{publish, unpublish};
use super::*;

use AttachMode::{Exclusive, ReadOnly};
use RefusalCode::FailedPrecondition;

fn open_at(by: u8, node: u8, force: bool) -> OpenVolume {
    let node = match node {
        0 => NodeId::NIL,
        n => NodeId(id16(n)),
    };
    OpenVolume {
        volume: VOLUME,
        client: client(by),
        node,
        client_name: format!("client {by}"),
        force,
    }
}

pub(super) fn join(by: u8, node: u8) -> Operation {
    Operation::JoinVolume(open_at(by, node, false))
}

/// A volume that was made and closed cleanly; the epoch is 2.
fn closed() -> Machine {
    let mut m = Machine::with_volume(4, 3);
    m.open(1, false).unwrap();
    let made = (1..=3).map(|disk| ReplicaChange {
        group: GroupIndex(0),
        disk: disk_id(disk),
        state: InSync,
        incarnation: Incarnation(5),
    });
    m.ok(Operation::ChangeReplicas(ChangeReplicas {
        volume: VOLUME,
        client: client(1),
        epoch: Epoch(1),
        changes: made.collect(),
    }));
    m.ok(close(1, 2, true));
    m
}

/// Whether the open needs neither a lease wait nor a reconcile.
fn at_once(m: &mut Machine, by: u8, node: u8, force: bool) -> Result<bool, RefusalCode> {
    match m.run(Operation::OpenVolume(open_at(by, node, force))) {
        Ok(Answer::Opened { previous_clean, .. }) => Ok(previous_clean),
        Ok(other) => panic!("{other:?}"),
        Err(refusal) => Err(refusal.code),
    }
}

#[test]
fn readers_share_what_is_made_clean_and_not_held() {
    let mut m = Machine::with_volume(4, 3);
    assert_eq!(
        m.refused(join(7, 1)),
        FailedPrecondition,
        "no replica is made"
    );
    m = closed();
    for by in [7, 8, 8] {
        m.ok(join(by, 1));
    }
    assert_eq!(m.volume().readers.len(), 2);
    assert_eq!(
        m.volume().epoch,
        Epoch(2),
        "readers have no epoch of their own"
    );
    assert_eq!(at_once(&mut m, 9, 3, false), Err(FailedPrecondition));
    assert_eq!(
        m.refused(Operation::DeleteVolume(VOLUME)),
        FailedPrecondition
    );
    m.ok(close(7, 0, true));
    m.ok(close(8, 0, true));
    assert_eq!(
        at_once(&mut m, 9, 3, false),
        Ok(true),
        "those that left are not waited for"
    );
    assert_eq!(m.refused(join(7, 1)), FailedPrecondition, "it is held");
    m.ok(close(9, 3, false));
    assert_eq!(m.refused(join(7, 1)), FailedPrecondition, "it is not clean");
}

#[test]
fn a_writer_waits_a_lease_for_readers_that_did_not_leave() {
    let mut m = closed();
    m.ok(join(7, 1));
    assert_eq!(at_once(&mut m, 9, 3, true), Ok(false));
    assert!(m.volume().readers.is_empty());
    m.ok(close(9, 3, true));
    m.ok(publish("node-1", ReadOnly));
    m.ok(join(7, 1));
    m.ok(unpublish("node-1"));
    assert!(m.volume().readers.is_empty() && m.volume().is_readable());
    m.ok(join(8, 2));
    m.ok(close(8, 0, true));
    assert_eq!(
        at_once(&mut m, 9, 3, false),
        Ok(false),
        "the first may still read"
    );
    m.ok(close(9, 4, true));
    assert_eq!(at_once(&mut m, 9, 3, false), Ok(true));
}

#[test]
fn unpublishing_one_node_leaves_the_readers_of_others() {
    let mut m = closed();
    for node in 1..=2 {
        m.ok(publish(&format!("node-{node}"), ReadOnly));
        m.ok(join(6 + node, node));
    }
    m.ok(unpublish("node-1"));
    let left: Vec<_> = m.volume().readers.iter().map(|r| r.client).collect();
    assert_eq!(left, [client(8)]);
    assert_eq!(m.refused(join(7, 1)), FailedPrecondition);
    m.ok(unpublish(""));
    assert!(m.volume().readers.is_empty());
}

#[test]
fn the_right_to_read_lets_a_node_only_make_the_volume_readable() {
    let mut m = Machine::with_volume(4, 3);
    m.ok(publish("node-1", ReadOnly));
    assert_eq!(
        at_once(&mut m, 7, 1, false),
        Ok(true),
        "to make the replicas"
    );
    m.ok(close(7, 1, false));
    assert_eq!(at_once(&mut m, 7, 1, false), Ok(false), "to reconcile them");
    let mut m = closed();
    m.ok(publish("node-1", ReadOnly));
    assert_eq!(at_once(&mut m, 7, 1, false), Err(FailedPrecondition));
    m.ok(join(7, 1));
    m.ok(unpublish(""));
    m.ok(publish("node-1", Exclusive));
    assert_eq!(at_once(&mut m, 7, 1, false), Ok(false));
}

#[test]
fn readers_survive_a_snapshot() {
    let mut m = closed();
    m.ok(join(7, 1));
    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(restored.volume(VOLUME), m.state.volume(VOLUME));
}
