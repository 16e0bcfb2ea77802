//! Random commands: every invariant holds after each, and an image is as good as the state.

use ashlar_proto::ids::SnapshotId;
use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Open(u8, bool),
    Close(u8, bool, bool),
    Change(u8, bool, u8, u8),
    Begin(bool, u8),
    Move(u8, u8),
    Delete,
    Create,
    Resize(u8),
    Register(u8, u64),
    Join(u8, u8),
    Publish(u8, bool),
    Unpublish(u8),
    Reserve(u8),
    /// Commit or cancel; as the state says or not.
    Settle(bool, bool),
    DropSnapshot(u8),
    Forget,
    /// A clone of a snapshot, of the volume or of a clone.
    Clone(u8, u8),
    /// A snapshot of a clone; and its commit.
    OfClone(u8, u8),
    DropClone(u8),
    Cut(u8),
    Flatten(u8),
    Care(u8),
    Serve(bool, u8, u8),
    Revert(u8),
    EndRevert,
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..4_u8, any::<bool>()).prop_map(|(c, f)| Step::Open(c, f)),
        1 => (1..4_u8, any::<bool>(), any::<bool>()).prop_map(|(c, e, k)| Step::Close(c, e, k)),
        12 => (1..4_u8, prop::bool::weighted(0.9), 1..7_u8, 0..3_u8).prop_map(|(c, e, d, s)| Step::Change(c, e, d, s)),
        6 => (prop::bool::weighted(0.9), 1..7_u8).prop_map(|(e, d)| Step::Begin(e, d)),
        3 => (1..7_u8, 1..7_u8).prop_map(|(a, b)| Step::Move(a, b)),
        1 => Just(Step::Delete),
        2 => Just(Step::Create),
        1 => (0..4_u8).prop_map(Step::Resize),
        1 => (1..7_u8, 1..4_u64).prop_map(|(d, i)| Step::Register(d, i)),
        3 => (1..6_u8, 0..4_u8).prop_map(|(c, n)| Step::Join(c, n)),
        1 => (1..4_u8, any::<bool>()).prop_map(|(n, r)| Step::Publish(n, r)),
        1 => (0..4_u8).prop_map(Step::Unpublish),
        4 => (0..6_u8).prop_map(Step::Reserve),
        4 => (prop::bool::weighted(0.8), prop::bool::weighted(0.9)).prop_map(|(c, r)| Step::Settle(c, r)),
        2 => (0..6_u8).prop_map(Step::DropSnapshot),
        1 => Just(Step::Forget),
        3 => (0..4_u8, 0..6_u8).prop_map(|(c, s)| Step::Clone(c, s)),
        2 => (0..4_u8, 0..6_u8).prop_map(|(c, s)| Step::OfClone(c, s)),
        2 => (0..4_u8).prop_map(Step::DropClone),
        1 => (0..4_u8).prop_map(Step::Cut),
        1 => (0..4_u8).prop_map(Step::Flatten),
        2 => (1..4_u8).prop_map(Step::Care),
        1 => (any::<bool>(), 1..7_u8, 0..5_u8).prop_map(|(n, i, s)| Step::Serve(n, i, s)),
        1 => (0..6_u8).prop_map(Step::Revert),
        1 => Just(Step::EndRevert),
        2 => Just(Step::Retry),
    ]
}

