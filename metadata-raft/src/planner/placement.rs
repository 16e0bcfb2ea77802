//! Where replicas of new volumes go.
//!
//! Invariants: replicas of a group never share a failure domain; disks that are dead, out of service, outside of the pool, nearly
//! full ([`FULL_PERCENT`]) or at their provisioning limit are not chosen. Among the rest the least filled wins ([`Candidate::fill`]);
//! groups of one volume rotate over the disks because each choice counts at once.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, NodeId, PoolId};

use super::DiskView;
use crate::model::{
    Disk, Domain, Pool, PoolSpec, Refusal, Service, State, Volume, share_bytes, validate,
};

/// Bytes for which a volume gets one group.
const BYTES_PER_GROUP: u64 = 64 << 30;

/// What to place.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// The pool's specification.
    pub pool: &'a PoolSpec,
    /// The volume's size.
    pub size_bytes: u64,
    /// Replicas per group.
    pub replicas: u8,
    /// Number of groups; 0: chosen.
    pub groups: u32,
    /// A node that should have one replica of each group.
    pub preferred: Option<NodeId>,
    /// Without a replica of each group there the volume is not placed.
    pub require_preferred: bool,
}

/// Nothing is placed on a disk that is fuller than this.
pub const FULL_PERCENT: u64 = 90;
/// From here on used space weighs more.
const NEARLY_FULL: u64 = 800_000;

/// A disk that is considered.
#[derive(Clone)]
pub(super) struct Candidate<'a> {
    pub(super) disk: &'a Disk,
    domain: Domain,
    /// By its replicas: it does not swing with what is being written.
    pub(super) used: u64,
    /// Also by writes that are in the log.
    occupied: u64,
    pub(super) provisioned: u64,
    limit: u64,
}

impl<'a> Candidate<'a> {
    pub(super) fn new(
        state: &State,
        view: &dyn DiskView,
        spec: &PoolSpec,
        disk: &'a Disk,
    ) -> Option<Self> {
        let node = state.node(disk.node)?;
        spec.selects(disk, node).then(|| Self {
            disk,
            domain: Domain::of(spec.failure_domain, disk, node),
            used: view.settled_bytes(disk.id),
            occupied: view.used_bytes(disk.id),
            provisioned: state.disk_use(disk.id).provisioned_bytes,
            limit: spec.provision_limit(disk.capacity_bytes),
        })
    }

    /// How full the disk would be with `more` bytes provisioned, in millionths: the mean of used and provisioned bytes relative to
    /// what is allowed, and more than that when it becomes nearly full. It grows with both. Compared, never shown.
    pub(super) fn fill(&self, more: u64) -> u64 {
        let millionths = |part: u64, whole: u64| {
            u64::try_from(u128::from(part) * 1_000_000 / u128::from(whole.max(1)))
                .unwrap_or(u64::MAX)
        };
        let used = millionths(self.used, self.disk.capacity_bytes);
        let provisioned = millionths(self.provisioned.saturating_add(more), self.limit);
        let hurry = used.saturating_sub(NEARLY_FULL).saturating_mul(2);
        (used.saturating_add(provisioned) / 2).saturating_add(hurry)
    }

    /// [`Self::fill`] with other provisioned and used bytes.
    pub(super) fn with(&self, provisioned: impl Fn(u64) -> u64, used: impl Fn(u64) -> u64) -> u64 {
        let changed = Self {
            provisioned: provisioned(self.provisioned),
            used: used(self.used),
            ..self.clone()
        };
        changed.fill(0)
    }

    fn has_room(&self, more: u64) -> bool {
        self.provisioned.saturating_add(more) <= self.limit
            && is_below(self.occupied, self.disk.capacity_bytes, FULL_PERCENT)
    }
}

fn candidates<'a>(state: &'a State, view: &dyn DiskView, spec: &PoolSpec) -> Vec<Candidate<'a>> {
    let disks = state.disks();
    disks
        .filter(|d| view.alive(d.id) && state.disk_service(d.id) == Service::InUse)
        .filter_map(|disk| Candidate::new(state, view, spec, disk))
        .collect()
}

/// Whether new replicas may be placed on a disk, as far as that does not depend on what they are.
pub fn takes_replicas(state: &State, view: &dyn DiskView, disk: &Disk) -> bool {
    view.alive(disk.id)
        && state.disk_service(disk.id) == Service::InUse
        && is_below(view.used_bytes(disk.id), disk.capacity_bytes, FULL_PERCENT)
}

