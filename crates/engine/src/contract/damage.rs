//! Snapshots that cannot be used: each is refused with the file's name, and nothing is left running.

use std::fs::{self, File};
use std::path::Path;

use super::{Frozen, World};
use crate::{Error, SnapshotFiles};

/// A copy of a snapshot to be damaged.
fn copy(world: &World, frozen: &Frozen) -> SnapshotFiles {
    let (_, files) = world.full();
    for (from, to) in [
        (&frozen.files.memory, &files.memory),
        (&frozen.files.state, &files.state),
    ] {
        let (from, to) = (File::open(from).unwrap(), File::create_new(to).unwrap());
        forkd_host::sparse::copy(&from, &to).unwrap();
    }
    files
}

fn truncate(path: &Path, part: u64) {
    let file = File::options().write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len * part / 10).unwrap();
}

/// Truncated, altered, emptied or missing: refused when the template is made.
pub(super) async fn damaged_files_are_refused(world: &World, frozen: &Frozen) {
    type Damage = fn(&SnapshotFiles) -> std::path::PathBuf;
    let damages: [(&str, Damage); 7] = [
        ("truncated state", |files| {
            truncate(&files.state, 5);
            files.state.clone()
        }),
        ("empty state", |files| {
            truncate(&files.state, 0);
            files.state.clone()
        }),
        ("altered state", |files| {
            let mut bytes = fs::read(&files.state).unwrap();
            let at = bytes.len() * 2 / 3;
            bytes[at] ^= 0x55;
            fs::write(&files.state, bytes).unwrap();
            files.state.clone()
        }),
        ("foreign state", |files| {
            fs::write(&files.state, [0x5a; 5000]).unwrap();
            files.state.clone()
        }),
        ("missing state", |files| {
            fs::remove_file(&files.state).unwrap();
            files.state.clone()
        }),
        ("truncated memory", |files| {
            truncate(&files.memory, 5);
            files.memory.clone()
        }),
        ("missing memory", |files| {
            fs::remove_file(&files.memory).unwrap();
            files.memory.clone()
        }),
    ];
    for (name, damage) in damages {
        let files = copy(world, frozen);
        let path = damage(&files);
        let error = world.template(files).await.expect_err(name);
        let blamed = match &error {
            Error::Snapshot { path, .. } | Error::File { path, .. } => path,
            other => panic!("{name}: {other:?}"),
        };
        assert_eq!(*blamed, path, "{name}: {error}");
    }
}

/// State of one machine is not loaded into another.
pub(super) async fn a_wrong_machine_is_refused(world: &World, frozen: &Frozen) {
    let other = World::new(
        world.engine.clone(),
        crate::MachineSpec {
            memory_mib: world.machine.memory_mib + 64,
            ..world.machine.clone()
        },
        &world.place("other").1,
        world.patience,
    );
    let error = other
        .template(frozen.files.clone())
        .await
        .expect_err("another machine");
    assert!(matches!(error, Error::Snapshot { .. }), "{error:?}");
}

/// A save never writes over anything; the VM goes on.
pub(super) async fn existing_files_are_not_overwritten(world: &World, frozen: &Frozen) {
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    let (spec, files) = world.full();
    fs::write(&files.memory, "precious").unwrap();
    vm.save(spec).await.expect_err("the file exists");
    assert_eq!(fs::read(&files.memory).unwrap(), b"precious");
    assert!(!files.state.exists());
    assert!(agent.answers().await);
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}
