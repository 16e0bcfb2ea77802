//! Decides whether a history is one that a correct volume can produce.
//!
//! Rules:
//! 1. Nothing invented: a sector read holds zeroes or the stamp of a write that covers it and had begun.
//! 2. Blocks are not mixed: of two writes that both cover two sectors of one block, a read never shows
//!    one in the first sector and the other in the second.
//! 3. Without a rollback every sector is a linearizable register (zones of Gibbons and Korach 1997, with
//!    unique values per write). Unanswered writes may have happened or not, but not after a later client
//!    began to serve (strict linearizability, Aguilera and Frolund 2003).
//! 4. With rollbacks (all in-sync replicas lost power): a read does not return a value that was
//!    overwritten before, unless the overwriting writes were not flushed before the rollback.
//!
//! Zeroes are not unique. A read of zeroes is accepted if at least one trim (or the initial state) can
//! explain it next to all other values: no false alarm, few misses.

use std::collections::BTreeMap;
use std::fmt;

use super::history::{History, Kind, Operation, OperationId, SECTORS_PER_BLOCK, Value};

/// A rule that a history breaks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// What is wrong, with the operations that show it.
    pub text: String,
    /// Where; to print the sector's history.
    pub sector: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "sector {} (block {}): {}",
            self.sector,
            self.sector / SECTORS_PER_BLOCK,
            self.text
        )
    }
}

/// Checks everything; the first violation found.
pub fn check(history: &History) -> Result<(), Violation> {
    let mut by_sector: BTreeMap<u64, Vec<OperationId>> = BTreeMap::new();
    for (index, operation) in history.operations.iter().enumerate() {
        let read_done = operation.kind != Kind::Read || operation.done().is_some();
        if operation.kind == Kind::Flush || !read_done {
            continue;
        }
        for sector in operation.first..operation.first + operation.count {
            by_sector
                .entry(sector)
                .or_default()
                .push(OperationId(index as u32));
        }
        if operation.kind == Kind::Read {
            check_read(history, OperationId(index as u32), operation)?;
        }
    }
    for (sector, operations) in by_sector {
        let register = Register::new(history, sector, &operations);
        if history.rollbacks.is_empty() {
            register.check_zones()?;
        } else {
            register.check_relaxed()?;
        }
    }
    Ok(())
}

/// The operations that touch a sector, as text, for people.
pub fn sector_history(history: &History, sector: u64) -> String {
    let mut text = String::new();
    for (index, operation) in history.operations.iter().enumerate() {
        if operation.kind != Kind::Flush && !operation.covers(sector) {
            continue;
        }
        text.push_str(&format!("  #{index} {operation}"));
        if let Some(value) = operation
            .values
            .get((sector.wrapping_sub(operation.first)) as usize)
        {
            text.push_str(&format!(" -> {value:?}"));
        }
        text.push('\n');
    }
    for (client, time) in &history.serving {
        text.push_str(&format!(
            "  client {client} serves from {:.3} ms\n",
            time.0 as f64 / 1e6
        ));
    }
    for rollback in &history.rollbacks {
        text.push_str(&format!(
            "  rollback possible {:.3} .. {:.3} ms\n",
            rollback.from.0 as f64 / 1e6,
            rollback.until.0 as f64 / 1e6
        ));
    }
    text
}

/// Rules 1 and 2.
fn check_read(history: &History, id: OperationId, read: &Operation) -> Result<(), Violation> {
    let fail = |sector, text| Err(Violation { text, sector });
    let writer = |value: Value| match value {
        Value::Written(id) => history.get(id),
        Value::Zero | Value::Garbage => None,
    };
    for (sector, &value) in (read.first..).zip(&read.values) {
        match value {
            Value::Garbage => {
                return fail(sector, format!("read #{} returned data nobody wrote", id.0));
            }
            Value::Zero => {}
            Value::Written(write) => {
                let known = writer(value).filter(|w| w.kind == Kind::Write && w.covers(sector));
                let Some(w) = known else {
                    return fail(
                        sector,
                        format!("read #{} returned unknown stamp {write:?}", id.0),
                    );
                };
                if read.done().is_some_and(|done| done < w.start) {
                    return fail(
                        sector,
                        format!("read #{} returned #{} of the future", id.0, write.0),
                    );
                }
            }
        }
        // Rule 2, against the other sectors of the same block.
        let block = sector / SECTORS_PER_BLOCK;
        let Some(mine) = writer(value) else { continue };
        for (other_sector, &other) in (read.first..).zip(&read.values) {
            if other_sector / SECTORS_PER_BLOCK != block || other == value {
                continue;
            }
            let Some(theirs) = writer(other) else {
                continue;
            };
            if mine.covers(other_sector) && theirs.covers(sector) {
                let text = format!("read #{} mixes {value:?} with {other:?} in one block", id.0);
                return fail(sector, text);
            }
        }
    }
    Ok(())
}

