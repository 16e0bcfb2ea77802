//! Commands about who may attach a volume: nodes that attach, publications, and what a node formatted.
//!
//! Invariants:
//! - While a volume has publications its holder, if any, had one at its open: opens of other nodes are
//!   refused, and nobody publishes past a holder elsewhere.
//! - Taking the right back ends the holder's epoch in the same command: the volume has a new epoch, no
//!   holder, and is not clean. Whoever opens it next fences the replicas before any I/O (R1).
//! - Publications name nodes, not identities: a storage daemon may take a node over.

use ashlar_proto::ids::{NodeId, VolumeId};

use super::cluster::Node;
use super::command::{Answer, Attacher, Refusal, Response};
use super::volume::{AttachMode, Attachment, Format, FormatState, Volume};
use super::{State, validate};

/// FNV-1a with 128 bits.
const FNV_BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const FNV_PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

/// The identity of a node that only attaches volumes: made from its name, the same for ever.
pub fn attacher_id(name: &str) -> NodeId {
    let hash = name.bytes().fold(FNV_BASIS, |hash, byte| {
        (hash ^ u128::from(byte)).wrapping_mul(FNV_PRIME)
    });
    let mut bytes = hash.to_be_bytes();
    // A UUID of version 8: never one that a storage daemon draws.
    bytes[6] = 0x80 | (bytes[6] & 0x0f);
    bytes[8] = 0x80 | (bytes[8] & 0x3f);
    NodeId(bytes)
}

impl Volume {
    /// The nodes that it is published to, for people.
    pub(super) fn published_to(&self) -> String {
        const SHOWN: usize = 5;
        let mut text = String::from("node ");
        for (index, name) in self.publications.keys().take(SHOWN).enumerate() {
            text.push_str(if index > 0 { ", " } else { "" });
            text.push_str(name);
        }
        if let more @ 1.. = self.publications.len().saturating_sub(SHOWN) {
            text.push_str(&format!(" and {more} more"));
        }
        text
    }
}

impl State {
    /// What is known of the node of an attacher once it is registered.
    pub fn attacher_node(&self, attacher: &Attacher) -> Node {
        let id = attacher_id(&attacher.name);
        let mut node = self
            .node_by_name(&attacher.name)
            .cloned()
            .unwrap_or_else(|| Node {
                id,
                name: attacher.name.clone(),
                labels: attacher.labels.clone(),
                admin_address: String::new(),
            });
        let before = self.attacher_labels.get(&attacher.name);
        for (key, value) in &attacher.labels {
            let own = node.labels.get(key);
            let told = before.and_then(|labels| labels.get(key));
            if node.id == id || own.is_none() || own == told {
                node.labels.insert(key.clone(), value.clone());
            }
        }
        if node.id == id && !attacher.address.is_empty() {
            node.admin_address.clone_from(&attacher.address);
        }
        node
    }

    /// Whether registering an attacher would change nothing.
    pub fn knows_attacher(&self, attacher: &Attacher) -> bool {
        let told = self.attacher_labels.get(&attacher.name);
        self.node_by_name(&attacher.name) == Some(&self.attacher_node(attacher))
            && told.is_some_and(|told| attacher.labels.iter().all(|(k, v)| told.get(k) == Some(v)))
    }

    pub(super) fn register_attacher(&mut self, attacher: &Attacher) -> Response {
        validate::name("name", &attacher.name)?;
        validate::text("admin_address", &attacher.address)?;
        let mut told = self
            .attacher_labels
            .get(&attacher.name)
            .cloned()
            .unwrap_or_default();
        told.extend(attacher.labels.clone());
        validate::labels("labels", &told)?;
        let node = self.attacher_node(attacher);
        validate::labels("labels", &node.labels)?;
        if self
            .node(node.id)
            .is_some_and(|other| other.name != node.name)
        {
            return Err(Refusal::exists(format!(
                "name: the identity made from {} belongs to another node; choose another name",
                node.name
            )));
        }
        self.attacher_labels.insert(node.name.clone(), told);
        self.insert_node(node.clone());
        Ok(Answer::Node(node))
    }

    /// Whether a client that says it is on `node` is on the node of that name. An identity made from the
    /// name stays valid when a storage daemon has taken the node over with its own.
    pub(super) fn is_on(&self, node: NodeId, name: &str) -> bool {
        !node.is_nil()
            && (self.node_by_name(name).is_some_and(|n| n.id == node) || attacher_id(name) == node)
    }

    /// Whether a node may attach a volume.
    pub(super) fn check_published(&self, volume: &Volume, node: NodeId) -> Result<(), Refusal> {
        let mut published = volume.publications.keys();
        if volume.publications.is_empty() || published.any(|name| self.is_on(node, name)) {
            return Ok(());
        }
        let to = volume.published_to();
        Err(Refusal::precondition(format!(
            "volume {} is published to {to}, and this client is {}; attach it there, or unpublish it first \
             (`ashlar volume unpublish`)",
            volume.name,
            self.place(node)
        )))
    }

