//! What a daemon answers at `/metrics`: fetched over HTTP, read as Prometheus' text format 0.0.4, strictly, and
//! compared with docs/metrics.md.
//!
//! Invariant: whatever Prometheus' own parser refuses is refused here: names, escapes, numbers, a family in two
//! places, a series twice, a histogram that does not add up.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use super::cluster::Cluster;
use super::tools::wait_until;

/// The reference.
const REFERENCE: &str = include_str!("../../../docs/metrics.md");
/// Its section for what all daemons have.
const EVERY_DAEMON: &str = "Every daemon";
/// Time for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Labels of a series, by name.
pub type Labels = BTreeMap<String, String>;

/// A metric with all its series.
#[derive(Clone, Default, Debug)]
pub struct Family {
    /// `counter`, `gauge`, `histogram`.
    pub kind: String,
    /// Name of the sample (a histogram has several), labels, value.
    pub samples: Vec<(String, Labels, f64)>,
}

/// All metrics of one answer.
#[derive(Clone, Default, Debug)]
pub struct Exposition {
    /// By name.
    pub families: BTreeMap<String, Family>,
}

/// Asks `http://ADDRESS/PATH`; status and body.
///
/// # Errors
/// Nobody answers within 10 s, or not in HTTP.
pub fn get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    read_answer(&answer).ok_or_else(|| std::io::Error::other(format!("no HTTP answer: {answer:?}")))
}

/// Status and body of an HTTP answer that ends with its connection.
pub fn read_answer(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// Where a process of a development cluster serves its metrics.
///
/// # Panics
/// If there is no such process, or it serves none.
pub fn address(cluster: &Cluster, process: &str) -> String {
    let status = cluster.json(&["dev", "status"]);
    let processes = status["processes"].as_array().expect("processes");
    let found = processes.iter().find(|p| p["name"] == process);
    let address = found.and_then(|p| p["metrics_address"].as_str());
    address
        .unwrap_or_else(|| panic!("{process} serves no metrics: {status}"))
        .to_owned()
}

/// The metrics of a process of a development cluster.
///
/// # Panics
/// If it does not answer, or what it answers is not understood.
pub fn scrape(cluster: &Cluster, process: &str) -> Exposition {
    scrape_at(&address(cluster, process))
}

/// The metrics at an address.
///
/// # Panics
/// If nobody answers, or what is answered is not understood.
pub fn scrape_at(address: &str) -> Exposition {
    let (status, text) = get(address, "/metrics").expect("an answer");
    assert_eq!(status, 200, "{text}");
    Exposition::parse(&text).unwrap_or_else(|e| panic!("{address}: {e}"))
}

/// Waits until the sum of a metric's series is as wished.
///
/// # Panics
/// If it is not within `limit`.
pub fn wait_metric(
    cluster: &Cluster,
    process: &str,
    name: &str,
    limit: Duration,
    wished: impl Fn(f64) -> bool,
) {
    let address = address(cluster, process);
    wait_until(&format!("{name} of {process}"), limit, || {
        let value = scrape_at(&address).value(name, &[]);
        value.filter(|v| wished(*v))
    });
}

impl Exposition {
    /// Reads an answer.
    ///
    /// # Errors
    /// The first line that is wrong, and why.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.is_empty() && !text.ends_with('\n') {
            return Err("the last line does not end".to_owned());
        }
        let mut this = Self::default();
        let mut seen = BTreeSet::new();
        let mut helped = BTreeSet::new();
        let mut current = String::new();
        for line in text.lines() {
            let wrong = |why: &str| format!("{why}: {line:?}");
            if line.trim().is_empty() {
                continue;
            }
            if let Some(comment) = line.strip_prefix('#') {
                let mut words = comment.trim_start().splitn(3, ' ');
                let (keyword, name) = (words.next(), words.next().unwrap_or_default());
                match keyword {
                    Some("HELP") if !helped.insert(name.to_owned()) => {
                        return Err(wrong("described twice"));
                    }
                    Some("TYPE") => {
                        let kind = words.next().unwrap_or_default().to_owned();
                        if !["counter", "gauge", "histogram", "summary", "untyped"]
                            .contains(&kind.as_str())
                        {
                            return Err(wrong("no type"));
                        }
                        let samples = Vec::new();
                        let family = Family { kind, samples };
                        if this.families.insert(name.to_owned(), family).is_some() {
                            return Err(wrong("the family is in two places"));
                        }
                        current = name.to_owned();
                    }
                    _ => {}
                }
                continue;
            }
            let (name, labels, value) = sample(line).map_err(|why| wrong(&why))?;
            let Some(family) = this.families.get_mut(&current) else {
                return Err(wrong("no type before it"));
            };
            let suffix = name.strip_prefix(current.as_str());
            let belongs = match family.kind.as_str() {
                "histogram" => matches!(suffix, Some("_bucket" | "_sum" | "_count")),
                _ => suffix == Some(""),
            };
            if !belongs {
                return Err(wrong("of another family than the type above"));
            }
            if !seen.insert((name.clone(), labels.clone())) {
                return Err(wrong("the series is there twice"));
            }
            family.samples.push((name, labels, value));
        }
        for (name, family) in &this.families {
            family.check(name).map_err(|why| format!("{name}: {why}"))?;
        }
        Ok(this)
    }

    /// The sum of the samples of this name that have these labels; None if there are none. Of a histogram, `name`
    /// ends with `_count` or `_sum`.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let samples = self.families.values().flat_map(|f| &f.samples);
        let fits = |have: &Labels| {
            labels
                .iter()
                .all(|(k, v)| have.get(*k).is_some_and(|x| x == v))
        };
        let mut found = samples
            .filter(|(n, have, _)| n == name && fits(have))
            .map(|(_, _, value)| *value)
            .peekable();
        found.peek()?;
        Some(found.sum())
    }

    /// Whether everything is as the section of docs/metrics.md for this program says: name, type and labels.
    ///
    /// # Errors
    /// What is not.
    pub fn check_documented(&self, program: &str) -> Result<(), String> {
        let mut documented = documented(EVERY_DAEMON);
        documented.extend(documented_nonempty(program)?);
        for (name, family) in &self.families {
            let Some((kind, labels)) = documented.get(name) else {
                return Err(format!("{name} is not documented for {program}"));
            };
            if family.kind != *kind {
                return Err(format!("{name} is a {}, not a {kind}", family.kind));
            }
            for (_, have, _) in &family.samples {
                let have: BTreeSet<&str> = have
                    .keys()
                    .map(String::as_str)
                    .filter(|k| *k != "le")
                    .collect();
                if have != labels.iter().map(String::as_str).collect() {
                    return Err(format!("{name} has the labels {have:?}, not {labels:?}"));
                }
            }
        }
        Ok(())
    }
}

