//! Commands about volumes as a whole: create, resize, delete, open, close.
//!
//! Rules R0 and R1 of DESIGN section 4: every grant yields a new epoch, and an open makes every
//! `Rebuilding` replica `Stale`. An open also cancels the pending snapshot of the volume, with its group (S5).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ashlar_proto::ids::{ClientId, DiskId, Epoch, ReplicaState, SnapshotNumber, VolumeId};
use ashlar_proto::layers::LayerList;

use super::cluster::PoolSpec;
use super::command::{Answer, CreateVolume, OpenVolume, Refusal, Response};
use super::service::Service;
use super::volume::{AttachMode, Attachment, Replica, Volume, share_bytes};
use super::{State, validate};

/// What a volume is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// By a client that uses it.
    Use,
    /// To bring it back to a snapshot.
    Revert,
    /// By a storage daemon, so that replicas can be rebuilt while nobody uses it.
    Care,
}

impl State {
    pub(super) fn require_volume(&self, id: VolumeId) -> Result<&Arc<Volume>, Refusal> {
        let volume = self.volumes.get(&id).ok_or_else(|| {
            Refusal::not_found(format!(
                "volume {id} does not exist; see `ashlar volume list`"
            ))
        })?;
        if volume.hidden {
            return Err(Refusal::not_found(format!(
                "volume {id} ({}) was deleted; only its snapshots are left, see `ashlar snapshot list`",
                volume.name
            )));
        }
        Ok(volume)
    }

    /// The same for what is done with replicas: those of a hidden volume are cared for, too.
    pub(super) fn require_replicas(&self, id: VolumeId) -> Result<&Arc<Volume>, Refusal> {
        match self.volumes.get(&id).filter(|v| v.hidden) {
            Some(hidden) => Ok(hidden),
            None => self.require_volume(id),
        }
    }

    /// The volume that a retried creation would get, or the refusal because the name is taken.
    pub fn existing_volume(&self, create: &CreateVolume) -> Option<Response> {
        let existing = self.volume_by_name(&create.name)?;
        let same = existing.size_bytes == create.size_bytes
            && existing.pool == create.pool
            && existing.replicas == create.replicas
            && existing.min_replicas == create.min_replicas
            && existing.labels == create.labels
            && existing.source.is_none();
        Some(if same {
            Ok(Answer::Volume(existing.clone()))
        } else {
            Err(Refusal::exists(format!(
                "volume {} exists with another size, pool, replica count, labels or source; choose another name",
                create.name
            )))
        })
    }

    pub(super) fn create_volume(&mut self, create: &CreateVolume) -> Response {
        validate::name("name", &create.name)?;
        validate::size("size_bytes", create.size_bytes)?;
        validate::replica_counts(create.replicas, create.min_replicas)?;
        validate::labels("labels", &create.labels)?;
        if create.groups.is_empty() || create.groups.len() > validate::GROUPS_MAX {
            return Err(Refusal::invalid(format!(
                "groups: must lie between 1 and {}",
                validate::GROUPS_MAX
            )));
        }
        if let Some(response) = self.existing_volume(create) {
            return response;
        }
        // The epochs of a reused identity would start again, below the fences of its former replicas.
        let remains = |disk: &DiskId| self.garbage.contains_key(&(*disk, create.volume));
        if create.volume.is_nil()
            || self.volumes.contains_key(&create.volume)
            || create.groups.iter().flatten().any(remains)
        {
            return Err(Refusal::internal("volume_id: not fresh"));
        }
        let pool = self.pool(create.pool).ok_or_else(|| {
            Refusal::not_found("pool: it does not exist (any more); see `ashlar pool list`")
        })?;
        self.check_placement(&pool.spec, create)?;
        let groups = create
            .groups
            .iter()
            .map(|group| group.iter().copied().map(Replica::new_in_sync).collect())
            .collect();
        let volume = self.install(Volume {
            id: create.volume,
            name: create.name.clone(),
            size_bytes: create.size_bytes,
            pool: create.pool,
            replicas: create.replicas,
            min_replicas: create.min_replicas,
            groups,
            epoch: Epoch(0),
            holder: None,
            clean: true,
            opened_once: false,
            snapshot: SnapshotNumber(0),
            revision: 0,
            created_unix_ms: create.created_unix_ms,
            labels: create.labels.clone(),
            publications: BTreeMap::new(),
            format: None,
            readers: Vec::new(),
            reader_revoked: false,
            layers: LayerList::default(),
            hidden: false,
            parent: None,
            flatten: false,
            reverting: None,
            source: None,
        })?;
        Ok(Answer::Volume(volume))
    }

