//! R7 end to end: two engines over the real store on simulated disks, with writes of the rebuild's epoch
//! going on meanwhile, a source that is killed, and a model of what the target must hold in the end.

use std::collections::BTreeMap;

use ashlar_platform::disk::DiskCompletion;
use ashlar_platform::sim::{Rng, SimDisk, SimDiskConfig};

use super::*;
use crate::store::{FormatOptions, Store, StoreConfig};

const E: u64 = 10;
const DISK_BYTES: u64 = 64 << 20;
const CHUNKS: u32 = 5;
const LAYERS: u32 = 2;
const BLOCKS: u16 = 40;

/// Blocks by (chunk, layer, block): version and the byte that they are filled with; `None` is a tombstone.
type Model = BTreeMap<Cursor, (Version, Option<u8>)>;

struct Machine {
    engine: DiskEngine<Store>,
    disk: SimDisk,
    now: Time,
    replies: Vec<(ConnectionId, Reply)>,
    others: Vec<EngineCommand>,
    next_id: u64,
}

fn open(now: Time) -> DiskEngine<Store> {
    DiskEngine::new(Store::open(
        StoreConfig::default(),
        DISK_BYTES,
        [3; 16],
        now,
    ))
}

impl Machine {
    fn new(id: u8, seed: u64) -> Self {
        let mut disk = SimDisk::new(SimDiskConfig::with_size(DISK_BYTES), Rng::new(seed));
        let plan = Store::format_plan(&FormatOptions {
            cluster: ClusterId([9; 16]),
            disk: DiskId([id; 16]),
            size_bytes: DISK_BYTES,
            incarnation: Incarnation(u64::from(id)),
            log_bytes: Some(4 << 20),
            replica_slots: Some(2),
        })
        .unwrap();
        for (offset, data) in &plan {
            disk.poke(*offset, data);
        }
        let now = Time(1_000_000_000);
        let (replies, others) = (Vec::new(), Vec::new());
        let mut machine = Self {
            engine: open(now),
            disk,
            now,
            replies,
            others,
            next_id: 1,
        };
        machine.settle();
        machine
    }

    /// The process dies and is started again under the same kernel.
    fn restart(&mut self) {
        self.disk.crash_process();
        self.engine = open(self.now);
        self.replies.clear();
        self.others.clear();
        self.settle();
    }

    fn event(&mut self, event: EngineEvent) {
        let mut out = Vec::new();
        self.engine.step(self.now, event, &mut out);
        for command in out {
            match command {
                EngineCommand::Disk(command) => self.disk.submit(self.now, command),
                EngineCommand::Reply { conn, reply } => self.replies.push((conn, reply)),
                EngineCommand::Failed { message } => panic!("{message}"),
                other => self.others.push(other),
            }
        }
    }

    /// Lets the disk finish everything that it was asked.
    fn settle(&mut self) {
        self.event(EngineEvent::Tick);
        while let Some(at) = self.disk.next_completion() {
            self.now = self.now.max(at);
            let mut done: Vec<DiskCompletion> = Vec::new();
            self.disk.poll(self.now, &mut done);
            for completion in done {
                self.event(EngineEvent::Disk(completion));
            }
            self.event(EngineEvent::Tick);
        }
        invariants::check(&self.engine).unwrap();
    }

    fn send(&mut self, conn: u64, epoch: u64, body: RequestBody) {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let incarnation = self.engine.identity().unwrap().incarnation;
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
    }

    /// Asks and waits for the disk; replies to others are kept.
    fn ask(&mut self, conn: u64, epoch: u64, body: RequestBody) -> Result<ReplyBody, Status> {
        let id = RequestId(self.next_id);
        self.send(conn, epoch, body);
        self.settle();
        let index = self
            .replies
            .iter()
            .position(|(c, r)| c.0 == conn && r.id == id)
            .unwrap();
        self.replies.remove(index).1.result
    }

