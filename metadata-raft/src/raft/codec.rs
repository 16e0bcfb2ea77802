//! Bytes of log entries, votes and messages: a version, a checksum, bincode with a limit.
//!
//! Form: version (u8), crc32c of the rest (u32 little-endian), bincode (little-endian, varint).
//! Invariant: bytes that do not verify, have another version, or trail are refused.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of the form.
pub const CODEC_VERSION: u8 = 1;
/// Longest encoded value: a batch of log entries.
pub const VALUE_BYTES_MAX: usize = 64 * 1024 * 1024;
const HEADER_BYTES: usize = 5;

fn config() -> bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<VALUE_BYTES_MAX>,
> {
    bincode::config::standard().with_limit::<VALUE_BYTES_MAX>()
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Encodes a value.
pub fn encode<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let body =
        bincode::serde::encode_to_vec(value, config()).map_err(|e| invalid(e.to_string()))?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.push(CODEC_VERSION);
    bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Decodes a value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(invalid("too short"));
    };
    if header[0] != CODEC_VERSION {
        return Err(invalid(format!(
            "version {} where this program knows {CODEC_VERSION}: use the newer program",
            header[0]
        )));
    }
    let crc = u32::from_le_bytes([header[1], header[2], header[3], header[4]]);
    if crc32c::crc32c(body) != crc {
        return Err(invalid("checksum differs"));
    }
    let (value, used) =
        bincode::serde::decode_from_slice(body, config()).map_err(|e| invalid(e.to_string()))?;
    if used != body.len() {
        return Err(invalid("trailing bytes"));
    }
    Ok(value)
}
