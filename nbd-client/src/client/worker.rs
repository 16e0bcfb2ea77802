//! One reactor thread: its volumes, their NBD connections and its connections to disks.
//!
//! All events of one wait are handled before anything is sent, so that what they cause leaves in few
//! batches.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use ashlar_platform::clock::{self, Time};
use ashlar_platform::reactor::{ConnId, Event, ListenerId, Reactor};
use ashlar_proto::ids::VolumeId;
use rustc_hash::FxHashMap;
use tokio::sync::mpsc;

use super::export::Export;
use super::links::{LinkOutput, Links};
use super::messages::{Endpoint, FromWorker, PassedSocket, ToWorker, VolumeSetup};
use super::stats::{VolumeStats, volume_stats};
use super::worker_handle::WorkerConfig;
use crate::engine::{SessionCommand, SessionEvent};

/// How soon messages for a full control channel are tried again.
const OUTBOX_RETRY: Duration = Duration::from_millis(10);

/// The thread's state.
pub(super) struct Worker {
    config: WorkerConfig,
    reactor: Reactor,
    inbox: mpsc::Receiver<ToWorker>,
    control: mpsc::Sender<FromWorker>,
    outbox: VecDeque<FromWorker>,
    links: Links,
    exports: Vec<Option<Box<Export>>>,
    /// Positions in `exports` of volumes that are gone.
    vacant: Vec<usize>,
    by_volume: FxHashMap<VolumeId, usize>,
    by_listener: FxHashMap<ListenerId, usize>,
    /// Volume (position in `exports`) of each NBD connection.
    nbd: FxHashMap<ConnId, usize>,
    positions: HashMap<usize, usize>,
    touched: Vec<usize>,
    unflushed: Vec<usize>,
    timers: BTreeSet<(Time, usize)>,
    pending: VecDeque<(usize, SessionEvent)>,
    shutting_down: bool,
    inbox_closed: bool,
}

impl Worker {
    pub(super) fn new(
        config: WorkerConfig,
        reactor: Reactor,
        inbox: mpsc::Receiver<ToWorker>,
        control: mpsc::Sender<FromWorker>,
    ) -> Self {
        let links = Links::new(config.client, config.local_sockets.clone());
        Self {
            config,
            reactor,
            inbox,
            control,
            outbox: VecDeque::new(),
            links,
            exports: Vec::new(),
            vacant: Vec::new(),
            by_volume: FxHashMap::default(),
            by_listener: FxHashMap::default(),
            nbd: FxHashMap::default(),
            positions: HashMap::new(),
            touched: Vec::new(),
            unflushed: Vec::new(),
            timers: BTreeSet::new(),
            pending: VecDeque::new(),
            shutting_down: false,
            inbox_closed: false,
        }
    }

