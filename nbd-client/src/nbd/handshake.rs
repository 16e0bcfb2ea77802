//! The handshake: fixed newstyle negotiation (spec, "Newstyle negotiation", "Fixed newstyle
//! negotiation").
//!
//! Invariants:
//! - Each option gets exactly one final reply (ACK or an error), except EXPORT_NAME, which has none but
//!   the start of transmission or the end of the connection.
//! - An option's payload is looked at only when it is complete, and it is complete or refused at
//!   [`MAX_OPTION_LENGTH`] bytes.

use bytes::{Buf as _, Bytes, BytesMut};

use super::constants::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, INIT_MAGIC, MAX_OPTION_LENGTH, MAX_OPTIONS, MAX_QUERIES,
    MAX_REQUEST_LENGTH, MAX_STRING_LENGTH, MINIMUM_BLOCK_SIZE, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK_SIZE, handshake_flag, info, option, option_reply, transmission_flag,
};
use super::{Export, Output, ProtocolError};

/// What the client chose, when the handshake ends in transmission. The kernel's client chooses nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Negotiated {
    /// Structured replies (spec, "Structured replies").
    pub structured: bool,
    /// BLOCK_STATUS with `base:allocation`.
    pub base_allocation: bool,
}

/// How an option ended.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// The input must grow to so many bytes.
    NeedMore(usize),
    /// An option was answered; look at the input again.
    Continue,
    /// Requests follow.
    Transmission(Negotiated),
    /// The client ended the session (ABORT): send what is queued, then close.
    Abort,
}

/// State of one handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    flags_seen: bool,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// Export name for which `base:allocation` was selected.
    context_for: Option<Bytes>,
    options: u32,
}

impl Handshake {
    /// Starts a handshake by queueing the server's greeting.
    pub fn start(out: &mut Output) -> Self {
        out.header(&INIT_MAGIC.to_be_bytes());
        out.header(&OPTION_MAGIC.to_be_bytes());
        out.header(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        Self {
            flags_seen: false,
            fixed: false,
            no_zeroes: false,
            structured: false,
            context_for: None,
            options: 0,
        }
    }

    /// Consumes client flags or one option.
    pub fn advance(
        &mut self,
        input: &mut BytesMut,
        export: &Export,
        out: &mut Output,
    ) -> Result<Progress, ProtocolError> {
        if !self.flags_seen {
            return self.client_flags(input);
        }
        if input.len() < 16 {
            return Ok(Progress::NeedMore(16));
        }
        let mut head = &input[..16];
        let magic = head.get_u64();
        if magic != OPTION_MAGIC {
            return Err(ProtocolError::Magic(magic, "option"));
        }
        let kind = head.get_u32();
        let length = head.get_u32() as usize;
        if length > MAX_OPTION_LENGTH {
            return Err(ProtocolError::Length("option", length as u64));
        }
        if input.len() < 16 + length {
            return Ok(Progress::NeedMore(16 + length));
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(ProtocolError::TooManyOptions);
        }
        input.advance(16);
        let data = input.split_to(length).freeze();
        self.option(kind, data, export, out)
    }

    /// Spec, "Newstyle negotiation": unrecognised client flags end the session.
    fn client_flags(&mut self, input: &mut BytesMut) -> Result<Progress, ProtocolError> {
        if input.len() < 4 {
            return Ok(Progress::NeedMore(4));
        }
        let flags = input.get_u32();
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Err(ProtocolError::ClientFlags(flags));
        }
        self.flags_seen = true;
        self.fixed = flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        Ok(Progress::Continue)
    }

