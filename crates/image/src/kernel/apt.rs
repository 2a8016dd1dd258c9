//! Downloads Debian's cloud kernel with apt and unpacks it, installing nothing.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};

use super::{Error, FILE_PREFIX, Material};
use crate::tool::{APT_CACHE, APT_GET, DPKG_DEB};
use crate::{Progress, name, preflight};

/// Depends on the newest cloud kernel of the release.
pub(super) const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// The package, its content and what is taken from it.
const ROOM: u64 = 400 * 1024 * 1024;

struct Package {
    name: String,
    version: String,
}

impl Package {
    fn with_version(&self) -> String {
        format!("{}={}", self.name, self.version)
    }

    fn file_name(&self) -> String {
        format!("{}_{}.deb", self.name, self.version.replace(':', "%3a"))
    }
}

pub(super) fn obtain(
    cache: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<Material, Error> {
    if APT_GET.find().is_err() || APT_CACHE.find().is_err() {
        return Err(Error::NoApt);
    }
    let meta = |source| Error::Download {
        package: META_PACKAGE.to_owned(),
        source,
    };
    DPKG_DEB.find().map_err(meta)?;
    preflight::room(scratch, ROOM).map_err(Error::Room)?;
    let package = match newest()? {
        Some(package) => package,
        None => {
            update(scratch, progress)?;
            newest()?.ok_or_else(|| Error::NoPackage {
                package: META_PACKAGE.to_owned(),
            })?
        }
    };
    let (package, deb) = match download(&package, cache, scratch, progress) {
        Ok(deb) => (package, deb),
        Err(Error::Download {
            source: crate::tool::Error::Failed { .. },
            ..
        }) => {
            // Most often the lists are older than the archive, which no longer has that version.
            update(scratch, progress)?;
            let package = newest()?.ok_or_else(|| Error::NoPackage {
                package: META_PACKAGE.to_owned(),
            })?;
            let deb = download(&package, cache, scratch, progress)?;
            (package, deb)
        }
        Err(other) => return Err(other),
    };
    unpack(&package, &deb, scratch, progress)
}

/// What the meta package of the kernel resolves to, if apt's lists know it.
fn newest() -> Result<Option<Package>, Error> {
    let Some(meta) = show(META_PACKAGE) else {
        return Ok(None);
    };
    let Some(name) = kernel_dependency(&meta) else {
        return Ok(None);
    };
    name::package(&name).map_err(Error::Name)?;
    let Some(version) = show(&name).as_deref().and_then(version) else {
        return Ok(None);
    };
    let package = Package { name, version };
    name::package(&package.with_version()).map_err(Error::Name)?;
    Ok(Some(package))
}

/// apt-cache fails for a name that it does not know, so a failure means: unknown.
fn show(package: &str) -> Option<String> {
    APT_CACHE
        .output(["show", "--no-all-versions", package])
        .ok()
        .filter(|text| !text.is_empty())
}

fn field<'a>(record: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.strip_prefix(key)?.strip_prefix(':').map(str::trim);
    record.lines().find_map(value)
}

fn version(record: &str) -> Option<String> {
    field(record, "Version").map(str::to_owned)
}

fn kernel_dependency(record: &str) -> Option<String> {
    let name = |item: &str| {
        item.split_whitespace()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let kernel = |name: &String| name.starts_with("linux-image-") && name != META_PACKAGE;
    field(record, "Depends")?.split(',').map(name).find(kernel)
}

fn update(scratch: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    progress.message("updating apt's package lists");
    let failed = |source| Error::Download {
        package: META_PACKAGE.to_owned(),
        source,
    };
    APT_GET
        .run(
            scratch,
            ["update", "-q", "-o", "Acquire::Retries=3"],
            progress,
            &mut |_, _| {},
        )
        .map_err(failed)
}

fn download(
    package: &Package,
    cache: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, Error> {
    let cached = cache.join(package.file_name());
    if cached.is_file() {
        progress.message(&format!(
            "using the downloaded {} {}",
            package.name, package.version
        ));
        return Ok(cached);
    }
    progress.message(&format!("downloading {} {}", package.name, package.version));
    let dir = scratch.join("download");
    create(&dir)?;
    let failed = |source| Error::Download {
        package: package.with_version(),
        source,
    };
    // apt checks the package against the signed lists before it keeps it.
    let args = [
        "download",
        "-q",
        "-o",
        "APT::Sandbox::User=root",
        "-o",
        "Acquire::Retries=3",
        &package.with_version(),
    ];
    APT_GET
        .run(&dir, args, progress, &mut |_, _| {})
        .map_err(failed)?;
    let downloaded =
        child(&dir, |name| name.ends_with(".deb")).ok_or_else(|| Error::Incomplete {
            package: package.with_version(),
            what: "file after its download",
        })?;
    create(cache)?;
    drop_others(cache);
    fs::rename(&downloaded, &cached).map_err(|source| Error::Io {
        path: cached.clone(),
        source,
    })?;
    Ok(cached)
}

/// Only the newest package is worth its place.
fn drop_others(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        if entry.path().extension() == Some(OsStr::new("deb")) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn unpack(
    package: &Package,
    deb: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<Material, Error> {
    progress.message(&format!("unpacking {}", package.name));
    let failed = |source| Error::Download {
        package: package.with_version(),
        source,
    };
    let dir = scratch.join("kernel-package");
    create(&dir)?;
    let args: [OsString; 3] = ["-x".into(), deb.into(), dir.clone().into()];
    if let Err(error) = DPKG_DEB.run(scratch, args, progress, &mut |_, _| {}) {
        // A damaged download must not be found again by the next attempt.
        let _ = fs::remove_file(deb);
        return Err(failed(error));
    }
    let incomplete = |what| Error::Incomplete {
        package: package.with_version(),
        what,
    };
    let kernel = child(&dir.join("boot"), |name| name.starts_with(FILE_PREFIX))
        .ok_or_else(|| incomplete("kernel image"))?;
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|at| child(&dir.join(at), |_| true))
        .ok_or_else(|| incomplete("modules"))?;
    let origin = format!("Debian {} {}", package.name, package.version);
    Ok(Material {
        kernel,
        modules,
        origin,
    })
}

fn child(dir: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(dir).ok()?;
    entries
        .flatten()
        .find(|e| e.file_name().to_str().is_some_and(&wanted))
        .map(|e| e.path())
}

fn create(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(|source| Error::Io {
        path: dir.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\nDepends: \
                        linux-base (>= 1), linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";

    #[test]
    fn the_meta_package_is_resolved() {
        let name = kernel_dependency(META);
        assert_eq!(name.as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(version(META).as_deref(), Some("6.1.192-2"));
        assert_eq!(kernel_dependency("Package: x\n"), None);
    }
}
