//! A node with a real kernel that runs `nbd-client node`.
//!
//! Invariant: what the node keeps across a reboot (the state directory) lies on its share, which is a
//! directory of the host; sockets lie in its /run, which is not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cluster::Cluster;
use super::exposition::{self, Exposition};
use super::tools::{binary, wait_until};
use super::uml::{Network, Node};

const MINUTE: Duration = Duration::from_secs(60);

/// See the module.
pub struct AttachNode {
    /// The machine.
    pub node: Node,
    share: PathBuf,
    name: String,
    metadata: String,
    scripts: u32,
}

impl AttachNode {
    /// Boots node `number` with the module nbd and starts the service, as the cluster's node `name`.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn boot(network: &Network, cluster: &Cluster, number: u32, name: &str) -> Self {
        Self::boot_with(network, cluster, number, name, LOAD)
    }

    /// As [`Self::boot`]; `prepare` runs before the service starts.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn boot_with(
        network: &Network,
        cluster: &Cluster,
        number: u32,
        name: &str,
        prepare: &str,
    ) -> Self {
        let share = cluster.scratch(&format!("node{number}"));
        std::fs::create_dir_all(&share).expect("share");
        for old in ["ready", "nbd.pid"] {
            let _ = std::fs::remove_file(share.join(old));
        }
        clear_commands(&share);
        let program = share.join("nbd-client");
        if !program.exists() {
            std::fs::copy(binary("nbd-client"), &program).expect("copy");
        }
        let mut this = Self {
            node: Node::boot(network, number, &share),
            share,
            name: name.to_owned(),
            metadata: cluster.metadata(),
            scripts: 0,
        };
        this.ok(prepare);
        this.start_service();
        this.wait_service();
        this
    }

    /// Starts (another) process of the service, without waiting for it.
    pub fn start_service(&mut self) {
        self.start_service_with("");
    }

    /// As [`Self::start_service`], with further arguments.
    pub fn start_service_with(&mut self, args: &str) {
        let (metadata, name) = (self.metadata.clone(), self.name.clone());
        self.ok(&format!(
            "setsid /share/nbd-client --log debug node --metadata {metadata} --node {name} --state-dir /share/state \
             --socket /run/ashlar/nbd.sock {args} >>/share/nbd.log 2>&1 </dev/null &\necho $! >/share/nbd.pid"
        ));
    }

    /// Waits until the service answers.
    ///
    /// # Panics
    /// If it does not within 10 s.
    pub fn wait_service(&mut self) {
        self.ok(
            "for i in $(seq 200); do /share/nbd-client list >/dev/null 2>&1 && exit 0; sleep 0.05; done; tail -20 /share/nbd.log; exit 1",
        );
    }

    /// Runs a script in the node, which must succeed; its output.
    ///
    /// # Panics
    /// If it fails, with the end of the service's log.
    pub fn ok(&mut self, script: &str) -> String {
        let (status, output) = self.run(script);
        assert_eq!(status, 0, "{script}\n{output}\n{}", self.log_tail());
        output
    }

    /// Runs a script in the node: its status and output.
    ///
    /// # Panics
    /// If it has not ended within three minutes.
    pub fn run(&mut self, script: &str) -> (i32, String) {
        let number = self.node.start(script);
        let status = wait_until(script, MINUTE * 3, || self.node.status(number));
        (status, self.node.output(number))
    }

    /// Starts a script that runs beside others; see [`Self::finish`].
    pub fn background(&mut self, script: &str) -> u32 {
        self.scripts += 1;
        let n = self.scripts;
        std::fs::write(self.share.join(format!("bg{n}.sh")), script).expect("share");
        let _ = std::fs::remove_file(self.share.join(format!("bg{n}.rc")));
        self.ok(&format!(
            "(setsid bash /share/bg{n}.sh >/share/bg{n}.out 2>&1 </dev/null; echo $? >/share/bg{n}.tmp; mv /share/bg{n}.tmp \
             /share/bg{n}.rc) >/dev/null 2>&1 &"
        ));
        n
    }

    /// Output so far of a script in the background, and its status if it has ended.
    pub fn peek(&self, n: u32) -> (Option<i32>, String) {
        let output = std::fs::read(self.share.join(format!("bg{n}.out"))).unwrap_or_default();
        let status = std::fs::read_to_string(self.share.join(format!("bg{n}.rc"))).ok();
        (
            status.and_then(|s| s.trim().parse().ok()),
            String::from_utf8_lossy(&output).into_owned(),
        )
    }

    /// Waits for a script in the background: its status and output.
    ///
    /// # Panics
    /// If it has not ended within `limit`.
    pub fn finish(&self, n: u32, limit: Duration) -> (i32, String) {
        let status = wait_until("a script in the background", limit, || self.peek(n).0);
        (status, self.peek(n).1)
    }

    /// What the service shows at `/metrics`, if it was started with `--metrics 127.0.0.1:PORT`.
    ///
    /// # Panics
    /// If it does not answer, or what it answers is not understood.
    pub fn metrics(&mut self, port: u16) -> Exposition {
        let answer = self.ok(&format!(
            "bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; \
             printf \"GET /metrics HTTP/1.1\\r\\nhost: node\\r\\nconnection: close\\r\\n\\r\\n\" >&3; cat <&3'"
        ));
        let (status, text) = exposition::read_answer(&answer).expect("an HTTP answer");
        assert_eq!(status, 200, "{text}");
        Exposition::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    /// Runs `nbd-client ARGS`, which must succeed, with JSON as its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn json(&mut self, args: &str) -> serde_json::Value {
        let text = self.ok(&format!("/share/nbd-client {args} -o json"));
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args}: {e}: {text}"))
    }

    /// Runs `nbd-client ARGS`, which must fail; what it says.
    ///
    /// # Panics
    /// If it succeeds.
    pub fn refused(&mut self, args: &str) -> String {
        let (status, output) = self.run(&format!("/share/nbd-client {args}"));
        assert_ne!(status, 0, "{args}: {output}");
        output
    }

    /// The attachment of a volume, as listed.
    ///
    /// # Panics
    /// If there is none.
    pub fn attachment(&mut self, volume: &str) -> serde_json::Value {
        let all = self.json("list");
        let found = all
            .as_array()
            .and_then(|a| a.iter().find(|a| a["volume"] == volume));
        found
            .cloned()
            .unwrap_or_else(|| panic!("{volume} is not in {all}"))
    }

    /// The end of the service's log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.share.join("nbd.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// A file of the share.
    pub fn share(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }
}

/// Loads nbd as the documentation says.
pub const LOAD: &str =
    "insmod $(find /lib/modules/$(uname -r)/ -name nbd.ko) max_part=0 nbds_max=0";

/// Files of the last boot's commands.
fn clear_commands(share: &Path) {
    for entry in std::fs::read_dir(share).into_iter().flatten().flatten() {
        let path = entry.path();
        if path
            .extension()
            .is_some_and(|e| e == "cmd" || e == "rc" || e == "out")
        {
            let _ = std::fs::remove_file(path);
        }
    }
}
