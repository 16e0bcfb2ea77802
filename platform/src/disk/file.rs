//! Files and block devices as disks: opened with O_DIRECT and exclusively.
//!
//! Invariants:
//! - While a [`DiskFile`] opened with `exclusive` lives, no second one can be opened on the same file or
//!   device (flock on files, O_EXCL on block devices).
//! - Sizes are whole logical sectors.
#![expect(unsafe_code, reason = "the BLKDISCARD ioctl")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::buffer::{ALIGNMENT, AlignedBuffer};

/// `_IO(0x12, 119)` of linux/fs.h: the kernel drops a range's contents.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// Logical sector of files whose file system does not tell.
const SECTOR_UNKNOWN: u32 = 4096;
/// STATX_DIOALIGN of linux/stat.h.
const STATX_DIOALIGN: u32 = 0x2000;

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskOpenError {
    /// Nothing there.
    #[error("{path}: no such file or device")]
    NotFound {
        /// What was opened.
        path: PathBuf,
    },
    /// `create` found something.
    #[error("{path}: exists already")]
    Exists {
        /// What was to be created.
        path: PathBuf,
    },
    /// Another process, or this one, has it open, or it is mounted.
    #[error("{path}: in use by another daemon, or mounted")]
    InUse {
        /// What was opened.
        path: PathBuf,
    },
    /// The file system has no direct I/O.
    #[error(
        "{path}: its file system does not support O_DIRECT; put the disk on ext4, xfs or a device"
    )]
    NoDirectIo {
        /// What was opened.
        path: PathBuf,
    },
    /// Neither file nor block device.
    #[error("{path}: neither a regular file nor a block device")]
    NotADisk {
        /// What was opened.
        path: PathBuf,
    },
    /// Any other error of the system.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was opened.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// How to open a disk. The default: for reading and writing, direct, exclusive.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Also for writing.
    pub write: bool,
    /// With O_DIRECT. Off only for looking at a disk offline.
    pub direct: bool,
    /// Refuse if somebody else has it open exclusively. Off only for looking at a disk in use.
    pub exclusive: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            write: true,
            direct: true,
            exclusive: true,
        }
    }
}

impl OpenOptions {
    /// For looking only: no lock, no O_DIRECT, no writes.
    #[must_use]
    pub fn inspect() -> Self {
        Self {
            write: false,
            direct: false,
            exclusive: false,
        }
    }
}

/// An open file or block device.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    size: u64,
    logical_sector: u32,
    memory_alignment: u32,
    block_device: bool,
}

impl DiskFile {
    /// Opens an existing file or block device.
    ///
    /// # Errors
    /// [`DiskOpenError`] tells the operator's cases apart.
    pub fn open(path: &Path, options: OpenOptions) -> Result<Self, DiskOpenError> {
        let block_device = std::fs::metadata(path)
            .map(|metadata| metadata.file_type().is_block_device())
            .map_err(|error| open_error(path, "open", error))?;
        let mut flags = OFlags::empty();
        flags.set(OFlags::EXCL, block_device && options.exclusive);
        Self::open_with(path, options, flags)
    }

    /// Creates a file of `size` bytes (rounded down to whole 4 KiB) with its space allocated.
    ///
    /// # Errors
    /// [`DiskOpenError`]; a file whose space could not be allocated is removed again.
    pub fn create(path: &Path, size: u64, options: OpenOptions) -> Result<Self, DiskOpenError> {
        let mut disk = Self::open_with(path, options, OFlags::CREATE | OFlags::EXCL)?;
        if let Err(error) = disk.grow(size) {
            // Nothing was in it; a second failure here leaves an empty file, which is harmless.
            let _ = std::fs::remove_file(path);
            return Err(open_error(path, "allocate space", error));
        }
        Ok(disk)
    }