    fn option(
        &mut self,
        kind: u32,
        data: Bytes,
        export: &Export,
        out: &mut Output,
    ) -> Result<Progress, ProtocolError> {
        // A client that is not of the fixed kind understands no reply to an option.
        if !self.fixed && kind != option::EXPORT_NAME {
            return Err(ProtocolError::ClientFlags(0));
        }
        match kind {
            option::EXPORT_NAME => self.export_name(&data, export, out),
            option::ABORT => {
                reply(out, kind, option_reply::ACK, &[]);
                Ok(Progress::Abort)
            }
            option::LIST => Ok(list(&data, export, out)),
            // Spec, "TLS support": a server without TLS answers POLICY (or UNSUP).
            option::STARTTLS => Ok(refuse(
                out,
                kind,
                option_reply::ERR_POLICY,
                "TLS is not offered here",
            )),
            option::INFO | option::GO => Ok(self.info_or_go(kind, data, export, out)),
            option::STRUCTURED_REPLY => {
                if !data.is_empty() {
                    return Ok(refuse(
                        out,
                        kind,
                        option_reply::ERR_INVALID,
                        "unexpected data",
                    ));
                }
                self.structured = true;
                reply(out, kind, option_reply::ACK, &[]);
                Ok(Progress::Continue)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                Ok(self.meta_context(kind, data, export, out))
            }
            _ => Ok(refuse(out, kind, option_reply::ERR_UNSUP, "")),
        }
    }

    /// Spec, "Option types", NBD_OPT_EXPORT_NAME: no error reply exists, so an unknown name ends the
    /// session; 124 zero bytes follow unless both sides agreed on NO_ZEROES.
    fn export_name(
        &self,
        name: &Bytes,
        export: &Export,
        out: &mut Output,
    ) -> Result<Progress, ProtocolError> {
        if !is_export(name, export) {
            return Err(ProtocolError::NoSuchExport);
        }
        out.header(&export.size_bytes.to_be_bytes());
        out.header(&self.transmission_flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.header(&[0; 124]);
        }
        Ok(Progress::Transmission(self.negotiated(name)))
    }

    fn negotiated(&self, name: &Bytes) -> Negotiated {
        // Spec, NBD_OPT_SET_META_CONTEXT: contexts hold only for the export they were selected for.
        let base_allocation = self.structured
            && self
                .context_for
                .as_ref()
                .is_some_and(|selected| selected == name);
        Negotiated {
            structured: self.structured,
            base_allocation,
        }
    }

    /// Spec, "Transmission flags"; SEND_DF only after structured replies were negotiated.
    fn transmission_flags(&self, export: &Export) -> u16 {
        use transmission_flag as f;
        let mut flags =
            f::HAS_FLAGS | f::SEND_FLUSH | f::SEND_FUA | f::CAN_MULTI_CONN | f::SEND_CACHE;
        if export.read_only {
            flags |= f::READ_ONLY;
        } else {
            flags |= f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO;
        }
        if self.structured {
            flags |= f::SEND_DF;
        }
        flags
    }

    /// Spec, "Option types", NBD_OPT_INFO and NBD_OPT_GO.
    fn info_or_go(&self, kind: u32, data: Bytes, export: &Export, out: &mut Output) -> Progress {
        let Some((name, wanted)) = parse_info_request(data) else {
            return refuse(out, kind, option_reply::ERR_INVALID, "malformed request");
        };
        if !is_export(&name, export) {
            return refuse(out, kind, option_reply::ERR_UNKNOWN, "no such export");
        }
        let mut item = Vec::with_capacity(16);
        item.extend_from_slice(&info::EXPORT.to_be_bytes());
        item.extend_from_slice(&export.size_bytes.to_be_bytes());
        item.extend_from_slice(&self.transmission_flags(export).to_be_bytes());
        reply(out, kind, option_reply::INFO, &item);
        // Sent whether asked for or not (spec, "Block size constraints").
        item.clear();
        item.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        for size in [MINIMUM_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, MAX_REQUEST_LENGTH] {
            item.extend_from_slice(&size.to_be_bytes());
        }
        reply(out, kind, option_reply::INFO, &item);
        for (code, text) in [
            (info::NAME, &export.name),
            (info::DESCRIPTION, &export.description),
        ] {
            if wanted.chunks_exact(2).any(|w| w == code.to_be_bytes()) {
                item.clear();
                item.extend_from_slice(&code.to_be_bytes());
                item.extend_from_slice(text.as_bytes());
                reply(out, kind, option_reply::INFO, &item);
            }
        }
        reply(out, kind, option_reply::ACK, &[]);
        if kind == option::GO {
            Progress::Transmission(self.negotiated(&name))
        } else {
            Progress::Continue
        }
    }

