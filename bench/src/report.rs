//! The rows of the table, each with its bar and its verdict.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use ashlar_bench::machine;
use serde::Serialize;

use crate::matrix::Measurement;

/// Medians by job id, for one target.
pub type Medians = BTreeMap<&'static str, Measurement>;

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name for programs.
    pub id: &'static str,
    /// Name for people.
    pub title: Cow<'static, str>,
    /// Unit of the three values.
    pub unit: &'static str,
    /// The raw file.
    pub raw: Option<f64>,
    /// qemu-nbd with one raw copy.
    pub qemu_nbd: Option<f64>,
    /// Ashlar with three copies.
    pub ashlar: f64,
    /// Ashlar's value by the one that it is held against.
    pub ratio: Option<f64>,
    /// What must hold, in words.
    pub bar: String,
    /// Whether it does.
    pub passes: bool,
}

/// Which way is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Bar {
    AtMost,
    AtLeast,
}

/// A row of the speed table.
struct Speed {
    id: &'static str,
    title: &'static str,
    unit: &'static str,
    job: &'static str,
    value: fn(&Measurement) -> f64,
    bar: Bar,
    factor: f64,
    /// Against the raw file instead of qemu-nbd.
    against_raw: bool,
}

const SPEED: [Speed; 9] = [
    Speed::new(
        "write-4k-1",
        "4k random write, depth 1, mean latency",
        "µs",
        Bar::AtMost,
        1.5,
    ),
    Speed::new(
        "write-4k-32",
        "4k random write, depth 32",
        "IOPS",
        Bar::AtLeast,
        0.8,
    ),
    Speed::new(
        "read-4k-1",
        "4k random read, depth 1, mean latency",
        "µs",
        Bar::AtMost,
        1.2,
    ),
    Speed::new(
        "read-4k-32",
        "4k random read, depth 32",
        "IOPS",
        Bar::AtLeast,
        0.9,
    ),
    Speed::new(
        "write-1m-8",
        "1 MiB write, depth 8",
        "MiB/s",
        Bar::AtLeast,
        0.5,
    ),
    Speed::new(
        "read-1m-8",
        "1 MiB read, depth 8",
        "MiB/s",
        Bar::AtLeast,
        0.9,
    ),
    Speed {
        id: "cpu-write-4k-32",
        ..Speed::new(
            "write-4k-32",
            "CPU of the machine per 4k write, depth 32",
            "CPU µs",
            Bar::AtMost,
            1.7,
        )
    },
    Speed {
        id: "cpu-read-4k-32",
        ..Speed::new(
            "read-4k-32",
            "CPU of the machine per 4k read, depth 32",
            "CPU µs",
            Bar::AtMost,
            1.4,
        )
    },
    Speed {
        against_raw: true,
        ..Speed::new(
            "write-flush-4k-1",
            "4k write + flush each, depth 1",
            "µs",
            Bar::AtMost,
            1.8,
        )
    },
];

impl Speed {
    const fn new(
        job: &'static str,
        title: &'static str,
        unit: &'static str,
        bar: Bar,
        factor: f64,
    ) -> Self {
        // The unit says which number it is.
        let value: fn(&Measurement) -> f64 = match unit.as_bytes() {
            b"IOPS" => |m| m.iops,
            b"MiB/s" => |m| m.mib_per_second,
            b"CPU \xc2\xb5s" => |m| m.cpu_us_per_op,
            _ => |m| m.latency_us,
        };
        Self {
            id: job,
            title,
            unit,
            job,
            value,
            bar,
            factor,
            against_raw: false,
        }
    }

    fn row(&self, raw: &Medians, qemu: &Medians, ashlar: &Medians) -> Option<Row> {
        let of = |medians: &Medians| medians.get(self.job).map(self.value);
        let (raw, qemu_nbd, ashlar) = (of(raw), of(qemu), of(ashlar)?);
        let (reference, name) = if self.against_raw {
            (raw?, "raw + fdatasync")
        } else {
            (qemu_nbd?, "qemu-nbd")
        };
        let ratio = ashlar / reference;
        let (sign, passes) = match self.bar {
            Bar::AtMost => ("≤", ratio <= self.factor),
            Bar::AtLeast => ("≥", ratio >= self.factor),
        };
        Some(Row {
            id: self.id,
            title: self.title.into(),
            unit: self.unit,
            raw,
            qemu_nbd,
            ashlar,
            ratio: Some(ratio),
            bar: format!("{sign} {} × {name}", self.factor),
            passes,
        })
    }
}