    /// Runs until it is told to shut down, or nobody can tell it anything any more.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = Vec::new();
        loop {
            let deadline = self.deadline();
            self.reactor.wait(deadline, &mut events)?;
            let now = clock::now();
            for event in events.drain(..) {
                self.event(now, event);
            }
            self.tick(now);
            self.settle(now);
            self.send_outbox();
            let ended = self.exports.iter().all(Option::is_none);
            if (self.shutting_down || self.inbox_closed) && ended && self.outbox.is_empty() {
                return Ok(());
            }
        }
    }

    fn deadline(&self) -> Option<Time> {
        let volumes = self.timers.first().map(|(at, _)| *at);
        let outbox = (!self.outbox.is_empty()).then(|| clock::now().after(OUTBOX_RETRY));
        [volumes, self.links.next_deadline(), outbox]
            .into_iter()
            .flatten()
            .min()
    }

    fn event(&mut self, now: Time, event: Event) {
        match event {
            Event::Accepted { listener, conn } => match self.by_listener.get(&listener) {
                Some(&at) => self.accepted(now, at, conn),
                None => self.reactor.close(conn),
            },
            Event::Connected { conn } => self.links.connected(now, &mut self.reactor, conn),
            Event::Received { conn } => self.received(now, conn),
            Event::Sent { conn } => {
                // A client that takes its replies again may go on.
                if let Some(&at) = self.nbd.get(&conn) {
                    if let Some(export) = &mut self.exports[at] {
                        export.sent(conn);
                    }
                    self.touch(at);
                }
            }
            Event::Closed { conn, error } => {
                if let Some(at) = self.nbd.remove(&conn) {
                    if let Some(export) = &mut self.exports[at] {
                        export.closed(conn);
                    }
                    self.touch(at);
                } else if let Some(disk) = self.links.disk_of(conn) {
                    // Answers that arrived with the end of the stream still count.
                    self.received(now, conn);
                    let why = error.map_or("closed by the disk's daemon".into(), |e| e.to_string());
                    self.links.fail(now, &mut self.reactor, disk, &why);
                }
            }
            Event::Released {
                conn,
                socket,
                received,
            } => {
                if let Some(at) = self.nbd.remove(&conn) {
                    if let Some(export) = &mut self.exports[at] {
                        export.released(conn, socket, received);
                    }
                    self.touch(at);
                }
            }
            Event::Woken => self.read_inbox(now),
            Event::Disk { .. } => {}
        }
        self.take_link_output();
    }

    fn accepted(&mut self, now: Time, at: usize, conn: ConnId) {
        if let Some(export) = &mut self.exports[at]
            && export.accept(now, conn, &mut self.reactor)
        {
            self.nbd.insert(conn, at);
            self.touch(at);
        }
    }

    fn received(&mut self, now: Time, conn: ConnId) {
        if let Some(&at) = self.nbd.get(&conn) {
            if let Some(export) = &mut self.exports[at]
                && export.serving
            {
                export.pump(now, conn, &mut self.reactor);
            }
            self.touch(at);
            return;
        }
        while let Some((disk, reply)) = self.links.next_reply(now, &mut self.reactor, conn) {
            if let Some(&at) = self.by_volume.get(&reply.volume)
                && self.links.is_user(disk, at)
                && let Some(export) = &mut self.exports[at]
            {
                export.step(now, SessionEvent::Reply { disk, reply });
                self.touch(at);
            }
        }
    }

    fn take_link_output(&mut self) {
        for output in self.links.output.drain(..) {
            match output {
                LinkOutput::Up(at, disk) => {
                    self.pending
                        .push_back((at, SessionEvent::ReplicaUp { disk }));
                }
                LinkOutput::Down(at, disk) => {
                    self.pending
                        .push_back((at, SessionEvent::ReplicaDown { disk }));
                }
                LinkOutput::Resolve(disk, address) => self.outbox.push_back(FromWorker::Resolve {
                    worker: self.config.number,
                    disk,
                    address,
                }),
            }
        }
    }

    fn touch(&mut self, at: usize) {
        if let Some(export) = &mut self.exports[at]
            && !export.touched
        {
            export.touched = true;
            self.touched.push(at);
        }
    }

    fn read_inbox(&mut self, now: Time) {
        loop {
            match self.inbox.try_recv() {
                Ok(message) => self.message(now, message),
                Err(mpsc::error::TryRecvError::Empty) => return,
                Err(mpsc::error::TryRecvError::Disconnected) => {
                    self.inbox_closed = true;
                    return;
                }
            }
        }
    }

    fn message(&mut self, now: Time, message: ToWorker) {
        match message {
            ToWorker::Add(setup) => self.add(*setup),
            ToWorker::Cluster(cluster) => self.links.set_cluster(cluster),
            ToWorker::Session { index, event } => {
                if let Some(&at) = self.positions.get(&index) {
                    self.pending.push_back((at, *event));
                }
            }
            ToWorker::Resolved { disk, address } => {
                self.links.resolved(now, &mut self.reactor, disk, address);
            }
            ToWorker::Stats { reset, reply } => {
                let stats = self.stats(now, reset);
                // The asker may have gone away meanwhile.
                let _ = reply.send(stats);
            }
            ToWorker::Adopt { index, sockets } => self.adopt(index, sockets),
            ToWorker::Ask { index, op, reply } => {
                if let Some(at) = self.find(index)
                    && let Some(export) = &mut self.exports[at]
                {
                    export.ask(now, op, reply);
                }
            }
            ToWorker::Release { index, reply } => {
                if let Some(at) = self.find(index)
                    && let Some(export) = &mut self.exports[at]
                {
                    export.release(reply, &mut self.reactor);
                }
            }
            ToWorker::Close { index } => {
                let until = now.after(self.config.drain_timeout);
                if let Some(at) = self.find(index)
                    && let Some(export) = &mut self.exports[at]
                {
                    export.drain(until, &mut self.reactor);
                }
            }
            ToWorker::Abandon { index } => {
                if let Some(at) = self.find(index)
                    && let Some(mut export) = self.exports[at].take()
                {
                    self.forget(now, at, &mut export);
                    self.outbox.push_back(FromWorker::Abandoned { index });
                }
            }
            ToWorker::Shutdown => {
                self.shutting_down = true;
                let until = now.after(self.config.drain_timeout);
                for at in 0..self.exports.len() {
                    if let Some(export) = &mut self.exports[at] {
                        export.drain(until, &mut self.reactor);
                    }
                    self.touch(at);
                }
            }
        }
    }

    /// Position of a volume, which is going to be looked at.
    fn find(&mut self, index: usize) -> Option<usize> {
        let at = self.positions.get(&index).copied()?;
        self.touch(at);
        Some(at)
    }

    fn adopt(&mut self, index: usize, sockets: Vec<PassedSocket>) {
        let Some(at) = self.find(index) else { return };
        let Some(export) = &mut self.exports[at] else {
            return;
        };
        for passed in sockets {
            if !export.may_adopt() {
                return;
            }
            match self.reactor.adopt_with(passed.socket, &passed.received) {
                Ok(conn) => {
                    export.adopt(conn, passed.negotiated);
                    self.nbd.insert(conn, at);
                }
                Err(error) => {
                    tracing::warn!(volume = export.info.name, %error, "cannot take a connection over");
                }
            }
        }
    }

    fn add(&mut self, setup: VolumeSetup) {
        let index = setup.index;
        let at = self.vacant.last().copied().unwrap_or(self.exports.len());
        let mut export = Export::new(setup);
        if self.shutting_down || self.by_volume.contains_key(&export.volume) {
            let error = "the volume is served already, or the process is ending".to_owned();
            self.outbox.push_back(FromWorker::Failed { index, error });
            return;
        }
        match self.listen(&export.endpoint) {
            Ok((listener, address)) => {
                export.listener = listener;
                self.by_listener.extend(listener.map(|l| (l, at)));
                self.outbox
                    .push_back(FromWorker::Listening { index, address });
            }
            Err(error) => {
                let error = error.to_string();
                self.outbox.push_back(FromWorker::Failed { index, error });
                return;
            }
        }
        self.by_volume.insert(export.volume, at);
        self.positions.insert(index, at);
        let export = Some(Box::new(export));
        if self.vacant.pop().is_some() {
            self.exports[at] = export;
        } else {
            self.exports.push(export);
        }
        self.pending.push_back((at, SessionEvent::Start));
    }

    fn listen(
        &mut self,
        endpoint: &Endpoint,
    ) -> io::Result<(Option<ListenerId>, Option<SocketAddr>)> {
        match endpoint {
            Endpoint::Given => Ok((None, None)),
            Endpoint::Unix(path) => {
                let listener = self.reactor.listen_unix(path)?;
                // Whoever may open the socket owns the volume's data.
                if let Err(error) =
                    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
                {
                    self.reactor.close_listener(listener);
                    return Err(error);
                }
                Ok((Some(listener), None))
            }
            Endpoint::Tcp(address) => {
                let (listener, actual) = self.reactor.listen_tcp(*address)?;
                Ok((Some(listener), Some(actual)))
            }
        }
    }

    fn tick(&mut self, now: Time) {
        self.links.tick(now, &mut self.reactor);
        self.take_link_output();
        while let Some(&(due, at)) = self.timers.first()
            && due <= now
        {
            self.timers.pop_first();
            if let Some(export) = &mut self.exports[at] {
                export.deadline = None;
                export.tick(now, &mut self.reactor);
            }
            self.touch(at);
        }
    }

    /// Carries out commands and delivers what they cause until nothing is left; then sends.
    fn settle(&mut self, now: Time) {
        loop {
            while let Some((at, event)) = self.pending.pop_front() {
                if let Some(export) = &mut self.exports[at] {
                    export.step(now, event);
                }
                self.touch(at);
            }
            let Some(at) = self.touched.pop() else { break };
            self.settle_one(now, at);
            self.take_link_output();
        }
        for at in std::mem::take(&mut self.unflushed) {
            self.flush_one(now, at);
        }
        self.links.flush(&mut self.reactor);
        if !self.touched.is_empty() || !self.pending.is_empty() {
            self.settle(now);
        }
    }

    fn settle_one(&mut self, now: Time, at: usize) {
        let Some(mut export) = self.exports[at].take() else {
            return;
        };
        export.touched = false;
        let mut commands = std::mem::take(&mut export.commands);
        let mut stopped = false;
        for command in commands.drain(..) {
            stopped |= self.execute(now, at, &mut export, command);
            if stopped {
                break;
            }
        }
        if stopped {
            return;
        }
        let mut again = !export.commands.is_empty();
        if !again {
            export.commands = commands;
        }
        // After the replies: they may be what a stalled connection waits for, and no other event need follow.
        again |= export.pump_stalled(now, &mut self.reactor);
        self.exports[at] = Some(export);
        self.unflushed.push(at);
        if again {
            self.touch(at);
        }
    }

    /// True if the volume has stopped, and is to be forgotten.
    fn execute(
        &mut self,
        now: Time,
        at: usize,
        export: &mut Export,
        command: SessionCommand,
    ) -> bool {
        match command {
            SessionCommand::Send { disk, request } => self.links.send(disk, &request),
            SessionCommand::Reply { tag, result } => export.reply(now, tag, result),
            SessionCommand::Connect { disk, address } => {
                self.links
                    .connect(now, &mut self.reactor, at, disk, address);
            }
            SessionCommand::Disconnect { disk } => {
                self.links.disconnect(now, &mut self.reactor, at, disk);
                // No ReplicaDown follows, not even one that was on its way.
                self.take_link_output();
                self.pending.retain(|(user, event)| {
                    let down = matches!(event, SessionEvent::ReplicaDown { disk: d } if *d == disk);
                    !(down && *user == at)
                });
            }
            SessionCommand::Metadata(request) => {
                self.outbox.push_back(FromWorker::Metadata {
                    index: export.index,
                    request,
                });
            }
            SessionCommand::Serving { size_bytes } => {
                export.start_serving(now, size_bytes, &mut self.reactor);
                self.tell_serving(export);
            }
            SessionCommand::Resized { size_bytes } => {
                export.info.size_bytes = size_bytes;
                self.tell_serving(export);
            }
            SessionCommand::Stopped { reason } => {
                self.forget(now, at, export);
                self.outbox.push_back(FromWorker::Stopped {
                    index: export.index,
                    reason,
                });
                return true;
            }
        }
        false
    }

    fn tell_serving(&mut self, export: &Export) {
        self.outbox.push_back(FromWorker::Serving {
            index: export.index,
            size_bytes: export.info.size_bytes,
        });
    }

    /// Removes every trace of a volume that has stopped; its position may be used again.
    fn forget(&mut self, now: Time, at: usize, export: &mut Export) {
        export.stop(&mut self.reactor);
        self.links.forget(now, &mut self.reactor, at);
        self.take_link_output();
        self.nbd.retain(|_, user| *user != at);
        self.by_listener.retain(|_, user| *user != at);
        self.by_volume.remove(&export.volume);
        self.positions.remove(&export.index);
        self.timers.retain(|(_, user)| *user != at);
        self.pending.retain(|(user, _)| *user != at);
        self.vacant.push(at);
    }

    fn flush_one(&mut self, now: Time, at: usize) {
        let Some(export) = &mut self.exports[at] else {
            return;
        };
        export.flush(&mut self.reactor);
        if export.wants_close() {
            export.step(now, SessionEvent::Close);
            self.touch(at);
        }
        let Some(export) = &mut self.exports[at] else {
            return;
        };
        for conn in export.gone.drain(..) {
            self.nbd.remove(&conn);
        }
        let count = export.peer_count();
        if export.told_connections != count {
            export.told_connections = count;
            self.outbox.push_back(FromWorker::Connections {
                index: export.index,
                count,
            });
        }
        let due = export.next_deadline();
        if export.deadline != due {
            if let Some(old) = export.deadline {
                self.timers.remove(&(old, at));
            }
            export.deadline = due;
            self.timers.extend(due.map(|due| (due, at)));
        }
    }

    fn send_outbox(&mut self) {
        while let Some(message) = self.outbox.pop_front() {
            match self.control.try_send(message) {
                Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
                Err(mpsc::error::TrySendError::Full(message)) => {
                    self.outbox.push_front(message);
                    return;
                }
            }
        }
    }

    fn stats(&mut self, now: Time, reset: bool) -> Vec<VolumeStats> {
        let links = &self.links;
        self.exports
            .iter_mut()
            .flatten()
            .map(|e| volume_stats(e, links, now, reset))
            .collect()
    }
}
