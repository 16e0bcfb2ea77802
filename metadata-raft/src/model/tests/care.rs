//! Volumes that a storage daemon holds so that they are rebuilt.

use super::publications::publish;
use super::readers::join;
use super::*;

use RefusalCode::FailedPrecondition;

fn care(by: u8) -> Operation {
    match open(by, false) {
        Operation::OpenVolume(open) => Operation::OpenToCare(open),
        other => panic!("{other:?}"),
    }
}

/// Held by client 1, who made its replicas.
fn held() -> Machine {
    let mut m = Machine::with_volume(4, 3);
    m.open(1, false).unwrap();
    for disk in 1..=3 {
        assert!(m.change(1, m.volume().epoch.0, disk, InSync));
    }
    m
}

/// Used and closed; disk 3 missed something.
fn behind() -> Machine {
    let mut m = held();
    assert!(m.change(1, m.volume().epoch.0, 3, Stale));
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, true));
    m
}

fn previous_clean(answer: Answer) -> bool {
    match answer {
        Answer::Opened { previous_clean, .. } => previous_clean,
        other => panic!("{other:?}"),
    }
}

#[test]
fn only_what_is_behind_and_unused_is_cared_for() {
    let mut m = Machine::with_volume(4, 3);
    assert_eq!(m.refused(care(9)), FailedPrecondition, "never opened");
    let mut m = held();
    assert_eq!(m.refused(care(9)), FailedPrecondition, "complete, and held");
    assert!(m.change(1, m.volume().epoch.0, 3, Stale));
    assert_eq!(m.state.neglected().count(), 0);
    assert_eq!(m.refused(care(9)), FailedPrecondition, "held");
    let epoch = m.volume().epoch.0;
    m.ok(close(1, epoch, true));
    assert_eq!(m.state.neglected().collect::<Vec<_>>(), [VOLUME]);
    m.ok(join(5, 0));
    assert_eq!(m.refused(care(9)), FailedPrecondition, "read");
    m.ok(Operation::CloseVolume {
        volume: VOLUME,
        client: client(5),
        epoch: Epoch(0),
        clean: true,
    });
    m.ok(publish("node-1", AttachMode::Exclusive));
    assert_eq!(m.refused(care(9)), FailedPrecondition, "published");
}

#[test]
fn it_is_rebuilt_and_left() {
    let mut m = behind();
    assert!(previous_clean(m.ok(care(9))));
    assert!(m.volume().is_in_care());
    assert_eq!(m.state.repairable_on(disk_id(3)).count(), 1);
    let epoch = m.volume().epoch.0;
    m.ok(begin(epoch, 3));
    assert_eq!(m.state.neglected().count(), 1, "until it is complete");
    assert!(m.change(9, epoch + 1, 3, InSync));
    assert_eq!(m.state.neglected().count(), 0);
    assert_eq!(m.refused(care(8)), FailedPrecondition, "complete");
    let epoch = m.volume().epoch.0;
    m.ok(close(9, epoch, true));
    assert!(m.volume().clean);
}

#[test]
fn it_stands_in_nobodys_way() {
    let mut m = behind();
    m.ok(care(9));
    // Another daemon, where the first is gone; then a client without force.
    assert!(!previous_clean(m.ok(care(8))));
    let epoch = m.volume().epoch.0;
    assert_eq!(m.refused(close(9, epoch, true)), FailedPrecondition);
    assert!(!previous_clean(m.open(1, false).unwrap()));
    assert!(!m.volume().is_in_care());
    assert_eq!(m.refused(close(8, epoch, true)), FailedPrecondition);
    assert_eq!(m.refused(care(8)), FailedPrecondition);
}
