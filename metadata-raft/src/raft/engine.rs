//! What the log store asks of the library below it: an ordered map of entries and a few named values.
//!
//! A second implementation (redb for instance) needs these functions.

use std::io;
use std::ops::Range;

/// Named values next to the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MetaKey {
    /// The vote.
    Vote,
    /// The last purged log id.
    Purged,
    /// The last committed log id that was noticed.
    Committed,
}

/// Durable storage of entries by index.
///
/// Invariants asked of an implementation: effects become visible at once; [`LogEngine::sync`] returns
/// when everything that was visible before the call survives a power loss; after a crash the effects
/// form a prefix of the calls, and each call is there wholly or not at all.
pub trait LogEngine: Send + Sync + 'static {
    /// Adds or replaces entries.
    fn put(&self, entries: Vec<(u64, Vec<u8>)>) -> io::Result<()>;
    /// Removes entries.
    fn remove(&self, indexes: Range<u64>) -> io::Result<()>;
    /// Removes entries below `end`, the lowest first and at most `most`; how many it removed.
    fn remove_lowest(&self, end: u64, most: usize) -> io::Result<usize>;
    /// Entries of a range, ascending.
    fn read(&self, indexes: Range<u64>) -> io::Result<Vec<(u64, Vec<u8>)>>;
    /// The entry with the highest index.
    fn last(&self) -> io::Result<Option<(u64, Vec<u8>)>>;
    /// Sets a named value.
    fn set_meta(&self, key: MetaKey, value: Option<Vec<u8>>) -> io::Result<()>;
    /// A named value.
    fn meta(&self, key: MetaKey) -> io::Result<Option<Vec<u8>>>;
    /// Makes everything durable.
    fn sync(&self) -> io::Result<()>;
}
