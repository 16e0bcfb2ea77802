//! Deterministic twins of the machine: randomness, disks, networks and clocks that replay from a seed.
//!
//! Architecture invariant: nothing here reads the real clock, draws real randomness, starts a thread or
//! iterates a hash map; one seed gives one history.

mod clock;
mod disk;
mod network;
mod rng;

pub use clock::SimClock;
pub use disk::{DiskFaults, DiskStats, PowerCut, SimDisk, SimDiskConfig};
pub use network::{
    ConnectionId, End, HostId, NetworkConfig, NetworkEvent, NetworkEventKind, SimNetwork,
};
pub use rng::Rng;