/// Operations of one value: its write (none for the initial zeroes) and the reads that returned it.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    /// Names the cluster in messages; `None` for the initial state.
    writer: Option<OperationId>,
    /// The write's own interval.
    write: (u64, u64),
    /// Earliest end of any member.
    first_end: u64,
    /// Latest start of any member.
    last_start: u64,
}

impl Cluster {
    fn new(writer: Option<OperationId>, start: u64, end: u64) -> Self {
        Self {
            writer,
            write: (start, end),
            first_end: end,
            last_start: start,
        }
    }

    #[must_use]
    fn with(mut self, start: u64, end: u64) -> Self {
        self.first_end = self.first_end.min(end);
        self.last_start = self.last_start.max(start);
        self
    }

    fn is_forward(&self) -> bool {
        self.first_end < self.last_start
    }

    /// Whether no order of the two values fits both.
    fn conflicts(&self, other: &Self) -> bool {
        match (self.is_forward(), other.is_forward()) {
            (true, true) => {
                self.first_end.max(other.first_end) < self.last_start.min(other.last_start)
            }
            (true, false) => self.first_end < other.last_start && other.first_end < self.last_start,
            (false, true) => other.conflicts(self),
            (false, false) => false,
        }
    }
}

/// One sector's operations.
struct Register<'a> {
    history: &'a History,
    sector: u64,
    operations: &'a [OperationId],
}

impl<'a> Register<'a> {
    fn new(history: &'a History, sector: u64, operations: &'a [OperationId]) -> Self {
        Self {
            history,
            sector,
            operations,
        }
    }

    fn operations(&self) -> impl Iterator<Item = (OperationId, &'a Operation)> + '_ {
        self.operations
            .iter()
            .filter_map(|&id| Some((id, self.history.get(id)?)))
    }

    /// Reads with the value they returned for this sector, start and end.
    fn reads(&self) -> impl Iterator<Item = (OperationId, Value, u64, u64)> + '_ {
        self.operations()
            .filter(|(_, op)| op.kind == Kind::Read)
            .filter_map(|(id, op)| {
                let value = op.values.get((self.sector - op.first) as usize)?;
                Some((id, *value, op.start.0, op.done()?.0))
            })
    }

    fn fail(&self, text: String) -> Result<(), Violation> {
        Err(Violation {
            text,
            sector: self.sector,
        })
    }

    /// Rule 3.
    fn check_zones(&self) -> Result<(), Violation> {
        let (mut values, zeroes) = self.clusters();
        // An answered trim is a value of its own, whatever reads saw of it.
        values.extend(
            zeroes
                .iter()
                .filter(|z| z.writer.is_some() && z.first_end < u64::MAX),
        );
        let name = |c: &Cluster| {
            c.writer
                .map_or("initial zeroes".to_owned(), |id| format!("#{}", id.0))
        };
        for (i, a) in values.iter().enumerate() {
            if let Some(b) = values[i + 1..].iter().find(|b| a.conflicts(b)) {
                let kind = if a.is_forward() && b.is_forward() {
                    "interleave"
                } else {
                    "stale read"
                };
                return self.fail(format!("values of {} and {} {kind}", name(a), name(b)));
            }
        }
        for (id, value, start, end) in self.reads() {
            if value != Value::Zero {
                continue;
            }
            let explained = zeroes.iter().any(|zero| {
                let pair = zero.with(start, end);
                let clash = |v: &&Cluster| v.writer != zero.writer && pair.conflicts(v);
                zero.write.0 < end && !values.iter().any(|v| clash(&v))
            });
            if !explained {
                return self.fail(format!(
                    "read #{} returned zeroes that were overwritten",
                    id.0
                ));
            }
        }
        Ok(())
    }

