//! The only code of Ashlar that touches the machine: io_uring reactor, aligned buffers, disks, sockets,
//! clock, randomness; and `sim`, their deterministic twins.
//!
//! Architecture invariant: no other crate opens files or sockets on the data path, reads the clock or
//! draws random numbers; engines receive time as [`clock::Time`] and ask for I/O with commands.

pub mod boot;
pub mod buffer;
pub mod clock;
pub mod disk;
#[cfg(feature = "observe")]
pub mod observe;
pub mod random;
pub mod reactor;
pub mod sim;

pub use boot::boot_id;
