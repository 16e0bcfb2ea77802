//! The generated messages, clients and servers of CSI 1.13.
#![expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code; csi.proto and the CSI specification are the documentation"
)]

tonic::include_proto!("csi.v1");

/// The descriptors of csi.proto, encoded.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/csi-descriptors.bin"));

/// Whether a service of CSI has a method of this name.
pub fn is_method(name: &str) -> bool {
    use prost::Message as _;
    use std::collections::HashSet;
    use std::sync::LazyLock;
    static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
        let set = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap_or_default();
        let services = set.file.into_iter().flat_map(|f| f.service);
        let methods = services.flat_map(|s| s.method);
        methods.filter_map(|m| m.name).collect()
    });
    METHODS.contains(name)
}
