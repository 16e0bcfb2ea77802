//! Randomness from the kernel (getrandom), for identities, incarnations and jitter. Engines take their
//! random numbers as arguments or from a seeded generator, never from here.
#![expect(unsafe_code, reason = "getrandom through libc")]

use std::io;

/// Fills `bytes` with random bytes.
///
/// # Panics
/// If the kernel has no randomness to give (before it is seeded, this call waits).
pub fn fill(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        // SAFETY: `rest` is valid for writes of its length during the call.
        let result = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(result) {
            Ok(count) => filled += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                assert_eq!(
                    error.kind(),
                    io::ErrorKind::Interrupted,
                    "getrandom failed: {error}"
                );
            }
        }
    }
}

/// `N` random bytes.
#[must_use]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    fill(&mut bytes);
    bytes
}

/// A random number.
#[must_use]
pub fn u64() -> u64 {
    u64::from_le_bytes(bytes())
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_differ_and_every_byte_is_filled() {
        assert_ne!(super::u64(), super::u64());
        let mut seen = [false; 1000];
        for _ in 0..64 {
            let bytes = super::bytes::<1000>();
            seen.iter_mut()
                .zip(bytes)
                .for_each(|(seen, byte)| *seen |= byte != 0);
        }
        assert!(seen.iter().all(|&seen| seen));
    }
}
