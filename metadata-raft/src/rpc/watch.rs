//! WatchVolumes: the current state, then every change, from the state that this member has applied.
//!
//! Invariants: the first state contains everything committed before the watch began (the leader confirms
//! how far that is); an event is sent only if the volume's revision or an endpoint differs from what was sent
//! last; a watcher that falls behind is brought up to date from the state, nothing queues without bound;
//! the stream ends with UNAVAILABLE when the member loses touch with the leader or stops.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::metadata as pb;
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert;
use super::member::{Member, Role};
use crate::model::{Change, Volume};
use crate::raft::state_machine::Changes;

/// Volumes that one watch may name.
const NAMED_MAX: usize = 10_000;
/// Events that wait for a slow reader.
const EVENTS_QUEUE: usize = 64;
/// How long a member may be out of touch when a watch begins.
const START_DEADLINE: Duration = Duration::from_secs(3);

/// The stream of one watch.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<pb::VolumeEvent, Status>> + Send>>;

/// What was sent of a volume: revision and a digest of its endpoints; `None`: that it is deleted.
type Sent = BTreeMap<VolumeId, Option<(u64, u32)>>;

struct Watcher {
    member: Arc<Member>,
    named: Option<Vec<VolumeId>>,
    sent: Sent,
    events: mpsc::Sender<Result<pb::VolumeEvent, Status>>,
}

/// Returns when the member cannot vouch for its state any more.
async fn lost_touch(role: &mut watch::Receiver<Role>) {
    // A closed channel means the same.
    let _ = role.wait_for(|r| !r.in_touch || r.stopping).await;
}

/// Starts a watch.
pub fn start(member: Arc<Member>, request: pb::WatchVolumesRequest) -> Result<EventStream, Status> {
    if request.volume_ids.len() > NAMED_MAX {
        return Err(Status::invalid_argument(format!(
            "volume_ids: at most {NAMED_MAX} can be named"
        )));
    }
    let named = request
        .volume_ids
        .iter()
        .map(|bytes| convert::id("volume_ids", bytes, VolumeId::from_slice))
        .collect::<Result<Vec<_>, _>>()?;
    let (events, receiver) = mpsc::channel(EVENTS_QUEUE);
    let named = (!named.is_empty()).then_some(named);
    let watcher = Watcher {
        member,
        named,
        sent: Sent::new(),
        events,
    };
    tokio::spawn(watcher.run());
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

impl Watcher {
    async fn run(mut self) {
        let status = match self.follow().await {
            Ok(()) => return,
            Err(status) => status,
        };
        // A reader that has gone away needs no farewell.
        let _ = self.events.send(Err(status)).await;
    }

    /// Runs until the reader goes away (`Ok`) or the member cannot serve it any more.
    async fn follow(&mut self) -> Result<(), Status> {
        let out_of_touch = || {
            Status::unavailable("this member has lost touch with the leader; watch at another one")
        };
        let mut changes = self.member.shared.subscribe();
        let mut role = self.member.role.clone();
        let start = async { role.wait_for(|r| r.in_touch && !r.stopping).await.map(drop) };
        let started = tokio::time::timeout(START_DEADLINE, start).await;
        if !matches!(started, Ok(Ok(()))) {
            return Err(out_of_touch());
        }
        // A follower that has not applied a volume yet would call it deleted.
        self.member.catch_up().await?;
        if !self.send_all().await {
            return Ok(());
        }
        loop {
            tokio::select! {
                received = changes.recv() => {
                    let alive = match received {
                        Ok(Some(batch)) => self.send_changes(&Some(batch)).await,
                        Ok(None) | Err(broadcast::error::RecvError::Lagged(_)) => self.send_all().await,
                        Err(broadcast::error::RecvError::Closed) => return Err(out_of_touch()),
                    };
                    if !alive {
                        return Ok(());
                    }
                }
                () = lost_touch(&mut role) => return Err(out_of_touch()),
                () = self.events.closed() => return Ok(()),
            }
        }
    }

    async fn send_all(&mut self) -> bool {
        let ids: Vec<VolumeId> = match &self.named {
            Some(named) => named.clone(),
            None => {
                let state = self.member.shared.state();
                let mut ids: Vec<_> = state.volumes().map(|v| v.id).collect();
                ids.extend(self.sent.keys().filter(|id| state.volume(**id).is_none()));
                ids
            }
        };
        self.send(ids).await
    }

    async fn send_changes(&mut self, changes: &Changes) -> bool {
        let mut ids = Vec::new();
        for change in changes.iter().flat_map(|c| c.iter()) {
            match change {
                Change::Volume(id) => ids.push(*id),
                Change::Disk(disk) => ids.extend(self.member.shared.state().volumes_on(*disk)),
            }
        }
        if let Some(named) = &self.named {
            ids.retain(|id| named.contains(id));
        }
        ids.sort_unstable();
        ids.dedup();
        self.send(ids).await
    }

    /// Sends what differs from what was sent; false if the reader has gone away.
    async fn send(&mut self, ids: Vec<VolumeId>) -> bool {
        for id in ids {
            if let Some(event) = self.event(id)
                && self.events.send(Ok(event)).await.is_err()
            {
                return false;
            }
        }
        true
    }

    fn event(&mut self, id: VolumeId) -> Option<pb::VolumeEvent> {
        let state = self.member.shared.state();
        let named = self.named.is_some();
        let shown = |v: &&Arc<Volume>| !v.hidden || (named && v.is_in_care());
        let Some(volume) = state.volume(id).filter(shown) else {
            let told = self.sent.get(&id).is_some_and(Option::is_none);
            if told || (self.named.is_none() && !self.sent.contains_key(&id)) {
                return None;
            }
            if self.named.is_some() {
                self.sent.insert(id, None);
            } else {
                self.sent.remove(&id);
            }
            let volume = pb::Volume {
                volume_id: id.to_vec(),
                ..pb::Volume::default()
            };
            return Some(pb::VolumeEvent {
                volume: Some(volume),
                disks: Vec::new(),
                deleted: true,
            });
        };
        let mut digest = 0;
        for disk in volume.disks().into_iter().filter_map(|d| state.disk(d)) {
            digest = crc32c::crc32c_append(digest, &disk.id.0);
            digest = crc32c::crc32c_append(digest, disk.data_address.as_bytes());
            digest = crc32c::crc32c_append(digest, &disk.incarnation.0.to_le_bytes());
        }
        let key = Some((volume.revision, digest));
        if self.sent.insert(id, key) == Some(key) {
            return None;
        }
        let disks = self.member.endpoints(&state, volume);
        Some(pb::VolumeEvent {
            volume: Some(crate::model::view::volume(&state, volume)),
            disks,
            deleted: false,
        })
    }
}