    fn greet(&mut self, conn: u64) {
        let identity = self.engine.identity().unwrap();
        let hello = Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            cluster: identity.cluster,
            disk: identity.disk,
            client: ClientId([1; 16]),
            ticket: Bytes::new(),
        };
        self.ask(conn, 0, RequestBody::Hello(hello)).unwrap();
    }

    fn put(&mut self, epoch: u64, at: Cursor, version: Version, byte: Option<u8>) {
        let range = BlockRange::new(at.chunk, u32::from(at.block), 1).unwrap();
        let snapshot = at.snapshot;
        let body = match byte {
            Some(byte) => {
                let data = Bytes::from(vec![byte; BLOCK_SIZE]);
                let checksums = [crc32c::crc32c(&data)].into_iter().collect();
                let data = [data].into_iter().collect();
                RequestBody::Write(Write {
                    range,
                    snapshot,
                    version,
                    durable: false,
                    checksums,
                    data,
                })
            }
            None => RequestBody::Trim(Trim {
                range,
                snapshot,
                version,
                durable: false,
            }),
        };
        let answer = self.ask(1, epoch, body);
        assert!(matches!(answer, Ok(ReplyBody::Written(_))), "{answer:?}");
    }

    /// Everything that the replica holds, read block by block.
    fn contents(&mut self, epoch: u64) -> Model {
        let mut model = Model::new();
        for chunk in 0..CHUNKS {
            for layer in 0..LAYERS {
                let range = BlockRange::new(ChunkIndex(chunk), 0, u32::from(BLOCKS)).unwrap();
                let read = Read {
                    range,
                    snapshot: SnapshotNumber(layer),
                    exact_layer: true,
                };
                let Ok(ReplyBody::Read(reply)) = self.ask(1, epoch, RequestBody::Read(read)) else {
                    panic!()
                };
                let joined = reply.data.concat();
                let mut data = joined.chunks(BLOCK_SIZE);
                for (block, info) in reply.blocks.iter().enumerate() {
                    let at = cursor(chunk, layer, block as u16);
                    match info.state {
                        BlockState::Absent => {}
                        BlockState::Tombstone => drop(model.insert(at, (info.version, None))),
                        BlockState::Data => {
                            let byte = data.next().unwrap()[0];
                            model.insert(at, (info.version, Some(byte)));
                        }
                        BlockState::Bad => panic!("a bad block at {at:?}"),
                    }
                }
            }
        }
        model
    }
}

fn cursor(chunk: u32, layer: u32, block: u16) -> Cursor {
    Cursor {
        chunk: ChunkIndex(chunk),
        snapshot: SnapshotNumber(layer),
        block,
    }
}

/// Source and target, with the messages between them.
struct Rebuild {
    source: Machine,
    target: Machine,
    rng: Rng,
    source_model: Model,
    target_model: Model,
    /// Connections to the source that a restart of it broke.
    sequence: u64,
}

