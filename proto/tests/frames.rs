//! The data protocol's bytes: golden frames, round trips, and hostile input.
#![expect(clippy::unwrap_used, reason = "tests")]

use ashlar_proto::descriptor::{Parent, ReplicaDescriptor, VolumeDescriptor};
use ashlar_proto::ids::*;
use ashlar_proto::layers::LayerList;
use ashlar_proto::wire::*;
use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use smallvec::smallvec;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn join(parts: &[Bytes]) -> BytesMut {
    let mut all = BytesMut::new();
    for part in parts {
        all.extend_from_slice(part);
    }
    all
}

fn request(body: RequestBody) -> Request {
    Request {
        id: RequestId(7),
        volume: VolumeId([0x11; 16]),
        epoch: Epoch(5),
        incarnation: Incarnation(9),
        body,
    }
}

fn reply(body: ReplyBody) -> Reply {
    Reply {
        id: RequestId(7),
        volume: VolumeId([0x11; 16]),
        fence: Epoch(5),
        incarnation: Incarnation(9),
        result: Ok(body),
    }
}

fn range(chunk: u32, first: u32, count: u32) -> BlockRange {
    BlockRange::new(ChunkIndex(chunk), first, count).unwrap()
}

fn write(count: u32) -> Write {
    let data = Bytes::from(vec![0xabu8; count as usize * BLOCK_SIZE]);
    let crc = crc32c::crc32c(&data[..BLOCK_SIZE]);
    Write {
        range: range(3, 10, count),
        snapshot: SnapshotNumber(2),
        version: Version::new(5, 77),
        durable: true,
        checksums: std::iter::repeat_n(crc, count as usize).collect(),
        data: smallvec![data],
    }
}

fn descriptor() -> VolumeDescriptor {
    VolumeDescriptor {
        volume: VolumeId([0x22; 16]),
        epoch: Epoch(6),
        size_bytes: 1 << 30,
        min_replicas: 2,
        snapshot: SnapshotNumber(4),
        layers: LayerList {
            revision: 6,
            settled: SnapshotNumber(3),
            live: vec![SnapshotNumber(1), SnapshotNumber(3)],
        },
        parent: Some(Parent {
            volume: VolumeId([0x55; 16]),
            number: SnapshotNumber(2),
        }),
        groups: vec![vec![
            ReplicaDescriptor {
                disk: DiskId([0x33; 16]),
                state: ReplicaState::InSync,
                inherits: true,
            },
            ReplicaDescriptor {
                disk: DiskId([0x44; 16]),
                state: ReplicaState::Stale,
                inherits: false,
            },
        ]],
        name: "pg-data".into(),
    }
}

fn every_request() -> Vec<RequestBody> {
    let cursor = Cursor {
        chunk: ChunkIndex(1),
        snapshot: SnapshotNumber(2),
        block: 3,
    };
    vec![
        RequestBody::Hello(Hello {
            version_min: 1,
            version_max: 1,
            cluster: ClusterId([1; 16]),
            disk: DiskId([2; 16]),
            client: ClientId([3; 16]),
            ticket: Bytes::from_static(b"ticket"),
        }),
        RequestBody::Fence(Fence {
            create: true,
            rebuild_epoch: Epoch(4),
            link: None,
        }),
        RequestBody::Fence(Fence {
            create: true,
            rebuild_epoch: Epoch(0),
            link: Some(FenceLink {
                parent: Parent {
                    volume: VolumeId([7; 16]),
                    number: SnapshotNumber(3),
                },
                required: true,
                whole: false,
            }),
        }),
        RequestBody::Configure(descriptor()),
        RequestBody::Write(write(2)),
        RequestBody::Trim(Trim {
            range: range(1, 0, 1024),
            snapshot: SnapshotNumber(0),
            version: Version::new(1, 2),
            durable: false,
        }),
        RequestBody::Read(Read {
            range: range(1, 1023, 1),
            snapshot: SnapshotNumber(9),
            exact_layer: true,
        }),
        RequestBody::Flush(Flush {
            watermark: Version::new(1, 1),
            forget_below: Version::ZERO,
        }),
        RequestBody::Collect(Collect {
            group: GroupIndex(1),
            group_count: 2,
            watermark: Version::new(1, 1),
            from: cursor,
        }),
        RequestBody::Digest(Digest {
            chunk: ChunkIndex(8),
            from: cursor,
        }),
        RequestBody::ChunkDigests(ChunkDigests {
            group: GroupIndex(0),
            group_count: 1,
            from: ChunkIndex(5),
        }),
        RequestBody::PullStart(PullStart {
            group: GroupIndex(0),
            group_count: 1,
            rebuild_epoch: Epoch(9),
            source: DiskId([5; 16]),
            source_incarnation: Incarnation(6),
            source_address: "10.0.0.1:7300".into(),
            bytes_per_second: 1 << 20,
        }),
        RequestBody::PullStatus {
            group: GroupIndex(0),
        },
        RequestBody::Repair(write(1)),
        RequestBody::Ping,
        RequestBody::Layers(descriptor().layers),
    ]
}

