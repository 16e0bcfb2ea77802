//! Disks while nobody serves them: what is on one, formatting it, giving it to a cluster.
//!
//! Invariants:
//! - Only a blank disk is formatted, unless the operator forces it.
//! - A disk belongs to no cluster until its first registration; then to that one for ever.

use std::path::Path;
use std::time::Duration;

use ashlar_platform::clock;
use ashlar_platform::disk::{DiskFile, DiskOpenError, OpenOptions};
use ashlar_proto::ids::{ClusterId, DiskId, Incarnation};

use crate::error::DiskError;
use crate::format::{FormatError, SUPERBLOCK_OFFSETS, Superblock};
use crate::store::{FormatOptions, Store};

/// Bytes at the start and at the end that must be zero in a blank disk: file systems, partition tables
/// and RAID members all leave their marks there.
const BLANK_BYTES: u64 = 1024 * 1024;
/// Bytes that hold a superblock copy.
const COPY_BYTES: usize = 4096;

/// How long a disk may still be locked by a process that has just ended: the kernel takes its io_uring
/// apart in the background, and the lock goes with it.
const UNLOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts.
const UNLOCK_PAUSE: Duration = Duration::from_millis(10);

/// Opens a disk for its daemon; waits a moment for an earlier one that has just ended.
///
/// # Errors
/// As [`DiskFile::open`].
pub fn open_for_service(path: &Path) -> Result<DiskFile, DiskOpenError> {
    let deadline = clock::now().after(UNLOCK_TIMEOUT);
    loop {
        match DiskFile::open(path, OpenOptions::default()) {
            Err(DiskOpenError::InUse { .. }) if clock::now() < deadline => {
                std::thread::sleep(UNLOCK_PAUSE);
            }
            other => return other,
        }
    }
}

/// What is on a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Contents {
    /// Zeroes where anybody would have left a mark.
    Blank,
    /// An Ashlar disk.
    Ashlar(Box<Superblock>),
    /// An Ashlar disk with both superblocks damaged, or of a newer release.
    Damaged(FormatError),
    /// Something else.
    Foreign,
}

fn io<'a>(
    disk: &'a DiskFile,
    action: &'static str,
) -> impl FnOnce(std::io::Error) -> DiskError + 'a {
    move |source| DiskError::Io {
        path: disk.path().to_owned(),
        action,
        source,
    }
}

/// Looks what is on a disk.
pub fn contents(disk: &DiskFile) -> Result<Contents, DiskError> {
    let mut best: Option<Superblock> = None;
    let mut damage = None;
    for offset in SUPERBLOCK_OFFSETS {
        if offset + COPY_BYTES as u64 > disk.size() {
            continue;
        }
        let bytes = disk
            .read_at(offset, COPY_BYTES)
            .map_err(io(disk, "read its superblock"))?;
        match Superblock::decode(&bytes) {
            Ok(copy) if best.as_ref().is_none_or(|b| copy.generation > b.generation) => {
                best = Some(copy);
            }
            Ok(_) | Err(FormatError::Magic) => {}
            Err(error) => damage = Some(error),
        }
    }
    if let Some(superblock) = best {
        return Ok(Contents::Ashlar(Box::new(superblock)));
    }
    if let Some(error) = damage {
        return Ok(Contents::Damaged(error));
    }
    let edge = BLANK_BYTES.min(disk.size()) & !(COPY_BYTES as u64 - 1);
    for offset in [0, (disk.size() - edge) & !(COPY_BYTES as u64 - 1)] {
        let bytes = disk
            .read_at(offset, edge as usize)
            .map_err(io(disk, "read"))?;
        if bytes.iter().any(|&b| b != 0) {
            return Ok(Contents::Foreign);
        }
    }
    Ok(Contents::Blank)
}

/// What `format` is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FormatRequest {
    /// Create the file with this size, or make it that large.
    pub size_bytes: Option<u64>,
    /// Also over foreign data.
    pub force: bool,
    /// Bytes of the log.
    pub log_bytes: Option<u64>,
    /// Replicas that it can hold.
    pub replica_slots: Option<u32>,
}

