//! The form of every object of a repository: a header of 72 bytes, then the payload, perhaps packed and encrypted.
//!
//! ```text
//!  0  4  magic "ASHB"           8  4  length of the plain content, little endian
//!  4  1  format (1)            12  4  length of the payload, little endian
//!  5  1  kind                  16 24  nonce (zeros without encryption)
//!  6  1  compression           40 32  BLAKE3 of bytes 0-39, of the length (4 bytes, little endian) of the
//!  7  1  encryption                   object's name, of the name, and of the payload
//! ```
//!
//! Invariants:
//! - [`Codec::decode`] returns what was given to [`Codec::encode`] under the same name and kind, or says how it is damaged.
//! - No memory is taken by a length that was not checked against the kind's limit.
//! - A nonce is a keyed hash of what it encrypts (and of the name): the same nonce twice means the same message twice.
//! - With a key, only the repository's own description may be in the clear.

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

use super::error::{BackupError, Damage, Result};
use super::id::ContentId;
use super::key::{Keys, public_names};

/// Begins every object.
const MAGIC: &[u8; 4] = b"ASHB";
/// The newest format that is known, and the one that is written.
pub const FORMAT: u8 = 1;
/// Length of the header.
pub const HEADER_BYTES: usize = 72;
/// What the cipher adds.
const TAG_BYTES: usize = 16;
/// Bytes of a nonce.
const NONCE_BYTES: usize = 24;
/// Level of zstd: its own default.
const ZSTD_LEVEL: i32 = 3;

/// What an object is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// The repository's description.
    Repository = 1,
    /// A piece of a volume.
    Segment = 2,
    /// References to segments.
    Page = 3,
    /// A backup.
    Manifest = 4,
    /// Somebody at work.
    Lock = 5,
}

impl Kind {
    /// Most bytes of plain content.
    pub const fn bytes_max(self) -> usize {
        match self {
            Self::Repository | Self::Lock => 64 * 1024,
            Self::Segment | Self::Manifest => 16 * 1024 * 1024,
            Self::Page => 1024 * 1024,
        }
    }

    /// Most bytes of an object.
    pub const fn object_bytes_max(self) -> usize {
        self.bytes_max() + HEADER_BYTES + TAG_BYTES
    }
}

/// How content is packed.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    clap::ValueEnum,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not.
    None,
    /// zstd: small.
    #[default]
    Zstd,
    /// LZ4: quick.
    Lz4,
}

impl Compression {
    fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }

    fn of_code(code: u8) -> std::result::Result<Self, Damage> {
        match code {
            0 => Ok(Self::None),
            1 => Ok(Self::Zstd),
            2 => Ok(Self::Lz4),
            _ => Err(Damage::Header("compression")),
        }
    }

    /// Packed content, if that is shorter.
    fn pack(self, plain: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Self::None => return None,
            // A failure to pack costs space, not the backup.
            Self::Zstd => zstd::bulk::compress(plain, ZSTD_LEVEL).ok()?,
            Self::Lz4 => lz4_flex::block::compress(plain),
        };
        (packed.len() < plain.len()).then_some(packed)
    }

    /// Content of exactly `length` bytes, which the caller has checked against a limit.
    fn unpack(self, payload: &[u8], length: usize) -> std::result::Result<Vec<u8>, Damage> {
        let plain = match self {
            Self::None => payload.to_vec(),
            Self::Zstd => zstd::bulk::decompress(payload, length).map_err(|_| Damage::Unpack)?,
            Self::Lz4 => {
                let mut plain = vec![0; length];
                let found = lz4_flex::block::decompress_into(payload, &mut plain)
                    .map_err(|_| Damage::Unpack)?;
                plain.truncate(found);
                plain
            }
        };
        if plain.len() != length {
            return Err(Damage::Unpack);
        }
        Ok(plain)
    }
}

/// Makes objects of content and content of objects.
#[derive(Debug)]
pub struct Codec {
    keys: Option<Keys>,
    names: [u8; 32],
}

impl Codec {
    /// With keys, everything is encrypted.
    pub fn new(keys: Option<Keys>) -> Self {
        let names = keys.as_ref().map_or_else(public_names, |k| k.names);
        Self { keys, names }
    }

    /// The name of content.
    pub fn id(&self, kind: Kind, plain: &[u8]) -> ContentId {
        let mut hasher = blake3::Hasher::new_keyed(&self.names);
        hasher.update(&[kind as u8]);
        hasher.update(plain);
        ContentId::new(*hasher.finalize().as_bytes())
    }