    /// Spec, "Option types", NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    fn meta_context(
        &mut self,
        kind: u32,
        data: Bytes,
        export: &Export,
        out: &mut Output,
    ) -> Progress {
        let set = kind == option::SET_META_CONTEXT;
        if set {
            self.context_for = None;
        }
        if !self.structured {
            let text = "negotiate structured replies first";
            return refuse(out, kind, option_reply::ERR_INVALID, text);
        }
        let Some((name, queries)) = parse_context_request(data) else {
            return refuse(out, kind, option_reply::ERR_INVALID, "malformed request");
        };
        if !is_export(&name, export) {
            return refuse(out, kind, option_reply::ERR_UNKNOWN, "no such export");
        }
        let selected = if set {
            queries.iter().any(|q| q == BASE_ALLOCATION.as_bytes())
        } else {
            // No query lists everything; a namespace alone lists all of it.
            queries.is_empty()
                || queries
                    .iter()
                    .any(|q| q == BASE_ALLOCATION.as_bytes() || q == &b"base:"[..])
        };
        if selected {
            // Spec: in answers to LIST the id is reserved.
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let mut item = id.to_be_bytes().to_vec();
            item.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, kind, option_reply::META_CONTEXT, &item);
            if set {
                self.context_for = Some(Bytes::copy_from_slice(&name));
            }
        }
        reply(out, kind, option_reply::ACK, &[]);
        Progress::Continue
    }
}

fn is_export(name: &[u8], export: &Export) -> bool {
    name.is_empty() || name == export.name.as_bytes()
}

/// Spec, "Option types", NBD_OPT_LIST.
fn list(data: &Bytes, export: &Export, out: &mut Output) -> Progress {
    if !data.is_empty() {
        return refuse(
            out,
            option::LIST,
            option_reply::ERR_INVALID,
            "unexpected data",
        );
    }
    let mut item = (export.name.len() as u32).to_be_bytes().to_vec();
    item.extend_from_slice(export.name.as_bytes());
    item.extend_from_slice(export.description.as_bytes());
    reply(out, option::LIST, option_reply::SERVER, &item);
    reply(out, option::LIST, option_reply::ACK, &[]);
    Progress::Continue
}

fn reply(out: &mut Output, kind: u32, code: u32, data: &[u8]) {
    out.header(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.header(&kind.to_be_bytes());
    out.header(&code.to_be_bytes());
    out.header(&(data.len() as u32).to_be_bytes());
    out.header(data);
}

fn refuse(out: &mut Output, kind: u32, code: u32, text: &str) -> Progress {
    reply(out, kind, code, text.as_bytes());
    Progress::Continue
}

/// A string with its length in front; `None` if it is not there or too long.
fn take_string(data: &mut Bytes) -> Option<Bytes> {
    if data.len() < 4 {
        return None;
    }
    let length = data.get_u32() as usize;
    (length <= MAX_STRING_LENGTH && length <= data.len()).then(|| data.split_to(length))
}

/// Name and information requests (2 bytes each) of INFO and GO.
fn parse_info_request(mut data: Bytes) -> Option<(Bytes, Bytes)> {
    let name = take_string(&mut data)?;
    if data.len() < 2 {
        return None;
    }
    let count = data.get_u16() as usize;
    (data.len() == 2 * count).then_some((name, data))
}

/// Name and queries of LIST_META_CONTEXT and SET_META_CONTEXT.
fn parse_context_request(mut data: Bytes) -> Option<(Bytes, Vec<Bytes>)> {
    let name = take_string(&mut data)?;
    if data.len() < 4 {
        return None;
    }
    let count = data.get_u32();
    if count > MAX_QUERIES {
        return None;
    }
    let mut queries = Vec::with_capacity(count as usize);
    for _ in 0..count {
        queries.push(take_string(&mut data)?);
    }
    data.is_empty().then_some((name, queries))
}
