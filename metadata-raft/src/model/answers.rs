//! Memory of recent answers: a retried request gets the answer of its first execution.
//!
//! Invariants: the content depends only on the sequence of applied commands; bounded by number and by
//! weight, oldest first out. Only answers of commands that changed something are kept: a refused
//! command may be evaluated again, as if its first sending had been lost.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::command::{Answer, RequestKey};

/// Most answers remembered.
const ANSWERS_MAX: usize = 8192;
/// Most bytes (estimated) remembered.
const WEIGHT_MAX: usize = 4 * 1024 * 1024;

/// One remembered answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Remembered {
    /// The request.
    pub request: RequestKey,
    /// Kind of operation that it was.
    pub kind: u8,
    /// Its answer.
    pub answer: Answer,
}

/// See the module.
#[derive(Clone, Default, Debug)]
pub struct RecentAnswers {
    order: VecDeque<RequestKey>,
    by_request: BTreeMap<RequestKey, Remembered>,
    weight: usize,
}

impl RecentAnswers {
    /// The answer given to a request, with the kind of its operation.
    pub fn get(&self, request: &RequestKey) -> Option<&Remembered> {
        self.by_request.get(request)
    }

    /// Remembers an answer and forgets the oldest beyond the bounds.
    pub fn insert(&mut self, remembered: Remembered) {
        self.weight += weight(&remembered.answer);
        self.order.push_back(remembered.request);
        self.by_request.insert(remembered.request, remembered);
        while self.order.len() > ANSWERS_MAX || self.weight > WEIGHT_MAX {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            if let Some(gone) = self.by_request.remove(&oldest) {
                self.weight -= weight(&gone.answer);
            }
        }
    }

    /// Oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Remembered> {
        self.order.iter().filter_map(|r| self.by_request.get(r))
    }

    /// Number of answers kept.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

/// Estimated bytes of an answer, a pure function of it.
fn weight(answer: &Answer) -> usize {
    const BASE: usize = 256;
    const REPLICA: usize = 64;
    match answer {
        Answer::Volume(v)
        | Answer::Opened { volume: v, .. }
        | Answer::Changed { volume: v, .. } => {
            let labels: usize = v.labels.iter().map(|(k, v)| k.len() + v.len() + 48).sum();
            let published: usize = v.publications.keys().map(|n| n.len() + 48).sum();
            BASE + v.groups.iter().map(Vec::len).sum::<usize>() * REPLICA
                + v.readers.len() * BASE
                + labels
                + published
        }
        Answer::Done => 64,
        Answer::Snapshots(ids) => BASE + ids.len() * 16,
        Answer::Node(_) | Answer::Disk(_) | Answer::Pool(_) => 2 * BASE,
    }
}
