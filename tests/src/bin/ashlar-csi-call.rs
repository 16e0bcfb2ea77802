//! Calls a CSI driver as kubelet and the sidecars do, from a shell: for tests inside nodes with a kernel of their own.
//!
//! Paths are kubelet's, below /var/lib/kubelet. A refusal is printed as `CODE: message` to standard error, and the
//! exit status is the gRPC code's number.

use std::collections::HashMap;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use csi_driver::rpc::controller_client::ControllerClient;
use csi_driver::rpc::node_client::NodeClient;
use csi_driver::rpc::volume_capability::access_mode::Mode;
use csi_driver::rpc::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use csi_driver::rpc::{self, CapacityRange, VolumeCapability};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// A CSI client.
#[derive(Parser, Debug)]
struct Arguments {
    /// The driver's socket.
    #[arg(long, default_value = "/csi/csi.sock")]
    socket: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug, Clone)]
struct Capability {
    /// A raw block volume.
    #[arg(long)]
    block: bool,
    /// ext4 or xfs.
    #[arg(long, default_value = "")]
    fs: String,
    /// Mount option (repeatable).
    #[arg(long)]
    flag: Vec<String>,
    /// Access mode: writer, pod, multi, reader, many, rwx.
    #[arg(long, default_value = "writer")]
    mode: String,
}

