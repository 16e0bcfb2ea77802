//! Schedules, as served by the leader; `schedule_loop` runs them.

use ashlar_proto::ids::VolumeId;
use ashlar_proto::rpc::metadata as pb;
use chrono::{DateTime, Utc};
use croner::parser::{CronParser, Seconds, Year};
use tonic::Status;

use super::convert;
use super::member::{Fault, Member};
use super::volumes::{unix_ms, volume_id};
use crate::model::{
    BackupTarget, Command, Operation, Outcome, Run, Schedule, ScheduleId, State, Target,
    no_such_schedule,
};

type Result<T> = std::result::Result<T, Fault>;

/// Times of a schedule: five fields of cron, in UTC.
pub(super) struct Times(croner::Cron);

impl Times {
    /// Reads the text.
    pub(super) fn parse(text: &str) -> std::result::Result<Self, String> {
        let parser = CronParser::builder()
            .seconds(Seconds::Disallowed)
            .year(Year::Disallowed)
            .build();
        let cron = parser.parse(text).map_err(|e| {
            format!(
                "{text:?} is no time in the form of cron ({e}); five fields are: minute, hour, day of the month, month, \
                 day of the week, in UTC, as in \"0 3 * * *\" for each night at three"
            )
        })?;
        Ok(Self(cron))
    }

    /// The first due time after a time.
    pub(super) fn next(&self, after_unix_ms: u64) -> Option<u64> {
        let next = self
            .0
            .find_next_occurrence(&time(after_unix_ms)?, false)
            .ok()?;
        u64::try_from(next.timestamp_millis()).ok()
    }

    /// The newest due time that is not after a time.
    pub(super) fn newest(&self, now_unix_ms: u64) -> Option<u64> {
        // Due times are whole minutes: what lies within this one is cut off before the search.
        let minute = now_unix_ms / 60_000 * 60_000;
        let newest = self.0.find_previous_occurrence(&time(minute)?, true).ok()?;
        u64::try_from(newest.timestamp_millis()).ok()
    }
}

fn time(unix_ms: u64) -> Option<DateTime<Utc>> {
    DateTime::from_timestamp_millis(i64::try_from(unix_ms).ok()?)
}

impl Member {
    pub(super) async fn create_schedule(
        &self,
        request: pb::CreateScheduleRequest,
    ) -> Result<pb::Schedule> {
        let schedule = schedule(&request)?;
        let command = Command {
            request: convert::request_key(&request.request_id)?,
            operation: Operation::CreateSchedule(schedule),
        };
        self.propose(command).await?;
        self.schedules.notify_one();
        self.one_schedule(&request.name)
    }

    pub(super) async fn list_schedules(
        &self,
        request: pb::ListSchedulesRequest,
    ) -> Result<pb::ListSchedulesResponse> {
        self.linearize().await?;
        if !request.name.is_empty() {
            let schedules = vec![self.one_schedule(&request.name)?];
            return Ok(pb::ListSchedulesResponse { schedules });
        }
        let state = self.shared.state();
        let schedules = state.schedules().iter().map(|s| message(&state, s));
        Ok(pb::ListSchedulesResponse {
            schedules: schedules.collect(),
        })
    }

    pub(super) async fn pause_schedule(
        &self,
        request: pb::PauseScheduleRequest,
    ) -> Result<pb::Schedule> {
        let command = Command {
            request: convert::request_key(&request.request_id)?,
            operation: Operation::PauseSchedule {
                name: request.name.clone(),
                paused: request.paused,
                now_unix_ms: unix_ms(),
            },
        };
        self.propose(command).await?;
        self.schedules.notify_one();
        self.one_schedule(&request.name)
    }

    pub(super) async fn delete_schedule(
        &self,
        request: pb::DeleteScheduleRequest,
    ) -> Result<pb::DeleteScheduleResponse> {
        let command = Command {
            request: convert::request_key(&request.request_id)?,
            operation: Operation::DeleteSchedule(request.name),
        };
        self.propose(command).await?;
        Ok(pb::DeleteScheduleResponse {})
    }

    fn one_schedule(&self, name: &str) -> Result<pb::Schedule> {
        let state = self.shared.state();
        let found = state.schedules().get(name);
        let found = found.ok_or_else(|| convert::status(no_such_schedule(name)))?;
        Ok(message(&state, found))
    }
}

