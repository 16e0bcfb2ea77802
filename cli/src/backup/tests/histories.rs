//! Random histories: full and incremental backups, deletions, garbage collections; what is listed restores exactly.

use std::time::Duration;

use proptest::prelude::*;

use super::store::Objects;
use super::*;
use crate::backup::gc::{self, Options};
use crate::backup::verify::verify;

#[derive(Clone, Debug)]
enum Step {
    /// Fills blocks with noise (or zeros, for 0).
    Write {
        block: usize,
        blocks: usize,
        seed: u64,
    },
    Grow {
        blocks: usize,
    },
    Full,
    Incremental {
        base: prop::sample::Index,
    },
    Delete {
        which: prop::sample::Index,
    },
    Collect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..24usize, 1..6usize, 0..4u64)
            .prop_map(|(block, blocks, seed)| Step::Write { block, blocks, seed }),
        1 => (1..5usize).prop_map(|blocks| Step::Grow { blocks }),
        1 => Just(Step::Full),
        3 => any::<prop::sample::Index>().prop_map(|base| Step::Incremental { base }),
        1 => any::<prop::sample::Index>().prop_map(|which| Step::Delete { which }),
        1 => Just(Step::Collect),
    ]
}

async fn play(steps: Vec<Step>, secret: Option<Secret>) {
    let objects = Objects::new();
    let repo = repository(&objects.storage(), secret.as_ref())
        .await
        .unwrap();
    let mut image = vec![0u8; 16 * 4096];
    let mut kept: Vec<(Manifest, Vec<u8>)> = Vec::new();
    for step in steps {
        match step {
            Step::Write {
                block,
                blocks,
                seed,
            } => {
                let start = (block * 4096).min(image.len());
                let end = (start + blocks * 4096).min(image.len());
                match seed {
                    0 => image[start..end].fill(0),
                    seed => image[start..end].copy_from_slice(&noise(seed, end - start)),
                }
            }
            Step::Grow { blocks } => image.resize(image.len() + blocks * 4096, 0),
            Step::Full => kept.push((full(&repo, &image).await.unwrap(), image.clone())),
            Step::Incremental { base } if !kept.is_empty() => {
                let (base, old) = base.get(&kept);
                let plan = plan(image.len(), Some(base.clone()), difference(old, &image));
                let source = Image::new(image.clone());
                let made = writer::backup(&repo, &source, plan, &Silent).await.unwrap();
                kept.push((made, image.clone()));
            }
            Step::Delete { which } if !kept.is_empty() => {
                let (gone, _) = kept.remove(which.index(kept.len()));
                writer::delete(&repo, &gone.object_name()).await.unwrap();
            }
            Step::Incremental { .. } | Step::Delete { .. } => {}
            Step::Collect => {
                let options = Options {
                    grace: Duration::ZERO,
                    dry_run: false,
                    break_locks: false,
                };
                gc::collect(&repo, options).await.unwrap();
            }
        }
    }
    let (listed, damaged) = repo.backups().await.unwrap();
    assert!(damaged.is_empty());
    assert_eq!(listed.len(), kept.len());
    let report = verify(&repo, None, true, &Silent).await.unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
    for (manifest, expected) in &kept {
        assert!(restored(&repo, manifest).await.unwrap() == *expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_listed_restores_exactly(
        steps in prop::collection::vec(step(), 1..40),
        encrypted in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(play(steps, encrypted.then(secret)));
    }
}

#[tokio::test]
async fn volumes_of_many_pages_reuse_what_did_not_change() {
    // Small segments make many pages of a small volume; almost all of it is zeros.
    let segment = 4096u32;
    let objects = Objects::new();
    let repo = Repository::create(objects.storage(), None, segment)
        .await
        .unwrap();
    let pages = 5u64;
    let length = (pages * crate::backup::manifest::PAGE_SEGMENTS) as usize * segment as usize;
    let mut image = vec![0; length];
    image[4096..8192].copy_from_slice(&noise(1, 4096));
    image[length - 4096..].copy_from_slice(&noise(2, 4096));
    let first = full(&repo, &image).await.unwrap();
    assert_eq!(first.sent_objects, 4);
    assert_eq!(first.pages.iter().filter(|p| p.is_empty()).count(), 3);
    image[length / 2..][..4096].copy_from_slice(&noise(3, 4096));
    let mut set = SegmentSet::none(first.geometry());
    set.add(length as u64 / 2, 4096);
    let plan = plan(length, Some(first.clone()), Reading::Only(set));
    let source = Image::new(image.clone());
    let second = writer::backup(&repo, &source, plan, &Silent);
    let second = second.await.unwrap();
    assert_eq!((second.read_bytes, second.sent_objects), (4096, 2));
    assert!(restored(&repo, &second).await.unwrap() == image);
}
