//! Hand-over: a new process takes the devices of a running one, connection by connection, so that the
//! kernel never sees a dead socket.
//!
//! | old process | new process |
//! |---|---|
//! | listens on `handover.sock` in the state directory | finds the lock taken, connects, says [`HELLO`] |
//! | per volume: flushes, stops at the end of a request, answers what is under way, closes the volume, notes the epoch, sends record and sockets | opens the volume, goes on with the sockets |
//! | sends the end, exits | takes the lock, then the records that nobody passed |
//!
//! A message is two lengths (32 bits each, little-endian), a header in JSON, and a body: what came in on the
//! sockets and belongs to requests not begun. Sockets travel with the lengths (SCM_RIGHTS).
//!
//! Invariants:
//! - A volume is passed only after it was closed cleanly and the epoch of that is in its record: whoever
//!   opens it next can tell whether anybody was in between.
//! - Whatever fails, the sockets are dropped and the device waits for the crash path: no error is answered.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::attachments::{Attachment, Attachments, State};
use super::record::Record;
use crate::client::{Ended, PassedSocket};
use crate::engine::ClientOp;
use crate::nbd::Negotiated;

/// What the new process says first: a version.
pub const HELLO: &[u8; 8] = b"ASHLHO01";
/// Longest header.
const HEADER_MAX: u32 = 64 * 1024;
/// Longest body: what sixteen connections may have received.
const BODY_MAX: u32 = 256 * 1024 * 1024;
/// Most sockets of a volume.
const SOCKETS_MAX: usize = 64;
/// Time for either side to say the next thing.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Time for operations under way and for devices that are being taken back, before volumes are passed. With the
/// time for the steps of a volume it stays below [`SILENCE_MAX`]. All is served meanwhile.
const OPERATIONS_TIMEOUT: Duration = Duration::from_secs(10);
const OPERATIONS_POLL: Duration = Duration::from_millis(10);
/// Time for a volume's first flush, which is only to make the second a short one.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for requests under way, and for closing: longer, and the crash path is as quick.
const STEP_TIMEOUT: Duration = Duration::from_secs(3);

/// Where the old process listens.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("handover.sock")
}

#[derive(Serialize, Deserialize, Debug)]
#[serde(tag = "message", rename_all = "kebab-case")]
enum Header {
    /// A volume; of each socket the length of what it received, and whether its replies are structured and its
    /// block status negotiated (a former version does not say so, and has only the kernel's sockets).
    Volume {
        record: Box<Record>,
        received: Vec<u32>,
        #[serde(default)]
        negotiated: Vec<(bool, bool)>,
    },
    /// Nothing follows.
    End,
}

/// A volume with its connections.
#[derive(Debug)]
pub struct Passed {
    /// Its record.
    pub record: Record,
    /// Its connections.
    pub sockets: Vec<PassedSocket>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("hand-over: {what}"))
}

