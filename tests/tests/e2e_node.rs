//! Volumes as devices of a real kernel: `nbd-client node` in user-mode Linux nodes, with file systems and
//! fio on top, killed, restarted, upgraded, frozen and rebooted.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use ashlar_tests::e2e::exposition::Exposition;
use ashlar_tests::e2e::uml::{Network, PROGRAMS};
use ashlar_tests::e2e::{AttachNode, Cluster, have};

const MINUTE: Duration = Duration::from_secs(60);

/// What every test needs of the machine.
fn ready() -> bool {
    let mut programs = PROGRAMS.to_vec();
    programs.extend(["fio", "mkfs.ext4", "e2fsck", "blockdev"]);
    have(&programs)
}

/// fio that writes files on /mnt directly, verifies them, and stops at the first error.
fn fio(seconds: u32) -> String {
    format!(
        "cd /mnt && fio --name=v --directory=/mnt --size=24m --nrfiles=2 --rw=randwrite --bs=4k-64k --ioengine=psync \
         --direct=1 --numjobs=2 --fsync=32 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based \
         --runtime={seconds} --group_reporting --output-format=json --output=/share/fio.json"
    )
}

/// The longest time that any request of a finished fio took, in milliseconds.
fn longest_ms(node: &AttachNode) -> f64 {
    let text = std::fs::read_to_string(node.share("fio.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{text}");
    assert!(job["write"]["total_ios"].as_u64() > Some(100), "{text}");
    [
        "/read/clat_ns/max",
        "/write/clat_ns/max",
        "/sync/lat_ns/max",
    ]
    .iter()
    .filter_map(|at| job.pointer(at)?.as_f64())
    .fold(0.0, f64::max)
        / 1e6
}

/// A node with a volume `data` attached, with ext4 on /mnt.
fn mounted(cluster: &Cluster, network: &Network, size: &str) -> AttachNode {
    cluster.volume("data", size, 3);
    let mut node = AttachNode::boot(network, cluster, 1, "node-1");
    node.json("attach data");
    node.ok("mkfs.ext4 -q -b 4096 /dev/nbd0 && mount /dev/nbd0 /mnt");
    node
}

/// Waits until requests are under way on /dev/nbd0.
fn wait_busy(node: &mut AttachNode) {
    node.ok(
        "a=$(awk '{print $5}' /sys/block/nbd0/stat); for i in $(seq 200); do \
         b=$(awk '{print $5}' /sys/block/nbd0/stat); [ $((b-a)) -gt 200 ] && exit 0; sleep 0.05; done; exit 1",
    );
}

/// Waits until the attachment is in this state.
fn wait_state(node: &mut AttachNode, state: &str) {
    node.ok(&format!(
        "for i in $(seq 300); do /share/nbd-client list | grep -q ' {state} ' && exit 0; sleep 0.05; done; \
         /share/nbd-client list; exit 1"
    ));
}

/// The file system is whole, and the kernel has seen no error.
fn check_clean(node: &mut AttachNode) {
    node.ok(
        "cd /; dmesg | grep -iE 'i/o error|ext4-fs error|aborted journal|remounting' && exit 1; umount /mnt && e2fsck -fn /dev/nbd0",
    );
}

/// Where a node's service shows its metrics.
const METRICS_PORT: u16 = 9190;

/// What the service shows is documented, and moved while the device was written and read.
fn check_metrics(before: &Exposition, after: &Exposition) {
    after.check_documented("nbd-client").unwrap();
    let attached = [("state", "attached")];
    assert_eq!(after.value("ashlar_node_attachments", &attached), Some(1.0));
    for operation in ["read", "write"] {
        for name in [
            "ashlar_volume_requests_total",
            "ashlar_volume_bytes_total",
            "ashlar_volume_request_duration_seconds_count",
        ] {
            let labels = [("volume", "data"), ("operation", operation)];
            let value = |shown: &Exposition| shown.value(name, &labels).unwrap_or(0.0);
            let grown = value(after) - value(before);
            assert!(grown > 10.0, "{name} {operation}: {grown}");
        }
    }
}

#[test]
fn a_volume_becomes_a_device_with_a_file_system_and_goes_again() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    cluster.volume("data", "1GiB", 3);
    let mut node = AttachNode::boot(&network, &cluster, 1, "node-1");
    // As before, but to be watched.
    node.ok("kill $(cat /share/nbd.pid); while kill -0 $(cat /share/nbd.pid) 2>/dev/null; do sleep 0.05; done");
    node.start_service_with(&format!("--metrics 127.0.0.1:{METRICS_PORT}"));
    node.wait_service();

    let made = node.json("attach data --probe-data");
    assert_eq!(made["device"], "/dev/nbd0", "{made}");
    assert_eq!(
        (&made["has_data"], &made["state"]),
        (&false.into(), &"attached".into())
    );
    assert_eq!(made["size_bytes"], 1_u64 << 30);
    let again = node.json("attach data --probe-data");
    assert_eq!(again, made, "attaching again changes nothing");
    let text = node.refused("attach data --read-only");
    assert!(text.contains("other options"), "{text}");
    node.ok("test $(blockdev --getsize64 /dev/nbd0) = $((1<<30)) && mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt");
    let before = node.metrics(METRICS_PORT);
    node.ok(&fio(5));
    check_metrics(&before, &node.metrics(METRICS_PORT));
    let text = node.refused("detach data");
    assert!(text.contains("unmount it first"), "{text}");
    node.ok("dmesg | grep -i 'nbd.*error' && exit 1; umount /mnt");
    let probed = node.json("attach data --probe-data");
    assert_eq!(probed["has_data"], true);
    node.json("detach data");
    node.json("detach data");
    assert_eq!(node.json("list"), serde_json::json!([]));
    let gone = node.metrics(METRICS_PORT);
    assert_eq!(gone.value("ashlar_node_attachments", &[]), Some(0.0));
    assert_eq!(gone.value("ashlar_volume_serving", &[]), None, "{gone:?}");
    let volume = cluster.json(&["volume", "show", "data"]);
    assert!(volume["holder"].is_null(), "{volume}");

    node.json("attach data");
    node.ok("e2fsck -fn /dev/nbd0");
    // The kernel's own view, also of a device of which this service knows nothing.
    assert_eq!(node.attachment("data")["connected"], true);
    let forget = "mkdir /share/aside && mv /share/state/attachments/* /share/aside";
    node.ok(&format!("kill -9 $(cat /share/nbd.pid); {forget}"));
    node.start_service();
    node.wait_service();
    assert_eq!(node.json("list"), serde_json::json!([]));
    let text = node.ok("/share/nbd-client list");
    let id = volume["id"].as_str().unwrap();
    let line = format!("not attached by this service: /dev/nbd0 (backend \"{id}\")");
    assert!(text.contains(&line), "{text}");
    node.ok("kill -9 $(cat /share/nbd.pid); mv /share/aside/* /share/state/attachments");
    node.start_service();
    node.wait_service();
    wait_state(&mut node, "attached");
    let text = node.ok("/share/nbd-client list");
    assert!(text.contains(" connected"), "{text}");
    assert!(!text.contains("not attached by this service"), "{text}");
    let text = node.refused("attach nothing");
    assert!(text.contains("NotFound"), "{text}");
    node.json("detach data");
}

