//! CreateVolume and DeleteVolume.
//!
//! Invariants: a CSI name makes one volume, whoever asks and however often; an existing volume is the answer only
//! if it is what was asked for. The volume's labels say what it was made with.

use ashlar_proto::rpc::metadata as pb;
use tonic::Code;

use super::source::Source;
use super::{ControllerService, csi_volume, no_mutable_parameters};
use crate::errors::{Error, Result};
use crate::metadata::{Metadata, request_id};
use crate::parameters::{NAME_LABEL, Parameters, Placement};
use crate::validate::{Access, Capability, Range};
use crate::{rpc, topology, validate, volume_id};

/// What a caller wishes for.
struct Wish {
    csi_name: String,
    name: String,
    capabilities: Vec<Capability>,
    range: Range,
    parameters: Parameters,
    near: Option<String>,
    source: Option<Source>,
}

impl Wish {
    fn parse(request: &rpc::CreateVolumeRequest) -> Result<Self> {
        let csi_name = validate::required("name", &request.name)?;
        validate::map("parameters", &request.parameters)?;
        validate::map("secrets", &request.secrets)?;
        let capabilities =
            validate::capabilities("volume_capabilities", &request.volume_capabilities)?;
        no_mutable_parameters(&request.mutable_parameters)?;
        let parameters = Parameters::parse(&request.parameters)?;
        for (at, capability) in capabilities.iter().enumerate() {
            if let (Access::Mount { fs_type, .. }, Some(class)) =
                (&capability.access, parameters.fs_type)
                && fs_type.is_some_and(|f| f != class)
            {
                return Err(Error::invalid(
                    format!("volume_capabilities[{at}].mount.fs_type"),
                    format!("differs from the StorageClass' file system, {class}"),
                ));
            }
        }
        let near = topology::wanted_node(request.accessibility_requirements.as_ref())?;
        if parameters.placement == Placement::Local && near.is_none() {
            return Err(Error::invalid(
                "parameters[placement]",
                format!(
                    "local needs to know the consuming node ({} in accessibility_requirements): use it in a StorageClass \
                     with volumeBindingMode WaitForFirstConsumer",
                    topology::NODE_KEY
                ),
            ));
        }
        Ok(Self {
            csi_name: csi_name.to_owned(),
            name: volume_id::volume_name(csi_name),
            capabilities,
            range: Range::parse(request.capacity_range.as_ref())?,
            parameters,
            near,
            source: Source::parse(request.volume_content_source.as_ref())?,
        })
    }

    /// The existing volume, if it is what is wished for.
    fn accept(&self, volume: pb::Volume) -> Result<pb::Volume> {
        let differs = |what: &str| {
            Err(Error::Exists(format!(
                "volume {} exists with another {what}; use another name, or delete it first",
                self.csi_name
            )))
        };
        let parameters = &self.parameters;
        let mut labels = volume.labels.clone();
        let wished = parameters.labels(&self.csi_name);
        if labels.get(NAME_LABEL) != Some(&self.csi_name) {
            return differs("origin (it was not made for this CSI name)");
        }
        if Source::of(&volume) != self.source {
            return differs("source");
        }
        if !self.range.admits(volume.size_bytes) {
            return differs("size");
        }
        if parameters.pool.as_ref().is_some_and(|p| *p != volume.pool) {
            return differs("pool");
        }
        if parameters.replicas.is_some_and(|r| r != volume.replicas)
            || parameters
                .min_replicas
                .is_some_and(|m| m != volume.min_replicas)
        {
            return differs("number of replicas");
        }
        // Names in Kubernetes are for people; everything else of ours must agree.
        labels.retain(|key, _| key.starts_with("csi.ashlar.io/"));
        let ours = wished
            .iter()
            .filter(|(k, _)| k.starts_with("csi.ashlar.io/"));
        if labels.len() != ours.clone().count()
            || ours.clone().any(|(k, v)| labels.get(k) != Some(v))
        {
            return differs("file system, mkfsOptions, blockSize or placement");
        }
        Ok(volume)
    }

    async fn pool(&self, metadata: &Metadata) -> Result<String> {
        if let Some(pool) = &self.parameters.pool {
            return Ok(pool.clone());
        }
        if self.source.is_some() {
            // Where the source is.
            return Ok(String::new());
        }
        let pools = metadata.pools().await?;
        the_only_pool(&pools)
    }

