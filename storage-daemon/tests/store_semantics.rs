//! What requests mean: versions, supersession, tombstones, layers, repair, rebuild merge, fences.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_platform::clock::Time;
use ashlar_proto::descriptor::{ReplicaDescriptor, VolumeDescriptor};
use ashlar_proto::ids::*;
use ashlar_proto::wire::{self, BlockState, WriteOutcome};
use bytes::Bytes;
use storage_daemon::store::*;
use store_support::*;

fn v(sequence: u64) -> Version {
    Version::new(1, sequence)
}

fn fresh() -> Harness {
    let mut h = Harness::open(TestDisk::formatted(&options(16 << 20, 1 << 20)), 1, 1);
    h.create(VOLUME, 1);
    h
}

fn written(outcome: WriteOutcome) -> Result<StoreReply, StoreError> {
    Ok(StoreReply::Written(outcome))
}

/// Everything goes home, and the caches are cold: by a clean restart after write-back.
fn home(mut h: Harness) -> Harness {
    h.flush(Version::ZERO, Version::ZERO);
    h.idle();
    Harness::open(h.shutdown(), 1, 2)
}

#[test]
fn a_lower_or_equal_version_is_superseded_in_log_and_home() {
    let mut h = fresh();
    assert_eq!(h.call(write(0, 3, 2, v(5))), written(WriteOutcome::Applied));
    for _ in 0..2 {
        assert_eq!(
            h.call(write(0, 3, 2, v(5))),
            written(WriteOutcome::Superseded)
        );
        assert_eq!(
            h.call(write(0, 3, 1, v(4))),
            written(WriteOutcome::Superseded)
        );
        assert_eq!(h.read_checked(0, 3, 2), vec![(BlockState::Data, v(5)); 2]);
        h = home(h);
    }
    // One of three blocks is new: it is written, the answer says that others were not.
    assert_eq!(
        h.call(write(0, 3, 3, v(4))),
        written(WriteOutcome::Superseded)
    );
    let states = h.read_checked(0, 3, 3);
    assert_eq!(
        states.iter().map(|s| s.1.sequence.0).collect::<Vec<_>>(),
        vec![5, 5, 4]
    );
    assert_eq!(h.call(write(0, 3, 3, v(6))), written(WriteOutcome::Applied));
}

#[test]
fn chunks_and_reserved_pages_are_counted() {
    let mut h = fresh();
    for (chunk, block) in [(0, 0), (0, 1), (0, 100), (7, 0)] {
        h.call(write(chunk, block, 1, v(1))).unwrap();
    }
    // Three pages are needed once the four blocks leave the log.
    let pages = 3 * PAGE_SIZE as u64;
    let stats = h.store.stats();
    assert_eq!((stats.reserved_bytes, stats.used_bytes), (pages, pages));
    assert_eq!(h.store.replica(VOLUME).unwrap().chunks, 2);
    let h = home(h);
    let stats = h.store.stats();
    assert_eq!((stats.reserved_bytes, stats.used_bytes), (0, pages));
    assert_eq!(h.store.replica(VOLUME).unwrap().chunks, 2);
}

#[test]
fn superseded_is_answered_after_the_superseding_batch() {
    let mut h = fresh();
    let first = h.request(write(0, 0, 1, v(2)));
    h.tick();
    let second = h.request(write(0, 0, 1, v(1)));
    assert!(h.replies.is_empty(), "the record is not on the device yet");
    h.settle();
    assert_eq!(
        h.replies.remove(&first),
        Some(written(WriteOutcome::Applied))
    );
    assert_eq!(
        h.replies.remove(&second),
        Some(written(WriteOutcome::Superseded))
    );
}

#[test]
fn client_writes_at_or_below_the_watermark_are_no_ops_and_reconciliation_is_not() {
    let mut h = fresh();
    h.call(write(0, 0, 1, v(9))).unwrap();
    h.flush(v(9), Version::ZERO);
    assert_eq!(
        h.call(write(0, 5, 1, v(8))),
        written(WriteOutcome::Superseded)
    );
    assert_eq!(h.read_checked(0, 5, 1)[0].0, BlockState::Absent);
    let write = write_of(0, 5, 1, v(8), 0);
    let r = h.call(StoreRequest::Write {
        volume: VOLUME,
        write,
        client: false,
    });
    assert_eq!(r, written(WriteOutcome::Applied));
}

