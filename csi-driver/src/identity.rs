//! The Identity service: who the driver is and what it can do.

use tonic::{Request, Response, Status};

use crate::rpc::identity_server::Identity;
use crate::rpc::plugin_capability::{Service, VolumeExpansion, service, volume_expansion};
use crate::rpc::{self, PluginCapability, plugin_capability};

/// Longest name of a driver (CSI: 63 characters of a domain name).
const DRIVER_NAME_BYTES_MAX: usize = 63;

/// The service.
#[derive(Clone, Debug)]
pub struct IdentityService {
    name: String,
    controller: bool,
}

impl IdentityService {
    /// Of the driver with this name; `controller`: whether this process serves the Controller,
    /// GroupController and SnapshotMetadata services.
    pub fn new(name: String, controller: bool) -> Self {
        Self { name, controller }
    }
}

/// Checks a driver's name: a domain name of at most 63 characters.
pub fn driver_name(text: &str) -> Result<String, String> {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let good = bytes.len() <= DRIVER_NAME_BYTES_MAX
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes
            .iter()
            .all(|b| alphanumeric(b) || matches!(b, b'-' | b'.'));
    match good {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "{text:?} is no domain name of at most {DRIVER_NAME_BYTES_MAX} lower-case letters, digits, '-' and '.'"
        )),
    }
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<rpc::GetPluginInfoRequest>,
    ) -> Result<Response<rpc::GetPluginInfoResponse>, Status> {
        Ok(Response::new(rpc::GetPluginInfoResponse {
            name: self.name.clone(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<rpc::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<rpc::GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| PluginCapability {
            r#type: Some(plugin_capability::Type::Service(Service {
                r#type: kind.into(),
            })),
        };
        let mut capabilities = vec![service(service::Type::VolumeAccessibilityConstraints)];
        if self.controller {
            capabilities.push(service(service::Type::ControllerService));
            capabilities.push(service(service::Type::GroupControllerService));
            capabilities.push(service(service::Type::SnapshotMetadataService));
        }
        capabilities.push(PluginCapability {
            r#type: Some(plugin_capability::Type::VolumeExpansion(VolumeExpansion {
                r#type: volume_expansion::Type::Online.into(),
            })),
        });
        Ok(Response::new(rpc::GetPluginCapabilitiesResponse {
            capabilities,
        }))
    }

    /// Whether this process works. That metadata or nbd-client do not answer is no reason to restart it, and the
    /// liveness probe would: `/readyz` says it instead.
    async fn probe(
        &self,
        _: Request<rpc::ProbeRequest>,
    ) -> Result<Response<rpc::ProbeResponse>, Status> {
        Ok(Response::new(rpc::ProbeResponse { ready: Some(true) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_names_are_domain_names() {
        assert!(driver_name("csi.ashlar.io").is_ok());
        for wrong in ["", "Csi.ashlar.io", "-a", "a.", "a_b", &"x".repeat(64)] {
            assert!(driver_name(wrong).is_err(), "{wrong}");
        }
    }
}
