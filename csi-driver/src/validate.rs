//! Checks of what callers sent: strings, maps, capabilities, sizes.
//!
//! Invariants: every capability of a request is checked, not only the first; sizes are rounded up to whole blocks
//! and `limit_bytes` is honoured after the rounding.

use std::collections::HashMap;

use ashlar_proto::ids::BLOCK_SIZE;

use crate::errors::{Error, Result};
use crate::parameters::FsType;
use crate::rpc::volume_capability::AccessType;
use crate::rpc::volume_capability::access_mode::Mode as Wire;
use crate::rpc::{CapacityRange, VolumeCapability};
use crate::volume_id::STRING_BYTES_MAX;

/// Largest map, in bytes of its keys and values.
const MAP_BYTES_MAX: usize = 4096;
/// Longest node id.
const NODE_ID_BYTES_MAX: usize = 256;
/// Longest path that Linux takes.
const PATH_BYTES_MAX: usize = 4095;
/// Most capabilities of one request.
const CAPABILITIES_MAX: usize = 64;
/// A volume whose size nobody asked for.
pub const VOLUME_BYTES_DEFAULT: u64 = 1 << 30;
/// The largest volume: 1 PiB.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// The smallest volume without a file system.
const BLOCK_VOLUME_BYTES_MIN: u64 = 1 << 20;

/// Who may use a volume, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// ReadWriteOnce: pods of one node write (SINGLE_NODE_WRITER, SINGLE_NODE_MULTI_WRITER).
    NodeWriter,
    /// ReadWriteOncePod: one pod writes.
    PodWriter,
    /// Pods of one node read.
    NodeReader,
    /// ReadOnlyMany.
    ManyReaders,
}

impl Mode {
    /// Whether nobody writes.
    pub fn reads_only(self) -> bool {
        matches!(self, Self::NodeReader | Self::ManyReaders)
    }
}

/// What a volume is used as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A raw block device.
    Block,
    /// A mounted file system.
    Mount {
        /// None: the StorageClass' or the default.
        fs_type: Option<FsType>,
        /// As for mount(8).
        flags: Vec<String>,
    },
}

/// A checked capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Device or file system.
    pub access: Access,
    /// Who may use it.
    pub mode: Mode,
}

impl Capability {
    /// Whether it is a raw block device.
    pub fn is_block(&self) -> bool {
        self.access == Access::Block
    }
}

/// A required string of CSI's usual length.
pub fn required<'a>(field: &str, value: &'a str) -> Result<&'a str> {
    bounded(field, value, STRING_BYTES_MAX)
}

/// A required node id.
pub fn node_id(value: &str) -> Result<&str> {
    bounded("node_id", value, NODE_ID_BYTES_MAX)
}

fn bounded<'a>(field: &str, value: &'a str, bytes_max: usize) -> Result<&'a str> {
    if value.is_empty() {
        return Err(Error::invalid(field, "is missing"));
    }
    if value.len() > bytes_max {
        return Err(Error::invalid(
            field,
            format!("longer than {bytes_max} bytes"),
        ));
    }
    if value.contains(['\0', '\n']) {
        return Err(Error::invalid(
            field,
            "contains a zero byte or a line break",
        ));
    }
    Ok(value)
}

/// A required absolute path without `..`.
pub fn path<'a>(field: &str, value: &'a str) -> Result<&'a std::path::Path> {
    let path = std::path::Path::new(bounded(field, value, PATH_BYTES_MAX)?);
    let clean = path
        .components()
        .all(|c| !matches!(c, std::path::Component::ParentDir));
    if !path.is_absolute() || !clean || path.parent().is_none() {
        return Err(Error::invalid(
            field,
            format!("{value:?} is no absolute path of a directory below / without \"..\""),
        ));
    }
    Ok(path)
}

/// A required path; one that is not absolute is the path of nothing.
pub fn required_path<'a>(field: &str, value: &'a str) -> Result<&'a str> {
    bounded(field, value, PATH_BYTES_MAX)
}

/// A map of bounded size.
pub fn map(field: &str, map: &HashMap<String, String>) -> Result<()> {
    let bytes: usize = map.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > MAP_BYTES_MAX {
        return Err(Error::invalid(
            field,
            format!("larger than {MAP_BYTES_MAX} bytes"),
        ));
    }
    Ok(())
}

