//! Tombstones of one layer of a chunk (R9): disjoint ranges with a version each.
//!
//! Invariants:
//! - A range hides every home block and log entry below it whose version is lower; a higher one hides it.
//! - Each range is backed by a live log record (`batch`): it is re-logged before that record is freed, or
//!   forgotten when the rules allow it.
//! - Ranges are sorted and disjoint: at most one per block.

use ashlar_proto::ids::Version;
use smallvec::SmallVec;

/// A run of trimmed blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extent {
    pub(super) first: u16,
    pub(super) end: u16,
    pub(super) version: Version,
    /// Log batch of the record that backs it.
    pub(super) batch: u64,
}

/// The ranges of one layer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Tombstones {
    list: Vec<Extent>,
}

impl Tombstones {
    pub(super) fn covering(&self, block: u16) -> Option<&Extent> {
        if self.list.is_empty() {
            return None;
        }
        let at = self.list.partition_point(|e| e.end <= block);
        self.list.get(at).filter(|e| e.first <= block)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Extent> {
        self.list.iter()
    }

    /// Covers `first..end` where nothing of the same or a higher version does already.
    pub(super) fn insert(&mut self, first: u16, end: u16, version: Version, batch: u64) {
        let mut merged: SmallVec<[Extent; 8]> = SmallVec::new();
        let lo = self.list.partition_point(|e| e.end <= first);
        let hi = self.list.partition_point(|e| e.first < end);
        let mut at = first;
        for old in &self.list[lo..hi] {
            if old.version >= version {
                if at < old.first {
                    merged.push(Extent {
                        first: at,
                        end: old.first,
                        version,
                        batch,
                    });
                }
                merged.push(*old);
                at = old.end.max(at);
                continue;
            }
            if old.first < first {
                merged.push(Extent { end: first, ..*old });
            }
            if old.end > end {
                merged.push(Extent {
                    first: at,
                    end,
                    version,
                    batch,
                });
                merged.push(Extent { first: end, ..*old });
                at = old.end;
            }
        }
        if at < end {
            merged.push(Extent {
                first: at,
                end,
                version,
                batch,
            });
        }
        self.list.splice(lo..hi, merged);
    }

    /// Uncovers one block.
    pub(super) fn punch(&mut self, block: u16) {
        let at = self.list.partition_point(|e| e.end <= block);
        let Some(old) = self.list.get(at).copied().filter(|e| e.first <= block) else {
            return;
        };
        let left = (old.first < block).then_some(Extent { end: block, ..old });
        let right = (block + 1 < old.end).then_some(Extent {
            first: block + 1,
            ..old
        });
        self.list.splice(at..=at, left.into_iter().chain(right));
    }

    /// Moves the ranges of `from` batches at or below to a new backing record.
    pub(super) fn rebase(&mut self, up_to: u64, batch: u64, keep: impl Fn(&Extent) -> bool) {
        for e in self.list.iter_mut().filter(|e| e.batch <= up_to && keep(e)) {
            e.batch = batch;
        }
    }

    /// Forgets ranges whose record is freed.
    pub(super) fn forget(&mut self, up_to: u64) {
        self.list.retain(|e| e.batch > up_to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_against_array(seed: u64) {
        let mut model = [Version::ZERO; 64];
        let mut t = Tombstones::default();
        let mut x = seed | 1;
        for step in 0..200 {
            x = x
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let first = (x >> 33) as u16 % 64;
            let end = first + 1 + (x >> 45) as u16 % (64 - first);
            let version = Version::new(1, (x >> 20) % 20 + 1);
            if step % 5 == 4 {
                t.punch(first);
                model[usize::from(first)] = Version::ZERO;
            } else {
                t.insert(first, end, version, step);
                for b in &mut model[usize::from(first)..usize::from(end)] {
                    *b = (*b).max(version);
                }
            }
            for (i, want) in model.iter().enumerate() {
                let have = t.covering(i as u16).map_or(Version::ZERO, |e| e.version);
                assert_eq!(have, *want, "seed {seed} step {step} block {i}");
            }
            assert!(t.list.windows(2).all(|w| w[0].end <= w[1].first));
            assert!(t.list.iter().all(|e| e.first < e.end));
        }
    }

    #[test]
    fn ranges_behave_like_an_array_of_versions() {
        for seed in 0..200 {
            check_against_array(seed * 977);
        }
    }
}
