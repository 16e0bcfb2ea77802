//! Disk operations in flight: their buffers, their continuation after partial transfers.
//!
//! Invariants:
//! - An operation owns its buffers and vectors until its completion; both stay in place when the table
//!   of operations moves (they are heap allocations of their own).
//! - A write completes only when all its bytes are written, a read only with all its bytes; anything else
//!   is an error.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use bytes::Bytes;
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use smallvec::SmallVec;

use crate::buffer::{AlignedBuffer, BufferPool};
use crate::disk::{DiskCommand, DiskCompletion, DiskFile, IoToken};

/// Buffers of one write that are handed over as they are; more are copied together.
const VECTORS_MAX: usize = 64;
/// Bytes of one transfer, so that its length fits into the entry.
const TRANSFER_MAX: usize = 1 << 30;
/// Continuations of one operation after interrupted or partial transfers.
const CONTINUATIONS_MAX: u32 = 1024;
/// `_IO(0x12, 0)` of linux/blkdev.h: discard through io_uring (Linux 6.12).
const BLOCK_URING_CMD_DISCARD: u32 = 0x1200;

/// A disk that the reactor serves.
pub(super) struct Disk {
    pub file: DiskFile,
    /// Index in the ring's table of files.
    pub registered: Option<u32>,
    /// The kernel has no discard by io_uring.
    pub discard_by_fallocate: bool,
}

enum Work {
    Read(AlignedBuffer),
    Write {
        data: SmallVec<[Bytes; 4]>,
        durable: bool,
    },
    Sync,
    Discard {
        length: u64,
    },
}

pub(super) struct Operation {
    pub disk: usize,
    token: IoToken,
    work: Work,
    offset: u64,
    length: usize,
    done: usize,
    continuations: u32,
    vectors: Vec<libc::iovec>,
}

/// What comes after a completion.
pub(super) enum Next {
    /// Submit the operation again, for the rest.
    Continue,
    /// Tell the consumer.
    Finished(DiskCompletion),
}

macro_rules! entry {
    ($disk:expr, |$target:ident| $build:expr) => {
        match $disk.registered {
            Some(index) => {
                let $target = types::Fixed(index);
                $build
            }
            None => {
                let $target = types::Fd(descriptor(&$disk.file));
                $build
            }
        }
    };
}

fn descriptor(file: &DiskFile) -> RawFd {
    std::os::fd::AsFd::as_fd(file).as_raw_fd()
}

impl Operation {
    /// An operation, or at once the completion of a command that is not in whole sectors (the kernel would
    /// refuse it or, worse, quietly go through the page cache).
    pub fn new(
        disk: usize,
        file: &DiskFile,
        command: DiskCommand,
        pool: &BufferPool,
    ) -> Result<Self, DiskCompletion> {
        let (token, offset, length) = match &command {
            DiskCommand::Read {
                token,
                offset,
                length,
            } => (*token, *offset, *length),
            DiskCommand::Write {
                token,
                offset,
                data,
                ..
            } => (*token, *offset, data.iter().map(Bytes::len).sum()),
            DiskCommand::Discard { token, offset, .. } => (*token, *offset, 0),
            DiskCommand::Sync { token } => (*token, 0, 0),
        };
        let sector = file.logical_sector() as usize;
        if !(offset.is_multiple_of(sector as u64) && length.is_multiple_of(sector)) {
            let message =
                format!("{length} bytes at {offset} are not in whole sectors of {sector}");
            let result = Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            return Err(DiskCompletion { token, result });
        }
        let work = match command {
            DiskCommand::Read { .. } => Work::Read(pool.take(length)),
            DiskCommand::Write { data, durable, .. } => Work::Write {
                data: aligned(file, data, length, pool),
                durable,
            },
            DiskCommand::Discard { length, .. } => Work::Discard { length },
            DiskCommand::Sync { .. } => Work::Sync,
        };
        let (done, continuations, vectors) = (0, 0, Vec::new());
        Ok(Self {
            disk,
            token,
            work,
            offset,
            length,
            done,
            continuations,
            vectors,
        })
    }

    /// The entry for what remains to be done. It names memory of this operation, which must live in
    /// place until the completion.
    pub fn entry(&mut self, disk: &Disk) -> squeue::Entry {
        let offset = self.offset + self.done as u64;
        match &mut self.work {
            Work::Read(buffer) => {
                let rest = &mut buffer[self.done..];
                let length = rest.len().min(TRANSFER_MAX) as u32;
                entry!(disk, |file| opcode::Read::new(
                    file,
                    rest.as_mut_ptr(),
                    length
                )
                .offset(offset)
                .build())
            }
            Work::Write { data, durable } => {
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                if let [only] = &data[..] {
                    let rest = &only[self.done..];
                    let (start, length) = (rest.as_ptr(), rest.len().min(TRANSFER_MAX) as u32);
                    return entry!(disk, |file| opcode::Write::new(file, start, length)
                        .offset(offset)
                        .rw_flags(flags)
                        .build());
                }
                fill_vectors(&mut self.vectors, data, self.done);
                let (start, count) = (self.vectors.as_ptr(), self.vectors.len() as u32);
                entry!(disk, |file| opcode::Writev::new(file, start, count)
                    .offset(offset)
                    .rw_flags(flags)
                    .build())
            }
            Work::Sync => entry!(disk, |file| opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build()),
            Work::Discard { length } => discard_entry(disk, offset, *length),
        }
    }

