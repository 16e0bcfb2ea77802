//! The reactor against real sockets and files; the peers are plain blocking threads or the reactor itself.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ashlar_platform::disk::{DiskCommand, DiskFile, DiskOpenError, IoToken, OpenOptions};
use ashlar_platform::reactor::{ConnId, DiskIndex, Event, Reactor, ReactorConfig};
use bytes::{Bytes, BytesMut};
use smallvec::smallvec;

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn reactor() -> Reactor {
    Reactor::new(ReactorConfig::default()).unwrap()
}

/// Waits until `wanted` picks an event; other events are dropped.
fn until<T>(reactor: &mut Reactor, mut wanted: impl FnMut(&mut Reactor, Event) -> Option<T>) -> T {
    let deadline = reactor.now().after(PATIENCE);
    let mut events = Vec::new();
    loop {
        reactor.wait(Some(deadline), &mut events).unwrap();
        assert!(reactor.now() < deadline, "nothing happened in time");
        let mut found = None;
        for event in events.drain(..) {
            let picked = wanted(reactor, event);
            found = found.or(picked);
        }
        if let Some(found) = found {
            return found;
        }
    }
}

fn closed(reactor: &mut Reactor, conn: ConnId) -> Option<std::io::Error> {
    until(reactor, |_, event| match event {
        Event::Closed { conn: c, error } if c == conn => Some(error),
        _ => None,
    })
}

/// Deterministic bytes of a stream at a position.
fn pattern(seed: u64, position: usize) -> u8 {
    let mixed = (seed ^ position as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 32) as u8
}

fn stream(seed: u64, length: usize) -> Bytes {
    (0..length)
        .map(|position| pattern(seed, position))
        .collect()
}

/// Sizes that look random, from 1 to `max`.
fn size(state: &mut u64, max: usize) -> usize {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % max + 1
}

/// Echoes everything until `connections` were closed by their peers.
fn echo(reactor: &mut Reactor, connections: usize) {
    let mut over = 0;
    until(reactor, |reactor, event| {
        match event {
            Event::Received { conn } => {
                let bytes = reactor.input(conn).split().freeze();
                reactor.send(conn, bytes);
            }
            Event::Closed { error, .. } => {
                assert!(error.is_none(), "{error:?}");
                over += 1;
            }
            _ => {}
        }
        (over == connections).then_some(())
    });
}

/// Sends a stream in random pieces, reads its echo, compares.
fn check_echo(
    mut socket: impl Read + Write,
    mut half: impl Write + Send + 'static,
    seed: u64,
    length: usize,
) {
    let sent = stream(seed, length);
    let expected = sent.clone();
    let writer = thread::spawn(move || {
        let (mut state, mut at) = (seed, 0);
        while at < sent.len() {
            let count = size(&mut state, 300_000).min(sent.len() - at);
            half.write_all(&sent[at..at + count]).unwrap();
            at += count;
        }
    });
    let mut received = vec![0; length];
    socket.read_exact(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == expected, "the echo of stream {seed} differs");
}

#[test]
fn echoes_many_tcp_connections() {
    const CONNECTIONS: usize = 40;
    let mut reactor = reactor();
    let (_, address) = reactor.listen_tcp(LOCAL).unwrap();
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|seed| {
            thread::spawn(move || {
                let socket = TcpStream::connect(address).unwrap();
                let half = socket.try_clone().unwrap();
                check_echo(socket, half, seed as u64, 40_000 * (seed + 1));
            })
        })
        .collect();
    echo(&mut reactor, CONNECTIONS);
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
}

#[test]
fn echoes_unix_connections_and_replaces_a_stale_socket_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let mut reactor = reactor();
    reactor.listen_unix(&path).unwrap();
    let again = reactor.listen_unix(&path);
    assert_eq!(again.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    let clients: Vec<_> = (0..8)
        .map(|seed| {
            let path = path.clone();
            thread::spawn(move || {
                let socket = UnixStream::connect(path).unwrap();
                let half = socket.try_clone().unwrap();
                check_echo(socket, half, seed, 5_000_000);
            })
        })
        .collect();
    // The probe of the second listener was accepted and closed as well.
    echo(&mut reactor, 9);
    clients
        .into_iter()
        .for_each(|client| client.join().unwrap());
}