    fn open_with(path: &Path, options: OpenOptions, extra: OFlags) -> Result<Self, DiskOpenError> {
        let mut flags = extra
            | OFlags::CLOEXEC
            | if options.write {
                OFlags::RDWR
            } else {
                OFlags::RDONLY
            };
        flags.set(OFlags::DIRECT, options.direct);
        let file: File = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR | Mode::RGRP)
            .map_err(|errno| match errno {
                Errno::INVAL if options.direct => {
                    if extra.contains(OFlags::CREATE) {
                        // Linux creates the file before it refuses O_DIRECT.
                        let _ = std::fs::remove_file(path);
                    }
                    DiskOpenError::NoDirectIo { path: path.into() }
                }
                other => open_error(path, "open", other.into()),
            })?
            .into();
        let metadata = file
            .metadata()
            .map_err(|error| open_error(path, "stat", error))?;
        let block_device = metadata.file_type().is_block_device();
        if !block_device && !metadata.is_file() {
            return Err(DiskOpenError::NotADisk { path: path.into() });
        }
        if options.exclusive && !block_device {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                .map_err(|errno| open_error(path, "lock", errno.into()))?;
        }
        let (logical_sector, memory_alignment) =
            alignments(&file, block_device).map_err(|error| open_error(path, "query", error))?;
        let mut disk = Self {
            file,
            path: path.into(),
            size: 0,
            logical_sector,
            memory_alignment,
            block_device,
        };
        disk.measure()
            .map_err(|error| open_error(path, "measure", error))?;
        Ok(disk)
    }

    fn measure(&mut self) -> io::Result<()> {
        let size = rustix::fs::seek(&self.file, SeekFrom::End(0))?;
        self.size = size - size % u64::from(self.logical_sector);
        Ok(())
    }

    /// Makes a file at least `size` bytes long (rounded down to whole 4 KiB), with its space allocated.
    ///
    /// # Errors
    /// Those of fallocate; unsupported on block devices, which grow by themselves.
    pub fn grow(&mut self, size: u64) -> io::Result<()> {
        let size = size - size % ALIGNMENT as u64;
        if size > self.size {
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, size)?;
            rustix::fs::fsync(&self.file)?;
        }
        self.measure()
    }

    /// Bytes, in whole logical sectors.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Smallest unit of I/O, in bytes: offsets and lengths are multiples of it.
    #[must_use]
    pub fn logical_sector(&self) -> u32 {
        self.logical_sector
    }

    /// Alignment in memory that direct I/O needs here (from 4 bytes on NVMe to 4096).
    #[must_use]
    pub fn memory_alignment(&self) -> u32 {
        self.memory_alignment
    }

    /// Whether the file has holes: it takes less room on its file system than its size. False for devices.
    ///
    /// # Errors
    /// Those of fstat.
    pub fn is_sparse(&self) -> io::Result<bool> {
        let stat = rustix::fs::fstat(&self.file)?;
        // st_blocks counts units of 512 bytes whatever the file system's own (stat(2)).
        Ok(!self.block_device && (stat.st_blocks as u64).saturating_mul(512) < self.size)
    }

    /// Whether this is a block device rather than a file.
    #[must_use]
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// What was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads synchronously, for tools and start-up; the data path uses the reactor.
    ///
    /// # Errors
    /// Those of pread; a short read is `UnexpectedEof`.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let mut buffer = AlignedBuffer::zeroed(length);
        self.file.read_exact_at(&mut buffer, offset)?;
        Ok(buffer.freeze())
    }

    /// Writes synchronously, for tools and start-up; the data path uses the reactor.
    ///
    /// # Errors
    /// Those of pwrite.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if data.as_ptr().align_offset(ALIGNMENT) == 0 {
            return self.file.write_all_at(data, offset);
        }
        let mut buffer = AlignedBuffer::with_capacity(data.len());
        buffer.extend_from_slice(data);
        self.file.write_all_at(&buffer, offset)
    }

    /// fdatasync, synchronously.
    ///
    /// # Errors
    /// Those of fdatasync: data may be lost, the disk must not be trusted any more.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Discards a range, synchronously: BLKDISCARD on devices, a hole in files. A disk that cannot is
    /// no error.
    ///
    /// # Errors
    /// Those of the system other than "not supported".
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let result = if self.block_device {
            let range = [offset, length];
            // SAFETY: BLKDISCARD reads two u64 from the pointer, which is valid during the call.
            let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            }
        } else {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, mode, offset, length).map_err(io::Error::from)
        };
        result.or_else(|error| {
            if discard_is_unsupported(&error) {
                Ok(())
            } else {
                Err(error)
            }
        })
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether a failed discard only says that this disk has none (discards are advice).
pub(crate) fn discard_is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS)
    )
}

