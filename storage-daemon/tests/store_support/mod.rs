//! A small simulated disk and a harness that drives one store over it.
//!
//! Invariants of the disk:
//! - A completed write is seen by reads; it is durable only after a sync that was submitted later.
//! - A power cut keeps any subset of the sectors (512 bytes) of writes that were not durable, in flight
//!   or completed.
#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(dead_code, reason = "each test file uses a part")]

pub mod clones;
pub mod layers;

use std::collections::BTreeMap;
use std::io;

use ashlar_platform::clock::Time;
use ashlar_platform::disk::{DiskCommand, DiskCompletion};
use ashlar_proto::ids::*;
use ashlar_proto::wire::{self, BlockState};
use bytes::Bytes;
use storage_daemon::store::*;

/// xorshift: enough randomness, the same everywhere.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// What a power cut does to writes that are not durable.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    LoseAll,
    KeepAll,
    /// Each write whole or not.
    Writes(u64),
    /// Each sector on its own.
    Sectors(u64),
}

#[derive(Clone, Default)]
pub struct TestDisk {
    /// What reads see.
    pub current: Vec<u8>,
    durable: Vec<u8>,
    /// Completed, not durable.
    volatile: Vec<(u64, Vec<u8>)>,
    in_flight: Vec<(DiskCommand, usize)>,
    pub fail_writes: bool,
    pub fail_syncs: bool,
    pub unreadable: Vec<std::ops::Range<u64>>,
    pub ios: u64,
    pub discards: u64,
}

/// What a discarded range reads as.
const DISCARDED: u8 = 0xdb;

