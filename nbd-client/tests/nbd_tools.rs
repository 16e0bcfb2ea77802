//! Real NBD clients against the real server with a volume in memory: nbdinfo, nbdcopy, nbdsh, qemu-img,
//! fio.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{MemoryEngine, Server, have, run, run_any, text};
use nbd_client::client::ToWorker;
use nbd_client::engine::{SessionEvent, StopReason};

const MIB: u64 = 1 << 20;

/// Pseudo-random bytes with holes, from a seed.
fn image(length: usize, mut seed: u64) -> Vec<u8> {
    let mut bytes = vec![0_u8; length];
    for (index, block) in bytes.chunks_mut(64 * 1024).enumerate() {
        if index % 3 == 1 {
            continue;
        }
        for chunk in block.chunks_mut(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            chunk.copy_from_slice(&(seed ^ seed >> 29).to_le_bytes()[..chunk.len()]);
        }
    }
    bytes
}

#[test]
fn nbdinfo_sees_the_export_with_everything_it_can_do() {
    if !have("nbdinfo") {
        return;
    }
    let server = Server::start(MemoryEngine::new(64 * MIB));
    let mode = std::fs::metadata(&server.socket)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let info = run("nbdinfo", &["--json", &server.uri()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "vol");
    assert_eq!(export["export-size"], 64 * MIB);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    for can in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let list = run("nbdinfo", &["--list", "--json", &server.uri()]);
    assert!(list.contains("\"export-name\": \"vol\""), "{list}");
    // A name that is not served.
    let other = format!("nbd+unix:///other?socket={}", server.socket.display());
    assert!(!run_any("nbdinfo", &[&other]).status.success());
}

#[test]
fn nbdcopy_in_and_out_keeps_every_byte() {
    if !have("nbdcopy") {
        return;
    }
    let server = Server::start(MemoryEngine::new(64 * MIB));
    let (source, back) = (server.path("in"), server.path("out"));
    let bytes = image(64 << 20, 1);
    std::fs::write(&source, &bytes).unwrap();
    run("nbdcopy", &["--flush", text(&source), &server.uri()]);
    run("nbdcopy", &[&server.uri(), text(&back)]);
    assert!(std::fs::read(&back).unwrap() == bytes);
    // One connection, one big request at a time, and holes allocated.
    run(
        "nbdcopy",
        &[
            "--connections=1",
            "--request-size=33554432",
            "--allocated",
            text(&source),
            &server.uri(),
        ],
    );
    std::fs::remove_file(&back).unwrap();
    run(
        "nbdcopy",
        &[
            "--connections=1",
            "--request-size=33554432",
            &server.uri(),
            text(&back),
        ],
    );
    assert!(std::fs::read(&back).unwrap() == bytes);
}

#[test]
fn a_slow_engine_that_accepts_little_is_waited_for() {
    if !have("nbdcopy") {
        return;
    }
    let engine = MemoryEngine::slow(16 * MIB, Duration::from_millis(2), 3);
    let server = Server::start(engine);
    let (source, back) = (server.path("in"), server.path("out"));
    let bytes = image(16 << 20, 2);
    std::fs::write(&source, &bytes).unwrap();
    run("nbdcopy", &["--requests=64", text(&source), &server.uri()]);
    run(
        "nbdcopy",
        &[
            "--requests=64",
            "--request-size=8388608",
            &server.uri(),
            text(&back),
        ],
    );
    assert!(std::fs::read(&back).unwrap() == bytes);
}

#[test]
fn qemu_img_converts_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let server = Server::start(MemoryEngine::new(32 * MIB));
    let (source, back) = (server.path("in.raw"), server.path("out.qcow2"));
    let bytes = image(32 << 20, 3);
    std::fs::write(&source, &bytes).unwrap();
    let url = format!("nbd+unix:///vol?socket={}", server.socket.display());
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            text(&source),
            &url,
        ],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", text(&source), &url],
    );
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &url, text(&back)],
    );
    run(
        "qemu-img",
        &["compare", "-f", "qcow2", "-F", "raw", text(&back), &url],
    );
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &url]);
    assert!(
        map.contains("\"data\": false") && map.contains("\"data\": true"),
        "{map}"
    );
}

