//! Snapshots in the store: lists, canonical layers, and merging, against a model that keeps everything.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::*;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{self, BlockState};
use storage_daemon::store::*;
use store_support::layers::*;
use store_support::*;

fn list(revision: u64, settled: u32, live: &[u32]) -> LayerList {
    LayerList {
        revision,
        settled: SnapshotNumber(settled),
        live: live.iter().copied().map(SnapshotNumber).collect(),
    }
}

fn v(sequence: u64) -> Version {
    Version::new(1, sequence)
}

fn fresh(seed: u64) -> Harness {
    let mut h = Harness::open(TestDisk::formatted(&options(24 << 20, 1 << 20)), 1, seed);
    h.create(VOLUME, 1);
    h
}

fn replica(h: &Harness) -> ReplicaInfo {
    h.store.replica(VOLUME).unwrap()
}

/// Goes on until nothing is left to be merged.
fn merge(h: &mut Harness) {
    h.idle();
    assert_eq!(replica(h).garbage_left, 0, "{:?}", h.store.stats());
}

#[test]
fn a_list_is_durable_and_never_goes_back_with_or_without_a_descriptor() {
    let mut h = fresh(1);
    h.put_layers(&list(3, 4, &[2, 4]));
    h.put_layers(&list(2, 9, &[]));
    h.put_layers(&list(3, 9, &[]));
    assert_eq!(replica(&h).layers, list(3, 4, &[2, 4]));
    let malformed = StoreRequest::PutLayers {
        volume: VOLUME,
        layers: list(9, 1, &[2]),
    };
    assert!(matches!(h.call(malformed), Err(StoreError::Invalid(_))));
    let mut h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 2, 1);
    assert_eq!(replica(&h).layers, list(3, 4, &[2, 4]));
    assert_eq!(replica(&h).descriptor, None);
    let descriptor = |epoch, layers| ashlar_proto::descriptor::VolumeDescriptor {
        volume: VOLUME,
        epoch: Epoch(epoch),
        size_bytes: 1 << 30,
        min_replicas: 1,
        snapshot: SnapshotNumber(5),
        layers,
        parent: None,
        groups: vec![],
        name: "v".to_owned(),
    };
    let put = |d| StoreRequest::PutDescriptor { descriptor: d };
    // An older list in a newer descriptor, then a newer one.
    for (epoch, given, kept) in [
        (2, list(1, 1, &[]), list(3, 4, &[2, 4])),
        (3, list(4, 4, &[4]), list(4, 4, &[4])),
    ] {
        assert_eq!(h.call(put(descriptor(epoch, given))), Ok(StoreReply::Done));
        let info = replica(&h);
        assert_eq!(info.layers, kept);
        assert_eq!(info.descriptor.unwrap().layers, kept);
    }
    assert!(matches!(
        h.call(put(descriptor(4, list(9, 1, &[2])))),
        Err(StoreError::Invalid(_))
    ));
    h.put_layers(&list(7, 6, &[]));
    let h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 3, 1);
    let info = replica(&h);
    assert_eq!(info.layers, list(7, 6, &[]));
    let kept = info.descriptor.unwrap();
    assert_eq!((kept.epoch, kept.layers), (Epoch(3), list(7, 6, &[])));
}

#[test]
fn requests_name_canonical_layers() {
    let mut h = fresh(1);
    h.call(write_layer(0, 0, 2, v(1), 1)).unwrap();
    h.call(write_layer(0, 1, 2, v(2), 2)).unwrap();
    h.call(write_layer(0, 2, 1, v(3), 5)).unwrap();
    // Snapshots 2 and 3 are gone, 5 is live: 0..=4 are one, 5 is the head's.
    h.put_layers(&list(1, 5, &[5]));
    let shown: Vec<_> = h
        .entries(0)
        .iter()
        .map(|e| (e.at.snapshot.0, e.at.block, e.version.sequence.0))
        .collect();
    let expected = vec![(4, 0, 1), (4, 1, 2), (4, 2, 2), (5, 2, 3)];
    assert_eq!(shown, expected);
    // A retry with a number below: superseded by what lies in the layer that is one with it.
    assert_eq!(
        h.call(write_layer(0, 1, 1, v(1), 1)),
        Ok(StoreReply::Written(wire::WriteOutcome::Superseded))
    );
    let read = |layer| wire::Read {
        range: BlockRange::new(ChunkIndex(0), 0, 3).unwrap(),
        snapshot: SnapshotNumber(layer),
        exact_layer: true,
    };
    for layer in [0, 2, 4] {
        let read = read(layer);
        let volume = VOLUME;
        match h.call(StoreRequest::Read { volume, read }) {
            Ok(StoreReply::Read(r)) => {
                let versions: Vec<_> = r.blocks.iter().map(|b| b.version).collect();
                assert_eq!(versions, [v(1), v(2), v(2)]);
            }
            other => panic!("{other:?}"),
        }
    }
    merge(&mut h);
    let info = replica(&h);
    let page = PAGE_SIZE as u64;
    assert_eq!(info.layer_bytes, [(4, page), (5, page)]);
    h.put_layers(&list(2, 5, &[]));
    merge(&mut h);
    assert_eq!(replica(&h).layer_bytes, [(5, page)]);
    let states = h.read_layer_checked(0, 0, 3, 5);
    assert_eq!(
        states.iter().map(|s| s.1).collect::<Vec<_>>(),
        [v(1), v(2), v(3)]
    );
}

