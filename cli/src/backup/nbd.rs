//! A small NBD client on a unix socket: reads, writes, flush and allocation, many requests in flight.
//! (NBD protocol: fixed newstyle, NBD_OPT_GO, structured replies, `base:allocation`.)
//!
//! Invariants:
//! - Each request gets its own reply: replies are told apart by their cookies, in whatever order they come.
//! - When the connection ends, every request in flight and every later one fails; nobody waits for ever.
//! - Nothing that the server says takes more memory than the request that it answers.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::{reader, writer};

const INIT_MAGIC: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: u32 = 3;
const FLAG_FIXED_NEWSTYLE: u16 = 1;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const INFO_EXPORT: u16 = 0;
/// Longest reply to an option.
const OPTION_REPLY_BYTES_MAX: u32 = 64 * 1024;
/// Most replies to one option.
const OPTION_REPLIES_MAX: usize = 64;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const COMMAND_BLOCK_STATUS: u16 = 7;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_ERROR_BIT: u16 = 1 << 15;
/// Longest chunk that is no data.
const SMALL_CHUNK_BYTES_MAX: u32 = 1024 * 1024;
/// Of `base:allocation`: reads as zeros.
const STATE_ZERO: u32 = 2;
/// Longest range of one question for allocation.
const STATUS_BYTES_MAX: u64 = 1 << 30;

/// A request in flight.
struct Pending {
    /// Data that a read waits for.
    data: BytesMut,
    offset: u64,
    /// How much of the data came.
    filled: usize,
    /// Extents that a question for allocation waits for: length and state.
    extents: Vec<(u32, u32)>,
    error: Option<u32>,
    done: oneshot::Sender<io::Result<Answer>>,
}

struct Answer {
    data: Bytes,
    extents: Vec<(u32, u32)>,
}

#[derive(Default)]
struct Table {
    pending: HashMap<u64, Pending>,
    /// Why the connection ended.
    ended: Option<(ErrorKind, String)>,
}

type Shared = Arc<Mutex<Table>>;

