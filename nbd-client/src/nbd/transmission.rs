//! Requests of the transmission phase (spec, "Transmission phase", "Request message").
//!
//! Invariants:
//! - A request is handed on only if its flags, range and length are valid for the export; others are
//!   answered here with the error that the spec names (or end the connection: lengths that no client
//!   may send).
//! - A write is handed on in parts, in order; each part ends at a multiple of [`MAX_PART_LENGTH`] or at
//!   the write's end, so it never crosses a chunk. Only one write is in parts at a time.

use bytes::{Buf as _, Bytes, BytesMut};

use super::constants::{
    EINVAL, ENOSPC, ENOTSUP, EPERM, MAX_PART_LENGTH, MAX_REQUEST_LENGTH, REQUEST_MAGIC, command,
    command_flag,
};
use super::handshake::Negotiated;
use super::replies::{self, ReplyStyle};
use super::{Export, Output, ProtocolError};

/// Bytes of a request without payload.
const REQUEST_HEADER_LEN: usize = 28;

/// A request that a volume is to carry out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// The client's name for the request; goes into the reply.
    pub cookie: u64,
    /// How it is to be answered.
    pub style: ReplyStyle,
    /// What is asked.
    pub command: Command,
}

/// What a client asks of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read `length` bytes (1 to [`MAX_REQUEST_LENGTH`]).
    Read {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// A part of a write.
    Write {
        /// First byte of the part.
        offset: u64,
        /// Its bytes (at most [`MAX_PART_LENGTH`]).
        data: Bytes,
        /// Durable before the reply.
        fua: bool,
        /// The first part of its request.
        first: bool,
        /// The last part: the request is answered when all parts are done.
        last: bool,
    },
    /// Make acknowledged writes durable.
    Flush,
    /// The range's contents are no longer needed.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        length: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make the range read as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        length: u32,
        /// Durable before the reply.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
    },
    /// Which parts of the range are allocated.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Bytes, at least 1.
        length: u32,
        /// One extent is enough.
        one: bool,
    },
}

/// What [`Transmission::advance`] found.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// The input must grow to so many bytes.
    NeedMore(usize),
    /// A request was answered here; look at the input again.
    Continue,
    /// For the volume.
    Request(Request),
    /// The client sent DISC: finish what is under way, then close.
    Disconnect,
}

/// A write whose payload is arriving.
#[derive(Debug)]
struct WriteInProgress {
    cookie: u64,
    offset: u64,
    remaining: u32,
    fua: bool,
    first: bool,
}

/// State of the transmission phase of one connection.
#[derive(Debug)]
pub(super) struct Transmission {
    negotiated: Negotiated,
    write: Option<WriteInProgress>,
    /// Payload of a refused write that is still to be skipped.
    skip: u32,
}

struct Header {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

impl Transmission {
    pub fn new(negotiated: Negotiated) -> Self {
        Self {
            negotiated,
            write: None,
            skip: 0,
        }
    }

    /// What the client chose.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Whether no request is half received.
    pub fn at_boundary(&self) -> bool {
        self.write.is_none() && self.skip == 0
    }

    /// Takes the next request, or part of a write, off the input.
    pub fn advance(
        &mut self,
        input: &mut BytesMut,
        export: &Export,
        out: &mut Output,
    ) -> Result<Step, ProtocolError> {
        if self.skip > 0 {
            let part = (self.skip as usize).min(input.len());
            input.advance(part);
            self.skip -= part as u32;
            if self.skip > 0 {
                return Ok(Step::NeedMore(1));
            }
        }
        if self.write.is_some() {
            return Ok(self.write_part(input));
        }
        if input.len() < REQUEST_HEADER_LEN {
            return Ok(Step::NeedMore(REQUEST_HEADER_LEN));
        }
        let magic = input.get_u32();
        if magic != REQUEST_MAGIC {
            return Err(ProtocolError::Magic(u64::from(magic), "request"));
        }
        let header = Header {
            flags: input.get_u16(),
            kind: input.get_u16(),
            cookie: input.get_u64(),
            offset: input.get_u64(),
            length: input.get_u32(),
        };
        self.request(&header, input, export, out)
    }

