//! Checks of what users sent: names, labels, addresses, sizes.

use ashlar_proto::ids::BLOCK_SIZE;

use super::cluster::{Labels, PoolSpec};
use super::command::Refusal;

/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Most labels on one thing.
pub const LABELS_MAX: usize = 64;
/// Longest key or value of a label, in bytes.
pub const LABEL_BYTES_MAX: usize = 320;
/// Longest address, path or client name, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Most replicas in a group (one more while a replica moves).
pub const REPLICAS_MAX: u8 = 5;
/// Most groups of a volume.
pub const GROUPS_MAX: usize = 64;
/// Largest volume: 1 PiB.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Largest over-provisioning, in per cent.
pub const OVERPROVISION_PERCENT_MAX: u32 = 1_000_000;
/// Most nodes that a volume is published to.
pub const PUBLICATIONS_MAX: usize = 1024;
/// Most clients that read a volume at once.
pub const READERS_MAX: usize = 1024;
/// Most live snapshots of a volume.
pub const SNAPSHOTS_MAX: usize = 1000;
/// Most snapshots of a volume together with those that are being deleted.
pub const SNAPSHOTS_KEPT_MAX: usize = 4096;
/// Longest chain of volumes that a clone inherits from.
pub const CLONE_DEPTH_MAX: usize = 16;
/// Most volumes whose snapshots are taken at one point in time.
pub const SNAPSHOT_VOLUMES_MAX: usize = 256;
/// Most entries of one batch in a command.
pub const BATCH_MAX: usize = 1024;

/// A name: lower-case letters, digits, `-`, `.`, `_`; begins and ends with a letter or digit.
pub fn name(field: &str, value: &str) -> Result<(), Refusal> {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = value.as_bytes();
    let ends = bytes.first().zip(bytes.last());
    let good = bytes.len() <= NAME_BYTES_MAX
        && ends.is_some_and(|(a, b)| alphanumeric(*a) && alphanumeric(*b))
        && bytes
            .iter()
            .all(|b| alphanumeric(*b) || matches!(b, b'-' | b'.' | b'_'));
    if good {
        return Ok(());
    }
    let shown: String = value.chars().take(NAME_BYTES_MAX).collect();
    Err(Refusal::invalid(format!(
        "{field}: {shown:?} is not a valid name; use at most {NAME_BYTES_MAX} lower-case letters, digits, '-', '.' or '_', \
         beginning and ending with a letter or digit"
    )))
}

/// Labels: bounded in number and length.
pub fn labels(field: &str, labels: &Labels) -> Result<(), Refusal> {
    if labels.len() > LABELS_MAX {
        return Err(Refusal::invalid(format!(
            "{field}: more than {LABELS_MAX} labels"
        )));
    }
    for (key, value) in labels {
        if key.is_empty() || key.len() > LABEL_BYTES_MAX || value.len() > LABEL_BYTES_MAX {
            return Err(Refusal::invalid(format!(
                "{field}: keys must have 1 to {LABEL_BYTES_MAX} bytes, values at most {LABEL_BYTES_MAX}"
            )));
        }
    }
    Ok(())
}

/// A free text of bounded length.
pub fn text(field: &str, value: &str) -> Result<(), Refusal> {
    if value.len() > TEXT_BYTES_MAX {
        return Err(Refusal::invalid(format!(
            "{field}: longer than {TEXT_BYTES_MAX} bytes"
        )));
    }
    Ok(())
}

/// A volume's size.
pub fn size(field: &str, bytes: u64) -> Result<(), Refusal> {
    if bytes == 0 || bytes > VOLUME_BYTES_MAX || !bytes.is_multiple_of(BLOCK_SIZE as u64) {
        return Err(Refusal::invalid(format!(
            "{field}: {bytes} is not a multiple of {BLOCK_SIZE} between {BLOCK_SIZE} and {VOLUME_BYTES_MAX}"
        )));
    }
    Ok(())
}

/// Replica counts of a volume.
pub fn replica_counts(replicas: u8, min_replicas: u8) -> Result<(), Refusal> {
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(Refusal::invalid(format!(
            "replicas: must lie between 1 and {REPLICAS_MAX}"
        )));
    }
    if min_replicas == 0 || min_replicas > replicas {
        return Err(Refusal::invalid(
            "min_replicas: must lie between 1 and replicas",
        ));
    }
    Ok(())
}

/// A pool's specification.
pub fn pool_spec(spec: &PoolSpec) -> Result<(), Refusal> {
    labels("spec.selector", &spec.selector)?;
    replica_counts(spec.replicas, 1)?;
    if spec.overprovision_percent == 0 || spec.overprovision_percent > OVERPROVISION_PERCENT_MAX {
        return Err(Refusal::invalid(format!(
            "spec.overprovision_percent: must lie between 1 and {OVERPROVISION_PERCENT_MAX}"
        )));
    }
    Ok(())
}

/// `min_replicas` of a volume that does not say: 2 for three replicas and more, else 1.
pub fn default_min_replicas(replicas: u8) -> u8 {
    if replicas >= 3 { 2 } else { 1 }
}
