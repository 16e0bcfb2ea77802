//! The crash-safe chunk store of one disk (DESIGN section 5), sans-IO.

mod api;

pub use api::*;
