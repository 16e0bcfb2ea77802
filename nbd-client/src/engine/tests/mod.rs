//! Tests of the session engine in a small deterministic world (`world.rs`) with fake replicas
//! (`fake_disk.rs`) and an oracle (`oracle.rs`).

mod backpressure;
mod cost;
mod fake_disk;
mod faults;
mod metadata;
mod oracle;
mod random;
mod readers;
mod requests;
mod scenarios;
mod snapshots;
mod world;

/// SplitMix64: small, deterministic.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
