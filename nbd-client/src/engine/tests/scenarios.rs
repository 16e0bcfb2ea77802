//! One behaviour per test.

use std::time::Duration;

use ashlar_proto::ids::{NodeId, ReplicaState};
use ashlar_proto::wire::Payload;
use bytes::Bytes;

use super::oracle::join;
use super::world::World;
use crate::engine::*;

const DONE: Result<ClientReply, ClientError> = Ok(ClientReply::Done);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn stamp_at(world: &mut World, client: usize, sector: u64) -> u64 {
    let tag = world.read(client, sector, 1);
    match world.answer(client, tag) {
        Ok(ClientReply::Data(segments)) => {
            u64::from_le_bytes(join(&segments)[..8].try_into().unwrap())
        }
        other => panic!("{other:?}"),
    }
}

fn write_done(world: &mut World, client: usize, sector: u64, count: u64) -> u64 {
    let tag = world.write(client, sector, count, false);
    assert_eq!(world.answer(client, tag), DONE);
    tag
}

fn flush(world: &mut World, client: usize) {
    let tag = world.submit(client, ClientOp::Flush);
    assert_eq!(world.answer(client, tag), DONE);
}

#[test]
fn a_first_open_creates_replicas_and_serves_without_waiting() {
    let mut w = World::new(1, 3, 1, 2);
    let began = w.now;
    let c = w.open(|_| {});
    assert!(w.now - began < 100_000_000, "no lease wait");
    assert!(
        w.disks
            .iter()
            .all(|d| d.exists && d.descriptor_epoch == w.view.epoch)
    );
    let tag = write_done(&mut w, c, 0, 8);
    assert_eq!(stamp_at(&mut w, c, 3), tag);
    assert_eq!(stamp_at(&mut w, c, 800), 0, "never written");
    flush(&mut w, c);
    assert_eq!(w.contents(0), w.contents(1));
    assert_eq!(w.contents(0), w.contents(2));
}

#[test]
fn any_byte_range_is_read_and_written() {
    let mut w = World::new(2, 3, 2, 2);
    let c = w.open(|_| {});
    let mut image = vec![0u8; 12 << 20];
    let mut random = super::Random(5);
    for round in 0..60u64 {
        let offset = random.below(image.len() as u64 - 1);
        let most = if round % 10 == 0 { 6 << 20 } else { 20_000 };
        let length = (1 + random.below(most)).min(image.len() as u64 - offset);
        let data: Vec<u8> = (0..length).map(|i| (i * 7 + round) as u8 | 1).collect();
        image[offset as usize..(offset + length) as usize].copy_from_slice(&data);
        let split = random.below(length) as usize;
        let bytes = Bytes::from(data);
        let data = Payload::from_iter([bytes.slice(..split), bytes.slice(split..)]);
        let fua = round % 3 == 0;
        // The oracle wants stamps: bypass it with zeroes and trims only where asked.
        let tag = w.submit(c, ClientOp::Write { offset, data, fua });
        assert_eq!(w.answer(c, tag), DONE);
        if round % 5 == 0 {
            let offset = random.below(image.len() as u64 - 1);
            let length = random.below(image.len() as u64 - offset).min(5 << 20);
            image[offset as usize..(offset + length) as usize].fill(0);
            let tag = w.submit(
                c,
                ClientOp::WriteZeroes {
                    offset,
                    length,
                    fua,
                },
            );
            assert_eq!(w.answer(c, tag), DONE);
        }
    }
    w.oracle = Default::default();
    for (offset, length) in [
        (0u64, 12u64 << 20),
        (511, 3),
        (4095, 4098),
        (4_194_303, 70_001),
    ] {
        let tag = raw_read(&mut w, c, offset, length as u32);
        let Ok(ClientReply::Data(segments)) = w.clients[c].answers[&tag].clone() else {
            panic!()
        };
        let bytes = join(&segments);
        assert!(
            bytes == image[offset as usize..(offset + length) as usize],
            "at {offset}"
        );
    }
}

