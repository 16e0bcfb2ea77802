//! StorageClass parameters, and their way into a volume's labels and its volume context.
//!
//! Invariants: an unknown or malformed parameter is refused, with the key and what is accepted; what a volume was
//! made with is kept in its labels, so that any controller answers the same volume context at any time; the
//! volume context holds no secret and nothing that changes.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::errors::{Error, Result};

/// `csi.storage.k8s.io/fstype`
pub const FS_TYPE: &str = "csi.storage.k8s.io/fstype";
const POOL: &str = "pool";
const REPLICAS: &str = "replicas";
const MIN_REPLICAS: &str = "minReplicas";
const MKFS_OPTIONS: &str = "mkfsOptions";
const BLOCK_SIZE: &str = "blockSize";
const PLACEMENT: &str = "placement";
/// What external-provisioner adds with --extra-create-metadata; kept as labels for people.
const METADATA_KEYS: [&str; 3] = [
    "csi.storage.k8s.io/pvc/name",
    "csi.storage.k8s.io/pvc/namespace",
    "csi.storage.k8s.io/pv/name",
];
const ACCEPTED: &str = "pool (a pool's name), replicas (1 to 5), minReplicas (1 to replicas), \
     csi.storage.k8s.io/fstype (ext4 or xfs), mkfsOptions (options of mkfs, separated by spaces), blockSize (512 or \
     4096), placement (spread or local)";

/// Most replicas.
const REPLICAS_MAX: u32 = 5;
/// Longest mkfsOptions: what a label holds.
const MKFS_OPTIONS_BYTES_MAX: usize = 320;
/// Longest name of a pool.
const POOL_BYTES_MAX: usize = 128;

/// Prefix of the labels that this driver gives to volumes.
const LABEL: &str = "csi.ashlar.io/";
/// Label with the CSI name.
pub const NAME_LABEL: &str = "csi.ashlar.io/name";

/// A file system that the driver makes and mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FsType {
    /// ext4, the default.
    #[default]
    Ext4,
    /// XFS.
    Xfs,
}

impl FsType {
    /// Its name, as mount(2) knows it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }

    /// Reads a name; `field` is where it came from. None if it is empty.
    pub fn parse(field: &str, text: &str) -> Result<Option<Self>> {
        match text {
            "" => Ok(None),
            "ext4" => Ok(Some(Self::Ext4)),
            "xfs" => Ok(Some(Self::Xfs)),
            other => Err(Error::invalid(
                field,
                format!("{other:?} is not supported; accepted: ext4, xfs"),
            )),
        }
    }

    /// The smallest volume that it fits on.
    pub const fn volume_bytes_min(self) -> u64 {
        match self {
            Self::Ext4 => 16 << 20,
            // mkfs.xfs refuses less.
            Self::Xfs => 300 << 20,
        }
    }
}

impl fmt::Display for FsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the replicas go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Placement {
    /// Wherever the planner likes, one of them near the consumer if that is possible.
    #[default]
    Spread,
    /// One replica on the consuming node, or no volume.
    Local,
}

/// Parsed parameters.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Parameters {
    /// The pool's name; None: the only pool.
    pub pool: Option<String>,
    /// None: the pool's.
    pub replicas: Option<u32>,
    /// None: by the number of replicas.
    pub min_replicas: Option<u32>,
    /// None: the capability's, or the default.
    pub fs_type: Option<FsType>,
    /// Words for mkfs.
    pub mkfs_options: Option<String>,
    /// Logical block size of the device.
    pub block_size: Option<u32>,
    /// Where the replicas go.
    pub placement: Placement,
    /// Names of the claim and the volume in Kubernetes.
    pub origin: BTreeMap<String, String>,
}

