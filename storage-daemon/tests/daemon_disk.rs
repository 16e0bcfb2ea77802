//! One disk's thread on a real file, spoken to over real TCP: the data protocol end to end.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ashlar_proto::descriptor::{ReplicaDescriptor, VolumeDescriptor};
use ashlar_proto::ids::*;
use ashlar_proto::wire::*;
use bytes::{Bytes, BytesMut};
use storage_daemon::config::DiscardPolicy;
use storage_daemon::disk_handle::{DiskHandle, DiskState, DiskThreadConfig};
use storage_daemon::engine::{AdminReply, AdminRequest};
use storage_daemon::offline::{self, FormatRequest};
use storage_daemon::store::{StoreConfig, StoreIdentity};

const CLUSTER: ClusterId = ClusterId([8; 16]);
const VOLUME: VolumeId = VolumeId([4; 16]);
const DISK_BYTES: u64 = 128 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A disk in a directory of its own (on the checkout's file system: /tmp may lack O_DIRECT).
struct Disk {
    _dir: tempfile::TempDir,
    path: PathBuf,
    handle: Option<DiskHandle>,
    identity: StoreIdentity,
    address: SocketAddr,
}

fn start(path: &Path, port: u16) -> (DiskHandle, StoreIdentity, SocketAddr) {
    let handle = DiskHandle::start(DiskThreadConfig {
        local_sockets: None,
        path: path.to_owned(),
        listen: SocketAddr::from(([127, 0, 0, 1], port)),
        discard: DiscardPolicy::On,
        store: StoreConfig {
            idle_write_back: Duration::from_millis(100),
            discard_after: Some(Duration::from_millis(100)),
            ..StoreConfig::default()
        },
    })
    .unwrap();
    let begin = Instant::now();
    loop {
        let state = handle.state().borrow().clone();
        match state {
            DiskState::Serving { identity, address } => return (handle, identity, address),
            DiskState::Opening if begin.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => panic!("not served: {other:?}"),
        }
    }
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("disk");
        let size_bytes = Some(DISK_BYTES);
        offline::format(
            &path,
            &FormatRequest {
                size_bytes,
                ..Default::default()
            },
        )
        .unwrap();
        offline::join_cluster(&path, CLUSTER).unwrap();
        let (handle, identity, address) = start(&path, 0);
        Self {
            _dir: dir,
            path,
            handle: Some(handle),
            identity,
            address,
        }
    }

    fn handle(&self) -> &DiskHandle {
        self.handle.as_ref().unwrap()
    }

    /// As after kill -9 of the process and its restart under the same kernel.
    fn kill_and_reopen(&mut self) {
        self.handle.take().unwrap().abandon();
        let (handle, identity, address) = start(&self.path, self.address.port());
        assert_eq!(address, self.address);
        (self.handle, self.identity) = (Some(handle), identity);
    }

    fn stop(&mut self) {
        let handle = self.handle.take().unwrap();
        assert_eq!(
            handle.admin_blocking(AdminRequest::Stop),
            Ok(AdminReply::Stopping)
        );
        handle.join();
        let state = handle.state().borrow().clone();
        assert_eq!(state, DiskState::Stopped);
    }

    fn client(&self) -> Client {
        let mut client = Client::connect(self.address, self.identity.incarnation);
        let hello = self.hello();
        assert!(matches!(
            client.ask(0, RequestBody::Hello(hello)),
            Ok(ReplyBody::Hello(_))
        ));
        client
    }

    fn hello(&self) -> Hello {
        Hello {
            version_min: PROTOCOL_VERSION_MIN,
            version_max: PROTOCOL_VERSION_MAX,
            cluster: CLUSTER,
            disk: self.identity.disk,
            client: ClientId([2; 16]),
            ticket: Bytes::new(),
        }
    }
}

struct Client {
    stream: TcpStream,
    input: BytesMut,
    incarnation: Incarnation,
    next_id: u64,
}

