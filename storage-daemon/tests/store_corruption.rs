//! Rot: every flipped bit is detected, none is returned as good.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_proto::ids::*;
use ashlar_proto::wire::{BlockState, WriteOutcome};
use storage_daemon::format::{Geometry, SLOT_BYTES};
use storage_daemon::store::*;
use store_support::*;

const SIZE: u64 = 16 << 20;
const LOG: u64 = 1 << 20;

fn v(sequence: u64) -> Version {
    Version::new(1, sequence)
}

fn geometry() -> Geometry {
    Geometry::plan(SIZE, Some(LOG), Some(3)).unwrap()
}

/// Homes with versions 1-2, the log with version 3, everything flushed and marked.
fn filled() -> TestDisk {
    let mut h = Harness::open(TestDisk::formatted(&options(SIZE, LOG)), 1, 1);
    h.create(VOLUME, 1);
    h.call(write(0, 0, 64, v(1))).unwrap();
    h.call(write(0, 70, 5, v(2))).unwrap();
    h.flush(v(2), Version::ZERO);
    h.idle();
    h.call(write(0, 4, 4, v(3))).unwrap();
    h.call(write(0, 80, 16, v(4))).unwrap();
    h.flush(v(4), Version::ZERO);
    // The marker becomes durable; write-back is not due yet.
    h.now = ashlar_platform::clock::Time(h.now.0 + 30_000_000);
    h.tick();
    h.settle();
    h.now = ashlar_platform::clock::Time(h.now.0 + 30_000_000);
    h.tick();
    h.settle();
    h.disk.after_power_cut(Cut::LoseAll)
}

fn expected(block: u32) -> (BlockState, Version) {
    match block {
        4..8 => (BlockState::Data, v(3)),
        80..96 => (BlockState::Data, v(4)),
        0..64 => (BlockState::Data, v(1)),
        70..75 => (BlockState::Data, v(2)),
        _ => (BlockState::Absent, Version::ZERO),
    }
}

/// Opens and compares. Returns (damaged or refused, bad blocks).
fn inspect(disk: TestDisk, context: &str) -> (bool, usize) {
    let mut h = Harness::start(disk, 2, 9);
    h.settle();
    if h.open_failed.is_some() {
        return (true, 0);
    }
    let identity = h.ready.unwrap();
    if h.store.replica(VOLUME).is_none() {
        assert!(identity.damaged, "{context}: a lost replica is damage");
        return (true, 0);
    }
    assert_eq!(
        identity.damaged,
        h.store.replica(VOLUME).unwrap().damaged,
        "{context}"
    );
    let states = h.read_checked(0, 0, 100);
    let mut bad = 0;
    for (b, state) in states.into_iter().enumerate() {
        if state.0 == BlockState::Bad {
            bad += 1;
        } else if !identity.damaged {
            assert_eq!(
                state,
                expected(b as u32),
                "{context}: block {b} is wrong, silently"
            );
        }
    }
    (identity.damaged, bad)
}

#[test]
fn bit_flips_in_metadata_are_noticed_or_harmless() {
    let base = filled();
    let g = geometry();
    assert_eq!(inspect(base.clone(), "unharmed"), (false, 0));
    let sectors = 512 * 40;
    let areas = [
        (0, 512),
        (64 << 10, 512),
        (g.slots_offset, 3 * SLOT_BYTES as u64),
        (g.sectors_offset, sectors),
    ];
    let mut rng = Rng::new(3);
    let mut damages = 0;
    for (start, length) in areas {
        for _ in 0..150 {
            let at = start + rng.below(length);
            let mut disk = base.clone();
            disk.current[at as usize] ^= 1 << rng.below(8);
            let (damaged, bad) = inspect(disk, &format!("byte {at:#x}"));
            damages += usize::from(damaged || bad > 0);
            if start == g.sectors_offset {
                assert!(damaged, "a rotten sector of {at:#x} must be noticed");
            }
        }
    }
    assert!(damages >= 150);
}

#[test]
fn bit_flips_in_the_log_below_the_marker_are_bad_blocks_or_damage() {
    let base = filled();
    let g = geometry();
    let mut rng = Rng::new(4);
    let (mut damaged_count, mut bad_count) = (0, 0);
    for _ in 0..400 {
        let at = g.log_offset + rng.below(48 * 4096);
        let mut disk = base.clone();
        disk.current[at as usize] ^= 1 << rng.below(8);
        let (damaged, bad) = inspect(disk, &format!("log byte {at:#x}"));
        damaged_count += usize::from(damaged);
        bad_count += usize::from(bad > 0);
    }
    assert!(damaged_count > 0, "headers were hit");
    assert!(bad_count > 0, "data was hit");
}

