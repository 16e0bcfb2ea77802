//! CPU per 4 KiB O_DIRECT write and read at depth 32 through the reactor.
//!
//! `cargo run -p ashlar-platform --example disk_bench --release -- PATH` (the file is made and removed)

use std::time::Instant;

use ashlar_platform::disk::{DiskCommand, DiskFile, IoToken, OpenOptions};
use ashlar_platform::random;
use ashlar_platform::reactor::{Event, Reactor, ReactorConfig};
use smallvec::smallvec;

const SIZE: u64 = 256 << 20;
const DEPTH: u64 = 32;
const OPERATIONS: u64 = 100_000;

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

fn main() {
    let path = std::env::args_os().nth(1).expect("a path");
    let path = std::path::Path::new(&path);
    let file = DiskFile::create(path, SIZE, OpenOptions::default()).expect("a new file");
    println!(
        "sector {}, memory alignment {}",
        file.logical_sector(),
        file.memory_alignment()
    );
    let mut reactor = Reactor::new(ReactorConfig::default()).expect("io_uring");
    let disk = reactor.add_disk(file);
    let mut events = Vec::new();
    for (name, write, size) in [
        ("fill", true, 1 << 20),
        ("write", true, 4096),
        ("read", false, 4096),
        ("large read", false, 1 << 20),
    ] {
        let operations = if size > 4096 {
            SIZE / size as u64
        } else {
            OPERATIONS
        };
        let (cpu, start) = (cpu_us(), Instant::now());
        let (mut submitted, mut done) = (0, 0);
        while done < operations {
            while submitted < operations && submitted - done < DEPTH {
                let places = SIZE / size as u64;
                let place = if size > 4096 {
                    submitted
                } else {
                    random::u64()
                };
                let (token, offset) = (IoToken(submitted), place % places * size as u64);
                reactor.disk(
                    disk,
                    if write {
                        let mut data = reactor.buffers().take(size);
                        data[0] = submitted as u8;
                        DiskCommand::Write {
                            durable: false,
                            token,
                            offset,
                            data: smallvec![data.freeze()],
                        }
                    } else {
                        DiskCommand::Read {
                            token,
                            offset,
                            length: size,
                        }
                    },
                );
                submitted += 1;
            }
            reactor.wait(None, &mut events).expect("wait");
            for event in events.drain(..) {
                if let Event::Disk { completion, .. } = event {
                    completion.result.expect("disk I/O");
                    done += 1;
                }
            }
        }
        let (cpu, elapsed) = (cpu_us() - cpu, start.elapsed());
        println!(
            "{name:>10}: {:.2} us CPU each, {:.0}/s",
            cpu as f64 / operations as f64,
            operations as f64 / elapsed.as_secs_f64()
        );
    }
    drop(reactor);
    std::fs::remove_file(path).expect("remove the file");
}
