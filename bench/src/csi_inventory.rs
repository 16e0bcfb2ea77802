//! What a cluster keeps of volumes, as its metadata and its storage daemons say: equal before and after a load
//! whose volumes are all gone.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ashlar_proto::rpc::daemon::storage_daemon_client::StorageDaemonClient;
use ashlar_proto::rpc::daemon::{GetStatusRequest, ListReplicasRequest};
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use serde::Serialize;
use tonic::transport::{Channel, Endpoint};

/// Largest answer that is read.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Pause between two looks.
const POLL: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Inventory {
    /// Volumes.
    pub volumes: u64,
    /// Rights of nodes to attach a volume.
    pub publications: u64,
    /// By node and path.
    pub disks: BTreeMap<String, DiskInventory>,
}

/// Of one disk.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct DiskInventory {
    /// Replicas that metadata placed there.
    pub replicas_placed: u64,
    /// Sum of their sizes.
    pub provisioned_bytes: u64,
    /// Replicas that the daemon has.
    pub replicas_kept: u64,
    /// Bytes that the daemon has allocated.
    pub used_bytes: u64,
    /// Bytes that the daemon keeps back.
    pub reserved_bytes: u64,
}

impl Inventory {
    /// Asks the metadata cluster and every storage daemon. `metadata` are addresses (`host:port`), with commas.
    ///
    /// # Errors
    /// One of them does not answer.
    pub async fn take(metadata: &str) -> Result<Self> {
        let mut client = metadata_client(metadata).await?;
        let mut inventory = Self::default();
        let mut page_token = String::new();
        loop {
            let request = pb::ListVolumesRequest {
                page_token,
                page_size: 0,
            };
            let page = client.list_volumes(request).await?.into_inner();
            for volume in &page.volumes {
                inventory.volumes += 1;
                inventory.publications += volume.publications.len() as u64;
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let placed = client.list_disks(pb::ListDisksRequest::default()).await?;
        let mut names = BTreeMap::new();
        for disk in placed.into_inner().disks {
            let name = format!("{}:{}", disk.node_name, disk.path);
            names.insert(disk.disk_id, name.clone());
            let entry = inventory.disks.entry(name).or_default();
            entry.replicas_placed = disk.replica_count.into();
            entry.provisioned_bytes = disk.provisioned_bytes;
        }
        let nodes = client.list_nodes(pb::ListNodesRequest {}).await?;
        for node in nodes.into_inner().nodes {
            // A node that only attaches volumes has none.
            if node.admin_address.is_empty() {
                continue;
            }
            inventory
                .ask_daemon(&node.admin_address, &names)
                .await
                .with_context(|| format!("the storage daemon of {}", node.name))?;
        }
        Ok(inventory)
    }

    async fn ask_daemon(&mut self, address: &str, names: &BTreeMap<Vec<u8>, String>) -> Result<()> {
        let channel = connect(address).await?;
        let mut client =
            StorageDaemonClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let status = client.get_status(GetStatusRequest {}).await?.into_inner();
        for disk in status.disks {
            let name = names
                .get(&disk.disk_id)
                .with_context(|| format!("metadata does not know disk {}", disk.path))?;
            let request = ListReplicasRequest {
                disk_id: disk.disk_id.clone(),
            };
            let replicas = client.list_replicas(request).await?.into_inner().replicas;
            let entry = self.disks.entry(name.clone()).or_default();
            entry.replicas_kept = replicas.len() as u64;
            entry.used_bytes = disk.used_bytes;
            entry.reserved_bytes = disk.reserved_bytes;
        }
        Ok(())
    }

    /// Waits until the cluster is as it was here: daemons free what was deleted in the background.
    ///
    /// # Errors
    /// It is not within `limit`; the message shows both.
    pub async fn wait_restored(&self, metadata: &str, limit: Duration) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let now = Self::take(metadata).await?;
            if now == *self {
                return Ok(begun.elapsed());
            }
            if begun.elapsed() > limit {
                bail!("something is left after {limit:?}: before {self:#?}, now {now:#?}");
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Makes nodes known that only attach volumes, as `csi-driver --mode node` does.
///
/// # Errors
/// The metadata cluster does not answer, or refuses.
pub async fn register_nodes(metadata: &str, names: &[String]) -> Result<()> {
    let mut client = metadata_client(metadata).await?;
    for name in names {
        let request = pb::RegisterNodeRequest {
            request_id: csi_driver::metadata::request_id(),
            node_id: Vec::new(),
            name: name.clone(),
            labels: std::collections::HashMap::new(),
            admin_address: String::new(),
        };
        client.register_node(request).await?;
    }
    Ok(())
}

async fn connect(address: &str) -> Result<Channel> {
    Endpoint::from_shared(format!("http://{address}"))
        .context("an address")?
        .connect()
        .await
        .with_context(|| format!("connect to {address}"))
}

/// A client of the first member that can be reached.
async fn metadata_client(addresses: &str) -> Result<MetadataClient<Channel>> {
    let mut last = anyhow::anyhow!("no metadata address is given");
    for address in addresses.split(',') {
        match connect(address).await {
            Ok(channel) => {
                return Ok(
                    MetadataClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
                );
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
