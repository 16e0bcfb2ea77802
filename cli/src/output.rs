//! Results on standard output: tables for people, JSON for programs. Nothing else writes there.

use std::io::Write as _;

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use serde::Serialize;

use crate::error::{Context as _, Result};

/// The form of the output.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs; fields are only ever added.
    Json,
}

/// Writes results in the chosen form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
}

impl Output {
    /// An output of a form.
    pub fn new(format: Format) -> Self {
        Self { format }
    }

    /// Whether programs read it.
    pub fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// A list: one row per item, or a JSON array.
    pub fn list<T: Serialize>(
        self,
        items: &[T],
        header: &[Column],
        row: impl Fn(&T) -> Vec<Cell>,
    ) -> Result<()> {
        if self.is_json() {
            return self.json(&items);
        }
        let mut table = new_table(header);
        for item in items {
            table.add_row(row(item));
        }
        print(&table.trim_fmt())
    }

    /// One object: `name: value` lines, or a JSON object.
    pub fn object<T: Serialize>(self, item: &T, fields: &[(&str, String)]) -> Result<()> {
        if self.is_json() {
            return self.json(item);
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        for (name, value) in fields {
            table.add_row(vec![Cell::new(format!("{name}:")), Cell::new(value)]);
        }
        print(&table.trim_fmt())
    }

    /// A sentence for people; programs get the object.
    pub fn done<T: Serialize>(self, item: &T, sentence: &str) -> Result<()> {
        if self.is_json() {
            self.json(item)
        } else {
            print(sentence)
        }
    }

    /// A further table or line for people only.
    pub fn text(self, text: &str) -> Result<()> {
        if self.is_json() { Ok(()) } else { print(text) }
    }

    /// A further table for people only.
    pub fn table(self, header: &[Column], rows: Vec<Vec<Cell>>) -> Result<()> {
        if self.is_json() {
            return Ok(());
        }
        let mut table = new_table(header);
        table.add_rows(rows);
        print(&table.trim_fmt())
    }

    fn json<T: Serialize>(self, value: &T) -> Result<()> {
        let text = serde_json::to_string_pretty(value).context(|| "write JSON".to_owned())?;
        print(&text)
    }
}

/// A column's title and how its values are aligned.
#[derive(Clone, Copy, Debug)]
pub enum Column {
    /// Words.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

fn new_table(header: &[Column]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.iter().map(|c| match c {
        Column::Left(t) | Column::Right(t) => Cell::new(t.to_uppercase()),
    }));
    for (index, column) in header.iter().enumerate() {
        if let (Column::Right(_), Some(c)) = (column, table.column_mut(index)) {
            c.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}") {
        // The reader of a pipe may have seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context(|| "write to standard output".to_owned()),
    }
}

/// A cell.
pub fn cell(value: impl ToString) -> Cell {
    Cell::new(value)
}

/// A cell that is green when all is well, red when not (colours only on a terminal).
pub fn health(value: impl ToString, well: bool) -> Cell {
    Cell::new(value).fg(if well { Color::Green } else { Color::Red })
}

/// Labels in the order of their names: `a=b,c=d`, or `-`.
pub fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    if labels.is_empty() {
        return "-".to_owned();
    }
    let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

/// An id's 16 bytes as text; empty for none.
pub fn id_text(bytes: &[u8]) -> String {
    uuid::Uuid::from_slice(bytes)
        .ok()
        .filter(|u| !u.is_nil())
        .map(|u| u.hyphenated().to_string())
        .unwrap_or_default()
}
