//! Which kernel modules a guest needs, with what they depend on, in the order to load them.
//!
//! Dependencies are read from the modules themselves (their `.modinfo` section), which is what
//! `depmod` does to write `modules.dep`: a freshly unpacked kernel package has no such file, and
//! an installed one may be stale.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::tool;

mod modinfo;

pub use modinfo::Info;

/// A kernel's module directory is never deeper than this.
const DEPTH_MAX: usize = 16;

/// What a guest needs. A module that the kernel has built in is left out; one that it lacks
/// altogether is refused if required.
pub const GUEST: &[Wanted] = &[
    Wanted::required("virtio_mmio"),
    Wanted::required("virtio_blk"),
    Wanted::required("erofs"),
    Wanted::required("overlay"),
    Wanted::required("virtio_console"),
    Wanted::required("virtio_net"),
    Wanted::required("vsock"),
    Wanted::required("vmw_vsock_virtio_transport"),
    Wanted::required("virtio_rng"),
    Wanted::optional("crc32c_generic"),
    Wanted::optional("vmgenid"),
];

/// A module asked for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Its name; dashes and underscores are the same.
    pub name: &'static str,
    /// Whether a kernel without it is of no use.
    pub required: bool,
}

impl Wanted {
    const fn required(name: &'static str) -> Wanted {
        Wanted {
            name,
            required: true,
        }
    }

    const fn optional(name: &'static str) -> Wanted {
        Wanted {
            name,
            required: false,
        }
    }
}

/// A module ready to be put into an initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The file name to load it by, `NAME.ko`.
    pub file_name: String,
    /// Its bytes, never compressed.
    pub content: Vec<u8>,
}

/// Finding or reading modules failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory holds no modules.
    #[error(
        "{dir} holds no kernel modules; name the directory that contains `kernel/`, like \
         /lib/modules/6.1.0-13-cloud-amd64"
    )]
    NoModules {
        /// The directory.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not a kernel module.
    #[error("{path} is not a kernel module: {reason}")]
    NotAModule {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The kernel lacks a module.
    #[error("the kernel has no module `{name}`, {needed_by}; use a kernel that has it")]
    Absent {
        /// The module.
        name: String,
        /// Who needs it.
        needed_by: String,
    },
    /// Modules depend on each other in a circle.
    #[error("the kernel module `{name}` depends on itself")]
    Circle {
        /// One of them.
        name: String,
    },
    /// Modules belong to another kernel.
    #[error("{path} is a module of kernel {found}, the kernel is {expected}")]
    OtherKernel {
        /// The module.
        path: PathBuf,
        /// Its kernel.
        found: String,
        /// Our kernel.
        expected: String,
    },
    /// Decompression needs a tool that failed.
    #[error("cannot decompress {path}")]
    Decompress {
        /// The module.
        path: PathBuf,
        /// Why.
        #[source]
        source: tool::Error,
    },
}

/// All modules of one kernel.
#[derive(Debug)]
pub struct Catalog {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// What a kernel has under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Builtin,
    Module(Info),
    Absent,
}

impl Catalog {
    /// Lists a directory such as `/lib/modules/6.1.0-13-cloud-amd64`.
    pub fn open(dir: &Path) -> Result<Catalog, Error> {
        let mut files = BTreeMap::new();
        list(dir, 0, &mut files)?;
        let builtin_list = dir.join("modules.builtin");
        let builtin = match fs::read_to_string(&builtin_list) {
            Ok(text) => text
                .lines()
                .filter_map(|l| module_name(Path::new(l)))
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeSet::new(),
            Err(source) => {
                return Err(Error::Read {
                    path: builtin_list,
                    source,
                });
            }
        };
        if files.is_empty() && builtin.is_empty() {
            return Err(Error::NoModules {
                dir: dir.to_owned(),
            });
        }
        Ok(Catalog { files, builtin })
    }

    /// The wanted modules and all they depend on, in load order, read and decompressed.
    /// `release` is the kernel's (`uname -r`), against which every module is checked.
    pub fn resolve(
        &self,
        wanted: &[Wanted],
        extra: &[String],
        release: &str,
    ) -> Result<Vec<Module>, Error> {
        let mut contents = BTreeMap::new();
        let mut lookup = |name: &str| self.lookup(name, release, &mut contents);
        let names = wanted.iter().map(|w| (w.name, w.required));
        let names: Vec<_> = names
            .chain(extra.iter().map(|n| (n.as_str(), true)))
            .collect();
        let order = closure(&names, &mut lookup)?;
        let module = |name: String| {
            let content = contents.remove(&name).unwrap_or_default();
            Module {
                file_name: format!("{name}.ko"),
                content,
                name,
            }
        };
        Ok(order.into_iter().map(module).collect())
    }

    fn lookup(
        &self,
        name: &str,
        release: &str,
        contents: &mut BTreeMap<String, Vec<u8>>,
    ) -> Result<Found, Error> {
        let Some(path) = self.files.get(name) else {
            let builtin = self.builtin.contains(name);
            return Ok(if builtin {
                Found::Builtin
            } else {
                Found::Absent
            });
        };
        let content = modinfo::read(path)?;
        let info = modinfo::parse(&content).map_err(|reason| Error::NotAModule {
            path: path.clone(),
            reason,
        })?;
        if info.release != release {
            return Err(Error::OtherKernel {
                path: path.clone(),
                found: info.release,
                expected: release.to_owned(),
            });
        }
        contents.insert(name.to_owned(), content);
        Ok(Found::Module(info))
    }
}

/// Orders modules so that each comes after all it depends on.
pub(crate) fn closure(
    wanted: &[(&str, bool)],
    lookup: &mut dyn FnMut(&str) -> Result<Found, Error>,
) -> Result<Vec<String>, Error> {
    let mut order = Order {
        lookup,
        state: BTreeMap::new(),
        done: Vec::new(),
    };
    for (name, required) in wanted {
        order.visit(&normal(name), *required, "which every guest needs")?;
    }
    Ok(order.done)
}

struct Order<'a> {
    lookup: &'a mut dyn FnMut(&str) -> Result<Found, Error>,
    /// `false` while a module's dependencies are being visited, `true` once it is placed.
    state: BTreeMap<String, bool>,
    done: Vec<String>,
}

