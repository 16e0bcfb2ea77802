//! A load on a driver's CSI Controller service, as many sidecars would make it: volumes are made, published,
//! listed, unpublished and deleted, a fixed number of requests being under way at all times.
//!
//! Invariants:
//! - Every answer is checked; the first one that is wrong, or is an error, ends the load with an error.
//! - At most `in_flight` requests are under way. Requests of one volume follow each other, as CSI wants it.
//! - A latency is the time of one request as its caller sees it, over one connection that all share (as in a
//!   sidecar).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use csi_driver::controller::READ_ONLY_KEY;
use csi_driver::rpc::controller_client::ControllerClient;
use csi_driver::rpc::volume_capability::access_mode::Mode;
use csi_driver::rpc::volume_capability::{AccessMode, AccessType, BlockVolume};
use csi_driver::rpc::{
    CapacityRange, ControllerPublishVolumeRequest, ControllerUnpublishVolumeRequest,
    CreateVolumeRequest, DeleteVolumeRequest, ListVolumesRequest, VolumeCapability,
};
use serde::Serialize;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// One volume in so many is published read-only, to every node.
const READERS_EVERY: usize = 4;
/// Largest answer that is read.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Pages of one walk through the list, at most.
const PAGES_MAX: usize = 100_000;

/// What the load consists of.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Volumes.
    pub volumes: usize,
    /// Requests under way at a time, at least 1.
    pub in_flight: usize,
    /// Size of each volume in bytes; at least 1 MiB.
    pub size_bytes: i64,
    /// Nodes to publish to, which must be registered.
    pub nodes: Vec<String>,
    /// `max_entries` of ListVolumes.
    pub page_size: usize,
    /// Names of the volumes begin so; no other volumes may.
    pub prefix: String,
}

/// Times of requests of one kind.
#[derive(Clone, Default, Debug)]
pub struct Samples {
    times: Vec<Duration>,
    /// Time from the first request to the last answer.
    wall: Duration,
}

/// What [`Samples`] come to.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Latency {
    /// Requests.
    pub requests: usize,
    /// Requests answered per second, by all in flight.
    pub per_second: f64,
    /// Half of the requests took at most this long, in milliseconds.
    pub p50_ms: f64,
    /// The same for 90 %.
    pub p90_ms: f64,
    /// The same for 99 %.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Samples {
    /// Puts those of another run to these.
    pub fn extend(&mut self, other: &Self) {
        self.times.extend_from_slice(&other.times);
        self.wall += other.wall;
    }

    /// The time within which `percent` of the requests were answered, in milliseconds (nearest rank).
    fn percentile(sorted: &[Duration], percent: usize) -> f64 {
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted
            .get(rank - 1)
            .map_or(0.0, |t| t.as_secs_f64() * 1000.0)
    }

    /// What they come to.
    pub fn latency(&self) -> Latency {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        let seconds = self.wall.as_secs_f64().max(f64::EPSILON);
        Latency {
            requests: sorted.len(),
            per_second: sorted.len() as f64 / seconds,
            p50_ms: Self::percentile(&sorted, 50),
            p90_ms: Self::percentile(&sorted, 90),
            p99_ms: Self::percentile(&sorted, 99),
            max_ms: Self::percentile(&sorted, 100),
        }
    }
}

/// A load in progress.
#[derive(Debug)]
pub struct Load {
    plan: Arc<Plan>,
    client: ControllerClient<Channel>,
    /// Ids of the volumes that exist, by number.
    ids: Arc<Vec<String>>,
}

