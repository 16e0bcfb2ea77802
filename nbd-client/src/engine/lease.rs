//! Leases (R6): who vouches that no newer holder serves yet.
//!
//! Invariants:
//! - An answer vouches for the lease from the time its request was *sent*, less the drift margin.
//! - Leases are renewed by whatever traffic there is; pings are sent only because a read needs them, so
//!   an idle volume sends nothing.

use ashlar_platform::clock::Time;

use super::api::PlantedBug;
use super::reader::Role;
use super::session::Session;

impl Session {
    /// A peer answered a request without refusing the epoch.
    pub(super) fn renew_lease(&mut self, peer: u8, sent: Time) {
        let until = sent.after(
            self.config
                .lease
                .saturating_sub(self.config.lease_drift_margin),
        );
        let peer = &mut self.peers[peer as usize];
        if until > peer.lease_until {
            peer.lease_until = until;
        }
    }

    /// Whether reads of a group may be answered now. Asks for fresh answers where they are missing or
    /// will soon be.
    pub(super) fn lease_holds(&mut self, g: usize) -> bool {
        if self.role == Role::Reader {
            return self.reader_lease_holds();
        }
        if self.planted(PlantedBug::ReadWithoutLease) {
            return true;
        }
        let group = &self.groups[g];
        if group.recovering {
            return false;
        }
        let soon = self.now.after(self.config.lease / 4);
        let mut holds = true;
        for peer in group.needed().iter() {
            let until = self.peers[peer as usize].lease_until;
            if until <= self.now {
                holds = false;
            }
            if until <= soon {
                self.ping(peer);
            }
        }
        holds
    }
}
