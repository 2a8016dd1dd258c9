//! `forkd cp`: files and directories into and out of a sandbox.
//!
//! Files go through the daemon's file routes. Directories go through the guest's own `tar`, which keeps
//! modes and links and needs no round trip per file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use axum::body::Body;
use bytes::Bytes;
use forkd_wire::api::exec::{Exec, ExecExit};
use forkd_wire::api::files::FileKind;
use forkd_wire::error::ErrorCode;
use forkd_wire::id::SandboxId;
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio_util::io::ReaderStream;

use super::Context;
use crate::args::Cp;
use crate::client::Client;
use crate::client::api::each_chunk;
use crate::failure::{Failure, exit};
use crate::output;
use crate::process::{Process, Stream};
use crate::session::Session;

/// Bytes read from a file at once.
const CHUNK: usize = 128 * 1024;
/// Chunks of an archive on their way to be unpacked.
const UNPACK_QUEUE: usize = 8;
/// The most that is kept of what the guest's `tar` complains about.
const COMPLAINT_MAX: usize = 2000;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    /// Standard input or output.
    Standard,
    /// Here.
    Local(PathBuf),
    /// In a sandbox.
    Guest(SandboxId, String),
}

impl Side {
    fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Standard;
        }
        if let Some((id, path)) = text.split_once(':')
            && !path.is_empty()
            && let Ok(id) = SandboxId::new(id)
        {
            return Self::Guest(id, path.to_owned());
        }
        Self::Local(PathBuf::from(text))
    }
}

/// `forkd cp`
pub(super) async fn run(context: &Context, args: &Cp) -> Result<(), Failure> {
    let sides = (Side::parse(&args.source), Side::parse(&args.target));
    let (into, id, guest, here) = match sides {
        (Side::Guest(id, path), here @ (Side::Local(_) | Side::Standard)) => {
            (false, id, path, here)
        }
        (here @ (Side::Local(_) | Side::Standard), Side::Guest(id, path)) => (true, id, path, here),
        (Side::Guest(..), Side::Guest(..)) => {
            return Err(usage("both sides are in sandboxes")
                .with_help("pass the file on: forkd cp A:FILE - | forkd cp - B:FILE"));
        }
        _ => {
            return Err(usage("neither side is in a sandbox")
                .with_help("write one side as ID:PATH, such as sb-1a2b:/tmp/file"));
        }
    };
    let client = Session::daemon(&context.common).await?.client;
    let copy = Copy { client, id };
    let work = async {
        match (into, here) {
            (true, Side::Local(path)) if path.is_dir() => copy.directory_in(&path, &guest).await,
            (true, Side::Local(path)) => copy.file_in(&path, &guest).await,
            (true, _) => copy.write(&guest, None, tokio::io::stdin()).await,
            (false, Side::Local(path)) => copy.out(&guest, &path).await,
            (false, _) => copy.file_to(&guest, output::bytes).await,
        }
    };
    context.interrupt.guard(work).await
}

fn usage(text: &str) -> Failure {
    Failure::new(text).with_exit(exit::USAGE)
}

#[derive(Debug)]
struct Copy {
    client: Client,
    id: SandboxId,
}

impl Copy {
    async fn file_in(&self, path: &Path, guest: &str) -> Result<(), Failure> {
        let file = tokio::fs::File::open(path)
            .await
            .map_err(|error| cannot("open", path, &error))?;
        let guest = match path.file_name() {
            Some(name) if self.is_directory(guest).await? => {
                format!("{}/{}", guest.trim_end_matches('/'), name.to_string_lossy())
            }
            _ => guest.to_owned(),
        };
        let meta = file
            .metadata()
            .await
            .map_err(|error| cannot("open", path, &error))?;
        self.write(&guest, Some(meta.permissions().mode() & 0o777), file)
            .await
    }

    async fn write<R>(&self, guest: &str, mode: Option<u32>, reader: R) -> Result<(), Failure>
    where
        R: AsyncRead + Send + 'static,
    {
        let body = Body::from_stream(ReaderStream::with_capacity(reader, CHUNK));
        self.client.write_file(&self.id, guest, mode, body).await
    }

