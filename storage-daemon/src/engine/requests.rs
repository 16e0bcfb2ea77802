//! Requests of clients and pulling daemons: greeting, admission, dispatch.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, VolumeId};
use ashlar_proto::wire::{
    Hello, HelloReply, PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, ReplyBody, Request, RequestBody,
    Status,
};

use super::fencing::{Raised, Tickets};
use super::{
    CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, ChunkStore, ClientRequest, ConnectionId,
    DiskEngine, EngineCommand, FenceKind, REQUEST_BYTES_MAX, REQUESTS_MAX, Replica, Stage, Work,
};
use crate::store::StoreRequest;

/// What a request without data counts for in the limits on bytes.
const REQUEST_BYTES_MIN: usize = 256;

impl<S: ChunkStore> DiskEngine<S> {
    pub(super) fn on_request(
        &mut self,
        now: Time,
        conn: ConnectionId,
        request: Request,
        out: &mut Vec<EngineCommand>,
    ) {
        let connection = self.connections.entry(conn).or_default();
        if connection.closing {
            return;
        }
        let greeted = connection.greeted;
        let (id, volume) = (request.id, request.volume);
        if let RequestBody::Hello(hello) = &request.body {
            let answer = if greeted {
                Err(Status::Invalid)
            } else {
                self.greet(hello)
            };
            match answer {
                Ok(reply) => {
                    if let Some(connection) = self.connections.get_mut(&conn) {
                        connection.greeted = true;
                    }
                    self.reply(conn, id, volume, Ok(ReplyBody::Hello(reply)), out);
                }
                Err(status) => self.refuse_connection(conn, &request, status, out),
            }
            return;
        }
        if !greeted {
            return self.refuse_connection(conn, &request, Status::Invalid, out);
        }
        self.counters.count_request(&request.body);
        if let Err(status) = self.admit(now, conn, request, out) {
            self.reply(conn, id, volume, Err(status), out);
        }
    }

    fn greet(&self, hello: &Hello) -> Result<HelloReply, Status> {
        let newest = hello.version_max.min(PROTOCOL_VERSION_MAX);
        let oldest = hello.version_min.max(PROTOCOL_VERSION_MIN);
        if newest < oldest {
            return Err(Status::Version);
        }
        if let Some(status) = self.refusal() {
            return Err(status);
        }
        let identity = self.identity.ok_or(Status::Busy)?;
        if hello.cluster != identity.cluster
            || hello.cluster.is_nil()
            || hello.disk != identity.disk
        {
            return Err(Status::WrongTarget);
        }
        Ok(HelloReply {
            version: newest,
            disk: identity.disk,
        })
    }

