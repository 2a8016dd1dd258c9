//! Whole files, up and down, as streams.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use forkd_wire::agent::connect::Code;
use forkd_wire::agent::filesystem::WrittenFile;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use super::multipart::{Form, Item};
use super::service::{give, make_dirs};
use crate::rpc::{self, Fault, Reply};
use crate::users::{self, User};

/// Bytes read at once.
const CHUNK: usize = 64 << 10;
/// Files written by one form.
const MAX_PARTS: usize = 1000;

/// What the query of a request says.
#[derive(Debug, Default)]
struct Query {
    path: Option<String>,
    user: Option<String>,
    mode: Option<u32>,
}

/// How a failed transfer is answered: the status says it, the body in E2B's form.
fn failed(fault: &Fault) -> Reply {
    let code = match fault.code {
        Code::ResourceExhausted => 507,
        code => code.status(),
    };
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    rpc::json(
        status,
        &serde_json::json!({ "code": code, "message": fault.message }),
    )
}

/// `GET /files`.
pub(crate) fn download(request: &Request<Incoming>) -> Reply {
    match open(request) {
        Err(fault) => failed(&fault),
        Ok((file, len)) => {
            let head = request.method() == Method::HEAD;
            let left = len.filter(|_| !head);
            let body = if head {
                rpc::full("")
            } else {
                FileBody { file, left }.boxed_unsync()
            };
            let mut reply = rpc::reply(StatusCode::OK, "application/octet-stream", body);
            if let Some(len) = len {
                reply.headers_mut().insert(CONTENT_LENGTH, len.into());
            }
            reply
        }
    }
}

fn open(request: &Request<Incoming>) -> Result<(File, Option<u64>), Fault> {
    let query = query(request)?;
    let user = user(request, &query)?;
    let path = user.resolve(query.path.as_deref().ok_or_else(no_path)?);
    let name = path.display().to_string();
    let wrong = |error| Fault::io("read", &name, &error);
    // A pipe without a writer must not hold up the agent.
    let mut options = File::options();
    let mut file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .map_err(wrong)?;
    let metadata = file.metadata().map_err(wrong)?;
    if !metadata.is_file() {
        let what = if metadata.is_dir() {
            "a directory"
        } else {
            "no regular file"
        };
        return Err(Fault::invalid(format!(
            "{name} is {what}; only files can be read"
        )));
    }
    // Files of /proc and /sys say that they are empty, and are not.
    let len = match metadata.len() {
        0 => None,
        len => Some(len),
    };
    let _ = file.seek(SeekFrom::Start(0));
    Ok((file, len))
}

/// A file's bytes; exactly `left` of them, if that is known.
#[derive(Debug)]
struct FileBody {
    file: File,
    left: Option<u64>,
}

