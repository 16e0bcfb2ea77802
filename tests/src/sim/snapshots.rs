//! Snapshots in simulations (docs/snapshots.md): taken and deleted at random while everything else goes on, and read
//! back from every replica in the end.
//!
//! A snapshot is judged as a read of the whole volume at one instant: that at which the leader heard that the writes
//! were held. So the oracle of reads is the oracle of snapshots.

use std::collections::BTreeMap;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{
    BLOCK_SIZE, BLOCKS_PER_CHUNK, BlockRange, ChunkIndex, ClientId, Epoch, ReplicaState,
    SnapshotId, SnapshotNumber,
};
use ashlar_proto::layers::REPORT_TIME;
use ashlar_proto::wire::{BlockState, Read, ReplyBody, RequestBody};
use metadata_raft::model::{CommitSnapshot, NewSnapshot, Operation, ReserveSnapshots};

use super::cluster::{Cluster, Timer};
use super::history::{Kind, Outcome, SECTORS_PER_BLOCK, Value, decode};
use super::metadata::{Metadata, VOLUME, node_of};
use super::run::ask;

/// Half the hold time: later reports are worth nothing (S3).
const REPORT_WITHIN_NS: u64 = REPORT_TIME.as_nanos() as u64;
/// Blocks of one read.
const READ_BLOCKS: u16 = 64;

/// What metadata knows of snapshots besides the state machine: the leader's memory.
#[derive(Default)]
pub struct Snapshots {
    count: u64,
    /// The pending one, its number, and when it was proposed.
    pending: Option<(SnapshotId, SnapshotNumber, Time)>,
    /// The committed ones that are not deleted.
    pub live: Vec<Taken>,
    /// How many were committed, for statistics.
    pub taken: u64,
}

/// A committed snapshot.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    id: SnapshotId,
    number: SnapshotNumber,
    /// An instant at which its volume's writes were held.
    at: Time,
    holder: ClientId,
}

impl Metadata {
    /// Reserves a number; whether that changed anything.
    pub fn take_snapshot(&mut self, now: Time) -> bool {
        self.snapshots.count += 1;
        let id = SnapshotId((self.snapshots.count as u128).to_be_bytes());
        let reserve = Operation::ReserveSnapshots(ReserveSnapshots {
            snapshots: vec![NewSnapshot {
                id,
                name: format!("s{}", self.snapshots.count),
                volume: VOLUME,
                labels: Default::default(),
            }],
            group: None,
            created_unix_ms: 1,
        });
        if self.apply(reserve).is_err() {
            return false;
        }
        let number = self.volume().snapshot;
        self.snapshots.pending = Some((id, number, now));
        if self.volume().holder.is_none() {
            // Closed cleanly, or it could not have been reserved.
            self.commit(now, id, number, None);
        }
        true
    }

    fn commit(
        &mut self,
        now: Time,
        snapshot: SnapshotId,
        number: SnapshotNumber,
        holder: Option<(ClientId, Epoch)>,
    ) {
        let commit = Operation::CommitSnapshots(vec![CommitSnapshot { snapshot, holder }]);
        if self.apply(commit).is_ok() {
            self.snapshots.taken += 1;
            self.snapshots.live.push(Taken {
                id: snapshot,
                number,
                at: now,
                holder: holder.map_or(ClientId::NIL, |(client, _)| client),
            });
        }
        self.snapshots.pending = None;
    }

    /// A holder reports that it holds.
    pub fn held(&mut self, now: Time, client: ClientId, epoch: Epoch, number: SnapshotNumber) {
        if let Some((id, pending, began)) = self.snapshots.pending
            && pending == number
            && now.0 - began.0 < REPORT_WITHIN_NS
            && self.volume().is_current(client, epoch)
        {
            self.commit(now, id, number, Some((client, epoch)));
        }
    }

    /// Gives up what was not committed in time; whether that changed anything.
    pub fn give_up_snapshot(&mut self) -> bool {
        let Some((id, ..)) = self.snapshots.pending.take() else {
            return false;
        };
        let before = self.volume().revision;
        self.must(Operation::CancelSnapshots(vec![id]));
        self.volume().revision != before
    }

    /// Deletes a committed snapshot; whether there was one.
    pub fn delete_snapshot(&mut self, index: usize) -> bool {
        if self.snapshots.live.is_empty() {
            return false;
        }
        let index = index % self.snapshots.live.len();
        let taken = self.snapshots.live.remove(index);
        self.must(Operation::DeleteSnapshots(vec![taken.id]));
        true
    }
}

