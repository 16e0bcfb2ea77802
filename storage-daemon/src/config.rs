//! Settings of `storage-daemon serve`, and what the node remembers in its data directory: its identity,
//! and its disks with the ports that they were served on.
//!
//! Invariants:
//! - The node file is replaced as a whole (written beside, synced, renamed), so it is old or new.
//! - A disk keeps its port over restarts where it can, so that clients find it again at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ashlar_proto::ids::NodeId;
use serde::{Deserialize, Serialize};

use crate::error::IdentityError;

/// Version of the node file that this build writes.
const NODE_FILE_VERSION: u32 = 1;

/// Where the data protocol listens: an address, and the port of the first disk (0: any port).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataListen {
    /// The address.
    pub ip: IpAddr,
    /// Port of the first disk; the others follow. 0: any.
    pub port_base: u16,
}

impl FromStr for DataListen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self {
                ip: address.ip(),
                port_base: address.port(),
            });
        }
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        bare.parse::<IpAddr>()
            .map(|ip| Self { ip, port_base: 0 })
            .map_err(|_| format!("{text:?} is neither an IP address nor IP:PORT"))
    }
}

/// Whether space that becomes free is given back to the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum DiscardPolicy {
    /// To block devices, and to files that have holes; a file that was allocated in full stays so.
    #[default]
    Auto,
    /// Always; disks that take no discards are noticed.
    On,
    /// Never.
    Off,
}

/// A label, `key=value`.
pub fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

/// Settings of `serve`.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// `host:port` of the metadata members.
    pub metadata: Vec<String>,
    /// Unique name of the node.
    pub node_name: String,
    /// Labels of the node.
    pub labels: BTreeMap<String, String>,
    /// Where identity and list of disks are kept.
    pub data_dir: PathBuf,
    /// Where the administration listens.
    pub admin_listen: SocketAddr,
    /// Where the data protocol listens.
    pub data_listen: DataListen,
    /// The address that others reach this node by, where it listens on all.
    pub advertise: Option<IpAddr>,
    /// Where each disk has a unix socket as well.
    pub local_sockets: Option<PathBuf>,
    /// Disks of the command line.
    pub disks: Vec<PathBuf>,
    /// Cache of page metadata per disk, in bytes.
    pub cache_bytes: usize,
    /// What becomes of free space.
    pub discard: DiscardPolicy,
}

impl ServeConfig {
    /// An address as others reach it.
    pub fn advertised(&self, listening: SocketAddr) -> SocketAddr {
        match self.advertise {
            Some(ip) => SocketAddr::new(ip, listening.port()),
            None => listening,
        }
    }
}

/// A disk that the node serves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskEntry {
    /// The file or device.
    pub path: PathBuf,
    /// Port that it was last served on.
    pub port: Option<u16>,
    /// Added by `AddDisk`, not on the command line.
    pub added: bool,
    /// Labels of the disk.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What a node remembers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeFile {
    version: u32,
    /// As text, for people who look at the file.
    #[serde(with = "id_as_text")]
    node_id: NodeId,
    disks: Vec<DiskEntry>,
    #[serde(skip)]
    path: PathBuf,
}

mod id_as_text {
    use ashlar_proto::ids::NodeId;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(id: &NodeId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NodeId, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl NodeFile {
    /// Reads the node's file, or draws an identity and writes the first one.
    pub fn open(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join("node.json");
        let io = |action| {
            let path = path.clone();
            move |source| IdentityError::Io {
                path,
                action,
                source,
            }
        };
        std::fs::create_dir_all(data_dir).map_err(io("create its directory"))?;
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let file = Self {
                    version: NODE_FILE_VERSION,
                    node_id: NodeId::generate(),
                    disks: Vec::new(),
                    path,
                };
                file.save()?;
                return Ok(file);
            }
            Err(error) => return Err(io("read")(error)),
        };
        let mut file: Self =
            serde_json::from_slice(&text).map_err(|source| IdentityError::Malformed {
                path: path.clone(),
                source,
            })?;
        if file.version > NODE_FILE_VERSION {
            return Err(IdentityError::Version {
                path,
                version: file.version,
            });
        }
        file.path = path;
        Ok(file)
    }

