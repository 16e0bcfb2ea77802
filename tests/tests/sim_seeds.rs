//! Whole clusters from seeds: 1,000 of them in `make test`, the same twice gives the same history, and
//! planted mistakes are found.

use ashlar_tests::sim::run::{self, Options};

/// Seeds of the regular run.
const SEEDS: u64 = 1000;
/// Threads: `make test` is meant for two cores.
const THREADS: usize = 2;

#[test]
fn a_thousand_clusters_keep_every_promise() {
    let mut failures = Vec::new();
    let summary = run::many(0..SEEDS, THREADS, &Options::default(), |report| {
        if let Some(failure) = &report.failure {
            failures.push(format!("seed {}: {failure}", report.seed));
        }
        failures.len() < 5
    });
    assert!(
        failures.is_empty(),
        "{}\nreplay with: ashlar-sim --verbose --seed N",
        failures.join("\n")
    );
    assert_eq!(summary.seeds, SEEDS);
    assert!(
        summary.answered * 10 > summary.requests * 8,
        "{summary:?}: too few requests answered"
    );
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..12 {
        let digests: Vec<u64> = (0..2)
            .map(|_| run::run(seed, &Options::default()).digest)
            .collect();
        assert_eq!(digests[0], digests[1], "seed {seed}");
    }
    let digest = |seed| run::run(seed, &Options::default()).digest;
    assert_ne!(digest(1), digest(2));
}

/// Seeds within which a planted mistake must show.
#[cfg(feature = "planted-bugs")]
const PLANTED_SEEDS: u64 = 2000;

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_mistakes_are_caught() {
    for bug in run::PLANTED {
        let options = Options {
            planted_bug: Some(bug),
            ..Options::default()
        };
        let mut caught = None;
        run::many(0..PLANTED_SEEDS, THREADS, &options, |report| {
            if report.failure.is_some() {
                caught = Some(report.seed);
            }
            caught.is_none()
        });
        assert!(
            caught.is_some(),
            "{bug:?} was not found in {PLANTED_SEEDS} seeds"
        );
    }
}