    fn refuse_connection(
        &mut self,
        conn: ConnectionId,
        request: &Request,
        status: Status,
        out: &mut Vec<EngineCommand>,
    ) {
        self.counters.connections_refused += 1;
        self.reply(conn, request.id, request.volume, Err(status), out);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.closing = true;
        }
        out.push(EngineCommand::Close { conn });
    }

    /// Checks a request and starts it, or says why not.
    fn admit(
        &mut self,
        now: Time,
        conn: ConnectionId,
        request: Request,
        out: &mut Vec<EngineCommand>,
    ) -> Result<(), Status> {
        if let Some(status) = self.refusal() {
            return Err(status);
        }
        let Request {
            id,
            volume,
            epoch,
            incarnation,
            body,
        } = request;
        let replica = self.replicas.get(&volume).copied().filter(|r| !r.dropping);
        let creates = matches!(&body, RequestBody::Fence(fence) if fence.create);
        if replica.is_none() && (!creates || volume.is_nil() || self.replicas.contains_key(&volume))
        {
            return Err(Status::UnknownVolume);
        }
        if epoch < self.fence_of(volume) {
            return Err(Status::Fenced);
        }
        let unchecked = incarnation.0 == 0 && matches!(body, RequestBody::Fence(_));
        if !unchecked && incarnation != self.incarnation() {
            return Err(Status::IncarnationMismatch);
        }
        let durable = replica.map_or(Epoch(0), |r| r.fence);
        match body {
            RequestBody::Hello(_) => Err(Status::Invalid),
            RequestBody::Ping => {
                self.reply(conn, id, volume, Ok(ReplyBody::Ping), out);
                Ok(())
            }
            RequestBody::PullStatus { group } => {
                let progress = self.pull_progress(volume, group);
                self.reply(conn, id, volume, Ok(ReplyBody::PullStatus(progress)), out);
                Ok(())
            }
            RequestBody::PullStart(start) => {
                let replica = replica.ok_or(Status::UnknownVolume)?;
                self.start_pull(now, volume, replica.rebuild_epoch, epoch, start, out)?;
                self.reply(conn, id, volume, Ok(ReplyBody::PullStart), out);
                Ok(())
            }
            RequestBody::Fence(fence) => {
                if fence.rebuild_epoch > epoch {
                    return Err(Status::Invalid);
                }
                let kind = FenceKind::Fence(fence);
                let client = self.client(
                    conn,
                    id,
                    volume,
                    epoch,
                    REQUEST_BYTES_MIN,
                    Stage::WaitingFence(kind),
                )?;
                self.raise(now, durable, client, out)
            }
            RequestBody::Configure(descriptor) => {
                if descriptor.volume != volume || descriptor.epoch != epoch {
                    return Err(Status::Invalid);
                }
                let kind = FenceKind::Configure(Box::new(descriptor));
                let client = self.client(
                    conn,
                    id,
                    volume,
                    epoch,
                    REQUEST_BYTES_MIN,
                    Stage::WaitingFence(kind),
                )?;
                self.raise(now, durable, client, out)
            }
            body => {
                let replica = replica.ok_or(Status::UnknownVolume)?;
                self.dispatch(now, conn, id, volume, epoch, replica, body, out)
            }
        }
    }

    /// Hands a plain request to the store.
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of one request, taken apart by its only caller"
    )]
    fn dispatch(
        &mut self,
        now: Time,
        conn: ConnectionId,
        id: ashlar_proto::ids::RequestId,
        volume: VolumeId,
        epoch: Epoch,
        replica: Replica,
        body: RequestBody,
        out: &mut Vec<EngineCommand>,
    ) -> Result<(), Status> {
        let (request, bytes) = store_request(volume, body)?;
        let stage = match request {
            StoreRequest::Flush { .. } if replica.suspect => Stage::Flush,
            StoreRequest::PutLayers { .. } => Stage::Layers,
            _ => Stage::Plain,
        };
        let mut client = self.client(conn, id, volume, epoch, bytes, stage)?;
        if !self.fencing.admit(volume, replica.fence, epoch) {
            return Err(Status::Fenced);
        }
        client.admitted = true;
        self.account(conn, bytes, out);
        self.ask(now, Work::Client(client), request, out);
        Ok(())
    }

    /// A request's entry in the table, if there is room for it.
    fn client(
        &self,
        conn: ConnectionId,
        id: ashlar_proto::ids::RequestId,
        volume: VolumeId,
        epoch: Epoch,
        bytes: usize,
        stage: Stage,
    ) -> Result<ClientRequest, Status> {
        if self.table.len() >= REQUESTS_MAX || self.request_bytes + bytes > REQUEST_BYTES_MAX {
            return Err(Status::Busy);
        }
        Ok(ClientRequest {
            conn,
            id,
            volume,
            epoch,
            admitted: false,
            bytes,
            stage,
        })
    }

    /// Counts a request that is under way; pauses its connection if that is too much.
    fn account(&mut self, conn: ConnectionId, bytes: usize, out: &mut Vec<EngineCommand>) {
        self.request_bytes += bytes;
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.requests += 1;
        connection.bytes += bytes;
        let full = connection.requests >= CONNECTION_REQUESTS_MAX
            || connection.bytes >= CONNECTION_BYTES_MAX;
        if full && !connection.paused {
            connection.paused = true;
            out.push(EngineCommand::Pause { conn });
        }
    }

    /// The reverse of [`Self::account`].
    pub(super) fn unaccount(&mut self, client: &ClientRequest, out: &mut Vec<EngineCommand>) {
        self.request_bytes -= client.bytes;
        let Some(connection) = self.connections.get_mut(&client.conn) else {
            return;
        };
        connection.requests -= 1;
        connection.bytes -= client.bytes;
        let relaxed = connection.requests < CONNECTION_REQUESTS_MAX / 2
            && connection.bytes < CONNECTION_BYTES_MAX / 2;
        if connection.paused && relaxed {
            connection.paused = false;
            out.push(EngineCommand::Resume { conn: client.conn });
        }
    }

    /// R1: raises the fence at once, then waits for lower epochs.
    fn raise(
        &mut self,
        now: Time,
        durable: Epoch,
        client: ClientRequest,
        out: &mut Vec<EngineCommand>,
    ) -> Result<(), Status> {
        let (conn, volume, epoch, bytes) = (client.conn, client.volume, client.epoch, client.bytes);
        // The slot is the ticket: it is taken before the fence knows it.
        let tag = self.table.insert(Work::Client(client));
        let mut dropped = Tickets::new();
        let raised = self
            .fencing
            .raise(volume, durable, epoch, tag as u32, &mut dropped);
        match raised {
            Raised::Refused | Raised::Busy => {
                self.table.remove(tag);
                return Err(if raised == Raised::Busy {
                    Status::Busy
                } else {
                    Status::Fenced
                });
            }
            Raised::Now | Raised::Waits => {}
        }
        self.account(conn, bytes, out);
        for ticket in dropped {
            self.drop_fence(ticket, out);
        }
        self.cancel_pulls(
            now,
            |v, pull| v == volume && pull.order().start.rebuild_epoch < epoch,
            out,
        );
        if raised == Raised::Now {
            self.put_fence(now, tag as u32, out);
        } else {
            self.counters.fences_waited += 1;
        }
        Ok(())
    }

    fn drop_fence(&mut self, ticket: u32, out: &mut Vec<EngineCommand>) {
        if let Some(Work::Client(client)) = self.table.remove_slot(ticket) {
            self.unaccount(&client, out);
            self.reply(
                client.conn,
                client.id,
                client.volume,
                Err(Status::Fenced),
                out,
            );
        }
    }

    /// Everything of a lower epoch is done: makes a fence or configuration durable.
    pub(super) fn put_fence(&mut self, now: Time, ticket: u32, out: &mut Vec<EngineCommand>) {
        let Some(Work::Client(mut client)) = self.table.remove_slot(ticket) else {
            debug_assert!(false, "a fence without a request");
            return;
        };
        let (volume, epoch) = (client.volume, client.epoch);
        let durable = self.replicas.get(&volume).map_or(Epoch(0), |r| r.fence);
        // From here on it counts as a request of its epoch: a higher fence waits for it.
        if !self.fencing.admit(volume, durable, epoch) {
            self.unaccount(&client, out);
            return self.reply(client.conn, client.id, volume, Err(Status::Fenced), out);
        }
        client.admitted = true;
        let request = match std::mem::replace(&mut client.stage, Stage::Plain) {
            Stage::WaitingFence(FenceKind::Fence(fence)) => {
                client.stage = Stage::Fence;
                StoreRequest::PutFence {
                    volume,
                    epoch,
                    create: fence.create,
                    rebuild_epoch: fence.rebuild_epoch,
                    link: fence.link,
                }
            }
            Stage::WaitingFence(FenceKind::Configure(descriptor)) => {
                client.stage = Stage::Descriptor;
                StoreRequest::PutDescriptor {
                    descriptor: *descriptor,
                }
            }
            _ => {
                debug_assert!(false, "only fences wait");
                return;
            }
        };
        self.ask(now, Work::Client(client), request, out);
    }
}

