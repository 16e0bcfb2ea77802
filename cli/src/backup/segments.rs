//! Which segments of a volume are to be read.

use super::manifest::Geometry;

/// A set of segments, one bit for each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SegmentSet {
    geometry: Geometry,
    words: Vec<u64>,
}

impl SegmentSet {
    /// None of them.
    pub fn none(geometry: Geometry) -> Self {
        let words = vec![0; geometry.segments().div_ceil(64) as usize];
        Self { geometry, words }
    }

    /// All of them.
    pub fn all(geometry: Geometry) -> Self {
        let mut set = Self::none(geometry);
        set.add(0, geometry.size_bytes);
        set
    }

    /// Adds those that bytes of the volume lie in; what is beyond its end is left out.
    pub fn add(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.geometry.size_bytes);
        if offset >= end {
            return;
        }
        let segment = u64::from(self.geometry.segment_bytes);
        for index in offset / segment..end.div_ceil(segment) {
            self.words[(index / 64) as usize] |= 1 << (index % 64);
        }
    }

    /// Whether a segment is among them.
    pub fn contains(&self, segment: u64) -> bool {
        let word = self.words.get((segment / 64) as usize).copied();
        word.unwrap_or(0) >> (segment % 64) & 1 == 1
    }

    /// Those in a range.
    pub fn within(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = u64> + '_ {
        range.filter(|s| self.contains(*s))
    }

    /// Bytes of the volume in them.
    pub fn bytes(&self) -> u64 {
        let all = self.within(0..self.geometry.segments());
        all.map(|s| u64::from(self.geometry.length(s))).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_mark_the_segments_that_they_lie_in() {
        let geometry = Geometry {
            size_bytes: 70 * 65_536 + 4096,
            segment_bytes: 65_536,
        };
        let mut set = SegmentSet::none(geometry);
        assert_eq!(set.bytes(), 0);
        set.add(65_535, 2);
        set.add(65_536 * 66, 65_536);
        set.add(65_536 * 70, u64::MAX);
        set.add(u64::MAX, 1);
        let found: Vec<u64> = set.within(0..geometry.segments()).collect();
        assert_eq!(found, [0, 1, 66, 70]);
        assert_eq!(set.bytes(), 3 * 65_536 + 4096);
        assert_eq!(SegmentSet::all(geometry).bytes(), geometry.size_bytes);
        assert!(!set.contains(1000));
    }
}