    /// The volume that there is, or else a new one.
    async fn fulfil(self, metadata: &Metadata) -> Result<pb::Volume> {
        // Both at once: it saves a round trip. An existing volume is answered whatever became of the pools.
        let (existing, pool) = tokio::join!(metadata.volume_named(&self.name), self.pool(metadata));
        if let Some(volume) = existing? {
            return self.accept(volume);
        }
        let least = validate::volume_bytes_min(&self.capabilities, self.parameters.fs_type);
        let size_bytes = match self.source {
            Some(source) => source.choose(metadata, &self.range, least).await?,
            None => self.range.choose(least)?,
        };
        let pool = pool?;
        let request = pb::CreateVolumeRequest {
            source: self.source.map(Source::asked),
            request_id: request_id(),
            name: self.name.clone(),
            size_bytes,
            pool: pool.clone(),
            replicas: self.parameters.replicas.unwrap_or(0),
            min_replicas: self.parameters.min_replicas.unwrap_or(0),
            groups: 0,
            labels: self.parameters.labels(&self.csi_name),
            preferred_node: self.near.clone().unwrap_or_default(),
            require_preferred_node: self.parameters.placement == Placement::Local,
        };
        let doing = format!("create volume {}", self.csi_name);
        let created = metadata
            .ask(&doing, request, async |mut c, q| c.create_volume(q).await)
            .await;
        match created {
            Ok(volume) => {
                tracing::info!(
                    name = self.csi_name,
                    volume = volume_id::format(&volume.volume_id),
                    size_bytes,
                    pool,
                    "volume created"
                );
                Ok(volume)
            }
            // Another controller was quicker.
            Err(error) if error.code() == Code::AlreadyExists => {
                match metadata.volume_named(&self.name).await? {
                    Some(volume) => self.accept(volume),
                    None => Err(Error::Busy(format!("volume {}", self.csi_name))),
                }
            }
            Err(error) if error.code() == Code::NotFound && self.source.is_none() => {
                let pools = metadata.pools().await?;
                if pools.iter().any(|p| p.name == *pool) {
                    // Then it is the node that the volume was to be on.
                    return Err(Error::Exhausted(error.to_string()));
                }
                Err(Error::invalid(
                    "parameters[pool]",
                    format!("pool {pool:?} does not exist; accepted: {}", names(&pools)),
                ))
            }
            Err(error) => Err(error),
        }
    }
}

/// The pool for a StorageClass that names none.
pub(super) fn the_only_pool(pools: &[pb::Pool]) -> Result<String> {
    match pools {
        [one] => Ok(one.name.clone()),
        [] => Err(Error::Precondition(
            "there is no pool yet; make one with `ashlar pool create`".to_owned(),
        )),
        several => Err(Error::invalid(
            "parameters[pool]",
            format!(
                "is missing, and there are several pools; accepted: {}",
                names(several)
            ),
        )),
    }
}

fn names(pools: &[pb::Pool]) -> String {
    /// Most names in a message.
    const SHOWN_MAX: usize = 20;
    let mut names: Vec<&str> = pools.iter().map(|p| p.name.as_str()).collect();
    names.sort_unstable();
    if names.len() > SHOWN_MAX {
        names.truncate(SHOWN_MAX);
        names.push("...");
    }
    names.join(", ")
}

impl ControllerService {
    pub(super) async fn create(
        &self,
        request: rpc::CreateVolumeRequest,
    ) -> Result<rpc::CreateVolumeResponse> {
        let wish = Wish::parse(&request)?;
        let metadata = self.metadata.clone();
        let key = wish.name.clone();
        let volume = self
            .locks
            .run(&key, async move { wish.fulfil(&metadata).await })
            .await?;
        Ok(rpc::CreateVolumeResponse {
            volume: Some(csi_volume(&volume)),
        })
    }

