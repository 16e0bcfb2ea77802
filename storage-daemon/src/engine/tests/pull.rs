//! R7 at the target: two engines, messages carried between them by hand.

use super::*;
use crate::engine::pull::{PULL_ANSWER_TIMEOUT, PULL_BUSY_DELAY, PULL_RECONNECT_DELAY};
use ashlar_proto::layers::LayerList;
use fake::Stored;

const E: u64 = 10;
const DISKS: (u8, u8) = (1, 2);

/// A source and a target, and the connection between them.
struct Pair {
    source: Rig,
    target: Rig,
    source_up: bool,
    /// Deliver so many requests to the source, then stop.
    budget: usize,
    data_reads: usize,
}

fn at(chunk: u32, layer: u32, block: u16) -> Cursor {
    Cursor {
        chunk: ChunkIndex(chunk),
        snapshot: SnapshotNumber(layer),
        block,
    }
}

impl Pair {
    fn new() -> Self {
        let store = |disk| {
            let mut store = FakeStore::new(disk);
            let fence = Epoch(E);
            store.replicas.insert(
                VOLUME,
                crate::store::ReplicaInfo {
                    fence,
                    ..fake::info(VOLUME)
                },
            );
            store
        };
        let mut target = store(DISKS.1);
        target.replicas.get_mut(&VOLUME).unwrap().rebuild_epoch = Epoch(E);
        let mut pair = Self {
            source: Rig::with(store(DISKS.0)),
            target: Rig::with(target),
            source_up: true,
            budget: usize::MAX,
            data_reads: 0,
        };
        pair.target.greet(1);
        pair
    }

    fn order(&self) -> PullStart {
        PullStart {
            group: GroupIndex(0),
            group_count: 1,
            rebuild_epoch: Epoch(E),
            source: DiskId([DISKS.0; 16]),
            source_incarnation: Incarnation(100),
            source_address: "127.0.0.1:1".into(),
            bytes_per_second: 0,
        }
    }

    fn start(&mut self) {
        let order = self.order();
        self.target.ask(1, E, RequestBody::PullStart(order));
        assert_eq!(self.target.answer(), Ok(ReplyBody::PullStart));
        self.run();
    }

    fn progress(&mut self) -> PullProgress {
        let epoch = self.target.engine.fence_of(VOLUME).0;
        self.target.ask(
            1,
            epoch,
            RequestBody::PullStatus {
                group: GroupIndex(0),
            },
        );
        let Ok(ReplyBody::PullStatus(progress)) = self.target.answer() else {
            panic!()
        };
        progress
    }

    /// Carries messages until nothing moves.
    fn run(&mut self) {
        loop {
            let mut moved = false;
            for command in std::mem::take(&mut self.target.others) {
                moved = true;
                match command {
                    EngineCommand::PeerConnect { peer, .. } if self.source_up => {
                        self.target.event(EngineEvent::PeerUp { peer });
                    }
                    EngineCommand::PeerConnect { peer, .. } => {
                        self.target.event(EngineEvent::PeerDown { peer });
                    }
                    EngineCommand::PeerSend { peer, request }
                        if self.source_up && self.budget > 0 =>
                    {
                        self.budget -= 1;
                        if matches!(request.body, RequestBody::Read(_)) {
                            self.data_reads += 1;
                        }
                        self.source.event(EngineEvent::Request {
                            conn: ConnectionId(peer.0),
                            request,
                        });
                    }
                    EngineCommand::PeerClose { peer } => {
                        self.source.event(EngineEvent::ConnClosed {
                            conn: ConnectionId(peer.0),
                        });
                    }
                    _ => {}
                }
            }
            for (conn, reply) in std::mem::take(&mut self.source.replies) {
                moved = true;
                self.target.event(EngineEvent::PeerReply {
                    peer: PeerId(conn.0),
                    reply,
                });
            }
            self.target.tick();
            if !moved {
                return;
            }
        }
    }

    fn break_connection(&mut self) {
        let peer = *self.target.engine.peers.keys().next().unwrap();
        self.source.event(EngineEvent::ConnClosed {
            conn: ConnectionId(peer.0),
        });
        self.target.event(EngineEvent::PeerDown { peer });
    }

    fn pass(&mut self, time: std::time::Duration) {
        self.target.now = self.target.now.after(time);
        self.target.tick();
        self.run();
    }

    fn contents(rig: &Rig) -> Vec<(Cursor, Stored)> {
        rig.engine
            .store
            .blocks
            .iter()
            .map(|((_, at), s)| (*at, s.clone()))
            .collect()
    }

    fn assert_equal(&self) {
        assert_eq!(Self::contents(&self.target), Self::contents(&self.source));
    }