#[test]
fn nbdsh_structured_replies_block_status_trim_zeroes_fua() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start(MemoryEngine::new(64 * MIB));
    let script = r#"
import errno
def fails(number, f):
    try:
        f()
    except nbd.Error as e:
        assert e.errno == errno.errorcode[number], (e.errno, number)
        return
    assert False, "must fail"

assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
h.set_strict_mode(0)
# Any alignment.
h.pwrite(b"x" * 5000, 1)
assert h.pread(5002, 0) == b"\0" + b"x" * 5000 + b"\0"
h.pwrite(b"y" * 512, 512, nbd.CMD_FLAG_FUA)
assert h.pread(512, 512) == b"y" * 512
# 32 MiB in one request.
big = bytes(range(256)) * (128 * 1024)
h.pwrite(big, 100)
assert h.pread(len(big), 100) == big
assert h.pread(len(big), 100, nbd.CMD_FLAG_DF) == big
# Chunks of a structured reply: data and holes.
h.zero(64 << 20, 0)
h.pwrite(b"d" * 4096, 8192)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
buf = h.pread_structured(16384, 4096, chunk)
assert sorted(chunks) == [(4096, 4096, nbd.READ_HOLE), (8192, 4096, nbd.READ_DATA), (12288, 8192, nbd.READ_HOLE)], chunks
chunks.clear()
h.pread_structured(16384, 4096, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(4096, 16384, nbd.READ_DATA)], chunks
# Block status.
found = []
def extent(context, offset, entries, error):
    assert context == "base:allocation"
    found.extend(entries)
h.block_status(65536, 4096, extent)
assert found == [4096, 3, 4096, 0, 57344, 3], found
found.clear()
h.block_status(65536, 8192, extent, nbd.CMD_FLAG_REQ_ONE)
assert found == [4096, 0], found
# Trim and zeroes.
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 8192) == bytes(4096)
h.pwrite(b"z" * 16384, 0)
h.zero(1000, 10)
assert h.pread(1020, 0) == b"z" * 10 + bytes(1000) + b"z" * 10
h.zero(8192, 4096, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(8192, 4096) == bytes(8192)
fails(95, lambda: h.zero(100, 1, nbd.CMD_FLAG_FAST_ZERO))
found.clear()
h.zero(3 << 20, 5 << 20, nbd.CMD_FLAG_NO_HOLE)
h.block_status(3 << 20, 5 << 20, extent)
assert found == [3 << 20, 0], found
h.flush()
h.cache(4096, 0)
# Errors, after which the connection is still good.
size = h.get_size()
fails(22, lambda: h.pread(512, size - 511))
fails(28, lambda: h.pwrite(b"a" * 512, size - 511))
fails(28, lambda: h.zero(512, size))
fails(22, lambda: h.trim(512, size))
fails(22, lambda: h.block_status(512, size, extent))
assert h.pread(1, 0) == b"z"
h.shutdown()
"#;
    run(
        "nbdsh",
        &["--base-allocation", "-u", &server.uri(), "-c", script],
    );
    // Simple replies only, as the kernel speaks.
    let script = r#"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated()
h.pwrite(b"s" * 70000, 1234)
assert h.pread(70002, 1233) == b"\0" + b"s" * 70000 + b"\0"
big = bytes(range(256)) * (128 * 1024)
h.pwrite(big, 4096)
assert h.pread(len(big), 4096) == big
h.shutdown()
"#;
    let server = Server::start(MemoryEngine::new(64 * MIB));
    let script = script.replace("(uri)", &format!("({:?})", server.uri()));
    run("nbdsh", &["-c", &script]);
}