    pub(super) async fn delete(
        &self,
        request: rpc::DeleteVolumeRequest,
    ) -> Result<rpc::DeleteVolumeResponse> {
        let id = validate::required("volume_id", &request.volume_id)?;
        // An id that is none of ours cannot be the id of a volume that there is.
        let Some(volume) = volume_id::parse(id) else {
            return Ok(rpc::DeleteVolumeResponse {});
        };
        let metadata = self.metadata.clone();
        let doing = format!("delete volume {id}");
        let delete = async move {
            let request = pb::DeleteVolumeRequest {
                request_id: request_id(),
                volume_id: volume.to_vec(),
            };
            let deleted = metadata
                .ask(&doing, request, async |mut c, q| c.delete_volume(q).await)
                .await;
            match deleted {
                Ok(_) => tracing::info!(%volume, "volume deleted"),
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) => return Err(error),
            }
            Ok(rpc::DeleteVolumeResponse {})
        };
        self.locks.run(id, delete).await
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::rpc::volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode};
    use crate::rpc::{CapacityRange, CreateVolumeRequest, VolumeCapability};
    use std::collections::HashMap;

    fn request(parameters: &[(&str, &str)]) -> CreateVolumeRequest {
        let mode = Mode::SingleNodeWriter.into();
        CreateVolumeRequest {
            name: "pvc-1".into(),
            capacity_range: Some(CapacityRange {
                required_bytes: 1 << 30,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                access_mode: Some(AccessMode { mode }),
            }],
            parameters: parameters
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..Default::default()
        }
    }

    fn volume(wish: &Wish) -> pb::Volume {
        pb::Volume {
            name: wish.name.clone(),
            size_bytes: 1 << 30,
            pool: "default".into(),
            replicas: 3,
            min_replicas: 2,
            labels: wish.parameters.labels(&wish.csi_name),
            ..Default::default()
        }
    }

    #[test]
    fn an_existing_volume_is_accepted_if_it_is_what_was_asked_for() {
        let wish = Wish::parse(&request(&[("replicas", "3"), ("mkfsOptions", "-m 1")])).unwrap();
        wish.accept(volume(&wish)).unwrap();
        // Grown meanwhile: still at least what is required.
        wish.accept(pb::Volume {
            size_bytes: 2 << 30,
            ..volume(&wish)
        })
        .unwrap();
        let refused = [
            pb::Volume {
                size_bytes: 1 << 29,
                ..volume(&wish)
            },
            pb::Volume {
                replicas: 2,
                ..volume(&wish)
            },
            pb::Volume {
                labels: HashMap::new(),
                ..volume(&wish)
            },
        ];
        for other in refused {
            assert_eq!(wish.accept(other).unwrap_err().code(), Code::AlreadyExists);
        }
        let without = Wish::parse(&request(&[])).unwrap();
        let error = without.accept(volume(&wish)).unwrap_err();
        assert!(error.to_string().contains("mkfsOptions"), "{error}");
        let elsewhere =
            Wish::parse(&request(&[("pool", "fast"), ("mkfsOptions", "-m 1")])).unwrap();
        let error = elsewhere.accept(volume(&wish)).unwrap_err();
        assert!(error.to_string().contains("pool"), "{error}");
    }

    #[test]
    fn other_names_in_kubernetes_do_not_matter() {
        let key = "csi.storage.k8s.io/pvc/name";
        let first = Wish::parse(&request(&[(key, "a")])).unwrap();
        let second = Wish::parse(&request(&[])).unwrap();
        second.accept(volume(&first)).unwrap();
    }

    #[test]
    fn local_placement_needs_a_node() {
        let mut local = request(&[("placement", "local")]);
        let Err(error) = Wish::parse(&local) else {
            panic!("no node is known");
        };
        assert!(
            error.to_string().contains("WaitForFirstConsumer"),
            "{error}"
        );
        local.accessibility_requirements = Some(rpc::TopologyRequirement {
            requisite: Vec::new(),
            preferred: vec![rpc::Topology {
                segments: topology::segments("n2", None),
            }],
        });
        assert_eq!(Wish::parse(&local).unwrap().near.as_deref(), Some("n2"));
    }

    #[test]
    fn a_file_system_that_differs_from_the_class_is_refused() {
        let mut both = request(&[("csi.storage.k8s.io/fstype", "xfs")]);
        both.volume_capabilities[0].access_type = Some(AccessType::Mount(MountVolume {
            fs_type: "ext4".into(),
            ..Default::default()
        }));
        assert!(Wish::parse(&both).is_err());
    }

    #[test]
    fn without_a_pool_in_the_class_the_only_one_is_taken() {
        let pool = |name: &str| pb::Pool {
            name: name.into(),
            ..Default::default()
        };
        assert_eq!(the_only_pool(&[pool("a")]).unwrap(), "a");
        let error = the_only_pool(&[pool("b"), pool("a")]).unwrap_err();
        assert!(error.to_string().contains("a, b"), "{error}");
        assert_eq!(
            the_only_pool(&[]).unwrap_err().code(),
            Code::FailedPrecondition
        );
    }
}