    /// Where a client is, for people.
    fn place(&self, node: NodeId) -> String {
        match self.node(node) {
            Some(node) => format!("on node {}", node.name),
            None if node.is_nil() => "on no registered node".to_owned(),
            None => format!("on node {node}, which is not registered"),
        }
    }

    fn held_text(&self, holder: &Attachment) -> String {
        let place = self.place(holder.node);
        format!("{} {place}", holder.client_name)
    }

    pub(super) fn publish_volume(
        &mut self,
        id: VolumeId,
        name: &str,
        mode: AttachMode,
    ) -> Response {
        let volume = self.require_volume(id)?.clone();
        if self.node_by_name(name).is_none() {
            let shown: String = name.chars().take(validate::NAME_BYTES_MAX).collect();
            return Err(Refusal::not_found(format!(
                "node_name: no node {shown:?} is registered; start nbd-client or a storage daemon there, and see \
                 `ashlar node list`"
            )));
        }
        if let Some(has) = volume.publications.get(name) {
            if *has == mode {
                return Ok(Answer::Volume(volume));
            }
            return Err(Refusal::exists(format!(
                "volume {} is published to node {name} already, {}; unpublish it there first",
                volume.name,
                mode_text(*has)
            )));
        }
        let others_read = volume
            .publications
            .values()
            .all(|m| *m == AttachMode::ReadOnly);
        if !volume.publications.is_empty() && (mode == AttachMode::Exclusive || !others_read) {
            return Err(Refusal::precondition(format!(
                "volume {} is published to {}, {}; unpublish it there first",
                volume.name,
                volume.published_to(),
                mode_text(if others_read {
                    AttachMode::ReadOnly
                } else {
                    AttachMode::Exclusive
                })
            )));
        }
        if volume.publications.len() >= validate::PUBLICATIONS_MAX {
            return Err(Refusal::exhausted(format!(
                "volume {} is published to {} nodes, which is the most; unpublish it from some",
                volume.name,
                validate::PUBLICATIONS_MAX
            )));
        }
        if let Some(holder) = &volume.holder
            && volume.publications.is_empty()
            && !self.is_on(holder.node, name)
        {
            return Err(Refusal::precondition(format!(
                "volume {} is attached by {}, without a publication; detach it there first",
                volume.name,
                self.held_text(holder)
            )));
        }
        let mut next = Volume::clone(&volume);
        next.publications.insert(name.to_owned(), mode);
        Ok(Answer::Volume(self.install(next)?))
    }

    pub(super) fn unpublish_volume(&mut self, id: VolumeId, name: &str) -> Response {
        let volume = self.require_volume(id)?.clone();
        let mut next = Volume::clone(&volume);
        if name.is_empty() {
            next.publications.clear();
        } else {
            next.publications.remove(name);
        }
        if next.publications == volume.publications {
            return Ok(Answer::Volume(volume));
        }
        // A holder had one of the publications: if it is none of those that stay, it was this one, even
        // if its node has another name meanwhile.
        let keeps = |holder: &Attachment| {
            let mut staying = next.publications.keys();
            staying.any(|name| self.is_on(holder.node, name))
        };
        if next.holder.as_ref().is_some_and(|h| !keeps(h)) {
            next.holder = None;
            next.clean = false;
            next.bump_epoch();
        }
        let before = next.readers.len();
        next.readers
            .retain(|r| !name.is_empty() && !self.is_on(r.node, name));
        next.reader_revoked |= next.readers.len() < before;
        Ok(Answer::Volume(self.install(next)?))
    }

    pub(super) fn set_volume_format(&mut self, id: VolumeId, format: &Format) -> Response {
        validate::name("format.fs_type", &format.fs_type)?;
        let volume = self.require_volume(id)?.clone();
        match &volume.format {
            Some(known) if known == format => return Ok(Answer::Volume(volume)),
            Some(known) if known.state == FormatState::Formatted => {
                return Err(Refusal::precondition(format!(
                    "volume {} is formatted with {}, and that is final; delete it and create another one to start anew",
                    volume.name, known.fs_type
                )));
            }
            _ => {}
        }
        let mut next = Volume::clone(&volume);
        next.format = Some(format.clone());
        Ok(Answer::Volume(self.install(next)?))
    }
}

fn mode_text(mode: AttachMode) -> &'static str {
    match mode {
        AttachMode::Exclusive | AttachMode::Care => "exclusively",
        AttachMode::ReadOnly => "read-only",
    }
}
