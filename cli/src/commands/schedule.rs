//! `ashlar schedule`: snapshots or backups at times, run by the metadata cluster itself.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ashlar_proto::rpc::metadata as pb;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::Context;
use crate::args::parse_label;
use crate::client::request_id;
use crate::error::{CliError, Context as _, Result};
use crate::output::{self, Column, cell, health};

/// Schedules.
#[derive(Subcommand, Debug)]
pub enum ScheduleCommand {
    /// Takes snapshots (or makes backups) of volumes at times, and keeps the newest ones
    Create(CreateArgs),
    /// Every schedule
    List,
    /// One schedule: its last and its next run
    Show {
        /// Its name
        schedule: String,
    },
    /// Deletes a schedule; the snapshots and backups that it made stay
    Delete {
        /// Its name
        schedule: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Runs nothing until it is resumed
    Pause {
        /// Its name
        schedule: String,
    },
    /// Runs again when it is due next; what was due meanwhile is not made up for
    Resume {
        /// Its name
        schedule: String,
    },
}

/// Of `schedule create`.
#[derive(Args, Debug)]
pub struct CreateArgs {
    /// Its name; snapshots are called NAME-DATE-TIME
    name: String,
    /// When: minute, hour, day of the month, month, day of the week, in UTC: "0 3 * * *" is each night at three
    #[arg(long)]
    cron: String,
    /// A volume (name or id)
    #[arg(long, required_unless_present = "labels", conflicts_with = "labels")]
    volume: Option<String>,
    /// All volumes that have this label then, NAME=VALUE (repeatable); their snapshots are of one point in time
    #[arg(long = "labels", visible_alias = "label", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// Snapshots (or backups) of each volume that stay
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    keep: u32,
    /// Make backups there instead: s3://BUCKET/PREFIX or file:///DIRECTORY; the metadata members reach it, and have
    /// credentials in their environment
    #[arg(long, value_name = "URL")]
    backup_to: Option<String>,
    /// File with the repository's key, on the machines of the metadata members
    #[arg(long, value_name = "FILE", requires = "backup_to")]
    key_file: Option<PathBuf>,
}

#[derive(Serialize)]
struct RunView {
    due_unix_ms: u64,
    began_unix_ms: u64,
    /// 0 while it runs.
    ended_unix_ms: u64,
    /// `running`, `done`, `failed` or `skipped`.
    outcome: &'static str,
    message: String,
}

impl RunView {
    fn new(run: &pb::ScheduleRun) -> Self {
        use pb::ScheduleOutcome as Outcome;
        Self {
            due_unix_ms: run.due_unix_ms,
            began_unix_ms: run.began_unix_ms,
            ended_unix_ms: run.ended_unix_ms,
            outcome: match run.outcome() {
                Outcome::Running | Outcome::Unspecified => "running",
                Outcome::Done => "done",
                Outcome::Failed => "failed",
                Outcome::Skipped => "skipped",
            },
            message: run.message.clone(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} {}", output::time(self.due_unix_ms), self.outcome);
        if !self.message.is_empty() {
            text = format!("{text}: {}", self.message);
        }
        text
    }
}

#[derive(Serialize)]
struct ScheduleView {
    id: String,
    name: String,
    cron: String,
    volume_id: Option<String>,
    /// Absent also if it was deleted.
    volume: Option<String>,
    labels: BTreeMap<String, String>,
    keep: u32,
    backup_to: Option<String>,
    key_file: Option<String>,
    paused: bool,
    created_unix_ms: u64,
    /// 0 while it is paused.
    next_unix_ms: u64,
    last: Option<RunView>,
    skipped: Option<RunView>,
    succeeded_unix_ms: u64,
    runs: u64,
    failures: u64,
    skips: u64,
}

impl ScheduleView {
    fn new(schedule: &pb::Schedule) -> Self {
        let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Self {
            id: output::id_text(&schedule.schedule_id),
            name: schedule.name.clone(),
            cron: schedule.cron.clone(),
            volume_id: given(&output::id_text(&schedule.volume_id)),
            volume: given(&schedule.volume_name),
            labels: schedule.labels.clone().into_iter().collect(),
            keep: schedule.keep,
            backup_to: given(&schedule.backup_url),
            key_file: given(&schedule.backup_key_file),
            paused: schedule.paused,
            created_unix_ms: schedule.created_unix_ms,
            next_unix_ms: schedule.next_unix_ms,
            last: schedule.last.as_ref().map(RunView::new),
            skipped: schedule.skipped.as_ref().map(RunView::new),
            succeeded_unix_ms: schedule.succeeded_unix_ms,
            runs: schedule.runs,
            failures: schedule.failures,
            skips: schedule.skips,
        }
    }

    fn target(&self) -> String {
        match (&self.volume, &self.volume_id) {
            (Some(name), _) => name.clone(),
            (None, Some(id)) => format!("{id} (deleted)"),
            (None, None) => output::labels(&self.labels),
        }
    }

    fn what(&self) -> &str {
        self.backup_to.as_deref().unwrap_or("snapshots")
    }

    fn next(&self) -> String {
        if self.paused {
            return "paused".to_owned();
        }
        output::time(self.next_unix_ms)
    }

