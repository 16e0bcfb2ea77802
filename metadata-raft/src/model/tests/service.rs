//! Nodes and disks out of service, and moves of what holds nothing yet.

use super::*;

fn serve(part: Part, service: Service) -> Operation {
    Operation::SetService { part, service }
}

const DISK: Part = Part::Disk(DiskId(id16(1)));

fn to(n: u8) -> Service {
    Service::Draining {
        to: Some(disk_id(n)),
    }
}

#[test]
fn what_counts_for_a_disk_is_what_is_said_of_it_or_of_its_node() {
    let mut m = Machine::new(3);
    let node = Part::Node(NodeId(id16(1)));
    let draining = Service::Draining { to: None };
    for (own, of_node, counts) in [
        (Service::InUse, Service::InUse, Service::InUse),
        (Service::InUse, Service::Cordoned, Service::Cordoned),
        (Service::Cordoned, Service::InUse, Service::Cordoned),
        (Service::Cordoned, draining, draining),
        (to(2), draining, to(2)),
    ] {
        m.ok(serve(DISK, own));
        m.ok(serve(node, of_node));
        assert_eq!(m.state.disk_service(disk_id(1)), counts);
        let drains = m.state.draining().any(|d| d == disk_id(1));
        assert_eq!(drains, matches!(counts, Service::Draining { .. }));
        m.ok(serve(DISK, Service::InUse));
        m.ok(serve(node, Service::InUse));
    }
    assert_eq!(m.state.draining().count(), 0);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut m = Machine::new(3);
    let refused = |m: &mut Machine, part, service| m.refused(serve(part, service));
    let nowhere = Part::Node(NodeId(id16(9)));
    assert_eq!(
        refused(&mut m, nowhere, Service::Cordoned),
        RefusalCode::NotFound
    );
    assert_eq!(
        refused(&mut m, Part::Disk(disk_id(9)), Service::Cordoned),
        RefusalCode::NotFound
    );
    assert_eq!(refused(&mut m, DISK, to(9)), RefusalCode::NotFound);
    assert_eq!(refused(&mut m, DISK, to(1)), RefusalCode::InvalidArgument);
    let node = Part::Node(NodeId(id16(1)));
    assert_eq!(refused(&mut m, node, to(2)), RefusalCode::InvalidArgument);
    m.ok(serve(Part::Disk(disk_id(2)), Service::Cordoned));
    assert_eq!(
        refused(&mut m, DISK, to(2)),
        RefusalCode::FailedPrecondition
    );
    // What is said of a disk goes with it.
    m.ok(serve(DISK, to(3)));
    m.ok(Operation::RemoveDisk(disk_id(1)));
    assert_eq!(m.state.draining().count(), 0);
}

fn moved(from: u8, to: u8) -> Operation {
    Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(from),
        to: disk_id(to),
    }
}

#[test]
fn what_was_never_opened_moves_at_once() {
    let mut m = Machine::with_volume(5, 3);
    m.ok(moved(1, 4));
    let disks: Vec<_> = m.volume().disks();
    assert_eq!(disks, [2, 3, 4].map(disk_id));
    assert!(m.states().iter().all(|s| *s == InSync));
    assert_eq!(m.state.garbage_on(disk_id(1)).count(), 1);
    // Also what had begun to move while somebody held it.
    m.open(1, false).unwrap();
    m.ok(moved(2, 1));
    assert_eq!(m.volume().groups[0].len(), 4);
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, false));
    m.ok(moved(2, 5));
    assert_eq!(m.volume().disks(), [3, 4, 5].map(disk_id));
    // Once its replicas are made they are copied.
    m.open(1, false).unwrap();
    for disk in 3..=5 {
        assert!(m.change(1, m.volume().epoch.0, disk, InSync));
    }
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, true));
    m.ok(moved(3, 1));
    assert_eq!(m.volume().groups[0].len(), 4);
    assert_eq!(m.state.neglected().count(), 1);
}