#[test]
fn data_that_does_not_match_its_checksum_is_refused() {
    let mut h = fresh();
    let mut w = write_of(0, 0, 2, v(1), 0);
    w.checksums[1] ^= 1;
    let r = h.call(StoreRequest::Write {
        volume: VOLUME,
        write: w,
        client: true,
    });
    assert_eq!(r, Err(StoreError::Checksum));
    assert_eq!(h.read_checked(0, 0, 2)[0].0, BlockState::Absent);
}

#[test]
fn big_writes_go_to_fresh_pages_and_survive_all_moves() {
    let mut h = fresh();
    h.call(write(0, 8, 200, v(1))).unwrap();
    assert_eq!(h.store.stats().redirected_pages, 12);
    h.call(write(0, 20, 3, v(2))).unwrap();
    h.call(write(0, 32, 64, v(3))).unwrap();
    for _ in 0..2 {
        let states = h.read_checked(0, 0, 220);
        for (b, s) in states.iter().enumerate() {
            let expected = match b {
                0..8 | 208.. => 0,
                20..23 => 2,
                32..96 => 3,
                _ => 1,
            };
            assert_eq!(s.1.sequence.0, expected, "block {b}");
        }
        h = home(h);
    }
}

#[test]
fn payloads_cut_anywhere_are_joined_right() {
    let mut h = fresh();
    let mut w = write_of(0, 0, 17, v(1), 0);
    let all = w.data[0].clone();
    w.data = [all.slice(..5000), all.slice(5000..5001), all.slice(5001..)]
        .into_iter()
        .collect();
    h.call(StoreRequest::Write {
        volume: VOLUME,
        write: w,
        client: true,
    })
    .unwrap();
    assert!(
        h.read_checked(0, 0, 17)
            .iter()
            .all(|s| s.0 == BlockState::Data)
    );
}

#[test]
fn tombstones_hide_older_data_and_are_forgotten_only_when_allowed() {
    let mut h = fresh();
    h.call(write(0, 0, 32, v(1))).unwrap();
    h = home(h);
    let used = h.store.stats().used_bytes;
    h.call(trim(0, 0, 1024, v(5))).unwrap();
    assert_eq!(
        h.read_checked(0, 0, 2),
        vec![(BlockState::Tombstone, v(5)); 2]
    );
    assert_eq!(
        h.call(write(0, 1, 1, v(4))),
        written(WriteOutcome::Superseded)
    );
    h.flush(v(5), Version::ZERO);
    h.idle();
    assert_eq!(
        h.read_checked(0, 0, 2),
        vec![(BlockState::Tombstone, v(5)); 2]
    );
    assert_eq!(
        h.store.stats().used_bytes,
        used - 2 * PAGE_SIZE as u64,
        "space comes back at once"
    );
    h = home(h);
    assert_eq!(h.read_checked(0, 0, 1), vec![(BlockState::Tombstone, v(5))]);
    // Now it may be forgotten, once its record is freed.
    h.flush(v(5), v(5));
    h.call(write(1, 0, 1, v(6))).unwrap();
    h = home(h);
    h.flush(v(5), v(5));
    h.call(write(1, 0, 1, v(7))).unwrap();
    h.flush(v(5), v(5));
    h.idle();
    assert_eq!(h.store.stats().tombstones, 0);
    assert_eq!(h.read_checked(0, 0, 1)[0].0, BlockState::Absent);
    let h = Harness::open(h.shutdown(), 1, 3);
    assert!(h.store.replica(VOLUME).unwrap().highest >= v(7));
    assert_eq!(h.store.replica(VOLUME).unwrap().watermark, v(5));
}

