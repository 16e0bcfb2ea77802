//! Random fault schedules, judged by the oracle.

use std::time::Duration;

use super::Random;
use super::world::World;
use crate::engine::*;

/// Which faults a schedule has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Family {
    /// Daemons die and lose power, links break; the client lives.
    Replicas,
    /// Clients crash or become zombies; daemons die, links break; no power loss.
    Clients,
    /// Everything; only flushed data must survive.
    All,
}

fn fault(w: &mut World, random: &mut Random, family: Family, holder: &mut usize, change: Change) {
    let disk = random.below(w.disks.len() as u64) as usize;
    match random.below(100) {
        0..30 => w.crash_disk(disk, 5 + random.below(3000)),
        30..45 => w.cut_links(disk),
        45..60 => w.pause(disk, 200 + random.below(2500)),
        60..75 if family != Family::Clients => {
            w.power_loss(disk, 5 + random.below(2000));
            if random.chance(30) {
                let other = (disk + 1) % w.disks.len();
                w.power_loss(other, 5 + random.below(2000));
                if random.chance(50) {
                    w.power_loss((disk + 2) % w.disks.len(), 5 + random.below(2000));
                }
            }
        }
        75..85 if family != Family::Replicas => {
            if random.chance(50) {
                w.clients[*holder].alive = false;
            } else {
                w.clients[*holder].cut = true;
            }
            *holder = w.start(change);
        }
        85..95 => {
            w.metadata_up = !w.metadata_up;
            if w.metadata_up {
                w.metadata_back();
            }
        }
        _ => w.delay_us_max = [100, 300, 2000, 30_000][random.below(4) as usize],
    }
}

type Change = fn(&mut SessionConfig);

fn work(w: &mut World, random: &mut Random, client: usize) {
    if w.clients[client].pending.len() >= 12 {
        return;
    }
    // A few hot blocks in two chunks.
    let block = random.below(4) + random.below(2) * 1024;
    let sector = block * 8;
    match random.below(100) {
        0..35 => w.write(client, sector, 8 * (1 + random.below(2)), random.chance(15)),
        35..45 => w.write(client, sector + random.below(8), 1 + random.below(4), false),
        45..90 => w.read(client, sector, 8 * (1 + random.below(2))),
        _ => w.submit(client, ClientOp::Flush),
    };
}

fn schedule(seed: u64, family: Family, change: Change) -> Result<World, String> {
    let mut random = Random(seed.wrapping_mul(77));
    let groups = 1 + random.below(2) as usize;
    let min = 1 + random.below(2) as u8;
    let mut w = World::new(seed, 3, groups, min);
    w.local = random.below(4) as u8;
    let mut holder = w.start(change);
    w.run_for(Duration::from_millis(20));
    for _ in 0..random.below(400) + 100 {
        w.run_for(Duration::from_micros(random.below(8000)));
        if random.chance(4) {
            fault(&mut w, &mut random, family, &mut holder, change);
        }
        if random.chance(3) {
            w.run_for(Duration::from_millis(random.below(3000)));
        }
        for client in 0..w.clients.len() {
            let live = w.clients[client].alive && w.clients[client].stopped.is_none();
            if live && (w.clients[client].serving || random.chance(10)) {
                work(&mut w, &mut random, client);
            }
        }
    }
    // Faults stop: everything must come to an end.
    w.metadata_up = true;
    w.delay_us_max = 300;
    for client in &mut w.clients {
        client.cut = false;
    }
    w.metadata_back();
    w.run_for(Duration::from_secs(60));
    // Whose open was granted last is the holder; it may have crashed.
    let last = w.clients.iter().position(|c| Some(c.id) == w.view.holder);
    let holder = match last.filter(|c| w.clients[*c].alive) {
        Some(client) => client,
        None => {
            let client = w.start(change);
            w.run_for(Duration::from_secs(30));
            client
        }
    };
    check(&mut w, family, holder)?;
    Ok(w)
}

fn check(w: &mut World, family: Family, holder: usize) -> Result<(), String> {
    if family == Family::All {
        w.oracle.check_flushed()?;
    } else {
        w.oracle.check_linearizable()?;
        w.oracle.check_flushed()?;
    }
    let last = &w.clients[holder];
    if !last.serving || last.stopped.is_some() {
        return Err(format!(
            "the last client does not serve: {:?}",
            last.session
        ));
    }
    if !last.pending.is_empty() {
        return Err(format!(
            "requests hang: {:?}\n{:?}",
            last.pending.keys(),
            last.session
        ));
    }
    if !w.all_in_sync() {
        return Err(format!(
            "not rebuilt: {:?}\n{:?}",
            w.view.groups, last.session
        ));
    }
    for disk in 1..w.disks.len() {
        if w.contents(disk) != w.contents(0) {
            let diff: Vec<_> = w
                .contents(0)
                .into_iter()
                .map(|(p, c)| (p, c.version))
                .collect();
            let other: Vec<_> = w
                .contents(disk)
                .into_iter()
                .map(|(p, c)| (p, c.version))
                .collect();
            return Err(format!("replicas differ:\n{diff:?}\n{other:?}"));
        }
    }
    for other in w
        .clients
        .iter()
        .enumerate()
        .filter(|(i, c)| *i != holder && c.alive)
    {
        if other.1.stopped != Some(StopReason::Superseded) {
            return Err(format!("client {} was not stopped", other.0));
        }
    }
    Ok(())
}

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("SESSION_SEEDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(60);
    let first = std::env::var("SESSION_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    first..first + count
}

fn run(family: Family) {
    let mut reads = 0;
    for seed in seeds() {
        match schedule(seed, family, |_| {}) {
            Ok(w) => reads += w.oracle.reads,
            Err(problem) => panic!("SESSION_SEED={seed} {family:?}: {problem}"),
        }
    }
    assert!(reads > 0);
}

#[test]
fn replicas_fail_at_random() {
    run(Family::Replicas);
}

#[test]
fn clients_and_replicas_fail_at_random() {
    run(Family::Clients);
}

#[test]
fn everything_fails_at_random() {
    run(Family::All);
}

#[cfg(feature = "planted-bugs")]
mod planted {
    use super::*;

    fn caught(family: Family, change: Change) {
        let found = (0..3000).any(|seed| {
            let run = std::panic::catch_unwind(|| schedule(seed, family, change).map(|_| ()));
            !matches!(run, Ok(Ok(())))
        });
        assert!(found, "the planted bug was not caught");
    }

    macro_rules! planted {
        ($name:ident, $family:expr, $bug:ident) => {
            #[test]
            fn $name() {
                caught($family, |config| {
                    config.planted_bug = Some(PlantedBug::$bug)
                });
            }
        };
    }
    planted!(ack_before_exclusion, Family::Clients, AckBeforeExclusion);
    planted!(read_without_lease, Family::Clients, ReadWithoutLease);
    planted!(skip_reconcile, Family::Clients, SkipReconcile);
    planted!(read_in_flight, Family::Clients, ReadInFlight);
}
