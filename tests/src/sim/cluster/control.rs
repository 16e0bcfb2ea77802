//! Metadata: what clients ask of it, what it tells them, and which losses of power took everything there was.
//!
//! Invariant: a question is asked again until it is answered, as a real client does; only the first answer counts.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::ReplicaState;
use nbd_client::engine::{MetadataRequest, SessionEvent};

use super::super::client::{Client, ClientState, Inbound, Pending};
use super::super::history::Rollback;
use super::super::metadata::{self, Ask};
use super::super::schedule::MS;
use super::{ASK_RETRY_NS, Cluster, Timer};

impl Cluster {
    /// The volume changed: watchers hear of it, and lossy replicas that are not in sync any more do not
    /// count.
    pub(in crate::sim) fn metadata_changed(&mut self) {
        let volume = self.metadata.volume();
        let summary: Vec<Vec<(u8, ReplicaState)>> = volume
            .groups
            .iter()
            .map(|g| g.iter().map(|r| (r.disk.0[15], r.state)).collect())
            .collect();
        let (epoch, holder) = (volume.epoch, volume.holder.as_ref().map(|h| h.client));
        self.note(|| format!("metadata: epoch {} holder {holder:?} {summary:?}", epoch.0));
        self.forget_excluded(&summary);
        self.look_for_total_loss();
        let clients: Vec<u32> = self
            .clients
            .values()
            .filter(|c| c.lives())
            .map(|c| c.host)
            .collect();
        for client in clients {
            let delay = self.rng.between(MS / 10, 5 * MS);
            self.timer(delay, Timer::Watch { client });
        }
    }

    /// Lossy replicas that are not in sync any more do not count. An exclusion alone never makes a loss
    /// total: R4 flushes a replica that remains first.
    fn forget_excluded(&mut self, summary: &[Vec<(u8, ReplicaState)>]) {
        let lossy_before: Vec<bool> = self
            .in_sync
            .iter()
            .enumerate()
            .map(|(g, nodes)| nodes.iter().all(|n| self.lossy.contains_key(&(g, *n))))
            .collect();
        self.in_sync = summary
            .iter()
            .map(|group| {
                let in_sync = group.iter().filter(|(_, s)| *s == ReplicaState::InSync);
                in_sync.map(|(n, _)| u32::from(*n)).collect()
            })
            .collect();
        for (g, nodes) in self.in_sync.iter().enumerate() {
            let all = nodes.iter().all(|n| self.lossy.contains_key(&(g, *n)));
            let excluded_only = all && lossy_before.get(g) == Some(&false);
            self.lossy
                .retain(|(group, node), _| *group != g || (nodes.contains(node) && !excluded_only));
        }
    }

    /// Whether every in-sync replica of some group has lost power since it was known good.
    pub(in crate::sim) fn look_for_total_loss(&mut self) {
        let volume = self.metadata.volume();
        for (index, group) in volume.groups.iter().enumerate() {
            let in_sync = group.iter().filter(|r| r.state == ReplicaState::InSync);
            let times: Option<Vec<Time>> = in_sync
                .map(|r| self.lossy.get(&(index, metadata::node_of(r.disk))).copied())
                .collect();
            if let Some(first) = times.and_then(|t| t.into_iter().min()) {
                let known = self.total_loss.unwrap_or(first);
                self.total_loss = Some(known.min(first));
            }
        }
    }

    /// A client serves, or a flush failed: what a total loss took is gone from now on.
    pub(super) fn settle_total_loss(&mut self) {
        if let Some(from) = self.total_loss.take() {
            self.lossy.clear();
            if !self.everything_durable {
                self.note(|| "unflushed writes may be gone".to_owned());
                self.history.rollbacks.push(Rollback {
                    from,
                    until: self.now,
                });
            }
        }
    }

