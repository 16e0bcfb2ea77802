//! gRPC to the metadata cluster and to storage daemons.
//!
//! Any member of the cluster may be asked. A call goes to one endpoint; when that does not answer, or
//! says that it has no leader, the same request (same request id, so it is carried out once) goes to
//! the next one, until the overall time is used up.

use std::path::Path;
use std::time::{Duration, Instant};

use ashlar_proto::rpc::daemon::storage_daemon_client::StorageDaemonClient;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::error::{CliError, Result};

/// Longest time for a TCP connection to one endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time for one try at one endpoint.
const TRY_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after every endpoint was tried once.
const ROUND_PAUSE: Duration = Duration::from_millis(150);
/// Volumes per page of a listing.
const PAGE_SIZE: u32 = 500;
/// Largest answer that is read.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The metadata cluster as a client sees it.
#[derive(Debug)]
pub struct Metadata {
    endpoints: Vec<String>,
    current: usize,
    client: Option<MetadataClient<Channel>>,
    timeout: Duration,
}

/// A fresh request id.
pub fn request_id() -> Vec<u8> {
    uuid::Uuid::new_v4().into_bytes().to_vec()
}

/// Opens a channel to `host:port` (or a full URI).
fn endpoint(address: &str) -> Result<Endpoint> {
    let uri = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let endpoint = Endpoint::from_shared(uri)
        .map_err(|e| CliError::usage(format!("{address:?} is not an address: {e}")))?;
    Ok(endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true))
}

