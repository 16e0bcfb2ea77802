//! One seed from beginning to end: load and faults, healing, convergence, final reads, power cycle,
//! judgement.

use std::collections::BTreeMap;

use ashlar_platform::sim::{NetworkConfig, Rng};
use ashlar_proto::ids::ChunkIndex;
use ashlar_proto::ids::{ClientId, Epoch, GroupIndex, Incarnation, RequestId, Version, VolumeId};
use ashlar_proto::wire::{
    BlockState, ChunkDigests, Cursor, Digest, Reply, ReplyBody, Request, RequestBody,
};
use storage_daemon::engine::{ConnectionId, EngineEvent};

use super::cluster::{AUDIT, Cluster, Setup, Timer, disk_of, hello};
use super::history::Kind;
use super::metadata::{Shape, VOLUME, node_of};
use super::node::Backend;
use super::oracle;
use super::schedule::{self, MS, Schedule};
use super::workload::{Request as UserRequest, Workload};
use super::{clones, growth, snapshots};

/// Once faults stop, everything must be well within this time. The longest chain is: a lease of 2 s, an
/// opener's patience, several exclusions and rebuilds that interrupt each other.
const SETTLE_MS: u64 = 40_000;
/// How often the end of settling is looked for.
const LOOK_MS: u64 = 20;
/// Client requests of a run.
const REQUESTS: u64 = 160;

/// How to run seeds.
#[derive(Clone, Debug)]
pub struct Options {
    /// The chunk store; `None`: the seed chooses.
    pub backend: Option<Backend>,
    /// Whether schedules may damage data.
    pub damage: bool,
    /// Clients that only read come and go.
    pub readers: bool,
    /// Snapshots are taken and deleted, and the volume grows.
    pub snapshots: bool,
    /// The volume is a clone.
    pub clones: bool,
    /// A mistake for sessions to make.
    #[cfg(feature = "planted-bugs")]
    pub planted_bug: Option<nbd_client::engine::PlantedBug>,
    /// Keep a trace.
    pub verbose: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backend: None,
            damage: true,
            readers: false,
            snapshots: false,
            clones: false,
            #[cfg(feature = "planted-bugs")]
            planted_bug: None,
            verbose: false,
        }
    }
}

/// What came of a seed.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What is wrong; `None`: nothing.
    pub failure: Option<String>,
    /// Digest of the history.
    pub digest: u64,
    /// Client requests made, and those answered.
    pub requests: (usize, usize),
    /// Snapshots committed.
    pub snapshots: u64,
    /// Times that the volume grew.
    pub resizes: u64,
    /// The faults.
    pub schedule: Schedule,
    /// Every event, if asked for.
    pub trace: Vec<String>,
}

/// Runs a seed.
pub fn run(seed: u64, options: &Options) -> Report {
    let mut rng = Rng::new(seed);
    let shape = shape(&mut rng);
    let drawn = if rng.chance(1, 4) {
        Backend::Memory
    } else {
        Backend::Disk
    };
    // The reference store knows no links.
    let backend = options.backend.unwrap_or(drawn);
    let backend = if options.clones {
        Backend::Disk
    } else {
        backend
    };
    let damage = options.damage && backend != Backend::Memory && shape.replicas == 3;
    let mut schedule = schedule::generate(&mut rng, shape.nodes, damage);
    if options.readers {
        schedule::add_readers(&mut rng, &mut schedule);
    }
    let grows = if options.snapshots {
        growth::sizes(&mut rng, shape.size_bytes)
    } else {
        Vec::new()
    };
    let last_size = grows.last().copied().unwrap_or(shape.size_bytes);
    let workload = Workload::generate(&mut rng, last_size / 512, schedule.duration, REQUESTS);
    let jitter_ns = *rng.pick(&[20_000, 200_000, 2_000_000]).unwrap_or(&20_000);
    let network = NetworkConfig {
        latency_ns: 20_000,
        jitter_ns,
        spike_one_in: if rng.coin() { rng.between(20, 200) } else { 0 },
        spike_ns: 100_000_000,
    };
    let setup = Setup {
        shape,
        backend,
        use_codec: rng.chance(1, 4),
        clones: options.clones,
        grows,
        network,
        #[cfg(feature = "planted-bugs")]
        planted_bug: options.planted_bug,
        verbose: options.verbose,
    };
    let mut cluster = Cluster::new(setup, workload, REQUESTS, rng.fork(3));
    if options.snapshots {
        for _ in 0..rng.between(2, 12) {
            cluster.timer(rng.between(50 * MS, schedule.duration), Timer::Snapshot);
        }
        for _ in 0..cluster.setup.grows.len() {
            cluster.timer(rng.between(50 * MS, schedule.duration), Timer::Grow);
        }
    }
    let mut ready = Ok(());
    if options.clones {
        ready = clones::prepare(&mut cluster, &mut rng);
    }
    let failure = ready.and_then(|()| execute(&mut cluster, &schedule)).err();
    let operations = &cluster.history.operations;
    Report {
        seed,
        failure,
        digest: cluster.history.digest() ^ cluster.now().0,
        requests: (
            operations.len(),
            operations.iter().filter(|op| op.done().is_some()).count(),
        ),
        snapshots: cluster.metadata.snapshots.taken,
        resizes: cluster.resizes,
        schedule,
        trace: std::mem::take(&mut cluster.trace),
    }
}

