//! A storage node of the simulation: a daemon process with the real disk engine on a simulated disk.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use ashlar_platform::clock::Time;
use ashlar_platform::sim::{
    ConnectionId as NetId, NetworkEvent, PowerCut, Rng, SimClock, SimDisk, SimDiskConfig,
};
use ashlar_proto::ids::Incarnation;
use ashlar_proto::wire::Request;
use storage_daemon::engine::{
    ChunkStore, ConnectionId, DiskEngine, EngineCommand, EngineEvent, PeerId,
};
use storage_daemon::store::{FormatOptions, Store, StoreConfig, StoreIdentity};

use super::frame::Frame;
use super::memory_store::{Media, MemoryStore};
use super::metadata::{CLUSTER, disk_id};

/// A log that wraps around within a run.
const LOG_BYTES_SMALL: u64 = 1 << 20;

/// Which chunk store the nodes run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backend {
    /// The reference store: simple, in memory.
    Memory,
    /// The real chunk store, on the simulated disk.
    Disk,
}

/// What a node does at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeState {
    /// Runs.
    Up,
    /// Stopped by a signal; its kernel still accepts connections and data.
    Frozen,
    /// Killed, or without power.
    Down,
}

/// The engine, whatever store it runs on.
pub trait Engine {
    /// See [`DiskEngine::step`].
    fn step(&mut self, now: Time, event: EngineEvent, out: &mut Vec<EngineCommand>);
    /// See [`DiskEngine::next_deadline`].
    fn next_deadline(&self) -> Option<Time>;
    /// See [`DiskEngine::identity`].
    fn identity(&self) -> Option<StoreIdentity>;
}

impl<S: ChunkStore> Engine for DiskEngine<S> {
    fn step(&mut self, now: Time, event: EngineEvent, out: &mut Vec<EngineCommand>) {
        DiskEngine::step(self, now, event, out);
    }

    fn next_deadline(&self) -> Option<Time> {
        DiskEngine::next_deadline(self)
    }

    fn identity(&self) -> Option<StoreIdentity> {
        DiskEngine::identity(self)
    }
}

/// A node.
pub struct Node {
    /// 1, 2, ..
    pub number: u32,
    /// What it does.
    pub state: NodeState,
    /// Grows with every state change, so that timers of an earlier life do nothing.
    pub generation: u64,
    /// Its clock, the same through all boots.
    pub clock: SimClock,
    /// Its disk.
    pub disk: SimDisk,
    /// The process's engine, while there is one.
    pub engine: Option<Box<dyn Engine>>,
    /// The engine said that its disk failed.
    pub failed: bool,
    /// The engine took an event in this round: a Tick ends it.
    pub touched: bool,
    /// Connections that this process opened to other daemons.
    pub peers: BTreeMap<NetId, PeerId>,
    /// Connections whose requests wait, because the engine asked for a pause.
    pub paused: BTreeMap<ConnectionId, VecDeque<Request>>,
    /// Connections that others opened.
    pub accepted: BTreeSet<NetId>,
    /// Revision of the newest layer list that it said to keep.
    pub layers: u64,
    /// What arrived while frozen.
    pub inbox: VecDeque<NetworkEvent<Frame>>,
    backend: Backend,
    media: Rc<RefCell<Media>>,
    boots: u64,
    rng: Rng,
}

impl Node {
    /// A node that is down, with a formatted disk.
    pub fn new(number: u32, backend: Backend, mut rng: Rng) -> Self {
        let config = SimDiskConfig::with_size(256 << 20);
        let mut disk = SimDisk::new(config, rng.fork(1));
        let identity = StoreIdentity {
            cluster: CLUSTER,
            disk: disk_id(number),
            incarnation: Incarnation(rng.next_u64() | 1),
            incarnation_changed: false,
            damaged: false,
            bad_blocks: 0,
        };
        if backend == Backend::Disk {
            format(&mut disk, &identity, &mut rng);
        }
        let drift = rng.between(0, 400) as i32 - 200;
        Self {
            number,
            state: NodeState::Down,
            generation: 0,
            clock: SimClock::new(rng.below(1 << 40), drift),
            disk,
            engine: None,
            failed: false,
            touched: false,
            peers: BTreeMap::new(),
            paused: BTreeMap::new(),
            accepted: BTreeSet::new(),
            layers: 0,
            inbox: VecDeque::new(),
            backend,
            media: Rc::new(RefCell::new(Media::new(identity))),
            boots: 1,
            rng,
        }
    }

    /// Starts the process.
    pub fn start(&mut self, now: Time) {
        self.state = NodeState::Up;
        self.generation += 1;
        self.failed = false;
        self.engine = Some(match self.backend {
            Backend::Memory => {
                Box::new(DiskEngine::new(MemoryStore::open(self.media.clone()))) as Box<dyn Engine>
            }
            Backend::Disk => {
                let mut boot = [0xb0; 16];
                boot[8..].copy_from_slice(&self.boots.to_be_bytes());
                let (size, now) = (self.disk.size_bytes(), self.clock.local(now));
                Box::new(DiskEngine::new(Store::open(small_store(), size, boot, now)))
            }
        });
    }

    fn drop_process(&mut self) {
        self.state = NodeState::Down;
        self.generation += 1;
        self.engine = None;
        self.peers.clear();
        self.paused.clear();
        self.accepted.clear();
        self.inbox.clear();
    }

    /// The process is killed.
    pub fn kill(&mut self) {
        self.drop_process();
        self.disk.crash_process();
    }

    /// The machine loses power.
    pub fn lose_power(&mut self) {
        self.drop_process();
        self.boots += 1;
        self.disk.power_cut(PowerCut::Random);
        self.media.borrow_mut().power_cut(&mut self.rng);
    }

    /// The incarnation that the open store has.
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.engine
            .as_ref()?
            .identity()
            .map(|identity| identity.incarnation)
    }

    /// When the process has something to do, in true time.
    pub fn next_time(&self) -> Option<Time> {
        if self.state != NodeState::Up {
            return None;
        }
        let timer = self
            .engine
            .as_ref()?
            .next_deadline()
            .map(|t| self.clock.true_time(t));
        [timer, self.disk.next_completion()]
            .into_iter()
            .flatten()
            .min()
    }
}

/// Small bounds, so that runs of a few hundred requests reach them.
fn small_store() -> StoreConfig {
    StoreConfig {
        cache_bytes: 64 << 10,
        batches_in_flight_max: 3,
        batch_bytes_max: 64 << 10,
        write_back_burst_bytes: 128 << 10,
        idle_write_back: Duration::from_millis(400),
        discard_after: Some(Duration::from_millis(100)),
        ..StoreConfig::default()
    }
}

fn format(disk: &mut SimDisk, identity: &StoreIdentity, rng: &mut Rng) {
    let options = FormatOptions {
        cluster: identity.cluster,
        disk: identity.disk,
        size_bytes: disk.size_bytes(),
        incarnation: identity.incarnation,
        log_bytes: rng.coin().then_some(LOG_BYTES_SMALL),
        replica_slots: Some(4),
    };
    match Store::format_plan(&options) {
        Ok(plan) => plan
            .iter()
            .for_each(|(offset, data)| disk.poke(*offset, data)),
        Err(error) => panic!("a simulated disk cannot be formatted: {error}"),
    }
}
