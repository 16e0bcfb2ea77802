//! A real S3 server (versitygw over a directory) on a port of loopback.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::cluster::Cluster;
use super::tools::{go_tool, have, wait_until};

const ADDRESS: &str = "127.0.0.1";
const ACCESS_KEY: &str = "ashlar";
const SECRET_KEY: &str = "a-secret-for-tests";

/// A running server; it and its data go when it is dropped.
pub struct S3Server {
    child: Child,
    port: u16,
    _directory: TempDir,
}

impl S3Server {
    /// Starts a server that has one bucket, where the cluster's processes reach it on loopback; `None`, with a loud line, if
    /// it is not installed.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start(cluster: &Cluster, bucket: &str) -> Option<Self> {
        let program = go_tool("versitygw");
        if !have(&[&program]) {
            return None;
        }
        let directory = tempfile::Builder::new()
            .prefix("ashlar-s3-")
            .tempdir()
            .expect("temp dir");
        let data = directory.path().join("data");
        std::fs::create_dir_all(data.join(bucket)).expect("a bucket");
        std::fs::create_dir_all(directory.path().join("attributes")).expect("a directory");
        // Free a moment ago; nobody else asks for this one.
        let probe = TcpListener::bind((ADDRESS, 0)).expect("a port");
        let port = probe.local_addr().expect("its number").port();
        drop(probe);
        let log = std::fs::File::create(directory.path().join("log")).expect("log");
        let child = cluster
            .command(Path::new(&program))
            .args(["--port", &format!("{ADDRESS}:{port}")])
            .args(["--access", ACCESS_KEY, "--secret", SECRET_KEY, "posix"])
            // Attributes in files of their own: not every file system of a test has extended ones.
            .arg("--sidecar")
            .arg(directory.path().join("attributes"))
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("versitygw starts");
        let server = Self {
            child,
            port,
            _directory: directory,
        };
        wait_until("the S3 server", Duration::from_secs(20), || {
            let open = format!("exec 3<>/dev/tcp/{ADDRESS}/{port}");
            let status = cluster
                .command(Path::new("bash"))
                .args(["-c", &open])
                .stderr(Stdio::null())
                .status();
            status.is_ok_and(|s| s.success()).then_some(())
        });
        Some(server)
    }

    /// Where it listens.
    pub fn endpoint(&self) -> String {
        format!("http://{ADDRESS}:{}", self.port)
    }

    /// What a client needs in its environment.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint().as_str()),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
