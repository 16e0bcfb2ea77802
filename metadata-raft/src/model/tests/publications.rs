//! Nodes that attach, publications, formats, and images of the version before them.

use super::*;

fn node_id(n: u8) -> NodeId {
    NodeId(id16(n))
}

pub(super) fn open_on(by: u8, node: NodeId, force: bool) -> Operation {
    Operation::OpenVolume(OpenVolume {
        volume: VOLUME,
        client: client(by),
        node,
        client_name: format!("client {by}"),
        force,
    })
}

pub(super) fn publish(node: &str, mode: AttachMode) -> Operation {
    Operation::PublishVolume {
        volume: VOLUME,
        node: node.into(),
        mode,
    }
}

pub(super) fn unpublish(node: &str) -> Operation {
    Operation::UnpublishVolume {
        volume: VOLUME,
        node: node.into(),
    }
}

fn attacher(name: &str, labels: &[(&str, &str)]) -> Operation {
    let labels = labels
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    Operation::RegisterAttacher(Attacher {
        name: name.into(),
        labels,
        address: String::new(),
    })
}

fn format(state: FormatState, fs_type: &str) -> Operation {
    Operation::SetVolumeFormat {
        volume: VOLUME,
        format: Format {
            state,
            fs_type: fs_type.into(),
        },
    }
}

fn node_of(answer: Answer) -> Node {
    match answer {
        Answer::Node(node) => node,
        other => panic!("{other:?}"),
    }
}

use AttachMode::{Exclusive, ReadOnly};
use RefusalCode::{AlreadyExists, FailedPrecondition, NotFound};

#[test]
fn a_published_volume_is_opened_only_on_its_node() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(publish("node-1", Exclusive));
    for (node, named) in [
        (node_id(2), "on node node-2"),
        (NodeId::NIL, "on no registered node"),
    ] {
        for force in [false, true] {
            let refusal = m.run(open_on(1, node, force)).unwrap_err();
            assert_eq!(refusal.code, FailedPrecondition);
            assert!(refusal.message.contains("published to node node-1"));
            assert!(refusal.message.contains(named), "{}", refusal.message);
        }
    }
    assert_eq!(m.volume().epoch, Epoch(0));
    m.ok(open_on(1, node_id(1), false));
    assert_eq!(
        m.refused(open_on(2, node_id(1), false)),
        FailedPrecondition,
        "another client on the node still needs force"
    );
    m.ok(open_on(1, node_id(1), false));
    assert_eq!(
        m.volume().epoch,
        Epoch(2),
        "the same client, started again, has its own back"
    );
}

#[test]
fn publishing_says_who_is_in_the_way() {
    let mut m = Machine::with_volume(3, 3);
    assert_eq!(m.refused(publish("node-9", Exclusive)), NotFound);
    m.ok(publish("node-1", Exclusive));
    let before = m.volume().clone();
    m.ok(publish("node-1", Exclusive));
    assert_eq!(*m.volume(), before, "the same again changes nothing");
    assert_eq!(m.refused(publish("node-1", ReadOnly)), AlreadyExists);
    for mode in [Exclusive, ReadOnly] {
        let refusal = m.run(publish("node-2", mode)).unwrap_err();
        assert_eq!(refusal.code, FailedPrecondition);
        assert!(refusal.message.contains("node-1"), "{}", refusal.message);
    }
    m.ok(unpublish(""));
    m.ok(publish("node-1", ReadOnly));
    m.ok(publish("node-2", ReadOnly));
    assert_eq!(m.refused(publish("node-3", Exclusive)), FailedPrecondition);
    assert_eq!(m.refused(publish("node-2", Exclusive)), AlreadyExists);
    assert_eq!(m.volume().publications.len(), 2);
    assert_eq!(
        m.refused(Operation::DeleteVolume(VOLUME)),
        FailedPrecondition
    );
    m.ok(unpublish(""));
    m.ok(Operation::DeleteVolume(VOLUME));
    assert_eq!(m.refused(publish("node-1", Exclusive)), NotFound);
    assert_eq!(m.refused(unpublish("node-1")), NotFound);
}