fn shape(rng: &mut Rng) -> Shape {
    let (replicas, min_replicas) = match rng.below(20) {
        0 => (1, 1),
        1..=3 => (2, 1),
        4 => (3, 1),
        _ => (3, 2),
    };
    let size_bytes = rng.between(1, 4) * (4 << 20) + rng.between(8, 600) * 4096;
    Shape {
        nodes: 3,
        replicas,
        min_replicas,
        groups: rng.between(1, 2) as u32,
        size_bytes,
    }
}

fn execute(cluster: &mut Cluster, schedule: &Schedule) -> Result<(), String> {
    // What went before (the origin of a clone) does not count.
    let begin = if cluster.setup.clones {
        cluster.now().0
    } else {
        0
    };
    cluster.arm(schedule);
    cluster.run_until(cluster.in_ms(50));
    cluster.new_client(false);
    cluster.run_until(ashlar_platform::clock::Time(begin + schedule.duration));
    healthy(cluster)?;
    cluster.heal();
    settle(cluster)?;
    finish(cluster)?;
    // After damage to one replica the others must not become suspect: an opener would wait for a person.
    if !schedule.damages && cluster.rng.coin() {
        cluster.power_cycle();
        settle(cluster)?;
        finish(cluster)?;
    }
    judge(cluster)
}

fn healthy(cluster: &Cluster) -> Result<(), String> {
    match cluster.problems.first() {
        Some(problem) => Err(problem.clone()),
        None => Ok(()),
    }
}

/// Rule "liveness": every request of the living client is answered, zombies have stopped, and the volume
/// is fully redundant, within a bound.
fn settle(cluster: &mut Cluster) -> Result<(), String> {
    let end = cluster.in_ms(SETTLE_MS);
    loop {
        cluster.run_until(cluster.in_ms(LOOK_MS));
        healthy(cluster)?;
        cluster.follow_holder();
        let Some(client) = cluster.clients.get(&cluster.newest) else {
            return Err("no client".into());
        };
        let zombies = cluster
            .clients
            .values()
            .filter(|c| c.host != cluster.newest && c.lives())
            .count();
        let redundant = cluster.metadata.fully_redundant() && cluster.layers_are_known();
        let grown = client.size_bytes == cluster.metadata.volume().size_bytes;
        if client.serving && grown && client.in_flight.is_empty() && zombies == 0 && redundant {
            return Ok(());
        }
        if cluster.now() > end {
            let unanswered: Vec<_> = client.in_flight.values().collect();
            return Err(format!(
                "not settled {SETTLE_MS} ms after the last fault: serving {}, unanswered {unanswered:?}, \
                 {zombies} zombies, fully redundant {redundant}",
                client.serving
            ));
        }
    }
}

