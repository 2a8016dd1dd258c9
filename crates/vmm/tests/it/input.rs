//! Bad files and bad circumstances: each refused with its name, nothing left running.

use std::path::Path;
use std::process::Command;

use forkd_vmm::client::{Error, Process, SnapshotFiles};

use crate::support::{World, kvm, load, program};

/// Loads damaged files and answers what the template said.
fn refusal(files: &SnapshotFiles) -> String {
    match Process::template(program(), "bad", std::slice::from_ref(files), &[]) {
        Err(Error::Refused(failure)) => failure.message,
        other => panic!("{other:?}"),
    }
}

fn damaged(path: &Path, change: impl FnOnce(&mut Vec<u8>), files: &SnapshotFiles) -> String {
    let good = std::fs::read(path).unwrap();
    let mut bad = good.clone();
    change(&mut bad);
    std::fs::write(path, &bad).unwrap();
    let message = refusal(files);
    std::fs::write(path, &good).unwrap();
    message
}

#[test]
fn damaged_files_are_refused_by_name() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (_, files) = world.template();
    let (state, index) = (&files.state, &files.index);
    let says = |message: String, words: &str| assert!(message.contains(words), "{message}");
    says(
        damaged(state, |bytes| bytes.truncate(100), &files),
        "truncated",
    );
    says(damaged(state, |bytes| bytes[500] ^= 1, &files), "damaged");
    says(damaged(state, |bytes| bytes[8] = 99, &files), "version 99");
    says(damaged(state, |bytes| bytes.clear(), &files), "truncated");
    says(
        damaged(index, |bytes| bytes.truncate(50), &files),
        "layer index",
    );
    says(damaged(index, |bytes| bytes[40] ^= 1, &files), "damaged");
    says(damaged(index, |bytes| bytes[8] = 7, &files), "version 7");
    says(
        damaged(&files.memory, |bytes| bytes.truncate(4096), &files),
        "memory file",
    );
    load("good", &[files]);
}

#[test]
fn files_of_two_snapshots_do_not_mix() {
    let Some(mut world) = World::new() else {
        return;
    };
    let (_, files) = world.template();
    let mut other = Process::boot_test_guest(program(), 32, &[]).unwrap();
    let directory = world.directory("other");
    let mut branch = other.branch().unwrap();
    let request = forkd_wire::vmm::Request::Write;
    let (smaller, _) = branch.template.write(&request, &directory).unwrap();
    let mixed = SnapshotFiles {
        state: smaller.state.clone(),
        ..files.clone()
    };
    assert!(refusal(&mixed).contains("not of one snapshot"));
    let layers = [files, smaller];
    match Process::template(program(), "mixed", &layers, &[]) {
        Err(Error::Refused(failure)) => assert!(failure.message.contains("lowest layer")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn impossible_machines_are_refused() {
    if !kvm() {
        return;
    }
    for (argument, words) in [("--memory=0", "choose"), ("--memory=262145", "choose")] {
        let arguments = ["boot".into(), "--test-guest".into(), argument.to_owned()];
        let mut process = Process::start(program(), &arguments).unwrap();
        match process.next() {
            Ok((_, forkd_wire::vmm::Reply::Failed(failure), _)) => {
                assert!(failure.message.contains(words), "{}", failure.message);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(process.wait().unwrap().unwrap().exit_status(), Some(1));
    }
}

#[test]
fn memory_that_cannot_be_mapped_is_an_answer() {
    if !kvm() {
        return;
    }
    let script = format!("ulimit -v 200000; exec {} \"$@\"", program().display());
    let arguments = [
        "-c".into(),
        script,
        "sh".into(),
        "boot".into(),
        "--test-guest".into(),
    ];
    let mut process = Process::start(Path::new("/bin/sh"), &arguments).unwrap();
    match process.next() {
        Ok((_, forkd_wire::vmm::Reply::Failed(failure), _)) => {
            assert!(
                failure.message.contains("cannot map"),
                "{}",
                failure.message
            );
            assert_eq!(failure.errno, 12);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn no_permission_for_kvm_is_said_clearly() {
    if !kvm() || !rustix::process::geteuid().is_root() {
        println!("skipped: only root can try as somebody else");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("forkd-vmm");
    std::fs::copy(program(), &copy).unwrap();
    let open_to_all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open_to_all).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&copy)
        .arg("check")
        .output();
    let Ok(output) = output else {
        println!("skipped: setpriv is not installed");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        println!("skipped: /dev/kvm is open to everybody here");
        return;
    }
    assert!(
        said.contains("no permission to open /dev/kvm") && said.contains("group"),
        "{said}"
    );
}

#[test]
fn every_command_has_help() {
    for command in [&[][..], &["template"], &["boot"], &["bench"], &["check"]] {
        let output = Command::new(program())
            .args(command)
            .arg("--help")
            .output()
            .unwrap();
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("Usage:"), "{text}");
    }
}

/// Boots what cannot boot and answers what the monitor said.
fn no_boot(arguments: &[&str]) -> String {
    let mut all = vec!["boot".to_owned()];
    all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let mut process = Process::start(program(), &all).unwrap();
    let message = match process.next() {
        Ok((_, forkd_wire::vmm::Reply::Failed(failure), _)) => failure.message,
        other => panic!("{other:?}"),
    };
    assert_eq!(process.wait().unwrap().unwrap().exit_status(), Some(1));
    message
}

#[test]
fn what_cannot_boot_is_refused_with_the_reason() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let text = path("text");
    std::fs::write(&text, "this is no kernel").unwrap();
    let kernel = |file: &str| format!("--kernel={file}");
    let says = |message: String, words: &[&str]| {
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    };
    says(no_boot(&[&kernel(&text)]), &["kernel"]);
    says(no_boot(&[&kernel(&path("absent"))]), &["absent"]);
    let disk = format!("--disk={}", path("missing"));
    says(no_boot(&["--test-guest", &disk]), &["missing"]);
    says(no_boot(&[&kernel(&text), &disk]), &["missing"]);
    let few = ["--memory=63", &kernel(&text)];
    says(no_boot(&few), &["63", "64 or more"]);
    let empty = path("empty");
    std::fs::write(&empty, "").unwrap();
    let disk = format!("--disk={empty}");
    says(no_boot(&["--test-guest", &disk]), &["disk"]);
}
