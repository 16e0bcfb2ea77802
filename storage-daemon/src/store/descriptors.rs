//! Replica slots: fences, descriptors, suspicion, creation and removal. All durable before the answer.
//!
//! Invariants:
//! - A descriptor's body is durable before a header names it; both header copies are durable before the
//!   change takes effect in memory and is answered.
//! - A replica number is durable as given away (superblock) before a slot uses it.
//! - The layer list of a replica never gets older (docs/snapshots.md, S6): whatever changes it compares revisions.
//! - Requests for one volume are done in order; those for different volumes share their syncs.

use std::collections::VecDeque;

use ashlar_proto::descriptor::VolumeDescriptor;
use ashlar_proto::ids::{Epoch, PAGE_SIZE, ReplicaState, Version, VolumeId};
use ashlar_proto::layers::LayerList;
use bytes::Bytes;

use super::api::{ReplicaInfo, StoreCommand, StoreError, StoreReply, StoreRequest};
use super::replica::Replica;
use super::space::block_of;
use super::sync::{SuperblockAction, SyncAction};
use super::{Store, Target};
use crate::format::{Body, Link, ReplicaHeader, SECTOR, encode_body};

/// Most changes that share one round of syncs.
const GROUP_MAX: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Stage {
    #[default]
    Idle,
    Superblock,
    Bodies,
    BodySync,
    Headers,
    HeaderSync,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Create,
    Change,
    Fence,
    Drop,
    /// Of a link; nobody asked.
    Cut,
}

struct Item {
    tag: u64,
    slot: u32,
    header: ReplicaHeader,
    body: Option<(Vec<u8>, Body)>,
    kind: Kind,
}

/// What is queued and under way.
#[derive(Default)]
pub(super) struct AdminState {
    queue: VecDeque<(u64, StoreRequest)>,
    group: Vec<Item>,
    stage: Stage,
    outstanding: u32,
}

impl AdminState {
    pub(super) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.stage == Stage::Idle
    }

    /// A replica is or will be dropped: write-back must not begin.
    pub(super) fn is_dropping(&self) -> bool {
        self.group.iter().any(|i| i.kind == Kind::Drop)
            || self
                .queue
                .iter()
                .any(|(_, r)| matches!(r, StoreRequest::DropReplica { .. }))
    }

    pub(super) fn take_tags(&mut self) -> Vec<u64> {
        let queued = self.queue.drain(..).map(|(tag, _)| tag);
        let group = self.group.drain(..).filter(|i| i.kind != Kind::Cut);
        queued.chain(group.map(|i| i.tag)).collect()
    }
}

fn volume_of(request: &StoreRequest) -> VolumeId {
    match request {
        StoreRequest::PutFence { volume, .. }
        | StoreRequest::PutLayers { volume, .. }
        | StoreRequest::ClearSuspect { volume }
        | StoreRequest::DropReplica { volume } => *volume,
        StoreRequest::PutDescriptor { descriptor } => descriptor.volume,
        _ => VolumeId::NIL,
    }
}

fn check_layers(layers: &LayerList) -> Result<(), StoreError> {
    layers.check().map_err(|error| StoreError::Invalid(error.0))
}

fn layer_bytes(r: &Replica) -> Vec<(u32, u64)> {
    let mut sums: Vec<(u32, u64)> = Vec::new();
    for (number, pages) in &r.layer_pages {
        let (layer, bytes) = (r.canonical(*number), pages * PAGE_SIZE as u64);
        match sums.last_mut().filter(|(last, _)| *last == layer) {
            Some((_, sum)) => *sum += bytes,
            None => sums.push((layer, bytes)),
        }
    }
    sums
}

/// Puts a body into a slot's header: the area that is not in use.
fn place_body(header: &mut ReplicaHeader, body: Body) -> Result<(Vec<u8>, Body), StoreError> {
    let bytes = encode_body(&body)
        .map_err(|_| StoreError::Invalid("descriptor and layer list do not fit their slot"))?;
    header.body_area ^= 1;
    header.body_bytes = bytes.len() as u32;
    header.body_checksum = crc32c::crc32c(&bytes);
    Ok((bytes, body))
}