impl Load {
    /// A load on the driver that listens on a unix socket.
    ///
    /// # Errors
    /// Nobody listens there, or the plan asks for nothing.
    pub async fn connect(socket: &Path, plan: Plan) -> Result<Self> {
        ensure!(
            plan.in_flight > 0 && !plan.nodes.is_empty() && plan.page_size > 0,
            "a load needs requests in flight, nodes and pages"
        );
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .context("the driver's socket")?
            .connect()
            .await
            .context("the driver's socket")?;
        Ok(Self {
            plan: Arc::new(plan),
            client: ControllerClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX),
            ids: Arc::default(),
        })
    }

    /// The CSI name of a volume.
    pub fn name(&self, number: usize) -> String {
        name(&self.plan, number)
    }

    /// Makes the volumes.
    ///
    /// # Errors
    /// A request failed, or its answer is wrong.
    pub async fn create(&mut self) -> Result<Samples> {
        let (plan, client) = (self.plan.clone(), self.client.clone());
        let (ids, samples) = self
            .run(self.plan.volumes, move |number| {
                let (plan, mut client) = (plan.clone(), client.clone());
                async move {
                    let mut times = Vec::with_capacity(1);
                    let request = create_request(&plan, number);
                    let answer = timed(&mut times, client.create_volume(request)).await?;
                    let volume = answer.volume.context("no volume in the answer")?;
                    ensure!(
                        volume.capacity_bytes == plan.size_bytes,
                        "{} bytes were asked for, {} given",
                        plan.size_bytes,
                        volume.capacity_bytes
                    );
                    Ok((volume.volume_id, times))
                }
            })
            .await
            .context("CreateVolume")?;
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        ensure!(distinct.len() == ids.len(), "two volumes have the same id");
        self.ids = Arc::new(ids);
        Ok(samples)
    }

    /// Publishes every volume: most to one node each, some to all nodes to be read.
    ///
    /// # Errors
    /// A request failed, or its answer is wrong.
    pub async fn publish(&self) -> Result<Samples> {
        let (plan, client, ids) = (self.plan.clone(), self.client.clone(), self.ids.clone());
        let (_, samples) = self
            .run(self.ids.len(), move |number| {
                let (plan, mut client, ids) = (plan.clone(), client.clone(), ids.clone());
                async move {
                    let mut times = Vec::new();
                    let (nodes, readonly) = targets(&plan, number);
                    for node in nodes {
                        let request = ControllerPublishVolumeRequest {
                            volume_id: ids[number].clone(),
                            node_id: node.clone(),
                            volume_capability: Some(capability()),
                            readonly,
                            ..Default::default()
                        };
                        let answer =
                            timed(&mut times, client.controller_publish_volume(request)).await?;
                        let said = answer.publish_context.get(READ_ONLY_KEY);
                        ensure!(
                            said.is_some_and(|v| *v == readonly.to_string()),
                            "the publish context says {said:?} of read-only, not {readonly}"
                        );
                    }
                    Ok(((), times))
                }
            })
            .await
            .context("ControllerPublishVolume")?;
        Ok(samples)
    }

    /// Walks through the list page by page, `in_flight` walkers at a time. Each must see every volume of the load
    /// once, published to the nodes it was published to (or none, unless `published`).
    ///
    /// # Errors
    /// A request failed, or the list is wrong.
    pub async fn list(&self, published: bool) -> Result<Samples> {
        let (plan, client, ids) = (self.plan.clone(), self.client.clone(), self.ids.clone());
        let mut expected: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (number, id) in ids.iter().enumerate() {
            let mut nodes = match published {
                true => targets(&plan, number).0.to_vec(),
                false => Vec::new(),
            };
            nodes.sort_unstable();
            expected.insert(id.clone(), nodes);
        }
        let expected = Arc::new(expected);
        let (_, samples) = self
            .run(self.plan.in_flight, move |_| {
                let (plan, client, expected) = (plan.clone(), client.clone(), expected.clone());
                async move {
                    let mut times = Vec::new();
                    let seen = walk(client, plan.page_size, &mut times).await?;
                    for (id, nodes) in expected.iter() {
                        let found = seen.get(id);
                        ensure!(
                            found == Some(nodes),
                            "volume {id} is listed as published to {found:?}, not {nodes:?}"
                        );
                    }
                    Ok(((), times))
                }
            })
            .await
            .context("ListVolumes")?;
        Ok(samples)
    }

    /// Takes every publication back.
    ///
    /// # Errors
    /// A request failed.
    pub async fn unpublish(&self) -> Result<Samples> {
        let (plan, client, ids) = (self.plan.clone(), self.client.clone(), self.ids.clone());
        let (_, samples) = self
            .run(self.ids.len(), move |number| {
                let (plan, mut client, ids) = (plan.clone(), client.clone(), ids.clone());
                async move {
                    let mut times = Vec::new();
                    for node in targets(&plan, number).0 {
                        let request = ControllerUnpublishVolumeRequest {
                            volume_id: ids[number].clone(),
                            node_id: node.clone(),
                            ..Default::default()
                        };
                        timed(&mut times, client.controller_unpublish_volume(request)).await?;
                    }
                    Ok(((), times))
                }
            })
            .await
            .context("ControllerUnpublishVolume")?;
        Ok(samples)
    }

    /// Deletes the volumes.
    ///
    /// # Errors
    /// A request failed.
    pub async fn delete(&mut self) -> Result<Samples> {
        let (client, ids) = (self.client.clone(), self.ids.clone());
        let (_, samples) = self
            .run(self.ids.len(), move |number| {
                let (mut client, ids) = (client.clone(), ids.clone());
                async move {
                    let mut times = Vec::with_capacity(1);
                    let request = DeleteVolumeRequest {
                        volume_id: ids[number].clone(),
                        ..Default::default()
                    };
                    timed(&mut times, client.delete_volume(request)).await?;
                    Ok(((), times))
                }
            })
            .await
            .context("DeleteVolume")?;
        self.ids = Arc::default();
        Ok(samples)
    }

    /// Calls `work` for the numbers below `count`, `in_flight` at a time; what each yields, in order, and the times
    /// of its requests.
    async fn run<T, W, F>(&self, count: usize, work: W) -> Result<(Vec<T>, Samples)>
    where
        W: Fn(usize) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<(T, Vec<Duration>)>> + Send,
        T: Send + 'static,
    {
        let next = Arc::new(AtomicUsize::new(0));
        let begun = Instant::now();
        // Dropped, and with it every worker, at the first error.
        let mut workers = JoinSet::new();
        for _ in 0..self.plan.in_flight {
            let (next, work) = (next.clone(), work.clone());
            workers.spawn(async move {
                let mut done = Vec::new();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return anyhow::Ok(done);
                    }
                    let (value, times) = work(number)
                        .await
                        .with_context(|| format!("number {number}"))?;
                    done.push((number, value, times));
                }
            });
        }
        let mut all = Vec::with_capacity(count);
        while let Some(worker) = workers.join_next().await {
            all.extend(worker.context("a worker stopped short")??);
        }
        let wall = begun.elapsed();
        all.sort_unstable_by_key(|(number, ..)| *number);
        let mut samples = Samples {
            times: Vec::with_capacity(count),
            wall,
        };
        let mut values = Vec::with_capacity(count);
        for (_, value, times) in all {
            samples.times.extend(times);
            values.push(value);
        }
        Ok((values, samples))
    }
}