    /// The node's identity.
    pub fn node(&self) -> NodeId {
        self.node_id
    }

    /// The disks.
    pub fn disks(&self) -> &[DiskEntry] {
        &self.disks
    }

    /// The entry of a disk; made if there is none, with the next free port.
    pub fn disk(&mut self, path: &Path, listen: DataListen, added: bool) -> DiskEntry {
        if let Some(entry) = self.disks.iter().find(|d| d.path == path) {
            return entry.clone();
        }
        let used: BTreeSet<u16> = self.disks.iter().filter_map(|d| d.port).collect();
        let port = match listen.port_base {
            0 => None,
            base => (base..=u16::MAX).find(|port| !used.contains(port)),
        };
        let entry = DiskEntry {
            path: path.to_owned(),
            port,
            added,
            labels: BTreeMap::new(),
        };
        self.disks.push(entry.clone());
        entry
    }

    /// Changes a disk's entry and keeps the file.
    pub fn update(
        &mut self,
        path: &Path,
        change: impl FnOnce(&mut DiskEntry),
    ) -> Result<(), IdentityError> {
        if let Some(entry) = self.disks.iter_mut().find(|d| d.path == path) {
            change(entry);
        }
        self.save()
    }

    /// Forgets a disk.
    pub fn remove(&mut self, path: &Path) -> Result<(), IdentityError> {
        self.disks.retain(|d| d.path != path);
        self.save()
    }

    /// Forgets the disks that were on an earlier command line and are not on this one.
    pub fn retain_served(&mut self, command_line: &[PathBuf]) {
        self.disks
            .retain(|d| d.added || command_line.contains(&d.path));
    }

    /// Writes the file.
    pub fn save(&self) -> Result<(), IdentityError> {
        let io = |action| {
            move |source| IdentityError::Io {
                path: self.path.clone(),
                action,
                source,
            }
        };
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|source| IdentityError::Malformed {
                path: self.path.clone(),
                source,
            })?;
        text.push(b'\n');
        let beside = self.path.with_extension("json.new");
        let mut file = std::fs::File::create(&beside).map_err(io("create beside"))?;
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .map_err(io("write"))?;
        std::fs::rename(&beside, &self.path).map_err(io("replace"))?;
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::File::open(directory)
            .and_then(|d| d.sync_all())
            .map_err(io("sync the directory of"))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn identity_and_ports_survive() {
        let dir = tempfile::tempdir().unwrap();
        let listen: DataListen = "127.0.0.1:7300".parse().unwrap();
        let mut file = NodeFile::open(dir.path()).unwrap();
        assert_eq!(file.disk(Path::new("/a"), listen, false).port, Some(7300));
        assert_eq!(file.disk(Path::new("/b"), listen, true).port, Some(7301));
        file.update(Path::new("/b"), |d| d.port = Some(9)).unwrap();
        let again = NodeFile::open(dir.path()).unwrap();
        assert_eq!(again.node(), file.node());
        assert_eq!(again.disks(), file.disks());
        file.retain_served(&[]);
        assert_eq!(file.disks().len(), 1);
    }

    #[test]
    fn a_file_of_a_newer_release_and_nonsense_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(
            NodeFile::open(dir.path()),
            Err(IdentityError::Malformed { .. })
        ));
        std::fs::remove_file(&path).unwrap();
        let file = NodeFile::open(dir.path()).unwrap();
        let newer = NodeFile { version: 2, ..file };
        newer.save().unwrap();
        assert!(matches!(
            NodeFile::open(dir.path()),
            Err(IdentityError::Version { .. })
        ));
    }

    #[test]
    fn addresses_parse_with_and_without_a_port() {
        let any: DataListen = "10.0.0.1".parse().unwrap();
        assert_eq!(any.port_base, 0);
        let v6: DataListen = "[::1]:80".parse().unwrap();
        assert_eq!(v6.port_base, 80);
        assert!("host:80".parse::<DataListen>().is_err());
        assert_eq!(parse_label("a=b=c").unwrap(), ("a".into(), "b=c".into()));
        assert!(parse_label("=x").is_err());
    }
}
