//! Which versions of the disk format this build opens, and how older ones are brought up to date.
//!
//! Invariant: a structure of a newer version is refused, never guessed at. A change of the format adds
//! its number here, keeps the old structures' decoding in this file, and updates docs/formats.md and the
//! golden bytes in the same commit. Version 1 is the first: there is nothing older to convert.

use super::FormatError;

/// The version that this build writes.
pub const FORMAT_VERSION: u16 = 1;
/// The oldest version that this build reads.
const FORMAT_VERSION_MIN: u16 = 1;

/// Accepts the versions that this build reads.
pub fn check_version(version: u16) -> Result<(), FormatError> {
    if (FORMAT_VERSION_MIN..=FORMAT_VERSION).contains(&version) {
        Ok(())
    } else {
        Err(FormatError::Version(version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_and_null_versions_are_refused() {
        assert_eq!(check_version(1), Ok(()));
        assert_eq!(check_version(0), Err(FormatError::Version(0)));
        assert_eq!(check_version(2), Err(FormatError::Version(2)));
    }
}
