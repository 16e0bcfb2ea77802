//! `ashlar backup`: snapshots in object storage.
//!
//! Invariants:
//! - A repository that is only read is never written: `list`, `show`, `verify` and `restore` need no right to write there.
//! - Keys and credentials come from files and the environment only, and are never shown.

mod create;
mod export;
mod restore;

use std::path::PathBuf;
use std::time::Duration;

use ashlar_cli::backup::key::Secret;
use ashlar_cli::backup::storage::{Absent, Storage};
use ashlar_cli::backup::verify::{self, Report};
use ashlar_cli::backup::{BackupError, Manifest, Progress, Repository, gc, writer};
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde::Serialize;

use super::Context;
use crate::error::{CliError, Kind, Result};
use crate::output::{self, Column, Output, cell};
use crate::{progress, size};

/// Backups.
#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    /// Backs up a snapshot, or a volume as it is now; only what the repository does not have is sent
    Create(create::CreateArgs),
    /// Every backup, oldest first
    List {
        /// Where
        #[command(flatten)]
        repository: RepositoryArgs,
        /// Only those of this volume (its name at the time, or its id)
        #[arg(long)]
        volume: Option<String>,
    },
    /// One backup
    Show {
        /// Id, or the beginning of it
        backup: String,
        /// Where
        #[command(flatten)]
        repository: RepositoryArgs,
    },
    /// Checks that backups are complete; exit code 1 if one is not
    Verify {
        /// Ids, or beginnings of them [default: every backup]
        backups: Vec<String>,
        /// Where
        #[command(flatten)]
        repository: RepositoryArgs,
        /// Read everything, and check its content
        #[arg(long)]
        deep: bool,
        /// Delete objects that are damaged: the next backup with `--base none` stores them again, if it still finds
        /// their content, and so heals the backups that need them
        #[arg(long, requires = "deep")]
        delete_damaged: bool,
    },
    /// Makes a new volume of a backup, in this cluster or another one
    Restore(restore::RestoreArgs),
    /// Deletes backups; others do not need them. `gc` frees the space
    Delete {
        /// Ids, or beginnings of them
        #[arg(required = true)]
        backups: Vec<String>,
        /// Where
        #[command(flatten)]
        repository: RepositoryArgs,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Deletes what no backup needs: of deleted backups, and of backups that were killed
    #[command(visible_alias = "clean")]
    Gc {
        /// Where
        #[command(flatten)]
        repository: RepositoryArgs,
        /// Objects that are younger stay
        #[arg(long, value_name = "HOURS", default_value_t = 24)]
        grace_hours: u64,
        /// Only say what would be deleted
        #[arg(long)]
        dry_run: bool,
        /// Take away the locks of others, who are known to be gone (a lock goes by itself 15 minutes after its owner)
        #[arg(long)]
        break_locks: bool,
    },
}

/// Which repository.
#[derive(Args, Clone, Debug)]
pub struct RepositoryArgs {
    /// file:///DIRECTORY or s3://BUCKET/PREFIX; S3 uses AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and
    /// AWS_SECRET_ACCESS_KEY of the environment
    #[arg(
        long = "repository",
        visible_aliases = ["from", "to"],
        value_name = "URL",
        env = "ASHLAR_BACKUP_REPOSITORY"
    )]
    url: String,
    /// File with the repository's key: 32 bytes, 64 hexadecimal digits, or a passphrase
    #[arg(long, value_name = "FILE", env = "ASHLAR_BACKUP_KEY_FILE")]
    key_file: Option<PathBuf>,
}

impl RepositoryArgs {
    fn secret(&self) -> Result<Option<Secret>> {
        let read = self.key_file.as_deref().map(Secret::read);
        read.transpose().map_err(failed)
    }

    async fn open(&self) -> Result<Repository> {
        let storage = Storage::open(&self.url, Absent::Refuse).map_err(failed)?;
        let secret = self.secret()?;
        Repository::open(storage, secret.as_ref())
            .await
            .map_err(failed)
    }

    async fn open_or_create(&self) -> Result<Repository> {
        let secret = self.secret()?;
        let storage = Storage::open(&self.url, Absent::Create).map_err(failed)?;
        Repository::open_or_create(storage, secret.as_ref())
            .await
            .map_err(failed)
    }
}

