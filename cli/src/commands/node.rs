//! `ashlar node`: the machines that run a storage daemon.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;
use clap::Subcommand;
use serde::Serialize;

use super::Context;
use super::service::{self, EmptyArgs, Named};
use crate::error::Result;
use crate::output::{self, Column, cell, health};

/// Machines that run a storage daemon.
#[derive(Subcommand, Debug)]
pub enum NodeCommand {
    /// Every node
    List,
    /// One node and its disks
    Show {
        /// Name or id
        node: String,
    },
    /// Lets no more replicas be placed on a node; those that are there stay
    Cordon {
        /// Name or id
        node: String,
    },
    /// Ends a cordon or a drain: the node is used again
    Uncordon {
        /// Name or id
        node: String,
    },
    /// Moves every replica to other nodes, and lets none come, until `uncordon`; pods are drained by `kubectl drain`
    Drain {
        /// Name or id
        node: String,
        /// Waiting
        #[command(flatten)]
        wait: EmptyArgs,
    },
}

#[derive(Serialize)]
struct NodeView {
    id: String,
    name: String,
    alive: bool,
    last_heartbeat_age_ms: u64,
    service: &'static str,
    admin_address: String,
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disks: Option<Vec<super::disk::DiskView>>,
}

impl NodeView {
    fn new(node: pb::Node) -> Self {
        Self {
            id: output::id_text(&node.node_id),
            service: service::name(node.service()),
            name: node.name,
            alive: node.alive,
            last_heartbeat_age_ms: node.last_heartbeat_age_ms,
            admin_address: node.admin_address,
            labels: node.labels.into_iter().collect(),
            disks: None,
        }
    }

    fn state(&self) -> &'static str {
        match (self.alive, self.admin_address.is_empty()) {
            // Without a storage daemon nobody sends heartbeats.
            (_, true) => "attach-only",
            (true, false) => "alive",
            (false, false) => "silent",
        }
    }

    fn shown(&self) -> String {
        service::with_state(self.state(), self.service)
    }

    fn heartbeat(&self) -> String {
        format!("{:.1} s ago", self.last_heartbeat_age_ms as f64 / 1000.0)
    }
}

/// Carries out a command.
pub async fn run(command: &NodeCommand, context: &mut Context) -> Result<()> {
    match command {
        NodeCommand::List => list(context).await,
        NodeCommand::Show { node } => show(node, context).await,
        NodeCommand::Cordon { node } => {
            let node = Named::node(&context.metadata.node(node).await?);
            service::change(context, &node, pb::Service::Cordoned).await
        }
        NodeCommand::Uncordon { node } => {
            let node = Named::node(&context.metadata.node(node).await?);
            service::change(context, &node, pb::Service::InUse).await
        }
        NodeCommand::Drain { node, wait } => {
            let node = Named::node(&context.metadata.node(node).await?);
            service::empty(context, &node, Vec::new(), *wait).await
        }
    }
}

async fn list(context: &mut Context) -> Result<()> {
    let nodes: Vec<NodeView> = context
        .metadata
        .nodes()
        .await?
        .into_iter()
        .map(NodeView::new)
        .collect();
    let header = [
        Column::Left("name"),
        Column::Left("state"),
        Column::Left("heartbeat"),
        Column::Left("address"),
        Column::Left("labels"),
        Column::Left("id"),
    ];
    context.output.list(&nodes, &header, |n| {
        vec![
            cell(&n.name),
            health(n.shown(), n.state() != "silent"),
            cell(n.heartbeat()),
            cell(&n.admin_address),
            cell(output::labels(&n.labels)),
            cell(&n.id),
        ]
    })
}

async fn show(name: &str, context: &mut Context) -> Result<()> {
    let node = context.metadata.node(name).await?;
    let disks: Vec<super::disk::DiskView> = context
        .metadata
        .disks()
        .await?
        .into_iter()
        .filter(|d| d.node_id == node.node_id)
        .map(super::disk::DiskView::new)
        .collect();
    let rows = disks.iter().map(super::disk::DiskView::row).collect();
    let mut view = NodeView::new(node);
    let fields = [
        ("Node", view.name.clone()),
        ("Id", view.id.clone()),
        ("State", view.shown()),
        ("Heartbeat", view.heartbeat()),
        ("Address", view.admin_address.clone()),
        ("Labels", output::labels(&view.labels)),
    ];
    view.disks = Some(disks);
    context.output.object(&view, &fields)?;
    context.output.text("")?;
    context.output.table(&super::disk::HEADER, rows)
}