#[test]
fn bit_flips_in_pages_are_bad_blocks_until_repaired() {
    let base = filled();
    let g = geometry();
    let mut rng = Rng::new(5);
    let mut hits = 0;
    for _ in 0..150 {
        let at = g.pages_offset + rng.below(8 * PAGE_SIZE as u64);
        let mut disk = base.clone();
        disk.current[at as usize] ^= 1 << rng.below(8);
        let mut h = Harness::open(disk, 2, 9);
        let states = h.read_checked(0, 0, 100);
        for (b, state) in states.into_iter().enumerate() {
            if state.0 != BlockState::Bad {
                assert_eq!(state, expected(b as u32));
                continue;
            }
            hits += 1;
            assert_eq!(state.1, expected(b as u32).1, "the version is known");
            assert!(h.bad_reports > 0 && h.store.stats().checksum_errors > 0);
            // A lower version does not repair, the equal one does, for good.
            let repair = |seq| StoreRequest::Repair {
                volume: VOLUME,
                write: write_of(0, b as u32, 1, v(seq), 0),
            };
            let right = state.1.sequence.0;
            if right > 1 {
                let r = h.call(repair(right - 1));
                assert_eq!(r, Ok(StoreReply::Written(WriteOutcome::Superseded)));
            }
            assert_eq!(
                h.call(repair(right)),
                Ok(StoreReply::Written(WriteOutcome::Applied))
            );
            assert_eq!(h.read_checked(0, b as u32, 1)[0], expected(b as u32));
            h.flush(v(4), Version::ZERO);
            h.idle();
            let mut h = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 3, 1);
            assert_eq!(h.read_checked(0, b as u32, 1)[0], expected(b as u32));
            break;
        }
    }
    assert!(hits > 10);
}

#[test]
fn rot_in_the_log_does_not_reach_the_homes_unnoticed() {
    let g = geometry();
    let mut rng = Rng::new(6);
    let mut bads = 0;
    for n in 0..60 {
        let base = filled();
        let mut h = Harness::open(base, 2, n);
        // Rot while the store is open, before write-back reads the log back.
        for _ in 0..3 {
            let at = (g.log_offset + rng.below(60 * 4096)) as usize;
            h.disk.current[at] ^= 1 << rng.below(8);
        }
        h.idle();
        for (b, state) in h.read_checked(0, 0, 100).into_iter().enumerate() {
            if state.0 == BlockState::Bad {
                bads += 1;
                assert_eq!(state.1, expected(b as u32).1);
            } else {
                assert_eq!(state, expected(b as u32));
            }
        }
    }
    assert!(bads > 0);
}

#[test]
fn a_rotten_sector_found_while_open_makes_its_blocks_bad() {
    let g = geometry();
    let mut h = Harness::open(filled(), 2, 1);
    // Sectors are not cached before the first read.
    let at = (g.sectors_offset + 512 * 8) as usize;
    let rotten: Vec<usize> = (0..20)
        .map(|i| g.sectors_offset as usize + 512 * i + 100)
        .collect();
    assert!(at > 0);
    for at in rotten {
        h.disk.current[at] ^= 4;
    }
    let states = h.read_checked(0, 0, 64);
    let bad: Vec<usize> = (0..64)
        .filter(|b| states[*b].0 == BlockState::Bad)
        .collect();
    assert!(!bad.is_empty());
    for (b, state) in states.iter().enumerate().filter(|(b, _)| !bad.contains(b)) {
        assert_eq!(*state, expected(b as u32));
    }
    // A repair of any version is taken: what was there is not known.
    let b = bad[0] as u32;
    let write = write_of(0, b, 1, v(1), 0);
    let r = h.call(StoreRequest::Repair {
        volume: VOLUME,
        write,
    });
    assert_eq!(r, Ok(StoreReply::Written(WriteOutcome::Applied)));
    h.flush(v(4), Version::ZERO);
    h.idle();
    assert_eq!(h.read_checked(0, b, 1)[0], (BlockState::Data, v(1)));
    let other = bad[1] as u32;
    assert_eq!(
        h.read_checked(0, other, 1)[0],
        (BlockState::Bad, Version::ZERO),
        "still known as bad"
    );
}

