//! How the connections of a volume end: one that is closed, all of them given back to the kernel or to another
//! process, all of them ended when the volume is closed.
//!
//! Invariants:
//! - A connection is given back only when nothing of it is under way, at the border of two requests.
//! - A request of which parts are missing when the volume closes is never answered: its connection ends.

use std::os::fd::OwnedFd;

use ashlar_platform::clock::Time;
use ashlar_platform::reactor::{ConnId, Reactor};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::export::Export;
use super::messages::{Endpoint, PassedSocket};

/// Connections that are being given back.
pub(super) struct Release {
    passed: Vec<PassedSocket>,
    reply: oneshot::Sender<Vec<PassedSocket>>,
}

impl Export {
    /// Gives all connections back, each as soon as nothing of it is under way.
    pub fn release(&mut self, reply: oneshot::Sender<Vec<PassedSocket>>, reactor: &mut Reactor) {
        self.release = Some(Release {
            passed: Vec::new(),
            reply,
        });
        for (conn, peer) in &mut self.peers {
            if !peer.is_amid_request() {
                reactor.pause_receive(*conn);
            }
            if !peer.dirty {
                peer.dirty = true;
                self.dirty.push(*conn);
            }
        }
        self.finish_release();
    }

    /// The reactor has given a connection's socket back.
    pub fn released(&mut self, conn: ConnId, socket: OwnedFd, received: Bytes) {
        // First, for the release ends with the last peer.
        if let (Some(release), Some(peer)) = (&mut self.release, self.peers.get(&conn)) {
            let negotiated = peer.protocol.negotiated();
            release.passed.push(PassedSocket {
                socket,
                received,
                negotiated,
            });
        }
        self.closed(conn);
    }

    fn finish_release(&mut self) {
        if self.peers.is_empty()
            && let Some(release) = self.release.take()
        {
            // Nobody takes them: they are closed.
            let _ = release.reply.send(release.passed);
        }
    }

    /// A connection is gone.
    pub fn closed(&mut self, conn: ConnId) {
        self.waiting.retain(|c| *c != conn);
        if let Some(peer) = self.peers.remove(&conn) {
            for slot in [peer.writing, peer.splitting.map(|s| s.slot())]
                .into_iter()
                .flatten()
            {
                self.requests.abandon(slot);
            }
        }
        self.finish_release();
    }

    pub(super) fn drop_peer(&mut self, conn: ConnId, reactor: &mut Reactor) {
        self.closed(conn);
        self.gone.push(conn);
        reactor.close(conn);
    }

    pub(super) fn drop_all(&mut self, reactor: &mut Reactor) {
        let conns: Vec<ConnId> = self.peers.keys().chain(&self.waiting).copied().collect();
        for conn in conns {
            self.drop_peer(conn, reactor);
        }
    }

    /// Shuts down: no new requests; those under way are answered until `until`.
    pub fn drain(&mut self, until: Time, reactor: &mut Reactor) {
        if self.draining.is_some() {
            return;
        }
        self.draining = Some(until);
        self.close_listener(reactor);
        while let Some(conn) = self.waiting.front().copied() {
            self.drop_peer(conn, reactor);
        }
        let peers: Vec<(ConnId, Option<u32>, Option<u32>)> = self
            .peers
            .iter_mut()
            .map(|(conn, peer)| {
                let splitting = peer.splitting.take().map(|s| s.slot());
                (*conn, peer.writing.take(), splitting)
            })
            .collect();
        for (conn, writing, splitting) in peers {
            reactor.pause_receive(conn);
            // A request of which parts are missing will never be answered: its connection ends without.
            if writing.is_some() || splitting.is_some() {
                self.requests.abandon_all([writing, splitting]);
                self.drop_peer(conn, reactor);
            } else if let Some(peer) = self.peers.get_mut(&conn)
                && !peer.dirty
            {
                peer.dirty = true;
                self.dirty.push(conn);
            }
        }
    }

    /// While shutting down: whether the engine is now to be closed (true once).
    pub fn wants_close(&mut self) -> bool {
        let ready = self.draining.is_some() && self.peers.is_empty() && !self.close_asked;
        self.close_asked |= ready;
        ready
    }

    fn close_listener(&mut self, reactor: &mut Reactor) {
        if let Some(listener) = self.listener.take() {
            reactor.close_listener(listener);
            if let Endpoint::Unix(path) = &self.endpoint
                && let Err(error) = std::fs::remove_file(path)
            {
                tracing::warn!(path = %path.display(), %error, "cannot remove a socket file");
            }
        }
    }

    /// The engine has stopped: every connection is dropped without a reply.
    pub fn stop(&mut self, reactor: &mut Reactor) {
        self.close_listener(reactor);
        self.drop_all(reactor);
    }
}
