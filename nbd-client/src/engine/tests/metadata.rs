//! The fake metadata cluster: epochs, holders, changes of replicas, a repair planner.

use ashlar_proto::ids::{DiskId, Epoch, ReplicaState, SnapshotNumber};

use super::world::{Event, MS, World};
use crate::engine::*;

impl World {
    pub(super) fn metadata(&mut self, client: usize, request: MetadataRequest) {
        if !self.metadata_up || self.clients[client].cut {
            self.waiting_metadata.push((client, request));
            return;
        }
        let id = self.clients[client].id;
        let event = match request {
            MetadataRequest::Open => {
                let first_open = !self.view.opened_once;
                // Always by force, as far as readers are concerned: they may go on for a lease.
                let left = self.view.readers.is_empty() && !self.reader_revoked;
                let previous_clean = self.clean && left;
                self.clean = false;
                self.reader_revoked = false;
                self.view.holder = Some(id);
                self.view.readers.clear();
                for replica in self.view.groups.iter_mut().flatten() {
                    if replica.state == ReplicaState::Rebuilding {
                        replica.state = ReplicaState::Stale;
                    }
                }
                self.bump();
                self.notify();
                SessionEvent::Granted {
                    view: Box::new(self.view.clone()),
                    previous_clean,
                    first_open,
                }
            }
            MetadataRequest::ChangeReplicas { epoch, changes } => {
                let applied = self.view.holder == Some(id)
                    && self.view.epoch == epoch
                    && self.change(&changes);
                SessionEvent::ChangeAnswer {
                    applied,
                    view: Box::new(self.view.clone()),
                }
            }
            MetadataRequest::Close { epoch, clean } => {
                if self.view.readers.contains(&id) {
                    self.view.readers.retain(|r| *r != id);
                    self.view.revision += 1;
                    SessionEvent::CloseAnswer
                } else if self.view.holder == Some(id) && self.view.epoch == epoch {
                    self.view.holder = None;
                    self.clean = clean;
                    self.view.revision += 1;
                    SessionEvent::CloseAnswer
                } else {
                    SessionEvent::ConfigChanged(Box::new(self.view.clone()))
                }
            }
            MetadataRequest::ReportHeld { .. } => return,
            MetadataRequest::Refresh => SessionEvent::ConfigChanged(Box::new(self.view.clone())),
            MetadataRequest::Confirm => SessionEvent::Confirmed(Box::new(self.view.clone())),
            MetadataRequest::Join if self.view.holder.is_some() => {
                // As the owner of a session does: it asks again until nobody holds the volume.
                return self.schedule(100 * MS, Event::Metadata { client, request });
            }
            MetadataRequest::Join if !self.clean || !self.view.opened_once => {
                SessionEvent::NotReadable
            }
            MetadataRequest::Join => {
                self.view.readers.retain(|r| *r != id);
                self.view.readers.push(id);
                self.view.revision += 1;
                SessionEvent::Granted {
                    view: Box::new(self.view.clone()),
                    previous_clean: true,
                    first_open: false,
                }
            }
        };
        let after = self.delay();
        self.schedule(
            after,
            Event::ToSession {
                client,
                event: Box::new(event),
            },
        );
    }

    /// Metadata has a majority again, or a client reaches it again.
    pub(super) fn metadata_back(&mut self) {
        for (client, request) in std::mem::take(&mut self.waiting_metadata) {
            self.metadata(client, request);
        }
        self.notify();
    }

    pub(super) fn bump(&mut self) {
        self.view.epoch.0 += 1;
        self.view.revision += 1;
        self.changes += 1;
        let epoch = self.view.epoch;
        for replica in self.view.groups.iter_mut().flatten() {
            replica.rebuild_epoch = if replica.state == ReplicaState::Rebuilding {
                epoch
            } else {
                Epoch(0)
            };
        }
    }

    pub(super) fn change(&mut self, changes: &[ReplicaChange]) -> bool {
        let mut groups = self.view.groups.clone();
        for change in changes {
            let group = &mut groups[change.group.0 as usize];
            let Some(replica) = group.iter_mut().find(|r| r.disk == change.disk) else {
                return false;
            };
            if change.state == ReplicaState::InSync && replica.state == ReplicaState::Stale {
                return false;
            }
            replica.state = change.state;
            if change.state == ReplicaState::InSync {
                replica.incarnation = change.incarnation;
            }
            if !group.iter().any(|r| r.state == ReplicaState::InSync) {
                return false;
            }
        }
        self.view.groups = groups;
        let mut replicas = self.view.groups.iter().flatten();
        self.view.opened_once |=
            replicas.all(|r| r.state != ReplicaState::InSync || r.incarnation.0 != 0);
        self.bump();
        self.notify();
        true
    }

    /// The repair planner: stale replicas of living disks are rebuilt.
    pub(super) fn plan(&mut self) {
        if !self.rebuilds || !self.metadata_up || self.view.holder.is_none() {
            return;
        }
        let now = self.now;
        let alive: Vec<DiskId> = self
            .disks
            .iter()
            .filter(|d| d.alive && d.paused_until <= now)
            .map(|d| d.id)
            .collect();
        let stale = self.view.groups.iter_mut().flatten();
        let Some(replica) = stale
            .into_iter()
            .find(|r| r.state == ReplicaState::Stale && alive.contains(&r.disk))
        else {
            return;
        };
        replica.state = ReplicaState::Rebuilding;
        self.bump();
        self.notify();
    }

    pub(super) fn notify(&mut self) {
        for client in 0..self.clients.len() {
            if !self.clients[client].cut && self.metadata_up {
                let event = Box::new(SessionEvent::ConfigChanged(Box::new(self.view.clone())));
                let after = self.delay();
                self.schedule(after, Event::ToSession { client, event });
            }
        }
    }

    /// UnpublishVolume of everybody: whoever has the volume loses it.
    pub(super) fn revoke(&mut self) {
        self.clean &= self.view.holder.is_none();
        self.reader_revoked |= !self.view.readers.is_empty();
        self.view.holder = None;
        self.view.readers.clear();
        self.bump();
        self.notify();
    }

    /// A snapshot's number is reserved (S1).
    pub(super) fn reserve(&mut self) -> SnapshotNumber {
        assert!(!self.view.snapshot_pending);
        self.view.snapshot.0 += 1;
        self.view.snapshot_pending = true;
        self.view.revision += 1;
        self.notify();
        self.view.snapshot
    }

    /// It is committed or cancelled (S3).
    pub(super) fn settle(&mut self, commit: bool) {
        self.view.snapshot_pending = false;
        self.view.layers.settled = self.view.snapshot;
        self.view.layers.revision += 1;
        if commit {
            self.view.layers.live.push(self.view.snapshot);
        }
        self.view.revision += 1;
        self.notify();
    }

    /// What a client that reports *held* promises: what it acknowledged is durable on every in-sync replica, and
    /// no write is on its way.
    pub(super) fn check_held(&mut self, client: usize) {
        let in_sync = self.view.groups.iter().flatten();
        let in_sync = in_sync.filter(|r| r.state == ReplicaState::InSync);
        let disks: Vec<usize> = in_sync.map(|r| self.disk_index(r.disk)).collect();
        for disk in disks {
            let loose = self.disks[disk].unflushed();
            assert_eq!(
                loose, 0,
                "client {client} holds, disk {disk} is not flushed"
            );
        }
    }

    pub(super) fn resize(&mut self, size_bytes: u64) {
        self.view.size_bytes = size_bytes;
        self.view.revision += 1;
        self.notify();
    }
}
