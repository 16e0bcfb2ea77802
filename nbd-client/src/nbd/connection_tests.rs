//! Golden bytes of handshake and transmission, and what is refused.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use super::super::constants::{command, command_flag, option, option_reply};
use super::super::{
    Command, EINVAL, ENOSPC, ENOTSUP, EPERM, Export, Extent, MAX_PART_LENGTH, MAX_REQUEST_LENGTH,
    ProtocolError, ReplyStyle, Request,
};
use super::{Connection, Incoming};
use crate::engine::ReadSegment;

const SIZE: u64 = 64 * 1024 * 1024;

fn export() -> Export {
    Export {
        name: "vol".into(),
        description: "a volume".into(),
        size_bytes: SIZE,
        read_only: false,
    }
}

/// One option as a client sends it.
fn option_bytes(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = b"IHAVEOPT".to_vec();
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.extend_from_slice(data);
    out
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(name.len() as u32);
    out.extend_from_slice(name.as_bytes());
    out.put_u16(wanted.len() as u16);
    for w in wanted {
        out.put_u16(*w);
    }
    out
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(name.len() as u32);
    out.extend_from_slice(name.as_bytes());
    out.put_u32(queries.len() as u32);
    for q in queries {
        out.put_u32(q.len() as u32);
        out.extend_from_slice(q.as_bytes());
    }
    out
}

fn request_bytes(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(0x2560_9513);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(length);
    out
}

/// The option replies in `bytes`: (option, type, data).
fn option_replies(mut bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(bytes.get_u64(), 0x0003_e889_0455_65a9);
        let (kind, code, length) = (bytes.get_u32(), bytes.get_u32(), bytes.get_u32() as usize);
        out.push((kind, code, bytes[..length].to_vec()));
        bytes.advance(length);
    }
    out
}

struct Client {
    connection: Connection,
    export: Export,
    input: BytesMut,
}

impl Client {
    /// A client that has sent its flags.
    fn new(export: Export) -> Self {
        let mut client = Self {
            connection: Connection::new(),
            export,
            input: BytesMut::new(),
        };
        let greeting = client.output();
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(client.send(&[0, 0, 0, 3]), Ok(None));
        client
    }

    fn send(&mut self, bytes: &[u8]) -> Result<Option<Incoming>, ProtocolError> {
        self.input.extend_from_slice(bytes);
        self.connection.receive(&mut self.input, &self.export)
    }

    fn output(&mut self) -> Vec<u8> {
        self.connection.output().take_all()
    }

    fn options(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
        assert_eq!(self.send(&option_bytes(kind, data)), Ok(None));
        option_replies(&self.output())
    }

    /// A client in the transmission phase.
    fn transmitting(export: Export, structured: bool) -> Self {
        let mut client = Self::new(export);
        if structured {
            client.options(option::STRUCTURED_REPLY, &[]);
            client.options(
                option::SET_META_CONTEXT,
                &context_data("", &["base:allocation"]),
            );
        }
        client.options(option::GO, &info_data("", &[]));
        assert!(!client.connection.in_handshake());
        client
    }

