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

#[path = "reactor/disks.rs"]
mod disks;
#[path = "reactor/ends.rs"]
mod ends;

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