    /// The leader's placement against the state that it is applied to.
    fn check_placement(&self, spec: &PoolSpec, create: &CreateVolume) -> Result<(), Refusal> {
        for group in &create.groups {
            if group.len() != usize::from(create.replicas) {
                return Err(Refusal::internal("placement: wrong number of replicas"));
            }
            let mut domains = BTreeSet::new();
            for &disk in group {
                self.check_disk(spec, disk)?;
                let domain = self.domain_of(spec.failure_domain, disk);
                if !domain.is_some_and(|d| domains.insert(d)) {
                    return Err(Refusal::precondition(
                        "placement: two replicas would share a failure domain (the cluster changed meanwhile); try again",
                    ));
                }
            }
        }
        let share = share_bytes(create.size_bytes, create.groups.len());
        let additions = create.groups.iter().flatten().map(|d| (*d, share));
        self.check_room(spec, additions)
    }

    /// Whether a disk exists and belongs to the pool.
    pub(super) fn check_disk(&self, spec: &PoolSpec, id: DiskId) -> Result<(), Refusal> {
        let Some(disk) = self.disk(id) else {
            return Err(Refusal::not_found(format!(
                "disk {id} does not exist; see `ashlar disk list`"
            )));
        };
        if !self
            .node(disk.node)
            .is_some_and(|node| spec.selects(disk, node))
        {
            return Err(Refusal::precondition(format!(
                "disk {id} does not belong to the volume's pool"
            )));
        }
        if self.disk_service(id) != Service::InUse {
            return Err(Refusal::precondition(format!(
                "disk {id} is cordoned or draining, it or its node: nothing new is placed on it; choose another disk, or end that \
                 with `ashlar disk uncordon` or `ashlar node uncordon`"
            )));
        }
        Ok(())
    }

    /// Whether the disks may be given more provisioned bytes under the pool's limit.
    pub(super) fn check_room(
        &self,
        spec: &PoolSpec,
        additions: impl Iterator<Item = (DiskId, u64)>,
    ) -> Result<(), Refusal> {
        let mut sums = std::collections::BTreeMap::<DiskId, u64>::new();
        for (disk, bytes) in additions {
            let sum = sums.entry(disk).or_default();
            *sum = sum.saturating_add(bytes);
        }
        for (disk, bytes) in sums {
            let Some(capacity) = self.disk(disk).map(|d| d.capacity_bytes) else {
                continue;
            };
            let provisioned = self.disk_use(disk).provisioned_bytes;
            let limit = spec.provision_limit(capacity);
            if provisioned.saturating_add(bytes) > limit {
                return Err(Refusal::exhausted(format!(
                    "disk {disk} has {provisioned} of at most {limit} bytes provisioned, {bytes} more do not fit; \
                     add disks to the pool, ask for less, or raise the pool's over-provisioning"
                )));
            }
        }
        Ok(())
    }

    pub(super) fn resize_volume(&mut self, id: VolumeId, size_bytes: u64) -> Response {
        validate::size("size_bytes", size_bytes)?;
        let volume = self.require_volume(id)?.clone();
        if size_bytes < volume.size_bytes {
            return Err(Refusal::invalid(format!(
                "size_bytes: volume {} has {} bytes, and volumes only grow",
                volume.name, volume.size_bytes
            )));
        }
        if size_bytes == volume.size_bytes {
            return Ok(Answer::Volume(volume));
        }
        let more =
            share_bytes(size_bytes, volume.groups.len()).saturating_sub(volume.share_bytes());
        if let Some(pool) = self.pool(volume.pool) {
            self.check_room(
                &pool.spec,
                volume.all_replicas().map(|(_, r)| (r.disk, more)),
            )?;
        }
        let mut next = Volume::clone(&volume);
        next.size_bytes = size_bytes;
        Ok(Answer::Volume(self.install(next)?))
    }

    pub(super) fn delete_volume(&mut self, id: VolumeId) -> Response {
        let Some(volume) = self.volumes.get(&id).filter(|v| !v.hidden).cloned() else {
            return Ok(Answer::Done);
        };
        if let Some(user) = volume.holder.iter().chain(&volume.readers).next() {
            return Err(Refusal::precondition(format!(
                "volume {} is attached by {}; detach it first",
                volume.name, user.client_name
            )));
        }
        if !volume.publications.is_empty() {
            return Err(Refusal::precondition(format!(
                "volume {} is still published to {}; unpublish it first (`ashlar volume unpublish`)",
                volume.name,
                volume.published_to()
            )));
        }
        self.remove_or_hide(&volume)
    }