    /// The object of content that is to be stored under a name.
    ///
    /// # Errors
    /// The content is longer than such content may be.
    pub fn encode(
        &self,
        kind: Kind,
        name: &str,
        plain: &[u8],
        compression: Compression,
    ) -> Result<Vec<u8>> {
        if plain.len() > kind.bytes_max() {
            return Err(BackupError::Mismatch(format!(
                "{name} would have {} bytes, and at most {} are possible",
                plain.len(),
                kind.bytes_max()
            )));
        }
        let packed = compression.pack(plain);
        let used = packed.as_ref().map_or(Compression::None, |_| compression);
        let content = packed.as_deref().unwrap_or(plain);
        let keys = self.keys.as_ref().filter(|_| kind != Kind::Repository);
        let payload_length = content.len() + keys.map_or(0, |_| TAG_BYTES);

        let mut object = Vec::with_capacity(HEADER_BYTES + payload_length);
        object.extend_from_slice(MAGIC);
        object.extend_from_slice(&[FORMAT, kind as u8, used.code(), u8::from(keys.is_some())]);
        object.extend_from_slice(&(plain.len() as u32).to_le_bytes());
        object.extend_from_slice(&(payload_length as u32).to_le_bytes());
        match keys {
            None => {
                object.resize(HEADER_BYTES, 0);
                object.extend_from_slice(content);
            }
            Some(keys) => {
                let nonce = nonce(keys, &object, name, content);
                let message = Payload {
                    msg: content,
                    aad: &associated(&object, name),
                };
                let payload = XChaCha20Poly1305::new((&keys.encryption).into())
                    .encrypt(&XNonce::from(nonce), message)
                    .map_err(|_| BackupError::Mismatch(format!("{name} cannot be encrypted")))?;
                object.extend_from_slice(&nonce);
                object.resize(HEADER_BYTES, 0);
                object.extend_from_slice(&payload);
            }
        }
        let sum = checksum(&object, name);
        object[40..HEADER_BYTES].copy_from_slice(&sum);
        Ok(object)
    }

    /// The content of an object that was stored under a name.
    ///
    /// # Errors
    /// How it is damaged.
    pub fn decode(&self, kind: Kind, name: &str, object: &[u8]) -> Result<Vec<u8>> {
        let header = match object.first_chunk::<HEADER_BYTES>() {
            Some(header) => Header::parse(header),
            None => Err(Damage::Length {
                expected: HEADER_BYTES as u64,
                found: object.len() as u64,
            }),
        };
        let damaged = |damage| BackupError::damaged(name, damage);
        let header = header.map_err(damaged)?;
        if checksum(object, name) != object[40..HEADER_BYTES] {
            return Err(damaged(Damage::Checksum));
        }
        // Whole, and still of a format that is not known: that is no damage.
        if header.format > FORMAT {
            return Err(BackupError::TooNew {
                name: name.to_owned(),
                found: u32::from(header.format),
                known: u32::from(FORMAT),
            });
        }
        self.open(kind, name, &header, object).map_err(damaged)
    }

    fn open(
        &self,
        kind: Kind,
        name: &str,
        header: &Header,
        object: &[u8],
    ) -> std::result::Result<Vec<u8>, Damage> {
        let payload = &object[HEADER_BYTES..];
        if header.format == 0 {
            return Err(Damage::Header("format"));
        }
        if header.kind != kind as u8 {
            return Err(Damage::Header("kind"));
        }
        if payload.len() as u64 != u64::from(header.payload_length) {
            return Err(Damage::Length {
                expected: u64::from(header.payload_length) + HEADER_BYTES as u64,
                found: object.len() as u64,
            });
        }
        let length = header.plain_length as usize;
        if length > kind.bytes_max() {
            return Err(Damage::TooLong {
                found: length as u64,
                limit: kind.bytes_max() as u64,
            });
        }
        let compression = Compression::of_code(header.compression)?;
        match (header.encryption, &self.keys) {
            (0, Some(_)) if kind != Kind::Repository => Err(Damage::NotEncrypted),
            (0, _) => compression.unpack(payload, length),
            (1, Some(keys)) => {
                let message = Payload {
                    msg: payload,
                    aad: &associated(&object[..16], name),
                };
                let content = XChaCha20Poly1305::new((&keys.encryption).into())
                    .decrypt(&XNonce::from(header.nonce), message)
                    .map_err(|_| Damage::Cipher)?;
                compression.unpack(&content, length)
            }
            _ => Err(Damage::Header("encryption")),
        }
    }

    /// The content of an object that is named by its content.
    ///
    /// # Errors
    /// How it is damaged.
    pub fn decode_content(
        &self,
        kind: Kind,
        id: ContentId,
        name: &str,
        object: &[u8],
    ) -> Result<Vec<u8>> {
        let plain = self.decode(kind, name, object)?;
        if self.id(kind, &plain) != id {
            return Err(BackupError::damaged(name, Damage::Content));
        }
        Ok(plain)
    }
}

/// The fields of a header, not yet believed.
struct Header {
    format: u8,
    kind: u8,
    compression: u8,
    encryption: u8,
    plain_length: u32,
    payload_length: u32,
    nonce: [u8; NONCE_BYTES],
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> std::result::Result<Self, Damage> {
        if !bytes.starts_with(MAGIC) {
            return Err(Damage::Magic);
        }
        let number = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&bytes[16..40]);
        Ok(Self {
            format: bytes[4],
            kind: bytes[5],
            compression: bytes[6],
            encryption: bytes[7],
            plain_length: number(8),
            payload_length: number(12),
            nonce,
        })
    }
}

/// Of everything but the place of the checksum itself.
fn checksum(object: &[u8], name: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&object[..40]);
    hasher.update(&(name.len() as u32).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(&object[HEADER_BYTES..]);
    *hasher.finalize().as_bytes()
}

/// What is authenticated beside the content: the header up to the nonce, and the name.
fn associated(header: &[u8], name: &str) -> Vec<u8> {
    [header, name.as_bytes()].concat()
}

fn nonce(keys: &Keys, header: &[u8], name: &str, content: &[u8]) -> [u8; NONCE_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(&keys.nonces);
    hasher.update(header);
    hasher.update(&(name.len() as u32).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(content);
    let mut nonce = [0; NONCE_BYTES];
    nonce.copy_from_slice(&hasher.finalize().as_bytes()[..NONCE_BYTES]);
    nonce
}