    /// A source with several chunks and layers.
    fn fill_source(&mut self) {
        for chunk in 0..9 {
            for block in [0, 1, 2, 3, 7, 900, 1023] {
                for layer in 0..2 {
                    let version = Version::new(3 + u64::from(layer), u64::from(block) + 1);
                    self.source.store().put(
                        VOLUME,
                        at(chunk, layer, block),
                        version,
                        chunk as u8 + 1,
                    );
                }
            }
        }
        self.source
            .store()
            .put_tombstone(VOLUME, at(4, 1, 500), Version::new(5, 5));
    }
}

#[test]
fn an_empty_target_gets_everything() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.start();
    pair.assert_equal();
    let progress = pair.progress();
    assert_eq!(
        (progress.state, progress.rebuild_epoch),
        (PullState::Complete, Epoch(E))
    );
    assert_eq!((progress.chunks_done, progress.chunks_total), (9, 9));
    assert_eq!(progress.blocks_moved, 9 * 14 + 1);
    assert!(pair.target.engine.peers.is_empty());
}

#[test]
fn equal_chunks_cost_no_data() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.target.store().blocks = pair.source.store().blocks.clone();
    let changed = Version::new(6, 1);
    pair.source.store().put(VOLUME, at(3, 0, 7), changed, 99);
    pair.start();
    pair.assert_equal();
    assert_eq!(pair.data_reads, 1);
    assert_eq!(pair.progress().blocks_moved, 1);
}

#[test]
fn for_anything_older_than_the_rebuild_the_source_is_the_truth() {
    let mut pair = Pair::new();
    let source = pair.source.store();
    source.put(VOLUME, at(0, 0, 0), Version::new(4, 1), 1);
    source.put_tombstone(VOLUME, at(0, 0, 1), Version::new(4, 2));
    source.put(VOLUME, at(0, 0, 2), Version::new(E, 7), 2);
    source.put(VOLUME, at(0, 0, 3), Version::new(4, 3), 3);
    let target = pair.target.store();
    // Never acknowledged, although higher; a chunk and blocks that the source does not have.
    target.put(VOLUME, at(0, 0, 0), Version::new(9, 9), 91);
    target.put(VOLUME, at(0, 0, 1), Version::new(9, 8), 92);
    target.put(VOLUME, at(0, 0, 5), Version::new(9, 7), 93);
    target.put(VOLUME, at(6, 0, 5), Version::new(9, 6), 94);
    // Written since the rebuild began: by version.
    target.put(VOLUME, at(0, 0, 2), Version::new(E, 6), 95);
    target.put(VOLUME, at(0, 0, 3), Version::new(E, 8), 96);
    target.put(VOLUME, at(0, 0, 9), Version::new(E, 9), 97);
    target.put(VOLUME, at(8, 0, 0), Version::new(E + 1, 1), 98);
    pair.start();
    assert_eq!(pair.progress().state, PullState::Complete);
    let versions: Vec<(Cursor, Version)> = Pair::contents(&pair.target)
        .into_iter()
        .map(|(at, s)| (at, s.version))
        .collect();
    assert_eq!(
        versions,
        [
            (at(0, 0, 0), Version::new(4, 1)),
            (at(0, 0, 1), Version::new(4, 2)),
            (at(0, 0, 2), Version::new(E, 7)),
            (at(0, 0, 3), Version::new(E, 8)),
            (at(0, 0, 9), Version::new(E, 9)),
            (at(8, 0, 0), Version::new(E + 1, 1)),
        ]
    );
}

#[test]
fn a_source_that_restarts_is_pulled_on_from() {
    for messages in 1..40 {
        let mut pair = Pair::new();
        pair.fill_source();
        pair.budget = messages;
        pair.start();
        if !pair.target.engine.peers.is_empty() {
            pair.source_up = false;
            pair.break_connection();
            pair.run();
            pair.pass(PULL_RECONNECT_DELAY);
            assert_eq!(pair.progress().state, PullState::Running);
            pair.source_up = true;
            pair.budget = usize::MAX;
            pair.pass(PULL_RECONNECT_DELAY);
        }
        assert_eq!(pair.progress().state, PullState::Complete, "{messages}");
        pair.assert_equal();
    }
}

#[test]
fn a_source_of_another_incarnation_or_fenced_further_ends_the_pull() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.source.engine.identity.as_mut().unwrap().incarnation = Incarnation(101);
    pair.start();
    assert_eq!(pair.progress().state, PullState::Failed);
    assert!(Pair::contents(&pair.target).is_empty());

    let mut pair = Pair::new();
    pair.fill_source();
    pair.source.greet(77);
    pair.source.ask(77, E + 1, fence());
    pair.source.answer().unwrap();
    pair.start();
    assert_eq!(pair.progress().state, PullState::Failed);
}

