//! A csi-driver process on the host, and clients for it.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use csi_driver::rpc::controller_client::ControllerClient;
use csi_driver::rpc::group_controller_client::GroupControllerClient;
use csi_driver::rpc::node_client::NodeClient;
use csi_driver::rpc::snapshot_metadata_client::SnapshotMetadataClient;
use csi_driver::rpc::volume_capability::access_mode::Mode;
use csi_driver::rpc::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use csi_driver::rpc::{CapacityRange, CreateVolumeRequest, VolumeCapability};
use tonic::transport::{Channel, Endpoint};

use super::attach::{AttachNode, LOAD};
use super::cluster::Cluster;
use super::tools::{binary, wait_until};
use super::uml::Network;

/// A running csi-driver; killed when dropped.
pub struct Driver {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Driver {
    /// Starts `csi-driver --mode all` for the node `node` and waits until its socket is there.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn start(cluster: &Cluster, name: &str, node: &str, args: &[&str]) -> Self {
        let no_nbd_client = cluster.scratch("no-nbd-client.sock");
        let socket = no_nbd_client.to_str().expect("a UTF-8 path");
        let mut all = vec!["--mode", "all", "--node", node, "--nbd-socket", socket];
        all.extend_from_slice(args);
        Self::launch(cluster, name, &all)
    }

    /// Starts `csi-driver --mode controller` and waits until its socket is there.
    ///
    /// # Panics
    /// If it does not come up within 20 s.
    pub fn controller_only(cluster: &Cluster, name: &str) -> Self {
        Self::launch(cluster, name, &["--mode", "controller"])
    }

    fn launch(cluster: &Cluster, name: &str, args: &[&str]) -> Self {
        let socket = cluster.scratch(&format!("{name}.sock"));
        let log = cluster.scratch(&format!("{name}.log"));
        let file = std::fs::File::create(&log).expect("log");
        let child = cluster
            .command(&binary("csi-driver"))
            .args(["--metadata", &cluster.metadata()])
            .arg("--endpoint")
            .arg(format!("unix://{}", socket.display()))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("csi-driver starts");
        let driver = Self { child, socket, log };
        wait_until("csi-driver listens", Duration::from_secs(20), || {
            std::os::unix::net::UnixStream::connect(&driver.socket)
                .is_ok()
                .then_some(())
        });
        driver
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("unix://{}", self.socket.display()))
            .expect("a path")
            .connect_lazy()
    }

    /// A client of the Controller service.
    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel())
    }

    /// A client of the GroupController service.
    pub fn group_controller(&self) -> GroupControllerClient<Channel> {
        GroupControllerClient::new(self.channel())
    }

    /// A client of the SnapshotMetadata service.
    pub fn snapshot_metadata(&self) -> SnapshotMetadataClient<Channel> {
        SnapshotMetadataClient::new(self.channel())
    }

    /// A client of the Node service.
    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel())
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- csi-driver\n{}", self.log());
        }
    }
}

/// A capability to mount.
pub fn mount(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// A capability for a raw block device.
pub fn block(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..mount(mode)
    }
}

/// A request for a volume of so many bytes.
pub fn create(name: &str, bytes: i64, parameters: &[(&str, &str)]) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes: bytes,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![mount(Mode::SingleNodeWriter)],
        parameters: parameters
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
        ..Default::default()
    }
}

/// A node with a real kernel that runs nbd-client and `csi-driver --mode all`, and a shell function `csi` that calls
/// the driver as kubelet and the sidecars do (see `ashlar-csi-call`).
pub struct CsiNode {
    /// The machine with nbd-client.
    pub attach: AttachNode,
    name: String,
    metadata: String,
}

/// Before every script.
const PROLOGUE: &str = "csi() { /share/ashlar-csi-call \"$@\"; }\n";

impl CsiNode {
    /// Boots node `number` as the cluster's node `node-NUMBER`.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn boot(network: &Network, cluster: &Cluster, number: u32) -> Self {
        let share = cluster.scratch(&format!("node{number}"));
        std::fs::create_dir_all(&share).expect("share");
        for program in ["csi-driver", "ashlar-csi-call"] {
            if !share.join(program).exists() {
                std::fs::copy(binary(program), share.join(program)).expect("copy");
            }
        }
        let name = format!("node-{number}");
        // As kubelet has it: what is mounted in one place is seen in all.
        let prepare = format!("{LOAD}\nmount --make-rshared /\n");
        let attach = AttachNode::boot_with(network, cluster, number, &name, &prepare);
        let mut node = Self {
            attach,
            name,
            metadata: cluster.metadata(),
        };
        node.start_driver();
        node
    }

    /// Starts the driver and waits until it answers.
    ///
    /// # Panics
    /// If it does not.
    pub fn start_driver(&mut self) {
        let (metadata, name) = (&self.metadata, &self.name);
        let script = format!(
            "setsid /share/csi-driver --mode all --metadata {metadata} --node {name} --log info,csi_driver=debug \
             >>/share/csi.log 2>&1 </dev/null &\necho $! >/share/csi.pid\n\
             for i in $(seq 200); do csi info >/dev/null 2>&1 && exit 0; sleep 0.05; done; exit 1"
        );
        self.ok(&script);
    }

    /// Kills the driver as a crash would.
    ///
    /// # Panics
    /// If it cannot.
    pub fn kill_driver(&mut self) {
        self.ok("kill -9 $(cat /share/csi.pid); while kill -0 $(cat /share/csi.pid) 2>/dev/null; do sleep 0.02; done");
    }

    /// Runs a script in the node, which must succeed; its output.
    ///
    /// # Panics
    /// If it fails, with the end of the driver's log.
    pub fn ok(&mut self, script: &str) -> String {
        let (status, output) = self.run(script);
        let log = std::fs::read_to_string(self.attach.share("csi.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        assert_eq!(
            status,
            0,
            "{script}\n{output}\n--- csi-driver\n{tail}\n--- nbd-client\n{}",
            self.attach.log_tail()
        );
        output.trim().to_owned()
    }

    /// Runs a script in the node: its status and output.
    pub fn run(&mut self, script: &str) -> (i32, String) {
        self.attach.run(&format!("{PROLOGUE}set -e\n{script}"))
    }

    /// Runs a script in the node that must end with a refusal of the driver; what it says.
    ///
    /// # Panics
    /// If it succeeds, or is refused with another code.
    pub fn refused(&mut self, code: tonic::Code, script: &str) -> String {
        let (status, output) = self.run(script);
        assert_eq!(status, i32::from(code), "{script}: {output}");
        output
    }
}