/// A repository's error, for the user.
fn failed(error: BackupError) -> CliError {
    use BackupError as E;
    let kind = match &error {
        E::NoRepository(_) | E::NoBackup(_) => Kind::NotFound,
        E::Url { .. } | E::KeyFile { .. } | E::KeyMissing | E::KeyUnused | E::KeyWrong { .. } => {
            Kind::Usage
        }
        E::Ambiguous(_) => Kind::Usage,
        E::Locked { .. } | E::LockLost | E::GarbageUnknown { .. } | E::Mismatch(_) => {
            Kind::Conflict
        }
        E::Storage { .. } => Kind::Unavailable,
        _ => Kind::Error,
    };
    let hint = match &error {
        E::NoRepository(_) => Some("`ashlar backup create` makes one"),
        E::NoBackup(_) | E::Ambiguous(_) => Some("`ashlar backup list` shows what there is"),
        E::Damaged { .. } | E::Missing(_) => {
            Some("`ashlar backup verify --deep` shows which backups are whole")
        }
        E::GarbageUnknown { .. } => {
            Some("see `ashlar backup verify`; delete the backup that cannot be read, and try again")
        }
        E::Locked { .. } => Some(
            "wait until it is done; if its process is gone, the lock goes 15 minutes later, or at once with \
             `ashlar backup gc --break-locks`",
        ),
        E::Storage { .. } => Some(
            "see whether the storage answers, and AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY; a backup that is run again goes on where it stopped",
        ),
        _ => None,
    };
    let mut message = brief(&error.to_string());
    // The storage's errors say in their sources what happened.
    let mut source = std::error::Error::source(&error).and_then(std::error::Error::source);
    while let Some(cause) = source {
        let text = brief(&cause.to_string());
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        source = cause.source();
    }
    let error = CliError::new(kind, message);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// A storage's error without the document that it answered: that repeats the whole request.
fn brief(text: &str) -> String {
    let Some((before, document)) = text.split_once("<?xml") else {
        return text.to_owned();
    };
    let between = |open: &str, close: &str| {
        let rest = document.split_once(open)?.1;
        Some(rest.split_once(close)?.0)
    };
    match between("<Code>", "</Code>") {
        Some(code) => format!("{before}{code}"),
        None => before.trim_end_matches([':', ' ']).to_owned(),
    }
}

/// A bar on standard error, if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(doing: &str) -> Self {
        let bar = progress::bar(
            doing,
            "{prefix} [{bar:30}] {percent:>3}% {bytes}/{total_bytes} {bytes_per_sec}, {eta} left, {msg}",
        );
        bar.set_length(0);
        Self(bar)
    }
}

impl Progress for Bar {
    fn begin(&self, total: u64) {
        self.0.set_length(total);
        self.0.set_position(0);
    }

