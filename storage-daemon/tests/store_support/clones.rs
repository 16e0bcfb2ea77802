//! A model of volumes, their snapshots and their clones on one disk: it copies everything.
//!
//! Invariant: every step waits for its answers, so the model knows exactly what each reader sees.

use std::collections::{BTreeMap, BTreeSet};

use ashlar_proto::descriptor::Parent;
use ashlar_proto::ids::*;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::{self, BlockState};
use storage_daemon::store::*;

use super::*;

pub const CHUNKS: u32 = 2;
pub const BLOCKS: u32 = 80;
pub const SLOTS: u32 = 8;

pub type Image = BTreeMap<(u32, u32), Version>;

/// A volume as its clients know it.
#[derive(Clone, Default)]
pub struct Volume {
    pub epoch: u64,
    pub sequence: u64,
    /// The number that new writes carry.
    pub number: u32,
    pub list: LayerList,
    pub head: Image,
    pub snapshots: BTreeMap<u32, Image>,
    /// Snapshots that the user has not deleted.
    pub wanted: BTreeSet<u32>,
    pub parent: Option<(u8, u32)>,
    pub depth: u32,
}

pub fn id(volume: u8) -> VolumeId {
    VolumeId([volume; 16])
}

pub fn options() -> FormatOptions {
    FormatOptions {
        replica_slots: Some(SLOTS),
        ..super::options(48 << 20, 1 << 20)
    }
}

