//! Real NBD clients against a real cluster: libnbd's tools, qemu-img, fio.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::Duration;

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, have, run_ok};

fn sha256(path: &Path) -> String {
    run_ok("sha256sum", &[path])
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn nbdinfo_nbdcopy_and_qemu_img_carry_an_ext4_image_in_and_out() {
    if !have(&["nbdinfo", "nbdcopy", "qemu-img", "mke2fs", "e2fsck"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec {
        disk_size: "4GiB",
        ..ClusterSpec::default()
    });
    cluster.volume("image", "1GiB", 3);
    let export = Export::start(&cluster, "image");
    let uri = export.uri();
    let info = run_ok("nbdinfo", &[&uri]);
    for expected in [
        "export-size: 1073741824",
        "is_read_only: false",
        "can_multi_conn: true",
    ] {
        assert!(info.contains(expected), "{expected} not in:\n{info}");
    }

    // An ext4 file system of 1 GiB with the host's real files in it.
    let image = cluster.scratch("image.raw");
    let source = if Path::new("/usr/share/perl").exists() {
        "/usr/share/perl"
    } else {
        "/usr/share"
    };
    run_ok("truncate", &["-s", "1G", image.to_str().unwrap()]);
    run_ok(
        "mke2fs",
        &["-q", "-t", "ext4", "-d", source, image.to_str().unwrap()],
    );
    let sum = sha256(&image);

    run_ok("nbdcopy", &[image.to_str().unwrap(), &uri]);
    let back = cluster.scratch("back.raw");
    run_ok("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert_eq!(sha256(&back), sum);
    run_ok("e2fsck", &["-fn", back.to_str().unwrap()]);
    std::fs::remove_file(&back).unwrap();

    run_ok(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            image.to_str().unwrap(),
            &uri,
        ],
    );
    cluster.volume("copy", "1GiB", 2);
    let copy = Export::start(&cluster, "copy");
    run_ok(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            image.to_str().unwrap(),
            &copy.uri(),
        ],
    );
    run_ok(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri, &copy.uri()],
    );
    assert!(export.stop().success());
    assert!(copy.stop().success());

    // What was written is there after a clean close and another open.
    let export = Export::start(&cluster, "image");
    run_ok(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            image.to_str().unwrap(),
            &export.uri(),
        ],
    );
}

#[test]
fn nbdsh_sees_structured_replies_block_status_trim_write_zeroes_and_fua() {
    if !have(&["nbdsh"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("shell", "64MiB", 3);
    let export = Export::start(&cluster, "shell");
    let script = r#"
h.add_meta_context("base:allocation")
h.connect_uri("URI")
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("base:allocation")
assert h.can_trim() and h.can_zero() and h.can_fua() and h.can_flush() and h.can_df()
size = h.get_size()
assert size == 64 << 20, size

def allocation(offset, length):
    extents = []
    def seen(context, at, entries, error):
        for i in range(0, len(entries), 2):
            extents.append((entries[i], entries[i + 1]))
    h.block_status(length, offset, seen)
    return extents

assert allocation(0, 1 << 20)[0] == (1 << 20, 3), "a new volume is a hole of zeroes"
data = bytes(range(256)) * 32                       # 8 KiB
h.pwrite(data, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 4096) == data
assert h.pread(1000, 4100) == data[4:1004], "any byte range"
h.pwrite(b"x" * 100, 5000)                          # read-modify-write
assert h.pread(4096, 4096) == data[:904] + b"x" * 100 + data[1004:4096]
status = allocation(0, 65536)
assert status[0] == (4096, 3), status
assert status[1][0] == 8192 and status[1][1] == 0, status

chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
h.pread_structured(65536, 0, chunk)
assert sum(c[1] for c in chunks) <= 65536 and chunks, chunks
chunks.clear()
h.pread_structured(65536, 0, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1 and chunks[0][1] == 65536, chunks

h.zero(4096, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(4096, 4096) == bytes(4096)
h.trim(4096, 8192)
assert h.pread(4096, 8192) == bytes(4096)
h.flush()
assert allocation(0, 65536)[0][1] == 3
h.zero(100, 300)                                    # unaligned zeroes
big = bytes([7]) * (32 << 20)
h.pwrite(big, 16 << 20)
assert h.pread(32 << 20, 16 << 20) == big, "32 MiB requests"
for call in (lambda: h.pread(4096, size), lambda: h.pwrite(b"y" * 4096, size - 100)):
    h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_BOUNDS)
    try:
        call()
        raise SystemExit("beyond the end was accepted")
    except nbd.Error:
        pass
assert h.pread(512, 0) == bytes(512), "the connection lives on after an error"
"#
    .replace("URI", &export.uri());
    // The distribution's python3 has the nbd module; another one earlier in PATH may not.
    run_ok("env", &["PATH=/usr/bin:/bin", "nbdsh", "-c", &script]);
}

#[test]
fn fio_verifies_random_sizes_from_512_bytes_to_1_mib() {
    if !have(&["fio"]) {
        return;
    }
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("fio", "256MiB", 3);
    let export = Export::start(&cluster, "fio");
    let uri = format!("--uri={}", export.uri());
    for (name, size) in [("sizes", "--bsrange=512-1m"), ("small", "--bsrange=512-8k")] {
        run_ok(
            "fio",
            &[
                &format!("--name={name}"),
                "--ioengine=nbd",
                &uri,
                "--rw=randwrite",
                size,
                "--blockalign=512",
                "--iodepth=16",
                "--size=256m",
                "--io_size=192m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--randseed=7",
                &format!("--aux-path={}", cluster.dir().display()),
            ],
        );
    }
    cluster.wait_redundant("fio", Duration::from_secs(20));
}