impl Order<'_> {
    fn visit(&mut self, name: &str, required: bool, needed_by: &str) -> Result<(), Error> {
        match self.state.get(name) {
            Some(true) => return Ok(()),
            Some(false) => {
                return Err(Error::Circle {
                    name: name.to_owned(),
                });
            }
            None => {}
        }
        let info = match (self.lookup)(name)? {
            Found::Module(info) => info,
            Found::Absent if required => {
                let (name, needed_by) = (name.to_owned(), needed_by.to_owned());
                return Err(Error::Absent { name, needed_by });
            }
            Found::Builtin | Found::Absent => {
                self.state.insert(name.to_owned(), true);
                return Ok(());
            }
        };
        self.state.insert(name.to_owned(), false);
        let needed_by = format!("on which `{name}` depends");
        for dependency in &info.soft {
            // Soft dependencies may name an alias, or nothing this kernel has: a hint only.
            self.visit(&normal(dependency), false, &needed_by)?;
        }
        for dependency in &info.depends {
            self.visit(&normal(dependency), true, &needed_by)?;
        }
        self.state.insert(name.to_owned(), true);
        self.done.push(name.to_owned());
        Ok(())
    }
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// `virtio_rng` for `kernel/drivers/char/hw_random/virtio-rng.ko.xz`; nothing for other files.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|e| name.strip_suffix(e))?;
    (!stem.is_empty()).then(|| normal(stem))
}

fn list(dir: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    let failed = |source| Error::Read {
        path: dir.to_owned(),
        source,
    };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Does not follow links, so `build` and `source` do not lead out of here.
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() && depth < DEPTH_MAX {
            list(&entry.path(), depth + 1, files)?;
        } else if kind.is_file()
            && let Some(name) = module_name(&entry.path())
        {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
