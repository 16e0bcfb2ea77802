//! A volume in memory behind the real NBD server (worker, export, codec), for tools to run against.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc as std_mpsc;

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{ClientId, VolumeId};
use bytes::Bytes;
use nbd_client::client::{
    Endpoint, FromWorker, ToWorker, VolumeEngine, VolumeSetup, WorkerConfig, WorkerHandle,
    spawn_worker,
};
use nbd_client::engine::{
    ClientError, ClientOp, ClientReply, ClientRequest, Extent, ReadSegment, SessionCommand,
    SessionEvent, SessionStats, StopReason,
};
use tokio::sync::mpsc;

/// Granularity of the sparse memory.
const BLOCK: u64 = 4096;

/// A sparse volume in memory that answers at once.
pub struct MemoryEngine {
    size: u64,
    blocks: BTreeMap<u64, Box<[u8; BLOCK as usize]>>,
    stats: SessionStats,
    /// Requests answered only when that many are waiting, or at the next tick (0: at once).
    delay: Option<std::time::Duration>,
    waiting: Vec<ClientRequest>,
    due: Option<Time>,
    accept_max: usize,
}

impl MemoryEngine {
    pub fn new(size: u64) -> Self {
        Self {
            size,
            blocks: BTreeMap::new(),
            stats: SessionStats::default(),
            delay: None,
            waiting: Vec::new(),
            due: None,
            accept_max: usize::MAX,
        }
    }

    /// Answers in batches after a delay, and accepts only a few requests at once: back-pressure.
    pub fn slow(size: u64, delay: std::time::Duration, accept_max: usize) -> Self {
        Self {
            delay: Some(delay),
            accept_max,
            ..Self::new(size)
        }
    }

    fn read(&self, offset: u64, length: u64) -> ClientReply {
        let mut segments = Vec::new();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let block = at / BLOCK;
            let stop = ((block + 1) * BLOCK).min(end);
            match self.blocks.get(&block) {
                Some(data) => {
                    let part =
                        &data[(at - block * BLOCK) as usize..(stop - block * BLOCK) as usize];
                    segments.push(ReadSegment::Data(Bytes::copy_from_slice(part)));
                }
                None => segments.push(ReadSegment::Zeroes((stop - at) as u32)),
            }
            at = stop;
        }
        ClientReply::Data(segments.into_iter().collect())
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (block, start) = (at / BLOCK, (at % BLOCK) as usize);
            let part = rest.len().min(BLOCK as usize - start);
            let target = self
                .blocks
                .entry(block)
                .or_insert_with(|| Box::new([0; BLOCK as usize]));
            target[start..start + part].copy_from_slice(&rest[..part]);
            rest = &rest[part..];
            at += part as u64;
        }
    }

    /// Whole blocks become holes; partial ones are zeroed if `exact`.
    fn discard(&mut self, offset: u64, length: u64, exact: bool) {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let block = at / BLOCK;
            let stop = ((block + 1) * BLOCK).min(end);
            if stop - at == BLOCK {
                self.blocks.remove(&block);
            } else if exact && let Some(data) = self.blocks.get_mut(&block) {
                data[(at - block * BLOCK) as usize..(stop - block * BLOCK) as usize].fill(0);
            }
            at = stop;
        }
    }

    fn carry_out(&mut self, op: ClientOp) -> Result<ClientReply, ClientError> {
        match op {
            ClientOp::Read { offset, length } => {
                self.stats.reads += 1;
                Ok(self.read(offset, u64::from(length)))
            }
            ClientOp::Write {
                mut offset, data, ..
            } => {
                self.stats.writes += 1;
                for part in data {
                    self.write(offset, &part);
                    offset += part.len() as u64;
                }
                Ok(ClientReply::Done)
            }
            ClientOp::Flush => {
                self.stats.flushes += 1;
                Ok(ClientReply::Done)
            }
            ClientOp::Trim { offset, length, .. } => {
                self.discard(offset, length, false);
                Ok(ClientReply::Done)
            }
            ClientOp::WriteZeroes { offset, length, .. } => {
                self.discard(offset, length, true);
                Ok(ClientReply::Done)
            }
            ClientOp::BlockStatus { offset, length } => {
                let mut extents: Vec<Extent> = Vec::new();
                let (mut at, end) = (offset, offset + length);
                while at < end {
                    let stop = ((at / BLOCK + 1) * BLOCK).min(end);
                    let allocated = self.blocks.contains_key(&(at / BLOCK));
                    match extents.last_mut() {
                        Some(last) if last.allocated == allocated => last.length += stop - at,
                        _ => extents.push(Extent {
                            length: stop - at,
                            allocated,
                        }),
                    }
                    at = stop;
                }
                Ok(ClientReply::Extents(extents))
            }
        }
    }
}

