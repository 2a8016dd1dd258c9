//! The calls of `filesystem.Filesystem`. File systems may be slow, so each call runs on a thread of
//! its own.

use std::io;
use std::path::{Path, PathBuf};

use forkd_wire::agent::connect::{Code, MAX_MESSAGE};
use forkd_wire::agent::filesystem::{
    self, EntryResponse, FileType, ListDirRequest, ListDirResponse, MoveRequest, PathRequest,
};
use http::Request;
use hyper::body::Incoming;

use super::stat::entry;
use crate::agent::call;
use crate::rpc::{Fault, Reply};
use crate::users::{self, Names, User};

/// Entries that one listing returns at most.
const MAX_ENTRIES: usize = MAX_MESSAGE / 512;
/// Levels that one listing goes down at most.
const MAX_DEPTH: u32 = 64;

/// Serves the call at `path`, or says that there is none.
pub(crate) async fn post(path: &str, request: Request<Incoming>) -> Option<Reply> {
    let user = users::of_request(request.headers());
    let user = move || users::find(user.as_deref());
    Some(match path {
        filesystem::STAT_PATH => {
            call(request, async |r: PathRequest| {
                slow(move || stat(&user()?, &r)).await
            })
            .await
        }
        filesystem::MAKE_DIR_PATH => {
            call(request, async |r: PathRequest| {
                slow(move || make_dir(&user()?, &r)).await
            })
            .await
        }
        filesystem::MOVE_PATH => {
            call(request, async |r: MoveRequest| {
                slow(move || rename(&user()?, &r)).await
            })
            .await
        }
        filesystem::LIST_DIR_PATH => {
            call(request, async |r: ListDirRequest| {
                slow(move || list(&user()?, &r)).await
            })
            .await
        }
        filesystem::REMOVE_PATH => {
            call(request, async |r: PathRequest| {
                slow(move || remove(&user()?, &r)).await
            })
            .await
        }
        _ => return None,
    })
}

async fn slow<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Fault::new(Code::Internal, "the call failed inside the agent"))?
}

fn resolve(user: &User, path: &str) -> Result<PathBuf, Fault> {
    if path.is_empty() || path.contains('\0') {
        return Err(Fault::invalid(format!("{path:?} is no path")));
    }
    Ok(user.resolve(path))
}

fn failed<'a>(step: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Fault + 'a {
    move |error| Fault::io(step, &path.display().to_string(), &error)
}

fn respond(path: &Path) -> Result<EntryResponse, Fault> {
    Ok(EntryResponse {
        entry: entry(path, &Names::read())?,
    })
}

fn stat(user: &User, request: &PathRequest) -> Result<EntryResponse, Fault> {
    respond(&resolve(user, &request.path)?)
}

fn make_dir(user: &User, request: &PathRequest) -> Result<EntryResponse, Fault> {
    let path = resolve(user, &request.path)?;
    if path.is_dir() {
        let message = format!("{} is there already", path.display());
        return Err(Fault::new(Code::AlreadyExists, message));
    }
    make_dirs(user, &path)?;
    respond(&path)
}

/// Makes a directory and those above it; what is new belongs to `user`.
pub(super) fn make_dirs(user: &User, path: &Path) -> Result<(), Fault> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_dirs(user, parent)?;
    }
    match std::fs::create_dir(path) {
        Ok(()) => give(user, path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(failed("make the directory", path)(error)),
    }
}

/// Makes `user` the owner of what the agent has just made.
pub(super) fn give(user: &User, path: &Path) -> Result<(), Fault> {
    if user.uid == rustix::process::geteuid().as_raw() {
        return Ok(());
    }
    std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid))
        .map_err(failed("change the owner of", path))
}

fn rename(user: &User, request: &MoveRequest) -> Result<EntryResponse, Fault> {
    let source = resolve(user, &request.source)?;
    let destination = resolve(user, &request.destination)?;
    if let Some(parent) = destination.parent() {
        make_dirs(user, parent)?;
    }
    match std::fs::rename(&source, &destination) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices && source.is_file() => {
            std::fs::copy(&source, &destination).map_err(failed("copy", &source))?;
            std::fs::remove_file(&source).map_err(failed("remove", &source))?;
        }
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            return Err(Fault::new(
                Code::FailedPrecondition,
                format!(
                    "{} and {} are on different file systems; copy the directory with cp -a",
                    source.display(),
                    destination.display()
                ),
            ));
        }
        result => result.map_err(failed("move", &source))?,
    }
    respond(&destination)
}

fn remove(user: &User, request: &PathRequest) -> Result<serde_json::Value, Fault> {
    let path = resolve(user, &request.path)?;
    let found = std::fs::symlink_metadata(&path).map_err(failed("remove", &path))?;
    let result = if found.is_dir() {
        std::fs::remove_dir_all(&path)
    } else {
        std::fs::remove_file(&path)
    };
    result.map_err(failed("remove", &path))?;
    Ok(serde_json::json!({}))
}

fn list(user: &User, request: &ListDirRequest) -> Result<ListDirResponse, Fault> {
    let path = resolve(user, &request.path)?;
    let names = Names::read();
    let mut response = ListDirResponse::default();
    list_into(
        &path,
        request.depth.clamp(1, MAX_DEPTH),
        &names,
        &mut response,
    )?;
    response.entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(response)
}

fn list_into(
    dir: &Path,
    depth: u32,
    names: &Names,
    response: &mut ListDirResponse,
) -> Result<(), Fault> {
    for found in std::fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = found.map_err(failed("list", dir))?.path();
        if response.entries.len() >= MAX_ENTRIES {
            return Err(Fault::new(
                Code::ResourceExhausted,
                format!(
                    "{} holds more than {MAX_ENTRIES} entries; list less of it, or use exec",
                    dir.display()
                ),
            ));
        }
        // An entry may vanish while we look.
        let Ok(info) = entry(&path, names) else {
            continue;
        };
        let descend =
            depth > 1 && info.kind == FileType::Directory && info.symlink_target.is_none();
        response.entries.push(info);
        if descend {
            list_into(&path, depth - 1, names, response)?;
        }
    }
    Ok(())
}