/// Frames of a length prefix and data, both ways between two connections of one reactor; each frame is
/// kept until the end, so that an overwritten buffer shows.
#[test]
fn frames_of_all_sizes_arrive_in_one_piece_and_stay_unchanged() {
    const FRAMES: usize = 400;
    let mut reactor = reactor();
    let (_, address) = reactor.listen_tcp(LOCAL).unwrap();
    let client = reactor.connect_tcp(address);
    let mut state = 1;
    let sizes: Vec<usize> = (0..FRAMES)
        .map(|i| size(&mut state, if i % 10 == 0 { 3_000_000 } else { 40_000 }))
        .collect();
    for (i, &size) in sizes.iter().enumerate() {
        let mut header = BytesMut::new();
        header.extend_from_slice(&(size as u32).to_le_bytes());
        reactor.send(client, header.freeze());
        reactor.send(client, stream(i as u64, size));
    }
    let mut frames = Vec::new();
    until(&mut reactor, |reactor, event| {
        let Event::Received { conn } = event else {
            return None;
        };
        loop {
            let input = reactor.input(conn);
            let Some(header) = input.first_chunk::<4>() else {
                break;
            };
            let total = u32::from_le_bytes(*header) as usize + 4;
            if input.len() < total {
                reactor.reserve(conn, total);
                break;
            }
            frames.push(input.split_to(total).freeze());
        }
        (frames.len() == FRAMES).then_some(())
    });
    for (i, frame) in frames.iter().enumerate() {
        assert_eq!(frame.len(), sizes[i] + 4);
        assert!(
            frame[4..] == stream(i as u64, sizes[i]),
            "frame {i} differs"
        );
    }
    assert_eq!(reactor.send_queued_bytes(client), 0);
}

#[test]
fn a_consumer_may_do_anything_to_its_input() {
    let mut reactor = reactor();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    let sent = stream(3, 3_000_000);
    let expected = sent.clone();
    let writer = thread::spawn(move || {
        sent.chunks(7777)
            .for_each(|chunk| theirs.write_all(chunk).unwrap());
        theirs
    });
    let (mut all, mut turn) = (Vec::new(), 0);
    until(&mut reactor, |reactor, event| {
        let Event::Received { conn } = event else {
            return None;
        };
        let input = reactor.input(conn);
        turn += 1;
        match turn % 5 {
            0 => input.reserve(500_000),
            1 => {
                let tail = input.split_off(input.len() / 2);
                all.extend_from_slice(input);
                *input = tail;
            }
            2 => {
                let taken = std::mem::replace(input, BytesMut::with_capacity(10));
                all.extend_from_slice(&taken);
            }
            3 => {
                all.extend_from_slice(input);
                input.clear();
                input.extend_from_slice(&[1; 100]);
                input.truncate(0);
            }
            _ => {}
        }
        (all.len() + reactor.input(conn).len() == expected.len()).then_some(())
    });
    all.extend_from_slice(reactor.input(conn));
    assert!(all == expected);
    drop(writer.join().unwrap());
    assert!(closed(&mut reactor, conn).is_none());
}

#[test]
fn partial_sends_continue_and_the_queue_is_counted() {
    let mut reactor = reactor();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let conn = reactor.adopt(OwnedFd::from(ours)).unwrap();
    let data = stream(9, 8_000_000);
    // More buffers than one send carries, of all sizes; the peer reads nothing yet.
    let (mut at, mut state) = (0, 5);
    while at < data.len() {
        let count = size(&mut state, 20_000).min(data.len() - at);
        reactor.send(conn, data.slice(at..at + count));
        at += count;
    }
    assert_eq!(reactor.send_queued_bytes(conn), data.len());
    let deadline = reactor.now().after(Duration::from_millis(50));
    let mut events = Vec::new();
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty(), "{events:?}");
    let reader = thread::spawn(move || {
        let mut received = vec![0; 8_000_000];
        theirs.read_exact(&mut received).unwrap();
        (received, theirs)
    });
    until(&mut reactor, |_, event| {
        matches!(event, Event::Sent { .. }).then_some(())
    });
    assert_eq!(reactor.send_queued_bytes(conn), 0);
    assert!(reader.join().unwrap().0 == data);
}

