//! The oracle accepts what an atomic register does and catches planted violations.

use ashlar_platform::clock::Time;
use ashlar_platform::sim::Rng;

use super::super::history::{Outcome, Rollback, Value};
use super::*;

/// A history of one sector in a few words.
#[derive(Default)]
struct Script {
    history: History,
}

impl Script {
    fn write(&mut self, client: u32, start: u64, end: impl Into<Option<u64>>) -> OperationId {
        self.operation(client, Kind::Write, start, end.into(), Vec::new())
    }

    fn zero(&mut self, client: u32, start: u64, end: impl Into<Option<u64>>) -> OperationId {
        self.operation(client, Kind::Zero, start, end.into(), Vec::new())
    }

    fn flush(&mut self, start: u64, end: u64) {
        let id = self.operation(1, Kind::Flush, start, Some(end), Vec::new());
        self.history.operations[id.0 as usize].count = 0;
    }

    fn read(&mut self, start: u64, end: u64, value: Value) {
        self.operation(9, Kind::Read, start, Some(end), vec![value]);
    }

    fn operation(
        &mut self,
        client: u32,
        kind: Kind,
        start: u64,
        end: Option<u64>,
        values: Vec<Value>,
    ) -> OperationId {
        let id = self.history.begin(client, kind, 0, 1, false, Time(start));
        let operation = &mut self.history.operations[id.0 as usize];
        operation.outcome = end.map_or(Outcome::Pending, |end| Outcome::Done(Time(end)));
        operation.values = values;
        id
    }

    fn accepted(&self) {
        if let Err(violation) = check(&self.history) {
            panic!("{violation}\n{}", sector_history(&self.history, 0));
        }
    }

    fn caught(&self) {
        assert!(
            check(&self.history).is_err(),
            "missed:\n{}",
            sector_history(&self.history, 0)
        );
    }
}

#[test]
fn reads_of_the_last_and_of_concurrent_writes_are_fine() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    let b = s.write(1, 30, 60);
    s.read(1, 9, Value::Zero);
    s.read(22, 28, Value::Written(a));
    s.read(31, 40, Value::Written(a));
    s.read(35, 45, Value::Written(b));
    s.read(46, 50, Value::Written(b));
    s.read(70, 80, Value::Written(b));
    s.accepted();
}

#[test]
fn a_stale_read_is_caught() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    s.write(1, 30, 40);
    s.read(50, 60, Value::Written(a));
    s.caught();
}

#[test]
fn a_value_that_comes_back_is_caught() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    let b = s.write(1, 30, 100);
    s.read(40, 50, Value::Written(b));
    s.read(60, 70, Value::Written(a));
    s.caught();
}

#[test]
fn a_lost_write_is_caught_also_when_it_was_the_first() {
    let mut s = Script::default();
    s.write(1, 10, 20);
    s.read(30, 40, Value::Zero);
    s.caught();
}

#[test]
fn a_value_of_the_future_or_of_nobody_is_caught() {
    let mut s = Script::default();
    s.write(1, 50, 60);
    s.read(10, 20, Value::Written(OperationId(0)));
    s.caught();
    let mut s = Script::default();
    s.read(10, 20, Value::Written(OperationId(7)));
    s.caught();
    let mut s = Script::default();
    s.read(10, 20, Value::Garbage);
    s.caught();
}

#[test]
fn an_unanswered_write_may_happen_late_but_not_come_and_go() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    let b = s.write(2, 30, None);
    s.read(40, 50, Value::Written(a));
    s.read(60, 70, Value::Written(b));
    s.accepted();
    s.read(80, 90, Value::Written(a));
    s.caught();
}

#[test]
fn an_unanswered_write_does_not_happen_after_a_later_client_serves() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    let b = s.write(1, 30, None);
    s.history.serving = vec![(1, Time(1)), (2, Time(100))];
    s.read(110, 120, Value::Written(b));
    s.accepted();
    let mut s = Script { history: s.history };
    s.history.operations.pop();
    s.read(110, 120, Value::Written(a));
    s.accepted();
    s.read(130, 140, Value::Written(b));
    s.caught();
}

#[test]
fn trims_make_zeroes_and_old_zeroes_do_not_come_back() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    s.zero(1, 30, 40);
    s.read(50, 60, Value::Zero);
    s.accepted();
    let mut stale = Script {
        history: s.history.clone(),
    };
    stale.read(70, 80, Value::Written(a));
    stale.caught();
    let b = s.write(1, 90, 100);
    s.read(110, 120, Value::Written(b));
    s.accepted();
    s.read(130, 140, Value::Zero);
    s.caught();
}

