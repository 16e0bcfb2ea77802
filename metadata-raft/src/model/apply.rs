//! Dispatch of commands, and those about the cluster, nodes, disks and pools.

use super::answers::Remembered;
use super::apply_volume::Purpose;
use super::cluster::{Disk, Node, Pool, PoolSpec};
use super::command::{Answer, Command, Operation, Refusal, Response};
use super::service::Part;
use super::{Change, State, validate};
use ashlar_proto::ids::{ClusterId, DiskId, VolumeId};

/// Volumes up to which debug builds check the whole state after each apply.
#[cfg(debug_assertions)]
const FULL_CHECK_VOLUMES_MAX: usize = 64;

/// Applies a command. A refusal changes nothing. A request that was already answered is not executed
/// again.
pub fn apply(state: &mut State, command: &Command) -> Response {
    let kind = command.operation.kind();
    if let Some(known) = state.answers.get(&command.request) {
        if known.kind != kind {
            return Err(Refusal::invalid(
                "request_id: it was used for another kind of request; draw a new one for every request",
            ));
        }
        return Ok(known.answer.clone());
    }
    let answer = execute(state, &command.operation)?;
    if !matches!(answer, Answer::Changed { applied: false, .. })
        && command.operation.is_remembered()
    {
        state.answers.insert(Remembered {
            request: command.request,
            kind,
            answer: answer.clone(),
        });
    }
    #[cfg(debug_assertions)]
    if state.volumes.len() <= FULL_CHECK_VOLUMES_MAX
        && let Err(broken) = super::check_state(state)
    {
        panic!("invariant broken by {command:?}: {broken}");
    }
    Ok(answer)
}

impl Operation {
    /// A number per variant.
    pub fn kind(&self) -> u8 {
        match self {
            Self::InitializeCluster(_) => 0,
            Self::RegisterNode(_) => 1,
            Self::RegisterDisk(_) => 2,
            Self::RemoveDisk(_) => 3,
            Self::CreatePool(_) => 4,
            Self::UpdatePool { .. } => 5,
            Self::DeletePool(_) => 6,
            Self::CreateVolume(_) => 7,
            Self::ResizeVolume { .. } => 8,
            Self::DeleteVolume(_) => 9,
            Self::OpenVolume(_) => 10,
            Self::CloseVolume { .. } => 11,
            Self::ChangeReplicas(_) => 12,
            Self::BeginRebuild { .. } => 13,
            Self::MoveReplica { .. } => 14,
            Self::ForgetGarbage(_) => 15,
            Self::RegisterAttacher(_) => 16,
            Self::PublishVolume { .. } => 17,
            Self::UnpublishVolume { .. } => 18,
            Self::SetVolumeFormat { .. } => 19,
            Self::JoinVolume(_) => 20,
            Self::ReserveSnapshots(_) => 21,
            Self::CommitSnapshots(_) => 22,
            Self::CancelSnapshots(_) => 23,
            Self::DeleteSnapshots(_) => 24,
            Self::ForgetSnapshots(_) => 25,
            Self::BeginRevert { .. } => 26,
            Self::OpenToRevert(_) => 27,
            Self::EndRevert { .. } => 28,
            Self::CloneVolume(_) => 29,
            Self::ReserveForClone(_) => 30,
            Self::FlattenVolume(_) => 31,
            Self::CutParent { .. } => 32,
            Self::SetFlattenPolicy { .. } => 33,
            Self::CreateSchedule(_) => 34,
            Self::PauseSchedule { .. } => 35,
            Self::DeleteSchedule(_) => 36,
            Self::RecordRun { .. } => 37,
            Self::OpenToCare(_) => 38,
            Self::SetService { .. } => 39,
        }
    }

    /// Whether answers are kept: not for what is idempotent by itself.
    fn is_remembered(&self) -> bool {
        !matches!(
            self,
            Self::InitializeCluster(_)
                | Self::RegisterNode(_)
                | Self::RegisterDisk(_)
                | Self::RegisterAttacher(_)
                | Self::ForgetGarbage(_)
                | Self::ReserveSnapshots(_)
                | Self::CancelSnapshots(_)
                | Self::ForgetSnapshots(_)
                | Self::ReserveForClone(_)
                | Self::CutParent { .. }
                | Self::SetFlattenPolicy { .. }
                | Self::CreateSchedule(_)
                | Self::PauseSchedule { .. }
                | Self::SetService { .. }
        )
    }
}

