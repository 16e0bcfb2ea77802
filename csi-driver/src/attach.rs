//! nbd-client of this node, which makes block devices of volumes: a gRPC service on a unix socket.
//!
//! Invariant: nothing is remembered here; every answer comes from nbd-client, which outlives this process.

use std::path::Path;
use std::time::Duration;

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::node as pb;
use ashlar_proto::rpc::node::node_attach_client::NodeAttachClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::errors::{Error, Result};

/// Time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for an attachment: an unclean volume waits a lease and is reconciled first.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(90);
/// Time for a detachment: what is not yet flushed is flushed.
const DETACH_TIMEOUT: Duration = Duration::from_secs(60);
/// Time for a question.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of nbd-client.
#[derive(Clone, Debug)]
pub struct Attacher {
    client: NodeAttachClient<Channel>,
}

impl Attacher {
    /// Connects lazily to the socket.
    pub fn new(socket: &Path) -> std::result::Result<Self, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?
            .connect_timeout(CONNECT_TIMEOUT);
        Ok(Self {
            client: NodeAttachClient::new(endpoint.connect_lazy()),
        })
    }

    /// Makes a device of a volume, or finds the one that there is.
    pub async fn attach(&self, request: pb::AttachRequest) -> Result<pb::Attachment> {
        let mut client = self.client.clone();
        let call = client.attach(request);
        finish("attach the volume", ATTACH_TIMEOUT, call).await
    }

    /// Takes the device away, if there is one.
    pub async fn detach(&self, volume: VolumeId) -> Result<()> {
        let mut client = self.client.clone();
        let call = client.detach(pb::DetachRequest {
            volume: String::new(),
            volume_id: volume.to_vec(),
            force: false,
        });
        match finish("detach the volume", DETACH_TIMEOUT, call).await {
            Ok(_) => Ok(()),
            // The volume is gone, and with it what was attached.
            Err(error) if error.code() == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes the device as large as the volume.
    pub async fn resize(&self, volume: VolumeId) -> Result<pb::Attachment> {
        let mut client = self.client.clone();
        let call = client.resize(pb::ResizeRequest {
            volume_id: volume.to_vec(),
        });
        finish("resize the device", ASK_TIMEOUT, call).await
    }

    /// The attachment of a volume, if there is one.
    pub async fn find(&self, volume: VolumeId) -> Result<Option<pb::Attachment>> {
        let mut client = self.client.clone();
        let call = client.list(pb::ListRequest {
            volume_id: volume.to_vec(),
        });
        match finish("find the device", ASK_TIMEOUT, call).await {
            Ok(list) => Ok(list
                .attachments
                .into_iter()
                .find(|a| a.volume_id == volume.0)),
            Err(error) if error.code() == Code::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether nbd-client answers.
    pub async fn answers(&self) -> bool {
        let mut client = self.client.clone();
        let call = client.list(pb::ListRequest {
            volume_id: VolumeId::NIL.to_vec(),
        });
        match finish("ask nbd-client", CONNECT_TIMEOUT, call).await {
            Ok(_) => true,
            Err(error) => error.code() != Code::Unavailable,
        }
    }
}

async fn finish<A>(
    doing: &str,
    limit: Duration,
    call: impl Future<Output = std::result::Result<tonic::Response<A>, Status>>,
) -> Result<A> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if status.code() == Code::Unavailable => Err(Error::remote(
            format!("{doing} (nbd-client must run on this node)"),
            status,
        )),
        Ok(Err(status)) => Err(Error::remote(doing, status)),
        Err(_) => Err(Error::remote(
            doing,
            Status::unavailable(format!("nbd-client did not finish within {limit:?}")),
        )),
    }
}
