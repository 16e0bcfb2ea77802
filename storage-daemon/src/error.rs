//! Errors of the daemon outside its engines: disks that cannot be used, identities, services.

use std::io;
use std::path::PathBuf;

use ashlar_platform::disk::DiskOpenError;
use ashlar_proto::ids::{ClusterId, DiskId};

use crate::format::FormatError;
use crate::store::StoreError;

/// Why a disk is not formatted, opened or served.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file or device.
    #[error(transparent)]
    Open(#[from] DiskOpenError),
    /// Reading or writing it.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The disk.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// `format` found data of somebody else.
    #[error(
        "{path}: holds data of something else; erase it, or format with --force if it may be lost"
    )]
    Foreign {
        /// The disk.
        path: PathBuf,
    },
    /// `format` found an Ashlar disk.
    #[error(
        "{path}: is the Ashlar disk {disk} already; format with --force if its data may be lost"
    )]
    Formatted {
        /// The disk.
        path: PathBuf,
        /// Its identity.
        disk: DiskId,
    },
    /// `serve` found no Ashlar disk.
    #[error("{path}: is not an Ashlar disk; format it with `storage-daemon format {path}`")]
    NotFormatted {
        /// The disk.
        path: PathBuf,
    },
    /// Its superblocks are damaged.
    #[error(
        "{path}: both superblocks are damaged ({source}); rebuild its replicas onto another disk"
    )]
    Damaged {
        /// The disk.
        path: PathBuf,
        /// What is wrong with the first.
        #[source]
        source: FormatError,
    },
    /// It belongs to another cluster.
    #[error("{path}: belongs to cluster {theirs}, this daemon to {ours}")]
    OtherCluster {
        /// The disk.
        path: PathBuf,
        /// In the superblock.
        theirs: ClusterId,
        /// As the metadata members say.
        ours: ClusterId,
    },
    /// The store refused.
    #[error("{path}: {source}")]
    Store {
        /// The disk.
        path: PathBuf,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The disk's thread could not be started or ended.
    #[error("{path}: {message}")]
    Thread {
        /// The disk.
        path: PathBuf,
        /// What happened.
        message: String,
    },
    /// The daemon serves it already.
    #[error("{path}: is served already")]
    AlreadyServed {
        /// The disk.
        path: PathBuf,
    },
    /// The daemon's list of disks cannot be kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Why the node's identity cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Its contents.
    #[error("{path}: not a node file: {source}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// Its version.
    #[error("{path}: version {version} is of a newer release")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}
