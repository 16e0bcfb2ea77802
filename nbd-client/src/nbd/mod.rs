//! The server side of the NBD protocol as a sans-IO codec: bytes in, requests and reply bytes out.
//!
//! "Spec" in this module means <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>;
//! its section titles are cited beside the code that obeys them.
//!
//! Invariants:
//! - Nothing a client sends causes a panic, or an allocation beyond the bounds named here: an option is
//!   at most [`MAX_OPTION_LENGTH`] bytes, a request's payload at most [`MAX_REQUEST_LENGTH`], and a
//!   payload is handed on in parts of at most [`MAX_PART_LENGTH`].
//! - A request that is refused by the codec (range, flags, read-only) never reaches the volume, and its
//!   payload is consumed so that the connection stays usable.
//! - Bytes that are not the protocol's end the connection; there is no resynchronisation.

mod connection;
mod constants;
mod handshake;
mod output;
mod replies;
mod transmission;

pub use connection::{Connection, Incoming};
pub use constants::{
    EINVAL, EIO, ENOMEM, ENOSPC, ENOTSUP, EOVERFLOW, EPERM, MAX_OPTION_LENGTH, MAX_PART_LENGTH,
    MAX_REQUEST_LENGTH, STATE_HOLE, STATE_ZERO,
};
pub use handshake::Negotiated;
pub use output::{Output, ZEROES};
pub use replies::{Extent, ReplyStyle};
pub use transmission::{Command, Request};

/// What is served on a connection.
#[derive(Clone, Debug)]
pub struct Export {
    /// The export's name; clients may also ask for the default export, the empty name.
    pub name: String,
    /// For people, in export lists.
    pub description: String,
    /// Current size in bytes.
    pub size_bytes: u64,
    /// Writes are refused with EPERM.
    pub read_only: bool,
}

/// The transmission flags of a volume for a client that speaks without handshake
/// ([`Connection::transmission`]).
pub fn kernel_flags(read_only: bool) -> u16 {
    use constants::transmission_flag as f;
    let flags = f::HAS_FLAGS | f::SEND_FLUSH | f::SEND_FUA | f::CAN_MULTI_CONN;
    if read_only {
        flags | f::READ_ONLY
    } else {
        flags | f::SEND_TRIM | f::SEND_WRITE_ZEROES
    }
}

/// Why a connection must be closed. There is never an answer: the client broke the protocol.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// A magic number is wrong.
    #[error("wrong magic {0:#x} in the {1}")]
    Magic(u64, &'static str),
    /// The client set handshake flags that the server did not offer.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// A length is beyond its limit.
    #[error("{0} of {1} bytes is too long")]
    Length(&'static str, u64),
    /// The client asked for an export that is not served here, in a way that allows no error reply.
    #[error("no such export")]
    NoSuchExport,
    /// Too many options in one handshake.
    #[error("too many options")]
    TooManyOptions,
}
