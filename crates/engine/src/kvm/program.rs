//! Where the monitor's program is.

use std::path::{Path, PathBuf};

use crate::Error;

/// The program.
pub(super) const PROGRAM: &str = "forkd-vmm";
/// Names the program, before everything else.
const VARIABLE: &str = "FORKD_VMM";

/// Looks for the program: what `FORKD_VMM` names, beside the running executable, below its `lib`, and
/// in `PATH`.
pub(super) fn find() -> Result<PathBuf, Error> {
    if let Some(named) = std::env::var_os(VARIABLE) {
        let named = PathBuf::from(named);
        return match is_program(&named) {
            true => Ok(named),
            false => Err(missing(format!(
                "{VARIABLE} names {}, which is no program",
                named.display()
            ))),
        };
    }
    let running = std::env::current_exe().ok();
    let found = candidates(running.as_deref(), std::env::var_os("PATH").as_deref())
        .into_iter()
        .find(|path| is_program(path));
    found.ok_or_else(|| missing("it is neither beside this program nor on PATH".to_owned()))
}

fn candidates(running: Option<&Path>, path: Option<&std::ffi::OsStr>) -> Vec<PathBuf> {
    let dir = running.and_then(Path::parent);
    let up = dir.and_then(Path::parent);
    let beside = dir.map(|dir| dir.join(PROGRAM));
    // Tests run one directory below the programs.
    let above = up.map(|up| up.join(PROGRAM));
    let below = up.map(|up| up.join("lib/forkd").join(PROGRAM));
    let on_path = path.into_iter().flat_map(std::env::split_paths);
    let on_path = on_path.map(|dir| dir.join(PROGRAM));
    let near = beside.into_iter().chain(below).chain(above);
    near.chain(on_path).collect()
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn missing(problem: String) -> Error {
    Error::Program {
        program: PROGRAM.to_owned(),
        problem,
        remedy: format!(
            "run `make build` (or `make install`), name it in {VARIABLE}, or use --engine qemu"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_beside_the_program_before_the_path() {
        let found = candidates(
            Some(Path::new("/opt/forkd/bin/forkd")),
            Some("/usr/bin:/bin".as_ref()),
        );
        let expected = [
            "/opt/forkd/bin/forkd-vmm",
            "/opt/forkd/lib/forkd/forkd-vmm",
            "/opt/forkd/forkd-vmm",
            "/usr/bin/forkd-vmm",
            "/bin/forkd-vmm",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
        assert!(candidates(None, None).is_empty());
    }
}