#[test]
fn a_released_socket_carries_on_elsewhere_without_a_byte_lost() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut socket = OwnedFd::from(ours);
    let mut received = Bytes::new();
    let sent = stream(21, 5_000_000);
    let expected = sent.clone();
    let writer = thread::spawn(move || {
        for chunk in sent.chunks(9_001) {
            theirs.write_all(chunk).unwrap();
        }
        let mut replies = vec![0; 30 * 4];
        theirs.read_exact(&mut replies).unwrap();
        replies
    });
    let mut all = Vec::new();
    for turn in 0..30_u32 {
        let mut reactor = reactor();
        let conn = reactor.adopt_with(socket, &received).unwrap();
        let goal = expected.len() * (turn as usize + 1) / 30;
        until(&mut reactor, |reactor, event| {
            let Event::Received { conn } = event else {
                return None;
            };
            let input = reactor.input(conn);
            // Something is left behind each time, for the next owner.
            let used = input.len().min(expected.len() - all.len()).min(50_000);
            all.extend_from_slice(&input.split_to(used));
            let more = !input.is_empty();
            if more && all.len() < goal {
                reactor.pause_receive(conn);
                reactor.resume_receive(conn);
            }
            (all.len() >= goal).then_some(())
        });
        reactor.send(conn, Bytes::copy_from_slice(&turn.to_le_bytes()));
        reactor.release(conn);
        (socket, received) = until(&mut reactor, |_, event| match event {
            Event::Released {
                socket, received, ..
            } => Some((socket, received)),
            other => {
                assert!(!matches!(other, Event::Closed { .. }), "{other:?}");
                None
            }
        });
    }
    assert!(all == expected && received.is_empty());
    let replies: Vec<u8> = (0..30_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(writer.join().unwrap(), replies);
}

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

#[test]
fn wait_ends_at_its_deadline_and_not_before() {
    let mut reactor = reactor();
    let mut events = Vec::new();
    for milliseconds in [0, 1, 30] {
        let deadline = reactor.now().after(Duration::from_millis(milliseconds));
        reactor.wait(Some(deadline), &mut events).unwrap();
        assert!(reactor.now() >= deadline && events.is_empty());
    }
}

#[test]
fn wakes_from_other_threads_are_never_lost() {
    const MESSAGES: usize = 20_000;
    let mut reactor = reactor();
    let (sender, receiver) = mpsc::channel();
    for _ in 0..2 {
        let (sender, waker) = (sender.clone(), reactor.waker());
        thread::spawn(move || {
            for i in 0..MESSAGES {
                sender.send(i).unwrap();
                waker.wake();
                if i % 1000 == 0 {
                    thread::yield_now();
                }
            }
        });
    }
    let mut count = 0;
    until(&mut reactor, |_, event| {
        assert!(matches!(event, Event::Woken));
        count += receiver.try_iter().count();
        (count == 2 * MESSAGES).then_some(())
    });
}

fn disk(reactor: &mut Reactor, directory: &tempfile::TempDir, size: u64) -> Option<DiskIndex> {
    match DiskFile::create(&directory.path().join("disk"), size, OpenOptions::default()) {
        Err(DiskOpenError::NoDirectIo { path }) => {
            eprintln!("SKIPPED: no O_DIRECT at {}", path.display());
            None
        }
        file => Some(reactor.add_disk(file.unwrap())),
    }
}

