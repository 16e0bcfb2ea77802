//! Whole clusters from seeds: 1,000 of them in `make test`, the same twice gives the same history, and
//! planted mistakes are found.

use ashlar_tests::sim::run::{self, Options, Summary};

/// Seeds of the regular run.
const SEEDS: u64 = 1000;
/// Threads: `make test` is meant for two cores.
const THREADS: usize = 2;

/// Runs seeds, none of which may fail; `flags` replay them.
fn all_pass(seeds: u64, options: &Options, flags: &str) -> Summary {
    let mut failures = Vec::new();
    let summary = run::many(0..seeds, THREADS, options, |report| {
        if let Some(failure) = &report.failure {
            failures.push(format!("seed {}: {failure}", report.seed));
        }
        failures.len() < 5
    });
    assert!(
        failures.is_empty(),
        "{}\nreplay with: ashlar-sim {flags} --verbose --seed N",
        failures.join("\n")
    );
    summary
}

#[test]
fn a_thousand_clusters_keep_every_promise() {
    let summary = all_pass(SEEDS, &Options::default(), "");
    assert_eq!(summary.seeds, SEEDS);
    assert!(
        summary.answered * 10 > summary.requests * 8,
        "{summary:?}: too few requests answered"
    );
}

#[test]
fn readers_come_and_go_in_three_hundred_clusters() {
    let options = Options {
        readers: true,
        ..Options::default()
    };
    let summary = all_pass(300, &options, "--readers");
    assert!(summary.answered * 10 > summary.requests * 7, "{summary:?}");
}

#[test]
fn snapshots_are_taken_in_eight_hundred_clusters() {
    let options = Options {
        snapshots: true,
        ..Options::default()
    };
    let summary = all_pass(800, &options, "--snapshots");
    assert!(
        summary.snapshots > 1600 && summary.resizes > 500,
        "{summary:?}"
    );
}

#[test]
fn twelve_hundred_clones_inherit_what_they_should_and_nothing_else() {
    let options = Options {
        snapshots: true,
        clones: true,
        ..Options::default()
    };
    let summary = all_pass(1200, &options, "--snapshots --clones");
    assert!(
        summary.snapshots > 1800 && summary.resizes > 700,
        "{summary:?}"
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

/// Mistakes that these schedules provoke often enough, and the seeds within which each must show (about
/// three times as many as it took). The others (`run::PLANTED`) are caught by the session engine's own
/// tests; here they show after many thousands of seeds or not at all.
#[cfg(feature = "planted-bugs")]
const PLANTED: [(nbd_client::engine::PlantedBug, u64); 3] = {
    use nbd_client::engine::PlantedBug as Bug;
    [
        (Bug::AckBeforeExclusion, 200),
        (Bug::SkipReconcile, 100),
        (Bug::ReadInFlight, 5500),
    ]
};

#[cfg(feature = "planted-bugs")]
#[test]
fn planted_mistakes_are_caught() {
    for (bug, seeds) in PLANTED {
        let options = Options {
            planted_bug: Some(bug),
            // The mistakes are the session's: the faster store shows them sooner.
            backend: Some(ashlar_tests::sim::node::Backend::Memory),
            ..Options::default()
        };
        let mut caught = None;
        run::many(0..seeds, THREADS, &options, |report| {
            if report.failure.is_some() {
                caught = Some(report.seed);
            }
            caught.is_none()
        });
        assert!(caught.is_some(), "{bug:?} was not found in {seeds} seeds");
    }
}
