//! A volume that grows while everything else happens to it.
//!
//! Clients ask for what lies within the size that their session has told them, and never for more. Whoever opens a volume
//! gets its size of then; a session that serves hears of a new one. In the end the volume has its last size.

use ashlar_platform::sim::Rng;
use metadata_raft::model::Operation;

use super::cluster::{Cluster, Timer};
use super::metadata::Metadata;
use super::schedule::MS;

/// When metadata is away it is asked again after this.
const AGAIN_NS: u64 = 20 * MS;

/// The sizes that a volume of this size will have, ascending.
pub fn sizes(rng: &mut Rng, from: u64) -> Vec<u64> {
    let mut size = from;
    let steps = rng.below(3);
    (0..steps)
        .map(|_| {
            size += rng.between(1, 1200) * 4096;
            size
        })
        .collect()
}

impl Metadata {
    fn resize(&mut self, size_bytes: u64) {
        let volume = self.volume().id;
        self.must(Operation::ResizeVolume { volume, size_bytes });
    }
}

impl Cluster {
    /// The volume grows to its next size.
    pub(super) fn growth_due(&mut self) {
        if self.metadata_down > 0 {
            return self.timer(AGAIN_NS, Timer::Grow);
        }
        let now = self.metadata.volume().size_bytes;
        let next = self.setup.grows.iter().find(|size| **size > now).copied();
        if let Some(size) = next {
            self.note(|| format!("the volume grows to {size} bytes"));
            self.metadata.resize(size);
            self.resizes += 1;
            self.metadata_changed();
        }
    }

    /// It reaches its last size.
    pub(super) fn grow_up(&mut self) {
        for _ in 0..self.setup.grows.len() {
            self.growth_due();
        }
    }

    /// A client's session says how large the volume is.
    pub(super) fn size_told(&mut self, host: u32, size_bytes: u64) {
        let known = size_bytes == self.setup.shape.size_bytes
            || self.setup.grows.contains(&size_bytes)
                && size_bytes <= self.metadata.volume().size_bytes;
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let shrinks = size_bytes < client.size_bytes;
        client.size_bytes = size_bytes;
        if !known || shrinks {
            self.problem(format!(
                "client {host} serves {size_bytes} bytes, a size that the volume does not have"
            ));
        }
    }
}
