//! R10 with real processes: several read-only clients of one volume, and a writer that takes it from them.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use ashlar_tests::e2e::{Cluster, ClusterSpec, Export, NbdClient, have, run_ok};
use rustix::process::Signal;

const BLOCKS: u64 = 300;

fn connect(export: &Export) -> NbdClient {
    NbdClient::connect_unix(export.socket(), "shared").unwrap()
}

fn write_all(client: &mut NbdClient, stamp: u64) {
    for block in 0..BLOCKS {
        client.write_stamp(block, stamp + block).unwrap();
    }
}

fn assert_all(client: &mut NbdClient, stamp: u64) {
    for block in 0..BLOCKS {
        assert_eq!(client.read_stamp(block).unwrap(), stamp + block);
    }
}

fn reader(cluster: &Cluster, name: &str) -> Export {
    Export::start_with(cluster, "shared", name, &["--read-only"])
}

/// A `serve` that must give up; what it said.
fn refused(cluster: &Cluster, args: &[&str]) -> String {
    let socket = cluster.scratch("refused.sock");
    let output = cluster
        .command(&ashlar_tests::e2e::binary("nbd-client"))
        .args(["serve", "--metadata", &cluster.metadata()])
        .args(["--volume", "shared", "--socket", socket.to_str().unwrap()])
        .args(args)
        .output()
        .unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn two_readers_see_the_same_and_a_writer_comes_only_by_force() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("shared", "64MiB", 3);
    let writer = Export::start(&cluster, "shared");
    write_all(&mut connect(&writer), 1000);
    assert!(writer.stop().success());

    let (first, second) = (reader(&cluster, "first"), reader(&cluster, "second"));
    let (mut one, mut two) = (connect(&first), connect(&second));
    assert_all(&mut one, 1000);
    assert_all(&mut two, 1000);
    if have(&["nbdcopy", "sha256sum"]) {
        let sums = [&first, &second].map(|export| {
            let file = cluster.scratch("copy.raw");
            run_ok("nbdcopy", &[export.uri().as_str(), file.to_str().unwrap()]);
            let sum = run_ok("sha256sum", &[&file]);
            std::fs::remove_file(&file).unwrap();
            sum
        });
        assert_eq!(sums[0], sums[1]);
    }
    assert!(one.write_stamp(0, 1).is_err(), "a reader refuses writes");
    let shown = cluster.json(&["volume", "show", "shared"]);
    assert_eq!(shown["readers"].as_array().unwrap().len(), 2);
    let why = refused(&cluster, &[]);
    assert!(why.contains("attached read-only by"), "{why}");

    // One reader is frozen, as on a machine that stands still; the other one learns of the writer at once.
    second.signal(Signal::STOP);
    let late = std::thread::spawn(move || two.read_stamp(7));
    let writer = Export::start_with(&cluster, "shared", "writer", &["--force"]);
    let mut first = first;
    assert!(!first.wait_end(Duration::from_secs(10)).success());
    write_all(&mut connect(&writer), 5000);
    second.signal(Signal::CONT);
    assert!(
        late.join().unwrap().is_err(),
        "a fenced reader answers nothing, least of all what is old"
    );
    let mut second = second;
    assert!(!second.wait_end(Duration::from_secs(10)).success());
    assert_all(&mut connect(&writer), 5000);
    assert!(writer.stop().success());
}

#[test]
fn readers_reconcile_what_a_killed_writer_left_and_go_on_without_a_daemon() {
    let cluster = Cluster::up(ClusterSpec::default());
    cluster.volume("shared", "64MiB", 3);
    let writer = Export::start(&cluster, "shared");
    write_all(&mut connect(&writer), 100);
    writer.kill();
    // Nobody knows that the writer is dead: it is taken over by force, once.
    let first = Export::start_with(&cluster, "shared", "first", &["--read-only", "--force"]);
    let second = reader(&cluster, "second");
    assert_all(&mut connect(&first), 100);
    assert_all(&mut connect(&second), 100);
    cluster.ok(&["dev", "kill", "daemon-1"]);
    assert_all(&mut connect(&first), 100);
    assert_all(&mut connect(&second), 100);
    cluster.ok(&["dev", "start", "daemon-1"]);
    assert!(first.stop().success());
    assert!(second.stop().success());
    let shown = cluster.json(&["volume", "show", "shared"]);
    assert_eq!(shown["clean"], true);
    let writer = Export::start(&cluster, "shared");
    write_all(&mut connect(&writer), 200);
    assert_all(&mut connect(&writer), 200);
}

#[test]
fn a_reader_waits_for_metadata_and_does_not_fail() {
    let cluster = Cluster::up(ClusterSpec {
        members: 1,
        ..ClusterSpec::default()
    });
    cluster.volume("shared", "64MiB", 3);
    let first = reader(&cluster, "first");
    let mut client = connect(&first);
    assert_eq!(client.read(0, 4096).unwrap(), vec![0; 4096]);
    cluster.ok(&["dev", "kill", "metadata-1"]);
    let (answered, answer) = std::sync::mpsc::channel();
    std::thread::spawn(move || while answered.send(client.read(0, 4096)).is_ok() {});
    // Within the lease reads are answered; beyond it they wait.
    while let Ok(read) = answer.recv_timeout(Duration::from_secs(2)) {
        assert_eq!(read.unwrap(), vec![0; 4096]);
    }
    cluster.ok(&["dev", "start", "metadata-1"]);
    let read = answer.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(read.unwrap(), vec![0; 4096]);
}