fn execute(state: &mut State, operation: &Operation) -> Response {
    match operation {
        Operation::InitializeCluster(id) => Ok(state.initialize(*id)),
        Operation::RegisterNode(node) => state.register_node(node),
        Operation::RegisterDisk(disk) => state.register_disk(disk),
        Operation::RemoveDisk(disk) => state.remove_disk(*disk),
        Operation::CreatePool(pool) => state.create_pool(pool),
        Operation::UpdatePool { name, spec } => state.update_pool(name, spec),
        Operation::DeletePool(name) => state.delete_pool(name),
        Operation::CreateVolume(create) => state.create_volume(create),
        Operation::ResizeVolume { volume, size_bytes } => state.resize_volume(*volume, *size_bytes),
        Operation::DeleteVolume(volume) => state.delete_volume(*volume),
        Operation::OpenVolume(open) => state.open_volume(open, Purpose::Use),
        Operation::OpenToRevert(open) => state.open_volume(open, Purpose::Revert),
        Operation::OpenToCare(open) => state.open_volume(open, Purpose::Care),
        Operation::CloseVolume {
            volume,
            client,
            epoch,
            clean,
        } => state.close_volume(*volume, *client, *epoch, *clean),
        Operation::ChangeReplicas(change) => state.change_replicas(change),
        Operation::BeginRebuild {
            volume,
            epoch,
            replicas,
        } => state.begin_rebuild(*volume, *epoch, replicas),
        Operation::MoveReplica { volume, from, to } => state.move_replica(*volume, *from, *to),
        Operation::ForgetGarbage(gone) => Ok(state.forget_garbage(gone)),
        Operation::RegisterAttacher(attacher) => state.register_attacher(attacher),
        Operation::PublishVolume { volume, node, mode } => {
            state.publish_volume(*volume, node, *mode)
        }
        Operation::UnpublishVolume { volume, node } => state.unpublish_volume(*volume, node),
        Operation::SetVolumeFormat { volume, format } => state.set_volume_format(*volume, format),
        Operation::JoinVolume(open) => state.join_volume(open),
        Operation::ReserveSnapshots(reserve) => state.reserve_snapshots(reserve, false),
        Operation::ReserveForClone(reserve) => state.reserve_snapshots(reserve, true),
        Operation::CommitSnapshots(commits) => state.commit_snapshots(commits),
        Operation::CancelSnapshots(ids) => state.cancel_snapshots(ids),
        Operation::DeleteSnapshots(ids) => state.delete_snapshots(ids),
        Operation::ForgetSnapshots(ids) => Ok(state.forget_snapshots(ids)),
        Operation::BeginRevert { volume, snapshot } => state.begin_revert(*volume, *snapshot),
        Operation::EndRevert {
            volume,
            snapshot,
            client,
            epoch,
        } => state.end_revert(*volume, *snapshot, *client, *epoch),
        Operation::CloneVolume(clone) => state.clone_volume(clone),
        Operation::FlattenVolume(volume) => state.flatten_volume(*volume),
        Operation::CutParent { volume, parent } => state.cut_parent(*volume, *parent),
        Operation::SetFlattenPolicy { pool, policy } => state.set_flatten_policy(pool, *policy),
        Operation::CreateSchedule(schedule) => state.create_schedule(schedule),
        Operation::PauseSchedule {
            name,
            paused,
            now_unix_ms,
        } => state.pause_schedule(name, *paused, *now_unix_ms),
        Operation::DeleteSchedule(name) => state.delete_schedule(name),
        Operation::RecordRun { schedule, run } => state.record_run(*schedule, run),
        Operation::SetService { part, service } => state.set_service(*part, *service),
    }
}

impl State {
    fn initialize(&mut self, id: ClusterId) -> Answer {
        if self.cluster.is_nil() {
            self.cluster = id;
        }
        Answer::Done
    }

    fn register_node(&mut self, node: &Node) -> Response {
        if node.id.is_nil() {
            return Err(Refusal::invalid("node_id: must not be zero"));
        }
        validate::name("name", &node.name)?;
        validate::labels("labels", &node.labels)?;
        validate::text("admin_address", &node.admin_address)?;
        let mut node = node.clone();
        if let Some(told) = self.attacher_labels.get(&node.name) {
            for (key, value) in told {
                // What a node that attaches told never keeps a storage daemon out.
                if node.labels.len() < validate::LABELS_MAX {
                    let label = node.labels.entry(key.clone());
                    label.or_insert_with(|| value.clone());
                }
            }
        }
        if let Some(other) = self
            .node_by_name(&node.name)
            .filter(|n| n.id != node.id)
            .cloned()
        {
            let disks = self
                .node_disks
                .range((other.id, DiskId([0; 16]))..=(other.id, DiskId([0xff; 16])));
            let count = disks.count();
            if count > 0 {
                return Err(Refusal::exists(format!(
                    "name: {} is the name of node {}, which still has {count} disks; start the daemon with that node's \
                     data directory, or under another name, or remove those disks first",
                    node.name, other.id
                )));
            }
            self.nodes.remove(&other.id);
            self.services.remove(&Part::Node(other.id));
            self.node_by_name.remove(&other.name);
        }
        self.insert_node(node.clone());
        Ok(Answer::Node(node))
    }

