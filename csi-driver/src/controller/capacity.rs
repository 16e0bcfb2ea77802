//! GetCapacity: how large a volume could still be made.
//!
//! An estimate from what the disks have promised already; placement has the last word.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;

use super::ControllerService;
use super::create::the_only_pool;
use crate::errors::Result;
use crate::parameters::{Parameters, Placement};
use crate::topology::{self, ZONE_KEY};
use crate::validate::{VOLUME_BYTES_MAX, signed};
use crate::{rpc, validate};

impl ControllerService {
    pub(super) async fn capacity(
        &self,
        request: rpc::GetCapacityRequest,
    ) -> Result<rpc::GetCapacityResponse> {
        let capabilities = match request.volume_capabilities.as_slice() {
            [] => Vec::new(),
            all => validate::capabilities("volume_capabilities", all)?,
        };
        validate::map("parameters", &request.parameters)?;
        let parameters = Parameters::parse(&request.parameters)?;
        let mut node = None;
        if let Some(topology) = &request.accessible_topology {
            topology::check("accessible_topology", topology)?;
            node = topology::node(topology).filter(|_| parameters.placement == Placement::Local);
        }
        let pools = self.metadata.pools().await?;
        let name = match &parameters.pool {
            Some(name) => name.clone(),
            None => the_only_pool(&pools)?,
        };
        let available = match pools.iter().find(|p| p.name == name) {
            None => 0,
            Some(pool) => {
                let nodes = self.metadata.nodes().await?;
                let disks = self.metadata.disks().await?;
                available(pool, &nodes, &disks, parameters.replicas, node.as_deref())
            }
        };
        let least = validate::volume_bytes_min(&capabilities, parameters.fs_type);
        Ok(rpc::GetCapacityResponse {
            available_capacity: signed(available),
            maximum_volume_size: Some(signed(available.min(VOLUME_BYTES_MAX))),
            minimum_volume_size: Some(signed(least)),
        })
    }
}

/// Bytes for one more volume in the pool; with `near`, one replica of it must go to that node.
fn available(
    pool: &pb::Pool,
    nodes: &[pb::Node],
    disks: &[pb::Disk],
    replicas: Option<u32>,
    near: Option<&str>,
) -> u64 {
    let default = pb::PoolSpec::default();
    let spec = pool.spec.as_ref().unwrap_or(&default);
    let replicas = replicas.unwrap_or(spec.replicas).max(1);
    // Replicas of a group go to different domains, so room counts per domain.
    let mut rooms: BTreeMap<String, u64> = BTreeMap::new();
    let mut near_room = 0_u64;
    for disk in disks {
        let node = nodes.iter().find(|n| n.node_id == disk.node_id);
        if !disk.takes_replicas || !selected(spec, node, disk) {
            continue;
        }
        let room = room(spec, disk);
        let domain = match spec.failure_domain() {
            pb::FailureDomain::Disk => format!("{:?}", disk.disk_id),
            pb::FailureDomain::Zone => node
                .and_then(|n| n.labels.get(ZONE_KEY))
                .cloned()
                .unwrap_or_default(),
            pb::FailureDomain::Node | pb::FailureDomain::Unspecified => disk.node_name.clone(),
        };
        let sum = rooms.entry(domain).or_default();
        *sum = sum.saturating_add(room);
        if near == Some(disk.node_name.as_str()) {
            near_room = near_room.saturating_add(room);
        }
    }
    let rooms: Vec<u64> = rooms.into_values().collect();
    let most = spread(&rooms, replicas);
    match near {
        Some(_) => most.min(near_room),
        None => most,
    }
}

/// Whether a pool takes a disk.
fn selected(spec: &pb::PoolSpec, node: Option<&pb::Node>, disk: &pb::Disk) -> bool {
    spec.selector.iter().all(|(key, value)| {
        let of_node = node.and_then(|n| n.labels.get(key));
        disk.labels.get(key).or(of_node) == Some(value)
    })
}

/// What a disk may still promise.
fn room(spec: &pb::PoolSpec, disk: &pb::Disk) -> u64 {
    let percent = u128::from(spec.overprovision_percent.max(1));
    let limit = u128::from(disk.capacity_bytes) * percent / 100;
    let room = limit.saturating_sub(u128::from(disk.provisioned_bytes));
    u64::try_from(room).unwrap_or(u64::MAX)
}

/// The largest X such that volumes of together X bytes fit, each byte in `replicas` different domains: no domain
/// can hold more than X, so X is the largest for which the sum of min(room, X) is at least `replicas` times X.
fn spread(rooms: &[u64], replicas: u32) -> u64 {
    let fits = |x: u64| {
        let sum: u128 = rooms.iter().map(|r| u128::from((*r).min(x))).sum();
        sum >= u128::from(replicas) * u128::from(x)
    };
    // What fits shrinks as X grows: bisect.
    let sum = rooms
        .iter()
        .fold(0_u64, |sum, room| sum.saturating_add(*room));
    let (mut good, mut bad) = (0_u64, sum.saturating_add(1));
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    good
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_need_different_domains() {
        assert_eq!(spread(&[10, 10, 10], 3), 10);
        assert_eq!(spread(&[10, 10, 10], 1), 30);
        assert_eq!(spread(&[10, 10, 10], 2), 15);
        assert_eq!(spread(&[100, 10, 10], 2), 20);
        assert_eq!(spread(&[100, 10], 3), 0);
        assert_eq!(spread(&[], 1), 0);
        assert_eq!(spread(&[0, 5, 5], 3), 0);
    }

    fn disk(node: &str, capacity: u64, provisioned: u64) -> pb::Disk {
        pb::Disk {
            disk_id: node.as_bytes().to_vec(),
            node_id: node.as_bytes().to_vec(),
            node_name: node.into(),
            capacity_bytes: capacity,
            provisioned_bytes: provisioned,
            takes_replicas: true,
            ..Default::default()
        }
    }

    fn pool(replicas: u32, percent: u32) -> pb::Pool {
        pb::Pool {
            spec: Some(pb::PoolSpec {
                replicas,
                overprovision_percent: percent,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn dead_full_and_foreign_disks_do_not_count() {
        let mut disks = [disk("a", 100, 0), disk("b", 100, 0), disk("c", 100, 40)];
        assert_eq!(available(&pool(3, 100), &[], &disks, None, None), 60);
        assert_eq!(available(&pool(3, 200), &[], &disks, None, None), 160);
        disks[0].takes_replicas = false;
        assert_eq!(available(&pool(3, 100), &[], &disks, None, None), 0);
        assert_eq!(available(&pool(3, 100), &[], &disks, Some(2), None), 60);
        disks[1].takes_replicas = false;
        assert_eq!(available(&pool(1, 100), &[], &disks, None, None), 60);
        let mut fast = pool(1, 100);
        if let Some(spec) = &mut fast.spec {
            spec.selector.insert("media".into(), "ssd".into());
        }
        assert_eq!(available(&fast, &[], &disks, None, None), 0);
        disks[2].labels.insert("media".into(), "ssd".into());
        assert_eq!(available(&fast, &[], &disks, None, None), 60);
    }

    #[test]
    fn a_local_volume_is_bounded_by_its_node() {
        let disks = [disk("a", 100, 90), disk("b", 100, 0)];
        assert_eq!(available(&pool(1, 100), &[], &disks, None, Some("a")), 10);
        assert_eq!(available(&pool(1, 100), &[], &disks, None, Some("x")), 0);
    }
}