/// Flushes, reads everything, compares the replicas.
fn finish(cluster: &mut Cluster) -> Result<(), String> {
    let host = cluster.newest;
    let flush = UserRequest {
        kind: Kind::Flush,
        trim: false,
        first: 0,
        count: 0,
        fua: false,
    };
    cluster.submit(host, flush);
    settle(cluster)?;
    cluster.everything_durable = true;
    for (first, count) in cluster.workload.everything() {
        cluster.submit(
            host,
            UserRequest {
                kind: Kind::Read,
                first,
                count,
                ..flush
            },
        );
    }
    settle(cluster)?;
    audit(cluster)?;
    snapshots::read_back(cluster)?;
    clones::read_back(cluster)
}

type Contents = BTreeMap<(u32, u32, u16), (BlockState, Version, u32)>;

/// Rule "convergence": the in-sync replicas of each group hold the same blocks.
fn audit(cluster: &mut Cluster) -> Result<(), String> {
    let volume = cluster.metadata.volume().clone();
    cluster.audits += 1;
    for node in 1..=cluster.setup.shape.nodes {
        ask(cluster, node, None)?;
    }
    for (index, group) in volume.groups.iter().enumerate() {
        let mut all: Vec<(u32, Contents)> = Vec::new();
        for replica in group {
            let node = node_of(replica.disk);
            let held = contents(cluster, node, index as u32, volume.groups.len() as u32)?;
            all.push((node, held));
        }
        for (_, held) in &mut all {
            held.retain(|key, _| !cluster.bad_blocks.contains(key));
        }
        for pair in all.windows(2) {
            let [(left, expected), (right, found)] = pair else {
                continue;
            };
            if expected != found {
                let differs = expected.iter().find(|(k, v)| found.get(*k) != Some(*v));
                let other = found.iter().find(|(k, v)| expected.get(*k) != Some(*v));
                return Err(format!(
                    "replicas of group {index} differ: node {left} has {differs:?}, node {right} has {other:?}"
                ));
            }
        }
    }
    Ok(())
}

fn contents(
    cluster: &mut Cluster,
    node: u32,
    group: u32,
    group_count: u32,
) -> Result<Contents, String> {
    let mut all = Contents::new();
    let mut next_chunk = Some(ChunkIndex(0));
    while let Some(from) = next_chunk {
        let digests = ChunkDigests {
            group: GroupIndex(group),
            group_count,
            from,
        };
        let ReplyBody::ChunkDigests(list) =
            ask(cluster, node, Some(RequestBody::ChunkDigests(digests)))?
        else {
            return Err(format!(
                "node {node} answers ChunkDigests with something else"
            ));
        };
        for chunk in &list.chunks {
            let mut cursor = Some(Cursor {
                chunk: chunk.chunk,
                ..Cursor::default()
            });
            while let Some(from) = cursor {
                let digest = Digest {
                    chunk: chunk.chunk,
                    from,
                };
                let ReplyBody::Entries(entries) =
                    ask(cluster, node, Some(RequestBody::Digest(digest)))?
                else {
                    return Err(format!("node {node} answers Digest with something else"));
                };
                for e in entries.entries {
                    // Tombstones may be forgotten at different times.
                    let counts = match e.state {
                        BlockState::Tombstone => false,
                        // A flipped bit that nobody reads is found by a scrub only.
                        BlockState::Bad if cluster.errors_allowed => {
                            cluster
                                .bad_blocks
                                .insert((e.at.chunk.0, e.at.snapshot.0, e.at.block));
                            false
                        }
                        _ => true,
                    };
                    if counts {
                        let key = (e.at.chunk.0, e.at.snapshot.0, e.at.block);
                        all.insert(key, (e.state, e.version, e.checksum));
                    }
                }
                cursor = entries.next;
            }
        }
        next_chunk = list.next;
    }
    Ok(all)
}

