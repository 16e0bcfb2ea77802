//! Blocks that are read from the disk to be written elsewhere on it: neighbours in one command.
//!
//! Invariant: one unreadable sector costs one block, not its neighbours: what fails as a whole is read block by block.

use ashlar_proto::ids::BLOCK_SIZE;
use bytes::Bytes;

/// Data that is being read, contiguous on the disk.
struct Piece {
    offset: u64,
    blocks: usize,
    data: Option<Bytes>,
}

impl Piece {
    fn covers(&self, offset: u64) -> bool {
        self.offset <= offset && offset < self.offset + (self.blocks * BLOCK_SIZE) as u64
    }
}

/// A part to read: its index, offset on the disk and length in bytes.
pub(super) type Part = (u32, u64, usize);

/// All that one step reads.
#[derive(Default)]
pub(super) struct Pieces {
    list: Vec<Piece>,
    outstanding: usize,
}

impl Pieces {
    /// Of blocks at these offsets, in any order; and what is to be read.
    pub(super) fn new(mut offsets: Vec<u64>) -> (Self, Vec<Part>) {
        offsets.sort_unstable();
        let mut list: Vec<Piece> = Vec::new();
        for offset in offsets {
            match list.last_mut() {
                Some(p) if p.offset + (p.blocks * BLOCK_SIZE) as u64 == offset => p.blocks += 1,
                _ => list.push(Piece {
                    offset,
                    blocks: 1,
                    data: None,
                }),
            }
        }
        let parts = list.iter().enumerate();
        let parts = parts.map(|(i, p)| (i as u32, p.offset, p.blocks * BLOCK_SIZE));
        let parts = parts.collect();
        let outstanding = list.len();
        (Self { list, outstanding }, parts)
    }

    /// A part came, or could not be read; returns what is to be read instead.
    pub(super) fn arrived(&mut self, index: u32, bytes: Option<Bytes>) -> Vec<Part> {
        let mut singles = Vec::new();
        self.outstanding -= 1;
        let next = self.list.len();
        if let Some(p) = self.list.get_mut(index as usize) {
            let whole = bytes.filter(|b| b.len() == p.blocks * BLOCK_SIZE);
            if whole.is_none() && p.blocks > 1 {
                let (offset, blocks) = (p.offset, std::mem::take(&mut p.blocks));
                for i in 0..blocks {
                    let offset = offset + (i * BLOCK_SIZE) as u64;
                    singles.push(((next + i) as u32, offset, BLOCK_SIZE));
                    self.list.push(Piece {
                        offset,
                        blocks: 1,
                        data: None,
                    });
                }
                self.outstanding += blocks;
            } else {
                p.data = whole;
            }
        }
        singles
    }

    pub(super) fn is_complete(&self) -> bool {
        self.outstanding == 0
    }

    /// Whether a block was to be read.
    pub(super) fn covers(&self, offset: u64) -> bool {
        self.list.iter().any(|p| p.covers(offset))
    }

    /// A block's data; `None` if it could not be read.
    pub(super) fn block(&self, offset: u64) -> Option<Bytes> {
        let piece = self.list.iter().find(|p| p.covers(offset))?;
        let at = (offset - piece.offset) as usize;
        piece.data.as_ref().map(|d| d.slice(at..at + BLOCK_SIZE))
    }
}