/// A read that the oracle does not judge.
fn raw_read(w: &mut World, c: usize, offset: u64, length: u32) -> u64 {
    let tag = w.submit(c, ClientOp::Read { offset, length });
    w.oracle.quiet = true;
    w.answer(c, tag).unwrap();
    w.oracle.quiet = false;
    tag
}

#[test]
fn partial_writes_of_one_block_do_not_lose_each_other() {
    let mut w = World::new(3, 3, 1, 2);
    let c = w.open(|_| {});
    let tags: Vec<u64> = (0..8).map(|s| w.write(c, s, 1, false)).collect();
    for tag in &tags {
        assert_eq!(w.answer(c, *tag), DONE);
    }
    for (sector, tag) in tags.iter().enumerate() {
        assert_eq!(stamp_at(&mut w, c, sector as u64), *tag);
    }
    w.oracle.check_linearizable().unwrap();
}

#[test]
fn a_dead_daemon_is_excluded_then_rebuilt_with_what_it_missed() {
    let mut w = World::new(4, 3, 1, 2);
    let c = w.open(|_| {});
    write_done(&mut w, c, 0, 64);
    w.crash_disk(1, 3000);
    let began = w.now;
    write_done(&mut w, c, 8, 8);
    assert!(
        w.now - began < 500_000_000,
        "stalled {} ms",
        (w.now - began) / 1_000_000
    );
    assert_eq!(w.view.groups[0][1].state, ReplicaState::Stale);
    w.run_until("rebuilt", |w| w.all_in_sync());
    w.run_for(ms(200));
    let tag = write_done(&mut w, c, 16, 8);
    assert_eq!(stamp_at(&mut w, c, 16), tag);
    flush(&mut w, c);
    assert_eq!(w.contents(0), w.contents(1));
    let stats = w.clients[c].session.stats();
    assert_eq!((stats.exclusions, stats.promotions), (1, 1));
    assert!(
        stats.rebuild_blocks_moved <= 2,
        "a delta: {}",
        stats.rebuild_blocks_moved
    );
}

#[test]
fn a_silent_replica_is_excluded_in_time() {
    let mut w = World::new(5, 3, 1, 2);
    let c = w.open(|_| {});
    write_done(&mut w, c, 0, 8);
    w.pause(2, 10_000);
    let began = w.now;
    write_done(&mut w, c, 8, 8);
    assert!(w.now - began < 3_000_000_000);
    let began = w.now;
    stamp_at(&mut w, c, 8);
    assert!(w.now - began < 100_000_000);
}

#[test]
fn a_second_client_takes_over_and_the_first_stops_without_an_answer() {
    let mut w = World::new(6, 3, 1, 2);
    let a = w.open(|_| {});
    let tag = write_done(&mut w, a, 0, 8);
    w.clients[a].cut = true;
    let began = w.now;
    let b = w.open(|_| {});
    assert!(
        w.now - began >= 2_000_000_000,
        "a full lease after an unclean close"
    );
    assert_eq!(stamp_at(&mut w, b, 0), tag);
    let late = w.write(a, 0, 8, false);
    let read = w.read(a, 0, 8);
    w.run_for(ms(3000));
    assert!(!w.clients[a].answers.contains_key(&late) && !w.clients[a].answers.contains_key(&read));
    w.clients[a].cut = false;
    w.metadata_back();
    w.run_for(ms(1000));
    assert_eq!(w.clients[a].stopped, Some(StopReason::Superseded));
    assert_eq!(stamp_at(&mut w, b, 0), tag);
}

