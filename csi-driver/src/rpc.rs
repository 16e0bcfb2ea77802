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
