//! `/proc/self/mountinfo`: what is mounted where (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::errors::{Error, Result};

/// Where the kernel says it.
const MOUNTINFO: &str = "/proc/self/mountinfo";

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// The device of it.
    pub minor: u32,
}

impl From<u64> for DeviceNumber {
    fn from(rdev: u64) -> Self {
        Self {
            major: rustix::fs::major(rdev),
            minor: rustix::fs::minor(rdev),
        }
    }
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Device of the file system.
    pub device: DeviceNumber,
    /// What of the file system is mounted: `/` is all of it.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Whether this mount, or the whole file system, is read-only.
    pub read_only: bool,
    /// As in `ext4`.
    pub fs_type: String,
}

/// All mounts of this process' namespace, in the order in which they were made.
pub fn mounts() -> Result<Vec<Mount>> {
    let text =
        std::fs::read(MOUNTINFO).map_err(|e| Error::system(format!("read {MOUNTINFO}"), e))?;
    Ok(parse(&text))
}

/// What one sees at a path: the mount that was made last there.
pub fn at<'a>(mounts: &'a [Mount], target: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|m| m.target == target)
}

/// Reads the file; a line that is not understood is passed over.
fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|b| *b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    // Number, parent's number.
    fields.nth(1)?;
    let device = number(fields.next()?)?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options = fields.next()?;
    // Optional fields end with a dash.
    fields.by_ref().find(|f| *f == b"-")?;
    let fs_type = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let _source = fields.next()?;
    let super_options = fields.next()?;
    let read_only = |options: &[u8]| options.split(|b| *b == b',').any(|o| o == b"ro");
    Some(Mount {
        device,
        root,
        target,
        read_only: read_only(options) || read_only(super_options),
        fs_type,
    })
}

fn number(text: &[u8]) -> Option<DeviceNumber> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some(DeviceNumber {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

/// Blanks, tabs, line breaks and backslashes are written as `\ooo`.
fn unescape(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = match (first, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        out.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &[u8] = b"21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=continue\n\
        36 21 43:0 / /var/lib/kubelet/plugins/kubernetes.io/csi/globalmount rw,noatime - ext4 /dev/nbd0 rw\n\
        40 21 43:0 / /pods/a\\040b/mount ro,noatime shared:7 master:2 - ext4 /dev/nbd0 rw\n\
        41 21 0:6 /nbd1 /pods/block rw - devtmpfs devtmpfs rw,size=4k\n\
        42 21 43:16 / /m rw - xfs /dev/nbd1 ro,nouuid\n\
        43 21 43:32 / /m rw - ext4 /dev/nbd2 rw\n\
        nonsense\n";

    #[test]
    fn mounts_are_read() {
        let mounts = parse(SAMPLE);
        assert_eq!(mounts.len(), 6);
        let nbd0 = DeviceNumber {
            major: 43,
            minor: 0,
        };
        assert_eq!(mounts[1].device, nbd0);
        assert!(!mounts[1].read_only && mounts[2].read_only && mounts[4].read_only);
        assert_eq!(mounts[2].target, Path::new("/pods/a b/mount"));
        assert_eq!(mounts[3].root, Path::new("/nbd1"));
        assert_eq!(mounts[3].fs_type, "devtmpfs");
    }

    #[test]
    fn the_last_mount_at_a_path_is_the_one_that_is_seen() {
        let mounts = parse(SAMPLE);
        assert_eq!(at(&mounts, Path::new("/m")).unwrap().fs_type, "ext4");
        assert_eq!(at(&mounts, Path::new("/nothing")), None);
    }

    #[test]
    fn this_machine_has_a_root() {
        assert!(at(&mounts().unwrap(), Path::new("/")).is_some());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&bytes);
            unescape(&bytes);
        }
    }
}
