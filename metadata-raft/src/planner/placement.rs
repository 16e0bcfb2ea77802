//! Where replicas of new volumes go.
//!
//! Invariants: replicas of a group never share a failure domain; disks that are dead, outside of the
//! pool or at their provisioning limit are not chosen. Among the rest the least filled wins, where
//! filled is the mean of used and provisioned bytes relative to what is allowed; groups of one volume
//! rotate over the disks because each choice counts at once.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::ids::{DiskId, NodeId};

use super::DiskView;
use crate::model::{Disk, Domain, PoolSpec, Refusal, State, Volume, share_bytes, validate};

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

struct Candidate<'a> {
    disk: &'a Disk,
    domain: Domain,
    used: u64,
    provisioned: u64,
    limit: u64,
}

impl Candidate<'_> {
    /// How full the disk would be with `more` bytes, in millionths; compared, never shown.
    fn fill(&self, more: u64) -> u64 {
        let millionths = |part: u64, whole: u64| {
            u64::try_from(u128::from(part) * 1_000_000 / u128::from(whole.max(1)))
                .unwrap_or(u64::MAX)
        };
        let used = millionths(self.used, self.disk.capacity_bytes);
        let provisioned = millionths(self.provisioned.saturating_add(more), self.limit);
        used.saturating_add(provisioned) / 2
    }

    fn has_room(&self, more: u64) -> bool {
        self.provisioned.saturating_add(more) <= self.limit && self.used < self.disk.capacity_bytes
    }
}

fn candidates<'a>(state: &'a State, view: &dyn DiskView, spec: &PoolSpec) -> Vec<Candidate<'a>> {
    state
        .disks()
        .filter_map(|disk| {
            let node = state.node(disk.node)?;
            (spec.selects(disk, node) && view.alive(disk.id)).then(|| Candidate {
                disk,
                domain: Domain::of(spec.failure_domain, disk, node),
                used: view.used_bytes(disk.id),
                provisioned: state.disk_use(disk.id).provisioned_bytes,
                limit: spec.provision_limit(disk.capacity_bytes),
            })
        })
        .collect()
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
            "{} replicas need as many {}s with living disks, the pool has {domains}; add some, ask for fewer replicas, or \
             create a pool with another failure domain",
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
        "no room for {} replicas of {share} bytes in different {}s within {} % of the capacity; add disks to the pool, ask for \
         less, or raise the pool's over-provisioning",
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

/// Bytes that were placed on disks but are not in the state yet.
pub type Planned = BTreeMap<DiskId, u64>;

/// Chooses the disk to which a volume's replica moves.
pub fn place_move(
    state: &State,
    view: &dyn DiskView,
    volume: &Volume,
    from: DiskId,
    planned: &Planned,
) -> Result<DiskId, Refusal> {
    let pool = state
        .pool(volume.pool)
        .ok_or_else(|| Refusal::internal("volume without a pool"))?;
    let mut taken = BTreeSet::new();
    let mut present = BTreeMap::new();
    for group in volume
        .groups
        .iter()
        .filter(|g| g.iter().any(|r| r.disk == from))
    {
        for replica in group {
            present.insert(replica.disk, ());
            if replica.disk != from {
                taken.extend(state.domain_of(pool.spec.failure_domain, replica.disk));
            }
        }
    }
    let mut candidates = candidates(state, view, &pool.spec);
    candidates.retain(|c| !present.contains_key(&c.disk.id));
    for candidate in &mut candidates {
        let more = planned.get(&candidate.disk.id).copied().unwrap_or(0);
        candidate.provisioned = candidate.provisioned.saturating_add(more);
    }
    choose(&candidates, &taken, volume.share_bytes(), None).map(|index| candidates[index].disk.id).ok_or_else(|| {
        Refusal::exhausted(format!(
            "no living disk of pool {} outside of the other replicas' failure domains has room; add one, or name one with \
             to_disk_id",
            pool.name
        ))
    })
}
