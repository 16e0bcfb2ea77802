//! Schedules: names, bounds, runs, and the image.

use super::*;
use crate::model::{BackupTarget, Outcome, Run, Schedule, ScheduleId, Target};

use RefusalCode::{AlreadyExists, InvalidArgument, NotFound};

fn schedule(name: &str) -> Schedule {
    Schedule {
        id: ScheduleId([name.len() as u8; 16]),
        name: name.to_owned(),
        cron: "0 3 * * *".to_owned(),
        target: Target::Volume(VOLUME),
        keep: 7,
        backup: None,
        paused: false,
        created_unix_ms: 1000,
        dealt_unix_ms: 1000,
        last: None,
        skipped: None,
        succeeded_unix_ms: 0,
        runs: 0,
        failures: 0,
        skips: 0,
    }
}

fn run(due_unix_ms: u64, outcome: Outcome) -> Operation {
    let ended_unix_ms = if outcome == Outcome::Running {
        0
    } else {
        due_unix_ms + 5
    };
    Operation::RecordRun {
        schedule: schedule("nightly").id,
        run: Run {
            due_unix_ms,
            began_unix_ms: due_unix_ms + 1,
            ended_unix_ms,
            outcome,
        },
    }
}

fn pause(paused: bool, now_unix_ms: u64) -> Operation {
    Operation::PauseSchedule {
        name: "nightly".to_owned(),
        paused,
        now_unix_ms,
    }
}

#[test]
fn names_and_bounds_are_checked() {
    let mut m = Machine::with_volume(3, 3);
    let create = |s: Schedule| Operation::CreateSchedule(s);
    m.ok(create(schedule("nightly")));
    // Again, with another identity and another time: it is there.
    m.ok(create(Schedule {
        id: ScheduleId([9; 16]),
        created_unix_ms: 5,
        ..schedule("nightly")
    }));
    let found = m.state.schedules().get("nightly").unwrap();
    assert_eq!(found.id, schedule("nightly").id);
    let other = Schedule {
        keep: 8,
        ..schedule("nightly")
    };
    assert_eq!(m.refused(create(other)), AlreadyExists);
    for wrong in [
        Schedule {
            name: "No".to_owned(),
            ..schedule("x")
        },
        Schedule {
            keep: 0,
            ..schedule("x")
        },
        Schedule {
            keep: 1_000_000,
            ..schedule("x")
        },
        Schedule {
            cron: "x".repeat(2000),
            ..schedule("x")
        },
        Schedule {
            target: Target::Labels(Labels::new()),
            ..schedule("x")
        },
    ] {
        assert_eq!(m.refused(create(wrong)), InvalidArgument);
    }
    let nowhere = Schedule {
        target: Target::Volume(VolumeId([77; 16])),
        ..schedule("x")
    };
    assert_eq!(m.refused(create(nowhere)), NotFound);
    m.ok(Operation::DeleteSchedule("nightly".to_owned()));
    assert_eq!(
        m.refused(Operation::DeleteSchedule("nightly".to_owned())),
        NotFound
    );
    assert_eq!(m.refused(pause(true, 0)), NotFound);
    // A run that ends after that changes nothing.
    m.ok(run(2000, Outcome::Done));
}

#[test]
fn runs_are_counted_and_no_due_time_comes_again() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(Operation::CreateSchedule(Schedule {
        backup: Some(BackupTarget {
            url: "file:///x".to_owned(),
            key_file: String::new(),
        }),
        ..schedule("nightly")
    }));
    m.ok(run(2000, Outcome::Running));
    m.ok(run(3000, Outcome::Skipped("it goes on".to_owned())));
    m.ok(run(2000, Outcome::Failed("no room".to_owned())));
    let found = m.state.schedules().get("nightly").unwrap().clone();
    assert_eq!((found.runs, found.failures, found.skips), (1, 1, 1));
    assert_eq!(found.dealt_unix_ms, 3000);
    assert_eq!(found.last.as_ref().map(|r| r.due_unix_ms), Some(2000));
    assert_eq!(found.skipped.as_ref().map(|r| r.due_unix_ms), Some(3000));
    assert_eq!(found.succeeded_unix_ms, 0);
    m.ok(run(4000, Outcome::Running));
    m.ok(run(4000, Outcome::Done));
    m.ok(pause(true, 5000));
    m.ok(pause(false, 9000));
    let found = m.state.schedules().get("nightly").unwrap().clone();
    assert_eq!((found.succeeded_unix_ms, found.dealt_unix_ms), (4005, 9000));

    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let read = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(read.schedules(), m.state.schedules());
}
