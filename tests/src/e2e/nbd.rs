//! A small blocking NBD client for tests that must know exactly what was answered and when.
//! (NBD protocol: fixed newstyle negotiation with NBD_OPT_GO, simple replies.)

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Number of a 4 KiB block of the export.
pub type BlockNumber = u64;

const BLOCK: usize = 4096;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;

/// One connection.
pub struct NbdClient {
    stream: UnixStream,
    cookie: u64,
    /// Size of the export in bytes.
    pub size: u64,
}

fn protocol(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl NbdClient {
    /// Connects and negotiates; reads and writes time out after 30 s.
    ///
    /// # Errors
    /// No server, or not one that offers the export.
    pub fn connect_unix(path: &Path, export: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_write_timeout(Some(Duration::from_secs(30)))?;
        let mut greeting = [0u8; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(protocol("no NBD greeting"));
        }
        let mut hello = Vec::new();
        hello.extend_from_slice(&3u32.to_be_bytes()); // fixed newstyle, no zeroes
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&7u32.to_be_bytes()); // NBD_OPT_GO
        hello.extend_from_slice(&(export.len() as u32 + 6).to_be_bytes());
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        hello.extend_from_slice(&0u16.to_be_bytes());
        stream.write_all(&hello)?;
        let mut size = 0;
        loop {
            let mut head = [0u8; 20];
            stream.read_exact(&mut head)?;
            let field = |at: usize| {
                u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let (kind, length) = (field(12), field(16) as usize);
            let mut body = vec![0; length.min(1 << 16)];
            stream.read_exact(&mut body)?;
            match kind {
                1 => break, // NBD_REP_ACK
                3 if body.len() == 12 && body[..2] == [0, 0] => {
                    size =
                        u64::from_be_bytes(body[2..10].try_into().map_err(|_| protocol("info"))?);
                }
                3 => {}
                other => return Err(protocol(format!("option refused: {other:#x}"))),
            }
        }
        Ok(Self {
            stream,
            cookie: 0,
            size,
        })
    }

    fn command(&mut self, kind: u16, offset: u64, length: u32, data: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut head = Vec::with_capacity(28 + data.len());
        head.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        head.extend_from_slice(&0u16.to_be_bytes());
        head.extend_from_slice(&kind.to_be_bytes());
        head.extend_from_slice(&self.cookie.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        head.extend_from_slice(data);
        self.stream.write_all(&head)?;
        let mut reply = [0u8; 16];
        self.stream.read_exact(&mut reply)?;
        if reply[..4] != 0x6744_6698_u32.to_be_bytes() || reply[8..] != self.cookie.to_be_bytes() {
            return Err(protocol("not the reply to the request"));
        }
        match u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]]) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno as i32)),
        }
    }

    /// Reads `length` bytes.
    ///
    /// # Errors
    /// The server's error, or the connection's.
    pub fn read(&mut self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        self.command(CMD_READ, offset, length as u32, &[])?;
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    /// Writes.
    ///
    /// # Errors
    /// The server's error, or the connection's.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.command(CMD_WRITE, offset, data.len() as u32, data)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The server's error, or the connection's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.command(CMD_FLUSH, 0, 0, &[])
    }

    /// Discards whole blocks.
    ///
    /// # Errors
    /// The server's error, or the connection's.
    pub fn trim(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.command(CMD_TRIM, offset, length, &[])
    }

    /// Writes a block that says its number and a stamp all over, so that a torn or misplaced block shows.
    ///
    /// # Errors
    /// As [`NbdClient::write`].
    pub fn write_stamp(&mut self, block: BlockNumber, stamp: u64) -> io::Result<()> {
        self.write(block * BLOCK as u64, &stamped(block, stamp))
    }

    /// Reads a block's stamp; 0 if it was never written.
    ///
    /// # Errors
    /// As [`NbdClient::read`], or the block is torn or belongs elsewhere.
    pub fn read_stamp(&mut self, block: BlockNumber) -> io::Result<u64> {
        let data = self.read(block * BLOCK as u64, BLOCK)?;
        let number =
            |at: usize| u64::from_le_bytes(data[at..at + 8].try_into().unwrap_or_default());
        let stamp = number(8);
        if data.iter().all(|b| *b == 0) {
            return Ok(0);
        }
        if data != stamped(block, stamp) {
            return Err(protocol(format!(
                "block {block} is torn or foreign (says {})",
                number(0)
            )));
        }
        Ok(stamp)
    }
}

fn stamped(block: BlockNumber, stamp: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity(BLOCK);
    while data.len() < BLOCK {
        data.extend_from_slice(&block.to_le_bytes());
        data.extend_from_slice(&stamp.to_le_bytes());
    }
    data
}
