//! Descriptors are given back: in a process of its own, since it counts them.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use ashlar_platform::reactor::{Event, Reactor, ReactorConfig};

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn no_descriptor_leaks_with_connections_or_reactors() {
    let round = |with_close: bool| {
        let mut reactor = Reactor::new(ReactorConfig::default()).unwrap();
        let (_, address) = reactor.listen_tcp((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let inside = descriptors();
        let mut events = Vec::new();
        for i in 0..200 {
            let mut peer = TcpStream::connect(address).unwrap();
            peer.write_all(b"hello").unwrap();
            let mut over = false;
            while !over {
                reactor.wait(None, &mut events).unwrap();
                for event in events.drain(..) {
                    match event {
                        Event::Received { conn } if i % 2 == 0 => {
                            reactor.close(conn);
                            over = true;
                        }
                        Event::Received { .. } => drop(std::mem::replace(
                            &mut peer,
                            TcpStream::connect(address).unwrap(),
                        )),
                        Event::Closed { .. } => over = true,
                        _ => {}
                    }
                }
            }
        }
        if with_close {
            // The stragglers: peers that were dropped at the end of their round.
            let deadline = reactor.now().after(Duration::from_secs(10));
            while descriptors() > inside + 2 {
                let step = reactor.now().after(Duration::from_millis(5));
                reactor.wait(Some(step), &mut events).unwrap();
                events.clear();
                assert!(
                    reactor.now() < deadline,
                    "{} descriptors, then {}",
                    inside,
                    descriptors()
                );
            }
        }
    };
    round(true);
    let before = descriptors();
    for _ in 0..5 {
        round(false);
    }
    assert_eq!(descriptors(), before);
}
