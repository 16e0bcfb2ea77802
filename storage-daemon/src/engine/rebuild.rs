//! Rebuild at the target (R7): the pulls of this disk, their connections and their share of the store.
//!
//! Invariants:
//! - At most one pull per (volume, group), at most [`PULLS_MAX`] under way on a disk.
//! - What a pull applies is admitted under the pull's rebuild epoch, like a client's request: a fence
//!   above it ends the pull and is answered only after its last merge.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{Epoch, GroupIndex, VolumeId};
use ashlar_proto::wire::{PullProgress, PullStart, PullState, Reply, Status};

use super::pull::{Pull, PullCommand, PullOrder};
use super::{ChunkStore, DiskEngine, EngineCommand, PeerId, PullPace, Work};
use crate::store::{StoreError, StoreReply, StoreRequest};

/// Pulls under way on one disk; more are answered `Busy` (the holder tries again).
pub const PULLS_MAX: usize = 4;
/// Longest address of a source.
const ADDRESS_MAX: usize = 256;

/// A pull and its connection.
pub(super) struct PullSlot {
    pull: Pull,
    /// Tells the pull's answers from those of an earlier one of the same group.
    number: u64,
    peer: Option<PeerId>,
    counted: bool,
    began: Time,
}

impl PullSlot {
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.pull.next_deadline()
    }

    pub(super) fn pull(&self) -> &Pull {
        &self.pull
    }
}

/// What happens on a connection to a source.
pub(super) enum PeerEvent {
    Up,
    Down,
    Reply(Box<Reply>),
}

type Key = (VolumeId, GroupIndex);

impl<S: ChunkStore> DiskEngine<S> {
    pub(super) fn start_pull(
        &mut self,
        now: Time,
        volume: VolumeId,
        rebuild_epoch: Epoch,
        request_epoch: Epoch,
        start: PullStart,
        out: &mut Vec<EngineCommand>,
    ) -> Result<(), Status> {
        let identity = self.identity.ok_or(Status::Busy)?;
        if start.rebuild_epoch.0 == 0
            || start.rebuild_epoch > request_epoch
            || start.group_count == 0
            || start.group.0 >= start.group_count
            || start.source == identity.disk
            || start.source_incarnation.0 == 0
            || start.source_address.len() > ADDRESS_MAX
        {
            return Err(Status::Invalid);
        }
        // Not a target of this rebuild, or already fenced beyond it.
        if start.rebuild_epoch != rebuild_epoch || start.rebuild_epoch < self.fence_of(volume) {
            return Err(Status::WrongState);
        }
        let key = (volume, start.group);
        let order = PullOrder {
            cluster: identity.cluster,
            target: identity.disk,
            volume,
            start,
        };
        if let Some(slot) = self.pulls.get(&key) {
            let progress = slot.pull.progress();
            let repeated = *slot.pull.order() == order && progress.state != PullState::Failed;
            let complete =
                progress.state == PullState::Complete && progress.rebuild_epoch == rebuild_epoch;
            if repeated || complete {
                return Ok(());
            }
        }
        let others = self
            .pulls
            .iter()
            .filter(|(k, s)| **k != key && s.pull.running())
            .count();
        if others >= PULLS_MAX {
            return Err(Status::Busy);
        }
        self.cancel_pulls(now, |v, pull| (v, pull.order().start.group) == key, out);
        tracing::info!(%volume, group = key.1.0, source = %order.start.source, epoch = rebuild_epoch.0,
            "pulling a replica from another disk");
        self.counters.pulls += 1;
        self.pull_next += 1;
        let mut commands = Vec::new();
        let pull = Pull::start(order, now, &mut commands);
        let slot = PullSlot {
            pull,
            number: self.pull_next,
            peer: None,
            counted: false,
            began: now,
        };
        self.pulls.insert(key, slot);
        self.run_pull(now, key, commands, out);
        Ok(())
    }

