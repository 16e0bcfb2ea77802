//! The kernel's generic netlink family `nbd` (linux/nbd-netlink.h): CONNECT, RECONFIGURE, DISCONNECT, STATUS,
//! and the multicast LINK_DEAD.
//!
//! Invariants:
//! - Encoding and decoding do no I/O; [`Nbd`] sends what they make. Its calls block: CONNECT until the
//!   device is set up, DISCONNECT until its requests are ended.
//! - Every CONNECT carries both timeouts: one that is not sent is inherited from the device's last use.
//! - Size and sockets never travel in one RECONFIGURE: the kernel would wait for requests that hang on the
//!   very sockets that it is given replacements for.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use neli::consts::nl::NlmF;
use neli::consts::socket::NlFamily;
use neli::err::{DeError, SocketError};
use neli::genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder};
use neli::nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder};
use neli::socket::synchronous::NlSocketHandle;
use neli::types::{Buffer, GenlBuffer};
use neli::utils::Groups;

const FAMILY: &str = "nbd";
const FAMILY_VERSION: u8 = 1;
const MULTICAST_GROUP: &str = "nbd_mc_group";

/// The controller, which knows the families.
mod control {
    pub const ID: u16 = 16;
    pub const GET_FAMILY: u8 = 3;
    pub const VERSION: u8 = 2;
    pub const ATTR_FAMILY_ID: u16 = 1;
    pub const ATTR_FAMILY_NAME: u16 = 2;
    pub const ATTR_MULTICAST_GROUPS: u16 = 7;
    pub const GROUP_NAME: u16 = 1;
    pub const GROUP_ID: u16 = 2;
}

mod command {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
    pub const LINK_DEAD: u8 = 4;
    pub const STATUS: u8 = 5;
}

mod attribute {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const DEVICE_LIST: u16 = 9;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// Within SOCKETS, and within its items.
    pub const SOCK_ITEM: u16 = 1;
    pub const SOCK_FD: u16 = 1;
    /// Within DEVICE_LIST, and within its items.
    pub const DEVICE_ITEM: u16 = 1;
    pub const DEVICE_INDEX: u16 = 1;
    pub const DEVICE_CONNECTED: u16 = 2;
}

type Message = Genlmsghdr<u8, u16>;
type Attributes = GenlBuffer<u16, Buffer>;

/// Why a request to the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no family `nbd`.
    #[error(
        "this kernel offers no NBD: load the module (`modprobe nbd max_part=0`) and run nbd-client in the host's \
         network namespace; where there is no module, attach with `--device loop`"
    )]
    NoNbd,
    /// The kernel refused.
    #[error("the kernel refuses {what}")]
    Refused {
        /// The request.
        what: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// The netlink socket failed.
    #[error("netlink: {0}")]
    Socket(String),
    /// The kernel's answer makes no sense.
    #[error("the kernel's answer to {0} makes no sense")]
    Malformed(&'static str),
}

impl NetlinkError {
    /// The kernel's error number, if it gave one.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        match self {
            Self::Refused { source, .. } => rustix::io::Errno::from_io_error(source),
            Self::NoNbd | Self::Socket(_) | Self::Malformed(_) => None,
        }
    }
}

impl From<SocketError> for NetlinkError {
    fn from(error: SocketError) -> Self {
        Self::Socket(error.to_string())
    }
}

impl From<DeError> for NetlinkError {
    fn from(error: DeError) -> Self {
        Self::Socket(error.to_string())
    }
}

/// A device to set up. The kernel chooses its number.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// Size in bytes, a multiple of the block size.
    pub size_bytes: u64,
    /// Logical block size, 512 to 4096.
    pub block_size: u64,
    /// Seconds after which a request is sent again on another connection.
    pub timeout_seconds: u64,
    /// Seconds for which requests wait when no connection is left.
    pub dead_connection_seconds: u64,
    /// Transmission flags.
    pub server_flags: u64,
    /// What a RECONFIGURE must name.
    pub backend: &'a str,
    /// Connected sockets.
    pub sockets: Vec<BorrowedFd<'a>>,
}

/// A device in an answer to STATUS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceStatus {
    /// X of /dev/nbdX.
    pub index: u32,
    /// Whether it is set up. It stays so when its server dies.
    pub connected: bool,
}

fn attr(kind: u16, payload: &[u8]) -> Result<Nlattr<u16, Buffer>, NetlinkError> {
    let kind = AttrTypeBuilder::default()
        .nla_type(kind)
        .build()
        .map_err(|e| NetlinkError::Socket(e.to_string()))?;
    NlattrBuilder::default()
        .nla_type(kind)
        .nla_payload(Buffer::from(payload))
        .build()
        .map_err(|e| NetlinkError::Socket(e.to_string()))
}

fn u32_attr(kind: u16, value: u32) -> Result<Nlattr<u16, Buffer>, NetlinkError> {
    attr(kind, &value.to_ne_bytes())
}

fn u64_attr(kind: u16, value: u64) -> Result<Nlattr<u16, Buffer>, NetlinkError> {
    attr(kind, &value.to_ne_bytes())
}