impl Family {
    fn check(&self, name: &str) -> Result<(), String> {
        match self.kind.as_str() {
            "counter" if !name.ends_with("_total") => Err("a counter ends with _total".to_owned()),
            "counter" => match self
                .samples
                .iter()
                .find(|(_, _, v)| !v.is_finite() || *v < 0.0)
            {
                Some((_, labels, v)) => Err(format!("{v} is no count: {labels:?}")),
                None => Ok(()),
            },
            "histogram" => self.check_histogram(name),
            _ => Ok(()),
        }
    }

    fn check_histogram(&self, name: &str) -> Result<(), String> {
        let mut buckets: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
        let mut counts: BTreeMap<Labels, f64> = BTreeMap::new();
        for (sample, labels, value) in &self.samples {
            let mut labels = labels.clone();
            match sample.strip_prefix(name) {
                Some("_bucket") => {
                    let le = labels.remove("le").ok_or("a bucket without le")?;
                    let le = number(&le).ok_or("le is no number")?;
                    buckets.entry(labels).or_default().push((le, *value));
                }
                Some("_count") => drop(counts.insert(labels, *value)),
                _ => {}
            }
        }
        for (labels, buckets) in &buckets {
            if !buckets
                .windows(2)
                .all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1)
            {
                return Err(format!("its buckets do not rise: {labels:?} {buckets:?}"));
            }
            let last = buckets.last().copied();
            let count = counts.get(labels).copied();
            if last.map(|(le, _)| le) != Some(f64::INFINITY) || last.map(|(_, n)| n) != count {
                return Err(format!("the last bucket is not all: {labels:?}"));
            }
        }
        match buckets.keys().eq(counts.keys()) {
            true => Ok(()),
            false => Err("buckets and counts do not have the same labels".to_owned()),
        }
    }
}

/// A number as Prometheus writes it.
fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        "-Inf" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        text if text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) => {
            text.parse().ok().filter(|v: &f64| v.is_finite())
        }
        _ => None,
    }
}

fn is_name(text: &str, more: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
    text.starts_with(|c: char| good(c) && !c.is_ascii_digit()) && text.chars().all(good)
}