impl HttpBody for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        let size = this.left.map_or(CHUNK, |left| {
            CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))
        });
        if size == 0 {
            return Poll::Ready(None);
        }
        let mut chunk = vec![0; size];
        match this.file.read(&mut chunk) {
            // It was cut short while we read it; the announced length cannot be kept.
            Ok(0) if this.left.is_some() => {
                Poll::Ready(Some(Err(io::ErrorKind::UnexpectedEof.into())))
            }
            Ok(0) => Poll::Ready(None),
            Ok(read) => {
                chunk.truncate(read);
                this.left = this.left.map(|left| left - read as u64);
                Poll::Ready(Some(Ok(Frame::data(chunk.into()))))
            }
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

/// `POST /files`.
pub(crate) async fn upload(request: Request<Incoming>) -> Reply {
    match write(request).await {
        Ok(written) => rpc::json(StatusCode::OK, &written),
        Err(fault) => failed(&fault),
    }
}

async fn write(request: Request<Incoming>) -> Result<Vec<WrittenFile>, Fault> {
    let query = query(&request)?;
    let user = user(&request, &query)?;
    let content_type = request
        .headers()
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let form = content_type
        .and_then(Form::boundary)
        .map(|boundary| Form::new(&boundary));
    let body = request.into_body();
    match form {
        Some(form) => write_form(form, body, &user, &query).await,
        None => {
            let path = user.resolve(query.path.as_deref().ok_or_else(no_path)?);
            let mut target = Target::create(&user, path, query.mode)?;
            each_chunk(body, |bytes| target.write(bytes)).await?;
            Ok(vec![target.done()])
        }
    }
}

async fn write_form(
    mut form: Form,
    body: Incoming,
    user: &User,
    query: &Query,
) -> Result<Vec<WrittenFile>, Fault> {
    let mut written = Vec::new();
    let mut target: Option<Target> = None;
    let broken = |error: super::multipart::Error| Fault::invalid(error.to_string());
    each_chunk(body, |bytes| {
        form.push(bytes);
        while let Some(item) = form.next().map_err(broken)? {
            match item {
                Item::Part(name) => {
                    written.extend(target.take().map(Target::done));
                    if written.len() >= MAX_PARTS {
                        return Err(Fault::invalid(format!(
                            "more than {MAX_PARTS} files at once"
                        )));
                    }
                    let path = query.path.clone().or(name).ok_or_else(no_path)?;
                    target = Some(Target::create(user, user.resolve(&path), query.mode)?);
                }
                Item::Data(bytes) => {
                    if let Some(target) = &mut target {
                        target.write(&bytes)?;
                    }
                }
                Item::End => break,
            }
        }
        Ok(())
    })
    .await?;
    form.finish().map_err(broken)?;
    written.extend(target.take().map(Target::done));
    Ok(written)
}

async fn each_chunk(
    mut body: Incoming,
    mut take: impl FnMut(&[u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    while let Some(frame) = body.frame().await {
        let frame = frame
            .map_err(|error| Fault::new(Code::Canceled, format!("the upload broke: {error}")))?;
        if let Ok(data) = frame.into_data() {
            take(&data)?;
        }
    }
    Ok(())
}

/// A file being written.
#[derive(Debug)]
struct Target {
    file: File,
    path: PathBuf,
}

impl Target {
    fn create(user: &User, path: PathBuf, mode: Option<u32>) -> Result<Self, Fault> {
        let name = path.display().to_string();
        let wrong = |error| Fault::io("write", &name, &error);
        if path.is_dir() {
            return Err(Fault::invalid(format!(
                "{name} is a directory; name a file in it"
            )));
        }
        if let Some(parent) = path.parent() {
            make_dirs(user, parent)?;
        }
        let new = !path.exists();
        let mut options = File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(wrong)?;
        if new {
            give(user, &path)?;
        }
        if let Some(mode) = mode {
            file.set_permissions(PermissionsExt::from_mode(mode))
                .map_err(wrong)?;
        }
        Ok(Self { file, path })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.file
            .write_all(bytes)
            .map_err(|error| Fault::io("write", &self.path.display().to_string(), &error))
    }

    fn done(self) -> WrittenFile {
        let name = self
            .path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        WrittenFile {
            path: lossy(&self.path),
            name,
            kind: "file".to_owned(),
        }
    }
}

fn lossy(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn no_path() -> Fault {
    Fault::invalid("the path is missing; name the file with ?path=")
}

fn user(request: &Request<Incoming>, query: &Query) -> Result<User, Fault> {
    let name = query
        .user
        .clone()
        .or_else(|| users::of_request(request.headers()));
    users::find(name.as_deref())
}

fn query(request: &Request<Incoming>) -> Result<Query, Fault> {
    let mut query = Query::default();
    for pair in request.uri().query().unwrap_or("").split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = unescape(value)
            .filter(|value| !value.contains('\0'))
            .ok_or_else(|| Fault::invalid(format!("the query's {name} is not URL-encoded text")))?;
        match name {
            "path" if !value.is_empty() => query.path = Some(value),
            "username" if !value.is_empty() => query.user = Some(value),
            "mode" if !value.is_empty() => {
                let mode = u32::from_str_radix(&value, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777);
                let wrong = || Fault::invalid(format!("{value:?} is no octal file mode"));
                query.mode = Some(mode.ok_or_else(wrong)?);
            }
            _ => {}
        }
    }
    Ok(query)
}

/// Undoes URL encoding, with `+` for a space, as forms have it.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(rest.next()?)? * 16 + digit(rest.next()?)?;
                u8::try_from(value).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_decoded() {
        assert_eq!(unescape("a%20b+c%2F%c3%a4").as_deref(), Some("a b c/ä"));
        assert_eq!(unescape("%2"), None);
        assert_eq!(unescape("%zz"), None);
        assert_eq!(unescape("%ff"), None);
    }
}
