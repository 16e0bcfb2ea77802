//! Snapshots as files: written whole, checked whole, replaced atomically.
//!
//! Form: magic (8 bytes), length of the meta (u32), meta (`codec`), image of the state
//! (`model::State::write_image`), crc32c of everything before it (u32); little-endian.
//!
//! Invariants:
//! - A file gets its final name only after fsync; the directory is synced after the rename.
//! - The newest file that verifies is the snapshot; others are removed after a newer one is durable.
//!   An open handle keeps a removed file readable while it is being sent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::codec;
use super::types::SnapshotMeta;
use crate::model::State;

const MAGIC: &[u8; 8] = b"ASHMSNP1";
const META_BYTES_MAX: usize = 1024 * 1024;
const SUFFIX: &str = "snapshot";
const BUFFER_BYTES: usize = 256 * 1024;
static TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// A snapshot that can be read while newer ones replace it.
#[derive(Clone, Debug)]
pub struct SnapshotHandle {
    file: Arc<File>,
    length: u64,
}

impl SnapshotHandle {
    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Reads up to `length` bytes at an offset; fewer only at the end.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let length =
            length.min(usize::try_from(self.length.saturating_sub(offset)).unwrap_or(length));
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// A reader of its own position.
    fn reader(&self) -> impl Read + '_ {
        HandleReader {
            handle: self,
            offset: 0,
        }
    }
}

struct HandleReader<'a> {
    handle: &'a SnapshotHandle,
    offset: u64,
}

impl Read for HandleReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.handle.length.saturating_sub(self.offset);
        let length = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self
            .handle
            .file
            .read_at(&mut buffer[..length], self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// Sums up what passes through.
struct Summing<T> {
    inner: T,
    crc: u32,
}

impl<T: Read> Read for Summing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.crc = crc32c::crc32c_append(self.crc, &buffer[..count]);
        Ok(count)
    }
}

impl<T: Write> Write for Summing<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.crc = crc32c::crc32c_append(self.crc, &buffer[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The directory of snapshots.
#[derive(Clone, Debug)]
pub struct SnapshotDirectory {
    path: PathBuf,
}

/// A snapshot that is being received.
#[derive(Debug)]
pub struct Incoming {
    file: File,
    path: PathBuf,
    length: u64,
}

impl Incoming {
    /// Adds bytes.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.length += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    /// All is there: the handle to it. The name goes, the content lives as long as the handle.
    pub fn finish(self) -> SnapshotHandle {
        // Best effort: a file left behind is removed at the next start.
        let _ = fs::remove_file(&self.path);
        SnapshotHandle {
            file: Arc::new(self.file),
            length: self.length,
        }
    }
}

impl SnapshotDirectory {
    /// Opens or creates a directory and removes what a crash left behind.
    pub fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        for entry in fs::read_dir(path)? {
            let entry = entry?.path();
            if entry.extension().is_some_and(|e| e == "tmp") {
                fs::remove_file(entry)?;
            }
        }
        Ok(Self {
            path: path.to_owned(),
        })
    }

    fn temporary(&self) -> io::Result<(File, PathBuf)> {
        let path = self
            .path
            .join(format!("{}.tmp", TEMPORARY.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)?;
        Ok((file, path))
    }

    /// Begins to receive a snapshot.
    pub fn receive(&self) -> io::Result<Incoming> {
        let (file, path) = self.temporary()?;
        Ok(Incoming {
            file,
            path,
            length: 0,
        })
    }

    /// Writes a snapshot of the state and makes it the current one.
    pub fn write(&self, meta: &SnapshotMeta, state: &State) -> io::Result<SnapshotHandle> {
        let (file, path) = self.temporary()?;
        let mut out = Summing {
            inner: BufWriter::with_capacity(BUFFER_BYTES, file),
            crc: 0,
        };
        let meta_bytes = codec::encode(meta)?;
        out.write_all(MAGIC)?;
        out.write_all(
            &u32::try_from(meta_bytes.len())
                .map_err(|_| invalid("meta too long"))?
                .to_le_bytes(),
        )?;
        out.write_all(&meta_bytes)?;
        state.write_image(&mut out).map_err(io::Error::other)?;
        let crc = out.crc;
        out.write_all(&crc.to_le_bytes())?;
        let file = out.inner.into_inner().map_err(|e| e.into_error())?;
        self.publish(&file, &path, meta)?;
        let length = file.metadata()?.len();
        Ok(SnapshotHandle {
            file: Arc::new(file),
            length,
        })
    }

    /// Makes a verified snapshot, received from elsewhere, the current one.
    pub fn adopt(&self, meta: &SnapshotMeta, handle: &SnapshotHandle) -> io::Result<()> {
        let (mut file, path) = self.temporary()?;
        io::copy(&mut handle.reader(), &mut file)?;
        self.publish(&file, &path, meta)
    }

    fn publish(&self, file: &File, temporary: &Path, meta: &SnapshotMeta) -> io::Result<()> {
        file.sync_all()?;
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let name = format!("{index:020}.{SUFFIX}");
        fs::rename(temporary, self.path.join(&name))?;
        File::open(&self.path)?.sync_all()?;
        for path in self.files()? {
            if path
                .file_name()
                .is_some_and(|n| *n.to_string_lossy() < *name)
            {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn files(&self) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == SUFFIX) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    /// The newest snapshot that verifies, with its state.
    pub fn load_newest(&self) -> io::Result<Option<(SnapshotMeta, State, SnapshotHandle)>> {
        let mut damaged = None;
        for path in self.files()?.into_iter().rev() {
            let file = File::open(&path)?;
            let handle = SnapshotHandle {
                length: file.metadata()?.len(),
                file: Arc::new(file),
            };
            match read(&handle) {
                Ok((meta, state)) => return Ok(Some((meta, state, handle))),
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "damaged snapshot ignored");
                    damaged = Some(error);
                }
            }
        }
        // Log entries before a snapshot are purged: starting without it would lose them.
        damaged.map_or(Ok(None), |error| {
            Err(invalid(format!("no snapshot in {} verifies ({error}): remove this member, and add one with an empty \
                                 directory under a new id", self.path.display())))
        })
    }
}

/// Reads and verifies a snapshot.
pub fn read(handle: &SnapshotHandle) -> io::Result<(SnapshotMeta, State)> {
    let buffered = BufReader::with_capacity(BUFFER_BYTES, handle.reader());
    let mut input = Summing {
        inner: buffered,
        crc: 0,
    };
    let mut magic = [0; 8];
    input.read_exact(&mut magic)?;
    if &magic != MAGIC {
        return Err(invalid("not a snapshot"));
    }
    let mut word = [0; 4];
    input.read_exact(&mut word)?;
    let length = u32::from_le_bytes(word) as usize;
    if length > META_BYTES_MAX {
        return Err(invalid("meta too long"));
    }
    let mut meta = vec![0; length];
    input.read_exact(&mut meta)?;
    let meta = codec::decode(&meta)?;
    let state = State::read_image(&mut input).map_err(io::Error::other)?;
    let crc = input.crc;
    input.read_exact(&mut word)?;
    if u32::from_le_bytes(word) != crc {
        return Err(invalid("checksum differs"));
    }
    if input.read(&mut word)? != 0 {
        return Err(invalid("trailing bytes"));
    }
    Ok((meta, state))
}