#[test]
fn a_bad_block_stays_known_as_bad_and_can_be_repaired_where_it_went() {
    let mut h = fresh(1);
    h.call(write_layer(0, 0, 16, v(1), 0)).unwrap();
    h.call(write_layer(0, 0, 2, v(2), 1)).unwrap();
    h.flush(Version::ZERO, Version::ZERO);
    h.idle();
    // Rot in the old layer's page, of a block that stays visible.
    let content = content(0, 5, v(1));
    let at = h
        .disk
        .current
        .windows(4096)
        .step_by(4096)
        .rposition(|w| w == content);
    h.disk.current[at.unwrap() * 4096 + 7] ^= 1;
    h.put_layers(&list(1, 1, &[]));
    merge(&mut h);
    let states = h.states(0, 16, 1);
    assert_eq!(states[5], (BlockState::Bad, v(1)));
    assert_eq!(
        states.iter().filter(|s| s.0 == BlockState::Data).count(),
        15
    );
    let repair = StoreRequest::Repair {
        volume: VOLUME,
        write: write_of(0, 5, 1, v(1), 0),
    };
    h.call(repair).unwrap();
    assert_eq!(h.read_layer_checked(0, 5, 1, 1), [(BlockState::Data, v(1))]);
}

/// Random work on one store; what it had to do.
fn run(seed: u64) -> u64 {
    let mut merged = 0;
    let mut m = Volume::default();
    let mut h = fresh(seed);
    for step in 0..400 {
        let context = format!("seed {seed} step {step}");
        match h.rng.below(40) {
            0..=27 => {
                let mut rng = h.rng.clone();
                let op = m.random_op(&mut rng);
                h.rng = rng;
                let tag = h.request(op.request());
                m.sent(tag, op);
                m.done.push(op);
            }
            28 if !m.done.is_empty() => {
                // A retry, of an update whose number may have another name by now.
                let op = m.done[h.rng.below(m.done.len() as u64) as usize];
                h.request(op.request());
            }
            29..=31 => {
                let mut rng = h.rng.clone();
                m.change_list(&mut rng, 6);
                h.rng = rng;
                if h.rng.below(3) > 0 {
                    let (volume, layers) = (VOLUME, m.list.clone());
                    let tag = h.request(StoreRequest::PutLayers { volume, layers });
                    m.list_sent(tag, m.list.revision);
                }
            }
            32 => {
                h.settle();
                m.collect(&mut h);
                m.all_flushed();
                let below = v(m.sequence.saturating_sub(h.rng.below(20)));
                m.forgotten = m.forgotten.max(below);
                h.flush(below, below);
            }
            33..=34 => {
                h.settle();
                m.collect(&mut h);
                m.check(&mut h, &context);
            }
            _ => {
                h.now = Time(h.now.0 + 2_500_000_000);
                h.tick();
            }
        }
        h.tick();
        for _ in 0..h.rng.below(6) {
            h.one_io();
        }
        if h.rng.below(60) == 0 {
            h.settle();
            m.collect(&mut h);
            m.all_flushed();
            merged += h.store.stats().merged_pages;
            let rng = h.rng.clone();
            h = if step % 2 == 0 {
                Harness::open(h.shutdown(), 1, 1)
            } else {
                Harness::open(h.disk.after_kill(Cut::LoseAll), 1, 1)
            };
            h.rng = rng;
            m.crashed();
            m.check(&mut h, &context);
        }
    }
    h.settle();
    m.collect(&mut h);
    m.all_flushed();
    h.put_layers(&m.list);
    m.revision_sent = m.list.revision;
    m.check(&mut h, &format!("seed {seed} end"));
    merge(&mut h);
    m.check(&mut h, &format!("seed {seed} merged"));
    assert_eq!(h.bad_reports, 0);
    h.check_disk(&format!("seed {seed}"));
    merged + h.store.stats().merged_pages
}

