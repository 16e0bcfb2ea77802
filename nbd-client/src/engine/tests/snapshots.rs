//! The switch to a new snapshot number (docs/snapshots.md, S2).

use std::time::Duration;

use ashlar_proto::ids::{SnapshotNumber, Version};

use super::world::{MS, World};
use crate::engine::*;

const DONE: Result<ClientReply, ClientError> = Ok(ClientReply::Done);
const HOLD_MS: u64 = 2000;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// The numbers that disk 0 saw, in the order of the versions.
fn numbers(w: &World) -> Vec<u32> {
    w.disks[0].layers.values().map(|n| n.0).collect()
}

/// Lets the client have `depth` writes of random blocks under way for a while; their tags.
fn load(w: &mut World, c: usize, depth: usize, duration: Duration) -> Vec<u64> {
    let until = w.now + duration.as_nanos() as u64;
    let mut tags = Vec::new();
    while w.now < until {
        while w.clients[c].pending.len() < depth {
            let sector = w.random.below(4000);
            // Parts of blocks as well: read, modified, written.
            let count = if w.random.chance(30) { 3 } else { 8 };
            let sector = if count == 8 { sector / 8 * 8 } else { sector };
            tags.push(w.write(c, sector, count, false));
        }
        w.advance(until);
    }
    tags
}

#[test]
fn writes_are_held_drained_and_flushed_before_the_report_and_carry_the_number_after() {
    for seed in 0..40 {
        let mut w = World::new(seed, 3, 2, 2);
        let c = w.open(|_| {});
        load(&mut w, c, 12, ms(30));
        let began = w.now;
        let number = w.reserve();
        let mut tags = load(&mut w, c, 12, ms(2));
        w.run_until("held", |w| !w.held.is_empty());
        // `check_held` looked at the disks when the report was made.
        assert_eq!(w.held[0].1, c);
        assert_eq!((w.held[0].2, w.held[0].3), (w.view.epoch, number));
        assert!(w.held[0].0 - began < 200 * MS, "one drain and one flush");
        assert!(
            numbers(&w).iter().all(|n| *n == 0),
            "nothing carries it yet"
        );
        // Reads and flushes go on.
        let (read, flush) = (w.read(c, 8, 8), w.submit(c, ClientOp::Flush));
        assert!(w.answer(c, read).is_ok());
        assert_eq!(w.answer(c, flush), DONE);
        let late = w.write(c, 0, 8, false);
        w.run_for(ms(300));
        assert!(w.clients[c].pending.contains_key(&late), "held");
        w.settle(true);
        tags.push(late);
        for tag in tags {
            assert_eq!(w.answer(c, tag), DONE);
        }
        let seen = numbers(&w);
        assert!(seen.is_sorted(), "the cut is one point among the versions");
        assert_eq!(seen.last(), Some(&number.0));
        // The next one, at once.
        let next = w.reserve();
        w.run_until("held again", |w| w.held.len() == 2);
        assert_eq!(w.held[1].3, next);
        w.settle(false);
        let tag = w.write(c, 0, 8, true);
        assert_eq!(w.answer(c, tag), DONE);
        assert_eq!(numbers(&w).last(), Some(&2));
        w.oracle.check_linearizable().unwrap();
        w.oracle.check_flushed().unwrap();
    }
}

/// One flush is always under way, and another one waits for it.
#[test]
fn clients_that_flush_all_the_time_do_not_keep_it_from_switching() {
    let mut w = World::new(8, 3, 1, 2);
    let c = w.open(|_| {});
    w.write(c, 0, 8, false);
    w.run_for(ms(20));
    let mut tags = [0; 3].map(|_| w.submit(c, ClientOp::Flush));
    assert!(w.clients[c].pending.len() == 3, "none is spared");
    w.reserve();
    let limit = w.now + 1000 * MS;
    while w.held.is_empty() {
        for tag in &mut tags {
            if w.clients[c].answers.contains_key(tag) {
                *tag = w.submit(c, ClientOp::Flush);
            }
        }
        assert!(w.advance(limit), "not held within a second");
    }
    w.settle(true);
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
}

#[test]
fn nothing_is_held_for_longer_than_the_hold_time() {
    let mut w = World::new(3, 3, 1, 2);
    let c = w.open(|_| {});
    let number = w.reserve();
    w.run_until("held", |w| !w.held.is_empty());
    let began = w.now;
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
    let waited = (w.now - began) / MS;
    assert!((HOLD_MS - 100..HOLD_MS + 50).contains(&waited), "{waited}");
    assert_eq!(numbers(&w).last(), Some(&number.0), "taken all the same");
    // Nobody settled it: it is not held a second time.
    w.view.revision += 1;
    w.notify();
    w.run_for(ms(100));
    let tag = w.write(c, 0, 8, false);
    let began = w.now;
    assert_eq!(w.answer(c, tag), DONE);
    assert!(w.now - began < 100 * MS);
    assert_eq!(w.held.len(), 1);
}

