//! Reconcile (R2): after an unclean close, and when every in-sync replica of a group lost power (R5).
//!
//! Collects from every in-sync member the blocks above the watermark, in order, page by page; merges the
//! lists; where a member lacks the highest version of a (layer, block), copies it there.
//!
//! Invariants:
//! - The highest version wins whether it was acknowledged or not; blocks keep version and layer.
//! - Memory is bounded: one page of entries per member and [`FIXES_MAX`] copies at a time.
//! - A member that fails meanwhile makes the group start again, when it is back or excluded.
//! - Members under different layer lists may name one layer differently. What is listed under two names is copied under
//!   both; where one copy supersedes the other, that is no damage.
//! - After R5 the retained writes are replayed before anything else in the group goes on.

use std::collections::VecDeque;

use ashlar_proto::ids::{BlockRange, GroupIndex, Version};
use ashlar_proto::wire::{
    BlockState, Checksums, Collect, Cursor, Entries, Entry, Read, ReadReply, RequestBody, Trim,
    Write,
};

use super::read::{blocks_of, verified, well_formed};
use super::replica::Purpose;
use super::session::{Phase, Session};
use super::slots::PeerSet;
use super::write::WriteOwner;

/// Copies under way at a time.
const FIXES_MAX: usize = 64;

/// A member's list.
#[derive(Debug)]
struct Source {
    peer: u8,
    entries: VecDeque<Entry>,
    next: Option<Cursor>,
    asked: bool,
}

/// One block that is missing somewhere.
#[derive(Debug)]
struct Fix {
    entry: Entry,
    holders: PeerSet,
    missing: PeerSet,
}

/// Reconcile of one group.
#[derive(Debug)]
pub(super) struct Reconcile {
    number: u64,
    watermark: Version,
    sources: Vec<Source>,
    /// Slots of copies under way.
    fixes: Vec<Option<Fix>>,
}

impl Session {
    /// Starts or goes on.
    pub(super) fn reconcile_pump(&mut self, g: usize) {
        if self.groups[g].reconcile.is_none() {
            self.reconcile_start(g);
        }
        self.reconcile_merge(g);
        self.reconcile_ask(g);
        let Some(run) = &self.groups[g].reconcile else {
            return;
        };
        let listed = run
            .sources
            .iter()
            .all(|s| s.entries.is_empty() && s.next.is_none());
        if listed && run.fixes.iter().all(Option::is_none) {
            self.groups[g].reconcile = None;
            self.groups[g].reconciled = true;
            self.pump = true;
            if self.groups[g].recovering {
                self.replay(g);
            }
        }
    }

    fn reconcile_start(&mut self, g: usize) {
        let in_sync = self.groups[g].in_sync;
        if !in_sync.iter().all(|p| self.usable(p)) {
            return;
        }
        self.reconciles += 1;
        let marks = in_sync.iter().map(|p| self.peers[p as usize].watermark);
        let watermark = marks.max().unwrap_or_default().max(self.confirmed);
        let sources = in_sync
            .iter()
            .map(|peer| Source {
                peer,
                entries: VecDeque::new(),
                next: Some(Cursor::default()),
                asked: false,
            })
            .collect();
        let number = self.reconciles;
        self.groups[g].reconcile = Some(Box::new(Reconcile {
            number,
            watermark,
            sources,
            fixes: Vec::new(),
        }));
    }

    /// Asks every member whose list is used up for its next page.
    fn reconcile_ask(&mut self, g: usize) {
        let group_count = self.groups.len() as u32;
        let group = GroupIndex(g as u32);
        let Some(run) = &mut self.groups[g].reconcile else {
            return;
        };
        let (number, watermark) = (run.number, run.watermark);
        let mut asks = Vec::new();
        for source in &mut run.sources {
            if source.entries.is_empty()
                && !source.asked
                && let Some(from) = source.next
            {
                source.asked = true;
                asks.push((source.peer, from));
            }
        }
        for (peer, from) in asks {
            let collect = Collect {
                group,
                group_count,
                watermark,
                from,
            };
            let purpose = Purpose::Collect {
                group: group.0,
                number,
            };
            self.send(peer, purpose, RequestBody::Collect(collect));
        }
    }

    fn reconcile_run(&mut self, g: usize, number: u64) -> Option<&mut Reconcile> {
        self.groups
            .get_mut(g)?
            .reconcile
            .as_deref_mut()
            .filter(|r| r.number == number)
    }

    pub(super) fn on_collected(&mut self, peer: u8, g: usize, number: u64, entries: Entries) {
        let Some(run) = self.reconcile_run(g, number) else {
            return;
        };
        if let Some(source) = run.sources.iter_mut().find(|s| s.peer == peer) {
            source.asked = false;
            // A member that does not advance would be asked for ever.
            let stuck = entries.next.is_some() && entries.next <= source.next;
            source.next = entries.next;
            source.entries = entries.entries.into();
            if stuck {
                return self.fail_peer(peer);
            }
        }
        self.reconcile_pump(g);
    }

