//! Greeting, incarnations, back-pressure, suspicion, dropping, stopping.

use super::*;

fn refused_with(change: impl FnOnce(&mut Hello)) -> Status {
    let mut rig = Rig::new(1);
    let mut hello = rig.hello();
    change(&mut hello);
    rig.ask(1, 0, RequestBody::Hello(hello));
    let status = rig.answer().unwrap_err();
    assert!(matches!(
        rig.others.pop(),
        Some(EngineCommand::Close {
            conn: ConnectionId(1)
        })
    ));
    // What still arrives on it is ignored.
    rig.ask(1, 0, RequestBody::Ping);
    assert!(rig.answers().is_empty());
    status
}

#[test]
fn a_hello_for_another_disk_cluster_or_version_ends_the_connection() {
    assert_eq!(
        refused_with(|h| h.disk = DiskId([5; 16])),
        Status::WrongTarget
    );
    assert_eq!(
        refused_with(|h| h.cluster = ClusterId([5; 16])),
        Status::WrongTarget
    );
    assert_eq!(
        refused_with(|h| (h.version_min, h.version_max) = (900, 901)),
        Status::Version
    );
    assert_eq!(
        refused_with(|h| (h.version_min, h.version_max) = (0, 0)),
        Status::Version
    );
    assert_eq!(
        refused_with(|h| (h.version_min, h.version_max) = (2, 1)),
        Status::Version
    );
}

#[test]
fn the_highest_common_version_is_chosen() {
    let mut rig = Rig::new(1);
    let hello = Hello {
        version_min: 0,
        version_max: 900,
        ..rig.hello()
    };
    rig.ask(1, 0, RequestBody::Hello(hello));
    let expected = HelloReply {
        version: PROTOCOL_VERSION_MAX,
        disk: DiskId([1; 16]),
    };
    assert_eq!(rig.answer(), Ok(ReplyBody::Hello(expected)));
}

#[test]
fn nothing_is_done_before_a_hello_and_a_second_one_ends_the_connection() {
    let mut rig = Rig::serving();
    rig.ask(3, 5, RequestBody::Ping);
    assert_eq!(rig.answer(), Err(Status::Invalid));
    assert!(matches!(
        rig.others.pop(),
        Some(EngineCommand::Close {
            conn: ConnectionId(3)
        })
    ));
    let hello = rig.hello();
    rig.ask(1, 0, RequestBody::Hello(hello));
    assert_eq!(rig.answer(), Err(Status::Invalid));
    assert!(matches!(
        rig.others.pop(),
        Some(EngineCommand::Close {
            conn: ConnectionId(1)
        })
    ));
}

#[test]
fn a_disk_of_no_cluster_serves_nobody() {
    let mut store = FakeStore::new(1);
    store.identity.cluster = ClusterId::NIL;
    let mut rig = Rig::with(store);
    let hello = rig.hello();
    rig.ask(1, 0, RequestBody::Hello(hello));
    assert_eq!(rig.answer(), Err(Status::WrongTarget));
}

#[test]
fn every_request_but_a_fence_must_name_the_incarnation() {
    let mut rig = Rig::serving();
    for incarnation in [Incarnation(0), Incarnation(99)] {
        rig.ask_incarnation(1, 5, incarnation, write(0, 5, 1));
        let reply = rig.replies.pop().unwrap().1;
        assert_eq!(reply.result, Err(Status::IncarnationMismatch));
        assert_eq!(reply.incarnation, Incarnation(100));
    }
    rig.ask_incarnation(1, 5, Incarnation(0), fence());
    rig.answer().unwrap();
    rig.ask_incarnation(1, 5, Incarnation(99), fence());
    assert_eq!(rig.answer(), Err(Status::IncarnationMismatch));
    assert!(rig.engine.store.applied.is_empty());
}

#[test]
fn a_flush_of_the_holder_clears_the_suspicion_before_it_is_answered() {
    let mut store = FakeStore::new(1);
    let replica = crate::store::ReplicaInfo {
        suspect: true,
        fence: Epoch(5),
        ..fake::info(VOLUME)
    };
    store.replicas.insert(VOLUME, replica);
    let mut rig = Rig::with(store);
    rig.greet(1);
    rig.ask(1, 4, flush());
    assert_eq!(rig.answer(), Err(Status::Fenced));
    assert!(rig.engine.store.replicas[&VOLUME].suspect);
    rig.ask(1, 5, flush());
    assert_eq!(rig.answer(), Ok(ReplyBody::Flush));
    assert!(!rig.engine.store.replicas[&VOLUME].suspect);
    rig.store().seen.clear();
    rig.ask(1, 5, flush());
    rig.answer().unwrap();
    assert_eq!(rig.engine.store.seen, ["flush"]);
}

