//! The life of volumes on nodes: kubelet-like sequences against the driver in user-mode Linux nodes, with real kernel
//! NBD, mounts and file systems.
#![expect(clippy::unwrap_used, reason = "tests")]

use ashlar_tests::e2e::csi::CsiNode;
use ashlar_tests::e2e::uml::{Network, PROGRAMS};
use ashlar_tests::e2e::{Cluster, have, wait_until};
use std::time::Duration;
use tonic::Code;

struct World {
    nodes: Vec<CsiNode>,
    cluster: Cluster,
    network: Network,
}

/// A cluster and nodes; None if the machine lacks something.
fn world(nodes: u32) -> Option<World> {
    let mut programs = PROGRAMS.to_vec();
    programs.extend([
        "mkfs.ext4",
        "mkfs.xfs",
        "xfs_growfs",
        "e2fsck",
        "resize2fs",
        "blkid",
    ]);
    if !have(&programs) {
        return None;
    }
    let network = Network::new(nodes);
    let cluster = Cluster::up(network.cluster());
    cluster.ok(&["pool", "create", "default"]);
    let nodes = (1..=nodes)
        .map(|n| CsiNode::boot(&network, &cluster, n))
        .collect();
    Some(World {
        nodes,
        cluster,
        network,
    })
}

#[test]
fn data_written_on_one_node_are_there_on_the_other() {
    let Some(mut world) = world(2) else { return };
    for fs in ["ext4", "xfs"] {
        let [first, second] = &mut world.nodes[..] else {
            panic!()
        };
        let volume = first.ok(&format!("csi create data-{fs} $((512<<20)) --fs {fs}"));
        first.ok(&format!(
            "t=$(csi up {volume} --node node-1 --fs {fs})\nseq 100000 >$t/numbers; test $(stat -f -c %T $t) != tmpfs\n\
             csi down {volume} --node node-1 --fs {fs}\ntest ! -e $t"
        ));
        second.ok(&format!(
            "t=$(csi up {volume} --node node-2 --fs {fs})\nseq 100000 | cmp - $t/numbers\n\
             csi down {volume} --node node-2 --fs {fs}; csi delete {volume}"
        ));
    }
}

#[test]
fn a_restart_of_the_driver_has_no_effect() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    let volume = node.ok("csi create data $((256<<20))");
    let target = node.ok(&format!("csi up {volume} --node node-1"));
    let writer = node.attach.background(&format!(
        "for i in $(seq 200); do echo $i >{target}/n && sync {target}/n || exit 1; sleep 0.01; done"
    ));
    node.kill_driver();
    node.start_driver();
    let (status, output) = node.attach.finish(writer, Duration::from_secs(60));
    assert_eq!(status, 0, "{output}");
    node.ok(&format!(
        "test $(cat {target}/n) = 200\ntest $(csi up {volume} --node node-1) = {target}\n\
         test $(grep -c ' {target} ' /proc/self/mountinfo) = 1\ncsi stats {volume} --node node-1\n\
         csi down {volume} --node node-1; csi down {volume} --node node-1"
    ));
}

#[test]
fn mounted_and_raw_volumes_grow_while_they_are_in_use() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    for how in ["--fs ext4", "--fs xfs", "--block"] {
        let name = how.replace(['-', ' '], "");
        let volume = node.ok(&format!("csi create grow{name} $((320<<20)) {how}"));
        let target = node.ok(&format!("csi up {volume} --node node-1 {how}"));
        let size = match how {
            "--block" => format!("blockdev --getsize64 {target}"),
            _ => format!("echo $(($(stat -f -c '%b * %S' {target})))"),
        };
        let file = if how == "--block" {
            target.clone()
        } else {
            format!("{target}/f")
        };
        let writer = node.attach.background(&format!(
            "for i in $(seq 40); do dd if=/dev/zero of={file} bs=64k count=16 conv=notrunc,fsync status=none || exit 1; done"
        ));
        let grown = node.ok(&format!(
            "csi expand {volume} --node node-1 {how} --size $((640<<20))"
        ));
        assert_eq!(grown, (640 << 20).to_string());
        let (status, output) = node.attach.finish(writer, Duration::from_secs(60));
        assert_eq!(status, 0, "{how}: {output}");
        let now: u64 = node.ok(&size).parse().unwrap();
        assert!(now > 560 << 20, "{how}: {now}");
        node.ok(&format!("csi down {volume} --node node-1 {how}"));
    }
}

