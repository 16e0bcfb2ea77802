//! What the metadata leader decides, and what it keeps in memory, on a cluster of 1,000 nodes, 10,000 disks and 100,000 volumes.
//!
//! The state machine and the planners are the real ones, driven by commands as the log would bring them; there are no disks, no
//! sockets and no log. Racks are zones of 20 nodes, and one fails: every replica in it gets another, in the rounds that the leader's
//! caps allow. What is counted is the time in which the leader thinks: planning, and applying what it planned.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use ashlar_bench::machine;
use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState, VolumeId,
};
use clap::Args;
use metadata_raft::model::{
    Answer, ChangeReplicas, Command, CreateVolume, Disk, FailureDomain, Labels, Node, OpenVolume,
    Operation, Pool, PoolSpec, ReplicaChange, RequestKey, State, ZONE_LABEL, apply,
};
use metadata_raft::planner::balance::Balancing;
use metadata_raft::planner::placement::{Wish, place};
use metadata_raft::planner::{DiskView, care, moves, repair};
use serde::Serialize;

use crate::report::{Row, limit_row, table};

const TIB: u64 = 1 << 40;
const VOLUME_BYTES: u64 = 60 << 30;
const POOL: PoolId = PoolId([9; 16]);
const RACK: u32 = 20;
const REPLICAS: u32 = 3;
/// Placements of new volumes that are timed.
const PLACEMENTS: u32 = 200;

/// Bars.
const DECIDE_SECONDS_MAX: f64 = 10.0;
const MEMORY_GIB_MAX: f64 = 4.0;

/// How large the cluster is.
#[derive(Args, Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Nodes, 20 of them a rack
    #[arg(long, default_value_t = 1000)]
    nodes: u32,
    /// Disks of a node
    #[arg(long, default_value_t = 10)]
    disks_per_node: u32,
    /// Volumes of 60 GiB with three replicas
    #[arg(long, default_value_t = 100_000)]
    volumes: u32,
}

/// `ashlar-bench scale`.
#[derive(Args, Debug)]
pub struct ScaleArgs {
    #[command(flatten)]
    size: Size,
    /// Where results go
    #[arg(long, default_value = "bench/out")]
    out: PathBuf,
    /// End with 1 if a bar is missed
    #[arg(long)]
    strict: bool,
}

impl Size {
    /// As in a whole run.
    pub fn of_bench(quick: bool) -> Self {
        let parts = if quick { 10 } else { 1 };
        Self {
            nodes: 1000 / parts,
            disks_per_node: 10,
            volumes: 100_000 / parts,
        }
    }
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    size: Size,
    /// Applying a CreateVolume whose disks are chosen, an OpenVolume and a ChangeReplicas.
    apply_microseconds: f64,
    /// Choosing the disks of a new volume.
    place_milliseconds: f64,
    /// Resident memory that the state took.
    state_bytes: u64,
    /// Of the failed rack.
    replicas_lost: u32,
    rounds: u32,
    /// All rounds, and the longest.
    decide_seconds: f64,
    longest_round_seconds: f64,
    /// A round that finds nothing to do: what the leader spends all the time.
    idle_round_seconds: f64,
}

impl Report {
    /// The rows with a bar.
    pub fn rows(&self) -> Vec<Row> {
        vec![
            limit_row(
                "scale-decide",
                format!(
                    "decisions for a failed rack of {} replicas",
                    self.replicas_lost
                ),
                "s",
                self.decide_seconds,
                DECIDE_SECONDS_MAX,
            ),
            limit_row(
                "scale-memory",
                format!("metadata memory, {} volumes", self.size.volumes),
                "GiB",
                self.state_bytes as f64 / (1_u64 << 30) as f64,
                MEMORY_GIB_MAX,
            ),
        ]
    }

    /// For people.
    pub fn table(&self) -> String {
        format!(
            "scale: {} nodes, {} disks, {} volumes of {REPLICAS} replicas\n  \
             apply {:.1} µs a command, placing a volume {:.2} ms, an idle round {:.1} ms\n  \
             a failed rack: {} replicas in {} rounds, the longest {:.1} ms\n",
            self.size.nodes,
            self.size.nodes * self.size.disks_per_node,
            self.size.volumes,
            self.apply_microseconds,
            self.place_milliseconds,
            self.idle_round_seconds * 1000.0,
            self.replicas_lost,
            self.rounds,
            self.longest_round_seconds * 1000.0,
        )
    }
}

