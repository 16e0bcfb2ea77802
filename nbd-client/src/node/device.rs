//! Kernel NBD devices: what sysfs says of them, sockets for them, and the steps of connecting, replacing
//! sockets and disconnecting.
//!
//! Invariants:
//! - A device is touched only if its backend identifier, as the kernel shows it, is the volume's.
//! - Whether the kernel took a socket is seen from the socket: one that it dropped has no peer.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, sockopt};

use super::netlink::{Connect, Nbd, NetlinkError};

/// A request without an answer for so long is sent again on another connection. Short, because requests
/// that were under way when this process died wait for it; longer than the failover of a replica.
pub const TIMEOUT_SECONDS: u64 = 5;
/// Requests wait for so long when no connection is left: this process may be away, and an error would
/// end the file system on the device.
pub const DEAD_CONNECTION_SECONDS: u64 = 365 * 24 * 3600;
/// What a socket takes before its peer reads.
const SOCKET_BUFFER: usize = 1024 * 1024;
/// Largest request, in KiB: the unit in which the engine takes writes.
const MAX_SECTORS_KB: u32 = 1024;
/// Time for a device node to appear.
const NODE_TIMEOUT: Duration = Duration::from_secs(5);
const NODE_POLL: Duration = Duration::from_millis(10);

/// Why a device cannot be had, or is not ours.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel's NBD.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A system call.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The device has another backend, or none.
    #[error("{} is not the device of this volume any more", path(*index).display())]
    NotOurs {
        /// X of /dev/nbdX.
        index: u32,
    },
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> DeviceError {
    let what = what.into();
    move |source| DeviceError::System { what, source }
}

/// The device node.
pub fn path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

fn sysfs(index: u32) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}"))
}

/// The backend identifier of a device that is set up. It stays when its server dies.
pub fn backend(index: u32) -> Option<String> {
    let text = fs::read_to_string(sysfs(index).join("backend")).ok()?;
    Some(text.trim().to_owned())
}

/// The device with this backend, if there is one.
pub fn find(wanted: &str) -> Option<u32> {
    let entries = fs::read_dir("/sys/block").ok()?;
    entries.flatten().find_map(|entry| {
        let name = entry.file_name();
        let index = name.to_str()?.strip_prefix("nbd")?.parse().ok()?;
        (backend(index)? == wanted).then_some(index)
    })
}

/// The devices that the kernel has set up, whoever did it. A device stays in the list when its server dies, so this
/// says nothing about whether requests are answered; and CONNECT needs none of it, as the kernel chooses a free number.
/// Blocks.
///
/// # Errors
/// If the kernel has no NBD, or refuses.
pub fn connected() -> Result<Vec<u32>, DeviceError> {
    let all = Nbd::open()?.status(None)?;
    let connected = all.into_iter().filter(|device| device.connected);
    Ok(connected.map(|device| device.index).collect())
}

/// Whether the device is set up for this backend.
pub fn is_ours(index: u32, wanted: &str) -> bool {
    backend(index).is_some_and(|found| found == wanted)
}

fn require_ours(index: u32, wanted: &str) -> Result<(), DeviceError> {
    if is_ours(index, wanted) {
        Ok(())
    } else {
        Err(DeviceError::NotOurs { index })
    }
}

/// Size of the device in bytes.
pub fn size_bytes(index: u32) -> Option<u64> {
    block_size_bytes(&sysfs(index))
}

/// Size of /dev/loopX in bytes.
pub fn loop_size_bytes(index: u32) -> Option<u64> {
    block_size_bytes(Path::new(&format!("/sys/block/loop{index}")))
}

fn block_size_bytes(sysfs: &Path) -> Option<u64> {
    let sectors: u64 = fs::read_to_string(sysfs.join("size"))
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(sectors * 512)
}

/// Whether the device is mounted, or claimed by another device.
///
/// # Errors
/// If it cannot be opened for another reason.
pub fn in_use(path: &Path) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, rustix::fs::Mode::empty()) {
        Ok(_) => Ok(false),
        Err(Errno::BUSY) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Two connected sockets: one for a worker, one for the kernel.
///
/// # Errors
/// If there are no descriptors to be had.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), DeviceError> {
    let make = || -> io::Result<(OwnedFd, OwnedFd)> {
        let (ours, kernels) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // Without the privilege the system's limit applies, which only costs turns.
        for socket in [&ours, &kernels] {
            let _ = sockopt::set_socket_send_buffer_size_force(socket, SOCKET_BUFFER)
                .or_else(|_| sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER));
        }
        Ok((ours, kernels))
    };
    make().map_err(system("cannot make a pair of sockets"))
}

