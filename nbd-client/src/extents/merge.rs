//! The lists of all groups in the order of the volume, neighbours joined.

use ashlar_proto::ids::CHUNK_SIZE;
use tokio::sync::mpsc;

use super::group::GroupList;
use super::source::Source;
use super::{Extent, ExtentsError};

type Sender = mpsc::Sender<Result<Extent, ExtentsError>>;

/// Lists everything from an offset on; ends early when nobody listens any more.
pub(super) async fn run(mut source: Source, start_offset: u64, sender: Sender) {
    let mut out = Output {
        start: start_offset,
        end: source.size_bytes(),
        pending: None,
        sender,
    };
    let result = merge(&mut source, &mut out).await;
    let farewell = match result {
        Ok(()) => out.pending.take().map(Ok),
        Err(error) => Some(Err(error)),
    };
    if let Some(last) = farewell {
        // A reader that is gone misses nothing.
        let _ = out.sender.send(last).await;
    }
}

async fn merge(source: &mut Source, out: &mut Output) -> Result<(), ExtentsError> {
    let first_chunk = (out.start / CHUNK_SIZE) as u32;
    let mut groups: Vec<GroupList> = (0..source.group_count())
        .map(|g| GroupList::new(g, first_chunk))
        .collect();
    // The group that is furthest behind either has an extent to give or is asked for more.
    loop {
        let behind = groups
            .iter_mut()
            .filter_map(|g| Some((g.position()?, g)))
            .min_by_key(|(at, _)| *at);
        let Some((at, group)) = behind else {
            return Ok(());
        };
        if at >= out.end {
            return Ok(());
        }
        match group.pop() {
            Some(extent) => {
                if !out.push(extent).await {
                    return Ok(());
                }
            }
            None => group.fill(source).await?,
        }
    }
}

/// Joins and clips extents.
struct Output {
    start: u64,
    end: u64,
    pending: Option<Extent>,
    sender: Sender,
}

impl Output {
    /// False: nobody listens.
    async fn push(&mut self, extent: Extent) -> bool {
        let offset = extent.offset.max(self.start);
        let end = extent.end().min(self.end);
        if offset >= end {
            return true;
        }
        let extent = Extent {
            offset,
            length: end - offset,
            data: extent.data,
        };
        if let Some(last) = &mut self.pending
            && last.end() == extent.offset
            && last.data == extent.data
        {
            last.length += extent.length;
            return true;
        }
        match self.pending.replace(extent) {
            Some(complete) => self.sender.send(Ok(complete)).await.is_ok(),
            None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn neighbours_of_one_kind_are_joined_and_what_lies_outside_is_cut_off() {
        let (sender, mut receiver) = mpsc::channel(16);
        let mut out = Output {
            start: 8192,
            end: 40960,
            pending: None,
            sender,
        };
        let extent = |offset, length, data| Extent {
            offset,
            length,
            data,
        };
        for e in [
            extent(0, 4096, true),
            extent(4096, 8192, true),
            extent(12288, 4096, true),
            extent(16384, 4096, false),
            extent(24576, 8192, false),
            extent(36864, 8192, true),
            extent(45056, 4096, true),
        ] {
            assert!(out.push(e).await);
        }
        let last = out.pending.take();
        drop(out);
        let mut seen = Vec::new();
        while let Some(Ok(e)) = receiver.recv().await {
            seen.push(e);
        }
        seen.extend(last);
        assert_eq!(
            seen,
            [
                extent(8192, 8192, true),
                extent(16384, 4096, false),
                extent(24576, 8192, false),
                extent(36864, 4096, true),
            ]
        );
    }
}
