//! Draining, cordons and balancing.

use proptest::prelude::*;

use super::*;
use crate::model::{Part, Refusal, Service};

fn serve(state: &mut State, part: Part, service: Service) {
    run(state, Operation::SetService { part, service });
}

const DRAINING: Service = Service::Draining { to: None };

fn node(n: u8) -> Part {
    Part::Node(NodeId([n; 16]))
}

fn disk(n: u8) -> Part {
    Part::Disk(disk_id(n, 1))
}

fn create(state: &mut State, n: u8, size_bytes: u64, disks: &[DiskId]) -> VolumeId {
    let volume = VolumeId([n; 16]);
    run(
        state,
        Operation::CreateVolume(CreateVolume {
            volume,
            name: format!("v{n}"),
            size_bytes,
            pool: POOL,
            replicas: disks.len() as u8,
            min_replicas: 1,
            groups: vec![disks.to_vec()],
            labels: Labels::new(),
            created_unix_ms: 0,
        }),
    );
    volume
}

#[test]
fn what_drains_is_emptied_to_disks_in_service() {
    let nothing = moves::MovePlan::default();
    let mut state = degraded();
    let view = Fake::default();
    serve(&mut state, disk(2), Service::Cordoned);
    assert_eq!(
        heal(&state, &view, |_| false),
        nothing,
        "it only gets no more"
    );
    serve(&mut state, node(2), DRAINING);
    serve(&mut state, disk(4), Service::Cordoned);
    let plan = heal(&state, &view, |_| false);
    assert_eq!(moved(&plan), [(disk_id(2, 1), disk_id(5, 1))]);
    assert_eq!(plan.moves[0].reason, moves::Reason::Drained);
    run(&mut state, plan.moves[0].operation());
    assert_eq!(heal(&state, &view, |_| false), nothing, "under way");
    // Where it goes is to be emptied as well, and nothing else is in service.
    serve(&mut state, disk(5), DRAINING);
    let plan = heal(&state, &view, |_| false);
    assert_eq!((plan.moves.len(), plan.unplaced.len()), (0, 1));
    assert_eq!(plan.unplaced[0].disk, disk_id(2, 1));
    serve(&mut state, disk(4), Service::InUse);
    let plan = heal(&state, &view, |_| false);
    assert_eq!(moved(&plan), [(disk_id(2, 1), disk_id(4, 1))]);
}

#[test]
fn a_disk_is_replaced_by_the_one_that_is_named() {
    let (mut state, _) = cluster(5, 2, FailureDomain::Node);
    create(&mut state, 7, GIB, &[1, 2, 3].map(|n| disk_id(n, 1)));
    let mut view = Fake::default();
    view.used.insert(disk_id(1, 2), 50 * GIB);
    let drain = |state: &mut State, to| {
        serve(state, disk(1), Service::Draining { to: Some(to) });
    };
    drain(&mut state, disk_id(1, 2));
    let to_same_node = [(disk_id(1, 1), disk_id(1, 2))];
    assert_eq!(moved(&heal(&state, &view, |_| false)), to_same_node);
    // One that the failure domains do not allow is not taken.
    drain(&mut state, disk_id(2, 2));
    assert_eq!(
        moved(&heal(&state, &view, |_| false)),
        [(disk_id(1, 1), disk_id(4, 1))]
    );
    // Also while it is lost.
    drain(&mut state, disk_id(1, 2));
    view.dead.insert(disk_id(1, 1));
    let plan = heal(&state, &view, |d| d == disk_id(1, 1));
    assert_eq!(moved(&plan), to_same_node);
    assert_eq!(plan.moves[0].reason, moves::Reason::Lost);
}

#[test]
fn what_is_lost_goes_before_what_drains() {
    let (mut state, _) = cluster(6, 1, FailureDomain::Node);
    for n in 1..=40 {
        let first = if n % 2 == 0 { 1 } else { 2 };
        create(&mut state, n, GIB, &[disk_id(first, 1), disk_id(3, 1)]);
    }
    serve(&mut state, disk(2), DRAINING);
    let mut view = Fake::default();
    let caps = moves::Caps {
        lost: Caps {
            cluster: 22,
            disk: 30,
        },
        calm: Caps {
            cluster: 4,
            disk: 2,
        },
    };
    let count =
        |plan: &moves::MovePlan, reason| plan.moves.iter().filter(|m| m.reason == reason).count();
    view.dead.insert(disk_id(1, 1));
    let plan = moves::plan(&state, &view, caps, |d| d == disk_id(1, 1), None);
    assert_eq!(count(&plan, moves::Reason::Lost), 20);
    assert_eq!(count(&plan, moves::Reason::Drained), 0);
    assert_eq!(plan.waiting, 20);
    view.dead.clear();
    let plan = moves::plan(&state, &view, caps, |_| false, None);
    assert_eq!(count(&plan, moves::Reason::Drained), 4, "the lower cap");
    assert_eq!(plan.waiting, 16);
}

