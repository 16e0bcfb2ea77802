//! What travels on simulated connections, and how it reads in a trace.

use ashlar_proto::wire::{
    self, Decoded, Direction, Reply, ReplyBody, Request, RequestBody, decode, encode_reply,
    encode_request,
};
use bytes::{Bytes, BytesMut};

/// A message on a connection.
#[derive(Clone, Debug)]
pub enum Frame {
    /// To a daemon.
    Request(Request),
    /// From a daemon.
    Reply(Reply),
}

impl Frame {
    /// The message after it went through its bytes, as on a real connection. Panics if the codec does
    /// not give back what it was given: a bug wherever it happens.
    #[must_use]
    pub fn through_codec(self) -> Self {
        let mut parts: Vec<Bytes> = Vec::new();
        let direction = match &self {
            Self::Request(request) => {
                encode_request(request, &mut parts);
                Direction::Requests
            }
            Self::Reply(reply) => {
                encode_reply(reply, &mut parts);
                Direction::Replies
            }
        };
        let mut input = BytesMut::from(&parts.concat()[..]);
        match decode(&mut input, direction) {
            Ok(Some(Decoded::Request(request))) if input.is_empty() => Self::Request(request),
            Ok(Some(Decoded::Reply(reply))) if input.is_empty() => Self::Reply(reply),
            other => panic!("the codec makes {other:?} of {}", self.brief()),
        }
    }

    /// One line for a trace.
    pub fn brief(&self) -> String {
        match self {
            Self::Request(r) => format!("{:x} e{} {}", r.id.0, r.epoch.0, brief_request(&r.body)),
            Self::Reply(r) => {
                let body = match &r.result {
                    Ok(body) => brief_reply(body),
                    Err(status) => format!("{status:?}"),
                };
                format!(
                    "{:x} fence {} i{:x}: {body}",
                    r.id.0,
                    r.fence.0,
                    r.incarnation.0 & 0xffff
                )
            }
        }
    }
}

fn range(range: &ashlar_proto::ids::BlockRange) -> String {
    format!("{}:{}+{}", range.chunk.0, range.first, range.count)
}

fn brief_request(body: &RequestBody) -> String {
    let durable = |durable: bool| if durable { " durable" } else { "" };
    match body {
        RequestBody::Write(w) => {
            format!(
                "Write {} {:?}{}",
                range(&w.range),
                w.version,
                durable(w.durable)
            )
        }
        RequestBody::Repair(w) => format!("Repair {} {:?}", range(&w.range), w.version),
        RequestBody::Trim(t) => {
            format!(
                "Trim {} {:?}{}",
                range(&t.range),
                t.version,
                durable(t.durable)
            )
        }
        RequestBody::Read(r) => format!("Read {}", range(&r.range)),
        RequestBody::Configure(d) => {
            let groups: Vec<_> = d
                .groups
                .iter()
                .map(|g| {
                    g.iter()
                        .map(|r| (r.disk.0[15], r.state))
                        .collect::<Vec<_>>()
                })
                .collect();
            format!("Configure e{} {groups:?}", d.epoch.0)
        }
        other => format!("{other:?}"),
    }
}

fn brief_reply(body: &ReplyBody) -> String {
    match body {
        ReplyBody::Read(r) => {
            let blocks: Vec<_> = r
                .blocks
                .iter()
                .map(|b: &wire::BlockInfo| format!("{:?} {:?}", b.state, b.version))
                .collect();
            format!("Read {} [{}]", range(&r.range), blocks.join(", "))
        }
        ReplyBody::Entries(e) => {
            let entries: Vec<_> = e
                .entries
                .iter()
                .map(|e| {
                    format!(
                        "{}:{} {:?} {:?}",
                        e.at.chunk.0, e.at.block, e.state, e.version
                    )
                })
                .collect();
            format!(
                "Entries [{}]{}",
                entries.join(", "),
                if e.next.is_some() { " .." } else { "" }
            )
        }
        other => format!("{other:?}"),
    }
}
