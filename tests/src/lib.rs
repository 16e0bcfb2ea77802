//! Simulation and end-to-end tests of Ashlar: what they share.

pub mod e2e;
pub mod sim;
