//! What goes wrong in a run, and when: drawn from the seed before the run starts.
//!
//! Each seed enables a random subset of the kinds of faults ("swarm testing"), so that some seeds see
//! one kind many times and others see unusual mixtures.
//!
//! Invariant: a schedule that damages data (bit flips, disk errors) damages one node only, and then no
//! other node loses power or fails: two good replicas remain.

use ashlar_platform::sim::Rng;

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;

/// One thing that goes wrong. Durations are in nanoseconds; nodes count from 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Some connections of the client break.
    BreakConnections,
    /// A direction between two hosts is cut; host 0 is metadata, `CLIENT` the newest client.
    Cut {
        from: u32,
        to: u32,
        both: bool,
        duration: u64,
    },
    /// A node hears and reaches nobody.
    Isolate { node: u32, duration: u64 },
    /// A daemon is killed and starts again under the same boot.
    Crash { node: u32, down: u64 },
    /// Machines lose power at the same time and come back.
    PowerLoss {
        nodes: Vec<u32>,
        down: u64,
        with_client: bool,
    },
    /// A daemon is stopped and goes on later.
    Freeze { node: u32, duration: u64 },
    /// A disk is slow.
    SlowDisk {
        node: u32,
        factor: u32,
        duration: u64,
    },
    /// A disk does not answer.
    StuckDisk { node: u32, duration: u64 },
    /// A disk's operations fail from now on; the daemon is restarted on a healthy disk later.
    DiskErrors { node: u32, duration: u64 },
    /// Bits flip on a disk.
    BitFlips { node: u32, count: u32 },
    /// The metadata cluster has no majority.
    MetadataDown { duration: u64 },
    /// One in `one_in` messages to and from metadata is lost.
    MetadataLossy { one_in: u64, duration: u64 },
    /// The client is killed; another one takes the volume over by force.
    CrashClient { reopen_after: u64, power: bool },
    /// The client is stopped; another one takes over; the old one wakes up.
    Zombie {
        takeover_after: u64,
        wakes_after: u64,
    },
    /// Another client takes over although the old one is well.
    Takeover,
    /// The client closes the volume and another one opens it.
    Handover,
    /// The client closes the volume and others read it, until another one takes it from them to write. Where
    /// `frozen_for` is not zero they are stopped by a signal shortly before that, and wake up later.
    Readers {
        count: u32,
        writer_after: u64,
        frozen_for: u64,
    },
    /// One node and the client reach only each other; another client takes over and cannot reach that
    /// node.
    Split {
        node: u32,
        takeover_after: u64,
        duration: u64,
    },
}

/// Stands for the newest client in [`Fault::Cut`].
pub const CLIENT: u32 = u32::MAX;

/// A run's faults, with times in nanoseconds from the start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schedule {
    /// When client load and faults end.
    pub duration: u64,
    /// Ascending.
    pub faults: Vec<(u64, Fault)>,
    /// Damage to data is among them.
    pub damages: bool,
}

/// Kinds of faults, to be enabled or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Break,
    Cut,
    Isolate,
    Crash,
    PowerLoss,
    Freeze,
    Slow,
    Stuck,
    Metadata,
    ClientCrash,
    Zombie,
    Handover,
    Split,
    Blackout,
    DiskErrors,
    BitFlips,
}

const HARMLESS: [Kind; 14] = [
    Kind::Break,
    Kind::Cut,
    Kind::Isolate,
    Kind::Crash,
    Kind::PowerLoss,
    Kind::Freeze,
    Kind::Slow,
    Kind::Stuck,
    Kind::Metadata,
    Kind::ClientCrash,
    Kind::Zombie,
    Kind::Handover,
    Kind::Split,
    Kind::Blackout,
];

/// Draws a schedule.
pub fn generate(rng: &mut Rng, nodes: u32, damage_allowed: bool) -> Schedule {
    let damages = damage_allowed && rng.chance(1, 5);
    let mut kinds: Vec<Kind> = HARMLESS.to_vec();
    rng.shuffle(&mut kinds);
    kinds.truncate(rng.between(1, 5) as usize);
    let victim = rng.between(1, u64::from(nodes)) as u32;
    if damages {
        kinds.retain(|k| *k != Kind::Blackout);
        kinds.push(if rng.coin() {
            Kind::DiskErrors
        } else {
            Kind::BitFlips
        });
    }
    let duration = rng.between(4_000, 12_000) * MS;
    let mut faults = Vec::new();
    if !rng.chance(1, 20) {
        let count = rng.between(1, 7);
        for _ in 0..count {
            let at = rng.between(0, duration);
            let kind = *rng.pick(&kinds).unwrap_or(&Kind::Break);
            let node = if damages {
                victim
            } else {
                rng.between(1, u64::from(nodes)) as u32
            };
            faults.push((at, fault(rng, kind, node, nodes)));
            // Trouble comes in pairs: many mistakes show only when two things happen at once.
            if rng.chance(1, 3) {
                let soon = at + rng.between(0, 80) * MS;
                let kind = *rng.pick(&kinds).unwrap_or(&Kind::Break);
                let other = rng.between(1, u64::from(nodes)) as u32;
                let node = if damages { victim } else { other };
                faults.push((soon.min(duration), fault(rng, kind, node, nodes)));
            }
        }
    }
    faults.sort_by_key(|(at, _)| *at);
    Schedule {
        duration,
        faults,
        damages,
    }
}