impl VolumeEngine for MemoryEngine {
    fn step(&mut self, now: Time, event: SessionEvent, out: &mut Vec<SessionCommand>) {
        match event {
            SessionEvent::Start => out.push(SessionCommand::Serving {
                size_bytes: self.size,
            }),
            SessionEvent::Client(request) => match self.delay {
                None => {
                    let result = self.carry_out(request.op);
                    out.push(SessionCommand::Reply {
                        tag: request.tag,
                        result,
                    });
                }
                Some(delay) => {
                    self.waiting.push(request);
                    self.due.get_or_insert(now.after(delay));
                }
            },
            SessionEvent::Tick => {
                self.due = None;
                // Answered newest first: the order of answers is free.
                for request in std::mem::take(&mut self.waiting).into_iter().rev() {
                    let result = self.carry_out(request.op);
                    out.push(SessionCommand::Reply {
                        tag: request.tag,
                        result,
                    });
                }
            }
            SessionEvent::Close => {
                out.push(SessionCommand::Stopped {
                    reason: StopReason::Closed,
                });
            }
            // Stands for being fenced.
            SessionEvent::Deleted => {
                out.push(SessionCommand::Stopped {
                    reason: StopReason::Superseded,
                });
            }
            _ => {}
        }
    }

    fn next_deadline(&self) -> Option<Time> {
        self.due
    }

    fn accepting(&self) -> bool {
        self.waiting.len() < self.accept_max
    }

    fn stats(&self) -> SessionStats {
        self.stats
    }
}

/// A running server of one volume.
pub struct Server {
    pub directory: tempfile::TempDir,
    pub socket: PathBuf,
    pub worker: WorkerHandle,
    pub messages: std_mpsc::Receiver<FromWorker>,
}

impl Server {
    pub fn start(engine: MemoryEngine) -> Self {
        Self::start_with(engine, false)
    }

    pub fn start_with(engine: MemoryEngine, read_only: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let (control, mut inbox) = mpsc::channel(64);
        let (sender, messages) = std_mpsc::channel();
        std::thread::spawn(move || {
            while let Some(message) = inbox.blocking_recv() {
                let _ = sender.send(message);
            }
        });
        let config = WorkerConfig {
            number: 0,
            client: ClientId::generate(),
            drain_timeout: std::time::Duration::from_secs(5),
            local_sockets: None,
        };
        let worker = spawn_worker(config, control).unwrap();
        let setup = VolumeSetup {
            index: 0,
            volume: VolumeId::generate(),
            name: "vol".into(),
            endpoint: Endpoint::Unix(socket.clone()),
            read_only,
            engine: Box::new(engine),
        };
        assert!(
            worker
                .sender()
                .blocking_send(ToWorker::Add(Box::new(setup)))
        );
        loop {
            match messages.recv().unwrap() {
                FromWorker::Serving { .. } => break,
                FromWorker::Failed { error, .. } => panic!("{error}"),
                _ => {}
            }
        }
        Self {
            directory,
            socket,
            worker,
            messages,
        }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///vol?socket={}", self.socket.display())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until the volume has stopped.
    pub fn stopped(&self) -> StopReason {
        loop {
            if let FromWorker::Stopped { reason, .. } = self.messages.recv().unwrap() {
                return reason;
            }
        }
    }
}

/// Whether a tool is installed. Without it a test is skipped loudly, and fails under CI.
pub fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|paths| {
        std::env::split_paths(&paths).any(|directory| directory.join(tool).is_file())
    });
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "{tool} is not installed; CI must have it"
        );
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// Runs a tool that must succeed; its output.
pub fn run(tool: &str, arguments: &[&str]) -> String {
    let output = run_any(tool, arguments);
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a tool with a time limit.
pub fn run_any(tool: &str, arguments: &[&str]) -> Output {
    // nbdsh starts the first python3 it finds, and the distribution's has the module.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("timeout");
    command.arg("120").arg(tool).args(arguments);
    command.env("PATH", path).output().unwrap()
}

/// As text for a command line.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