    fn request(&mut self, bytes: &[u8]) -> Request {
        match self.send(bytes) {
            Ok(Some(Incoming::Request(request))) => request,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a request that is answered by the codec with a simple reply; its error.
    fn refused(&mut self, bytes: &[u8]) -> u32 {
        assert_eq!(self.send(bytes), Ok(None));
        let out = self.output();
        assert_eq!(out.len(), 16);
        assert_eq!(&out[..4], &0x6744_6698_u32.to_be_bytes());
        u32::from_be_bytes(out[4..8].try_into().unwrap())
    }
}

#[test]
fn export_name_has_golden_bytes() {
    let mut client = Client::new(export());
    client
        .send(&option_bytes(option::EXPORT_NAME, b"vol"))
        .unwrap();
    // Size; HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
    assert_eq!(client.output(), [0, 0, 0, 0, 4, 0, 0, 0, 0x0d, 0x6d]);
    assert!(!client.connection.in_handshake());
}

#[test]
fn export_name_pads_with_zeroes_unless_agreed_otherwise() {
    let mut client = Client {
        input: BytesMut::new(),
        export: export(),
        connection: Connection::new(),
    };
    client.output();
    client.send(&[0, 0, 0, 1]).unwrap();
    client
        .send(&option_bytes(option::EXPORT_NAME, b""))
        .unwrap();
    let out = client.output();
    assert_eq!(out.len(), 10 + 124);
    assert!(out[10..].iter().all(|b| *b == 0));
}

#[test]
fn export_name_of_an_unknown_export_ends_the_connection() {
    let mut client = Client::new(export());
    let result = client.send(&option_bytes(option::EXPORT_NAME, b"other"));
    assert_eq!(result, Err(ProtocolError::NoSuchExport));
}

#[test]
fn go_has_golden_bytes_and_all_information() {
    let mut client = Client::new(export());
    client.options(option::STRUCTURED_REPLY, &[]);
    let replies = client.options(option::GO, &info_data("vol", &[1, 2, 3]));
    let expected = [
        (
            option_reply::INFO,
            b"\0\0\0\0\0\0\x04\0\0\0\x0d\xed".to_vec(),
        ),
        (
            option_reply::INFO,
            b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec(),
        ),
        (option_reply::INFO, b"\0\x01vol".to_vec()),
        (option_reply::INFO, b"\0\x02a volume".to_vec()),
        (option_reply::ACK, vec![]),
    ];
    assert_eq!(replies.len(), expected.len());
    for (got, (code, data)) in replies.into_iter().zip(expected) {
        assert_eq!(got, (option::GO, code, data));
    }
}

#[test]
fn a_read_only_export_says_so() {
    let mut client = Client::new(Export {
        read_only: true,
        ..export()
    });
    let replies = client.options(option::INFO, &info_data("vol", &[]));
    assert_eq!(replies[0].2[10..], [0x05, 0x0f]);
    assert!(client.connection.in_handshake());
}

#[test]
fn options_that_are_refused_leave_the_handshake_usable() {
    let mut client = Client::new(export());
    let code = |replies: Vec<(u32, u32, Vec<u8>)>| {
        assert_eq!(replies.len(), 1);
        replies[0].1
    };
    assert_eq!(
        code(client.options(option::STARTTLS, &[])),
        option_reply::ERR_POLICY
    );
    assert_eq!(code(client.options(11, &[])), option_reply::ERR_UNSUP);
    assert_eq!(
        code(client.options(0xffff_ffff, &[1; 99])),
        option_reply::ERR_UNSUP
    );
    assert_eq!(
        code(client.options(option::LIST, &[1])),
        option_reply::ERR_INVALID
    );
    assert_eq!(
        code(client.options(option::STRUCTURED_REPLY, &[1])),
        option_reply::ERR_INVALID
    );
    let other = info_data("other", &[]);
    assert_eq!(
        code(client.options(option::GO, &other)),
        option_reply::ERR_UNKNOWN
    );
    for bad in [
        &b""[..],
        b"\xff\xff\xff\xff",
        b"\0\0\0\x01x",
        b"\0\0\0\0\0\x02\0\0",
    ] {
        assert_eq!(
            code(client.options(option::GO, bad)),
            option_reply::ERR_INVALID
        );
    }
    // Metadata contexts need structured replies.
    let context = context_data("", &["base:allocation"]);
    let refused = client.options(option::SET_META_CONTEXT, &context);
    assert_eq!(code(refused), option_reply::ERR_INVALID);
    assert_eq!(client.options(option::GO, &info_data("vol", &[])).len(), 3);
}

#[test]
fn list_names_the_export() {
    let mut client = Client::new(export());
    let replies = client.options(option::LIST, &[]);
    let server = b"\0\0\0\x03vola volume".to_vec();
    assert_eq!(
        replies,
        [
            (3, option_reply::SERVER, server),
            (3, option_reply::ACK, vec![])
        ]
    );
}

#[test]
fn abort_is_acknowledged_and_ends() {
    let mut client = Client::new(export());
    let result = client.send(&option_bytes(option::ABORT, &[]));
    assert_eq!(result, Ok(Some(Incoming::Disconnect)));
    assert_eq!(
        option_replies(&client.output()),
        [(2, option_reply::ACK, vec![])]
    );
    assert_eq!(client.send(b"anything"), Ok(None));
}

#[test]
fn meta_contexts_are_listed_and_selected() {
    let mut client = Client::new(export());
    client.options(option::STRUCTURED_REPLY, &[]);
    let found = |id: u8| {
        let mut data = vec![0, 0, 0, id];
        data.extend_from_slice(b"base:allocation");
        data
    };
    for queries in [&[][..], &["base:"], &["x:", "base:allocation"]] {
        let replies = client.options(option::LIST_META_CONTEXT, &context_data("vol", queries));
        assert_eq!(replies[0], (9, option_reply::META_CONTEXT, found(0)));
        assert_eq!(replies[1].1, option_reply::ACK);
    }
    let none = client.options(option::SET_META_CONTEXT, &context_data("vol", &["base:"]));
    assert_eq!(none, [(10, option_reply::ACK, vec![])]);
    let some = client.options(
        option::SET_META_CONTEXT,
        &context_data("vol", &["base:allocation"]),
    );
    assert_eq!(some[0], (10, option_reply::META_CONTEXT, found(1)));
    // Selected for "vol" and not for the default export.
    client.options(option::GO, &info_data("", &[]));
    client
        .send(&request_bytes(0, command::BLOCK_STATUS, 1, 0, 4096))
        .unwrap();
    assert_eq!(client.output()[20..24], EINVAL.to_be_bytes());
}

#[test]
fn simple_transmission_has_golden_bytes() {
    let mut client = Client::transmitting(export(), false);
    let request = client.request(&request_bytes(0, command::READ, 7, 512, 1024));
    assert_eq!(
        request,
        Request {
            cookie: 7,
            style: ReplyStyle::Simple,
            command: Command::Read {
                offset: 512,
                length: 1024
            }
        }
    );
    let segments = [
        ReadSegment::Data(Bytes::from_static(&[9; 600])),
        ReadSegment::Zeroes(424),
    ];
    client
        .connection
        .reply_read(request.style, 7, 512, segments.into_iter().collect());
    let mut expected = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x07".to_vec();
    expected.extend_from_slice(&[9; 600]);
    expected.extend_from_slice(&[0; 424]);
    assert_eq!(client.output(), expected);

    let mut bytes = request_bytes(command_flag::FUA, command::WRITE, 8, 0, 3);
    bytes.extend_from_slice(b"abc");
    let request = client.request(&bytes);
    let data = Bytes::from_static(b"abc");
    assert_eq!(
        request.command,
        Command::Write {
            offset: 0,
            data,
            fua: true,
            first: true,
            last: true
        }
    );
    client.connection.reply_done(request.style, 8);
    assert_eq!(
        client.output(),
        b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x08"
    );
    client.connection.reply_error(request.style, 9, 5);
    assert_eq!(
        client.output(),
        b"\x67\x44\x66\x98\0\0\0\x05\0\0\0\0\0\0\0\x09"
    );
}

#[test]
fn structured_transmission_has_golden_bytes() {
    let mut client = Client::transmitting(export(), true);
    let request = client.request(&request_bytes(0, command::READ, 7, 4096, 8 * 1024));
    assert_eq!(request.style, ReplyStyle::Structured);
    let data = || ReadSegment::Data(Bytes::from_static(&[9; 2048]));
    let segments = [
        data(),
        data(),
        ReadSegment::Zeroes(1024),
        ReadSegment::Zeroes(3072),
    ];
    client
        .connection
        .reply_read(request.style, 7, 4096, segments.into_iter().collect());
    let mut expected = b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x07\0\0\x10\x08".to_vec();
    expected.extend_from_slice(b"\0\0\0\0\0\0\x10\0");
    expected.extend_from_slice(&[9; 4096]);
    expected.extend_from_slice(b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c");
    expected.extend_from_slice(b"\0\0\0\0\0\0\x20\0\0\0\x10\0");
    assert_eq!(client.output(), expected);

    // With DF there is one chunk with its zeroes spelt out.
    let df = client.request(&request_bytes(command_flag::DF, command::READ, 8, 0, 4096));
    let segments = [data(), ReadSegment::Zeroes(2048)];
    client
        .connection
        .reply_read(df.style, 8, 0, segments.into_iter().collect());
    let mut expected = b"\x66\x8e\x33\xef\0\x01\0\x01\0\0\0\0\0\0\0\x08\0\0\x10\x08".to_vec();
    expected.extend_from_slice(&[0; 8]);
    expected.extend_from_slice(&[9; 2048]);
    expected.extend_from_slice(&[0; 2048]);
    assert_eq!(client.output(), expected);

    client.connection.reply_error(ReplyStyle::Structured, 9, 5);
    assert_eq!(
        client.output(),
        b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x09\0\0\0\x06\0\0\0\x05\0\0"
    );

    let status = client.request(&request_bytes(8, command::BLOCK_STATUS, 3, 0, 8192));
    assert_eq!(
        status.command,
        Command::BlockStatus {
            offset: 0,
            length: 8192,
            one: true
        }
    );
    client.connection.reply_block_status(
        3,
        &[Extent {
            length: 8192,
            flags: 3,
        }],
    );
    assert_eq!(
        client.output(),
        b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x03\0\0\0\x0c\0\0\0\x01\0\0\x20\0\0\0\0\x03"
    );
}

#[test]
fn a_long_write_comes_in_parts_that_end_at_aligned_offsets() {
    let mut client = Client::transmitting(export(), false);
    let part = u64::from(MAX_PART_LENGTH);
    let (offset, length) = (part - 4096, 2 * MAX_PART_LENGTH);
    let mut bytes = request_bytes(0, command::WRITE, 5, offset, length);
    bytes.extend(std::iter::repeat_n(1_u8, length as usize));
    client.input.extend_from_slice(&bytes);
    let mut got = Vec::new();
    while let Some(Incoming::Request(request)) = client.send(&[]).unwrap() {
        let Command::Write {
            offset,
            data,
            first,
            last,
            ..
        } = request.command
        else {
            panic!()
        };
        got.push((offset, data.len() as u64, first, last));
    }
    let expected = [
        (part - 4096, 4096, true, false),
        (part, part, false, false),
        (2 * part, part - 4096, false, true),
    ];
    assert_eq!(got, expected);
}

#[test]
fn wrong_requests_get_the_error_of_the_spec_and_the_connection_lives_on() {
    let mut client = Client::transmitting(export(), false);
    let read = |offset, length| request_bytes(0, command::READ, 1, offset, length);
    assert_eq!(client.refused(&read(SIZE, 1)), EINVAL);
    assert_eq!(client.refused(&read(u64::MAX, 2)), EINVAL);
    assert_eq!(client.refused(&read(0, MAX_REQUEST_LENGTH + 1)), EINVAL);
    assert_eq!(client.refused(&request_bytes(0, 99, 1, 0, 0)), EINVAL);
    assert_eq!(
        client.refused(&request_bytes(0x80, command::READ, 1, 0, 1)),
        EINVAL
    );
    // DF is not offered without structured replies.
    assert_eq!(
        client.refused(&request_bytes(4, command::READ, 1, 0, 1)),
        EINVAL
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::FLUSH, 1, 1, 0)),
        EINVAL
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::TRIM, 1, SIZE, 1)),
        EINVAL
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::WRITE_ZEROES, 1, SIZE, 1)),
        ENOSPC
    );
    assert_eq!(
        client.refused(&request_bytes(16, command::WRITE_ZEROES, 1, 1, 4096)),
        ENOTSUP
    );
    assert_eq!(
        client.refused(&request_bytes(18, command::WRITE_ZEROES, 1, 0, 4096)),
        ENOTSUP
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::BLOCK_STATUS, 1, 0, 4096)),
        EINVAL
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::CACHE, 1, 0, 4096)),
        0
    );
    assert_eq!(client.refused(&read(0, 0)), 0);
    // The payload of a refused write is skipped, also when it arrives in pieces.
    let mut write = request_bytes(0, command::WRITE, 1, SIZE - 1, 2);
    write.push(1);
    assert_eq!(client.refused(&write), ENOSPC);
    client.send(&[2]).unwrap();
    let request = client.request(&request_bytes(1, command::READ, 2, SIZE - 1, 1));
    assert_eq!(
        request.command,
        Command::Read {
            offset: SIZE - 1,
            length: 1
        }
    );
    assert_eq!(
        client.send(&request_bytes(0, command::DISC, 0, 0, 0)),
        Ok(Some(Incoming::Disconnect))
    );
}

#[test]
fn a_read_only_export_refuses_changes() {
    let mut client = Client::transmitting(
        Export {
            read_only: true,
            ..export()
        },
        false,
    );
    let mut write = request_bytes(0, command::WRITE, 1, 0, 2);
    write.extend_from_slice(&[1, 2]);
    assert_eq!(client.refused(&write), EPERM);
    assert_eq!(
        client.refused(&request_bytes(0, command::TRIM, 1, 0, 1)),
        EPERM
    );
    assert_eq!(
        client.refused(&request_bytes(0, command::WRITE_ZEROES, 1, 0, 1)),
        EPERM
    );
}
