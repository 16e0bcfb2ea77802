//! Numbers of the NBD protocol (spec, "Values") and the limits of this server.

/// First 8 bytes of the server: "NBDMAGIC".
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second 8 bytes of the server and start of each option: "IHAVEOPT".
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of each reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of each request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Longest payload of one option; a longer one ends the connection.
pub const MAX_OPTION_LENGTH: usize = 64 * 1024;
/// Longest string (spec, "Conventions").
pub(super) const MAX_STRING_LENGTH: usize = 4096;
/// Most options of one handshake.
pub(super) const MAX_OPTIONS: u32 = 1024;
/// Most queries in one list of metadata contexts.
pub(super) const MAX_QUERIES: u32 = 256;
/// Longest read or write (advertised as the maximum block size).
pub const MAX_REQUEST_LENGTH: u32 = 32 * 1024 * 1024;
/// Longest part of a write that is handed on at once; parts end at multiples of it.
pub const MAX_PART_LENGTH: u32 = 1024 * 1024;
/// Smallest request that is served (read-modify-write below the preferred size).
pub(super) const MINIMUM_BLOCK_SIZE: u32 = 1;
/// Requests that are multiples of it need no read-modify-write.
pub(super) const PREFERRED_BLOCK_SIZE: u32 = 4096;
/// The only metadata context.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";
/// Its id on the wire, chosen by us.
pub(super) const BASE_ALLOCATION_ID: u32 = 1;

/// Handshake flags, both directions (spec, "Handshake phase").
pub(super) mod handshake_flag {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags (spec, "Transmission flags").
pub(super) mod transmission_flag {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Option types (spec, "Option types").
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Option reply types (spec, "Option reply types").
pub(super) mod option_reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
}

/// Kinds of information in replies to INFO and GO.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types (spec, "Request types").
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags (spec, "Command flags").
pub(super) mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunk types and flags of structured replies (spec, "Structured reply types").
pub(super) mod chunk {
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// `base:allocation`: not allocated (spec, "Metadata contexts").
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// Operation not permitted: the export is read-only (spec, "Error values").
pub const EPERM: u32 = 1;
/// Input/output error.
pub const EIO: u32 = 5;
/// Cannot allocate memory.
pub const ENOMEM: u32 = 12;
/// Invalid argument.
pub const EINVAL: u32 = 22;
/// No space left on device.
pub const ENOSPC: u32 = 28;
/// Value too large.
pub const EOVERFLOW: u32 = 75;
/// Operation not supported: a fast zero that would not be fast.
pub const ENOTSUP: u32 = 95;
