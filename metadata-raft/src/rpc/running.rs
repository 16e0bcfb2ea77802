//! A member from start to stop.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ashlar_proto::ids::ClusterId;
use ashlar_proto::rpc::metadata as pb;
use ashlar_proto::rpc::metadata::metadata_client::MetadataClient;
use ashlar_proto::rpc::metadata::metadata_server::MetadataServer;
use ashlar_proto::rpc::raft::raft_server::RaftServer as RaftService;
use openraft::async_runtime::WatchReceiver;
use openraft::{BasicNode, Instant as _};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use super::member::{MESSAGE_BYTES_MAX, Member, Role};
use super::service::Service;
use crate::model::{Command, Operation, RequestKey};
use crate::raft::codec::VALUE_BYTES_MAX;
use crate::raft::config::{Tuning, raft_config};
use crate::raft::log_store::LogStore;
use crate::raft::network::{NetworkFactory, channel};
use crate::raft::server::RaftServer;
use crate::raft::sled_engine::SledEngine;
use crate::raft::snapshot_file::SnapshotDirectory;
use crate::raft::state_machine::StateMachine;
use crate::raft::types::{MemberId, Raft};

/// A leader without a majority, or a follower without a leader, for this long is out of touch.
const OUT_OF_TOUCH: Duration = Duration::from_millis(2500);
/// How often that is looked at.
const TOUCH_PERIOD: Duration = Duration::from_millis(500);
/// Other initial members wait this long for the first one, each.
const BOOTSTRAP_PATIENCE: Duration = Duration::from_secs(3);
/// Between two attempts to join.
const JOIN_PAUSE: Duration = Duration::from_millis(500);
/// Time for open calls to end when the process stops.
const STOP_DEADLINE: Duration = Duration::from_secs(2);
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How to start a member.
#[derive(Clone, Debug)]
pub struct Options {
    /// This member's number, never reused.
    pub id: MemberId,
    /// Address to listen on; port 0: any.
    pub listen: SocketAddr,
    /// Address by which other members reach it; `None`: the one it listens on.
    pub advertise: Option<String>,
    /// Directory of its log and snapshots.
    pub data: PathBuf,
    /// The initial members, this one among them; ignored once the cluster exists.
    pub bootstrap: BTreeMap<MemberId, String>,
    /// Members of a cluster to join; ignored once joined.
    pub join: Vec<String>,
    /// A disk whose node is away for this long is lost: its replicas get others.
    pub replace_after: Duration,
    /// For tests.
    pub tuning: Tuning,
}

/// A member cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory or the listener.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The configuration contradicts itself.
    #[error("{0}")]
    Configuration(String),
    /// Consensus does not start.
    #[error("raft does not start: {0}")]
    Raft(String),
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    let what = what.into();
    move |source| StartError::Io { what, source }
}

/// A running member.
pub struct Running {
    /// The member.
    pub member: Arc<Member>,
    /// Where it listens.
    pub address: SocketAddr,
    role: watch::Sender<Role>,
    tasks: Vec<JoinHandle<()>>,
    server: JoinHandle<()>,
}

/// Time of the last message from a leader, in milliseconds since the start of the process.
struct Contact {
    started: Instant,
    last_ms: AtomicU64,
}

