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

    /// A list that is written while it is found out; `header` and the lines of the rows are for people.
    pub fn rows(self, header: &str) -> Result<Rows> {
        let mut rows = Rows {
            json: self.is_json(),
            first: true,
            out: std::io::BufWriter::new(std::io::stdout().lock()),
        };
        rows.write(if rows.json { "[" } else { header })?;
        Ok(rows)
    }

    fn json<T: Serialize>(self, value: &T) -> Result<()> {
        let text = serde_json::to_string_pretty(value).context(|| "write JSON".to_owned())?;
        print(&text)
    }
}

/// See [`Output::rows`].
pub struct Rows {
    json: bool,
    first: bool,
    out: std::io::BufWriter<std::io::StdoutLock<'static>>,
}

impl Rows {
    /// The next row; false: the reader had enough.
    pub fn row<T: Serialize>(&mut self, item: &T, line: &str) -> Result<bool> {
        if !self.json {
            return self.write(&format!("\n{line}"));
        }
        let text = serde_json::to_string(item).context(|| "write JSON".to_owned())?;
        let comma = if std::mem::take(&mut self.first) {
            ""
        } else {
            ","
        };
        self.write(&format!("{comma}\n  {text}"))
    }

    /// The end, with a sentence for people.
    pub fn end(mut self, sentence: &str) -> Result<()> {
        let last = if self.json {
            "\n]\n".to_owned()
        } else {
            format!("\n{sentence}\n")
        };
        if self.write(&last)? {
            end_of_output(self.out.flush())?;
        }
        Ok(())
    }

    fn write(&mut self, text: &str) -> Result<bool> {
        end_of_output(self.out.write_all(text.as_bytes()))
    }
}

/// False: a reader that has seen enough went away.
fn end_of_output(result: std::io::Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e).context(|| "write to standard output".to_owned()),
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

/// A time in UTC, as `2026-11-27 01:50:05`; `-` for none.
pub fn time(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".to_owned();
    }
    let seconds = unix_ms / 1000;
    // Days to a date by H. Hinnant's algorithm: eras of 400 years that begin in March.
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

/// An id's 16 bytes as text; empty for none.
pub fn id_text(bytes: &[u8]) -> String {
    uuid::Uuid::from_slice(bytes)
        .ok()
        .filter(|u| !u.is_nil())
        .map(|u| u.hyphenated().to_string())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_in_utc() {
        for (seconds, text) in [
            (1, "1970-01-01 00:00:01"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_700_000_000, "2023-11-14 22:13:20"),
            (4_107_542_399, "2100-02-28 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(time(seconds * 1000), text);
        }
        assert_eq!(time(0), "-");
    }
}
