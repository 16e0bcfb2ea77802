//! `ashlar node`: the machines that run a storage daemon.

use std::collections::BTreeMap;

use ashlar_proto::rpc::metadata as pb;
use clap::Subcommand;
use serde::Serialize;

use super::Context;
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
}

#[derive(Serialize)]
struct NodeView {
    id: String,
    name: String,
    alive: bool,
    last_heartbeat_age_ms: u64,
    admin_address: String,
    labels: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disks: Option<Vec<super::disk::DiskView>>,
}

impl NodeView {
    fn new(node: pb::Node) -> Self {
        Self {
            id: output::id_text(&node.node_id),
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

    fn heartbeat(&self) -> String {
        format!("{:.1} s ago", self.last_heartbeat_age_ms as f64 / 1000.0)
    }
}

/// Carries out a command.
pub async fn run(command: &NodeCommand, context: &mut Context) -> Result<()> {
    match command {
        NodeCommand::List => list(context).await,
        NodeCommand::Show { node } => show(node, context).await,
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
            health(n.state(), n.state() != "silent"),
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
        ("State", view.state().to_owned()),
        ("Heartbeat", view.heartbeat()),
        ("Address", view.admin_address.clone()),
        ("Labels", output::labels(&view.labels)),
    ];
    view.disks = Some(disks);
    context.output.object(&view, &fields)?;
    context.output.text("")?;
    context.output.table(&super::disk::HEADER, rows)
}