    pub(super) fn pull_progress(&self, volume: VolumeId, group: GroupIndex) -> PullProgress {
        self.pulls.get(&(volume, group)).map_or(
            PullProgress {
                rebuild_epoch: Epoch(0),
                state: PullState::None,
                chunks_done: 0,
                chunks_total: 0,
                blocks_moved: 0,
            },
            |slot| slot.pull.progress(),
        )
    }

    /// The pulls of a volume, summed over its groups; `None` if there was none.
    pub(super) fn pull_summary(&self, volume: VolumeId) -> Option<PullProgress> {
        let range = (volume, GroupIndex(0))..=(volume, GroupIndex(u32::MAX));
        self.pulls
            .range(range)
            .map(|(_, slot)| slot.pull.progress())
            .reduce(|a, b| PullProgress {
                rebuild_epoch: a.rebuild_epoch.max(b.rebuild_epoch),
                state: if a.state == PullState::Complete {
                    b.state
                } else {
                    a.state
                },
                chunks_done: a.chunks_done.saturating_add(b.chunks_done),
                chunks_total: a.chunks_total.saturating_add(b.chunks_total),
                blocks_moved: a.blocks_moved.saturating_add(b.blocks_moved),
            })
    }

    /// The running pulls of a volume, together; `None` if there is none.
    pub(super) fn pull_pace(&self, volume: VolumeId, now: Time) -> Option<PullPace> {
        let range = (volume, GroupIndex(0))..=(volume, GroupIndex(u32::MAX));
        let slots = self.pulls.range(range).map(|(_, slot)| slot);
        let paces = slots.filter(|s| s.pull.running()).map(|s| PullPace {
            running: now.since(s.began),
            position: u64::from(s.pull.position().0),
            groups: 1,
        });
        paces.reduce(|a, b| PullPace {
            running: a.running.max(b.running),
            position: a.position + b.position,
            groups: a.groups + b.groups,
        })
    }