/// Connects to a storage daemon's administration.
pub async fn daemon(address: &str) -> Result<StorageDaemonClient<Channel>> {
    let channel = endpoint(address)?.timeout(TRY_TIMEOUT).connect().await.map_err(|e| {
        CliError::unavailable(format!("the storage daemon at {address} does not answer: {}", root(&e)))
            .hint("see whether it runs (`ashlar node list`; in a development cluster `ashlar dev status`)")
    })?;
    Ok(StorageDaemonClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// The innermost cause: what the operating system said.
fn root(error: &dyn std::error::Error) -> String {
    let mut current = error;
    while let Some(source) = current.source() {
        current = source;
    }
    current.to_string()
}

impl Metadata {
    /// A client of the members at `endpoints` (`host:port`). Connects at the first call.
    pub fn new(endpoints: Vec<String>, timeout: Duration) -> Result<Self> {
        if endpoints.is_empty() {
            return Err(CliError::usage("no metadata address is given").hint(
                "give --metadata HOST:PORT,HOST:PORT,... (or set ASHLAR_METADATA), or start a development \
                 cluster here with `ashlar dev up`",
            ));
        }
        for address in &endpoints {
            endpoint(address)?;
        }
        Ok(Self {
            endpoints,
            current: 0,
            client: None,
            timeout,
        })
    }

    /// The members that are asked, as `host:port`.
    pub fn addresses(&self) -> Vec<String> {
        let plain = |e: &String| e.strip_prefix("http://").unwrap_or(e).to_owned();
        self.endpoints.iter().map(plain).collect()
    }

    /// Asks the cluster, with failover. `doing` says what for, as in "create the pool".
    pub async fn call<Q, A, F>(&mut self, doing: &str, request: Q, ask: F) -> Result<A>
    where
        Q: Clone,
        F: AsyncFn(MetadataClient<Channel>, Q) -> std::result::Result<Response<A>, Status>,
    {
        let deadline = Instant::now() + self.timeout;
        let mut failures = 0;
        loop {
            let status = match self.try_once(&request, &ask, deadline).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            if !is_transient(status.code()) {
                return Err(CliError::from_status(doing, &status));
            }
            tracing::debug!(endpoint = %self.endpoints[self.current], %status, "trying the next endpoint");
            self.client = None;
            self.current = (self.current + 1) % self.endpoints.len();
            failures += 1;
            if Instant::now() >= deadline {
                return Err(self.nobody_answered(doing, &status));
            }
            if failures % self.endpoints.len() == 0 {
                tokio::time::sleep(ROUND_PAUSE).await;
            }
        }
    }

    async fn try_once<Q, A, F>(
        &mut self,
        request: &Q,
        ask: &F,
        deadline: Instant,
    ) -> std::result::Result<A, Status>
    where
        Q: Clone,
        F: AsyncFn(MetadataClient<Channel>, Q) -> std::result::Result<Response<A>, Status>,
    {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let address = &self.endpoints[self.current];
                let endpoint = endpoint(address).map_err(|e| Status::internal(e.message))?;
                let channel = endpoint
                    .connect()
                    .await
                    .map_err(|e| Status::unavailable(format!("{address}: {}", root(&e))))?;
                let client =
                    MetadataClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
                self.client = Some(client.clone());
                client
            }
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = left.clamp(Duration::from_millis(500), TRY_TIMEOUT);
        match tokio::time::timeout(limit, ask(client, request.clone())).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "{} did not answer within {limit:?}",
                self.endpoints[self.current]
            ))),
        }
    }

    fn nobody_answered(&self, doing: &str, status: &Status) -> CliError {
        CliError::unavailable(format!(
            "{doing}: the metadata cluster ({}) does not answer: {}",
            self.endpoints.join(","),
            status.message()
        ))
        .hint(
            "a majority of the metadata members must run and reach each other; volumes that are in use go \
             on meanwhile. In a development cluster: `ashlar dev status`, `ashlar dev up`",
        )
    }

    /// Every volume, over all pages.
    pub async fn volumes(&mut self) -> Result<Vec<pb::Volume>> {
        let mut volumes = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListVolumesRequest {
                page_token: page_token.clone(),
                page_size: PAGE_SIZE,
            };
            let page = self
                .call("list the volumes", request, async |mut c, q| {
                    c.list_volumes(q).await
                })
                .await?;
            let empty = page.volumes.is_empty();
            volumes.extend(page.volumes);
            if page.next_page_token.is_empty() || empty {
                return Ok(volumes);
            }
            page_token = page.next_page_token;
        }
    }

    /// A volume by its name or id.
    pub async fn volume(&mut self, name: &str) -> Result<pb::Volume> {
        let request = match uuid::Uuid::parse_str(name) {
            Ok(id) => pb::GetVolumeRequest {
                name: String::new(),
                volume_id: id.into_bytes().to_vec(),
            },
            Err(_) => pb::GetVolumeRequest {
                name: name.to_owned(),
                volume_id: Vec::new(),
            },
        };
        self.call(
            &format!("find the volume {name:?}"),
            request,
            async |mut c, q| c.get_volume(q).await,
        )
        .await
        .map_err(|e| with_list_hint(e, "volume"))
    }

    /// The snapshots that a request names, over all pages.
    pub async fn snapshots(
        &mut self,
        mut request: pb::ListSnapshotsRequest,
    ) -> Result<Vec<pb::Snapshot>> {
        let mut snapshots = Vec::new();
        request.page_size = PAGE_SIZE;
        loop {
            let page = self
                .call("list the snapshots", request.clone(), async |mut c, q| {
                    c.list_snapshots(q).await
                })
                .await?;
            let empty = page.snapshots.is_empty();
            snapshots.extend(page.snapshots);
            if page.next_page_token.is_empty() || empty {
                return Ok(snapshots);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// A snapshot by its name or id.
    pub async fn snapshot(&mut self, name: &str) -> Result<pb::Snapshot> {
        let request = match uuid::Uuid::parse_str(name) {
            Ok(id) => pb::GetSnapshotRequest {
                name: String::new(),
                snapshot_id: id.into_bytes().to_vec(),
            },
            Err(_) => pb::GetSnapshotRequest {
                name: name.to_owned(),
                snapshot_id: Vec::new(),
            },
        };
        self.call(
            &format!("find the snapshot {name:?}"),
            request,
            async |mut c, q| c.get_snapshot(q).await,
        )
        .await
        .map_err(|e| with_list_hint(e, "snapshot"))
    }

    /// Every node.
    pub async fn nodes(&mut self) -> Result<Vec<pb::Node>> {
        let request = pb::ListNodesRequest {};
        let mut nodes = self
            .call("list the nodes", request, async |mut c, q| {
                c.list_nodes(q).await
            })
            .await?
            .nodes;
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(nodes)
    }

    /// A node by its name or id.
    pub async fn node(&mut self, name: &str) -> Result<pb::Node> {
        let id = uuid::Uuid::parse_str(name)
            .map(|u| u.into_bytes().to_vec())
            .ok();
        let nodes = self.nodes().await?;
        nodes
            .into_iter()
            .find(|n| n.name == name || Some(&n.node_id) == id.as_ref())
            .ok_or_else(|| {
                with_list_hint(
                    CliError::not_found(format!("no node is named {name:?}")),
                    "node",
                )
            })
    }

    /// Every disk, by node and path.
    pub async fn disks(&mut self) -> Result<Vec<pb::Disk>> {
        let request = pb::ListDisksRequest {
            node_id: Vec::new(),
        };
        let mut disks = self
            .call("list the disks", request, async |mut c, q| {
                c.list_disks(q).await
            })
            .await?
            .disks;
        disks.sort_by(|a, b| (&a.node_name, &a.path).cmp(&(&b.node_name, &b.path)));
        Ok(disks)
    }

    /// Every pool, by name.
    pub async fn pools(&mut self, name: &str) -> Result<Vec<pb::Pool>> {
        let request = pb::ListPoolsRequest {
            name: name.to_owned(),
        };
        let mut pools = self
            .call("list the pools", request, async |mut c, q| {
                c.list_pools(q).await
            })
            .await?
            .pools;
        pools.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pools)
    }

    /// A pool by its name.
    pub async fn pool(&mut self, name: &str) -> Result<pb::Pool> {
        let pools = self.pools(name).await?;
        pools.into_iter().find(|p| p.name == name).ok_or_else(|| {
            with_list_hint(
                CliError::not_found(format!("no pool is named {name:?}")),
                "pool",
            )
        })
    }

    /// The cluster and its members.
    pub async fn cluster(&mut self) -> Result<pb::Cluster> {
        self.call(
            "ask for the cluster",
            pb::GetClusterRequest {},
            async |mut c, q| c.get_cluster(q).await,
        )
        .await
    }
}

/// "Not found" says how to see what there is.
fn with_list_hint(error: CliError, noun: &str) -> CliError {
    if error.kind == crate::error::Kind::NotFound && error.hint.is_none() {
        return error.hint(format!("`ashlar {noun} list` shows what there is"));
    }
    error
}

/// Whether the next endpoint may do better.
fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}