impl Cluster {
    pub(super) fn snapshot_due(&mut self) {
        if self.metadata_down > 0 {
            return;
        }
        let deletes = self.rng.chance(1, 3);
        let index = self.rng.below(1000) as usize;
        let changed = if deletes {
            self.metadata.delete_snapshot(index)
        } else {
            self.metadata.take_snapshot(self.now)
        };
        if changed {
            self.note(|| format!("snapshot {}", if deletes { "deleted" } else { "reserved" }));
            self.metadata_changed();
            if !deletes {
                self.timer(REPORT_WITHIN_NS, Timer::SnapshotOver);
            }
        }
    }

    pub(super) fn snapshot_over(&mut self) {
        if self.metadata_down > 0 {
            return self.timer(REPORT_WITHIN_NS, Timer::SnapshotOver);
        }
        if self.metadata.give_up_snapshot() {
            self.note(|| "snapshot given up".to_owned());
            self.metadata_changed();
        }
    }

    pub(super) fn snapshot_held(&mut self, client: ClientId, epoch: Epoch, number: SnapshotNumber) {
        let before = self.metadata.volume().revision;
        self.metadata.held(self.now, client, epoch, number);
        if self.metadata.volume().revision != before {
            self.note(|| format!("snapshot {} committed", number.0));
            self.metadata_changed();
        }
    }
}

/// Reads every live snapshot from every replica: they agree, and the history gets what they show.
pub(super) fn read_back(cluster: &mut Cluster) -> Result<(), String> {
    for taken in cluster.metadata.snapshots.live.clone() {
        let mut seen: BTreeMap<(u32, u16), (u32, Vec<Value>)> = BTreeMap::new();
        let volume = cluster.metadata.volume().clone();
        let chunks = volume.size_bytes.div_ceil(4 << 20) as u32;
        for chunk in 0..chunks {
            let group = &volume.groups[chunk as usize % volume.groups.len()];
            for replica in group.iter().filter(|r| r.state == ReplicaState::InSync) {
                read_chunk(cluster, node_of(replica.disk), chunk, taken, &mut seen)?;
            }
        }
        let client = cluster
            .clients
            .values()
            .find(|c| c.id == taken.holder)
            .map_or(0, |c| c.host);
        for ((chunk, block), (_, values)) in seen {
            let block = u64::from(chunk) * u64::from(BLOCKS_PER_CHUNK) + u64::from(block);
            let first = block * SECTORS_PER_BLOCK;
            let count = SECTORS_PER_BLOCK;
            if !cluster.workload.touches(first, count) {
                continue;
            }
            let id = cluster
                .history
                .begin(client, Kind::Read, first, count, false, taken.at);
            if let Some(operation) = cluster.history.operations.get_mut(id.0 as usize) {
                operation.outcome = Outcome::Done(taken.at);
                operation.values = values;
            }
        }
    }
    Ok(())
}

fn read_chunk(
    cluster: &mut Cluster,
    node: u32,
    chunk: u32,
    taken: Taken,
    seen: &mut BTreeMap<(u32, u16), (u32, Vec<Value>)>,
) -> Result<(), String> {
    for first in (0..BLOCKS_PER_CHUNK as u16).step_by(usize::from(READ_BLOCKS)) {
        let range = BlockRange {
            chunk: ChunkIndex(chunk),
            first,
            count: READ_BLOCKS,
        };
        let start = u64::from(chunk) * u64::from(BLOCKS_PER_CHUNK) + u64::from(first);
        let sectors = u64::from(READ_BLOCKS) * SECTORS_PER_BLOCK;
        if !cluster.workload.touches(start * SECTORS_PER_BLOCK, sectors) {
            continue;
        }
        let read = Read {
            range,
            snapshot: SnapshotNumber(taken.number.0 - 1),
            exact_layer: false,
        };
        let ReplyBody::Read(reply) = ask(cluster, node, Some(RequestBody::Read(read)))? else {
            return Err(format!("node {node} answers Read with something else"));
        };
        let mut data = reply.data.iter().flat_map(|b| b.chunks(BLOCK_SIZE));
        for (info, block) in reply.blocks.iter().zip(first..) {
            let sector = (start + u64::from(block - first)) * SECTORS_PER_BLOCK;
            let values: Vec<Value> = match info.state {
                BlockState::Data => {
                    let bytes = data.next().ok_or("a read without data")?;
                    let sectors = bytes.chunks(512).zip(sector..);
                    sectors.map(|(bytes, at)| decode(at, bytes)).collect()
                }
                BlockState::Absent | BlockState::Tombstone => {
                    vec![Value::Zero; SECTORS_PER_BLOCK as usize]
                }
                BlockState::Bad if cluster.errors_allowed => continue,
                BlockState::Bad => return Err(format!("node {node}: a bad block nobody damaged")),
            };
            let (other, known) = seen.entry((chunk, block)).or_insert((node, values.clone()));
            if *known != values {
                return Err(format!(
                    "snapshot {} differs at chunk {chunk} block {block}: node {other} has {known:?}, node {node} {values:?}",
                    taken.number.0
                ));
            }
        }
    }
    Ok(())
}