#[test]
fn without_metadata_io_goes_on_until_a_replica_fails() {
    let mut w = World::new(7, 3, 1, 2);
    let c = w.open(|_| {});
    w.metadata_up = false;
    write_done(&mut w, c, 0, 8);
    w.run_for(ms(5000));
    write_done(&mut w, c, 8, 8);
    stamp_at(&mut w, c, 8);
    w.crash_disk(0, 60_000);
    let tag = w.write(c, 16, 8, false);
    w.run_for(ms(8000));
    assert!(
        !w.clients[c].answers.contains_key(&tag),
        "waits: no error, no lie"
    );
    w.metadata_up = true;
    w.metadata_back();
    assert_eq!(w.answer(c, tag), DONE);
}

#[test]
fn the_last_replica_is_waited_for() {
    let mut w = World::new(8, 1, 1, 1);
    let c = w.open(|_| {});
    let first = write_done(&mut w, c, 0, 8);
    w.crash_disk(0, 4000);
    let tag = w.write(c, 8, 8, false);
    assert_eq!(stamp_at(&mut w, c, 0), first);
    assert_eq!(w.answer(c, tag), DONE);
    assert_eq!(
        w.changes, 2,
        "only the first open (grant, confirmation) changed the configuration"
    );
}

#[test]
fn writes_are_replayed_when_every_replica_lost_power() {
    for seed in 0..20 {
        let mut w = World::new(100 + seed, 3, 1, 2);
        let c = w.open(|_| {});
        write_done(&mut w, c, 0, 8);
        flush(&mut w, c);
        let tags: Vec<u64> = (0..10).map(|i| write_done(&mut w, c, i * 8, 8)).collect();
        let late = w.write(c, 200, 8, false);
        for disk in 0..3 {
            w.power_loss(disk, 500 + disk as u64 * 100);
        }
        assert_eq!(w.answer(c, late), DONE);
        for (i, tag) in tags.iter().enumerate() {
            assert_eq!(stamp_at(&mut w, c, i as u64 * 8), *tag, "seed {seed}");
        }
        assert!(w.clients[c].session.stats().writes_replayed >= 10);
        flush(&mut w, c);
        w.oracle.check_linearizable().unwrap();
    }
}

#[test]
fn one_power_loss_rolls_nothing_back() {
    for seed in 0..20 {
        let mut w = World::new(200 + seed, 3, 1, 2);
        let c = w.open(|config| config.node = NodeId([2; 16]));
        let tags: Vec<u64> = (0..10).map(|i| write_done(&mut w, c, i * 8, 8)).collect();
        w.power_loss(1, 100);
        for (i, tag) in tags.iter().enumerate() {
            assert_eq!(stamp_at(&mut w, c, i as u64 * 8), *tag);
        }
        w.run_until("rebuilt", |w| w.changes > 2 && w.all_in_sync());
        w.run_for(ms(500));
        assert_eq!(w.contents(0), w.contents(1), "seed {seed}");
    }
}

#[test]
fn an_unclean_open_reconciles_what_was_in_flight() {
    for seed in 0..30 {
        let mut w = World::new(300 + seed, 3, 2, 2);
        let a = w.open(|_| {});
        for i in 0..12 {
            w.write(a, i * 8, 8, false);
            w.write(a, 8192 + i * 8, 8, false);
        }
        w.run_for(Duration::from_micros(150 + seed * 10));
        w.clients[a].alive = false;
        w.run_for(ms(5));
        let b = w.open(|_| {});
        assert_eq!(w.contents(0), w.contents(1));
        assert_eq!(w.contents(0), w.contents(2));
        for i in 0..12 {
            stamp_at(&mut w, b, i * 8);
        }
        w.oracle.check_linearizable().unwrap();
    }
}

#[test]
fn a_clean_close_needs_no_wait_at_the_next_open() {
    let mut w = World::new(9, 3, 1, 2);
    let a = w.open(|_| {});
    let tag = w.write(a, 0, 8, false);
    w.feed(a, SessionEvent::Close);
    w.run_until("closed", |w| w.clients[a].stopped.is_some());
    assert_eq!(w.clients[a].stopped, Some(StopReason::Closed));
    assert_eq!(w.answer(a, tag), DONE);
    let began = w.now;
    let b = w.open(|_| {});
    assert!(w.now - began < 500_000_000);
    assert_eq!(stamp_at(&mut w, b, 0), tag);
}