#[test]
fn every_live_snapshot_and_the_head_read_back() {
    let merged: u64 = (1..=40).map(run).sum();
    assert!(merged > 1000, "only {merged}");
}

/// The same updates to two stores, one of which merges early and often, the other late or never.
#[test]
fn listings_under_one_list_are_equal_however_far_merging_is() {
    for seed in 1..=15 {
        let mut m = Volume::default();
        let (mut a, mut b) = (fresh(seed), fresh(seed + 100));
        for step in 0..200 {
            let mut rng = a.rng.clone();
            if rng.below(12) == 0 {
                m.change_list(&mut rng, 5);
                a.put_layers(&m.list);
            }
            let op = m.random_op(&mut rng);
            a.rng = rng;
            a.call(op.request()).unwrap();
            b.call(op.request()).unwrap();
            if step % 20 == 0 {
                a.idle();
            }
            if step % 70 == 69 {
                b.put_layers(&m.list);
                a.put_layers(&m.list);
                for chunk in 0..CHUNKS {
                    assert_eq!(
                        a.entries(chunk),
                        b.entries(chunk),
                        "seed {seed} step {step}"
                    );
                }
            }
        }
    }
}

#[test]
fn space_returns_to_the_byte() {
    for seed in 1..=20 {
        let mut m = Volume::default();
        let (mut with, mut without) = (fresh(seed), fresh(seed + 100));
        for _ in 0..150 {
            let mut rng = with.rng.clone();
            if rng.below(10) == 0 {
                m.change_list(&mut rng, 8);
                if rng.below(2) == 0 {
                    with.put_layers(&m.list);
                }
            }
            let op = m.random_op(&mut rng);
            if rng.below(15) == 0 {
                with.idle();
            }
            with.rng = rng;
            with.call(op.request()).unwrap();
            without.call(Op { layer: 0, ..op }.request()).unwrap();
        }
        m.delete_all();
        with.put_layers(&m.list);
        for h in [&mut with, &mut without] {
            let all = v(m.sequence);
            h.flush(all, all);
            merge(h);
        }
        let (a, b) = (with.store.stats(), without.store.stats());
        assert_eq!(a.used_bytes, b.used_bytes, "seed {seed}: {a:?} {b:?}");
        assert_eq!(replica(&with).pages, replica(&without).pages);
        let layers = replica(&with).layer_bytes;
        assert_eq!(layers, [(m.number, a.used_bytes)], "seed {seed}");
        for chunk in 0..CHUNKS {
            let states = with.read_layer_checked(chunk, 0, BLOCKS, m.number);
            let expected = without.read_checked(chunk, 0, BLOCKS);
            for (have, want) in states.into_iter().zip(expected) {
                let data = |s: (BlockState, Version)| (s.0 == BlockState::Data).then_some(s.1);
                assert_eq!(data(have), data(want), "seed {seed}");
            }
        }
    }
}

#[test]
fn a_full_disk_gives_space_back_when_its_snapshots_go() {
    let mut h = Harness::open(TestDisk::formatted(&options(6 << 20, 512 << 10)), 1, 3);
    h.create(VOLUME, 1);
    let mut sequence = 0;
    let mut full = false;
    for layer in 0..40 {
        for page in 0..12 {
            sequence += 1;
            full |= h
                .call(write_layer(
                    0,
                    page * 16 + layer % 16,
                    1,
                    v(sequence),
                    layer,
                ))
                .is_err();
        }
        h.idle();
    }
    assert!(full);
    let before = h.store.stats();
    assert_eq!(before.used_bytes, before.capacity_bytes);
    h.put_layers(&list(1, 40, &[]));
    merge(&mut h);
    let used = h.store.stats().used_bytes;
    assert_eq!(used, 12 * PAGE_SIZE as u64);
    h.call(write_layer(0, 500, 1, v(sequence + 1), 40)).unwrap();
}

/// The log is never empty, and somebody always waits for it.
#[test]
fn load_without_an_end_does_not_keep_a_deleted_snapshot() {
    let mut h = fresh(1);
    let mut sequence = 0;
    let mut next = |h: &mut Harness, layer| {
        sequence += 1;
        // What is written under load is not what is to be merged.
        let chunk = h.rng.below(2) as u32 + if layer == 4 { 2 } else { 0 };
        let first = h.rng.below(63) as u32 * 16;
        h.request(write_layer(chunk, first, 16, v(sequence), layer))
    };
    for layer in 1..=3 {
        for _ in 0..60 {
            next(&mut h, layer);
            h.settle();
        }
        h.put_layers(&list(u64::from(layer), layer, &[layer]));
    }
    h.put_layers(&list(9, 3, &[]));
    assert!(replica(&h).garbage_left > 0);
    let mut waiting: Vec<u64> = (0..60).map(|_| next(&mut h, 4)).collect();
    let (mut answered, mut crowded) = (0, 0);
    while replica(&h).garbage_left > 0 {
        assert!(answered < 20_000, "{:?}", h.store.stats());
        h.tick();
        h.one_io();
        waiting.retain(|tag| h.replies.remove(tag).is_none());
        while waiting.len() < 60 {
            waiting.push(next(&mut h, 4));
            answered += 1;
        }
        crowded += u32::from(h.store.stats().queued_requests > 0);
    }
    assert!(crowded > 100, "{answered} {crowded}");
}

