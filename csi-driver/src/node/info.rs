//! NodeGetInfo, and the node's registration with metadata.

use ashlar_proto::rpc::metadata as pb;

use super::NodeService;
use crate::errors::Result;
use crate::metadata::request_id;
use crate::rpc;
use crate::topology::{self, ZONE_KEY};

impl NodeService {
    pub(super) async fn info(&self) -> Result<rpc::NodeGetInfoResponse> {
        // Volumes are published to nodes that metadata knows, so this node must be known before it is announced.
        let node = self.register().await?;
        let own = self.options.labels.get(ZONE_KEY);
        let zone = own.or_else(|| node.labels.get(ZONE_KEY));
        Ok(rpc::NodeGetInfoResponse {
            node_id: self.options.name.clone(),
            max_volumes_per_node: self.options.max_volumes,
            accessible_topology: Some(rpc::Topology {
                segments: topology::segments(&self.options.name, zone.map(String::as_str)),
            }),
        })
    }

    /// Makes this node known to metadata, also if no storage daemon runs on it.
    pub async fn register(&self) -> Result<pb::Node> {
        let request = pb::RegisterNodeRequest {
            request_id: request_id(),
            node_id: Vec::new(),
            name: self.options.name.clone(),
            labels: self.options.labels.clone(),
            admin_address: String::new(),
        };
        self.metadata
            .ask("register this node", request, async |mut c, q| {
                c.register_node(q).await
            })
            .await
    }
}
