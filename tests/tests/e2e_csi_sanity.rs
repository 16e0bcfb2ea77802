//! The conformance test of CSI, csi-sanity, against the whole driver: controller and node, with real kernel NBD,
//! mounts and formats in a user-mode Linux node.
#![expect(clippy::unwrap_used, reason = "tests")]

use ashlar_tests::e2e::csi::CsiNode;
use ashlar_tests::e2e::uml::{Network, PROGRAMS};
use ashlar_tests::e2e::{Cluster, go_tool, have};

/// Groups that may be skipped: their capability is not declared, or they are the suite's own options.
const MAY_SKIP: [&str; 5] = [
    "VolumeHealth",
    "StorageHealth",
    "attach limit",
    "pagination should detect",
    "accessibility requirements",
];

fn sanity(access: &str) {
    let tool = go_tool("csi-sanity");
    let mut programs = PROGRAMS.to_vec();
    programs.extend([tool.as_str(), "mkfs.ext4", "e2fsck", "resize2fs", "blkid"]);
    if !have(&programs) {
        return;
    }
    let network = Network::new(1);
    let cluster = Cluster::up(network.cluster());
    cluster.ok(&["pool", "create", "default"]);
    let mut node = CsiNode::boot(&network, &cluster, 1);
    std::fs::copy(&tool, node.attach.share("csi-sanity")).unwrap();
    let (status, output) = node.run(&format!(
        "mkdir -p /tmp/csi; cd /tmp; timeout 170 /share/csi-sanity -csi.endpoint unix:///csi/csi.sock -csi.mountdir /tmp/csi/mount \
         -csi.stagingdir /tmp/csi/staging -csi.testvolumesize $((1<<30)) -csi.testvolumeexpandsize $((3<<29)) \
         -csi.testvolumeaccesstype {access} --ginkgo.no-color --ginkgo.junit-report /share/junit.xml"
    ));
    let summary = output
        .lines()
        .rev()
        .find(|l| l.contains("Passed"))
        .unwrap_or_default();
    let tail: Vec<_> = output.lines().rev().take(150).collect();
    let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
    let log = std::fs::read_to_string(node.attach.share("csi.log")).unwrap_or_default();
    assert_eq!(status, 0, "{tail}\n--- csi-driver\n{log}");
    println!("csi-sanity, {access}: {summary}");

    let report = std::fs::read_to_string(node.attach.share("junit.xml")).unwrap();
    let cases = report.split("<testcase ").skip(1);
    let skipped: Vec<&str> = cases
        .filter(|c| c.contains("<skipped"))
        .map(|c| {
            c.split("name=\"")
                .nth(1)
                .unwrap_or(c)
                .split('"')
                .next()
                .unwrap_or(c)
        })
        .collect();
    let unexpected: Vec<_> = skipped
        .iter()
        .filter(|name| !MAY_SKIP.iter().any(|may| name.contains(may)))
        .collect();
    assert!(unexpected.is_empty(), "skipped: {unexpected:#?}");
    // Nothing is left: no volume, no device, no mount.
    let left = node.ok("/share/nbd-client list -o json; grep nbd /proc/self/mountinfo || true");
    assert_eq!(left, "[]");
    assert_eq!(cluster.json(&["volume", "list"]), serde_json::json!([]));
    assert_eq!(cluster.json(&["snapshot", "list"]), serde_json::json!([]));
}

#[test]
fn csi_sanity_passes_with_mounted_volumes() {
    sanity("mount");
}

#[test]
fn csi_sanity_passes_with_raw_block_volumes() {
    sanity("block");
}
