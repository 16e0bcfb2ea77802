//! Looking for, making, checking and growing file systems.
//!
//! Invariants: a device that cannot be read is an error, never an empty device; nothing here decides whether a
//! device may be formatted (that is `node/format.rs`); the features of a new file system are spelled out, so that
//! kernels older than the image's tools mount it.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use super::programs::{run, run_ok};
use crate::errors::{Error, Result};
use crate::parameters::FsType;

const PROBE_TIMEOUT: Duration = Duration::from_secs(60);
const MKFS_TIMEOUT: Duration = Duration::from_secs(600);
const CHECK_TIMEOUT: Duration = Duration::from_secs(3600);
const GROW_TIMEOUT: Duration = Duration::from_secs(600);

/// Where every signature that blkid knows begins, or nearly.
const HEAD_BYTES: usize = 128 * 1024;
/// ext4 as kernel 4.x knows it; `none` clears what mke2fs.conf says.
const EXT4_FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
     sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";
/// XFS as kernel 5.10 knows it.
const XFS_META: &str = "crc=1,finobt=1,rmapbt=0,reflink=1,bigtime=1,inobtcount=1";
/// Large extent counters need kernel 5.19.
const XFS_INODES: &str = "sparse=1,nrext64=0";

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No signature.
    Nothing,
    /// This one, as blkid names it.
    FileSystem(String),
    /// Something that is no file system, or more than one thing.
    Other(String),
}

/// Looks what is on a device, by reading only.
pub async fn probe(device: &Path) -> Result<Found> {
    let path = device.to_owned();
    super::blocking(move || {
        let read =
            std::fs::File::open(&path).and_then(|mut f| f.read_exact(&mut vec![0; HEAD_BYTES]));
        read.map_err(|e| Error::system(format!("read the beginning of {}", path.display()), e))
    })
    .await?;
    let device = device.to_string_lossy();
    let finished = run("blkid", &["-p", "-o", "export", &device], PROBE_TIMEOUT).await?;
    match finished.code {
        Some(0) => Ok(read_blkid(&finished.stdout)),
        Some(2) if finished.stderr.trim().is_empty() => Ok(Found::Nothing),
        Some(8) => Ok(Found::Other(
            "signatures of several file systems".to_owned(),
        )),
        _ => Err(finished.failure("blkid").into()),
    }
}

fn read_blkid(text: &str) -> Found {
    let value = |key: &str| {
        let found = text
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        found.map(str::to_owned)
    };
    match (value("USAGE").as_deref(), value("TYPE"), value("PTTYPE")) {
        (Some("filesystem"), Some(fs), _) => Found::FileSystem(fs),
        (_, Some(other), _) => Found::Other(other),
        (_, None, Some(table)) => Found::Other(format!("a partition table ({table})")),
        (_, None, None) => Found::Other("an unknown signature".to_owned()),
    }
}

/// Makes a file system. `again`: over the remains of one that was not finished.
pub async fn make(fs: FsType, device: &Path, options: &[String], again: bool) -> Result<()> {
    let device = device.to_string_lossy();
    let mut arguments: Vec<&str> = match fs {
        // Nothing was ever written, so there is nothing to discard.
        FsType::Ext4 => vec!["-q", "-O", EXT4_FEATURES, "-I", "256", "-m", "0", "-E"],
        FsType::Xfs => vec!["-q", "-m", XFS_META, "-i", XFS_INODES],
    };
    match (fs, again) {
        (FsType::Ext4, false) => arguments.push("nodiscard"),
        (FsType::Ext4, true) => arguments.extend(["discard", "-F"]),
        (FsType::Xfs, false) => arguments.push("-K"),
        (FsType::Xfs, true) => arguments.push("-f"),
    }
    // The StorageClass has the last word.
    arguments.extend(options.iter().map(String::as_str));
    arguments.push(&device);
    let program = match fs {
        FsType::Ext4 => "mkfs.ext4",
        FsType::Xfs => "mkfs.xfs",
    };
    run_ok(program, &arguments, MKFS_TIMEOUT).await?;
    Ok(())
}

/// Checks a file system that is not mounted, and repairs what can be repaired without asking.
pub async fn check(fs: FsType, device: &Path) -> Result<()> {
    // XFS replays its log when it is mounted, and has nothing to check before that.
    if fs == FsType::Xfs {
        return Ok(());
    }
    let text = device.to_string_lossy();
    let finished = run("e2fsck", &["-p", &text], CHECK_TIMEOUT).await?;
    match finished.code {
        // 1: repaired; 2: repaired, and a reboot would be needed were it the root.
        Some(0) => Ok(()),
        Some(1..=3) => {
            tracing::warn!(device = %text, output = finished.stdout.trim(), "e2fsck repaired a file system");
            Ok(())
        }
        Some(code) if code & 4 != 0 => Err(Error::Precondition(format!(
            "the file system on {text} has errors that e2fsck does not repair without being asked; attach the volume \
             somewhere (`nbd-client attach`) and run `e2fsck -f` by hand: {}",
            finished.failure("e2fsck")
        ))),
        _ => Err(finished.failure("e2fsck").into()),
    }
}

/// Makes a mounted file system as large as its device; does nothing if it is.
pub async fn grow(fs: FsType, device: &Path, mounted_at: &Path) -> Result<()> {
    match fs {
        FsType::Ext4 => {
            let device = device.to_string_lossy();
            run_ok("resize2fs", &[&device], GROW_TIMEOUT).await?;
        }
        FsType::Xfs => {
            let target = mounted_at.to_string_lossy();
            run_ok("xfs_growfs", &["-d", &target], GROW_TIMEOUT).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn what_blkid_says_is_read() {
        let ext4 = "DEVNAME=/dev/nbd0\nUUID=1\nBLOCK_SIZE=4096\nTYPE=ext4\nUSAGE=filesystem\n";
        assert_eq!(read_blkid(ext4), Found::FileSystem("ext4".into()));
        let luks = "DEVNAME=/dev/nbd0\nTYPE=crypto_LUKS\nUSAGE=crypto\n";
        assert_eq!(read_blkid(luks), Found::Other("crypto_LUKS".into()));
        let table = "DEVNAME=/dev/nbd0\nPTUUID=1\nPTTYPE=gpt\n";
        assert_eq!(
            read_blkid(table),
            Found::Other("a partition table (gpt)".into())
        );
        assert!(matches!(read_blkid(""), Found::Other(_)));
    }

    #[tokio::test]
    async fn a_device_that_cannot_be_read_is_no_empty_device() {
        let dir = tempfile::tempdir().unwrap();
        assert!(probe(&dir.path().join("absent")).await.is_err());
        let short = dir.path().join("short");
        std::fs::write(&short, "x").unwrap();
        assert!(probe(&short).await.is_err());
    }
}