/// A required capability.
pub fn capability(field: &str, capability: Option<&VolumeCapability>) -> Result<Capability> {
    let capability = capability.ok_or_else(|| Error::invalid(field, "is missing"))?;
    let access = match &capability.access_type {
        None => {
            return Err(Error::invalid(
                format!("{field}.access_type"),
                "is missing; accepted: block, mount",
            ));
        }
        Some(AccessType::Block(_)) => Access::Block,
        Some(AccessType::Mount(mount)) => {
            let bytes: usize = mount.mount_flags.iter().map(String::len).sum();
            if bytes > MAP_BYTES_MAX {
                let why = format!("longer than {MAP_BYTES_MAX} bytes");
                return Err(Error::invalid(format!("{field}.mount.mount_flags"), why));
            }
            if !mount.volume_mount_group.is_empty() {
                return Err(Error::invalid(
                    format!("{field}.mount.volume_mount_group"),
                    "ext4 and xfs have no group for a whole mount; let kubelet apply fsGroup (fsGroupPolicy: File in \
                     the CSIDriver object)",
                ));
            }
            Access::Mount {
                fs_type: FsType::parse(&format!("{field}.mount.fs_type"), &mount.fs_type)?,
                flags: mount.mount_flags.clone(),
            }
        }
    };
    let wire = capability.access_mode.as_ref().map_or(0, |m| m.mode);
    let mode = mode(&format!("{field}.access_mode"), wire, &access)?;
    Ok(Capability { access, mode })
}

fn mode(field: &str, wire: i32, access: &Access) -> Result<Mode> {
    const ACCEPTED: &str = "accepted: SINGLE_NODE_WRITER, SINGLE_NODE_SINGLE_WRITER, SINGLE_NODE_MULTI_WRITER, \
         SINGLE_NODE_READER_ONLY, MULTI_NODE_READER_ONLY (in Kubernetes: ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany)";
    match Wire::try_from(wire) {
        Ok(Wire::SingleNodeWriter | Wire::SingleNodeMultiWriter) => Ok(Mode::NodeWriter),
        Ok(Wire::SingleNodeSingleWriter) => Ok(Mode::PodWriter),
        Ok(Wire::SingleNodeReaderOnly) => Ok(Mode::NodeReader),
        Ok(Wire::MultiNodeReaderOnly) => Ok(Mode::ManyReaders),
        Ok(Wire::MultiNodeMultiWriter) if *access == Access::Block => Err(Error::invalid(
            field,
            format!("ReadWriteMany raw block volumes are not supported yet; {ACCEPTED}"),
        )),
        Ok(Wire::MultiNodeMultiWriter | Wire::MultiNodeSingleWriter) => Err(Error::invalid(
            field,
            format!(
                "writers and readers on several nodes at a time would destroy the file system; {ACCEPTED}"
            ),
        )),
        Ok(Wire::Unknown) => Err(Error::invalid(field, format!("is missing; {ACCEPTED}"))),
        Err(_) => Err(Error::invalid(
            field,
            format!("{wire} is unknown; {ACCEPTED}"),
        )),
    }
}

/// All capabilities of a request; at least one.
pub fn capabilities(field: &str, all: &[VolumeCapability]) -> Result<Vec<Capability>> {
    if all.is_empty() {
        return Err(Error::invalid(field, "is missing"));
    }
    if all.len() > CAPABILITIES_MAX {
        return Err(Error::invalid(
            field,
            format!("more than {CAPABILITIES_MAX}"),
        ));
    }
    all.iter()
        .enumerate()
        .map(|(at, one)| capability(&format!("{field}[{at}]"), Some(one)))
        .collect()
}

/// A checked range of sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// At least so much; None: nobody asked.
    pub required: Option<u64>,
    /// At most so much.
    pub limit: Option<u64>,
}

impl Range {
    /// Reads a range.
    pub fn parse(range: Option<&CapacityRange>) -> Result<Self> {
        let Some(range) = range else {
            return Ok(Self {
                required: None,
                limit: None,
            });
        };
        let bytes = |field: &str, value: i64| match u64::try_from(value) {
            Ok(0) => Ok(None),
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => Err(Error::invalid(
                format!("capacity_range.{field}"),
                "is negative",
            )),
        };
        let parsed = Self {
            required: bytes("required_bytes", range.required_bytes)?,
            limit: bytes("limit_bytes", range.limit_bytes)?,
        };
        if let (Some(required), Some(limit)) = (parsed.required, parsed.limit)
            && required > limit
        {
            return Err(Error::invalid(
                "capacity_range",
                format!("required_bytes {required} is more than limit_bytes {limit}"),
            ));
        }
        Ok(parsed)
    }