/// A connection to an export.
pub struct NbdClient {
    shared: Shared,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    cookies: AtomicU64,
    size_bytes: u64,
    has_allocation: bool,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn protocol(what: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.into())
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, Table> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NbdClient {
    /// Connects to an export.
    ///
    /// # Errors
    /// No server, or not one that has the export.
    pub async fn connect(socket: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await?;
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        if &greeting[..16] != INIT_MAGIC || flags & FLAG_FIXED_NEWSTYLE == 0 {
            return Err(protocol("no NBD server"));
        }
        stream.write_all(&CLIENT_FLAGS.to_be_bytes()).await?;
        let structured = option(&mut stream, OPTION_STRUCTURED_REPLY, &[])
            .await?
            .is_some();
        let mut has_allocation = false;
        if structured {
            let query = "base:allocation";
            let mut data = named(export);
            data.extend_from_slice(&1u32.to_be_bytes());
            data.extend_from_slice(&named(query));
            let replies = option(&mut stream, OPTION_SET_META_CONTEXT, &data).await?;
            has_allocation = replies
                .iter()
                .flatten()
                .any(|(kind, _)| *kind == REPLY_META_CONTEXT);
        }
        let mut data = named(export);
        data.extend_from_slice(&0u16.to_be_bytes());
        let infos = option(&mut stream, OPTION_GO, &data).await?;
        let infos = infos.ok_or_else(|| protocol(format!("no export is named {export:?}")))?;
        let size_bytes = infos.iter().find_map(|(kind, body)| {
            let size = body.get(2..10)?.try_into().ok()?;
            let is_export = body.get(..2)? == INFO_EXPORT.to_be_bytes();
            (*kind == REPLY_INFO && is_export).then(|| u64::from_be_bytes(size))
        });
        let size_bytes = size_bytes.ok_or_else(|| protocol("the server does not say the size"))?;
        let (reader, writer) = stream.into_split();
        let shared = Shared::default();
        Ok(Self {
            task: tokio::spawn(receive(reader, Arc::clone(&shared))),
            shared,
            writer: tokio::sync::Mutex::new(writer),
            cookies: AtomicU64::new(1),
            size_bytes,
            has_allocation,
        })
    }

    /// Size of the export.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn request(
        &self,
        command: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> io::Result<Answer> {
        let cookie = self.cookies.fetch_add(1, Ordering::Relaxed);
        let (done, answer) = oneshot::channel();
        let mut data = BytesMut::new();
        if command == COMMAND_READ {
            data.resize(length as usize, 0);
        }
        let pending = Pending {
            data,
            offset,
            filled: 0,
            extents: Vec::new(),
            error: None,
            done,
        };
        {
            let mut table = lock(&self.shared);
            if let Some((kind, why)) = &table.ended {
                return Err(io::Error::new(*kind, why.clone()));
            }
            table.pending.insert(cookie, pending);
        }
        let mut head = Vec::with_capacity(28);
        head.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head.extend_from_slice(&0u16.to_be_bytes());
        head.extend_from_slice(&command.to_be_bytes());
        head.extend_from_slice(&cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        let sent = self.send(&head, payload).await;
        if let Err(e) = sent {
            // Part of a request may be out: nothing more can be said on this connection.
            end(&self.shared, &e);
        }
        answer
            .await
            .unwrap_or_else(|_| Err(ErrorKind::ConnectionAborted.into()))
    }

    async fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        writer.write_all(head).await?;
        writer.write_all(payload).await
    }

    /// Ranges that are not zeros for sure, in order: everything, if the server cannot say. `found` gets offset and length.
    ///
    /// # Errors
    /// The server's, or the connection's.
    pub async fn allocated(&self, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        if !self.has_allocation {
            found(0, self.size_bytes);
            return Ok(());
        }
        let mut offset = 0;
        while offset < self.size_bytes {
            let length = (self.size_bytes - offset).min(STATUS_BYTES_MAX) as u32;
            let answer = self
                .request(COMMAND_BLOCK_STATUS, offset, length, &[])
                .await?;
            let before = offset;
            for (length, state) in answer.extents {
                if state & STATE_ZERO == 0 {
                    found(offset, u64::from(length));
                }
                offset += u64::from(length);
            }
            if offset == before {
                return Err(protocol("the server says nothing about allocation"));
            }
        }
        Ok(())
    }

    /// Ends the connection in order.
    pub async fn disconnect(self) {
        let mut head = [0; 28];
        head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[6..8].copy_from_slice(&COMMAND_DISCONNECT.to_be_bytes());
        // The server notices the end of the connection in any case.
        let _ = self.send(&head, &[]).await;
    }
}

#[async_trait::async_trait]
impl writer::Source for NbdClient {
    async fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        Ok(self.request(COMMAND_READ, offset, length, &[]).await?.data)
    }
}

#[async_trait::async_trait]
impl reader::Target for NbdClient {
    async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let length = u32::try_from(data.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let answer = self.request(COMMAND_WRITE, offset, length, &data).await;
        answer.map(drop)
    }

    async fn flush(&self) -> io::Result<()> {
        self.request(COMMAND_FLUSH, 0, 0, &[]).await.map(drop)
    }
}

