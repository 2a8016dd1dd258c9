//! What goes into the node: its first root, and a disk with programs, tests and guests.
//!
//! ```text
//! /lab/run            the script that is run
//! /lab/user           the part of the suite that does what users do
//! /lab/bin/           programs of this repository and busybox
//! /lab/tests/         test programs, named PACKAGE.TEST
//! /lab/guest/         vmlinuz and initramfs of the guests the tests boot
//! /lab/only/          for each of them, what the names of its tests must contain
//! /lab/in/            what --input named; the image store and the agent that --data named
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{Error, run};
use super::kernel::{Kernel, unpack};
use super::newc::Archive;
use super::{Args, root};

/// What the guests of the tests load, in the order that names disks and links.
const GUEST_MODULES: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "erofs",
    "overlay",
];
const FIRECRACKER: &str = "firecracker";
const CARGO: &str = "run this through cargo";
const NODE_INIT: &str = include_str!("../../lab/node-init.sh");
const GUEST_INIT: &str = include_str!("../../lab/guest-init.sh");
const SUITE: &str = include_str!("../../lab/suite.sh");
const USER: &str = include_str!("../../lab/user.sh");

/// Writes the first root of the node.
pub(crate) fn node_initramfs(
    cache: &Path,
    kernel: &Kernel,
    modules: &[&str],
    run: &Path,
) -> Result<PathBuf, Error> {
    let path = run.join("node.cpio");
    let archive = initramfs(cache, kernel, modules, NODE_INIT)?;
    fs::write(&path, archive).map_err(Error::file(&path))?;
    Ok(path)
}

/// Collects and packs the disk of inputs.
pub(crate) fn pack(
    args: &Args,
    cache: &Path,
    kernel: &Kernel,
    run: &Path,
) -> Result<PathBuf, Error> {
    let tree = run.join("inputs");
    for directory in ["bin", "tests", "only", "guest", "in"] {
        let path = tree.join(directory);
        fs::create_dir_all(&path).map_err(Error::file(&path))?;
    }
    let script = match &args.script {
        Some(path) => fs::read_to_string(path).map_err(Error::file(path))?,
        None => SUITE.to_owned(),
    };
    write(&tree.join("run"), script.as_bytes())?;
    write(&tree.join("user"), USER.as_bytes())?;
    write(&tree.join("filter"), args.filter.as_bytes())?;
    let length: &[u8] = if args.short { b"short" } else { b"full" };
    write(&tree.join("length"), length)?;
    copy(&busybox(cache)?, &tree.join("bin/busybox"))?;
    copy(&kernel.image, &tree.join("guest/vmlinuz"))?;
    let guest = initramfs(cache, kernel, GUEST_MODULES, GUEST_INIT)?;
    write(&tree.join("guest/initramfs"), &guest)?;
    programs(args, &tree)?;
    tests(args, &tree)?;
    firecracker(&tree.join("bin"))?;
    for input in &args.inputs {
        bring(input, &tree.join("in"))?;
    }
    if let Some(data) = &args.data {
        images(&data.join("images"), &tree)?;
    }
    let image = run.join("inputs.erofs");
    root::pack(&tree, &image, &[])?;
    fs::remove_dir_all(&tree).map_err(Error::file(&tree))?;
    Ok(image)
}

/// Takes the images along, without what only building them needs, and the agent that made them.
fn images(store: &Path, tree: &Path) -> Result<(), Error> {
    let into = tree.join("in/images");
    fs::create_dir_all(&into).map_err(Error::file(&into))?;
    for part in ["blobs", "images", "inputs"] {
        bring(&store.join(part), &into)?;
    }
    match std::env::var_os("FORKD_AGENT").map(PathBuf::from) {
        Some(agent) => bring(&agent, &tree.join("in")),
        None => Ok(()),
    }
}

