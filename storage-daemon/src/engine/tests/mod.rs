//! Tests of the engine over a store in memory: each states one clause.
#![expect(clippy::unwrap_used, reason = "tests")]

mod fake;
mod fencing;
mod pull;
mod service;
mod simulated;

use ashlar_platform::clock::Time;
use ashlar_proto::descriptor::VolumeDescriptor;
use ashlar_proto::ids::*;
use ashlar_proto::wire::*;
use bytes::Bytes;

use self::fake::FakeStore;
use super::*;

pub(super) const VOLUME: VolumeId = VolumeId([7; 16]);

/// An engine with everything that it said.
pub(super) struct Rig {
    pub engine: DiskEngine<FakeStore>,
    pub now: Time,
    pub replies: Vec<(ConnectionId, Reply)>,
    pub others: Vec<EngineCommand>,
    next_id: u64,
}

impl Rig {
    /// An open disk without replicas.
    pub fn new(disk: u8) -> Self {
        Self::with(FakeStore::new(disk))
    }

    pub fn with(store: FakeStore) -> Self {
        let mut rig = Self {
            engine: DiskEngine::new(store),
            now: Time(1_000_000_000),
            replies: Vec::new(),
            others: Vec::new(),
            next_id: 1,
        };
        rig.tick();
        assert!(matches!(rig.others.pop(), Some(EngineCommand::Ready(_))));
        rig
    }

    /// An open disk with a replica fenced at epoch 5 and two greeted connections, 1 and 2.
    pub fn serving() -> Self {
        let mut rig = Self::new(1);
        rig.greet(1);
        rig.greet(2);
        rig.ask(
            1,
            5,
            RequestBody::Fence(Fence {
                create: true,
                rebuild_epoch: Epoch(0),
                link: None,
            }),
        );
        assert!(matches!(
            rig.answer(),
            Ok(ReplyBody::Fence(FenceReply { existed: false, .. }))
        ));
        rig
    }

    pub fn store(&mut self) -> &mut FakeStore {
        &mut self.engine.store
    }

    pub fn event(&mut self, event: EngineEvent) {
        let mut out = Vec::new();
        self.engine.step(self.now, event, &mut out);
        if self.engine.table.len() <= invariants::CHECKED_REQUESTS_MAX {
            invariants::check(&self.engine).unwrap();
        }
        for command in out {
            match command {
                EngineCommand::Reply { conn, reply } => self.replies.push((conn, reply)),
                other => self.others.push(other),
            }
        }
    }

    pub fn tick(&mut self) {
        self.event(EngineEvent::Tick);
    }

    /// Carries out so many held store requests.
    pub fn release(&mut self, count: usize) {
        self.store().release(count);
        self.tick();
    }

    pub fn hello(&self) -> Hello {
        let identity = self.engine.store.identity;
        Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            cluster: identity.cluster,
            disk: identity.disk,
            client: ClientId([1; 16]),
            ticket: Bytes::new(),
        }
    }

    pub fn greet(&mut self, conn: u64) {
        let hello = self.hello();
        self.ask(conn, 0, RequestBody::Hello(hello));
        assert!(matches!(self.answer(), Ok(ReplyBody::Hello(_))));
    }

    /// Sends a request under an epoch and the right incarnation; its id.
    pub fn ask(&mut self, conn: u64, epoch: u64, body: RequestBody) -> RequestId {
        let incarnation = self.engine.store.identity.incarnation;
        self.ask_incarnation(conn, epoch, incarnation, body)
    }

    pub fn ask_incarnation(
        &mut self,
        conn: u64,
        epoch: u64,
        incarnation: Incarnation,
        body: RequestBody,
    ) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let request = Request {
            id,
            volume: VOLUME,
            epoch: Epoch(epoch),
            incarnation,
            body,
        };
        self.event(EngineEvent::Request {
            conn: ConnectionId(conn),
            request,
        });
        id
    }

    /// The only answer since the last call.
    pub fn answer(&mut self) -> Result<ReplyBody, Status> {
        let mut replies = std::mem::take(&mut self.replies);
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.pop().unwrap().1.result
    }

    /// Ids of the answers since the last call, and whether they are good.
    pub fn answers(&mut self) -> Vec<(u64, Result<(), Status>)> {
        let replies = std::mem::take(&mut self.replies);
        replies
            .into_iter()
            .map(|(_, r)| (r.id.0, r.result.map(|_| ())))
            .collect()
    }
}

pub(super) fn write(block: u32, epoch: u64, sequence: u64) -> RequestBody {
    let data = Bytes::from(vec![sequence as u8; BLOCK_SIZE]);
    RequestBody::Write(Write {
        range: BlockRange::new(ChunkIndex(0), block, 1).unwrap(),
        snapshot: SnapshotNumber(0),
        version: Version::new(epoch, sequence),
        durable: false,
        checksums: [crc32c::crc32c(&data)].into_iter().collect(),
        data: [data].into_iter().collect(),
    })
}

pub(super) fn fence() -> RequestBody {
    RequestBody::Fence(Fence {
        create: false,
        rebuild_epoch: Epoch(0),
        link: None,
    })
}

pub(super) fn flush() -> RequestBody {
    RequestBody::Flush(Flush {
        watermark: Version::ZERO,
        forget_below: Version::ZERO,
    })
}

pub(super) fn configure(epoch: u64) -> RequestBody {
    RequestBody::Configure(VolumeDescriptor {
        volume: VOLUME,
        epoch: Epoch(epoch),
        size_bytes: 1 << 20,
        min_replicas: 1,
        snapshot: SnapshotNumber(0),
        layers: Default::default(),
        parent: None,
        groups: vec![Vec::new()],
        name: "v".into(),
    })
}