/// Makes a disk an Ashlar disk, of no cluster yet.
pub fn format(path: &Path, request: &FormatRequest) -> Result<Superblock, DiskError> {
    let options = OpenOptions::default();
    let disk = match request.size_bytes {
        Some(size) if !path.exists() => DiskFile::create(path, size, options)?,
        Some(size) => {
            let mut disk = DiskFile::open(path, options)?;
            if !disk.is_block_device() && disk.size() < size {
                disk.grow(size).map_err(|source| DiskError::Io {
                    path: path.to_owned(),
                    action: "allocate space",
                    source,
                })?;
            }
            disk
        }
        None => DiskFile::open(path, options)?,
    };
    match contents(&disk)? {
        Contents::Blank => {}
        _ if request.force => {}
        Contents::Ashlar(superblock) => {
            return Err(DiskError::Formatted {
                path: path.to_owned(),
                disk: superblock.disk,
            });
        }
        Contents::Damaged(_) | Contents::Foreign => {
            return Err(DiskError::Foreign {
                path: path.to_owned(),
            });
        }
    }
    let plan = Store::format_plan(&FormatOptions {
        cluster: ClusterId::NIL,
        disk: DiskId::generate(),
        size_bytes: disk.size(),
        incarnation: Incarnation(ashlar_platform::random::u64() | 1),
        log_bytes: request.log_bytes,
        replica_slots: request.replica_slots,
    })
    .map_err(|source| DiskError::Store {
        path: path.to_owned(),
        source,
    })?;
    for (offset, bytes) in &plan {
        disk.write_at(*offset, bytes).map_err(io(&disk, "write"))?;
    }
    disk.sync().map_err(io(&disk, "sync"))?;
    match contents(&disk)? {
        Contents::Ashlar(superblock) => Ok(*superblock),
        _ => Err(DiskError::NotFormatted {
            path: path.to_owned(),
        }),
    }
}

/// Reads the superblock of a disk that is to be served.
pub fn superblock(path: &Path) -> Result<Superblock, DiskError> {
    let disk = DiskFile::open(path, OpenOptions::inspect())?;
    match contents(&disk)? {
        Contents::Ashlar(superblock) => Ok(*superblock),
        Contents::Damaged(source) => Err(DiskError::Damaged {
            path: path.to_owned(),
            source,
        }),
        Contents::Blank | Contents::Foreign => Err(DiskError::NotFormatted {
            path: path.to_owned(),
        }),
    }
}

/// Gives a disk of no cluster to one, durably. A disk of that cluster is left as it is.
pub fn join_cluster(path: &Path, cluster: ClusterId) -> Result<Superblock, DiskError> {
    let disk = open_for_service(path)?;
    let mut superblock = match contents(&disk)? {
        Contents::Ashlar(superblock) => *superblock,
        _ => {
            return Err(DiskError::NotFormatted {
                path: path.to_owned(),
            });
        }
    };
    if superblock.cluster == cluster {
        return Ok(superblock);
    }
    if !superblock.cluster.is_nil() {
        let theirs = superblock.cluster;
        return Err(DiskError::OtherCluster {
            path: path.to_owned(),
            theirs,
            ours: cluster,
        });
    }
    superblock.cluster = cluster;
    superblock.generation += 1;
    let mut block = vec![0; COPY_BYTES];
    let bytes = superblock.encode();
    block[..bytes.len()].copy_from_slice(&bytes);
    for offset in SUPERBLOCK_OFFSETS {
        disk.write_at(offset, &block)
            .map_err(io(&disk, "write its superblock"))?;
        disk.sync().map_err(io(&disk, "sync its superblock"))?;
    }
    Ok(superblock)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const SIZE: u64 = 64 << 20;

    fn request() -> FormatRequest {
        FormatRequest {
            size_bytes: Some(SIZE),
            ..FormatRequest::default()
        }
    }

    #[test]
    fn a_blank_disk_is_formatted_and_joins_one_cluster_only() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("disk");
        let first = format(&path, &request()).unwrap();
        assert!(first.cluster.is_nil());
        assert!(matches!(
            format(&path, &request()),
            Err(DiskError::Formatted { .. })
        ));
        let (ours, theirs) = (ClusterId([1; 16]), ClusterId([2; 16]));
        assert_eq!(join_cluster(&path, ours).unwrap().cluster, ours);
        assert_eq!(superblock(&path).unwrap().cluster, ours);
        assert!(matches!(
            join_cluster(&path, theirs),
            Err(DiskError::OtherCluster { .. })
        ));
        let forced = format(
            &path,
            &FormatRequest {
                force: true,
                ..request()
            },
        )
        .unwrap();
        assert_ne!(forced.disk, first.disk);
    }

    #[test]
    fn foreign_data_is_not_formatted_over() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("disk");
        let mut bytes = vec![0_u8; SIZE as usize];
        bytes[1080] = 0x53;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(
            format(&path, &request()),
            Err(DiskError::Foreign { .. })
        ));
        assert!(matches!(
            superblock(&path),
            Err(DiskError::NotFormatted { .. })
        ));
        bytes[1080] = 0;
        bytes[SIZE as usize - 512] = 0x45;
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(
            format(&path, &request()),
            Err(DiskError::Foreign { .. })
        ));
        assert!(
            format(
                &path,
                &FormatRequest {
                    force: true,
                    ..request()
                }
            )
            .is_ok()
        );
    }
}
