//! Progress bars (on standard error, and only when it is a terminal), and waiting with one until all replicas of a volume are
//! in sync.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ashlar_proto::rpc::daemon as daemon_pb;
use ashlar_proto::rpc::metadata as pb;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::client::{self, Metadata};
use crate::error::{CliError, Result};

/// Pause between two looks.
const INTERVAL: Duration = Duration::from_millis(300);

/// Of steps that are counted and otherwise said in words.
pub const STEPS: &str = "{prefix} [{bar:30}] {percent:>3}% {msg} ({elapsed})";

/// A bar of this template; `about`: what it is the progress of.
pub fn bar(about: &str, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> "),
    );
    bar.set_prefix(about.to_owned());
    bar
}

/// How long to wait for replicas.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct WaitArgs {
    /// Wait until every replica is in sync
    #[arg(long)]
    pub wait: bool,
    /// Give up waiting after this time (exit code 5); what was begun goes on
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 3600,
        requires = "wait"
    )]
    pub wait_timeout: u64,
}

/// How far one volume's replicas are.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
struct Redundancy {
    in_sync: usize,
    total: usize,
}

fn redundancy(volume: &pb::Volume) -> Redundancy {
    let mut result = Redundancy::default();
    for replica in volume.groups.iter().flat_map(|g| &g.replicas) {
        result.total += 1;
        result.in_sync += usize::from(replica.state() == pb::ReplicaState::InSync);
    }
    result
}

/// Waits until every replica of the volume is in sync; shows chunks compared of those that rebuild.
pub async fn wait_in_sync(
    metadata: &mut Metadata,
    name: &str,
    wait: WaitArgs,
) -> Result<pb::Volume> {
    let deadline = Instant::now() + Duration::from_secs(wait.wait_timeout);
    let bar = bar(name, STEPS);
    loop {
        let volume = metadata.volume(name).await?;
        let now = redundancy(&volume);
        if now.in_sync == now.total {
            bar.finish_and_clear();
            return Ok(volume);
        }
        if Instant::now() >= deadline {
            bar.abandon();
            return Err(CliError::unavailable(format!(
                "{name}: after {} s only {} of {} replicas are in sync",
                wait.wait_timeout, now.in_sync, now.total
            ))
            .hint(format!(
                "`ashlar volume show {name}` shows which, `ashlar disk list` why"
            )));
        }
        show(&bar, metadata, &volume, now).await;
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn show(bar: &ProgressBar, metadata: &mut Metadata, volume: &pb::Volume, now: Redundancy) {
    let pulls = rebuilds(metadata, volume).await;
    let done: u64 = pulls
        .values()
        .map(|r| u64::from(r.rebuild_chunks_done))
        .sum();
    let total: u64 = pulls
        .values()
        .map(|r| u64::from(r.rebuild_chunks_total))
        .sum();
    let moved: u64 = pulls.values().map(|r| r.rebuild_blocks_moved).sum();
    bar.set_length(total.max(1));
    bar.set_position(done);
    bar.set_message(format!(
        "{} of {} replicas in sync, {moved} blocks moved",
        now.in_sync, now.total
    ));
}

/// What the daemons say of the volume's rebuilding replicas, by disk. Daemons that do not answer are
/// left out: this only feeds a progress bar.
async fn rebuilds(
    metadata: &mut Metadata,
    volume: &pb::Volume,
) -> BTreeMap<Vec<u8>, daemon_pb::ReplicaInfo> {
    let mut result = BTreeMap::new();
    let Ok(usage) = replica_infos(metadata).await else {
        return result;
    };
    for replica in volume.groups.iter().flat_map(|g| &g.replicas) {
        if replica.state() != pb::ReplicaState::Rebuilding {
            continue;
        }
        let key = (replica.disk_id.clone(), volume.volume_id.clone());
        if let Some(info) = usage.get(&key) {
            result.insert(replica.disk_id.clone(), info.clone());
        }
    }
    result
}

/// Replicas by (disk id, volume id).
pub type ReplicaInfos = BTreeMap<(Vec<u8>, Vec<u8>), daemon_pb::ReplicaInfo>;

/// Asks every daemon that is alive for its replicas.
pub async fn replica_infos(metadata: &mut Metadata) -> Result<ReplicaInfos> {
    let mut infos = ReplicaInfos::new();
    for node in metadata.nodes().await?.into_iter().filter(|n| n.alive) {
        let Ok(mut daemon) = client::daemon(&node.admin_address).await else {
            continue;
        };
        let request = daemon_pb::ListReplicasRequest {
            disk_id: Vec::new(),
        };
        if let Ok(answer) = daemon.list_replicas(request).await {
            for info in answer.into_inner().replicas {
                infos.insert((info.disk_id.clone(), info.volume_id.clone()), info);
            }
        }
    }
    Ok(infos)
}
