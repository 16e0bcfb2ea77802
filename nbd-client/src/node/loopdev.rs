//! Devices for kernels without nbd: the volume's NBD export as a file (nbdfuse), and a loop device on it.
//!
//! ```text
//! file system - /dev/loopX - FILE - nbdfuse - socket - nbd-client node
//! ```
//!
//! nbdfuse is a process of its own that outlives this one, but has no way to reconnect: when its connections end,
//! requests fail for good. A hand-over passes them on, so an upgrade keeps the device; a crash breaks it. (A relay
//! between them, `nbdkit --filter=retry nbd`, was tried: nbdkit 1.32, Debian 12's, ends on an assertion of its own
//! while it waits for the server, which breaks the device all the same.)
//!
//! Invariants:
//! - A loop device is touched only if its backing file is the volume's; a process is ended only if its arguments
//!   name the volume's file.
//! - Without connections that were passed on, a device that is left over is never taken back.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ashlar_proto::ids::VolumeId;
use rustix::process::{Pid, Signal};

use super::error::NodeError;

/// Time for nbdfuse to show its file.
const MOUNT_TIMEOUT: Duration = Duration::from_secs(10);
const MOUNT_POLL: Duration = Duration::from_millis(10);
/// Time for nbdfuse to end when its file is unmounted.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Name of the file that nbdfuse shows.
const FILE: &str = "volume";
/// Most characters of the programs' words in an error.
const WORDS_MAX: usize = 500;

/// Where the file of a volume appears.
#[derive(Clone, Debug)]
pub struct Place {
    directory: PathBuf,
    /// The volume's NBD export.
    pub socket: PathBuf,
    log: PathBuf,
}

impl Place {
    /// The place of a volume in a state directory.
    pub fn new(state_dir: &Path, volume: VolumeId) -> Self {
        // As /proc will show it in arguments, and the kernel as a backing file.
        let loops = std::path::absolute(state_dir).unwrap_or_else(|_| state_dir.to_owned());
        let loops = fs::canonicalize(&loops).unwrap_or(loops).join("loop");
        Self {
            directory: loops.join(volume.to_string()),
            socket: loops.join(format!("{volume}.sock")),
            log: loops.join(format!("{volume}.log")),
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

    /// The loop device on this volume's file, if there is one.
    pub fn find(&self) -> Option<u32> {
        let entries = fs::read_dir("/sys/block").ok()?;
        entries.flatten().find_map(|entry| {
            let name = entry.file_name();
            let index = name.to_str()?.strip_prefix("loop")?.parse().ok()?;
            self.has(index).then_some(index)
        })
    }

    /// Processes with this program and argument.
    fn processes(&self, program: &str, argument: &str) -> Vec<Pid> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            // It may be gone by now.
            let Ok(line) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let mut arguments = line.split(|byte| *byte == 0);
            let is = arguments.next().is_some_and(|first| {
                first.rsplit(|b| *b == b'/').next() == Some(program.as_bytes())
            });
            if is && arguments.any(|a| a == argument.as_bytes()) {
                found.extend(Pid::from_raw(pid));
            }
        }
        found
    }

    fn fuses(&self) -> Vec<Pid> {
        self.processes("nbdfuse", &self.file().display().to_string())
    }

    /// What the device's programs said last.
    fn words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let text: Vec<&str> = text.split_whitespace().collect();
        text.join(" ").chars().take(WORDS_MAX).collect()
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

/// Starts nbdfuse, away from this process's terminal, log and signals.
fn start(place: &Place, read_only: bool) -> io::Result<Child> {
    let mut nbdfuse = Command::new("nbdfuse");
    if read_only {
        nbdfuse.arg("--readonly");
    }
    let uri = format!("nbd+unix:///?socket={}", place.socket.display());
    nbdfuse
        .arg(place.file())
        .arg(uri)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&place.log)?)
        .process_group(0)
        .spawn()
}

/// Makes a loop device of a volume that is served on the place's socket; its number. Blocks.
///
/// # Errors
/// If a program is missing, or fails.
pub fn attach(place: &Place, read_only: bool, block_size: u32) -> Result<u32, NodeError> {
    let mut child = start(place, read_only).map_err(|error| {
        NodeError::Precondition(format!(
            "nbdfuse cannot be run ({error}): install it (Debian: libnbd-bin), or load the kernel's module nbd"
        ))
    })?;
    let until = Instant::now() + MOUNT_TIMEOUT;
    while !place.file().exists() {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(NodeError::Precondition(format!(
                "nbdfuse ended ({status}): is it installed (Debian: libnbd-bin), and the kernel's module fuse loaded? {}",
                place.words()
            )));
        }
        if Instant::now() > until {
            let _ = child.kill();
            let _ = child.wait();
            clear(place);
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
            clear(place);
            return Err(error);
        }
    };
    let device = String::from_utf8_lossy(&output.stdout);
    let index = device.trim().strip_prefix("/dev/loop");
    index
        .and_then(|i| i.parse().ok())
        .ok_or_else(|| NodeError::Bug(format!("losetup made {device:?}")))
}

/// Takes the loop device and the file down, as far as they are there. One that is mounted goes with its last user.
/// Blocks.
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
        if place.has(index) {
            // It is still in use: its file must stay.
            return Ok(());
        }
    }
    clear(place);
    Ok(())
}

/// Ends nbdfuse by taking its file away; only the empty directory is removed.
fn clear(place: &Place) {
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
    let until = Instant::now() + END_TIMEOUT;
    while !place.fuses().is_empty() {
        if Instant::now() > until {
            tracing::warn!(file = %place.file().display(), "nbdfuse does not end: ending it");
            for pid in place.fuses() {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            break;
        }
        std::thread::sleep(MOUNT_POLL);
    }
    let _ = fs::remove_dir(&place.directory);
    let _ = fs::remove_file(&place.log);
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
        assert_eq!(place.find(), None);
        detach(&place, Some(u32::MAX)).unwrap();
        assert!(!place.directory.exists() && place.directory.parent().unwrap().exists());
    }

    #[test]
    fn a_process_is_known_by_its_program_and_a_whole_argument() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path(), VolumeId::generate());
        let marker = place.file().display().to_string();
        // A shell under other names that waits for a line, with the marker as an argument that it does not look at.
        let start = |name: &str, argument: &str| {
            Command::new("sh")
                .arg0(name)
                .args(["-c", "read line; :", argument])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut right = start("/usr/bin/nbdfuse", &marker);
        let mut others = [
            start("nbdfuse", &format!("{marker}2")),
            start("sh", &marker),
            start("nbdfuse-not", &marker),
        ];
        assert_eq!(place.fuses(), [Pid::from_child(&right)]);
        for child in others.iter_mut().chain([&mut right]) {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(place.fuses(), []);
    }
}