#[test]
fn a_volume_that_grew_while_it_was_not_mounted_is_as_large_when_it_is() {
    let Some(mut world) = world(1) else { return };
    let volume = world.nodes[0].ok("csi create data $((128<<20))");
    world.nodes[0].ok(&format!(
        "csi up {volume} --node node-1; csi down {volume} --node node-1"
    ));
    world.cluster.ok(&["volume", "resize", "data", "512MiB"]);
    let node = &mut world.nodes[0];
    let size: u64 = node
        .ok(&format!(
            "t=$(csi up {volume} --node node-1)\necho $(($(stat -f -c '%b * %S' $t)))"
        ))
        .parse()
        .unwrap();
    assert!(size > 440 << 20, "{size}");
}

#[test]
fn a_read_only_volume_takes_no_writes_and_may_be_read_on_two_nodes() {
    let Some(mut world) = world(2) else { return };
    let [first, second] = &mut world.nodes[..] else {
        panic!()
    };
    let volume = first.ok("csi create data $((128<<20))");
    // Read-only for one pod only.
    first.ok(&format!(
        "t=$(csi up {volume} --node node-1 --mode multi)\necho hello >$t/greeting\n\
         r=$(csi publish {volume} --node node-1 --mode multi --pod reader --readonly)\n\
         test $(cat $r/greeting) = hello\n! touch $r/x 2>/dev/null\ntouch $t/x\n\
         csi unpublish {volume} --node node-1 --pod reader\ncsi down {volume} --node node-1 --mode multi"
    ));
    // ReadOnlyMany.
    for (node, name) in [(first, "node-1"), (second, "node-2")] {
        node.ok(&format!(
            "t=$(csi up {volume} --node {name} --mode many)\ntest $(cat $t/greeting) = hello\n! touch $t/y 2>/dev/null"
        ));
    }
    let text = world.nodes[0].refused(
        Code::FailedPrecondition,
        &format!("csi publish {volume} --node node-3 --mode writer || exit $?"),
    );
    assert!(!text.is_empty());
}

#[test]
fn two_pods_of_a_node_share_a_volume_unless_it_is_for_one_pod() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    let shared = node.ok("csi create shared $((128<<20)) --mode multi");
    node.ok(&format!(
        "a=$(csi up {shared} --node node-1 --mode multi)\nb=$(csi up {shared} --node node-1 --mode multi --pod b)\n\
         echo hi >$a/f; test $(cat $b/f) = hi\ncsi unpublish {shared} --node node-1\ntest $(cat $b/f) = hi"
    ));
    let text = node.refused(
        Code::FailedPrecondition,
        &format!("csi unstage {shared} --node node-1"),
    );
    assert!(text.contains("/pods/b/"), "{text}");
    node.ok(&format!("csi down {shared} --node node-1 --pod b"));
    for how in ["", "--block"] {
        let own = node.ok(&format!(
            "csi create own{how} $((128<<20)) --mode pod {how}"
        ));
        node.ok(&format!("csi up {own} --node node-1 --mode pod {how}"));
        let text = node.refused(
            Code::FailedPrecondition,
            &format!("csi publish {own} --node node-1 --mode pod --pod b {how}"),
        );
        assert!(text.contains("one pod only"), "{text}");
        node.ok(&format!(
            "csi up {own} --node node-1 --mode pod {how}; csi down {own} --node node-1 {how}"
        ));
    }
}