#[test]
fn fio_on_ext4_waits_while_the_process_is_killed_and_started_again() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "1GiB");
    let before = node.attachment("data");
    let run = node.background(&fio(25));
    for away in ["0", "2"] {
        wait_busy(&mut node);
        node.ok(&format!("kill -9 $(cat /share/nbd.pid); sleep {away}"));
        node.start_service();
        node.wait_service();
        wait_state(&mut node, "attached");
    }
    let (status, output) = node.finish(run, MINUTE * 2);
    assert_eq!(status, 0, "{output}\n{}", node.log_tail());
    println!("two crashes: longest request {:.0} ms", longest_ms(&node));
    let after = node.attachment("data");
    assert_eq!(after["device"], before["device"]);
    assert!(after["epoch"].as_u64() > before["epoch"].as_u64());
    check_clean(&mut node);
    node.json("detach data");
}

#[test]
fn an_upgrade_by_hand_over_costs_less_than_a_second() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "1GiB");
    let run = node.background(&fio(20));
    for _ in 0..3 {
        wait_busy(&mut node);
        let old = node.ok("cat /share/nbd.pid");
        node.start_service();
        node.ok(&format!(
            "for i in $(seq 300); do kill -0 {} 2>/dev/null || exit 0; sleep 0.05; done; exit 1",
            old.trim()
        ));
        node.wait_service();
    }
    let (status, output) = node.finish(run, MINUTE * 2);
    assert_eq!(status, 0, "{output}\n{}", node.log_tail());
    let log = std::fs::read_to_string(node.share("nbd.log")).unwrap();
    let passed = log.matches("passed_count=2").count();
    assert_eq!(passed, 3, "each upgrade passed both connections\n{log}");
    let longest = longest_ms(&node);
    println!("three upgrades: longest request {longest:.0} ms");
    assert!(longest < 1000.0, "{longest} ms\n{log}");
    check_clean(&mut node);
    node.json("detach data");
}

