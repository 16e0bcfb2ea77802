//! The key of a repository: read from a file, stretched if it is a passphrase, and split into keys for each purpose.
//!
//! Invariants:
//! - No key is shown, logged or stored; a repository keeps a salt, the parameters of the stretching and the key's id.
//! - Parameters come from the repository, which may be hostile: they are bounded before memory is taken.

use std::fmt;
use std::path::Path;

use super::error::{BackupError, Result};
use super::id::{hex, parse_hex};

/// Longest key file.
const FILE_BYTES_MAX: u64 = 4096;
/// Shortest passphrase.
const PASSPHRASE_BYTES_MIN: usize = 12;
/// Bounds of Argon2id's parameters, as read from a repository.
const MEMORY_KIB_MAX: u32 = 1024 * 1024;
const PASSES_MAX: u32 = 32;
/// Argon2id's parameters of a new repository: 64 MiB, 3 passes, one lane.
const MEMORY_KIB: u32 = 64 * 1024;
const PASSES: u32 = 3;

/// What a key file holds.
#[derive(Clone)]
pub enum Secret {
    /// 32 random bytes.
    Raw([u8; 32]),
    /// Words that a person chose.
    Passphrase(Vec<u8>),
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// Reads a key file: 32 bytes, 64 hexadecimal digits, or else a passphrase (its last line end does not belong to it).
    ///
    /// # Errors
    /// The file cannot be read, is longer than 4 KiB, or holds a passphrase of fewer than 12 bytes.
    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |reason: String| BackupError::KeyFile {
            path: path.to_owned(),
            reason,
        };
        let length = std::fs::metadata(path)
            .map_err(|e| wrong(e.to_string()))?
            .len();
        if length > FILE_BYTES_MAX {
            return Err(wrong(format!("longer than {FILE_BYTES_MAX} bytes")));
        }
        let content = std::fs::read(path).map_err(|e| wrong(e.to_string()))?;
        Self::parse(&content).map_err(wrong)
    }

    fn parse(content: &[u8]) -> std::result::Result<Self, String> {
        let printable = content.iter().all(|b| (0x20..0x7f).contains(b));
        if let (Ok(raw), false) = (<[u8; 32]>::try_from(content), printable) {
            return Ok(Self::Raw(raw));
        }
        let text = content.strip_suffix(b"\n").unwrap_or(content);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let digits = std::str::from_utf8(text).ok();
        if let Some(raw) = digits.and_then(|t| parse_hex(&t.to_ascii_lowercase())) {
            return Ok(Self::Raw(raw));
        }
        if text.len() < PASSPHRASE_BYTES_MIN {
            return Err(format!(
                "a passphrase of fewer than {PASSPHRASE_BYTES_MIN} bytes (or no key of 32 bytes, which \
                 `head -c 32 /dev/urandom` makes)"
            ));
        }
        Ok(Self::Passphrase(text.to_vec()))
    }
}

/// How a repository's key is made of the secret.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct KeySpec {
    /// `raw` or `argon2id`.
    pub derivation: String,
    /// 16 bytes, in hexadecimal digits.
    pub salt: String,
    /// Argon2id: memory.
    pub memory_kib: u32,
    /// Argon2id: passes.
    pub passes: u32,
    /// What tells this key from others, and says nothing about it.
    pub key_id: String,
}