/// Whether less than so many per cent are used.
pub(super) fn is_below(used: u64, capacity: u64, percent: u64) -> bool {
    u128::from(used) * 100 < u128::from(capacity) * u128::from(percent)
}

/// Number of groups for a volume: one per 64 GiB, at most one per disk and 64.
pub fn group_count(size_bytes: u64, disks: usize) -> usize {
    let by_size = usize::try_from(size_bytes.div_ceil(BYTES_PER_GROUP)).unwrap_or(usize::MAX);
    by_size.min(disks).clamp(1, validate::GROUPS_MAX)
}

/// Chooses the disks of every group.
pub fn place(
    state: &State,
    view: &dyn DiskView,
    wish: &Wish<'_>,
) -> Result<Vec<Vec<DiskId>>, Refusal> {
    let mut candidates = candidates(state, view, wish.pool);
    let domains = candidates
        .iter()
        .map(|c| &c.domain)
        .collect::<BTreeSet<_>>()
        .len();
    if domains < usize::from(wish.replicas) {
        return Err(Refusal::exhausted(format!(
            "{} replicas need as many {}s with living disks in service, the pool has {domains}; add some, end a cordon, ask for \
             fewer replicas, or create a pool with another failure domain",
            wish.replicas,
            domain_name(wish.pool)
        )));
    }
    let count = match wish.groups {
        0 => group_count(wish.size_bytes, candidates.len()),
        asked => usize::try_from(asked).unwrap_or(usize::MAX),
    };
    if count > validate::GROUPS_MAX {
        return Err(Refusal::invalid(format!(
            "groups: at most {} are allowed",
            validate::GROUPS_MAX
        )));
    }
    let share = share_bytes(wish.size_bytes, count);
    let mut groups = Vec::with_capacity(count);
    for _ in 0..count {
        let mut group = Vec::with_capacity(usize::from(wish.replicas));
        let mut taken = BTreeSet::new();
        for index in 0..wish.replicas {
            let preferred = if index == 0 { wish.preferred } else { None };
            let Some(chosen) = choose(&candidates, &taken, share, preferred) else {
                return Err(no_room(wish, share));
            };
            if index == 0 && !on_required_node(&candidates[chosen], wish) {
                return Err(Refusal::exhausted(format!(
                    "no living disk of the pool on the preferred node has room for a replica of {share} bytes; add one there, \
                     ask for less, or do not require that node"
                )));
            }
            let chosen = &mut candidates[chosen];
            chosen.provisioned = chosen.provisioned.saturating_add(share);
            taken.insert(chosen.domain.clone());
            group.push(chosen.disk.id);
        }
        groups.push(group);
    }
    Ok(groups)
}

fn domain_name(spec: &PoolSpec) -> &'static str {
    match spec.failure_domain {
        crate::model::FailureDomain::Node => "node",
        crate::model::FailureDomain::Zone => "zone",
        crate::model::FailureDomain::Disk => "disk",
    }
}

fn no_room(wish: &Wish<'_>, share: u64) -> Refusal {
    Refusal::exhausted(format!(
        "no room for {} replicas of {share} bytes in different {}s, on disks in service that are less than {FULL_PERCENT} % full, \
         within {} % of the capacity; add disks to the pool, ask for less, or raise the pool's over-provisioning",
        wish.replicas,
        domain_name(wish.pool),
        wish.pool.overprovision_percent
    ))
}

fn on_required_node(chosen: &Candidate<'_>, wish: &Wish<'_>) -> bool {
    !wish.require_preferred || wish.preferred == Some(chosen.disk.node)
}

/// The least filled candidate outside of the domains that are taken, on the preferred node if possible.
fn choose(
    candidates: &[Candidate<'_>],
    taken: &BTreeSet<Domain>,
    share: u64,
    preferred: Option<NodeId>,
) -> Option<usize> {
    candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| !taken.contains(&c.domain) && c.has_room(share))
        .min_by_key(|(_, c)| (Some(c.disk.node) != preferred, c.fill(share), c.disk.id))
        .map(|(index, _)| index)
}

/// Where a replica moves to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// To this disk; it counts at once.
    On(DiskId),
    /// There are disks that will do, but all have as much to do as they may.
    Crowded,
    /// There is none.
    Nowhere(Refusal),
}

