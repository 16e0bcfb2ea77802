//! Why an operation on an attachment fails, and what that is in gRPC.

use ashlar_proto::ids::VolumeId;
use tonic::{Code, Status};

use super::device::DeviceError;
use super::netlink::NetlinkError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A field of the request.
    #[error("{field}: {why}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such volume.
    #[error("{0}")]
    NotFound(String),
    /// Another operation on the volume is under way.
    #[error("another operation on volume {0} is under way: try again when it is done")]
    Pending(VolumeId),
    /// The state of the volume or of the host does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// There is no free device.
    #[error("{0}")]
    Exhausted(String),
    /// Somebody does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The state directory.
    #[error("cannot keep the record of an attachment")]
    Record(#[source] std::io::Error),
    /// A bug.
    #[error("{0}: report this bug")]
    Bug(String),
}

impl From<NodeError> for Status {
    fn from(error: NodeError) -> Self {
        let code = match &error {
            NodeError::Invalid { .. } => Code::InvalidArgument,
            NodeError::NotFound(_) => Code::NotFound,
            NodeError::Pending(_) => Code::Aborted,
            NodeError::Precondition(_)
            | NodeError::Device(
                DeviceError::NotOurs { .. } | DeviceError::Netlink(NetlinkError::NoNbd),
            ) => Code::FailedPrecondition,
            NodeError::Exhausted(_) => Code::ResourceExhausted,
            NodeError::Unavailable(_) => Code::Unavailable,
            NodeError::Device(_) | NodeError::Record(_) | NodeError::Bug(_) => Code::Internal,
        };
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        Status::new(code, text)
    }
}
