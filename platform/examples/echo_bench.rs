//! CPU per echo over loopback at depth 32: both ends are reactors, each on a thread of its own.
//!
//! `cargo run -p ashlar-platform --example echo_bench --release [-- unix]`

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use ashlar_platform::reactor::{Event, Reactor, ReactorConfig};
use bytes::Bytes;

/// Messages in flight; fewer for large ones.
const DEPTH: usize = 32;

#[derive(Clone)]
enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

fn serve(address: Address, size: usize, ready: &mpsc::Sender<Address>) {
    let mut reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
    let actual = match address {
        Address::Tcp(address) => Address::Tcp(reactor.listen_tcp(address).expect("listen").1),
        Address::Unix(path) => {
            reactor.listen_unix(&path).expect("listen");
            Address::Unix(path)
        }
    };
    ready.send(actual).expect("the client waits");
    let mut events = Vec::new();
    loop {
        reactor.wait(None, &mut events).expect("wait");
        for event in events.drain(..) {
            match event {
                Event::Received { conn } => {
                    while reactor.input(conn).len() >= size {
                        let message = reactor.input(conn).split_to(size).freeze();
                        reactor.send(conn, message);
                    }
                    if !reactor.input(conn).is_empty() {
                        reactor.reserve(conn, size);
                    }
                }
                Event::Closed { .. } => return,
                _ => {}
            }
        }
    }
}

/// User and system time of all threads, in microseconds.
fn cpu_us() -> u64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("/proc");
    let fields: Vec<&str> = text
        .rsplit(')')
        .next()
        .unwrap_or("")
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum();
    ticks * 10_000
}

fn run(address: Address, size: usize, messages: usize) {
    let (sender, receiver) = mpsc::channel();
    let server = std::thread::spawn(move || serve(address, size, &sender));
    let mut reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
    let conn = match receiver.recv().expect("the server listens") {
        Address::Tcp(address) => reactor.connect_tcp(address),
        Address::Unix(path) => reactor.connect_unix(&path),
    };
    let message = Bytes::from(vec![7; size]);
    let (mut received, mut waits) = (0, 0);
    let (cpu, start) = (cpu_us(), Instant::now());
    let mut events = Vec::new();
    for _ in 0..if size > 65536 { DEPTH / 4 } else { DEPTH } {
        reactor.send(conn, message.clone());
    }
    while received < messages {
        reactor.wait(None, &mut events).expect("wait");
        waits += 1;
        for event in events.drain(..) {
            match event {
                Event::Received { conn } => {
                    while reactor.input(conn).len() >= size {
                        let _ = reactor.input(conn).split_to(size);
                        received += 1;
                        reactor.send(conn, message.clone());
                    }
                    if !reactor.input(conn).is_empty() {
                        reactor.reserve(conn, size);
                    }
                }
                Event::Closed { error, .. } => panic!("closed: {error:?}"),
                _ => {}
            }
        }
    }
    let (cpu, elapsed) = (cpu_us() - cpu, start.elapsed());
    drop(reactor);
    server.join().expect("the server ends");
    let per_second = received as f64 / elapsed.as_secs_f64();
    println!(
        "{size:>8} bytes: {:.2} us CPU per echo (both ends), {per_second:.0}/s, {:.1} messages per wait",
        cpu as f64 / received as f64,
        received as f64 / f64::from(waits),
    );
}

fn main() {
    for (size, messages) in [(64, 1_000_000), (4096, 600_000), (1 << 20, 6000)] {
        let address = if std::env::args().any(|argument| argument == "unix") {
            Address::Unix(std::env::temp_dir().join(format!("echo-bench-{}", std::process::id())))
        } else {
            Address::Tcp((Ipv4Addr::LOCALHOST, 0).into())
        };
        if let Address::Unix(path) = &address {
            let _ = std::fs::remove_file(path);
        }
        run(address, size, messages);
    }
}