/// Notes how long a request took.
async fn timed<A>(
    times: &mut Vec<Duration>,
    call: impl Future<Output = std::result::Result<tonic::Response<A>, Status>>,
) -> Result<A> {
    let begun = Instant::now();
    let answer = call.await;
    times.push(begun.elapsed());
    let answer = answer.map_err(|s| anyhow!("{:?}: {}", s.code(), s.message()))?;
    Ok(answer.into_inner())
}

/// Every volume of the list, with its nodes in order.
async fn walk(
    mut client: ControllerClient<Channel>,
    page_size: usize,
    times: &mut Vec<Duration>,
) -> Result<BTreeMap<String, Vec<String>>> {
    let mut seen = BTreeMap::new();
    let mut token = String::new();
    for _ in 0..PAGES_MAX {
        let request = ListVolumesRequest {
            max_entries: i32::try_from(page_size)?,
            starting_token: token,
        };
        let page = timed(times, client.list_volumes(request)).await?;
        ensure!(
            page.entries.len() <= page_size,
            "a page of {} entries where {page_size} were asked for",
            page.entries.len()
        );
        for entry in page.entries {
            let id = entry.volume.context("an entry without volume")?.volume_id;
            let mut nodes = entry.status.unwrap_or_default().published_node_ids;
            nodes.sort_unstable();
            ensure!(
                seen.insert(id.clone(), nodes).is_none(),
                "volume {id} is listed twice"
            );
        }
        token = page.next_token;
        if token.is_empty() {
            return Ok(seen);
        }
    }
    Err(anyhow!("the list has no end"))
}

fn name(plan: &Plan, number: usize) -> String {
    format!("{}-{number:06}", plan.prefix)
}

/// The nodes that a volume is published to, and whether it is only read there.
fn targets(plan: &Plan, number: usize) -> (&[String], bool) {
    if number.is_multiple_of(READERS_EVERY) {
        return (&plan.nodes, true);
    }
    let at = number % plan.nodes.len();
    (&plan.nodes[at..=at], false)
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
    }
}

fn create_request(plan: &Plan, number: usize) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name(plan, number),
        capacity_range: Some(CapacityRange {
            required_bytes: plan.size_bytes,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability()],
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_nearest_rank() {
        let samples = Samples {
            times: (1..=1000).rev().map(Duration::from_millis).collect(),
            wall: Duration::from_secs(2),
        };
        let latency = samples.latency();
        assert_eq!(latency.requests, 1000);
        assert_eq!(latency.per_second, 500.0);
        assert_eq!(
            [
                latency.p50_ms,
                latency.p90_ms,
                latency.p99_ms,
                latency.max_ms
            ],
            [500.0, 900.0, 990.0, 1000.0]
        );
        let one = Samples {
            times: vec![Duration::from_millis(3)],
            wall: Duration::from_millis(3),
        };
        assert_eq!(one.latency().p50_ms, 3.0);
        assert_eq!(Samples::default().latency().p99_ms, 0.0);
    }

    #[test]
    fn volumes_go_to_several_nodes_to_be_written_and_to_be_read() {
        let plan = Plan {
            volumes: 8,
            in_flight: 1,
            size_bytes: 1 << 20,
            nodes: ["a", "b", "c"].map(str::to_owned).to_vec(),
            page_size: 10,
            prefix: "load".into(),
        };
        assert_eq!(targets(&plan, 0), (plan.nodes.as_slice(), true));
        let writers: Vec<&str> = [1, 2, 3, 5, 6, 7]
            .iter()
            .map(|n| {
                let (nodes, readonly) = targets(&plan, *n);
                assert!(!readonly && nodes.len() == 1);
                nodes[0].as_str()
            })
            .collect();
        assert_eq!(writers, ["b", "c", "a", "c", "a", "b"]);
    }
}
