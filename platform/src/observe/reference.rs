//! The reference of all metrics, `docs/metrics.md`, as each crate's tests compare it with its table.
//!
//! A crate's test, where `ALL` is its table and the section is headed `## nbd-client`:
//!
//! ```ignore
//! #[test]
//! fn the_reference_is_complete() {
//!     let reference = include_str!("../../docs/metrics.md");
//!     ashlar_platform::observe::check_reference(reference, "nbd-client", ALL).unwrap();
//! }
//! ```

use std::fmt::Write as _;

use super::metric::{Kind, Metric, Unit};

/// Compares a section's table with a crate's, and the names with the rules.
///
/// # Errors
/// What is wrong; if the section differs: the section as it should be, to be pasted.
pub fn check_reference(reference: &str, section: &str, table: &[Metric]) -> Result<(), String> {
    for (at, metric) in table.iter().enumerate() {
        if let Some(broken) = broken_rule(metric) {
            return Err(format!("{}: {broken}", metric.name));
        }
        if table[..at].iter().any(|m| m.name == metric.name) {
            return Err(format!("{}: twice", metric.name));
        }
    }
    let heading = format!("## {section}");
    let found: Vec<&str> = reference
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with('|'))
        .collect();
    let wanted = rows(table);
    if found == wanted.lines().collect::<Vec<_>>() {
        return Ok(());
    }
    Err(format!(
        "docs/metrics.md: the table below `{heading}` must be\n\n{wanted}"
    ))
}

fn rows(table: &[Metric]) -> String {
    let mut rows = "| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n".to_owned();
    for metric in table {
        let labels: Vec<String> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(
            rows,
            "| `{}` | {} | {} | {} | {} |",
            metric.name,
            metric.kind.name(),
            labels.join(", "),
            metric.unit.name(),
            metric.help
        );
    }
    rows
}

/// Prometheus' conventions: https://prometheus.io/docs/practices/naming/.
fn broken_rule(metric: &Metric) -> Option<&'static str> {
    let stem = metric.name.strip_suffix("_total").unwrap_or(metric.name);
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    if !metric.name.starts_with("ashlar_") || !metric.name.chars().all(plain) {
        Some("a name is ashlar_ and then a-z, 0-9 and _")
    } else if (metric.kind == Kind::Counter) != metric.name.ends_with("_total") {
        Some("a counter, and nothing else, ends in _total")
    } else if (metric.unit == Unit::Bytes) != stem.ends_with("_bytes") {
        Some("bytes, and nothing else, end in _bytes or _bytes_total")
    } else if (metric.unit == Unit::Seconds) != stem.ends_with("_seconds") {
        Some("seconds, and nothing else, end in _seconds")
    } else if metric.help.is_empty() || metric.help.ends_with('.') || metric.help.contains('|') {
        Some("the help is a sentence without a full stop, and no column separator is in it")
    } else {
        None
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::observe::PROCESS;

    const A: Metric = Metric::counter("ashlar_a_total", Unit::Count, &["x", "y"], "As");
    const B: Metric = Metric::seconds("ashlar_b_seconds", &[], "Time of B");

    #[test]
    fn the_reference_of_every_process_is_complete() {
        check_reference(
            include_str!("../../../docs/metrics.md"),
            "Every daemon",
            PROCESS,
        )
        .unwrap();
    }

    #[test]
    fn a_missing_an_obsolete_and_a_changed_row_are_found() {
        let right = format!(
            "# M\n## other\n| a |\n## it\ntext\n\n{}\n## end\n| b |\n",
            rows(&[A, B])
        );
        check_reference(&right, "it", &[A, B]).unwrap();
        let missing = check_reference(&right, "it", &[A]).unwrap_err();
        assert!(missing.contains("| `ashlar_a_total` | counter | `x`, `y` | count | As |"));
        check_reference(&right, "it", &[B, A]).unwrap_err();
        check_reference(&right, "other", &[A, B]).unwrap_err();
        check_reference(&right, "nowhere", &[A, B]).unwrap_err();
        let changed = Metric { help: "Bs", ..A };
        check_reference(&right, "it", &[changed, B]).unwrap_err();
    }

    #[test]
    fn names_follow_the_conventions() {
        for wrong in [
            Metric::counter("ashlar_a", Unit::Count, &[], "As"),
            Metric::gauge("ashlar_a_total", Unit::Count, &[], "As"),
            Metric::gauge("ashlar_a", Unit::Bytes, &[], "As"),
            Metric::gauge("ashlar_a_seconds", Unit::Count, &[], "As"),
            Metric::seconds("ashlar_a_time", &[], "As"),
            Metric::gauge("other_a", Unit::Count, &[], "As"),
            Metric::gauge("ashlar_A", Unit::Count, &[], "As"),
            Metric::gauge("ashlar_a", Unit::Count, &[], "As."),
        ] {
            assert!(broken_rule(&wrong).is_some(), "{wrong:?}");
            check_reference("", "it", &[wrong]).unwrap_err();
        }
        assert_eq!(broken_rule(&A), None);
        assert!(
            check_reference("", "it", &[A, A])
                .unwrap_err()
                .contains("twice")
        );
    }
}