    pub(super) fn ask(&mut self, host: u32, request: MetadataRequest) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        let number = client.next_ask;
        client.next_ask += 1;
        let ask = Ask {
            client: client.id,
            number,
            request,
            force: client.force,
        };
        self.note(|| format!("k{host} asks metadata {:?}", ask.request));
        if let Some(client) = self.clients.get_mut(&host) {
            client.pending.insert(
                number,
                Pending {
                    ask,
                    opened_once: None,
                },
            );
        }
        self.send_ask(host, number);
        self.timer(
            ASK_RETRY_NS,
            Timer::AskAgain {
                client: host,
                number,
            },
        );
    }

    pub(super) fn send_ask(&mut self, client: u32, number: u64) {
        let frozen = !self.clients.get(&client).is_some_and(Client::runs);
        if frozen || self.metadata_drops(client, 0) {
            return;
        }
        let delay = self.rng.between(MS / 5, 8 * MS);
        self.timer(delay, Timer::AskArrives { client, number });
    }

    fn metadata_drops(&mut self, from: u32, to: u32) -> bool {
        let lossy = self
            .metadata_lossy
            .is_some_and(|one_in| self.rng.chance(1, one_in));
        lossy || self.cuts.contains_key(&(from, to))
    }

    pub(super) fn ask_arrives(&mut self, client: u32, number: u64) {
        if self.metadata_down > 0 {
            return;
        }
        let Some(pending) = self
            .clients
            .get(&client)
            .and_then(|c| c.pending.get(&number))
        else {
            return;
        };
        let pending = pending.clone();
        if let MetadataRequest::ReportHeld { epoch, number } = pending.ask.request {
            self.snapshot_held(pending.ask.client, epoch, number);
            if let Some(client) = self.clients.get_mut(&client) {
                client.pending.remove(&pending.ask.number);
            }
            return;
        }
        let opening = pending.ask.request == MetadataRequest::Open;
        let delay = self.rng.between(MS / 5, 8 * MS);
        if let (true, None) = (opening, pending.opened_once) {
            let opened_once = self.metadata.volume().opened_once;
            if !self.metadata_drops(0, client) {
                self.timer(
                    delay,
                    Timer::OpenedOnce {
                        client,
                        number,
                        opened_once,
                    },
                );
            }
            return;
        }
        if pending.ask.request == MetadataRequest::Join && self.metadata.volume().holder.is_some() {
            // As the real process does: it asks again until nobody holds the volume.
            return;
        }
        let before = self.metadata.volume().revision;
        let opened_once = pending.opened_once.unwrap_or(true);
        let event = self.metadata.answer(self.now, &pending.ask, opened_once);
        if self.metadata.volume().revision != before {
            self.metadata_changed();
        }
        if !self.metadata_drops(0, client) {
            self.timer(
                delay,
                Timer::Answered {
                    client,
                    number,
                    event: Box::new(event),
                },
            );
        }
    }

    pub(super) fn answered(&mut self, host: u32, number: u64, event: Box<SessionEvent>) {
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !client.lives() || client.pending.remove(&number).is_none() {
            return;
        }
        if let SessionEvent::Granted { .. } = *event {
            client.granted = true;
        }
        match client.state {
            ClientState::Frozen => client.inbox.push_back(Inbound::Session(event)),
            _ => self.session(host, *event),
        }
    }

    pub(super) fn watch(&mut self, host: u32) {
        let revision = self.metadata.volume().revision;
        let reachable = self.metadata_down == 0 && !self.cuts.contains_key(&(0, host));
        let Some(client) = self.clients.get_mut(&host) else {
            return;
        };
        if !reachable || !client.granted || !client.lives() || client.revision >= revision {
            return;
        }
        client.revision = revision;
        let event = Box::new(SessionEvent::ConfigChanged(Box::new(
            self.metadata.view(self.now),
        )));
        match client.state {
            ClientState::Frozen => client.inbox.push_back(Inbound::Session(event)),
            _ => self.session(host, *event),
        }
    }
}