/// The directory for working files below the one for results.
pub fn work_directory(out: &Path) -> Result<PathBuf> {
    let work = out.join("work");
    std::fs::create_dir_all(&work)?;
    Ok(work.canonicalize()?)
}

/// The same, after the first line of a report: on which machine.
pub fn begin(out: &Path) -> Result<PathBuf> {
    let work = work_directory(out)?;
    println!(
        "{}, load {:.1}\n",
        machine::description(),
        machine::load_average()
    );
    Ok(work)
}

/// The rows of the speed table.
pub fn speed_rows(raw: &Medians, qemu: &Medians, ashlar: &Medians) -> Vec<Row> {
    SPEED
        .iter()
        .filter_map(|s| s.row(raw, qemu, ashlar))
        .collect()
}

/// A row that is held against a number.
pub fn limit_row(
    id: &'static str,
    title: impl Into<Cow<'static, str>>,
    unit: &'static str,
    value: f64,
    below: f64,
) -> Row {
    Row {
        id,
        title: title.into(),
        unit,
        raw: None,
        qemu_nbd: None,
        ashlar: value,
        ratio: None,
        bar: format!("< {}", number(below)),
        passes: value < below,
    }
}

/// A row whose value must not be lower than this.
pub fn floor_row(
    id: &'static str,
    title: impl Into<Cow<'static, str>>,
    unit: &'static str,
    value: f64,
    least: f64,
) -> Row {
    Row {
        bar: format!("≥ {}", number(least)),
        passes: value >= least,
        ..limit_row(id, title, unit, value, least)
    }
}

/// A number with about three digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 10_000.0 => format!("{:.1}k", value / 1000.0),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// The table, for people.
pub fn table(rows: &[Row]) -> String {
    let dash = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), number);
    let mut text = format!(
        "{:<52} {:>8} {:>9} {:>9} {:>9} {:>7}  {:<26} {}\n",
        "row", "unit", "raw", "qemu-nbd", "ashlar", "ratio", "bar", "verdict"
    );
    for row in rows {
        text += &format!(
            "{:<52} {:>8} {:>9} {:>9} {:>9} {:>7}  {:<26} {}\n",
            row.title,
            row.unit,
            dash(row.raw),
            dash(row.qemu_nbd),
            number(row.ashlar),
            row.ratio
                .map_or_else(|| "-".to_owned(), |r| format!("{r:.2}")),
            row.bar,
            if row.passes { "pass" } else { "FALLS SHORT" }
        );
    }
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn medians(value: f64) -> Medians {
        let measurement = Measurement {
            iops: value,
            mib_per_second: value,
            latency_us: value,
            p99_us: value,
            cpu_us_per_op: value * 10.0,
        };
        crate::matrix::JOBS
            .iter()
            .map(|j| (j.id, measurement))
            .collect()
    }

    #[test]
    fn each_row_is_held_against_its_reference() {
        let rows = speed_rows(&medians(100.0), &medians(200.0), &medians(190.0));
        assert_eq!(rows.len(), 9);
        let row = |id: &str| rows.iter().find(|r| r.id == id).unwrap();
        assert!(row("write-4k-1").passes && row("read-4k-32").passes);
        assert_eq!(row("write-4k-1").ratio, Some(0.95));
        assert!(
            !row("write-flush-4k-1").passes,
            "1.9 times raw is more than 1.8"
        );
        assert_eq!(row("cpu-read-4k-32").ashlar, 1900.0);
        let slow = speed_rows(&medians(100.0), &medians(200.0), &medians(90.0));
        assert!(!slow.iter().find(|r| r.id == "write-1m-8").unwrap().passes);
    }

    #[test]
    fn a_row_that_falls_short_says_so() {
        let rows = [
            limit_row("a", "A", "s", 0.6, 0.5),
            limit_row("b", "B", "s", 0.4, 0.5),
        ];
        let text = table(&rows);
        assert_eq!(text.matches("FALLS SHORT").count(), 1);
        assert_eq!(text.matches("pass").count(), 1);
    }
}
