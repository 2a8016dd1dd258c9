//! Running host programs: output kept for the error, the program named.

use std::path::PathBuf;
use std::process::{Command, Stdio};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("could not start {program}; {remedy}")]
    Start {
        program: String,
        remedy: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("{program} failed with {status}:\n{stderr}")]
    Failed {
        program: String,
        status: std::process::ExitStatus,
        stderr: String,
    },
    #[error("could not use {path}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

/// Runs a program to its end and returns what it wrote to stdout.
pub(crate) fn run(command: &mut Command, remedy: &'static str) -> Result<Vec<u8>, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start {
            program: program.clone(),
            remedy,
            source,
        })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let tail: Vec<&str> = stderr.lines().rev().take(30).collect();
        let stderr = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        return Err(Error::Failed {
            program,
            status: output.status,
            stderr,
        });
    }
    Ok(output.stdout)
}
