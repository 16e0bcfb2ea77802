//! Timing and limits of Raft.
//!
//! A leader is missed after its lease (`ELECTION_MS_MAX`) and a random part of the election timeout; a
//! new one leads 1 to 1.8 s after a death. Idle cost: one heartbeat per follower and 300 ms.

use std::sync::Arc;

use openraft::{Config, ConfigError, SnapshotPolicy};

/// Between two heartbeats of the leader.
const HEARTBEAT_MS: u64 = 300;
/// Bounds of the random election timeout.
const ELECTION_MS_MIN: u64 = 600;
const ELECTION_MS_MAX: u64 = 900;
/// Entries after which a snapshot is taken.
const SNAPSHOT_ENTRIES: u64 = 8192;
/// Entries kept behind a snapshot, for members that lag a little.
const KEPT_ENTRIES: u64 = 2048;
/// Time for a whole snapshot to be sent and installed.
const SNAPSHOT_MS_MAX: u64 = 60_000;

/// Numbers that tests make smaller.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Entries after which a snapshot is taken.
    pub snapshot_entries: u64,
    /// Entries kept behind a snapshot.
    pub kept_entries: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            snapshot_entries: SNAPSHOT_ENTRIES,
            kept_entries: KEPT_ENTRIES,
        }
    }
}

/// The configuration for openraft.
pub fn raft_config(tuning: Tuning) -> Result<Arc<Config>, ConfigError> {
    let config = Config {
        cluster_name: "ashlar".to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MS_MIN,
        election_timeout_max: ELECTION_MS_MAX,
        install_snapshot_timeout: SNAPSHOT_MS_MAX,
        max_payload_entries: 256,
        replication_lag_threshold: tuning.snapshot_entries,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(tuning.snapshot_entries),
        max_in_snapshot_log_to_keep: tuning.kept_entries,
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    Ok(Arc::new(config.validate()?))
}