impl Running {
    /// Opens the data directory, starts consensus and serves.
    pub async fn start(options: Options) -> Result<Self, StartError> {
        if options.id == 0 {
            return Err(StartError::Configuration("--id must not be 0".to_owned()));
        }
        if !options.bootstrap.is_empty() && !options.bootstrap.contains_key(&options.id) {
            return Err(StartError::Configuration(
                "--bootstrap must name this member, too".to_owned(),
            ));
        }
        let data = &options.data;
        std::fs::create_dir_all(data)
            .map_err(io_error(format!("cannot create {}", data.display())))?;
        check_identity(&options)?;
        let log = data.join("log");
        let engine = SledEngine::open(&log).map_err(io_error(format!(
            "cannot open the log in {} (if it is damaged: remove this member, and add one with an empty directory under a \
             new id)",
            log.display()
        )))?;
        let store =
            LogStore::new(Arc::new(engine)).map_err(io_error("cannot start the log's thread"))?;
        let snapshots = data.join("snapshots");
        let directory = SnapshotDirectory::open(&snapshots)
            .map_err(io_error(snapshots.display().to_string()))?;
        let machine = StateMachine::open(directory.clone())
            .map_err(io_error(snapshots.display().to_string()))?;
        let shared = machine.shared();
        let listener = TcpListener::bind(options.listen)
            .await
            .map_err(io_error(format!("cannot listen on {}", options.listen)))?;
        let address = listener.local_addr().map_err(io_error("listener"))?;
        let config =
            raft_config(options.tuning).map_err(|e| StartError::Configuration(e.to_string()))?;
        let network = NetworkFactory::new(shared.clone());
        let raft = Raft::new(options.id, config, network, store, machine)
            .await
            .map_err(|e| StartError::Raft(e.to_string()))?;

        let (role, role_receiver) = watch::channel(Role::default());
        let member = Member::new(options.id, raft.clone(), shared.clone(), role_receiver);
        let contact = Arc::new(Contact {
            started: Instant::now(),
            last_ms: AtomicU64::new(0),
        });
        let heard = contact.clone();
        let raft_server = RaftServer::new(options.id, raft, shared, directory)
            .on_append(move || heard.last_ms.store(heard.now_ms(), Ordering::Relaxed));
        let server = serve(listener, member.clone(), raft_server);
        let advertise = options
            .advertise
            .clone()
            .unwrap_or_else(|| address.to_string());
        let tasks = vec![
            tokio::spawn(follow_role(member.clone(), role.clone(), contact)),
            tokio::spawn(super::repair_loop::run(member.clone())),
            tokio::spawn(super::move_loop::run(member.clone(), options.replace_after)),
            tokio::spawn(super::care_loop::run(member.clone())),
            tokio::spawn(super::snapshot_loop::run(member.clone())),
            tokio::spawn(super::schedule_loop::run(member.clone())),
            tokio::spawn(form_cluster(member.clone(), options, advertise)),
        ];
        tracing::info!(id = member.id, %address, "metadata member started");
        Ok(Self {
            member,
            address,
            role,
            tasks,
            server,
        })
    }

    /// Hands the leadership over, ends open calls and stops.
    pub async fn stop(self) {
        self.member.hand_over().await;
        self.finish().await;
    }

    /// Stops at once, as a crash would, but for the data that other threads still write.
    pub async fn kill(self) {
        self.server.abort();
        self.finish().await;
    }

