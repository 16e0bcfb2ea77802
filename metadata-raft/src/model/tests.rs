//! One behaviour per test. `random` draws commands and checks every invariant after each.

use std::collections::BTreeMap;

use ashlar_proto::ids::{
    ClientId, DiskId, Epoch, GroupIndex, Incarnation, NodeId, PoolId, ReplicaState, VolumeId,
};

use super::*;

mod care;
mod clones;
mod publications;
mod random;
mod readers;
mod reverts;
mod schedules;
mod service;
mod snapshots;

fn key(n: u128) -> RequestKey {
    RequestKey(n.to_be_bytes())
}

const fn id16(n: u8) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0] = n;
    bytes
}

fn disk_id(n: u8) -> DiskId {
    DiskId(id16(n))
}

fn client(n: u8) -> ClientId {
    ClientId(id16(n))
}

const VOLUME: VolumeId = VolumeId([7; 16]);
const POOL: PoolId = PoolId([9; 16]);

struct Machine {
    state: State,
    next: u128,
}

impl Machine {
    /// Nodes 1..=n with one disk of 1 GiB each, and a pool.
    fn new(nodes: u8) -> Self {
        let mut machine = Self {
            state: State::new(),
            next: 1,
        };
        for n in 1..=nodes {
            let node = Node {
                id: NodeId(id16(n)),
                name: format!("node-{n}"),
                labels: Labels::new(),
                admin_address: String::new(),
            };
            machine.ok(Operation::RegisterNode(node));
            machine.ok(Operation::RegisterDisk(disk(n)));
        }
        let spec = PoolSpec {
            overprovision_percent: 200,
            ..PoolSpec::default()
        };
        machine.ok(Operation::CreatePool(Pool {
            id: POOL,
            name: "fast".into(),
            spec,
        }));
        machine
    }

    fn with_volume(nodes: u8, replicas: u8) -> Self {
        let mut machine = Self::new(nodes);
        machine.ok(Operation::CreateVolume(create("one", VOLUME, replicas)));
        machine
    }

    fn run(&mut self, operation: Operation) -> Response {
        self.next += 1;
        apply(
            &mut self.state,
            &Command {
                request: key(self.next),
                operation,
            },
        )
    }

    fn ok(&mut self, operation: Operation) -> Answer {
        self.run(operation).unwrap()
    }

    fn refused(&mut self, operation: Operation) -> RefusalCode {
        self.run(operation).unwrap_err().code
    }

    fn open(&mut self, by: u8, force: bool) -> Response {
        self.run(open(by, force))
    }

    fn volume(&self) -> &Volume {
        self.state.volume(VOLUME).unwrap()
    }

    fn states(&self) -> Vec<ReplicaState> {
        self.volume().groups[0].iter().map(|r| r.state).collect()
    }

    fn change(&mut self, by: u8, epoch: u64, disk: u8, state: ReplicaState) -> bool {
        match self.ok(change(by, epoch, disk, state)) {
            Answer::Changed { applied, .. } => applied,
            other => panic!("{other:?}"),
        }
    }
}

fn disk(n: u8) -> Disk {
    Disk {
        id: disk_id(n),
        node: NodeId(id16(n)),
        path: format!("/dev/{n}"),
        data_address: format!("10.0.0.{n}:1"),
        capacity_bytes: 1 << 30,
        incarnation: Incarnation(1),
        labels: Labels::new(),
    }
}

fn create(name: &str, volume: VolumeId, replicas: u8) -> CreateVolume {
    CreateVolume {
        volume,
        name: name.into(),
        size_bytes: 64 << 20,
        pool: POOL,
        replicas,
        min_replicas: validate::default_min_replicas(replicas),
        groups: vec![(1..=replicas).map(disk_id).collect()],
        labels: Labels::new(),
        created_unix_ms: 1,
    }
}

fn open(by: u8, force: bool) -> Operation {
    Operation::OpenVolume(OpenVolume {
        volume: VOLUME,
        client: client(by),
        node: NodeId::NIL,
        client_name: format!("client {by}"),
        force,
    })
}

fn close(by: u8, epoch: u64, clean: bool) -> Operation {
    Operation::CloseVolume {
        volume: VOLUME,
        client: client(by),
        epoch: Epoch(epoch),
        clean,
    }
}

