//! The process is killed before every step of every operation; the next one must find all or nothing.
//!
//! A child of the test binary runs the operation and aborts at the n-th step, for every n until it
//! comes through. Nothing of a child's memory survives, so the parent sees what a restart sees.

use std::process::{Command, Stdio};

use super::*;
use crate::fault;

/// In the child: which operation, on which directory, killed at which step.
const OPERATION: &str = "FORKD_TEST_CRASH_OPERATION";
const ROOT: &str = "FORKD_TEST_CRASH_ROOT";
const STEP: &str = "FORKD_TEST_CRASH_STEP";
/// No operation has more steps.
const STEPS_MAX: i64 = 100;

/// Not a test by itself: what the children of the others run.
#[test]
fn child() {
    let Ok(operation) = std::env::var(OPERATION) else {
        return;
    };
    let dir = PathBuf::from(std::env::var_os(ROOT).unwrap());
    let store = Store {
        root: dir.join("snapshots"),
    };
    fault::arm(std::env::var(STEP).unwrap().parse().unwrap());
    run(&store, &operation);
    fault::arm(i64::MAX);
}

fn run(store: &Store, operation: &str) {
    match operation {
        "publish" => {
            let base = store.get(&tag("base")).unwrap();
            let draft = store.begin(&tag("new")).unwrap();
            write_layer(&draft, &[(1, Some(1))]);
            let over = base.manifest.reference();
            draft.publish(about(MemoryDraft::Layer { over })).unwrap();
        }
        "flatten" => drop(store.flatten(&tag("top"), &tag("new")).unwrap()),
        "cascade" => drop(store.remove(&tag("base"), Dependents::Cascade).unwrap()),
        "detach" => drop(store.remove(&tag("base"), Dependents::Detach).unwrap()),
        other => panic!("no operation {other}"),
    }
}

/// Runs the operation in a child that is killed at a step; answers whether it came through.
fn run_killed_at(step: i64, operation: &str, world: &World) -> bool {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "store::tests::crash::child", "--nocapture"]);
    child.env(OPERATION, operation).env(ROOT, world.dir.path());
    child.env(STEP, step.to_string());
    child.stdout(Stdio::null()).stderr(Stdio::null());
    child.status().unwrap().success()
}

/// Answers the tags left after each kill, and last those after success.
fn killed_at_every_step(operation: &str) -> Vec<Vec<String>> {
    let mut outcomes = Vec::new();
    for step in 0..STEPS_MAX {
        let world = world();
        let base = world.full("base", &[(0, 1)]);
        world.layer("top", &base, &[(1, Some(2))]);
        let done = run_killed_at(step, operation, &world);
        let reopened = Store::open(world.store.root()).unwrap();
        for line in reopened.list().unwrap() {
            assert_eq!(line.status, Status::Ready, "{operation} {step}: {line:?}");
            reopened.verify(&line.tag).unwrap();
        }
        let hidden = |name: &String| name.starts_with('.') && !name.starts_with(".base-");
        let left = world.left();
        assert!(!left.iter().any(hidden), "{operation} {step}: {left:?}");
        outcomes.push(world.tags(Status::Ready));
        for tag in ["new", "top", "base"].map(tag) {
            let _absent = reopened.remove(&tag, Dependents::Cascade);
        }
        assert_eq!(world.left(), [""; 0], "{operation} {step}");
        if done {
            return outcomes;
        }
    }
    panic!("{operation} does not end");
}

#[test]
fn publishing_is_all_or_nothing() {
    let outcomes = killed_at_every_step("publish");
    assert!(outcomes.len() > 6, "{outcomes:?}");
    for tags in &outcomes {
        assert!(
            *tags == ["base", "top"] || *tags == ["base", "new", "top"],
            "{tags:?}"
        );
    }
    assert_eq!(outcomes[0].len(), 2);
    assert_eq!(outcomes.last().unwrap().len(), 3);
}

#[test]
fn flattening_is_all_or_nothing() {
    let outcomes = killed_at_every_step("flatten");
    assert_eq!(*outcomes.last().unwrap(), ["base", "new", "top"]);
}

#[test]
fn removing_never_leaves_a_layer_without_its_base() {
    let outcomes = killed_at_every_step("cascade");
    assert!(outcomes.contains(&vec!["base".to_owned()]));
    assert_eq!(*outcomes.last().unwrap(), [""; 0]);
}

#[test]
fn taking_a_tag_away_keeps_the_layers_over_it() {
    for tags in killed_at_every_step("detach") {
        assert!(tags.contains(&"top".to_owned()), "{tags:?}");
    }
}
