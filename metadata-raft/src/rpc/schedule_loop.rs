//! The leader's loop that runs schedules.
//!
//! Invariants:
//! - A run is recorded by Raft before it begins. A member that has ceased to lead cannot record one, and so begins none.
//! - Of due times that passed while nobody led, or while the cluster was down, the newest is made up for if it is not older than
//!   [`CATCH_UP`]; a due time that comes while the run before goes on is recorded as skipped.
//! - Snapshots are named after the due time, so that a run that is begun twice makes nothing twice.
//! - What a schedule deletes has its label, and is deleted after the new snapshot is there.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use ashlar_proto::ids::{SnapshotId, VolumeId};
use ashlar_proto::rpc::metadata as pb;

use super::member::{Fault, Member};
use super::schedules::Times;
use super::volumes::unix_ms;
use crate::model::{
    BackupTarget, Command, Operation, Outcome, RequestKey, Run, Schedule, ScheduleId,
    SnapshotState, State, Target, validate,
};

/// Between two looks while there are schedules.
const PERIOD: Duration = Duration::from_secs(1);
/// A due time that passed unnoticed is made up for within this time.
const CATCH_UP: Duration = Duration::from_secs(6 * 3600);
/// Later than this, a run is one that was missed.
const LATE: Duration = Duration::from_secs(90);
/// Longest backup of one volume.
const BACKUP_MAX: Duration = Duration::from_secs(24 * 3600);
/// Label of a schedule's snapshots: its identity.
const LABEL_ID: &str = "ashlar.io/schedule-id";
/// Label of a schedule's snapshots, for people: its name.
const LABEL_NAME: &str = "ashlar.io/schedule";
/// The program that makes backups; it lies beside this one, or where this variable says.
const PROGRAM: &str = "ashlar";
const PROGRAM_VARIABLE: &str = "ASHLAR_BACKUP_PROGRAM";
/// Bytes kept of what it says when it fails.
const MESSAGE_BYTES_MAX: usize = 500;

/// What a due schedule needs.
#[derive(Debug)]
enum Due {
    /// A run.
    Begin(u64),
    /// It was too long ago.
    Missed(u64),
    /// The run before goes on.
    Overlaps(u64),
    /// The run before was cut off with the member that had begun it.
    CutOff(Run),
}

/// Runs for the life of the member.
pub async fn run(member: Arc<Member>) {
    let mut role = member.role.clone();
    let mut running: BTreeMap<ScheduleId, tokio::task::JoinHandle<()>> = BTreeMap::new();
    loop {
        let leads = role.wait_for(|r| r.leading_term.is_some() || r.stopping);
        if leads.await.is_err() || role.borrow().stopping {
            break;
        }
        running.retain(|_, task| !task.is_finished());
        round(&member, &mut running).await;
        let some = !member.shared.state().schedules().is_empty();
        tokio::select! {
            () = member.schedules.notified() => {}
            () = tokio::time::sleep(PERIOD), if some => {}
            _ = role.changed() => {}
        }
    }
    for task in running.values() {
        task.abort();
    }
}

