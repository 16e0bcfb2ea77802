//! Names and ids: the CSI volume id is the metadata cluster's volume id; the volume's name follows from the CSI name.
//!
//! Invariants: the same CSI name always gives the same volume name, and two CSI names never give the same one
//! (up to SHA-256), so that CreateVolume is idempotent whichever controller carries it out.

use ashlar_proto::ids::VolumeId;
use sha2::{Digest as _, Sha256};

/// Longest string of CSI, in bytes.
pub const STRING_BYTES_MAX: usize = 128;
/// How the names begin that were made by hashing.
const HASHED_PREFIX: &str = "csi-sha256-";

/// Reads a CSI volume id; `None` is the id of no volume of ours.
pub fn parse(text: &str) -> Option<VolumeId> {
    // One spelling only: two spellings would be two locks and two attachments.
    let id: VolumeId = text.parse().ok()?;
    (id.to_string() == text && !id.is_nil()).then_some(id)
}

/// The CSI volume id of a volume.
pub fn format(id: &[u8]) -> String {
    VolumeId::from_slice(id).map_or_else(String::new, |id| id.to_string())
}

/// The name of the volume that belongs to a CSI name.
pub fn volume_name(csi_name: &str) -> String {
    if fits(csi_name) && !csi_name.starts_with(HASHED_PREFIX) {
        return csi_name.to_owned();
    }
    let digest = Sha256::digest(csi_name.as_bytes());
    let mut name = HASHED_PREFIX.to_owned();
    for byte in digest {
        name.push_str(&format!("{byte:02x}"));
    }
    name
}

/// Whether metadata takes the name as it is: lower-case letters, digits, `-`, `.`, `_`, with letters or digits at
/// both ends.
fn fits(name: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= STRING_BYTES_MAX
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes
            .iter()
            .all(|b| alphanumeric(b) || matches!(b, b'-' | b'.' | b'_'))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_fit_are_kept_and_others_hashed() {
        let pvc = "pvc-0b2e4f0e-6a3a-4d5c-9d62-2b8a0f3d7c11";
        assert_eq!(volume_name(pvc), pvc);
        for odd in ["Sanity-A", "a/b", "ü", "-a", "a-", "a b", &"x".repeat(129)] {
            let name = volume_name(odd);
            assert!(name.starts_with(HASHED_PREFIX) && fits(&name), "{name}");
            assert_eq!(name, volume_name(odd));
        }
        assert_ne!(volume_name("A"), volume_name("B"));
    }

    #[test]
    fn a_name_that_looks_hashed_does_not_collide_with_the_hashed_one() {
        let hashed = volume_name("A");
        assert_ne!(volume_name(&hashed), hashed);
    }

    #[test]
    fn ids_have_one_spelling() {
        let id = VolumeId::generate();
        assert_eq!(parse(&format(&id.0)).unwrap(), id);
        assert_eq!(parse(&id.to_string().to_uppercase()), None);
        assert_eq!(parse(&id.to_string().replace('-', "")), None);
        assert_eq!(parse("00000000-0000-0000-0000-000000000000"), None);
        assert_eq!(parse("fake-vol-id-1"), None);
        assert_eq!(format(&[1, 2]), "");
    }

    proptest! {
        #[test]
        fn every_name_gives_a_name_that_metadata_takes(name in ".{1,128}") {
            prop_assert!(fits(&volume_name(&name)));
        }
    }
}
