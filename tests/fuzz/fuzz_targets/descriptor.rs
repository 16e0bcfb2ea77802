//! Bytes as volume descriptors: what is accepted encodes to the same bytes.
#![no_main]

use ashlar_proto::descriptor::VolumeDescriptor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(descriptor) = VolumeDescriptor::decode(bytes) {
        let mut again = Vec::new();
        descriptor.encode(&mut again);
        assert_eq!(again, bytes);
    }
});