#[test]
fn a_silent_source_is_given_up_and_tried_again() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.budget = 5;
    pair.start();
    assert_eq!(pair.progress().state, PullState::Running);
    pair.budget = usize::MAX;
    pair.pass(PULL_ANSWER_TIMEOUT);
    pair.pass(PULL_RECONNECT_DELAY);
    assert_eq!(pair.progress().state, PullState::Complete);
    pair.assert_equal();
}

#[test]
fn an_unreachable_source_fails_the_pull_in_the_end() {
    let mut pair = Pair::new();
    pair.source_up = false;
    pair.start();
    let mut rounds = 0;
    while pair.progress().state == PullState::Running {
        let deadline = pair.target.engine.next_deadline().unwrap();
        assert!(deadline > pair.target.now);
        pair.target.now = deadline;
        pair.target.tick();
        pair.run();
        rounds += 1;
        assert!(rounds < 100);
    }
    assert_eq!(pair.progress().state, PullState::Failed);
    assert_eq!(pair.target.engine.next_deadline(), None);
}

#[test]
fn a_higher_fence_ends_the_pull_and_is_answered_after_its_last_merge() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.target.store().hold = true;
    pair.start();
    let merges = pair.target.store().held.len();
    assert!(merges > 0);
    pair.target.ask(1, E + 1, fence());
    assert!(pair.target.answers().is_empty());
    pair.target.release(merges);
    assert!(
        pair.target.answers().is_empty(),
        "the fence is not durable yet"
    );
    pair.target.release(1);
    assert_eq!(pair.target.answers().len(), 1);
    assert_eq!(pair.progress().state, PullState::Failed);
    assert!(pair.target.store().held.is_empty());
    let order = pair.order();
    pair.target.ask(1, E + 1, RequestBody::PullStart(order));
    assert_eq!(pair.target.answer(), Err(Status::WrongState));
}

#[test]
fn only_a_target_of_that_rebuild_pulls() {
    let mut pair = Pair::new();
    let order = PullStart {
        rebuild_epoch: Epoch(E - 1),
        ..pair.order()
    };
    pair.target.ask(1, E, RequestBody::PullStart(order));
    assert_eq!(pair.target.answer(), Err(Status::WrongState));
    let order = PullStart {
        source: DiskId([DISKS.1; 16]),
        ..pair.order()
    };
    pair.target.ask(1, E, RequestBody::PullStart(order));
    assert_eq!(pair.target.answer(), Err(Status::Invalid));
    assert_eq!(pair.progress().state, PullState::None);
}

#[test]
fn a_repeated_start_changes_nothing_and_a_start_after_a_failure_starts_again() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.source.engine.identity.as_mut().unwrap().incarnation = Incarnation(101);
    pair.start();
    assert_eq!(pair.progress().state, PullState::Failed);
    pair.source.engine.identity.as_mut().unwrap().incarnation = Incarnation(100);
    pair.start();
    assert_eq!(pair.progress().state, PullState::Complete);
    let moved = pair.progress().blocks_moved;
    pair.start();
    assert_eq!(
        (pair.progress().state, pair.progress().blocks_moved),
        (PullState::Complete, moved)
    );
}

#[test]
fn what_is_rotten_at_the_source_is_known_to_be_bad_at_the_target() {
    let mut pair = Pair::new();
    pair.source
        .store()
        .put(VOLUME, at(0, 0, 0), Version::new(4, 1), 1);
    pair.source
        .store()
        .put(VOLUME, at(0, 0, 1), Version::new(4, 1), 1);
    let bad = pair
        .source
        .store()
        .blocks
        .get_mut(&(VOLUME, at(0, 0, 1)))
        .unwrap();
    (bad.state, bad.data) = (BlockState::Bad, Bytes::new());
    pair.start();
    assert_eq!(pair.progress().state, PullState::Complete);
    let state = |pair: &mut Pair| pair.target.store().blocks[&(VOLUME, at(0, 0, 1))].state;
    assert_eq!(Pair::contents(&pair.target).len(), 2);
    assert_eq!(state(&mut pair), BlockState::Bad);
    // The target's own copy of that version is as good as any.
    pair.target
        .store()
        .put(VOLUME, at(0, 0, 1), Version::new(4, 1), 1);
    pair.start();
    assert_eq!(pair.progress().state, PullState::Complete);
    assert_eq!(state(&mut pair), BlockState::Data);
}

#[test]
fn a_busy_store_is_asked_again() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.target.store().busy_applies = 5;
    pair.start();
    for _ in 0..20 {
        pair.pass(PULL_BUSY_DELAY);
    }
    assert_eq!(pair.progress().state, PullState::Complete);
    pair.assert_equal();
}