/// The store's request for a plain body, and the bytes that it counts for.
fn store_request(volume: VolumeId, body: RequestBody) -> Result<(StoreRequest, usize), Status> {
    Ok(match body {
        RequestBody::Write(write) => {
            let bytes = write.range.byte_len();
            (
                StoreRequest::Write {
                    volume,
                    write,
                    client: true,
                },
                bytes,
            )
        }
        RequestBody::Repair(write) => {
            let bytes = write.range.byte_len();
            (StoreRequest::Repair { volume, write }, bytes)
        }
        RequestBody::Read(read) => {
            let bytes = read.range.byte_len();
            (StoreRequest::Read { volume, read }, bytes)
        }
        RequestBody::Trim(trim) => (
            StoreRequest::Trim {
                volume,
                trim,
                client: true,
            },
            REQUEST_BYTES_MIN,
        ),
        RequestBody::Flush(flush) => (
            StoreRequest::Flush {
                volume,
                watermark: flush.watermark,
                forget_below: flush.forget_below,
            },
            REQUEST_BYTES_MIN,
        ),
        RequestBody::Collect(collect) => {
            (StoreRequest::Collect { volume, collect }, REQUEST_BYTES_MIN)
        }
        RequestBody::Digest(digest) => (StoreRequest::Digest { volume, digest }, REQUEST_BYTES_MIN),
        RequestBody::ChunkDigests(digests) => (
            StoreRequest::ChunkDigests { volume, digests },
            REQUEST_BYTES_MIN,
        ),
        RequestBody::Layers(layers) => (
            StoreRequest::PutLayers { volume, layers },
            REQUEST_BYTES_MIN,
        ),
        RequestBody::Hello(_)
        | RequestBody::Fence(_)
        | RequestBody::Configure(_)
        | RequestBody::PullStart(_)
        | RequestBody::PullStatus { .. }
        | RequestBody::Ping => return Err(Status::Invalid),
    })
}
