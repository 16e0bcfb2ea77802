//! Mount options as StorageClasses write them, for mount(2).
//!
//! Invariant: options that mount(8) keeps to itself are dropped, those of every file system become flags, and the
//! rest goes to the file system, which refuses what it does not know.

use rustix::mount::MountFlags;

use crate::errors::{Error, Result};
use crate::parameters::FsType;

/// Largest options for a file system: a page.
const DATA_BYTES_MAX: usize = 4095;

/// Options for mount(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Those of every file system.
    pub flags: MountFlags,
    /// Those of this one, separated by commas.
    pub data: String,
}

impl MountOptions {
    /// Reads options; each may be several, separated by commas.
    pub fn parse(options: &[String]) -> Result<Self> {
        let mut flags = MountFlags::empty();
        let mut data: Vec<&str> = Vec::new();
        let all = options.iter().flat_map(|o| o.split(','));
        for option in all.map(str::trim).filter(|o| !o.is_empty()) {
            if option.contains(['\0', '\n']) {
                return Err(Error::invalid(
                    "volume_capability.mount.mount_flags",
                    "contains a zero byte or a line break",
                ));
            }
            if let Some((flag, set)) = flag(option) {
                flags.set(flag, set);
            } else if !is_for_mount8(option) {
                data.push(option);
            }
        }
        let data = data.join(",");
        if data.len() > DATA_BYTES_MAX {
            return Err(Error::invalid(
                "volume_capability.mount.mount_flags",
                format!("longer than {DATA_BYTES_MAX} bytes"),
            ));
        }
        Ok(Self { flags, data })
    }

    /// What the driver adds for a file system on a device; `read_only` if nothing may be written to the device.
    pub fn complete(mut self, fs: FsType, read_only: bool) -> Self {
        let mut add = |option: &str| {
            if !self.data.split(',').any(|o| o == option) {
                if !self.data.is_empty() {
                    self.data.push(',');
                }
                self.data.push_str(option);
            }
        };
        // A clone has its parent's UUID, and both may be mounted on one node.
        if fs == FsType::Xfs {
            add("nouuid");
        }
        if read_only {
            // A journal that could not be replayed on a device that takes no writes would make the mount fail.
            add(match fs {
                FsType::Ext4 => "noload",
                FsType::Xfs => "norecovery",
            });
            self.flags |= MountFlags::RDONLY;
        }
        self
    }

    /// Whether they ask for a read-only mount.
    pub fn read_only(&self) -> bool {
        self.flags.contains(MountFlags::RDONLY)
    }
}

/// The flag of an option, and whether it sets or clears it.
fn flag(option: &str) -> Option<(MountFlags, bool)> {
    Some(match option {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "lazytime" => (MountFlags::LAZYTIME, true),
        "nolazytime" => (MountFlags::LAZYTIME, false),
        _ => return None,
    })
}

/// Options that mean something to mount(8) and fstab only.
fn is_for_mount8(option: &str) -> bool {
    matches!(
        option,
        "defaults"
            | "auto"
            | "noauto"
            | "user"
            | "nouser"
            | "users"
            | "group"
            | "owner"
            | "nofail"
            | "_netdev"
    ) || option.starts_with("x-")
        || option.starts_with("comment=")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        MountOptions::parse(&options).unwrap()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = parse(&[
            "noatime,nodev",
            "data=ordered",
            " discard",
            "x-systemd.automount",
        ]);
        assert_eq!(options.flags, MountFlags::NOATIME | MountFlags::NODEV);
        assert_eq!(options.data, "data=ordered,discard");
        let defaults = parse(&["defaults", "_netdev", "nofail", "comment=x"]);
        assert!(defaults.flags.is_empty() && defaults.data.is_empty());
    }

    #[test]
    fn the_later_option_wins() {
        assert!(!parse(&["ro", "rw"]).read_only());
        assert!(parse(&["rw,ro"]).read_only());
    }

    #[test]
    fn xfs_is_mounted_whatever_its_uuid_and_a_read_only_device_without_replay() {
        assert_eq!(parse(&[]).complete(FsType::Xfs, false).data, "nouuid");
        assert_eq!(
            parse(&["nouuid"]).complete(FsType::Xfs, false).data,
            "nouuid"
        );
        let options = parse(&["noatime"]).complete(FsType::Ext4, true);
        assert!(options.read_only() && options.data == "noload");
        let options = parse(&["inode64"]).complete(FsType::Xfs, true);
        assert_eq!(options.data, "inode64,nouuid,norecovery");
    }

    #[test]
    fn unclean_options_are_refused() {
        assert!(MountOptions::parse(&["a\nb".to_owned()]).is_err());
        assert!(MountOptions::parse(&["a".repeat(5000)]).is_err());
    }
}