async fn round(
    member: &Arc<Member>,
    running: &mut BTreeMap<ScheduleId, tokio::task::JoinHandle<()>>,
) {
    let now = unix_ms();
    // Whatever is found here is proposed, and refused if another member leads: a stale state does no harm, but only
    // a confirmed one shows runs that a leader before has recorded.
    let any = {
        let state = member.shared.state();
        state
            .schedules()
            .iter()
            .any(|s| due(s, now, running.contains_key(&s.id)).is_some())
    };
    if !any || member.linearize().await.is_err() {
        return;
    }
    let found: Vec<(Schedule, Due)> = {
        let state = member.shared.state();
        let all = state.schedules().iter();
        all.filter_map(|s| Some((s.clone(), due(s, now, running.contains_key(&s.id))?)))
            .collect()
    };
    for (schedule, due) in found {
        let id = schedule.id;
        let record = |due_unix_ms, outcome| Run {
            due_unix_ms,
            began_unix_ms: now,
            ended_unix_ms: if outcome == Outcome::Running { 0 } else { now },
            outcome,
        };
        let run = match due {
            Due::Begin(due) => record(due, Outcome::Running),
            Due::Missed(due) => record(
                due,
                Outcome::Skipped("no member led for hours when it was due".to_owned()),
            ),
            Due::Overlaps(due) => record(
                due,
                Outcome::Skipped(
                    "the run before was still going on; give the schedule more time".to_owned(),
                ),
            ),
            Due::CutOff(run) => Run {
                ended_unix_ms: now,
                outcome: Outcome::Failed(
                    "the member that ran it stopped, or ceased to lead".to_owned(),
                ),
                ..run
            },
        };
        tracing::info!(schedule = schedule.name, ?run, "schedule");
        if member.propose(recorded(id, run.clone())).await.is_err() {
            return;
        }
        if run.outcome == Outcome::Running {
            let task = tokio::spawn(carry_out(member.clone(), schedule, run));
            running.insert(id, task);
        }
    }
}

/// What is to be done for a schedule now, if anything.
fn due(schedule: &Schedule, now_unix_ms: u64, running: bool) -> Option<Due> {
    if let Some(run) = &schedule.last
        && run.outcome == Outcome::Running
        && !running
    {
        return Some(Due::CutOff(run.clone()));
    }
    if schedule.paused {
        return None;
    }
    let times = Times::parse(&schedule.cron).ok()?;
    let first = times.next(schedule.dealt_unix_ms)?;
    if first > now_unix_ms {
        return None;
    }
    let newest = times.newest(now_unix_ms).unwrap_or(first).max(first);
    if running {
        return Some(Due::Overlaps(newest));
    }
    let late = Duration::from_millis(now_unix_ms.saturating_sub(newest));
    if late > CATCH_UP {
        return Some(Due::Missed(newest));
    }
    if late > LATE {
        tracing::info!(
            schedule = schedule.name,
            ?late,
            "making up for a run that was missed"
        );
    }
    Some(Due::Begin(newest))
}

fn recorded(schedule: ScheduleId, run: Run) -> Command {
    Command {
        request: RequestKey::generate(),
        operation: Operation::RecordRun { schedule, run },
    }
}

/// A run from its beginning to its recorded end.
async fn carry_out(member: Arc<Member>, schedule: Schedule, run: Run) {
    let result = match &schedule.backup {
        None => snapshots(&member, &schedule, run.due_unix_ms).await,
        Some(target) => backups(&member, &schedule, target).await,
    };
    let outcome = match result {
        Ok(()) => Outcome::Done,
        Err(why) => {
            tracing::warn!(
                schedule = schedule.name,
                why,
                "a scheduled run failed; see `ashlar schedule show`"
            );
            Outcome::Failed(clipped(&why))
        }
    };
    let run = Run {
        ended_unix_ms: unix_ms(),
        outcome,
        ..run
    };
    // If this member leads no more, the next leader records that it was cut off.
    let _ = member.propose(recorded(schedule.id, run)).await;
}

