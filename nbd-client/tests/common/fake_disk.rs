//! A disk in memory that speaks the data protocol well enough for a session: blocks with versions,
//! a fence, no snapshots, nothing durable.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use ashlar_proto::ids::{BLOCK_SIZE, CHUNK_SIZE, ClusterId, DiskId, Epoch, Incarnation, Version};
use ashlar_proto::wire::{
    BlockInfo, BlockState, Decoded, Direction, Entries, FenceReply, HelloReply, ReadReply, Reply,
    ReplyBody, Request, RequestBody, Status, WriteOutcome, decode, encode_reply,
};
use bytes::{Bytes, BytesMut};

/// The only life of the store.
const INCARNATION: Incarnation = Incarnation(7);

struct Block {
    version: Version,
    checksum: u32,
    data: Option<Bytes>,
}

#[derive(Default)]
struct State {
    blocks: BTreeMap<(u32, u16), Block>,
    fence: Epoch,
    existed: bool,
    watermark: Version,
    connections: Vec<TcpStream>,
    dead: bool,
}

/// The disk.
pub struct FakeDisk {
    pub id: DiskId,
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl FakeDisk {
    pub fn start(cluster: ClusterId) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (id, state) = (DiskId::generate(), Arc::new(Mutex::new(State::default())));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let mut state = shared.lock().unwrap();
                if state.dead {
                    return;
                }
                state.connections.push(stream.try_clone().unwrap());
                drop(state);
                let shared = shared.clone();
                std::thread::spawn(move || serve(stream, cluster, id, &shared));
            }
        });
        Self { id, address, state }
    }

    /// Ends all connections, and takes no new one.
    pub fn kill(&self) {
        let mut state = self.state.lock().unwrap();
        state.dead = true;
        for connection in state.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        // The listener notices, and closes.
        let _ = TcpStream::connect(self.address);
    }

    /// One byte of the only volume.
    pub fn byte(&self, offset: u64) -> u8 {
        let state = self.state.lock().unwrap();
        let chunk = (offset / CHUNK_SIZE) as u32;
        let block = (offset % CHUNK_SIZE / BLOCK_SIZE as u64) as u16;
        let found = state
            .blocks
            .get(&(chunk, block))
            .and_then(|b| b.data.as_ref());
        found.map_or(0, |data| data[(offset % BLOCK_SIZE as u64) as usize])
    }
}

fn serve(mut stream: TcpStream, cluster: ClusterId, id: DiskId, state: &Mutex<State>) {
    stream.set_nodelay(true).unwrap();
    let mut input = BytesMut::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let Ok(count @ 1..) = stream.read(&mut buffer) else {
            return;
        };
        input.extend_from_slice(&buffer[..count]);
        let mut out = Vec::new();
        while let Some(Decoded::Request(request)) = decode(&mut input, Direction::Requests).unwrap()
        {
            encode_reply(
                &answer(cluster, id, &mut state.lock().unwrap(), request),
                &mut out,
            );
        }
        for bytes in out {
            if stream.write_all(&bytes).is_err() {
                return;
            }
        }
    }
}

fn answer(cluster: ClusterId, id: DiskId, state: &mut State, request: Request) -> Reply {
    let result = match &request.body {
        RequestBody::Hello(hello) if hello.cluster != cluster || hello.disk != id => {
            Err(Status::WrongTarget)
        }
        RequestBody::Hello(_) => Ok(ReplyBody::Hello(HelloReply {
            version: 1,
            disk: id,
        })),
        _ if request.epoch < state.fence => Err(Status::Fenced),
        _ => state.carry_out(&request),
    };
    Reply {
        id: request.id,
        volume: request.volume,
        fence: state.fence,
        incarnation: INCARNATION,
        result,
    }
}

impl State {
    fn carry_out(&mut self, request: &Request) -> Result<ReplyBody, Status> {
        Ok(match &request.body {
            RequestBody::Fence(fence) => {
                if !self.existed && !fence.create {
                    return Err(Status::UnknownVolume);
                }
                let existed = std::mem::replace(&mut self.existed, true);
                self.fence = request.epoch;
                ReplyBody::Fence(FenceReply {
                    existed,
                    suspect: false,
                    damaged: false,
                    watermark: self.watermark,
                    highest: self
                        .blocks
                        .values()
                        .map(|b| b.version)
                        .max()
                        .unwrap_or_default(),
                    written: !self.blocks.is_empty(),
                })
            }
            RequestBody::Configure(_) => {
                self.fence = request.epoch;
                ReplyBody::Configure
            }
            RequestBody::Write(write) => {
                let data: Vec<u8> = write.data.iter().flatten().copied().collect();
                let data = Bytes::from(data);
                for (index, block) in write.range.blocks().enumerate() {
                    let data = data.slice(index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE);
                    assert_eq!(crc32c::crc32c(&data), write.checksums[index]);
                    let checksum = write.checksums[index];
                    self.put(
                        (write.range.chunk.0, block),
                        write.version,
                        checksum,
                        Some(data),
                    );
                }
                ReplyBody::Written(WriteOutcome::Applied)
            }
            RequestBody::Trim(trim) => {
                for block in trim.range.blocks() {
                    self.put((trim.range.chunk.0, block), trim.version, 0, None);
                }
                ReplyBody::Written(WriteOutcome::Applied)
            }
            RequestBody::Read(read) => {
                let mut reply = ReadReply {
                    range: read.range,
                    blocks: Default::default(),
                    data: Default::default(),
                };
                for block in read.range.blocks() {
                    let found = self.blocks.get(&(read.range.chunk.0, block));
                    reply.blocks.push(BlockInfo {
                        state: match found {
                            None => BlockState::Absent,
                            Some(Block { data: None, .. }) => BlockState::Tombstone,
                            Some(_) => BlockState::Data,
                        },
                        version: found.map(|b| b.version).unwrap_or_default(),
                        checksum: found.map_or(0, |b| b.checksum),
                    });
                    reply.data.extend(found.and_then(|b| b.data.clone()));
                }
                ReplyBody::Read(reply)
            }
            RequestBody::Flush(flush) => {
                self.watermark = self.watermark.max(flush.watermark);
                ReplyBody::Flush
            }
            RequestBody::Collect(_) | RequestBody::Digest(_) => ReplyBody::Entries(Entries {
                entries: Vec::new(),
                next: None,
            }),
            RequestBody::Ping => ReplyBody::Ping,
            _ => return Err(Status::Invalid),
        })
    }

    fn put(&mut self, at: (u32, u16), version: Version, checksum: u32, data: Option<Bytes>) {
        if self.blocks.get(&at).is_none_or(|b| b.version < version) {
            self.blocks.insert(
                at,
                Block {
                    version,
                    checksum,
                    data,
                },
            );
        }
    }
}