#[test]
fn a_mixed_block_is_caught() {
    let mut history = History::default();
    let mut write = |first, count| {
        let id = history.begin(1, Kind::Write, first, count, false, Time(10));
        history.operations[id.0 as usize].outcome = Outcome::Done(Time(20));
        id
    };
    let (a, b, part) = (write(0, 8), write(0, 16), write(7, 1));
    let mut read = |values: &[OperationId]| {
        let id = history.begin(2, Kind::Read, 0, values.len() as u64, false, Time(15));
        let operation = &mut history.operations[id.0 as usize];
        operation.outcome = Outcome::Done(Time(18));
        operation.values = values.iter().map(|v| Value::Written(*v)).collect();
        let result = check(&history);
        history.operations.pop();
        result
    };
    assert!(read(&[a; 8]).is_ok());
    assert!(
        read(&[a, a, a, a, a, a, a, part]).is_ok(),
        "a smaller write on top"
    );
    assert!(read(&[a, a, a, a, b, b, b, b]).is_err());
    let mut two_blocks = [a; 16];
    two_blocks[8..].fill(b);
    assert!(
        read(&two_blocks).is_ok(),
        "requests are not atomic across blocks"
    );
}

#[test]
fn a_rollback_may_take_unflushed_writes_and_never_flushed_ones() {
    let mut s = Script::default();
    let a = s.write(1, 10, 20);
    s.flush(21, 25);
    let b = s.write(1, 30, 40);
    let rollback = Rollback {
        from: Time(50),
        until: Time(60),
    };
    s.read(70, 80, Value::Written(a));
    s.caught();
    s.history.rollbacks = vec![rollback];
    s.accepted();
    s.history.operations.pop();
    s.read(70, 80, Value::Written(b));
    s.accepted();
    s.read(70, 80, Value::Zero);
    s.caught();
}

/// A history of an atomic register: every operation takes effect at a random point of its interval.
fn atomic_history(rng: &mut Rng) -> History {
    let mut points = Vec::new();
    let mut history = History::default();
    let mut starts: Vec<u64> = (0..60).map(|_| rng.between(1, 1000)).collect();
    starts.sort_unstable();
    for start in starts {
        let kind = *rng
            .pick(&[Kind::Write, Kind::Read, Kind::Read, Kind::Zero])
            .unwrap_or(&Kind::Read);
        let kind = if kind == Kind::Zero && rng.coin() {
            Kind::Write
        } else {
            kind
        };
        let end = start + rng.between(1, 100);
        let id = history.begin(1, kind, 0, 1, false, Time(start));
        let operation = &mut history.operations[id.0 as usize];
        let answered = kind == Kind::Read || rng.chance(9, 10);
        operation.outcome = if answered {
            Outcome::Done(Time(end))
        } else {
            Outcome::Pending
        };
        if answered || rng.coin() {
            points.push((rng.between(start * 1000, end * 1000), id));
        }
    }
    points.sort_unstable();
    let mut value = Value::Zero;
    for (_, id) in points {
        let operation = &mut history.operations[id.0 as usize];
        match operation.kind {
            Kind::Write => value = Value::Written(id),
            Kind::Zero => value = Value::Zero,
            Kind::Read | Kind::Flush => operation.values = vec![value],
        }
    }
    history
}

#[test]
fn atomic_registers_are_accepted_and_reads_made_stale_are_caught() {
    let (mut planted, mut caught) = (0, 0);
    for seed in 0..500 {
        let mut rng = Rng::new(seed);
        let mut history = atomic_history(&mut rng);
        check(&history)
            .unwrap_or_else(|v| panic!("seed {seed}: {v}\n{}", sector_history(&history, 0)));
        // Let a late read return a value that an answered write certainly replaced.
        let operations = &history.operations;
        let Some(read) = operations.iter().rposition(|op| op.kind == Kind::Read) else {
            continue;
        };
        let before = operations[read].start;
        let done_before = |op: &&Operation| op.done().is_some_and(|done| done < before);
        let writes = operations
            .iter()
            .enumerate()
            .filter(|(_, op)| op.kind == Kind::Write);
        let old = writes.filter(|(_, op)| done_before(op)).find(|(_, op)| {
            let later = operations
                .iter()
                .filter(|w| w.kind == Kind::Write)
                .filter(done_before);
            later
                .clone()
                .any(|w| op.done().is_some_and(|done| done < w.start))
        });
        if let Some((index, _)) = old {
            history.operations[read].values = vec![Value::Written(OperationId(index as u32))];
            planted += 1;
            caught += u32::from(check(&history).is_err());
        }
    }
    assert!(planted > 400, "{planted}");
    assert_eq!(caught, planted);
}