    /// Takes the outcome of one submission.
    pub fn complete(&mut self, outcome: io::Result<usize>, disk: &mut Disk) -> Next {
        self.continuations += 1;
        let again = self.continuations < CONTINUATIONS_MAX;
        let transferred = match outcome {
            Ok(count) => count,
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR | libc::EAGAIN) if again => return Next::Continue,
                _ if matches!(self.work, Work::Discard { .. })
                    && crate::disk::discard_is_unsupported(&error) =>
                {
                    if disk.file.is_block_device() && !disk.discard_by_fallocate {
                        disk.discard_by_fallocate = true;
                        return Next::Continue;
                    }
                    return self.finish(Err(io::ErrorKind::Unsupported.into()));
                }
                _ => return self.finish(Err(error)),
            },
        };
        if matches!(self.work, Work::Sync | Work::Discard { .. }) {
            return self.finish(Ok(()));
        }
        self.done += transferred;
        if self.done >= self.length {
            return self.finish(Ok(()));
        }
        let sector = disk.file.logical_sector() as usize;
        if transferred == 0 || !self.done.is_multiple_of(sector) || !again {
            let kind = match self.work {
                Work::Read(_) => io::ErrorKind::UnexpectedEof,
                _ => io::ErrorKind::WriteZero,
            };
            let (done, length, offset) = (self.done, self.length, self.offset);
            let message = format!("{done} of {length} bytes transferred at {offset}");
            return self.finish(Err(io::Error::new(kind, message)));
        }
        Next::Continue
    }

    fn finish(&mut self, result: io::Result<()>) -> Next {
        let result = match (result, std::mem::replace(&mut self.work, Work::Sync)) {
            (Ok(()), Work::Read(buffer)) => Ok(buffer.freeze()),
            (Ok(()), _) => Ok(Bytes::new()),
            (Err(error), _) => Err(error),
        };
        Next::Finished(DiskCompletion {
            token: self.token,
            result,
        })
    }
}

/// The buffers of a write, copied into one aligned buffer if the device could not take them as they are.
fn aligned(
    file: &DiskFile,
    data: SmallVec<[Bytes; 4]>,
    length: usize,
    pool: &BufferPool,
) -> SmallVec<[Bytes; 4]> {
    let (memory, sector) = (
        file.memory_alignment() as usize,
        file.logical_sector() as usize,
    );
    let fits = |bytes: &Bytes| {
        (bytes.as_ptr() as usize).is_multiple_of(memory) && bytes.len().is_multiple_of(sector)
    };
    if data.len() <= VECTORS_MAX && data.iter().all(fits) {
        return data;
    }
    let mut copy = pool.with_capacity(length);
    for bytes in &data {
        copy.extend_from_slice(bytes);
    }
    SmallVec::from_iter([copy.freeze()])
}

/// Vectors for the bytes of `data` after the first `skip`.
fn fill_vectors(vectors: &mut Vec<libc::iovec>, data: &[Bytes], mut skip: usize) {
    vectors.clear();
    for bytes in data {
        if skip >= bytes.len() {
            skip -= bytes.len();
            continue;
        }
        let rest = &bytes[skip..];
        skip = 0;
        vectors.push(libc::iovec {
            iov_base: rest.as_ptr().cast_mut().cast(),
            iov_len: rest.len(),
        });
    }
    if vectors.is_empty() {
        // An empty write: the kernel answers 0, which is all of it.
        vectors.push(libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        });
    }
}

fn discard_entry(disk: &Disk, offset: u64, length: u64) -> squeue::Entry {
    if disk.file.is_block_device() && !disk.discard_by_fallocate {
        let mut command = [0; 16];
        command[..8].copy_from_slice(&length.to_ne_bytes());
        return entry!(disk, |file| opcode::UringCmd16::new(
            file,
            BLOCK_URING_CMD_DISCARD
        )
        .addr(Some(offset))
        .cmd(command)
        .build());
    }
    let mode = (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits() as i32;
    entry!(disk, |file| opcode::Fallocate::new(file, length)
        .offset(offset)
        .mode(mode)
        .build())
}