/// Only this; true unless strict and a row falls short.
pub fn run(args: &ScaleArgs) -> Result<bool> {
    crate::report::begin(&args.out)?;
    let report = measure(args.size)?;
    let rows = report.rows();
    let json = args.out.join("scale.json");
    std::fs::write(&json, serde_json::to_string_pretty(&report)?)?;
    println!("\n{}\n{}", table(&rows), report.table());
    println!("Written: {}", json.display());
    Ok(!args.strict || rows.iter().all(|r| r.passes))
}

fn id(kind: u8, n: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = kind;
    // Scattered as random ones are.
    bytes[1..5].copy_from_slice(&n.wrapping_mul(2_654_435_761).to_be_bytes());
    bytes[5..9].copy_from_slice(&n.to_be_bytes());
    bytes
}

struct View {
    dead: BTreeSet<DiskId>,
    used: u64,
}

impl DiskView for View {
    fn alive(&self, disk: DiskId) -> bool {
        !self.dead.contains(&disk)
    }
    fn used_bytes(&self, _: DiskId) -> u64 {
        self.used
    }
    fn settled_bytes(&self, disk: DiskId) -> u64 {
        self.used_bytes(disk)
    }
    fn replica_bytes(&self, _: DiskId, _: VolumeId) -> u64 {
        VOLUME_BYTES / 2
    }
}

/// A cluster that only decides.
struct Cluster {
    size: Size,
    state: State,
    client: ClientId,
    applied: u64,
}

impl Cluster {
    fn apply(&mut self, operation: Operation) -> Result<Answer> {
        let request = RequestKey::generate();
        self.applied += 1;
        apply(&mut self.state, &Command { request, operation })
            .map_err(|refusal| anyhow!("refused: {refusal}"))
    }

    fn disk(&self, node: u32, disk: u32) -> DiskId {
        DiskId(id(2, node * self.size.disks_per_node + disk))
    }

    fn build(size: Size) -> Result<Self> {
        let mut cluster = Self {
            size,
            state: State::new(),
            client: ClientId(id(4, 1)),
            applied: 0,
        };
        for node in 0..size.nodes {
            let zone = (ZONE_LABEL.to_owned(), format!("rack-{}", node / RACK));
            cluster.apply(Operation::RegisterNode(Node {
                id: NodeId(id(1, node)),
                name: format!("node-{node}"),
                labels: Labels::from([zone]),
                admin_address: "10.0.0.1:7201".into(),
            }))?;
            for disk in 0..size.disks_per_node {
                cluster.apply(Operation::RegisterDisk(Disk {
                    id: cluster.disk(node, disk),
                    node: NodeId(id(1, node)),
                    path: format!("/dev/nvme{disk}n1"),
                    data_address: "10.0.0.1:7301".into(),
                    capacity_bytes: 4 * TIB,
                    incarnation: Incarnation(1),
                    labels: Labels::new(),
                }))?;
            }
        }
        cluster.apply(Operation::CreatePool(Pool {
            id: POOL,
            name: "main".into(),
            spec: PoolSpec {
                failure_domain: FailureDomain::Zone,
                ..PoolSpec::default()
            },
        }))?;
        for n in 0..size.volumes {
            cluster.volume(n)?;
        }
        Ok(cluster)
    }

    /// A volume on three racks, held by its client, all in sync.
    fn volume(&mut self, n: u32) -> Result<()> {
        let volume = VolumeId(id(3, n));
        let racks = self.size.nodes / RACK;
        let disks: Vec<_> = (0..REPLICAS)
            .map(|r| {
                let rack = (n + r * (racks / REPLICAS).max(1)) % racks;
                let node = rack * RACK + (n / racks) % RACK;
                self.disk(node, (n / racks / RACK) % self.size.disks_per_node)
            })
            .collect();
        self.apply(Operation::CreateVolume(CreateVolume {
            volume,
            name: format!("pvc-{n:032x}"),
            size_bytes: VOLUME_BYTES,
            pool: POOL,
            replicas: REPLICAS as u8,
            min_replicas: 2,
            groups: vec![disks.clone()],
            labels: Labels::from([("team".to_owned(), format!("team-{}", n % 50))]),
            created_unix_ms: 0,
        }))?;
        self.apply(Operation::OpenVolume(OpenVolume {
            volume,
            client: self.client,
            node: NodeId(id(1, n % self.size.nodes)),
            client_name: format!("node-{}:4711", n % self.size.nodes),
            force: false,
        }))?;
        self.in_sync(volume, &disks)
    }