    /// Clusters of the written values that exist for certain, and of the ways to become zero.
    fn clusters(&self) -> (Vec<Cluster>, Vec<Cluster>) {
        let mut values: BTreeMap<OperationId, (Cluster, bool)> = BTreeMap::new();
        let mut zeroes = vec![Cluster::new(None, 0, 0)];
        for (id, op) in self.operations() {
            let cluster = Cluster::new(Some(id), op.start.0, self.history.latest_effect(op));
            match op.kind {
                Kind::Write => {
                    values.insert(id, (cluster, op.done().is_some()));
                }
                Kind::Zero if op.done().is_some() => zeroes.push(cluster),
                // An unanswered trim can explain zeroes, but need not have happened.
                Kind::Zero => zeroes.push(Cluster {
                    first_end: u64::MAX,
                    ..cluster
                }),
                Kind::Read | Kind::Flush => {}
            }
        }
        for (_, value, start, end) in self.reads() {
            if let Value::Written(write) = value
                && let Some((cluster, happened)) = values.get_mut(&write)
            {
                *cluster = cluster.with(start, end);
                *happened = true;
            }
        }
        (
            values
                .into_values()
                .filter(|(_, happened)| *happened)
                .map(|(c, _)| c)
                .collect(),
            zeroes,
        )
    }

    /// Rule 4.
    fn check_relaxed(&self) -> Result<(), Violation> {
        for (id, value, start, end) in self.reads() {
            let candidates: Vec<(u64, u64)> = match value {
                Value::Written(write) => self
                    .history
                    .get(write)
                    .map(|w| (w.start.0, self.history.latest_effect(w)))
                    .into_iter()
                    .collect(),
                _ => {
                    let trims = self.operations().filter(|(_, op)| op.kind == Kind::Zero);
                    let trims = trims.map(|(_, op)| (op.start.0, self.history.latest_effect(op)));
                    std::iter::once((0, 0)).chain(trims).collect()
                }
            };
            let explained = candidates
                .iter()
                .any(|&(begun, settled)| begun < end && self.lost_between(settled, start, end));
            if !explained {
                let text = format!("read #{} returned {value:?}, flushed over before", id.0);
                return self.fail(text);
            }
        }
        Ok(())
    }

    /// Whether every write that definitely came after a value settled and before a read started may
    /// have been rolled back before the read ended.
    fn lost_between(&self, settled: u64, read_start: u64, read_end: u64) -> bool {
        self.operations()
            .filter(|(_, op)| matches!(op.kind, Kind::Write | Kind::Zero))
            .all(|(_, op)| {
                let Some(done) = op.done().filter(|done| done.0 < read_start) else {
                    return true;
                };
                if op.start.0 <= settled {
                    return true;
                }
                let durable = if op.fua {
                    done.0
                } else {
                    self.flushed_at(op.client, done.0)
                };
                self.history.rollbacks.iter().any(|rollback| {
                    op.start.0 <= rollback.until.0
                        && durable >= rollback.from.0
                        && rollback.from.0 <= read_end
                })
            })
    }

    /// End of the first successful flush that covers a write: it started after the write's answer, and
    /// its client made the write or began to serve after it. (A zombie's flush says nothing of others.)
    fn flushed_at(&self, client: u32, acknowledged: u64) -> u64 {
        let serving_since = |client: u32| {
            let begun = self.history.serving.iter().find(|(c, _)| *c == client);
            begun.map_or(u64::MAX, |(_, time)| time.0)
        };
        let flushes = self.history.operations.iter().filter(|op| {
            op.kind == Kind::Flush
                && op.start.0 >= acknowledged
                && (op.client == client
                    || (serving_since(op.client) >= acknowledged
                        && serving_since(op.client) < op.start.0))
        });
        let ends = flushes.filter_map(|op| op.done().map(|time| time.0));
        ends.min().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[path = "oracle_tests.rs"]
mod tests;
