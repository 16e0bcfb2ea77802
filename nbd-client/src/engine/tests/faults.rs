//! What a world does besides carrying messages: pulls of rebuild targets, and faults.

use std::collections::BTreeMap;

use ashlar_proto::ids::ReplicaState;
use ashlar_proto::wire::PullState;

use super::Random;
use super::fake_disk::{Cell, Place};
use super::world::{Event, MS, World, trace};

impl World {
    pub(super) fn pull_begin(&mut self, disk: usize, group: u32) {
        let Some(pull) = self.disks[disk].pull.get(&group) else {
            return;
        };
        let (source, groups) = (self.disk_index(pull.source), pull.groups);
        let mut places: Vec<Place> = self.disks[source].live.keys().copied().collect();
        places.extend(self.disks[disk].live.keys().copied());
        places.retain(|p| p.0 % groups == group);
        places.sort_unstable();
        places.dedup();
        if let Some(pull) = self.disks[disk].pull.get_mut(&group) {
            pull.todo = places.into();
        }
    }

    pub(super) fn pull_step(&mut self, disk: usize, process: u64, group: u32, number: u64) {
        if self.disks[disk].process != process {
            return;
        }
        let Some(pull) = self.disks[disk]
            .pull
            .get(&group)
            .filter(|p| p.number == number)
        else {
            return;
        };
        let (source, epoch, incarnation) = (
            self.disk_index(pull.source),
            pull.epoch,
            pull.source_incarnation,
        );
        let from = &self.disks[source];
        let good = from.alive
            && from.paused_until <= self.now
            && from.incarnation == incarnation
            && from.fence <= epoch;
        let Some(pull) = self.disks[disk].pull.get_mut(&group) else {
            return;
        };
        if !good {
            pull.state = PullState::Failed;
            return;
        }
        match pull.todo.pop_front() {
            Some(place) => {
                pull.applying += 1;
                let cell = self.disks[source].live.get(&place).cloned();
                let after = self.delay();
                self.schedule(
                    after,
                    Event::PullApply {
                        disk,
                        process,
                        group,
                        number,
                        place,
                        cell,
                    },
                );
            }
            None if pull.applying == 0 => {
                pull.state = PullState::Complete;
                return;
            }
            None => {}
        }
        let after = self.delay();
        self.schedule(
            after,
            Event::PullStep {
                disk,
                process,
                group,
                number,
            },
        );
    }

    pub(super) fn break_connections(&mut self, disk: usize) {
        self.connection += 1;
        self.broken_below[disk] = self.connection;
        for client in 0..self.clients.len() {
            let connection = self.clients[client].connections[disk];
            let after = self.delay();
            self.schedule(
                after,
                Event::Broken {
                    client,
                    disk,
                    connection,
                },
            );
        }
    }

    pub(super) fn crash_disk(&mut self, disk: usize, back_after_ms: u64) {
        trace!(self, "CRASH {disk}");
        self.disks[disk].crash();
        self.break_connections(disk);
        self.schedule(back_after_ms * MS, Event::Restart { disk });
    }

    pub(super) fn power_loss(&mut self, disk: usize, back_after_ms: u64) {
        trace!(self, "POWER LOSS {disk}");
        let mut random = Random(self.random.next());
        self.disks[disk].power_loss(&mut random);
        self.break_connections(disk);
        self.schedule(back_after_ms * MS, Event::Restart { disk });
    }

    /// The connections break; requests on their way arrive nevertheless.
    pub(super) fn cut_links(&mut self, disk: usize) {
        self.break_connections(disk);
    }

    pub(super) fn pause(&mut self, disk: usize, ms: u64) {
        trace!(self, "PAUSE {disk} {ms}");
        self.disks[disk].paused_until = self.now + ms * MS;
    }

    pub(super) fn all_in_sync(&self) -> bool {
        self.view
            .groups
            .iter()
            .flatten()
            .all(|r| r.state == ReplicaState::InSync)
    }

    /// What a replica's block holds, tombstones as absent.
    pub(super) fn contents(&self, disk: usize) -> BTreeMap<Place, Cell> {
        let live = self.disks[disk].live.iter();
        live.filter(|(_, c)| c.data.is_some())
            .map(|(p, c)| (*p, c.clone()))
            .collect()
    }
}