#[test]
fn a_drain_that_cannot_end_lets_the_writes_go_under_the_old_number() {
    let mut w = World::new(4, 3, 1, 2);
    let c = w.open(|_| {});
    // A replica is gone, and nobody can exclude it: its writes wait.
    w.metadata_up = false;
    w.crash_disk(2, 60_000);
    w.run_for(ms(10));
    let stuck = w.write(c, 0, 8, false);
    w.metadata_up = true;
    w.reserve();
    w.metadata_up = false;
    w.run_for(ms(100));
    let held = w.write(c, 64, 8, false);
    w.run_for(ms(HOLD_MS + 500));
    assert!(w.held.is_empty(), "never drained, never reported");
    w.metadata_up = true;
    w.settle(false);
    w.metadata_back();
    assert_eq!(w.answer(c, stuck), DONE);
    assert_eq!(w.answer(c, held), DONE);
    assert!(numbers(&w).iter().all(|n| *n == 0));
    // And the next snapshot is taken as ever.
    let number = w.reserve();
    assert_eq!(number, SnapshotNumber(2));
    w.run_until("held", |w| !w.held.is_empty());
    w.settle(true);
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
    assert_eq!(numbers(&w).last(), Some(&2));
}

#[test]
fn a_number_that_is_cancelled_while_the_client_drains_is_not_taken() {
    let mut w = World::new(5, 3, 1, 2);
    let c = w.open(|_| {});
    w.slow_writes_to = Some(1);
    let slow = w.write(c, 0, 8, false);
    w.reserve();
    w.run_for(ms(50));
    let held = w.write(c, 64, 8, false);
    w.settle(false);
    assert_eq!(w.answer(c, slow), DONE);
    assert_eq!(w.answer(c, held), DONE);
    assert!(w.held.is_empty());
    assert!(numbers(&w).iter().all(|n| *n == 0));
}

#[test]
fn a_new_epoch_while_it_holds_is_reported_again() {
    let mut w = World::new(6, 3, 1, 2);
    let c = w.open(|_| {});
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
    let number = w.reserve();
    w.run_until("held", |w| !w.held.is_empty());
    w.crash_disk(2, 60_000);
    w.run_until("held again", |w| w.held.len() == 2);
    assert_eq!((w.held[1].2, w.held[1].3), (w.view.epoch, number));
    assert!(w.held[1].2 > w.held[0].2);
    w.settle(true);
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
}

#[test]
fn closing_lets_go_what_was_held_and_the_next_holder_takes_the_number() {
    let mut w = World::new(7, 3, 1, 2);
    let c = w.open(|_| {});
    let number = w.reserve();
    w.run_until("held", |w| !w.held.is_empty());
    let tag = w.write(c, 0, 8, false);
    w.feed(c, SessionEvent::Close);
    assert_eq!(w.answer(c, tag), DONE);
    w.run_until("closed", |w| w.clients[c].stopped.is_some());
    assert_eq!(w.clients[c].stopped, Some(StopReason::Closed));
    w.settle(false);
    let d = w.open(|_| {});
    let tag = w.write(d, 0, 8, false);
    assert_eq!(w.answer(d, tag), DONE);
    let newest: Option<(&Version, &SnapshotNumber)> = w.disks[0].layers.last_key_value();
    assert_eq!(newest.map(|(_, n)| *n), Some(number));
}

#[test]
fn a_reader_of_a_snapshot_outlives_holders_and_replicas_and_ends_with_its_snapshot() {
    let mut w = World::new(9, 3, 1, 2);
    let c = w.open(|_| {});
    let tag = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
    let number = w.reserve();
    w.run_until("held", |w| !w.held.is_empty());
    w.settle(true);
    let size_bytes = 1 << 20;
    let r = w.open(|config| {
        config.read_only = true;
        config.snapshot = Some(SnapshotSource { number, size_bytes });
    });
    let read = |w: &mut World| {
        let tag = w.read(r, 0, 8);
        w.answer(r, tag)
    };
    assert!(read(&mut w).is_ok(), "beside a holder");
    let beyond = w.submit(
        r,
        ClientOp::Read {
            offset: size_bytes,
            length: 4096,
        },
    );
    assert_eq!(w.answer(r, beyond), Err(ClientError::Invalid));
    let written = w.write(r, 0, 8, false);
    assert_eq!(w.answer(r, written), Err(ClientError::Invalid));

    // A holder goes, another one fences the replicas with a higher epoch.
    w.feed(c, SessionEvent::Close);
    w.run_until("closed", |w| w.clients[c].stopped.is_some());
    assert!(read(&mut w).is_ok(), "without a holder");
    let epoch = w.view.epoch;
    let d = w.open(|_| {});
    assert!(w.view.epoch > epoch);
    assert!(read(&mut w).is_ok(), "under another holder");
    w.crash_disk(2, 60_000);
    for _ in 0..4 {
        assert!(read(&mut w).is_ok(), "from another replica");
    }
    let tag = w.write(d, 64, 8, false);
    assert_eq!(w.answer(d, tag), DONE);

    w.view.layers.live.clear();
    w.view.layers.revision += 1;
    w.view.revision += 1;
    w.notify();
    w.run_until("the end", |w| w.clients[r].stopped.is_some());
    assert_eq!(w.clients[r].stopped, Some(StopReason::Deleted));
    assert!(w.clients[d].stopped.is_none());
}
