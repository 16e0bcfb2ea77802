//! What the clients of a simulated volume did and saw, and the bytes that make it checkable.
//!
//! Every write carries a stamp of its own in each 512-byte sector, so a sector read tells which write it
//! comes from, and a sector that was torn, mixed, misplaced or made up is recognised as such.
//!
//! Invariant: times are true simulated time, the first operation starts after 0.

use std::fmt;

use ashlar_platform::clock::Time;

/// Bytes of the unit that is checked: the smallest that NBD clients here address.
pub const SECTOR: usize = 512;
/// Sectors of a block.
pub const SECTORS_PER_BLOCK: u64 = 8;

/// What a sector holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Value {
    /// Zeroes: never written, trimmed or zeroed.
    Zero,
    /// Written by the operation of this number.
    Written(OperationId),
    /// Bytes that no write produced for this sector.
    Garbage,
}

/// Index of an operation in its [`History`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct OperationId(pub u32);

const MAGIC: u64 = 0x7573_6c61_6873_6173;

fn word(stamp: u64, sector: u64, index: u64) -> u64 {
    let mut x = stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sector.rotate_left(32) ^ (index << 56);
    x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

/// The bytes that an operation writes to a run of sectors.
pub fn stamped(operation: OperationId, first_sector: u64, sectors: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(sectors as usize * SECTOR);
    let stamp = u64::from(operation.0) + 1;
    for sector in first_sector..first_sector + sectors {
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&stamp.to_le_bytes());
        bytes.extend_from_slice(&sector.to_le_bytes());
        let fill = word(stamp, sector, 1).to_le_bytes();
        for _ in 3..SECTOR / 8 {
            bytes.extend_from_slice(&fill);
        }
    }
    bytes
}

/// What the bytes read from a sector say.
pub fn decode(sector: u64, bytes: &[u8]) -> Value {
    static ZERO: [u8; SECTOR] = [0; SECTOR];
    if bytes == &ZERO[..] {
        return Value::Zero;
    }
    let at = |index: usize| {
        let field = bytes
            .get(index * 8..index * 8 + 8)
            .and_then(|b| b.try_into().ok());
        field.map_or(0, u64::from_le_bytes)
    };
    let stamp = at(1);
    let fill = word(stamp, sector, 1);
    let intact = bytes.len() == SECTOR
        && at(0) == MAGIC
        && at(2) == sector
        && at(3) == fill
        // Every word after the first of the filling equals the one before it.
        && bytes[24..SECTOR - 8] == bytes[32..];
    match u32::try_from(stamp.wrapping_sub(1)) {
        Ok(id) if intact => Value::Written(OperationId(id)),
        _ => Value::Garbage,
    }
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Writes stamped data.
    Write,
    /// Makes sectors read as zeroes: trim and write zeroes.
    Zero,
    /// Reads.
    Read,
    /// Makes durable what was acknowledged before it started.
    Flush,
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// No answer (yet, or ever).
    Pending,
    /// Done.
    Done(Time),
    /// The client was told of an error; a write may have happened or not, also in part.
    Failed(Time),
}

/// One operation of a client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Operation {
    /// The client process.
    pub client: u32,
    /// What.
    pub kind: Kind,
    /// First sector; for writes, zeroes and reads.
    pub first: u64,
    /// Sectors; 0 for a flush.
    pub count: u64,
    /// Durable when answered.
    pub fua: bool,
    /// When it was submitted.
    pub start: Time,
    /// How it ended.
    pub outcome: Outcome,
    /// What a read returned, per sector.
    pub values: Vec<Value>,
}

impl Operation {
    /// When it was answered without error.
    pub fn done(&self) -> Option<Time> {
        match self.outcome {
            Outcome::Done(time) => Some(time),
            Outcome::Pending | Outcome::Failed(_) => None,
        }
    }

    /// Whether it touches a sector.
    pub fn covers(&self, sector: u64) -> bool {
        (self.first..self.first + self.count).contains(&sector)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |t: Time| t.0 as f64 / 1e6;
        write!(f, "client {} {:?}", self.client, self.kind)?;
        if self.count > 0 {
            write!(f, " sectors {}+{}", self.first, self.count)?;
        }
        if self.fua {
            write!(f, " fua")?;
        }
        write!(f, " [{:.3} ms .. ", ms(self.start))?;
        match self.outcome {
            Outcome::Pending => write!(f, "never]"),
            Outcome::Done(t) => write!(f, "{:.3}]", ms(t)),
            Outcome::Failed(t) => write!(f, "{:.3} FAILED]", ms(t)),
        }
    }
}