#[test]
fn a_read_only_export_refuses_writes() {
    if !have("nbdsh") {
        return;
    }
    let server = Server::start_with(MemoryEngine::new(MIB), true);
    let script = r#"
assert h.is_read_only()
h.set_strict_mode(0)
for f in [lambda: h.pwrite(b"a" * 512, 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)]:
    try:
        f()
        assert False
    except nbd.Error as e:
        assert e.errno == "EPERM", e.errno
assert h.pread(4, 0) == bytes(4)
h.flush()
"#;
    run("nbdsh", &["-u", &server.uri(), "-c", script]);
}

#[test]
fn fio_verifies_random_sizes_over_several_connections() {
    if !have("fio") {
        return;
    }
    if !run("fio", &["--enghelp"]).contains("nbd") {
        eprintln!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let server = Server::start(MemoryEngine::new(64 * MIB));
    let uri = format!("--uri={}", server.uri());
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-1m",
        "--bs_unaligned=0",
        "--blockalign=512",
        "--iodepth=16",
        "--verify=crc32c",
        "--size=64m",
        "--io_size=128m",
        "--randseed=7",
        "--verify_fatal=1",
        "--verify_state_save=0",
    ];
    run("fio", &common);
}

#[test]
fn a_stopped_volume_drops_its_connections_without_a_reply() {
    let engine = MemoryEngine::slow(MIB, Duration::from_secs(3600), 100);
    let server = Server::start(engine);
    let mut client = UnixStream::connect(&server.socket).unwrap();
    let mut bytes = [0, 0, 0, 3].to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
    bytes.extend(0x2560_9513_u32.to_be_bytes());
    bytes.extend([0; 20]);
    bytes.extend(512_u32.to_be_bytes());
    client.write_all(&bytes).unwrap();
    let mut start = [0; 28];
    client.read_exact(&mut start).unwrap();
    let event = Box::new(SessionEvent::Deleted);
    assert!(
        server
            .worker
            .sender()
            .blocking_send(ToWorker::Session { index: 0, event })
    );
    assert_eq!(server.stopped(), StopReason::Superseded);
    let mut rest = Vec::new();
    // The end of the stream, or a reset since the request was never read.
    let _ = client.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{rest:?}");
    assert!(!server.socket.exists());
    assert!(UnixStream::connect(&server.socket).is_err());
}

#[test]
fn shutdown_answers_what_is_under_way_and_then_closes() {
    let engine = MemoryEngine::slow(MIB, Duration::from_millis(300), 100);
    let server = Server::start(engine);
    let mut client = UnixStream::connect(&server.socket).unwrap();
    let mut bytes = [0, 0, 0, 3].to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\0");
    bytes.extend(0x2560_9513_u32.to_be_bytes());
    bytes.extend([0, 0, 0, 3]);
    bytes.extend(77_u64.to_be_bytes());
    bytes.extend([0; 12]);
    client.write_all(&bytes).unwrap();
    let mut start = [0; 28];
    client.read_exact(&mut start).unwrap();
    // The flush has been received before the shutdown is, or its connection ends without reply.
    std::thread::sleep(Duration::from_millis(100));
    assert!(server.worker.sender().blocking_send(ToWorker::Shutdown));
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x4d");
    assert_eq!(server.stopped(), StopReason::Closed);
    assert!(server.worker.thread.join().unwrap().is_ok());
}

#[test]
fn hostile_bytes_end_only_their_connection() {
    let server = Server::start(MemoryEngine::new(MIB));
    let hostile: [&[u8]; 4] = [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
        b"\0\0\0\x03garbagegarbagegarbage",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0\x25\x60\x95\x13\0\0\0\x01aaaaaaaa\0\0\0\0\0\0\0\0\xff\xff\xff\xff",
    ];
    for bytes in hostile {
        let mut client = UnixStream::connect(&server.socket).unwrap();
        client.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(rest.starts_with(b"NBDMAGICIHAVEOPT\0\x03"));
        assert!(rest.len() <= 28);
    }
    let mut client = UnixStream::connect(&server.socket).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
}
