//! `nbd-client attach|detach|list`: the node's service on the command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::node as pb;
use ashlar_proto::rpc::node::node_attach_client::NodeAttachClient;
use clap::{Args, Subcommand, ValueEnum};
use tonic::transport::{Channel, Endpoint};

/// How results are shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// Kinds of devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Device {
    /// Kernel NBD.
    Nbd,
    /// nbdfuse and a loop device, for kernels without nbd.
    Loop,
}

/// Where the service is, and how to show what it says.
#[derive(Args, Debug)]
pub struct Common {
    /// The socket of `nbd-client node`.
    #[arg(
        long,
        value_name = "PATH",
        env = "ASHLAR_NBD_SOCKET",
        default_value = "/run/ashlar/nbd.sock"
    )]
    socket: PathBuf,
    /// How to show the result.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// Seconds to wait for an answer.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

/// Commands to a running `nbd-client node`.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a block device of a volume.
    Attach {
        /// Name or id of the volume.
        volume: String,
        /// Refuse writes.
        #[arg(long)]
        read_only: bool,
        /// The kind of device.
        #[arg(long, value_enum, default_value = "nbd")]
        device: Device,
        /// Connections of the device; 0 for the default.
        #[arg(long, default_value_t = 0)]
        connections: u32,
        /// Logical block size: 512 or 4096.
        #[arg(long, default_value_t = 512)]
        block_size: u32,
        /// Take the volume over from a client that holds it.
        #[arg(long)]
        force: bool,
        /// Also tell whether the volume holds any data.
        #[arg(long)]
        probe_data: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Take a device down and close its volume.
    Detach {
        /// Name or id of the volume.
        volume: String,
        /// Although the volume's replicas do not answer: writes that were not flushed are lost.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Show the attachments of this node.
    List {
        #[command(flatten)]
        common: Common,
    },
    /// Make a device as large as its volume is now.
    Resize {
        /// Name or id of the volume.
        volume: String,
        #[command(flatten)]
        common: Common,
    },
}

/// Carries a command out.
///
/// # Errors
/// If nobody listens, or the service refuses; the text says what to do.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Attach {
            volume,
            read_only,
            device,
            connections,
            block_size,
            force,
            probe_data,
            common,
        } => {
            let (volume, volume_id) = named(volume);
            let kind = match device {
                Device::Nbd => pb::DeviceKind::Nbd,
                Device::Loop => pb::DeviceKind::Loop,
            };
            let request = pb::AttachRequest {
                volume,
                volume_id,
                read_only,
                kind: kind as i32,
                connections,
                block_size,
                force,
                probe_data,
            };
            let made = answer(connect(&common).await?.attach(request).await)?;
            if common.output == Output::Table {
                println!("{}", made.device);
                match made.has_data {
                    Some(true) => println!("holds data"),
                    Some(false) => println!("never written, or all of it trimmed"),
                    None => {}
                }
            } else {
                println!("{}", serde_json::to_string_pretty(&json(&made))?);
            }
        }
        Command::Detach {
            volume,
            force,
            common,
        } => {
            let (volume, volume_id) = named(volume);
            let request = pb::DetachRequest {
                volume,
                volume_id,
                force,
            };
            answer(connect(&common).await?.detach(request).await)?;
            if common.output == Output::Json {
                println!("{{}}");
            }
        }
        Command::List { common } => {
            let found = list(&common).await?;
            show(&found.attachments, &found.others, common.output)?;
        }
        Command::Resize { volume, common } => {
            let (name, id) = named(volume);
            let volume_id = match id.is_empty() {
                false => id,
                true => match list(&common)
                    .await?
                    .attachments
                    .into_iter()
                    .find(|a| a.volume == name)
                {
                    Some(found) => found.volume_id,
                    None => bail!("volume {name} is not attached to this node"),
                },
            };
            let request = pb::ResizeRequest { volume_id };
            let made = answer(connect(&common).await?.resize(request).await)?;
            show(std::slice::from_ref(&made), &[], common.output)?;
        }
    }
    Ok(())
}

/// Name and id of a request: what looks like an id is one.
fn named(volume: String) -> (String, Vec<u8>) {
    match volume.parse::<VolumeId>() {
        Ok(id) => (String::new(), id.to_vec()),
        Err(_) => (volume, Vec::new()),
    }
}

async fn connect(common: &Common) -> anyhow::Result<NodeAttachClient<Channel>> {
    let path = std::path::absolute(&common.socket)?;
    let channel = Endpoint::from_shared(format!("unix://{}", path.display()))?
        .timeout(Duration::from_secs(common.timeout))
        .connect()
        .await
        .with_context(|| format!("is `nbd-client node` running? {}", path.display()))?;
    Ok(NodeAttachClient::new(channel))
}

fn answer<T>(result: Result<tonic::Response<T>, tonic::Status>) -> anyhow::Result<T> {
    match result {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => bail!("{} ({:?})", status.message(), status.code()),
    }
}

async fn list(common: &Common) -> anyhow::Result<pb::ListResponse> {
    let request = pb::ListRequest {
        volume_id: Vec::new(),
    };
    answer(connect(common).await?.list(request).await)
}

fn id_text(bytes: &[u8]) -> String {
    VolumeId::from_slice(bytes).map_or_else(String::new, |id| id.to_string())
}

/// `ATTACHMENT_STATE_FENCED` as `fenced`.
fn short(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_lowercase()
}

fn state_text(a: &pb::Attachment) -> String {
    short(a.state().as_str_name(), "ATTACHMENT_STATE_")
}

fn json(a: &pb::Attachment) -> serde_json::Value {
    serde_json::json!({
        "volume_id": id_text(&a.volume_id),
        "volume": a.volume,
        "device": a.device,
        "kind": short(a.kind().as_str_name(), "DEVICE_KIND_"),
        "size_bytes": a.size_bytes,
        "read_only": a.read_only,
        "block_size": a.block_size,
        "connections": a.connections,
        "epoch": a.epoch,
        "state": state_text(a),
        "detail": a.detail,
        "has_data": a.has_data,
        "attached_unix_ms": a.attached_unix_ms,
        "connected": a.connected,
    })
}

fn show(all: &[pb::Attachment], others: &[pb::OtherDevice], output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        let rows: Vec<_> = all.iter().map(json).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header([
        "VOLUME", "DEVICE", "SIZE", "MODE", "STATE", "KERNEL", "DETAIL",
    ]);
    for a in all {
        table.add_row([
            a.volume.clone(),
            a.device.clone(),
            a.size_bytes.to_string(),
            if a.read_only { "ro" } else { "rw" }.to_owned(),
            state_text(a),
            match a.connected {
                Some(true) => "connected",
                Some(false) => "not set up",
                None => "-",
            }
            .to_owned(),
            a.detail.clone(),
        ]);
    }
    println!("{table}");
    for other in others {
        println!(
            "not attached by this service: {} (backend {:?})",
            other.device, other.backend
        );
    }
    Ok(())
}