/// `name{label="value",...} 1.5`
fn sample(line: &str) -> Result<(String, Labels, f64), String> {
    let end = line.find(['{', ' ']).ok_or("no value")?;
    let (name, mut rest) = line.split_at(end);
    if !is_name(name, "_:") {
        return Err("no name".to_owned());
    }
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (label, quoted) = rest.split_once("=\"").ok_or("no label")?;
            if !is_name(label, "_") {
                return Err(format!("{label:?} is no name of a label"));
            }
            let (value, after) = unescape(quoted)?;
            if labels.insert(label.to_owned(), value).is_some() {
                return Err(format!("the label {label} is there twice"));
            }
            rest = match after.strip_prefix(',') {
                Some(next) => next,
                None if after.starts_with('}') => after,
                None => return Err("no end of the labels".to_owned()),
            };
        }
    }
    let value = rest.strip_prefix(' ').ok_or("no value")?;
    let value = number(value).ok_or("no number")?;
    Ok((name.to_owned(), labels, value))
}

/// A label's value up to its quotation mark, and what follows it.
fn unescape(text: &str) -> Result<(String, &str), String> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, c @ ('\\' | '"'))) => value.push(c),
                _ => return Err("a wrong escape".to_owned()),
            },
            c => value.push(c),
        }
    }
    Err("a label without end".to_owned())
}

/// Type and labels of the metrics in a section's table.
fn documented(section: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let heading = format!("## {section}");
    let rows = REFERENCE
        .lines()
        .skip_while(|line| *line != heading)
        .skip(1)
        .take_while(|line| !line.starts_with("## "))
        .filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let names = |cell: &str| -> Vec<String> {
            let parts = cell.split(',').map(|p| p.trim().trim_matches('`'));
            parts.filter(|p| !p.is_empty()).map(str::to_owned).collect()
        };
        let labels = names(cells[3]);
        (names(cells[1]).concat(), (cells[2].to_owned(), labels))
    })
    .collect()
}

fn documented_nonempty(section: &str) -> Result<BTreeMap<String, (String, Vec<String>)>, String> {
    let found = documented(section);
    match found.is_empty() {
        true => Err(format!("docs/metrics.md has no section {section}")),
        false => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const GOOD: &str = "# HELP a_total Things\n# TYPE a_total counter\na_total{x=\"1\\\"\\\\\\n}\",y=\"\"} 3\na_total 4\n\
        # TYPE s histogram\ns_bucket{le=\"0.5\"} 1\ns_bucket{le=\"+Inf\"} 2\ns_sum 1.5e-3\ns_count 2\n\
        # TYPE g gauge\ng NaN\n";

    #[test]
    fn an_answer_is_read_as_it_was_meant() {
        let read = Exposition::parse(GOOD).unwrap();
        assert_eq!(read.value("a_total", &[]), Some(7.0));
        assert_eq!(read.value("a_total", &[("x", "1\"\\\n}")]), Some(3.0));
        assert_eq!(read.value("s_count", &[]), Some(2.0));
        assert_eq!(read.value("b_total", &[]), None);
    }

    #[test]
    fn what_prometheus_refuses_is_refused() {
        for (good, bad, why) in [
            ("a_total 4\n", "a_total 4", "does not end"),
            ("a_total 4", "a_total four", "no number"),
            ("a_total 4", "a_total -4", "no count"),
            ("a_total 4", "b_total 4", "another family"),
            ("a_total 4", "a-total 4", "no name"),
            ("y=\"\"", "x=\"\"", "twice"),
            ("y=\"\"", "1=\"\"", "name of a label"),
            ("\\n}", "\\t}", "escape"),
            ("s_count 2", "s_count 3", "not all"),
            ("le=\"0.5\"} 1", "le=\"0.5\"} 3", "do not rise"),
            ("# TYPE g gauge", "# TYPE a_total counter", "two places"),
            ("# TYPE a_total counter\n", "", "no type"),
            ("g NaN\n", "g NaN\ng 1\n", "there twice"),
        ] {
            assert!(GOOD.contains(good));
            let mut text = GOOD.replacen(good, bad, 1);
            if why == "does not end" {
                text = "a_total 4".to_owned();
            }
            let error = Exposition::parse(&text).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn the_reference_is_consulted() {
        let text = "# TYPE ashlar_disk_failed gauge\nashlar_disk_failed{disk=\"d\",path=\"p\"} 0\n";
        let read = Exposition::parse(text).unwrap();
        read.check_documented("storage-daemon").unwrap();
        read.check_documented("nbd-client").unwrap_err();
        read.check_documented("nobody").unwrap_err();
        let fewer = Exposition::parse(&text.replace(",path=\"p\"", "")).unwrap();
        fewer.check_documented("storage-daemon").unwrap_err();
    }
}
