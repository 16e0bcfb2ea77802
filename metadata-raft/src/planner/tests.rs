//! Placement and repair on small clusters.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState, VolumeId,
};

use super::DiskView;
use super::placement::{Wish, group_count, place, place_move};
use super::repair::{Caps, plan};
use crate::model::{
    ChangeReplicas, Command, CreateVolume, Disk, FailureDomain, Labels, Node, OpenVolume,
    Operation, Pool, PoolSpec, RefusalCode, ReplicaChange, RequestKey, State, ZONE_LABEL, apply,
};

#[derive(Default)]
struct Fake {
    dead: BTreeSet<DiskId>,
    used: BTreeMap<DiskId, u64>,
}

impl DiskView for Fake {
    fn alive(&self, disk: DiskId) -> bool {
        !self.dead.contains(&disk)
    }
    fn used_bytes(&self, disk: DiskId) -> u64 {
        self.used.get(&disk).copied().unwrap_or(0)
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
    view.used.insert(disk_id(1, 1), 90 * GIB);
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
