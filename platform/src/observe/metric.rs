//! A metric as a constant: what it is called, what it means, and how it is counted.
//!
//! Invariants:
//! - A name is written once, in its crate's `metrics.rs`; label names come from there, too, so that the
//!   reference in `docs/metrics.md` can be compared with them.
//! - Counting before [`super::Observer::install`] goes nowhere and costs next to nothing.

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder};

/// What a metric does over time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Only grows while the process runs; the name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution; the name ends in `_seconds`.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// Unit of a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
}

impl Unit {
    /// As the reference calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::Seconds => "seconds",
        }
    }

    fn of_recorder(self) -> metrics::Unit {
        match self {
            Self::Count => metrics::Unit::Count,
            Self::Bytes => metrics::Unit::Bytes,
            Self::Seconds => metrics::Unit::Seconds,
        }
    }
}

const METADATA: Metadata<'static> = Metadata::new("ashlar", Level::INFO, None);

/// One metric (a family of series, if it has labels).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Metric {
    /// Its name, beginning with `ashlar_`.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it means, one sentence without a full stop.
    pub help: &'static str,
}

impl Metric {
    /// A counter.
    pub const fn counter(
        name: &'static str,
        unit: Unit,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self {
            name,
            kind: Kind::Counter,
            unit,
            labels,
            help,
        }
    }

    /// A gauge.
    pub const fn gauge(
        name: &'static str,
        unit: Unit,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self {
            name,
            kind: Kind::Gauge,
            unit,
            labels,
            help,
        }
    }

    /// A histogram of seconds.
    pub const fn seconds(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self {
            name,
            kind: Kind::Histogram,
            unit: Unit::Seconds,
            labels,
            help,
        }
    }

    /// The counter of these label values, in the order of [`Metric::labels`]; keep it where it is used often.
    ///
    /// # Panics
    /// If the metric is no counter, or the number of values is not that of the labels.
    pub fn counter_of(&self, values: &[&str]) -> Counter {
        assert_eq!(self.kind, Kind::Counter, "{} is no counter", self.name);
        metrics::with_recorder(|r| r.register_counter(&self.key(values), &METADATA))
    }

    /// The gauge of these label values; see [`Metric::counter_of`].
    ///
    /// # Panics
    /// If the metric is no gauge, or the number of values is not that of the labels.
    pub fn gauge_of(&self, values: &[&str]) -> Gauge {
        assert_eq!(self.kind, Kind::Gauge, "{} is no gauge", self.name);
        metrics::with_recorder(|r| r.register_gauge(&self.key(values), &METADATA))
    }

    /// The histogram of these label values; see [`Metric::counter_of`].
    ///
    /// # Panics
    /// If the metric is no histogram, or the number of values is not that of the labels.
    pub fn histogram_of(&self, values: &[&str]) -> Histogram {
        assert_eq!(self.kind, Kind::Histogram, "{} is no histogram", self.name);
        metrics::with_recorder(|r| r.register_histogram(&self.key(values), &METADATA))
    }

    fn key(&self, values: &[&str]) -> Key {
        assert_eq!(self.labels.len(), values.len(), "labels of {}", self.name);
        let labels: Vec<Label> = self
            .labels
            .iter()
            .zip(values)
            .map(|(name, value)| Label::new(*name, (*value).to_owned()))
            .collect();
        Key::from_parts(self.name, labels)
    }

    pub(super) fn describe(&self, recorder: &dyn Recorder) {
        let (name, unit, help) = (
            self.name.into(),
            Some(self.unit.of_recorder()),
            self.help.into(),
        );
        match self.kind {
            Kind::Counter => recorder.describe_counter(name, unit, help),
            Kind::Gauge => recorder.describe_gauge(name, unit, help),
            Kind::Histogram => recorder.describe_histogram(name, unit, help),
        }
    }

    pub(super) fn put(&self, recorder: &dyn Recorder, values: &[&str], value: Value) {
        let key = self.key(values);
        match (self.kind, value) {
            (Kind::Counter, Value::Integer(value)) => {
                recorder.register_counter(&key, &METADATA).absolute(value);
            }
            #[expect(
                clippy::cast_precision_loss,
                reason = "a gauge is a float in Prometheus"
            )]
            (Kind::Gauge, Value::Integer(value)) => {
                recorder.register_gauge(&key, &METADATA).set(value as f64);
            }
            (Kind::Gauge, Value::Float(value)) => {
                recorder.register_gauge(&key, &METADATA).set(value);
            }
            (kind, _) => panic!(
                "{}: a {} cannot be given this value at a scrape",
                self.name,
                kind.name()
            ),
        }
    }
}

/// A value given at a scrape.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    /// Of a counter or a gauge.
    Integer(u64),
    /// Of a gauge.
    Float(f64),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Integer(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Integer(value.into())
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Integer(value as u64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Integer(value.into())
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}