impl Store {
    pub(super) fn replica_info(&self, r: &Replica) -> ReplicaInfo {
        ReplicaInfo {
            volume: r.header.volume,
            fence: r.header.fence,
            rebuild_epoch: r.header.rebuild_epoch,
            suspect: r.header.trusted != self.superblock.incarnation,
            damaged: r.header.sound < self.superblock.damage_incarnation,
            watermark: r.watermark,
            highest: r.highest,
            written: r.highest > Version::ZERO || r.base.is_some(),
            pages: r.pages,
            chunks: r.chunks.len() as u64,
            descriptor: r.descriptor.clone(),
            layers: r.layers.clone(),
            garbage_left: r.garbage.len() as u64,
            layer_bytes: layer_bytes(r),
        }
    }

    pub(super) fn queue_admin(
        &mut self,
        tag: u64,
        request: StoreRequest,
        out: &mut Vec<StoreCommand>,
    ) {
        if self.admin.queue.len() >= self.config.queue_requests_max {
            return Self::reply(out, tag, Err(StoreError::Busy));
        }
        self.admin.queue.push_back((tag, request));
    }

    /// Forms the next group, if none is under way.
    pub(super) fn start_admin(&mut self, out: &mut Vec<StoreCommand>) {
        let cuts = self.flattening_done();
        if self.admin.stage != Stage::Idle || (self.admin.queue.is_empty() && cuts.is_empty()) {
            return;
        }
        let mut later = VecDeque::new();
        let mut seen: Vec<VolumeId> = Vec::new();
        let mut created = false;
        for (tag, request) in std::mem::take(&mut self.admin.queue) {
            let volume = volume_of(&request);
            let dropping = matches!(request, StoreRequest::DropReplica { .. });
            if seen.contains(&volume)
                || self.waits_for_link(&request)
                || self.admin.group.len() >= GROUP_MAX
                || (dropping
                    && !(self.burst.is_idle() && self.merge.is_idle() && self.flattening.is_idle()))
            {
                seen.push(volume);
                later.push_back((tag, request));
                continue;
            }
            match self.plan_admin(tag, request) {
                Err(error) => Self::reply(out, tag, Err(error)),
                Ok(None) => Self::reply(out, tag, Ok(StoreReply::Done)),
                Ok(Some(item)) => {
                    seen.push(volume);
                    created |= item.kind == Kind::Create;
                    self.admin.group.push(item);
                }
            }
        }
        self.admin.queue = later;
        self.plan_cuts(&cuts);
        if self.admin.group.is_empty() {
            return;
        }
        if created {
            self.admin.stage = Stage::Superblock;
            self.want_superblock(SuperblockAction::Admin);
        } else {
            self.write_bodies(out);
        }
    }

    /// Links that may be cut, unless something else is being changed of their replicas.
    fn plan_cuts(&mut self, slots: &[u32]) {
        for &slot in slots {
            let busy = self.admin.group.iter().any(|i| i.slot == slot);
            if let Some(r) = self.index.by_slot(slot).filter(|_| !busy) {
                let mut header = r.header.clone();
                header.generation += 1;
                header.link = None;
                self.admin.group.push(Item {
                    tag: 0,
                    slot,
                    header,
                    body: None,
                    kind: Kind::Cut,
                });
            }
        }
    }

    /// A link and the dropping of what it leads to are never in one group.
    fn waits_for_link(&self, request: &StoreRequest) -> bool {
        let mut group = self.admin.group.iter();
        match request {
            StoreRequest::PutFence { link: Some(l), .. } => {
                let parent = self.index.by_volume.get(&l.parent.volume);
                group.any(|i| i.kind == Kind::Drop && Some(&i.slot) == parent)
            }
            StoreRequest::DropReplica { volume } => {
                group.any(|i| i.header.link.is_some_and(|l| l.parent.volume == *volume))
            }
            _ => false,
        }
    }