#[test]
fn a_hundred_layers_of_tombstones_become_one_range() {
    let mut h = fresh(1);
    for layer in 0..100 {
        h.call(trim_layer(0, 0, 1024, v(u64::from(layer) + 1), layer))
            .unwrap();
    }
    assert_eq!(h.store.stats().tombstones, 100);
    h.put_layers(&list(1, 100, &[]));
    merge(&mut h);
    assert_eq!(h.store.stats().tombstones, 1);
    let states = h.read_layer_checked(0, 0, 64, 100);
    assert!(states.iter().all(|s| *s == (BlockState::Tombstone, v(100))));
}

#[test]
fn five_hundred_layers_cost_a_reader_no_look_at_sectors_that_cannot_have_the_block() {
    let mut h = Harness::open(TestDisk::formatted(&options(48 << 20, 1 << 20)), 1, 1);
    h.create(VOLUME, 1);
    let live: Vec<u32> = (1..=500).collect();
    h.put_layers(&list(1, 500, &live));
    for layer in 0..=500 {
        let page = if layer == 0 { 0 } else { 1 + layer % 30 };
        let version = v(u64::from(layer) + 1);
        h.call(write_layer(0, page * 16, 1, version, layer))
            .unwrap();
    }
    h.flush(v(500), Version::ZERO);
    h.idle();
    let looks = |h: &Harness| h.store.stats().cache_hits + h.store.stats().cache_misses;
    h.read_layer_checked(0, 0, 1, 500);
    let before = looks(&h);
    assert_eq!(
        h.read_layer_checked(0, 0, 1, 500),
        [(BlockState::Data, v(1))]
    );
    assert_eq!(looks(&h) - before, 1, "the oldest layer's sector only");
    assert_eq!(
        h.read_layer_checked(0, 600, 1, 500)[0].0,
        BlockState::Absent
    );
    assert_eq!(looks(&h) - before, 1);
    assert_eq!(h.entries(0).len(), 501);
    h.put_layers(&list(2, 500, &[]));
    merge(&mut h);
    assert_eq!(
        h.read_layer_checked(0, 0, 1, 500),
        [(BlockState::Data, v(1))]
    );
    assert_eq!(replica(&h).layer_bytes, [(500, 31 * PAGE_SIZE as u64)]);
}

#[test]
fn a_rebuild_takes_the_source_for_the_truth_in_all_layers_that_are_one() {
    let mut h = fresh(1);
    for layer in 0..3 {
        // Never acknowledged.
        h.call(write_layer(0, 0, 4, v(20 + u64::from(layer)), layer))
            .unwrap();
    }
    h.put_layers(&list(1, 2, &[]));
    let block = |block: u16, state, version: Version| PullBlock {
        snapshot: SnapshotNumber(2),
        block,
        state,
        version,
        checksum: if state == BlockState::Data {
            crc32c::crc32c(&content(0, block.into(), version))
        } else {
            0
        },
        data: if state == BlockState::Data {
            content(0, block.into(), version).into()
        } else {
            bytes::Bytes::new()
        },
    };
    let blocks = vec![
        block(0, BlockState::Data, v(5)),
        block(1, BlockState::Tombstone, v(6)),
        block(2, BlockState::Absent, Version::ZERO),
    ];
    let pull = StoreRequest::PullApply {
        volume: VOLUME,
        rebuild_epoch: Epoch(9),
        chunk: ChunkIndex(0),
        blocks,
    };
    assert_eq!(h.call(pull), Ok(StoreReply::Pulled { applied: 3 }));
    let expected = [
        (BlockState::Data, v(5)),
        (BlockState::Tombstone, v(6)),
        (BlockState::Absent, Version::ZERO),
        (BlockState::Data, v(22)),
    ];
    assert_eq!(h.read_layer_checked(0, 0, 4, 2), expected);
    let mut h = Harness::open(h.disk.after_kill(Cut::LoseAll), 1, 1);
    assert_eq!(h.read_layer_checked(0, 0, 4, 2), expected);
    merge(&mut h);
    assert_eq!(h.read_layer_checked(0, 0, 4, 2), expected);
}
