//! Nodes and disks in and out of service, and what that and losses make the leader repair.

use std::sync::PoisonError;

use ashlar_proto::ids::{DiskId, NodeId};
use ashlar_proto::rpc::metadata as pb;
use tonic::Status;

use super::convert;
use super::member::{Fault, Member};
use crate::model::{Command, Operation, Part, Service};

type Result<T> = std::result::Result<T, Fault>;

impl Member {
    pub(super) async fn set_service(
        &self,
        request: pb::SetServiceRequest,
    ) -> Result<pb::SetServiceResponse> {
        let part = match &request.part {
            Some(pb::set_service_request::Part::NodeId(id)) => {
                Part::Node(convert::id("node_id", id, NodeId::from_slice)?)
            }
            Some(pb::set_service_request::Part::DiskId(id)) => {
                Part::Disk(convert::id("disk_id", id, DiskId::from_slice)?)
            }
            None => {
                return Err(
                    Status::invalid_argument("part: a node or a disk must be named").into(),
                );
            }
        };
        let draining = request.service() == pb::Service::Draining;
        let to = if request.to_disk_id.is_empty() {
            None
        } else if draining {
            let to = convert::id("to_disk_id", &request.to_disk_id, DiskId::from_slice)?;
            Some(to)
        } else {
            let refusal = "to_disk_id: only for what is draining";
            return Err(Status::invalid_argument(refusal).into());
        };
        let service = match pb::Service::try_from(request.service) {
            Ok(pb::Service::InUse) => Service::InUse,
            Ok(pb::Service::Cordoned) => Service::Cordoned,
            Ok(pb::Service::Draining) => Service::Draining { to },
            Ok(pb::Service::Unspecified) | Err(_) => {
                let refusal = "service: in use, cordoned or draining";
                return Err(Status::invalid_argument(refusal).into());
            }
        };
        let request = convert::request_key(&request.request_id)?;
        let operation = Operation::SetService { part, service };
        self.propose(Command { request, operation }).await?;
        self.moves.notify_one();
        Ok(pb::SetServiceResponse {})
    }

    pub(super) async fn get_repairs(&self, _: pb::GetRepairsRequest) -> Result<pb::Repairs> {
        self.linearize().await?;
        let repairs = self.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pb::Repairs {
            rebuilding: self.shared.state().rebuilding(),
            ..repairs.clone()
        })
    }
}

/// For those who ask.
pub(super) fn message(service: Service) -> pb::Service {
    match service {
        Service::InUse => pb::Service::InUse,
        Service::Cordoned => pb::Service::Cordoned,
        Service::Draining { .. } => pb::Service::Draining,
    }
}
