//! Golden bytes of the messages, and answers as a kernel 6.1 sends them. Little-endian machines only, as the
//! bytes are in the order of the machine.
#![cfg(target_endian = "little")]

use std::io::Cursor;
use std::os::fd::{AsFd as _, AsRawFd as _};

use neli::{FromBytesWithInput as _, ToBytes as _};

use super::*;

fn bytes(message: &Message) -> Vec<u8> {
    let mut buffer = Cursor::new(Vec::new());
    message.to_bytes(&mut buffer).unwrap();
    buffer.into_inner()
}

fn parse(bytes: &[u8]) -> Message {
    Message::from_bytes_with_input(&mut Cursor::new(bytes), bytes.len()).unwrap()
}

/// Length, type, payload, padding.
fn tlv(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u16 + 4).to_le_bytes().to_vec();
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

const NESTED: u16 = 1 << 15;

#[test]
fn connect() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let connect = Connect {
        size_bytes: 1 << 30,
        block_size: 512,
        timeout_seconds: 5,
        dead_connection_seconds: 31_536_000,
        server_flags: 0x16d,
        backend: "0197-vol",
        sockets: vec![file.as_fd(), file.as_fd()],
    };
    let mut golden = vec![1, 1, 0, 0];
    // Attribute by attribute: 64-bit numbers, a string, and fds nested twice.
    golden.extend_from_slice(&[12, 0, 2, 0, 0, 0, 0, 0x40, 0, 0, 0, 0]);
    golden.extend_from_slice(&[12, 0, 3, 0, 0, 2, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[12, 0, 4, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[12, 0, 8, 0, 0x80, 0x33, 0xe1, 1, 0, 0, 0, 0]);
    golden.extend_from_slice(&[12, 0, 5, 0, 0x6d, 1, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[12, 0, 10, 0]);
    golden.extend_from_slice(b"0197-vol");
    let fd = file.as_raw_fd() as u8;
    golden.extend_from_slice(&[28, 0, 7, 0x80]);
    for _ in 0..2 {
        golden.extend_from_slice(&[12, 0, 1, 0x80, 8, 0, 1, 0, fd, 0, 0, 0]);
    }
    assert_eq!(bytes(&connect_message(&connect).unwrap()), golden);
}

#[test]
fn a_socket_and_a_size_are_never_in_one_message() {
    let file = std::fs::File::open("/dev/null").unwrap();
    let fd = (file.as_raw_fd() as u32).to_le_bytes();
    let mut golden = vec![3, 1, 0, 0];
    golden.extend(tlv(1, &7_u32.to_le_bytes()));
    golden.extend(tlv(10, b"v"));
    let mut replace = golden.clone();
    let item = tlv(1 | NESTED, &tlv(1, &fd));
    replace.extend(tlv(7 | NESTED, &item));
    assert_eq!(
        bytes(&replace_message(7, "v", file.as_fd()).unwrap()),
        replace
    );
    golden.extend(tlv(2, &4096_u64.to_le_bytes()));
    assert_eq!(bytes(&resize_message(7, "v", 4096).unwrap()), golden);
}

#[test]
fn disconnect_and_status() {
    let index = tlv(1, &300_u32.to_le_bytes());
    let message = index_message(command::DISCONNECT, Some(300)).unwrap();
    assert_eq!(bytes(&message), [&[2, 1, 0, 0], &index[..]].concat());
    let message = index_message(command::STATUS, None).unwrap();
    assert_eq!(bytes(&message), [5, 1, 0, 0]);
}

#[test]
fn answers() {
    let connected = parse(&[1, 0, 0, 0, 8, 0, 1, 0, 4, 0, 0, 0]);
    assert_eq!(index_of(&connected), Some(4));
    let dead = parse(&[4, 0, 0, 0, 8, 0, 1, 0, 9, 0, 0, 0]);
    assert_eq!(
        (*dead.cmd(), index_of(&dead)),
        (command::LINK_DEAD, Some(9))
    );
    let device = |index: u32, connected: u8| {
        let mut item = tlv(1, &index.to_le_bytes());
        item.extend(tlv(2, &[connected]));
        tlv(1 | NESTED, &item)
    };
    let mut answer = vec![5, 0, 0, 0];
    answer.extend(tlv(9 | NESTED, &[device(0, 1), device(11, 0)].concat()));
    let expected =
        [(0, true), (11, false)].map(|(index, connected)| DeviceStatus { index, connected });
    assert_eq!(statuses(&parse(&answer)).unwrap(), expected);
    assert_eq!(statuses(&parse(&[5, 0, 0, 0])).unwrap(), []);
}

#[test]
fn the_family_and_its_multicast_group() {
    let mut group = tlv(2, &6_u32.to_le_bytes());
    group.extend(tlv(1, b"nbd_mc_group\0"));
    let mut other = tlv(2, &5_u32.to_le_bytes());
    other.extend(tlv(1, b"other\0"));
    let groups = [tlv(1 | NESTED, &other), tlv(2 | NESTED, &group)].concat();
    let mut answer = vec![1, 2, 0, 0];
    answer.extend(tlv(2, b"nbd\0"));
    answer.extend(tlv(1, &27_u16.to_le_bytes()));
    answer.extend(tlv(7 | NESTED, &groups));
    assert_eq!(family_of(&parse(&answer)), Some((27, Some(6))));
    let mut alone = vec![1, 2, 0, 0];
    alone.extend(tlv(1, &27_u16.to_le_bytes()));
    assert_eq!(family_of(&parse(&alone)), Some((27, None)));
}

#[test]
fn a_kernel_without_nbd_says_what_to_do() {
    // Either this machine has no NBD, or it answers.
    match Nbd::open() {
        Ok(mut nbd) => drop(nbd.status(None).unwrap()),
        Err(NetlinkError::NoNbd) => {
            let text = NetlinkError::NoNbd.to_string();
            assert!(text.contains("modprobe nbd") && text.contains("--device loop"));
        }
        Err(other) => panic!("{other}"),
    }
}
