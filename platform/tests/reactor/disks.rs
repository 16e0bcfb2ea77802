//! Disks of a reactor: alignment, discard, limits.

use super::*;

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