    async fn finish(mut self) {
        self.role.send_modify(|r| r.stopping = true);
        for task in &self.tasks {
            task.abort();
        }
        if let Err(error) = self.member.raft.shutdown().await {
            tracing::error!(%error, "raft did not stop cleanly");
        }
        if tokio::time::timeout(STOP_DEADLINE, &mut self.server)
            .await
            .is_err()
        {
            self.server.abort();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.role.send_modify(|r| r.stopping = true);
    }
}

impl Contact {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A directory belongs to one member: another id must not adopt its votes.
fn check_identity(options: &Options) -> Result<(), StartError> {
    let path = options.data.join("id");
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim() == options.id.to_string() => Ok(()),
        Ok(text) => Err(StartError::Configuration(format!(
            "{} belongs to member {}, not {}",
            options.data.display(),
            text.trim(),
            options.id
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::write(&path, options.id.to_string())
                .map_err(io_error(path.display().to_string()))
        }
        Err(error) => Err(io_error(path.display().to_string())(error)),
    }
}

fn serve(listener: TcpListener, member: Arc<Member>, raft: RaftServer) -> JoinHandle<()> {
    let mut stopping = member.role.clone();
    let (health, health_service) = tonic_health::server::health_reporter();
    let reporting = member.clone().report_health(health);
    let metadata =
        MetadataServer::new(Service(member)).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let raft = RaftService::new(raft)
        .max_decoding_message_size(VALUE_BYTES_MAX)
        .max_encoding_message_size(VALUE_BYTES_MAX);
    let incoming = TcpIncoming::from(listener)
        .with_nodelay(Some(true))
        .with_keepalive(Some(KEEPALIVE));
    tokio::spawn(async move {
        let stop = async move {
            // A closed channel is a stop, too.
            let _ = stopping.wait_for(|r| r.stopping).await;
        };
        let serving = Server::builder()
            .add_service(health_service)
            .add_service(metadata)
            .add_service(raft)
            .serve_with_incoming_shutdown(incoming, stop);
        let served = tokio::select! {
            served = serving => served,
            never = async { reporting.await; pending::<Infallible>().await } => match never {},
        };
        if let Err(error) = served {
            tracing::error!(%error, "the gRPC server has ended");
        }
    })
}

/// Keeps `Role` current and does what a new leader does first.
async fn follow_role(member: Arc<Member>, role: watch::Sender<Role>, contact: Arc<Contact>) {
    let mut metrics = member.raft.server_metrics();
    let mut period = tokio::time::interval(TOUCH_PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let now = current_role(&member, &contact);
        let began = now.leading_term.is_some() && now.leading_term != role.borrow().leading_term;
        if began {
            member.liveness().begin(Instant::now());
            tracing::info!(term = now.leading_term, "this member leads now");
        }
        role.send_if_modified(|r| {
            let next = Role {
                stopping: r.stopping,
                ..now
            };
            let changed = *r != next;
            *r = next;
            changed
        });
        if role.borrow().leading_term.is_some() && member.shared.state().cluster().is_nil() {
            initialize_cluster(&member).await;
        }
        tokio::select! {
            changed = metrics.changed() => if changed.is_err() { return },
            _ = period.tick() => {}
        }
    }
}

fn current_role(member: &Member, contact: &Contact) -> Role {
    let metrics = member.raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let leader = metrics.current_leader.and_then(|id| {
        let address = metrics.membership_config.get_node(&id)?.addr.clone();
        Some((id, address))
    });
    let leads = leader.as_ref().is_some_and(|(id, _)| *id == member.id);
    drop(metrics);
    let in_touch = if leads {
        let all = member.raft.metrics();
        let acked = all.borrow_watched().last_quorum_acked;
        acked.is_some_and(|at| at.into_inner().elapsed() < OUT_OF_TOUCH)
    } else {
        let age = contact
            .now_ms()
            .saturating_sub(contact.last_ms.load(Ordering::Relaxed));
        leader.is_some() && u128::from(age) < OUT_OF_TOUCH.as_millis()
    };
    let leading_term = leads.then(|| member.raft.metrics().borrow_watched().current_term);
    Role {
        leader,
        leading_term,
        in_touch,
        stopping: false,
    }
}

async fn initialize_cluster(member: &Member) {
    let operation = Operation::InitializeCluster(ClusterId::generate());
    // A failure is tried again at the next look.
    let _ = member
        .propose(Command {
            request: RequestKey::generate(),
            operation,
        })
        .await;
}

/// Initializes a new cluster or joins an existing one, until this member belongs to one.
async fn form_cluster(member: Arc<Member>, options: Options, advertise: String) {
    if !options.bootstrap.is_empty() {
        let rank = options
            .bootstrap
            .keys()
            .position(|id| *id == options.id)
            .unwrap_or(0);
        let patience = BOOTSTRAP_PATIENCE * u32::try_from(rank).unwrap_or(0);
        tokio::time::sleep(patience).await;
        if member.raft.is_initialized().await.unwrap_or(true) {
            return;
        }
        let members: BTreeMap<MemberId, BasicNode> = options
            .bootstrap
            .iter()
            .map(|(id, address)| (*id, BasicNode::new(address)))
            .collect();
        if let Err(error) = member.raft.initialize(members).await {
            tracing::warn!(%error, "the cluster was initialized meanwhile");
        }
        return;
    }
    let mut peers = options.join.iter().cycle();
    while !is_voter(&member) {
        let Some(peer) = peers.next() else { return };
        if let Err(status) = ask_to_join(peer, options.id, &advertise).await {
            tracing::warn!(peer, message = status.message(), "cannot join yet");
        }
        tokio::time::sleep(JOIN_PAUSE).await;
    }
}

fn is_voter(member: &Member) -> bool {
    member
        .cluster()
        .members
        .iter()
        .any(|m| m.id == member.id && m.voter)
}

async fn ask_to_join(peer: &str, id: MemberId, address: &str) -> Result<(), tonic::Status> {
    let channel = channel(peer).map_err(|e| tonic::Status::invalid_argument(e.to_string()))?;
    let request = pb::AddMemberRequest {
        request_id: RequestKey::generate().0.to_vec(),
        id,
        address: address.to_owned(),
    };
    MetadataClient::new(channel)
        .add_member(request)
        .await
        .map(drop)
}
