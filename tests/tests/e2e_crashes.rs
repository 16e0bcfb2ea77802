//! Real processes killed at random points: nothing that was flushed is lost or torn.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ashlar_platform::sim::Rng;
use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient};
use rustix::process::Signal;

/// Blocks that the writers use: few, so that writes meet.
const BLOCKS: u64 = 400;

/// What one writer knows of its blocks.
#[derive(Default)]
struct Known {
    /// Highest stamp that was sent, per block.
    sent: BTreeMap<u64, u64>,
    /// Stamp of the last write that was answered before an answered flush.
    durable: BTreeMap<u64, u64>,
    /// Longest time that one request took.
    stall: Duration,
    writes: u64,
}

/// Writes and flushes until told to stop; every answer must be a success.
fn write_until(stop: &AtomicBool, client: &mut NbdClient, seed: u64, known: &Mutex<Known>) {
    let mut rng = Rng::new(seed);
    let mut answered = BTreeMap::new();
    let mut stamp = known
        .lock()
        .unwrap()
        .sent
        .values()
        .copied()
        .max()
        .unwrap_or(0);
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        if rng.below(8) == 0 {
            client.flush().unwrap();
            known.lock().unwrap().durable.append(&mut answered);
        } else {
            stamp += 1;
            let block = rng.below(BLOCKS);
            known.lock().unwrap().sent.insert(block, stamp);
            client.write_stamp(block, stamp).unwrap();
            answered.insert(block, stamp);
        }
        let mut known = known.lock().unwrap();
        known.stall = known.stall.max(start.elapsed());
        known.writes += 1;
    }
}

/// Every block holds a stamp between the last durable one and the last sent one.
fn check(client: &mut NbdClient, known: &Known) {
    for block in 0..BLOCKS {
        let stamp = client.read_stamp(block).unwrap();
        let durable = known.durable.get(&block).copied().unwrap_or(0);
        let sent = known.sent.get(&block).copied().unwrap_or(0);
        assert!(
            (durable..=sent).contains(&stamp),
            "block {block} says {stamp}, flushed {durable}, sent {sent}"
        );
    }
}