/// Waits for the completions of `count` commands.
fn completions(reactor: &mut Reactor, count: usize) -> BTreeMap<u64, std::io::Result<Bytes>> {
    let mut done = BTreeMap::new();
    until(reactor, |_, event| {
        if let Event::Disk { completion, .. } = event {
            assert!(done.insert(completion.token.0, completion.result).is_none());
        }
        (done.len() == count).then_some(())
    });
    done
}

#[test]
fn disks_read_what_was_written_whatever_the_alignment() {
    const PIECES: usize = 1500;
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = reactor();
    let Some(disk) = disk(&mut reactor, &directory, 64 << 20) else {
        return;
    };
    let piece = |i: usize| (i as u64 * 40960, 4096 * (1 + i % 10));
    // More commands than the queue holds; by turns aligned, unaligned, and in several buffers.
    for i in 0..PIECES {
        let (offset, length) = piece(i);
        let data = stream(i as u64, length);
        let data = match i % 3 {
            0 => smallvec![reactor.buffers().copy_of(&data).freeze()],
            1 => smallvec![data.slice(..1000), data.slice(1000..)],
            _ => data
                .chunks(4096)
                .map(|c| reactor.buffers().copy_of(c).freeze())
                .collect(),
        };
        reactor.disk(
            disk,
            DiskCommand::Write {
                durable: false,
                token: IoToken(i as u64),
                offset,
                data,
            },
        );
    }
    completions(&mut reactor, PIECES)
        .into_values()
        .for_each(|result| drop(result.unwrap()));
    reactor.disk(disk, DiskCommand::Sync { token: IoToken(7) });
    completions(&mut reactor, 1).remove(&7).unwrap().unwrap();
    for i in 0..PIECES {
        let (offset, length) = piece(i);
        reactor.disk(
            disk,
            DiskCommand::Read {
                token: IoToken(i as u64),
                offset,
                length,
            },
        );
    }
    for (i, result) in completions(&mut reactor, PIECES) {
        let data = result.unwrap();
        assert_eq!(data.as_ptr().align_offset(4096), 0);
        assert!(data == stream(i, piece(i as usize).1), "piece {i} differs");
    }
}