    /// Takes the next block from the fronts of the lists, while all of them are known.
    fn reconcile_merge(&mut self, g: usize) {
        loop {
            let in_sync = self.groups[g].in_sync;
            let Some(run) = &mut self.groups[g].reconcile else {
                return;
            };
            if run.fixes.iter().flatten().count() >= FIXES_MAX
                || run
                    .sources
                    .iter()
                    .any(|s| s.entries.is_empty() && s.next.is_some())
            {
                return;
            }
            let fronts = || run.sources.iter().filter_map(|s| s.entries.front());
            let Some(at) = fronts().map(|e| e.at).min() else {
                return;
            };
            let here = || fronts().filter(|e| e.at == at);
            let Some(version) = here().map(|e| e.version).max() else {
                return;
            };
            // Of equal versions an intact one is copied.
            let Some(best) = here()
                .filter(|e| e.version == version)
                .min_by_key(|e| e.state == BlockState::Bad)
                .copied()
            else {
                return;
            };
            let (mut holders, mut have) = (PeerSet::EMPTY, PeerSet::EMPTY);
            for source in &mut run.sources {
                if source.entries.front().is_some_and(|e| e.at == at)
                    && let Some(entry) = source.entries.pop_front()
                    && entry.version == version
                {
                    have.insert(source.peer);
                    if entry.state == best.state {
                        holders.insert(source.peer);
                    }
                }
            }
            let missing = in_sync.without(have);
            if !missing.is_empty() {
                self.reconcile_fix(
                    g,
                    Fix {
                        entry: best,
                        holders,
                        missing,
                    },
                );
            }
        }
    }

    fn reconcile_fix(&mut self, g: usize, fix: Fix) {
        let Some(run) = &mut self.groups[g].reconcile else {
            return;
        };
        let number = run.number;
        let index = run
            .fixes
            .iter()
            .position(Option::is_none)
            .unwrap_or(run.fixes.len());
        if index == run.fixes.len() {
            run.fixes.push(None);
        }
        let (entry, missing) = (fix.entry, fix.missing);
        run.fixes[index] = Some(fix);
        let (group, fix) = (g as u32, index as u32);
        if entry.state == BlockState::Tombstone {
            let trim = Trim {
                range: one_block(&entry),
                snapshot: entry.at.snapshot,
                version: entry.version,
                durable: true,
            };
            for peer in missing.iter() {
                let purpose = Purpose::ReconcileWrite { group, number, fix };
                self.send(peer, purpose, RequestBody::Trim(trim));
            }
        } else {
            self.reconcile_read(g, fix);
        }
    }

    /// Reads a block from the next member that holds it.
    fn reconcile_read(&mut self, g: usize, fix: u32) {
        let Some(run) = &mut self.groups[g].reconcile else {
            return;
        };
        let number = run.number;
        let Some(Some(slot)) = run.fixes.get(fix as usize) else {
            return;
        };
        let (entry, holder) = (slot.entry, slot.holders.first());
        match holder.filter(|_| entry.state == BlockState::Data) {
            Some(peer) => {
                let read = Read {
                    range: one_block(&entry),
                    snapshot: entry.at.snapshot,
                    exact_layer: true,
                };
                let purpose = Purpose::ReconcileRead {
                    group: g as u32,
                    number,
                    fix,
                };
                self.send(peer, purpose, RequestBody::Read(read));
            }
            None => self.reconcile_bad(g, entry),
        }
    }

    /// The highest version of a block is intact nowhere: its holders are damaged, others may go on.
    fn reconcile_bad(&mut self, g: usize, entry: Entry) {
        tracing::error!(volume = %self.config.volume, ?entry, "newest version of a block is unreadable: its replica is excluded; if it is the last one, an operator must decide");
        let holders: Vec<u8> = self.groups[g].in_sync.iter().collect();
        let Some(run) = &mut self.groups[g].reconcile else {
            return;
        };
        let missing = run
            .fixes
            .iter()
            .flatten()
            .find(|f| f.entry.at == entry.at)
            .map(|f| f.missing);
        for peer in holders {
            if missing.is_some_and(|m| !m.contains(peer)) {
                self.peers[peer as usize].lost = true;
                self.peers[peer as usize].damaged = true;
                self.mark_failed(peer);
            }
        }
    }

    pub(super) fn on_reconcile_read(
        &mut self,
        peer: u8,
        g: usize,
        number: u64,
        fix: u32,
        reply: &ReadReply,
    ) {
        let Some(run) = self.reconcile_run(g, number) else {
            return;
        };
        let Some(Some(slot)) = run.fixes.get_mut(fix as usize) else {
            return;
        };
        let (entry, missing) = (slot.entry, slot.missing);
        let range = one_block(&entry);
        let block = if well_formed(range, reply) {
            blocks_of(reply).next()
        } else {
            None
        };
        let superseded = block
            .as_ref()
            .is_some_and(|(info, _)| info.state != BlockState::Bad && info.version > entry.version);
        if superseded {
            // Another copy of this run came first, under a number that is the same layer to this member: no
            // reader can tell the two apart (S7), and the higher version goes to all by itself.
            run.fixes[fix as usize] = None;
            return self.reconcile_pump(g);
        }
        let intact = block
            .filter(|(info, data)| info.state == BlockState::Data && verified(info, data))
            .filter(|(info, _)| info.version == entry.version);
        let Some((info, data)) = intact else {
            slot.holders.remove(peer);
            self.stats.bad_blocks_found += 1;
            return self.reconcile_read(g, fix);
        };
        let write = Write {
            range,
            snapshot: entry.at.snapshot,
            version: entry.version,
            durable: true,
            checksums: Checksums::from_iter([info.checksum]),
            data: [data].into_iter().collect(),
        };
        for target in missing.iter() {
            let purpose = Purpose::ReconcileWrite {
                group: g as u32,
                number,
                fix,
            };
            self.send(target, purpose, RequestBody::Write(write.clone()));
        }
    }

