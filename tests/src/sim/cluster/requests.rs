//! The user's requests: when the next one comes, how it reaches a session, and what its answer means to the history.

use bytes::Bytes;
use nbd_client::engine::{
    ClientError, ClientOp, ClientReply, ClientRequest, ReadSegment, SessionEvent,
};
use smallvec::smallvec;

use super::super::client::{ClientState, Inbound};
use super::super::history::{Kind, OperationId, Outcome, SECTOR, Value, decode, stamped};
use super::super::schedule::MS;
use super::super::workload;
use super::{Cluster, Timer};

impl Cluster {
    pub(super) fn arm_submit(&mut self, client: u32) {
        let delay = self.rng.between(1, self.workload.think_ns.max(1));
        // Many requests at once matter more than even spacing.
        let delay = if self.rng.chance(2, 5) {
            1 + delay / 1000
        } else {
            delay
        };
        self.timer(delay, Timer::Submit { client });
    }

    pub(super) fn submit_due(&mut self, host: u32) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if client.state == ClientState::Frozen {
            client.inbox.push_back(Inbound::Submit);
        } else if client.runs() {
            self.submit_next(host);
        }
    }

    pub(in crate::sim) fn submit_next(&mut self, host: u32) {
        let Some(client) = self.clients.get(&host) else {
            return;
        };
        if !self.loading || self.requests_left == 0 || client.closing {
            return;
        }
        if !client.session.accepting() {
            return self.timer(5 * MS, Timer::Submit { client: host });
        }
        let (reads, size) = (client.reads, client.size_bytes);
        let mut request = self.workload.next(&mut self.rng);
        if (request.first + request.count) * SECTOR as u64 > size {
            // It is not as large yet.
            return self.timer(5 * MS, Timer::Submit { client: host });
        }
        self.requests_left -= 1;
        if reads {
            request.kind = Kind::Read;
            request.fua = false;
            if request.count == 0 {
                (request.first, request.count) = (0, 8);
            }
        }
        self.submit(host, request);
    }

    /// Gives a request to a client's session.
    pub(in crate::sim) fn submit(&mut self, host: u32, request: workload::Request) -> OperationId {
        let workload::Request {
            kind,
            trim,
            first,
            count,
            fua,
        } = request;
        let covered = match (kind, trim) {
            (Kind::Zero, true) => workload::whole_blocks(first, count),
            _ => (first, count),
        };
        let id = self
            .history
            .begin(host, kind, covered.0, covered.1, fua, self.now);
        let (offset, length) = (first * SECTOR as u64, count * SECTOR as u64);
        let op = match kind {
            Kind::Read => ClientOp::Read {
                offset,
                length: length as u32,
            },
            Kind::Flush => ClientOp::Flush,
            Kind::Zero if trim => ClientOp::Trim {
                offset,
                length,
                fua,
            },
            Kind::Zero => ClientOp::WriteZeroes {
                offset,
                length,
                fua,
            },
            Kind::Write => {
                let bytes = Bytes::from(stamped(id, first, count));
                // Sometimes in two pieces, as it arrives from a socket.
                let cut = if self.rng.chance(1, 4) {
                    self.rng.index(bytes.len())
                } else {
                    0
                };
                let data = match cut {
                    0 => smallvec![bytes],
                    cut => smallvec![bytes.slice(..cut), bytes.slice(cut..)],
                };
                ClientOp::Write { offset, data, fua }
            }
        };
        self.note(|| {
            format!(
                "k{host} #{} {kind:?} {first}+{count} fua {fua} trim {trim}",
                id.0
            )
        });
        let tag = u64::from(id.0);
        if let Some(client) = self.clients.get_mut(&host) {
            client.in_flight.insert(tag, id);
        }
        self.session(host, SessionEvent::Client(ClientRequest { tag, op }));
        id
    }

    pub(super) fn reply(&mut self, host: u32, tag: u64, result: Result<ClientReply, ClientError>) {
        let now = self.now;
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let Some(id) = client.in_flight.remove(&tag) else {
            return self.problem(format!(
                "client {host} answered #{tag}, which is not in flight"
            ));
        };
        self.note(|| match &result {
            Ok(_) => format!("k{host} #{tag} done"),
            Err(error) => format!("k{host} #{tag} FAILED {error:?}"),
        });
        let Some(operation) = self.history.operations.get_mut(id.0 as usize) else {
            return;
        };
        let kind = operation.kind;
        match result {
            Ok(ClientReply::Data(segments)) => {
                operation.outcome = Outcome::Done(now);
                let bytes = joined(&segments);
                if bytes.len() != operation.count as usize * SECTOR {
                    return self.problem(format!("#{tag} returned {} bytes", bytes.len()));
                }
                let sectors = (operation.first..).zip(bytes.chunks(SECTOR));
                operation.values = sectors
                    .map(|(sector, b)| decode(sector, b))
                    .collect::<Vec<Value>>();
            }
            Ok(_) => {
                operation.outcome = Outcome::Done(now);
                let start = operation.start;
                let holder = self.metadata.volume().holder.as_ref().map(|h| h.client);
                let holds = self.clients.get(&host).map(|c| c.id) == holder;
                if kind == Kind::Flush && holds && self.total_loss.is_some_and(|loss| loss < start)
                {
                    // The living holder replayed what was lost: nothing is gone.
                    self.total_loss = None;
                    self.lossy.clear();
                }
            }
            Err(error) => {
                operation.outcome = Outcome::Failed(now);
                let excused = match (error, kind) {
                    (ClientError::Io, Kind::Flush) => self.total_loss.is_some(),
                    (ClientError::Io, _) => self.errors_allowed,
                    _ => false,
                };
                if kind == Kind::Flush && excused {
                    self.settle_total_loss();
                } else if !excused {
                    return self.problem(format!("#{tag} {kind:?} failed: {error}"));
                }
            }
        }
        self.arm_submit(host);
    }
}

fn joined(segments: &[ReadSegment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            ReadSegment::Data(data) => bytes.extend_from_slice(data),
            ReadSegment::Zeroes(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    bytes
}