    /// What a request changes; `None`: nothing.
    fn plan_admin(&mut self, tag: u64, request: StoreRequest) -> Result<Option<Item>, StoreError> {
        let volume = volume_of(&request);
        let current = self.index.replica(volume).map(|r| {
            (
                r.slot,
                r.header.clone(),
                r.descriptor.as_ref().map_or(Epoch(0), |d| d.epoch),
            )
        });
        let incarnation = self.superblock.incarnation;
        if let StoreRequest::PutFence {
            epoch,
            create: true,
            rebuild_epoch,
            link,
            ..
        } = &request
            && current.is_none()
        {
            let slot = self.free_slot().ok_or(StoreError::NoSpace)?;
            let mut header = ReplicaHeader {
                replica: self.superblock.next_replica,
                volume,
                fence: *epoch,
                rebuild_epoch: *rebuild_epoch,
                trusted: incarnation,
                sound: incarnation,
                salt: self.salt,
                generation: 1,
                ..ReplicaHeader::default()
            };
            self.plan_link(&mut header, *link)?;
            self.superblock.next_replica += 1;
            return Ok(Some(Item {
                tag,
                slot,
                header,
                body: None,
                kind: Kind::Create,
            }));
        }
        let (slot, mut header, descriptor_epoch) = current.ok_or(StoreError::UnknownVolume)?;
        header.generation += 1;
        let mut body = None;
        let mut kind = Kind::Change;
        match request {
            StoreRequest::PutFence {
                epoch,
                rebuild_epoch,
                ..
            } => {
                if epoch < header.fence {
                    return Err(StoreError::Fenced(header.fence));
                }
                header.fence = epoch;
                if rebuild_epoch > Epoch(0) {
                    header.rebuild_epoch = rebuild_epoch;
                    header.sound = incarnation;
                    // What has lost its parent's replica is rebuilt as one that never had it.
                    let tied = |l: &Link| self.index.base_of(l).is_some();
                    header.link = header.link.filter(tied);
                }
                kind = Kind::Fence;
            }
            StoreRequest::PutDescriptor { mut descriptor } => {
                let floor = header.fence.max(descriptor_epoch);
                if descriptor.epoch < floor {
                    return Err(StoreError::Fenced(floor));
                }
                check_layers(&descriptor.layers)?;
                let held = self.index.replica(volume).map(|r| &r.layers);
                if let Some(held) = held.filter(|l| l.revision >= descriptor.layers.revision) {
                    descriptor.layers = held.clone();
                }
                header.fence = descriptor.epoch;
                if self.settled_in_sync(&descriptor) {
                    header.rebuild_epoch = Epoch(0);
                }
                let new = Body {
                    layers: descriptor.layers.clone(),
                    descriptor: Some(descriptor),
                };
                body = Some(place_body(&mut header, new)?);
            }
            StoreRequest::PutLayers { layers, .. } => {
                check_layers(&layers)?;
                let Some(r) = self.index.replica(volume) else {
                    return Err(StoreError::UnknownVolume);
                };
                if layers.revision <= r.layers.revision {
                    return Ok(None);
                }
                let mut descriptor = r.descriptor.clone();
                if let Some(d) = &mut descriptor {
                    d.layers = layers.clone();
                }
                body = Some(place_body(&mut header, Body { descriptor, layers })?);
            }
            StoreRequest::ClearSuspect { .. } => header.trusted = incarnation,
            StoreRequest::DropReplica { .. } => {
                if self.index.has_clones(slot) {
                    return Err(StoreError::HasClones);
                }
                let generation = header.generation;
                header = ReplicaHeader {
                    generation,
                    salt: self.salt,
                    ..ReplicaHeader::default()
                };
                kind = Kind::Drop;
            }
            _ => return Err(StoreError::Invalid("not about a replica")),
        }
        Ok(Some(Item {
            tag,
            slot,
            header,
            body,
            kind,
        }))
    }

    /// The descriptor has this disk in sync and nowhere rebuilding.
    fn settled_in_sync(&self, descriptor: &VolumeDescriptor) -> bool {
        let mine = descriptor
            .groups
            .iter()
            .flatten()
            .filter(|r| r.disk == self.superblock.disk);
        let (mut in_sync, mut rebuilding) = (false, false);
        for r in mine {
            in_sync |= r.state == ReplicaState::InSync;
            rebuilding |= r.state == ReplicaState::Rebuilding;
        }
        in_sync && !rebuilding
    }

    fn free_slot(&self) -> Option<u32> {
        (0..self.geometry.slot_count).find(|slot| {
            self.index.by_slot(*slot).is_none()
                && self.admin.group.iter().all(|item| item.slot != *slot)
        })
    }