fn every_reply() -> Vec<ReplyBody> {
    let cursor = Cursor {
        chunk: ChunkIndex(1),
        snapshot: SnapshotNumber(2),
        block: 3,
    };
    let info = |state| BlockInfo {
        state,
        version: Version::new(1, 2),
        checksum: 3,
    };
    vec![
        ReplyBody::Hello(HelloReply {
            version: 1,
            disk: DiskId([2; 16]),
        }),
        ReplyBody::Fence(FenceReply {
            existed: true,
            suspect: false,
            damaged: true,
            watermark: Version::new(1, 2),
            highest: Version::new(3, 4),
            written: true,
        }),
        ReplyBody::Configure,
        ReplyBody::Written(WriteOutcome::Applied),
        ReplyBody::Written(WriteOutcome::Superseded),
        ReplyBody::Read(ReadReply {
            range: range(0, 0, 4),
            blocks: smallvec![
                info(BlockState::Absent),
                info(BlockState::Data),
                info(BlockState::Tombstone),
                info(BlockState::Bad)
            ],
            data: smallvec![Bytes::from(vec![7u8; BLOCK_SIZE])],
        }),
        ReplyBody::Flush,
        ReplyBody::Entries(Entries {
            entries: vec![Entry {
                at: cursor,
                state: BlockState::Data,
                version: Version::new(1, 2),
                checksum: 3,
            }],
            next: Some(cursor),
        }),
        ReplyBody::ChunkDigests(ChunkDigestList {
            chunks: vec![ChunkDigest {
                chunk: ChunkIndex(1),
                digest: 2,
            }],
            next: None,
        }),
        ReplyBody::PullStart,
        ReplyBody::PullStatus(PullProgress {
            rebuild_epoch: Epoch(1),
            state: PullState::Running,
            chunks_done: 2,
            chunks_total: 3,
            blocks_moved: 4,
        }),
        ReplyBody::Ping,
        ReplyBody::Layers(LayerList::default()),
    ]
}

#[test]
fn every_request_survives_a_round_trip() {
    for body in every_request() {
        let sent = request(body);
        let mut parts = Vec::new();
        encode_request(&sent, &mut parts);
        let mut input = join(&parts);
        let got = decode(&mut input, Direction::Requests).unwrap().unwrap();
        assert_eq!(got, Decoded::Request(sent));
        assert!(input.is_empty());
    }
}

#[test]
fn every_reply_survives_a_round_trip() {
    for body in every_reply() {
        let sent = reply(body);
        let mut parts = Vec::new();
        encode_reply(&sent, &mut parts);
        let mut input = join(&parts);
        assert_eq!(
            decode(&mut input, Direction::Replies).unwrap().unwrap(),
            Decoded::Reply(sent)
        );
        assert!(input.is_empty());
    }
}

