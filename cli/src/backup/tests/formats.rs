//! The bytes of objects, which must stay readable: a change here is a change of the format.

use uuid::Uuid;

use super::store::Objects;
use super::*;
use crate::backup::codec::{Codec, Kind};
use crate::backup::error::{BackupError, Damage};
use crate::backup::id::{ContentId, hex, parse_hex};
use crate::backup::key::Keys;
use crate::backup::manifest::{FORMAT, content_name, parse_content_name, parse_object_name};

fn keys() -> Keys {
    Keys {
        encryption: [1; 32],
        nonces: [2; 32],
        names: [3; 32],
    }
}

/// As version 1 writes them; another program, in another language and with other libraries, made these.
const PLAIN: &str = "415348420102000006000000060000000000000000000000000000000000000000000000000000005714c2c5b885193ad6abb47f4e23491cce9e571f8f15c5db7ba3da4f9b967b8a6173686c6172";
/// LZ4 may be packed in several ways: this one is only read.
const PACKED: &str = "4153484201020200400000000b000000000000000000000000000000000000000000000000000000bc5e8554c95ea28a1f07550c78d2c0ab6cc35b7819b2d37eb7770de9721e5cac1f61010027506161616161";
const ENCRYPTED: &str = "415348420102000106000000160000009be3823ee42e00b43d87731985f1717968e3b608b934ffb97bc3fb56018dd1e7f428db122f81e2c3507bf0b974bc713f69bc2bca66907ac871c314255fc08506d919a7f4b8969c7202f1ddff975e";

fn bytes(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks(2);
    let text = pairs.map(|pair| std::str::from_utf8(pair).unwrap());
    text.map(|t| parse_hex::<1>(t).unwrap()[0]).collect()
}

fn read(codec: &Codec, object: &str) -> Vec<u8> {
    codec
        .decode(Kind::Segment, "data/x", &bytes(object))
        .unwrap()
}

#[test]
fn objects_are_written_and_read_as_ever() {
    for (codec, object) in [
        (Codec::new(None), PLAIN),
        (Codec::new(Some(keys())), ENCRYPTED),
    ] {
        let written = codec.encode(Kind::Segment, "data/x", b"ashlar", Compression::Zstd);
        assert_eq!(hex(&written.unwrap()), object);
        assert_eq!(read(&codec, object), b"ashlar");
    }
    assert_eq!(read(&Codec::new(None), PACKED), [b'a'; 64]);
}

#[test]
fn names_are_as_ever() {
    let plain = Codec::new(None).id(Kind::Segment, b"ashlar");
    let keyed = Codec::new(Some(keys())).id(Kind::Segment, b"ashlar");
    assert_eq!(
        plain.to_string(),
        "a07741ad1069c26928a39c70983f0572d8659d97712388c76773828c707353f8"
    );
    assert_eq!(
        keyed.to_string(),
        "bb0b399ca39e29d2602491debeef2d5afc0e7f7313ff565daa7b79159bdc7388"
    );
    assert_ne!(plain, Codec::new(None).id(Kind::Page, b"ashlar"));
    let name = content_name(Kind::Segment, plain);
    assert_eq!(parse_content_name(&name), Some((Kind::Segment, plain)));
    assert_eq!(parse_content_name("data/00/zz"), None);
    assert_eq!(
        parse_content_name(&name.replacen("data/", "data/x", 1)),
        None
    );
    let (volume, backup) = (Uuid::from_u128(5), Uuid::from_u128(6));
    let name = crate::backup::manifest::object_name(volume, backup);
    assert_eq!(parse_object_name(&name), Some((volume, backup)));
    // What a local file system has of a put that died.
    assert_eq!(parse_object_name(&format!("{name}#1")), None);
}

#[test]
fn content_comes_back_however_it_is_packed() {
    for codec in [Codec::new(None), Codec::new(Some(keys()))] {
        for compression in [Compression::None, Compression::Zstd, Compression::Lz4] {
            for plain in [
                vec![],
                vec![0; 1 << 20],
                noise(1, 70_000),
                b"x".repeat(5000),
            ] {
                let object = codec
                    .encode(Kind::Segment, "n", &plain, compression)
                    .unwrap();
                assert!(
                    object.len() <= plain.len() + 72 + 16,
                    "stored raw if it does not shrink"
                );
                assert_eq!(codec.decode(Kind::Segment, "n", &object).unwrap(), plain);
                for (kind, name) in [(Kind::Page, "n"), (Kind::Segment, "m")] {
                    let other = codec.decode(kind, name, &object);
                    assert!(matches!(other, Err(BackupError::Damaged { .. })));
                }
            }
        }
    }
}