    fn in_sync(&mut self, volume: VolumeId, disks: &[DiskId]) -> Result<()> {
        let epoch = self.state.volume(volume).map_or(Epoch(0), |v| v.epoch);
        let changes = disks.iter().map(|disk| ReplicaChange {
            group: GroupIndex(0),
            disk: *disk,
            state: ReplicaState::InSync,
            incarnation: Incarnation(1),
        });
        let change = ChangeReplicas {
            volume,
            client: self.client,
            epoch,
            changes: changes.collect(),
        };
        match self.apply(Operation::ChangeReplicas(change))? {
            Answer::Changed { applied: true, .. } => Ok(()),
            other => bail!("not in sync: {other:?}"),
        }
    }

    /// Lets everything that is being rebuilt be in sync.
    fn complete(&mut self, moves: &[moves::Move]) -> Result<()> {
        for one in moves {
            self.in_sync(one.volume, &[one.to])?;
        }
        let garbage = moves.iter().map(|m| (m.from, m.volume)).collect();
        self.apply(Operation::ForgetGarbage(garbage))?;
        Ok(())
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let result = work();
    (result, began.elapsed())
}

/// All of it.
pub fn measure(size: Size) -> Result<Report> {
    println!(
        "decisions on {} nodes, {} volumes",
        size.nodes, size.volumes
    );
    let me = std::process::id();
    let before = machine::process_rss_bytes(me)?;
    let (cluster, building) = timed(|| Cluster::build(size));
    let mut cluster = cluster?;
    let state_bytes = machine::process_rss_bytes(me)?.saturating_sub(before);
    let apply_microseconds = building.as_secs_f64() * 1e6 / cluster.applied as f64;
    let mut view = View {
        dead: BTreeSet::new(),
        used: TIB,
    };
    let pool = cluster.state.pool(POOL).context("pool")?.spec.clone();
    let wish = Wish {
        pool: &pool,
        size_bytes: VOLUME_BYTES,
        replicas: REPLICAS as u8,
        groups: 0,
        preferred: None,
        require_preferred: false,
    };
    let (placed, placing) =
        timed(|| (0..PLACEMENTS).try_for_each(|_| place(&cluster.state, &view, &wish).map(drop)));
    placed.map_err(|refusal| anyhow!("placing: {refusal}"))?;
    let (_, idle) = timed(|| round(&cluster.state, &view));

    // A rack fails.
    let disks = (0..RACK).flat_map(|node| (0..size.disks_per_node).map(move |d| (node, d)));
    view.dead = disks.map(|(n, d)| cluster.disk(n, d)).collect();
    let mut lost = 0;
    for disk in &view.dead {
        lost += cluster.state.disk_use(*disk).replicas;
    }
    let (mut deciding, mut longest, mut rounds) = (Duration::ZERO, Duration::ZERO, 0);
    let mut left = lost;
    while left > 0 {
        let (plan, planning) = timed(|| round(&cluster.state, &view));
        if plan.moves.is_empty() {
            bail!("{left} replicas stay: {:?}", plan.unplaced.first());
        }
        let (applied, applying) = timed(|| {
            let mut moves = plan.moves.iter();
            moves.try_for_each(|m| cluster.apply(m.operation()).map(drop))
        });
        applied?;
        let took = planning + applying;
        (deciding, longest, rounds) = (deciding + took, longest.max(took), rounds + 1);
        left -= u32::try_from(plan.moves.len())?;
        cluster.complete(&plan.moves)?;
    }
    Ok(Report {
        size,
        apply_microseconds,
        place_milliseconds: placing.as_secs_f64() * 1000.0 / f64::from(PLACEMENTS),
        state_bytes,
        replicas_lost: lost,
        rounds,
        decide_seconds: deciding.as_secs_f64(),
        longest_round_seconds: longest.as_secs_f64(),
        idle_round_seconds: idle.as_secs_f64(),
    })
}

/// What all loops of the leader decide once.
fn round(state: &State, view: &View) -> moves::MovePlan {
    let lost = |disk: DiskId| view.dead.contains(&disk);
    let mut balancing = Balancing::default();
    let caps = moves::Caps::default();
    let plan = moves::plan(state, view, caps, lost, Some(&mut balancing));
    let before = care::Orders::new();
    let orders = care::plan(state, view, care::Caps::default(), &before, |_| false);
    let repairs = repair::plan(state, view, repair::Caps::default(), |_, _| true);
    std::hint::black_box((orders, repairs));
    plan
}