impl TestDisk {
    pub fn formatted(options: &FormatOptions) -> Self {
        let mut image = vec![0; options.size_bytes as usize];
        for (offset, bytes) in Store::format_plan(options).unwrap() {
            image[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        }
        Self {
            durable: image.clone(),
            current: image,
            ..Self::default()
        }
    }

    pub fn submit(&mut self, command: DiskCommand) {
        let completed = self.volatile.len();
        self.in_flight.push((command, completed));
    }

    pub fn busy(&self) -> bool {
        !self.in_flight.is_empty()
    }

    fn bytes_of(data: &[Bytes]) -> Vec<u8> {
        data.concat()
    }

    /// Completes one command, which is chosen at random.
    pub fn complete(&mut self, rng: &mut Rng) -> DiskCompletion {
        let at = rng.below(self.in_flight.len() as u64) as usize;
        let (command, completed) = self.in_flight.swap_remove(at);
        self.ios += 1;
        match command {
            DiskCommand::Read {
                token,
                offset,
                length,
            } => {
                let range = offset..offset + length as u64;
                let bad = self
                    .unreadable
                    .iter()
                    .any(|u| u.start < range.end && range.start < u.end);
                let result = if bad {
                    Err(io::Error::from_raw_os_error(5))
                } else {
                    let (a, b) = (range.start as usize, range.end as usize);
                    Ok(Bytes::copy_from_slice(&self.current[a..b]))
                };
                DiskCompletion { token, result }
            }
            DiskCommand::Write {
                token,
                offset,
                data,
                durable,
            } => {
                let bytes = Self::bytes_of(&data);
                assert!(offset % 512 == 0 && bytes.len() % 512 == 0, "aligned");
                if self.fail_writes {
                    let result = Err(io::Error::from_raw_os_error(5));
                    return DiskCompletion { token, result };
                }
                self.current[offset as usize..offset as usize + bytes.len()]
                    .copy_from_slice(&bytes);
                self.volatile.push((offset, bytes));
                if durable {
                    self.harden(offset as usize, data.iter().map(Bytes::len).sum());
                }
                DiskCompletion {
                    token,
                    result: Ok(Bytes::new()),
                }
            }
            DiskCommand::Sync { token } => {
                if self.fail_syncs {
                    let result = Err(io::Error::from_raw_os_error(5));
                    return DiskCompletion { token, result };
                }
                for (offset, bytes) in self.volatile.drain(..completed) {
                    let at = offset as usize;
                    self.durable[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                for (_, n) in &mut self.in_flight {
                    *n = n.saturating_sub(completed);
                }
                DiskCompletion {
                    token,
                    result: Ok(Bytes::new()),
                }
            }
            DiskCommand::Discard {
                token,
                offset,
                length,
            } => {
                // What is there afterwards is nobody's business: something that no checksum matches.
                self.discards += 1;
                let range = offset as usize..(offset + length) as usize;
                self.current[range.clone()].fill(DISCARDED);
                self.durable[range].fill(DISCARDED);
                DiskCompletion {
                    token,
                    result: Ok(Bytes::new()),
                }
            }
        }
    }

    /// What the cache holds of a range becomes durable, and nothing else.
    fn harden(&mut self, offset: usize, length: usize) {
        let mut at = 0;
        while at < self.volatile.len() {
            let start = self.volatile[at].0 as usize;
            let bytes = self.volatile[at].1.len();
            if start < offset + length && offset < start + bytes {
                let (_, data) = self.volatile.remove(at);
                self.durable[start..start + bytes].copy_from_slice(&data);
                for (_, completed) in &mut self.in_flight {
                    *completed -= usize::from(*completed > at);
                }
            } else {
                at += 1;
            }
        }
    }

    /// The disk after the process died but not the machine: what completed stays, in flight may not.
    pub fn after_kill(&self, cut: Cut) -> Self {
        let mut image = self.current.clone();
        // What reached the cache is as volatile as what completed: the next sync makes it durable.
        let mut volatile = self.volatile.clone();
        volatile.extend(self.tear(&mut image, cut, false));
        Self {
            current: image,
            durable: self.durable.clone(),
            volatile,
            ..Self::default()
        }
    }

    /// The disk after a power cut.
    pub fn after_power_cut(&self, cut: Cut) -> Self {
        let mut image = self.durable.clone();
        self.tear(&mut image, cut, true);
        Self {
            current: image.clone(),
            durable: image,
            ..Self::default()
        }
    }

    /// Puts what a cut keeps into an image; returns it.
    fn tear(&self, image: &mut [u8], cut: Cut, volatile: bool) -> Vec<(u64, Vec<u8>)> {
        let mut kept = Vec::new();
        let completed = self.volatile.iter().filter(|_| volatile).cloned();
        let flying = self.in_flight.iter().filter_map(|(c, _)| match c {
            DiskCommand::Write { offset, data, .. } => Some((*offset, Self::bytes_of(data))),
            DiskCommand::Discard { offset, length, .. } => {
                Some((*offset, vec![DISCARDED; *length as usize]))
            }
            _ => None,
        });
        let seed = match cut {
            Cut::Writes(s) | Cut::Sectors(s) => s,
            _ => 1,
        };
        let mut rng = Rng::new(seed);
        for (offset, bytes) in completed.chain(flying) {
            let whole = rng.below(2) == 0;
            for (i, sector) in bytes.chunks(512).enumerate() {
                let keep = match cut {
                    Cut::LoseAll => false,
                    Cut::KeepAll => true,
                    Cut::Writes(_) => whole,
                    Cut::Sectors(_) => rng.below(2) == 0,
                };
                if keep {
                    let at = offset as usize + i * 512;
                    image[at..at + sector.len()].copy_from_slice(sector);
                    kept.push((at as u64, sector.to_vec()));
                }
            }
        }
        kept
    }
}

pub const VOLUME: VolumeId = VolumeId([7; 16]);

pub fn options(size_bytes: u64, log_bytes: u64) -> FormatOptions {
    FormatOptions {
        cluster: ClusterId([1; 16]),
        disk: DiskId([2; 16]),
        size_bytes,
        incarnation: Incarnation(100),
        log_bytes: Some(log_bytes),
        replica_slots: Some(3),
    }
}

pub fn config() -> StoreConfig {
    StoreConfig {
        cache_bytes: 1 << 20,
        batches_in_flight_max: 3,
        write_back_burst_bytes: 64 << 10,
        write_back_percent: 30,
        // A few completions: most discards meet other work.
        discard_after: Some(std::time::Duration::from_micros(50)),
        merge_pause: std::time::Duration::from_micros(20),
        ..StoreConfig::default()
    }
}

/// A store, its disk, and the answers it gave.
pub struct Harness {
    pub store: Store,
    pub disk: TestDisk,
    pub rng: Rng,
    pub now: Time,
    pub next_tag: u64,
    pub replies: BTreeMap<u64, Result<StoreReply, StoreError>>,
    pub ready: Option<StoreIdentity>,
    pub open_failed: Option<StoreError>,
    pub poisoned: bool,
    pub closed: bool,
    pub bad_reports: u64,
}

impl Harness {
    /// Opens a store on a disk without completing any I/O.
    pub fn start(disk: TestDisk, boot: u8, seed: u64) -> Self {
        Self::start_with(config(), disk, boot, seed)
    }

    pub fn start_with(config: StoreConfig, disk: TestDisk, boot: u8, seed: u64) -> Self {
        let now = Time(1_000_000);
        let store = Store::open(config, disk.current.len() as u64, [boot; 16], now);
        let mut h = Self {
            store,
            disk,
            rng: Rng::new(seed),
            now,
            next_tag: 1,
            replies: BTreeMap::new(),
            ready: None,
            open_failed: None,
            poisoned: false,
            closed: false,
            bad_reports: 0,
        };
        h.tick();
        h
    }

    /// Opens and recovers.
    pub fn open(disk: TestDisk, boot: u8, seed: u64) -> Self {
        let mut h = Self::start(disk, boot, seed);
        h.settle();
        assert!(h.ready.is_some(), "open failed: {:?}", h.open_failed);
        h
    }

    fn absorb(&mut self, out: Vec<StoreCommand>) {
        for command in out {
            match command {
                StoreCommand::Disk(c) => self.disk.submit(c),
                StoreCommand::Reply { tag, result } => {
                    assert!(
                        self.replies.insert(tag, result).is_none(),
                        "tag {tag} answered twice"
                    );
                }
                StoreCommand::Ready(identity) => self.ready = Some(identity),
                StoreCommand::OpenFailed(error) => self.open_failed = Some(error),
                StoreCommand::Poisoned { .. } => self.poisoned = true,
                StoreCommand::BadBlock { .. } => self.bad_reports += 1,
                StoreCommand::Closed => self.closed = true,
            }
        }
    }

    pub fn step(&mut self, event: StoreEvent) {
        let mut out = Vec::new();
        self.store.step(self.now, event, &mut out);
        self.absorb(out);
    }

    pub fn tick(&mut self) {
        self.step(StoreEvent::Tick);
    }

    pub fn request(&mut self, request: StoreRequest) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.step(StoreEvent::Request { tag, request });
        tag
    }

    /// Completes one I/O, then ends the iteration.
    pub fn one_io(&mut self) -> bool {
        if !self.disk.busy() {
            return false;
        }
        let completion = self.disk.complete(&mut self.rng);
        self.now = Time(self.now.0 + 10_000);
        self.step(StoreEvent::Disk(completion));
        self.tick();
        true
    }

    /// Completes everything that is under way; time stands (nearly) still.
    pub fn settle(&mut self) {
        for _ in 0..2_000_000 {
            if !self.one_io() {
                return;
            }
        }
        panic!("the store never comes to rest");
    }

    /// Lets time pass until nothing is due any more.
    pub fn idle(&mut self) {
        for _ in 0..100_000 {
            self.settle();
            let Some(deadline) = self.store.next_deadline() else {
                return;
            };
            self.now = self.now.max(deadline);
            self.tick();
        }
        panic!("the store never comes to rest");
    }

    pub fn call(&mut self, request: StoreRequest) -> Result<StoreReply, StoreError> {
        let tag = self.request(request);
        self.tick();
        self.settle();
        self.replies
            .remove(&tag)
            .unwrap_or_else(|| panic!("no answer to {tag}"))
    }

    pub fn create(&mut self, volume: VolumeId, epoch: u64) {
        let reply = self.call(StoreRequest::PutFence {
            volume,
            epoch: Epoch(epoch),
            create: true,
            rebuild_epoch: Epoch(0),
            link: None,
        });
        assert!(matches!(reply, Ok(StoreReply::Fenced { .. })), "{reply:?}");
    }

    pub fn flush(&mut self, watermark: Version, forget_below: Version) {
        let r = self.call(StoreRequest::Flush {
            volume: VOLUME,
            watermark,
            forget_below,
        });
        assert_eq!(r, Ok(StoreReply::Done));
    }

    pub fn read(&mut self, chunk: u32, first: u32, count: u32, snapshot: u32) -> wire::ReadReply {
        let request = StoreRequest::Read {
            volume: VOLUME,
            read: wire::Read {
                range: BlockRange::new(ChunkIndex(chunk), first, count).unwrap(),
                snapshot: SnapshotNumber(snapshot),
                exact_layer: false,
            },
        };
        match self.call(request) {
            Ok(StoreReply::Read(r)) => r,
            other => panic!("read: {other:?}"),
        }
    }

    /// Reads and checks that every Data block has the contents of its version.
    pub fn read_checked(
        &mut self,
        chunk: u32,
        first: u32,
        count: u32,
    ) -> Vec<(BlockState, Version)> {
        self.read_layer_checked(chunk, first, count, 0)
    }

    /// The same at a snapshot number.
    pub fn read_layer_checked(
        &mut self,
        chunk: u32,
        first: u32,
        count: u32,
        snapshot: u32,
    ) -> Vec<(BlockState, Version)> {
        let r = self.read(chunk, first, count, snapshot);
        let data = r.data.concat();
        let mut at = 0;
        let mut states = Vec::new();
        for (i, b) in r.blocks.iter().enumerate() {
            if b.state == BlockState::Data {
                let expected = content(chunk, first + i as u32, b.version);
                assert_eq!(crc32c::crc32c(&data[at..at + 4096]), b.checksum);
                assert!(
                    data[at..at + 4096] == expected[..],
                    "contents of {chunk}/{i} {:?}",
                    b.version
                );
                at += 4096;
            }
            states.push((b.state, b.version));
        }
        assert_eq!(at, data.len());
        states
    }

    /// Closes the store; the disk, while the harness stays as it is.
    pub fn shutdown_disk(&mut self) -> TestDisk {
        assert_eq!(self.call(StoreRequest::Shutdown), Ok(StoreReply::Done));
        assert!(self.closed);
        self.disk.clone()
    }

    pub fn shutdown(mut self) -> TestDisk {
        assert_eq!(self.call(StoreRequest::Shutdown), Ok(StoreReply::Done));
        assert!(self.closed);
        self.disk
    }
}

/// What the tests write into a block at a version.
pub fn content(chunk: u32, block: u32, version: Version) -> Vec<u8> {
    let mut rng = Rng::new(
        u64::from(chunk) << 40 ^ u64::from(block) << 20 ^ version.sequence.0 << 3 ^ version.epoch.0,
    );
    (0..512).flat_map(|_| rng.next().to_le_bytes()).collect()
}

pub fn write_of(chunk: u32, first: u32, count: u32, version: Version, layer: u32) -> wire::Write {
    let blocks: Vec<Vec<u8>> = (first..first + count)
        .map(|b| content(chunk, b, version))
        .collect();
    wire::Write {
        range: BlockRange::new(ChunkIndex(chunk), first, count).unwrap(),
        snapshot: SnapshotNumber(layer),
        version,
        durable: false,
        checksums: blocks.iter().map(|b| crc32c::crc32c(b)).collect(),
        data: [Bytes::from(blocks.concat())].into_iter().collect(),
    }
}

pub fn write(chunk: u32, first: u32, count: u32, version: Version) -> StoreRequest {
    let write = write_of(chunk, first, count, version, 0);
    StoreRequest::Write {
        volume: VOLUME,
        write,
        client: true,
    }
}

pub fn trim(chunk: u32, first: u32, count: u32, version: Version) -> StoreRequest {
    trim_layer(chunk, first, count, version, 0)
}

pub fn write_layer(
    chunk: u32,
    first: u32,
    count: u32,
    version: Version,
    layer: u32,
) -> StoreRequest {
    StoreRequest::Write {
        volume: VOLUME,
        write: write_of(chunk, first, count, version, layer),
        client: true,
    }
}

pub fn trim_layer(
    chunk: u32,
    first: u32,
    count: u32,
    version: Version,
    layer: u32,
) -> StoreRequest {
    StoreRequest::Trim {
        volume: VOLUME,
        trim: wire::Trim {
            range: BlockRange::new(ChunkIndex(chunk), first, count).unwrap(),
            snapshot: SnapshotNumber(layer),
            version,
            durable: false,
        },
        client: true,
    }
}