/// Finds a disk by id, by a part of the id that only one has (start or end), by path or `node:path`.
pub fn find_disk<'a>(disks: &'a [pb::Disk], text: &str) -> Result<&'a pb::Disk> {
    /// Shortest part of an id that is taken for one.
    const PART_LEN_MIN: usize = 4;
    let wanted = text.to_ascii_lowercase();
    let matching: Vec<&pb::Disk> = disks
        .iter()
        .filter(|d| {
            let id = crate::output::id_text(&d.disk_id);
            let by_part =
                wanted.len() >= PART_LEN_MIN && (id.starts_with(&wanted) || id.ends_with(&wanted));
            id == wanted
                || by_part
                || d.path == text
                || format!("{}:{}", d.node_name, d.path) == text
        })
        .collect();
    match matching.as_slice() {
        [one] => Ok(one),
        [] => Err(with_list_hint(
            CliError::not_found(format!("no disk is {text:?}")),
            "disk",
        )),
        several => Err(
            CliError::usage(format!("{} disks match {text:?}", several.len()))
                .hint("give the whole id (`ashlar disk list`), or NODE:PATH"),
        ),
    }
}

/// The metadata addresses of the development cluster in `directory`, if there is one.
pub fn dev_endpoints(directory: &Path) -> Option<Vec<String>> {
    crate::dev::state::State::load(directory)
        .ok()
        .flatten()
        .map(|s| s.spec.member_addresses())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::error::Kind;

    fn disk(last: u8, node: &str, path: &str) -> pb::Disk {
        let mut id = vec![1u8; 16];
        id[15] = last;
        pb::Disk {
            disk_id: id,
            node_name: node.into(),
            path: path.into(),
            ..Default::default()
        }
    }

    #[test]
    fn disks_are_found_by_id_part_path_and_node() {
        let disks = [
            disk(0xa1, "n1", "/d"),
            disk(0xa2, "n2", "/d"),
            disk(0xb3, "n3", "/e"),
        ];
        let id = crate::output::id_text(&disks[2].disk_id);
        assert_eq!(find_disk(&disks, &id).unwrap().path, "/e");
        assert_eq!(find_disk(&disks, "01a2").unwrap().node_name, "n2");
        assert_eq!(find_disk(&disks, "/e").unwrap().node_name, "n3");
        assert_eq!(find_disk(&disks, "n2:/d").unwrap().node_name, "n2");
        assert_eq!(find_disk(&disks, "/d").unwrap_err().kind, Kind::Usage);
        assert_eq!(
            find_disk(&disks, "/nothing").unwrap_err().kind,
            Kind::NotFound
        );
        assert_eq!(find_disk(&disks, "0101").unwrap_err().kind, Kind::Usage);
    }
}
