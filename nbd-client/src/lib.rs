//! Placeholder header while the crate is being laid down.
pub mod engine;