#[test]
fn an_open_excludes_a_dead_replica() {
    let mut w = World::new(10, 3, 1, 2);
    let a = w.open(|_| {});
    let tag = write_done(&mut w, a, 0, 8);
    w.clients[a].alive = false;
    w.crash_disk(0, 600_000);
    let b = w.open(|_| {});
    assert_eq!(w.view.groups[0][0].state, ReplicaState::Stale);
    assert_eq!(stamp_at(&mut w, b, 0), tag);
}

#[test]
fn an_open_waits_rather_than_trust_a_suspect_replica() {
    let mut w = World::new(11, 2, 1, 1);
    let a = w.open(|_| {});
    let tag = write_done(&mut w, a, 0, 8);
    w.clients[a].alive = false;
    w.power_loss(0, 10);
    w.crash_disk(1, 20_000);
    let began = w.now;
    let b = w.open(|_| {});
    assert!(
        w.now - began > 19_000_000_000,
        "waited for the one that may know more"
    );
    assert_eq!(stamp_at(&mut w, b, 0), tag);
}

#[test]
fn a_bad_block_is_read_elsewhere_and_repaired() {
    let mut w = World::new(12, 3, 1, 2);
    let c = w.open(|config| config.node = NodeId([1; 16]));
    let tag = write_done(&mut w, c, 0, 16);
    w.disks[0].corrupt = Some((0, 1));
    let read = w.read(c, 0, 16);
    let Ok(ClientReply::Data(segments)) = w.answer(c, read) else {
        panic!()
    };
    assert_eq!(
        u64::from_le_bytes(join(&segments)[4096..4104].try_into().unwrap()),
        tag
    );
    w.run_for(ms(10));
    assert_eq!(w.disks[0].corrupt, None, "repaired");
    let stats = w.clients[c].session.stats();
    assert_eq!((stats.bad_blocks_found, stats.bad_blocks_repaired), (1, 1));
    // Bad everywhere: an error, never wrong data.
    for disk in &mut w.disks {
        disk.corrupt = Some((0, 0));
    }
    let read = w.read(c, 0, 8);
    assert_eq!(w.answer(c, read), Err(ClientError::Io));
}

#[test]
fn trims_zeroes_and_block_status() {
    let mut w = World::new(13, 3, 1, 2);
    let c = w.open(|_| {});
    write_done(&mut w, c, 0, 64);
    write_done(&mut w, c, 8192, 8);
    let tag = w.submit(
        c,
        ClientOp::Trim {
            offset: 4096 + 100,
            length: 8192,
            fua: false,
        },
    );
    assert_eq!(w.answer(c, tag), DONE);
    let tag = w.submit(
        c,
        ClientOp::BlockStatus {
            offset: 0,
            length: 16 << 20,
        },
    );
    let extent = |length, allocated| Extent { length, allocated };
    let expected = vec![
        extent(8192, true),
        extent(4096, false),
        extent(32768 - 12288, true),
        extent((4 << 20) - 32768, false),
        extent(4096, true),
        extent((12 << 20) - 4096, false),
    ];
    assert_eq!(w.answer(c, tag), Ok(ClientReply::Extents(expected)));
    let tag = w.submit(
        c,
        ClientOp::BlockStatus {
            offset: 8000,
            length: 500,
        },
    );
    let expected = vec![extent(192, true), extent(308, false)];
    assert_eq!(w.answer(c, tag), Ok(ClientReply::Extents(expected)));
    // Tombstones are forgotten once the watermark has passed them.
    for _ in 0..3 {
        flush(&mut w, c);
        write_done(&mut w, c, 9000, 8);
    }
    assert!(
        w.disks
            .iter()
            .all(|d| d.live.values().all(|cell| cell.data.is_some()))
    );
}

