//! What one 4 KiB request costs in the session, without world, network or disk.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{BLOCK_SIZE, Incarnation, Version};
use ashlar_proto::wire::*;
use bytes::Bytes;

use super::world::World;
use crate::engine::*;

const DEPTH: u64 = 32;

/// Prints nanoseconds per write and read with three replicas at depth 32.
pub(super) fn measure() {
    let mut world = World::new(1, 3, 1, 2);
    let client = world.open(|_| {});
    world.run_for(std::time::Duration::from_millis(50));
    let incarnations: Vec<Incarnation> = world.disks.iter().map(|d| d.incarnation).collect();
    let disks: Vec<_> = world.disks.iter().map(|d| d.id).collect();
    let mut now = world.now;
    let session = &mut world.clients[client].session;
    let data = Bytes::from(vec![1u8; BLOCK_SIZE]);
    let checksum = crc32c::crc32c(&data);
    for (name, writing) in [("write", true), ("read", false)] {
        let rounds = 20_000u64;
        let mut out = Vec::new();
        let mut sent = Vec::new();
        let began = std::time::Instant::now();
        for round in 0..rounds {
            now += 1000;
            for i in 0..DEPTH {
                let offset = (round * DEPTH + i) * 7919 % 4096 * BLOCK_SIZE as u64;
                let op = if writing {
                    ClientOp::Write {
                        offset,
                        data: Payload::from_iter([data.clone()]),
                        fua: false,
                    }
                } else {
                    ClientOp::Read {
                        offset,
                        length: BLOCK_SIZE as u32,
                    }
                };
                session.step(
                    Time(now),
                    SessionEvent::Client(ClientRequest { tag: i, op }),
                    &mut out,
                );
            }
            while !out.is_empty() {
                sent.append(&mut out);
                for command in sent.drain(..) {
                    let SessionCommand::Send { disk, request } = command else {
                        continue;
                    };
                    let index = disks.iter().position(|d| *d == disk).unwrap();
                    let body = match &request.body {
                        RequestBody::Write(_) => ReplyBody::Written(WriteOutcome::Applied),
                        RequestBody::Flush(_) => ReplyBody::Flush,
                        RequestBody::Ping => ReplyBody::Ping,
                        RequestBody::Read(read) => ReplyBody::Read(ReadReply {
                            range: read.range,
                            blocks: [BlockInfo {
                                state: BlockState::Data,
                                version: Version::new(1, 1),
                                checksum,
                            }]
                            .into_iter()
                            .collect(),
                            data: Payload::from_iter([data.clone()]),
                        }),
                        other => panic!("{other:?}"),
                    };
                    let reply = Reply {
                        id: request.id,
                        volume: request.volume,
                        fence: request.epoch,
                        incarnation: incarnations[index],
                        result: Ok(body),
                    };
                    session.step(Time(now), SessionEvent::Reply { disk, reply }, &mut out);
                }
            }
        }
        let each = began.elapsed().as_nanos() as u64 / (rounds * DEPTH);
        println!("{name}: {each} ns (crc32c, three replies and this loop included)");
    }
}
