//! What can go wrong with a repository, told apart by what a user can do about it.

use std::path::PathBuf;

/// Result of an operation on a repository.
pub type Result<T> = std::result::Result<T, BackupError>;

/// Why an operation on a repository failed.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The storage failed (after the retries of its client).
    #[error("the object storage failed at {name}: {source}")]
    Storage {
        /// Object or prefix.
        name: String,
        /// What the storage said.
        #[source]
        source: object_store::Error,
    },
    /// The address of a repository makes no sense.
    #[error("{url:?} is not an address of a repository: {reason}")]
    Url {
        /// As given.
        url: String,
        /// Why not.
        reason: String,
    },
    /// There is no repository at the address.
    #[error("there is no backup repository at {0}")]
    NoRepository(String),
    /// A file with a key cannot be used.
    #[error("the key file {path}: {reason}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The repository is encrypted, and no key was given.
    #[error("the repository is encrypted: give its key with --key-file")]
    KeyMissing,
    /// A key was given for a repository without encryption.
    #[error("the repository is not encrypted: leave out --key-file")]
    KeyUnused,
    /// The key is another one.
    #[error("the key is not the one of this repository (which has key id {expected})")]
    KeyWrong {
        /// Id of the right key.
        expected: String,
    },
    /// An object is not what it was when it was stored.
    #[error("{name} is damaged: {damage}")]
    Damaged {
        /// The object.
        name: String,
        /// How.
        #[source]
        damage: Damage,
    },
    /// An object that a backup needs is gone.
    #[error("{0} is missing")]
    Missing(String),
    /// The repository was made by a newer version.
    #[error(
        "{name} has format {found}; this version of ashlar knows formats up to {known}: use a newer one"
    )]
    TooNew {
        /// The object.
        name: String,
        /// Its format.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// No backup has this id.
    #[error("no backup {0:?} is in the repository")]
    NoBackup(String),
    /// Several backups match.
    #[error("several backups match {0:?}: give the whole id")]
    Ambiguous(String),
    /// Somebody else works on the repository in a way that excludes this.
    #[error("the repository is in use: {holder} (since {age_seconds} s)")]
    Locked {
        /// Who, and what for.
        holder: String,
        /// Since when its lock is there.
        age_seconds: u64,
    },
    /// The lock of this operation is gone: it stood still for too long.
    #[error(
        "this operation stood still for so long that its lock on the repository was taken away; run it again"
    )]
    LockLost,
    /// A backup that others need to judge what is garbage cannot be read.
    #[error("what {name} needs is not known, so nothing can be called garbage: {reason}")]
    GarbageUnknown {
        /// The manifest or page.
        name: String,
        /// Why it cannot be read.
        reason: String,
    },
    /// What is backed up, or restored to, failed.
    #[error("{doing}: {source}")]
    Volume {
        /// What was being done.
        doing: String,
        /// What the other side said.
        #[source]
        source: std::io::Error,
    },
    /// A worker thread ended.
    #[error("a worker of this process failed: {0}")]
    Worker(String),
    /// What is asked for does not fit together.
    #[error("{0}")]
    Mismatch(String),
}

impl BackupError {
    /// Of a storage's answer for an object.
    pub(super) fn storage(name: impl ToString, source: object_store::Error) -> Self {
        if matches!(source, object_store::Error::NotFound { .. }) {
            return Self::Missing(name.to_string());
        }
        Self::Storage {
            name: name.to_string(),
            source,
        }
    }

    /// Of an object.
    pub(super) fn damaged(name: impl Into<String>, damage: Damage) -> Self {
        Self::Damaged {
            name: name.into(),
            damage,
        }
    }

    /// Whether an object is the cause, and other objects may still be well.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::Missing(_) | Self::TooNew { .. }
        )
    }
}

/// How an object is damaged.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Damage {
    /// Shorter than its header says, or longer.
    #[error("it has {found} bytes where {expected} are expected")]
    Length {
        /// By its header, or the header itself.
        expected: u64,
        /// As stored.
        found: u64,
    },
    /// Longer than such an object can be.
    #[error("it has {found} bytes, and at most {limit} are possible")]
    TooLong {
        /// As stored.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// No object of ours.
    #[error("it does not begin as an object of a backup repository")]
    Magic,
    /// A field of the header has a value that does not exist.
    #[error("its header has an impossible {0}")]
    Header(&'static str),
    /// The checksum of the stored bytes differs.
    #[error("its checksum is wrong")]
    Checksum,
    /// Stored in the clear in an encrypted repository.
    #[error("it is not encrypted, as everything in this repository is")]
    NotEncrypted,
    /// The cipher refuses it.
    #[error("it was not encrypted with this repository's key under this name")]
    Cipher,
    /// It cannot be unpacked.
    #[error("it cannot be unpacked")]
    Unpack,
    /// The content has another hash than its name says.
    #[error("its content is not what its name says")]
    Content,
    /// The content makes no sense.
    #[error("{0}")]
    Nonsense(String),
}