/// The keys of an encrypted repository.
#[derive(Clone)]
pub struct Keys {
    /// Of the cipher.
    pub(super) encryption: [u8; 32],
    /// Of the nonces.
    pub(super) nonces: [u8; 32],
    /// Of the names of content.
    pub(super) names: [u8; 32],
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl Keys {
    /// For a new repository.
    ///
    /// # Errors
    /// The stretching failed.
    pub fn create(secret: &Secret) -> Result<(KeySpec, Self)> {
        let (derivation, memory_kib, passes) = match secret {
            Secret::Raw(_) => ("raw", 0, 0),
            Secret::Passphrase(_) => ("argon2id", MEMORY_KIB, PASSES),
        };
        let mut spec = KeySpec {
            derivation: derivation.to_owned(),
            salt: hex(uuid::Uuid::new_v4().as_bytes()),
            memory_kib,
            passes,
            key_id: String::new(),
        };
        let master = master(&spec, secret)?;
        spec.key_id = key_id(&master);
        Ok((spec, Self::split(&master)))
    }

    /// For a repository that says `spec`.
    ///
    /// # Errors
    /// Another key, or parameters that nobody chose.
    pub fn open(spec: &KeySpec, secret: &Secret) -> Result<Self> {
        let fits = match secret {
            Secret::Raw(_) => spec.derivation == "raw",
            Secret::Passphrase(_) => spec.derivation == "argon2id",
        };
        let wrong = || BackupError::KeyWrong {
            expected: spec.key_id.clone(),
        };
        if !fits {
            return Err(wrong());
        }
        let master = master(spec, secret)?;
        if key_id(&master) != spec.key_id {
            return Err(wrong());
        }
        Ok(Self::split(&master))
    }

    fn split(master: &[u8; 32]) -> Self {
        Self {
            encryption: blake3::derive_key("ashlar backup 1: encryption", master),
            nonces: blake3::derive_key("ashlar backup 1: nonces", master),
            names: blake3::derive_key("ashlar backup 1: names", master),
        }
    }
}

/// The key of the names of content in a repository without encryption.
pub(super) fn public_names() -> [u8; 32] {
    blake3::derive_key("ashlar backup 1: names without encryption", b"")
}

fn key_id(master: &[u8; 32]) -> String {
    let id = blake3::derive_key("ashlar backup 1: key id", master);
    hex(&id[..8])
}

fn master(spec: &KeySpec, secret: &Secret) -> Result<[u8; 32]> {
    let mismatch = |what: &str| BackupError::Mismatch(format!("the repository's key has {what}"));
    let salt: [u8; 16] = parse_hex(&spec.salt).ok_or_else(|| mismatch("no proper salt"))?;
    match secret {
        // The salt makes each repository's keys its own.
        Secret::Raw(raw) => Ok(*blake3::keyed_hash(raw, &salt).as_bytes()),
        Secret::Passphrase(words) => {
            if spec.memory_kib > MEMORY_KIB_MAX || spec.passes > PASSES_MAX {
                return Err(mismatch("parameters of Argon2id beyond all reason"));
            }
            let parameters = argon2::Params::new(spec.memory_kib, spec.passes, 1, Some(32))
                .map_err(|e| mismatch(&format!("impossible parameters of Argon2id: {e}")))?;
            let argon = argon2::Argon2::new(
                argon2::Algorithm::Argon2id,
                argon2::Version::V0x13,
                parameters,
            );
            let mut master = [0; 32];
            argon
                .hash_password_into(words, &salt, &mut master)
                .map_err(|e| mismatch(&format!("a key that cannot be stretched: {e}")))?;
            Ok(master)
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn key_files_are_bytes_digits_or_words() {
        let raw = |c: &[u8]| matches!(Secret::parse(c), Ok(Secret::Raw(_)));
        assert!(raw(&[7; 32]));
        assert!(raw("0123456789abcdefABCDEF0123456789".repeat(2).as_bytes()));
        assert!(raw(format!("{}\n", "a0".repeat(32)).as_bytes()));
        let words = b"thirty-two bytes of a passphrase";
        assert!(!raw(words), "a passphrase of 32 characters is stretched");
        let Ok(Secret::Passphrase(found)) = Secret::parse(b"correct horse battery\r\n") else {
            panic!("a passphrase");
        };
        assert_eq!(found, b"correct horse battery");
        assert!(Secret::parse(b"short\n").is_err());
    }

    #[test]
    fn a_wrong_key_is_told_by_its_id() {
        for (right, wrong) in [
            (Secret::Raw([1; 32]), Secret::Raw([2; 32])),
            (
                Secret::Passphrase(b"a passphrase 1".to_vec()),
                Secret::Passphrase(b"a passphrase 2".to_vec()),
            ),
            (Secret::Raw([1; 32]), Secret::Passphrase(vec![1; 32])),
        ] {
            let (spec, keys) = Keys::create(&right).unwrap();
            assert_eq!(
                Keys::open(&spec, &right).unwrap().encryption,
                keys.encryption
            );
            assert!(matches!(
                Keys::open(&spec, &wrong),
                Err(BackupError::KeyWrong { .. })
            ));
        }
    }

    #[test]
    fn hostile_parameters_are_refused() {
        let secret = Secret::Passphrase(b"a passphrase 1".to_vec());
        let (spec, _) = Keys::create(&secret).unwrap();
        for hostile in [
            KeySpec {
                memory_kib: u32::MAX,
                ..spec.clone()
            },
            KeySpec {
                passes: u32::MAX,
                ..spec.clone()
            },
            KeySpec {
                memory_kib: 0,
                ..spec.clone()
            },
            KeySpec {
                salt: "zz".into(),
                ..spec
            },
        ] {
            assert!(matches!(
                Keys::open(&hostile, &secret),
                Err(BackupError::Mismatch(_))
            ));
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        let secret = Secret::Raw([1; 32]);
        let (_, keys) = Keys::create(&secret).unwrap();
        assert_eq!(format!("{secret:?} {keys:?}"), "Secret Keys");
    }
}
