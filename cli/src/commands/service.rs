//! Nodes and disks in and out of service, and waiting until they are empty.

use std::time::{Duration, Instant};

use ashlar_proto::rpc::metadata as pb;
use serde::Serialize;

use super::Context;
use crate::client::{Metadata, request_id};
use crate::error::{CliError, Result};
use crate::output;
use crate::progress::bar;
use crate::size;

/// Pause between two looks.
const INTERVAL: Duration = Duration::from_millis(500);
const IN_USE: &str = "in-use";
/// Bytes that leave, with an estimate of when they are gone.
const LEAVING: &str =
    "{prefix} [{bar:30}] {binary_bytes} of {binary_total_bytes} {msg} (about {eta} left)";

/// Whether and how long to wait until everything has left.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct EmptyArgs {
    /// Wait until no replica is left there
    #[arg(long)]
    pub wait: bool,
    /// Give up waiting after this time (exit code 5); what was begun goes on
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 86_400,
        requires = "wait"
    )]
    pub wait_timeout: u64,
}

/// What a node or disk is there for, in a word.
pub fn name(service: pb::Service) -> &'static str {
    match service {
        pb::Service::InUse | pb::Service::Unspecified => IN_USE,
        pb::Service::Cordoned => "cordoned",
        pb::Service::Draining => "draining",
    }
}

/// Its state, with what is not as usual.
pub fn with_state(state: &str, service: &str) -> String {
    if service == IN_USE {
        return state.to_owned();
    }
    format!("{state}, {service}")
}

/// A node or disk that something is said of.
pub struct Named {
    /// The part.
    pub part: pb::set_service_request::Part,
    /// `node n1`, `disk 12ab.. (/dev/sdb on n1)`.
    pub text: String,
}

impl Named {
    /// A node.
    pub fn node(node: &pb::Node) -> Self {
        Self {
            part: pb::set_service_request::Part::NodeId(node.node_id.clone()),
            text: format!("node {}", node.name),
        }
    }

    /// A disk.
    pub fn disk(disk: &pb::Disk) -> Self {
        Self {
            part: pb::set_service_request::Part::DiskId(disk.disk_id.clone()),
            text: format!(
                "disk {} ({} on {})",
                output::id_text(&disk.disk_id),
                disk.path,
                disk.node_name
            ),
        }
    }

    fn holds(&self, disk: &pb::Disk) -> bool {
        match &self.part {
            pb::set_service_request::Part::NodeId(id) => disk.node_id == *id,
            pb::set_service_request::Part::DiskId(id) => disk.disk_id == *id,
        }
    }
}

#[derive(Serialize)]
struct ServiceView {
    what: String,
    service: &'static str,
    replicas_left: u32,
}

/// Says what a node or disk is there for; without a word.
pub async fn set(
    metadata: &mut Metadata,
    named: &Named,
    service: pb::Service,
    to_disk_id: Vec<u8>,
) -> Result<()> {
    let request = pb::SetServiceRequest {
        request_id: request_id(),
        part: Some(named.part.clone()),
        service: service.into(),
        to_disk_id,
    };
    let doing = format!("make {} {}", named.text, name(service));
    metadata
        .call(&doing, request, async |mut c, q| c.set_service(q).await)
        .await?;
    Ok(())
}

/// Says what a node or disk is there for, and that it was done.
pub async fn change(context: &mut Context, named: &Named, service: pb::Service) -> Result<()> {
    set(&mut context.metadata, named, service, Vec::new()).await?;
    let left = left(&mut context.metadata, named).await?;
    let sentence = match service {
        pb::Service::Cordoned => format!(
            "{} gets no more replicas; the {} that are there stay",
            named.text, left.replicas
        ),
        _ => format!("{} is in use", named.text),
    };
    finish(context, named, service, left, &sentence)
}

/// Lets everything leave a node or disk, for another disk if one is named.
pub async fn empty(
    context: &mut Context,
    named: &Named,
    to_disk_id: Vec<u8>,
    wait: EmptyArgs,
) -> Result<()> {
    let draining = pb::Service::Draining;
    set(&mut context.metadata, named, draining, to_disk_id).await?;
    let mut left = left(&mut context.metadata, named).await?;
    if wait.wait {
        left = wait_empty(context, named, left, wait).await?;
    }
    let sentence = if left.replicas == 0 {
        format!("{} holds no replica", named.text)
    } else {
        format!(
            "{} replicas ({}) leave {}; `ashlar cluster repairs` shows how far it is",
            left.replicas,
            size::format(left.bytes),
            named.text
        )
    };
    finish(context, named, draining, left, &sentence)
}

fn finish(
    context: &mut Context,
    named: &Named,
    service: pb::Service,
    left: Left,
    sentence: &str,
) -> Result<()> {
    let view = ServiceView {
        what: named.text.clone(),
        service: name(service),
        replicas_left: left.replicas,
    };
    context.output.done(&view, sentence)
}

#[derive(Clone, Copy, Default)]
struct Left {
    replicas: u32,
    bytes: u64,
}

async fn left(metadata: &mut Metadata, named: &Named) -> Result<Left> {
    let disks = metadata.disks().await?;
    let mine = disks.iter().filter(|d| named.holds(d));
    Ok(mine.fold(Left::default(), |sum, d| Left {
        replicas: sum.replicas + d.replica_count,
        bytes: sum.bytes + if d.replica_count > 0 { d.used_bytes } else { 0 },
    }))
}

async fn wait_empty(
    context: &mut Context,
    named: &Named,
    first: Left,
    wait: EmptyArgs,
) -> Result<Left> {
    let deadline = Instant::now() + Duration::from_secs(wait.wait_timeout);
    let bar = bar(&named.text, LEAVING);
    bar.set_length(first.bytes.max(1));
    let mut told = false;
    loop {
        let now = left(&mut context.metadata, named).await?;
        if now.replicas == 0 {
            bar.finish_and_clear();
            return Ok(now);
        }
        bar.set_position(first.bytes.saturating_sub(now.bytes));
        bar.set_message(format!(
            "left, {} of {} replicas",
            first.replicas.saturating_sub(now.replicas),
            first.replicas
        ));
        let repairs = repairs(&mut context.metadata).await?;
        let stuck = repairs.unplaced.first();
        if let Some(one) = stuck.filter(|_| !told) {
            told = true;
            bar.suspend(|| eprintln!("waiting: {}", unplaced(&repairs, one)));
        }
        if Instant::now() >= deadline {
            bar.abandon();
            let error = CliError::unavailable(format!(
                "{}: after {} s {} replicas are still there",
                named.text, wait.wait_timeout, now.replicas
            ));
            return Err(match stuck {
                Some(one) => error.hint(unplaced(&repairs, one)),
                None => error.hint("`ashlar cluster repairs` shows how far it is; it goes on"),
            });
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What the leader repairs.
pub async fn repairs(metadata: &mut Metadata) -> Result<pb::Repairs> {
    let request = pb::GetRepairsRequest {};
    metadata
        .call("ask for repairs", request, async |mut c, q| {
            c.get_repairs(q).await
        })
        .await
}

fn unplaced(repairs: &pb::Repairs, one: &pb::Unplaced) -> String {
    let more = match repairs.unplaced_total.saturating_sub(1) {
        0 => String::new(),
        more => format!(" (and {more} more replicas without a place)"),
    };
    format!("volume {}: {}{more}", one.volume_name, one.reason)
}