    /// The size to make, of at least `min` bytes.
    pub fn choose(&self, min: u64) -> Result<u64> {
        let wanted = match (self.required, self.limit) {
            (Some(required), _) => required,
            (None, Some(limit)) => VOLUME_BYTES_DEFAULT.min(limit),
            (None, None) => VOLUME_BYTES_DEFAULT,
        };
        if wanted > VOLUME_BYTES_MAX {
            return Err(Error::OutOfRange(format!(
                "capacity_range.required_bytes: {wanted} is more than {VOLUME_BYTES_MAX} (1 PiB), the largest volume"
            )));
        }
        let block = BLOCK_SIZE as u64;
        // Down where a limit alone was given, else up to whole blocks.
        let wanted = match self.required {
            None => wanted - wanted % block,
            Some(_) => wanted.next_multiple_of(block),
        };
        let size = wanted.max(min);
        match self.limit {
            Some(limit) if size > limit => Err(Error::OutOfRange(format!(
                "capacity_range.limit_bytes: {limit} is less than {size}, the smallest volume that would do (sizes are \
                 multiples of {block} bytes, at least {min})"
            ))),
            _ => Ok(size),
        }
    }

    /// Whether an existing volume of this size will do.
    pub fn admits(&self, size: u64) -> bool {
        self.required.is_none_or(|r| size >= r) && self.limit.is_none_or(|l| size <= l)
    }
}

/// The smallest volume for these uses; `fs` is the file system of the StorageClass.
pub fn volume_bytes_min(capabilities: &[Capability], fs: Option<FsType>) -> u64 {
    let least = |capability: &Capability| match &capability.access {
        Access::Block => BLOCK_VOLUME_BYTES_MIN,
        Access::Mount { fs_type, .. } => fs_type.or(fs).unwrap_or_default().volume_bytes_min(),
    };
    capabilities
        .iter()
        .map(least)
        .max()
        .unwrap_or(BLOCK_VOLUME_BYTES_MIN)
}

