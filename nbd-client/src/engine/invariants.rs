//! Invariants of a session, checked after every step in debug builds (tests, simulator).

use super::session::{Phase, Session};

impl Session {
    /// Panics if the session's state contradicts itself.
    pub(super) fn check_invariants(&self) {
        for (g, group) in self.groups.iter().enumerate() {
            assert!(
                group.targets.covers(group.counted),
                "a counted target is a target"
            );
            assert!(
                !group.targets.intersects(group.in_sync),
                "a target is not in sync"
            );
            if group.acknowledging && self.config_is_sound() {
                let failed = group
                    .needed()
                    .iter()
                    .find(|p| self.peers[*p as usize].failed);
                assert_eq!(
                    failed, None,
                    "group {g} acknowledges although a needed replica failed"
                );
                assert!(
                    !group.recovering,
                    "group {g} acknowledges while it recovers"
                );
            }
        }
        let lingering = self.writes.iter().filter(|(_, w)| w.done).count();
        assert_eq!(lingering, self.lingering, "lingering writes are counted");
        for (_, write) in self.writes.iter() {
            assert!(
                write.sent.covers(write.answered),
                "only who was asked answers"
            );
        }
        if self.phase == Phase::Serving {
            assert!(
                self.stats.retained_bytes < self.config.retained_bytes_max || self.flush.is_some(),
                "whoever admits nobody because of what is retained is flushing it"
            );
            assert!(
                self.waiting.is_empty(),
                "a serving session keeps nobody waiting"
            );
        }
    }

    /// Planted bugs break the invariants on purpose.
    fn config_is_sound(&self) -> bool {
        #[cfg(feature = "planted-bugs")]
        {
            self.config.planted_bug.is_none()
        }
        #[cfg(not(feature = "planted-bugs"))]
        {
            true
        }
    }
}