/// Adds readers to a schedule.
pub fn add_readers(rng: &mut Rng, schedule: &mut Schedule) {
    for _ in 0..rng.between(1, 4) {
        let at = rng.between(0, schedule.duration);
        let fault = Fault::Readers {
            count: rng.between(1, 3) as u32,
            writer_after: span(rng),
            frozen_for: if rng.coin() { span(rng) } else { 0 },
        };
        schedule.faults.push((at, fault));
    }
    schedule.faults.sort_by_key(|(at, _)| *at);
}

/// A duration: often short, sometimes beyond every timeout.
fn span(rng: &mut Rng) -> u64 {
    match rng.below(3) {
        0 => rng.between(1, 200) * MS,
        1 => rng.between(200, 1_500) * MS,
        _ => rng.between(1_500, 6_000) * MS,
    }
}

fn fault(rng: &mut Rng, kind: Kind, node: u32, nodes: u32) -> Fault {
    let duration = span(rng);
    match kind {
        Kind::Break => Fault::BreakConnections,
        Kind::Cut => {
            let ends = [
                (CLIENT, node),
                (node, CLIENT),
                (CLIENT, 0),
                (0, CLIENT),
                (node, 0),
            ];
            let other = rng.between(1, u64::from(nodes)) as u32;
            let (from, to) = *rng.pick(&ends).unwrap_or(&(node, other));
            let (from, to) = if other != node && rng.chance(1, 5) {
                (other, node)
            } else {
                (from, to)
            };
            Fault::Cut {
                from,
                to,
                both: rng.coin(),
                duration,
            }
        }
        Kind::Isolate => Fault::Isolate { node, duration },
        Kind::Crash => Fault::Crash {
            node,
            down: duration,
        },
        Kind::PowerLoss => Fault::PowerLoss {
            nodes: vec![node],
            down: duration,
            with_client: rng.chance(1, 5),
        },
        Kind::Blackout => Fault::PowerLoss {
            nodes: (1..=nodes).collect(),
            down: duration,
            with_client: rng.coin(),
        },
        Kind::Freeze => Fault::Freeze { node, duration },
        Kind::Slow => Fault::SlowDisk {
            node,
            factor: rng.between(5, 400) as u32,
            duration,
        },
        Kind::Stuck => Fault::StuckDisk { node, duration },
        Kind::DiskErrors => Fault::DiskErrors { node, duration },
        Kind::BitFlips => Fault::BitFlips {
            node,
            count: rng.between(1, 12) as u32,
        },
        Kind::Metadata if rng.coin() => Fault::MetadataDown { duration },
        Kind::Metadata => Fault::MetadataLossy {
            one_in: rng.between(2, 5),
            duration,
        },
        Kind::ClientCrash => Fault::CrashClient {
            reopen_after: duration,
            power: rng.coin(),
        },
        Kind::Zombie => Fault::Zombie {
            takeover_after: span(rng),
            wakes_after: duration,
        },
        Kind::Split => Fault::Split {
            node,
            takeover_after: span(rng),
            duration,
        },
        Kind::Handover if rng.coin() => Fault::Takeover,
        Kind::Handover => Fault::Handover,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_confined_to_one_node() {
        let mut damaging = 0;
        for seed in 0..500 {
            let schedule = generate(&mut Rng::new(seed), 3, true);
            assert!(schedule.faults.is_sorted_by_key(|(at, _)| *at));
            if !schedule.damages {
                continue;
            }
            damaging += 1;
            let mut hit: Vec<u32> = Vec::new();
            for (_, fault) in &schedule.faults {
                match fault {
                    Fault::PowerLoss { nodes, .. } => hit.extend(nodes),
                    Fault::Crash { node, .. }
                    | Fault::DiskErrors { node, .. }
                    | Fault::BitFlips { node, .. } => hit.push(*node),
                    _ => {}
                }
            }
            hit.dedup();
            assert!(hit.len() <= 1, "{schedule:?}");
        }
        assert!(damaging > 50);
    }
}