fn sockets_attr(sockets: &[BorrowedFd<'_>]) -> Result<Nlattr<u16, Buffer>, NetlinkError> {
    let mut list = attr(attribute::SOCKETS, &[])?;
    for socket in sockets {
        let fd = u32_attr(attribute::SOCK_FD, socket.as_raw_fd().unsigned_abs())?;
        let item = attr(attribute::SOCK_ITEM, &[])?
            .nest(&fd)
            .map_err(|e| NetlinkError::Socket(e.to_string()))?;
        list = list
            .nest(&item)
            .map_err(|e| NetlinkError::Socket(e.to_string()))?;
    }
    Ok(list)
}

fn message(
    command: u8,
    version: u8,
    attributes: impl IntoIterator<Item = Nlattr<u16, Buffer>>,
) -> Result<Message, NetlinkError> {
    GenlmsghdrBuilder::default()
        .cmd(command)
        .version(version)
        .attrs(attributes.into_iter().collect::<Attributes>())
        .build()
        .map_err(|e| NetlinkError::Socket(e.to_string()))
}

fn connect_message(connect: &Connect<'_>) -> Result<Message, NetlinkError> {
    let attributes = [
        u64_attr(attribute::SIZE_BYTES, connect.size_bytes)?,
        u64_attr(attribute::BLOCK_SIZE_BYTES, connect.block_size)?,
        u64_attr(attribute::TIMEOUT, connect.timeout_seconds)?,
        u64_attr(
            attribute::DEAD_CONN_TIMEOUT,
            connect.dead_connection_seconds,
        )?,
        u64_attr(attribute::SERVER_FLAGS, connect.server_flags)?,
        attr(attribute::BACKEND_IDENTIFIER, connect.backend.as_bytes())?,
        sockets_attr(&connect.sockets)?,
    ];
    message(command::CONNECT, FAMILY_VERSION, attributes)
}

fn replace_message(
    index: u32,
    backend: &str,
    socket: BorrowedFd<'_>,
) -> Result<Message, NetlinkError> {
    let attributes = [
        u32_attr(attribute::INDEX, index)?,
        attr(attribute::BACKEND_IDENTIFIER, backend.as_bytes())?,
        sockets_attr(&[socket])?,
    ];
    message(command::RECONFIGURE, FAMILY_VERSION, attributes)
}

fn resize_message(index: u32, backend: &str, size_bytes: u64) -> Result<Message, NetlinkError> {
    let attributes = [
        u32_attr(attribute::INDEX, index)?,
        attr(attribute::BACKEND_IDENTIFIER, backend.as_bytes())?,
        u64_attr(attribute::SIZE_BYTES, size_bytes)?,
    ];
    message(command::RECONFIGURE, FAMILY_VERSION, attributes)
}

fn index_message(command: u8, index: Option<u32>) -> Result<Message, NetlinkError> {
    let index = index.map(|i| u32_attr(attribute::INDEX, i)).transpose()?;
    message(command, FAMILY_VERSION, index)
}

/// The device of an answer to CONNECT, or of a LINK_DEAD.
fn index_of(message: &Message) -> Option<u32> {
    let attributes = message.attrs().get_attr_handle();
    attributes.get_attr_payload_as(attribute::INDEX).ok()
}

fn statuses(message: &Message) -> Result<Vec<DeviceStatus>, NetlinkError> {
    let attributes = message.attrs().get_attr_handle();
    let Ok(list) = attributes.get_nested_attributes::<u16>(attribute::DEVICE_LIST) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for item in list.iter() {
        if *item.nla_type().nla_type() != attribute::DEVICE_ITEM {
            continue;
        }
        let item = item.get_attr_handle::<u16>()?;
        let index = item.get_attr_payload_as(attribute::DEVICE_INDEX)?;
        let connected: u8 = item.get_attr_payload_as(attribute::DEVICE_CONNECTED)?;
        found.push(DeviceStatus {
            index,
            connected: connected != 0,
        });
    }
    Ok(found)
}

/// Family id and id of the multicast group, from the controller's answer.
fn family_of(message: &Message) -> Option<(u16, Option<u32>)> {
    let attributes = message.attrs().get_attr_handle();
    let id = attributes
        .get_attr_payload_as(control::ATTR_FAMILY_ID)
        .ok()?;
    let groups = attributes.get_nested_attributes::<u16>(control::ATTR_MULTICAST_GROUPS);
    let group = groups.ok().and_then(|groups| {
        groups.iter().find_map(|group| {
            let group = group.get_attr_handle::<u16>().ok()?;
            let name: String = group
                .get_attr_payload_as_with_len(control::GROUP_NAME)
                .ok()?;
            (name == MULTICAST_GROUP)
                .then(|| group.get_attr_payload_as(control::GROUP_ID).ok())
                .flatten()
        })
    });
    Some((id, group))
}

/// The kernel's NBD driver.
pub struct Nbd {
    socket: NlSocketHandle,
    family: u16,
    group: Option<u32>,
    sequence: u32,
}

impl Nbd {
    /// Finds the driver.
    ///
    /// # Errors
    /// [`NetlinkError::NoNbd`] if the kernel has none, or shows it only to another network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty())?;
        let mut nbd = Self {
            socket,
            family: control::ID,
            group: None,
            sequence: 0,
        };
        let mut name = FAMILY.as_bytes().to_vec();
        name.push(0);
        let question = message(
            control::GET_FAMILY,
            control::VERSION,
            [attr(control::ATTR_FAMILY_NAME, &name)?],
        )?;
        let answer = match nbd.request("GETFAMILY", question) {
            Err(error) if error.errno() == Some(rustix::io::Errno::NOENT) => {
                return Err(NetlinkError::NoNbd);
            }
            other => other?,
        };
        let (family, group) = answer
            .as_ref()
            .and_then(family_of)
            .ok_or(NetlinkError::Malformed("GETFAMILY"))?;
        Ok(Self {
            family,
            group,
            ..nbd
        })
    }

    /// Sends a request and waits for its acknowledgement; the answer that came before it, if any.
    fn request(
        &mut self,
        what: &'static str,
        message: Message,
    ) -> Result<Option<Message>, NetlinkError> {
        self.sequence += 1;
        let request: Nlmsghdr<u16, Message> = NlmsghdrBuilder::default()
            .nl_type(self.family)
            .nl_flags(NlmF::REQUEST | NlmF::ACK)
            .nl_seq(self.sequence)
            .nl_payload(NlPayload::Payload(message))
            .build()
            .map_err(|e| NetlinkError::Socket(e.to_string()))?;
        self.socket.send(&request)?;
        let mut answer = None;
        loop {
            let (messages, _) = self.socket.recv::<u16, Message>()?;
            for message in messages {
                let message = message?;
                if *message.nl_seq() != self.sequence {
                    continue;
                }
                match message.nl_payload() {
                    NlPayload::Payload(payload) => answer = Some(payload.clone()),
                    NlPayload::Err(error) => {
                        let source = io::Error::from_raw_os_error(-*error.error());
                        return Err(NetlinkError::Refused { what, source });
                    }
                    NlPayload::Ack(_) => return Ok(answer),
                    NlPayload::DumpExtAck(_) | NlPayload::Empty => {}
                }
            }
        }
    }

    /// Sets up a device on free number; its number.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connect(&mut self, connect: &Connect<'_>) -> Result<u32, NetlinkError> {
        let answer = self.request("CONNECT", connect_message(connect)?)?;
        answer
            .as_ref()
            .and_then(index_of)
            .ok_or(NetlinkError::Malformed("CONNECT"))
    }

    /// Offers a socket in place of a dead one. The kernel drops it silently if none is dead.
    ///
    /// # Errors
    /// What the kernel says: also if the device has another backend.
    pub fn replace_socket(
        &mut self,
        index: u32,
        backend: &str,
        socket: BorrowedFd<'_>,
    ) -> Result<(), NetlinkError> {
        let message = replace_message(index, backend, socket)?;
        self.request("RECONFIGURE", message).map(drop)
    }

    /// Changes a device's size. Its connections must be alive.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resize(
        &mut self,
        index: u32,
        backend: &str,
        size_bytes: u64,
    ) -> Result<(), NetlinkError> {
        let message = resize_message(index, backend, size_bytes)?;
        self.request("RECONFIGURE (size)", message).map(drop)
    }

    /// Takes a device down; requests that hang get an I/O error.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn disconnect(&mut self, index: u32) -> Result<(), NetlinkError> {
        let message = index_message(command::DISCONNECT, Some(index))?;
        self.request("DISCONNECT", message).map(drop)
    }

    /// One device, or all.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn status(&mut self, index: Option<u32>) -> Result<Vec<DeviceStatus>, NetlinkError> {
        let answer = self.request("STATUS", index_message(command::STATUS, index)?)?;
        answer.as_ref().map_or(Ok(Vec::new()), statuses)
    }

    /// Makes this a listener for dead connections: only [`Self::next_dead`] is called afterwards.
    ///
    /// # Errors
    /// If the kernel has no such group.
    pub fn listen(&self) -> Result<(), NetlinkError> {
        let group = self.group.ok_or(NetlinkError::Malformed("GETFAMILY"))?;
        Ok(self
            .socket
            .add_mcast_membership(Groups::new_groups(&[group]))?)
    }

    /// Waits for the next LINK_DEAD; its device.
    ///
    /// # Errors
    /// If the socket fails, also when messages were lost.
    pub fn next_dead(&self) -> Result<u32, NetlinkError> {
        loop {
            let (messages, _) = self.socket.recv::<u16, Message>()?;
            for message in messages {
                if let NlPayload::Payload(payload) = message?.nl_payload()
                    && *payload.cmd() == command::LINK_DEAD
                    && let Some(index) = index_of(payload)
                {
                    return Ok(index);
                }
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
#[path = "netlink_tests.rs"]
mod tests;