#[derive(Args, Debug, Clone)]
struct Use {
    volume: String,
    #[arg(long)]
    node: String,
    #[arg(long, default_value = "a")]
    pod: String,
    /// As of the pod or the PersistentVolume.
    #[arg(long)]
    readonly: bool,
    #[command(flatten)]
    capability: Capability,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// CreateVolume; prints the id.
    Create {
        name: String,
        size: i64,
        #[arg(long = "param", value_parser = pair)]
        parameters: Vec<(String, String)>,
        #[command(flatten)]
        capability: Capability,
    },
    Delete {
        volume: String,
    },
    /// ControllerPublish, NodeStage, NodePublish; prints the target path.
    Up(Use),
    /// NodePublish only (after ControllerPublish, which is idempotent); prints the target path.
    Publish(Use),
    /// NodeUnpublish, NodeUnstage, ControllerUnpublish.
    Down(Use),
    /// NodeUnpublish only.
    Unpublish(Use),
    /// NodeUnstage only.
    Unstage(Use),
    /// ControllerUnpublish only; node "" means all.
    Detach(Use),
    /// ControllerExpand, then NodeExpand at the pod's path; prints the size.
    Expand {
        #[command(flatten)]
        r#use: Use,
        #[arg(long)]
        size: i64,
    },
    /// Prints `UNIT total used available` lines.
    Stats(Use),
    /// Prints the nodes that a volume is published to.
    Nodes {
        volume: String,
    },
    Info,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("not of the form KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Capability {
    fn message(&self) -> VolumeCapability {
        let mode = match self.mode.as_str() {
            "pod" => Mode::SingleNodeSingleWriter,
            "multi" => Mode::SingleNodeMultiWriter,
            "reader" => Mode::SingleNodeReaderOnly,
            "many" => Mode::MultiNodeReaderOnly,
            "rwx" => Mode::MultiNodeMultiWriter,
            _ => Mode::SingleNodeWriter,
        };
        let access = match self.block {
            true => AccessType::Block(BlockVolume {}),
            false => AccessType::Mount(MountVolume {
                fs_type: self.fs.clone(),
                mount_flags: self.flag.clone(),
                volume_mount_group: String::new(),
            }),
        };
        VolumeCapability {
            access_type: Some(access),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }
}

impl Use {
    fn staging(&self) -> String {
        let below = "/var/lib/kubelet/plugins/kubernetes.io/csi";
        match self.capability.block {
            true => format!("{below}/volumeDevices/staging/{}", self.volume),
            false => format!("{below}/csi.ashlar.io/{}/globalmount", self.volume),
        }
    }

    fn target(&self) -> String {
        match self.capability.block {
            true => format!(
                "/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/{}/{}",
                self.volume, self.pod
            ),
            false => format!(
                "/var/lib/kubelet/pods/{}/volumes/kubernetes.io~csi/{}/mount",
                self.pod, self.volume
            ),
        }
    }
}

struct Clients {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
}

type Result2<T> = Result<T, Status>;

impl Clients {
    /// ControllerPublish; publish context and volume context.
    async fn attach(
        &mut self,
        used: &Use,
    ) -> Result2<(HashMap<String, String>, HashMap<String, String>)> {
        let get = rpc::ControllerGetVolumeRequest {
            volume_id: used.volume.clone(),
        };
        let found = self.controller.controller_get_volume(get).await?;
        let volume_context = found.into_inner().volume.unwrap_or_default().volume_context;
        let publish = rpc::ControllerPublishVolumeRequest {
            volume_id: used.volume.clone(),
            node_id: used.node.clone(),
            volume_capability: Some(used.capability.message()),
            readonly: used.readonly && used.capability.mode != "multi",
            volume_context: volume_context.clone(),
            ..Default::default()
        };
        let published = self.controller.controller_publish_volume(publish).await?;
        Ok((published.into_inner().publish_context, volume_context))
    }

    async fn publish(&mut self, used: &Use, stage: bool) -> Result2<String> {
        let (publish_context, volume_context) = self.attach(used).await?;
        if stage {
            self.node
                .node_stage_volume(rpc::NodeStageVolumeRequest {
                    volume_id: used.volume.clone(),
                    publish_context: publish_context.clone(),
                    staging_target_path: used.staging(),
                    volume_capability: Some(used.capability.message()),
                    volume_context: volume_context.clone(),
                    ..Default::default()
                })
                .await?;
        }
        self.node
            .node_publish_volume(rpc::NodePublishVolumeRequest {
                volume_id: used.volume.clone(),
                publish_context,
                staging_target_path: used.staging(),
                target_path: used.target(),
                volume_capability: Some(used.capability.message()),
                readonly: used.readonly,
                volume_context,
                ..Default::default()
            })
            .await?;
        Ok(used.target())
    }

    async fn unpublish(&mut self, used: &Use) -> Result2<()> {
        let request = rpc::NodeUnpublishVolumeRequest {
            volume_id: used.volume.clone(),
            target_path: used.target(),
        };
        self.node.node_unpublish_volume(request).await.map(drop)
    }

    async fn unstage(&mut self, used: &Use) -> Result2<()> {
        let request = rpc::NodeUnstageVolumeRequest {
            volume_id: used.volume.clone(),
            staging_target_path: used.staging(),
        };
        self.node.node_unstage_volume(request).await.map(drop)
    }

    async fn detach(&mut self, used: &Use) -> Result2<()> {
        let request = rpc::ControllerUnpublishVolumeRequest {
            volume_id: used.volume.clone(),
            node_id: used.node.clone(),
            ..Default::default()
        };
        let unpublished = self.controller.controller_unpublish_volume(request).await;
        unpublished.map(drop)
    }

    async fn expand(&mut self, used: &Use, size: i64) -> Result2<String> {
        let range = CapacityRange {
            required_bytes: size,
            limit_bytes: 0,
        };
        self.controller
            .controller_expand_volume(rpc::ControllerExpandVolumeRequest {
                volume_id: used.volume.clone(),
                capacity_range: Some(range),
                volume_capability: Some(used.capability.message()),
                ..Default::default()
            })
            .await?;
        let expanded = self
            .node
            .node_expand_volume(rpc::NodeExpandVolumeRequest {
                volume_id: used.volume.clone(),
                volume_path: used.target(),
                capacity_range: Some(range),
                staging_target_path: used.staging(),
                volume_capability: Some(used.capability.message()),
                ..Default::default()
            })
            .await?;
        Ok(expanded.into_inner().capacity_bytes.to_string())
    }

    async fn stats(&mut self, used: &Use) -> Result2<String> {
        let request = rpc::NodeGetVolumeStatsRequest {
            volume_id: used.volume.clone(),
            volume_path: used.target(),
            staging_target_path: used.staging(),
        };
        let stats = self.node.node_get_volume_stats(request).await?.into_inner();
        let line = |u: &rpc::VolumeUsage| {
            let unit = u.unit().as_str_name();
            format!("{unit} {} {} {}", u.total, u.used, u.available)
        };
        Ok(stats.usage.iter().map(line).collect::<Vec<_>>().join("\n"))
    }

    async fn run(&mut self, command: Command) -> Result2<String> {
        match command {
            Command::Create {
                name,
                size,
                parameters,
                capability,
            } => {
                let request = rpc::CreateVolumeRequest {
                    name,
                    capacity_range: Some(CapacityRange {
                        required_bytes: size,
                        limit_bytes: 0,
                    }),
                    volume_capabilities: vec![capability.message()],
                    parameters: parameters.into_iter().collect(),
                    ..Default::default()
                };
                let created = self.controller.create_volume(request).await?.into_inner();
                return Ok(created.volume.unwrap_or_default().volume_id);
            }
            Command::Delete { volume } => {
                let request = rpc::DeleteVolumeRequest {
                    volume_id: volume,
                    ..Default::default()
                };
                self.controller.delete_volume(request).await?;
            }
            Command::Up(used) => return self.publish(&used, true).await,
            Command::Publish(used) => return self.publish(&used, false).await,
            Command::Down(used) => {
                self.unpublish(&used).await?;
                self.unstage(&used).await?;
                self.detach(&used).await?;
            }
            Command::Unpublish(used) => self.unpublish(&used).await?,
            Command::Unstage(used) => self.unstage(&used).await?,
            Command::Detach(used) => self.detach(&used).await?,
            Command::Expand { r#use, size } => return self.expand(&r#use, size).await,
            Command::Stats(used) => return self.stats(&used).await,
            Command::Nodes { volume } => {
                let request = rpc::ControllerGetVolumeRequest { volume_id: volume };
                let found = self.controller.controller_get_volume(request).await?;
                let status = found.into_inner().status.unwrap_or_default();
                return Ok(status.published_node_ids.join(" "));
            }
            Command::Info => {
                let info = self.node.node_get_info(rpc::NodeGetInfoRequest {}).await?;
                return Ok(info.into_inner().node_id);
            }
        }
        Ok(String::new())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let endpoint = match Endpoint::from_shared(format!("unix://{}", arguments.socket)) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            eprintln!("--socket: {error}");
            return ExitCode::FAILURE;
        }
    };
    let channel = endpoint.connect_lazy();
    let mut clients = Clients {
        controller: ControllerClient::new(channel.clone()),
        node: NodeClient::new(channel),
    };
    match clients.run(arguments.command).await {
        Ok(text) if text.is_empty() => ExitCode::SUCCESS,
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(status) => {
            eprintln!("{:?}: {}", status.code(), status.message());
            ExitCode::from(u8::try_from(i32::from(status.code())).unwrap_or(1))
        }
    }
}
