//! What can go wrong, and which gRPC code says so.
//!
//! Invariants: status details stay empty (CSI forbids to rely on them, and they leak); a message names the field
//! or the thing, and what to do. Callers retry `ABORTED` and `UNAVAILABLE` and take every other code as final
//! for this attempt, so whatever may still be in progress is one of those two.

use tonic::{Code, Status};

/// A refused or failed request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field is missing or malformed.
    #[error("{field}: {why}")]
    Invalid {
        /// The field, as CSI or the StorageClass names it.
        field: String,
        /// What is wrong, and what is accepted.
        why: String,
    },
    /// The thing does not exist.
    #[error("{0}")]
    NotFound(String),
    /// It exists, but is another one.
    #[error("{0}")]
    Exists(String),
    /// Another operation on the volume is in progress.
    #[error("another operation on {0} is in progress; try again when it has ended")]
    Busy(String),
    /// The state of the volume or the node does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// A size or offset that cannot be had.
    #[error("{0}")]
    OutOfRange(String),
    /// No room.
    #[error("{0}")]
    Exhausted(String),
    /// Ashlar does not do that.
    #[error("{0}")]
    Unsupported(&'static str),
    /// A token of a list that was not given out by this driver.
    #[error("starting_token: {0}")]
    BadToken(String),
    /// The metadata cluster or nbd-client refused, or does not answer.
    #[error("{doing}: {}", .source.message())]
    Remote {
        /// What was asked for.
        doing: String,
        /// The answer.
        #[source]
        source: Box<Status>,
    },
    /// A program that the driver runs failed.
    #[error(transparent)]
    Program(#[from] crate::mounter::ProgramError),
    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was tried.
        doing: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A mistake of this program.
    #[error("{0}")]
    Internal(&'static str),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A malformed field.
    pub fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            why: why.into(),
        }
    }

    /// A refusal of another service.
    pub fn remote(doing: impl Into<String>, status: Status) -> Self {
        Self::Remote {
            doing: doing.into(),
            source: Box::new(status),
        }
    }

    /// A failed system call.
    pub fn system(doing: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::System {
            doing: doing.into(),
            source: source.into(),
        }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::Exists(_) => Code::AlreadyExists,
            Self::Busy(_) | Self::BadToken(_) => Code::Aborted,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::OutOfRange(_) => Code::OutOfRange,
            Self::Exhausted(_) => Code::ResourceExhausted,
            Self::Unsupported(_) => Code::Unimplemented,
            Self::Remote { source, .. } => remote_code(source.code()),
            Self::Program(_) | Self::System { .. } | Self::Internal(_) => Code::Internal,
        }
    }
}

/// The code of a refusal of metadata or nbd-client as a CSI caller is to see it.
fn remote_code(code: Code) -> Code {
    match code {
        // They mean the same in both worlds.
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::OutOfRange
        | Code::Aborted => code,
        // Whether it was carried out is not known: the caller must ask again.
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            Code::Unavailable
        }
        _ => Code::Internal,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_answer_is_retried_and_a_refusal_is_not() {
        for code in [Code::Unavailable, Code::DeadlineExceeded, Code::Unknown] {
            let error = Error::remote("create", Status::new(code, "x"));
            assert_eq!(error.code(), Code::Unavailable);
        }
        let error = Error::remote("create", Status::already_exists("other size"));
        let status = Status::from(error);
        assert_eq!(status.code(), Code::AlreadyExists);
        assert_eq!(status.message(), "create: other size");
        assert!(status.details().is_empty());
    }
}