#[test]
fn the_throttle_holds_back_reads_until_their_time() {
    let mut pair = Pair::new();
    pair.fill_source();
    let order = PullStart {
        bytes_per_second: 100_000,
        ..pair.order()
    };
    pair.target.ask(1, E, RequestBody::PullStart(order));
    pair.target.answer().unwrap();
    pair.run();
    let begin = pair.target.now;
    let mut rounds = 0;
    while pair.progress().state == PullState::Running {
        let deadline = pair.target.engine.next_deadline().unwrap();
        assert!(deadline > pair.target.now);
        pair.target.now = deadline;
        pair.target.tick();
        pair.run();
        rounds += 1;
        assert!(rounds < 10_000);
    }
    assert_eq!(pair.progress().state, PullState::Complete);
    pair.assert_equal();
    let bytes = 9 * 14 * BLOCK_SIZE as u64;
    let seconds = pair.target.now.since(begin).as_secs_f64();
    assert!(seconds > bytes as f64 / 100_000.0 * 0.9, "{seconds}");
}

#[test]
fn hostile_answers_end_the_pull_and_nothing_else() {
    let mut pair = Pair::new();
    pair.fill_source();
    pair.budget = 3;
    pair.start();
    let peer = *pair.target.engine.peers.keys().next().unwrap();
    let reply = Reply {
        id: RequestId(77_777),
        volume: VOLUME,
        fence: Epoch(E),
        incarnation: Incarnation(100),
        result: Ok(ReplyBody::Ping),
    };
    pair.target.event(EngineEvent::PeerReply { peer, reply });
    assert_eq!(pair.progress().state, PullState::Failed);
    assert!(pair.target.engine.peers.is_empty());
}

fn list(revision: u64, settled: u32, live: &[u32]) -> LayerList {
    LayerList {
        revision,
        settled: SnapshotNumber(settled),
        live: live.iter().copied().map(SnapshotNumber).collect(),
    }
}

fn layers_of(rig: &Rig) -> u64 {
    rig.engine.store.replicas[&VOLUME].layers.revision
}

#[test]
fn source_and_target_compare_under_the_newer_of_their_lists() {
    // The source merged what the target has not, and the other way round.
    for (at_source, at_target) in [(3, 0), (0, 3), (3, 2), (2, 3), (3, 3)] {
        let mut pair = Pair::new();
        pair.fill_source();
        pair.target.store().blocks = pair.source.store().blocks.clone();
        let lists = |revision| list(revision, 1, if revision == 2 { &[1] } else { &[] });
        let source = pair.source.store();
        source.put_layers(VOLUME, lists(at_source)).unwrap();
        let target = pair.target.store();
        target.put_layers(VOLUME, lists(at_target)).unwrap();
        pair.start();
        assert_eq!(pair.progress().state, PullState::Complete);
        assert_eq!((layers_of(&pair.source), layers_of(&pair.target)), (3, 3));
        assert_eq!(pair.data_reads, 0, "the contents are the same");
        pair.assert_equal();
    }
}

#[test]
fn a_list_that_changes_anywhere_in_a_pull_leaves_both_equal() {
    let mut changed_late = 0;
    for messages in 1..70 {
        let mut pair = Pair::new();
        pair.fill_source();
        let target = pair.target.store();
        // Never acknowledged, in layers that are one with others before long.
        target.put(VOLUME, at(2, 0, 900), Version::new(9, 1), 91);
        target.put(VOLUME, at(2, 1, 901), Version::new(9, 2), 92);
        target.put(VOLUME, at(5, 0, 7), Version::new(E, 9), 93);
        pair.budget = messages;
        pair.start();
        if pair.progress().state == PullState::Complete {
            break;
        }
        changed_late = messages;
        let newer = list(5, 1, &[]);
        let store = if messages % 2 == 0 {
            pair.source.store()
        } else {
            pair.target.store()
        };
        store.put_layers(VOLUME, newer).unwrap();
        pair.budget = usize::MAX;
        for _ in 0..6 {
            pair.pass(PULL_ANSWER_TIMEOUT);
            pair.pass(PULL_RECONNECT_DELAY);
        }
        assert_eq!(pair.progress().state, PullState::Complete, "{messages}");
        assert_eq!((layers_of(&pair.source), layers_of(&pair.target)), (5, 5));
        // What was written since the rebuild began reaches the target only, here.
        pair.target.store().blocks.remove(&(VOLUME, at(5, 1, 7)));
        pair.source.store().blocks.remove(&(VOLUME, at(5, 1, 7)));
        pair.assert_equal();
    }
    assert!(changed_late > 20, "{changed_late}");
}
