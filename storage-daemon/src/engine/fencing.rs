//! R1 at one replica: which requests an epoch may still make, and when a fence may be answered.
//!
//! Invariants:
//! - A fence is *raised* in memory the moment it is asked for: from then on no lower epoch is admitted,
//!   by any connection. It is made durable (by the store) only after every admitted request of a lower
//!   epoch has been applied or dropped, and only then answered. So whoever holds the answer knows that
//!   nothing of a lower epoch can be applied any more.
//! - A fence that is waiting when a higher one is raised is dropped: it is refused, never answered.
//! - The raised fence never falls while the process runs; the durable one never exceeds it.

use ashlar_proto::ids::{Epoch, VolumeId};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// Fences that may wait at one volume at a time; more are refused as busy.
pub const FENCES_WAITING_MAX: usize = 64;

/// What [`Fencing::raise`] decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Raised {
    /// Nothing of a lower epoch is left: make it durable and answer.
    Now,
    /// Kept until the lower epochs' requests are done; [`Fencing::finish`] hands it back.
    Waits,
    /// A higher fence exists.
    Refused,
    /// Too many wait already.
    Busy,
}

/// Tickets of fences that [`Fencing::raise`] dropped or [`Fencing::finish`] released.
pub type Tickets = SmallVec<[u32; 4]>;

#[derive(Default)]
struct VolumeFence {
    /// Lower epochs are refused.
    raised: Epoch,
    /// Admitted and unfinished requests by epoch. Few epochs live at a time: usually one.
    admitted: SmallVec<[(Epoch, u32); 2]>,
    /// Fences that wait: epoch, ticket.
    waiting: SmallVec<[(Epoch, u32); 2]>,
}

impl VolumeFence {
    fn lower_admitted(&self, epoch: Epoch) -> bool {
        self.admitted.iter().any(|&(e, _)| e < epoch)
    }
}

/// The fences of all volumes of a disk.
#[derive(Default)]
pub struct Fencing {
    // Only looked up, never iterated to decide anything.
    volumes: FxHashMap<VolumeId, VolumeFence>,
}

impl Fencing {
    /// The fence of a volume as requests see it: the durable one or the higher one being raised.
    pub fn fence(&self, volume: VolumeId, durable: Epoch) -> Epoch {
        self.volumes
            .get(&volume)
            .map_or(durable, |v| v.raised.max(durable))
    }

    /// Admits a request, unless its epoch is fenced. Every admitted request is [`Self::finish`]ed once.
    pub fn admit(&mut self, volume: VolumeId, durable: Epoch, epoch: Epoch) -> bool {
        let state = self.volumes.entry(volume).or_default();
        state.raised = state.raised.max(durable);
        if epoch < state.raised {
            return false;
        }
        match state.admitted.iter_mut().find(|(e, _)| *e == epoch) {
            Some((_, count)) => *count += 1,
            None => state.admitted.push((epoch, 1)),
        }
        true
    }

    /// Raises the fence. A fence that was waiting with a lower epoch is dropped: its ticket is added to
    /// `dropped`.
    pub fn raise(
        &mut self,
        volume: VolumeId,
        durable: Epoch,
        epoch: Epoch,
        ticket: u32,
        dropped: &mut Tickets,
    ) -> Raised {
        let state = self.volumes.entry(volume).or_default();
        state.raised = state.raised.max(durable);
        if epoch < state.raised {
            return Raised::Refused;
        }
        state.raised = epoch;
        state.waiting.retain(|&mut (e, t)| {
            let keep = e >= epoch;
            if !keep {
                dropped.push(t);
            }
            keep
        });
        if !state.lower_admitted(epoch) {
            return Raised::Now;
        }
        if state.waiting.len() >= FENCES_WAITING_MAX {
            return Raised::Busy;
        }
        state.waiting.push((epoch, ticket));
        Raised::Waits
    }

    /// An admitted request was applied or dropped. Fences that waited only for it are added to
    /// `released`: make them durable and answer them.
    pub fn finish(&mut self, volume: VolumeId, epoch: Epoch, released: &mut Tickets) {
        let Some(state) = self.volumes.get_mut(&volume) else {
            debug_assert!(false, "a request finished that was never admitted");
            return;
        };
        if let Some(index) = state.admitted.iter().position(|&(e, _)| e == epoch) {
            state.admitted[index].1 -= 1;
            if state.admitted[index].1 == 0 {
                state.admitted.swap_remove(index);
            }
        }
        if state.waiting.is_empty() {
            return;
        }
        let admitted = &state.admitted;
        state.waiting.retain(|&mut (wanted, ticket)| {
            let wait = admitted.iter().any(|&(e, _)| e < wanted);
            if !wait {
                released.push(ticket);
            }
            wait
        });
    }

