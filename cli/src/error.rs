//! What a command ends with when it does not end well: a kind (the exit code), what happened, and what
//! to do about it.

use std::fmt;

/// The kinds of failure that programs tell apart by the exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Anything else.
    Error,
    /// The command line makes no sense.
    Usage,
    /// What the command names does not exist.
    NotFound,
    /// The state does not allow it (in use, exists already, full, wrong epoch).
    Conflict,
    /// Nobody answered in time; the same command may work later.
    Unavailable,
}

impl Kind {
    /// The process' exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Error => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unavailable => 5,
        }
    }
}

/// A failed command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CliError {
    /// What kind of failure.
    pub kind: Kind,
    /// What happened.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Result of a command.
pub type Result<T> = std::result::Result<T, CliError>;

impl CliError {
    /// A failure of a kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
        }
    }

    /// Any other error.
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(Kind::Error, message)
    }

    /// A wrong command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// Something named does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// The state does not allow it.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(Kind::Conflict, message)
    }

    /// Nobody answered, or not in time.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    /// Adds what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// From an answer of a service, with what was being done.
    pub fn from_status(doing: &str, status: &tonic::Status) -> Self {
        use tonic::Code;
        let message = if status.message().is_empty() {
            format!("{doing}: {:?}", status.code())
        } else {
            format!("{doing}: {}", status.message())
        };
        match status.code() {
            Code::NotFound => Self::not_found(message),
            Code::AlreadyExists => Self::conflict(message)
                .hint("the name is taken by something with other settings: choose another name"),
            Code::FailedPrecondition | Code::Aborted => Self::conflict(message),
            Code::ResourceExhausted => Self::conflict(message).hint(
                "add disks (`ashlar disk add`), ask for fewer replicas or less space, or widen the pool's \
                 selector (`ashlar pool update`)",
            ),
            Code::InvalidArgument | Code::OutOfRange => Self::usage(message),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                Self::unavailable(message)
            }
            _ => Self::error(message),
        }
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for CliError {}

/// Adds what was being done to an operating-system error.
pub trait Context<T> {
    /// `doing` reads as "cannot {doing}".
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| CliError::error(format!("cannot {}: {e}", doing())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_code_has_its_exit_code() {
        let code = |c| {
            CliError::from_status("x", &tonic::Status::new(c, "m"))
                .kind
                .exit_code()
        };
        assert_eq!(code(tonic::Code::NotFound), 3);
        assert_eq!(code(tonic::Code::AlreadyExists), 4);
        assert_eq!(code(tonic::Code::FailedPrecondition), 4);
        assert_eq!(code(tonic::Code::ResourceExhausted), 4);
        assert_eq!(code(tonic::Code::InvalidArgument), 2);
        assert_eq!(code(tonic::Code::Unavailable), 5);
        assert_eq!(code(tonic::Code::DeadlineExceeded), 5);
        assert_eq!(code(tonic::Code::Internal), 1);
    }
}