fn operation(m: &Machine, step: &Step) -> Option<Operation> {
    let current = m.state.volume(VOLUME).map_or(0, |v| v.epoch.0);
    let epoch = |now: &bool| {
        if *now {
            current
        } else {
            current.saturating_sub(1)
        }
    };
    Some(match step {
        Step::Open(c, force) => {
            let open = publications::open_on(*c, NodeId(id16(*c)), *force);
            let reverting = m.state.volume(VOLUME).and_then(|v| v.reverting);
            match open {
                Operation::OpenVolume(open) if reverting.is_some() => Operation::OpenToRevert(open),
                open => open,
            }
        }
        Step::Care(n) => match publications::open_on(10 + *n, NodeId(id16(*n)), false) {
            Operation::OpenVolume(open) => Operation::OpenToCare(open),
            other => other,
        },
        Step::Serve(node, i, s) => Operation::SetService {
            part: if *node {
                Part::Node(NodeId(id16(*i)))
            } else {
                Part::Disk(disk_id(*i))
            },
            service: match s {
                0 | 1 => Service::InUse,
                2 => Service::Cordoned,
                3 => Service::Draining { to: None },
                _ => Service::Draining {
                    to: Some(disk_id(*i % 6 + 1)),
                },
            },
        },
        Step::Clone(c, s) => {
            let source = m.state.snapshots().by_name(&format!("s{s}"))?;
            // An identity is not used twice.
            let fresh = CloneVolume {
                volume: VolumeId(m.next.to_be_bytes()),
                ..clones::clone_as(*c, source.id)
            };
            Operation::CloneVolume(CloneVolume {
                size_bytes: source.size_bytes,
                ..fresh
            })
        }
        Step::OfClone(c, s) => {
            let clone = m.state.volume_by_name(&format!("c{c}"))?;
            match snapshots::reserve_as(snapshot_id(m.next), &format!("s{s}")) {
                Operation::ReserveSnapshots(mut reserve) => {
                    reserve.snapshots[0].volume = clone.id;
                    if *c == 0 {
                        Operation::ReserveForClone(reserve)
                    } else {
                        Operation::ReserveSnapshots(reserve)
                    }
                }
                other => other,
            }
        }
        Step::DropClone(c) => Operation::DeleteVolume(m.state.volume_by_name(&format!("c{c}"))?.id),
        Step::Cut(n) => {
            let clone = m.state.clones().nth(usize::from(*n))?;
            let parent = m.state.volume(clone)?.parent?;
            Operation::CutParent {
                volume: clone,
                parent,
            }
        }
        Step::Flatten(c) => Operation::FlattenVolume(m.state.volume_by_name(&format!("c{c}"))?.id),
        Step::Revert(n) => Operation::BeginRevert {
            volume: VOLUME,
            snapshot: m.state.snapshots().by_name(&format!("s{n}"))?.id,
        },
        Step::EndRevert => {
            let volume = m.state.volume(VOLUME)?;
            Operation::EndRevert {
                volume: VOLUME,
                snapshot: volume.reverting?,
                client: volume.holder.as_ref().map_or(client(1), |h| h.client),
                epoch: volume.epoch,
            }
        }
        Step::Join(c, n) => readers::join(*c, *n),
        Step::Publish(n, true) => publications::publish(&format!("node-{n}"), AttachMode::ReadOnly),
        Step::Publish(n, false) => {
            publications::publish(&format!("node-{n}"), AttachMode::Exclusive)
        }
        Step::Unpublish(0) => publications::unpublish(""),
        Step::Unpublish(n) => publications::unpublish(&format!("node-{n}")),
        Step::Close(c, now, clean) => close(*c, epoch(now), *clean),
        Step::Change(c, now, d, s) => {
            // Mostly by the holder, or little would ever be applied.
            let holder = m
                .state
                .volume(VOLUME)
                .and_then(|v| v.holder.as_ref())
                .map(|h| h.client.0[0]);
            let by = if *c == 1 { 1 } else { holder.unwrap_or(*c) };
            change(by, epoch(now), *d, ReplicaState::from_u8(*s)?)
        }
        Step::Begin(now, d) => begin(epoch(now), *d),
        Step::Move(a, b) => Operation::MoveReplica {
            volume: VOLUME,
            from: disk_id(*a),
            to: disk_id(*b),
        },
        Step::Delete => Operation::DeleteVolume(VOLUME),
        Step::Reserve(n) => snapshots::reserve_as(snapshot_id(m.next), &format!("s{n}")),
        Step::Settle(commits, right) => {
            let pending = m.state.snapshots().pending().next()?;
            if *commits {
                let of = m.state.snapshots().get(pending)?.volume;
                let volume = m.state.volume(of)?;
                let holder = volume.holder.as_ref().map(|h| (h.client, volume.epoch));
                Operation::CommitSnapshots(vec![CommitSnapshot {
                    snapshot: pending,
                    holder: holder.filter(|_| *right),
                }])
            } else {
                Operation::CancelSnapshots(vec![pending])
            }
        }
        Step::DropSnapshot(n) => {
            let named = m.state.snapshots().by_name(&format!("s{n}"))?;
            Operation::DeleteSnapshots(vec![named.id])
        }
        Step::Forget => {
            Operation::ForgetSnapshots(m.state.snapshots().iter().map(|s| s.id).collect())
        }
        // One that was deleted lives on for its snapshots.
        Step::Create if m.state.volume(VOLUME).is_some_and(|v| v.hidden) => {
            Operation::DeleteSnapshots(m.state.snapshots().iter().map(|s| s.id).collect())
        }
        // An identity is not reused while a disk may still hold the former volume.
        Step::Create if m.state.garbage.is_empty() => {
            Operation::CreateVolume(create("one", VOLUME, 3))
        }
        Step::Create => Operation::ForgetGarbage((1..7).map(|d| (disk_id(d), VOLUME)).collect()),
        Step::Resize(n) => Operation::ResizeVolume {
            volume: VOLUME,
            size_bytes: u64::from(*n) * (32 << 20),
        },
        Step::Register(d, i) => Operation::RegisterDisk(Disk {
            incarnation: Incarnation(*i),
            ..disk(*d)
        }),
        Step::Retry => return None,
    })
}