    /// Forgets a volume whose replica does not exist, if nothing of it is in flight. A fence that was
    /// raised for it protected nothing.
    pub fn forget_if_idle(&mut self, volume: VolumeId) {
        if self
            .volumes
            .get(&volume)
            .is_some_and(|v| v.admitted.is_empty() && v.waiting.is_empty())
        {
            self.volumes.remove(&volume);
        }
    }

    /// Requests of a volume that are admitted and not finished.
    pub fn in_flight(&self, volume: VolumeId) -> u32 {
        self.volumes
            .get(&volume)
            .map_or(0, |v| v.admitted.iter().map(|&(_, count)| count).sum())
    }

    /// Requests of all volumes that are admitted and not finished, for the invariants.
    pub fn in_flight_total(&self) -> u64 {
        // A sum does not depend on the order of iteration.
        self.volumes
            .values()
            .flat_map(|v| v.admitted.iter())
            .map(|&(_, count)| u64::from(count))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId([1; 16]);
    const NONE: Epoch = Epoch(0);

    fn raise(fencing: &mut Fencing, epoch: u64, ticket: u32) -> (Raised, Tickets) {
        let mut dropped = Tickets::new();
        let raised = fencing.raise(VOLUME, NONE, Epoch(epoch), ticket, &mut dropped);
        (raised, dropped)
    }

    fn finish(fencing: &mut Fencing, epoch: u64) -> Tickets {
        let mut released = Tickets::new();
        fencing.finish(VOLUME, Epoch(epoch), &mut released);
        released
    }

    #[test]
    fn a_fence_waits_for_every_lower_epoch_and_for_no_other() {
        let mut fencing = Fencing::default();
        assert!(fencing.admit(VOLUME, NONE, Epoch(3)));
        assert!(fencing.admit(VOLUME, NONE, Epoch(4)));
        assert!(fencing.admit(VOLUME, NONE, Epoch(5)));
        assert_eq!(raise(&mut fencing, 5, 7).0, Raised::Waits);
        assert!(!fencing.admit(VOLUME, NONE, Epoch(4)));
        assert!(fencing.admit(VOLUME, NONE, Epoch(6)));
        assert!(finish(&mut fencing, 3).is_empty());
        assert_eq!(finish(&mut fencing, 4).as_slice(), [7]);
        assert_eq!(fencing.in_flight(VOLUME), 2);
    }

    #[test]
    fn a_higher_fence_drops_a_waiting_lower_one() {
        let mut fencing = Fencing::default();
        assert!(fencing.admit(VOLUME, NONE, Epoch(3)));
        assert_eq!(raise(&mut fencing, 5, 1).0, Raised::Waits);
        let (raised, dropped) = raise(&mut fencing, 6, 2);
        assert_eq!((raised, dropped.as_slice()), (Raised::Waits, &[1][..]));
        assert_eq!(raise(&mut fencing, 5, 3).0, Raised::Refused);
        assert_eq!(finish(&mut fencing, 3).as_slice(), [2]);
    }

    #[test]
    fn the_durable_fence_counts_after_a_restart() {
        let mut fencing = Fencing::default();
        assert!(!fencing.admit(VOLUME, Epoch(9), Epoch(8)));
        assert!(fencing.admit(VOLUME, Epoch(9), Epoch(9)));
        assert_eq!(fencing.fence(VOLUME, Epoch(9)), Epoch(9));
    }

    #[test]
    fn the_same_epoch_may_fence_twice_and_waits_again() {
        let mut fencing = Fencing::default();
        assert!(fencing.admit(VOLUME, NONE, Epoch(1)));
        assert_eq!(raise(&mut fencing, 2, 1).0, Raised::Waits);
        assert_eq!(raise(&mut fencing, 2, 2).0, Raised::Waits);
        assert_eq!(finish(&mut fencing, 1).as_slice(), [1, 2]);
        assert_eq!(raise(&mut fencing, 2, 3).0, Raised::Now);
    }
}