#[test]
fn a_device_that_holds_anything_is_never_formatted() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    // Data without a signature, a foreign file system, and a file system whose beginning was lost.
    let cases = [
        (
            "raw",
            "dd if=/dev/urandom of=$t bs=1M seek=9 count=1 conv=notrunc status=none",
            "",
        ),
        ("swap", "mkswap $t >/dev/null", ""),
        ("other", "mkfs.xfs -q -f $t", "--fs ext4"),
    ];
    for (name, spoil, how) in cases {
        let volume = node.ok(&format!("csi create {name} $((320<<20)) --block"));
        let sum = node.ok(&format!(
            "t=$(csi up {volume} --node node-1 --block)\n{spoil}\nsync; md5sum <$t\ncsi down {volume} --node node-1 --block"
        ));
        let text = node.refused(
            Code::FailedPrecondition,
            &format!("csi up {volume} --node node-1 {how}"),
        );
        assert!(text.contains("it holds"), "{text}");
        let after = node.ok(&format!(
            "csi unstage {volume} --node node-1\nt=$(csi up {volume} --node node-1 --block)\nmd5sum <$t\n\
             csi down {volume} --node node-1 --block"
        ));
        assert_eq!(sum, after, "{name}");
    }
    let volume = node.ok("csi create damaged $((128<<20))");
    node.ok(&format!(
        "csi up {volume} --node node-1; csi down {volume} --node node-1\nt=$(csi up {volume} --node node-1 --block)\n\
         dd if=/dev/zero of=$t bs=1M count=1 conv=notrunc,fsync status=none\ncsi down {volume} --node node-1 --block"
    ));
    let text = node.refused(
        Code::FailedPrecondition,
        &format!("csi up {volume} --node node-1"),
    );
    assert!(text.contains("was formatted"), "{text}");
}

#[test]
fn mount_and_mkfs_options_reach_the_kernel() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    let ext4 = node.ok(
        "csi create ext4 $((128<<20)) --param 'mkfsOptions=-L mylabel -m 3' --param blockSize=4096",
    );
    node.ok(&format!(
        "t=$(csi up {ext4} --node node-1 --flag noatime --flag nodev,data=journal)\n\
         grep \" $t \" /proc/self/mountinfo | grep noatime | grep nodev | grep data=journal\n\
         d=$(findmnt -n -o SOURCE --target $t | head -1)\ntest $(blkid -p -s LABEL -o value $d) = mylabel\n\
         test $(blockdev --getss $d) = 4096\ndumpe2fs -h $d 2>/dev/null | grep features | grep -v orphan_file\n\
         csi down {ext4} --node node-1"
    ));
    let xfs = node.ok("csi create xfs $((320<<20)) --param csi.storage.k8s.io/fstype=xfs");
    node.ok(&format!(
        "t=$(csi up {xfs} --node node-1)\ngrep \" $t \" /proc/self/mountinfo | grep ' xfs ' | grep nouuid"
    ));
    let text = node.refused(
        Code::Internal,
        "v=$(csi create bad $((128<<20))); csi up $v --node node-1 --flag no-such-option",
    );
    assert!(
        !text.contains("no-such-option"),
        "mount options are not for logs: {text}"
    );
}

#[test]
fn fstrim_of_a_mounted_file_system_frees_space_on_every_disk_unless_a_snapshot_holds_it() {
    let Some(mut world) = world(1) else { return };
    let (node, cluster) = (&mut world.nodes[0], &world.cluster);
    // With the file's 100 MiB, and without: xfs keeps a log of 64 MiB.
    for (fs, most, rest) in [("ext4", 160, 40), ("xfs", 240, 99)] {
        let volume = node.ok(&format!("csi create {fs} $((512<<20)) --fs {fs}"));
        let target = node.ok(&format!("csi up {volume} --node node-1 --fs {fs}"));
        let write = format!(
            "dd if=/dev/urandom of={target}/f bs=1M count=100 conv=fsync status=none; sync"
        );
        let trim = format!("rm {target}/f; sync; fstrim {target}");
        node.ok(&write);
        cluster.wait_used_mib(100, most);
        node.ok(&trim);
        cluster.wait_used_mib(0, rest);
        node.ok(&write);
        cluster.ok(&["snapshot", "create", fs, "--name", fs]);
        node.ok(&trim);
        std::thread::sleep(Duration::from_secs(5));
        cluster.wait_used_mib(100, most);
        cluster.ok(&["snapshot", "delete", fs, "--yes"]);
        cluster.wait_used_mib(0, rest);
        node.ok(&format!(
            "csi down {volume} --node node-1 --fs {fs}; csi delete {volume}"
        ));
        cluster.wait_used_mib(0, 1);
    }
}