    /// Ends the running pulls that a predicate names.
    pub(super) fn cancel_pulls(
        &mut self,
        now: Time,
        which: impl Fn(VolumeId, &Pull) -> bool,
        out: &mut Vec<EngineCommand>,
    ) {
        let keys: Vec<Key> = self
            .pulls
            .iter()
            .filter(|((volume, _), slot)| slot.pull.running() && which(*volume, &slot.pull))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.with_pull(now, key, out, |pull, commands| pull.cancel(commands));
        }
    }

    /// Forgets the pulls of a volume.
    pub(super) fn forget_pulls(
        &mut self,
        now: Time,
        volume: VolumeId,
        out: &mut Vec<EngineCommand>,
    ) {
        self.cancel_pulls(now, |v, _| v == volume, out);
        self.pulls.retain(|(v, _), _| *v != volume);
    }

    pub(super) fn on_peer(
        &mut self,
        now: Time,
        peer: PeerId,
        event: PeerEvent,
        out: &mut Vec<EngineCommand>,
    ) {
        // Events of a connection that was given up meanwhile find nothing.
        let Some(&key) = self.peers.get(&peer) else {
            return;
        };
        if matches!(event, PeerEvent::Down) {
            self.peers.remove(&peer);
            if let Some(slot) = self.pulls.get_mut(&key) {
                slot.peer = None;
            }
        }
        self.with_pull(now, key, out, |pull, commands| match event {
            PeerEvent::Up => pull.connected(now, commands),
            PeerEvent::Down => pull.lost(now, commands),
            PeerEvent::Reply(reply) => pull.reply(*reply, now, commands),
        });
    }

    pub(super) fn on_pull_result(
        &mut self,
        now: Time,
        key: Key,
        number: u64,
        token: u32,
        result: Result<StoreReply, StoreError>,
        out: &mut Vec<EngineCommand>,
    ) {
        if self
            .pulls
            .get(&key)
            .is_some_and(|slot| slot.number == number)
        {
            self.with_pull(now, key, out, |pull, commands| {
                pull.local(token, result, now, commands)
            });
        }
    }

    pub(super) fn tick_pulls(&mut self, now: Time, out: &mut Vec<EngineCommand>) {
        if self.pulls.is_empty() {
            return;
        }
        let due: Vec<Key> = self
            .pulls
            .iter()
            .filter(|(_, slot)| slot.next_deadline().is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.with_pull(now, key, out, |pull, commands| pull.tick(now, commands));
        }
    }

    fn with_pull(
        &mut self,
        now: Time,
        key: Key,
        out: &mut Vec<EngineCommand>,
        act: impl FnOnce(&mut Pull, &mut Vec<PullCommand>),
    ) {
        let Some(slot) = self.pulls.get_mut(&key) else {
            return;
        };
        let mut commands = Vec::new();
        act(&mut slot.pull, &mut commands);
        self.run_pull(now, key, commands, out);
    }

    fn run_pull(
        &mut self,
        now: Time,
        key: Key,
        commands: Vec<PullCommand>,
        out: &mut Vec<EngineCommand>,
    ) {
        for command in commands {
            match command {
                PullCommand::Connect => self.connect_peer(key, out),
                PullCommand::Disconnect => {
                    let peer = self.pulls.get_mut(&key).and_then(|slot| slot.peer.take());
                    if let Some(peer) = peer {
                        self.peers.remove(&peer);
                        out.push(EngineCommand::PeerClose { peer });
                    }
                }
                PullCommand::Send(request) => {
                    if let Some(peer) = self.pulls.get(&key).and_then(|slot| slot.peer) {
                        out.push(EngineCommand::PeerSend { peer, request });
                    }
                }
                PullCommand::Local { token, request } => {
                    self.ask_for_pull(now, key, token, request, out)
                }
            }
        }
        self.note_end(key);
    }

    fn connect_peer(&mut self, key: Key, out: &mut Vec<EngineCommand>) {
        let Some(slot) = self.pulls.get_mut(&key) else {
            return;
        };
        self.peer_next += 1;
        let peer = PeerId(self.peer_next);
        slot.peer = Some(peer);
        self.peers.insert(peer, key);
        let address = slot.pull.order().start.source_address.clone();
        out.push(EngineCommand::PeerConnect { peer, address });
    }

    fn ask_for_pull(
        &mut self,
        now: Time,
        key: Key,
        token: u32,
        request: StoreRequest,
        out: &mut Vec<EngineCommand>,
    ) {
        let Some(slot) = self.pulls.get(&key) else {
            return;
        };
        let (number, epoch) = (slot.number, slot.pull.order().start.rebuild_epoch);
        let (volume, group) = key;
        let mut admitted = None;
        if matches!(request, StoreRequest::PullApply { .. }) {
            let durable = self.replicas.get(&volume).map_or(Epoch(0), |r| r.fence);
            if !self.fencing.admit(volume, durable, epoch) {
                let refused = Err(StoreError::Fenced(self.fence_of(volume)));
                return self.on_pull_result(now, key, number, token, refused, out);
            }
            admitted = Some(epoch);
        }
        let work = Work::Pull {
            volume,
            group,
            number,
            token,
            admitted,
        };
        self.ask(now, work, request, out);
    }

    /// Logs and counts a pull's end, once.
    fn note_end(&mut self, key: Key) {
        let Some(slot) = self.pulls.get_mut(&key) else {
            return;
        };
        if slot.pull.running() || slot.counted {
            return;
        }
        slot.counted = true;
        let progress = slot.pull.progress();
        self.counters.pull_blocks += progress.blocks_moved;
        let (volume, group) = key;
        match slot.pull.failure() {
            None if slot.pull.source_bad() > 0 => tracing::error!(%volume, group = group.0,
                blocks = slot.pull.source_bad(), "pulled a replica; blocks that were rotten at its source are \
                lost unless another replica has them: reading them fails until they are written"),
            None => tracing::info!(%volume, group = group.0, chunks = progress.chunks_done,
                blocks = progress.blocks_moved, "pulled a replica"),
            Some(failure) => {
                self.counters.pulls_failed += 1;
                tracing::warn!(%volume, group = group.0, %failure, "the pull of a replica ended; its holder starts another");
            }
        }
    }
}
