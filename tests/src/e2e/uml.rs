//! Nodes with a real kernel: user-mode Linux processes on a bridge in a network namespace of the test.
//!
//! Invariants: a node is one process tree in a pid namespace of its own, so that SIGKILL is a power cut;
//! everything goes when [`Network`] is dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::tools::{run_ok, wait_until};

/// The kernel.
pub const KERNEL: &str = "/usr/bin/linux.uml";
/// The host's address on the nodes' bridge.
pub const HOST_ADDRESS: &str = "10.77.0.1";
/// Programs that nodes need on the host.
pub const PROGRAMS: &[&str] = &[KERNEL, "busybox", "ip", "insmod", "unshare", "nsenter"];

/// A network namespace with a bridge and a tap for each node.
pub struct Network {
    name: String,
}

impl Network {
    /// Makes the namespace with room for `nodes` nodes.
    ///
    /// # Panics
    /// If the machine refuses (no root, no tap).
    pub fn new(nodes: u32) -> Self {
        let network = Self {
            name: format!("ashlar-{}", std::process::id()),
        };
        run_ok("ip", &["netns", "add", &network.name]);
        let mut script = format!(
            "ip link set lo up; ip link add br0 type bridge stp_state 0 forward_delay 0\n\
             ip addr add {HOST_ADDRESS}/24 dev br0; ip link set br0 up\n"
        );
        for node in 1..=nodes {
            script.push_str(&format!(
                "ip tuntap add tap{node} mode tap vnet_hdr; ip link set tap{node} master br0 up\n"
            ));
        }
        let namespace = network.path();
        run_ok(
            "nsenter",
            &[&format!("--net={namespace}"), "sh", "-ec", &script],
        );
        network
    }

    /// Name of the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

impl Network {
    /// What a cluster is made of that the nodes reach.
    pub fn cluster(&self) -> super::ClusterSpec {
        super::ClusterSpec {
            namespace: Some(self.name.clone()),
            address: HOST_ADDRESS,
            ..super::ClusterSpec::default()
        }
    }
}

/// A booted node. Dropping it cuts its power.
pub struct Node {
    child: Child,
    share: PathBuf,
    commands: u32,
}

impl Node {
    /// Boots node `number` (from 1); `share` becomes its /share.
    ///
    /// # Panics
    /// If it is not up within 60 s.
    pub fn boot(network: &Network, number: u32, share: &Path) -> Self {
        std::fs::create_dir_all(share.join("uml")).expect("share");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("uml/node-init.sh");
        let console = std::fs::File::create(share.join("console")).expect("console");
        let child = Command::new("setsid")
            .args(["nsenter", &format!("--net={}", network.path())])
            .args(["unshare", "--pid", "--fork", "--kill-child=KILL", KERNEL])
            .args([
                "mem=1G",
                "root=/dev/root",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
            ])
            .arg(format!("umid=ashlar-n{number}"))
            .arg(format!("uml_dir={}", share.join("uml").display()))
            .arg(format!("init={}", script.display()))
            .args([
                "con=null",
                "ssl=null",
                "con0=fd:0,fd:1",
                "quiet",
                "loglevel=3",
                "panic=-1",
            ])
            .arg(format!(
                "vec0:transport=tap,ifname=tap{number},depth=128,gro=1"
            ))
            .arg(format!("SCRIPT={}", script.display()))
            .arg(format!("NODE=n{number}"))
            .arg(format!("IP=10.77.0.1{number}/24"))
            .arg(format!("MAC=02:00:00:4d:00:1{number}"))
            .arg(format!("SHARE={}", share.display()))
            .stdin(Stdio::null())
            .stdout(console.try_clone().expect("console"))
            .stderr(console)
            .spawn()
            .expect("setsid starts");
        let mut node = Self {
            child,
            share: share.to_owned(),
            commands: 0,
        };
        let ready = node.share.join("ready");
        wait_until("the node boots", Duration::from_secs(60), || {
            if let Ok(Some(status)) = node.child.try_wait() {
                panic!("the node ended ({status}): {}", node.console());
            }
            ready.exists().then_some(())
        });
        node
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.share.join("console")).unwrap_or_default())
            .into_owned()
    }

    /// Starts a shell script in the node and returns its number.
    ///
    /// # Panics
    /// If the share cannot be written.
    pub fn start(&mut self, script: &str) -> u32 {
        self.commands += 1;
        let n = self.commands;
        let temporary = self.share.join(format!("{n}.tmp"));
        std::fs::write(&temporary, script).expect("share");
        std::fs::rename(temporary, self.share.join(format!("{n}.cmd"))).expect("share");
        n
    }

    /// Output of a script so far.
    pub fn output(&self, number: u32) -> String {
        let bytes = std::fs::read(self.share.join(format!("{number}.out"))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Exit status of a script, once it has ended.
    pub fn status(&self, number: u32) -> Option<i32> {
        std::fs::read_to_string(self.share.join(format!("{number}.rc")))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Runs a shell script in the node, which must succeed; its output.
    ///
    /// # Panics
    /// If it fails, or has not ended after `limit`.
    pub fn ok(&mut self, script: &str, limit: Duration) -> String {
        let n = self.start(script);
        self.finish(n, limit)
    }

    /// Waits for a script, which must succeed; its output.
    ///
    /// # Panics
    /// If it fails, or has not ended after `limit`.
    pub fn finish(&mut self, number: u32, limit: Duration) -> String {
        let start = std::time::Instant::now();
        loop {
            if let Some(status) = self.status(number) {
                let output = self.output(number);
                assert_eq!(status, 0, "in the node: {output}");
                return output;
            }
            assert!(
                start.elapsed() < limit,
                "not within {limit:?}: {}\nconsole: {}",
                self.output(number),
                self.console()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Freezes the whole machine, as a hypervisor may.
    ///
    /// # Panics
    /// If it is gone.
    pub fn freeze(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// If it is gone.
    pub fn thaw(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    /// The kernel is the child of `unshare`, which is the child that this process started.
    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.child.id();
        let path = format!("/proc/{id}/task/{id}/children");
        let children = std::fs::read_to_string(path).expect("the node runs");
        let kernel = children.split_whitespace().next().expect("a kernel");
        let kernel = rustix::process::Pid::from_raw(kernel.parse().expect("a number"));
        rustix::process::kill_process(kernel.expect("a process"), signal).expect("signalled");
    }

    /// Cuts the node's power.
    pub fn power_off(mut self) {
        self.cut();
    }

    fn cut(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The tap stays busy until the whole process tree is gone.
        std::thread::sleep(Duration::from_millis(300));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.cut();
    }
}