pub struct World {
    pub h: Harness,
    pub rng: Rng,
    pub boot: u8,
    pub volumes: BTreeMap<u8, Volume>,
    pub next: u8,
    pub context: String,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let h = Harness::open(TestDisk::formatted(&options()), 1, seed);
        let mut w = Self {
            h,
            rng: Rng::new(seed ^ 0xc10e),
            boot: 1,
            volumes: BTreeMap::new(),
            next: 1,
            context: format!("seed {seed}"),
        };
        w.create(None);
        w
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.below(from.len() as u64) as usize])
    }

    pub fn any(&mut self) -> u8 {
        let all: Vec<u8> = self.volumes.keys().copied().collect();
        self.pick(&all).unwrap()
    }

    pub fn create(&mut self, parent: Option<(u8, u32)>) {
        let volume = self.next;
        self.next += 1;
        let mut new = Volume {
            epoch: 1,
            ..Volume::default()
        };
        if let Some((p, n)) = parent {
            let of = &self.volumes[&p];
            new = Volume {
                epoch: of.epoch + 1,
                number: n,
                list: LayerList {
                    revision: 1,
                    settled: SnapshotNumber(n),
                    live: Vec::new(),
                },
                head: of.snapshots[&n].clone(),
                parent,
                depth: of.depth + 1,
                ..Volume::default()
            };
        }
        let link = parent.map(|(p, n)| wire::FenceLink {
            parent: Parent {
                volume: id(p),
                number: SnapshotNumber(n),
            },
            required: true,
            whole: true,
        });
        let fence = StoreRequest::PutFence {
            volume: id(volume),
            epoch: Epoch(new.epoch),
            create: true,
            rebuild_epoch: Epoch(0),
            link,
        };
        let reply = self.h.call(fence);
        assert!(matches!(reply, Ok(StoreReply::Fenced { .. })), "{reply:?}");
        self.volumes.insert(volume, new);
        self.put_list(volume);
    }

    pub fn put_list(&mut self, volume: u8) {
        let layers = self.volumes[&volume].list.clone();
        let volume = id(volume);
        let reply = self.h.call(StoreRequest::PutLayers { volume, layers });
        assert_eq!(reply, Ok(StoreReply::Done));
    }

    pub fn update(&mut self, volume: u8) {
        let rng = &mut self.rng;
        let chunk = rng.below(CHUNKS.into()) as u32;
        let trim = rng.below(4) == 0;
        let (first, count) = match rng.below(4) {
            0 => (16 * rng.below(3) as u32, 32),
            _ => (
                rng.below(u64::from(BLOCKS) - 20) as u32,
                1 + rng.below(20) as u32,
            ),
        };
        let v = self.volumes.get_mut(&volume).unwrap();
        v.sequence += 1;
        let version = Version::new(v.epoch, v.sequence);
        for block in first..first + count {
            if trim {
                v.head.remove(&(chunk, block));
            } else {
                v.head.insert((chunk, block), version);
            }
        }
        let number = v.number;
        let request = if trim {
            trim_layer(chunk, first, count, version, number)
        } else {
            write_layer(chunk, first, count, version, number)
        };
        let (volume, client) = (id(volume), true);
        let request = match request {
            StoreRequest::Write { write, .. } => StoreRequest::Write {
                volume,
                write,
                client,
            },
            StoreRequest::Trim { trim, .. } => StoreRequest::Trim {
                volume,
                trim,
                client,
            },
            other => other,
        };
        let reply = self.h.call(request);
        assert!(matches!(reply, Ok(StoreReply::Written(_))), "{reply:?}");
    }

    /// Everything becomes durable, and tombstones may be forgotten.
    pub fn flush(&mut self) {
        for (volume, v) in self.volumes.clone() {
            let watermark = Version::new(v.epoch, v.sequence);
            let reply = self.h.call(StoreRequest::Flush {
                volume: id(volume),
                watermark,
                forget_below: watermark,
            });
            assert_eq!(reply, Ok(StoreReply::Done));
        }
    }

    pub fn snapshot(&mut self, volume: u8) {
        let v = self.volumes.get_mut(&volume).unwrap();
        v.number += 1;
        v.list.revision += 1;
        v.list.settled = SnapshotNumber(v.number);
        v.list.live.push(SnapshotNumber(v.number));
        v.snapshots.insert(v.number, v.head.clone());
        v.wanted.insert(v.number);
        self.put_list(volume);
    }

    /// Takes numbers off the lists that nobody wants and no clone needs; drops what is deleted.
    pub fn unpin(&mut self) {
        let pins: BTreeSet<(u8, u32)> = self.volumes.values().filter_map(|v| v.parent).collect();
        for volume in self.volumes.keys().copied().collect::<Vec<_>>() {
            let v = self.volumes.get_mut(&volume).unwrap();
            let before = v.list.live.len();
            let wanted = &v.wanted;
            v.list
                .live
                .retain(|n| wanted.contains(&n.0) || pins.contains(&(volume, n.0)));
            let live = v.list.live.clone();
            v.snapshots
                .retain(|n, _| live.contains(&SnapshotNumber(*n)));
            if live.len() < before {
                v.list.revision += 1;
                self.put_list(volume);
            }
        }
    }

    pub fn delete_snapshot(&mut self, volume: u8) {
        let v = self.volumes.get_mut(&volume).unwrap();
        let wanted: Vec<u32> = v.wanted.iter().copied().collect();
        if let Some(n) = self.pick(&wanted) {
            self.volumes.get_mut(&volume).unwrap().wanted.remove(&n);
            self.unpin();
        }
    }

    pub fn clone_some(&mut self) {
        let all: Vec<(u8, u32)> = self
            .volumes
            .iter()
            .filter(|(_, v)| v.depth < 3)
            .flat_map(|(id, v)| v.wanted.iter().map(|n| (*id, *n)))
            .collect();
        if self.volumes.len() < SLOTS as usize
            && let Some(parent) = self.pick(&all)
        {
            self.create(Some(parent));
        }
    }

    pub fn has_clones(&self, volume: u8) -> bool {
        let mut parents = self.volumes.values().filter_map(|v| v.parent);
        parents.any(|(p, _)| p == volume)
    }

    pub fn drop_volume(&mut self, volume: u8) {
        self.collect_cuts();
        let reply = self
            .h
            .call(StoreRequest::DropReplica { volume: id(volume) });
        if self.has_clones(volume) {
            // Perhaps the last link was cut in the meantime.
            self.collect_cuts();
            if self.has_clones(volume) {
                assert_eq!(reply, Err(StoreError::HasClones), "{}", self.context);
            }
            if reply.is_err() {
                return;
            }
        }
        assert_eq!(reply, Ok(StoreReply::Done), "{}", self.context);
        self.volumes.remove(&volume);
        self.unpin();
    }

    /// Learns which links were cut.
    pub fn collect_cuts(&mut self) {
        let Ok(StoreReply::LayerProgress(progress)) = self.h.call(StoreRequest::LayerProgress)
        else {
            panic!("no progress");
        };
        for (volume, v) in &mut self.volumes {
            let mut of = progress.iter().filter(|p| p.volume == id(*volume));
            if v.parent.is_some() && !of.any(|p| p.inherits) {
                v.parent = None;
                v.depth = 0;
            }
        }
        self.unpin();
    }

    pub fn cut_power(&mut self) {
        self.flush();
        // What goes on in the background, up to a random I/O.
        self.h.tick();
        for _ in 0..self.rng.below(60) {
            if !self.h.one_io() {
                let Some(deadline) = self.h.store.next_deadline() else {
                    break;
                };
                self.h.now = self.h.now.max(deadline);
                self.h.tick();
            }
        }
        let seed = self.rng.next();
        let disk = match self.rng.below(3) {
            0 => self.h.disk.after_kill(Cut::Sectors(seed)),
            1 => self.h.disk.after_power_cut(Cut::Sectors(seed)),
            _ => self.h.disk.after_power_cut(Cut::LoseAll),
        };
        self.boot += 1;
        self.h = Harness::open(disk, self.boot, seed);
        assert!(!self.h.ready.unwrap().damaged, "{}", self.context);
    }

    pub fn read(&mut self, volume: u8, number: SnapshotNumber) -> Image {
        let mut image = Image::new();
        for chunk in 0..CHUNKS {
            let request = StoreRequest::Read {
                volume: id(volume),
                read: wire::Read {
                    range: BlockRange::new(ChunkIndex(chunk), 0, BLOCKS).unwrap(),
                    snapshot: number,
                    exact_layer: false,
                },
            };
            let reply = match self.h.call(request) {
                Ok(StoreReply::Read(reply)) => reply,
                other => panic!("{}: {other:?}", self.context),
            };
            let data = reply.data.concat();
            let mut data = data.chunks_exact(4096);
            for (i, b) in reply.blocks.iter().enumerate() {
                assert_ne!(b.state, BlockState::Bad, "{}", self.context);
                if b.state == BlockState::Data {
                    let at = (chunk, i as u32);
                    assert!(data.next().unwrap() == content(at.0, at.1, b.version));
                    image.insert(at, b.version);
                }
            }
        }
        image
    }

    /// What a rebuild of the volume would see.
    pub fn listed(&mut self, volume: u8) -> BTreeMap<(u32, u32), (u32, Version)> {
        let mut image = BTreeMap::new();
        for chunk in (0..CHUNKS).map(ChunkIndex) {
            let mut from = wire::Cursor {
                chunk,
                ..wire::Cursor::default()
            };
            loop {
                let digest = wire::Digest { chunk, from };
                let volume = id(volume);
                let Ok(StoreReply::Entries(part)) =
                    self.h.call(StoreRequest::Digest { volume, digest })
                else {
                    panic!("{}: no listing", self.context);
                };
                for e in part.entries.iter().filter(|e| e.state == BlockState::Data) {
                    // Entries ascend by layer: the last one is the head's.
                    let at = (chunk.0, u32::from(e.at.block));
                    image.insert(at, (e.at.snapshot.0, e.version));
                }
                match part.next {
                    Some(next) => from = next,
                    None => break,
                }
            }
        }
        image
    }

    pub fn check(&mut self) {
        for (volume, v) in self.volumes.clone() {
            let context = format!("{}: volume {volume}", self.context);
            assert_eq!(
                self.read(volume, SnapshotNumber::HEAD),
                v.head,
                "{context}: head, parent {:?}, list {:?}",
                v.parent,
                v.list
            );
            for (n, image) in &v.snapshots {
                let seen = self.read(volume, SnapshotNumber(n - 1));
                assert_eq!(&seen, image, "{context}: snapshot {n}");
            }
            let listed = self.listed(volume);
            for (at, version) in &v.head {
                let found = listed.get(at).map(|l| l.1);
                assert_eq!(found, Some(*version), "{context}: listed {at:?}");
            }
        }
    }

    pub fn step(&mut self) {
        let volume = self.any();
        match self.rng.below(32) {
            0..=13 => self.update(volume),
            14..=16 => self.snapshot(volume),
            17 => self.delete_snapshot(volume),
            18..=20 => self.clone_some(),
            21 => self.flush(),
            22..=23 => {
                let volume = id(volume);
                let reply = self.h.call(StoreRequest::Flatten { volume });
                assert_eq!(reply, Ok(StoreReply::Done));
            }
            24 if self.volumes.len() > 1 => self.drop_volume(volume),
            25 => {
                self.h.idle();
                self.collect_cuts();
            }
            26..=27 => self.cut_power(),
            28 => self.check(),
            _ => {}
        }
    }
}