impl Parameters {
    /// Reads a StorageClass' parameters.
    pub fn parse(map: &HashMap<String, String>) -> Result<Self> {
        let mut parameters = Self::default();
        // In order, so that the same mistake gives the same message.
        for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
            parameters.set(key, value)?;
        }
        if let (Some(min), Some(replicas)) = (parameters.min_replicas, parameters.replicas)
            && min > replicas
        {
            return Err(bad(
                MIN_REPLICAS,
                &min.to_string(),
                "1 to the value of replicas",
            ));
        }
        Ok(parameters)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            POOL => {
                if value.is_empty() || value.len() > POOL_BYTES_MAX {
                    return Err(bad(POOL, value, "the name of a pool"));
                }
                self.pool = Some(value.to_owned());
            }
            REPLICAS => self.replicas = Some(number(REPLICAS, value, 1, REPLICAS_MAX)?),
            MIN_REPLICAS => self.min_replicas = Some(number(MIN_REPLICAS, value, 1, REPLICAS_MAX)?),
            FS_TYPE => self.fs_type = FsType::parse(&format!("parameters[{FS_TYPE}]"), value)?,
            MKFS_OPTIONS => {
                let good = value.len() <= MKFS_OPTIONS_BYTES_MAX
                    && value.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
                if !good {
                    let accepted =
                        "at most 320 printable ASCII characters, words separated by spaces";
                    return Err(bad(MKFS_OPTIONS, value, accepted));
                }
                let words: Vec<&str> = value.split_whitespace().collect();
                self.mkfs_options = (!words.is_empty()).then(|| words.join(" "));
            }
            BLOCK_SIZE => {
                self.block_size = Some(match value {
                    "512" => 512,
                    "4096" => 4096,
                    _ => return Err(bad(BLOCK_SIZE, value, "512, 4096")),
                });
            }
            PLACEMENT => {
                self.placement = match value {
                    "spread" => Placement::Spread,
                    "local" => Placement::Local,
                    _ => return Err(bad(PLACEMENT, value, "spread, local")),
                }
            }
            key if METADATA_KEYS.contains(&key) => {
                if value.len() > MKFS_OPTIONS_BYTES_MAX {
                    return Err(bad(key, value, "at most 320 bytes"));
                }
                self.origin.insert(key.to_owned(), value.to_owned());
            }
            unknown => {
                return Err(Error::invalid(
                    format!("parameters[{}]", shown(unknown)),
                    format!("unknown parameter; accepted: {ACCEPTED}"),
                ));
            }
        }
        Ok(())
    }

    /// The labels of a volume with these parameters.
    pub fn labels(&self, csi_name: &str) -> HashMap<String, String> {
        let mut labels: HashMap<String, String> = self.origin.clone().into_iter().collect();
        labels.insert(NAME_LABEL.to_owned(), csi_name.to_owned());
        for (key, value) in self.volume_context() {
            labels.insert(format!("{LABEL}{key}"), value);
        }
        if self.placement == Placement::Local {
            labels.insert(format!("{LABEL}{PLACEMENT}"), "local".to_owned());
        }
        labels
    }

    /// What the node service needs to know.
    pub fn volume_context(&self) -> HashMap<String, String> {
        let mut context = HashMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                context.insert(key.to_owned(), value);
            }
        };
        put("fsType", self.fs_type.map(|f| f.to_string()));
        put(MKFS_OPTIONS, self.mkfs_options.clone());
        put(BLOCK_SIZE, self.block_size.map(|b| b.to_string()));
        context
    }
}

/// The volume context of a volume, from its labels.
pub fn context_of_labels(labels: &HashMap<String, String>) -> HashMap<String, String> {
    ["fsType", MKFS_OPTIONS, BLOCK_SIZE]
        .into_iter()
        .filter_map(|key| {
            Some((
                key.to_owned(),
                labels.get(&format!("{LABEL}{key}"))?.clone(),
            ))
        })
        .collect()
}

/// What the node service reads from a volume context.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct VolumeContext {
    /// Of the StorageClass.
    pub fs_type: Option<FsType>,
    /// Words for mkfs.
    pub mkfs_options: Vec<String>,
    /// Logical block size of the device; 0: default.
    pub block_size: u32,
}

impl VolumeContext {
    /// Reads it. Keys that others added (as `storage.kubernetes.io/...`) are passed over.
    pub fn parse(map: &HashMap<String, String>) -> Result<Self> {
        let mut own = HashMap::new();
        for key in [MKFS_OPTIONS, BLOCK_SIZE] {
            if let Some(value) = map.get(key) {
                own.insert(key.to_owned(), value.clone());
            }
        }
        if let Some(value) = map.get("fsType") {
            own.insert(FS_TYPE.to_owned(), value.clone());
        }
        let parameters = Parameters::parse(&own)?;
        let words = parameters.mkfs_options.unwrap_or_default();
        Ok(Self {
            fs_type: parameters.fs_type,
            mkfs_options: words.split_whitespace().map(str::to_owned).collect(),
            block_size: parameters.block_size.unwrap_or(0),
        })
    }
}

