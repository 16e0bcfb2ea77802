//! Fields of messages as values of the model, with errors that name the field.

use std::collections::HashMap;

use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use crate::model::{
    FailureDomain, FlattenPolicy, Labels, PoolSpec, Refusal, RefusalCode, RequestKey,
};

/// A refusal as a gRPC status.
pub fn status(refusal: Refusal) -> Status {
    let code = match refusal.code {
        RefusalCode::InvalidArgument => tonic::Code::InvalidArgument,
        RefusalCode::NotFound => tonic::Code::NotFound,
        RefusalCode::AlreadyExists => tonic::Code::AlreadyExists,
        RefusalCode::FailedPrecondition => tonic::Code::FailedPrecondition,
        RefusalCode::ResourceExhausted => tonic::Code::ResourceExhausted,
        RefusalCode::Internal => tonic::Code::Internal,
        RefusalCode::Aborted => tonic::Code::Aborted,
    };
    Status::new(code, refusal.message)
}

/// An identity of 16 bytes.
pub fn id<T>(field: &str, bytes: &[u8], make: impl Fn(&[u8]) -> Option<T>) -> Result<T, Status> {
    make(bytes).ok_or_else(|| {
        Status::invalid_argument(format!("{field}: must have 16 bytes, not {}", bytes.len()))
    })
}

/// The request's key; a request without one gets a fresh key (and no protection on retries).
pub fn request_key(bytes: &[u8]) -> Result<RequestKey, Status> {
    if bytes.is_empty() {
        return Ok(RequestKey::generate());
    }
    id("request_id", bytes, |b| b.try_into().ok().map(RequestKey))
}

/// Labels in order.
pub fn labels(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

/// A small count.
pub fn count(field: &str, value: u32) -> Result<u8, Status> {
    u8::try_from(value)
        .map_err(|_| Status::invalid_argument(format!("{field}: {value} is too large")))
}

/// What a pool says about flattening, if it says something.
pub fn flatten_policy(spec: Option<&pb::PoolSpec>) -> Result<Option<FlattenPolicy>, Status> {
    match pb::FlattenPolicy::try_from(spec.map_or(0, |s| s.flatten)) {
        Ok(pb::FlattenPolicy::Unspecified) => Ok(None),
        Ok(pb::FlattenPolicy::Never) => Ok(Some(FlattenPolicy::Never)),
        Ok(pb::FlattenPolicy::Orphaned) => Ok(Some(FlattenPolicy::Orphaned)),
        Ok(pb::FlattenPolicy::Always) => Ok(Some(FlattenPolicy::Always)),
        Err(_) => Err(Status::invalid_argument("spec.flatten: unknown value")),
    }
}

/// A pool's specification with its defaults.
pub fn pool_spec(spec: Option<pb::PoolSpec>) -> Result<PoolSpec, Status> {
    let spec = spec.unwrap_or_default();
    let defaults = PoolSpec::default();
    let failure_domain = match pb::FailureDomain::try_from(spec.failure_domain) {
        Ok(pb::FailureDomain::Unspecified) => defaults.failure_domain,
        Ok(pb::FailureDomain::Node) => FailureDomain::Node,
        Ok(pb::FailureDomain::Zone) => FailureDomain::Zone,
        Ok(pb::FailureDomain::Disk) => FailureDomain::Disk,
        Err(_) => {
            return Err(Status::invalid_argument(
                "spec.failure_domain: unknown value",
            ));
        }
    };
    Ok(PoolSpec {
        selector: labels(spec.selector),
        replicas: match spec.replicas {
            0 => defaults.replicas,
            replicas => count("spec.replicas", replicas)?,
        },
        failure_domain,
        overprovision_percent: match spec.overprovision_percent {
            0 => defaults.overprovision_percent,
            percent => percent,
        },
    })
}
