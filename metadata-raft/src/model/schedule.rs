//! Schedules: what is to be snapshotted or backed up, when, and how the last run went.
//!
//! Invariants:
//! - A schedule says up to which due time it was dealt with (`dealt_unix_ms`); that only grows, so no due time is served twice.
//! - A run is recorded before it begins and when it ends; a run that began and did not end was cut off with its leader.
//! - The text of the times is checked before it comes here, and read again only outside of the state machine: another version of
//!   the parser must not make members differ.

use std::collections::BTreeMap;

use ashlar_proto::ids::VolumeId;
use serde::{Deserialize, Serialize};

use super::cluster::Labels;
use super::command::{Answer, Refusal, Response};
use super::{State, validate};

/// Most schedules of a cluster.
pub const SCHEDULES_MAX: usize = 1000;
/// Most snapshots or backups of each volume that a schedule keeps.
pub const KEEP_MAX: u32 = 500;

/// Identifies a schedule; another one of the same name later has another identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ScheduleId(pub [u8; 16]);

/// Which volumes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Target {
    /// One.
    Volume(VolumeId),
    /// All that have these labels when it is due.
    Labels(Labels),
}

/// Where backups go.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupTarget {
    /// The repository.
    pub url: String,
    /// File with its key, on the machines of the metadata members; empty: none.
    pub key_file: String,
}

/// How a run went.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// It began.
    Running,
    /// All is done.
    Done,
    /// Not all is done, and why.
    Failed(String),
    /// It was not begun, and why.
    Skipped(String),
}

/// A run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// When it was due.
    pub due_unix_ms: u64,
    /// When it began, by the leader's clock.
    pub began_unix_ms: u64,
    /// When it ended; 0 while it runs.
    pub ended_unix_ms: u64,
    /// See there.
    pub outcome: Outcome,
}

/// A schedule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Schedule {
    /// Identity.
    pub id: ScheduleId,
    /// Its name.
    pub name: String,
    /// Five fields of cron, in UTC.
    pub cron: String,
    /// Of what.
    pub target: Target,
    /// Snapshots (or backups) of each volume that stay.
    pub keep: u32,
    /// Backups instead of snapshots.
    pub backup: Option<BackupTarget>,
    /// Nothing is run.
    pub paused: bool,
    /// The leader's clock.
    pub created_unix_ms: u64,
    /// Due times up to here were dealt with.
    pub dealt_unix_ms: u64,
    /// The newest run that was begun.
    pub last: Option<Run>,
    /// The newest due time that was skipped.
    pub skipped: Option<Run>,
    /// When the newest run that was done ended.
    pub succeeded_unix_ms: u64,
    /// Runs that were begun.
    pub runs: u64,
    /// Of them those that failed.
    pub failures: u64,
    /// Due times that were skipped.
    pub skips: u64,
}

impl Schedule {
    /// Whether it asks for the same as another one.
    fn asks_same(&self, other: &Self) -> bool {
        self.cron == other.cron
            && self.target == other.target
            && self.keep == other.keep
            && self.backup == other.backup
    }

    fn check(&self) -> Result<(), Refusal> {
        validate::name("name", &self.name)?;
        validate::text("cron", &self.cron)?;
        if self.keep == 0 || self.keep > KEEP_MAX {
            return Err(Refusal::invalid(format!(
                "keep: must lie between 1 and {KEEP_MAX}"
            )));
        }
        match &self.target {
            Target::Volume(_) => {}
            Target::Labels(labels) if labels.is_empty() => {
                return Err(Refusal::invalid(
                    "labels: name a volume, or at least one label",
                ));
            }
            Target::Labels(labels) => validate::labels("labels", labels)?,
        }
        if let Some(backup) = &self.backup {
            validate::text("backup_url", &backup.url)?;
            validate::text("backup_key_file", &backup.key_file)?;
        }
        Ok(())
    }

    fn record(&mut self, run: &Run) {
        match &run.outcome {
            Outcome::Skipped(_) => {
                self.skips += 1;
                self.skipped = Some(run.clone());
            }
            outcome => {
                match outcome {
                    Outcome::Running => self.runs += 1,
                    Outcome::Failed(_) => self.failures += 1,
                    Outcome::Done => self.succeeded_unix_ms = run.ended_unix_ms,
                    Outcome::Skipped(_) => {}
                }
                self.last = Some(run.clone());
            }
        }
        self.dealt_unix_ms = self.dealt_unix_ms.max(run.due_unix_ms);
    }
}

/// All schedules, by name.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Schedules(BTreeMap<String, Schedule>);

impl Schedules {
    /// All, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Schedule> {
        self.0.values()
    }

    /// One.
    pub fn get(&self, name: &str) -> Option<&Schedule> {
        self.0.get(name)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, schedule: Schedule) {
        self.0.insert(schedule.name.clone(), schedule);
    }
}

impl State {
    pub(super) fn create_schedule(&mut self, schedule: &Schedule) -> Response {
        schedule.check()?;
        if let Target::Volume(id) = &schedule.target
            && self.volume(*id).is_none_or(|v| v.hidden)
        {
            return Err(Refusal::not_found(format!(
                "volume {id} does not exist; see `ashlar volume list`"
            )));
        }
        if let Some(existing) = self.schedules.get(&schedule.name) {
            if existing.asks_same(schedule) {
                return Ok(Answer::Done);
            }
            return Err(Refusal::exists(format!(
                "schedule {} exists with other settings; delete it first with `ashlar schedule delete` (what it made stays)",
                schedule.name
            )));
        }
        if self.schedules.0.len() >= SCHEDULES_MAX {
            return Err(Refusal::exhausted(format!(
                "there are {SCHEDULES_MAX} schedules already; give volumes a common label, and schedule that"
            )));
        }
        self.schedules.insert(schedule.clone());
        Ok(Answer::Done)
    }

    /// Due times of the pause are not made up for.
    pub(super) fn pause_schedule(
        &mut self,
        name: &str,
        paused: bool,
        now_unix_ms: u64,
    ) -> Response {
        let schedule = self.schedules.0.get_mut(name);
        let schedule = schedule.ok_or_else(|| no_such_schedule(name))?;
        if schedule.paused && !paused {
            schedule.dealt_unix_ms = schedule.dealt_unix_ms.max(now_unix_ms);
        }
        schedule.paused = paused;
        Ok(Answer::Done)
    }

    pub(super) fn delete_schedule(&mut self, name: &str) -> Response {
        let gone = self.schedules.0.remove(name);
        gone.map(|_| Answer::Done)
            .ok_or_else(|| no_such_schedule(name))
    }

    /// Of a schedule that is gone nothing is recorded.
    pub(super) fn record_run(&mut self, id: ScheduleId, run: &Run) -> Response {
        if let Outcome::Failed(text) | Outcome::Skipped(text) = &run.outcome {
            validate::text("outcome", text)?;
        }
        if let Some(schedule) = self.schedules.0.values_mut().find(|s| s.id == id) {
            schedule.record(run);
        }
        Ok(Answer::Done)
    }
}

/// The refusal for an unknown schedule.
pub(crate) fn no_such_schedule(name: &str) -> Refusal {
    let shown: String = name.chars().take(validate::NAME_BYTES_MAX).collect();
    Refusal::not_found(format!(
        "schedule {shown:?} does not exist; see `ashlar schedule list`"
    ))
}
