//! Writes the initramfs: the agent as `/init`, kernel modules and their load order.
//!
//! It is not compressed: unpacking it costs a software-emulated guest more than copying it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{Endianness, elf};

use crate::cpio::Archive;
use crate::modules::Module;

/// Where the guest's agent finds its modules.
pub(crate) const MODULES: &str = "modules";
/// File names in load order, one per line.
pub(crate) const LOAD_LIST: &str = "load.list";
/// Mount points, and where the root is assembled.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("newroot", 0o755),
    (MODULES, 0o755),
];

/// The initramfs cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent would not run as the guest's first program.
    #[error(
        "{path} cannot be a guest's first program: {reason}; build forkd-agent statically for \
         x86-64"
    )]
    Agent {
        /// The agent.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Reads the agent and checks that it runs where there is nothing but itself.
pub(crate) fn agent(path: &Path) -> Result<Vec<u8>, Error> {
    let content = fs::read(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })?;
    check(&content).map_err(|reason| Error::Agent {
        path: path.to_owned(),
        reason,
    })?;
    Ok(content)
}

fn check(content: &[u8]) -> Result<(), &'static str> {
    let file = ElfFile64::<Endianness>::parse(content).map_err(|_| "it is no 64-bit program")?;
    let endian = file.endian();
    if file.elf_header().e_machine(endian) != elf::EM_X86_64 {
        return Err("it is for another processor");
    }
    let segments = file.elf_program_headers();
    if segments
        .iter()
        .any(|segment| segment.p_type(endian) == elf::PT_INTERP)
    {
        return Err("it is linked dynamically");
    }
    Ok(())
}

/// Names of modules in load order, as the guest reads them.
pub(crate) fn load_list(modules: &[Module]) -> String {
    modules
        .iter()
        .map(|module| format!("{}\n", module.file_name))
        .collect()
}

/// Writes the archive. `modules` is a directory that holds the list and the files it names.
pub(crate) fn write(out: &Path, agent: &[u8], modules: &Path) -> Result<(), Error> {
    let failed = |source| Error::Io {
        path: out.to_owned(),
        source,
    };
    let read = |path: PathBuf| fs::read(&path).map_err(|source| Error::Io { path, source });
    let list = read(modules.join(LOAD_LIST))?;
    let mut files = vec![(LOAD_LIST.to_owned(), list.clone())];
    for name in String::from_utf8_lossy(&list).lines() {
        files.push((name.to_owned(), read(modules.join(name))?));
    }
    let file = File::create_new(out).map_err(failed)?;
    archive(BufWriter::new(file), agent, &files).map_err(failed)
}

fn archive<W: Write>(out: W, agent: &[u8], modules: &[(String, Vec<u8>)]) -> io::Result<()> {
    let mut archive = Archive::new(out);
    for (path, mode) in DIRECTORIES {
        archive.directory(path, *mode)?;
    }
    // The kernel opens the console for its first program before anything is mounted.
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    for (name, content) in modules {
        archive.file(&format!("{MODULES}/{name}"), 0o644, content)?;
    }
    archive.file("init", 0o755, agent)?;
    archive.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_are_agents() {
        assert_eq!(check(b"#!/bin/sh\n"), Err("it is no 64-bit program"));
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(check(&own), Err("it is linked dynamically"));
        let error = agent(Path::new("/no/such/agent")).unwrap_err();
        assert!(error.to_string().contains("/no/such/agent"));
    }

    #[test]
    fn the_archive_holds_what_the_agent_expects() {
        let modules = [
            (LOAD_LIST.to_owned(), b"a.ko\n".to_vec()),
            ("a.ko".to_owned(), b"module".to_vec()),
        ];
        let mut out = Vec::new();
        archive(&mut out, b"agent", &modules).unwrap();
        let text = String::from_utf8_lossy(&out);
        for path in [
            "newroot\0",
            "dev/console\0",
            "modules/load.list\0",
            "modules/a.ko\0",
            "init\0",
        ] {
            assert!(text.contains(path), "{path:?} is missing");
        }
    }
}