#[test]
fn a_lone_daemon_killed_200_times_loses_nothing_and_no_request_fails() {
    let rounds: u64 = std::env::var("ASHLAR_KILL_ROUNDS")
        .ok()
        .and_then(|t| t.parse().ok())
        .unwrap_or(200);
    let cluster = Cluster::up(ClusterSpec {
        members: 1,
        daemons: 1,
        ..ClusterSpec::default()
    });
    cluster.volume("single", "64MiB", 1);
    let export = Export::start(&cluster, "single");
    let known = Arc::new(Mutex::new(Known::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (known, stop) = (known.clone(), stop.clone());
        let mut client = NbdClient::connect_unix(export.socket(), "single").unwrap();
        std::thread::spawn(move || write_until(&stop, &mut client, 11, &known))
    };
    let mut checker = NbdClient::connect_unix(export.socket(), "single").unwrap();
    let mut rng = Rng::new(42);
    for _ in 0..rounds {
        std::thread::sleep(Duration::from_millis(rng.below(150)));
        cluster.ok(&["dev", "kill", "daemon-1"]);
        cluster.ok(&["dev", "start", "daemon-1"]);
        let block = rng.below(BLOCKS);
        let lower = known
            .lock()
            .unwrap()
            .durable
            .get(&block)
            .copied()
            .unwrap_or(0);
        let stamp = checker.read_stamp(block).unwrap();
        assert!(
            stamp >= lower,
            "block {block} says {stamp}, flushed {lower}"
        );
        assert!(!writer.is_finished(), "a request failed");
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let known = known.lock().unwrap();
    check(&mut checker, &known);
    println!(
        "{rounds} kills, {} requests, longest {:?}",
        known.writes, known.stall
    );
}

#[test]
fn one_of_three_daemons_killed_again_and_again_is_not_noticed() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("three", "64MiB", 3);
    let export = Export::start(&cluster, "three");
    let known = Arc::new(Mutex::new(Known::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (known, stop) = (known.clone(), stop.clone());
        let mut client = NbdClient::connect_unix(export.socket(), "three").unwrap();
        std::thread::spawn(move || write_until(&stop, &mut client, 12, &known))
    };
    for round in 0..6 {
        let name = format!("daemon-{}", round % 3 + 1);
        std::thread::sleep(Duration::from_millis(300));
        cluster.ok(&["dev", "kill", &name]);
        std::thread::sleep(Duration::from_millis(300));
        cluster.ok(&["dev", "start", &name]);
        cluster.wait_redundant("three", Duration::from_secs(30));
        assert!(!writer.is_finished(), "a request failed");
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    let known = known.lock().unwrap();
    let mut checker = NbdClient::connect_unix(export.socket(), "three").unwrap();
    check(&mut checker, &known);
    println!(
        "longest stall {:?} over {} requests",
        known.stall, known.writes
    );
    // The bar (0.5 s) is measured by the demo and the bench; here only that nothing hung.
    assert!(known.stall < Duration::from_secs(5), "{:?}", known.stall);
}

#[test]
fn a_frozen_daemon_is_left_behind_and_catches_up() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("frozen", "64MiB", 3);
    let export = Export::start(&cluster, "frozen");
    let mut client = NbdClient::connect_unix(export.socket(), "frozen").unwrap();
    for block in 0..50 {
        client.write_stamp(block, 1).unwrap();
    }
    cluster.ok(&["dev", "pause", "daemon-2"]);
    let start = Instant::now();
    client.write_stamp(0, 2).unwrap();
    client.flush().unwrap();
    let stall = start.elapsed();
    println!("stall by a frozen daemon: {stall:?}");
    assert!(stall < Duration::from_secs(8), "{stall:?}");
    for block in 1..50 {
        client.write_stamp(block, 2).unwrap();
    }
    cluster.ok(&["dev", "resume", "daemon-2"]);
    cluster.wait_redundant("frozen", Duration::from_secs(30));
    for block in 0..50 {
        assert_eq!(client.read_stamp(block).unwrap(), 2);
    }
}

#[test]
fn without_a_metadata_majority_io_goes_on_and_waits_only_when_a_replica_fails() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("quorum", "64MiB", 3);
    let export = Export::start(&cluster, "quorum");
    let mut client = NbdClient::connect_unix(export.socket(), "quorum").unwrap();
    cluster.ok(&["dev", "kill", "metadata-1"]);
    cluster.ok(&["dev", "kill", "metadata-2"]);
    for block in 0..100 {
        client.write_stamp(block, 1).unwrap();
        assert_eq!(client.read_stamp(block).unwrap(), 1);
    }
    client.flush().unwrap();
    cluster.ok(&["dev", "kill", "daemon-1"]);
    let waiting = std::thread::spawn(move || {
        let start = Instant::now();
        client.write_stamp(3, 2).unwrap();
        (client, start.elapsed())
    });
    std::thread::sleep(Duration::from_secs(3));
    assert!(
        !waiting.is_finished(),
        "acknowledged although the exclusion cannot be committed"
    );
    cluster.ok(&["dev", "start", "metadata-1"]);
    cluster.ok(&["dev", "start", "metadata-2"]);
    let (mut client, waited) = waiting.join().unwrap();
    assert!(waited >= Duration::from_secs(3));
    assert_eq!(client.read_stamp(3).unwrap(), 2);
    cluster.ok(&["dev", "start", "daemon-1"]);
    cluster.wait_redundant("quorum", Duration::from_secs(30));
}

#[test]
fn a_zombie_of_the_old_epoch_is_refused() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("zombie", "64MiB", 3);
    let mut old = Export::start_with(&cluster, "zombie", "old", &[]);
    let mut before = NbdClient::connect_unix(old.socket(), "zombie").unwrap();
    before.write_stamp(1, 1).unwrap();
    before.flush().unwrap();
    old.signal(Signal::STOP);
    let new = Export::start_with(&cluster, "zombie", "new", &["--force"]);
    let mut after = NbdClient::connect_unix(new.socket(), "zombie").unwrap();
    assert_eq!(after.read_stamp(1).unwrap(), 1);
    after.write_stamp(1, 2).unwrap();
    old.signal(Signal::CONT);
    assert!(
        before.write_stamp(1, 3).is_err(),
        "the zombie's write was acknowledged"
    );
    let status = old.wait_end(Duration::from_secs(20));
    assert!(!status.success(), "{status}");
    assert_eq!(after.read_stamp(1).unwrap(), 2);
}
