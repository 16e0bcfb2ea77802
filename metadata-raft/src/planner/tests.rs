//! Placement and repair on small clusters.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState, VolumeId,
};

use super::DiskView;
use super::placement::{Wish, group_count, place, place_move};
use super::repair::{Caps, plan};
use super::{balance, care, moves};
use crate::model::{
    ChangeReplicas, Command, CreateVolume, Disk, FailureDomain, Labels, Node, OpenVolume,
    Operation, Pool, PoolSpec, RefusalCode, ReplicaChange, RequestKey, State, ZONE_LABEL, apply,
};

mod service;

#[derive(Default)]
struct Fake {
    dead: BTreeSet<DiskId>,
    used: BTreeMap<DiskId, u64>,
    replicas: BTreeMap<VolumeId, u64>,
}

impl DiskView for Fake {
    fn alive(&self, disk: DiskId) -> bool {
        !self.dead.contains(&disk)
    }
    fn used_bytes(&self, disk: DiskId) -> u64 {
        self.used.get(&disk).copied().unwrap_or(0)
    }
    fn settled_bytes(&self, disk: DiskId) -> u64 {
        self.used_bytes(disk)
    }
    fn replica_bytes(&self, _: DiskId, volume: VolumeId) -> u64 {
        self.replicas.get(&volume).copied().unwrap_or(0)
    }
}

fn disk_id(node: u8, disk: u8) -> DiskId {
    let mut bytes = [0; 16];
    (bytes[0], bytes[1]) = (node, disk);
    DiskId(bytes)
}

const GIB: u64 = 1 << 30;
const POOL: PoolId = PoolId([9; 16]);
const VOLUME: VolumeId = VolumeId([7; 16]);

fn run(state: &mut State, operation: Operation) {
    apply(
        state,
        &Command {
            request: RequestKey::generate(),
            operation,
        },
    )
    .unwrap();
}

/// `nodes` nodes in three zones with `disks` disks of 100 GiB each.
fn cluster(nodes: u8, disks: u8, failure_domain: FailureDomain) -> (State, PoolSpec) {
    let mut state = State::new();
    for n in 1..=nodes {
        let labels = Labels::from([(ZONE_LABEL.to_owned(), format!("zone-{}", n % 3))]);
        let id = NodeId([n; 16]);
        run(
            &mut state,
            Operation::RegisterNode(Node {
                id,
                name: format!("n{n}"),
                labels,
                admin_address: String::new(),
            }),
        );
        for d in 1..=disks {
            run(
                &mut state,
                Operation::RegisterDisk(Disk {
                    id: disk_id(n, d),
                    node: id,
                    path: String::new(),
                    data_address: String::new(),
                    capacity_bytes: 100 * GIB,
                    incarnation: Incarnation(1),
                    labels: Labels::new(),
                }),
            );
        }
    }
    let spec = PoolSpec {
        failure_domain,
        ..PoolSpec::default()
    };
    run(
        &mut state,
        Operation::CreatePool(Pool {
            id: POOL,
            name: "p".into(),
            spec: spec.clone(),
        }),
    );
    (state, spec)
}

fn wish(pool: &PoolSpec, size_bytes: u64) -> Wish<'_> {
    Wish {
        pool,
        size_bytes,
        replicas: 3,
        groups: 0,
        preferred: None,
        require_preferred: false,
    }
}

#[test]
fn replicas_lie_in_different_domains() {
    for level in [
        FailureDomain::Node,
        FailureDomain::Zone,
        FailureDomain::Disk,
    ] {
        let (state, spec) = cluster(6, 2, level);
        let groups = place(&state, &Fake::default(), &wish(&spec, 700 * GIB)).unwrap();
        assert_eq!(groups.len(), 11);
        for group in groups {
            let domains: BTreeSet<_> = group.iter().map(|d| state.domain_of(level, *d)).collect();
            assert_eq!(domains.len(), 3);
        }
    }
}

#[test]
fn groups_spread_evenly() {
    let (state, spec) = cluster(6, 2, FailureDomain::Node);
    let groups = place(&state, &Fake::default(), &wish(&spec, 12 * 64 * GIB)).unwrap();
    let mut count = BTreeMap::<DiskId, u32>::new();
    groups
        .iter()
        .flatten()
        .for_each(|d| *count.entry(*d).or_default() += 1);
    assert_eq!(groups.len(), 12);
    assert_eq!(count.len(), 12);
    assert!(count.values().all(|c| *c == 3), "{count:?}");
}

