//! R10: readers.

use std::time::Duration;

use super::oracle::join;
use super::world::World;
use crate::engine::*;

const LEASE_NS: u64 = LEASE.as_nanos() as u64;

fn reader(config: &mut SessionConfig) {
    config.read_only = true;
}

fn stamp_at(w: &mut World, client: usize, sector: u64) -> u64 {
    let tag = w.read(client, sector, 1);
    stamp(w.answer(client, tag))
}

fn stamp(answer: Result<ClientReply, ClientError>) -> u64 {
    match answer {
        Ok(ClientReply::Data(segments)) => {
            u64::from_le_bytes(join(&segments)[..8].try_into().unwrap())
        }
        other => panic!("{other:?}"),
    }
}

fn write_done(w: &mut World, client: usize, sector: u64) -> u64 {
    let tag = w.write(client, sector, 8, false);
    assert_eq!(w.answer(client, tag), Ok(ClientReply::Done));
    tag
}

fn close(w: &mut World, client: usize) {
    w.feed(client, SessionEvent::Close);
    w.run_until("closed", |w| w.clients[client].stopped.is_some());
    assert_eq!(w.clients[client].stopped, Some(StopReason::Closed));
}

/// A volume with one write, closed cleanly; the write's stamp.
fn written(seed: u64) -> (World, u64) {
    let mut w = World::new(seed, 3, 2, 2);
    let writer = w.open(|_| {});
    let tag = write_done(&mut w, writer, 0);
    close(&mut w, writer);
    (w, tag)
}

#[test]
fn readers_share_a_volume_and_change_nothing() {
    let (mut w, tag) = written(1);
    let epoch = w.view.epoch;
    let began = w.now;
    let (a, b) = (w.open(reader), w.open(reader));
    assert!(w.now - began < LEASE_NS / 4, "no wait");
    assert_eq!(stamp_at(&mut w, a, 0), tag);
    assert_eq!(stamp_at(&mut w, b, 0), tag);
    assert_eq!(stamp_at(&mut w, b, 800), 0, "never written");
    let refused = w.submit(
        a,
        ClientOp::Trim {
            offset: 0,
            length: 4096,
            fua: false,
        },
    );
    assert_eq!(w.answer(a, refused), Err(ClientError::Invalid));
    let flush = w.submit(a, ClientOp::Flush);
    assert_eq!(w.answer(a, flush), Ok(ClientReply::Done));
    let status = w.submit(
        b,
        ClientOp::BlockStatus {
            offset: 0,
            length: 8192,
        },
    );
    let expected =
        [(4096, true), (4096, false)].map(|(length, allocated)| Extent { length, allocated });
    assert_eq!(
        w.answer(b, status),
        Ok(ClientReply::Extents(expected.to_vec()))
    );
    assert_eq!(w.view.epoch, epoch);
    close(&mut w, a);
    assert_eq!(stamp_at(&mut w, b, 0), tag);
    close(&mut w, b);
    assert!(w.clean && w.view.readers.is_empty());
}

#[test]
fn a_new_volume_is_made_before_it_is_read() {
    let mut w = World::new(2, 3, 2, 2);
    let (a, b) = (w.start(reader), w.start(reader));
    w.run_until("both serve", |w| {
        [a, b].iter().all(|c| w.clients[*c].serving)
    });
    assert_eq!(stamp_at(&mut w, a, 0), 0);
    assert_eq!(stamp_at(&mut w, b, 0), 0);
    assert!(w.disks.iter().all(|d| d.exists));
    assert!(w.clean && w.view.readers.len() == 2);
}

#[test]
fn what_a_dead_writer_left_is_reconciled_before_it_is_read() {
    for seed in 0..20 {
        let mut w = World::new(seed, 3, 1, 2);
        let writer = w.open(|_| {});
        let acknowledged = write_done(&mut w, writer, 0);
        // On its way to some replicas and not to others.
        w.broken_below[(seed % 3) as usize] = w.connection + 1;
        w.write(writer, 0, 8, false);
        w.run_for(Duration::from_micros(seed * 40));
        w.clients[writer].alive = false;
        w.revoke();
        let (a, b) = (w.start(reader), w.start(reader));
        w.run_until("both serve", |w| {
            [a, b].iter().all(|c| w.clients[*c].serving)
        });
        let seen = stamp_at(&mut w, a, 0);
        assert!(seen >= acknowledged);
        assert_eq!(stamp_at(&mut w, b, 0), seen);
        assert!(w.clean);
    }
}

#[test]
fn reads_wait_while_metadata_is_away() {
    let (mut w, tag) = written(3);
    let a = w.open(reader);
    assert_eq!(stamp_at(&mut w, a, 0), tag);
    w.metadata_up = false;
    assert_eq!(stamp_at(&mut w, a, 0), tag, "within the lease");
    w.run_for(LEASE);
    let read = w.read(a, 0, 1);
    w.run_for(Duration::from_secs(20));
    assert!(
        !w.clients[a].answers.contains_key(&read),
        "no error, no lie"
    );
    w.metadata_up = true;
    w.metadata_back();
    assert_eq!(stamp(w.answer(a, read)), tag);
}

#[test]
fn an_idle_reader_asks_nobody() {
    let (mut w, _) = written(4);
    let a = w.open(reader);
    w.run_for(Duration::from_secs(1));
    let (sent, connections) = (w.clients[a].sent, w.connection);
    w.run_for(Duration::from_secs(60));
    assert_eq!((w.clients[a].sent, w.connection), (sent, connections));
}