    pub(super) fn open_volume(&mut self, open: &OpenVolume, purpose: Purpose) -> Response {
        validate::text("client_name", &open.client_name)?;
        if open.client.is_nil() {
            return Err(Refusal::invalid("client_id: must not be zero"));
        }
        let volume = match purpose {
            Purpose::Use | Purpose::Revert => self.require_volume(open.volume)?,
            Purpose::Care => self.require_replicas(open.volume)?,
        };
        self.check_published(volume, open.node)?;
        self.check_may_write(volume, open.node)?;
        self.check_reverting(volume, purpose == Purpose::Revert)?;
        let in_the_way = |a: &&Attachment| a.client != open.client && a.mode != AttachMode::Care;
        let mut users = volume.holder.iter().chain(&volume.readers);
        if purpose == Purpose::Care && !volume.needs_care() {
            return Err(Refusal::precondition(format!(
                "volume {} is used, or complete: nobody has to care for it",
                volume.name
            )));
        }
        if let Some(other) = users.find(in_the_way)
            && !open.force
        {
            let how = match other.mode {
                AttachMode::Exclusive | AttachMode::Care => "attached",
                AttachMode::ReadOnly => "attached read-only",
            };
            return Err(Refusal::precondition(format!(
                "volume {} is {how} by {} ({}); detach it there, or take it over by force if that client is gone",
                volume.name, other.client_name, other.client
            )));
        }
        // A reader that did not leave may answer reads for a lease.
        let previous_clean = volume.clean && volume.readers.is_empty() && !volume.reader_revoked;
        let mut cancelled = self.cancellation_by_open(volume);
        let settled = cancelled.volumes.remove(&volume.id);
        let mut next = settled.unwrap_or_else(|| Volume::clone(volume));
        for replica in next.groups.iter_mut().flatten() {
            if replica.state == ReplicaState::Rebuilding {
                replica.state = ReplicaState::Stale;
                replica.rebuild_epoch = Epoch(0);
            }
        }
        next.bump_epoch();
        next.holder = Some(Attachment {
            client: open.client,
            node: open.node,
            client_name: open.client_name.clone(),
            mode: match purpose {
                Purpose::Use | Purpose::Revert => AttachMode::Exclusive,
                Purpose::Care => AttachMode::Care,
            },
            epoch: next.epoch,
        });
        next.clean = false;
        next.readers.clear();
        next.reader_revoked = false;
        let id = next.id;
        let mut nexts: Vec<_> = cancelled.volumes.into_values().collect();
        nexts.push(next);
        let installed = self.install_all(nexts)?;
        for snapshot in cancelled.snapshots {
            self.snapshots.remove(snapshot);
        }
        let volume = installed.into_iter().find(|v| v.id == id);
        Ok(Answer::Opened {
            volume: volume.ok_or_else(|| Refusal::internal("the opened volume is gone"))?,
            previous_clean,
        })
    }

    pub(super) fn close_volume(
        &mut self,
        id: VolumeId,
        client: ClientId,
        epoch: Epoch,
        clean: bool,
    ) -> Response {
        let volume = self.require_replicas(id)?;
        if volume.readers.iter().any(|r| r.client == client) {
            return self.leave_volume(id, client);
        }
        if !volume.is_current(client, epoch) {
            return Err(not_current(volume, client, epoch));
        }
        let mut next = Volume::clone(volume);
        next.holder = None;
        next.clean = clean;
        Ok(Answer::Volume(self.install(next)?))
    }
}

/// The refusal of R0: names what is current.
pub(super) fn not_current(volume: &Volume, client: ClientId, epoch: Epoch) -> Refusal {
    let holder = volume.holder.as_ref();
    let reason = match holder {
        Some(h) if h.client == client => {
            format!(
                "epoch {} is not current, {} is: read the volume and ask again",
                epoch.0, volume.epoch.0
            )
        }
        Some(h) => format!("it is held by {} ({}) now", h.client_name, h.client),
        None => "nobody holds it now".to_owned(),
    };
    Refusal::precondition(format!("volume {}: {reason}", volume.name))
}