fn schedule(request: &pb::CreateScheduleRequest) -> std::result::Result<Schedule, Status> {
    let invalid = |what: &str| Status::invalid_argument(what.to_owned());
    Times::parse(&request.cron).map_err(|e| invalid(&format!("cron: {e}")))?;
    let target = match (request.volume_id.is_empty(), request.labels.is_empty()) {
        (false, true) => Target::Volume(volume_id(&request.volume_id)?),
        (true, _) => Target::Labels(convert::labels(request.labels.clone())),
        (false, false) => return Err(invalid("labels: name either a volume or labels")),
    };
    let backup = (!request.backup_url.is_empty()).then(|| BackupTarget {
        url: request.backup_url.clone(),
        key_file: request.backup_key_file.clone(),
    });
    if backup.is_none() && !request.backup_key_file.is_empty() {
        return Err(invalid("backup_key_file: goes only with backup_url"));
    }
    let now = unix_ms();
    Ok(Schedule {
        id: ScheduleId(uuid::Uuid::now_v7().into_bytes()),
        name: request.name.clone(),
        cron: request.cron.clone(),
        target,
        keep: request.keep,
        backup,
        paused: false,
        created_unix_ms: now,
        dealt_unix_ms: now,
        last: None,
        skipped: None,
        succeeded_unix_ms: 0,
        runs: 0,
        failures: 0,
        skips: 0,
    })
}

fn message(state: &State, schedule: &Schedule) -> pb::Schedule {
    let (volume, labels) = match &schedule.target {
        Target::Volume(id) => (Some(*id), None),
        Target::Labels(labels) => (None, Some(labels.clone())),
    };
    let name = |id: VolumeId| {
        state
            .volume(id)
            .filter(|v| !v.hidden)
            .map(|v| v.name.clone())
    };
    let next = Times::parse(&schedule.cron)
        .ok()
        .filter(|_| !schedule.paused)
        .and_then(|times| times.next(schedule.dealt_unix_ms));
    let backup = schedule.backup.clone();
    pb::Schedule {
        schedule_id: schedule.id.0.to_vec(),
        name: schedule.name.clone(),
        cron: schedule.cron.clone(),
        volume_id: volume.map(VolumeId::to_vec).unwrap_or_default(),
        volume_name: volume.and_then(name).unwrap_or_default(),
        labels: labels.unwrap_or_default().into_iter().collect(),
        keep: schedule.keep,
        backup_url: backup.as_ref().map(|b| b.url.clone()).unwrap_or_default(),
        backup_key_file: backup.map(|b| b.key_file).unwrap_or_default(),
        paused: schedule.paused,
        created_unix_ms: schedule.created_unix_ms,
        next_unix_ms: next.unwrap_or(0),
        last: schedule.last.as_ref().map(run),
        skipped: schedule.skipped.as_ref().map(run),
        succeeded_unix_ms: schedule.succeeded_unix_ms,
        runs: schedule.runs,
        failures: schedule.failures,
        skips: schedule.skips,
    }
}

fn run(run: &Run) -> pb::ScheduleRun {
    use pb::ScheduleOutcome as To;
    let (outcome, message) = match &run.outcome {
        Outcome::Running => (To::Running, ""),
        Outcome::Done => (To::Done, ""),
        Outcome::Failed(why) => (To::Failed, why.as_str()),
        Outcome::Skipped(why) => (To::Skipped, why.as_str()),
    };
    pb::ScheduleRun {
        due_unix_ms: run.due_unix_ms,
        began_unix_ms: run.began_unix_ms,
        ended_unix_ms: run.ended_unix_ms,
        outcome: outcome.into(),
        message: message.to_owned(),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_utc_and_due_at_whole_minutes() {
        let ms = |text: &str| {
            let time: DateTime<Utc> = text.parse().unwrap();
            u64::try_from(time.timestamp_millis()).unwrap()
        };
        let nightly = Times::parse("0 3 * * *").unwrap();
        assert_eq!(
            nightly.next(ms("2026-11-27T02:59:59.999Z")),
            Some(ms("2026-11-27T03:00:00Z"))
        );
        assert_eq!(
            nightly.next(ms("2026-11-27T03:00:00Z")),
            Some(ms("2026-11-28T03:00:00Z"))
        );
        assert_eq!(
            nightly.newest(ms("2026-11-27T02:59:59.999Z")),
            Some(ms("2026-11-26T03:00:00Z"))
        );
        assert_eq!(
            nightly.newest(ms("2026-11-27T03:00:00.001Z")),
            Some(ms("2026-11-27T03:00:00Z"))
        );
        let leap = Times::parse("30 12 29 2 *").unwrap();
        assert_eq!(
            leap.next(ms("2026-11-27T00:00:00Z")),
            Some(ms("2028-02-29T12:30:00Z"))
        );
        for wrong in ["", "* * * *", "61 * * * *", "0 0 3 * * *", "x"] {
            assert!(Times::parse(wrong).is_err(), "{wrong}");
        }
    }
}
