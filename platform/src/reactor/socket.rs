//! Sockets as the reactor needs them: blocking descriptors (io_uring waits for them; it refuses to wait on
//! O_NONBLOCK ones), close-on-exec, TCP tuned for small messages and for noticing dead peers.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getsockname, listen,
    sockopt,
};

/// Idle time before the first keepalive probe.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
/// Time between keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Unanswered keepalive probes that end a connection.
const KEEPALIVE_PROBES: u32 = 3;
/// What a unix socket takes before its peer reads, in bytes.
const UNIX_SEND_BUFFER: usize = 1024 * 1024;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

fn tcp_family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    }
}

/// A listening TCP socket and its actual address.
pub(super) fn listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let socket = rustix::net::socket_with(
        tcp_family(address),
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    let actual = getsockname(&socket)?.try_into()?;
    Ok((socket, actual))
}

/// A listening unix socket; a socket file that nobody listens on any more is replaced.
pub(super) fn listen_unix(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let new_socket = || {
        rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
    };
    let socket = new_socket()?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if fs::symlink_metadata(path)?.file_type().is_socket() => {
            match connect(new_socket()?, &address) {
                Err(Errno::CONNREFUSED) => fs::remove_file(path)?,
                _ => return Err(Errno::ADDRINUSE.into()),
            }
            bind(&socket, &address)?;
        }
        other => other?,
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A connection being made: whether it is there already.
pub(super) struct Attempt {
    pub socket: OwnedFd,
    pub connected: bool,
}

/// Starts to connect.
pub(super) fn connect_tcp(address: SocketAddr) -> io::Result<Attempt> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(tcp_family(address), SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) => Ok(Attempt {
            socket,
            connected: true,
        }),
        Err(Errno::INPROGRESS) => Ok(Attempt {
            socket,
            connected: false,
        }),
        Err(errno) => Err(errno.into()),
    }
}

/// Connects; a full backlog is `WouldBlock`.
pub(super) fn connect_unix(path: &Path) -> io::Result<Attempt> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    Ok(Attempt {
        socket,
        connected: true,
    })
}

/// The outcome of an attempt whose socket became writable.
pub(super) fn connect_outcome(socket: impl AsFd) -> io::Result<()> {
    sockopt::socket_error(socket)?.map_err(io::Error::from)
}

/// Makes a connected socket ready for use. Options that a kind of socket does not have are skipped.
pub(super) fn prepare(socket: impl AsFd, user_timeout: Duration) -> io::Result<()> {
    let socket = socket.as_fd();
    rustix::io::ioctl_fionbio(socket, false)?;
    let address = getsockname(socket)?;
    if address.address_family() == AddressFamily::UNIX {
        // Large messages need fewer turns; without the privilege the system's limit applies.
        let _ = sockopt::set_socket_send_buffer_size_force(socket, UNIX_SEND_BUFFER)
            .or_else(|_| sockopt::set_socket_send_buffer_size(socket, UNIX_SEND_BUFFER));
        return Ok(());
    }
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
    let milliseconds = u32::try_from(user_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(socket, milliseconds)?;
    Ok(())
}