fn change(by: u8, epoch: u64, disk: u8, state: ReplicaState) -> Operation {
    Operation::ChangeReplicas(ChangeReplicas {
        volume: VOLUME,
        client: client(by),
        epoch: Epoch(epoch),
        changes: vec![ReplicaChange {
            group: GroupIndex(0),
            disk: disk_id(disk),
            state,
            incarnation: Incarnation(5),
        }],
    })
}

fn begin(epoch: u64, disk: u8) -> Operation {
    let replicas = vec![(GroupIndex(0), disk_id(disk))];
    Operation::BeginRebuild {
        volume: VOLUME,
        epoch: Epoch(epoch),
        replicas,
    }
}

use ReplicaState::{InSync, Rebuilding, Stale};

#[test]
fn every_open_grants_a_higher_epoch() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert_eq!(m.volume().epoch, Epoch(1));
    m.open(1, false).unwrap();
    assert_eq!(m.volume().epoch, Epoch(2));
    assert_eq!(m.volume().holder.as_ref().unwrap().epoch, Epoch(2));
}

#[test]
fn another_client_opens_only_by_force() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert_eq!(
        m.open(2, false).unwrap_err().code,
        RefusalCode::FailedPrecondition
    );
    m.open(2, true).unwrap();
    assert_eq!(m.volume().holder.as_ref().unwrap().client, client(2));
    assert!(!m.change(1, 1, 1, Stale), "the old holder is refused");
}

#[test]
fn clean_is_what_the_last_close_said() {
    let mut m = Machine::with_volume(3, 3);
    let clean = |answer| match answer {
        Ok(Answer::Opened { previous_clean, .. }) => previous_clean,
        other => panic!("{other:?}"),
    };
    assert!(clean(m.open(1, false)), "nothing was ever written");
    m.ok(close(1, 1, true));
    assert!(clean(m.open(1, false)));
    m.ok(close(1, 2, false));
    assert!(!clean(m.open(1, false)));
    assert!(!clean(m.open(2, true)), "taken over");
}

#[test]
fn only_the_holder_of_the_current_epoch_closes() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert_eq!(
        m.refused(close(2, 1, true)),
        RefusalCode::FailedPrecondition
    );
    assert_eq!(
        m.refused(close(1, 0, true)),
        RefusalCode::FailedPrecondition
    );
    m.ok(close(1, 1, true));
    assert!(m.volume().holder.is_none());
}

#[test]
fn the_last_in_sync_replica_never_becomes_stale() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert!(m.change(1, 1, 1, Stale));
    assert!(m.change(1, 2, 2, Stale));
    assert!(!m.change(1, 3, 3, Stale));
    assert_eq!(m.states(), [Stale, Stale, InSync]);
    assert_eq!(
        m.volume().epoch,
        Epoch(3),
        "a refused change has no new epoch"
    );
}

#[test]
fn a_replica_comes_back_only_by_a_rebuild() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert!(m.change(1, 1, 1, Stale));
    assert!(!m.change(1, 2, 1, InSync));
    m.ok(begin(2, 1));
    assert_eq!(m.volume().groups[0][0].rebuild_epoch, Epoch(3));
    assert!(!m.change(1, 2, 1, InSync), "of an old epoch");
    assert!(m.change(1, 3, 1, InSync));
    let replica = m.volume().groups[0][0];
    assert_eq!(
        (replica.state, replica.incarnation, replica.rebuild_epoch),
        (InSync, Incarnation(5), Epoch(0))
    );
}

#[test]
fn a_configuration_change_restarts_rebuilds_under_the_new_epoch() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert!(m.change(1, 1, 1, Stale));
    m.ok(begin(2, 1));
    assert!(m.change(1, 3, 2, Stale));
    assert_eq!(m.volume().groups[0][0].rebuild_epoch, Epoch(4));
}

#[test]
fn an_open_makes_rebuilding_replicas_stale() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert!(m.change(1, 1, 1, Stale));
    m.ok(begin(2, 1));
    assert_eq!(m.states(), [Rebuilding, InSync, InSync]);
    m.open(1, false).unwrap();
    assert_eq!(m.states(), [Stale, InSync, InSync]);
}

