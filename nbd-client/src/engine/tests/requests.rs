//! Requests of clients, as tests make them.

use ashlar_proto::wire::Payload;
use bytes::Bytes;

use super::world::World;
use crate::engine::*;

impl World {
    /// Hands a session a request; returns its tag.
    pub(super) fn submit(&mut self, client: usize, op: ClientOp) -> u64 {
        self.tag += 1;
        let tag = self.tag;
        self.oracle.invoked(tag, client, self.now, &op);
        self.clients[client].pending.insert(tag, op.clone());
        self.feed(client, SessionEvent::Client(ClientRequest { tag, op }));
        tag
    }

    /// A write of sectors (512 bytes), each holding a stamp that is unique to this write.
    pub(super) fn write(&mut self, client: usize, sector: u64, count: u64, fua: bool) -> u64 {
        let stamp = self.tag + 1;
        let mut bytes = vec![0u8; count as usize * 512];
        for chunk in bytes.chunks_mut(512) {
            chunk[..8].copy_from_slice(&stamp.to_le_bytes());
            chunk[504..].copy_from_slice(&stamp.to_le_bytes());
        }
        let data = Payload::from_iter([Bytes::from(bytes)]);
        self.submit(
            client,
            ClientOp::Write {
                offset: sector * 512,
                data,
                fua,
            },
        )
    }

    pub(super) fn read(&mut self, client: usize, sector: u64, count: u64) -> u64 {
        let (offset, length) = (sector * 512, count as u32 * 512);
        self.submit(client, ClientOp::Read { offset, length })
    }
}