#[test]
fn dead_and_full_disks_are_avoided() {
    let (state, spec) = cluster(4, 1, FailureDomain::Node);
    let mut view = Fake::default();
    view.used.insert(disk_id(1, 1), 89 * GIB);
    let groups = place(&state, &view, &wish(&spec, GIB)).unwrap();
    assert!(!groups[0].contains(&disk_id(1, 1)));
    view.dead.insert(disk_id(2, 1));
    assert!(place(&state, &view, &wish(&spec, GIB)).unwrap()[0].contains(&disk_id(1, 1)));
    view.dead.insert(disk_id(3, 1));
    let refusal = place(&state, &view, &wish(&spec, GIB)).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::ResourceExhausted);
}

#[test]
fn a_preferred_node_gets_a_replica() {
    let (state, spec) = cluster(6, 1, FailureDomain::Node);
    let wish = Wish {
        preferred: Some(NodeId([5; 16])),
        ..wish(&spec, GIB)
    };
    assert_eq!(
        place(&state, &Fake::default(), &wish).unwrap()[0][0],
        disk_id(5, 1)
    );
}

#[test]
fn a_required_node_gets_a_replica_or_nothing_is_placed() {
    let (mut state, spec) = cluster(6, 1, FailureDomain::Node);
    let required = Wish {
        preferred: Some(NodeId([5; 16])),
        require_preferred: true,
        ..wish(&spec, GIB)
    };
    let placed = place(&state, &Fake::default(), &required).unwrap();
    assert_eq!(placed[0][0], disk_id(5, 1));
    run(&mut state, Operation::RemoveDisk(disk_id(5, 1)));
    let refusal = place(&state, &Fake::default(), &required).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::ResourceExhausted);
    let preferred = Wish {
        require_preferred: false,
        ..required
    };
    assert!(place(&state, &Fake::default(), &preferred).is_ok());
}

#[test]
fn over_provisioning_is_bounded() {
    let (state, mut spec) = cluster(3, 1, FailureDomain::Node);
    spec.overprovision_percent = 100;
    assert!(place(&state, &Fake::default(), &wish(&spec, 100 * GIB)).is_ok());
    let refusal = place(&state, &Fake::default(), &wish(&spec, 100 * GIB + 4096)).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::ResourceExhausted);
}

#[test]
fn group_count_grows_with_the_size_up_to_the_disks() {
    assert_eq!(group_count(1, 12), 1);
    assert_eq!(group_count(64 * GIB, 12), 1);
    assert_eq!(group_count(65 * GIB, 12), 2);
    assert_eq!(group_count(1 << 50, 12), 12);
    assert_eq!(group_count(1 << 50, 1000), 64);
}

/// A held volume on nodes 1 to 3 whose replica on node 1 is stale.
fn degraded() -> State {
    let (mut state, _) = cluster(5, 1, FailureDomain::Node);
    let client = ClientId([1; 16]);
    run(
        &mut state,
        Operation::CreateVolume(CreateVolume {
            volume: VOLUME,
            name: "v".into(),
            size_bytes: GIB,
            pool: POOL,
            replicas: 3,
            min_replicas: 2,
            groups: vec![(1..=3).map(|n| disk_id(n, 1)).collect()],
            labels: Labels::new(),
            created_unix_ms: 0,
        }),
    );
    let open = OpenVolume {
        volume: VOLUME,
        client,
        node: NodeId::NIL,
        client_name: String::new(),
        force: false,
    };
    run(&mut state, Operation::OpenVolume(open));
    let stale = ReplicaChange {
        group: GroupIndex(0),
        disk: disk_id(1, 1),
        state: ReplicaState::Stale,
        incarnation: Incarnation(0),
    };
    let change = ChangeReplicas {
        volume: VOLUME,
        client,
        epoch: Epoch(1),
        changes: vec![stale],
    };
    run(&mut state, Operation::ChangeReplicas(change));
    state
}

#[test]
fn a_returning_replica_is_rebuilt_once_its_disk_lives() {
    let state = degraded();
    let mut view = Fake::default();
    view.dead.insert(disk_id(1, 1));
    assert!(
        plan(&state, &view, Caps::default(), |_, _| true)
            .operations
            .is_empty()
    );
    view.dead.clear();
    let expected = Operation::BeginRebuild {
        volume: VOLUME,
        epoch: Epoch(2),
        replicas: vec![(GroupIndex(0), disk_id(1, 1))],
    };
    assert_eq!(
        plan(&state, &view, Caps::default(), |_, _| true).operations,
        [expected]
    );
    assert!(
        plan(&state, &view, Caps::default(), |_, _| false)
            .operations
            .is_empty()
    );
}

#[test]
fn caps_hold() {
    let state = degraded();
    let view = Fake::default();
    assert!(
        plan(
            &state,
            &view,
            Caps {
                cluster: 0,
                disk: 9
            },
            |_, _| true
        )
        .operations
        .is_empty()
    );
    assert!(
        plan(
            &state,
            &view,
            Caps {
                cluster: 9,
                disk: 0
            },
            |_, _| true
        )
        .operations
        .is_empty()
    );
}