    pub(super) fn insert_node(&mut self, node: Node) {
        let (id, name) = (node.id, node.name.clone());
        if let Some(old) = self.nodes.insert(id, node) {
            self.node_by_name.remove(&old.name);
        }
        self.node_by_name.insert(name, id);
    }

    fn register_disk(&mut self, disk: &Disk) -> Response {
        if disk.id.is_nil() {
            return Err(Refusal::invalid("disk_id: must not be zero"));
        }
        if !self.nodes.contains_key(&disk.node) {
            return Err(Refusal::precondition(format!(
                "node_id: node {} is not registered; register the node first",
                disk.node
            )));
        }
        validate::text("path", &disk.path)?;
        validate::text("data_address", &disk.data_address)?;
        validate::labels("labels", &disk.labels)?;
        if self.disks.get(&disk.id) == Some(disk) {
            return Ok(Answer::Disk(disk.clone()));
        }
        if let Some(old) = self.disks.insert(disk.id, disk.clone()) {
            self.node_disks.remove(&(old.node, old.id));
        }
        self.node_disks.insert((disk.node, disk.id));
        self.note(Change::Disk(disk.id));
        Ok(Answer::Disk(disk.clone()))
    }

    fn remove_disk(&mut self, id: DiskId) -> Response {
        let Some(disk) = self.disks.get(&id) else {
            return Err(Refusal::not_found(format!(
                "disk {id} does not exist; see `ashlar disk list`"
            )));
        };
        let replicas = self.disk_use(id).replicas;
        if replicas > 0 {
            return Err(Refusal::precondition(format!(
                "disk {id} still holds {replicas} replicas; move them away with `ashlar disk evacuate` first"
            )));
        }
        self.node_disks.remove(&(disk.node, id));
        self.disks.remove(&id);
        self.services.remove(&Part::Disk(id));
        let (low, high) = ((id, VolumeId([0; 16])), (id, VolumeId([0xff; 16])));
        let gone: Vec<_> = self.garbage.range(low..=high).map(|(k, _)| *k).collect();
        for key in gone {
            self.garbage.remove(&key);
        }
        Ok(Answer::Done)
    }

    fn create_pool(&mut self, pool: &Pool) -> Response {
        validate::name("name", &pool.name)?;
        validate::pool_spec(&pool.spec)?;
        if let Some(existing) = self.pool_by_name(&pool.name) {
            if existing.spec == pool.spec {
                return Ok(Answer::Pool(existing.clone()));
            }
            return Err(Refusal::exists(format!(
                "pool {} exists with another specification; change it with `ashlar pool update`",
                pool.name
            )));
        }
        if pool.id.is_nil() || self.pools.contains_key(&pool.id) {
            return Err(Refusal::internal("pool_id: not fresh"));
        }
        self.pools.insert(pool.id, pool.clone());
        self.pool_by_name.insert(pool.name.clone(), pool.id);
        Ok(Answer::Pool(pool.clone()))
    }

    fn update_pool(&mut self, name: &str, spec: &PoolSpec) -> Response {
        validate::pool_spec(spec)?;
        let id = *self
            .pool_by_name
            .get(name)
            .ok_or_else(|| no_such_pool(name))?;
        let pool = self.pools.get_mut(&id).ok_or_else(|| no_such_pool(name))?;
        pool.spec = spec.clone();
        Ok(Answer::Pool(pool.clone()))
    }

    fn delete_pool(&mut self, name: &str) -> Response {
        let id = *self
            .pool_by_name
            .get(name)
            .ok_or_else(|| no_such_pool(name))?;
        let volumes = self.pool_use(id).volumes;
        if volumes > 0 {
            return Err(Refusal::precondition(format!(
                "pool {name} still has {volumes} volumes (deleted ones with snapshots count); delete them, and their snapshots, \
                 first"
            )));
        }
        self.pools.remove(&id);
        self.flatten_policies.remove(&id);
        self.pool_by_name.remove(name);
        Ok(Answer::Done)
    }

    fn forget_garbage(&mut self, gone: &[(DiskId, VolumeId)]) -> Answer {
        for key in gone.iter().take(validate::BATCH_MAX) {
            self.garbage.remove(key);
        }
        Answer::Done
    }
}

/// The refusal for an unknown pool.
pub(crate) fn no_such_pool(name: &str) -> Refusal {
    let shown: String = name.chars().take(validate::NAME_BYTES_MAX).collect();
    Refusal::not_found(format!(
        "pool {shown:?} does not exist; see `ashlar pool list`"
    ))
}