    fn is_well(&self) -> bool {
        self.last.as_ref().is_none_or(|run| run.outcome != "failed")
    }
}

/// Carries out a command.
pub async fn run(command: &ScheduleCommand, context: &mut Context) -> Result<()> {
    match command {
        ScheduleCommand::Create(args) => create(args, context).await,
        ScheduleCommand::List => list(context).await,
        ScheduleCommand::Show { schedule } => show(schedule, context).await,
        ScheduleCommand::Delete { schedule, yes } => delete(schedule, *yes, context).await,
        ScheduleCommand::Pause { schedule } => pause(schedule, true, context).await,
        ScheduleCommand::Resume { schedule } => pause(schedule, false, context).await,
    }
}

async fn create(args: &CreateArgs, context: &mut Context) -> Result<()> {
    let volume_id = match &args.volume {
        Some(name) => context.metadata.volume(name).await?.volume_id,
        None => Vec::new(),
    };
    let key_file = match &args.key_file {
        None => String::new(),
        // Read elsewhere, where another directory is the current one.
        Some(path) => std::path::absolute(path)
            .context(|| format!("make an absolute path of {}", path.display()))?
            .to_str()
            .ok_or_else(|| CliError::usage("the path of the key file is not UTF-8"))?
            .to_owned(),
    };
    let request = pb::CreateScheduleRequest {
        request_id: request_id(),
        name: args.name.clone(),
        cron: args.cron.clone(),
        volume_id,
        labels: args.labels.iter().cloned().collect(),
        keep: args.keep,
        backup_url: args.backup_to.clone().unwrap_or_default(),
        backup_key_file: key_file,
    };
    let doing = format!("create the schedule {:?}", args.name);
    let made = context
        .metadata
        .call(&doing, request, async |mut c, q| c.create_schedule(q).await)
        .await
        .map_err(|e| CliError { hint: None, ..e })?;
    let view = ScheduleView::new(&made);
    let sentence = format!(
        "schedule {} is there; it runs first at {}",
        view.name,
        view.next()
    );
    context.output.done(&view, &sentence)
}

async fn found(name: &str, context: &mut Context) -> Result<Vec<ScheduleView>> {
    let request = pb::ListSchedulesRequest {
        name: name.to_owned(),
    };
    let answer = context
        .metadata
        .call("list the schedules", request, async |mut c, q| {
            c.list_schedules(q).await
        })
        .await?;
    Ok(answer.schedules.iter().map(ScheduleView::new).collect())
}

async fn list(context: &mut Context) -> Result<()> {
    let views = found("", context).await?;
    let header = [
        Column::Left("name"),
        Column::Left("times (UTC)"),
        Column::Left("of"),
        Column::Left("makes"),
        Column::Right("keeps"),
        Column::Left("last"),
        Column::Left("next"),
    ];
    context.output.list(&views, &header, |s| {
        let last = s.last.as_ref().map_or_else(
            || "-".to_owned(),
            |run| format!("{} {}", output::time(run.due_unix_ms), run.outcome),
        );
        vec![
            cell(&s.name),
            cell(&s.cron),
            cell(s.target()),
            cell(s.what()),
            cell(s.keep),
            health(last, s.is_well()),
            cell(s.next()),
        ]
    })
}

async fn show(name: &str, context: &mut Context) -> Result<()> {
    let views = found(name, context).await?;
    let view = views
        .first()
        .ok_or_else(|| CliError::not_found(format!("no schedule is named {name:?}")))?;
    let text = |run: &Option<RunView>| run.as_ref().map_or_else(|| "-".to_owned(), RunView::text);
    let fields = [
        ("Schedule", view.name.clone()),
        ("Id", view.id.clone()),
        ("Times (UTC)", view.cron.clone()),
        ("Of", view.target()),
        ("Makes", view.what().to_owned()),
        (
            "Key file",
            view.key_file.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("Keeps", view.keep.to_string()),
        ("Created", output::time(view.created_unix_ms)),
        ("Next", view.next()),
        ("Last", text(&view.last)),
        ("Last done", output::time(view.succeeded_unix_ms)),
        ("Last skipped", text(&view.skipped)),
        (
            "Runs",
            format!(
                "{}, of which {} failed; {} skipped",
                view.runs, view.failures, view.skips
            ),
        ),
    ];
    context.output.object(view, &fields)
}

#[derive(Serialize)]
struct DeletedView {
    name: String,
    deleted: bool,
}

async fn delete(name: &str, yes: bool, context: &mut Context) -> Result<()> {
    super::confirm_that(&format!("deletes the schedule {name:?}"), name, yes)?;
    let request = pb::DeleteScheduleRequest {
        request_id: request_id(),
        name: name.to_owned(),
    };
    let doing = format!("delete the schedule {name:?}");
    context
        .metadata
        .call(&doing, request, async |mut c, q| c.delete_schedule(q).await)
        .await?;
    let view = DeletedView {
        name: name.to_owned(),
        deleted: true,
    };
    context.output.done(
        &view,
        &format!("schedule {name} is deleted; what it made stays"),
    )
}

async fn pause(name: &str, paused: bool, context: &mut Context) -> Result<()> {
    let request = pb::PauseScheduleRequest {
        request_id: request_id(),
        name: name.to_owned(),
        paused,
    };
    let doing = format!("change the schedule {name:?}");
    let changed = context
        .metadata
        .call(&doing, request, async |mut c, q| c.pause_schedule(q).await)
        .await?;
    let view = ScheduleView::new(&changed);
    let sentence = if paused {
        format!("schedule {name} is paused")
    } else {
        format!("schedule {name} runs next at {}", view.next())
    };
    context.output.done(&view, &sentence)
}