#[test]
fn nothing_new_is_placed_where_it_does_not_belong() {
    let (mut state, spec) = cluster(4, 1, FailureDomain::Node);
    let mut view = Fake::default();
    let used = |state: &State, view: &Fake| -> Result<BTreeSet<DiskId>, Refusal> {
        let groups = place(state, view, &wish(&spec, 100 * GIB))?;
        Ok(groups.into_iter().flatten().collect())
    };
    serve(&mut state, node(1), Service::Cordoned);
    let expected = [2, 3, 4].map(|n| disk_id(n, 1)).into();
    assert_eq!(used(&state, &view).unwrap(), expected);
    serve(&mut state, node(1), Service::InUse);
    view.used.insert(disk_id(1, 1), 91 * GIB);
    assert_eq!(used(&state, &view).unwrap(), expected, "nearly full");
    serve(&mut state, disk(2), DRAINING);
    let refusal = used(&state, &view).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::ResourceExhausted);
    assert!(refusal.message.contains("less than 90 % full"), "{refusal}");
    // Nor by somebody who names it.
    let volume = create(&mut state, 7, GIB, &[1, 3].map(|n| disk_id(n, 1)));
    let command = Command {
        request: RequestKey::generate(),
        operation: Operation::MoveReplica {
            volume,
            from: disk_id(1, 1),
            to: disk_id(2, 1),
        },
    };
    let refusal = apply(&mut state, &command).unwrap_err();
    assert!(refusal.message.contains("uncordon"), "{refusal}");
}

/// Volumes of (size in GiB, part of it that is used in per cent, disks), on disks of these capacities in GiB.
type Arrangement = (Vec<u64>, Vec<(u64, u64, BTreeSet<u8>)>);

fn arrangement() -> impl Strategy<Value = Arrangement> {
    (4..8_usize).prop_flat_map(|nodes| {
        let disks = prop::collection::btree_set(1..=nodes as u8, 1..4);
        let volume = (1..40_u64, 0..=100_u64, disks);
        (
            prop::collection::vec(60..300_u64, nodes),
            prop::collection::vec(volume, 1..60),
        )
    })
}

struct Arranged {
    state: State,
    view: Fake,
    disks: u8,
}

impl Arranged {
    fn new((capacities, volumes): &Arrangement) -> Self {
        let (mut state, spec) = cluster(capacities.len() as u8, 1, FailureDomain::Node);
        run(
            &mut state,
            Operation::UpdatePool {
                name: "p".into(),
                spec: PoolSpec {
                    overprovision_percent: 10_000,
                    ..spec
                },
            },
        );
        for (n, capacity) in (1..).zip(capacities) {
            let disk = state.disk(disk_id(n, 1)).unwrap().clone();
            let capacity_bytes = capacity * GIB;
            run(
                &mut state,
                Operation::RegisterDisk(Disk {
                    capacity_bytes,
                    ..disk
                }),
            );
        }
        let mut view = Fake::default();
        for (n, (size, used, disks)) in (1..).zip(volumes) {
            let disks: Vec<_> = disks.iter().map(|d| disk_id(*d, 1)).collect();
            let volume = create(&mut state, n, size * GIB, &disks);
            view.replicas.insert(volume, size * GIB * used / 100);
        }
        let disks = capacities.len() as u8;
        let mut arranged = Self { state, view, disks };
        arranged.measure();
        arranged
    }

    fn measure(&mut self) {
        self.view.used.clear();
        for n in 1..=self.disks {
            let on = self.state.volumes_on(disk_id(n, 1));
            let used = on.map(|v| self.view.replica_bytes(disk_id(n, 1), v)).sum();
            self.view.used.insert(disk_id(n, 1), used);
        }
    }

    /// Where everything is.
    fn places(&self) -> Vec<Vec<DiskId>> {
        self.state.volumes().map(|v| v.disks()).collect()
    }

    /// One round, carried out at once: what was never opened has nothing to copy.
    fn round(&mut self, balancing: &mut balance::Balancing) -> usize {
        let caps = moves::Caps::default();
        let plan = moves::plan(&self.state, &self.view, caps, |_| false, Some(balancing));
        for one in &plan.moves {
            assert_eq!(one.reason, moves::Reason::Balanced);
            run(&mut self.state, one.operation());
            let volume = self.state.volume(one.volume).unwrap();
            let nodes: BTreeSet<_> = volume.disks().iter().map(|d| d.0[0]).collect();
            assert_eq!(nodes.len(), volume.groups[0].len(), "failure domains");
        }
        let garbage = (1..=self.disks).flat_map(|n| {
            let disk = disk_id(n, 1);
            self.state.garbage_on(disk).map(move |(v, _)| (disk, v))
        });
        let garbage = garbage.collect();
        run(&mut self.state, Operation::ForgetGarbage(garbage));
        self.measure();
        plan.moves.len()
    }