fn number(key: &str, value: &str, min: u32, max: u32) -> Result<u32> {
    // Digits only: parse() would take "+3" too.
    let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    match value.parse::<u32>() {
        Ok(number) if digits && (min..=max).contains(&number) => Ok(number),
        _ => Err(bad(key, value, &format!("{min} to {max}"))),
    }
}

fn bad(key: &str, value: &str, accepted: &str) -> Error {
    Error::invalid(
        format!("parameters[{key}]"),
        format!("{:?} is not valid; accepted: {accepted}", shown(value)),
    )
}

/// A text for a message, cut.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tonic::Code;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn every_parameter_is_read() {
        let parameters = Parameters::parse(&map(&[
            ("pool", "fast"),
            ("replicas", "3"),
            ("minReplicas", "2"),
            (FS_TYPE, "xfs"),
            ("mkfsOptions", "-m  reflink=0 "),
            ("blockSize", "4096"),
            ("placement", "local"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ]))
        .unwrap();
        assert_eq!(parameters.pool.as_deref(), Some("fast"));
        assert_eq!(
            (parameters.replicas, parameters.min_replicas),
            (Some(3), Some(2))
        );
        assert_eq!(parameters.fs_type, Some(FsType::Xfs));
        assert_eq!(parameters.mkfs_options.as_deref(), Some("-m reflink=0"));
        assert_eq!(parameters.block_size, Some(4096));
        assert_eq!(parameters.placement, Placement::Local);
        let labels = parameters.labels("pvc-1");
        assert_eq!(labels["csi.ashlar.io/name"], "pvc-1");
        assert_eq!(labels["csi.ashlar.io/placement"], "local");
        assert_eq!(labels["csi.storage.k8s.io/pvc/name"], "data");
        // Any controller finds the same context again.
        assert_eq!(context_of_labels(&labels), parameters.volume_context());
        let context = VolumeContext::parse(&parameters.volume_context()).unwrap();
        assert_eq!(context.mkfs_options, ["-m", "reflink=0"]);
        assert_eq!(
            (context.fs_type, context.block_size),
            (Some(FsType::Xfs), 4096)
        );
    }

    #[test]
    fn nothing_given_is_the_default() {
        let parameters = Parameters::parse(&HashMap::new()).unwrap();
        assert_eq!(parameters, Parameters::default());
        assert!(parameters.volume_context().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_accepted() {
        let cases = [
            ("replicas", "0", "1 to 5"),
            ("replicas", "six", "1 to 5"),
            ("replicas", "+3", "1 to 5"),
            ("replicas", "", "1 to 5"),
            ("minReplicas", "6", "1 to 5"),
            (FS_TYPE, "btrfs", "ext4, xfs"),
            ("blockSize", "1024", "512, 4096"),
            ("placement", "near", "spread, local"),
            ("mkfsOptions", "a\nb", "printable"),
            ("pool", "", "name of a pool"),
            ("Pool", "x", "pool (a pool's name)"),
            ("replica", "3", "replicas (1 to 5)"),
        ];
        for (key, value, accepted) in cases {
            let error = Parameters::parse(&map(&[(key, value)])).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{key}={value}");
            let text = error.to_string();
            assert!(text.contains(key) && text.contains(accepted), "{text}");
        }
    }

    #[test]
    fn fewer_replicas_than_the_minimum_are_refused() {
        let error =
            Parameters::parse(&map(&[("replicas", "1"), ("minReplicas", "2")])).unwrap_err();
        assert!(error.to_string().contains("minReplicas"), "{error}");
    }

    #[test]
    fn foreign_keys_of_a_volume_context_do_no_harm() {
        let key = "storage.kubernetes.io/csiProvisionerIdentity";
        let context = VolumeContext::parse(&map(&[(key, "x"), ("fsType", "ext4")])).unwrap();
        assert_eq!(context.fs_type, Some(FsType::Ext4));
        assert!(VolumeContext::parse(&map(&[("fsType", "ntfs")])).is_err());
    }
}