#[test]
fn unreadable_places_cost_only_their_blocks() {
    let g = geometry();
    let mut disk = filled();
    disk.unreadable
        .push(g.pages_offset + 4096..g.pages_offset + 8192);
    let mut h = Harness::open(disk, 2, 1);
    let states = h.read_checked(0, 0, 100);
    let bad = states.iter().filter(|s| s.0 == BlockState::Bad).count();
    assert_eq!(bad, 1);
    let mut disk = filled();
    disk.unreadable
        .push(g.sectors_offset..g.sectors_offset + 512);
    let h = Harness::open(disk, 2, 1);
    assert!(h.ready.unwrap().damaged);
    let again = Harness::open(h.disk.after_power_cut(Cut::LoseAll), 3, 1);
    assert!(
        !again.ready.unwrap().damaged,
        "found once, written down, not found again"
    );
    assert!(
        again.store.replica(VOLUME).unwrap().damaged,
        "the replica stays damaged"
    );
}

#[test]
fn a_rebuild_fence_ends_the_damage() {
    let g = geometry();
    let mut disk = filled();
    disk.current[g.sectors_offset as usize + 40] ^= 1;
    let mut h = Harness::open(disk, 2, 1);
    assert!(h.store.replica(VOLUME).unwrap().damaged);
    h.call(StoreRequest::PutFence {
        volume: VOLUME,
        epoch: Epoch(2),
        create: false,
        rebuild_epoch: Epoch(2),
        link: None,
    })
    .unwrap();
    assert!(!h.store.replica(VOLUME).unwrap().damaged);
}

#[test]
fn not_a_disk_of_ours_is_refused() {
    let h = |disk| {
        let mut h = Harness::start(disk, 1, 1);
        h.settle();
        h.open_failed
    };
    let mut empty = TestDisk::default();
    empty.current = vec![0; 1 << 20];
    assert!(matches!(h(empty), Some(StoreError::NotFormatted(_))));
    let mut newer = filled();
    for at in [0, 64 << 10] {
        newer.current[at + 8] = 2;
        let sum = {
            let b = &newer.current[at..at + 512];
            let c = crc32c::crc32c(&b[..12]);
            let c = crc32c::crc32c_append(c, &[0; 4]);
            crc32c::crc32c_append(c, &b[16..])
        };
        newer.current[at + 12..at + 16].copy_from_slice(&sum.to_le_bytes());
    }
    assert_eq!(h(newer), Some(StoreError::FormatVersion(2)));
    let mut short = filled();
    short.current.truncate(1 << 20);
    assert!(matches!(h(short), Some(StoreError::NotFormatted(_))));
}

#[test]
fn a_check_finds_every_kind_of_rot_and_nothing_on_a_sound_disk() {
    use storage_daemon::check::check_image;
    let mut h = Harness::open(TestDisk::formatted(&options(10 << 20, 512 << 10)), 1, 1);
    h.create(VOLUME, 1);
    h.put_layers(&ashlar_proto::layers::LayerList {
        revision: 1,
        settled: SnapshotNumber(2),
        live: vec![SnapshotNumber(2)],
    });
    h.call(write(0, 0, 40, Version::new(1, 1))).unwrap();
    h.flush(Version::ZERO, Version::ZERO);
    h.idle();
    h.check_disk("at rest");
    // In the log when it is closed.
    h.call(write(0, 3, 1, Version::new(1, 2))).unwrap();
    let image = h.shutdown().current;
    let report = check_image(&image[..], true);
    assert!(report.sound() && report.clean, "{report:#?}");
    assert_eq!((report.owned_pages, report.data_blocks), (3, 40));
    let find = |pattern: &[u8]| {
        let at = image.windows(pattern.len()).position(|w| w == pattern);
        at.unwrap()
    };
    let home = find(&content(0, 17, Version::new(1, 1)));
    let logged = find(&content(0, 3, Version::new(1, 2)));
    let places = [
        (16, "superblock"),
        (128 * 1024 + 40, "slot header"),
        (find(&[0xfe, 0, 0, 0, 1]) + 5, "layer list"),
        (find(b"APGM") + 30, "sector of a page"),
        (home + 100, "data at home"),
        (logged + 100, "data in the log"),
        (logged - 4096 + 70, "header of a batch"),
    ];
    for (at, what) in places {
        let mut rotten = image.clone();
        rotten[at] ^= 4;
        let report = check_image(&rotten[..], true);
        assert!(!report.sound(), "{what}");
    }
    // A page that two sectors claim.
    let first = find(b"APGM\x01\0\x01");
    let mut twice = image.clone();
    let salt = storage_daemon::format::salt_of(DiskId([2; 16]));
    let sectors = (128 << 10) + 3 * (64 << 10);
    let page = ((first - sectors) / 512) as u32;
    let mut sector =
        storage_daemon::format::PageSector::decode(&image[first..], page, salt).unwrap();
    sector.physical = 100;
    sector.encode_into(&mut twice[sectors + 512 * 100..], salt);
    let report = check_image(&twice[..], false);
    assert!(!report.sound());
}