#[test]
fn a_move_goes_to_a_free_domain() {
    let state = degraded();
    let volume = state.volume(VOLUME).unwrap();
    let mut view = Fake::default();
    view.used.insert(disk_id(4, 1), 50 * GIB);
    assert_eq!(
        place_move(&state, &view, volume, disk_id(1, 1)).unwrap(),
        disk_id(5, 1)
    );
    view.dead.insert(disk_id(5, 1));
    assert_eq!(
        place_move(&state, &view, volume, disk_id(1, 1)).unwrap(),
        disk_id(4, 1)
    );
}

/// Where `VOLUME` goes, or others.
fn moved(plan: &moves::MovePlan) -> Vec<(DiskId, DiskId)> {
    plan.moves.iter().map(|m| (m.from, m.to)).collect()
}

fn heal(state: &State, view: &Fake, lost: impl Fn(DiskId) -> bool) -> moves::MovePlan {
    moves::plan(state, view, moves::Caps::default(), lost, None)
}

#[test]
fn a_lost_replica_moves_once_to_a_disk_that_lives() {
    let mut state = degraded();
    let mut view = Fake::default();
    view.dead.insert(disk_id(1, 1));
    let one = |disk| disk == disk_id(1, 1);
    let nothing = heal(&state, &view, |_| false);
    assert_eq!(nothing, moves::MovePlan::default());
    view.used.insert(disk_id(4, 1), GIB);
    let plan = heal(&state, &view, one);
    assert_eq!(moved(&plan), [(disk_id(1, 1), disk_id(5, 1))]);
    run(&mut state, plan.moves[0].operation());
    assert_eq!(heal(&state, &view, one), moves::MovePlan::default());
    // The new one is lost as well: another takes its place.
    view.dead.insert(disk_id(5, 1));
    let both = |disk| disk == disk_id(1, 1) || disk == disk_id(5, 1);
    let plan = heal(&state, &view, both);
    assert_eq!(moved(&plan), [(disk_id(1, 1), disk_id(4, 1))]);
    run(&mut state, plan.moves[0].operation());
    assert_eq!(heal(&state, &view, both), moves::MovePlan::default());
}

#[test]
fn what_cannot_be_rebuilt_or_placed_stays() {
    let state = degraded();
    let mut view = Fake::default();
    let one = |disk| disk == disk_id(1, 1);
    // No living copy: nothing to rebuild from.
    view.dead
        .extend([disk_id(1, 1), disk_id(2, 1), disk_id(3, 1)]);
    assert_eq!(heal(&state, &view, one), moves::MovePlan::default());
    // No disk to go to.
    view.dead = [disk_id(1, 1), disk_id(4, 1), disk_id(5, 1)].into();
    let plan = heal(&state, &view, one);
    assert!(plan.moves.is_empty());
    assert_eq!(plan.unplaced.len(), 1);
    assert_eq!(plan.unplaced[0].disk, disk_id(1, 1));
    // No budget.
    view.dead = [disk_id(1, 1)].into();
    for caps in [
        Caps {
            cluster: 0,
            disk: 9,
        },
        Caps {
            cluster: 9,
            disk: 0,
        },
    ] {
        let caps = moves::Caps {
            lost: caps,
            ..moves::Caps::default()
        };
        let plan = moves::plan(&state, &view, caps, one, None);
        assert_eq!((plan.moves.len(), plan.waiting), (0, 1));
    }
}

#[test]
fn fewest_good_copies_go_first_and_what_is_planned_counts() {
    let (mut state, _) = cluster(6, 1, FailureDomain::Node);
    let volume = |n: u8| VolumeId([n; 16]);
    for n in 1..=6 {
        let disks = if n == 4 { [1, 2, 0] } else { [1, 3, 4] };
        let group: Vec<_> = disks
            .iter()
            .filter(|d| **d > 0)
            .map(|d| disk_id(*d, 1))
            .collect();
        run(
            &mut state,
            Operation::CreateVolume(CreateVolume {
                volume: volume(n),
                name: format!("v{n}"),
                size_bytes: 30 * GIB,
                pool: POOL,
                replicas: group.len() as u8,
                min_replicas: 1,
                groups: vec![group],
                labels: Labels::new(),
                created_unix_ms: 0,
            }),
        );
    }
    let mut view = Fake::default();
    view.dead.insert(disk_id(1, 1));
    let plan = heal(&state, &view, |d| d == disk_id(1, 1));
    assert_eq!(plan.moves.len(), 6, "{plan:?}");
    let order: Vec<_> = plan.moves.iter().map(|m| (m.volume, m.to)).collect();
    assert_eq!(order[0].0, volume(4), "one copy left");
    let mut per_disk = BTreeMap::<DiskId, u32>::new();
    order
        .iter()
        .for_each(|(_, to)| *per_disk.entry(*to).or_default() += 1);
    assert!(
        per_disk.len() >= 3 && per_disk.values().all(|n| *n <= 3),
        "{per_disk:?}"
    );
}