/// A string with its length before it.
fn named(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The server's replies to an option (type and body) up to the acknowledgement; `None` if it refuses.
async fn option(
    stream: &mut UnixStream,
    number: u32,
    data: &[u8],
) -> io::Result<Option<Vec<(u32, Vec<u8>)>>> {
    let mut message = b"IHAVEOPT".to_vec();
    message.extend_from_slice(&number.to_be_bytes());
    message.extend_from_slice(&(data.len() as u32).to_be_bytes());
    message.extend_from_slice(data);
    stream.write_all(&message).await?;
    let mut replies = Vec::new();
    while replies.len() < OPTION_REPLIES_MAX {
        if stream.read_u64().await? != OPTION_REPLY_MAGIC || stream.read_u32().await? != number {
            return Err(protocol("no reply to the option"));
        }
        let kind = stream.read_u32().await?;
        let length = stream.read_u32().await?;
        if length > OPTION_REPLY_BYTES_MAX {
            return Err(protocol("a reply to an option is too long"));
        }
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await?;
        match kind {
            REPLY_ACK => return Ok(Some(replies)),
            kind if kind >> 31 == 1 => return Ok(None),
            kind => replies.push((kind, body)),
        }
    }
    Err(protocol("too many replies to an option"))
}

/// Fails everything in flight and everything later.
fn end(shared: &Shared, error: &io::Error) {
    let mut table = lock(shared);
    let why = format!("the connection to the volume ended: {error}");
    if table.ended.is_none() {
        table.ended = Some((error.kind(), why.clone()));
    }
    for (_, pending) in table.pending.drain() {
        // Who asked may be gone.
        let _ = pending
            .done
            .send(Err(io::Error::new(error.kind(), why.clone())));
    }
}

async fn receive(mut reader: OwnedReadHalf, shared: Shared) {
    let error = loop {
        if let Err(e) = reply(&mut reader, &shared).await {
            break e;
        }
    };
    end(&shared, &error);
}

/// One simple reply, or one chunk of a structured one.
async fn reply(reader: &mut OwnedReadHalf, shared: &Shared) -> io::Result<()> {
    match reader.read_u32().await? {
        SIMPLE_REPLY_MAGIC => {
            let error = reader.read_u32().await?;
            let cookie = reader.read_u64().await?;
            let mut pending = take(shared, cookie)?;
            if error == 0 {
                let length = pending.data.len();
                reader.read_exact(&mut pending.data).await?;
                pending.filled = length;
            } else {
                pending.error = Some(error);
            }
            finish(pending);
            Ok(())
        }
        STRUCTURED_REPLY_MAGIC => {
            let flags = reader.read_u16().await?;
            let kind = reader.read_u16().await?;
            let cookie = reader.read_u64().await?;
            let length = reader.read_u32().await?;
            let mut pending = take(shared, cookie)?;
            chunk(reader, kind, length, &mut pending).await?;
            if flags & CHUNK_DONE == 0 {
                lock(shared).pending.insert(cookie, pending);
            } else {
                finish(pending);
            }
            Ok(())
        }
        _ => Err(protocol("no reply")),
    }
}

fn take(shared: &Shared, cookie: u64) -> io::Result<Pending> {
    let found = lock(shared).pending.remove(&cookie);
    found.ok_or_else(|| protocol("a reply to nothing"))
}

async fn chunk(
    reader: &mut OwnedReadHalf,
    kind: u16,
    length: u32,
    pending: &mut Pending,
) -> io::Result<()> {
    if kind == CHUNK_DATA {
        let offset = reader.read_u64().await?;
        let length = (length as usize)
            .checked_sub(8)
            .ok_or_else(|| protocol("a short chunk"))?;
        let place = place(pending, offset, length)?;
        pending.filled += length;
        return reader.read_exact(&mut pending.data[place]).await.map(drop);
    }
    if length > SMALL_CHUNK_BYTES_MAX {
        return Err(protocol("a chunk is too long"));
    }
    let mut body = vec![0; length as usize];
    reader.read_exact(&mut body).await?;
    let number = |at: usize| {
        let bytes = body.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes
            .map(u32::from_be_bytes)
            .ok_or_else(|| protocol("a short chunk"))
    };
    match kind {
        CHUNK_NONE => {}
        CHUNK_HOLE => {
            let offset = u64::from(number(0)?) << 32 | u64::from(number(4)?);
            let length = number(8)? as usize;
            // The data were zeros from the start.
            place(pending, offset, length)?;
            pending.filled += length;
        }
        CHUNK_BLOCK_STATUS => {
            for at in (4..body.len()).step_by(8) {
                pending.extents.push((number(at)?, number(at + 4)?));
            }
        }
        kind if kind & CHUNK_ERROR_BIT != 0 => pending.error = Some(number(0)?),
        _ => return Err(protocol("an unknown chunk")),
    }
    Ok(())
}

/// Where a chunk's data belong.
fn place(pending: &Pending, offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
    let start = offset
        .checked_sub(pending.offset)
        .and_then(|s| usize::try_from(s).ok());
    let end = start.and_then(|s| s.checked_add(length));
    match (start, end) {
        (Some(start), Some(end)) if end <= pending.data.len() => Ok(start..end),
        _ => Err(protocol("data that nobody asked for")),
    }
}

fn finish(pending: Pending) {
    let result = match pending.error {
        Some(error) => Err(io::Error::from_raw_os_error(error as i32)),
        None if pending.filled != pending.data.len() => Err(protocol("not all data came")),
        None => Ok(Answer {
            data: pending.data.freeze(),
            extents: pending.extents,
        }),
    };
    // Who asked may be gone.
    let _ = pending.done.send(result);
}