impl Rebuild {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (source, target) = (
            Machine::new(1, rng.next_u64()),
            Machine::new(2, rng.next_u64()),
        );
        let models = (Model::new(), Model::new());
        let mut rebuild = Self {
            source,
            target,
            rng,
            source_model: models.0,
            target_model: models.1,
            sequence: 0,
        };
        for machine in [&mut rebuild.source, &mut rebuild.target] {
            machine.greet(1);
            let fence = Fence {
                create: true,
                rebuild_epoch: Epoch(0),
                link: None,
            };
            machine.ask(1, 1, RequestBody::Fence(fence)).unwrap();
        }
        rebuild
    }

    fn random_place(&mut self) -> (Cursor, Option<u8>) {
        let rng = &mut self.rng;
        // Layers only grow: the younger layer is written last in a chunk's life, here at random chunks.
        let at = cursor(
            rng.below(u64::from(CHUNKS)) as u32,
            0,
            rng.below(u64::from(BLOCKS)) as u16,
        );
        let byte = (!rng.chance(1, 6)).then(|| rng.below(250) as u8 + 1);
        (at, byte)
    }

    /// A write of one version to the source, the target, or both.
    fn write(&mut self, epoch: u64, version_epoch: u64, layer: u32, to: (bool, bool)) {
        let (mut at, byte) = self.random_place();
        at.snapshot = SnapshotNumber(layer);
        self.sequence += 1;
        let version = Version::new(version_epoch, self.sequence);
        let put = |machine: &mut Machine, model: &mut Model| {
            machine.put(epoch, at, version, byte);
            let entry = model.entry(at).or_insert((Version::ZERO, None));
            if version > entry.0 {
                *entry = (version, byte);
            }
        };
        if to.0 {
            put(&mut self.source, &mut self.source_model);
        }
        if to.1 {
            put(&mut self.target, &mut self.target_model);
        }
    }

    /// Histories that agree in most, with writes that only one of them saw.
    fn diverge(&mut self) {
        for layer in 0..LAYERS {
            for _ in 0..60 {
                let to = match self.rng.below(4) {
                    0 => (true, false),
                    1 => (false, true),
                    _ => (true, true),
                };
                let version_epoch = self.rng.between(2, E - 1);
                self.write(E - 1, version_epoch, layer, to);
            }
        }
    }

    fn begin(&mut self) {
        self.source.ask(1, E, fence()).unwrap();
        let target = Fence {
            create: true,
            rebuild_epoch: Epoch(E),
            link: None,
        };
        self.target.ask(1, E, RequestBody::Fence(target)).unwrap();
        let source = self.source.engine.identity().unwrap();
        let order = PullStart {
            group: GroupIndex(0),
            group_count: 1,
            rebuild_epoch: Epoch(E),
            source: source.disk,
            source_incarnation: source.incarnation,
            source_address: "127.0.0.1:1".into(),
            bytes_per_second: 0,
        };
        assert_eq!(
            self.target.ask(1, E, RequestBody::PullStart(order)),
            Ok(ReplyBody::PullStart)
        );
    }

    fn state(&mut self) -> PullState {
        let status = RequestBody::PullStatus {
            group: GroupIndex(0),
        };
        let Ok(ReplyBody::PullStatus(progress)) = self.target.ask(1, E, status) else {
            panic!()
        };
        progress.state
    }

    /// Carries what is to be carried, once; whether anything was.
    fn carry(&mut self) -> bool {
        let mut moved = false;
        for command in std::mem::take(&mut self.target.others) {
            moved = true;
            match command {
                EngineCommand::PeerConnect { peer, .. } => {
                    self.target.event(EngineEvent::PeerUp { peer })
                }
                EngineCommand::PeerSend { peer, request } => {
                    let conn = ConnectionId(1000 + peer.0);
                    self.source.event(EngineEvent::Request { conn, request });
                }
                EngineCommand::PeerClose { peer } => {
                    let conn = ConnectionId(1000 + peer.0);
                    self.source.event(EngineEvent::ConnClosed { conn });
                }
                _ => {}
            }
        }
        self.source.settle();
        for (conn, reply) in std::mem::take(&mut self.source.replies) {
            moved = true;
            self.target.event(EngineEvent::PeerReply {
                peer: PeerId(conn.0 - 1000),
                reply,
            });
        }
        self.target.settle();
        moved
    }

    fn kill_source(&mut self) {
        self.source.restart();
        self.source.greet(1);
        let peers: Vec<PeerId> = self.target.engine.peers.keys().copied().collect();
        for peer in peers {
            self.target.event(EngineEvent::PeerDown { peer });
        }
        self.target.others.clear();
    }

    /// What the target must hold in the end.
    fn expected(&self) -> Model {
        let mut expected: Model = self.source_model.clone();
        for (at, &(version, byte)) in &self.target_model {
            if version.epoch >= Epoch(E) {
                let entry = expected.entry(*at).or_insert((Version::ZERO, None));
                if version > entry.0 {
                    *entry = (version, byte);
                }
            }
        }
        expected
    }
}

#[test]
fn the_target_ends_with_the_sources_truth_and_every_newer_write() {
    for seed in 0..150 {
        let mut rebuild = Rebuild::new(seed);
        rebuild.diverge();
        rebuild.begin();
        let kill_after = (seed % 3 == 0).then(|| rebuild.rng.between(2, 8));
        let mut rounds = 0;
        while rebuild.state() == PullState::Running {
            if rebuild.rng.chance(1, 3) {
                let layer = LAYERS - 1;
                rebuild.write(E, E, layer, (true, true));
            }
            if Some(rounds) == kill_after {
                rebuild.kill_source();
            }
            if !rebuild.carry() {
                let deadline = rebuild.target.engine.next_deadline().unwrap();
                rebuild.target.now = rebuild.target.now.max(deadline);
                rebuild.target.settle();
            }
            rounds += 1;
            assert!(rounds < 2000, "seed {seed}: no end");
        }
        assert_eq!(rebuild.state(), PullState::Complete, "seed {seed}");
        let expected = rebuild.expected();
        assert_eq!(
            rebuild.source.contents(E),
            rebuild.source_model,
            "seed {seed}: the source"
        );
        assert_eq!(rebuild.target.contents(E), expected, "seed {seed}");
        // Durable: also after the target's process died.
        rebuild.target.ask(1, E, flush()).unwrap();
        rebuild.target.restart();
        rebuild.target.greet(1);
        assert_eq!(
            rebuild.target.contents(E),
            expected,
            "seed {seed}, opened again"
        );
    }
}