#[test]
fn a_connection_with_too_much_under_way_is_paused_and_resumed() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    for sequence in 0..u64::from(CONNECTION_REQUESTS_MAX) {
        rig.ask(1, 5, write(0, 5, sequence + 1));
    }
    let pauses = rig.others.iter().filter(|c| {
        matches!(
            c,
            EngineCommand::Pause {
                conn: ConnectionId(1)
            }
        )
    });
    assert_eq!(pauses.count(), 1);
    rig.release(CONNECTION_REQUESTS_MAX as usize);
    let resumes = rig.others.iter().filter(|c| {
        matches!(
            c,
            EngineCommand::Resume {
                conn: ConnectionId(1)
            }
        )
    });
    assert_eq!(resumes.count(), 1);
}

#[test]
fn beyond_the_disks_bound_requests_are_refused_as_busy() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    let block_limit = REQUEST_BYTES_MAX / BLOCK_SIZE;
    for sequence in 0..=block_limit as u64 {
        rig.ask(1 + sequence % 2, 5, write(0, 5, sequence + 1));
    }
    assert_eq!(rig.answer(), Err(Status::Busy));
}

#[test]
fn a_replica_is_dropped_only_when_idle_and_not_fenced_beyond_the_order() {
    let mut rig = Rig::serving();
    let drop_at = |rig: &mut Rig, epoch| {
        let request = AdminRequest::DropReplica {
            volume: VOLUME,
            epoch: Epoch(epoch),
        };
        rig.event(EngineEvent::Admin { tag: 1, request });
        rig.others.pop()
    };
    let refused = |command, status| {
        matches!(command,
        Some(EngineCommand::Admin { reply: AdminReply::Refused(s), .. }) if s == status)
    };
    assert!(refused(drop_at(&mut rig, 4), Status::Fenced));
    rig.store().hold = true;
    rig.ask(1, 5, write(0, 5, 1));
    assert!(refused(drop_at(&mut rig, 5), Status::Busy));
    rig.release(1);
    rig.answer().unwrap();
    assert!(drop_at(&mut rig, 5).is_none());
    // While it is being dropped it does not exist.
    rig.ask(1, 5, RequestBody::Ping);
    assert_eq!(rig.answer(), Err(Status::UnknownVolume));
    rig.ask(
        1,
        6,
        RequestBody::Fence(Fence {
            create: true,
            rebuild_epoch: Epoch(0),
            link: None,
        }),
    );
    assert_eq!(rig.answer(), Err(Status::UnknownVolume));
    rig.release(1);
    assert!(matches!(
        rig.others.pop(),
        Some(EngineCommand::Admin {
            reply: AdminReply::Dropped,
            ..
        })
    ));
    rig.store().hold = false;
    rig.ask(
        1,
        2,
        RequestBody::Fence(Fence {
            create: true,
            rebuild_epoch: Epoch(0),
            link: None,
        }),
    );
    assert!(matches!(
        rig.answer(),
        Ok(ReplyBody::Fence(FenceReply { existed: false, .. }))
    ));
}

#[test]
fn a_stop_finishes_what_was_admitted_and_refuses_the_rest() {
    let mut rig = Rig::serving();
    rig.store().hold = true;
    rig.ask(1, 5, write(0, 5, 1));
    rig.event(EngineEvent::Admin {
        tag: 9,
        request: AdminRequest::Stop,
    });
    rig.ask(1, 5, RequestBody::Ping);
    assert_eq!(rig.answer(), Err(Status::Busy));
    assert!(!rig.engine.store.seen.contains(&"shutdown"));
    rig.release(1);
    rig.answer().unwrap();
    assert!(rig.engine.store.seen.contains(&"shutdown"));
    assert!(
        rig.others
            .iter()
            .any(|c| matches!(c, EngineCommand::Stopped))
    );
}

#[test]
fn a_failed_disk_refuses_and_says_so() {
    let mut rig = Rig::serving();
    rig.store().poison = true;
    rig.ask(1, 5, write(0, 5, 1));
    assert_eq!(rig.answer(), Err(Status::DiskFailed));
}

#[test]
fn the_status_lists_the_volumes_with_their_fences() {
    let mut rig = Rig::serving();
    rig.event(EngineEvent::Admin {
        tag: 3,
        request: AdminRequest::Status,
    });
    let Some(EngineCommand::Admin {
        tag: 3,
        reply: AdminReply::Status(status),
    }) = rig.others.pop()
    else {
        panic!()
    };
    assert_eq!(status.volumes, [(VOLUME, Epoch(5))]);
    assert_eq!(status.counters.fences, 1);
}