#[test]
fn requests_out_of_range_are_invalid_until_the_volume_grows() {
    let mut w = World::new(14, 3, 1, 2);
    let c = w.open(|_| {});
    let tag = w.write(c, 32768, 8, false);
    assert_eq!(w.answer(c, tag), Err(ClientError::Invalid));
    w.resize(32 << 20);
    w.run_for(ms(10));
    write_done(&mut w, c, 32768, 8);
}

#[test]
fn full_disks_are_an_error_only_if_all_are() {
    let mut w = World::new(15, 3, 1, 2);
    let c = w.open(|_| {});
    let tag = write_done(&mut w, c, 0, 8);
    for disk in &mut w.disks {
        disk.full = true;
    }
    let late = w.write(c, 0, 8, false);
    assert_eq!(w.answer(c, late), Err(ClientError::NoSpace));
    assert_eq!(stamp_at(&mut w, c, 0), tag);
    w.disks[0].full = false;
    w.disks[1].full = false;
    write_done(&mut w, c, 0, 8);
    assert_eq!(w.view.groups[0][2].state, ReplicaState::Stale);
    w.disks[2].full = false;
    w.run_until("rebuilt", |w| w.all_in_sync());
}

#[test]
fn below_min_replicas_writes_wait_for_a_rebuild() {
    let mut w = World::new(16, 3, 1, 2);
    w.rebuilds = false;
    let c = w.open(|_| {});
    let first = write_done(&mut w, c, 0, 8);
    w.crash_disk(0, 10);
    w.run_for(ms(500));
    w.crash_disk(1, 10);
    let tag = w.write(c, 8, 8, false);
    w.run_for(ms(3000));
    assert!(!w.clients[c].answers.contains_key(&tag));
    assert_eq!(stamp_at(&mut w, c, 0), first, "reads go on");
    w.rebuilds = true;
    assert_eq!(w.answer(c, tag), DONE);
}

#[test]
fn an_idle_volume_sends_nothing_and_needs_no_timer() {
    let mut w = World::new(17, 3, 1, 2);
    let c = w.open(|_| {});
    write_done(&mut w, c, 0, 8);
    stamp_at(&mut w, c, 0);
    w.run_for(ms(100));
    assert_eq!(w.clients[c].session.next_deadline(), None);
    let sent = w.clients[c].sent;
    w.run_for(Duration::from_secs(60));
    assert_eq!(w.clients[c].sent, sent);
    stamp_at(&mut w, c, 0);
}

#[test]
fn a_rhythm_of_writes_and_flushes_needs_no_flush_requests() {
    let mut w = World::new(21, 3, 1, 2);
    let c = w.open(|_| {});
    for i in 0..20 {
        write_done(&mut w, c, i * 8, 8);
        flush(&mut w, c);
    }
    let spared = w.clients[c].session.stats().flushes_spared;
    assert!((15..20).contains(&spared), "spared {spared} of 20");
    // A second write between flushes ends the guessing.
    write_done(&mut w, c, 800, 8);
    write_done(&mut w, c, 808, 8);
    flush(&mut w, c);
    assert_eq!(w.clients[c].session.stats().flushes_spared, spared);
    write_done(&mut w, c, 816, 8);
    flush(&mut w, c);
    assert_eq!(w.clients[c].session.stats().flushes_spared, spared);
}

#[test]
fn a_spared_flush_is_as_good_as_any_when_all_lose_power() {
    let mut w = World::new(23, 3, 1, 2);
    let c = w.open(|_| {});
    for i in 0..4 {
        write_done(&mut w, c, i * 8, 8);
        flush(&mut w, c);
    }
    let before = w.clients[c].session.stats().flushes_spared;
    let tag = write_done(&mut w, c, 80, 8);
    flush(&mut w, c);
    let stats = w.clients[c].session.stats();
    assert_eq!(
        (stats.flushes_spared, stats.retained_bytes),
        (before + 1, 0)
    );
    for disk in 0..3 {
        w.power_loss(disk, 300 + disk as u64 * 50);
    }
    assert_eq!(stamp_at(&mut w, c, 80), tag);
}