    fn step(&self, bytes: u64, _moved: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A backup.
#[derive(Serialize)]
struct BackupView {
    id: String,
    volume: String,
    volume_id: String,
    snapshot: String,
    snapshot_id: String,
    snapshot_unix_ms: u64,
    size_bytes: u64,
    /// `full` or `incremental`; each can be restored alone.
    kind: &'static str,
    base: Option<String>,
    schedule: Option<String>,
    began_unix_ms: u64,
    finished_unix_ms: u64,
    read_bytes: u64,
    sent_bytes: u64,
    sent_objects: u64,
    compression: String,
    pool: String,
    replicas: u32,
    labels: std::collections::BTreeMap<String, String>,
}

impl BackupView {
    fn new(manifest: &Manifest) -> Self {
        let origin = &manifest.origin;
        Self {
            id: manifest.backup_id.to_string(),
            volume: origin.volume_name.clone(),
            volume_id: origin.volume_id.to_string(),
            snapshot: origin.snapshot_name.clone(),
            snapshot_id: origin.snapshot_id.to_string(),
            snapshot_unix_ms: origin.snapshot_unix_ms,
            size_bytes: manifest.size_bytes,
            kind: if manifest.base.is_some() {
                "incremental"
            } else {
                "full"
            },
            base: manifest.base.map(|b| b.to_string()),
            schedule: manifest.schedule.clone(),
            began_unix_ms: manifest.began_unix_ms,
            finished_unix_ms: manifest.finished_unix_ms,
            read_bytes: manifest.read_bytes,
            sent_bytes: manifest.sent_bytes,
            sent_objects: manifest.sent_objects,
            compression: format!("{:?}", manifest.compression).to_lowercase(),
            pool: origin.pool.clone(),
            replicas: origin.replicas,
            labels: origin.labels.clone(),
        }
    }
}

/// Carries out a command that needs no cluster; `None` if it needs one.
pub async fn run_alone(command: &BackupCommand, output: Output) -> Option<Result<()>> {
    Some(match command {
        BackupCommand::Create(_) | BackupCommand::Restore(_) => return None,
        BackupCommand::List { repository, volume } => {
            list(repository, volume.as_deref(), output).await
        }
        BackupCommand::Show { backup, repository } => show(backup, repository, output).await,
        BackupCommand::Verify {
            backups,
            repository,
            deep,
            delete_damaged,
        } => {
            let how = How {
                deep: *deep,
                delete_damaged: *delete_damaged,
            };
            verify(backups, repository, how, output).await
        }
        BackupCommand::Delete {
            backups,
            repository,
            yes,
        } => delete(backups, repository, *yes, output).await,
        BackupCommand::Gc {
            repository,
            grace_hours,
            dry_run,
            break_locks,
        } => {
            let options = gc::Options {
                grace: Duration::from_secs(grace_hours.saturating_mul(3600)),
                dry_run: *dry_run,
                break_locks: *break_locks,
            };
            collect(repository, options, output).await
        }
    })
}

/// Carries out a command that needs a cluster.
pub async fn run(command: &BackupCommand, context: &mut Context) -> Result<()> {
    match command {
        BackupCommand::Create(args) => create::run(args, context).await,
        BackupCommand::Restore(args) => restore::run(args, context).await,
        other => match run_alone(other, context.output).await {
            Some(result) => result,
            None => Ok(()),
        },
    }
}

async fn list(args: &RepositoryArgs, volume: Option<&str>, output: Output) -> Result<()> {
    let repository = args.open().await?;
    let (mut backups, damaged) = repository.backups().await.map_err(failed)?;
    if let Some(wanted) = volume {
        backups
            .retain(|m| m.origin.volume_name == wanted || m.origin.volume_id.to_string() == wanted);
    }
    let views: Vec<_> = backups.iter().map(BackupView::new).collect();
    let header = [
        Column::Left("id"),
        Column::Left("volume"),
        Column::Left("snapshot"),
        Column::Left("of"),
        Column::Right("size"),
        Column::Left("kind"),
        Column::Right("sent"),
    ];
    output.list(&views, &header, |b| {
        vec![
            cell(&b.id),
            cell(&b.volume),
            cell(&b.snapshot),
            cell(output::time(b.snapshot_unix_ms)),
            cell(size::format(b.size_bytes)),
            cell(b.kind),
            cell(size::format(b.sent_bytes)),
        ]
    })?;
    match damaged.as_slice() {
        [] => Ok(()),
        some => {
            let lines: Vec<_> = some.iter().map(ToString::to_string).collect();
            Err(CliError::error(format!(
                "{} backups cannot be read: {}",
                some.len(),
                lines.join("; ")
            )))
        }
    }
}

async fn show(backup: &str, args: &RepositoryArgs, output: Output) -> Result<()> {
    let repository = args.open().await?;
    let view = BackupView::new(&repository.backup(backup).await.map_err(failed)?);
    let bytes = |n: u64| format!("{} ({n} bytes)", size::format(n));
    let fields = [
        ("Backup", view.id.clone()),
        ("Volume", view.volume.clone()),
        ("Volume id", view.volume_id.clone()),
        ("Snapshot", view.snapshot.clone()),
        ("Snapshot id", view.snapshot_id.clone()),
        ("Of", output::time(view.snapshot_unix_ms)),
        ("Size", bytes(view.size_bytes)),
        ("Kind", view.kind.to_owned()),
        ("Base", view.base.clone().unwrap_or_else(|| "-".to_owned())),
        (
            "Schedule",
            view.schedule.clone().unwrap_or_else(|| "-".to_owned()),
        ),
        ("Began", output::time(view.began_unix_ms)),
        ("Finished", output::time(view.finished_unix_ms)),
        ("Read", bytes(view.read_bytes)),
        ("Sent", bytes(view.sent_bytes)),
        ("Objects sent", view.sent_objects.to_string()),
        ("Compression", view.compression.clone()),
        ("Pool", view.pool.clone()),
        ("Replicas", view.replicas.to_string()),
        ("Labels", output::labels(&view.labels)),
    ];
    output.object(&view, &fields)
}

#[derive(Serialize)]
struct ProblemView {
    object: String,
    problem: String,
}

#[derive(Serialize)]
struct ReportView {
    backups: usize,
    objects: u64,
    deep: bool,
    /// Damaged ones, on request.
    deleted_objects: usize,
    problems: Vec<ProblemView>,
    bad_backups: Vec<String>,
}

/// How to verify.
#[derive(Clone, Copy)]
struct How {
    deep: bool,
    delete_damaged: bool,
}

async fn verify(ids: &[String], args: &RepositoryArgs, how: How, output: Output) -> Result<()> {
    let deep = how.deep;
    let repository = args.open().await?;
    let mut names = Vec::new();
    for id in ids {
        names.push(repository.find(id).await.map_err(failed)?);
    }
    let names = (!names.is_empty()).then_some(names);
    let bar = Bar::new("verify");
    let report = verify::verify(&repository, names, deep, &bar).await;
    drop(bar);
    let report = report.map_err(failed)?;
    let deleted_objects = if how.delete_damaged {
        verify::delete_damaged(&repository, &report)
            .await
            .map_err(failed)?
    } else {
        0
    };
    let Report {
        backups,
        objects,
        problems,
        mut bad_backups,
    } = report;
    bad_backups.sort();
    let view = ReportView {
        backups,
        objects,
        deep,
        deleted_objects,
        problems: problems
            .into_iter()
            .map(|p| ProblemView {
                object: p.object,
                problem: p.error.to_string(),
            })
            .collect(),
        bad_backups,
    };
    if view.problems.is_empty() {
        let how = if deep {
            "were read, and are as they should be"
        } else {
            "are there (--deep reads them)"
        };
        return output.done(
            &view,
            &format!("{backups} backups: {objects} objects {how}"),
        );
    }
    let lines: Vec<_> = view.problems.iter().map(|p| p.problem.as_str()).collect();
    output.done(&view, &lines.join("\n"))?;
    Err(CliError::error(format!(
        "{} of {backups} backups cannot be restored rightly: {}",
        view.bad_backups.len(),
        view.bad_backups.join(", ")
    ))
    .hint(
        "`ashlar backup verify --deep --delete-damaged`, then `ashlar backup create --base none` stores again what the \
         volume still has; delete the backups that stay bad",
    ))
}

#[derive(Serialize)]
struct DeletedView {
    id: String,
    deleted: bool,
}

async fn delete(ids: &[String], args: &RepositoryArgs, yes: bool, output: Output) -> Result<()> {
    let repository = args.open().await?;
    let mut names = Vec::new();
    for id in ids {
        names.push(repository.find(id).await.map_err(failed)?);
    }
    let all = ids.join(", ");
    super::confirm_that(&format!("deletes backups: {all}"), "yes", yes)?;
    for name in &names {
        writer::delete(&repository, name).await.map_err(failed)?;
    }
    let views: Vec<_> = names
        .iter()
        .map(|name| DeletedView {
            id: name
                .rsplit('/')
                .next()
                .unwrap_or(name)
                .trim_end_matches(".manifest")
                .to_owned(),
            deleted: true,
        })
        .collect();
    output.done(
        &views,
        &format!("deleted: {all}; `ashlar backup gc` frees the space"),
    )
}

async fn collect(args: &RepositoryArgs, options: gc::Options, output: Output) -> Result<()> {
    let repository = args.open().await?;
    let found = gc::collect(&repository, options).await.map_err(failed)?;
    let verb = if options.dry_run { "would be" } else { "were" };
    let sentence = format!(
        "{} objects ({}) {verb} deleted; {} ({}) are needed, {} are not, but are too young to be deleted",
        found.deleted_objects,
        size::format(found.deleted_bytes),
        found.kept_objects,
        size::format(found.kept_bytes),
        found.young_objects
    );
    output.done(&found, &sentence)
}
