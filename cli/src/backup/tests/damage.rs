//! Flipped bits, missing objects, and deaths at every single change of the storage.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::store::Objects;
use super::*;
use crate::backup::error::BackupError;
use crate::backup::gc::{self, Options};
use crate::backup::verify::verify;

const NOW: Options = Options {
    grace: Duration::ZERO,
    dry_run: false,
    break_locks: true,
};

/// A base with something in most segments, and the same with some changes.
fn images() -> (Vec<u8>, Vec<u8>) {
    let mut old = noise(1, 6 * SEGMENT as usize + 4096);
    old[SEGMENT as usize..2 * SEGMENT as usize].fill(0);
    old[4 * SEGMENT as usize..][..5000].fill(b'x');
    let mut new = old.clone();
    new[3 * SEGMENT as usize] ^= 1;
    new[5 * SEGMENT as usize..6 * SEGMENT as usize].fill(0);
    (old, new)
}

#[tokio::test]
async fn every_flipped_bit_is_found_by_verify_and_by_restore() {
    let (old, new) = images();
    for secret in [None, Some(secret())] {
        let objects = Objects::new();
        let repo = repository(&objects.storage(), secret.as_ref())
            .await
            .unwrap();
        let first = full(&repo, &old).await.unwrap();
        let plan = plan(new.len(), Some(first.clone()), difference(&old, &new));
        let source = Image::new(new.clone());
        let second = writer::backup(&repo, &source, plan, &Silent);
        let second = second.await.unwrap();
        let report = verify(&repo, None, true, &Silent).await.unwrap();
        assert!(report.problems.is_empty(), "{report:?}");
        for name in objects.names().await {
            let good = objects.get(&name).await;
            let some = [
                0,
                4,
                5,
                6,
                7,
                8,
                12,
                16,
                39,
                40,
                71,
                72,
                73,
                good.len() / 2,
                good.len() - 1,
            ];
            for (at, bit) in some.into_iter().flat_map(|at| [(at, 0), (at, 7)]) {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                objects.put(&name, bad).await;
                found_everywhere(&objects, secret.as_ref(), &name, [&first, &second]).await;
            }
            for cut in [0, 71, good.len() - 1] {
                objects.put(&name, good[..cut].to_vec()).await;
                found_everywhere(&objects, secret.as_ref(), &name, [&first, &second]).await;
            }
            objects.delete(&name).await;
            if !name.ends_with(".manifest") {
                found_everywhere(&objects, secret.as_ref(), &name, [&first, &second]).await;
            }
            objects.put(&name, good).await;
        }
        assert!(restored(&repo, &first).await.unwrap() == old);
        assert!(restored(&repo, &second).await.unwrap() == new);
    }
}

async fn found_everywhere(
    objects: &Objects,
    secret: Option<&Secret>,
    name: &str,
    backups: [&Manifest; 2],
) {
    let Ok(repo) = Repository::open(objects.storage(), secret).await else {
        return;
    };
    let report = verify(&repo, None, true, &Silent).await.unwrap();
    assert_eq!(report.problems.len(), 1, "{name}: {report:?}");
    assert_eq!(report.problems[0].object, name);
    assert!(!report.bad_backups.is_empty());
    for manifest in backups {
        let id = manifest.backup_id.to_string();
        let result = match repo.backup(&id).await {
            Ok(found) => restored(&repo, &found).await.map(drop),
            Err(e) => Err(e),
        };
        // A backup that does not need the object is restored.
        assert_eq!(
            result.is_err(),
            report.bad_backups.contains(&id),
            "{name} {result:?}"
        );
    }
    let collected = gc::collect(&repo, NOW).await;
    if !name.starts_with("data/") {
        assert!(
            matches!(collected, Err(BackupError::GarbageUnknown { .. })),
            "{name}"
        );
    }
}

#[tokio::test]
async fn a_backup_that_dies_anywhere_is_not_listed_and_goes_on_later() {
    let (old, new) = images();
    let mut deaths = 0;
    loop {
        let objects = Objects::new();
        let repo = repository(&objects.storage(), Some(&secret()))
            .await
            .unwrap();
        let first = full(&repo, &old).await.unwrap();
        let (storage, left) = objects.dying(deaths);
        let mortal = Repository::open(storage, Some(&secret())).await;
        let plan = || plan(new.len(), Some(first.clone()), difference(&old, &new));
        let source = Image::new(new.clone());
        let result = writer::backup(&mortal.unwrap(), &source, plan(), &Silent).await;
        let (listed, damaged) = repo.backups().await.unwrap();
        assert!(damaged.is_empty());
        if result.is_ok() {
            // Only the release of the lock may fail.
            assert!(listed.len() == 2);
            if left.load(Ordering::SeqCst) >= 0 {
                break;
            }
        } else if listed.len() == 2 {
            panic!("it failed, and is listed");
        }
        // It goes on, or is cleaned away; both at every second death.
        if deaths % 2 == 0 {
            let second = writer::backup(&repo, &source, plan(), &Silent)
                .await
                .unwrap();
            assert!(restored(&repo, &second).await.unwrap() == new);
        }
        gc::collect(&repo, NOW).await.unwrap();
        let report = verify(&repo, None, true, &Silent).await.unwrap();
        assert!(report.problems.is_empty());
        assert!(restored(&repo, &first).await.unwrap() == old);
        let names = objects.names().await;
        assert!(!names.iter().any(|n| n.starts_with("locks/")), "{names:?}");
        deaths += 1;
    }
    assert!(deaths >= 4, "only {deaths} deaths were tried");
}