#[test]
fn the_watermark_moves_although_flushes_are_spared() {
    let mut w = World::new(22, 3, 1, 2);
    let c = w.open(|_| {});
    for i in 0..200 {
        write_done(&mut w, c, i % 50 * 8, 8);
        flush(&mut w, c);
    }
    let stats = w.clients[c].session.stats();
    assert!(
        stats.flushes_spared > 180 && stats.flushes_spared < 198,
        "{stats:?}"
    );
}

#[test]
fn blackout_of_all_daemons_is_survived_without_an_exclusion() {
    let mut w = World::new(19, 3, 1, 2);
    let c = w.open(|_| {});
    for disk in 0..3 {
        w.crash_disk(disk, 2000 + disk as u64 * 50);
    }
    let tag = w.write(c, 8, 8, false);
    assert_eq!(w.answer(c, tag), DONE);
    assert_eq!(
        w.changes, 2,
        "only the first open (grant, confirmation) changed the configuration"
    );
}

/// A daemon dies; while it is out, the survivor loses power and the client dies too. Seeds in which an
/// acknowledged write of before is gone.
fn losses_after_an_exclusion(change: fn(&mut SessionConfig)) -> usize {
    let mut losses = 0;
    for seed in 0..20 {
        let mut w = World::new(400 + seed, 2, 1, 1);
        w.rebuilds = false;
        let a = w.open(change);
        let tag = write_done(&mut w, a, 0, 8);
        w.crash_disk(0, 600_000);
        let late = write_done(&mut w, a, 8, 8);
        w.power_loss(1, 10);
        w.clients[a].alive = false;
        let b = w.open(change);
        let seen = (stamp_at(&mut w, b, 0), stamp_at(&mut w, b, 8));
        // The second write may have begun before the failure was seen, or after the exclusion.
        losses += usize::from(seen.0 != tag || !(seen.1 == late || seen.1 == 0));
    }
    losses
}

#[test]
fn an_exclusion_leaves_no_acknowledged_write_in_a_volatile_cache_only() {
    assert_eq!(losses_after_an_exclusion(|_| {}), 0);
}

#[cfg(feature = "planted-bugs")]
#[test]
fn an_exclusion_without_flush_is_caught() {
    let planted = |config: &mut SessionConfig| {
        config.planted_bug = Some(PlantedBug::SkipExclusionFlush);
    };
    assert!(losses_after_an_exclusion(planted) > 0);
}

/// Whether a target that is slow to apply a write has it when it is promoted.
fn promoted_with_everything(change: fn(&mut SessionConfig)) -> bool {
    let mut w = World::new(20, 3, 1, 2);
    let c = w.open(change);
    write_done(&mut w, c, 0, 64);
    w.crash_disk(1, 100);
    write_done(&mut w, c, 0, 8);
    w.run_until("pulling", |w| !w.disks[1].pull.is_empty());
    w.slow_writes_to = Some(1);
    let began = w.now;
    write_done(&mut w, c, 80, 8);
    assert!(
        w.now - began < 100_000_000,
        "acknowledgements do not wait for an uncounted target"
    );
    w.run_until("promoted", |w| w.all_in_sync());
    w.disks[1].live.contains_key(&(0, 10))
}

#[test]
fn a_target_is_promoted_only_with_every_write_sent_to_it() {
    assert!(promoted_with_everything(|_| {}));
}

#[cfg(feature = "planted-bugs")]
#[test]
fn a_promotion_without_the_target_s_answers_is_caught() {
    assert!(!promoted_with_everything(|config| {
        config.planted_bug = Some(PlantedBug::PromoteWithoutTargetAcks);
    }));
}

/// How long a step takes: `cargo test --release -- --ignored --nocapture cost_of`.
#[test]
#[ignore = "a measurement"]
fn cost_of_small_writes_and_reads() {
    super::cost::measure();
}
