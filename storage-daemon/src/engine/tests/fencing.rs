//! R1 and R0 at one replica.

use super::*;
use ashlar_platform::sim::Rng;

#[test]
fn a_write_in_flight_on_another_connection_holds_back_the_fence() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let write = rig.ask(1, 5, write(0, 5, 1));
    let fence = rig.ask(2, 6, fence());
    rig.tick();
    assert!(rig.answers().is_empty());
    assert_eq!(invariants::waiting_fences(&rig.engine), 1);
    // The write is applied: only now the fence goes to the disk.
    rig.release(1);
    assert_eq!(rig.answers(), [(write.0, Ok(()))]);
    assert_eq!(rig.engine.store.held.len(), 1);
    rig.release(1);
    assert_eq!(rig.answers(), [(fence.0, Ok(()))]);
}

#[test]
fn a_fence_waits_also_for_a_connection_that_is_gone() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    rig.ask(1, 5, write(0, 5, 1));
    rig.event(EngineEvent::ConnClosed {
        conn: ConnectionId(1),
    });
    let fence = rig.ask(2, 6, fence());
    assert_eq!(invariants::waiting_fences(&rig.engine), 1);
    rig.release(1);
    rig.release(1);
    assert_eq!(rig.answers(), [(fence.0, Ok(()))]);
    assert_eq!(rig.engine.store.applied, [Version::new(5, 1)]);
}

#[test]
fn from_the_moment_a_fence_is_asked_for_lower_epochs_are_refused() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let first = rig.ask(1, 5, write(0, 5, 1));
    rig.ask(2, 6, fence());
    let late = rig.ask(1, 5, write(1, 5, 2));
    let reply = rig.replies.pop().unwrap().1;
    assert_eq!(
        (reply.id, reply.result, reply.fence),
        (late, Err(Status::Fenced), Epoch(6))
    );
    let newer = rig.ask(2, 6, write(2, 6, 1));
    rig.release(2);
    assert_eq!(rig.answers(), [(first.0, Ok(())), (newer.0, Ok(()))]);
    assert_eq!(
        rig.engine.store.applied,
        [Version::new(5, 1), Version::new(6, 1)]
    );
}

#[test]
fn a_higher_fence_drops_a_waiting_one() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let write = rig.ask(1, 5, write(0, 5, 1));
    let low = rig.ask(1, 6, fence());
    let high = rig.ask(2, 7, fence());
    assert_eq!(rig.answers(), [(low.0, Err(Status::Fenced))]);
    rig.release(1);
    rig.release(1);
    assert_eq!(rig.answers(), [(write.0, Ok(())), (high.0, Ok(()))]);
    assert_eq!(rig.engine.store.replicas[&VOLUME].fence, Epoch(7));
}

#[test]
fn a_higher_fence_waits_for_a_lower_one_on_its_way_to_the_disk() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let low = rig.ask(1, 6, fence());
    let high = rig.ask(2, 7, fence());
    assert_eq!(rig.engine.store.held.len(), 1);
    rig.release(1);
    rig.release(1);
    assert_eq!(rig.answers(), [(low.0, Ok(())), (high.0, Ok(()))]);
}

#[test]
fn the_fence_is_durable_and_the_answer_tells_the_replicas_state() {
    let mut rig = Rig::serving();
    rig.ask(1, 5, write(0, 5, 3));
    rig.answer().unwrap();
    let replica = rig.store().replicas.get_mut(&VOLUME).unwrap();
    (replica.suspect, replica.highest, replica.written) = (true, Version::new(5, 3), true);
    rig.ask(1, 6, fence());
    let Ok(ReplyBody::Fence(reply)) = rig.answer() else {
        panic!()
    };
    assert!(reply.existed && reply.suspect && reply.written && !reply.damaged);
    assert_eq!(reply.highest, Version::new(5, 3));
    // Another process over the same disk.
    let mut store = FakeStore::new(1);
    store.replicas = rig.engine.store.replicas.clone();
    let mut rig = Rig::with(store);
    rig.greet(1);
    rig.ask(1, 5, write(0, 5, 4));
    assert_eq!(rig.answer(), Err(Status::Fenced));
}

#[test]
fn a_configuration_fences_at_its_epoch() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let write = rig.ask(1, 5, write(0, 5, 1));
    let configure_6 = rig.ask(2, 6, configure(6));
    assert!(rig.answers().is_empty());
    rig.release(1);
    rig.release(1);
    assert_eq!(rig.answers(), [(write.0, Ok(())), (configure_6.0, Ok(()))]);
    rig.ask(1, 5, RequestBody::Ping);
    assert_eq!(rig.answer(), Err(Status::Fenced));
    rig.ask(1, 6, RequestBody::Ping);
    assert_eq!(rig.answer(), Ok(ReplyBody::Ping));
    rig.ask(1, 5, configure(5));
    assert_eq!(rig.answer(), Err(Status::Fenced));
    rig.ask(1, 7, configure(6));
    assert_eq!(rig.answer(), Err(Status::Invalid));
}

#[test]
fn a_failed_fence_of_an_unknown_volume_leaves_nothing_behind() {
    let mut rig = Rig::new(1);
    rig.greet(1);
    rig.ask(1, 9, fence());
    assert_eq!(rig.answer(), Err(Status::UnknownVolume));
    rig.ask(
        1,
        3,
        RequestBody::Fence(Fence {
            create: true,
            rebuild_epoch: Epoch(0),
            link: None,
        }),
    );
    rig.answer().unwrap();
    assert_eq!(rig.engine.store.replicas[&VOLUME].fence, Epoch(3));
}

/// Whoever has the answer of a fence knows that nothing of a lower epoch is applied from then on.
#[test]
fn nothing_of_a_lower_epoch_is_applied_after_a_fences_answer() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let mut rig = Rig::serving();
        rig.store().hold = true;
        rig.greet(3);
        let mut fences = std::collections::BTreeMap::new();
        let mut answered = (Epoch(0), 0);
        for sequence in 0..200 {
            let (conn, epoch) = (rng.between(1, 3), rng.between(4, 9));
            match rng.below(10) {
                0..=4 => {
                    rig.ask(conn, epoch, write(rng.below(8) as u32, epoch, sequence));
                }
                5 => {
                    let id = rig.ask(conn, epoch, fence());
                    fences.insert(id.0, Epoch(epoch));
                }
                6 => {
                    let id = rig.ask(conn, epoch, configure(epoch));
                    fences.insert(id.0, Epoch(epoch));
                }
                _ => {
                    // The store finishes in any order.
                    let held = rig.store().held.len();
                    if held > 0 {
                        rig.store().release_one(rng.index(held));
                        rig.tick();
                    }
                }
            }
            let applied = rig.engine.store.applied.clone();
            for (id, result) in rig.answers() {
                let epoch = fences.get(&id).copied().filter(|_| result.is_ok());
                if let Some(epoch) = epoch.filter(|&e| e > answered.0) {
                    answered = (epoch, applied.len());
                }
            }
            let later = &applied[answered.1..];
            assert!(
                later.iter().all(|v| v.epoch >= answered.0),
                "seed {seed}: {answered:?} {later:?}"
            );
        }
        while !rig.engine.store.held.is_empty() {
            rig.release(1);
        }
        assert_eq!(rig.engine.fencing.in_flight_total(), 0, "seed {seed}");
        assert_eq!(invariants::waiting_fences(&rig.engine), 0, "seed {seed}");
    }
}
