//! What a pull does whenever something arrived: list, compare, read, merge, as far as its bounds allow.

use ashlar_platform::clock::Time;
use ashlar_proto::ids::{BLOCK_SIZE, ChunkIndex};
use ashlar_proto::wire::{ChunkDigests, Digest, Read, RequestBody};
use smallvec::SmallVec;

use super::work::ChunkTask;
use super::{
    LIMITS, Link, Local, PULL_APPLIES_MAX, PULL_CHUNKS_MAX, PULL_READS_MAX, Pull, PullCommand,
    Remote,
};
use crate::store::StoreRequest;

impl Pull {
    /// Starts everything that can be started.
    pub(super) fn pump(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        if !self.running() || self.link != Link::Up || self.hold_until.is_some() {
            return;
        }
        for (chunk, blocks) in std::mem::take(&mut self.again) {
            if let Some(task) = self.tasks.get_mut(&chunk) {
                task.applies = task.applies.saturating_sub(1);
            }
            self.apply(chunk, blocks, out);
        }
        if !self.agree(out) {
            return;
        }
        loop {
            self.list_chunks(now, out);
            let more_tasks = self.start_tasks();
            let finished = self.work_tasks(now, out);
            if !more_tasks && !finished {
                break;
            }
        }
        let listed = !self.source.starved() && !self.target.starved();
        let walked = self.source.head().is_none() && self.target.head().is_none();
        if listed && walked && self.tasks.is_empty() && self.applies == 0 && self.again.is_empty() {
            self.confirm(out);
        }
    }

    fn list_chunks(&mut self, now: Time, out: &mut Vec<PullCommand>) {
        let (group, group_count) = (self.order.start.group, self.order.start.group_count);
        if let Some(from) = self.source.wants() {
            let digests = ChunkDigests {
                group,
                group_count,
                from,
            };
            self.send(Remote::Chunks, RequestBody::ChunkDigests(digests), now, out);
        }
        if let Some(from) = self.target.wants() {
            let digests = ChunkDigests {
                group,
                group_count,
                from,
            };
            let request = StoreRequest::ChunkDigests {
                volume: self.order.volume,
                digests,
            };
            self.ask_store(Local::Chunks, request, out);
        }
    }

    /// Takes chunks off the two lists; whether any was taken.
    fn start_tasks(&mut self) -> bool {
        let mut taken = false;
        while self.tasks.len() < PULL_CHUNKS_MAX && !self.source.starved() && !self.target.starved()
        {
            let source = self.source.head().copied();
            let target = self.target.head().copied();
            let chunk = match (source, target) {
                (None, None) => break,
                (Some(s), Some(t)) => s.chunk.min(t.chunk),
                (Some(one), None) | (None, Some(one)) => one.chunk,
            };
            let source = source
                .filter(|d| d.chunk == chunk)
                .and_then(|_| self.source.take());
            let target = target
                .filter(|d| d.chunk == chunk)
                .and_then(|_| self.target.take());
            self.position = ChunkIndex(chunk.0.saturating_add(1));
            taken = true;
            if source == target {
                self.chunks_done += 1;
            } else {
                self.tasks.insert(
                    chunk,
                    ChunkTask::new(chunk, source.is_some(), target.is_some()),
                );
            }
        }
        taken
    }

    /// Advances every chunk under way; whether one was finished.
    fn work_tasks(&mut self, now: Time, out: &mut Vec<PullCommand>) -> bool {
        let rebuild = self.order.start.rebuild_epoch;
        let mut finished = false;
        let chunks: SmallVec<[ChunkIndex; PULL_CHUNKS_MAX]> = self.tasks.keys().copied().collect();
        for chunk in chunks {
            // Taken out while it works, so that it can use the rest of the pull.
            let Some(mut task) = self.tasks.remove(&chunk) else {
                continue;
            };
            loop {
                task.plan
                    .extend(chunk, &mut task.source, &mut task.target, rebuild, LIMITS);
                self.source_bad += std::mem::take(&mut task.plan.source_bad);
                if task.plan.direct.is_empty() || self.applies >= PULL_APPLIES_MAX {
                    break;
                }
                let blocks = std::mem::take(&mut task.plan.direct);
                task.applies += 1;
                self.apply(chunk, blocks, out);
            }
            self.ask_for_entries(chunk, &mut task, now, out);
            self.read_runs(&mut task, now, out);
            if task.done() {
                self.chunks_done += 1;
                finished = true;
            } else {
                self.tasks.insert(chunk, task);
            }
        }
        finished
    }

    fn ask_for_entries(
        &mut self,
        chunk: ChunkIndex,
        task: &mut ChunkTask,
        now: Time,
        out: &mut Vec<PullCommand>,
    ) {
        if let Some(from) = task.source.wants() {
            let digest = Digest { chunk, from };
            self.send(
                Remote::Entries(chunk),
                RequestBody::Digest(digest),
                now,
                out,
            );
        }
        if let Some(from) = task.target.wants() {
            let digest = Digest { chunk, from };
            let request = StoreRequest::Digest {
                volume: self.order.volume,
                digest,
            };
            self.ask_store(Local::Entries(chunk), request, out);
        }
    }

    fn read_runs(&mut self, task: &mut ChunkTask, now: Time, out: &mut Vec<PullCommand>) {
        while self.reads < PULL_READS_MAX && self.applies < PULL_APPLIES_MAX {
            let Some(&run) = task.plan.runs.front() else {
                return;
            };
            if !self
                .budget
                .take(usize::from(run.range.count) * BLOCK_SIZE, now)
            {
                return;
            }
            task.plan.runs.pop_front();
            task.reads += 1;
            self.reads += 1;
            let read = Read {
                range: run.range,
                snapshot: run.snapshot,
                exact_layer: true,
            };
            self.send(Remote::Data(run), RequestBody::Read(read), now, out);
        }
    }
}