impl Client {
    fn connect(address: SocketAddr, incarnation: Incarnation) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            input: BytesMut::new(),
            incarnation,
            next_id: 1,
        }
    }

    fn send(&mut self, epoch: u64, body: RequestBody) -> RequestId {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let request = Request {
            id,
            volume: VOLUME,
            epoch: Epoch(epoch),
            incarnation: self.incarnation,
            body,
        };
        let mut buffers = Vec::new();
        encode_request(&request, &mut buffers);
        self.stream.write_all(&buffers.concat()).unwrap();
        id
    }

    /// The next reply; `None` if the connection was closed.
    fn receive(&mut self) -> Option<Reply> {
        loop {
            match decode(&mut self.input, Direction::Replies).unwrap() {
                Some(Decoded::Reply(reply)) => return Some(reply),
                Some(Decoded::Request(_)) => panic!("a daemon sent a request"),
                None => {}
            }
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                read => self.input.extend_from_slice(&buffer[..read.unwrap()]),
            }
        }
    }

    fn ask(&mut self, epoch: u64, body: RequestBody) -> Result<ReplyBody, Status> {
        let id = self.send(epoch, body);
        let reply = self.receive().expect("the connection was closed");
        assert_eq!(reply.id, id);
        reply.result
    }

    fn write(&mut self, epoch: u64, sequence: u64, first: u32, data: &[u8]) {
        let body = write(epoch, sequence, first, data);
        assert_eq!(
            self.ask(epoch, body),
            Ok(ReplyBody::Written(WriteOutcome::Applied))
        );
    }

    fn read(&mut self, epoch: u64, first: u32, count: u32) -> Vec<u8> {
        let range = BlockRange::new(ChunkIndex(first / 1024), first % 1024, count).unwrap();
        let read = Read {
            range,
            snapshot: SnapshotNumber(0),
            exact_layer: false,
        };
        let Ok(ReplyBody::Read(reply)) = self.ask(epoch, RequestBody::Read(read)) else {
            panic!()
        };
        let joined = reply.data.concat();
        let mut data = joined.chunks(BLOCK_SIZE);
        let mut out = Vec::new();
        for block in &reply.blocks {
            match block.state {
                BlockState::Data => {
                    let bytes = data.next().unwrap();
                    assert_eq!(crc32c::crc32c(bytes), block.checksum);
                    out.extend_from_slice(bytes);
                }
                BlockState::Absent | BlockState::Tombstone => out.resize(out.len() + BLOCK_SIZE, 0),
                BlockState::Bad => panic!("a bad block"),
            }
        }
        out
    }

    fn flush(&mut self, epoch: u64, watermark: Version) {
        let body = RequestBody::Flush(Flush {
            watermark,
            forget_below: Version::ZERO,
        });
        assert_eq!(self.ask(epoch, body), Ok(ReplyBody::Flush));
    }

    fn fence(
        &mut self,
        epoch: u64,
        create: bool,
        rebuild_epoch: u64,
    ) -> Result<FenceReply, Status> {
        let rebuild_epoch = Epoch(rebuild_epoch);
        match self.ask(
            epoch,
            RequestBody::Fence(Fence {
                create,
                rebuild_epoch,
                link: None,
            }),
        )? {
            ReplyBody::Fence(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }
}

fn write(epoch: u64, sequence: u64, first: u32, data: &[u8]) -> RequestBody {
    let count = (data.len() / BLOCK_SIZE) as u32;
    RequestBody::Write(Write {
        range: BlockRange::new(ChunkIndex(first / 1024), first % 1024, count).unwrap(),
        snapshot: SnapshotNumber(0),
        version: Version::new(epoch, sequence),
        durable: false,
        checksums: data.chunks(BLOCK_SIZE).map(crc32c::crc32c).collect(),
        data: [Bytes::copy_from_slice(data)].into_iter().collect(),
    })
}

fn pattern(seed: u64, blocks: usize) -> Vec<u8> {
    let mut rng = ashlar_platform::sim::Rng::new(seed);
    let mut data = vec![0; blocks * BLOCK_SIZE];
    rng.fill(&mut data);
    data
}

fn descriptor(epoch: u64, disks: &[(DiskId, ReplicaState)]) -> RequestBody {
    let replicas = disks
        .iter()
        .map(|&(disk, state)| ReplicaDescriptor {
            disk,
            state,
            inherits: false,
        })
        .collect();
    RequestBody::Configure(VolumeDescriptor {
        volume: VOLUME,
        epoch: Epoch(epoch),
        size_bytes: 64 << 20,
        min_replicas: 1,
        snapshot: SnapshotNumber(0),
        layers: Default::default(),
        parent: None,
        groups: vec![replicas],
        name: "volume".into(),
    })
}

#[test]
fn data_fences_and_identity_survive_a_killed_process() {
    let mut disk = Disk::new();
    let mut client = disk.client();
    assert!(!client.fence(3, true, 0).unwrap().existed);
    let configuration = descriptor(3, &[(disk.identity.disk, ReplicaState::InSync)]);
    assert_eq!(client.ask(3, configuration), Ok(ReplyBody::Configure));
    let (small, big) = (pattern(1, 3), pattern(2, 256));
    client.write(3, 1, 5, &small);
    client.write(3, 2, 1024, &big);
    assert_eq!(client.read(3, 5, 3), small);
    assert_eq!(client.read(3, 1024, 256), big);
    client.flush(3, Version::ZERO);
    client.write(3, 3, 2, &small);

    let before = disk.identity;
    disk.kill_and_reopen();
    assert_eq!(
        disk.identity.incarnation, before.incarnation,
        "the same kernel boot"
    );
    // The old connection is gone with the process.
    assert!(client.receive().is_none());
    let mut client = disk.client();
    assert_eq!(client.ask(2, RequestBody::Ping), Err(Status::Fenced));
    assert_eq!(client.ask(3, RequestBody::Ping), Ok(ReplyBody::Ping));
    assert_eq!(client.read(3, 5, 3), small);
    assert_eq!(client.read(3, 1024, 256), big);
    assert_eq!(
        client.read(3, 2, 3),
        small,
        "acknowledged, not flushed, and only the process died"
    );
    let fenced = client.fence(4, false, 0).unwrap();
    assert!(fenced.existed && fenced.written && !fenced.damaged);
    assert_eq!(fenced.highest, Version::new(3, 3));
    let mut zombie = disk.client();
    assert_eq!(zombie.ask(3, write(3, 4, 0, &small)), Err(Status::Fenced));
    assert_eq!(client.read(4, 0, 1), vec![0; BLOCK_SIZE]);
}

#[test]
fn a_graceful_stop_marks_the_disk_clean() {
    let mut disk = Disk::new();
    let mut client = disk.client();
    client.fence(1, true, 0).unwrap();
    let data = pattern(7, 1);
    client.write(1, 1, 9, &data);
    disk.stop();
    assert!(client.receive().is_none());
    assert!(offline::superblock(&disk.path).unwrap().clean);
    let (handle, identity, address) = start(&disk.path, 0);
    (disk.handle, disk.identity, disk.address) = (Some(handle), identity, address);
    assert_eq!(disk.client().read(1, 9, 1), data);
}

#[test]
fn many_requests_in_one_segment_are_all_answered() {
    let disk = Disk::new();
    let mut client = disk.client();
    client.fence(1, true, 0).unwrap();
    let blocks: Vec<Vec<u8>> = (0..200).map(|i| pattern(i, 1)).collect();
    let mut waiting = std::collections::BTreeSet::new();
    for (index, data) in blocks.iter().enumerate() {
        waiting.insert(
            client
                .send(1, write(1, index as u64 + 1, index as u32, data))
                .0,
        );
    }
    while !waiting.is_empty() {
        let reply = client.receive().unwrap();
        assert_eq!(reply.result, Ok(ReplyBody::Written(WriteOutcome::Applied)));
        assert!(waiting.remove(&reply.id.0), "answered twice");
    }
    assert_eq!(client.read(1, 0, 200), blocks.concat());
}

#[test]
fn hostile_bytes_end_their_connection_and_nothing_else() {
    let disk = Disk::new();
    let mut good = disk.client();
    good.fence(1, true, 0).unwrap();
    let mut frame = Vec::new();
    let request = Request {
        id: RequestId(1),
        volume: VOLUME,
        epoch: Epoch(1),
        incarnation: disk.identity.incarnation,
        body: write(1, 1, 0, &pattern(1, 1)),
    };
    encode_request(&request, &mut frame);
    let frame = frame.concat();
    for round in 0..300_u64 {
        let mut rng = ashlar_platform::sim::Rng::new(round);
        let mut bytes = frame.clone();
        match round % 3 {
            0 => rng.fill(&mut bytes),
            1 => {
                // A bit of the header or the fields: the checksums notice.
                let bit = rng.below(HEADER_LEN as u64 * 8) as usize;
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            _ => bytes[40..56].fill(0xff),
        }
        let mut bad = Client::connect(disk.address, disk.identity.incarnation);
        // The daemon may close it before everything is written.
        let _ = bad.stream.write_all(&bytes);
        assert!(bad.receive().is_none(), "round {round}");
    }
    // Half a frame, then nothing.
    let mut half = Client::connect(disk.address, disk.identity.incarnation);
    half.stream.write_all(&frame[..frame.len() / 2]).unwrap();
    drop(half);
    assert_eq!(good.ask(1, RequestBody::Ping), Ok(ReplyBody::Ping));
}

#[test]
fn a_greeting_for_another_disk_is_answered_and_ends_the_connection() {
    let disk = Disk::new();
    let mut client = Client::connect(disk.address, disk.identity.incarnation);
    let hello = Hello {
        disk: DiskId([1; 16]),
        ..disk.hello()
    };
    assert_eq!(
        client.ask(0, RequestBody::Hello(hello)),
        Err(Status::WrongTarget)
    );
    assert!(client.receive().is_none());
    let mut client = Client::connect(disk.address, disk.identity.incarnation);
    assert_eq!(client.ask(1, RequestBody::Ping), Err(Status::Invalid));
    assert!(client.receive().is_none());
}

#[test]
fn damaged_data_is_refused_on_arrival() {
    let disk = Disk::new();
    let mut client = disk.client();
    client.fence(1, true, 0).unwrap();
    let RequestBody::Write(mut body) = write(1, 1, 0, &pattern(1, 1)) else {
        panic!()
    };
    body.checksums[0] ^= 1;
    assert_eq!(
        client.ask(1, RequestBody::Write(body)),
        Err(Status::Checksum)
    );
    assert_eq!(client.read(1, 0, 1), vec![0; BLOCK_SIZE]);
}

#[test]
fn a_target_pulls_what_differs_from_a_source_over_tcp() {
    let (source, target) = (Disk::new(), Disk::new());
    let (mut at_source, mut at_target) = (source.client(), target.client());
    at_source.fence(1, true, 0).unwrap();
    at_target.fence(1, true, 0).unwrap();
    let mut expected = vec![0; 3 * 1024 * BLOCK_SIZE];
    for index in 0..60_u32 {
        let first = index * 51;
        let count = 1 + index as usize % 20;
        let data = pattern(u64::from(index), count);
        at_source.write(1, u64::from(index) + 1, first, &data);
        if index % 3 != 0 {
            at_target.write(1, u64::from(index) + 1, first, &data);
        }
        expected[first as usize * BLOCK_SIZE..][..data.len()].copy_from_slice(&data);
    }
    // Never acknowledged: higher at the target, unknown at the source.
    at_target.write(1, 900, 3000, &pattern(900, 2));

    let states = [
        (source.identity.disk, ReplicaState::InSync),
        (target.identity.disk, ReplicaState::Rebuilding),
    ];
    assert_eq!(
        at_source.ask(2, descriptor(2, &states)),
        Ok(ReplyBody::Configure)
    );
    assert!(at_target.fence(2, true, 2).unwrap().existed);
    // A write of the rebuild's epoch goes to both.
    let newer = pattern(77, 1);
    at_source.write(2, 1, 100, &newer);
    at_target.write(2, 1, 100, &newer);
    expected[100 * BLOCK_SIZE..][..BLOCK_SIZE].copy_from_slice(&newer);
    let order = PullStart {
        group: GroupIndex(0),
        group_count: 1,
        rebuild_epoch: Epoch(2),
        source: source.identity.disk,
        source_incarnation: source.identity.incarnation,
        source_address: source.address.to_string(),
        bytes_per_second: 0,
    };
    assert_eq!(
        at_target.ask(2, RequestBody::PullStart(order)),
        Ok(ReplyBody::PullStart)
    );
    let begin = Instant::now();
    let progress = loop {
        let group = GroupIndex(0);
        let Ok(ReplyBody::PullStatus(progress)) =
            at_target.ask(2, RequestBody::PullStatus { group })
        else {
            panic!()
        };
        if progress.state != PullState::Running {
            break progress;
        }
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(progress.state, PullState::Complete);
    let missing: u64 = (0..60).filter(|i| i % 3 == 0).map(|i| 1 + i % 20).sum();
    assert!(
        progress.blocks_moved <= missing + 2 && progress.blocks_moved >= missing,
        "{progress:?}"
    );
    at_target.flush(2, Version::ZERO);
    for chunk in 0..3_u32 {
        for part in 0..4 {
            let first = chunk * 1024 + part * 256;
            let range = first as usize * BLOCK_SIZE..(first as usize + 256) * BLOCK_SIZE;
            assert_eq!(
                at_target.read(2, first, 256),
                expected[range.clone()],
                "target, block {first}"
            );
            assert_eq!(
                at_source.read(2, first, 256),
                expected[range],
                "source, block {first}"
            );
        }
    }
    let Ok(AdminReply::Replicas(replicas)) =
        target.handle().admin_blocking(AdminRequest::ListReplicas)
    else {
        panic!()
    };
    assert_eq!(
        replicas[0].pull.unwrap().blocks_moved,
        progress.blocks_moved
    );
}

/// Bytes that a file takes on its file system.
fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    // In units of 512 bytes (stat(2)).
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn space_that_is_trimmed_goes_back_to_the_file_system_and_is_used_again() {
    const MIB: u64 = 1 << 20;
    let mut disk = Disk::new();
    let mut client = disk.client();
    client.fence(1, true, 0).unwrap();
    let blocks = (MIB as usize) / BLOCK_SIZE;
    for i in 0..16 {
        client.write(1, i + 1, i as u32 * blocks as u32, &pattern(i, blocks));
    }
    client.flush(1, Version::ZERO);
    let before = allocated(&disk.path);
    for (chunk, sequence) in [(0, 17), (1, 18), (2, 19)] {
        let trim = Trim {
            range: BlockRange::new(ChunkIndex(chunk), 0, 1024).unwrap(),
            snapshot: SnapshotNumber(0),
            version: Version::new(1, sequence),
            durable: false,
        };
        let answer = client.ask(1, RequestBody::Trim(trim));
        assert!(matches!(answer, Ok(ReplyBody::Written(_))), "{answer:?}");
    }
    client.flush(1, Version::ZERO);
    let begin = Instant::now();
    while allocated(&disk.path) + 11 * MIB > before {
        assert!(begin.elapsed() < PATIENCE, "12 MiB were trimmed");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What was not trimmed is there, and what was can be written again; also after a crash.
    assert_eq!(client.read(1, 12 * 256, 256), pattern(12, blocks));
    client.write(1, 20, 0, &pattern(100, blocks));
    client.flush(1, Version::ZERO);
    disk.kill_and_reopen();
    let mut client = disk.client();
    client.fence(1, false, 0).unwrap();
    assert_eq!(client.read(1, 0, 256), pattern(100, blocks));
    assert_eq!(client.read(1, 256, 256), vec![0; MIB as usize]);
    assert_eq!(client.read(1, 15 * 256, 256), pattern(15, blocks));
    disk.stop();
}
