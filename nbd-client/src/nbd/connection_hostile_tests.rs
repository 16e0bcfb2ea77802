//! Hostile input: wrong lengths and magics, endless options, pieces of any size, random bytes.

use proptest::prelude::*;

use super::*;

#[test]
fn hostile_lengths_and_magics_end_the_connection() {
    let mut client = Client::new(export());
    let mut option = b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff".to_vec();
    assert!(matches!(
        client.send(&option),
        Err(ProtocolError::Length("option", _))
    ));
    assert!(client.input.capacity() < 1024 * 1024);
    option[0] = b'X';
    let mut client = Client::new(export());
    assert!(matches!(
        client.send(&option),
        Err(ProtocolError::Magic(_, "option"))
    ));
    let mut client = Client {
        input: BytesMut::new(),
        export: export(),
        connection: Connection::new(),
    };
    assert_eq!(
        client.send(&[0, 0, 0, 4]),
        Err(ProtocolError::ClientFlags(4))
    );

    let mut client = Client::transmitting(export(), true);
    let write = request_bytes(0, command::WRITE, 1, 0, u32::MAX);
    assert!(matches!(
        client.send(&write),
        Err(ProtocolError::Length("write", _))
    ));
    assert!(client.input.capacity() < 1024 * 1024);
    let mut client = Client::transmitting(export(), true);
    assert!(matches!(
        client.send(&[0; 28]),
        Err(ProtocolError::Magic(0, "request"))
    ));
}

#[test]
fn endless_options_end_the_connection() {
    let mut client = Client::new(export());
    let mut result = Ok(None);
    for _ in 0..2000 {
        result = client.send(&option_bytes(99, &[]));
        client.output();
        if result.is_err() {
            break;
        }
    }
    assert_eq!(result, Err(ProtocolError::TooManyOptions));
}

/// Feeds bytes in pieces of the given sizes; everything that was received, and the output.
fn feed(bytes: &[u8], pieces: &[usize]) -> (Vec<Result<Incoming, ProtocolError>>, Vec<u8>) {
    let mut client = Client {
        input: BytesMut::new(),
        export: export(),
        connection: Connection::new(),
    };
    let (mut got, mut rest, mut sizes) = (Vec::new(), bytes, pieces.iter().cycle());
    while !rest.is_empty() {
        let part = (*sizes.next().unwrap_or(&1)).clamp(1, rest.len());
        let mut result = client.send(&rest[..part]);
        rest = &rest[part..];
        loop {
            match result {
                Ok(None) => break,
                Ok(Some(incoming)) => got.push(Ok(incoming)),
                Err(error) => {
                    got.push(Err(error));
                    return (got, client.output());
                }
            }
            result = client.send(&[]);
        }
        assert!(client.input.capacity() < 4 * 1024 * 1024);
    }
    (got, client.output())
}

/// A plausible session, so that mutations of it reach deep states.
fn session() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(option::LIST, &[]));
    bytes.extend(option_bytes(option::INFO, &info_data("vol", &[1, 2, 3])));
    let contexts = context_data("vol", &["base:allocation", "x"]);
    bytes.extend(option_bytes(option::LIST_META_CONTEXT, &contexts));
    bytes.extend(option_bytes(option::SET_META_CONTEXT, &contexts));
    bytes.extend(option_bytes(option::GO, &info_data("vol", &[3])));
    bytes.extend(request_bytes(0, command::READ, 1, 0, 4096));
    bytes.extend(request_bytes(1, command::WRITE, 2, 4096, 700));
    bytes.extend([7; 700]);
    bytes.extend(request_bytes(0, command::BLOCK_STATUS, 3, 0, 1 << 20));
    bytes.extend(request_bytes(0, command::WRITE, 4, SIZE, 300));
    bytes.extend([8; 300]);
    bytes.extend(request_bytes(2, command::WRITE_ZEROES, 5, 1, 9999));
    bytes.extend(request_bytes(0, command::FLUSH, 6, 0, 0));
    bytes.extend(request_bytes(0, command::DISC, 7, 0, 0));
    bytes
}

proptest! {
    #[test]
    fn pieces_do_not_matter(pieces in prop::collection::vec(1_usize..200, 1..20)) {
        let whole = session();
        prop_assert_eq!(feed(&whole, &pieces), feed(&whole, &[whole.len()]));
    }

    #[test]
    fn random_input_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        feed(&bytes, &[usize::MAX]);
    }

    #[test]
    fn mutated_and_truncated_sessions_never_panic(
        cut in 0_usize..2500,
        changes in prop::collection::vec((0_usize..2500, any::<u8>()), 0..6),
        pieces in prop::collection::vec(1_usize..500, 1..5),
    ) {
        let mut bytes = session();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(cut.max(4));
        feed(&bytes, &pieces);
    }
}