/// Logical sector and memory alignment of direct I/O.
fn alignments(file: &File, block_device: bool) -> io::Result<(u32, u32)> {
    let asked = StatxFlags::from_bits_retain(STATX_DIOALIGN);
    let (mut sector, mut memory) = (0, 0);
    if let Ok(stat) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, asked)
        && stat.stx_mask & STATX_DIOALIGN != 0
    {
        sector = stat.stx_dio_offset_align;
        memory = stat.stx_dio_mem_align;
    }
    if block_device {
        sector = rustix::fs::ioctl_blksszget(file)?;
    }
    let usable = |value: u32| value.is_power_of_two() && value <= ALIGNMENT as u32;
    let sector = if usable(sector) {
        sector.max(512)
    } else {
        SECTOR_UNKNOWN
    };
    let memory = if usable(memory) {
        memory
    } else {
        ALIGNMENT as u32
    };
    Ok((sector, memory))
}

fn open_error(path: &Path, action: &'static str, source: io::Error) -> DiskOpenError {
    let path = path.to_path_buf();
    match source.raw_os_error() {
        Some(libc::ENOENT) => DiskOpenError::NotFound { path },
        Some(libc::EEXIST) => DiskOpenError::Exists { path },
        Some(libc::EBUSY | libc::EWOULDBLOCK | libc::ETXTBSY) => DiskOpenError::InUse { path },
        _ => DiskOpenError::Io {
            path,
            action,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn create(path: &Path, size: u64) -> Option<DiskFile> {
        match DiskFile::create(path, size, OpenOptions::default()) {
            Err(DiskOpenError::NoDirectIo { path }) => {
                eprintln!("SKIPPED: no O_DIRECT at {}", path.display());
                None
            }
            other => Some(other.unwrap()),
        }
    }

    #[test]
    fn a_disk_is_exclusive_until_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let Some(disk) = create(&path, 100_000) else {
            return;
        };
        assert_eq!(disk.size(), 98_304);
        let again = DiskFile::open(&path, OpenOptions::default());
        assert!(
            matches!(again, Err(DiskOpenError::InUse { .. })),
            "{again:?}"
        );
        assert!(DiskFile::open(&path, OpenOptions::inspect()).is_ok());
        drop(disk);
        assert_eq!(
            DiskFile::open(&path, OpenOptions::default())
                .unwrap()
                .size(),
            98_304
        );
    }

    #[test]
    fn errors_tell_what_is_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let missing = DiskFile::open(&directory.path().join("none"), OpenOptions::default());
        assert!(
            matches!(missing, Err(DiskOpenError::NotFound { .. })),
            "{missing:?}"
        );
        let no_disk = DiskFile::open(Path::new("/dev/null"), OpenOptions::inspect());
        assert!(
            matches!(no_disk, Err(DiskOpenError::NotADisk { .. })),
            "{no_disk:?}"
        );
        let proc_file = DiskFile::open(
            Path::new("/proc/self/status"),
            OpenOptions {
                write: false,
                ..OpenOptions::default()
            },
        );
        assert!(
            matches!(proc_file, Err(DiskOpenError::NoDirectIo { .. })),
            "{proc_file:?}"
        );
        let path = directory.path().join("disk");
        let Some(_disk) = create(&path, 4096) else {
            return;
        };
        let twice = DiskFile::create(&path, 4096, OpenOptions::default());
        assert!(
            matches!(twice, Err(DiskOpenError::Exists { .. })),
            "{twice:?}"
        );
    }

    #[test]
    fn a_file_without_space_is_not_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let result = DiskFile::create(
            &path,
            1 << 60,
            OpenOptions {
                direct: false,
                ..OpenOptions::default()
            },
        );
        assert!(
            matches!(result, Err(DiskOpenError::Io { .. })),
            "{result:?}"
        );
        assert!(!path.exists());
    }

    #[test]
    fn synchronous_io_reads_back_what_was_written_and_discarded() {
        let directory = tempfile::tempdir().unwrap();
        let Some(mut disk) = create(&directory.path().join("disk"), 1 << 20) else {
            return;
        };
        let data: Vec<u8> = (0..8193_u32).map(|i| i as u8).collect();
        disk.write_at(4096, &data[1..]).unwrap();
        disk.sync().unwrap();
        assert_eq!(disk.read_at(4096, 8192).unwrap(), &data[1..]);
        disk.discard(4096, 4096).unwrap();
        let after = disk.read_at(4096, 8192).unwrap();
        assert!(after[..4096].iter().all(|&byte| byte == 0));
        assert_eq!(after[4096..], data[4097..]);
        assert!(disk.read_at(1 << 20, 4096).is_err());
        disk.grow(2 << 20).unwrap();
        assert_eq!(disk.size(), 2 << 20);
    }
}
