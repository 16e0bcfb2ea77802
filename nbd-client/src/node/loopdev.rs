//! Devices for kernels without nbd: the volume's NBD export as a file (nbdfuse), and a loop device on it.
//!
//! Invariants:
//! - A loop device is touched only if its backing file is the volume's.
//! - There is no way to reconnect: when this process ends, requests on the device fail. So nothing is taken
//!   back after a start; what is left over is taken down.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ashlar_proto::ids::VolumeId;

use super::error::NodeError;

/// Time for nbdfuse to show its file.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(10);
const MOUNT_POLL: Duration = Duration::from_millis(10);
/// Name of the file that nbdfuse shows.
const FILE: &str = "volume";

/// Where the file of a volume appears.
#[derive(Clone, Debug)]
pub struct Place {
    directory: PathBuf,
    /// The volume's NBD export.
    pub socket: PathBuf,
}

impl Place {
    /// The place of a volume in a state directory.
    pub fn new(state_dir: &Path, volume: VolumeId) -> Self {
        let loops = state_dir.join("loop");
        Self {
            directory: loops.join(volume.to_string()),
            socket: loops.join(format!("{volume}.sock")),
        }
    }

    fn file(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// Makes the directories, so that the export can be listened on.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.directory)
    }

    /// Whether the loop device is on this volume's file.
    pub fn has(&self, index: u32) -> bool {
        let path = format!("/sys/block/loop{index}/loop/backing_file");
        let Ok(backing) = fs::read_to_string(path) else {
            return false;
        };
        // The kernel adds a note to the path of a file that is gone.
        let backing = backing.trim_end();
        let backing = backing.strip_suffix(" (deleted)").unwrap_or(backing);
        Path::new(backing) == self.file()
    }
}

fn run(program: &str, what: &str, command: &mut Command) -> Result<Output, NodeError> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| {
        NodeError::Precondition(format!(
            "{program} cannot be run to {what} ({error}): install it, or load the kernel's module nbd"
        ))
    })?;
    if output.status.success() {
        return Ok(output);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(NodeError::Precondition(format!(
        "{program} cannot {what}: {}",
        text.trim()
    )))
}

/// Makes a loop device of a volume that is served on the place's socket; its number. Blocks.
///
/// # Errors
/// If a program is missing, or fails.
pub fn attach(place: &Place, read_only: bool, block_size: u32) -> Result<u32, NodeError> {
    let mut nbdfuse = Command::new("nbdfuse");
    if read_only {
        nbdfuse.arg("--readonly");
    }
    let uri = format!("nbd+unix:///?socket={}", place.socket.display());
    let mut child = nbdfuse
        .arg(place.file())
        .arg(uri)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| {
            NodeError::Precondition(format!(
                "nbdfuse cannot be run ({error}): install it (Debian: libnbd-bin), or load the kernel's module nbd"
            ))
        })?;
    let until = Instant::now() + MOUNT_TIMEOUT;
    while !place.file().exists() {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(NodeError::Precondition(format!(
                "nbdfuse ended ({status}): is the kernel's module fuse loaded? Its own words are in this process's log"
            )));
        }
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(NodeError::Unavailable("nbdfuse does not start".into()));
        }
        std::thread::sleep(MOUNT_POLL);
    }
    // Ends when its file is unmounted; then there must be somebody who waits for it.
    let reaper = std::thread::Builder::new().name("nbdfuse".into());
    let waits = reaper.spawn(move || match child.wait() {
        Ok(status) if status.success() => {}
        outcome => tracing::warn!(?outcome, "nbdfuse ended"),
    });
    if let Err(error) = waits {
        tracing::warn!(%error, "nobody waits for the end of nbdfuse");
    }
    let mut losetup = Command::new("losetup");
    losetup.args(["--find", "--show", "--sector-size", &block_size.to_string()]);
    if read_only {
        losetup.arg("--read-only");
    }
    let outcome = run("losetup", "make a loop device", losetup.arg(place.file()));
    let output = match outcome {
        Ok(output) => output,
        Err(error) => {
            unmount(place);
            return Err(error);
        }
    };
    let device = String::from_utf8_lossy(&output.stdout);
    let index = device.trim().strip_prefix("/dev/loop");
    index
        .and_then(|i| i.parse().ok())
        .ok_or_else(|| NodeError::Bug(format!("losetup made {device:?}")))
}

/// Takes the loop device and the file down, as far as they are there. Blocks.
///
/// # Errors
/// If the loop device cannot be taken down.
pub fn detach(place: &Place, index: Option<u32>) -> Result<(), NodeError> {
    if let Some(index) = index.filter(|i| place.has(*i)) {
        let device = format!("/dev/loop{index}");
        let mut losetup = Command::new("losetup");
        run(
            "losetup",
            "take the loop device down",
            losetup.args(["--detach", &device]),
        )?;
    }
    unmount(place);
    Ok(())
}

/// Ends nbdfuse by taking its file away; only the empty directory is removed.
fn unmount(place: &Place) {
    for target in [place.file(), place.directory.clone()] {
        let quiet = Command::new("umount")
            .arg(&target)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if quiet.is_ok_and(|status| status.success()) {
            break;
        }
    }
    let _ = fs::remove_dir(&place.directory);
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_loop_device_of_something_else_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), VolumeId::generate());
        place.make().unwrap();
        assert!(!place.has(u32::MAX));
        detach(&place, Some(u32::MAX)).unwrap();
        assert!(!place.directory.exists() && place.directory.parent().unwrap().exists());
    }
}