fn bring(from: &Path, into: &Path) -> Result<(), Error> {
    let mut copy = Command::new("cp");
    copy.arg("-aL").arg(from).arg(into);
    run(&mut copy, "install the package coreutils")?;
    Ok(())
}

/// Takes Firecracker along, where this machine has it. It is not ours to bring: without it, what needs it says that it
/// was skipped.
fn firecracker(bin: &Path) -> Result<(), Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(FIRECRACKER));
    match found.find(|program| program.is_file()) {
        Some(program) => copy(&program, &bin.join(FIRECRACKER)),
        None => {
            crate::output::step("no firecracker on PATH: its tests are skipped");
            Ok(())
        }
    }
}

fn programs(args: &Args, tree: &Path) -> Result<(), Error> {
    let default = ["forkd-vmm", "forkd-cli"].map(String::from);
    let packages = if args.programs.is_empty() {
        &default[..]
    } else {
        &args.programs[..]
    };
    for package in packages {
        for program in build(&["build", "-p", package])? {
            if let Some(name) = program.file_name() {
                copy(&program, &tree.join("bin").join(name))?;
            }
        }
    }
    // As it is shipped, which is linked otherwise than what is built here.
    match std::env::var_os("FORKD_VMM").map(PathBuf::from) {
        Some(monitor) => copy(&monitor, &tree.join("bin/forkd-vmm")),
        None => Ok(()),
    }
}

fn tests(args: &Args, tree: &Path) -> Result<(), Error> {
    let default = ["forkd-vmm:lab", "forkd-engine=kvm:: firecracker::tests"].map(String::from);
    let named = if args.tests.is_empty() {
        &default[..]
    } else {
        &args.tests[..]
    };
    for name in named {
        let (name, only) = name.split_once('=').unwrap_or((name, ""));
        let (package, test) = name.split_once(':').unwrap_or((name, ""));
        let mut cargo = vec!["test", "--no-run", "-p", package];
        if test.is_empty() {
            cargo.push("--lib");
        } else {
            cargo.extend(["--test", test]);
        }
        for program in build(&cargo)?.iter().filter(|path| in_deps(path)) {
            let label = if test.is_empty() { "lib" } else { test };
            let label = format!("{package}.{label}");
            copy(program, &tree.join("tests").join(&label))?;
            write(&tree.join("only").join(&label), only.as_bytes())?;
        }
    }
    Ok(())
}

fn in_deps(program: &Path) -> bool {
    program
        .parent()
        .is_some_and(|parent| parent.ends_with("deps"))
}

/// Runs cargo and returns the programs it built.
fn build(arguments: &[&str]) -> Result<Vec<PathBuf>, Error> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(arguments)
        .arg("--message-format=json-render-diagnostics");
    let messages = run(&mut command, CARGO)?;
    let programs = String::from_utf8_lossy(&messages)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .collect();
    Ok(programs)
}

fn initramfs(
    cache: &Path,
    kernel: &Kernel,
    modules: &[&str],
    init: &str,
) -> Result<Vec<u8>, Error> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "modules", "tmp"] {
        archive.directory(name);
    }
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    let path = busybox(cache)?;
    let busybox = fs::read(&path).map_err(Error::file(&path))?;
    archive.file("bin/busybox", 0o755, &busybox);
    archive.symlink("bin/sh", "busybox");
    archive.file("init", 0o755, init.as_bytes());
    let mut order = String::new();
    for path in kernel.modules(modules)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let bytes = fs::read(&path).map_err(Error::file(&path))?;
        archive.file(&format!("modules/{name}"), 0o644, &bytes);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/load.list", 0o644, order.as_bytes());
    Ok(archive.finish())
}

fn busybox(cache: &Path) -> Result<PathBuf, Error> {
    Ok(unpack(cache, "busybox-static")?.join("bin/busybox"))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(Error::file(path))
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    fs::copy(from, to).map_err(Error::file(from))?;
    Ok(())
}
