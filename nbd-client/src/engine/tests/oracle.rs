//! What clients saw, judged: per-sector linearizability by zones (Gibbons and Korach) with unique
//! stamps, and that nothing flushed is lost.

use std::collections::BTreeMap;

use super::fake_disk::whole;
use crate::engine::*;

/// One operation on one sector.
#[derive(Clone, Copy, Debug)]
struct Touch {
    tag: u64,
    client: usize,
    stamp: u64,
    invoked: u64,
    answered: u64,
    write: bool,
}

#[derive(Default)]
pub(super) struct Oracle {
    /// When, and by whose client, each tag was.
    invoked: BTreeMap<u64, (u64, usize)>,
    touches: BTreeMap<u64, Vec<Touch>>,
    /// (invoked, answered, client) of flushes. A flush covers what its own client was acknowledged:
    /// another client's unflushed writes may be gone before it opens.
    flushes: Vec<(u64, u64, usize)>,
    /// When FUA writes were answered, by tag.
    durable: BTreeMap<u64, u64>,
    pub(super) reads: u64,
    /// Judge nothing (data without stamps).
    pub(super) quiet: bool,
}

const NEVER: u64 = u64::MAX;

impl Oracle {
    pub(super) fn invoked(&mut self, tag: u64, client: usize, now: u64, op: &ClientOp) {
        self.invoked.insert(tag, (now, client));
        let (offset, length, stamp) = match op {
            ClientOp::Write { offset, data, .. } => (*offset, whole(data).len() as u64, tag),
            _ => return,
        };
        for sector in offset / 512..(offset + length) / 512 {
            self.touches.entry(sector).or_default().push(Touch {
                tag,
                client,
                stamp,
                invoked: now,
                answered: NEVER,
                write: true,
            });
        }
    }

    pub(super) fn answered(
        &mut self,
        tag: u64,
        now: u64,
        op: &ClientOp,
        result: &Result<ClientReply, ClientError>,
    ) {
        let Some((invoked, client)) = self.invoked.get(&tag).copied().filter(|_| !self.quiet)
        else {
            return;
        };
        match (op, result) {
            (ClientOp::Write { fua, .. }, Ok(_)) => {
                for touch in self
                    .touches
                    .values_mut()
                    .flatten()
                    .filter(|t| t.tag == tag && t.write)
                {
                    touch.answered = now;
                }
                if *fua {
                    self.durable.insert(tag, now);
                }
            }
            (ClientOp::Flush, Ok(_)) => self.flushes.push((invoked, now, client)),
            (ClientOp::Read { offset, length }, Ok(ClientReply::Data(segments))) => {
                let bytes = join(segments);
                assert_eq!(
                    bytes.len(),
                    *length as usize,
                    "a read returns what was asked for"
                );
                for (i, sector) in bytes.chunks(512).enumerate() {
                    let head = u64::from_le_bytes(sector[..8].try_into().unwrap());
                    let tail = u64::from_le_bytes(sector[504..].try_into().unwrap());
                    assert_eq!(head, tail, "a torn sector");
                    self.reads += 1;
                    self.touches
                        .entry(offset / 512 + i as u64)
                        .or_default()
                        .push(Touch {
                            tag,
                            client,
                            stamp: head,
                            invoked,
                            answered: now,
                            write: false,
                        });
                }
            }
            _ => {}
        }
    }

    /// Every sector's history is that of one register.
    pub(super) fn check_linearizable(&self) -> Result<(), String> {
        for (sector, touches) in &self.touches {
            // Per stamp: first answer and last invocation.
            let mut zones: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
            let mut written: BTreeMap<u64, u64> = BTreeMap::from([(0, 0)]);
            zones.insert(0, (0, 0));
            for touch in touches {
                if touch.write {
                    written.insert(touch.stamp, touch.invoked);
                }
                let zone = zones.entry(touch.stamp).or_insert((NEVER, 0));
                zone.0 = zone.0.min(touch.answered);
                zone.1 = zone.1.max(touch.invoked);
            }
            for touch in touches.iter().filter(|t| !t.write) {
                match written.get(&touch.stamp) {
                    None => {
                        return Err(format!("sector {sector}: read {touch:?} of nobody's write"));
                    }
                    Some(at) if *at > touch.answered => {
                        return Err(format!("sector {sector}: read from the future {touch:?}"));
                    }
                    Some(_) => {}
                }
            }
            let list: Vec<(u64, u64, u64)> = zones.iter().map(|(s, z)| (*s, z.0, z.1)).collect();
            for (i, (s, first, last)) in list.iter().enumerate() {
                if first >= last {
                    continue;
                }
                for (j, (t, f, l)) in list.iter().enumerate() {
                    if i == j {
                        continue;
                    }
                    let forward = f < l;
                    let overlap = forward && first < l && f < last;
                    let inside = !forward && first < l && f < last;
                    if overlap || inside {
                        return Err(format!(
                            "sector {sector}: stamp {s} was seen from {first} to {last}, but stamp {t} between ({f}, {l})\n{}",
                            history(touches)
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// No read returns a write that a flushed (or FUA) one had replaced.
    pub(super) fn check_flushed(&self) -> Result<(), String> {
        for (sector, touches) in &self.touches {
            let writes: Vec<&Touch> = touches.iter().filter(|t| t.write).collect();
            for read in touches.iter().filter(|t| !t.write) {
                let replaced_by = |w: &&&Touch| {
                    let safe = self.durable.get(&w.tag).copied().into_iter().chain(
                        self.flushes
                            .iter()
                            .filter(|f| w.answered < f.0 && w.client == f.2)
                            .map(|f| f.1),
                    );
                    safe.min().is_some_and(|at| at < read.invoked)
                };
                let seen = writes.iter().find(|w| w.stamp == read.stamp);
                if seen.is_none() && read.stamp != 0 {
                    return Err(format!("sector {sector}: read of nobody's write: {read:?}"));
                }
                let answered = seen.map_or(0, |w| w.answered);
                if let Some(newer) = writes
                    .iter()
                    .filter(|w| w.invoked > answered)
                    .find(replaced_by)
                {
                    return Err(format!(
                        "sector {sector}: {read:?} although {newer:?} was flushed\n{}",
                        history(touches)
                    ));
                }
            }
        }
        Ok(())
    }
}

fn history(touches: &[Touch]) -> String {
    let mut touches = touches.to_vec();
    touches.sort_by_key(|t| t.invoked);
    touches.iter().map(|t| format!("  {t:?}\n")).collect()
}

pub(super) fn join(segments: &ReadSegments) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            ReadSegment::Data(data) => bytes.extend_from_slice(data),
            ReadSegment::Zeroes(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    bytes
}