    /// Until nothing moves any more; the number of moves.
    fn settle(&mut self, balancing: &mut balance::Balancing) -> usize {
        let mut seen = BTreeSet::from([self.places()]);
        let mut moves = 0;
        loop {
            let moved = self.round(balancing);
            if moved == 0 {
                return moves;
            }
            moves += moved;
            assert!(seen.insert(self.places()), "the same again");
            let replicas: usize = self.state.volumes().map(|v| v.disks().len()).sum();
            assert!(
                moves <= 4 * replicas,
                "{moves} moves of {replicas} replicas"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn balancing_comes_to_an_end_and_stays_there(arrangement in arrangement(), growth in prop::collection::vec(0..2_u64, 60)) {
        let mut arranged = Arranged::new(&arrangement);
        let mut balancing = balance::Balancing::default();
        arranged.settle(&mut balancing);
        // A leader that knows nothing finds nothing to do, and neither does one when use grows a little everywhere.
        prop_assert_eq!(arranged.round(&mut balance::Balancing::default()), 0);
        let mut places = arranged.places();
        let alike = balancing == balance::Balancing::default();
        for (bytes, percent) in arranged.view.replicas.values_mut().zip(growth) {
            *bytes += *bytes * percent / 100;
        }
        arranged.measure();
        if alike {
            prop_assert_eq!(arranged.round(&mut balancing), 0, "within the hysteresis");
            places.sort();
            let mut after = arranged.places();
            after.sort();
            prop_assert_eq!(places, after);
        }
    }
}

#[test]
fn a_new_disk_gets_its_part() {
    let (mut state, _) = cluster(4, 1, FailureDomain::Node);
    for n in 1..=20 {
        create(&mut state, n, 40 * GIB, &[1, 2, 3].map(|d| disk_id(d, 1)));
    }
    let view = Fake {
        replicas: (1..=20).map(|n| (VolumeId([n; 16]), 4 * GIB)).collect(),
        ..Fake::default()
    };
    let mut arranged = Arranged {
        state,
        view,
        disks: 4,
    };
    arranged.measure();
    let moves = arranged.settle(&mut balance::Balancing::default());
    let on = |n| arranged.state.volumes_on(disk_id(n, 1)).count();
    let counts = [1, 2, 3, 4].map(on);
    assert_eq!(counts.iter().sum::<usize>(), 60);
    assert!(counts.iter().all(|c| (13..=17).contains(c)), "{counts:?}");
    assert!(moves <= 17, "{moves} moves");
}

#[test]
fn no_whole_replica_is_built_on_a_disk_that_is_nearly_full() {
    let mut state = degraded();
    let mut view = Fake::default();
    let begun =
        |state: &State, view: &Fake| plan(state, view, Caps::default(), |_, _| true).begun.len();
    assert_eq!(begun(&state, &view), 1);
    view.used.insert(disk_id(1, 1), 95 * GIB);
    assert_eq!(begun(&state, &view), 0, "it was never in sync");
    // One that was, and missed something, catches up.
    let epoch = state.volume(VOLUME).unwrap().epoch;
    for (disk, to) in [(2, ReplicaState::InSync), (2, ReplicaState::Stale)] {
        let change = ReplicaChange {
            group: GroupIndex(0),
            disk: disk_id(disk, 1),
            state: to,
            incarnation: Incarnation(1),
        };
        let epoch = state.volume(VOLUME).unwrap().epoch.max(epoch);
        run(
            &mut state,
            Operation::ChangeReplicas(ChangeReplicas {
                volume: VOLUME,
                client: ClientId([1; 16]),
                epoch,
                changes: vec![change],
            }),
        );
    }
    view.used.insert(disk_id(2, 1), 99 * GIB);
    let begun = plan(&state, &view, Caps::default(), |_, _| true).begun;
    assert_eq!(begun, [(VOLUME, disk_id(2, 1))]);
}

#[test]
fn a_disk_that_is_nearly_full_is_relieved() {
    let (mut state, _) = cluster(4, 1, FailureDomain::Node);
    let mut view = Fake::default();
    for n in 1..=4 {
        let volume = create(&mut state, n, 100 * GIB, &[disk_id(1, 1)]);
        view.replicas.insert(volume, 24 * GIB);
    }
    let mut arranged = Arranged {
        state,
        view,
        disks: 4,
    };
    arranged.measure();
    assert_eq!(arranged.view.used[&disk_id(1, 1)], 96 * GIB);
    assert_eq!(arranged.settle(&mut balance::Balancing::default()), 3);
}
