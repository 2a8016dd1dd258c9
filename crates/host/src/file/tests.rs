//! On a real directory; death of an owner is played by closing its lock.

use std::collections::BTreeSet;
use std::process;

use super::*;

fn root() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    entries.map(name).collect()
}

/// What a killed process leaves: the directory stays, the lock is gone.
fn abandon(dir: TempDir) -> PathBuf {
    dir.abandon()
}

/// Tries until it works. Other tests start programs, and a program being started holds copies of our
/// locks between its fork and its exec.
fn patiently<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1000 {
        if let Some(done) = attempt() {
            return done;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("did not work within five seconds");
}

#[test]
fn publishes_whole_files_and_replaces_them() {
    let root = root();
    let path = root.path().join("record.json");
    publish(&path, b"one").unwrap();
    publish(&path, b"two").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(names(root.path()).len(), 1);
}

#[test]
fn a_failed_publish_leaves_nothing() {
    let root = root();
    let path = root.path().join("taken");
    fs::create_dir_all(path.join("child")).unwrap();
    assert!(publish(&path, b"x").is_err());
    assert_eq!(names(root.path()).len(), 1);
    let error = publish(&root.path().join("no/such/dir"), b"x").unwrap_err();
    assert!(error.to_string().starts_with("cannot create "), "{error}");
}

#[test]
fn rename_new_never_replaces() {
    let root = root();
    let (from, to) = (root.path().join("from"), root.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&to).unwrap();
    assert!(matches!(rename_new(&from, &to), Err(Error::Exists { .. })));
    fs::remove_dir(&to).unwrap();
    rename_new(&from, &to).unwrap();
    assert!(!from.exists() && to.exists());
}

#[test]
fn temporary_directories_go_with_their_owner() {
    let root = root();
    let dir = TempDir::create(root.path(), "staging").unwrap();
    fs::write(dir.path().join("file"), b"x").unwrap();
    drop(dir);
    let dir = TempDir::create(root.path(), "staging").unwrap();
    dir.remove().unwrap();
    let dir = TempDir::create(root.path(), "staging").unwrap();
    dir.publish(&root.path().join("final")).unwrap();
    assert_eq!(names(root.path()), BTreeSet::from(["final".to_owned()]));
}

#[test]
fn a_directory_whose_name_is_taken_is_removed() {
    let root = root();
    fs::create_dir(root.path().join("final")).unwrap();
    let dir = TempDir::create(root.path(), "staging").unwrap();
    let refused = dir.publish(&root.path().join("final"));
    assert!(matches!(refused, Err(Error::Exists { .. })));
    assert_eq!(names(root.path()).len(), 1);
}

#[test]
fn sweeps_only_what_is_abandoned_and_ours() {
    let root = root();
    let alive = TempDir::create(root.path(), "staging").unwrap();
    let other = TempDir::create(root.path(), "other").unwrap();
    let dead = abandon(TempDir::create(root.path(), "staging").unwrap());
    fs::write(dead.join("file"), b"x").unwrap();
    let other = abandon(other);
    let swept = patiently(|| sweep(root.path(), "staging").unwrap().pop());
    assert_eq!(swept, dead);
    assert!(alive.path().exists() && other.exists() && !dead.exists());
    assert_eq!(
        sweep(root.path(), "staging").unwrap(),
        Vec::<PathBuf>::new()
    );
}

#[test]
fn creating_races_with_sweeping_without_loss() {
    let root = root();
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            for _ in 0..200 {
                sweep(root.path(), "staging").unwrap();
            }
        });
        for _ in 0..200 {
            let dir = TempDir::create(root.path(), "staging").unwrap();
            fs::write(dir.path().join("file"), b"x").unwrap();
            dir.remove().unwrap();
        }
        sweeper.join().unwrap();
    });
    assert!(names(root.path()).is_empty());
}

#[test]
fn what_a_dead_holder_left_is_waited_for() {
    let root = root();
    let path = root.path().join("lock");
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    fs::write(&path, format!("{}\n", dead.id())).unwrap();
    let left = fs::File::open(&path).unwrap();
    rustix::fs::flock(&left, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let dropped = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(left);
    });
    LockFile::acquire(&path).unwrap();
    dropped.join().unwrap();
}

#[test]
fn a_lock_names_its_holder_and_ends_with_it() {
    let root = root();
    let path = root.path().join("lock");
    let lock = LockFile::acquire(&path).unwrap();
    let refused = LockFile::acquire(&path).unwrap_err();
    let holder = Some(process::id());
    assert!(matches!(&refused, Error::Locked { holder: found, .. } if *found == holder));
    assert!(
        refused
            .to_string()
            .contains(&format!("process {}", process::id()))
    );
    drop(lock);
    patiently(|| LockFile::acquire(&path).ok());
}

#[test]
fn too_little_space_is_said_in_numbers() {
    let root = root();
    require_free(root.path(), 1).unwrap();
    let refused = require_free(root.path(), u64::MAX).unwrap_err();
    assert!(refused.to_string().contains("MiB are needed"), "{refused}");
}

#[test]
fn bounded_reads_stop_at_the_bound() {
    let root = root();
    let path = root.path().join("file");
    fs::write(&path, b"12345").unwrap();
    assert_eq!(read_bounded(&path, 5).unwrap(), b"12345");
    assert!(read_bounded(&path, 4).is_err());
    assert!(read_bounded(&root.path().join("absent"), 4).is_err());
}

#[test]
fn a_claimed_name_is_taken_while_its_owner_lives() {
    let root = root();
    let claim = || TempDir::claim(root.path(), "draft", "tag");
    let first = claim().unwrap();
    assert!(matches!(claim(), Err(Error::Locked { .. })));
    assert!(is_claimed(first.path()).unwrap());
    let left = abandon(first);
    fs::write(left.join("file"), b"x").unwrap();
    patiently(|| (!is_claimed(&left).unwrap()).then_some(()));
    let second = patiently(|| claim().ok());
    assert_eq!(names(second.path()).len(), 0);
    drop(second);
    claim().unwrap();
}

#[test]
fn a_directory_in_use_cannot_be_taken() {
    let root = root();
    let path = root.path().join("dir");
    assert!(DirLock::shared(&path).unwrap().is_none());
    fs::create_dir(&path).unwrap();
    let users = [
        DirLock::shared(&path).unwrap(),
        DirLock::shared(&path).unwrap(),
    ];
    assert!(users.iter().all(Option::is_some));
    assert!(DirLock::exclusive(&path).unwrap().is_none());
    drop(users);
    let _alone = patiently(|| DirLock::exclusive(&path).unwrap());
}
