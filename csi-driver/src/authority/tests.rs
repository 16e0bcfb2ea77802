//! What is replaced, what stays, and what RFC 7541 says of lengths.

use super::*;
use proptest::prelude::*;

/// `:authority: /csi/csi.sock`, literal with indexing, name by index, not in Huffman code.
fn plain() -> Vec<u8> {
    [&[0x41, 13][..], b"/csi/csi.sock"].concat()
}

fn stream_of(frames: &[(u8, u8, &[u8])]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    for (kind, flags, payload) in frames {
        frame(*kind, *flags, [0, 0, 0, 1], &[payload], &mut bytes);
    }
    bytes
}

fn sanitized(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Sanitizer::default().push(bytes, &mut out);
    out
}

#[test]
fn the_code_is_complete() {
    // Kraft's equation holds with equality for a complete prefix code, here of 257 symbols.
    let sum: u64 = HUFFMAN_LENGTHS
        .iter()
        .enumerate()
        .map(|(bits, count)| u64::from(*count) << (30 - bits))
        .sum();
    assert_eq!(sum, 1 << 30);
    assert_eq!(HUFFMAN_LENGTHS.iter().sum::<u16>(), 257);
}

#[test]
fn symbols_are_counted_as_in_the_examples_of_the_rfc() {
    // RFC 7541 appendix C.4.1: "www.example.com"; C.6.1: "302", a date, a location.
    let www = [
        0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
    ];
    assert_eq!(huffman_symbols(&www), Some(15));
    assert_eq!(huffman_symbols(&[0x64, 0x02]), Some(3));
    let location = [
        0x9d, 0x29, 0xad, 0x17, 0x18, 0x63, 0xc7, 0x8f, 0x0b, 0x97, 0xc8, 0xe9, 0xae, 0x82, 0xae,
        0x43, 0xd3,
    ];
    assert_eq!(
        huffman_symbols(&location),
        Some("https://www.example.com".len())
    );
    // Padding that is too long, or has a zero.
    assert_eq!(huffman_symbols(&[0xff]), None);
    assert_eq!(huffman_symbols(&[0x00]), None);
}

#[test]
fn what_is_written_has_as_many_symbols() {
    for len in [1, 7, 8, 13, 108, 202, 203, 204, 205, 4096] {
        let mut out = Vec::new();
        zeros(len, &mut out);
        let mut at = 0;
        let (huffman, value) = string(&out, &mut at).unwrap();
        assert!(huffman && at == out.len());
        assert_eq!(huffman_symbols(value), Some(len), "{len}");
    }
}

#[test]
fn only_the_authority_changes() {
    // :method POST (indexed), :path literal, :authority, then another field that looks like it.
    let mut block = vec![0x83, 0x44, 4];
    block.extend_from_slice(b"/a/b");
    let tail = [&[0x40, 4][..], b"path", &[13], b"/csi/csi.sock"].concat();
    let input = [&block[..], &plain(), &tail].concat();
    let mut expected = block;
    expected.push(0x41);
    zeros(13, &mut expected);
    expected.extend_from_slice(&tail);
    assert_eq!(sanitize(&input).unwrap(), expected);
}

#[test]
fn an_authority_with_its_name_spelled_out_is_found() {
    for first in [0x40, 0x00, 0x10] {
        let input = [&[first, 10][..], b":authority", &[2], b"/x"].concat();
        let output = sanitize(&input).unwrap();
        assert_eq!(output[..12], input[..12]);
        assert_eq!(output[12..], [0x82, 0x00, 0x3f]);
    }
}

#[test]
fn frames_without_headers_and_padding_are_kept_in_order() {
    let data = vec![7; 100];
    let settings = [0, 3, 0, 0, 0, 100];
    let padded = [&[3][..], &plain(), &[0, 0, 0]].concat();
    let input = stream_of(&[
        (4, 0, &settings),
        (TYPE_HEADERS, 0xc, &padded),
        (0, 1, &data),
    ]);
    let mut block = vec![0x41];
    zeros(13, &mut block);
    let expected = stream_of(&[
        (4, 0, &settings),
        (TYPE_HEADERS, 0x4, &block),
        (0, 1, &data),
    ]);
    assert_eq!(sanitized(&input), expected);
}

#[test]
fn a_block_cut_in_the_middle_of_the_value_is_put_together() {
    let block = plain();
    let (a, b) = block.split_at(6);
    let priority = [&[0, 0, 0, 0, 15][..], a].concat();
    let input = stream_of(&[(TYPE_HEADERS, 0x21, &priority), (TYPE_CONTINUATION, 0x4, b)]);
    let mut expected_block = vec![0, 0, 0, 0, 15, 0x41];
    zeros(13, &mut expected_block);
    assert_eq!(
        sanitized(&input),
        stream_of(&[(TYPE_HEADERS, 0x25, &expected_block)])
    );
}

#[test]
fn what_is_no_http2_and_what_is_malformed_goes_through() {
    let http1 = b"GET / HTTP/1.1\r\nHost: /csi/csi.sock\r\n\r\n";
    assert_eq!(sanitized(http1), http1);
    for payload in [&[0x41, 200, 1][..], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff]] {
        let input = stream_of(&[(TYPE_HEADERS, 0x4, payload)]);
        assert_eq!(sanitized(&input), input);
    }
    // A continuation of nothing, and padding longer than the frame.
    for (kind, flags, payload) in [(TYPE_CONTINUATION, 0x4, &[0x83][..]), (1, 0xc, &[9, 0x83])] {
        let input = stream_of(&[(kind, flags, payload), (TYPE_HEADERS, 4, &plain())]);
        assert_eq!(sanitized(&input), input);
    }
}

proptest! {
    #[test]
    fn how_the_bytes_arrive_does_not_matter(cuts in proptest::collection::vec(1_usize..40, 1..40)) {
        let mut block = vec![0x83];
        block.extend_from_slice(&plain());
        let input = stream_of(&[
            (4, 0, &[]), (TYPE_HEADERS, 0x4, &block), (0, 0, &[1; 60]), (TYPE_HEADERS, 0x0, &block),
            (TYPE_CONTINUATION, 0x4, &plain()),
        ]);
        let whole = sanitized(&input);
        let mut out = Vec::new();
        let mut sanitizer = Sanitizer::default();
        let mut rest = &input[..];
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            sanitizer.push(now, &mut out);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(out, whole);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut input = PREFACE.to_vec();
        input.extend_from_slice(&bytes);
        sanitized(&input);
        let _ = sanitize(&bytes);
    }
}
