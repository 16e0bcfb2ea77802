//! Power cuts and kills at every I/O of a workload that takes and deletes snapshots: what was flushed is in every
//! snapshot that shows it, the newest answered list is there, and merging goes on where it was.
#![expect(clippy::unwrap_used, reason = "tests")]

mod store_support;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::Version;
use storage_daemon::store::*;
use store_support::layers::*;
use store_support::*;

fn fresh(seed: u64, write_back_percent: u8) -> Harness {
    let disk = TestDisk::formatted(&options(12 << 20, 512 << 10));
    let config = StoreConfig {
        write_back_percent,
        ..config()
    };
    let mut h = Harness::start_with(config, disk, 1, seed);
    h.settle();
    h.create(VOLUME, 1);
    h
}

fn recover(disk: TestDisk, boot: u8, context: &str) -> Harness {
    let h = Harness::open(disk, boot, 99);
    let identity = h.ready.unwrap();
    assert!(!identity.damaged, "{context}: false damage");
    assert_eq!(identity.bad_blocks, 0, "{context}");
    h
}

fn random_step(m: &mut Volume, h: &mut Harness) {
    let mut rng = h.rng.clone();
    match rng.below(24) {
        0..=15 => {
            let mut op = m.random_op(&mut rng);
            if op.count == 34 && rng.below(2) == 0 {
                op.count = 3;
            }
            let mut request = op.request();
            if let StoreRequest::Write { write, .. } = &mut request {
                write.durable = rng.below(4) == 0;
            }
            let tag = h.request(request);
            m.sent(tag, op);
        }
        16..=19 => {
            m.change_list(&mut rng, 4);
            let (volume, layers) = (VOLUME, m.list.clone());
            let tag = h.request(StoreRequest::PutLayers { volume, layers });
            m.list_sent(tag, m.list.revision);
        }
        20..=22 => {
            let mark = m.watermark();
            m.forgotten = m.forgotten.max(mark);
            let tag = h.request(StoreRequest::Flush {
                volume: VOLUME,
                watermark: mark,
                forget_below: mark,
            });
            m.flush_sent(tag);
        }
        _ => h.now = Time(h.now.0 + 3_000_000_000),
    }
    h.rng = rng;
    m.collect(h);
}

fn cut_everywhere(seed: u64, steps: u32, write_back_percent: u8) -> u64 {
    let mut h = fresh(seed, write_back_percent);
    let mut m = Volume::default();
    for _ in 0..steps {
        random_step(&mut m, &mut h);
        if h.rng.below(3) == 0 {
            h.tick();
        }
        for _ in 0..h.rng.below(9) {
            let io = h.disk.ios;
            if !h.one_io() {
                break;
            }
            m.collect(&mut h);
            let cut = match io % 4 {
                0 => Cut::LoseAll,
                1 => Cut::Writes(io),
                2 => Cut::KeepAll,
                _ => Cut::Sectors(io),
            };
            let context = format!("percent {write_back_percent} seed {seed} io {io} {cut:?}");
            let mut after = recover(h.disk.after_power_cut(cut), 2, &context);
            m.check(&mut after, &context);
            if io.is_multiple_of(4) {
                // Merging goes on and ends, and changes nothing that anybody sees.
                after.idle();
                after.check_disk(&context);
                assert_eq!(
                    after.store.replica(VOLUME).unwrap().garbage_left,
                    0,
                    "{context}: {:?}",
                    after.store.stats()
                );
                m.check(&mut after, &format!("{context}, merged"));
            }
            if io.is_multiple_of(8) {
                let context = format!("{context}, killed");
                let mut after = recover(h.disk.after_kill(cut), 1, &context);
                let mut strict = m.clone();
                strict.all_flushed();
                strict.check(&mut after, &context);
            }
        }
    }
    h.store.stats().merged_pages
}

#[test]
fn power_cut_at_every_io_while_snapshots_come_and_go() {
    let merged: u64 = (1..=3).map(|seed| cut_everywhere(seed, 150, 30)).sum();
    assert!(merged > 20, "only {merged}");
}

#[test]
fn power_cut_at_every_io_with_eager_write_back() {
    let merged: u64 = (1..=3).map(|seed| cut_everywhere(seed, 150, 0)).sum();
    // Bursts leave little time for it; recovered stores merge in any case.
    assert!(merged > 0);
}

#[test]
fn lives_after_lives_with_snapshots() {
    for seed in 1..=24 {
        let mut h = fresh(seed, [0, 30, 60][seed as usize % 3]);
        let mut m = Volume::default();
        for life in 2..9u8 {
            for _ in 0..h.rng.below(70) {
                random_step(&mut m, &mut h);
                h.tick();
                for _ in 0..h.rng.below(8) {
                    h.one_io();
                    m.collect(&mut h);
                }
            }
            let cut = match h.rng.below(3) {
                0 => Cut::LoseAll,
                1 => Cut::Writes(seed),
                _ => Cut::Sectors(seed),
            };
            let context = format!("seed {seed} life {life} {cut:?}");
            h = recover(h.disk.after_power_cut(cut), life, &context);
            h.rng = Rng::new(seed * 100 + u64::from(life));
            m.check(&mut h, &context);
            m.crashed();
        }
        h.idle();
        m.check(&mut h, &format!("seed {seed} at rest"));
        h.check_disk(&format!("seed {seed} at rest"));
        let disk = h.shutdown();
        let report = storage_daemon::check::check_image(&disk.current[..], true);
        assert!(report.sound() && report.clean, "{report:#?}");
    }
}

/// Nothing but merging is under way: every one of its I/Os is cut.
#[test]
fn power_cut_at_every_io_of_merging() {
    let mut cuts = 0;
    for seed in 1..=8 {
        let mut h = fresh(seed, 30);
        let mut m = Volume::default();
        for step in 0..70 {
            random_step(&mut m, &mut h);
            h.tick();
            h.settle();
            m.collect(&mut h);
            if step % 15 == 14 {
                h.idle();
            }
        }
        m.all_flushed();
        h.flush(Version::ZERO, Version::ZERO);
        h.idle();
        m.delete_all();
        if seed % 2 == 0 {
            m.change_list(&mut Rng::new(seed), 4);
        }
        let (volume, layers) = (VOLUME, m.list.clone());
        let tag = h.request(StoreRequest::PutLayers { volume, layers });
        m.list_sent(tag, m.list.revision);
        h.tick();
        loop {
            if !h.one_io() {
                let Some(deadline) = h.store.next_deadline() else {
                    break;
                };
                h.now = h.now.max(deadline);
                h.tick();
                continue;
            }
            m.collect(&mut h);
            let io = h.disk.ios;
            cuts += 1;
            for cut in [Cut::LoseAll, Cut::Sectors(io)] {
                let context = format!("seed {seed} io {io} {cut:?}");
                let mut after = recover(h.disk.after_power_cut(cut), 2, &context);
                m.check(&mut after, &context);
                after.idle();
                after.check_disk(&context);
                m.check(&mut after, &format!("{context}, merged"));
            }
        }
        assert_eq!(h.store.replica(VOLUME).unwrap().garbage_left, 0);
        m.check(&mut h, &format!("seed {seed} merged"));
    }
    assert!(cuts > 100, "only {cuts}");
}