    async fn out(&self, guest: &str, path: &Path) -> Result<(), Failure> {
        let info = self.client.stat(&self.id, guest).await?;
        if info.kind == FileKind::Directory {
            return self.directory_out(guest, path).await;
        }
        let mut target = path.to_owned();
        if path.is_dir() {
            target.push(file_name(guest)?);
        }
        // Renamed when complete: an interrupted copy leaves what was there before.
        let partial = partial_name(&target)?;
        let outcome = self.file_out(guest, &partial).await.and_then(|()| {
            std::fs::rename(&partial, &target).map_err(|error| cannot("write", &target, &error))
        });
        if outcome.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        outcome
    }

    async fn file_out(&self, guest: &str, partial: &Path) -> Result<(), Failure> {
        let created = Partial::create(partial)?;
        self.file_to(guest, |data| {
            (&created.file)
                .write_all(data)
                .map_err(|error| cannot("write", partial, &error))
        })
        .await?;
        created.keep();
        Ok(())
    }

    async fn file_to(
        &self,
        guest: &str,
        write: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        each_chunk(self.client.read_file(&self.id, guest).await?, write).await
    }

    async fn is_directory(&self, guest: &str) -> Result<bool, Failure> {
        match self.client.stat(&self.id, guest).await {
            Ok(info) => Ok(info.kind == FileKind::Directory),
            Err(failure) if failure.code() == Some(ErrorCode::NotFound) => Ok(guest.ends_with('/')),
            Err(failure) => Err(failure),
        }
    }

    /// As `cp -r`: into an existing directory under its own name, else as the new name.
    async fn directory_in(&self, path: &Path, guest: &str) -> Result<(), Failure> {
        let exists = self.client.stat(&self.id, guest).await.is_ok();
        let real = path
            .canonicalize()
            .map_err(|error| cannot("open", path, &error))?;
        let target = match real.file_name() {
            Some(name) if exists => {
                format!("{}/{}", guest.trim_end_matches('/'), name.to_string_lossy())
            }
            _ => guest.to_owned(),
        };
        self.client.make_directory(&self.id, &target).await?;
        let mut process = self.tar(["-C", target.as_str(), "-xf", "-"]).await?;
        let writer = process.input().writer();
        let packing = tokio::task::spawn_blocking(move || {
            let mut archive = tar::Builder::new(io::BufWriter::with_capacity(CHUNK, writer));
            archive.follow_symlinks(false);
            archive.append_dir_all(".", &real)?;
            let mut buffer = archive.into_inner()?;
            buffer.flush()?;
            match buffer.into_inner() {
                Ok(writer) => writer.finish(),
                Err(error) => return Err(error.into_error()),
            }
            Ok(())
        });
        let mut complaint = Vec::new();
        let ended = process
            .finish(|stream, data| keep(&mut complaint, stream, data))
            .await?;
        let packed = packing.await;
        check(&ended, &complaint)?;
        match packed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(cannot("pack", path, &error)),
            Err(error) => Err(Failure::caused("packing broke off", &error)),
        }
    }

    async fn directory_out(&self, guest: &str, path: &Path) -> Result<(), Failure> {
        let target = if path.is_dir() {
            path.join(file_name(guest)?)
        } else {
            path.to_owned()
        };
        std::fs::create_dir_all(&target).map_err(|error| cannot("create", &target, &error))?;
        let mut process = self.tar(["-C", guest, "-cf", "-", "."]).await?;
        process.input().close().await;
        let (chunks, reader) = pipe();
        let into = target.clone();
        let unpacking = tokio::task::spawn_blocking(move || {
            let mut archive = tar::Archive::new(reader);
            archive.set_preserve_permissions(true);
            // The archive is the guest's: the unpacker refuses every entry that leaves the target.
            archive.unpack(into)
        });
        let mut complaint = Vec::new();
        let outcome = process
            .finish(|stream, data| match stream {
                // A closed pipe means that unpacking failed, which is told below.
                Stream::Out => tokio::task::block_in_place(|| {
                    let _ = chunks.blocking_send(Bytes::copy_from_slice(data));
                    Ok(())
                }),
                Stream::Err => keep(&mut complaint, stream, data),
            })
            .await;
        drop(chunks);
        let unpacked = unpacking.await;
        check(&outcome?, &complaint)?;
        match unpacked {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(cannot("unpack into", &target, &error)),
            Err(error) => Err(Failure::caused("unpacking broke off", &error)),
        }
    }

    async fn tar<const N: usize>(&self, args: [&str; N]) -> Result<Process, Failure> {
        let words = ["tar"].into_iter().chain(args);
        let request = Exec {
            timeout_secs: 0,
            ..Exec::new(words)
        };
        Process::start(&self.client, &self.id, request).await
    }
}