#[test]
fn statistics_are_of_the_volume() {
    let Some(mut world) = world(1) else { return };
    let node = &mut world.nodes[0];
    let volume = node.ok("csi create data $((256<<20))");
    let text = node.ok(&format!(
        "t=$(csi up {volume} --node node-1)\ndd if=/dev/urandom of=$t/f bs=1M count=50 conv=fsync status=none\ntouch $t/a $t/b\n\
         csi stats {volume} --node node-1"
    ));
    let lines: Vec<Vec<u64>> = text
        .lines()
        .map(|l| l.split(' ').skip(1).map(|n| n.parse().unwrap()).collect())
        .collect();
    assert!(
        text.starts_with("BYTES") && text.contains("\nINODES"),
        "{text}"
    );
    let [total, used, available] = lines[0][..] else {
        panic!("{text}")
    };
    assert!(
        used >= 50 << 20 && total > 200 << 20 && total >= used + available,
        "{text}"
    );
    let [total, used, available] = lines[1][..] else {
        panic!("{text}")
    };
    assert!(used >= 13 && total == used + available, "{text}");
    node.refused(
        Code::NotFound,
        &format!("csi stats {volume} --node node-1 --pod nobody"),
    );
    let block = node.ok("csi create block $((256<<20)) --block");
    let text = node.ok(&format!(
        "csi up {block} --node node-1 --block >/dev/null\ncsi stats {block} --node node-1 --block"
    ));
    assert_eq!(text, format!("BYTES {} 0 0", 256 << 20));
}

#[test]
fn a_volume_of_a_node_that_lost_its_power_is_there_on_another_with_every_fsync() {
    let Some(mut world) = world(2) else { return };
    let volume = world.nodes[0].ok("csi create data $((256<<20))");
    let target = world.nodes[0].ok(&format!("csi up {volume} --node node-1"));
    let share = world.nodes[0].attach.share("acknowledged");
    world.nodes[0].attach.background(&format!(
        "n=0; while true; do n=$((n+1)); echo $n >{target}/f$n && sync {target}/f$n {target} || exit 1\n\
         echo $n >/share/acknowledged.tmp; mv /share/acknowledged.tmp /share/acknowledged; done"
    ));
    let acknowledged = || {
        let text = std::fs::read_to_string(&share).ok()?;
        text.trim().parse::<u32>().ok()
    };
    wait_until("some fsyncs", Duration::from_secs(60), || {
        acknowledged().filter(|n| *n > 50)
    });
    let dead = world.nodes.remove(0);
    dead.attach.node.power_off();
    let reported = acknowledged().unwrap();
    // What the attacher does for a node with the out-of-service taint.
    let node = &mut world.nodes[0];
    node.ok(&format!("csi detach {volume} --node node-1"));
    let text = node.ok(&format!(
        "t=$(csi up {volume} --node node-2)\nfor n in $(seq {reported}); do test \"$(cat $t/f$n)\" = $n || echo lost $n; done"
    ));
    assert_eq!(text, "");
    let _ = &world.network;
}

#[test]
fn leftovers_of_a_reboot_are_removed_if_they_are_empty_and_kept_if_not() {
    let Some(mut world) = world(1) else { return };
    let volume = world.nodes[0].ok("csi create data $((128<<20))");
    let target = world.nodes[0].ok(&format!(
        "t=$(csi up {volume} --node node-1)\necho kept >$t/f; sync $t/f; echo $t"
    ));
    let old = world.nodes.remove(0);
    old.attach.node.power_off();
    let mut node = CsiNode::boot(&world.network, &world.cluster, 1);
    // The directories survived, the mounts did not, and somebody wrote below.
    node.ok(&format!("mkdir -p {target}; echo precious >{target}/below"));
    let text = node.refused(
        Code::FailedPrecondition,
        &format!("csi unpublish {volume} --node node-1"),
    );
    assert!(text.contains("not deleted"), "{text}");
    node.ok(&format!(
        "test $(cat {target}/below) = precious; rm {target}/below\ncsi down {volume} --node node-1\ntest ! -e {target}\n\
         t=$(csi up {volume} --node node-1)\ntest $(cat $t/f) = kept"
    ));
    world.nodes.push(node);
}
