//! One client's connection: handshake, then requests; and the replies to them.

use bytes::BytesMut;

use super::handshake::{Handshake, Negotiated, Progress};
use super::replies::{self, Extent, ReplyStyle};
use super::transmission::{Request, Step, Transmission};
use super::{Export, Output, ProtocolError};
use crate::engine::{ReadSegment, ReadSegments};

/// What a client wants, found by [`Connection::receive`].
#[derive(PartialEq, Eq, Debug)]
pub enum Incoming {
    /// A request for the volume; answer it with one of the reply functions.
    Request(Request),
    /// The client is leaving: finish what is under way, send it, close.
    Disconnect,
}

#[derive(Debug)]
enum Phase {
    Handshake(Handshake),
    Transmission(Transmission),
    Ended,
}

/// The protocol state of one connection and the bytes that wait to be sent on it.
#[derive(Debug)]
pub struct Connection {
    phase: Phase,
    output: Output,
    wanted: usize,
}

impl Connection {
    /// A new connection; the greeting is in the output.
    pub fn new() -> Self {
        let mut output = Output::default();
        let phase = Phase::Handshake(Handshake::start(&mut output));
        Self {
            phase,
            output,
            wanted: 0,
        }
    }

    /// A connection past its handshake: both sides know the export, and how to reply. The kernel's client begins so.
    pub fn transmission(negotiated: Negotiated) -> Self {
        Self {
            phase: Phase::Transmission(Transmission::new(negotiated)),
            output: Output::default(),
            wanted: 0,
        }
    }

    /// What the handshake came to; nothing while it lasts.
    pub fn negotiated(&self) -> Negotiated {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.negotiated(),
            Phase::Handshake(_) | Phase::Ended => Negotiated::default(),
        }
    }

    /// Whether what was received so far ends with a whole request: then another connection object may
    /// go on in its place.
    pub fn at_boundary(&self) -> bool {
        match &self.phase {
            Phase::Handshake(_) => false,
            Phase::Transmission(transmission) => transmission.at_boundary(),
            Phase::Ended => true,
        }
    }

    /// Takes the next request off the input; `None` when more bytes are needed ([`Self::wanted`]).
    /// Replies to options and to invalid requests go to the output.
    ///
    /// # Errors
    /// The client broke the protocol: close the connection without sending anything.
    pub fn receive(
        &mut self,
        input: &mut BytesMut,
        export: &Export,
    ) -> Result<Option<Incoming>, ProtocolError> {
        loop {
            match &mut self.phase {
                Phase::Handshake(handshake) => {
                    match handshake.advance(input, export, &mut self.output)? {
                        Progress::NeedMore(wanted) => {
                            self.wanted = wanted;
                            return Ok(None);
                        }
                        Progress::Continue => {}
                        Progress::Transmission(negotiated) => {
                            self.phase = Phase::Transmission(Transmission::new(negotiated));
                        }
                        Progress::Abort => {
                            self.phase = Phase::Ended;
                            return Ok(Some(Incoming::Disconnect));
                        }
                    }
                }
                Phase::Transmission(transmission) => {
                    match transmission.advance(input, export, &mut self.output)? {
                        Step::NeedMore(wanted) => {
                            self.wanted = wanted;
                            return Ok(None);
                        }
                        Step::Continue => {}
                        Step::Request(request) => return Ok(Some(Incoming::Request(request))),
                        Step::Disconnect => {
                            self.phase = Phase::Ended;
                            return Ok(Some(Incoming::Disconnect));
                        }
                    }
                }
                Phase::Ended => {
                    // Spec, NBD_CMD_DISC: nothing may follow.
                    input.clear();
                    return Ok(None);
                }
            }
        }
    }

    /// Length that the input must reach for progress, when [`Self::receive`] has returned `None`: at
    /// most [`super::MAX_PART_LENGTH`].
    pub fn wanted(&self) -> usize {
        self.wanted
    }

    /// Whether the client has not yet chosen an export.
    pub fn in_handshake(&self) -> bool {
        matches!(self.phase, Phase::Handshake(_))
    }

    /// Bytes to send.
    pub fn output(&mut self) -> &mut Output {
        &mut self.output
    }

    /// Answers a request that has no data.
    pub fn reply_done(&mut self, style: ReplyStyle, cookie: u64) {
        replies::done(&mut self.output, style, cookie);
    }

    /// Answers a request that failed.
    pub fn reply_error(&mut self, style: ReplyStyle, cookie: u64, error: u32) {
        replies::error(&mut self.output, style, cookie, error);
    }

    /// Answers a whole read.
    pub fn reply_read(
        &mut self,
        style: ReplyStyle,
        cookie: u64,
        offset: u64,
        segments: ReadSegments,
    ) {
        if style == ReplyStyle::Structured {
            replies::read_part(&mut self.output, cookie, offset, segments, true);
        } else {
            replies::read_whole(&mut self.output, style, cookie, offset, segments);
        }
    }

    /// Answers a part of a read of style [`ReplyStyle::Structured`]; parts may come in any order, and the
    /// last one sent has `done`.
    pub fn reply_read_part(
        &mut self,
        cookie: u64,
        offset: u64,
        segments: impl IntoIterator<Item = ReadSegment>,
        done: bool,
    ) {
        replies::read_part(&mut self.output, cookie, offset, segments, done);
    }

    /// Answers a block status request with at least one extent.
    pub fn reply_block_status(&mut self, cookie: u64, extents: &[Extent]) {
        replies::block_status(&mut self.output, cookie, extents);
    }
}

impl Default for Connection {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
#[path = "connection_tests.rs"]
mod tests;