#[test]
fn disks_discard_and_refuse_to_read_beyond_their_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = reactor();
    let Some(disk) = disk(&mut reactor, &directory, 1 << 20) else {
        return;
    };
    let data = smallvec![reactor.buffers().copy_of(&[7; 65536]).freeze()];
    reactor.disk(
        disk,
        DiskCommand::Write {
            durable: false,
            token: IoToken(1),
            offset: 0,
            data,
        },
    );
    completions(&mut reactor, 1).remove(&1).unwrap().unwrap();
    reactor.disk(
        disk,
        DiskCommand::Discard {
            token: IoToken(2),
            offset: 4096,
            length: 8192,
        },
    );
    completions(&mut reactor, 1).remove(&2).unwrap().unwrap();
    reactor.disk(
        disk,
        DiskCommand::Read {
            token: IoToken(3),
            offset: 0,
            length: 65536,
        },
    );
    reactor.disk(
        disk,
        DiskCommand::Read {
            token: IoToken(4),
            offset: (1 << 20) - 4096,
            length: 8192,
        },
    );
    let mut done = completions(&mut reactor, 2);
    let data = done.remove(&3).unwrap().unwrap();
    assert!(
        data.iter()
            .enumerate()
            .all(|(i, &b)| b == if (4096..12288).contains(&i) { 0 } else { 7 })
    );
    assert_eq!(
        done.remove(&4).unwrap().unwrap_err().kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn a_reactor_can_be_dropped_with_everything_in_flight() {
    let directory = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        let mut reactor = reactor();
        let (_, address) = reactor.listen_tcp(LOCAL).unwrap();
        let conn = reactor.connect_tcp(address);
        reactor.connect_tcp(SocketAddr::from(([10, 255, 255, 1], 9)));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stuck = reactor.adopt(OwnedFd::from(ours)).unwrap();
        reactor.send(stuck, stream(1, 5_000_000));
        let path = directory.path().join("disk");
        let file = DiskFile::create(
            &path,
            8 << 20,
            OpenOptions {
                direct: false,
                ..OpenOptions::default()
            },
        );
        let disk = reactor.add_disk(file.unwrap());
        let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(5)));
        reactor.wait(Some(deadline), &mut events).unwrap();
        for i in 0..64 {
            let data = smallvec![Bytes::from(vec![1; 65536])];
            reactor.disk(
                disk,
                DiskCommand::Write {
                    durable: false,
                    token: IoToken(i),
                    offset: i * 65536,
                    data,
                },
            );
            reactor.disk(
                disk,
                DiskCommand::Read {
                    token: IoToken(i),
                    offset: i * 65536,
                    length: 65536,
                },
            );
        }
        reactor.send(conn, stream(2, 3_000_000));
        let now = reactor.now();
        reactor.wait(Some(now), &mut events).unwrap();
        drop(reactor);
        drop(theirs);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn connections_beyond_the_limit_wait_to_be_accepted() {
    let config = ReactorConfig {
        connections_max: 2,
        ..ReactorConfig::default()
    };
    let mut reactor = Reactor::new(config).unwrap();
    let (_, address) = reactor.listen_tcp(LOCAL).unwrap();
    let clients: Vec<_> = (0..3)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    let mut accepted = Vec::new();
    until(&mut reactor, |_, event| {
        if let Event::Accepted { conn, .. } = event {
            accepted.push(conn);
        }
        (accepted.len() == 2).then_some(())
    });
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(20)));
    reactor.wait(Some(deadline), &mut events).unwrap();
    assert!(events.is_empty(), "{events:?}");
    let refused = reactor.connect_tcp(address);
    assert!(closed(&mut reactor, refused).is_some());
    reactor.close(accepted[0]);
    until(&mut reactor, |_, event| {
        matches!(event, Event::Accepted { .. }).then_some(())
    });
    drop(clients);
}

#[test]
fn a_closed_listener_accepts_nothing() {
    let mut reactor = reactor();
    let (listener, address) = reactor.listen_tcp(LOCAL).unwrap();
    let (mut events, deadline) = (Vec::new(), reactor.now().after(Duration::from_millis(1)));
    reactor.wait(Some(deadline), &mut events).unwrap();
    reactor.close_listener(listener);
    reactor.close_listener(listener);
    let patience = reactor.now().after(PATIENCE);
    loop {
        let deadline = reactor.now().after(Duration::from_millis(1));
        reactor.wait(Some(deadline), &mut events).unwrap();
        assert!(reactor.now() < patience && events.is_empty(), "{events:?}");
        if TcpStream::connect(address).is_err() {
            break;
        }
    }
}

#[test]
fn empty_disk_commands_succeed_and_misplaced_ones_fail() {
    let directory = tempfile::tempdir().unwrap();
    let mut reactor = reactor();
    let Some(disk) = disk(&mut reactor, &directory, 1 << 20) else {
        return;
    };
    reactor.disk(
        disk,
        DiskCommand::Read {
            token: IoToken(1),
            offset: 0,
            length: 0,
        },
    );
    reactor.disk(
        disk,
        DiskCommand::Write {
            durable: false,
            token: IoToken(2),
            offset: 0,
            data: smallvec![],
        },
    );
    reactor.disk(
        disk,
        DiskCommand::Read {
            token: IoToken(3),
            offset: 100,
            length: 4096,
        },
    );
    let odd = smallvec![Bytes::from_static(b"no sector")];
    reactor.disk(
        disk,
        DiskCommand::Write {
            durable: false,
            token: IoToken(4),
            offset: 0,
            data: odd,
        },
    );
    let done = completions(&mut reactor, 4);
    assert!(
        done[&1].is_ok() && done[&2].is_ok() && done[&3].is_err() && done[&4].is_err(),
        "{done:?}"
    );
}