/// Sends one message; `None` is the end.
fn send(mut stream: &UnixStream, passed: Option<&Passed>) -> io::Result<()> {
    let (header, sockets) = match passed {
        None => (Header::End, &[][..]),
        Some(passed) => {
            let lengths = passed.sockets.iter().map(|s| s.received.len() as u32);
            let negotiated = passed.sockets.iter().map(|s| s.negotiated);
            let negotiated = negotiated.map(|n| (n.structured, n.base_allocation));
            let header = Header::Volume {
                record: Box::new(passed.record.clone()),
                received: lengths.collect(),
                negotiated: negotiated.collect(),
            };
            (header, &passed.sockets[..])
        }
    };
    let header = serde_json::to_vec(&header)?;
    let body: usize = sockets.iter().map(|s| s.received.len()).sum();
    let mut lengths = (header.len() as u32).to_le_bytes().to_vec();
    lengths.extend_from_slice(&(body as u32).to_le_bytes());
    let fds: Vec<_> = sockets.iter().map(|s| s.socket.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(invalid("too many sockets"));
    }
    let sent = rustix::net::sendmsg(
        stream,
        &[IoSlice::new(&lengths)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    stream.write_all(&lengths[sent..])?;
    stream.write_all(&header)?;
    for socket in sockets {
        stream.write_all(&socket.received)?;
    }
    Ok(())
}

/// Receives one message; `None` is the end.
fn receive(mut stream: &UnixStream) -> io::Result<Option<Passed>> {
    let mut lengths = [0_u8; 8];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        stream,
        &mut [IoSliceMut::new(&mut lengths)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut sockets: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            sockets.extend(fds);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(invalid("sockets were lost"));
    }
    stream.read_exact(&mut lengths[received.bytes..])?;
    let [a, b, c, d, e, f, g, h] = lengths;
    let (header_length, body_length) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    if header_length > HEADER_MAX || body_length > BODY_MAX {
        return Err(invalid("a message is too long"));
    }
    let mut header = vec![0; header_length as usize];
    stream.read_exact(&mut header)?;
    let mut body = vec![0; body_length as usize];
    stream.read_exact(&mut body)?;
    let mut body = Bytes::from(body);
    match serde_json::from_slice(&header)? {
        Header::End => Ok(None),
        Header::Volume {
            record,
            received,
            negotiated,
        } => {
            let total: u64 = received.iter().map(|n| u64::from(*n)).sum();
            if received.len() != sockets.len() || total != body.len() as u64 {
                return Err(invalid("the parts of a message do not fit together"));
            }
            let sockets =
                sockets
                    .into_iter()
                    .zip(received)
                    .enumerate()
                    .map(|(at, (socket, length))| {
                        let (structured, base_allocation) =
                            negotiated.get(at).copied().unwrap_or_default();
                        PassedSocket {
                            socket,
                            received: body.split_to(length as usize),
                            negotiated: Negotiated {
                                structured,
                                base_allocation,
                            },
                        }
                    });
            Ok(Some(Passed {
                record: *record,
                sockets: sockets.collect(),
            }))
        }
    }
}

/// Asks the process that has the state directory for its volumes: each comes through the channel, which
/// ends when that process has no more. Blocks until it has agreed.
///
/// # Errors
/// If nobody listens there.
pub(super) fn ask(state_dir: &Path) -> io::Result<mpsc::Receiver<Passed>> {
    let mut stream = UnixStream::connect(path(state_dir))?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    stream.write_all(HELLO)?;
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        loop {
            match receive(&stream) {
                Ok(Some(passed)) => {
                    if sender.blocking_send(passed).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "a hand-over was cut short: the rest is taken back as after a crash");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("hand-over".into())
        .spawn(read)?;
    Ok(receiver)
}

impl Attachments {
    /// Serves one hand-over; true if everything that could be passed was, and this process is to end.
    pub(super) async fn hand_over(&self, stream: UnixStream) -> bool {
        let greeted = tokio::task::spawn_blocking(move || {
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            let mut hello = [0; HELLO.len()];
            (&stream).read_exact(&mut hello)?;
            if hello == *HELLO {
                Ok(stream)
            } else {
                Err(invalid("the other process speaks another version"))
            }
        });
        let stream = match greeted.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::warn!(%error, "refused a hand-over");
                return false;
            }
            Err(_) => return false,
        };
        self.refuse_operations();
        let until = tokio::time::Instant::now() + OPERATIONS_TIMEOUT;
        // What was itself only just handed over may not be open yet: to let it go now would drop connections that are alive.
        while (self.operations() > 0 || self.is_recovering()) && tokio::time::Instant::now() < until
        {
            tokio::time::sleep(OPERATIONS_POLL).await;
        }
        let (sender, mut ready) = mpsc::channel::<Passed>(1);
        let sending = tokio::task::spawn_blocking(move || {
            while let Some(passed) = ready.blocking_recv() {
                // If it fails the sockets are dropped here, and the kernel waits for the crash path.
                send(&stream, Some(&passed))?;
            }
            send(&stream, None)
        });
        let mut passing = tokio::task::JoinSet::new();
        for attachment in self.list(None) {
            let (this, sender) = (self.clone(), sender.clone());
            passing.spawn(async move {
                if let Some(passed) = this.part_with(attachment).await {
                    // The sender ended: so do the sockets.
                    let _ = sender.send(passed).await;
                }
            });
        }
        drop(sender);
        while passing.join_next().await.is_some() {}
        match sending.await {
            Ok(Ok(())) => tracing::info!("everything is handed over"),
            Ok(Err(error)) => tracing::error!(%error, "a hand-over failed; devices wait"),
            Err(error) => tracing::error!(%error, "a hand-over failed; devices wait"),
        }
        true
    }

    /// Closes a volume whose connections go to the next process.
    async fn part_with(&self, attachment: Attachment) -> Option<Passed> {
        if let Some(supervisor) = &attachment.supervisor {
            supervisor.abort();
        }
        let hosted = attachment.hosted.as_ref()?;
        let volume = &attachment.record.volume;
        if attachment.state != State::Attached {
            hosted.abandon().await;
            return None;
        }
        // Most of what is to be durable becomes so while requests are still served.
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, hosted.ask(ClientOp::Flush)).await;
        let started = std::time::Instant::now();
        let sockets = tokio::time::timeout(STEP_TIMEOUT, hosted.release()).await;
        let Ok(sockets) = sockets else {
            tracing::warn!(volume, "requests are not answered: not handed over");
            hosted.abandon().await;
            return None;
        };
        hosted.close().await;
        let ended = tokio::time::timeout(STEP_TIMEOUT, hosted.ended()).await;
        let Ok(Ended::Closed { epoch }) = ended else {
            tracing::warn!(volume, ?ended, "the volume does not close: not handed over");
            hosted.abandon().await;
            return None;
        };
        let mut record = attachment.record.clone();
        record.closed_epoch = Some(epoch);
        if let Err(error) = self.shared.records.save(&record) {
            tracing::error!(volume, %error, "cannot note that a volume was closed: not handed over");
            return None;
        }
        tracing::info!(
            volume,
            sockets = sockets.len(),
            bytes = sockets.iter().map(|s| s.received.len()).sum::<usize>(),
            microseconds = started.elapsed().as_micros() as u64,
            "handing over"
        );
        Some(Passed { record, sockets })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use ashlar_proto::ids::VolumeId;

    use super::super::record::Kind;
    use super::*;

    fn passed(received: &[&[u8]]) -> (Passed, Vec<UnixStream>) {
        let mut others = Vec::new();
        let sockets = received.iter().map(|bytes| {
            let (a, b) = UnixStream::pair().unwrap();
            others.push(b);
            PassedSocket {
                socket: a.into(),
                received: Bytes::copy_from_slice(bytes),
                negotiated: Negotiated {
                    structured: bytes.is_empty(),
                    base_allocation: false,
                },
            }
        });
        let sockets = sockets.collect();
        let record = Record {
            volume_id: VolumeId::generate(),
            volume: "v".into(),
            kind: Kind::Nbd,
            boot_id: "b".into(),
            index: Some(1),
            read_only: false,
            block_size: 512,
            connections: 2,
            attached_unix_ms: 0,
            fenced: None,
            closed_epoch: Some(9),
        };
        (Passed { record, sockets }, others)
    }

    #[test]
    fn sockets_and_what_they_received_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let big = vec![7_u8; 3_000_000];
        let (first, mut first_others) = passed(&[b"", &big]);
        let (second, _second_others) = passed(&[]);
        let records = [first.record.clone(), second.record.clone()];
        let sender = std::thread::spawn(move || {
            send(&ours, Some(&first)).unwrap();
            send(&ours, Some(&second)).unwrap();
            send(&ours, None).unwrap();
        });
        let got = receive(&theirs).unwrap().unwrap();
        assert_eq!(got.record, records[0]);
        assert_eq!(got.sockets.len(), 2);
        assert!(got.sockets[0].received.is_empty() && got.sockets[1].received == big);
        assert!(got.sockets[0].negotiated.structured && !got.sockets[1].negotiated.structured);
        assert_eq!(receive(&theirs).unwrap().unwrap().record, records[1]);
        assert!(receive(&theirs).unwrap().is_none());
        sender.join().unwrap();
        // They are the sockets that they were.
        rustix::io::write(&got.sockets[1].socket, b"hello").unwrap();
        let mut text = [0; 5];
        first_others[1].read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
    }

    #[test]
    fn a_message_that_is_cut_short_passes_nothing() {
        let (whole, mut sink) = UnixStream::pair().unwrap();
        let (volume, _others) = passed(&[b"abc"]);
        send(&whole, Some(&volume)).unwrap();
        drop(whole);
        let mut bytes = Vec::new();
        sink.read_to_end(&mut bytes).unwrap();
        for cut in [0, 4, 8, bytes.len() - 1] {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(&bytes[..cut]).unwrap();
            drop(ours);
            assert!(receive(&theirs).is_err(), "{cut}");
        }
        // All of it, but without the sockets.
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&bytes).unwrap();
        assert!(receive(&theirs).is_err());
    }

    #[test]
    fn lengths_that_nobody_sends_are_refused_before_memory_is_taken() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&[0xff; 8]).unwrap();
        assert!(
            receive(&theirs)
                .unwrap_err()
                .to_string()
                .contains("too long")
        );
    }
}