    fn write_bodies(&mut self, out: &mut Vec<StoreCommand>) {
        self.admin.stage = Stage::Bodies;
        let mut writes = Vec::new();
        for item in &self.admin.group {
            if let Some((bytes, _)) = &item.body {
                let offset =
                    self.slot_offset(item.slot) + ReplicaHeader::body_offset(item.header.body_area);
                let length = bytes.len().next_multiple_of(crate::format::IO_BLOCK);
                let mut buffer = ashlar_platform::buffer::AlignedBuffer::zeroed(length);
                buffer[..bytes.len()].copy_from_slice(bytes);
                writes.push((offset, buffer.freeze()));
            }
        }
        if writes.is_empty() {
            return self.write_headers(out);
        }
        self.write_all(writes, out);
    }

    fn write_headers(&mut self, out: &mut Vec<StoreCommand>) {
        self.admin.stage = Stage::Headers;
        let mut writes = Vec::new();
        for item in &self.admin.group {
            let block = block_of(&item.header.encode());
            debug_assert!(block.len() >= SECTOR);
            for copy in ReplicaHeader::COPIES {
                writes.push((self.slot_offset(item.slot) + copy, block.clone()));
            }
        }
        self.write_all(writes, out);
    }

    fn write_all(&mut self, writes: Vec<(u64, Bytes)>, out: &mut Vec<StoreCommand>) {
        self.admin.outstanding = writes.len() as u32;
        for (offset, data) in writes {
            self.write_block(Target::Admin, offset, data, out);
        }
    }

    pub(super) fn on_admin_written(&mut self, out: &mut Vec<StoreCommand>) {
        self.admin.outstanding -= 1;
        if self.admin.outstanding > 0 {
            return;
        }
        self.admin.stage = match self.admin.stage {
            Stage::Bodies => Stage::BodySync,
            _ => Stage::HeaderSync,
        };
        self.want_sync(SyncAction::Admin, out);
    }

    pub(super) fn admin_advance(&mut self, out: &mut Vec<StoreCommand>) {
        match self.admin.stage {
            Stage::Superblock => self.write_bodies(out),
            Stage::BodySync => self.write_headers(out),
            Stage::HeaderSync => {
                self.admin.stage = Stage::Idle;
                for item in std::mem::take(&mut self.admin.group) {
                    self.apply_admin(item, out);
                }
            }
            Stage::Idle | Stage::Bodies | Stage::Headers => {}
        }
    }

    fn apply_admin(&mut self, item: Item, out: &mut Vec<StoreCommand>) {
        let volume = item.header.volume;
        match item.kind {
            Kind::Drop => {
                let number = self
                    .index
                    .by_slot(item.slot)
                    .map_or(0, |r| r.header.replica);
                let mut pages = self.index.remove(item.slot, &mut self.allocator);
                // Pages that log records name are given back when those records are freed.
                let named = self.log.redirected_pages(number);
                pages.retain(|p| !named.contains(p));
                self.release_later(pages);
                return Self::reply(out, item.tag, Ok(StoreReply::Done));
            }
            Kind::Create => {
                let base = item.header.link.and_then(|l| self.index.base_of(&l));
                let mut replica = Replica::new(item.slot, item.header);
                replica.base = base;
                self.index.add(replica);
            }
            Kind::Cut => {
                if let Some(r) = self.index.by_slot_mut(item.slot) {
                    r.header = item.header;
                    (r.base, r.flatten) = (None, None);
                    tracing::info!(%volume, "a clone does not inherit on this disk any more");
                }
                return;
            }
            Kind::Change | Kind::Fence => {
                if let Some(r) = self.index.by_slot_mut(item.slot) {
                    r.header = item.header;
                    if let Some((_, body)) = item.body {
                        let newer = body.layers.revision > r.layers.revision;
                        r.descriptor = body.descriptor;
                        if newer {
                            self.adopt_layers(item.slot, body.layers);
                        }
                    }
                }
            }
        }
        let reply = match (item.kind, self.replica(volume)) {
            (Kind::Change, _) => Ok(StoreReply::Done),
            (kind, Some(replica)) => Ok(StoreReply::Fenced {
                existed: kind == Kind::Fence,
                replica,
            }),
            (_, None) => Err(StoreError::UnknownVolume),
        };
        Self::reply(out, item.tag, reply);
    }
}