/// Chooses disks for replicas that move, one after the other: what it placed counts for what comes next.
pub struct Placer<'a> {
    state: &'a State,
    view: &'a dyn DiskView,
    /// Rebuilds onto one disk at a time.
    per_disk: u32,
    pools: BTreeMap<PoolId, Vec<Candidate<'a>>>,
    /// Bytes and number of replicas placed so far.
    placed: BTreeMap<DiskId, (u64, u32)>,
}

impl<'a> Placer<'a> {
    /// Nothing placed yet.
    pub fn new(state: &'a State, view: &'a dyn DiskView, per_disk: u32) -> Self {
        Self {
            state,
            view,
            per_disk,
            pools: BTreeMap::new(),
            placed: BTreeMap::new(),
        }
    }

    /// Changes how many rebuilds onto one disk there may be from now on.
    pub fn set_per_disk(&mut self, per_disk: u32) {
        self.per_disk = per_disk;
    }

    /// Finds a disk for what a volume has on `from`; `wanted` if it will do.
    pub fn place(&mut self, volume: &Volume, from: DiskId, wanted: Option<DiskId>) -> Place {
        let fits = self.fitting(volume, from);
        let (pool, fits) = match fits {
            Ok(fits) => fits,
            Err(refusal) => return Place::Nowhere(refusal),
        };
        if fits.is_empty() {
            return Place::Nowhere(Refusal::exhausted(format!(
                "no living disk of pool {pool} outside of the other replicas' failure domains has room; add one, end a cordon \
                 (`ashlar node list`, `ashlar disk list`), or name one"
            )));
        }
        let share = volume.share_bytes();
        let free = fits.iter().filter(|c| !self.is_crowded(c.disk.id));
        let best = free.min_by_key(|c| (Some(c.disk.id) != wanted, c.fill(share), c.disk.id));
        match best.map(|c| c.disk.id) {
            None => Place::Crowded,
            Some(disk) => {
                self.count(disk, share);
                Place::On(disk)
            }
        }
    }

    /// The disks that may get what a volume has on `from`, with what was placed so far; and the pool's name.
    pub(super) fn fitting(
        &mut self,
        volume: &Volume,
        from: DiskId,
    ) -> Result<(&'a str, Vec<Candidate<'a>>), Refusal> {
        let pool = self
            .state
            .pool(volume.pool)
            .ok_or_else(|| Refusal::internal("volume without a pool"))?;
        let level = pool.spec.failure_domain;
        let mut taken = BTreeSet::new();
        let mut present = BTreeSet::new();
        let groups = volume.groups.iter();
        for replica in groups
            .filter(|g| g.iter().any(|r| r.disk == from))
            .flatten()
        {
            present.insert(replica.disk);
            if replica.disk != from {
                taken.extend(self.state.domain_of(level, replica.disk));
            }
        }
        let share = volume.share_bytes();
        let mut fits = self.disks(pool);
        fits.retain(|c| {
            !present.contains(&c.disk.id) && !taken.contains(&c.domain) && c.has_room(share)
        });
        Ok((&pool.name, fits))
    }

    /// The disks of a pool that replicas may be placed on, with what was placed so far.
    pub(super) fn disks(&mut self, pool: &'a Pool) -> Vec<Candidate<'a>> {
        let (state, view) = (self.state, self.view);
        let all = self.pools.entry(pool.id);
        let all = all.or_insert_with(|| candidates(state, view, &pool.spec));
        let placed = &self.placed;
        let with_placed = all.iter().map(|c| {
            let (more, _) = placed.get(&c.disk.id).copied().unwrap_or_default();
            Candidate {
                provisioned: c.provisioned.saturating_add(more),
                ..c.clone()
            }
        });
        with_placed.collect()
    }

    pub(super) fn is_crowded(&self, disk: DiskId) -> bool {
        let (_, here) = self.placed.get(&disk).copied().unwrap_or_default();
        self.state.disk_use(disk).rebuilding + here >= self.per_disk
    }

    pub(super) fn count(&mut self, disk: DiskId, bytes: u64) {
        let (sum, number) = self.placed.entry(disk).or_default();
        *sum = sum.saturating_add(bytes);
        *number += 1;
    }
}

/// Chooses the disk to which a volume's replica moves.
pub fn place_move(
    state: &State,
    view: &dyn DiskView,
    volume: &Volume,
    from: DiskId,
) -> Result<DiskId, Refusal> {
    match Placer::new(state, view, u32::MAX).place(volume, from, None) {
        Place::On(disk) => Ok(disk),
        Place::Crowded => Err(Refusal::internal("no disk has to wait here")),
        Place::Nowhere(refusal) => Err(refusal),
    }
}