#[test]
fn a_process_that_ends_in_order_leaves_its_devices_waiting() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "1GiB");
    let run = node.background(&fio(15));
    wait_busy(&mut node);
    node.ok("kill $(cat /share/nbd.pid); while kill -0 $(cat /share/nbd.pid) 2>/dev/null; do sleep 0.05; done; sleep 1");
    // The volume stays held: nobody else gets it meanwhile.
    let volume = cluster.json(&["volume", "show", "data"]);
    assert!(!volume["holder"].is_null(), "{volume}");
    node.start_service();
    node.wait_service();
    let (status, output) = node.finish(run, MINUTE * 2);
    assert_eq!(status, 0, "{output}\n{}", node.log_tail());
    println!(
        "SIGTERM and a start: longest request {:.0} ms",
        longest_ms(&node)
    );
    check_clean(&mut node);
    node.json("detach data");
}

#[test]
fn a_device_grows_with_its_volume_under_a_mounted_file_system() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "256MiB");
    let run = node.background(&fio(8));
    wait_busy(&mut node);
    cluster.ok(&["volume", "resize", "data", "512MiB"]);
    let grown = node.json("resize data");
    assert_eq!(grown[0]["size_bytes"], 512_u64 << 20, "{grown}");
    node.ok("test $(blockdev --getsize64 /dev/nbd0) = $((512<<20)) && resize2fs /dev/nbd0 && test $(df -m --output=size /mnt | tail -1) -gt 400");
    let (status, output) = node.finish(run, MINUTE);
    assert_eq!(status, 0, "{output}");
    // It keeps its size, and grows again, across a restart.
    cluster.ok(&["volume", "resize", "data", "768MiB"]);
    node.ok("kill -9 $(cat /share/nbd.pid)");
    node.start_service();
    node.wait_service();
    node.ok("for i in $(seq 300); do test $(blockdev --getsize64 /dev/nbd0) = $((768<<20)) && exit 0; sleep 0.05; done; exit 1");
    check_clean(&mut node);
    node.json("detach data");
}

#[test]
fn what_a_reboot_leaves_over_is_forgotten_and_nothing_is_opened() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "256MiB");
    node.ok("echo kept > /mnt/file && sync");
    let records = node.share("state/attachments");
    let count = || std::fs::read_dir(&records).unwrap().count();
    assert_eq!(count(), 1);
    let epoch = cluster.json(&["volume", "show", "data"])["epoch"].clone();
    assert!(epoch.is_u64());
    node.node.power_off();
    let log = cluster.scratch("node1").join("nbd.log");
    std::fs::remove_file(&log).unwrap();

    let mut node = AttachNode::boot(&network, &cluster, 1, "node-1");
    assert_eq!(node.json("list"), serde_json::json!([]));
    assert_eq!(count(), 0);
    let volume = cluster.json(&["volume", "show", "data"]);
    assert_eq!(volume["epoch"], epoch, "nobody opened it: {volume}");
    node.json("attach data");
    node.ok("mount /dev/nbd0 /mnt && grep -q kept /mnt/file");
    check_clean(&mut node);
    node.json("detach data");
}

