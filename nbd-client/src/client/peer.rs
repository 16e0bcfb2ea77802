//! One NBD client of a volume, and the requests that are handed to the engine in parts.

use ashlar_proto::wire::Payload;
use bytes::Bytes;

use super::requests::part_end;
use crate::engine::ClientOp;
use crate::nbd::{self, ZEROES};

/// A request whose parts are given to the engine one by one, as it accepts them.
#[derive(Debug)]
pub(super) enum Splitting {
    Read {
        slot: u32,
        next: u64,
        end: u64,
    },
    Zeroes {
        slot: u32,
        next: u64,
        end: u64,
        fua: bool,
    },
}

impl Splitting {
    /// Slot of the request.
    pub fn slot(&self) -> u32 {
        match self {
            Self::Read { slot, .. } | Self::Zeroes { slot, .. } => *slot,
        }
    }
}

/// One NBD client.
#[derive(Debug)]
pub(super) struct Peer {
    pub protocol: nbd::Connection,
    pub in_flight: u32,
    /// Slot of a write whose later parts are still arriving.
    pub writing: Option<u32>,
    pub splitting: Option<Splitting>,
    pub stalled: bool,
    pub leaving: bool,
    pub dirty: bool,
    /// The reactor is giving its socket back.
    pub released: bool,
}

impl Peer {
    /// A client that has just connected.
    pub fn new() -> Self {
        Self::with(nbd::Connection::new())
    }

    /// A client past the handshake.
    pub fn in_transmission(negotiated: nbd::Negotiated) -> Self {
        Self::with(nbd::Connection::transmission(negotiated))
    }

    fn with(protocol: nbd::Connection) -> Self {
        Self {
            protocol,
            in_flight: 0,
            writing: None,
            splitting: None,
            stalled: false,
            leaving: false,
            dirty: true,
            released: false,
        }
    }

    /// Whether nothing of it is under way and nothing half received.
    pub fn at_rest(&self) -> bool {
        self.in_flight == 0 && self.splitting.is_none() && self.protocol.at_boundary()
    }

    /// Whether a request has begun and the rest of it is still to be taken in.
    pub fn is_amid_request(&self) -> bool {
        self.splitting.is_some() || !self.protocol.at_boundary()
    }

    /// The next part of the request that is being split: slot, operation, whether it is the last.
    pub fn next_part(&mut self) -> Option<(u32, ClientOp, bool)> {
        let (slot, op, last) = match self.splitting.as_mut() {
            Some(Splitting::Read { slot, next, end }) => {
                let offset = *next;
                *next = part_end(offset, *end);
                let length = (*next - offset) as u32;
                (*slot, ClientOp::Read { offset, length }, next == end)
            }
            Some(Splitting::Zeroes {
                slot,
                next,
                end,
                fua,
            }) => {
                let offset = *next;
                *next = part_end(offset, *end);
                let data = zeroes((*next - offset) as usize);
                (
                    *slot,
                    ClientOp::Write {
                        offset,
                        data,
                        fua: *fua,
                    },
                    next == end,
                )
            }
            None => return None,
        };
        if last {
            self.splitting = None;
        }
        Some((slot, op, last))
    }
}

/// Zero bytes that take no memory.
fn zeroes(length: usize) -> Payload {
    let mut left = length;
    let mut payload = Payload::new();
    while left > 0 {
        let part = left.min(ZEROES.len());
        payload.push(Bytes::from_static(&ZEROES[..part]));
        left -= part;
    }
    payload
}