/// Whether the other end of a socket is still held by somebody.
fn has_peer(socket: BorrowedFd<'_>) -> bool {
    let mut byte = [0_u8];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(socket, &mut byte[..], flags) {
        Ok((0, _)) => false,
        Ok(_) | Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}

/// A device to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The backend identifier.
    pub backend: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Logical block size.
    pub block_size: u32,
    /// Transmission flags.
    pub flags: u16,
}

/// Sets a device up on the kernel's ends of socket pairs, whose other ends are served already; its number.
/// Blocks.
///
/// # Errors
/// If the kernel has no NBD, or refuses.
pub fn connect(spec: &Spec, sockets: &[OwnedFd]) -> Result<u32, DeviceError> {
    let index = Nbd::open()?.connect(&Connect {
        size_bytes: spec.size_bytes,
        block_size: u64::from(spec.block_size),
        timeout_seconds: TIMEOUT_SECONDS,
        dead_connection_seconds: DEAD_CONNECTION_SECONDS,
        server_flags: u64::from(spec.flags),
        backend: &spec.backend,
        sockets: sockets.iter().map(|s| s.as_fd()).collect(),
    })?;
    let queue = sysfs(index).join("queue/max_sectors_kb");
    if let Err(error) = fs::write(&queue, MAX_SECTORS_KB.to_string()) {
        tracing::debug!(path = %queue.display(), %error, "requests stay small");
    }
    let until = Instant::now() + NODE_TIMEOUT;
    while !path(index).exists() {
        if Instant::now() > until {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            let what = format!("{} does not appear", path(index).display());
            let _ = disconnect(index, &spec.backend);
            return Err(system(what)(missing));
        }
        std::thread::sleep(NODE_POLL);
    }
    Ok(index)
}

/// Offers the kernel a socket in place of a dead one; our end of it, or `None` if no socket of the device
/// is dead (yet). Blocks.
///
/// # Errors
/// If the device is not ours, or the kernel refuses.
pub fn replace_socket(index: u32, backend: &str) -> Result<Option<OwnedFd>, DeviceError> {
    require_ours(index, backend)?;
    let (ours, kernels) = socket_pair()?;
    Nbd::open()?.replace_socket(index, backend, kernels.as_fd())?;
    drop(kernels);
    Ok(has_peer(ours.as_fd()).then_some(ours))
}

/// Makes the device as large as told. Its connections must be alive. Blocks.
///
/// # Errors
/// If the device is not ours, or the kernel refuses.
pub fn resize(index: u32, backend: &str, size_bytes: u64) -> Result<(), DeviceError> {
    require_ours(index, backend)?;
    Ok(Nbd::open()?.resize(index, backend, size_bytes)?)
}

/// Takes the device down; what hangs on it gets an I/O error. Blocks.
///
/// # Errors
/// If the device is not ours, or the kernel refuses.
pub fn disconnect(index: u32, backend: &str) -> Result<(), DeviceError> {
    require_ours(index, backend)?;
    Ok(Nbd::open()?.disconnect(index)?)
}

/// Makes sure that the kernel offers NBD, loading its module if need be. Blocks.
///
/// # Errors
/// [`NetlinkError::NoNbd`] if it does not.
pub fn require_nbd() -> Result<(), DeviceError> {
    match Nbd::open() {
        Err(NetlinkError::NoNbd) => {}
        other => return Ok(other.map(drop)?),
    }
    // Partitions are not looked for: such a look would hang on a device whose server is away.
    let outcome = std::process::Command::new("modprobe")
        .args(["nbd", "max_part=0", "nbds_max=0"])
        .output();
    match outcome {
        Ok(output) if output.status.success() => tracing::info!("loaded the kernel's module nbd"),
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            tracing::warn!(why = why.trim(), "cannot load the kernel's module nbd");
        }
        Err(error) => tracing::warn!(%error, "cannot run modprobe to load the kernel's module nbd"),
    }
    Ok(Nbd::open().map(drop)?)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_socket_is_told_from_a_kept_one() {
        let (ours, theirs) = socket_pair().unwrap();
        assert!(has_peer(ours.as_fd()));
        rustix::io::write(&theirs, b"x").unwrap();
        assert!(has_peer(ours.as_fd()), "with something to read");
        let kept = theirs.try_clone().unwrap();
        drop(theirs);
        assert!(has_peer(ours.as_fd()), "somebody has it");
        rustix::io::read(&ours, &mut [0_u8; 1]).unwrap();
        drop(kept);
        assert!(!has_peer(ours.as_fd()));
    }

    #[test]
    fn a_device_with_another_backend_is_not_touched() {
        for outcome in [
            disconnect(u32::MAX, "ours"),
            resize(u32::MAX, "ours", 4096),
            replace_socket(u32::MAX, "ours").map(drop),
        ] {
            assert!(matches!(outcome, Err(DeviceError::NotOurs { .. })));
        }
    }
}