/// A time from which on acknowledged but unflushed writes may be gone, because every in-sync replica of
/// some group had lost power and the client could not replay them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rollback {
    /// First power loss that took part: what was flushed before this is safe.
    pub from: Time,
    /// When a client served again: writes that start later are not concerned.
    pub until: Time,
}

/// Everything that clients did.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// In order of submission.
    pub operations: Vec<Operation>,
    /// When each client began to serve, in order: unanswered writes of clients before it have taken
    /// effect by then, or never will.
    pub serving: Vec<(u32, Time)>,
    /// See [`Rollback`].
    pub rollbacks: Vec<Rollback>,
}

impl History {
    /// Adds an operation that starts.
    pub fn begin(
        &mut self,
        client: u32,
        kind: Kind,
        first: u64,
        count: u64,
        fua: bool,
        start: Time,
    ) -> OperationId {
        let id = OperationId(self.operations.len() as u32);
        self.operations.push(Operation {
            client,
            kind,
            first,
            count,
            fua,
            start,
            outcome: Outcome::Pending,
            values: Vec::new(),
        });
        id
    }

    /// The operation of an id.
    pub fn get(&self, id: OperationId) -> Option<&Operation> {
        self.operations.get(id.0 as usize)
    }

    /// The latest time at which an operation can have taken effect: its answer, else when a later client
    /// began to serve, else never.
    pub fn latest_effect(&self, operation: &Operation) -> u64 {
        if let Some(time) = operation.done() {
            return time.0;
        }
        let own = self
            .serving
            .iter()
            .rposition(|(client, _)| *client == operation.client);
        let later = own.map_or(&self.serving[..], |i| &self.serving[i + 1..]);
        // Only a session that was not yet serving when the operation began can have settled it.
        let settled = later
            .iter()
            .find(|(client, time)| *client != operation.client && *time > operation.start);
        settled.map_or(u64::MAX, |(_, time)| time.0)
    }

    /// A digest of everything, to compare two runs.
    pub fn digest(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut mix = |x: u64| {
            hash = (hash ^ x)
                .wrapping_mul(0x0000_0100_0000_01b3)
                .rotate_left(23);
        };
        for op in &self.operations {
            mix(u64::from(op.client));
            mix(op.kind as u64);
            mix(op.first);
            mix(op.count);
            mix(op.start.0);
            match op.outcome {
                Outcome::Pending => mix(1),
                Outcome::Done(t) => mix(t.0 << 2 | 2),
                Outcome::Failed(t) => mix(t.0 << 2 | 3),
            }
            for value in &op.values {
                match value {
                    Value::Zero => mix(0),
                    Value::Written(id) => mix(u64::from(id.0) + 1),
                    Value::Garbage => mix(u64::MAX),
                }
            }
        }
        self.serving
            .iter()
            .for_each(|(client, time)| mix(u64::from(*client) ^ time.0));
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_its_write_and_nothing_else_does() {
        let bytes = stamped(OperationId(41), 100, 2);
        assert_eq!(
            decode(100, &bytes[..SECTOR]),
            Value::Written(OperationId(41))
        );
        assert_eq!(
            decode(101, &bytes[SECTOR..]),
            Value::Written(OperationId(41))
        );
        assert_eq!(decode(101, &bytes[..SECTOR]), Value::Garbage, "misplaced");
        assert_eq!(decode(5, &[0; SECTOR]), Value::Zero);
        let other = stamped(OperationId(42), 100, 1);
        for cut in [16, 24, 32, 256, 504, 511] {
            let mut torn = bytes[..SECTOR].to_vec();
            torn[cut..].copy_from_slice(&other[cut..]);
            assert_eq!(decode(100, &torn), Value::Garbage, "torn at {cut}");
        }
        for bit in 0..SECTOR * 8 {
            let mut flipped = bytes[..SECTOR].to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(100, &flipped), Value::Garbage, "bit {bit}");
        }
    }
}
