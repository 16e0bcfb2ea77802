//! Mounts and mount points: the system calls, and what must be looked at before and after.
//!
//! Invariants: nothing is ever deleted recursively; a mount point goes by rmdir (or, for a block volume, when it is
//! an empty file), and only when nothing is mounted there; after a mount the kernel is asked what is there.

pub mod filesystem;
mod mountinfo;
mod options;
mod programs;

use std::ffi::CString;
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _,
};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

pub use mountinfo::{DeviceNumber, Mount, at, mounts};
pub use options::MountOptions;
pub use programs::ProgramError;

use crate::errors::{Error, Result};
use crate::parameters::FsType;

/// Most mounts on top of each other that are taken away.
const STACKED_MAX: usize = 32;
/// Mode of directories that are made.
const DIRECTORY_MODE: u32 = 0o750;
/// Mode of the file under a block device.
const FILE_MODE: u32 = 0o640;

/// Runs something that may block on a thread of its own.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Internal("a system call stopped short; see the driver's log"))?
}

/// The number of a block device file.
pub fn device_number(path: &Path) -> Result<DeviceNumber> {
    let metadata = std::fs::metadata(path)
        .map_err(|e| Error::system(format!("look at {}", path.display()), e))?;
    match metadata.file_type().is_block_device() {
        true => Ok(metadata.rdev().into()),
        false => Err(Error::Precondition(format!(
            "{} is no block device",
            path.display()
        ))),
    }
}

/// Whether something is there; a path that cannot be looked at (a dead mount) is.
pub fn exists(path: &Path) -> bool {
    !matches!(std::fs::symlink_metadata(path), Err(e) if e.kind() == io::ErrorKind::NotFound)
}

/// Makes a directory and those above it.
pub fn make_directory(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(|e| Error::system(format!("make the directory {}", path.display()), e))
}

/// Makes an empty file, and the directories above it.
pub fn make_file(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let made = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .open(path);
    match made {
        Ok(_) => Ok(()),
        Err(e) => Err(Error::system(
            format!("make the file {}", path.display()),
            e,
        )),
    }
}

/// Mounts a device.
pub fn mount(device: &Path, target: &Path, fs: FsType, options: &MountOptions) -> Result<()> {
    let data = CString::new(options.data.as_str())
        .map_err(|_| Error::invalid("mount_flags", "contains a zero byte"))?;
    rustix::mount::mount(device, target, fs.name(), options.flags, data.as_c_str()).map_err(|e| {
        // The options may hold what is not for logs: they are not shown.
        Error::system(
            format!(
                "mount {} ({fs}) at {}; the kernel's log says more",
                device.display(),
                target.display()
            ),
            e,
        )
    })
}

/// Makes `source` appear at `target` too.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    let doing = |what: &str| format!("{what} {} at {}", source.display(), target.display());
    rustix::mount::mount_bind(source, target).map_err(|e| Error::system(doing("bind"), e))?;
    if read_only && let Err(error) = make_read_only(target) {
        // Never leave a writable mount behind where a read-only one was wanted.
        let _ = rustix::mount::unmount(target, UnmountFlags::NOFOLLOW);
        return Err(Error::system(doing("make read-only"), error));
    }
    Ok(())
}

/// Makes a bind mount read-only, and keeps its other flags (a remount replaces them all).
fn make_read_only(target: &Path) -> rustix::io::Result<()> {
    use rustix::fs::StatVfsMountFlags as Has;
    let has = rustix::fs::statvfs(target)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::RDONLY;
    for (is, flag) in [
        (Has::NOSUID, MountFlags::NOSUID),
        (Has::NODEV, MountFlags::NODEV),
        (Has::NOEXEC, MountFlags::NOEXEC),
        (Has::NOATIME, MountFlags::NOATIME),
        (Has::NODIRATIME, MountFlags::NODIRATIME),
        (Has::RELATIME, MountFlags::RELATIME),
    ] {
        flags.set(flag, has.contains(is));
    }
    rustix::mount::mount_remount(target, flags, c"")
}

/// Takes away everything that is mounted at a path. Nothing there: OK.
pub fn unmount(target: &Path) -> Result<()> {
    for _ in 0..STACKED_MAX {
        if at(&mounts()?, target).is_none() {
            return Ok(());
        }
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Somebody else was quicker.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(e) => {
                return Err(Error::system(
                    format!("unmount {} (is it in use?)", target.display()),
                    e,
                ));
            }
        }
    }
    Err(Error::Precondition(format!(
        "{} is covered by more than {STACKED_MAX} mounts",
        target.display()
    )))
}

/// Removes a path that nothing is mounted at: an empty directory or an empty file. Nothing there: OK.
pub fn remove_mount_point(path: &Path) -> Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::system(format!("look at {}", path.display()), e)),
    };
    let removed = if metadata.is_dir() {
        std::fs::remove_dir(path)
    } else if metadata.is_file() && metadata.len() == 0 {
        std::fs::remove_file(path)
    } else {
        return Err(Error::Precondition(format!(
            "{} is neither an empty directory nor an empty file: it is not removed; look at what it is, and remove it \
             by hand",
            path.display()
        )));
    };
    match removed {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
            Err(Error::Precondition(format!(
                "{} holds files although nothing is mounted there: they are not deleted; move them away by hand",
                path.display()
            )))
        }
        Err(e) => Err(Error::system(format!("remove {}", path.display()), e)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    #[test]
    fn only_empty_mount_points_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("a/b");
        make_directory(&directory).unwrap();
        std::fs::write(directory.join("precious"), "data").unwrap();
        let error = remove_mount_point(&directory).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        assert_eq!(std::fs::read(directory.join("precious")).unwrap(), b"data");
        assert!(remove_mount_point(&directory.join("precious")).is_err());
        std::fs::remove_file(directory.join("precious")).unwrap();
        remove_mount_point(&directory).unwrap();
        assert!(!exists(&directory));
        remove_mount_point(&directory).unwrap();
        let file = dir.path().join("c/d");
        make_file(&file).unwrap();
        make_file(&file).unwrap();
        remove_mount_point(&file).unwrap();
        assert!(!exists(&file));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(remove_mount_point(&link).is_err());
    }

    #[test]
    fn what_is_not_mounted_is_unmounted() {
        let dir = tempfile::tempdir().unwrap();
        unmount(dir.path()).unwrap();
        unmount(&dir.path().join("absent")).unwrap();
    }

    #[test]
    fn a_file_is_no_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(device_number(file.path()).is_err());
        assert!(device_number(Path::new("/absent")).is_err());
    }
}