#[test]
fn every_status_survives_a_round_trip() {
    for number in 0..=u16::MAX {
        let Some(status) = Status::from_u16(number) else {
            continue;
        };
        assert_eq!(status as u16, number);
        let sent = Reply {
            result: Err(status),
            ..reply(ReplyBody::Ping)
        };
        let mut parts = Vec::new();
        encode_reply(&sent, &mut parts);
        let got = decode(&mut join(&parts), Direction::Replies)
            .unwrap()
            .unwrap();
        assert_eq!(got, Decoded::Reply(sent));
    }
}

#[test]
fn write_frame_has_its_golden_bytes() {
    let mut parts = Vec::new();
    encode_request(&request(RequestBody::Write(write(1))), &mut parts);
    assert_eq!(
        hex(&parts[0]),
        concat!(
            "41534844",                         // magic "ASHD"
            "01",                               // version
            "04",                               // kind: write
            "0000",                             // status
            "0700000000000000",                 // request id
            "11111111111111111111111111111111", // volume
            "0500000000000000",                 // epoch
            "0900000000000000",                 // incarnation
            "21000000",                         // length of the fields
            "00100000",                         // length of the data
            "d5711893",                         // crc32c of the fields
            "bb5d8293",                         // crc32c of the header before it
            "03000000",                         // chunk
            "0a00",                             // first block
            "0100",                             // blocks
            "02000000",                         // snapshot
            "0500000000000000",                 // version: epoch
            "4d00000000000000",                 // version: sequence
            "01",                               // durable
            "93413794",                         // crc32c of the block
        )
    );
    assert_eq!(parts[1].len(), BLOCK_SIZE);
}

#[test]
fn error_reply_has_its_golden_bytes() {
    let mut parts = Vec::new();
    encode_reply(
        &Reply {
            result: Err(Status::Fenced),
            ..reply(ReplyBody::Ping)
        },
        &mut parts,
    );
    assert_eq!(
        hex(&parts[0]),
        concat!(
            "4153484401800200",
            "0700000000000000",
            "11111111111111111111111111111111",
            "0500000000000000",
            "0900000000000000",
            "0000000000000000",
            "00000000",
            "5bcfb49d"
        )
    );
}

#[test]
fn layers_have_their_golden_bytes() {
    let fields = concat!(
        "0600000000000000", // revision
        "03000000",         // settled number
        "0200",             // live snapshots
        "0100000003000000",
    );
    let mut parts = Vec::new();
    encode_request(
        &request(RequestBody::Layers(descriptor().layers)),
        &mut parts,
    );
    assert_eq!(parts[0][5], 15);
    assert_eq!(hex(&parts[0][64..]), fields);
    let mut parts = Vec::new();
    encode_reply(&reply(ReplyBody::Layers(descriptor().layers)), &mut parts);
    assert_eq!(parts[0][5], 0x80 | 15);
    assert_eq!(hex(&parts[0][64..]), fields);
}

#[test]
fn malformed_layer_lists_are_refused() {
    let live = |live: &[u32]| live.iter().copied().map(SnapshotNumber).collect();
    for (settled, live) in [
        (2, live(&[1, 3])),
        (3, live(&[3, 1])),
        (3, live(&[1, 1])),
        (3, live(&[0])),
    ] {
        let layers = LayerList {
            revision: 1,
            settled: SnapshotNumber(settled),
            live,
        };
        let mut parts = Vec::new();
        encode_request(&request(RequestBody::Layers(layers)), &mut parts);
        assert!(decode(&mut join(&parts), Direction::Requests).is_err());
    }
}

#[test]
fn descriptor_has_its_golden_bytes() {
    let mut bytes = Vec::new();
    descriptor().encode(&mut bytes);
    assert_eq!(
        hex(&bytes),
        concat!(
            "03",                                 // format version
            "22222222222222222222222222222222",   // volume
            "0600000000000000",                   // epoch
            "0000004000000000",                   // size
            "02",                                 // min_replicas
            "04000000",                           // number that new writes carry
            "060000000000000003000000",           // layer list: revision, settled
            "02000100000003000000",               // live snapshots
            "55555555555555555555555555555555",   // parent: volume
            "02000000",                           // and snapshot
            "0100",                               // groups
            "02",                                 // replicas of group 0
            "3333333333333333333333333333333382", // in sync, inherits
            "4444444444444444444444444444444400", // stale
            "0770672d64617461",                   // name
        )
    );
    assert_eq!(VolumeDescriptor::decode(&bytes).unwrap(), descriptor());
}