#[test]
fn layers_resolve_per_block_to_the_newest_at_or_below() {
    let mut h = fresh();
    let write = |h: &mut Harness, block, layer, seq| {
        let write = write_of(0, block, 2, v(seq), layer);
        h.call(StoreRequest::Write {
            volume: VOLUME,
            write,
            client: true,
        })
        .unwrap();
    };
    write(&mut h, 0, 0, 1);
    write(&mut h, 1, 3, 2);
    for _ in 0..2 {
        let seen = |h: &mut Harness, layer| {
            let r = h.read(0, 0, 4, layer);
            r.blocks
                .iter()
                .map(|b| b.version.sequence.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(seen(&mut h, 0), vec![1, 1, 0, 0]);
        assert_eq!(seen(&mut h, 2), vec![1, 1, 0, 0]);
        assert_eq!(seen(&mut h, 3), vec![1, 2, 2, 0]);
        h = home(h);
    }
    // A tombstone in the upper layer hides the lower one, and stays: there is something beneath it.
    let t = wire::Trim {
        range: BlockRange::new(ChunkIndex(0), 0, 1).unwrap(),
        snapshot: SnapshotNumber(3),
        version: v(3),
        durable: false,
    };
    h.call(StoreRequest::Trim {
        volume: VOLUME,
        trim: t,
        client: true,
    })
    .unwrap();
    h.flush(v(3), v(3));
    h = home(h);
    let r = h.read(0, 0, 1, 3);
    assert_eq!(r.blocks[0].state, BlockState::Tombstone);
    assert_eq!(h.read(0, 0, 1, 0).blocks[0].version, v(1));
}

#[test]
fn reads_of_blocks_in_flight_wait_for_them() {
    let mut h = fresh();
    h.request(write(0, 0, 1, v(1)));
    let read = wire::Read {
        range: BlockRange::new(ChunkIndex(0), 0, 1).unwrap(),
        snapshot: SnapshotNumber(0),
        exact_layer: false,
    };
    let tag = h.request(StoreRequest::Read {
        volume: VOLUME,
        read,
    });
    assert!(!h.replies.contains_key(&tag));
    h.tick();
    h.settle();
    match h.replies.remove(&tag) {
        Some(Ok(StoreReply::Read(r))) => assert_eq!(r.blocks[0].version, v(1)),
        other => panic!("{other:?}"),
    }
}

fn pull(state: BlockState, block: u16, version: Version) -> PullBlock {
    let data = match state {
        BlockState::Data => Bytes::from(content(0, block.into(), version)),
        _ => Bytes::new(),
    };
    PullBlock {
        snapshot: SnapshotNumber(0),
        block,
        state,
        version,
        checksum: if data.is_empty() {
            0
        } else {
            crc32c::crc32c(&data)
        },
        data,
    }
}

#[test]
fn the_rebuild_merge_takes_the_source_for_older_epochs_and_versions_for_newer() {
    let e1 = |s| Version::new(1, s);
    let e2 = |s| Version::new(2, s);
    for at_home in [false, true] {
        let mut h = fresh();
        for b in 0..8 {
            h.call(write(0, b, 1, e1(10 + u64::from(b)))).unwrap();
        }
        h.call(write(0, 6, 1, e2(1))).unwrap();
        h.call(write(0, 7, 1, e2(2))).unwrap();
        if at_home {
            h = home(h);
        }
        let blocks = vec![
            pull(BlockState::Data, 0, e1(3)), // lower, but the source is the truth
            pull(BlockState::Tombstone, 1, e1(4)), // likewise
            pull(BlockState::Absent, 2, Version::ZERO), // the source has nothing
            pull(BlockState::Data, 3, e1(13)), // equal: nothing to do
            pull(BlockState::Data, 4, e2(9)), // newer
            pull(BlockState::Data, 6, e1(16)), // ours is of the rebuild's epoch: stays
            pull(BlockState::Data, 7, e2(5)), // both are: the version decides
            pull(BlockState::Absent, 20, Version::ZERO),
            pull(BlockState::Bad, 5, e1(15)), // rotten at the source, sound here: stays
            pull(BlockState::Bad, 21, e1(7)), // nobody has it: known to be lost
            pull(BlockState::Bad, 22, e1(8)),
        ];
        let request = StoreRequest::PullApply {
            volume: VOLUME,
            rebuild_epoch: Epoch(2),
            chunk: ChunkIndex(0),
            blocks,
        };
        assert_eq!(
            h.call(request.clone()),
            Ok(StoreReply::Pulled { applied: 7 })
        );
        assert_eq!(
            h.call(request),
            Ok(StoreReply::Pulled { applied: 0 }),
            "idempotent"
        );
        for _ in 0..3 {
            let s = h.read_checked(0, 0, 8);
            let expected = vec![
                (BlockState::Data, e1(3)),
                (BlockState::Tombstone, e1(4)),
                (BlockState::Absent, Version::ZERO),
                (BlockState::Data, e1(13)),
                (BlockState::Data, e2(9)),
                (BlockState::Data, e1(15)),
                (BlockState::Data, e2(1)),
                (BlockState::Data, e2(5)),
            ];
            assert_eq!(s, expected);
            let lost = vec![(BlockState::Bad, e1(7)), (BlockState::Bad, e1(8))];
            assert_eq!(h.read_checked(0, 21, 2), lost);
            h = home(h);
        }
    }
}

#[test]
fn listings_show_every_block_and_digests_tell_differences() {
    let mut a = fresh();
    let mut b = fresh();
    for h in [&mut a, &mut b] {
        h.call(write(0, 0, 40, v(1))).unwrap();
        h.call(write(5, 100, 2, v(2))).unwrap();
        h.call(trim(6, 7, 3, v(3))).unwrap();
    }
    b = home(b);
    let digests = |h: &mut Harness| {
        let digests = wire::ChunkDigests {
            group: GroupIndex(0),
            group_count: 1,
            from: ChunkIndex(0),
        };
        match h.call(StoreRequest::ChunkDigests {
            volume: VOLUME,
            digests,
        }) {
            Ok(StoreReply::ChunkDigests(l)) => l.chunks,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        digests(&mut a),
        digests(&mut b),
        "log or home makes no difference"
    );
    assert_eq!(digests(&mut a).len(), 3);
    b.call(write(5, 100, 1, v(9))).unwrap();
    let (da, db) = (digests(&mut a), digests(&mut b));
    assert_eq!(da[0], db[0]);
    assert_ne!(da[1], db[1]);
    let collect = wire::Collect {
        group: GroupIndex(0),
        group_count: 1,
        watermark: v(1),
        from: wire::Cursor::default(),
    };
    match b.call(StoreRequest::Collect {
        volume: VOLUME,
        collect,
    }) {
        Ok(StoreReply::Entries(e)) => {
            let found: Vec<_> = e
                .entries
                .iter()
                .map(|e| (e.at.chunk.0, e.at.block, e.version.sequence.0))
                .collect();
            assert_eq!(
                found,
                vec![(5, 100, 9), (5, 101, 2), (6, 7, 3), (6, 8, 3), (6, 9, 3)]
            );
            assert_eq!(e.next, None);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn long_listings_go_on_where_they_stopped() {
    let mut h = fresh();
    for i in 0..6 {
        h.call(write(i, 0, 250, v(u64::from(i) + 1))).unwrap();
    }
    let mut from = wire::Cursor::default();
    let mut seen = 0;
    loop {
        let collect = wire::Collect {
            group: GroupIndex(0),
            group_count: 1,
            watermark: Version::ZERO,
            from,
        };
        let Ok(StoreReply::Entries(e)) = h.call(StoreRequest::Collect {
            volume: VOLUME,
            collect,
        }) else {
            panic!()
        };
        assert!(e.entries.iter().all(|x| x.at >= from));
        seen += e.entries.len();
        match e.next {
            Some(next) => from = next,
            None => break,
        }
    }
    assert_eq!(seen, 1500);
}

fn descriptor(epoch: u64, state: ReplicaState) -> VolumeDescriptor {
    VolumeDescriptor {
        volume: VOLUME,
        epoch: Epoch(epoch),
        size_bytes: 1 << 30,
        min_replicas: 2,
        snapshot: SnapshotNumber(0),
        layers: Default::default(),
        parent: None,
        groups: vec![vec![ReplicaDescriptor {
            disk: DiskId([2; 16]),
            state,
            inherits: false,
        }]],
        name: "v".into(),
    }
}

#[test]
fn fences_and_descriptors_are_durable_and_never_go_back() {
    let mut h = fresh();
    let fence = |epoch, rebuild| StoreRequest::PutFence {
        volume: VOLUME,
        epoch: Epoch(epoch),
        create: false,
        rebuild_epoch: Epoch(rebuild),
        link: None,
    };
    h.call(fence(4, 4)).unwrap();
    assert_eq!(h.call(fence(3, 0)), Err(StoreError::Fenced(Epoch(4))));
    let put = |d| StoreRequest::PutDescriptor { descriptor: d };
    let old = h.call(put(descriptor(3, ReplicaState::Rebuilding)));
    assert_eq!(old, Err(StoreError::Fenced(Epoch(4))));
    h.call(put(descriptor(5, ReplicaState::Rebuilding)))
        .unwrap();
    assert_eq!(h.store.replica(VOLUME).unwrap().rebuild_epoch, Epoch(4));
    h.call(put(descriptor(6, ReplicaState::InSync))).unwrap();
    let h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 2, 1);
    let r = h.store.replica(VOLUME).unwrap();
    assert_eq!((r.fence, r.rebuild_epoch), (Epoch(6), Epoch(0)));
    assert_eq!(r.descriptor, Some(descriptor(6, ReplicaState::InSync)));
    assert!(r.suspect && !r.damaged);
}

#[test]
fn incarnations_change_with_the_boot_unless_closed_cleanly() {
    let mut h = fresh();
    assert_eq!(h.ready.unwrap().incarnation, Incarnation(100));
    h.call(write(0, 0, 1, v(1))).unwrap();
    let mut h = Harness::open(h.disk.after_kill(Cut::LoseAll), 1, 1);
    assert_eq!(h.ready.unwrap().incarnation, Incarnation(100), "same boot");
    assert!(!h.store.replica(VOLUME).unwrap().suspect);
    assert_eq!(h.read_checked(0, 0, 1)[0].1, v(1));
    let h = Harness::open(h.shutdown(), 2, 1);
    assert_eq!(
        h.ready.unwrap().incarnation,
        Incarnation(100),
        "closed cleanly"
    );
    let mut h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 3, 1);
    assert_eq!(h.ready.unwrap().incarnation, Incarnation(101));
    assert!(h.store.replica(VOLUME).unwrap().suspect);
    h.call(StoreRequest::ClearSuspect { volume: VOLUME })
        .unwrap();
    let h = Harness::open(h.disk.after_kill(Cut::LoseAll), 3, 1);
    assert!(!h.store.replica(VOLUME).unwrap().suspect);
}

#[test]
fn a_dropped_replica_leaves_nothing_and_its_space_comes_back() {
    for at_home in [false, true] {
        let mut h = fresh();
        let before = h.store.stats().used_bytes;
        h.call(write(0, 0, 64, v(1))).unwrap();
        h.call(write(0, 100, 3, v(1))).unwrap();
        if at_home {
            h = home(h);
        }
        h.call(StoreRequest::DropReplica { volume: VOLUME })
            .unwrap();
        assert_eq!(h.call(write(0, 0, 1, v(2))), Err(StoreError::UnknownVolume));
        h.create(VOLUME, 1);
        assert_eq!(
            h.read_checked(0, 0, 64),
            vec![(BlockState::Absent, Version::ZERO); 64]
        );
        h.call(write(1, 0, 1, v(2))).unwrap();
        h = home(h);
        assert_eq!(
            h.read_checked(0, 0, 64),
            vec![(BlockState::Absent, Version::ZERO); 64]
        );
        assert_eq!(h.store.stats().used_bytes, before + PAGE_SIZE as u64);
    }
}

#[test]
fn an_idle_store_comes_to_rest() {
    let mut h = fresh();
    h.call(write(0, 0, 3, v(1))).unwrap();
    h.call(trim(0, 8, 3, v(2))).unwrap();
    h.flush(v(2), Version::ZERO);
    h.idle();
    assert_eq!(h.store.next_deadline(), None);
    let (syncs, batches) = (h.store.stats().syncs, h.store.stats().batches);
    h.now = Time(h.now.0 + 3_600_000_000_000);
    h.tick();
    h.idle();
    assert_eq!(
        (h.store.stats().syncs, h.store.stats().batches),
        (syncs, batches)
    );
}

#[test]
fn a_failed_write_or_sync_poisons_the_store() {
    for sync in [false, true] {
        let mut h = fresh();
        h.call(write(0, 0, 1, v(1))).unwrap();
        h.disk.fail_syncs = sync;
        h.disk.fail_writes = !sync;
        let w = h.request(write(0, 1, 1, v(2)));
        h.tick();
        let f = h.request(StoreRequest::Flush {
            volume: VOLUME,
            watermark: v(1),
            forget_below: v(0),
        });
        h.tick();
        h.settle();
        assert!(h.poisoned);
        // A write that was in the device's cache before may be answered, and so may a flush that covers only what
        // was written before: its sync can be done before the write fails.
        let victim = if sync { f } else { w };
        assert_eq!(h.replies.remove(&victim), Some(Err(StoreError::DiskFailed)));
        h.disk.fail_syncs = false;
        h.disk.fail_writes = false;
        assert_eq!(h.call(write(0, 2, 1, v(3))), Err(StoreError::DiskFailed));
        assert_eq!(h.call(StoreRequest::Stats), Err(StoreError::DiskFailed));
    }
}