/// Bytes for a message of CSI, whose sizes are signed.
pub fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::rpc::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use proptest::prelude::*;
    use tonic::Code;

    fn mount(mode: Wire) -> VolumeCapability {
        VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume::default())),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    fn block(mode: Wire) -> VolumeCapability {
        VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            ..mount(mode)
        }
    }

    fn range(required: i64, limit: i64) -> Result<Range> {
        Range::parse(Some(&CapacityRange {
            required_bytes: required,
            limit_bytes: limit,
        }))
    }

    #[test]
    fn strings_are_there_and_bounded() {
        assert!(required("name", "").is_err());
        assert!(required("name", &"x".repeat(129)).is_err());
        assert!(required("name", "a\nb").is_err());
        assert_eq!(required("name", &"x".repeat(128)).unwrap().len(), 128);
        assert!(node_id(&"x".repeat(256)).is_ok());
        assert!(node_id(&"x".repeat(257)).is_err());
    }

    #[test]
    fn paths_are_absolute_and_do_not_climb() {
        assert!(path("p", "/var/lib/kubelet/x").is_ok());
        for wrong in ["", "/", "some/path", "/a/../etc", "/a\0"] {
            let error = path("p", wrong).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{wrong}");
        }
        assert!(path("p", &format!("/{}", "x".repeat(300))).is_ok());
    }

    #[test]
    fn maps_are_bounded() {
        let of = |n: usize| HashMap::from([("k".to_owned(), "x".repeat(n))]);
        assert!(map("parameters", &of(4095)).is_ok());
        assert!(map("parameters", &of(4096)).is_err());
    }

    #[test]
    fn every_capability_is_checked_not_only_the_first() {
        let good = mount(Wire::SingleNodeWriter);
        assert!(capabilities("c", &[]).is_err());
        assert_eq!(
            capabilities("c", &[good.clone(), good.clone()])
                .unwrap()
                .len(),
            2
        );
        let error = capabilities("c", &[good, mount(Wire::MultiNodeMultiWriter)]).unwrap_err();
        assert!(error.to_string().starts_with("c[1].access_mode"), "{error}");
    }

    #[test]
    fn access_modes_are_read_or_refused_with_a_reason() {
        let mode = |c: VolumeCapability| capability("c", Some(&c)).map(|c| c.mode);
        assert_eq!(
            mode(mount(Wire::SingleNodeWriter)).unwrap(),
            Mode::NodeWriter
        );
        assert_eq!(
            mode(mount(Wire::SingleNodeMultiWriter)).unwrap(),
            Mode::NodeWriter
        );
        assert_eq!(
            mode(mount(Wire::SingleNodeSingleWriter)).unwrap(),
            Mode::PodWriter
        );
        assert_eq!(
            mode(block(Wire::MultiNodeReaderOnly)).unwrap(),
            Mode::ManyReaders
        );
        assert!(
            mode(mount(Wire::SingleNodeReaderOnly))
                .unwrap()
                .reads_only()
        );
        let error = mode(block(Wire::MultiNodeMultiWriter)).unwrap_err();
        assert!(
            error.to_string().contains("ReadWriteMany raw block"),
            "{error}"
        );
        assert_eq!(error.code(), Code::InvalidArgument);
        for wrong in [
            Wire::Unknown,
            Wire::MultiNodeSingleWriter,
            Wire::MultiNodeMultiWriter,
        ] {
            let error = mode(mount(wrong)).unwrap_err();
            assert!(error.to_string().contains("SINGLE_NODE_WRITER"), "{error}");
        }
        let mut unknown = mount(Wire::SingleNodeWriter);
        unknown.access_mode = Some(AccessMode { mode: 99 });
        assert!(mode(unknown).is_err());
        let mut absent = mount(Wire::SingleNodeWriter);
        absent.access_type = None;
        assert!(mode(absent).is_err());
        assert!(capability("c", None).is_err());
    }

    #[test]
    fn a_mount_group_and_an_unknown_file_system_are_refused() {
        let with = |change: fn(&mut MountVolume)| {
            let mut volume = MountVolume::default();
            change(&mut volume);
            let capability = VolumeCapability {
                access_type: Some(AccessType::Mount(volume)),
                ..mount(Wire::SingleNodeWriter)
            };
            super::capability("c", Some(&capability))
        };
        let error = with(|m| m.volume_mount_group = "1000".into()).unwrap_err();
        assert!(error.to_string().contains("fsGroupPolicy: File"), "{error}");
        let error = with(|m| m.fs_type = "btrfs".into()).unwrap_err();
        assert!(error.to_string().contains("ext4, xfs"), "{error}");
        assert!(with(|m| m.mount_flags = vec!["x".repeat(5000)]).is_err());
        let capability = with(|m| m.fs_type = "xfs".into()).unwrap();
        let Access::Mount { fs_type, .. } = capability.access else {
            panic!("mount");
        };
        assert_eq!(fs_type, Some(FsType::Xfs));
    }

    #[test]
    fn limits_are_honoured_after_rounding() {
        assert_eq!(range(4097, 0).unwrap().choose(0).unwrap(), 8192);
        assert_eq!(range(4097, 8192).unwrap().choose(0).unwrap(), 8192);
        let error = range(4097, 8191).unwrap().choose(0).unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange);
        // Below the file system's minimum: more is given, unless the limit forbids it.
        assert_eq!(
            range(4096, 0).unwrap().choose(300 << 20).unwrap(),
            300 << 20
        );
        assert!(range(4096, 4096).unwrap().choose(300 << 20).is_err());
    }

    #[test]
    fn sizes_nobody_asked_for_are_the_default_within_the_limit() {
        assert_eq!(Range::parse(None).unwrap().choose(0).unwrap(), 1 << 30);
        assert_eq!(range(0, 0).unwrap().choose(0).unwrap(), 1 << 30);
        assert_eq!(range(0, 5000).unwrap().choose(0).unwrap(), 4096);
        assert_eq!(range(0, 1 << 40).unwrap().choose(0).unwrap(), 1 << 30);
    }

    #[test]
    fn senseless_ranges_are_refused() {
        assert_eq!(range(-1, 0).unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(range(0, -1).unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(range(2, 1).unwrap_err().code(), Code::InvalidArgument);
        let error = range((1 << 50) + 1, 0).unwrap().choose(0).unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange);
        assert!(range(i64::MAX, 0).unwrap().choose(0).is_err());
    }

    #[test]
    fn the_minimum_follows_the_file_system() {
        let one = |c: VolumeCapability| vec![capability("c", Some(&c)).unwrap()];
        let ext4 = one(mount(Wire::SingleNodeWriter));
        assert_eq!(volume_bytes_min(&ext4, None), 16 << 20);
        assert_eq!(volume_bytes_min(&ext4, Some(FsType::Xfs)), 300 << 20);
        assert_eq!(
            volume_bytes_min(&one(block(Wire::SingleNodeWriter)), Some(FsType::Xfs)),
            1 << 20
        );
    }

    proptest! {
        #[test]
        fn a_chosen_size_is_admitted_and_whole(
            required in 0_i64..(1 << 42), room in 0_i64..(1 << 42), min in 0_u64..10
        ) {
            let min = min << 20;
            let range = range(required, required.saturating_add(room)).unwrap();
            if let Ok(size) = range.choose(min) {
                prop_assert!(range.admits(size) && size % 4096 == 0 && size >= min);
            }
        }
    }
}
