//! Bytes from a network as data frames, in both directions. The checksums are made right first, so that
//! the fuzzer reaches the code behind them. What is accepted must survive another round trip.
#![no_main]

use ashlar_proto::wire::{Decoded, Direction, HEADER_LEN, decode, encode_reply, encode_request};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

fn seal(frame: &mut [u8]) {
    if frame.len() < HEADER_LEN {
        return;
    }
    let length = u32::from_le_bytes([frame[48], frame[49], frame[50], frame[51]]) as usize;
    if let Some(fields) = frame.get(HEADER_LEN..HEADER_LEN.saturating_add(length)) {
        let crc = ashlar_fuzz_crc(fields);
        frame[56..60].copy_from_slice(&crc.to_le_bytes());
    }
    let crc = ashlar_fuzz_crc(&frame[..60]);
    frame[60..64].copy_from_slice(&crc.to_le_bytes());
}

/// crc32c, bit by bit: independent of the code under test.
fn ashlar_fuzz_crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| (c >> 1) ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
    })
}

fuzz_target!(|bytes: &[u8]| {
    let mut sealed = bytes.to_vec();
    seal(&mut sealed);
    for input in [bytes, &sealed[..]] {
        for direction in [Direction::Requests, Direction::Replies] {
            let mut buffer = BytesMut::from(input);
            while let Ok(Some(message)) = decode(&mut buffer, direction) {
                let mut parts = Vec::new();
                match &message {
                    Decoded::Request(request) => encode_request(request, &mut parts),
                    Decoded::Reply(reply) => encode_reply(reply, &mut parts),
                }
                let mut again = BytesMut::new();
                parts.iter().for_each(|part| again.extend_from_slice(part));
                assert_eq!(decode(&mut again, direction), Ok(Some(message)));
            }
        }
    }
});