#[test]
fn a_writer_by_force_ends_the_readers() {
    let (mut w, tag) = written(5);
    let (a, cut) = (w.open(reader), w.open(reader));
    w.clients[cut].cut = true;
    assert_eq!(stamp_at(&mut w, cut, 0), tag);
    let began = w.now;
    let writer = w.open(|_| {});
    assert!(
        w.now - began >= LEASE_NS,
        "a full lease for readers that did not leave"
    );
    assert_eq!(w.clients[a].stopped, Some(StopReason::Superseded));
    let newer = write_done(&mut w, writer, 0);
    let late = w.read(cut, 0, 1);
    w.run_for(Duration::from_secs(5));
    assert!(
        !w.clients[cut].answers.contains_key(&late),
        "fenced, and out of lease"
    );
    w.clients[cut].cut = false;
    w.metadata_back();
    w.run_until("it learns it", |w| w.clients[cut].stopped.is_some());
    assert_eq!(w.clients[cut].stopped, Some(StopReason::Superseded));
    assert_eq!(stamp_at(&mut w, writer, 0), newer);
}

#[test]
fn a_reader_goes_on_with_the_replicas_that_are_left() {
    let (mut w, tag) = written(6);
    let a = w.open(reader);
    let epoch = w.view.epoch;
    for disk in 0..3 {
        w.crash_disk(disk, 3000);
        assert_eq!(stamp_at(&mut w, a, 0), tag, "disk {disk} is away");
        w.run_for(Duration::from_secs(5));
    }
    assert_eq!(w.view.epoch, epoch, "readers exclude nobody");
}

/// Random readers and writers that take the volume from each other, some of them cut off: the oracle of the world
/// judges what every one of them reads.
#[test]
fn readers_and_writers_that_take_over_agree() {
    for seed in 0..30 {
        if let Err(wrong) = takeovers(seed) {
            panic!("seed {seed}: {wrong}");
        }
    }
}

/// A reader that only reaches disk 0 and not metadata, and a writer that reaches everything but disk 0: no fence
/// stands between them. What the reader is told of a sector once the writer has written it, if anything.
fn split(change: impl FnOnce(&mut SessionConfig)) -> (World, usize, u64, Option<u64>) {
    let (mut w, old) = written(7);
    w.rebuilds = false;
    w.local = 1;
    let left = w.open(|config| {
        reader(config);
        change(config);
    });
    assert_eq!(stamp_at(&mut w, left, 0), old);
    w.clients[left].cut = true;
    w.local = 0;
    w.unreachable.insert((w.clients.len(), 0));
    let writer = w.open(|_| {});
    write_done(&mut w, writer, 0);
    let read = w.read(left, 0, 1);
    w.run_for(Duration::from_secs(5));
    let answer = w.clients[left].answers.get(&read).cloned();
    (w, left, old, answer.map(stamp))
}

#[test]
fn a_reader_out_of_lease_says_nothing_although_its_replica_is_not_fenced() {
    let (mut w, left, _, answer) = split(|_| {});
    assert_eq!(answer, None);
    w.clients[left].cut = false;
    w.metadata_back();
    w.run_until("it learns it", |w| w.clients[left].stopped.is_some());
    assert_eq!(w.clients[left].stopped, Some(StopReason::Superseded));
}

#[cfg(feature = "planted-bugs")]
#[test]
fn a_reader_without_confirmation_returns_what_is_old() {
    let (w, _, old, answer) = split(|config| {
        config.planted_bug = Some(PlantedBug::ReadWithoutConfirmation);
    });
    assert_eq!(answer, Some(old));
    assert!(w.oracle.check_linearizable().is_err());
}

fn takeovers(seed: u64) -> Result<(), String> {
    let mut w = World::new(seed, 3, 2, 2);
    let first = w.open(|_| {});
    write_done(&mut w, first, 0);
    close(&mut w, first);
    let mut clients: Vec<usize> = Vec::new();
    for round in 0..12 {
        let reads = w.random.chance(60);
        let client = w.start(|config| config.read_only = reads);
        clients.push(client);
        let cut = w.random.chance(30);
        for _ in 0..40 {
            let at = w.random.below(4) * 8;
            let who = clients[w.random.below(clients.len() as u64) as usize];
            if w.clients[who].stopped.is_none() && w.clients[who].serving {
                if w.random.chance(40) && who == client && !reads {
                    w.write(who, at, 8, false);
                } else {
                    w.read(who, at, 8);
                }
            }
            let pause = w.random.below(120);
            w.run_for(Duration::from_millis(pause));
        }
        w.clients[client].cut = cut && reads;
        if !reads {
            close_or_leave(&mut w, client);
        } else if round % 4 == 3 {
            w.revoke();
        }
    }
    for client in 0..w.clients.len() {
        w.clients[client].cut = false;
    }
    w.metadata_back();
    w.run_for(Duration::from_secs(10));
    assert!(w.oracle.reads > 100, "too few reads to judge by");
    w.oracle.check_linearizable()
}

/// Closes a writer, or lets it die.
fn close_or_leave(w: &mut World, client: usize) {
    if w.random.chance(50) {
        w.feed(client, SessionEvent::Close);
        w.run_until("closed", |w| w.clients[client].stopped.is_some());
    } else {
        w.clients[client].alive = false;
        w.revoke();
    }
}
