//! The unix socket that sidecars and kubelet connect to.
//!
//! Invariants: a socket that a predecessor left is removed, but never one that somebody serves, and nothing that is
//! no socket; the mode is 0660.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;

use crate::authority::Sanitized;

/// Of the socket.
const MODE: u32 = 0o660;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// It is no endpoint.
    #[error("endpoint {0:?} is not of the form unix:///PATH")]
    NotUnix(String),
    /// Something else is there.
    #[error("{0} exists and is no socket; remove it, or give another --endpoint")]
    Occupied(PathBuf),
    /// Another process serves it.
    #[error("another process serves {0}; stop it, or give another --endpoint")]
    Served(PathBuf),
    /// A system call failed.
    #[error("{0}: {1}")]
    System(PathBuf, #[source] std::io::Error),
}

/// The path of an endpoint: `unix:///PATH`, `unix:/PATH` or `/PATH`.
pub fn endpoint_path(endpoint: &str) -> Result<PathBuf, ListenError> {
    let path = endpoint
        .strip_prefix("unix://")
        .or_else(|| endpoint.strip_prefix("unix:"))
        .unwrap_or(endpoint);
    let path = PathBuf::from(path);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(ListenError::NotUnix(endpoint.to_owned())),
    }
}

/// Listens on a unix socket.
pub async fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let system = |error| ListenError::System(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::Occupied(path.to_owned()));
        }
        Ok(_) => {
            if UnixStream::connect(path).await.is_ok() {
                return Err(ListenError::Served(path.to_owned()));
            }
            std::fs::remove_file(path).map_err(system)?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(system)?;
            }
        }
        Err(error) => return Err(system(error)),
    }
    let listener = UnixListener::bind(path).map_err(system)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(MODE)).map_err(system)?;
    Ok(listener)
}

/// The connections of a listener, whatever their clients take for an authority.
pub fn connections(
    listener: UnixListener,
) -> impl Stream<Item = std::io::Result<Sanitized<UnixStream>>> {
    use tokio_stream::StreamExt as _;
    UnixListenerStream::new(listener).map(|stream| stream.map(Sanitized::new))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_unix_sockets() {
        for good in [
            "unix:///csi/csi.sock",
            "unix:/csi/csi.sock",
            "/csi/csi.sock",
        ] {
            assert_eq!(endpoint_path(good).unwrap(), Path::new("/csi/csi.sock"));
        }
        for wrong in ["tcp://127.0.0.1:1", "csi.sock", "", "unix://csi.sock"] {
            assert!(endpoint_path(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_served_one_or_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("below/csi.sock");
        let listener = listen(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
        assert!(matches!(listen(&path).await, Err(ListenError::Served(_))));
        drop(listener);
        listen(&path).await.unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "data").unwrap();
        assert!(matches!(listen(&file).await, Err(ListenError::Occupied(_))));
        assert_eq!(std::fs::read(&file).unwrap(), b"data");
    }
}
