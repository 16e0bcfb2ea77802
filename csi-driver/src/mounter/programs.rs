//! Runs the programs of e2fsprogs, xfsprogs and util-linux.
//!
//! Invariants: no shell, no input, the C locale; a program that exceeds its time is killed; what it printed is in
//! the error, cut.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// Most characters of a program's output in an error.
const SHOWN_MAX: usize = 600;

/// A program failed.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It is not there.
    #[error("{program} cannot be started: {source}; it must be installed in the driver's image")]
    Start {
        /// Its name.
        program: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It took too long.
    #[error("{program} did not end within {limit:?} and was stopped")]
    TimedOut {
        /// Its name.
        program: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// It said no.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// Its name.
        program: &'static str,
        /// Exit code or signal.
        status: String,
        /// What it printed.
        output: String,
    },
}

/// What a program that ran to its end left.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; None: a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Finished {
    /// An error with what it printed.
    pub fn failure(&self, program: &'static str) -> ProgramError {
        let text = format!("{} {}", self.stderr.trim(), self.stdout.trim());
        ProgramError::Failed {
            program,
            status: match self.code {
                Some(code) => format!("exit code {code}"),
                None => "ended by a signal".to_owned(),
            },
            output: text
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .chars()
                .take(SHOWN_MAX)
                .collect(),
        }
    }
}

/// Runs a program to its end, whatever its exit code.
pub async fn run(
    program: &'static str,
    arguments: &[&str],
    limit: Duration,
) -> Result<Finished, ProgramError> {
    let started = std::time::Instant::now();
    let child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| ProgramError::Start { program, source })?;
    let output = match tokio::time::timeout(limit, child.wait_with_output()).await {
        Err(_) => return Err(ProgramError::TimedOut { program, limit }),
        Ok(Err(source)) => return Err(ProgramError::Start { program, source }),
        Ok(Ok(output)) => output,
    };
    let finished = Finished {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    tracing::debug!(program, ?arguments, code = ?finished.code, took = ?started.elapsed(), "program ended");
    Ok(finished)
}

/// Runs a program that must succeed.
pub async fn run_ok(
    program: &'static str,
    arguments: &[&str],
    limit: Duration,
) -> Result<Finished, ProgramError> {
    let finished = run(program, arguments, limit).await?;
    match finished.code {
        Some(0) => Ok(finished),
        _ => Err(finished.failure(program)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn what_a_program_says_is_in_the_error() {
        let error = run_ok("sh", &["-c", "echo out; echo err >&2; exit 3"], SECOND * 10);
        let text = error.await.unwrap_err().to_string();
        assert_eq!(text, "sh failed (exit code 3): err out");
        let error = run("no-such-program", &[], SECOND).await.unwrap_err();
        assert!(error.to_string().contains("must be installed"), "{error}");
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_stopped() {
        let error = run("sleep", &["100"], Duration::from_millis(20)).await;
        assert!(matches!(error, Err(ProgramError::TimedOut { .. })));
    }
}