    pub(super) fn on_reconcile_written(&mut self, peer: u8, g: usize, number: u64, fix: u32) {
        let Some(run) = self.reconcile_run(g, number) else {
            return;
        };
        let Some(place) = run.fixes.get_mut(fix as usize) else {
            return;
        };
        let Some(slot) = place else { return };
        slot.missing.remove(peer);
        if slot.missing.is_empty() {
            *place = None;
            self.stats.blocks_reconciled += 1;
            self.reconcile_pump(g);
        }
    }

    /// A request of a reconcile got no answer: the group starts again.
    pub(super) fn reconcile_void(&mut self, group: u32, number: u64) {
        if self.reconcile_run(group as usize, number).is_some() {
            self.reconcile_restart(group as usize);
        }
    }

    /// A member failed or left: what was compared may no longer hold.
    pub(super) fn reconcile_restart(&mut self, g: usize) {
        let opening = self.phase == Phase::Opening;
        let group = &mut self.groups[g];
        if opening || group.recovering {
            group.reconcile = None;
            group.reconciled = false;
            self.pump = true;
        }
    }

    /// R5: accepts that every in-sync member of a group lost power, and recovers what is retained.
    pub(super) fn recovery_pump(&mut self) {
        if !matches!(self.phase, Phase::Serving | Phase::Draining) {
            return;
        }
        for g in 0..self.groups.len() {
            let lost = self.lost_together(g);
            if !lost.is_empty() {
                self.recover(lost);
            }
            if self.groups[g].recovering {
                if !self.groups[g].reconciled {
                    self.reconcile_pump(g);
                } else if self.replays == 0 {
                    self.recovered(g);
                }
            }
        }
    }

    /// The in-sync members of a group, and of all groups that share any of them, if all of them lost
    /// power and are back; else nobody: a lost replica of a group with a healthy one is excluded.
    fn lost_together(&self, g: usize) -> PeerSet {
        let mut set = self.groups[g].in_sync;
        loop {
            let sharing = self.groups.iter().filter(|g| g.in_sync.intersects(set));
            let wider = sharing.fold(set, |all, g| all.union(g.in_sync));
            if wider == set {
                break;
            }
            set = wider;
        }
        let returned = |p: u8| {
            let peer = &self.peers[p as usize];
            peer.lost && !peer.damaged && peer.link == super::replica::Link::Up
        };
        let elsewhere = self.groups.iter().any(|g| g.targets.intersects(set));
        if set.iter().all(returned) && !elsewhere {
            set
        } else {
            PeerSet::EMPTY
        }
    }

    fn recover(&mut self, lost: PeerSet) {
        tracing::warn!(volume = %self.config.volume, "every in-sync replica lost power: reconciling and replaying");
        for group in 0..self.groups.len() {
            if self.groups[group].in_sync.intersects(lost) {
                self.groups[group].recovering = true;
                self.groups[group].reconciled = false;
                self.groups[group].reconcile = None;
                self.renew_writes(group);
                self.rebuild_sources_changed(group);
            }
        }
        self.flush_forget(lost);
        for p in lost.iter() {
            let peer = &mut self.peers[p as usize];
            peer.incarnation = peer.actual;
            peer.lost = false;
            peer.failed = false;
        }
        for group in 0..self.groups.len() {
            self.refresh_group(group);
        }
        self.pump = true;
    }

    /// Writes what was acknowledged and not flushed once more.
    fn replay(&mut self, g: usize) {
        let stale = self
            .writes
            .keys_where(|w| w.group as usize == g && w.owner == WriteOwner::Replay && !w.done);
        for key in stale {
            self.writes.remove(key);
            self.replays -= 1;
        }
        let again: Vec<_> = self
            .retained
            .iter()
            .filter(|r| r.group as usize == g)
            .map(|r| (r.range, r.version, r.snapshot, r.body.clone()))
            .collect();
        for (range, version, snapshot, body) in again {
            self.replays += 1;
            self.submit_write_as(WriteOwner::Replay, range, version, snapshot, body, true);
        }
    }

    fn recovered(&mut self, g: usize) {
        self.groups[g].recovering = false;
        self.dirty = true;
        self.refresh_group(g);
        self.send_group(g);
        self.pump = true;
    }
}

fn one_block(entry: &Entry) -> BlockRange {
    BlockRange {
        chunk: entry.at.chunk,
        first: entry.at.block,
        count: 1,
    }
}