fn snapshot_id(n: u128) -> SnapshotId {
    SnapshotId(n.to_be_bytes())
}

/// Two replicas of a group never share a failure domain.
fn domains_differ(state: &State, volume: &Volume) -> bool {
    volume.groups.iter().all(|group| {
        let staying = group.iter().filter(|r| r.leaving_for.is_none());
        let domains: std::collections::BTreeSet<_> = staying
            .clone()
            .map(|r| state.domain_of(FailureDomain::Node, r.disk))
            .collect();
        domains.len() == staying.count()
    })
}

/// Clients and nodes have the same numbers here.
fn holder_is_published(volume: &Volume) -> bool {
    volume.publications.is_empty()
        || volume.holder.as_ref().is_none_or(|h| {
            let node = format!("node-{}", h.client.0[0]);
            volume.publications.contains_key(&node)
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn random_commands_keep_the_invariants(steps in prop::collection::vec(step(), 1..120)) {
        let mut m = Machine::with_volume(6, 3);
        let mut answered = BTreeMap::<RequestKey, (Command, Response)>::new();
        for step in &steps {
            let before = m.state.volume(VOLUME).cloned();
            let Some(operation) = operation(&m, step) else {
                for (command, response) in answered.values() {
                    if m.state.remembered(&command.request).is_some() {
                        prop_assert_eq!(&apply(&mut m.state, command), response);
                    }
                }
                continue;
            };
            m.next += 1;
            let command = Command { request: key(m.next), operation };
            // Debug builds check the whole state inside.
            let response = apply(&mut m.state, &command);
            if let Err(refusal) = &response {
                prop_assert_ne!(refusal.code, RefusalCode::Internal, "{}", refusal.message);
            }
            if let Some(after) = m.state.volume(VOLUME) {
                prop_assert!(domains_differ(&m.state, after));
                prop_assert!(holder_is_published(after));
                if let Some(before) = &before {
                    prop_assert!(after.epoch >= before.epoch);
                    prop_assert!(after.snapshot >= before.snapshot);
                }
            }
            answered.insert(command.request, (command, response));
        }
        let mut image = Vec::new();
        m.state.write_image(&mut image).unwrap();
        let restored = State::read_image(&mut image.as_slice()).unwrap();
        prop_assert_eq!(restored.disk_use, m.state.disk_use);
        prop_assert_eq!(restored.snapshots, m.state.snapshots);
        prop_assert_eq!(restored.children, m.state.children);
        prop_assert_eq!(restored.services, m.state.services);
    }
}
