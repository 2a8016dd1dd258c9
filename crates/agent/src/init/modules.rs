//! Loads the kernel modules that the initramfs brings, in the order its list gives.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use super::Error;
use crate::console;

const DIR: &str = "/modules";
const LIST: &str = "/modules/load.list";

/// Loads every module of the list. One that is there already, or whose device is not, is no matter.
pub(super) fn load() -> Result<(), Error> {
    let list = match std::fs::read_to_string(LIST) {
        Ok(list) => list,
        // Everything may be built into the kernel.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::step("read", LIST)(error)),
    };
    for line in list.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        load_one(line)?;
    }
    Ok(())
}

/// A line names a file, in the directory if it is no path, and may give parameters after it.
fn load_one(line: &str) -> Result<(), Error> {
    let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
    let path = Path::new(DIR).join(name);
    let text = path.to_string_lossy();
    let file = File::open(&path).map_err(Error::step("open the module", &text))?;
    let parameters = std::ffi::CString::new(parameters).unwrap_or_default();
    match finit_module(&file, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(Errno::NODEV | Errno::NXIO) => Ok(()),
        Err(error @ (Errno::NOEXEC | Errno::NOENT)) => Err(Error::step(
            "load (was it built for this kernel, and does the list name what it needs before it?)",
            &text,
        )(error)),
        Err(error) => {
            // The guest may do without it; what it cannot do without fails below, by name.
            console(&format!("cannot load {text}: {error}"));
            Ok(())
        }
    }
}