#[test]
fn rebuilds_need_a_holder_and_the_current_epoch() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert!(m.change(1, 1, 1, Stale));
    assert!(m.state.has_repairable());
    assert!(matches!(
        m.ok(begin(1, 1)),
        Answer::Changed { applied: false, .. }
    ));
    m.ok(close(1, 2, true));
    assert_eq!(m.refused(begin(2, 1)), RefusalCode::FailedPrecondition);
    assert!(!m.state.has_repairable());
}

#[test]
fn a_retry_gets_the_first_answer() {
    let mut m = Machine::with_volume(3, 3);
    let command = Command {
        request: key(1000),
        operation: open(1, false),
    };
    let first = apply(&mut m.state, &command);
    m.open(2, true).unwrap();
    assert_eq!(apply(&mut m.state, &command), first);
    assert_eq!(m.volume().epoch, Epoch(2), "not granted again");
    let other = Command {
        request: key(1000),
        operation: close(2, 2, true),
    };
    assert_eq!(
        apply(&mut m.state, &other).unwrap_err().code,
        RefusalCode::InvalidArgument
    );
}

#[test]
fn answers_are_bounded() {
    let mut m = Machine::with_volume(3, 3);
    for _ in 0..9000 {
        m.next += 1;
        let command = Command {
            request: key(m.next),
            operation: Operation::DeleteVolume(VolumeId([1; 16])),
        };
        apply(&mut m.state, &command).unwrap();
    }
    assert!(m.state.answers.len() <= 8192);
}

#[test]
fn volumes_only_grow() {
    let mut m = Machine::with_volume(3, 3);
    let resize = |size_bytes| Operation::ResizeVolume {
        volume: VOLUME,
        size_bytes,
    };
    m.ok(resize(128 << 20));
    assert_eq!(m.refused(resize(64 << 20)), RefusalCode::InvalidArgument);
    assert_eq!(
        m.refused(resize((128 << 20) + 1)),
        RefusalCode::InvalidArgument
    );
    assert_eq!(m.refused(resize(4 << 30)), RefusalCode::ResourceExhausted);
    assert_eq!(m.volume().size_bytes, 128 << 20);
}

#[test]
fn deleting_waits_for_the_detach_and_leaves_garbage_to_drop() {
    let mut m = Machine::with_volume(3, 3);
    m.open(1, false).unwrap();
    assert_eq!(
        m.refused(Operation::DeleteVolume(VOLUME)),
        RefusalCode::FailedPrecondition
    );
    m.ok(close(1, 1, true));
    m.ok(Operation::DeleteVolume(VOLUME));
    m.ok(Operation::DeleteVolume(VOLUME));
    assert_eq!(
        m.state.garbage_on(disk_id(2)).collect::<Vec<_>>(),
        [(VOLUME, Epoch(1))]
    );
    m.ok(Operation::ForgetGarbage(vec![(disk_id(2), VOLUME)]));
    assert_eq!(m.state.garbage_on(disk_id(2)).count(), 0);
    assert_eq!(m.state.garbage_on(disk_id(1)).count(), 1);
}

#[test]
fn a_move_removes_the_old_replica_with_the_promotion() {
    let mut m = Machine::with_volume(4, 3);
    m.open(1, false).unwrap();
    let to_4 = Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(1),
        to: disk_id(4),
    };
    m.ok(to_4.clone());
    assert_eq!(m.states(), [InSync, InSync, InSync, Rebuilding]);
    m.ok(to_4);
    assert_eq!(m.volume().epoch, Epoch(2), "asking twice changes nothing");
    assert!(m.change(1, 2, 4, InSync));
    assert_eq!(m.volume().disks(), [disk_id(2), disk_id(3), disk_id(4)]);
    assert_eq!(
        m.state.garbage_on(disk_id(1)).collect::<Vec<_>>(),
        [(VOLUME, Epoch(2))]
    );
    m.ok(Operation::RemoveDisk(disk_id(1)));
}

#[test]
fn a_move_may_be_redirected_and_respects_domains() {
    let mut m = Machine::with_volume(5, 3);
    m.open(1, false).unwrap();
    let go = |to| Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(1),
        to: disk_id(to),
    };
    assert_eq!(m.refused(go(2)), RefusalCode::FailedPrecondition);
    m.ok(go(4));
    m.ok(go(5));
    assert_eq!(m.volume().disks(), [1, 2, 3, 5].map(disk_id));
    assert_eq!(m.state.garbage_on(disk_id(4)).count(), 1);
    m.ok(go(4));
    assert_eq!(
        m.state.garbage_on(disk_id(4)).count(),
        0,
        "a replica is no garbage"
    );
}

