//! A root file system of Debian packages, made by mmdebstrap.

use std::ffi::OsString;
use std::path::Path;

use super::{Debian, Defaults, Error, Tree, write_defaults};
use crate::tool::MMDEBSTRAP;
use crate::{Progress, name};

/// In every image: an agent's work talks to the network, and TLS needs roots to trust.
/// usr-is-merged stands in for a package that would bring all of perl.
pub(super) const BASE: &[&str] = &["ca-certificates", "netbase", "usr-is-merged"];
/// Makes the merged /usr by hand, as usr-is-merged expects it.
const MERGED_USR: &str = "/usr/share/mmdebstrap/hooks/maybe-merged-usr";
/// Leaves out what no program reads at run time; copyright files stay, as their licences ask.
const DPKG: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    // The root is thrown away if the machine dies: no need to wait for the disk at each file.
    "force-unsafe-io",
];
const APT: &[&str] = &[
    "APT::Install-Recommends \"false\"",
    "Acquire::Languages \"none\"",
    "Acquire::Retries \"3\"",
];
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Checks every word that will be on a command line, and puts the packages in order.
pub(super) fn plan(debian: &Debian) -> Result<Debian, Error> {
    name::suite(&debian.suite).map_err(Error::Name)?;
    if let Some(mirror) = &debian.mirror {
        name::mirror(mirror).map_err(Error::Name)?;
    }
    let mut packages = debian.packages.clone();
    for package in &packages {
        name::package(package).map_err(Error::Name)?;
    }
    packages.sort();
    packages.dedup();
    Ok(Debian {
        packages,
        suite: debian.suite.clone(),
        mirror: debian.mirror.clone(),
    })
}

pub(super) fn preflight(debian: &Debian) -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    MMDEBSTRAP.find().map_err(|source| failed(debian, source))?;
    Ok(())
}

fn failed(debian: &Debian, source: crate::tool::Error) -> Error {
    let (suite, packages) = (debian.suite.clone(), debian.packages.clone());
    Error::Debian {
        suite,
        packages,
        source,
    }
}

pub(super) fn build(
    debian: &Debian,
    scratch: &Path,
    root: &Path,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let mut installed = Installed::default();
    MMDEBSTRAP
        .run(
            scratch,
            arguments(debian, root),
            progress,
            &mut |line, progress| {
                if let Some(text) = installed.heard(line) {
                    progress.message(&text);
                }
            },
        )
        .map_err(|source| failed(debian, source))?;
    finish(root)
}

fn arguments(debian: &Debian, root: &Path) -> Vec<OsString> {
    let packages: Vec<&str> = BASE
        .iter()
        .copied()
        .chain(debian.packages.iter().map(String::as_str))
        .collect();
    let mut args: Vec<OsString> = ["--verbose", "--mode=root", "--format=directory"]
        .map(OsString::from)
        .into();
    args.push("--variant=essential".into());
    args.push(format!("--include={}", packages.join(",")).into());
    args.extend(APT.iter().map(|option| format!("--aptopt={option}").into()));
    args.extend(
        DPKG.iter()
            .map(|option| format!("--dpkgopt={option}").into()),
    );
    if Path::new(MERGED_USR).is_dir() {
        args.push(format!("--hook-dir={MERGED_USR}").into());
    }
    args.push(debian.suite.clone().into());
    args.push(root.into());
    args.extend(debian.mirror.iter().map(OsString::from));
    args
}

/// Removes what belongs to the machine that built it.
fn finish(root: &Path) -> Result<(), Error> {
    let tree = Tree::open(root).map_err(Error::Tree)?;
    for gone in [
        "var/cache/apt",
        "var/cache/debconf",
        "var/lib/apt/lists",
        "var/log/apt",
    ] {
        tree.remove(Path::new(gone)).map_err(Error::Tree)?;
    }
    for gone in [
        "var/log/dpkg.log",
        "var/log/bootstrap.log",
        "var/log/alternatives.log",
    ] {
        tree.remove(Path::new(gone)).map_err(Error::Tree)?;
    }
    let files: [(&str, &str); 4] = [
        ("etc/hostname", "forkd\n"),
        (
            "etc/hosts",
            "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
        ),
        // Written by the agent when the sandbox learns its network.
        ("etc/resolv.conf", ""),
        ("etc/machine-id", ""),
    ];
    for (path, content) in files {
        tree.write(Path::new(path), content.as_bytes(), 0o644)
            .map_err(Error::Tree)?;
    }
    let defaults = Defaults {
        env: vec![PATH.to_owned(), "LANG=C.UTF-8".to_owned()],
        workdir: "/root".to_owned(),
        user: "root".to_owned(),
        ..Defaults::default()
    };
    write_defaults(&tree, &defaults)
}

/// Turns mmdebstrap's and dpkg's output into a few lines for people.
#[derive(Default)]
struct Installed {
    unpacked: usize,
    set_up: usize,
}

/// Every how many packages there is a word.
const EVERY: usize = 20;

impl Installed {
    fn heard(&mut self, line: &str) -> Option<String> {
        if let Some(stage) = line.strip_prefix("I: ") {
            return Some(stage.trim_end_matches('.').to_owned());
        }
        if line.starts_with("Need to get ") || line.starts_with("Fetched ") {
            return Some(line.to_owned());
        }
        let count = if line.starts_with("Unpacking ") {
            &mut self.unpacked
        } else if line.starts_with("Setting up ") {
            &mut self.set_up
        } else {
            return None;
        };
        *count += 1;
        let what = if line.starts_with("Unpacking ") {
            "unpacked"
        } else {
            "set up"
        };
        count
            .is_multiple_of(EVERY)
            .then(|| format!("{what} {count} packages"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_checked_before_they_become_arguments() {
        assert!(plan(&Debian::new(["python3-numpy"])).is_ok());
        assert!(plan(&Debian::new(["--hook=x"])).is_err());
        let mut debian = Debian::new(["a1"; 0]);
        debian.suite = "--help".into();
        assert!(plan(&debian).is_err());
    }

    #[test]
    fn the_order_of_packages_does_not_matter() {
        let plan = |names: &[&str]| plan(&Debian::new(names.iter().copied())).unwrap();
        assert_eq!(plan(&["git", "curl", "git"]), plan(&["curl", "git"]));
    }

    #[test]
    fn every_word_stays_one_argument() {
        let args = arguments(
            &Debian::new(["python3-numpy", "git"]),
            Path::new("/r o o t"),
        );
        let include = args
            .iter()
            .find(|a| a.to_string_lossy().starts_with("--include"))
            .unwrap();
        assert!(include.to_string_lossy().ends_with(",python3-numpy,git"));
        assert_eq!(
            args[args.len() - 2..],
            [OsString::from("bookworm"), "/r o o t".into()]
        );
    }

    #[test]
    fn progress_is_sparse() {
        let mut installed = Installed::default();
        assert_eq!(
            installed.heard("I: extracting archives...").unwrap(),
            "extracting archives"
        );
        let said = (0..100)
            .filter_map(|_| installed.heard("Setting up x (1) ..."))
            .count();
        assert_eq!(said, 5);
    }
}