#[test]
fn any_flipped_bit_of_head_is_refused() {
    let mut parts = Vec::new();
    encode_request(&request(RequestBody::Write(write(1))), &mut parts);
    let good = join(&parts);
    for bit in 0..parts[0].len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&mut bad, Direction::Requests).is_err(), "bit {bit}");
    }
}

#[test]
fn a_truncated_frame_asks_for_more_and_reserves_room_for_it() {
    let mut parts = Vec::new();
    encode_request(&request(RequestBody::Write(write(256))), &mut parts);
    let all = join(&parts);
    for length in [
        0,
        1,
        HEADER_LEN - 1,
        HEADER_LEN,
        HEADER_LEN + 5,
        all.len() - 1,
    ] {
        let mut input = BytesMut::from(&all[..length]);
        assert_eq!(decode(&mut input, Direction::Requests), Ok(None));
        assert_eq!(input.len(), length, "nothing is taken");
        if length >= HEADER_LEN {
            assert!(input.capacity() >= all.len());
        }
    }
}

#[test]
fn a_reply_is_refused_where_requests_are_expected() {
    let mut parts = Vec::new();
    encode_reply(&reply(ReplyBody::Ping), &mut parts);
    assert!(matches!(
        decode(&mut join(&parts), Direction::Requests),
        Err(FrameError::Unknown("kind", _))
    ));
}

/// Rewrites the checksums so that a mutation reaches the code behind them.
fn seal(frame: &mut [u8]) {
    let meta_len = u32::from_le_bytes(frame[48..52].try_into().unwrap()) as usize;
    if let Some(meta) = frame.get(HEADER_LEN..HEADER_LEN + meta_len) {
        let crc = crc32c::crc32c(meta);
        frame[56..60].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = crc32c::crc32c(&frame[..60]);
    frame[60..64].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn hostile_lengths_are_refused_without_memory() {
    for (at, value) in [
        (48, MAX_META as u32 + 1),
        (52, MAX_PAYLOAD as u32 + 1),
        (52, u32::MAX),
    ] {
        let mut parts = Vec::new();
        encode_request(&request(RequestBody::Ping), &mut parts);
        let mut frame = join(&parts);
        frame[at..at + 4].copy_from_slice(&value.to_le_bytes());
        seal(&mut frame);
        assert!(matches!(
            decode(&mut frame, Direction::Requests),
            Err(FrameError::Bounds(_))
        ));
        assert!(frame.capacity() < 1 << 20);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        for direction in [Direction::Requests, Direction::Replies] {
            let mut input = BytesMut::from(&bytes[..]);
            let _ = decode(&mut input, direction);
        }
    }

    #[test]
    fn mutated_and_sealed_frames_never_panic(
        which in 0usize..32,
        flips in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        cut in any::<usize>(),
    ) {
        let mut parts = Vec::new();
        let (requests, replies) = (every_request(), every_reply());
        let direction = if which < requests.len() {
            encode_request(&request(requests[which].clone()), &mut parts);
            Direction::Requests
        } else {
            encode_reply(&reply(replies[which % replies.len()].clone()), &mut parts);
            Direction::Replies
        };
        let mut frame = join(&parts);
        let head = frame.len().min(HEADER_LEN + 200);
        for (at, value) in flips {
            frame[at % head] = value;
        }
        seal(&mut frame);
        frame.truncate(HEADER_LEN + cut % (frame.len() - HEADER_LEN + 1));
        if let Ok(Some(Decoded::Request(r))) = decode(&mut frame, direction) {
            // What is accepted is within the limits, so that it can be sent on.
            let mut again = Vec::new();
            encode_request(&r, &mut again);
        }
    }

    #[test]
    fn random_descriptors_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = VolumeDescriptor::decode(&bytes);
    }
}