#[test]
fn placements_that_share_a_domain_or_have_no_room_are_refused() {
    let mut m = Machine::new(3);
    let mut twice = create("a", VOLUME, 2);
    twice.groups = vec![vec![disk_id(1), disk_id(1)]];
    assert_eq!(
        m.refused(Operation::CreateVolume(twice)),
        RefusalCode::FailedPrecondition
    );
    let mut large = create("a", VOLUME, 3);
    large.size_bytes = (2 << 30) + 4096;
    assert_eq!(
        m.refused(Operation::CreateVolume(large.clone())),
        RefusalCode::ResourceExhausted
    );
    large.size_bytes = 2 << 30;
    m.ok(Operation::CreateVolume(large));
    let small = create("b", VolumeId([8; 16]), 3);
    assert_eq!(
        m.refused(Operation::CreateVolume(small)),
        RefusalCode::ResourceExhausted
    );
}

#[test]
fn a_name_is_created_once() {
    let mut m = Machine::with_volume(3, 3);
    let again = create("one", VolumeId([8; 16]), 3);
    assert!(
        matches!(m.ok(Operation::CreateVolume(again.clone())), Answer::Volume(v) if v.id == VOLUME)
    );
    let other = CreateVolume {
        size_bytes: 8192,
        ..again
    };
    assert_eq!(
        m.refused(Operation::CreateVolume(other)),
        RefusalCode::AlreadyExists
    );
    for name in ["", "-a", "a-", "A", "a/b", &"a".repeat(129)] {
        let bad = create(name, VolumeId([8; 16]), 3);
        assert_eq!(
            m.refused(Operation::CreateVolume(bad)),
            RefusalCode::InvalidArgument,
            "{name}"
        );
    }
}

#[test]
fn what_is_in_use_is_not_removed() {
    let mut m = Machine::with_volume(3, 3);
    assert_eq!(
        m.refused(Operation::RemoveDisk(disk_id(1))),
        RefusalCode::FailedPrecondition
    );
    assert_eq!(
        m.refused(Operation::DeletePool("fast".into())),
        RefusalCode::FailedPrecondition
    );
    m.ok(Operation::DeleteVolume(VOLUME));
    m.ok(Operation::RemoveDisk(disk_id(1)));
    m.ok(Operation::DeletePool("fast".into()));
    assert_eq!(
        m.refused(Operation::DeletePool("fast".into())),
        RefusalCode::NotFound
    );
}

#[test]
fn a_node_name_passes_on_only_without_disks() {
    let mut m = Machine::new(1);
    let node = |n, name: &str| {
        let (id, name) = (NodeId(id16(n)), name.to_owned());
        Operation::RegisterNode(Node {
            id,
            name,
            labels: Labels::new(),
            admin_address: String::new(),
        })
    };
    assert_eq!(m.refused(node(9, "node-1")), RefusalCode::AlreadyExists);
    m.ok(Operation::RemoveDisk(disk_id(1)));
    m.ok(node(9, "node-1"));
    assert_eq!(m.state.node_by_name("node-1").unwrap().id, NodeId(id16(9)));
}

#[test]
fn an_image_restores_everything_and_refuses_damage() {
    let mut m = Machine::with_volume(4, 3);
    m.open(1, false).unwrap();
    m.ok(Operation::MoveReplica {
        volume: VOLUME,
        from: disk_id(1),
        to: disk_id(4),
    });
    let mut image = Vec::new();
    m.state.write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    let mut again = Vec::new();
    restored.write_image(&mut again).unwrap();
    assert_eq!(image, again);
    assert_eq!(
        restored.remembered(&key(m.next)),
        m.state.remembered(&key(m.next))
    );
    for cut in 0..image.len() {
        assert!(State::read_image(&mut &image[..cut]).is_err());
    }
    for at in 0..image.len() {
        let mut damaged = image.clone();
        damaged[at] ^= 0x40;
        // The checksum of the file catches what decodes by chance; here nothing may panic.
        let _ = State::read_image(&mut damaged.as_slice());
    }
}
