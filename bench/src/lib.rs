//! What `ashlar-bench` shares with the end-to-end tests: loads that are measured here and judged there, and
//! what processes cost.

pub mod csi_inventory;
pub mod csi_load;
pub mod machine;