#[test]
fn a_frozen_node_that_wakes_up_and_writes_is_refused() {
    if !ready() {
        return;
    }
    let network = Network::new(2);
    let cluster = Cluster::up(network.cluster());
    cluster.volume("data", "256MiB", 3);
    let mut old = AttachNode::boot(&network, &cluster, 1, "node-1");
    let mut new = AttachNode::boot(&network, &cluster, 2, "node-2");
    old.json("attach data");
    let writer = old.background(
        "n=0; while true; do n=$((n+1)); printf '%-4096d' $n | dd of=/dev/nbd0 bs=4096 count=1 oflag=direct status=none \
         || exit 7; echo $n > /share/next; mv /share/next /share/last; done",
    );
    // Renamed, so that a freeze never leaves it empty.
    old.ok("for i in $(seq 200); do [ \"$(cat /share/last 2>/dev/null)\" -gt 20 ] && exit 0; sleep 0.05; done; exit 1");
    old.node.freeze();
    let text = new.refused("attach data");
    assert!(
        text.contains("FailedPrecondition"),
        "held elsewhere: {text}"
    );
    new.json("attach data --force");
    let last: u64 = std::fs::read_to_string(old.share("last"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let read = "dd if=/dev/nbd0 bs=4096 count=1 iflag=direct status=none";
    let found: u64 = new.ok(read).trim().parse().unwrap();
    assert!(found >= last, "{last} was acknowledged, {found} is there");
    new.ok("printf '%-4096s' new | dd of=/dev/nbd0 bs=4096 count=1 oflag=direct status=none");
    old.node.thaw();
    let (status, output) = old.finish(writer, MINUTE);
    assert_eq!(status, 7, "the old node's writes fail: {output}");
    assert_eq!(new.ok(read).trim(), "new");
    let fenced = old.attachment("data");
    assert_eq!(fenced["state"], "fenced", "{fenced}");
    let text = old.refused("attach data");
    assert!(text.contains("detach it before"), "{text}");
    old.json("detach data");
    assert_eq!(old.json("list"), serde_json::json!([]));
    assert_eq!(new.attachment("data")["state"], "attached");
    new.json("detach data");
}

#[test]
fn a_read_only_device_is_read_and_not_written() {
    if !ready() {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    let mut node = mounted(&cluster, &network, "256MiB");
    node.ok("echo kept > /mnt/file && umount /mnt");
    node.json("detach data");
    let made = node.json("attach data --read-only --block-size 4096");
    assert_eq!(
        (&made["read_only"], &made["block_size"]),
        (&true.into(), &4096.into())
    );
    node.ok(
        "test $(blockdev --getro /dev/nbd0) = 1 && test $(blockdev --getss /dev/nbd0) = 4096 \
         && mount -o ro,noload /dev/nbd0 /mnt && grep -q kept /mnt/file && umount /mnt",
    );
    node.ok("dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 oflag=direct && exit 1; exit 0");
    node.json("detach data");
}

/// Loads what loop devices are made of.
const LOAD_LOOP: &str = "for m in fuse loop; do insmod $(find /lib/modules/$(uname -r)/ -name $m.ko) 2>/dev/null || true; done; \
                         test -e /dev/fuse && test -e /dev/loop-control";

/// Nothing is left of a loop device.
const NO_LOOP: &str = "for i in $(seq 100); do \
     { losetup -a; mount | grep fuse.nbdfuse; pgrep nbdfuse; ls /share/state/loop; } > /tmp/left 2>&1; \
     [ -s /tmp/left ] || exit 0; sleep 0.05; done; cat /tmp/left; exit 1";

#[test]
fn a_loop_device_outlives_an_upgrade_and_is_reported_as_broken_after_a_crash() {
    if !ready() || !have(&["nbdfuse", "losetup"]) {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    cluster.volume("data", "256MiB", 3);
    let mut node = AttachNode::boot_with(&network, &cluster, 1, "node-1", LOAD_LOOP);
    node.json("attach data --device loop");
    node.ok("mkfs.ext4 -q /dev/loop0 && mount /dev/loop0 /mnt && echo kept > /mnt/file && sync");
    // An upgrade passes the connections on: nothing breaks, also while requests are under way.
    let run = node.background(&fio(8));
    node.ok(
        "for i in $(seq 200); do ls /mnt/v.* >/dev/null 2>&1 && exit 0; sleep 0.05; done; exit 1",
    );
    let old = node.ok("cat /share/nbd.pid");
    node.start_service();
    node.ok(&format!(
        "for i in $(seq 300); do kill -0 {} 2>/dev/null || exit 0; sleep 0.05; done; exit 1",
        old.trim()
    ));
    node.wait_service();
    wait_state(&mut node, "attached");
    let (status, output) = node.finish(run, MINUTE * 2);
    assert_eq!(status, 0, "{output}\n{}", node.log_tail());
    node.ok("echo more > /mnt/more && sync && echo 3 > /proc/sys/vm/drop_caches && grep -q kept /mnt/file");
    // A crash does, and that is said.
    node.ok("kill -9 $(cat /share/nbd.pid)");
    node.start_service();
    node.wait_service();
    let broken = node.attachment("data");
    assert_eq!(
        (&broken["state"], &broken["device"]),
        (&"broken".into(), &"/dev/loop0".into()),
        "{broken}"
    );
    assert!(
        broken["detail"].as_str().unwrap().contains("unmount it"),
        "{broken}"
    );
    for command in ["attach data --device loop", "detach data"] {
        let text = node.refused(command);
        assert!(
            text.contains("unmount it") || text.contains("under way"),
            "{text}"
        );
    }
    node.ok("cat /mnt/* > /dev/null; umount /mnt");
    // It goes by itself, and the volume is not held for ever.
    node.ok("for i in $(seq 400); do [ \"$(/share/nbd-client list -o json)\" = '[]' ] && exit 0; sleep 0.05; done; exit 1");
    node.ok(NO_LOOP);
    let volume = cluster.json(&["volume", "show", "data"]);
    assert!(volume["holder"].is_null(), "{volume}");
    node.json("attach data --device loop");
    node.ok("e2fsck -fy /dev/loop0 > /dev/null; mount /dev/loop0 /mnt && grep -q kept /mnt/file && grep -q more /mnt/more && umount /mnt");
    node.json("detach data");
}

#[test]
fn a_kernel_without_nbd_says_so_and_loop_devices_work() {
    if !ready() || !have(&["nbdfuse", "losetup"]) {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    cluster.volume("data", "256MiB", 3);
    let mut node = AttachNode::boot_with(&network, &cluster, 1, "node-1", LOAD_LOOP);
    // Whoever loads modules by itself finds none.
    node.ok("mount -t tmpfs none /lib/modules");
    let text = node.refused("attach data");
    assert!(
        text.contains("modprobe nbd") && text.contains("--device loop"),
        "{text}"
    );
    let made = node.json("attach data --device loop");
    assert_eq!(
        (&made["kind"], &made["device"]),
        (&"loop".into(), &"/dev/loop0".into())
    );
    node.ok("mkfs.ext4 -q /dev/loop0 && mount /dev/loop0 /mnt && echo kept > /mnt/file && sync");
    let text = node.refused("detach data");
    assert!(text.contains("unmount it first"), "{text}");
    node.ok("umount /mnt");
    node.json("detach data");
    node.ok("losetup -a | grep . && exit 1; mount | grep fuse.nbdfuse && exit 1; exit 0");
    node.json("attach data --device loop --read-only");
    node.ok("mount -o ro,noload /dev/loop0 /mnt && grep -q kept /mnt/file && umount /mnt");
    node.json("detach data");
}