/// A file that is removed unless it is kept: also when the copy is dropped half-way by a signal.
#[derive(Debug)]
struct Partial<'a> {
    file: File,
    path: Option<&'a Path>,
}

impl<'a> Partial<'a> {
    fn create(path: &'a Path) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|error| cannot("create", path, &error))?;
        Ok(Self {
            file,
            path: Some(path),
        })
    }

    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Keeps the beginning of what the guest complains about.
fn keep(complaint: &mut Vec<u8>, stream: Stream, data: &[u8]) -> Result<(), Failure> {
    if stream == Stream::Err {
        let room = COMPLAINT_MAX.saturating_sub(complaint.len());
        complaint.extend_from_slice(&data[..data.len().min(room)]);
    }
    Ok(())
}

fn check(ended: &ExecExit, complaint: &[u8]) -> Result<(), Failure> {
    if ended.exit_code == 0 {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(complaint);
    let complaint: String = complaint
        .chars()
        .filter(|c| !c.is_control() || *c == '\n')
        .collect();
    let why = ended.error.as_deref().unwrap_or_else(|| complaint.trim());
    let failure = Failure::new(format!(
        "the guest's tar failed ({}): {why}",
        ended.exit_code
    ));
    Err(if ended.exit_code == 127 {
        failure.with_help("directories are copied with the guest's tar; install it in the image")
    } else {
        failure
    })
}

fn cannot(step: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::caused(format!("cannot {step} {}", path.display()), error)
}

fn file_name(guest: &str) -> Result<&std::ffi::OsStr, Failure> {
    Path::new(guest).file_name().ok_or_else(|| {
        usage(&format!("`{guest}` has no name of its own"))
            .with_help("name the file or directory that it is to become here")
    })
}

fn partial_name(target: &Path) -> Result<PathBuf, Failure> {
    let name = target
        .file_name()
        .ok_or_else(|| usage(&format!("`{}` is no name for a file", target.display())))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".forkd-{}", std::process::id()));
    Ok(target.with_file_name(partial))
}

/// A pipe from async code to a thread that reads.
fn pipe() -> (mpsc::Sender<Bytes>, PipeReader) {
    let (sender, receiver) = mpsc::channel(UNPACK_QUEUE);
    (
        sender,
        PipeReader {
            receiver,
            current: Bytes::new(),
        },
    )
}

#[derive(Debug)]
struct PipeReader {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(next) => self.current = next,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.current.len());
        buffer[..len].copy_from_slice(&self.current.split_to(len));
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_side(text: &str, expected: Side) {
        assert_eq!(Side::parse(text), expected, "{text}");
    }

    #[test]
    fn sides_are_told_apart() {
        let guest = |id: &str, path: &str| Side::Guest(SandboxId::new(id).unwrap(), path.into());
        check_side("-", Side::Standard);
        check_side("sb-1:/tmp/x", guest("sb-1", "/tmp/x"));
        check_side("sb-1:rel:colon", guest("sb-1", "rel:colon"));
        check_side("./a:b", Side::Local("./a:b".into()));
        check_side("/srv/a:b", Side::Local("/srv/a:b".into()));
        check_side("file", Side::Local("file".into()));
        check_side("sb-1:", Side::Local("sb-1:".into()));
    }

    #[test]
    fn a_partial_file_goes_unless_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        drop(Partial::create(&path).unwrap());
        assert!(!path.exists());
        Partial::create(&path).unwrap().keep();
        assert!(path.exists());
    }
}