/// Asks an engine directly; without a body: says Hello.
pub(super) fn ask(
    cluster: &mut Cluster,
    node: u32,
    body: Option<RequestBody>,
) -> Result<ReplyBody, String> {
    let epoch = cluster.metadata.volume().epoch;
    match body {
        None => ask_engine(cluster, node, hello(ClientId([0xad; 16]), disk_of(node))),
        Some(body) => ask_of(cluster, node, (VOLUME, epoch), body),
    }
}

/// Asks an engine about a volume, at an epoch of it.
pub(super) fn ask_of(
    cluster: &mut Cluster,
    node: u32,
    (volume, epoch): (VolumeId, Epoch),
    body: RequestBody,
) -> Result<ReplyBody, String> {
    let incarnation = cluster.nodes.get(&node).and_then(|n| n.incarnation());
    let request = Request {
        id: RequestId(1),
        volume,
        epoch,
        incarnation: incarnation.unwrap_or(Incarnation(0)),
        body,
    };
    ask_engine(cluster, node, request)
}

fn ask_engine(cluster: &mut Cluster, node: u32, request: Request) -> Result<ReplyBody, String> {
    cluster.audit_replies.clear();
    let conn = ConnectionId(AUDIT + cluster.audits);
    cluster.engine(node, EngineEvent::Request { conn, request });
    for _ in 0..1000 {
        if let Some(Reply { result, .. }) = cluster.audit_replies.pop() {
            return result.map_err(|status| format!("node {node} refuses the audit: {status}"));
        }
        cluster.run_until(cluster.in_ms(1));
        healthy(cluster)?;
    }
    Err(format!("node {node} does not answer the audit"))
}

fn judge(cluster: &Cluster) -> Result<(), String> {
    oracle::check(&cluster.history).map_err(|violation| {
        format!(
            "{violation}\n{}",
            oracle::sector_history(&cluster.history, violation.sector)
        )
    })
}

/// All mistakes that sessions can be told to make.
#[cfg(feature = "planted-bugs")]
pub const PLANTED: [nbd_client::engine::PlantedBug; 7] = {
    use nbd_client::engine::PlantedBug as Bug;
    [
        Bug::AckBeforeExclusion,
        Bug::PromoteWithoutTargetAcks,
        Bug::ReadWithoutLease,
        Bug::SkipReconcile,
        Bug::ReadInFlight,
        Bug::SkipExclusionFlush,
        Bug::ReadWithoutConfirmation,
    ]
};

/// What came of many seeds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// Client requests made.
    pub requests: usize,
    /// Client requests answered.
    pub answered: usize,
    /// Snapshots committed.
    pub snapshots: u64,
    /// Times that volumes grew.
    pub resizes: u64,
}

/// Runs seeds on several threads. `each` gets every report, in no particular order, and says whether to
/// go on.
pub fn many(
    seeds: std::ops::Range<u64>,
    threads: usize,
    options: &Options,
    mut each: impl FnMut(&Report) -> bool,
) -> Summary {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (send, receive) = std::sync::mpsc::sync_channel(16);
    let mut summary = Summary::default();
    std::thread::scope(|scope| {
        use std::sync::atomic::Ordering::Relaxed;
        for _ in 0..threads.max(1) {
            let (send, next, stop, end) = (send.clone(), &next, &stop, seeds.end);
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= end || send.send(run_caught(seed, options)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        for report in receive {
            summary.seeds += 1;
            summary.requests += report.requests.0;
            summary.answered += report.requests.1;
            summary.snapshots += report.snapshots;
            summary.resizes += report.resizes;
            if !stop.load(Relaxed) && !each(&report) {
                stop.store(true, Relaxed);
            }
        }
    });
    summary
}

/// A panic in an engine (a broken invariant) is a failure of its seed.
fn run_caught(seed: u64, options: &Options) -> Report {
    std::panic::catch_unwind(|| run(seed, options)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Report {
            seed,
            failure: Some(format!("panic: {}", text.unwrap_or_default())),
            digest: 0,
            requests: (0, 0),
            snapshots: 0,
            resizes: 0,
            schedule: Schedule {
                duration: 0,
                faults: Vec::new(),
                damages: false,
            },
            trace: Vec::new(),
        }
    })
}