/// Of `degraded`: nobody uses it any more.
fn neglected() -> State {
    let mut state = degraded();
    let mut changes = Vec::new();
    for node in [2, 3] {
        changes.push(ReplicaChange {
            group: GroupIndex(0),
            disk: disk_id(node, 1),
            state: ReplicaState::InSync,
            incarnation: Incarnation(1),
        });
    }
    let made = ChangeReplicas {
        volume: VOLUME,
        client: ClientId([1; 16]),
        epoch: state.volume(VOLUME).unwrap().epoch,
        changes,
    };
    run(&mut state, Operation::ChangeReplicas(made));
    let epoch = state.volume(VOLUME).unwrap().epoch;
    let close = Operation::CloseVolume {
        volume: VOLUME,
        client: ClientId([1; 16]),
        epoch,
        clean: true,
    };
    run(&mut state, close);
    state
}

fn orders(node: u8) -> care::Orders {
    care::Orders::from([(NodeId([node; 16]), BTreeSet::from([VOLUME]))])
}

#[test]
fn a_daemon_with_a_good_copy_cares_while_something_can_be_rebuilt() {
    let plan = |state: &State, view: &Fake, before: &care::Orders| {
        care::plan(state, view, care::Caps::default(), before, |_| false)
    };
    let none = care::Orders::new();
    let mut view = Fake::default();
    assert_eq!(plan(&degraded(), &view, &none), none, "held");
    let state = neglected();
    assert_eq!(plan(&state, &view, &none), orders(2));
    // It stays with the daemon that has it, also where only the state tells.
    assert_eq!(plan(&state, &view, &orders(3)), orders(3));
    let mut held = state.clone();
    let open = OpenVolume {
        volume: VOLUME,
        client: ClientId([8; 16]),
        node: NodeId([3; 16]),
        client_name: String::new(),
        force: false,
    };
    run(&mut held, Operation::OpenToCare(open));
    assert_eq!(plan(&held, &view, &none), orders(3));
    view.dead.insert(disk_id(3, 1));
    assert_eq!(plan(&held, &view, &orders(3)), orders(2), "its node died");
    // Nothing to rebuild onto, nothing to rebuild from, or somebody wants it.
    view.dead = [disk_id(1, 1)].into();
    assert_eq!(plan(&held, &view, &orders(3)), none);
    view.dead = [disk_id(2, 1), disk_id(3, 1)].into();
    assert_eq!(plan(&state, &view, &none), none);
    view.dead.clear();
    let wanted = care::plan(&state, &view, care::Caps::default(), &orders(2), |v| {
        v == VOLUME
    });
    assert_eq!(wanted, none);
    for (cluster, node) in [(0, 9), (9, 0)] {
        let caps = care::Caps { cluster, node };
        assert_eq!(care::plan(&state, &view, caps, &none, |_| false), none);
    }
}

#[test]
fn rebuilds_of_volumes_in_danger_begin_first() {
    let mut state = degraded();
    let other = VolumeId([1; 16]);
    let create = CreateVolume {
        volume: other,
        name: "w".into(),
        size_bytes: GIB,
        pool: POOL,
        replicas: 3,
        min_replicas: 1,
        groups: vec![(1..=3).map(|n| disk_id(n, 1)).collect()],
        labels: Labels::new(),
        created_unix_ms: 0,
    };
    run(&mut state, Operation::CreateVolume(create));
    let client = ClientId([1; 16]);
    let open = OpenVolume {
        volume: other,
        client,
        node: NodeId::NIL,
        client_name: String::new(),
        force: false,
    };
    run(&mut state, Operation::OpenVolume(open));
    let stale = |node| ReplicaChange {
        group: GroupIndex(0),
        disk: disk_id(node, 1),
        state: ReplicaState::Stale,
        incarnation: Incarnation(0),
    };
    let change = |volume, epoch, changes| {
        Operation::ChangeReplicas(ChangeReplicas {
            volume,
            client,
            epoch: Epoch(epoch),
            changes,
        })
    };
    run(&mut state, change(other, 1, vec![stale(1)]));
    // The one of the later identity has a single good copy.
    run(&mut state, change(VOLUME, 2, vec![stale(2)]));
    let caps = Caps {
        cluster: 1,
        disk: 9,
    };
    let plan = plan(&state, &Fake::default(), caps, |_, _| true);
    assert_eq!(plan.begun.len(), 1);
    assert_eq!(plan.begun[0].0, VOLUME);
}
