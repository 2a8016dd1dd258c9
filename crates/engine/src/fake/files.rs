//! Files of a fake guest: a map from path to bytes. Directories exist where files are below them, or where one was
//! made: as an entry whose path ends in a slash.

use std::sync::Arc;

use bytes::Bytes;
use forkd_wire::agent::ConnectError;
use forkd_wire::agent::connect::Code;
use forkd_wire::agent::filesystem::{
    EntryInfo, EntryResponse, FileType, ListDirRequest, ListDirResponse, MoveRequest, PathRequest,
    WrittenFile,
};

use super::agent::{Answer, full, json, respond};
use super::guest::{Content, Guest, State};

/// Where relative paths begin.
const HOME: &str = "/root";

fn absolute(path: &str) -> String {
    let path = path.trim_end_matches('/');
    match path.starts_with('/') || path.is_empty() {
        true => path.to_owned(),
        false => format!("{HOME}/{path}"),
    }
}

/// The `path` of a query string.
fn path_of(query: &str) -> Result<String, ConnectError> {
    let found = query.split('&').find_map(|pair| pair.strip_prefix("path="));
    let found = found.filter(|path| !path.is_empty());
    let missing = || ConnectError::new(Code::InvalidArgument, "no path was given");
    Ok(absolute(&unescape(found.ok_or_else(missing)?)))
}

fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let hex = bytes.get(at + 1..at + 3).filter(|_| byte == b'%');
        let hex = hex.and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(escaped) => {
                out.push(escaped);
                at += 3;
            }
            None => {
                out.push(if byte == b'+' { b' ' } else { byte });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn missing(path: &str) -> ConnectError {
    ConnectError::new(Code::NotFound, format!("{path} does not exist"))
}

pub(super) fn read(guest: &Guest, query: &str) -> Answer {
    let path = path_of(query)?;
    let content = guest.state().files.get(&path).cloned();
    let content = content.ok_or_else(|| missing(&path))?;
    let bytes = Bytes::copy_from_slice(&content.0);
    Ok(respond(200, "application/octet-stream", full(bytes)))
}

pub(super) fn write(guest: &Guest, query: &str, body: &Bytes) -> Answer {
    let path = path_of(query)?;
    let content = Content(Arc::new(body.to_vec()));
    guest.state().files.insert(path.clone(), content);
    json(&[WrittenFile {
        name: name_of(&path),
        path,
        kind: "file".to_owned(),
    }])
}

fn name_of(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).to_owned()
}

fn entry(path: &str, size: Option<usize>) -> EntryInfo {
    let (kind, mode, permissions) = match size {
        Some(_) => (FileType::File, 0o644, "-rw-r--r--"),
        None => (FileType::Directory, 0o755, "drwxr-xr-x"),
    };
    EntryInfo {
        name: name_of(path),
        kind,
        path: path.to_owned(),
        size: size.unwrap_or(0) as i64,
        mode,
        permissions: permissions.to_owned(),
        owner: "root".to_owned(),
        group: "root".to_owned(),
        modified_time: "1970-01-01T00:00:00Z".to_owned(),
        symlink_target: None,
    }
}

fn find(state: &State, path: &str) -> Option<EntryInfo> {
    if let Some(content) = state.files.get(path) {
        return Some(entry(path, Some(content.0.len())));
    }
    let below = format!("{path}/");
    let is_directory = state.files.keys().any(|file| file.starts_with(&below));
    (is_directory || path.is_empty()).then(|| entry(path, None))
}

pub(super) fn stat(guest: &Guest, request: &PathRequest) -> Answer {
    let path = absolute(&request.path);
    let entry = find(&guest.state(), &path).ok_or_else(|| missing(&path))?;
    json(&EntryResponse { entry })
}

pub(super) fn list(guest: &Guest, request: &ListDirRequest) -> Answer {
    let path = absolute(&request.path);
    let state = guest.state();
    find(&state, &path).ok_or_else(|| missing(&path))?;
    let below = format!("{path}/");
    let mut names: Vec<String> = state
        .files
        .keys()
        .filter_map(|file| file.strip_prefix(&below))
        .filter_map(|rest| rest.split('/').next())
        .filter(|name| !name.is_empty())
        .map(|name| format!("{below}{name}"))
        .collect();
    names.dedup();
    let entries = names.iter().filter_map(|path| find(&state, path)).collect();
    json(&ListDirResponse { entries })
}

pub(super) fn make_dir(guest: &Guest, request: &PathRequest) -> Answer {
    let path = absolute(&request.path);
    let mut state = guest.state();
    if find(&state, &path).is_some() {
        let text = format!("{path} exists");
        return Err(ConnectError::new(Code::AlreadyExists, text));
    }
    let empty = Content(Arc::default());
    state.files.insert(format!("{path}/"), empty);
    json(&EntryResponse {
        entry: entry(&path, None),
    })
}

pub(super) fn rename(guest: &Guest, request: &MoveRequest) -> Answer {
    let (from, to) = (absolute(&request.source), absolute(&request.destination));
    let mut state = guest.state();
    find(&state, &from).ok_or_else(|| missing(&from))?;
    let below = format!("{from}/");
    if from.is_empty() || to.is_empty() || to == from || to.starts_with(&below) {
        let text = format!("{from} cannot become {to}");
        return Err(ConnectError::new(Code::InvalidArgument, text));
    }
    let all = std::mem::take(&mut state.files);
    let moved = all.into_iter().map(|(path, content)| {
        let rest = path.strip_prefix(&from);
        match rest.filter(|rest| rest.is_empty() || rest.starts_with('/')) {
            Some(rest) => (format!("{to}{rest}"), content),
            None => (path, content),
        }
    });
    state.files = moved.collect();
    let entry = find(&state, &to).ok_or_else(|| missing(&to))?;
    json(&EntryResponse { entry })
}

pub(super) fn remove(guest: &Guest, request: &PathRequest) -> Answer {
    let path = absolute(&request.path);
    let below = format!("{path}/");
    let mut state = guest.state();
    find(&state, &path).ok_or_else(|| missing(&path))?;
    state
        .files
        .retain(|file, _| *file != path && !file.starts_with(&below));
    json(&serde_json::json!({}))
}
