//! Simulation and end-to-end tests of Ashlar: what they share.

pub mod sim;
