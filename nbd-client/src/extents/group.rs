//! The list of one group, from whichever replica answers.
//!
//! Invariant: what is below `next_chunk` was told completely, by one replica or another, and once.

use std::collections::VecDeque;
use std::time::Duration;

use ashlar_proto::ids::{CHUNK_SIZE, DiskId};
use ashlar_proto::rpc::daemon as pb;
use ashlar_proto::rpc::daemon::storage_daemon_client::StorageDaemonClient;
use tokio::time::Instant;
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use super::source::Source;
use super::{Extent, ExtentsError};

/// Time for a connection to a daemon.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for a part: a daemon looks at few chunks for it.
const PART_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after every replica was asked in vain.
const PAUSE: Duration = Duration::from_millis(500);
/// Time without an answer of any replica after which the list fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct GroupList {
    group: u32,
    next_chunk: u32,
    done: bool,
    extents: VecDeque<Extent>,
    stream: Option<(DiskId, Streaming<pb::ListBlocksPart>)>,
    /// Replicas that failed since one answered.
    failed: Vec<DiskId>,
}

impl GroupList {
    pub fn new(group: u32, first_chunk: u32) -> Self {
        Self {
            group,
            next_chunk: first_chunk,
            done: false,
            extents: VecDeque::new(),
            stream: None,
            failed: Vec::new(),
        }
    }

    /// Nothing that follows begins below this byte; `None`: nothing follows.
    pub fn position(&self) -> Option<u64> {
        match self.extents.front() {
            Some(extent) => Some(extent.offset),
            None if self.done => None,
            None => Some(u64::from(self.next_chunk) * CHUNK_SIZE),
        }
    }

    /// The next extent, if it is known.
    pub fn pop(&mut self) -> Option<Extent> {
        self.extents.pop_front()
    }

    /// Gets the next part.
    pub async fn fill(&mut self, source: &mut Source) -> Result<(), ExtentsError> {
        let began = Instant::now();
        loop {
            let (disk, problem) = match self.part(source).await {
                Ok(()) => return Ok(()),
                Err(problem) => problem,
            };
            self.stream = None;
            tracing::info!(
                group = self.group,
                ?disk,
                problem,
                "a list of blocks goes on elsewhere"
            );
            self.failed.extend(disk);
            if began.elapsed() >= PATIENCE {
                return Err(ExtentsError::Unavailable(format!(
                    "no replica of group {} lists its blocks ({problem}); see `ashlar volume show`, and try again",
                    self.group
                )));
            }
            source.refresh().await?;
        }
    }

    /// One part from the present replica, or from another one.
    async fn part(&mut self, source: &Source) -> Result<(), (Option<DiskId>, String)> {
        if self.stream.is_none() {
            self.connect(source).await?;
        }
        let Some((disk, stream)) = &mut self.stream else {
            return Err((None, "no stream".to_owned()));
        };
        let disk = *disk;
        match tokio::time::timeout(PART_TIMEOUT, stream.message()).await {
            Ok(Ok(Some(part))) => self
                .take(&part)
                .map_err(|problem| (Some(disk), problem.to_owned())),
            Ok(Ok(None)) => Err((Some(disk), "the list ended too early".to_owned())),
            Ok(Err(status)) => Err((Some(disk), text(&status))),
            Err(_) => Err((Some(disk), "no answer".to_owned())),
        }
    }

    async fn connect(&mut self, source: &Source) -> Result<(), (Option<DiskId>, String)> {
        let replicas = source.replicas(self.group);
        let untried = replicas.iter().find(|d| !self.failed.contains(d));
        let Some(disk) = untried.copied() else {
            self.failed.clear();
            tokio::time::sleep(PAUSE).await;
            return Err((None, "every replica in sync failed".to_owned()));
        };
        let fail = |problem: String| (Some(disk), problem);
        let address = source
            .daemon(disk)
            .ok_or_else(|| fail("its daemon's address is not known".to_owned()))?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| fail(error.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        let request = source.request(disk, self.group, self.next_chunk);
        let ask = async {
            let channel = endpoint.connect().await.map_err(|e| e.to_string())?;
            let mut client = StorageDaemonClient::new(channel);
            let answer = client.list_blocks(request).await;
            answer.map_err(|status| text(&status))
        };
        match tokio::time::timeout(PART_TIMEOUT, ask).await {
            Ok(Ok(answer)) => {
                self.stream = Some((disk, answer.into_inner()));
                Ok(())
            }
            Ok(Err(problem)) => Err(fail(problem)),
            Err(_) => Err(fail("no answer".to_owned())),
        }
    }

    /// Takes a part, if it makes sense.
    fn take(&mut self, part: &pb::ListBlocksPart) -> Result<(), &'static str> {
        let mut at = u64::from(self.next_chunk) * CHUNK_SIZE;
        for e in &part.extents {
            let end = e
                .offset
                .checked_add(e.length)
                .ok_or("an extent overflows")?;
            if e.length == 0 || e.offset < at {
                return Err("extents are not ascending");
            }
            at = end;
        }
        if !part.last && part.next_chunk <= self.next_chunk {
            return Err("the list does not proceed");
        }
        self.extents.extend(part.extents.iter().map(|e| Extent {
            offset: e.offset,
            length: e.length,
            data: !e.hole,
        }));
        self.done = part.last;
        self.next_chunk = part.next_chunk;
        self.failed.clear();
        Ok(())
    }
}

fn text(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}