#[test]
fn unpublishing_ends_the_holders_epoch() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(publish("node-1", Exclusive));
    m.ok(open_on(1, node_id(1), false));
    assert!(m.change(1, 1, 1, Stale));
    m.ok(begin(2, 1));
    assert_eq!(m.state.rebuilding(), 1);
    m.ok(unpublish("node-2"));
    assert_eq!(m.volume().epoch, Epoch(3), "that node never had it");
    m.ok(unpublish("node-1"));
    let volume = m.volume();
    assert_eq!(volume.epoch, Epoch(4));
    assert!(volume.holder.is_none() && !volume.clean && volume.publications.is_empty());
    assert_eq!(m.state.rebuilding(), 0);
    assert!(!m.change(1, 3, 2, Stale), "the former holder is refused");
    assert_eq!(m.refused(close(1, 3, true)), FailedPrecondition);
    m.ok(unpublish("node-1"));
    assert_eq!(m.volume().epoch, Epoch(4), "once");
    m.ok(publish("node-2", Exclusive));
    match m.ok(open_on(2, node_id(2), false)) {
        Answer::Opened {
            volume,
            previous_clean,
        } => assert!(volume.epoch == Epoch(5) && !previous_clean),
        other => panic!("{other:?}"),
    }
}

#[test]
fn unpublishing_after_a_clean_close_leaves_the_volume_clean() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(publish("node-1", Exclusive));
    m.ok(open_on(1, node_id(1), false));
    m.ok(close(1, 1, true));
    m.ok(unpublish(""));
    assert!(m.volume().clean && m.volume().epoch == Epoch(1));
}

#[test]
fn a_client_that_was_never_published_is_not_fenced_by_publications() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(open_on(1, node_id(1), false));
    for node in ["", "node-1", "node-2"] {
        m.ok(unpublish(node));
    }
    assert_eq!(m.volume().holder.as_ref().unwrap().epoch, Epoch(1));
    let refusal = m.run(publish("node-2", Exclusive)).unwrap_err();
    assert_eq!(refusal.code, FailedPrecondition);
    assert!(refusal.message.contains("client 1 on node node-1"));
    m.ok(publish("node-1", Exclusive));
    assert_eq!(m.volume().epoch, Epoch(1), "on its own node it goes on");
    m.ok(unpublish("node-1"));
    assert!(m.volume().holder.is_none());
}

#[test]
fn one_of_several_readers_loses_the_volume_alone() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(publish("node-1", ReadOnly));
    m.ok(publish("node-2", ReadOnly));
    m.ok(open_on(1, node_id(1), false));
    m.ok(unpublish("node-2"));
    assert!(m.volume().holder.is_some());
    m.ok(publish("node-2", ReadOnly));
    m.ok(unpublish("node-1"));
    assert!(m.volume().holder.is_none());
    assert_eq!(m.volume().publications.len(), 1);
}

#[test]
fn a_storage_daemon_takes_over_the_node_of_its_name() {
    let mut m = Machine::with_volume(3, 3);
    let first = node_of(m.ok(attacher("worker", &[("zone", "a"), ("rack", "1")])));
    assert_eq!(first.id, attacher_id("worker"));
    assert_ne!(first.id, attacher_id("worker-2"));
    m.ok(publish("worker", Exclusive));
    m.ok(open_on(1, first.id, false));
    let daemon = Node {
        id: node_id(50),
        name: "worker".into(),
        labels: [("zone".to_owned(), "b".to_owned())].into(),
        admin_address: "10.0.0.50:1".into(),
    };
    let taken = node_of(m.ok(Operation::RegisterNode(daemon.clone())));
    let labels = |node: &Node| (node.labels["zone"].clone(), node.labels["rack"].clone());
    assert_eq!(
        (taken.id, labels(&taken)),
        (daemon.id, ("b".into(), "1".into()))
    );
    assert!(m.state.node(first.id).is_none());
    // The client goes on under the identity that it knows, and under the new one.
    m.ok(open_on(1, first.id, false));
    m.ok(open_on(1, daemon.id, false));
    // Its node says what it always said, and the daemon, started again, too.
    let again = node_of(m.ok(attacher("worker", &[("zone", "a"), ("rack", "2")])));
    assert_eq!(
        (again.id, labels(&again)),
        (daemon.id, ("b".into(), "2".into()))
    );
    assert_eq!(again.admin_address, daemon.admin_address);
    let again = node_of(m.ok(Operation::RegisterNode(daemon)));
    assert_eq!(labels(&again), ("b".into(), "2".into()));
    m.ok(unpublish("worker"));
    assert!(m.volume().holder.is_none());
}

