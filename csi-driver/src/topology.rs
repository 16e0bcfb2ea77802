//! Topology: where a node is, and what a caller's wishes about it mean.
//!
//! Invariant: a volume can be used from every node, wherever its replicas are, so an answer never narrows that
//! down; topology only says where a replica is to be.

use std::collections::HashMap;

use crate::errors::{Error, Result};
use crate::rpc::{Topology, TopologyRequirement};

/// The node's name.
pub const NODE_KEY: &str = "topology.csi.ashlar.io/node";
/// The zone of a node, as everybody calls it.
pub const ZONE_KEY: &str = "topology.kubernetes.io/zone";

/// The segments of a node.
pub fn segments(node: &str, zone: Option<&str>) -> HashMap<String, String> {
    let mut segments = HashMap::from([(NODE_KEY.to_owned(), node.to_owned())]);
    if let Some(zone) = zone.filter(|z| !z.is_empty()) {
        segments.insert(ZONE_KEY.to_owned(), zone.to_owned());
    }
    segments
}

/// The node that a volume is to be near to: the first that is preferred, else the first that is required.
pub fn wanted_node(requirement: Option<&TopologyRequirement>) -> Result<Option<String>> {
    let Some(requirement) = requirement else {
        return Ok(None);
    };
    let all = || requirement.preferred.iter().chain(&requirement.requisite);
    for (at, topology) in all().enumerate() {
        check(&format!("accessibility_requirements[{at}]"), topology)?;
    }
    Ok(all().find_map(node))
}

/// The node that a topology names.
pub fn node(topology: &Topology) -> Option<String> {
    topology
        .segments
        .get(NODE_KEY)
        .filter(|n| !n.is_empty())
        .cloned()
}

/// Refuses keys that no node of ours reports.
pub fn check(field: &str, topology: &Topology) -> Result<()> {
    match topology
        .segments
        .keys()
        .find(|k| *k != NODE_KEY && *k != ZONE_KEY)
    {
        None => Ok(()),
        Some(key) => Err(Error::invalid(
            format!("{field}.segments[{key}]"),
            format!("unknown topology key; accepted: {NODE_KEY}, {ZONE_KEY}"),
        )),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn of(node: Option<&str>, zone: Option<&str>) -> Topology {
        let mut segments = HashMap::new();
        if let Some(node) = node {
            segments.insert(NODE_KEY.to_owned(), node.to_owned());
        }
        if let Some(zone) = zone {
            segments.insert(ZONE_KEY.to_owned(), zone.to_owned());
        }
        Topology { segments }
    }

    #[test]
    fn the_first_preferred_node_wins_then_the_first_required_one() {
        let requirement = TopologyRequirement {
            requisite: vec![of(Some("n1"), None), of(Some("n2"), None)],
            preferred: vec![of(None, Some("z")), of(Some("n2"), None)],
        };
        let wanted = wanted_node(Some(&requirement)).unwrap();
        assert_eq!(wanted.as_deref(), Some("n2"));
        let requisite_only = TopologyRequirement {
            preferred: Vec::new(),
            ..requirement
        };
        let wanted = wanted_node(Some(&requisite_only)).unwrap();
        assert_eq!(wanted.as_deref(), Some("n1"));
        assert_eq!(wanted_node(None).unwrap(), None);
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let mut topology = of(Some("n1"), None);
        topology.segments.insert("rack".into(), "7".into());
        let requirement = TopologyRequirement {
            requisite: vec![topology],
            preferred: Vec::new(),
        };
        let error = wanted_node(Some(&requirement)).unwrap_err().to_string();
        assert!(
            error.contains("rack") && error.contains(ZONE_KEY),
            "{error}"
        );
    }

    #[test]
    fn a_node_without_zone_reports_its_name_only() {
        assert_eq!(segments("n1", Some("")).len(), 1);
        assert_eq!(segments("n1", Some("z"))[ZONE_KEY], "z");
    }
}
