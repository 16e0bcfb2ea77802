//! Generated gRPC clients, servers and messages. One module per package.
#![expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    missing_docs,
    reason = "generated code; the .proto files are the documentation"
)]

/// `ashlar.metadata.v1`: cluster, nodes, disks, pools, volumes, attachments, watch.
pub mod metadata {
    tonic::include_proto!("ashlar.metadata.v1");
}

/// `ashlar.daemon.v1`: administration of a storage daemon.
pub mod daemon {
    tonic::include_proto!("ashlar.daemon.v1");
}

/// `ashlar.node.v1`: attaching volumes on a node (`nbd-client`'s local service).
pub mod node {
    tonic::include_proto!("ashlar.node.v1");
}

/// `ashlar.raft.v1`: transport between metadata members.
pub mod raft {
    tonic::include_proto!("ashlar.raft.v1");
}
