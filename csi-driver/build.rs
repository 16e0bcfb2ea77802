//! Generates the CSI gRPC code with protox, so that no protoc is needed on the builder's machine.
//!
//! Invariant: a message with a field that may hold a secret, or mount flags, has no generated `Debug`:
//! `src/redact.rs` writes it by hand, so that a secret cannot reach a log by carelessness.

use prost::Message as _;
use prost_types::DescriptorProto;

/// Fields that are not shown.
const HIDDEN: [&str; 2] = ["secrets", "mount_flags"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["proto/csi.proto"], ["proto"])?;
    let mut hidden = Vec::new();
    for file in &descriptors.file {
        for message in &file.message_type {
            collect(&format!(".{}", file.package()), message, &mut hidden);
        }
    }
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("csi-descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug(hidden)
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=proto");
    Ok(())
}

fn collect(scope: &str, message: &DescriptorProto, hidden: &mut Vec<String>) {
    let path = format!("{scope}.{}", message.name());
    if message.field.iter().any(|f| HIDDEN.contains(&f.name())) {
        hidden.push(path.clone());
    }
    for nested in &message.nested_type {
        collect(&path, nested, hidden);
    }
}