#[tokio::test]
async fn what_a_dead_run_sent_is_not_sent_again() {
    let bytes = noise(5, 20 * SEGMENT as usize);
    let objects = Objects::new();
    let repo = repository(&objects.storage(), None).await.unwrap();
    // The lock and ten segments.
    let (storage, _) = objects.dying(11);
    let mortal = Repository::open(storage, None).await.unwrap();
    full(&mortal, &bytes).await.unwrap_err();
    let manifest = full(&repo, &bytes).await.unwrap();
    // Ten segments and the page.
    assert_eq!(manifest.sent_objects, 11);
    let again = full(&repo, &bytes).await.unwrap();
    assert_eq!((again.sent_objects, again.sent_bytes), (0, 0));
}

#[tokio::test]
async fn garbage_is_not_collected_beside_a_backup_nor_before_its_time() {
    let bytes = noise(6, 4 * SEGMENT as usize);
    let objects = Objects::new();
    let repo = repository(&objects.storage(), None).await.unwrap();
    // It dies with its lock in place.
    let (storage, _) = objects.dying(3);
    let mortal = Repository::open(storage, None).await.unwrap();
    full(&mortal, &bytes).await.unwrap_err();
    let careful = Options {
        break_locks: false,
        ..NOW
    };
    let refused = gc::collect(&repo, careful).await;
    assert!(
        matches!(refused, Err(BackupError::Locked { .. })),
        "{refused:?}"
    );
    let later = Options {
        grace: Duration::from_secs(3600),
        ..NOW
    };
    let collected = gc::collect(&repo, later).await.unwrap();
    assert_eq!((collected.deleted_objects, collected.young_objects), (0, 2));
    let only_say = Options {
        dry_run: true,
        ..NOW
    };
    assert_eq!(
        gc::collect(&repo, only_say).await.unwrap().deleted_objects,
        2
    );
    assert_eq!(
        gc::collect(&repo, careful).await.unwrap().deleted_objects,
        2
    );
    assert_eq!(objects.names().await, ["ashlar-repository"]);
}

#[tokio::test]
async fn what_a_put_left_behind_in_a_directory_is_collected() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("file://{}", directory.path().display());
    let storage = Storage::open(&url, crate::backup::storage::Absent::Create).unwrap();
    let repo = repository(&storage, Some(&secret())).await.unwrap();
    let bytes = noise(8, 3 * SEGMENT as usize);
    let manifest = full(&repo, &bytes).await.unwrap();
    let left = directory.path().join("data").join("00").join("0123#1");
    std::fs::create_dir_all(left.parent().unwrap()).unwrap();
    std::fs::write(&left, b"half").unwrap();
    assert_eq!(gc::collect(&repo, NOW).await.unwrap().deleted_objects, 1);
    assert!(!left.exists());
    assert!(restored(&repo, &manifest).await.unwrap() == bytes);
}

#[tokio::test]
async fn a_backup_whose_lock_was_taken_away_is_not_listed() {
    struct Thief(Objects, Image);
    #[async_trait::async_trait]
    impl Source for Thief {
        async fn read(&self, offset: u64, length: u32) -> std::io::Result<Bytes> {
            for name in self.0.names().await {
                if name.starts_with("locks/") {
                    self.0.delete(&name).await;
                }
            }
            self.1.read(offset, length).await
        }
    }
    let bytes = noise(7, 2 * SEGMENT as usize);
    let objects = Objects::new();
    let repo = repository(&objects.storage(), None).await.unwrap();
    let thief = Thief(objects.clone(), Image::new(bytes.clone()));
    let result = writer::backup(
        &repo,
        &thief,
        plan(bytes.len(), None, Reading::All),
        &Silent,
    );
    assert!(matches!(result.await, Err(BackupError::LockLost)));
    assert!(repo.backups().await.unwrap().0.is_empty());
}
