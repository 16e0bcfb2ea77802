//! The identity of this run of the kernel: a store that was opened under another one may have lost what
//! was not flushed.

use std::{fs, io};

const BOOT_ID_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The 16 bytes of the kernel's boot id (a UUID): the same for every process until the machine reboots.
///
/// # Errors
/// If /proc is not mounted or does not hold a UUID there.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string(BOOT_ID_PATH)?;
    parse(text.trim()).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{BOOT_ID_PATH} holds no UUID: {text:?}"),
        )
    })
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|&c| c != '-')
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let pairs: Vec<u8> = digits
        .chunks(2)
        .filter(|p| p.len() == 2)
        .map(|p| p[0] << 4 | p[1])
        .collect();
    if digits.len() != 32 {
        return None;
    }
    pairs.try_into().ok()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    #[test]
    fn the_boot_id_is_stable_and_not_zero() {
        let id = super::boot_id().unwrap();
        assert_ne!(id, [0; 16]);
        assert_eq!(id, super::boot_id().unwrap());
    }

    #[test]
    fn only_uuids_parse() {
        assert!(super::parse("0123456789abcdef-0123456789abcde").is_none());
        assert!(super::parse("").is_none());
        assert!(super::parse("zz23456789abcdef0123456789abcdef").is_none());
        assert_eq!(
            super::parse("00000000-0000-0000-0000-0000000000ff").unwrap()[15],
            255
        );
    }
}
