//! Branches: snapshots of forks, and forks of those.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use forkd_host::sparse;
use forkd_wire::layer::Index;

use super::{Frozen, MARK, MARK_CONTENT, World};
use crate::{SnapshotFiles, Vm};

/// How deep layers are stacked.
const DEPTH: usize = 3;

/// A branch of a branch of a branch has what every one of them wrote.
pub(super) async fn layers_over_layers(world: &World, frozen: &Frozen) {
    if !world.engine.capabilities().save_layer {
        return;
    }
    let mut files = frozen.files.clone();
    for depth in 0..=DEPTH {
        let template = world.template(files.clone()).await.expect("template");
        let vm = world.fork_one(&template).await;
        let agent = world.agent(&vm).await;
        assert_eq!(agent.read(MARK).await.as_deref(), Some(MARK_CONTENT));
        for before in 0..depth {
            let content = agent.read(&name(before)).await;
            assert!(
                content == Some(content_of(before)),
                "level {before} seen from {depth}"
            );
        }
        assert_eq!(agent.read(&name(depth)).await, None);
        agent.write(&name(depth), &content_of(depth)).await;
        // Saved while it runs and talks.
        let (spec, branch) = world.layer(&files);
        let report = vm.save(spec).await.expect("save as a layer");
        world.note("saved a fork as a layer", &report);
        let agent = world.agent_after_save(&vm, agent).await;
        // What is written after the branch is not in it.
        agent.write(MARK, b"after the branch").await;
        vm.kill().await.expect("kill");
        template.close().await.expect("close");
        files = branch;
    }
}

fn name(level: usize) -> String {
    format!("/tmp/level{level}")
}

fn content_of(level: usize) -> Vec<u8> {
    (0..300_000_usize)
        .map(|i| (i * (level + 3) / 7) as u8)
        .collect()
}

/// Pages that a notice to the guest touches: a queue, and a buffer.
const NOTICE_PAGES: usize = 3;

/// Base and layer together are, byte for byte, what a full save writes.
pub(super) async fn layer_and_full_save_agree(world: &World, frozen: &Frozen) {
    if !world.engine.capabilities().save_layer {
        return;
    }
    let template = world
        .template(frozen.files.clone())
        .await
        .expect("template");
    let vm = world.fork_one(&template).await;
    let agent = world.agent(&vm).await;
    agent.write("/tmp/agree", &content_of(1)).await;
    vm.pause().await.expect("pause");
    let (spec, full) = world.full();
    vm.save(spec).await.expect("save");
    let (spec, layered) = world.layer(&frozen.files);
    vm.save(spec).await.expect("save as a layer");
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
    let flat = world.dir.join("flat");
    apply(&layered, &flat);
    // Each save leaves a word in guest memory that its connections have ended, where they do.
    let allowed = match world.engine.capabilities().keeps_connections {
        true => 0,
        false => NOTICE_PAGES,
    };
    let differing = differing_pages(&full.memory, &flat);
    assert!(differing.len() <= allowed, "pages differ at {differing:x?}");
    assert_forks(world, full).await;
}

fn apply(files: &SnapshotFiles, to: &Path) {
    let base = File::open(&files.memory).unwrap();
    let flat = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(to)
        .unwrap();
    sparse::copy(&base, &flat).unwrap();
    for layer in &files.layers {
        let index = Index::decode(&std::fs::read(&layer.index).unwrap()).unwrap();
        sparse::apply_layer(&flat, &File::open(&layer.memory).unwrap(), &index).unwrap();
    }
}

/// Where two files of the same size differ, bytes.
fn differing_pages(a: &Path, b: &Path) -> Vec<u64> {
    let pages = |path: &Path| -> (u64, BTreeMap<u64, blake3::Hash>) {
        let file = File::open(path).unwrap();
        let mut pages = BTreeMap::new();
        sparse::read_nonzero(&file, |offset, bytes| {
            // By page, because runs may be cut differently.
            for (index, page) in bytes.chunks(sparse::PAGE_SIZE as usize).enumerate() {
                let at = offset + index as u64 * sparse::PAGE_SIZE;
                if !sparse::is_zero(page) {
                    pages.insert(at, blake3::hash(page));
                }
            }
            Ok(())
        })
        .unwrap();
        (sparse::size(&file).unwrap(), pages)
    };
    let ((a_size, a), (b_size, b)) = (pages(a), pages(b));
    assert_eq!(a_size, b_size);
    let all = a.keys().chain(b.keys().filter(|at| !a.contains_key(at)));
    all.filter(|at| a.get(at) != b.get(at)).copied().collect()
}

/// A full save of a fork stands for itself.
async fn assert_forks(world: &World, files: SnapshotFiles) {
    let template = world.template(files).await.expect("template");
    let vm = world.fork_one(&template).await;
    // Saved paused, it runs when forked.
    let agent = world.agent(&vm).await;
    assert!(agent.read("/tmp/agree").await == Some(content_of(1)));
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}

/// A machine that was booted can be saved, go on, change, and leaves its snapshot as it was.
pub(super) async fn a_booted_machine_goes_on_after_its_save(world: &World, _: &Frozen) {
    let vm: Arc<dyn Vm> = world.boot().await;
    let agent = world.agent(&vm).await;
    agent.write(MARK, b"first").await;
    let (spec, files) = world.full();
    vm.save(spec).await.expect("save");
    let agent = world.agent_after_save(&vm, agent).await;
    agent.write(MARK, b"second").await;
    let template = world.template(files).await.expect("template");
    let fork = world.fork_one(&template).await;
    let forked = world.agent(&fork).await;
    assert_eq!(forked.read(MARK).await.as_deref(), Some(&b"first"[..]));
    assert_eq!(agent.read(MARK).await.as_deref(), Some(&b"second"[..]));
    if world.engine.capabilities().save_layer {
        // There is nothing it could be a layer over.
        let (spec, layer) = world.layer(&world.full().1);
        vm.save(spec)
            .await
            .expect_err("a booted machine has no base");
        assert!(!layer.state.exists());
        assert!(agent.answers().await);
    }
    fork.kill().await.expect("kill");
    vm.kill().await.expect("kill");
    template.close().await.expect("close");
}