    fn request(
        &mut self,
        header: &Header,
        input: &mut BytesMut,
        export: &Export,
        out: &mut Output,
    ) -> Result<Step, ProtocolError> {
        let &Header {
            flags,
            kind,
            cookie,
            offset,
            length,
        } = header;
        if kind == command::DISC {
            return Ok(Step::Disconnect);
        }
        if kind == command::WRITE && length > MAX_REQUEST_LENGTH {
            // Spec, "Block size constraints": may be a hard disconnect; skipping 4 GiB is no service.
            return Err(ProtocolError::Length("write", u64::from(length)));
        }
        let style = self.style(header);
        if let Err(error) = self.check(header, export) {
            if kind == command::WRITE {
                self.skip = length;
            }
            replies::error(out, style, cookie, error);
            return Ok(Step::Continue);
        }
        // Spec, "Request types": the effect of length 0 is unspecified; here it does nothing.
        if (length == 0 && kind != command::FLUSH) || kind == command::CACHE {
            replies::done(out, style, cookie);
            return Ok(Step::Continue);
        }
        let fua = flags & command_flag::FUA != 0;
        let command = match kind {
            command::READ => Command::Read { offset, length },
            command::WRITE => {
                self.write = Some(WriteInProgress {
                    cookie,
                    offset,
                    remaining: length,
                    fua,
                    first: true,
                });
                return Ok(self.write_part(input));
            }
            command::FLUSH => Command::Flush,
            command::TRIM => Command::Trim {
                offset,
                length,
                fua,
            },
            command::WRITE_ZEROES => {
                let no_hole = flags & command_flag::NO_HOLE != 0;
                Command::WriteZeroes {
                    offset,
                    length,
                    fua,
                    no_hole,
                }
            }
            _ => {
                let one = flags & command_flag::REQ_ONE != 0;
                Command::BlockStatus {
                    offset,
                    length,
                    one,
                }
            }
        };
        Ok(Step::Request(Request {
            cookie,
            style,
            command,
        }))
    }

    /// Spec, "Structured replies": once negotiated, READ and BLOCK_STATUS are always answered so; other
    /// requests may be answered simply.
    fn style(&self, header: &Header) -> ReplyStyle {
        let structured = self.negotiated.structured
            && matches!(header.kind, command::READ | command::BLOCK_STATUS);
        match structured {
            false => ReplyStyle::Simple,
            true if header.flags & command_flag::DF != 0 => ReplyStyle::Unfragmented,
            true => ReplyStyle::Structured,
        }
    }

    /// The errors of the spec's "Error values", for requests that are wrong in themselves.
    fn check(&self, header: &Header, export: &Export) -> Result<(), u32> {
        use command_flag as f;
        // Spec, "Command flags": FUA must be accepted with every command; a flag that is not documented
        // for the command is EINVAL.
        let allowed = f::FUA
            | match header.kind {
                command::READ if self.negotiated.structured => f::DF,
                command::WRITE_ZEROES => f::NO_HOLE | f::FAST_ZERO,
                command::BLOCK_STATUS => f::REQ_ONE,
                _ => 0,
            };
        if header.flags & !allowed != 0 {
            return Err(EINVAL);
        }
        let modifies = matches!(
            header.kind,
            command::WRITE | command::TRIM | command::WRITE_ZEROES
        );
        if modifies && export.read_only {
            return Err(EPERM);
        }
        match header.kind {
            // Spec, NBD_CMD_FLUSH: offset and length must be zero.
            command::FLUSH if header.offset != 0 || header.length != 0 => return Err(EINVAL),
            command::READ if header.length > MAX_REQUEST_LENGTH => return Err(EINVAL),
            command::BLOCK_STATUS if !self.negotiated.base_allocation || header.length == 0 => {
                return Err(EINVAL);
            }
            command::READ
            | command::WRITE
            | command::FLUSH
            | command::TRIM
            | command::CACHE
            | command::WRITE_ZEROES
            | command::BLOCK_STATUS => {}
            _ => return Err(EINVAL),
        }
        let end = header.offset.checked_add(u64::from(header.length));
        if end.is_none_or(|end| end > export.size_bytes) {
            return Err(match header.kind {
                command::WRITE | command::WRITE_ZEROES => ENOSPC,
                _ => EINVAL,
            });
        }
        // Spec, NBD_CMD_WRITE_ZEROES: with FAST_ZERO the server fails rather than write data. Allocated
        // zeroes and pieces of blocks are written as data here.
        let aligned = [header.offset, u64::from(header.length)]
            .iter()
            .all(|v| v % u64::from(super::constants::PREFERRED_BLOCK_SIZE) == 0);
        if header.flags & f::FAST_ZERO != 0 && (header.flags & f::NO_HOLE != 0 || !aligned) {
            return Err(ENOTSUP);
        }
        Ok(())
    }

    fn write_part(&mut self, input: &mut BytesMut) -> Step {
        let Some(write) = &mut self.write else {
            return Step::Continue;
        };
        let room = MAX_PART_LENGTH - (write.offset % u64::from(MAX_PART_LENGTH)) as u32;
        let length = write.remaining.min(room);
        if input.len() < length as usize {
            return Step::NeedMore(length as usize);
        }
        let data = input.split_to(length as usize).freeze();
        let last = length == write.remaining;
        let command = Command::Write {
            offset: write.offset,
            data,
            fua: write.fua,
            first: write.first,
            last,
        };
        let cookie = write.cookie;
        write.offset += u64::from(length);
        write.remaining -= length;
        write.first = false;
        if last {
            self.write = None;
        }
        Step::Request(Request {
            cookie,
            style: ReplyStyle::Simple,
            command,
        })
    }
}