#[test]
fn a_holder_is_fenced_although_its_node_was_renamed() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(publish("node-1", Exclusive));
    m.ok(open_on(1, node_id(1), false));
    m.ok(Operation::RegisterNode(Node {
        id: node_id(1),
        name: "renamed".into(),
        labels: Labels::new(),
        admin_address: String::new(),
    }));
    m.ok(unpublish("node-1"));
    assert!(m.volume().holder.is_none());
}

#[test]
fn what_is_formatted_stays_so() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(format(FormatState::Formatting, "ext4"));
    m.ok(format(FormatState::Formatting, "xfs"));
    m.ok(format(FormatState::Formatted, "xfs"));
    let before = m.volume().clone();
    m.ok(format(FormatState::Formatted, "xfs"));
    assert_eq!(*m.volume(), before);
    assert_eq!(
        m.refused(format(FormatState::Formatted, "ext4")),
        FailedPrecondition
    );
    assert_eq!(
        m.refused(format(FormatState::Formatting, "xfs")),
        FailedPrecondition
    );
    assert_eq!(
        m.refused(format(FormatState::Formatted, "")),
        RefusalCode::InvalidArgument
    );
}

#[test]
fn an_image_keeps_publications_formats_and_labels_of_attachers() {
    let mut m = Machine::with_volume(3, 3);
    m.ok(attacher("worker", &[("rack", "1")]));
    m.ok(publish("worker", ReadOnly));
    m.ok(publish("node-1", ReadOnly));
    m.ok(format(FormatState::Formatted, "ext4"));
    let mut image = Vec::new();
    m.state.for_image().write_image(&mut image).unwrap();
    let restored = State::read_image(&mut image.as_slice()).unwrap();
    assert_eq!(restored.volume(VOLUME), m.state.volume(VOLUME));
    assert_eq!(restored.attacher_labels, m.state.attacher_labels);
    assert_eq!(restored.attacher_labels.len(), 1);
    assert!(restored.answers.iter().eq(m.state.answers.iter()));
}

/// Both files were written by the program as it was before publications.
#[test]
fn images_and_commands_of_the_version_before_are_read() {
    let image: &[u8] = include_bytes!("../../../testdata/image-v1.bin");
    assert_eq!(image[..4], [1, 0, 0, 0]);
    let mut state = State::read_image(&mut &image[..]).unwrap();
    let volume = state.volume(VOLUME).unwrap();
    assert_eq!(volume.epoch, Epoch(3));
    assert_eq!(volume.holder.as_ref().unwrap().client, client(1));
    assert_eq!(volume.groups[0][0].state, Rebuilding);
    assert!(volume.publications.is_empty() && volume.format.is_none());
    assert_eq!(state.volume_by_name("two").unwrap().labels["team"], "blue");
    assert_eq!(state.garbage.len(), 1);
    let opened = state.answers.iter().find(|r| r.kind == 10).unwrap();
    assert!(matches!(&opened.answer, Answer::Opened { volume, .. } if volume.epoch == Epoch(1)));
    assert_eq!(state.answers.len(), 8);
    // And it goes on from there.
    let command = Command {
        request: key(1 << 100),
        operation: open_on(2, node_id(2), true),
    };
    apply(&mut state, &command).unwrap();
    let mut again = Vec::new();
    state.write_image(&mut again).unwrap();
    let again = State::read_image(&mut again.as_slice()).unwrap();
    assert_eq!(again.volumes, state.volumes);

    let bytes: &[u8] = include_bytes!("../../../testdata/commands-v1.bin");
    let commands: Vec<Command> = crate::raft::codec::decode(bytes).unwrap();
    assert_eq!(commands.len(), 8);
    assert_eq!(commands[2].operation, open(1, true));
    assert_eq!(
        crate::raft::codec::encode(&commands).unwrap(),
        bytes,
        "what older members log and send has not changed"
    );
}
