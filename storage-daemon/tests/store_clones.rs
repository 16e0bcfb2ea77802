//! Clones in the store (docs/snapshots.md, C3 to C7) against a model that copies everything.
//!
//! Every step waits for its answers, so the model knows exactly what each reader sees. Power is cut at any I/O of what
//! goes on in the background: flattening, merging, write-back, links that are made and cut, replicas that are dropped.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_proto::descriptor::Parent;
use ashlar_proto::ids::*;
use ashlar_proto::wire::{self, BlockState};
use storage_daemon::store::*;
use store_support::clones::*;
use store_support::*;

fn run(seed: u64, steps: u32) {
    let mut w = World::new(seed);
    for step in 0..steps {
        w.context = format!("seed {seed}, step {step}");
        w.step();
    }
    w.context = format!("seed {seed}, end");
    w.check();
    w.flush();
    w.h.idle();
    w.check();
    w.h.check_disk(&w.context);
    // Space comes back to the byte, whatever the order.
    while !w.volumes.is_empty() {
        let volume = w.any();
        w.drop_volume(volume);
    }
    w.h.idle();
    assert_eq!(w.h.store.stats().used_bytes, 0, "{}", w.context);
    w.h.check_disk(&w.context);
}

#[test]
fn clones_read_back_exactly_and_give_their_space_back() {
    for seed in 0..30 {
        run(seed, 120);
    }
}

#[test]
#[ignore = "long: by hand, STORE_CLONES_SEEDS=FROM:TO"]
fn many_more_seeds() {
    let seeds = std::env::var("STORE_CLONES_SEEDS").unwrap_or_default();
    let (from, to) = seeds.split_once(':').unwrap_or(("1000", "2000"));
    for seed in from.parse().unwrap()..to.parse().unwrap() {
        run(seed, 150);
    }
}

fn cloned() -> World {
    let mut w = World::new(7);
    for (first, sequence) in [(0, 1), (16, 2)] {
        let write = write_of(0, first, 16, Version::new(1, sequence), 0);
        let (volume, client) = (id(1), true);
        w.h.call(StoreRequest::Write {
            volume,
            write,
            client,
        })
        .unwrap();
    }
    let v = w.volumes.get_mut(&1).unwrap();
    v.sequence = 2;
    v.head = (0..32)
        .map(|b| ((0, b), Version::new(1, 1 + u64::from(b / 16))))
        .collect();
    w.snapshot(1);
    w.create(Some((1, 1)));
    w
}

#[test]
fn a_clone_is_not_made_without_its_parent_unless_it_is_rebuilt() {
    let mut w = World::new(1);
    let fence = |required, rebuild| StoreRequest::PutFence {
        volume: id(9),
        epoch: Epoch(5),
        create: true,
        rebuild_epoch: Epoch(rebuild),
        link: Some(wire::FenceLink {
            parent: Parent {
                volume: id(8),
                number: SnapshotNumber(1),
            },
            required,
            whole: false,
        }),
    };
    assert_eq!(w.h.call(fence(true, 0)), Err(StoreError::NoParent));
    assert!(w.h.store.replica(id(9)).is_none());
    assert!(w.h.call(fence(false, 5)).is_ok());
    let Ok(StoreReply::LayerProgress(progress)) = w.h.call(StoreRequest::LayerProgress) else {
        panic!("no progress");
    };
    assert!(progress.iter().all(|p| !p.inherits));
}

#[test]
fn where_the_source_has_nothing_a_rebuild_hides_what_is_inherited() {
    let mut w = cloned();
    let pull = |block, state, version| PullBlock {
        snapshot: SnapshotNumber(1),
        block,
        state,
        version,
        checksum: 0,
        data: bytes::Bytes::new(),
    };
    let request = StoreRequest::PullApply {
        volume: id(2),
        rebuild_epoch: Epoch(9),
        chunk: ChunkIndex(0),
        blocks: vec![
            pull(3, BlockState::Absent, Version::ZERO),
            pull(4, BlockState::Tombstone, Version::new(1, 1)),
        ],
    };
    let applied = |reply| match reply {
        Ok(StoreReply::Pulled { applied }) => applied,
        other => panic!("{other:?}"),
    };
    assert_eq!(applied(w.h.call(request.clone())), 2);
    assert_eq!(applied(w.h.call(request)), 0, "once is enough");
    w.flush();
    w.h.idle();
    let disk = w.h.disk.after_power_cut(Cut::LoseAll);
    w.h = Harness::open(disk, 2, 3);
    let head = w.read(2, SnapshotNumber::HEAD);
    let mut expected = w.volumes[&1].head.clone();
    expected.remove(&(0, 3));
    expected.remove(&(0, 4));
    assert_eq!(head, expected);
    let parent = w.read(1, SnapshotNumber::HEAD);
    assert_eq!(parent, w.volumes[&1].head);
}

#[test]
fn reconciliation_collects_what_is_the_clones_own() {
    let mut w = cloned();
    let collect = |watermark| StoreRequest::Collect {
        volume: id(2),
        collect: wire::Collect {
            group: GroupIndex(0),
            group_count: 1,
            watermark,
            from: wire::Cursor::default(),
        },
    };
    let write = write_of(0, 5, 2, Version::new(2, 1), 1);
    let (volume, client) = (id(2), true);
    w.h.call(StoreRequest::Write {
        volume,
        write,
        client,
    })
    .unwrap();
    let Ok(StoreReply::Entries(found)) = w.h.call(collect(Version::ZERO)) else {
        panic!("no entries");
    };
    let blocks: Vec<u16> = found.entries.iter().map(|e| e.at.block).collect();
    assert_eq!(blocks, [5, 6]);
}

#[test]
fn a_bad_inherited_block_is_repaired_in_the_clone() {
    let mut w = cloned();
    w.flush();
    w.h.idle();
    let disk = w.h.shutdown_disk();
    w.h = Harness::open(disk, 2, 3);
    let good = content(0, 7, Version::new(1, 1));
    let at =
        w.h.disk
            .current
            .windows(4096)
            .step_by(512)
            .position(|bytes| bytes == &good[..])
            .unwrap()
            * 512;
    w.h.disk.current[at] ^= 1;
    let request = |volume| StoreRequest::Read {
        volume: id(volume),
        read: wire::Read {
            range: BlockRange::new(ChunkIndex(0), 7, 1).unwrap(),
            snapshot: SnapshotNumber::HEAD,
            exact_layer: false,
        },
    };
    let state = |reply| match reply {
        Ok(StoreReply::Read(r)) => r.blocks[0].state,
        other => panic!("{other:?}"),
    };
    assert_eq!(state(w.h.call(request(2))), BlockState::Bad);
    let repair = StoreRequest::Repair {
        volume: id(2),
        write: write_of(0, 7, 1, Version::new(1, 1), u32::MAX),
    };
    let reply = w.h.call(repair);
    assert_eq!(reply, Ok(StoreReply::Written(wire::WriteOutcome::Applied)));
    assert_eq!(state(w.h.call(request(2))), BlockState::Data);
    assert_eq!(
        state(w.h.call(request(1))),
        BlockState::Bad,
        "its own matter"
    );
}
