//! `ashlar pool`: which disks a volume may be placed on, and its defaults.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::Context;
use crate::args::parse_label;
use crate::client::request_id;
use crate::error::{CliError, Result};
use crate::output::{self, Column, cell};
use crate::size;

/// Pools of disks.
#[derive(Subcommand, Debug)]
pub enum PoolCommand {
    /// Makes a pool
    Create {
        /// Its name
        name: String,
        /// Its settings
        #[command(flatten)]
        spec: SpecArgs,
    },
    /// Every pool
    List,
    /// One pool
    Show {
        /// Its name
        name: String,
    },
    /// Changes the given settings; volumes that exist keep their replicas where they are
    Update {
        /// Its name
        name: String,
        /// The settings to change
        #[command(flatten)]
        spec: SpecArgs,
    },
    /// Deletes a pool that has no volumes
    Delete {
        /// Its name
        name: String,
    },
}

/// What must not be shared by two replicas.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureDomain {
    /// A disk.
    Disk,
    /// A node.
    Node,
    /// A zone (label topology.kubernetes.io/zone).
    Zone,
}

impl From<FailureDomain> for pb::FailureDomain {
    fn from(domain: FailureDomain) -> Self {
        match domain {
            FailureDomain::Disk => Self::Disk,
            FailureDomain::Node => Self::Node,
            FailureDomain::Zone => Self::Zone,
        }
    }
}

/// Which clones are made independent of their sources without being asked.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flatten {
    /// None.
    Never,
    /// Those of a volume or snapshot that was deleted.
    Orphaned,
    /// All.
    Always,
}

impl From<Flatten> for pb::FlattenPolicy {
    fn from(flatten: Flatten) -> Self {
        match flatten {
            Flatten::Never => Self::Never,
            Flatten::Orphaned => Self::Orphaned,
            Flatten::Always => Self::Always,
        }
    }
}

/// Settings of a pool.
#[derive(Args, Debug, Default)]
pub struct SpecArgs {
    /// Replicas of a volume that does not say otherwise [default: 3]
    #[arg(long)]
    replicas: Option<u32>,
    /// What two replicas never share [default: node]
    #[arg(long, value_enum)]
    failure_domain: Option<FailureDomain>,
    /// Label that disks (or their nodes) must have, NAME=VALUE (repeatable) [default: every disk]
    #[arg(long = "selector", value_parser = parse_label)]
    selector: Vec<(String, String)>,
    /// Take every disk again (with update)
    #[arg(long, conflicts_with = "selector")]
    no_selector: bool,
    /// How much may be promised, in percent of the capacity [default: 1000]
    #[arg(long, value_name = "PERCENT")]
    overprovision: Option<u32>,
    /// Which clones are made independent of their sources in the background [default: orphaned]
    #[arg(long, value_enum)]
    flatten: Option<Flatten>,
}

impl SpecArgs {
    fn apply(&self, mut spec: pb::PoolSpec) -> pb::PoolSpec {
        if let Some(replicas) = self.replicas {
            spec.replicas = replicas;
        }
        if let Some(domain) = self.failure_domain {
            spec.set_failure_domain(domain.into());
        }
        if !self.selector.is_empty() {
            spec.selector = self.selector.iter().cloned().collect();
        } else if self.no_selector {
            spec.selector.clear();
        }
        if let Some(percent) = self.overprovision {
            spec.overprovision_percent = percent;
        }
        if let Some(flatten) = self.flatten {
            spec.set_flatten(flatten.into());
        }
        spec
    }

    fn is_empty(&self) -> bool {
        self.replicas.is_none()
            && self.failure_domain.is_none()
            && self.selector.is_empty()
            && !self.no_selector
            && self.overprovision.is_none()
            && self.flatten.is_none()
    }
}

#[derive(Serialize)]
struct PoolView {
    id: String,
    name: String,
    replicas: u32,
    failure_domain: &'static str,
    selector: BTreeMap<String, String>,
    overprovision_percent: u32,
    /// Which clones are made independent without being asked: `never`, `orphaned` or `always`.
    flatten: &'static str,
    disks: u32,
    capacity_bytes: u64,
    used_bytes: u64,
    provisioned_bytes: u64,
    volumes: u32,
}

impl PoolView {
    fn new(pool: pb::Pool) -> Self {
        let spec = pool.spec.unwrap_or_default();
        Self {
            id: output::id_text(&pool.pool_id),
            name: pool.name,
            replicas: spec.replicas,
            failure_domain: match spec.failure_domain() {
                pb::FailureDomain::Disk => "disk",
                pb::FailureDomain::Zone => "zone",
                pb::FailureDomain::Node | pb::FailureDomain::Unspecified => "node",
            },
            overprovision_percent: spec.overprovision_percent,
            flatten: match spec.flatten() {
                pb::FlattenPolicy::Never => "never",
                pb::FlattenPolicy::Always => "always",
                pb::FlattenPolicy::Orphaned | pb::FlattenPolicy::Unspecified => "orphaned",
            },
            selector: spec.selector.into_iter().collect(),
            disks: pool.disk_count,
            capacity_bytes: pool.capacity_bytes,
            used_bytes: pool.used_bytes,
            provisioned_bytes: pool.provisioned_bytes,
            volumes: pool.volume_count,
        }
    }
}