/// An object whose checksum was made right again after a change.
fn resealed(name: &str, mut object: Vec<u8>, change: impl Fn(&mut [u8])) -> Vec<u8> {
    change(&mut object);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&object[..40]);
    hasher.update(&(name.len() as u32).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(&object[72..]);
    let sum = *hasher.finalize().as_bytes();
    object[40..72].copy_from_slice(&sum);
    object
}

#[test]
fn hostile_objects_take_no_memory_and_pass_for_nothing() {
    let codec = Codec::new(None);
    let packed = codec
        .encode(Kind::Segment, "n", &vec![0; 1 << 20], Compression::Zstd)
        .unwrap();
    let damage = |object: &[u8]| match codec.decode(Kind::Segment, "n", object) {
        Err(BackupError::Damaged { damage, .. }) => damage,
        other => panic!("{other:?}"),
    };
    // It claims to become 4 GiB, less than it does, or more.
    let claims = |length: u32| {
        resealed("n", packed.clone(), |o| {
            o[8..12].copy_from_slice(&length.to_le_bytes())
        })
    };
    assert!(matches!(damage(&claims(u32::MAX)), Damage::TooLong { .. }));
    assert_eq!(damage(&claims(1000)), Damage::Unpack);
    assert_eq!(damage(&claims((1 << 20) + 1)), Damage::Unpack);
    for (at, value) in [(5, 9), (6, 9), (7, 1), (4, 0), (12, 1)] {
        damage(&resealed("n", packed.clone(), |o| o[at] = value));
    }
    let newer = resealed("n", packed.clone(), |o| o[4] = 2);
    let newer = codec.decode(Kind::Segment, "n", &newer);
    assert!(matches!(newer, Err(BackupError::TooNew { found: 2, .. })));
    for length in [0, 1, 71, 72, packed.len() - 1] {
        damage(&packed[..length]);
    }
}

#[test]
fn what_is_not_encrypted_does_not_pass_in_an_encrypted_repository() {
    let object = Codec::new(None).encode(Kind::Segment, "n", b"forged", Compression::None);
    let found = Codec::new(Some(keys())).decode(Kind::Segment, "n", &object.unwrap());
    let Err(BackupError::Damaged { damage, .. }) = found else {
        panic!("{found:?}");
    };
    assert_eq!(damage, Damage::NotEncrypted);
}

#[test]
fn manifests_are_refused_that_make_no_sense() {
    let manifest = Manifest {
        format: FORMAT,
        backup_id: Uuid::from_u128(9),
        origin: origin(),
        schedule: None,
        size_bytes: 3 * u64::from(SEGMENT) + 4096,
        segment_bytes: SEGMENT,
        base: None,
        began_unix_ms: 1,
        finished_unix_ms: 2,
        compression: Compression::Lz4,
        read_bytes: 3,
        sent_bytes: 4,
        sent_objects: 5,
        pages: vec![ContentId::new([1; 32]).to_string()],
    };
    let name = manifest.object_name();
    let parse = |m: &Manifest| Manifest::parse(&name, &m.to_bytes().unwrap());
    assert_eq!(parse(&manifest).unwrap(), manifest);
    let changes: [fn(&mut Manifest); 7] = [
        |m| m.size_bytes = 0,
        |m| m.size_bytes = u64::MAX,
        |m| m.size_bytes += 1,
        |m| m.segment_bytes = 0,
        |m| m.segment_bytes = u32::MAX,
        |m| m.pages.clear(),
        |m| m.backup_id = Uuid::from_u128(10),
    ];
    for change in changes {
        let mut wrong = manifest.clone();
        change(&mut wrong);
        assert!(matches!(parse(&wrong), Err(BackupError::Damaged { .. })));
    }
    let mut newer = manifest.clone();
    newer.format += 1;
    assert!(matches!(parse(&newer), Err(BackupError::TooNew { .. })));
    // As it stands in repositories.
    let text = String::from_utf8(manifest.to_bytes().unwrap()).unwrap();
    assert!(text.starts_with(
        r#"{"format":1,"backup_id":"00000000-0000-0000-0000-000000000009","origin":{"#
    ));
}

#[tokio::test]
async fn the_right_key_is_asked_for() {
    let (open, encrypted) = (Objects::new(), Objects::new());
    repository(&open.storage(), None).await.unwrap();
    repository(&encrypted.storage(), Some(&secret()))
        .await
        .unwrap();
    let other = Secret::Raw([8; 32]);
    let found = Repository::open(encrypted.storage(), Some(&other)).await;
    assert!(matches!(found, Err(BackupError::KeyWrong { .. })));
    let found = Repository::open(encrypted.storage(), None).await;
    assert!(matches!(found, Err(BackupError::KeyMissing)));
    let found = Repository::open(open.storage(), Some(&other)).await;
    assert!(matches!(found, Err(BackupError::KeyUnused)));
    let found = Repository::open(Objects::new().storage(), None).await;
    assert!(matches!(found, Err(BackupError::NoRepository(_))));
}
