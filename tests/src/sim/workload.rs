//! What clients ask of the volume: few hot blocks, many requests at once, every size and alignment.
//!
//! Invariant: offsets and lengths are multiples of 512 bytes, the unit that the oracle checks (the engine
//! itself takes any; its own tests do bytes).

use ashlar_platform::sim::Rng;

use super::history::{Kind, SECTORS_PER_BLOCK};

/// Sectors of a chunk.
const CHUNK_SECTORS: u64 = 8192;
/// Sectors of a page.
const PAGE_SECTORS: u64 = 128;

/// One request to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What.
    pub kind: Kind,
    /// Of zeroing kinds: a trim, else write zeroes.
    pub trim: bool,
    /// First sector.
    pub first: u64,
    /// Sectors.
    pub count: u64,
    /// Durable when answered.
    pub fua: bool,
}

/// A run's habits.
#[derive(Clone, Debug)]
pub struct Workload {
    regions: Vec<(u64, u64)>,
    weights: [u64; 4],
    fua_one_in: u64,
    unaligned_percent: u64,
    large_percent: u64,
    volume_sectors: u64,
    /// Requests in flight at once, per client.
    pub depth: usize,
    /// Longest pause between an answer and the slot's next request.
    pub think_ns: u64,
}

impl Workload {
    /// Draws the habits of a run on a volume of this size that lasts about so long.
    pub fn generate(rng: &mut Rng, volume_sectors: u64, duration_ns: u64, requests: u64) -> Self {
        let chunks = volume_sectors.div_ceil(CHUNK_SECTORS);
        // Some runs fight over a single block or two.
        let hot = rng.chance(1, 3);
        let count = if hot { 1 } else { rng.between(1, 4) };
        let regions = (0..count).map(|_| {
            let blocks = rng.between(1, if hot { 2 } else { 6 });
            let chunk = rng.below(chunks);
            let within = match rng.below(4) {
                0 => 0,
                1 => CHUNK_SECTORS - SECTORS_PER_BLOCK * blocks.div_ceil(2),
                2 => PAGE_SECTORS * rng.between(1, 4) - SECTORS_PER_BLOCK * blocks.div_ceil(2),
                _ => rng.below(1024 - blocks) * SECTORS_PER_BLOCK,
            };
            let first = chunk * CHUNK_SECTORS + within;
            let count = blocks * SECTORS_PER_BLOCK;
            let first = first.min(volume_sectors - count);
            (first, count)
        });
        let regions = regions.collect();
        let depth = rng.between(1, 8) as usize;
        // Slots pause so that the requests spread over the run.
        let think_ns = 2 * duration_ns * depth as u64 / requests.max(1);
        Self {
            regions,
            weights: [
                rng.between(20, 60),
                rng.between(20, 60),
                rng.between(0, 12),
                rng.between(0, 15),
            ],
            fua_one_in: rng.between(2, 20),
            unaligned_percent: rng.between(0, 60),
            large_percent: if rng.coin() { rng.between(0, 8) } else { 0 },
            volume_sectors,
            depth,
            think_ns,
        }
    }

    /// The next request.
    pub fn next(&self, rng: &mut Rng) -> Request {
        let mut draw = rng.below(self.weights.iter().sum());
        let kinds = [Kind::Write, Kind::Read, Kind::Zero, Kind::Flush];
        let mut kind = Kind::Read;
        for (candidate, weight) in kinds.into_iter().zip(self.weights) {
            if draw < weight {
                kind = candidate;
                break;
            }
            draw -= weight;
        }
        if kind == Kind::Flush {
            return Request {
                kind,
                trim: false,
                first: 0,
                count: 0,
                fua: false,
            };
        }
        let (first, count) = self.extent(rng);
        let fua = kind != Kind::Read && rng.chance(1, self.fua_one_in);
        Request {
            kind,
            trim: rng.coin(),
            first,
            count,
            fua,
        }
    }

    fn extent(&self, rng: &mut Rng) -> (u64, u64) {
        let &(start, length) = rng.pick(&self.regions).unwrap_or(&(0, SECTORS_PER_BLOCK));
        if rng.below(100) < self.large_percent {
            // Whole pages around the region.
            let first = start / PAGE_SECTORS * PAGE_SECTORS;
            let count = rng.between(1, 3) * PAGE_SECTORS;
            return (first, count.min(self.volume_sectors - first));
        }
        if rng.below(100) < self.unaligned_percent {
            let first = start + rng.below(length);
            let count = rng.between(1, (length - (first - start)).min(20));
            return (first, count);
        }
        let blocks = length / SECTORS_PER_BLOCK;
        let first = rng.below(blocks);
        let count = rng.between(1, blocks - first);
        (start + first * SECTORS_PER_BLOCK, count * SECTORS_PER_BLOCK)
    }

    /// Whether requests may touch any of these sectors.
    pub fn touches(&self, first: u64, count: u64) -> bool {
        let mut extents = self.everything().into_iter();
        extents.any(|(start, length)| first < start + length && start < first + count)
    }

    /// Runs of sectors that together cover everything the workload may touch, for the final reads.
    pub fn everything(&self) -> Vec<(u64, u64)> {
        let mut extents = Vec::new();
        for &(start, length) in &self.regions {
            let first = start / PAGE_SECTORS * PAGE_SECTORS;
            let end = (start + length).max(if self.large_percent > 0 {
                first + 3 * PAGE_SECTORS
            } else {
                0
            });
            let first = if self.large_percent > 0 { first } else { start };
            extents.push((first, end.min(self.volume_sectors) - first));
        }
        extents
    }
}

/// The whole blocks inside a run of sectors: what a trim really discards.
pub fn whole_blocks(first: u64, count: u64) -> (u64, u64) {
    let start = first.next_multiple_of(SECTORS_PER_BLOCK);
    let end = (first + count) / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
    (start, end.saturating_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_within_the_volume_and_within_what_is_read_at_the_end() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let sectors = rng.between(1, 5) * CHUNK_SECTORS + rng.between(64, 500) * 8;
            let workload = Workload::generate(&mut rng, sectors, 1_000_000_000, 100);
            let everything = workload.everything();
            for _ in 0..200 {
                let request = workload.next(&mut rng);
                let end = request.first + request.count;
                assert!(end <= sectors, "{request:?} of {sectors}");
                let covered = everything
                    .iter()
                    .any(|(f, c)| *f <= request.first && end <= f + c);
                assert!(
                    covered || request.kind == Kind::Flush,
                    "{request:?} {everything:?}"
                );
            }
        }
    }
}