/// Carries out a command.
pub async fn run(command: &PoolCommand, context: &mut Context) -> Result<()> {
    match command {
        PoolCommand::Create { name, spec } => create(name, spec, context).await,
        PoolCommand::List => list(context).await,
        PoolCommand::Show { name } => show(name, context).await,
        PoolCommand::Update { name, spec } => update(name, spec, context).await,
        PoolCommand::Delete { name } => delete(name, context).await,
    }
}

async fn create(name: &str, spec: &SpecArgs, context: &mut Context) -> Result<()> {
    let defaults = pb::PoolSpec {
        selector: Default::default(),
        replicas: 3,
        failure_domain: pb::FailureDomain::Node as i32,
        overprovision_percent: 1000,
        flatten: pb::FlattenPolicy::Unspecified as i32,
    };
    let request = pb::CreatePoolRequest {
        request_id: request_id(),
        name: name.to_owned(),
        spec: Some(spec.apply(defaults)),
    };
    let pool = context
        .metadata
        .call(
            &format!("create the pool {name:?}"),
            request,
            async |mut c, q| c.create_pool(q).await,
        )
        .await?;
    let view = PoolView::new(pool);
    let sentence = format!(
        "pool {} is there: {} disks, {}",
        view.name,
        view.disks,
        size::format(view.capacity_bytes)
    );
    context.output.done(&view, &sentence)
}

async fn list(context: &mut Context) -> Result<()> {
    let pools: Vec<PoolView> = context
        .metadata
        .pools("")
        .await?
        .into_iter()
        .map(PoolView::new)
        .collect();
    let header = [
        Column::Left("name"),
        Column::Right("replicas"),
        Column::Left("domain"),
        Column::Right("disks"),
        Column::Right("capacity"),
        Column::Right("used"),
        Column::Right("provisioned"),
        Column::Right("volumes"),
        Column::Left("selector"),
    ];
    context.output.list(&pools, &header, |p| {
        vec![
            cell(&p.name),
            cell(p.replicas),
            cell(p.failure_domain),
            cell(p.disks),
            cell(size::format(p.capacity_bytes)),
            cell(size::format(p.used_bytes)),
            cell(size::format(p.provisioned_bytes)),
            cell(p.volumes),
            cell(output::labels(&p.selector)),
        ]
    })
}

async fn show(name: &str, context: &mut Context) -> Result<()> {
    let view = PoolView::new(context.metadata.pool(name).await?);
    let fields = [
        ("Pool", view.name.clone()),
        ("Id", view.id.clone()),
        ("Replicas", view.replicas.to_string()),
        ("Failure domain", view.failure_domain.to_owned()),
        ("Selector", output::labels(&view.selector)),
        ("Overprovision", format!("{} %", view.overprovision_percent)),
        ("Disks", view.disks.to_string()),
        ("Capacity", size::format(view.capacity_bytes)),
        ("Used", size::format(view.used_bytes)),
        ("Provisioned", size::format(view.provisioned_bytes)),
        ("Volumes", view.volumes.to_string()),
    ];
    context.output.object(&view, &fields)
}

async fn update(name: &str, spec: &SpecArgs, context: &mut Context) -> Result<()> {
    if spec.is_empty() {
        return Err(CliError::usage("nothing to change is given")
            .hint("`ashlar pool update --help` lists the settings"));
    }
    let current = context.metadata.pool(name).await?.spec.unwrap_or_default();
    let request = pb::UpdatePoolRequest {
        request_id: request_id(),
        name: name.to_owned(),
        spec: Some(spec.apply(current)),
    };
    let pool = context
        .metadata
        .call(
            &format!("update the pool {name:?}"),
            request,
            async |mut c, q| c.update_pool(q).await,
        )
        .await?;
    let view = PoolView::new(pool);
    let sentence = format!("pool {} is updated", view.name);
    context.output.done(&view, &sentence)
}

#[derive(Serialize)]
struct DeletedView<'a> {
    name: &'a str,
    deleted: bool,
}

async fn delete(name: &str, context: &mut Context) -> Result<()> {
    let request = pb::DeletePoolRequest {
        request_id: request_id(),
        name: name.to_owned(),
    };
    context
        .metadata
        .call(
            &format!("delete the pool {name:?}"),
            request,
            async |mut c, q| c.delete_pool(q).await,
        )
        .await?;
    context.output.done(
        &DeletedView {
            name,
            deleted: true,
        },
        &format!("pool {name} is deleted"),
    )
}