fn clipped(text: &str) -> String {
    let mut end = text.len().min(MESSAGE_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

fn why(fault: Fault) -> String {
    match fault {
        Fault::NotLeader => "this member leads no more".to_owned(),
        Fault::Status(status) => status.message().to_owned(),
    }
}

/// The volumes of a schedule: identity and name.
fn volumes(state: &State, target: &Target) -> Result<Vec<(VolumeId, String)>, String> {
    let found: Vec<_> = match target {
        Target::Volume(id) => state
            .volume(*id)
            .into_iter()
            .filter(|v| !v.hidden)
            .collect(),
        Target::Labels(labels) => state
            .volumes()
            .filter(|v| !v.hidden)
            .filter(|v| {
                labels
                    .iter()
                    .all(|(k, value)| v.labels.get(k) == Some(value))
            })
            .collect(),
    };
    if found.is_empty() {
        return Err(match target {
            Target::Volume(_) => "the volume was deleted".to_owned(),
            Target::Labels(_) => "no volume has the labels".to_owned(),
        });
    }
    if found.len() > validate::SNAPSHOT_VOLUMES_MAX {
        return Err(format!(
            "{} volumes have the labels, and at most {} can be of one point in time",
            found.len(),
            validate::SNAPSHOT_VOLUMES_MAX
        ));
    }
    Ok(found.into_iter().map(|v| (v.id, v.name.clone())).collect())
}

/// `name-20261127-0300`, cut so that a volume's name has room.
fn base_name(schedule: &Schedule, due_unix_ms: u64) -> String {
    let time = i64::try_from(due_unix_ms).ok();
    let time = time
        .and_then(chrono::DateTime::from_timestamp_millis)
        .unwrap_or_default();
    format!("{}-{}", schedule.name, time.format("%Y%m%d-%H%M"))
}

async fn snapshots(member: &Member, schedule: &Schedule, due_unix_ms: u64) -> Result<(), String> {
    let volumes = volumes(&member.shared.state(), &schedule.target)?;
    let base = base_name(schedule, due_unix_ms);
    let several = matches!(schedule.target, Target::Labels(_));
    let id = uuid::Uuid::from_bytes(schedule.id.0).to_string();
    let items = volumes.iter().map(|(volume, name)| pb::CreateSnapshotItem {
        name: if several {
            format!("{base}-{name}")
        } else {
            base.clone()
        },
        volume_id: volume.to_vec(),
        labels: [
            (LABEL_ID.to_owned(), id.clone()),
            (LABEL_NAME.to_owned(), schedule.name.clone()),
        ]
        .into(),
    });
    let request = pb::CreateSnapshotsRequest {
        request_id: RequestKey::generate().0.to_vec(),
        items: items.collect(),
        group_name: if several { base } else { String::new() },
    };
    member.create_snapshots(request).await.map_err(why)?;
    retain(member, schedule, &id).await
}

/// Deletes the oldest snapshots of the schedule, of each volume all but the newest ones.
async fn retain(member: &Member, schedule: &Schedule, id: &str) -> Result<(), String> {
    let superfluous: Vec<SnapshotId> = {
        let state = member.shared.state();
        let mut kept: BTreeMap<VolumeId, u32> = BTreeMap::new();
        let mut all: Vec<_> = state
            .snapshots()
            .iter()
            .filter(|s| s.state == SnapshotState::Ready)
            .filter(|s| s.labels.get(LABEL_ID).map(String::as_str) == Some(id))
            .collect();
        all.sort_by_key(|s| std::cmp::Reverse((s.volume, s.number)));
        all.into_iter()
            .filter(|s| {
                let count = kept.entry(s.volume).or_default();
                *count += 1;
                *count > schedule.keep
            })
            .map(|s| s.id)
            .collect()
    };
    for part in superfluous.chunks(validate::BATCH_MAX) {
        let request = pb::DeleteSnapshotsRequest {
            request_id: RequestKey::generate().0.to_vec(),
            snapshot_ids: part.iter().map(|s| s.to_vec()).collect(),
        };
        member.delete_snapshots(request).await.map_err(why)?;
    }
    Ok(())
}

/// Backs the volumes up, one after the other; one that fails does not keep the others back.
async fn backups(
    member: &Member,
    schedule: &Schedule,
    target: &BackupTarget,
) -> Result<(), String> {
    let volumes = volumes(&member.shared.state(), &schedule.target)?;
    let program = program()?;
    let members: Vec<_> = member
        .cluster()
        .members
        .into_iter()
        .map(|m| m.address)
        .collect();
    let members = members.join(",");
    let mut failed = Vec::new();
    let mut seen = HashSet::new();
    for (volume, name) in volumes {
        if member.role.borrow().leading_term.is_none() {
            return Err("this member leads no more".to_owned());
        }
        if seen.insert(volume)
            && let Err(why) = backup(&program, &members, schedule, target, &name).await
        {
            failed.push(format!("{name}: {why}"));
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(failed.join("; "))
}

fn program() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(PROGRAM_VARIABLE) {
        return Ok(path.into());
    }
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let path = own.with_file_name(PROGRAM);
    if path.is_file() {
        return Ok(path);
    }
    Err(format!(
        "{} is missing, which makes backups: install it there, or name it with {PROGRAM_VARIABLE}",
        path.display()
    ))
}

async fn backup(
    program: &PathBuf,
    members: &str,
    schedule: &Schedule,
    target: &BackupTarget,
    volume: &str,
) -> Result<(), String> {
    let mut command = tokio::process::Command::new(program);
    command
        .args([
            "--metadata",
            members,
            "backup",
            "create",
            "--volume",
            volume,
        ])
        .args(["--repository", &target.url])
        .args(["--schedule", &schedule.name])
        .args(["--keep", &schedule.keep.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if !target.key_file.is_empty() {
        command.args(["--key-file", &target.key_file]);
    }
    let child = command
        .spawn()
        .map_err(|e| format!("{} cannot be started: {e}", program.display()))?;
    let output = tokio::time::timeout(BACKUP_MAX, child.wait_with_output())
        .await
        .map_err(|_| format!("not done after {} hours", BACKUP_MAX.as_secs() / 3600))?
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;

    fn hourly(dealt_unix_ms: u64) -> Schedule {
        Schedule {
            id: ScheduleId([1; 16]),
            name: "hourly".to_owned(),
            cron: "0 * * * *".to_owned(),
            target: Target::Volume(VolumeId([2; 16])),
            keep: 3,
            backup: None,
            paused: false,
            created_unix_ms: 0,
            dealt_unix_ms,
            last: None,
            skipped: None,
            succeeded_unix_ms: 0,
            runs: 0,
            failures: 0,
            skips: 0,
        }
    }

    #[test]
    fn due_times_are_served_once_made_up_for_or_skipped() {
        let schedule = hourly(10 * HOUR + 1);
        assert!(due(&schedule, 11 * HOUR - 1, false).is_none());
        assert!(matches!(due(&schedule, 11 * HOUR, false), Some(Due::Begin(t)) if t == 11 * HOUR));
        // Several were missed: the newest is made up for.
        let late = due(&schedule, 15 * HOUR + 59 * MINUTE, false);
        assert!(matches!(late, Some(Due::Begin(t)) if t == 15 * HOUR));
        assert!(
            matches!(due(&schedule, 11 * HOUR, true), Some(Due::Overlaps(t)) if t == 11 * HOUR)
        );
        let paused = Schedule {
            paused: true,
            ..schedule.clone()
        };
        assert!(due(&paused, 20 * HOUR, false).is_none());
        let daily = Schedule {
            cron: "0 3 * * *".to_owned(),
            ..hourly(HOUR)
        };
        assert!(matches!(due(&daily, 8 * HOUR, false), Some(Due::Begin(t)) if t == 3 * HOUR));
        assert!(matches!(due(&daily, 10 * HOUR, false), Some(Due::Missed(t)) if t == 3 * HOUR));
    }

    #[test]
    fn a_run_that_nobody_carries_out_any_more_was_cut_off() {
        let run = Run {
            due_unix_ms: HOUR,
            began_unix_ms: HOUR,
            ended_unix_ms: 0,
            outcome: Outcome::Running,
        };
        let schedule = Schedule {
            last: Some(run),
            ..hourly(HOUR)
        };
        assert!(matches!(
            due(&schedule, HOUR + MINUTE, false),
            Some(Due::CutOff(_))
        ));
        assert!(due(&schedule, HOUR + MINUTE, true).is_none());
    }

    #[test]
    fn messages_are_cut_at_a_character() {
        let text = "ä".repeat(MESSAGE_BYTES_MAX);
        assert_eq!(clipped(&text), "ä".repeat(MESSAGE_BYTES_MAX / 2));
        let schedule = hourly(0);
        assert_eq!(base_name(&schedule, 27 * HOUR), "hourly-19700102-0300");
        assert_eq!(clipped("x"), "x");
        assert!(Times::parse(&schedule.cron).is_ok_and(|t| t.next(0).unwrap() == HOUR));
    }
}
