//! How connections end: refused, reset, given up, closed with work in flight, paused.

use super::*;

#[test]
fn a_peer_that_leaves_is_reported_although_its_socket_was_to_be_released() {
    let mut reactor = reactor();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    reactor.pause_receive(conn);
    drop(theirs);
    let mut events = Vec::new();
    let soon = reactor.now().after(Duration::from_millis(20));
    reactor.wait(Some(soon), &mut events).unwrap();
    reactor.release(conn);
    until(&mut reactor, |_, event| match event {
        Event::Closed { conn: gone, .. } | Event::Released { conn: gone, .. } => {
            (gone == conn).then_some(())
        }
        _ => None,
    });
}

#[test]
fn a_peer_that_does_not_read_is_given_up() {
    let config = ReactorConfig {
        send_queue_max: 1_000_000,
        ..ReactorConfig::default()
    };
    let mut reactor = Reactor::new(config).unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    for _ in 0..3 {
        reactor.send(conn, Bytes::from(vec![0; 500_000]));
    }
    assert_eq!(
        closed(&mut reactor, conn).unwrap().kind(),
        std::io::ErrorKind::StorageFull
    );
}

#[test]
fn a_refused_connection_is_closed_with_the_reason() {
    let address = TcpListener::bind(LOCAL).unwrap().local_addr().unwrap();
    let mut reactor = reactor();
    let conn = reactor.connect_tcp(address);
    assert_eq!(
        closed(&mut reactor, conn).unwrap().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
    let conn = reactor.connect_unix(std::path::Path::new("/nonexistent/socket"));
    assert_eq!(
        closed(&mut reactor, conn).unwrap().kind(),
        std::io::ErrorKind::NotFound
    );
    reactor.send(conn, Bytes::from_static(b"nobody"));
    assert_eq!(reactor.input(conn).len(), 0);
}

#[test]
fn a_reset_reports_exactly_one_closed_after_what_was_received() {
    let listener = TcpListener::bind(LOCAL).unwrap();
    let mut reactor = reactor();
    let conn = reactor.connect_tcp(listener.local_addr().unwrap());
    until(&mut reactor, |_, event| {
        matches!(event, Event::Connected { .. }).then_some(())
    });
    let (mut peer, _) = listener.accept().unwrap();
    // Unread bytes at close make the kernel reset the connection.
    reactor.send(conn, Bytes::from(vec![1; 100_000]));
    until(&mut reactor, |_, event| {
        matches!(event, Event::Sent { .. }).then_some(())
    });
    peer.read_exact(&mut [0; 10]).unwrap();
    drop(peer);
    let error = closed(&mut reactor, conn).unwrap();
    assert!(
        matches!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe
        ),
        "{error:?}"
    );
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(20)));
    reactor.send(conn, Bytes::from_static(b"too late"));
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty(), "{events:?}");
}

#[test]
fn the_last_bytes_can_be_read_when_the_peer_has_left() {
    let mut reactor = reactor();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    theirs.write_all(b"farewell").unwrap();
    drop(theirs);
    assert!(closed(&mut reactor, conn).is_none());
    assert_eq!(&reactor.input(conn)[..], b"farewell");
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(1)));
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty() && reactor.input(conn).is_empty());
}

#[test]
fn closing_with_operations_in_flight_reports_nothing_and_old_names_find_nothing() {
    let mut reactor = reactor();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    reactor.send(conn, Bytes::from(vec![0; 4_000_000]));
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(5)));
    reactor.wait(Some(deadline), &mut events).unwrap();
    reactor.close(conn);
    let deadline = reactor.now().after(Duration::from_millis(20));
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty(), "{events:?}");
    let mut rest = Vec::new();
    theirs.read_to_end(&mut rest).unwrap();
    let (next, mut peer) = UnixStream::pair().unwrap();
    let next = reactor.adopt(OwnedFd::from(next)).unwrap();
    assert_ne!(next, conn);
    reactor.send(conn, Bytes::from_static(b"old"));
    reactor.send(next, Bytes::from_static(b"new"));
    until(&mut reactor, |_, event| {
        matches!(event, Event::Sent { .. }).then_some(())
    });
    let mut received = [0; 3];
    peer.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"new");
}

#[test]
fn close_after_send_delivers_everything_even_if_the_peer_still_sends() {
    let mut reactor = reactor();
    let (_, address) = reactor.listen_tcp(LOCAL).unwrap();
    let peer = thread::spawn(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.write_all(&[1; 300_000]).unwrap();
        let mut received = Vec::new();
        socket.read_to_end(&mut received).unwrap();
        received
    });
    until(&mut reactor, |reactor, event| {
        let Event::Accepted { conn, .. } = event else {
            return None;
        };
        reactor.send(conn, stream(4, 2_000_000));
        reactor.close_after_send(conn);
        Some(())
    });
    let (mut events, deadline) = (Vec::new(), reactor.now().after(PATIENCE));
    while !peer.is_finished() {
        let step = reactor.now().after(Duration::from_millis(10));
        reactor.wait(Some(step), &mut events).unwrap();
        assert!(reactor.now() < deadline && events.is_empty(), "{events:?}");
    }
    assert!(peer.join().unwrap() == stream(4, 2_000_000));
}

#[test]
fn a_paused_connection_holds_back_its_data_and_its_end() {
    let mut reactor = reactor();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    theirs.write_all(b"one").unwrap();
    until(&mut reactor, |_, event| {
        matches!(event, Event::Received { .. }).then_some(())
    });
    reactor.pause_receive(conn);
    theirs.write_all(b"two").unwrap();
    drop(theirs);
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(30)));
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty(), "{events:?}");
    reactor.resume_receive(conn);
    let mut received = false;
    let error = until(&mut reactor, |_, event| match event {
        Event::Received { .. } => {
            received = true;
            None
        }
        Event::Closed { error, .. } => Some(error),
        _ => None,
    });
    assert!(received && error.is_none());
    assert_eq!(&reactor.input(conn)[..], b"onetwo");
}
